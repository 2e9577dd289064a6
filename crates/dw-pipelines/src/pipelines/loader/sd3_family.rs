//! Whether the parts of a Stable Diffusion 3 belong together, as far as their configurations say.

use super::{Kind, Model, Origin};
use crate::{
    Error, Result,
    models::{ClipTextConfig, Sd3Config, Sd3ControlNetConfig, T5Config},
};

/// Refuses text encoders and ControlNets that were made for another transformer, before weights are read.
pub(super) fn check(origins: &[(String, Origin)]) -> Result<()> {
    let parts = origins.iter().map(|(name, origin)| Ok((name.as_str(), Part::of(origin)?)));
    let parts = parts.collect::<Result<Vec<(&str, Part)>>>()?;
    let transformer = parts.iter().find_map(|(_, part)| match part {
        Part::Transformer(config) => Some(config),
        _ => None,
    });
    let Some(transformer) = transformer else { return Ok(()) };
    for (name, part) in &parts {
        let (reason, remedy) = match part {
            Part::ControlNet(net) => (net_misfit(net, transformer), "a ControlNet made for this model"),
            Part::T5(config) => (t5_misfit(config, transformer), "the text encoder that belongs to the model"),
            _ => (None, ""),
        };
        if let Some(reason) = reason {
            return Err(Error::Unsupported(format!("component `{name}` {reason}; use {remedy}")));
        }
    }
    let mut encoders = parts.iter().filter_map(|(_, part)| match part {
        Part::ClipText(config) => Some(config),
        _ => None,
    });
    if let (Some(first), Some(second)) = (encoders.next(), encoders.next())
        && let Some(reason) = clip_misfit(first, second, transformer)
    {
        return Err(Error::Unsupported(format!(
            "components `text_encoder` and `text_encoder_2` {reason}; use the text encoders that belong to the model"
        )));
    }
    Ok(())
}

/// The configuration of a part that another one must fit.
enum Part {
    Transformer(Sd3Config),
    ControlNet(Sd3ControlNetConfig),
    T5(T5Config),
    ClipText(ClipTextConfig),
    Other,
}

impl Part {
    fn of(origin: &Origin) -> Result<Self> {
        Ok(match origin {
            Origin::Loaded(planned) => match planned.kind {
                Kind::Sd3Transformer => Self::Transformer(planned.config()?),
                Kind::Sd3ControlNet => Self::ControlNet(planned.config()?),
                Kind::T5 => Self::T5(planned.config()?),
                Kind::ClipText => Self::ClipText(planned.config()?),
                _ => Self::Other,
            },
            Origin::Shared(component) => match &component.model {
                Model::Sd3Transformer(model) => Self::Transformer(model.config().clone()),
                Model::Sd3ControlNet(model) => Self::ControlNet(model.config().clone()),
                Model::T5(model) => Self::T5(model.config().clone()),
                Model::ClipText(model) => Self::ClipText(model.config().clone()),
                _ => Self::Other,
            },
        })
    }
}

/// Why a T5 encoder's states cannot be read by a transformer.
fn t5_misfit(config: &T5Config, transformer: &Sd3Config) -> Option<String> {
    let (made, read) = (config.d_model, transformer.joint_attention_dim);
    (made != read).then(|| format!("makes text of {made} features, but the model's transformer reads {read}"))
}

/// Why what two CLIP encoders make together cannot be read by a transformer.
fn clip_misfit(first: &ClipTextConfig, second: &ClipTextConfig, transformer: &Sd3Config) -> Option<String> {
    let (made, read) = (first.hidden_size + second.hidden_size, transformer.joint_attention_dim);
    if made > read {
        return Some(format!("make text of {made} features together, but the model's transformer reads {read}"));
    }
    let (made, read) = (first.projection_dim + second.projection_dim, transformer.pooled_projection_dim);
    let differs = made != read;
    differs.then(|| format!("make pooled text of {made} features together, but the model's transformer reads {read}"))
}

/// Why a net cannot steer a transformer.
fn net_misfit(net: &Sd3ControlNetConfig, transformer: &Sd3Config) -> Option<String> {
    let inner = net.num_attention_heads * net.attention_head_dim;
    let wanted = transformer.num_attention_heads * transformer.attention_head_dim;
    if inner != wanted {
        return Some(format!("has tokens of {inner} features, but the model's transformer has {wanted}"));
    }
    if let Some(text) = net.joint_attention_dim
        && text != transformer.joint_attention_dim
    {
        let wanted = transformer.joint_attention_dim;
        return Some(format!("reads text of {text} features, but the model's transformer reads {wanted}"));
    }
    let (pooled, wanted) = (net.pooled_projection_dim, transformer.pooled_projection_dim);
    if pooled != wanted {
        return Some(format!("reads pooled text of {pooled} features, but the model's transformer reads {wanted}"));
    }
    let differs = net.in_channels != transformer.latent_channels() || net.patch_size != transformer.patch_size;
    differs.then(|| "has other inputs than the model's transformer".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_net_of_another_model_is_told_by_its_sizes() {
        let net = |heads: usize, text: Option<usize>| Sd3ControlNetConfig {
            num_attention_heads: heads,
            joint_attention_dim: text,
            ..Sd3ControlNetConfig::default()
        };
        let transformer = Sd3Config::default();
        assert_eq!(net_misfit(&net(18, Some(4096)), &transformer), None);
        assert_eq!(net_misfit(&net(18, None), &transformer), None);
        assert!(net_misfit(&net(24, None), &transformer).is_some_and(|reason| reason.contains("1536")));
        assert!(net_misfit(&net(18, Some(768)), &transformer).is_some_and(|reason| reason.contains("768")));
    }

    #[test]
    fn two_clip_encoders_are_measured_together() {
        let clip = |hidden_size, projection_dim| ClipTextConfig { hidden_size, projection_dim, ..Default::default() };
        let transformer = Sd3Config::default();
        assert_eq!(clip_misfit(&clip(768, 768), &clip(1280, 1280), &transformer), None);
        let reason = clip_misfit(&clip(768, 768), &clip(1280, 1024), &transformer);
        assert!(reason.is_some_and(|reason| reason.contains("1792") && reason.contains("2048")));
    }
}
