//! Turns prompts into token ids as CLIP text encoders expect them, and (see [`T5Tokenizer`]) T5 encoders.
//!
//! Owns reading a tokenizer folder (`tokenizer.json`, or `vocab.json` with `merges.txt`) and the rules
//! around it: begin and end marks, padding, truncation. Encoding ids into embeddings is left to the
//! models, and how several encoders are combined to the pipelines.

mod t5;
pub mod weighting;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde_json::{Map, Value, json};
use tokenizers::{AddedToken, Tokenizer};

pub use self::t5::T5Tokenizer;
use crate::{Error, Result};

/// Splits cleaned text into words, numbers and runs of punctuation (CLIP's `bpe_simple_tokenizer`).
const WORD_PATTERN: &str =
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// The sequence length when neither the tokenizer nor the text encoder says one.
const DEFAULT_LENGTH: usize = 77;

/// The parsed files of a tokenizer folder; those that are not there are `None`.
#[derive(Clone, Debug, Default)]
pub struct TokenizerFiles {
    /// Where they come from, for messages.
    pub place: PathBuf,
    /// `tokenizer.json`.
    pub tokenizer: Option<Value>,
    /// `vocab.json`: token to id.
    pub vocab: Option<Value>,
    /// `merges.txt`: one merge a line, best first.
    pub merges: Option<String>,
    /// `tokenizer_config.json`.
    pub config: Option<Value>,
    /// `special_tokens_map.json`.
    pub special_tokens_map: Option<Value>,
}

/// One prompt as token ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tokens {
    /// Text with its marks and padding: always as many as the encoder reads.
    pub ids: Vec<u32>,
    /// The end of the prompt that did not fit, as the user wrote it.
    pub lost: Option<String>,
}

/// A byte-level BPE tokenizer as CLIP's text encoders use it.
#[derive(Clone, Debug)]
pub struct ClipTokenizer {
    tokenizer: Tokenizer,
    begin: u32,
    end: u32,
    pad: u32,
    max_length: usize,
    /// Learned words that stand for more than one vector: the first id, and how many follow each other from there.
    learned: BTreeMap<u32, u32>,
}

