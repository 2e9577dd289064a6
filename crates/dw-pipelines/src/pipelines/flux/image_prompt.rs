//! Pictures as prompts for Flux: the arguments of a call for its IP-Adapters, and what becomes of them.

use candle_core::Tensor;
use dw_core::arguments::{Arguments, ArtifactRef};
use schemars::JsonSchema;
use serde::Deserialize;

use super::ip_adapter::{FluxIpAdapters, ScaledAdapter};
use crate::{
    Result,
    models::{ClipVisionModel, FluxConfig, FluxImagePrompts},
    pipelines::{
        arguments::tensor,
        components::Parts,
        image_prompt::{Handles, prepared},
        text_to_image::refuse,
    },
};

/// What the IP-Adapters of the step are shown.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(default)]
pub(crate) struct ImagePromptArguments {
    /// The picture that the step's IP-Adapter is shown, or a list of pictures; with several adapters a list with
    /// one entry for each.
    ip_adapter_image: Option<Handles>,
    /// What the image encoder said about the pictures, instead of them: an array `(1, pictures, features)`, or a list with
    /// one for each adapter.
    ip_adapter_image_embeds: Option<Handles>,
    /// The picture that the IP-Adapter is shown beside the negative prompt, as `ip_adapter_image`; a black one when not
    /// given. Used when `true_cfg_scale` is above 1.
    negative_ip_adapter_image: Option<Handles>,
    /// What the image encoder said about those pictures, instead of them, as `ip_adapter_image_embeds`.
    negative_ip_adapter_image_embeds: Option<Handles>,
}

/// What one adapter is shown.
enum Shown {
    /// Normalised pixels, `(pictures, 3, side, side)`.
    Pixels(Tensor),
    /// What the image encoder said, `(pictures, features)`.
    Encoded(Tensor),
    /// One black picture.
    Black,
}

/// What the adapters of a pipeline are shown in a call, checked.
pub(super) struct ImagePromptInputs<'a> {
    adapters: &'a FluxIpAdapters,
    encoder: Option<&'a ClipVisionModel>,
    positive: Vec<Shown>,
    negative: Vec<Shown>,
}

impl<'a> ImagePromptInputs<'a> {
    /// Reads the pictures (or embeddings) that the pipeline's adapters need; none where it has no adapters. A side of
    /// which nothing is said is shown black when the other is not.
    pub(super) fn read(parts: &'a Parts, arguments: &Arguments, given: &ImagePromptArguments) -> Result<Option<Self>> {
        let positive = [
            ("ip_adapter_image", &given.ip_adapter_image),
            ("ip_adapter_image_embeds", &given.ip_adapter_image_embeds),
        ];
        let negative = [
            ("negative_ip_adapter_image", &given.negative_ip_adapter_image),
            ("negative_ip_adapter_image_embeds", &given.negative_ip_adapter_image_embeds),
        ];
        let mut all = positive.iter().chain(&negative);
        let Some(adapters) = parts.flux_ip_adapters.as_deref() else {
            return match all.find(|(_, handles)| handles.is_some()) {
                Some((name, _)) => {
                    Err(refuse(name, "is given, but the step loads no IP-Adapter; add `ip_adapter` to it"))
                }
                None => Ok(None),
            };
        };
        if all.all(|(_, handles)| handles.is_none()) {
            return Err(refuse(positive[0].0, "is missing; the step has an IP-Adapter, so give it a picture"));
        }
        let source = Source { parts, arguments, adapters, encoder: parts.image_encoder()? };
        let (positive, negative) = (source.shown(positive)?, source.shown(negative)?);
        Ok(Some(Self { adapters, encoder: source.encoder, positive, negative }))
    }

    /// What the blocks see beside the prompt, for a batch of `rows`.
    pub(super) fn positive(&self, config: &FluxConfig, rows: usize) -> Result<FluxImagePrompts> {
        self.prompts(&self.positive, "ip_adapter_image", (config, rows))
    }

