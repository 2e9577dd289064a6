//! Teaches the text encoders of a pipeline the words of textual inversions: the tokenizer gets the word, the encoder
//! its vectors.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use candle_core::Tensor;

use super::{
    adapt::rebuilt,
    cache::ComponentCache,
    components::{Component, Model, SharedComponent},
};
use crate::{
    Error, Result,
    adapters::{AdapterFile, TextualInversion, file::Place, textual_inversion::extended},
    hub::Hub,
    models::ClipTextModel,
    request::{Context, PipelineRequest},
    text::ClipTokenizer,
};

/// The text encoders that may learn words, each with its tokenizer, in the order in which they are tried.
const ENCODERS: [(&str, &str); 3] =
    [("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"), ("text_encoder_3", "tokenizer_3")];

/// The learned words of one pipeline.
#[derive(Clone, Default)]
pub(crate) struct Words(Vec<Word>);

/// A learned word, and the text encoder it is meant for if one is named.
#[derive(Clone)]
struct Word {
    inversion: Arc<TextualInversion>,
    encoder: Option<String>,
}

/// A word and its vectors for one encoder.
type Lesson<'a> = (&'a TextualInversion, &'a Tensor);

impl Words {
    /// Finds and reads the files that `request` names.
    pub(super) fn find(request: &PipelineRequest, hub: &Hub, context: Context<'_>) -> Result<Self> {
        let read = |word: &crate::request::TextualInversionRequest| {
            let (subfolder, weight_name) = (word.subfolder.as_deref(), word.weight_name.as_deref());
            let file = AdapterFile::find(Place { source: &word.source, subfolder, weight_name }, hub, context)?;
            let inversion = Arc::new(TextualInversion::read(&file, word.token.as_deref())?);
            Ok(Word { inversion, encoder: word.text_encoder.clone() })
        };
        Ok(Self(request.textual_inversions.iter().map(read).collect::<Result<_>>()?))
    }

    /// Replaces tokenizers and text encoders by ones that know the words.
    pub(super) fn teach(
        &self,
        components: &mut BTreeMap<String, SharedComponent>,
        cache: &mut ComponentCache,
    ) -> Result<()> {
        let mut taught = Vec::new();
        for (encoder, tokenizer, lessons) in self.lessons(components)? {
            let word = |(word, _): &Lesson<'_>| format!("|word:{}={}", word.token, word.file().fingerprint());
            let words = lessons.iter().map(word).collect::<Vec<_>>().concat();
            let (Some(encoder), Some(tokenizer)) =
                (components.get_key_value(encoder), components.get_key_value(tokenizer))
            else {
                let reason = format!("`{encoder}` cannot learn a word without `{tokenizer}`; do not leave it out");
                return Err(Error::Argument { name: "textual_inversions".into(), reason });
            };
            let keys = [format!("{}{words}", tokenizer.1.key), format!("{}{words}", encoder.1.key)];
            let pair = match [cache.get(&keys[0]), cache.get(&keys[1])] {
                [Some(tokenizer), Some(encoder)] => [tokenizer, encoder],
                _ => teach(tokenizer.1, encoder.1, &lessons, keys)?.map(Arc::new),
            };
            let names = [tokenizer.0.clone(), encoder.0.clone()];
            taught.extend(names.into_iter().zip(pair));
        }
        for (name, component) in taught {
            cache.insert(Arc::clone(&component));
            components.insert(name, component);
        }
        Ok(())
    }

    /// Which encoder, with which tokenizer, learns what.
    fn lessons(
        &self,
        components: &BTreeMap<String, SharedComponent>,
    ) -> Result<Vec<(&'static str, &'static str, Vec<Lesson<'_>>)>> {
        let mut lessons: Vec<_> =
            ENCODERS.iter().map(|&(encoder, tokenizer)| (encoder, tokenizer, Vec::new())).collect();
        for word in &self.0 {
            let mut widths = Vec::new();
            for (encoder, _, lessons) in &mut lessons {
                let is_meant = word.encoder.as_deref().is_none_or(|meant| meant == *encoder);
                let Some(width) = width(components, encoder).filter(|_| is_meant) else { continue };
                // Each table goes to the first encoder of its width.
                let Some(vectors) = word.inversion.vectors(width).filter(|_| !widths.contains(&width)) else {
                    continue;
                };
                widths.push(width);
                lessons.push((&*word.inversion, vectors));
            }
            if widths.is_empty() {
                return Err(unplaced(word, components));
            }
        }
        lessons.retain(|(_, _, lessons)| !lessons.is_empty());
        Ok(lessons)
    }
}

/// A tokenizer and its text encoder with more words.
fn teach(
    tokenizer: &Component,
    encoder: &Component,
    lessons: &[Lesson<'_>],
    [tokenizer_key, encoder_key]: [String; 2],
) -> Result<[Component; 2]> {
    let (Model::Tokenizer(known), Some(weights)) = (&tokenizer.model, &encoder.weights) else {
        return Err(Error::Unsupported(format!("a `{}` with a `{}` learns no words", encoder.class, tokenizer.class)));
    };
    let (name, mut table) = ClipTextModel::word_table(weights)?
        .ok_or_else(|| Error::Unsupported(format!("a `{}` without a table of words learns none", encoder.class)))?;
    let mut known: ClipTokenizer = known.clone();
    for (word, vectors) in lessons {
        let first = known.learn(&word.token, vectors.dim(0)?)?;
        table = extended(&table, vectors, first as usize)?;
    }
    let model = Model::Tokenizer(known);
    let class = tokenizer.class.clone();
    Ok([
        Component { class, key: tokenizer_key, bytes: 0, model, weights: None, base: None },
        rebuilt(encoder, weights, HashMap::from([(name.to_owned(), table)]).into(), encoder_key, None)?,
    ])
}

/// The width of a text encoder; none when there is no such encoder.
fn width(components: &BTreeMap<String, SharedComponent>, encoder: &str) -> Option<usize> {
    match &components.get(encoder)?.model {
        Model::ClipText(model) => Some(model.config().hidden_size),
        _ => None,
    }
}

/// Complains about a word that fits no text encoder.
fn unplaced(word: &Word, components: &BTreeMap<String, SharedComponent>) -> Error {
    let has = |(name, _): &(&str, &str)| Some(format!("`{name}` has {}", width(components, name)?));
    let there = ENCODERS.iter().filter_map(has).collect::<Vec<_>>().join(", ");
    let meant = word.encoder.as_deref().map_or("no text encoder".into(), |meant| format!("not `{meant}`"));
    let widths = word.inversion.widths().iter().map(ToString::to_string).collect::<Vec<_>>().join(" and ");
    let reason = format!(
        "`{}` stands for vectors of {widths} values, which fit {meant} of this model ({there}); choose a file made for \
         the model, or correct `text_encoder`",
        word.inversion.token
    );
    Error::BadFile { path: word.inversion.file().path().to_owned(), reason }
}
