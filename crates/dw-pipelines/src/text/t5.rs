//! Turns prompts into token ids as T5 text encoders expect them: the text, an end mark, padding.

use tokenizers::Tokenizer;

use super::{TokenizerFiles, Tokens, bad, token_text};
use crate::{Error, Result};

/// A T5 tokenizer (SentencePiece, unigram), as `tokenizer.json` describes it.
#[derive(Clone, Debug)]
pub struct T5Tokenizer {
    tokenizer: Tokenizer,
    end: u32,
    pad: u32,
}

impl T5Tokenizer {
    /// A tokenizer from its files, of which `tokenizer.json` must be there.
    pub fn new(files: &TokenizerFiles) -> Result<Self> {
        let Some(json) = &files.tokenizer else {
            return Err(bad(
                files,
                "holds no `tokenizer.json`, and a `spiece.model` alone is not read; take `tokenizer.json` from a model \
                 with the same text encoder",
            ));
        };
        let mut json = json.clone();
        for cut in ["truncation", "padding", "post_processor"] {
            json[cut] = serde_json::Value::Null;
        }
        if json.pointer("/model/type").and_then(serde_json::Value::as_str) != Some("Unigram") {
            return Err(bad(files, "is not a T5 tokenizer: its model is no unigram vocabulary"));
        }
        let tokenizer: Tokenizer = serde_json::from_value(json).map_err(|error| bad(files, &error.to_string()))?;
        let id = |key: &str, usual: &str| {
            let maps = [&files.config, &files.special_tokens_map].into_iter().flatten();
            let named = maps.into_iter().find_map(|map| token_text(map.get(key)?));
            let token = named.as_deref().unwrap_or(usual);
            tokenizer.token_to_id(token).ok_or_else(|| bad(files, &format!("the vocabulary has no token `{token}`")))
        };
        let (end, pad) = (id("eos_token", "</s>")?, id("pad_token", "<pad>")?);
        Ok(Self { tokenizer, end, pad })
    }

    /// The ids of `text`, an end mark and padding: `length` in all. Text that does not fit is cut off before the end
    /// mark and reported.
    pub fn encode(&self, text: &str, length: usize) -> Result<Tokens> {
        let encoding = self.tokenized(text)?;
        let ids = encoding.get_ids();
        let room = length.saturating_sub(1);
        // The normaliser moves text about, so what was lost is put together from the tokens.
        let lost = ids.get(room..).filter(|lost| !lost.is_empty()).map(|lost| self.text_of(lost)).transpose()?;
        Ok(Tokens { ids: self.framed(ids.get(..room).unwrap_or(ids), length), lost })
    }

    /// The ids of `text` alone: no mark, no padding, nothing cut off.
    pub fn ids(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.tokenized(text)?.get_ids().to_vec())
    }

    /// `ids` (as many as fit), the end mark and padding.
    pub fn framed(&self, ids: &[u32], length: usize) -> Vec<u32> {
        let mut framed: Vec<u32> = ids.iter().copied().take(length.saturating_sub(1)).collect();
        framed.push(self.end);
        framed.resize(length, self.pad);
        framed
    }

    fn tokenized(&self, text: &str) -> Result<tokenizers::Encoding> {
        self.tokenizer.encode(text, false).map_err(|error| refuse(&error.to_string()))
    }

    /// Roughly the text that became `ids`.
    pub fn text_of(&self, ids: &[u32]) -> Result<String> {
        let text = self.tokenizer.decode(ids, false).map_err(|error| refuse(&error.to_string()))?;
        Ok(text.trim().to_owned())
    }
}

fn refuse(reason: &str) -> Error {
    Error::Argument { name: "prompt".into(), reason: format!("cannot be tokenized: {reason}") }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn files() -> TokenizerFiles {
        let vocab = json!([["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0], ["▁a", -1.0], ["▁cat", -2.0], ["s", -3.0]]);
        let metaspace = json!({ "type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true });
        let tokenizer = json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
            "added_tokens": [], "pre_tokenizer": metaspace, "decoder": metaspace,
            "model": { "type": "Unigram", "unk_id": 2, "vocab": vocab, "byte_fallback": false },
        });
        TokenizerFiles { place: "tokenizer_3".into(), tokenizer: Some(tokenizer), ..TokenizerFiles::default() }
    }

    #[test]
    fn a_prompt_ends_with_its_mark_and_is_padded() {
        let tokenizer = T5Tokenizer::new(&files()).expect("complete");
        let tokens = tokenizer.encode("a cats", 6).expect("text");
        assert_eq!(tokens, Tokens { ids: vec![3, 4, 5, 1, 0, 0], lost: None });
        assert_eq!(tokenizer.encode("", 2).expect("text").ids, [1, 0]);
    }

    #[test]
    fn what_does_not_fit_is_cut_before_the_mark_and_told() {
        let tokenizer = T5Tokenizer::new(&files()).expect("complete");
        let tokens = tokenizer.encode("a a cat a", 3).expect("text");
        assert_eq!(tokens, Tokens { ids: vec![3, 3, 1], lost: Some("cat a".into()) });
        assert_eq!(tokenizer.encode("a cat", 3).expect("text"), Tokens { ids: vec![3, 4, 1], lost: None });
    }

    #[test]
    fn a_folder_without_tokenizer_json_says_what_to_do() {
        let none = TokenizerFiles { tokenizer: None, ..files() };
        let message = T5Tokenizer::new(&none).expect_err("nothing to read").to_string();
        assert!(message.contains("`tokenizer.json`") && message.contains("spiece.model"), "{message}");
        let mut other = files();
        other.tokenizer.as_mut().expect("just made")["model"] = json!({ "type": "BPE", "vocab": {}, "merges": [] });
        assert!(T5Tokenizer::new(&other).expect_err("BPE").to_string().contains("not a T5 tokenizer"));
    }
}