    /// What they see beside the negative prompt.
    pub(super) fn negative(&self, config: &FluxConfig, rows: usize) -> Result<FluxImagePrompts> {
        self.prompts(&self.negative, "negative_ip_adapter_image", (config, rows))
    }

    fn prompts(&self, shown: &[Shown], name: &str, (config, rows): (&FluxConfig, usize)) -> Result<FluxImagePrompts> {
        let mut prompts = FluxImagePrompts::new(config);
        for (ScaledAdapter { adapter, scales }, shown) in self.adapters.adapters.iter().zip(shown) {
            let features = match shown {
                Shown::Pixels(pixels) => self.encode(name, pixels)?,
                Shown::Encoded(encoded) => encoded.clone(),
                Shown::Black => self.encode(name, &self.black(name)?)?,
            };
            adapter.prompt(&features, scales, rows, &mut prompts)?;
        }
        Ok(prompts)
    }

    /// A black picture as the image encoder takes it.
    fn black(&self, name: &str) -> Result<Tensor> {
        let encoder = needed(name, self.encoder)?;
        self.adapters.pixels.black(encoder.config().image_size, encoder.device())
    }

    /// `(pictures, features)`.
    fn encode(&self, name: &str, pixels: &Tensor) -> Result<Tensor> {
        needed(name, self.encoder)?
            .forward(pixels)?
            .image_embeds
            .ok_or_else(|| refuse(name, "needs an image encoder with a projection (`CLIPVisionModelWithProjection`)"))
    }
}

/// The image encoder, or what to give instead of pictures.
fn needed<'a>(name: &str, encoder: Option<&'a ClipVisionModel>) -> Result<&'a ClipVisionModel> {
    encoder.ok_or_else(|| {
        refuse(
            name,
            format!("needs an image encoder, which is left out; give `{name}_embeds`, or load `image_encoder`"),
        )
    })
}

/// Where pictures and embeddings come from.
struct Source<'a, 'b> {
    parts: &'a Parts,
    arguments: &'b Arguments,
    adapters: &'a FluxIpAdapters,
    encoder: Option<&'a ClipVisionModel>,
}

impl Source<'_, '_> {
    /// What each adapter is shown: pictures, or embeddings instead of them.
    fn shown(&self, [(pictures, images), (encoded, embeds)]: [(&str, &Option<Handles>); 2]) -> Result<Vec<Shown>> {
        let adapters = &self.adapters.adapters;
        match (images, embeds) {
            (Some(_), Some(_)) => {
                Err(refuse(pictures, format!("cannot be combined with `{encoded}`; give one of them")))
            }
            (None, None) => Ok(adapters.iter().map(|_| Shown::Black).collect()),
            (Some(images), None) => {
                let encoder = needed(pictures, self.encoder)?;
                let pixels = |list: Vec<ArtifactRef>| {
                    prepared(&self.adapters.pixels, encoder, self.arguments, (pictures, &list)).map(Shown::Pixels)
                };
                images.for_each(pictures, adapters.len())?.into_iter().map(pixels).collect()
            }
            (None, Some(embeds)) => {
                let lists = embeds.for_each(encoded, adapters.len())?;
                let features = |(list, adapter): (Vec<ArtifactRef>, &ScaledAdapter)| {
                    self.features(encoded, &list, adapter.adapter.width()).map(Shown::Encoded)
                };
                lists.into_iter().zip(adapters).map(features).collect()
            }
        }
    }

    /// Embeddings from an argument as `(pictures, features)`.
    fn features(&self, name: &str, list: &[ArtifactRef], width: usize) -> Result<Tensor> {
        let [handle] = list else {
            return Err(refuse(name, format!("has {} arrays for one IP-Adapter; give one", list.len())));
        };
        let features = tensor(self.arguments, name, *handle, self.parts.dtype, &self.parts.device)?;
        match features.dims() {
            // The reference shows all rows to each picture of a call, one after the other.
            &[_, _, found] if found == width => Ok(features.flatten(0, 1)?),
            dims => Err(refuse(name, format!("has shape {dims:?}; this call needs (1, pictures, {width})"))),
        }
    }
}
