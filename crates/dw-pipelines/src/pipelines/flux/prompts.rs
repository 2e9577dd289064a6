//! The prompts of Flux: the states of a T5 encoder, and the pooled state of a CLIP encoder.

use candle_core::Tensor;
use dw_core::arguments::Arguments;

use super::{FluxPrompts, NegativePrompts};
use crate::{
    Error, Result,
    pipelines::{
        arguments::{Texts, group},
        components::Parts,
        prompt::{Embeddings, TextEncoder, Truncations, given_embeddings, same_shape},
        t5_prompt::{SequenceLength, T5Encoder},
        text_to_image::{Generation, one_for_each, refuse},
    },
    request::Context,
};

/// The texts for each encoder, CLIP's first.
type EachText = [Vec<String>; 2];

/// What is to be encoded, checked.
pub(super) struct Prompts<'a> {
    encoders: Encoders<'a>,
    for_each: usize,
    /// How many prompts there are.
    pub(super) count: usize,
    positive: Option<EachText>,
    negative: Option<EachText>,
    given: Option<Embeddings>,
    negative_given: Option<Embeddings>,
}

impl<'a> Prompts<'a> {
    pub(super) fn new(
        parts: &'a Parts,
        call: &Generation,
        (given, negative): (&FluxPrompts, &NegativePrompts),
        arguments: &Arguments,
    ) -> Result<Self> {
        let embeddings = |name: &str, embeds, pooled| given_embeddings(parts, arguments, name, embeds, pooled);
        let positive_given = embeddings("prompt_embeds", call.prompt_embeds, given.pooled_prompt_embeds)?;
        let negative_given = embeddings(
            "negative_prompt_embeds",
            negative.negative_prompt_embeds,
            negative.negative_pooled_prompt_embeds,
        )?;
        if positive_given.is_some() && given.prompt_2.is_some() {
            return Err(refuse("prompt_2", "cannot be combined with `prompt_embeds`; give one of them"));
        }
        let config = parts.flux()?.config();
        for (name, given) in [("prompt_embeds", &positive_given), ("negative_prompt_embeds", &negative_given)] {
            if let Some(given) = given {
                check_widths(name, given, (config.joint_attention_dim, config.pooled_projection_dim))?;
            }
        }
        let count = match (&call.prompt, &positive_given) {
            (Some(prompt), _) => prompt.list().len(),
            (None, Some(given)) => given.embeds.dim(0)?,
            (None, None) => 0,
        };
        let encoders = Encoders::of(parts, group::<SequenceLength>(arguments)?.tokens()?)?;
        encoders.check_widths((config.joint_attention_dim, config.pooled_projection_dim))?;
        Ok(Self {
            encoders,
            for_each: call.num_images_per_prompt,
            count,
            positive: each_text("prompt", call.prompt.as_ref(), given.prompt_2.as_ref(), count)?,
            negative: each_text(
                "negative_prompt",
                call.negative_prompt.as_ref(),
                negative.negative_prompt_2.as_ref(),
                count,
            )?,
            given: positive_given,
            negative_given,
        })
    }

    /// Whether the call says what the picture should not show.
    pub(super) fn has_negative(&self) -> bool {
        self.negative.is_some() || self.negative_given.is_some()
    }

    /// Positive and (when guided) negative embeddings, one row for each picture.
    pub(super) fn encode(&self, guided: bool, context: Context<'_>) -> Result<(Embeddings, Option<Embeddings>)> {
        let mut truncations = Truncations::new(context);
        let mut embeddings = |name: &str, given: &Option<Embeddings>, texts: &Option<EachText>| {
            let rows = match (given, texts) {
                (Some(given), _) => given.clone(),
                (None, Some(texts)) => self.encoders.encode(name, texts, &mut truncations)?,
                (None, None) => return Err(refuse("prompt", "is missing")),
            };
            rows.repeated(self.for_each)
        };
        let positive = embeddings("prompt_embeds", &self.given, &self.positive)?;
        if !guided {
            return Ok((positive, None));
        }
        let negative = embeddings("negative_prompt_embeds", &self.negative_given, &self.negative)?;
        if self.given.is_some() && self.negative_given.is_some() {
            same_shape("negative_prompt_embeds", &positive.embeds, &negative.embeds)?;
        }
        same_shape("negative_pooled_prompt_embeds", &positive.pooled, &negative.pooled)?;
        Ok((positive, Some(negative)))
    }
}

