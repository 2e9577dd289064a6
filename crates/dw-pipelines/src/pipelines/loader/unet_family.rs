//! What belongs to a UNet: its ControlNets and its IP-Adapters, checked before weights are read.

use candle_core::{DType, Device};

use super::{Kind, Origin};
use crate::{
    Error, Result,
    models::{ClipVisionConfig, ControlNetConfig, UnetConfig},
    pipelines::{
        clip_pixels::ClipPixels,
        components::Model,
        ip_adapter::{Found, IpAdapters, check_encoder},
    },
    request::Context,
};

/// Refuses ControlNets that were made for another family of models, before weights are read.
pub(super) fn check(origins: &[(String, Origin)]) -> Result<()> {
    let mut unet = None;
    for (name, origin) in origins {
        let Some((kind, config)) = origin.unet_config()? else { continue };
        if kind == Kind::Unet {
            unet = Some(config);
            continue;
        }
        let Some(unet) = &unet else { continue };
        let (of_net, of_unet) = (&config.cross_attention_dim, &unet.cross_attention_dim);
        let reason = if of_net != of_unet {
            let show = |dim| serde_json::to_string(dim).unwrap_or_default();
            format!("reads text of {} features, but the model's UNet reads {}", show(of_net), show(of_unet))
        } else if config.block_out_channels != unet.block_out_channels {
            let (net, unet) = (&config.block_out_channels, &unet.block_out_channels);
            format!("has levels of {net:?} channels, but the model's UNet has {unet:?}")
        } else if config.addition_embed_type != unet.addition_embed_type || config.in_channels != unet.out_channels {
            "has other inputs than the model's UNet".to_owned()
        } else {
            continue;
        };
        return Err(Error::Unsupported(format!(
            "component `{name}` {reason}; use a ControlNet made for this family of models"
        )));
    }
    Ok(())
}

impl Origin {
    /// What a UNet, or the UNet that a ControlNet was copied from, looks like; none for other components.
    fn unet_config(&self) -> Result<Option<(Kind, UnetConfig)>> {
        Ok(match self {
            Self::Loaded(planned) => match planned.kind {
                Kind::Unet => Some((Kind::Unet, planned.config()?)),
                Kind::ControlNet => Some((Kind::ControlNet, planned.config::<ControlNetConfig>()?.unet)),
                _ => None,
            },
            Self::Shared(component) => match &component.model {
                Model::Unet(unet) => Some((Kind::Unet, unet.config().clone())),
                Model::ControlNet(net) => Some((Kind::ControlNet, net.config().unet.clone())),
                Model::ControlNetUnion(net) => Some((Kind::ControlNet, net.config().unet.clone())),
                _ => None,
            },
        })
    }
}

/// The UNet of a pipeline that is being loaded.
pub(super) struct Unet {
    pub(super) config: UnetConfig,
    dtype: DType,
    device: Device,
}

impl Unet {
    /// The one among these components, if any.
    pub(super) fn of(origins: &[(String, Origin)]) -> Result<Option<Self>> {
        let unet = origins.iter().find_map(|(_, origin)| match origin {
            Origin::Loaded(planned) if planned.kind == Kind::Unet => {
                let with = |config| Self { config, dtype: planned.dtype, device: planned.device.clone() };
                Some(planned.config().map(with))
            }
            Origin::Shared(component) => match &component.model {
                Model::Unet(unet) => {
                    Some(Ok(Self { config: unet.config().clone(), dtype: unet.dtype(), device: unet.device().clone() }))
                }
                _ => None,
            },
            Origin::Loaded(_) => None,
        });
        unet.transpose()
    }
}

/// What the image encoder among these components looks like, if there is one.
fn clip_vision_config(origins: &[(String, Origin)]) -> Result<Option<ClipVisionConfig>> {
    let config = origins.iter().find_map(|(_, origin)| match origin {
        Origin::Loaded(planned) => (planned.kind == Kind::ClipVision).then(|| planned.config()),
        Origin::Shared(component) => match &component.model {
            Model::ClipVision(model) => Some(Ok(model.config().clone())),
            _ => None,
        },
    });
    config.transpose()
}

/// Reads the adapters that were found for `unet`; none when there are none.
pub(super) fn read_ip_adapters(
    unet: &Unet,
    origins: &[(String, Origin)],
    found: &[Found<'_>],
    pixels: ClipPixels,
    context: Context<'_>,
) -> Result<Option<IpAdapters>> {
    if found.is_empty() {
        return Ok(None);
    }
    let encoder = clip_vision_config(origins)?;
    let mut adapters = Vec::with_capacity(found.len());
    for found in found {
        let scaled = found.read(&unet.config, (unet.dtype, &unet.device), context)?;
        if let Some(encoder) = &encoder {
            check_encoder(&scaled.adapter, encoder)?;
        }
        adapters.push(scaled);
    }
    Ok(Some(IpAdapters { adapters, pixels }))
}
