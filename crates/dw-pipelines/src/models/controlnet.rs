//! ControlNet: a copy of a UNet's way down that turns a picture (edges, depth, a pose) into additions to the UNet's
//! skip connections (diffusers `ControlNetModel` and `ControlNetUnionModel`); Zhang, Rao and Agrawala 2023,
//! arXiv:2302.05543.
//!
//! Owns one evaluation. When a ControlNet acts, and on which half of the batch, belongs to the pipelines.

pub(super) mod condition;
mod union;

use candle_core::{DType, Device, Tensor};
use serde::Deserialize;

use self::condition::ConditionEmbedding;
pub use self::union::{ControlNetUnionConfig, ControlNetUnionInput, ControlNetUnionModel};
use super::unet::{Conditioning, Trunk, UnetConfig, UnetInput};
use crate::{
    Result,
    models::config::unsupported,
    nn::{Conv2d, Conv2dOptions},
    weights::Weights,
};

/// The `config.json` of a `ControlNetModel`; what it leaves out has diffusers' defaults.
#[derive(Clone, Debug, Deserialize)]
#[non_exhaustive]
pub struct ControlNetConfig {
    /// What it has in common with the UNet it was copied from.
    #[serde(flatten)]
    pub unet: UnetConfig,
    /// What it has besides.
    #[serde(flatten)]
    pub condition: ConditionConfig,
}

/// How the picture that controls is read.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct ConditionConfig {
    /// Channels of the picture.
    pub conditioning_channels: usize,
    /// Channels of the layers that bring the picture to the size of the latents.
    pub conditioning_embedding_out_channels: Vec<usize>,
    /// `rgb`, or `bgr` for a model that was trained on reversed channels.
    pub controlnet_conditioning_channel_order: String,
    /// Whether the additions are averaged over the picture.
    pub global_pool_conditions: bool,
}

impl Default for ConditionConfig {
    fn default() -> Self {
        Self {
            conditioning_channels: 3,
            conditioning_embedding_out_channels: vec![16, 32, 96, 256],
            controlnet_conditioning_channel_order: String::from("rgb"),
            global_pool_conditions: false,
        }
    }
}

/// What one evaluation of a ControlNet takes.
#[derive(Clone, Copy, Debug)]
pub struct ControlNetInput<'a> {
    /// What the UNet takes, too; its residuals play no part.
    pub unet: UnetInput<'a>,
    /// The picture, `(batch, conditioning_channels, 8 height, 8 width)` in 0..1.
    pub condition: &'a Tensor,
    /// How strongly it acts.
    pub scale: f64,
    /// Whether deep additions count more than shallow ones, for prompts that say nothing.
    pub is_guess: bool,
}

/// What a ControlNet adds to a UNet.
#[derive(Clone, Debug)]
pub struct ControlNetOutput {
    /// Additions to the skip connections, from the full size downwards.
    pub down: Vec<Tensor>,
    /// The addition to the middle.
    pub mid: Tensor,
}

impl ControlNetOutput {
    /// The sum of two ControlNets' additions.
    pub fn add(&self, other: &Self) -> Result<Self> {
        let down = self.down.iter().zip(&other.down).map(|(left, right)| left.broadcast_add(right));
        Ok(Self { down: down.collect::<candle_core::Result<_>>()?, mid: self.mid.broadcast_add(&other.mid)? })
    }

    /// Every addition multiplied by its own scale: one per skip connection and one for the middle.
    fn scaled(self, scales: &[f64]) -> Result<Self> {
        let down = self.down.iter().zip(scales).map(|(residual, scale)| residual * *scale);
        let last = scales.last().copied().unwrap_or(1.0);
        Ok(Self { down: down.collect::<candle_core::Result<_>>()?, mid: (self.mid * last)? })
    }

    /// Every addition averaged over the picture, `(batch, channels, 1, 1)`.
    fn pooled(self) -> Result<Self> {
        let pool = |residual: &Tensor| residual.mean_keepdim(3)?.mean_keepdim(2);
        let down = self.down.iter().map(pool).collect::<candle_core::Result<_>>()?;
        Ok(Self { down, mid: pool(&self.mid)? })
    }
}

/// The factors of guess mode: from 0.1 for the shallowest addition to 1 for the middle, in equal ratios.
fn guess_scales(count: usize) -> Vec<f64> {
    (0..count).map(|i| 10f64.powf(i as f64 / (count.max(2) - 1) as f64 - 1.0)).collect()
}

