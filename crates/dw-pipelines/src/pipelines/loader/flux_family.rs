//! Whether the parts of a Flux model belong together, as far as their configurations say.

use super::{Found, Kind, Model, Origin};
use crate::{
    Error, Result,
    models::{ClipVisionConfig, FluxConfig, FluxControlNetConfig, VaeConfig},
    pipelines::{
        clip_pixels::ClipPixels,
        components::Parts,
        flux::{
            check_class,
            ip_adapter::{self, FluxIpAdapters, ScaledAdapter},
        },
    },
    request::Context,
};

/// Pixels for each side of a latent where a step has no autoencoder.
const USUAL_SCALE: usize = 8;

/// Refuses transformers that were made for another class, and ControlNets that were made for another transformer, before
/// weights are read. LoRAs may make a transformer fit the class.
pub(super) fn check((class, has_loras): (&str, bool), origins: &[(String, Origin)]) -> Result<()> {
    let transformers = origins.iter().find_map(|(_, origin)| transformer(origin).transpose());
    let Some(transformer) = transformers.transpose()? else { return Ok(()) };
    if !has_loras {
        let scales = origins.iter().find_map(|(_, origin)| vae(origin).transpose());
        let scale = scales.transpose()?.map_or(USUAL_SCALE, |vae| vae.scale_factor());
        check_class(class, (transformer.in_channels / 4, transformer.predicted_channels() / 4), scale)?;
    }
    for (name, origin) in origins {
        let Some(net) = controlnet(origin)? else { continue };
        if let Some(reason) = misfit(&net, &transformer) {
            return Err(Error::Unsupported(format!(
                "component `{name}` {reason}; use a ControlNet made for this model"
            )));
        }
    }
    Ok(())
}

/// Refuses IP-Adapters that were made for another transformer or image encoder, before weights are read.
pub(super) fn check_ip_adapters(origins: &[(String, Origin)], found: &[Found<'_>]) -> Result<()> {
    let transformers = origins.iter().find_map(|(_, origin)| transformer(origin).transpose());
    let Some(transformer) = transformers.transpose()? else { return Ok(()) };
    let encoders = origins.iter().find_map(|(_, origin)| image_encoder(origin).transpose());
    let features = encoders.transpose()?.map(|encoder| encoder.projection_dim);
    found.iter().try_for_each(|found| ip_adapter::check(found, &transformer, features))
}

/// Reads the adapters that were found; none when there are none.
pub(super) fn read_ip_adapters(
    parts: &Parts,
    found: &[Found<'_>],
    pixels: ClipPixels,
    context: Context<'_>,
) -> Result<Option<FluxIpAdapters>> {
    if found.is_empty() {
        return Ok(None);
    }
    let transformer = parts.flux()?;
    let kind = (transformer.dtype(), transformer.device());
    let read = |found| ScaledAdapter::read(found, transformer.config(), kind, context);
    Ok(Some(FluxIpAdapters { adapters: found.iter().map(read).collect::<Result<_>>()?, pixels }))
}

fn transformer(origin: &Origin) -> Result<Option<FluxConfig>> {
    Ok(match origin {
        Origin::Loaded(planned) if planned.kind == Kind::FluxTransformer => Some(planned.config()?),
        Origin::Shared(component) => match &component.model {
            Model::FluxTransformer(model) => Some(model.config().clone()),
            _ => None,
        },
        Origin::Loaded(_) => None,
    })
}

fn vae(origin: &Origin) -> Result<Option<VaeConfig>> {
    Ok(match origin {
        Origin::Loaded(planned) if planned.kind == Kind::Vae => Some(planned.config()?),
        Origin::Shared(component) => match &component.model {
            Model::Vae(model) => Some(model.config().clone()),
            _ => None,
        },
        Origin::Loaded(_) => None,
    })
}

fn image_encoder(origin: &Origin) -> Result<Option<ClipVisionConfig>> {
    Ok(match origin {
        Origin::Loaded(planned) if planned.kind == Kind::ClipVision => Some(planned.config()?),
        Origin::Shared(component) => match &component.model {
            Model::ClipVision(model) => Some(model.config().clone()),
            _ => None,
        },
        Origin::Loaded(_) => None,
    })
}

fn controlnet(origin: &Origin) -> Result<Option<FluxControlNetConfig>> {
    Ok(match origin {
        Origin::Loaded(planned) if planned.kind == Kind::FluxControlNet => Some(planned.config()?),
        Origin::Shared(component) => match &component.model {
            Model::FluxControlNet(model) => Some(model.config().clone()),
            _ => None,
        },
        Origin::Loaded(_) => None,
    })
}

/// Why a net cannot steer a transformer.
fn misfit(net: &FluxControlNetConfig, transformer: &FluxConfig) -> Option<String> {
    let net = &net.transformer;
    let sizes = [
        ("tokens of", "features", net.inner_dim(), transformer.inner_dim()),
        ("text of", "features", net.joint_attention_dim, transformer.joint_attention_dim),
        ("pooled text of", "features", net.pooled_projection_dim, transformer.pooled_projection_dim),
        ("latents of", "values for each token", net.in_channels, transformer.predicted_channels()),
    ];
    let differs = sizes.into_iter().find(|(_, _, found, wanted)| found != wanted);
    differs.map(|(what, unit, found, wanted)| {
        format!("is made for {what} {found} {unit}, but the model's transformer has {wanted}")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_net_of_another_model_is_told_by_its_sizes() {
        let net = |joint_attention_dim: usize| FluxControlNetConfig {
            transformer: FluxConfig { joint_attention_dim, num_layers: 2, ..FluxConfig::default() },
            ..FluxControlNetConfig::default()
        };
        // A transformer that reads more than the latents predicts as many values as any.
        let transformer = FluxConfig { in_channels: 128, out_channels: Some(64), ..FluxConfig::default() };
        assert_eq!(misfit(&net(4096), &transformer), None);
        let reason = misfit(&net(2048), &transformer).expect("other text");
        assert!(reason.contains("text of 2048") && reason.contains("4096"), "{reason}");
    }
}
