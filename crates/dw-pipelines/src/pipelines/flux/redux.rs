//! Pictures as prompts for Flux (diffusers `FluxPriorReduxPipeline`): what SigLIP says about a picture, as words that
//! follow those of a prompt. The result is a prompt for another class of the family, not a picture.

use candle_core::{DType, Tensor};
use dw_core::{
    arguments::{Arguments, ArtifactRef},
    artifact::{Artifact, Entry},
    event::Event,
};
use image::DynamicImage;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::Value;

use super::prompts::{Encoders, each_text};
use crate::{
    Result,
    models::{ReduxImageEncoder, SiglipVisionModel},
    pipelines::{
        arguments::{Numbers, Texts, group, group_schema, merged_schema, refuse_unknown},
        call::Surroundings,
        clip_pixels::ClipPixels,
        components::Parts,
        decode::latent_artifact,
        image_to_image::{Pictures, pictures},
        prompt::{Embeddings, Truncations, given_embeddings, repeat_rows},
        text_to_image::refuse,
    },
    request::Context,
};

/// Tokens of a prompt, which the class does not let be chosen.
const WORDS: usize = 512;

/// Features of the pooled prompt of the published models, for when no text encoder is there to tell.
const POOLED: usize = 768;

/// What the picture is made of.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(default)]
pub(crate) struct ReduxArguments {
    /// The picture that becomes a prompt. Those of a list are added up to one prompt.
    pub(crate) image: Option<Pictures>,
    /// Words beside the picture; one text, or one for each picture. Needs the text encoders, which the published model
    /// does not have.
    pub(crate) prompt: Option<Texts>,
    /// The prompt for the second text encoder (T5); `prompt` when not given.
    pub(crate) prompt_2: Option<Texts>,
    /// Encoded prompts instead of `prompt`: an array `(pictures, tokens, features)`.
    pub(crate) prompt_embeds: Option<ArtifactRef>,
    /// Pooled embeddings that go with `prompt_embeds`: an array `(pictures, features)`.
    pub(crate) pooled_prompt_embeds: Option<ArtifactRef>,
    /// What words and picture are multiplied with; a list has one number for each picture.
    pub(crate) prompt_embeds_scale: Numbers,
    /// What the pooled embeddings are multiplied with; a list has one number for each picture.
    pub(crate) pooled_prompt_embeds_scale: Numbers,
}

impl Default for ReduxArguments {
    fn default() -> Self {
        Self {
            image: None,
            prompt: None,
            prompt_2: None,
            prompt_embeds: None,
            pooled_prompt_embeds: None,
            prompt_embeds_scale: 1.0.into(),
            pooled_prompt_embeds_scale: 1.0.into(),
        }
    }
}

/// The arguments of the class.
pub(crate) fn schema() -> Value {
    merged_schema("FluxPriorReduxPipeline", &[group_schema::<ReduxArguments>()])
}

/// One call: the embeddings as `prompt_embeds` and `pooled_prompt_embeds`.
pub(crate) fn run(parts: &Parts, arguments: &Arguments, surroundings: Surroundings<'_>) -> Result<Entry> {
    refuse_unknown(parts.class, arguments, &schema())?;
    let context = surroundings.context;
    let given: ReduxArguments = group(arguments)?;
    let images = match &given.image {
        Some(images) if !images.handles().is_empty() => pictures(("image", "a picture"), arguments, images.handles())?,
        _ => return Err(refuse("image", "is missing; give the picture that becomes a prompt")),
    };
    let count = images.len();
    let scales = given.prompt_embeds_scale.for_each("prompt_embeds_scale", count, "picture(s)")?;
    let pooled_scales = given.pooled_prompt_embeds_scale.for_each("pooled_prompt_embeds_scale", count, "picture(s)")?;
    let words = given.words(parts, arguments, count)?;

    let of_pictures = seen(parts, &images)?;
    let Embeddings { embeds, pooled } = words.encoded(parts, count, context)?;
    context.cancel.check()?;
    let embeds = Tensor::cat(&[&embeds.to_dtype(of_pictures.dtype())?, &of_pictures], 1)?;
    Ok(Entry {
        artifacts: Vec::new(),
        properties: vec![
            ("prompt_embeds".to_owned(), summed(&embeds, &scales)?),
            ("pooled_prompt_embeds".to_owned(), summed(&pooled, &pooled_scales)?),
        ],
    })
}

