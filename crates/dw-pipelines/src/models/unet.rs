//! The denoiser of Stable Diffusion 1, 2 and XL (diffusers `UNet2DConditionModel`); Rombach et al. 2022,
//! arXiv:2112.10752, and Podell et al. 2023, arXiv:2307.01952.
//!
//! Owns one evaluation. Guidance, scaling of the input and the loop belong to the pipelines.

mod blocks;
mod conditioning;
mod config;
mod image_prompt;
mod k_blocks;
mod transformer;

use candle_core::{DType, Device, Tensor};

pub(crate) use self::blocks::Conditioning;
use self::{
    blocks::{DownBlock, MidBlock, UpBlock},
    conditioning::TimeConditioning,
    k_blocks::{KDownBlock, KUpBlock},
};
pub use self::{
    config::UnetConfig,
    image_prompt::{CrossAttentionLayer, ImageBranch, ImagePrompts},
};
use crate::{
    Error, Result,
    nn::{Activation, Conv2d, Conv2dOptions, GroupNorm},
    weights::Weights,
};

/// SDXL's conditions besides the prompt.
#[derive(Clone, Copy, Debug)]
pub struct AddedConditions<'a> {
    /// The pooled text, `(batch, features)`.
    pub text_embeds: &'a Tensor,
    /// Original size, crop and target size (or aesthetic score), `(batch, 6)` or `(batch, 5)`.
    pub time_ids: &'a Tensor,
}

/// What one evaluation of a UNet takes.
#[derive(Clone, Copy, Debug)]
pub struct UnetInput<'a> {
    /// Noisy latents, `(batch, in_channels, height, width)`.
    pub sample: &'a Tensor,
    /// The noise level, 0..1000.
    pub timestep: f64,
    /// The text, `(batch, tokens, cross_attention_dim)`.
    pub encoder_hidden_states: &'a Tensor,
    /// SDXL's conditions.
    pub added: Option<AddedConditions<'a>>,
    /// The guidance embedding of distilled models, `(batch, time_cond_proj_dim)`.
    pub timestep_cond: Option<&'a Tensor>,
    /// Class numbers `(batch,)` or features `(batch, n)`, where the model has classes.
    pub class_labels: Option<&'a Tensor>,
    /// ControlNet's additions to the skip connections, from the full size downwards.
    pub down_residuals: Option<&'a [Tensor]>,
    /// ControlNet's addition to the middle.
    pub mid_residual: Option<&'a Tensor>,
    /// What attention to the text sees of pictures.
    pub image_prompts: Option<&'a ImagePrompts>,
}

impl<'a> UnetInput<'a> {
    /// An input without any of the optional parts.
    pub fn new(sample: &'a Tensor, timestep: f64, encoder_hidden_states: &'a Tensor) -> Self {
        Self {
            sample,
            timestep,
            encoder_hidden_states,
            added: None,
            timestep_cond: None,
            class_labels: None,
            down_residuals: None,
            mid_residual: None,
            image_prompts: None,
        }
    }
}

/// The UNet.
pub struct Unet2DConditionModel {
    config: UnetConfig,
    dtype: DType,
    device: Device,
    trunk: Trunk,
    up_blocks: Vec<UpLevel>,
    /// None in a model whose residual blocks have norms of their own kind.
    norm_out: Option<(GroupNorm, Activation)>,
    conv_out: Conv2d,
}

impl Unet2DConditionModel {
    /// Builds the UNet, or says which setting of the configuration it cannot run.
    pub fn new(config: &UnetConfig, weights: Weights) -> Result<Self> {
        let trunk = Trunk::new(config, &weights)?;
        let channels = &config.block_out_channels;
        let plans = config.up_plans()?;
        let up_block = |i: usize| {
            let below = if i == 0 { plans[0].channels } else { plans[i - 1].channels };
            let skip = plans.get(i + 1).unwrap_or(&plans[i]).channels;
            let weights = weights.pp("up_blocks").pp(i);
            Ok(if k_blocks::is_k_block(&plans[i].class) {
                UpLevel::Conditioned(KUpBlock::new(config, &plans[i], skip, &weights)?)
            } else {
                UpLevel::Plain(UpBlock::new(config, &plans[i], below, skip, &weights)?)
            })
        };
        let norm_out = config.norm_num_groups.map(|groups| {
            let norm = weights.pp("conv_norm_out").group_norm(groups, channels[0], config.norm_eps)?;
            Ok::<_, Error>((norm, config.act()?))
        });
        let out = Conv2dOptions::same(config.conv_out_kernel);
        Ok(Self {
            trunk,
            up_blocks: (0..plans.len()).map(up_block).collect::<Result<_>>()?,
            norm_out: norm_out.transpose()?,
            conv_out: weights.pp("conv_out").conv2d(channels[0], config.out_channels, out)?,
            config: config.clone(),
            dtype: weights.dtype(),
            device: weights.device().clone(),
        })
    }

    /// The configuration it was built from.
    pub fn config(&self) -> &UnetConfig {
        &self.config
    }