/// One text for each of `prompts` and for each encoder; the second encoder reads the first one's text unless it is
/// given its own.
pub(super) fn each_text(
    name: &str,
    first: Option<&Texts>,
    second: Option<&Texts>,
    prompts: usize,
) -> Result<Option<EachText>> {
    let Some(first) = one_for_each(name, first, prompts)? else { return Ok(None) };
    let second = second.filter(|texts| texts.stands());
    let second = one_for_each(&format!("{name}_2"), second, prompts)?.unwrap_or_else(|| first.clone());
    Ok(Some([first, second]))
}

/// Refuses embeddings of another model: `(text, pooled)` are the features that the transformer reads.
fn check_widths(name: &str, given: &Embeddings, (text, pooled): (usize, usize)) -> Result<()> {
    let pooled_name = name.replace("prompt_embeds", "pooled_prompt_embeds");
    let rows = given.embeds.dims().first().copied().unwrap_or(0);
    match (given.embeds.dims(), given.pooled.dims()) {
        ([_, _, width], _) if *width != text => {
            Err(refuse(name, format!("has {width} features for each token, but the model reads {text}")))
        }
        ([_, _, _], [found, width]) if (*found, *width) == (rows, pooled) => Ok(()),
        ([_, _, _], dims) => {
            Err(refuse(&pooled_name, format!("has shape {dims:?}, but this call needs [{rows}, {pooled}]")))
        }
        (dims, _) => Err(refuse(name, format!("has shape {dims:?}, but must have (prompts, tokens, {text})"))),
    }
}

/// The text encoders of the family with their tokenizers; either may be left out.
pub(super) struct Encoders<'a> {
    clip: Option<TextEncoder<'a>>,
    t5: Option<T5Encoder<'a>>,
    /// Tokens of a prompt for T5.
    length: usize,
    is_weighted: bool,
}

impl<'a> Encoders<'a> {
    pub(super) fn of(parts: &'a Parts, length: usize) -> Result<Self> {
        Ok(Self {
            clip: parts.text_encoder("text_encoder", "tokenizer")?.map(TextEncoder::from),
            t5: parts.t5_encoder("text_encoder_2", "tokenizer_2")?.map(T5Encoder::from),
            length,
            is_weighted: parts.prompt_weighting,
        })
    }

    /// Whether both are there.
    pub(super) fn are_complete(&self) -> bool {
        self.clip.is_some() && self.t5.is_some()
    }

    /// Refuses encoders that were made for another transformer, which reads `(text, pooled)` features.
    fn check_widths(&self, (text, pooled): (usize, usize)) -> Result<()> {
        let t5 = self.t5.map(|encoder| encoder.model.config().d_model);
        let clip = self.clip.map(|encoder| encoder.model.config().hidden_size);
        for (name, found, wanted) in [("text_encoder_2", t5, text), ("text_encoder", clip, pooled)] {
            if let Some(found) = found.filter(|found| *found != wanted) {
                return Err(Error::Unsupported(format!(
                    "component `{name}` makes {found} features, but the transformer reads {wanted}; use the text encoder \
                     that belongs to the model"
                )));
            }
        }
        Ok(())
    }

    /// The embeddings of one text for each encoder. `instead` is the argument that can stand in for a missing one.
    pub(super) fn encode(
        &self,
        instead: &str,
        [for_clip, for_t5]: &EachText,
        truncations: &mut Truncations<'_>,
    ) -> Result<Embeddings> {
        let missing = |name: &str| {
            refuse(instead, format!("is needed instead of a prompt, because the model's `{name}` is left out"))
        };
        let clip = self.clip.ok_or_else(|| missing("text_encoder"))?;
        let t5 = self.t5.ok_or_else(|| missing("text_encoder_2"))?;
        let embeds = if self.is_weighted {
            t5.encode_weighted(for_t5, self.length, truncations)?
        } else {
            t5.encode(for_t5, self.length, truncations)?
        };
        Ok(Embeddings { embeds, pooled: self.pooled(clip, for_clip, truncations)? })
    }

    /// CLIP's pooled state of each text, `(texts, features)`.
    fn pooled(&self, clip: TextEncoder<'_>, texts: &[String], truncations: &mut Truncations<'_>) -> Result<Tensor> {
        if !self.is_weighted {
            return Ok(clip.encode(texts, truncations)?.pooled);
        }
        clip.pooled_unweighted(texts)
    }
}