/// The rows of embeddings, each multiplied with its scale, added up to one.
fn summed(rows: &Tensor, scales: &[f64]) -> Result<Artifact> {
    let mut shape = vec![1; rows.rank()];
    shape[0] = scales.len();
    let scales = Tensor::new(scales, rows.device())?.to_dtype(rows.dtype())?.reshape(shape)?;
    latent_artifact(&rows.broadcast_mul(&scales)?.sum_keepdim(0)?)
}

/// What the image encoder says about each picture, as words: `(pictures, patches, features)`.
fn seen(parts: &Parts, images: &[&DynamicImage]) -> Result<Tensor> {
    let (encoder, embedder) = (parts.siglip()?, parts.redux()?);
    let processor = ClipPixels::of_siglip(parts.feature_extractor.as_ref());
    let side = encoder.config().image_size;
    let pixels = images.iter().map(|image| processor.stretched(image, side, &parts.device));
    let pixels = Tensor::cat(&pixels.collect::<Result<Vec<_>>>()?, 0)?;
    check_widths(encoder, embedder)?;
    embedder.forward(&encoder.forward(&pixels)?)
}

fn check_widths(encoder: &SiglipVisionModel, embedder: &ReduxImageEncoder) -> Result<()> {
    let (found, wanted) = (encoder.config().hidden_size, embedder.config().redux_dim);
    if found == wanted {
        return Ok(());
    }
    Err(crate::Error::Unsupported(format!(
        "component `image_encoder` makes {found} features, but `image_embedder` reads {wanted}; use the image encoder \
         that belongs to the model"
    )))
}

/// The words beside the pictures.
enum Words<'a> {
    Given(Embeddings),
    Texts(Box<Encoders<'a>>, [Vec<String>; 2]),
    /// Zeros, as the model was trained to read. Whether a prompt was given for nothing.
    None {
        is_lost: bool,
    },
}

impl ReduxArguments {
    fn words<'a>(&self, parts: &'a Parts, arguments: &Arguments, count: usize) -> Result<Words<'a>> {
        let given = given_embeddings(parts, arguments, "prompt_embeds", self.prompt_embeds, self.pooled_prompt_embeds)?;
        if let Some(given) = given {
            if self.prompt.is_some() || self.prompt_2.is_some() {
                return Err(refuse("prompt", "cannot be combined with `prompt_embeds`; give one of them"));
            }
            let (rows, features) = (given.embeds.dim(0)?, parts.redux()?.config().txt_in_features);
            if given.embeds.rank() != 3 || given.embeds.dim(2)? != features || (rows != 1 && rows != count) {
                let dims = given.embeds.dims();
                let reason = format!("has shape {dims:?}, but must have ({count}, tokens, {features})");
                return Err(refuse("prompt_embeds", reason));
            }
            return Ok(Words::Given(given.repeated(count / rows)?));
        }
        let encoders = Encoders::of(parts, WORDS)?;
        if !encoders.are_complete() {
            return Ok(Words::None { is_lost: self.prompt.is_some() });
        }
        let nothing = Texts::One(String::new());
        let prompt = self.prompt.as_ref().unwrap_or(&nothing);
        let texts = each_text("prompt", Some(prompt), self.prompt_2.as_ref(), count)?;
        Ok(Words::Texts(Box::new(encoders), texts.unwrap_or_default()))
    }
}

impl Words<'_> {
    /// One row for each of `count` pictures.
    fn encoded(self, parts: &Parts, count: usize, context: Context<'_>) -> Result<Embeddings> {
        match self {
            Self::Given(embeddings) => Ok(embeddings),
            Self::Texts(encoders, texts) => encoders.encode("prompt_embeds", &texts, &mut Truncations::new(context)),
            Self::None { is_lost } => {
                if is_lost {
                    let message = "`prompt` is not looked at, because the model has no text encoders; load \
                                   `text_encoder`, `tokenizer`, `text_encoder_2` and `tokenizer_2` from the Flux model";
                    context.events.emit(Event::Warning { message: message.into() });
                }
                let features = parts.redux()?.config().txt_in_features;
                let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &parts.device);
                let pooled = repeat_rows(&zeros(&[1, POOLED])?, count)?;
                Ok(Embeddings { embeds: zeros(&[count, WORDS, features])?, pooled })
            }
        }
    }
}