    /// The type of the prediction; inputs are converted to it.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where the model is.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The prediction, `(batch, out_channels, height, width)`.
    pub fn forward(&self, input: &UnetInput) -> Result<Tensor> {
        self.check(input)?;
        let text = input.encoder_hidden_states.to_dtype(self.dtype)?;
        let time = self.trunk.time.forward(input, self.dtype)?;
        let conditioning = Conditioning { time: &time, text: &text, image_prompts: input.image_prompts };
        let sample = self.trunk.embed(&input.sample.to_dtype(self.dtype)?)?;
        let (mut x, mut skips) = self.trunk.forward(&sample, conditioning)?;
        add_residuals(&mut skips, input.down_residuals)?;
        if let Some(residual) = input.mid_residual {
            x = x.broadcast_add(&residual.to_dtype(self.dtype)?)?;
        }
        for block in &self.up_blocks {
            x = match block {
                UpLevel::Plain(block) => block.forward(&x, conditioning, &mut skips)?,
                UpLevel::Conditioned(block) => block.forward(&x, conditioning, &mut skips)?,
            };
        }
        if let Some((norm, act)) = &self.norm_out {
            x = act.forward(&norm.forward(&x)?)?;
        }
        self.conv_out.forward(&x)
    }

    fn check(&self, input: &UnetInput) -> Result<()> {
        let (_, channels, _, _) = input.sample.dims4()?;
        if channels == self.config.in_channels {
            return Ok(());
        }
        Err(Error::Argument {
            name: String::from("latents"),
            reason: format!(
                "they have {channels} channels, but this model takes {}; use a pipeline that fits the model",
                self.config.in_channels
            ),
        })
    }
}

/// A level on the way down, of either kind.
enum DownLevel {
    Plain(DownBlock),
    Conditioned(KDownBlock),
}

/// A level on the way up, of either kind.
enum UpLevel {
    Plain(UpBlock),
    Conditioned(KUpBlock),
}

/// The half of a UNet that a ControlNet copies: everything down to the middle.
pub(crate) struct Trunk {
    conv_in: Conv2d,
    pub(crate) time: TimeConditioning,
    down_blocks: Vec<DownLevel>,
    mid_block: Option<MidBlock>,
    is_centred: bool,
}

impl Trunk {
    pub(crate) fn new(config: &UnetConfig, weights: &Weights) -> Result<Self> {
        config.check()?;
        let channels = &config.block_out_channels;
        let plans = config.down_plans()?;
        let down_block = |i: usize| {
            let inputs = channels[i.saturating_sub(1)];
            let weights = weights.pp("down_blocks").pp(i);
            Ok(if k_blocks::is_k_block(&plans[i].class) {
                DownLevel::Conditioned(KDownBlock::new(config, &plans[i], inputs, &weights)?)
            } else {
                DownLevel::Plain(DownBlock::new(config, &plans[i], inputs, &weights)?)
            })
        };
        let conv_in = Conv2dOptions::same(config.conv_in_kernel);
        Ok(Self {
            conv_in: weights.pp("conv_in").conv2d(config.in_channels, channels[0], conv_in)?,
            time: TimeConditioning::new(config, weights)?,
            down_blocks: (0..plans.len()).map(down_block).collect::<Result<_>>()?,
            mid_block: MidBlock::new(config, &weights.pp("mid_block"))?,
            is_centred: config.center_input_sample,
        })
    }

    /// Latents to the first feature map, `(batch, block_out_channels[0], height, width)`.
    pub(crate) fn embed(&self, sample: &Tensor) -> Result<Tensor> {
        if self.is_centred { self.conv_in.forward(&sample.affine(2.0, -1.0)?) } else { self.conv_in.forward(sample) }
    }

    /// The feature map of the middle, and those of the skip connections, from the full size downwards.
    pub(crate) fn forward(&self, sample: &Tensor, conditioning: Conditioning) -> Result<(Tensor, Vec<Tensor>)> {
        let mut skips = vec![sample.clone()];
        let mut x = sample.clone();
        for block in &self.down_blocks {
            x = match block {
                DownLevel::Plain(block) => block.forward(&x, conditioning, &mut skips)?,
                DownLevel::Conditioned(block) => block.forward(&x, conditioning, &mut skips)?,
            };
        }
        if let Some(mid_block) = &self.mid_block {
            x = mid_block.forward(&x, conditioning)?;
        }
        Ok((x, skips))
    }
}

/// Adds a ControlNet's residuals to the skip connections, of which there must be as many.
fn add_residuals(skips: &mut [Tensor], residuals: Option<&[Tensor]>) -> Result<()> {
    let Some(residuals) = residuals else { return Ok(()) };
    if residuals.len() != skips.len() {
        return Err(Error::Unsupported(format!(
            "the ControlNet gives {} residuals, but the UNet has {} skip connections; use a ControlNet made for this model",
            residuals.len(),
            skips.len()
        )));
    }
    for (skip, residual) in skips.iter_mut().zip(residuals) {
        *skip = skip.broadcast_add(&residual.to_dtype(skip.dtype())?)?;
    }
    Ok(())
}
