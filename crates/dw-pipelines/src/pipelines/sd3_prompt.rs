//! The prompts of Stable Diffusion 3: the states of two CLIP encoders side by side, widened with zeros to T5's and
//! followed by T5's, and both pooled states.

use candle_core::Tensor;
use dw_core::arguments::Arguments;

use super::{
    arguments::{Texts, group},
    components::Parts,
    prompt::{Embeddings, TextEncoder, Truncations, given_embeddings, hidden_state, same_shape},
    stable_diffusion_3::Sd3Prompts,
    t5_prompt::{SequenceLength, T5Encoder},
    text_to_image::{Generation, one_for_each, refuse},
    weighting::Chunks,
};
use crate::{Error, Result, models::ClipTextOutput, request::Context};

/// What is to be encoded, checked.
pub(crate) struct Prompts<'a> {
    parts: &'a Parts,
    call: &'a Generation,
    /// The CLIP encoders; none when one of them is left out.
    clip: Option<[TextEncoder<'a>; 2]>,
    t5: Option<T5Encoder<'a>>,
    /// Tokens of a prompt for T5.
    length: usize,
    /// How many prompts there are.
    pub(crate) count: usize,
    /// For each encoder, in order.
    positive: Option<[Vec<String>; 3]>,
    negative: [Vec<String>; 3],
    given: Option<Embeddings>,
    negative_given: Option<Embeddings>,
}

impl<'a> Prompts<'a> {
    pub(crate) fn new(
        parts: &'a Parts,
        call: &'a Generation,
        given: &Sd3Prompts,
        arguments: &Arguments,
    ) -> Result<Self> {
        let embeddings = |name: &str, embeds, pooled| given_embeddings(parts, arguments, name, embeds, pooled);
        let positive_given = embeddings("prompt_embeds", call.prompt_embeds, given.pooled_prompt_embeds)?;
        let negative_given =
            embeddings("negative_prompt_embeds", given.negative_prompt_embeds, given.negative_pooled_prompt_embeds)?;
        let count = match (&call.prompt, &positive_given) {
            (Some(prompt), _) => prompt.list().len(),
            (None, Some(given)) => given.embeds.dim(0)?,
            (None, None) => 0,
        };
        let each = |name: &str, texts: [Option<&Texts>; 3]| {
            let [first, others @ ..] = texts;
            let Some(first) = one_for_each(name, first, count)? else { return Ok(None) };
            let [second, third] = others.map(|texts| texts.filter(|texts| texts.stands()));
            let second = one_for_each(&format!("{name}_2"), second, count)?.unwrap_or_else(|| first.clone());
            let third = one_for_each(&format!("{name}_3"), third, count)?.unwrap_or_else(|| first.clone());
            Ok::<_, Error>(Some([first, second, third]))
        };
        let nothing = Texts::One(String::new());
        let negative = Some(given.negative_prompt.as_ref().unwrap_or(&nothing));
        Ok(Self {
            parts,
            call,
            clip: clip_encoders(parts)?,
            t5: parts.t5_encoder("text_encoder_3", "tokenizer_3")?.map(T5Encoder::from),
            length: group::<SequenceLength>(arguments)?.tokens()?,
            count,
            positive: each("prompt", [call.prompt.as_ref(), given.prompt_2.as_ref(), given.prompt_3.as_ref()])?,
            negative: each(
                "negative_prompt",
                [negative, given.negative_prompt_2.as_ref(), given.negative_prompt_3.as_ref()],
            )?
            .unwrap_or_default(),
            given: positive_given,
            negative_given,
        })
    }

    /// Positive and (when guided) negative embeddings, one row for each picture.
    pub(crate) fn encode(&self, guided: bool, context: Context<'_>) -> Result<(Embeddings, Option<Embeddings>)> {
        let mut truncations = Truncations::new(context);
        let skip = self.call.clip_skip.unwrap_or(0);
        let chunks = self.chunks(guided)?;
        let positive = match (&self.given, &self.positive) {
            (Some(given), _) => given.clone(),
            (None, Some(texts)) => self.embed("prompt_embeds", texts, skip, (chunks, &mut truncations))?,
            (None, None) => return Err(refuse("prompt", "is missing")),
        };
        let negative = match &self.negative_given {
            _ if !guided => None,
            Some(given) => Some(given.clone()),
            // The reference leaves the negative prompt's layer alone.
            None => Some(self.embed("negative_prompt_embeds", &self.negative, 0, (chunks, &mut truncations))?),
        };
        if let Some(negative) = &negative {
            same_shape("negative_prompt_embeds", &positive.embeds, &negative.embeds)?;
            same_shape("negative_pooled_prompt_embeds", &positive.pooled, &negative.pooled)?;
        }
        let times = self.call.num_images_per_prompt;
        Ok((positive.repeated(times)?, negative.map(|negative| negative.repeated(times)).transpose()?))
    }

