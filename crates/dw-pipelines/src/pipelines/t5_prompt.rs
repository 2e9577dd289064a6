//! Prompts to the states of a T5 encoder, and the argument that says how long they are.

use candle_core::Tensor;
use schemars::JsonSchema;
use serde::Deserialize;

use super::{arguments::positive, prompt::Truncations, text_to_image::refuse};
use crate::{Result, models::T5EncoderModel, text::T5Tokenizer};

/// The longest prompt that the families were trained with, in T5 tokens.
const LONGEST: usize = 512;

/// How long prompts are for a T5 encoder.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(default)]
pub(crate) struct SequenceLength {
    /// How many tokens of the prompt the T5 text encoder reads, 1 to 512; shorter prompts are padded to it.
    #[serde(deserialize_with = "positive")]
    #[schemars(range(min = 1, max = 512))]
    pub(crate) max_sequence_length: usize,
}

impl Default for SequenceLength {
    fn default() -> Self {
        Self { max_sequence_length: 256 }
    }
}

impl SequenceLength {
    /// The length, checked.
    pub(crate) fn tokens(self) -> Result<usize> {
        if self.max_sequence_length <= LONGEST {
            return Ok(self.max_sequence_length);
        }
        let reason = format!("must be at most {LONGEST}, found `{}`", self.max_sequence_length);
        Err(refuse("max_sequence_length", reason))
    }
}

/// A tokenizer with the T5 encoder it feeds.
#[derive(Clone, Copy)]
pub(crate) struct T5Encoder<'a> {
    pub(crate) tokenizer: &'a T5Tokenizer,
    pub(crate) model: &'a T5EncoderModel,
}

impl<'a> From<(&'a T5Tokenizer, &'a T5EncoderModel)> for T5Encoder<'a> {
    fn from((tokenizer, model): (&'a T5Tokenizer, &'a T5EncoderModel)) -> Self {
        Self { tokenizer, model }
    }
}

impl T5Encoder<'_> {
    /// The states of `length` tokens of each text, `(texts, length, features)`; padding is attended to, as in the
    /// reference.
    pub(crate) fn encode(&self, texts: &[String], length: usize, truncations: &mut Truncations<'_>) -> Result<Tensor> {
        let mut rows = Vec::with_capacity(texts.len());
        for text in texts {
            let tokens = self.tokenizer.encode(text, length)?;
            if let Some(lost) = tokens.lost {
                truncations.tell(lost, length);
            }
            rows.push(tokens.ids);
        }
        self.states(&rows, length)
    }

    /// The states of rows of `length` ids each.
    pub(crate) fn states(&self, rows: &[Vec<u32>], length: usize) -> Result<Tensor> {
        let ids = Tensor::from_vec(rows.concat(), (rows.len(), length), self.model.device())?;
        self.model.forward(&ids)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_than_512_tokens_are_refused() {
        let tokens = |max_sequence_length| SequenceLength { max_sequence_length }.tokens();
        assert_eq!(tokens(512).ok(), Some(512));
        let message = tokens(513).expect_err("too long").to_string();
        assert!(message.contains("at most 512") && message.contains("`513`"), "{message}");
    }
}