impl ClipTokenizer {
    /// A tokenizer from its files. Normalisation and word splitting are always CLIP's own, whatever
    /// `tokenizer.json` says: NFC, white space to single blanks, lower case.
    pub fn new(files: &TokenizerFiles) -> Result<Self> {
        let specials = SpecialTokens::new(files);
        let mut built = json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "normalizer": { "type": "Sequence", "normalizers": [
                { "type": "NFC" },
                { "type": "Replace", "pattern": { "Regex": r"\s+" }, "content": " " },
                { "type": "Lowercase" },
            ]},
            "pre_tokenizer": { "type": "Sequence", "pretokenizers": [
                { "type": "Split", "pattern": { "Regex": WORD_PATTERN }, "behavior": "Removed", "invert": true },
                { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true },
            ]},
            "post_processor": null,
            "decoder": null,
        });
        let (vocab, merges) = vocabulary(files)?;
        built["added_tokens"] = specials.added(&vocab, files)?;
        built["model"] = json!({
            "type": "BPE", "dropout": null, "unk_token": specials.unknown,
            "continuing_subword_prefix": "", "end_of_word_suffix": "</w>",
            "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": merges,
        });
        let tokenizer: Tokenizer = serde_json::from_value(built).map_err(|error| bad(files, &error.to_string()))?;
        let id = |token: &str| {
            tokenizer.token_to_id(token).ok_or_else(|| bad(files, &format!("the vocabulary has no token `{token}`")))
        };
        let (begin, end, pad) = (id(&specials.begin)?, id(&specials.end)?, id(&specials.pad)?);
        Ok(Self { begin, end, pad, max_length: max_length(files), tokenizer, learned: BTreeMap::new() })
    }

    /// How many ids every prompt becomes.
    pub fn max_length(&self) -> usize {
        self.max_length
    }

    /// Adds a word that stands for `vectors` embeddings and returns its first id: the end of the vocabulary. The
    /// further ones are called `word_1`, `word_2` and so on, and follow the first wherever the word stands.
    pub fn learn(&mut self, word: &str, vectors: usize) -> Result<u32> {
        let refuse = |reason: String| Error::Argument { name: "textual_inversions".into(), reason };
        let name = |i: usize| if i == 0 { word.to_owned() } else { format!("{word}_{i}") };
        if let Some(known) = (0..vectors).map(name).find(|name| self.tokenizer.token_to_id(name).is_some()) {
            return Err(refuse(format!("`{known}` is a word of the tokenizer already; choose another `token`")));
        }
        let tokens: Vec<AddedToken> = (0..vectors).map(|i| AddedToken::from(name(i), false)).collect();
        self.tokenizer.add_tokens(tokens).map_err(|error| refuse(format!("`{word}` cannot be added: {error}")))?;
        let first = self.tokenizer.token_to_id(word);
        let first = first.ok_or_else(|| refuse(format!("`{word}` cannot be added; choose another `token`")))?;
        self.learned.insert(first, vectors as u32);
        Ok(first)
    }

    /// The ids of `text`. Text that does not fit is cut off before the end mark and reported.
    pub fn encode(&self, text: &str) -> Result<Tokens> {
        let spread = self.spread(text)?;
        let room = self.room();
        let lost = spread.get(room).map(|&(_, start)| text.get(start..).unwrap_or(text).trim().to_owned());
        let kept: Vec<u32> = spread.iter().take(room).map(|&(id, _)| id).collect();
        Ok(Tokens { ids: self.framed(&kept), lost })
    }

    /// The ids of `text` alone: no marks, no padding, nothing cut off.
    pub fn ids(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.spread(text)?.into_iter().map(|(id, _)| id).collect())
    }

    /// How many ids have room between the marks.
    pub fn room(&self) -> usize {
        self.max_length.saturating_sub(2)
    }

    /// Begin mark, `ids` (at most [`Self::room`] of them), end mark and padding.
    pub fn framed(&self, ids: &[u32]) -> Vec<u32> {
        let mut framed = Vec::with_capacity(self.max_length);
        framed.push(self.begin);
        framed.extend_from_slice(ids);
        framed.push(self.end);
        framed.resize(self.max_length, self.pad);
        framed
    }

    /// The ids of `text` with the byte each begins at; a learned word is all of its ids.
    fn spread(&self, text: &str) -> Result<Vec<(u32, usize)>> {
        let encoding = self.tokenizer.encode(text, false).map_err(|error| Error::Argument {
            name: "prompt".into(),
            reason: format!("cannot be tokenized: {error}"),
        })?;
        let found = encoding.get_ids().iter().zip(encoding.get_offsets());
        let spread = found.flat_map(|(&id, &(start, _))| {
            let count = self.learned.get(&id).copied().unwrap_or(1);
            (id..id + count).map(move |id| (id, start))
        });
        Ok(spread.collect())
    }
}

/// The tokens with a meaning of their own.
struct SpecialTokens {
    begin: String,
    end: String,
    pad: String,
    unknown: String,
}

impl SpecialTokens {
    fn new(files: &TokenizerFiles) -> Self {
        let named = |key: &str| {
            [&files.config, &files.special_tokens_map].into_iter().flatten().find_map(|map| token_text(map.get(key)?))
        };
        let end = named("eos_token").unwrap_or_else(|| "<|endoftext|>".into());
        Self {
            begin: named("bos_token").unwrap_or_else(|| "<|startoftext|>".into()),
            pad: named("pad_token").unwrap_or_else(|| end.clone()),
            unknown: named("unk_token").unwrap_or_else(|| end.clone()),
            end,
        }
    }

