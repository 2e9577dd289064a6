//! The IP-Adapter of a Stable Diffusion 3: whether it belongs to the model, and reading it.

use serde_json::Value;

use super::{Kind, Model, Origin};
use crate::{
    Error, Result,
    hub::{Need, sub},
    models::{Sd3Config, Sd3IpAdapter, SiglipVisionConfig, sd3_ip_adapter::Shapes},
    pipelines::{
        clip_pixels::ClipPixels, components::Parts, ip_adapter::Found, sd3_image_prompt::ScaledSd3Adapter,
        text_to_image::refuse,
    },
    request::{Context, IpAdapterRequest, IpAdapterScale},
};

const IMAGE_ENCODER: &str = "image_encoder";

/// How strongly an adapter acts when its step does not say.
const USUAL_SCALE: f64 = 0.5;

/// Refuses what the family does not take, whatever the files hold.
pub(super) fn check_requests(requests: &[IpAdapterRequest]) -> Result<()> {
    if requests.len() > 1 {
        let reason = format!("lists {} adapters, but Stable Diffusion 3 takes one; leave one", requests.len());
        return Err(refuse("ip_adapter", reason));
    }
    requests.iter().try_for_each(|request| scale(request).map(drop))
}

fn scale(request: &IpAdapterRequest) -> Result<f64> {
    match request.scale {
        IpAdapterScale::Usual => Ok(USUAL_SCALE),
        IpAdapterScale::Everywhere(scale) => Ok(scale),
        IpAdapterScale::ByBlock(_) | IpAdapterScale::ByLayer(_) => Err(refuse(
            "ip_adapter.scale",
            "must be one number: an IP-Adapter of Stable Diffusion 3 acts alike everywhere",
        )),
    }
}

/// Refuses adapters of other models, and image encoders that an adapter cannot read, before weights are read.
pub(super) fn check(found: &[Found<'_>], origins: &[(String, Origin)]) -> Result<()> {
    let (Some(found), Some(transformer)) = (found.first(), transformer(origins)?) else { return Ok(()) };
    let shapes = found.shapes()?;
    let Shapes { width, .. } = Shapes::check(&transformer, &found.origin(), &|name| shapes.get(name).cloned())?;
    let Some(encoder) = image_encoder(origins)? else { return Ok(()) };
    if encoder.hidden_size == width {
        return Ok(());
    }
    Err(Error::Unsupported(format!(
        "the image encoder gives {} features, but the IP-Adapter reads {width}; load the encoder it was trained with as \
         component `{IMAGE_ENCODER}` (`google/siglip-so400m-patch14-384` for the adapter of Stable Diffusion 3.5 large)",
        encoder.hidden_size
    )))
}

fn transformer(origins: &[(String, Origin)]) -> Result<Option<Sd3Config>> {
    let config = origins.iter().find_map(|(_, origin)| match origin {
        Origin::Loaded(planned) => (planned.kind == Kind::Sd3Transformer).then(|| planned.config()),
        Origin::Shared(component) => match &component.model {
            Model::Sd3Transformer(model) => Some(Ok(model.config().clone())),
            _ => None,
        },
    });
    config.transpose()
}

fn image_encoder(origins: &[(String, Origin)]) -> Result<Option<SiglipVisionConfig>> {
    let config = origins.iter().find_map(|(_, origin)| match origin {
        Origin::Loaded(planned) => (planned.kind == Kind::Siglip).then(|| planned.config()),
        Origin::Shared(component) => match &component.model {
            Model::Siglip(model) => Some(Ok(model.config().clone())),
            _ => None,
        },
    });
    config.transpose()
}

/// How the image encoder takes pictures, where a file beside its weights says so.
pub(super) fn preprocessor(
    found: &[Found<'_>],
    origins: &[(String, Origin)],
    context: Context<'_>,
) -> Result<Option<Value>> {
    let planned = origins.iter().find_map(|(name, origin)| match origin {
        Origin::Loaded(planned) if name == IMAGE_ENCODER => Some(planned),
        _ => None,
    });
    let Some(planned) = planned.filter(|planned| !found.is_empty() && planned.kind == Kind::Siglip) else {
        return Ok(None);
    };
    let file = "preprocessor_config.json";
    match planned.files.fetch(&planned.folder, Need::File(file), context) {
        // Not every encoder has one; what it would say is SigLIP's own then.
        Ok(()) | Err(Error::Source(_)) => planned.files.read_json(&sub(&planned.folder, file)),
        Err(error) => Err(error),
    }
}

/// Reads the adapter that was found; none when there is none.
pub(super) fn read(
    parts: &Parts,
    found: &[Found<'_>],
    preprocessor: Option<&Value>,
    context: Context<'_>,
) -> Result<Option<ScaledSd3Adapter>> {
    let Some(found) = found.first() else { return Ok(None) };
    let transformer = parts.sd3_transformer()?;
    let weights = found.weights((transformer.dtype(), &parts.device), context)?;
    Ok(Some(ScaledSd3Adapter {
        adapter: Sd3IpAdapter::new(transformer.config(), &weights)?,
        scale: scale(found.request)?,
        pixels: ClipPixels::of_siglip(preprocessor.or(parts.feature_extractor.as_ref())),
    }))
}