    /// How many chunks each prompt is encoded in, by both CLIP encoders, when prompts are weighted.
    fn chunks(&self, guided: bool) -> Result<Option<Chunks>> {
        let Some(encoders) = self.clip.as_ref().filter(|_| self.parts.prompt_weighting) else { return Ok(None) };
        let positive = self.positive.as_ref().filter(|_| self.given.is_none());
        let negative = Some(&self.negative).filter(|_| guided && self.negative_given.is_none());
        let mut chunks = Chunks::default();
        for (name, texts) in [("prompt", positive), ("negative_prompt", negative)] {
            let Some(texts) = texts else { continue };
            for (texts, encoder) in texts.iter().zip(encoders) {
                chunks.make_room(name, texts, encoder.tokenizer)?;
            }
        }
        Ok(Some(chunks))
    }

    /// The embeddings of one text for each encoder. `instead` is the argument that can stand in for a missing
    /// encoder; `skip` more CLIP layers than the usual one are left out.
    fn embed(
        &self,
        instead: &str,
        texts: &[Vec<String>; 3],
        skip: usize,
        (chunks, truncations): (Option<Chunks>, &mut Truncations<'_>),
    ) -> Result<Embeddings> {
        let Some(encoders) = &self.clip else {
            let reason = "is needed, because `text_encoder` or `text_encoder_2` is left out";
            return Err(refuse(instead, reason));
        };
        let dtype = self.parts.dtype;
        let state = |output: &ClipTextOutput| Ok(hidden_state(output, skip + 1)?.to_dtype(dtype)?);
        let (mut states, mut pooled) = (Vec::new(), Vec::new());
        for ((texts, encoder), name) in texts.iter().zip(encoders).zip(["text_encoder", "text_encoder_2"]) {
            let (of_tokens, of_text) = if let Some(chunks) = chunks {
                let encoded = encoder.encode_weighted(texts, chunks, &state)?;
                (encoded.states, encoded.pooled)
            } else {
                let output = encoder.encode(texts, truncations)?;
                (state(&output)?, output.text_embeds)
            };
            states.push(of_tokens);
            pooled.push(of_text.ok_or_else(|| {
                Error::Unsupported(format!(
                    "component `{name}` has no projection of the pooled text; use a `CLIPTextModelWithProjection`"
                ))
            })?);
        }
        let clip = Tensor::cat(&states, 2)?;
        let t5 = self.t5_states(&texts[2], truncations)?.to_dtype(dtype)?;
        let widened = clip.pad_with_zeros(2, 0, t5.dim(2)? - clip.dim(2)?)?;
        Ok(Embeddings { embeds: Tensor::cat(&[widened, t5], 1)?, pooled: Tensor::cat(&pooled, 1)?.to_dtype(dtype)? })
    }

    /// T5's states, `(texts, length, features)`; zeros where the encoder is left out, as the model was trained to
    /// read.
    fn t5_states(&self, texts: &[String], truncations: &mut Truncations<'_>) -> Result<Tensor> {
        match self.t5 {
            Some(t5) if self.parts.prompt_weighting => t5.encode_weighted(texts, self.length, truncations),
            Some(t5) => t5.encode(texts, self.length, truncations),
            None => {
                let features = self.parts.sd3_transformer()?.config().joint_attention_dim;
                Ok(Tensor::zeros((texts.len(), self.length, features), self.parts.dtype, &self.parts.device)?)
            }
        }
    }
}

/// Both CLIP encoders with their tokenizers.
fn clip_encoders(parts: &Parts) -> Result<Option<[TextEncoder<'_>; 2]>> {
    let first = parts.text_encoder("text_encoder", "tokenizer")?;
    let second = parts.text_encoder("text_encoder_2", "tokenizer_2")?;
    Ok(first.zip(second).map(|(first, second)| [first, second].map(TextEncoder::from)))
}