    /// The `added_tokens` list: what the files declare, and every special token, because a special
    /// token is found in a prompt before the text is split (SDXL's second tokenizer pads with `!`).
    fn added(&self, vocab: &Map<String, Value>, files: &TokenizerFiles) -> Result<Value> {
        let mut added: Vec<Value> = Vec::new();
        for mut token in declared_tokens(files).chain(self.plain()) {
            let Some(content) = token.get("content").and_then(Value::as_str).map(str::to_owned) else {
                return Err(bad(files, "a token in `added_tokens` has no `content`"));
            };
            if added.iter().any(|other| other["content"] == content.as_str()) {
                continue;
            }
            for flag in ["single_word", "lstrip", "rstrip", "normalized"] {
                token.entry(flag).or_insert(Value::Bool(false));
            }
            token.entry("special").or_insert(Value::Bool(true));
            if let Some(id) = vocab.get(&content).or_else(|| token.get("id")).cloned() {
                token.insert("id".into(), id);
                added.push(Value::Object(token));
            }
        }
        added.sort_by_key(|token| token["id"].as_u64());
        Ok(Value::Array(added))
    }

    fn plain(&self) -> impl Iterator<Item = Map<String, Value>> {
        [&self.begin, &self.end, &self.pad, &self.unknown]
            .into_iter()
            .map(|content| Map::from_iter([("content".to_owned(), Value::String(content.clone()))]))
    }
}

/// Tokens listed in `tokenizer.json` and, keyed by id, in `tokenizer_config.json`.
fn declared_tokens(files: &TokenizerFiles) -> impl Iterator<Item = Map<String, Value>> {
    let listed = files.tokenizer.iter().filter_map(|file| file.get("added_tokens")?.as_array()).flatten();
    let keyed = files.config.iter().filter_map(|file| file.get("added_tokens_decoder")?.as_object()).flatten();
    let keyed = keyed.filter_map(|(id, token)| {
        let mut token = token.as_object()?.clone();
        token.insert("id".into(), id.parse::<u64>().ok()?.into());
        Some(token)
    });
    listed.filter_map(|token| token.as_object().cloned()).chain(keyed)
}

/// A special token is written as text, or as an object with `content`.
fn token_text(value: &Value) -> Option<String> {
    value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
}

/// Vocabulary and merges, from `vocab.json` and `merges.txt` or from inside `tokenizer.json`.
fn vocabulary(files: &TokenizerFiles) -> Result<(Map<String, Value>, Value)> {
    if let (Some(Value::Object(vocab)), Some(merges)) = (&files.vocab, &files.merges) {
        let lines = merges.lines().filter(|line| !line.starts_with("#version") && !line.trim().is_empty());
        return Ok((vocab.clone(), lines.map(|line| Value::String(line.trim().into())).collect()));
    }
    let model = files.tokenizer.as_ref().and_then(|file| file.get("model"));
    let Some(model) = model else {
        return Err(bad(files, "holds neither `tokenizer.json` nor `vocab.json` with `merges.txt`"));
    };
    match (model.get("vocab"), model.get("merges")) {
        (Some(Value::Object(vocab)), Some(merges @ Value::Array(_))) => Ok((vocab.clone(), merges.clone())),
        _ => Err(bad(files, "is not a CLIP tokenizer: its model has no BPE vocabulary and merges")),
    }
}

/// `model_max_length`, unless it is missing or one of the huge numbers that stand for "none".
fn max_length(files: &TokenizerFiles) -> usize {
    let declared = files.config.as_ref().and_then(|config| config.get("model_max_length")?.as_u64());
    declared.filter(|&length| (2..1_000_000).contains(&length)).map_or(DEFAULT_LENGTH, |length| length as usize)
}

fn bad(files: &TokenizerFiles, reason: &str) -> Error {
    let place: &Path = &files.place;
    Error::BadFile { path: place.into(), reason: format!("{reason}; fetch the tokenizer folder again") }
}
