//! Pictures as prompts: the arguments of a call for its IP-Adapters, and what becomes of them.

use candle_core::{DType, Tensor};
use dw_core::{
    arguments::{Arguments, ArtifactRef},
    artifact::Artifact,
};
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use super::{
    arguments::tensor, clip_pixels::ClipPixels, components::Parts, ip_adapter::ScaledAdapter, prompt::repeat_rows,
    text_to_image::refuse,
};
use crate::{
    Result,
    models::{ClipVisionModel, ImageFeatures, ImagePrompts},
};

/// One handle, a list of them, or a list with one entry for each adapter (or ControlNet).
#[derive(Clone, Debug, Serialize)]
pub struct Handles(Vec<Vec<ArtifactRef>>);

impl<'de> Deserialize<'de> for Handles {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let list = |value: Value| match value {
            Value::Array(items) => items,
            one => vec![one],
        };
        let entry = |value: Value| list(value).into_iter().map(ArtifactRef::deserialize).collect();
        let entries: std::result::Result<Vec<Vec<ArtifactRef>>, _> =
            list(Value::deserialize(deserializer)?).into_iter().map(entry).collect();
        entries.map(Self).map_err(serde::de::Error::custom)
    }
}

impl JsonSchema for Handles {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Handles".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let one = ArtifactRef::json_schema(generator);
        let list = serde_json::json!({ "type": "array", "items": one, "minItems": 1 });
        schemars::json_schema!({ "anyOf": [one, { "type": "array", "items": { "anyOf": [one, list] }, "minItems": 1 }] })
    }
}

impl Handles {
    /// The handles of each of `adapters`. With one adapter, a flat list is all its own.
    pub(crate) fn for_each(&self, name: &str, adapters: usize) -> Result<Vec<Vec<ArtifactRef>>> {
        self.shared_out(name, (adapters, "IP-Adapters"))
    }

    /// The handles of each of so many `things`. One thing has all of a flat list.
    pub(crate) fn shared_out(&self, name: &str, (count, things): (usize, &str)) -> Result<Vec<Vec<ArtifactRef>>> {
        if count == 1 {
            return Ok(vec![self.0.concat()]);
        }
        if self.0.len() == count {
            return Ok(self.0.clone());
        }
        let reason = format!("has {} entries for {count} {things}; give a list with one for each", self.0.len());
        Err(refuse(name, reason))
    }
}

/// What an adapter is shown.
enum Shown {
    /// Normalised pixels, `(pictures, 3, side, side)`.
    Pixels(Tensor),
    /// What the image encoder said, `(1 or 2, pictures, …)`, negative row first.
    Encoded(Tensor),
}

/// The image prompts of a call, checked.
pub(crate) struct ImagePromptInputs<'a> {
    adapters: &'a [ScaledAdapter],
    encoder: Option<&'a ClipVisionModel>,
    shown: Vec<Shown>,
}

impl<'a> ImagePromptInputs<'a> {
    /// Reads the pictures (or embeddings) that the pipeline's adapters need.
    pub(crate) fn read(
        parts: &'a Parts,
        arguments: &Arguments,
        images: Option<&Handles>,
        embeds: Option<&Handles>,
    ) -> Result<Self> {
        let (pictures, encoded) = ("ip_adapter_image", "ip_adapter_image_embeds");
        let Some(ip) = &parts.ip_adapters else {
            for (name, given) in [(pictures, images), (encoded, embeds)] {
                if given.is_some() {
                    return Err(refuse(name, "is given, but the step loads no IP-Adapter; add `ip_adapter` to it"));
                }
            }
            return Ok(Self { adapters: &[], encoder: None, shown: Vec::new() });
        };
        let encoder = parts.image_encoder()?;
        let count = ip.adapters.len();
        let shown = match (images, embeds) {
            (Some(_), Some(_)) => {
                return Err(refuse(pictures, format!("cannot be combined with `{encoded}`; give one of them")));
            }
            (None, None) => {
                return Err(refuse(pictures, "is missing; the step has an IP-Adapter, so give it a picture"));
            }
            (Some(images), None) => {
                let encoder = encoder.ok_or_else(|| {
                    let reason = format!("needs an image encoder, which is left out; give `{encoded}` instead");
                    refuse(pictures, reason)
                })?;
                let lists = images.for_each(pictures, count)?;
                let pixels = |list: &Vec<ArtifactRef>| prepared(&ip.pixels, encoder, arguments, (pictures, list));
                lists.iter().map(|list| pixels(list).map(Shown::Pixels)).collect::<Result<_>>()?
            }
            (None, Some(embeds)) => {
                let lists = embeds.for_each(encoded, count)?;
                let read = |list: &Vec<ArtifactRef>| match list.as_slice() {
                    [handle] => tensor(arguments, encoded, *handle, parts.dtype, &parts.device).map(Shown::Encoded),
                    list => Err(refuse(encoded, format!("has {} arrays for one IP-Adapter; give one", list.len()))),
                };
                lists.iter().map(read).collect::<Result<_>>()?
            }
        };
        Ok(Self { adapters: &ip.adapters, encoder, shown })
    }

