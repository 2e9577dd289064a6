//! A ControlNet for several kinds of pictures at once (diffusers `ControlNetUnionModel`; the ControlNet++ of xinsir):
//! a small transformer weighs the pictures against each other.

use candle_core::{DType, Device, Tensor};
use serde::Deserialize;

use super::{ConditionConfig, ControlNetOutput, Heads, condition::ConditionEmbedding, guess_scales};
use crate::{
    Error, Result,
    models::unet::{Conditioning, Trunk, UnetConfig, UnetInput},
    nn::{Activation, AttentionOptions, LayerNorm, Linear, TimestepEmbedding, Timesteps, attention},
    weights::Weights,
};

/// The epsilon of the fusing transformer's norms.
const NORM_EPS: f64 = 1e-5;

/// The `config.json` of a `ControlNetUnionModel`; what it leaves out has diffusers' defaults.
#[derive(Clone, Debug, Deserialize)]
#[non_exhaustive]
pub struct ControlNetUnionConfig {
    /// What it has in common with the UNet it was copied from.
    #[serde(flatten)]
    pub unet: UnetConfig,
    /// How pictures are read.
    #[serde(flatten)]
    pub condition: ConditionConfig,
    /// What weighs them.
    #[serde(flatten)]
    pub fuser: FuserConfig,
}

/// The transformer that weighs the pictures.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct FuserConfig {
    /// How many kinds of pictures the model knows.
    #[serde(rename = "num_control_type")]
    pub control_types: usize,
    /// Features of the transformer.
    #[serde(rename = "num_trans_channel")]
    pub channels: usize,
    /// Heads of the transformer.
    #[serde(rename = "num_trans_head")]
    pub heads: usize,
    /// Layers of the transformer.
    #[serde(rename = "num_trans_layer")]
    pub layers: usize,
    /// Channels of what the transformer adds to a picture.
    #[serde(rename = "num_proj_channel")]
    pub projected_channels: usize,
}

impl Default for FuserConfig {
    fn default() -> Self {
        Self { control_types: 6, channels: 320, heads: 8, layers: 1, projected_channels: 320 }
    }
}

/// What one evaluation of a union ControlNet takes.
#[derive(Clone, Copy, Debug)]
pub struct ControlNetUnionInput<'a> {
    /// What the UNet takes, too; its residuals play no part.
    pub unet: UnetInput<'a>,
    /// The pictures, each `(batch, conditioning_channels, 8 height, 8 width)` in 0..1.
    pub conditions: &'a [Tensor],
    /// The kind of each picture.
    pub control_types: &'a [usize],
    /// How strongly each acts.
    pub scales: &'a [f64],
    /// Whether deep additions count more than shallow ones.
    pub is_guess: bool,
    /// Whether it is one of several ControlNets; the scale then acts on the additions, as with one picture.
    pub is_one_of_many: bool,
}

/// A ControlNet for several kinds of pictures.
pub struct ControlNetUnionModel {
    config: ControlNetUnionConfig,
    dtype: DType,
    device: Device,
    trunk: Trunk,
    condition: ConditionEmbedding,
    control_sinusoid: Timesteps,
    control_add_embedding: TimestepEmbedding,
    /// `(num_control_type, num_trans_channel)`.
    task_embedding: Tensor,
    layers: Vec<FuserLayer>,
    spatial_ch_projs: Linear,
    heads: Heads,
}

impl ControlNetUnionModel {
    /// Builds the ControlNet, or says which setting of the configuration it cannot run.
    pub fn new(config: &ControlNetUnionConfig, weights: Weights) -> Result<Self> {
        let (unet, fuser) = (&config.unet, &config.fuser);
        let size = unet.addition_time_embed_dim.unwrap_or_default();
        let inputs = size * fuser.control_types;
        let control_path = weights.pp("control_add_embedding");
        let layer = |i: usize| FuserLayer::new(fuser, &weights.pp("transformer_layes").pp(i));
        Ok(Self {
            trunk: Trunk::new(unet, &weights)?,
            condition: ConditionEmbedding::new(unet, &config.condition, &weights)?,
            control_sinusoid: Timesteps::new(size, unet.flip_sin_to_cos, unet.freq_shift, weights.device())?,
            control_add_embedding: TimestepEmbedding::new(
                inputs,
                unet.time_embed_dim(),
                Activation::Silu,
                &control_path,
            )?,
            task_embedding: weights.get((fuser.control_types, fuser.channels), "task_embedding")?,
            layers: (0..fuser.layers).map(layer).collect::<Result<_>>()?,
            spatial_ch_projs: weights.pp("spatial_ch_projs").linear(fuser.channels, fuser.projected_channels, true)?,
            heads: Heads::new(unet, &weights)?,
            config: config.clone(),
            dtype: weights.dtype(),
            device: weights.device().clone(),
        })
    }

