//! Pictures as prompts of Stable Diffusion 3: the arguments of a call for the step's IP-Adapter, and what becomes of
//! them (diffusers `StableDiffusion3Pipeline.prepare_ip_adapter_image_embeds`).

use candle_core::Tensor;
use dw_core::{
    arguments::{Arguments, ArtifactRef},
    artifact::Artifact,
};
use schemars::JsonSchema;
use serde::Deserialize;

use super::{
    arguments::{group, tensor},
    clip_pixels::ClipPixels,
    components::Parts,
    image_prompt::Handles,
    text_to_image::refuse,
};
use crate::{
    Result,
    models::{Sd3ImagePrompt, Sd3IpAdapter, SiglipVisionModel},
};

const PICTURES: &str = "ip_adapter_image";
const EMBEDS: &str = "ip_adapter_image_embeds";

/// The IP-Adapter of a pipeline.
pub(crate) struct ScaledSd3Adapter {
    pub(crate) adapter: Sd3IpAdapter,
    pub(crate) scale: f64,
    /// How the image encoder takes pictures.
    pub(crate) pixels: ClipPixels,
}

/// What a call shows its IP-Adapter.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(default)]
pub(crate) struct PicturePrompts {
    /// The picture that the step's IP-Adapter is shown, or a list of pictures, all of which it sees.
    pub(crate) ip_adapter_image: Option<Handles>,
    /// What the image encoder said about the pictures before its last layer, instead of them: an array `(pictures,
    /// patches, features)`; where `guidance_scale` is above 1 twice as many rows, the negative ones first.
    pub(crate) ip_adapter_image_embeds: Option<Handles>,
}

/// What an adapter is shown.
enum Shown<'a> {
    /// Normalised pixels, `(pictures, 3, side, side)`, and who reads them.
    Pixels(Tensor, &'a SiglipVisionModel),
    /// States of an image encoder, `(rows, pictures, patches, features)`: a negative row first when guided.
    Encoded(Tensor),
}

/// The image prompt of a call, checked.
pub(crate) struct ImagePromptInput<'a> {
    scaled: &'a ScaledSd3Adapter,
    shown: Shown<'a>,
    is_guided: bool,
}

impl<'a> ImagePromptInput<'a> {
    /// Reads the pictures (or embeddings) that the pipeline's adapter needs; none without an adapter.
    pub(crate) fn read(parts: &'a Parts, arguments: &Arguments, is_guided: bool) -> Result<Option<Self>> {
        let PicturePrompts { ip_adapter_image: images, ip_adapter_image_embeds: embeds } = group(arguments)?;
        let Some(scaled) = parts.sd3_ip_adapter.as_deref() else {
            for (name, given) in [(PICTURES, &images), (EMBEDS, &embeds)] {
                if given.is_some() {
                    return Err(refuse(name, "is given, but the step loads no IP-Adapter; add `ip_adapter` to it"));
                }
            }
            return Ok(None);
        };
        let shown = match (images, embeds) {
            (Some(_), Some(_)) => {
                return Err(refuse(PICTURES, format!("cannot be combined with `{EMBEDS}`; give one of them")));
            }
            (None, None) => {
                return Err(refuse(PICTURES, "is missing; the step has an IP-Adapter, so give it a picture"));
            }
            (Some(images), None) => {
                let encoder = parts.siglip_if_any()?.ok_or_else(|| {
                    refuse(PICTURES, format!("needs an image encoder, which is left out; give `{EMBEDS}` instead"))
                })?;
                Shown::Pixels(pixels(scaled, encoder, arguments, &images.for_each(PICTURES, 1)?.concat())?, encoder)
            }
            (None, Some(embeds)) => match embeds.for_each(EMBEDS, 1)?.concat().as_slice() {
                [handle] => {
                    let encoded = tensor(arguments, EMBEDS, *handle, parts.dtype, &parts.device)?;
                    Shown::Encoded(given(&encoded, scaled, is_guided)?)
                }
                list => return Err(refuse(EMBEDS, format!("has {} arrays for one IP-Adapter; give one", list.len()))),
            },
        };
        Ok(Some(Self { scaled, shown, is_guided }))
    }

    /// The states of the pictures for a batch with `pictures` rows in each half; none where the adapter does not act.
    pub(crate) fn encode(self, pictures: usize) -> Result<Option<ImageConditioning<'a>>> {
        let ScaledSd3Adapter { adapter, scale, .. } = self.scaled;
        // The reference passes pictures over unless the scale is above 0, and embeddings only where it is 0.
        let acts = *scale > 0.0 || (*scale < 0.0 && matches!(self.shown, Shown::Encoded(_)));
        if !acts {
            return Ok(None);
        }
        let features = match self.shown {
            Shown::Encoded(features) => features,
            Shown::Pixels(pixels, encoder) => {
                let positive = encoder.before_last(&pixels)?.unsqueeze(0)?;
                let negative = self.is_guided.then(|| positive.zeros_like()).transpose()?;
                Tensor::cat(&negative.iter().chain([&positive]).collect::<Vec<_>>(), 0)?
            }
        };
        Ok(Some(ImageConditioning { adapter, features, pictures, scale: *scale }))
    }
}

/// What an IP-Adapter knows of a call's pictures.
pub(crate) struct ImageConditioning<'a> {
    adapter: &'a Sd3IpAdapter,
    /// `(rows, pictures, patches, features)`: one row, or a negative and a positive one.
    features: Tensor,
    /// How many rows of the batch each row stands for.
    pictures: usize,
    scale: f64,
}

impl ImageConditioning<'_> {
    /// What the transformer sees at a timestep.
    pub(crate) fn at(&self, timestep: f64) -> Result<Sd3ImagePrompt<'_>> {
        self.adapter.prompt(&self.features, timestep, self.scale)?.repeated(self.pictures)
    }
}

/// Embeddings from an argument as `(rows, pictures, patches, features)`: two rows when guided.
fn given(encoded: &Tensor, scaled: &ScaledSd3Adapter, is_guided: bool) -> Result<Tensor> {
    let (rows, width) = (if is_guided { 2 } else { 1 }, scaled.adapter.width());
    match *encoded.dims() {
        [all, patches, features] if all > 0 && all % rows == 0 && features == width => {
            Ok(encoded.reshape((rows, all / rows, patches, features))?)
        }
        ref dims => {
            let pictures = if is_guided { "2 × pictures" } else { "pictures" };
            let reason =
                format!("has shape {dims:?}; this call needs ({pictures}, patches, {width}), negative rows first");
            Err(refuse(EMBEDS, reason))
        }
    }
}

/// The pictures as the image encoder takes them.
fn pixels(
    scaled: &ScaledSd3Adapter,
    encoder: &SiglipVisionModel,
    arguments: &Arguments,
    list: &[ArtifactRef],
) -> Result<Tensor> {
    if list.is_empty() {
        return Err(refuse(PICTURES, "is an empty list; give at least one picture"));
    }
    let side = encoder.config().image_size;
    let prepare = |handle: &ArtifactRef| match arguments.get(*handle) {
        Some(Artifact::Image(picture)) => scaled.pixels.stretched(picture, side, encoder.device()),
        Some(other) => Err(refuse(PICTURES, format!("must be a picture, found {}", other.kind()))),
        None => Err(refuse(PICTURES, "refers to a result that is not there any more")),
    };
    Ok(Tensor::cat(&list.iter().map(prepare).collect::<Result<Vec<_>>>()?, 0)?)
}