/// A ControlNet for one kind of picture.
pub struct ControlNetModel {
    config: ControlNetConfig,
    dtype: DType,
    device: Device,
    trunk: Trunk,
    condition: ConditionEmbedding,
    heads: Heads,
}

impl ControlNetModel {
    /// Builds the ControlNet, or says which setting of the configuration it cannot run.
    pub fn new(config: &ControlNetConfig, weights: Weights) -> Result<Self> {
        Ok(Self {
            trunk: Trunk::new(&config.unet, &weights)?,
            condition: ConditionEmbedding::new(&config.unet, &config.condition, &weights)?,
            heads: Heads::new(&config.unet, &weights)?,
            config: config.clone(),
            dtype: weights.dtype(),
            device: weights.device().clone(),
        })
    }

    /// The configuration it was built from.
    pub fn config(&self) -> &ControlNetConfig {
        &self.config
    }

    /// The type of the additions; inputs are converted to it.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where the model is.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The additions for one step.
    pub fn forward(&self, input: &ControlNetInput) -> Result<ControlNetOutput> {
        let text = input.unet.encoder_hidden_states.to_dtype(self.dtype)?;
        let time = self.trunk.time.forward(&input.unet, self.dtype)?;
        let sample = self.trunk.embed(&input.unet.sample.to_dtype(self.dtype)?)?;
        let sample = (sample + self.condition.forward(&input.condition.to_dtype(self.dtype)?)?)?;
        let (mid, skips) =
            self.trunk.forward(&sample, Conditioning { time: &time, text: &text, image_prompts: None })?;
        let output = self.heads.forward(&mid, &skips)?;
        let is_pooled = self.config.condition.global_pool_conditions;
        let count = skips.len() + 1;
        let scales = if input.is_guess && !is_pooled { guess_scales(count) } else { vec![1.0; count] };
        let output = output.scaled(&scales.iter().map(|scale| scale * input.scale).collect::<Vec<_>>())?;
        if is_pooled { output.pooled() } else { Ok(output) }
    }
}

/// The 1x1 convolutions behind each skip connection and the middle, which training starts at zero.
pub(crate) struct Heads {
    down: Vec<Conv2d>,
    mid: Conv2d,
}

impl Heads {
    pub(crate) fn new(config: &UnetConfig, weights: &Weights) -> Result<Self> {
        let last = *config.block_out_channels.last().ok_or_else(|| unsupported("block_out_channels", "[]"))?;
        let head = |name: String, channels: usize| weights.pp(name).conv2d(channels, channels, Conv2dOptions::same(1));
        let channels = config.skip_channels()?;
        let down = channels.into_iter().enumerate();
        Ok(Self {
            down: down
                .map(|(i, channels)| head(format!("controlnet_down_blocks.{i}"), channels))
                .collect::<Result<_>>()?,
            mid: head(String::from("controlnet_mid_block"), last)?,
        })
    }

    pub(crate) fn forward(&self, mid: &Tensor, skips: &[Tensor]) -> Result<ControlNetOutput> {
        let down = self.down.iter().zip(skips).map(|(head, skip)| head.forward(skip));
        Ok(ControlNetOutput { down: down.collect::<Result<_>>()?, mid: self.mid.forward(mid)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guess_mode_rises_from_a_tenth_to_one_in_equal_ratios() {
        let scales = guess_scales(3);
        assert!((scales[0] - 0.1).abs() < 1e-12 && (scales[1] - 0.1f64.sqrt()).abs() < 1e-12);
        assert!((scales[2] - 1.0).abs() < 1e-12);
    }

    #[test]
    fn a_configuration_reads_the_settings_of_the_unet_and_its_own() {
        let config: ControlNetConfig = serde_json::from_str(
            r#"{"block_out_channels": [8, 16], "conditioning_embedding_out_channels": [4, 8], "in_channels": 9}"#,
        )
        .expect("a configuration of known keys");
        assert_eq!((config.unet.in_channels, &config.unet.block_out_channels[..]), (9, &[8, 16][..]));
        assert_eq!(config.condition.conditioning_embedding_out_channels, [4, 8]);
        assert_eq!(config.condition.conditioning_channels, 3);
    }
}
