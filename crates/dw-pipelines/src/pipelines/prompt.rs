//! Prompts to conditioning: tokens, CLIP encoders, and one row for each picture.
//!
//! How many encoders there are and which of their states count is the families' choice; this module holds
//! what they share.

use candle_core::Tensor;
use dw_core::{
    arguments::{Arguments, ArtifactRef},
    event::Event,
};

use super::{arguments::tensor, components::Parts, text_to_image::refuse};
use crate::{
    Result,
    models::{ClipTextModel, ClipTextOutput},
    request::Context,
    text::ClipTokenizer,
};

/// A tokenizer with the encoder it feeds.
#[derive(Clone, Copy)]
pub(crate) struct TextEncoder<'a> {
    pub(crate) tokenizer: &'a ClipTokenizer,
    pub(crate) model: &'a ClipTextModel,
}

impl<'a> From<(&'a ClipTokenizer, &'a ClipTextModel)> for TextEncoder<'a> {
    fn from((tokenizer, model): (&'a ClipTokenizer, &'a ClipTextModel)) -> Self {
        Self { tokenizer, model }
    }
}

/// The ends of prompts that did not fit, told to the user once each.
pub(crate) struct Truncations<'a> {
    context: Context<'a>,
    told: Vec<String>,
}

impl<'a> Truncations<'a> {
    pub(crate) fn new(context: Context<'a>) -> Self {
        Self { context, told: Vec::new() }
    }

    /// Tells of the end of a prompt that did not fit into `max_length` tokens.
    pub(crate) fn tell(&mut self, lost: String, max_length: usize) {
        if self.told.contains(&lost) {
            return;
        }
        self.context.events.emit(Event::Warning {
            message: format!(
                "the prompt has more than {max_length} tokens, and this end of it was cut off: `{lost}`; shorten it, \
                 or move what matters to the front"
            ),
        });
        self.told.push(lost);
    }
}

impl TextEncoder<'_> {
    /// What the encoder says about each text; padding is attended to, as in the reference.
    pub(crate) fn encode(&self, texts: &[String], truncations: &mut Truncations<'_>) -> Result<ClipTextOutput> {
        let mut rows = Vec::with_capacity(texts.len());
        for text in texts {
            let tokens = self.tokenizer.encode(text)?;
            if let Some(lost) = tokens.lost {
                truncations.tell(lost, self.tokenizer.max_length());
            }
            rows.push(tokens.ids);
        }
        let length = self.tokenizer.max_length();
        let ids = Tensor::from_vec(rows.concat(), (texts.len(), length), self.model.device())?;
        self.model.forward(&ids)
    }
}

/// The hidden state `from_end` layers before the last one (0 is the last), without the final norm:
/// `(batch, tokens, hidden)`.
pub(crate) fn hidden_state(output: &ClipTextOutput, from_end: usize) -> Result<&Tensor> {
    let states = &output.hidden_states;
    let state = states.len().checked_sub(from_end + 1).and_then(|at| states.get(at));
    state.ok_or_else(|| {
        refuse(
            "clip_skip",
            format!("skips more layers than the text encoder has ({}); use a smaller number", states.len() - 1),
        )
    })
}

/// Each row `times` in a row: `(n, …)` to `(n * times, …)`.
pub(crate) fn repeat_rows(rows: &Tensor, times: usize) -> Result<Tensor> {
    if times == 1 {
        return Ok(rows.clone());
    }
    let mut repeats = vec![1; rows.rank() + 1];
    repeats[1] = times;
    Ok(rows.unsqueeze(1)?.repeat(repeats)?.flatten(0, 1)?)
}

/// Embeddings that go together must have one shape.
pub(crate) fn same_shape(name: &str, embeds: &Tensor, other: &Tensor) -> Result<()> {
    if embeds.dims() == other.dims() {
        return Ok(());
    }
    Err(refuse(
        name,
        format!("has shape {:?}, but its positive counterpart has {:?}; they must agree", embeds.dims(), other.dims()),
    ))
}

/// Embeddings of prompts, one row for each picture.
#[derive(Clone)]
pub(crate) struct Embeddings {
    /// `(pictures, tokens, features)`.
    pub(crate) embeds: Tensor,
    /// `(pictures, features)`.
    pub(crate) pooled: Tensor,
}

impl Embeddings {
    /// Each row `times` in a row.
    pub(crate) fn repeated(&self, times: usize) -> Result<Self> {
        Ok(Self { embeds: repeat_rows(&self.embeds, times)?, pooled: repeat_rows(&self.pooled, times)? })
    }
}

/// Embeddings from arguments: the token states and their pooled state come together.
pub(crate) fn given_embeddings(
    parts: &Parts,
    arguments: &Arguments,
    name: &str,
    embeds: Option<ArtifactRef>,
    pooled: Option<ArtifactRef>,
) -> Result<Option<Embeddings>> {
    let pooled_name = name.replace("prompt_embeds", "pooled_prompt_embeds");
    let read = |name: &str, handle| tensor(arguments, name, handle, parts.dtype, &parts.device);
    match (embeds, pooled) {
        (None, None) => Ok(None),
        (Some(embeds), Some(pooled)) => {
            Ok(Some(Embeddings { embeds: read(name, embeds)?, pooled: read(&pooled_name, pooled)? }))
        }
        (Some(_), None) => Err(refuse(&pooled_name, format!("is missing; it belongs to `{name}`"))),
        (None, Some(_)) => Err(refuse(name, format!("is missing; it belongs to `{pooled_name}`"))),
    }
}
