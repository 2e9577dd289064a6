//! Whether the parts of a Stable Diffusion 3 belong together, as far as their configurations say.

use super::{Kind, Model, Origin};
use crate::{
    Error, Result,
    models::{Sd3Config, Sd3ControlNetConfig},
};

/// Refuses ControlNets that were made for another transformer, before weights are read.
pub(super) fn check(origins: &[(String, Origin)]) -> Result<()> {
    let transformers = origins.iter().find_map(|(_, origin)| transformer(origin).transpose());
    let Some(transformer) = transformers.transpose()? else { return Ok(()) };
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

fn transformer(origin: &Origin) -> Result<Option<Sd3Config>> {
    Ok(match origin {
        Origin::Loaded(planned) if planned.kind == Kind::Sd3Transformer => Some(planned.config()?),
        Origin::Shared(component) => match &component.model {
            Model::Sd3Transformer(model) => Some(model.config().clone()),
            _ => None,
        },
        Origin::Loaded(_) => None,
    })
}

fn controlnet(origin: &Origin) -> Result<Option<Sd3ControlNetConfig>> {
    Ok(match origin {
        Origin::Loaded(planned) if planned.kind == Kind::Sd3ControlNet => Some(planned.config()?),
        Origin::Shared(component) => match &component.model {
            Model::Sd3ControlNet(model) => Some(model.config().clone()),
            _ => None,
        },
        Origin::Loaded(_) => None,
    })
}

/// Why a net cannot steer a transformer.
fn misfit(net: &Sd3ControlNetConfig, transformer: &Sd3Config) -> Option<String> {
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
        assert_eq!(misfit(&net(18, Some(4096)), &transformer), None);
        assert_eq!(misfit(&net(18, None), &transformer), None);
        assert!(misfit(&net(24, None), &transformer).is_some_and(|reason| reason.contains("1536")));
        assert!(misfit(&net(18, Some(768)), &transformer).is_some_and(|reason| reason.contains("768")));
    }
}
