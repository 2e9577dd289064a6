//! The IP-Adapters of a Flux pipeline: whether they fit the model, and how strongly each acts in which block.
//!
//! What pictures say to them in a call is [`super::image_prompt`]'s part.

use candle_core::{DType, Device};

use crate::{
    Error, Result,
    models::{FluxConfig, FluxIpAdapter},
    pipelines::{clip_pixels::ClipPixels, ip_adapter::Found, text_to_image::refuse},
    request::{Context, IpAdapterScale},
};

/// The IP-Adapters of a pipeline, and how pictures are prepared for their image encoder.
pub(crate) struct FluxIpAdapters {
    pub(crate) adapters: Vec<ScaledAdapter>,
    pub(crate) pixels: ClipPixels,
}

/// An adapter with its strength in each block.
pub(crate) struct ScaledAdapter {
    pub(super) adapter: FluxIpAdapter,
    pub(super) scales: Vec<f64>,
}

impl ScaledAdapter {
    /// Reads an adapter that was found.
    pub(crate) fn read(
        found: &Found<'_>,
        config: &FluxConfig,
        kind: (DType, &Device),
        context: Context<'_>,
    ) -> Result<Self> {
        let scales = scales(found.scale(), config)?;
        Ok(Self { adapter: FluxIpAdapter::new(config, found.weights(kind, context)?)?, scales })
    }
}

/// Refuses an adapter made for another model, with scales for other blocks or, where one is known, for an image encoder
/// that gives another number of features; reads no weights.
pub(crate) fn check(found: &Found<'_>, config: &FluxConfig, encoder_features: Option<usize>) -> Result<()> {
    scales(found.scale(), config)?;
    let width = FluxIpAdapter::check(config, &found.origin(), &found.shapes()?)?;
    match encoder_features {
        Some(features) if features != width => Err(Error::Unsupported(format!(
            "the image encoder gives {features} features, but the IP-Adapter reads {width}; load the encoder it was \
             trained with (of XLabs' adapters openai/clip-vit-large-patch14) as component `image_encoder`"
        ))),
        _ => Ok(()),
    }
}

/// The strength in each block in which picture and text have weights of their own.
fn scales(scale: &IpAdapterScale, config: &FluxConfig) -> Result<Vec<f64>> {
    let blocks = config.num_layers;
    match scale {
        IpAdapterScale::Usual => Ok(vec![1.0; blocks]),
        IpAdapterScale::Everywhere(scale) => Ok(vec![*scale; blocks]),
        IpAdapterScale::ByLayer(numbers) if numbers.len() == blocks => Ok(numbers.clone()),
        IpAdapterScale::ByLayer(numbers) => Err(refuse(
            "ip_adapter.scale",
            format!(
                "has {} numbers, but the transformer has {blocks} double blocks; give one number, or one for each",
                numbers.len()
            ),
        )),
        IpAdapterScale::ByBlock(_) => Err(refuse(
            "ip_adapter.scale",
            format!(
                "names parts of a UNet, which Flux does not have; give one number, or a list of {blocks}, one for each \
                 double block"
            ),
        )),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_scale_is_one_number_or_one_for_each_double_block() {
        let config = FluxConfig { num_layers: 3, ..FluxConfig::default() };
        let read = |value| IpAdapterScale::from_json(&value).and_then(|scale| scales(&scale, &config));
        assert_eq!(read(json!(null)).expect("valid"), [1.0, 1.0, 1.0]);
        assert_eq!(read(json!(0.5)).expect("valid"), [0.5, 0.5, 0.5]);
        assert_eq!(read(json!([0.1, 0.2, 1])).expect("valid"), [0.1, 0.2, 1.0]);
        let said = read(json!([0.1, 0.2])).expect_err("too few").to_string();
        assert!(said.contains("has 2 numbers, but the transformer has 3 double blocks"), "{said}");
        let said = read(json!({ "mid": 1.0 })).expect_err("a UNet's").to_string();
        assert!(said.contains("parts of a UNet") && said.contains("a list of 3"), "{said}");
    }
}