    /// The configuration it was built from.
    pub fn config(&self) -> &ControlNetUnionConfig {
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
    pub fn forward(&self, input: &ControlNetUnionInput) -> Result<ControlNetOutput> {
        self.check(input)?;
        let batch = input.unet.sample.dim(0)?;
        let text = input.unet.encoder_hidden_states.to_dtype(self.dtype)?;
        let time = self.trunk.time.forward(&input.unet, self.dtype)?;
        let time = time.broadcast_add(&self.control_embedding(input.control_types)?)?;
        let sample = self.trunk.embed(&input.unet.sample.to_dtype(self.dtype)?)?;
        let sample = self.fuse(&sample, input, batch)?;
        let (mid, skips) =
            self.trunk.forward(&sample, Conditioning { time: &time, text: &text, image_prompts: None })?;
        let output = self.heads.forward(&mid, &skips)?;
        self.scale(output, input)
    }

    fn check(&self, input: &ControlNetUnionInput) -> Result<()> {
        let count = input.conditions.len();
        let known = self.config.fuser.control_types;
        let reason = if input.control_types.len() != count || input.scales.len() != count {
            format!(
                "{} kinds and {} scales for {count} pictures; each picture needs one of each",
                input.control_types.len(),
                input.scales.len()
            )
        } else if let Some(kind) = input.control_types.iter().find(|kind| **kind >= known) {
            format!("kind `{kind}` is not one of the {known} this model knows (0 to {})", known - 1)
        } else {
            return Ok(());
        };
        Err(Error::Argument { name: String::from("control_mode"), reason })
    }

    /// Whether the scale acts on the additions rather than on each picture.
    fn is_scaled_after(input: &ControlNetUnionInput) -> bool {
        input.is_one_of_many || input.conditions.len() == 1
    }

    /// Which kinds are present, as an embedding `(1, time_embed_dim)`.
    fn control_embedding(&self, kinds: &[usize]) -> Result<Tensor> {
        let mut flags = vec![0f32; self.config.fuser.control_types];
        for &kind in kinds {
            flags[kind] = 1.0;
        }
        let flags = Tensor::new(flags, &self.device)?;
        let waves = self.control_sinusoid.forward(&flags)?.reshape((1, ()))?.to_dtype(self.dtype)?;
        self.control_add_embedding.forward(&waves, None)
    }

    /// The latents' feature map plus every picture's, each shifted by what the transformer says about it.
    fn fuse(&self, sample: &Tensor, input: &ControlNetUnionInput, batch: usize) -> Result<Tensor> {
        let is_scaled_after = Self::is_scaled_after(input);
        let mean = |map: &Tensor| map.mean_keepdim(3)?.mean_keepdim(2)?.flatten_from(1);
        let (mut maps, mut tokens) = (Vec::new(), Vec::new());
        for ((condition, kind), scale) in input.conditions.iter().zip(input.control_types).zip(input.scales) {
            let scale = if is_scaled_after { 1.0 } else { *scale };
            let map = self.condition.forward(&condition.to_dtype(self.dtype)?)?;
            let token = mean(&map)?.broadcast_add(&self.task_embedding.get(*kind)?)?;
            tokens.push((token * scale)?.unsqueeze(1)?);
            maps.push(((map * scale)?, scale));
        }
        tokens.push(mean(sample)?.unsqueeze(1)?);
        let mut tokens = Tensor::cat(&tokens, 1)?;
        for layer in &self.layers {
            tokens = layer.forward(&tokens)?;
        }
        let mut fused = sample.clone();
        for (at, (map, scale)) in maps.iter().enumerate() {
            let shift = self.spatial_ch_projs.forward(&tokens.narrow(1, at, 1)?.reshape((batch, ()))?)?;
            let shift = (shift * *scale)?.unsqueeze(2)?.unsqueeze(3)?;
            fused = (fused + map.broadcast_add(&shift)?)?;
        }
        Ok(fused)
    }

    fn scale(&self, output: ControlNetOutput, input: &ControlNetUnionInput) -> Result<ControlNetOutput> {
        let is_pooled = self.config.condition.global_pool_conditions;
        let count = output.down.len() + 1;
        let after = if Self::is_scaled_after(input) { input.scales.first().copied().unwrap_or(1.0) } else { 1.0 };
        let scales = if input.is_guess && !is_pooled { guess_scales(count) } else { vec![1.0; count] };
        let output = output.scaled(&scales.iter().map(|scale| scale * after).collect::<Vec<_>>())?;
        if is_pooled { output.pooled() } else { Ok(output) }
    }
}

/// One layer of the fusing transformer.
struct FuserLayer {
    ln_1: LayerNorm,
    /// Query, key and value, which are stored as one matrix `in_proj_weight`.
    in_proj: Linear,
    out_proj: Linear,
    ln_2: LayerNorm,
    c_fc: Linear,
    c_proj: Linear,
    heads: usize,
}

impl FuserLayer {
    fn new(config: &FuserConfig, weights: &Weights) -> Result<Self> {
        let size = config.channels;
        Ok(Self {
            ln_1: weights.pp("ln_1").layer_norm(size, NORM_EPS)?,
            in_proj: weights.pp("attn").linear_named("in_proj_weight", Some("in_proj_bias"), size, 3 * size)?,
            out_proj: weights.pp("attn.out_proj").linear(size, size, true)?,
            ln_2: weights.pp("ln_2").layer_norm(size, NORM_EPS)?,
            c_fc: weights.pp("mlp.c_fc").linear(size, 4 * size, true)?,
            c_proj: weights.pp("mlp.c_proj").linear(4 * size, size, true)?,
            heads: config.heads,
        })
    }

    /// `(batch, pictures + 1, features)` to the same. The reference hands its attention the batch where the sequence
    /// belongs, and the models were trained that way: the pictures of different batch rows attend to each other.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let size = x.dim(2)?;
        let projected = self.in_proj.forward(&self.ln_1.forward(x)?)?.transpose(0, 1)?;
        let part = |at: usize| projected.narrow(2, at * size, size)?.contiguous();
        let attended = attention(&part(0)?, &part(1)?, &part(2)?, AttentionOptions::heads(self.heads))?;
        let x = (x + self.out_proj.forward(&attended.transpose(0, 1)?.contiguous()?)?)?;
        let inner = Activation::QuickGelu.forward(&self.c_fc.forward(&self.ln_2.forward(&x)?)?)?;
        Ok((x + self.c_proj.forward(&inner)?)?)
    }
}
