//! Brings the picture that controls to the size and channels of a denoiser's first feature map.

use candle_core::Tensor;

use super::ConditionConfig;
use crate::{
    Result,
    models::{config::unsupported, unet::UnetConfig},
    nn::{Activation, Conv2d, Conv2dOptions},
    weights::Weights,
};

/// A tiny convolutional encoder (diffusers `ControlNetConditioningEmbedding`); three strides of 2 with the usual four
/// channel counts.
pub(crate) struct ConditionEmbedding {
    conv_in: Conv2d,
    blocks: Vec<Conv2d>,
    conv_out: Conv2d,
    is_bgr: bool,
}

impl ConditionEmbedding {
    pub(crate) fn new(unet: &UnetConfig, config: &ConditionConfig, weights: &Weights) -> Result<Self> {
        let is_bgr = match config.controlnet_conditioning_channel_order.as_str() {
            "rgb" => false,
            "bgr" => true,
            other => return Err(unsupported("controlnet_conditioning_channel_order", other)),
        };
        let channels = &config.conditioning_embedding_out_channels;
        let ends = (config.conditioning_channels, unet.block_out_channels[0]);
        let embedding = Self::of_channels(channels, ends, &weights.pp("controlnet_cond_embedding"))?;
        Ok(Self { is_bgr, ..embedding })
    }

    /// An encoder of a picture with so many channels to feature maps with as many, with `channels` in between.
    pub(crate) fn of_channels(channels: &[usize], (read, made): (usize, usize), weights: &Weights) -> Result<Self> {
        let (Some(&first), Some(&last)) = (channels.first(), channels.last()) else {
            return Err(unsupported("conditioning_embedding_out_channels", "[]"));
        };
        let same = Conv2dOptions::same(3);
        let mut blocks = Vec::with_capacity(2 * channels.len());
        for pair in channels.windows(2) {
            let block = |at: usize| weights.pp("blocks").pp(at);
            blocks.push(block(blocks.len()).conv2d(pair[0], pair[0], same)?);
            blocks.push(block(blocks.len()).conv2d(pair[0], pair[1], Conv2dOptions { stride: 2, ..same })?);
        }
        Ok(Self {
            conv_in: weights.pp("conv_in").conv2d(read, first, same)?,
            blocks,
            conv_out: weights.pp("conv_out").conv2d(last, made, same)?,
            is_bgr: false,
        })
    }

    /// `(batch, channels, f height, f width)` to feature maps `(batch, made, height, width)`.
    pub(crate) fn forward(&self, condition: &Tensor) -> Result<Tensor> {
        let condition = if self.is_bgr { condition.flip(&[1])? } else { condition.clone() };
        let mut x = Activation::Silu.forward(&self.conv_in.forward(&condition)?)?;
        for block in &self.blocks {
            x = Activation::Silu.forward(&block.forward(&x)?)?;
        }
        self.conv_out.forward(&x)
    }
}