    /// What the UNet's attention sees, for a batch of `pictures`, twice as many rows when `guided` (negative
    /// half first); none without adapters.
    pub(crate) fn prompts(&self, guided: bool, pictures: usize) -> Result<Option<ImagePrompts>> {
        self.prompts_in(if guided { &[0, 1] } else { &[0] }, pictures)
    }

    /// The same for an edit, whose guided batch has three parts of which only the first is positive.
    pub(crate) fn edit_prompts(&self, guided: bool, pictures: usize) -> Result<Option<ImagePrompts>> {
        self.prompts_in(if guided { &[1, 0, 0] } else { &[0] }, pictures)
    }

    /// `order` says which row each part of the batch gets: of one row, or of a negative and a positive one.
    fn prompts_in(&self, order: &[u32], pictures: usize) -> Result<Option<ImagePrompts>> {
        let guided = order.len() > 1;
        if self.adapters.is_empty() {
            return Ok(None);
        }
        let mut prompts = ImagePrompts::default();
        for (scaled, shown) in self.adapters.iter().zip(&self.shown) {
            let features = match shown {
                Shown::Pixels(pixels) => self.encode(pixels, scaled.adapter.features(), guided)?,
                Shown::Encoded(encoded) => given(encoded, scaled, guided)?,
            };
            let features = features.index_select(&Tensor::new(order, features.device())?, 0)?;
            let (rows, images) = (features.dim(0)?, features.dim(1)?);
            let tokens = scaled.adapter.tokens(&features.flatten(0, 1)?)?;
            let (_, per_image, width) = tokens.dims3()?;
            let tokens = repeat_rows(&tokens.reshape((rows, images * per_image, width))?, pictures)?;
            scaled.adapter.prompt(&tokens, &|name| scaled.scale(name), &mut prompts)?;
        }
        Ok(Some(prompts))
    }

    /// `(1, pictures, …)`, or with the negative row first `(2, pictures, …)`: zeros in place of pooled states,
    /// and what the encoder says about zeros in place of the others (diffusers `encode_image`).
    fn encode(&self, pixels: &Tensor, features: ImageFeatures, guided: bool) -> Result<Tensor> {
        let Some(encoder) = self.encoder else { return Err(refuse("ip_adapter_image", "needs an image encoder")) };
        let state = |pixels: &Tensor| -> Result<Tensor> {
            let output = encoder.forward(pixels)?;
            match features {
                ImageFeatures::Pooled => output.image_embeds.ok_or_else(|| {
                    refuse(
                        "ip_adapter_image",
                        "needs an image encoder with a projection (`CLIPVisionModelWithProjection`)",
                    )
                }),
                ImageFeatures::Penultimate => {
                    let before_last = output.hidden_states.len().checked_sub(2);
                    before_last.and_then(|at| output.hidden_states.get(at).cloned()).ok_or_else(|| {
                        refuse("ip_adapter_image", "needs an image encoder with layers; this one has none")
                    })
                }
            }
        };
        let positive = state(pixels)?.unsqueeze(0)?;
        if !guided {
            return Ok(positive);
        }
        let negative = match features {
            ImageFeatures::Pooled => positive.zeros_like()?,
            ImageFeatures::Penultimate => state(&pixels.zeros_like()?)?.unsqueeze(0)?,
        };
        Ok(Tensor::cat(&[negative, positive], 0)?)
    }
}

/// Embeddings from an argument as `(rows, pictures, …)`: two rows when guided.
fn given(encoded: &Tensor, scaled: &ScaledAdapter, guided: bool) -> Result<Tensor> {
    let rank = if scaled.adapter.features() == ImageFeatures::Pooled { 3 } else { 4 };
    let rows = if guided { 2 } else { 1 };
    let dims = encoded.dims();
    if dims.len() == rank && dims[0] == rows && dims[rank - 1] == scaled.adapter.width() {
        return Ok(encoded.clone());
    }
    let patches = if rank == 4 { "patches, " } else { "" };
    Err(refuse(
        "ip_adapter_image_embeds",
        format!(
            "has shape {dims:?}; this call needs ({rows}, pictures, {patches}{}), negative row first when guided",
            scaled.adapter.width()
        ),
    ))
}

/// The pictures of one adapter, from the argument `name`, as the image encoder takes them: `(pictures, 3, side, side)` in f32.
pub(crate) fn prepared(
    pixels: &ClipPixels,
    encoder: &ClipVisionModel,
    arguments: &Arguments,
    (name, list): (&str, &[ArtifactRef]),
) -> Result<Tensor> {
    if list.is_empty() {
        return Err(refuse(name, "is an empty list; give at least one picture"));
    }
    let prepare = |handle: &ArtifactRef| match arguments.get(*handle) {
        Some(Artifact::Image(picture)) => pixels.prepare(picture, encoder.config().image_size, encoder.device()),
        Some(other) => Err(refuse(name, format!("must be a picture, found {}", other.kind()))),
        None => Err(refuse(name, "refers to a result that is not there any more")),
    };
    let pictures = list.iter().map(prepare).collect::<Result<Vec<_>>>()?;
    Ok(Tensor::cat(&pictures, 0)?.to_dtype(DType::F32)?)
}
