//! The denoiser of the Flux models (diffusers `FluxTransformer2DModel`): blocks in which picture and text have weights of
//! their own, then blocks that treat both alike, with rotary positions.
//!
//! Takes packed latents as tokens; packing them is the pipelines' part.

mod blocks;
pub mod controlnet;
pub mod ip_adapter;
pub mod redux;

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use serde::Deserialize;

use self::{
    blocks::{Additions, Blocks, Tokens},
    ip_adapter::FluxImagePrompts,
};
use super::{
    config::unsupported,
    mmdit::{AdaptiveNorm, TimeTextEmbed},
    reuse::Memory,
};
use crate::{
    Result,
    nn::{Linear, Rotary},
    weights::Weights,
};

/// The `config.json` of a Flux transformer; what it leaves out has diffusers' defaults.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct FluxConfig {
    /// Height and width of a token in packed latents; only 1 is known.
    pub patch_size: usize,
    /// Values per token that are read.
    pub in_channels: usize,
    /// Values per token that are predicted; as many as are read when none.
    pub out_channels: Option<usize>,
    /// Blocks in which picture and text have weights of their own.
    pub num_layers: usize,
    /// Blocks that treat picture and text alike.
    pub num_single_layers: usize,
    /// Features per head.
    pub attention_head_dim: usize,
    /// Heads per attention.
    pub num_attention_heads: usize,
    /// Features per token of the encoded prompt.
    pub joint_attention_dim: usize,
    /// Features of the pooled prompt.
    pub pooled_projection_dim: usize,
    /// Whether guidance is an input of the model.
    pub guidance_embeds: bool,
    /// How many features of a head turn with each coordinate of a token.
    pub axes_dims_rope: Vec<usize>,
}

impl Default for FluxConfig {
    fn default() -> Self {
        Self {
            patch_size: 1,
            in_channels: 64,
            out_channels: None,
            num_layers: 19,
            num_single_layers: 38,
            attention_head_dim: 128,
            num_attention_heads: 24,
            joint_attention_dim: 4096,
            pooled_projection_dim: 768,
            guidance_embeds: false,
            axes_dims_rope: vec![16, 56, 56],
        }
    }
}

impl FluxConfig {
    /// Features per token inside the model.
    pub fn inner_dim(&self) -> usize {
        self.num_attention_heads * self.attention_head_dim
    }

    /// Values per token that are predicted.
    pub fn predicted_channels(&self) -> usize {
        self.out_channels.unwrap_or(self.in_channels)
    }

    fn check(&self) -> Result<()> {
        if self.patch_size != 1 {
            return Err(unsupported("patch_size", self.patch_size));
        }
        if self.axes_dims_rope.iter().sum::<usize>() != self.attention_head_dim {
            return Err(unsupported("axes_dims_rope", format!("{:?}", self.axes_dims_rope)));
        }
        Ok(())
    }

    /// Rotations for a picture whose tokens are at `picture`, and text of `words` tokens, which have no position.
    pub fn rotary(&self, picture: &[[u32; 3]], words: usize, device: &Device) -> Result<Rotary> {
        let mut positions = picture.to_vec();
        positions.resize(picture.len() + words, [0; 3]);
        Rotary::new(&positions, &self.axes_dims_rope, self.num_attention_heads, device)
    }
}

/// What a model of the family reads in a step.
#[derive(Clone, Copy)]
pub struct FluxInput<'a> {
    /// `(batch, tokens, in_channels)`.
    pub picture: &'a Tensor,
    /// `(batch, words, joint_attention_dim)`.
    pub text: &'a Tensor,
    /// `(batch, pooled_projection_dim)`.
    pub pooled: &'a Tensor,
    /// 0 to 1000.
    pub timestep: f64,
    /// Counts where the model embeds it.
    pub guidance: f64,
    /// Of [`FluxConfig::rotary`].
    pub rotary: &'a Rotary,
    /// What an IP-Adapter shows; ControlNets do not look at it.
    pub images: Option<&'a FluxImagePrompts>,
}

/// What ControlNets add to the picture's tokens after each block, `(batch, tokens, inner)` each.
#[derive(Clone, Debug, Default)]
pub struct FluxResiduals {
    /// For the first kind of blocks; fewer than there are blocks are spread over them.
    pub blocks: Vec<Tensor>,
    /// For the second kind.
    pub single_blocks: Vec<Tensor>,
    /// Whether those of the first kind are taken in turn instead of spread.
    pub is_repeated: bool,
}

impl FluxResiduals {
    /// The sum with those of another net, for as many blocks as both nets have something; all that one has for a kind
    /// of blocks for which the other has nothing.
    pub fn add(&self, other: &Self) -> Result<Self> {
        let sum = |own: &[Tensor], other: &[Tensor]| match (own.is_empty(), other.is_empty()) {
            (_, true) => Ok(own.to_vec()),
            (true, false) => Ok(other.to_vec()),
            (false, false) => own.iter().zip(other).map(|(own, other)| Ok((own + other)?)).collect::<Result<_>>(),
        };
        Ok(Self {
            blocks: sum(&self.blocks, &other.blocks)?,
            single_blocks: sum(&self.single_blocks, &other.single_blocks)?,
            is_repeated: self.is_repeated,
        })
    }
}

/// Squares of `side` x `side` values as tokens, row by row: `(batch, channels, height, width)` to
/// `(batch, height / side * width / side, channels * side * side)`.
pub fn packed(picture: &Tensor, side: usize) -> Result<Tensor> {
    let (batch, channels, height, width) = picture.dims4()?;
    let (rows, columns) = (height / side, width / side);
    let squares = picture.reshape(&[batch, channels, rows, side, columns, side][..])?;
    let tokens = squares.permute(vec![0, 2, 4, 1, 3, 5])?;
    Ok(tokens.reshape((batch, rows * columns, channels * side * side))?)
}

/// What comes before the blocks.
struct Stem {
    x_embedder: Linear,
    context_embedder: Linear,
    time_text_embed: TimeTextEmbed,
    dtype: DType,
}

impl Stem {
    fn new(config: &FluxConfig, weights: &Weights) -> Result<Self> {
        let (inner, pooled) = (config.inner_dim(), config.pooled_projection_dim);
        let time_text_embed = weights.pp("time_text_embed");
        Ok(Self {
            x_embedder: weights.pp("x_embedder").linear(config.in_channels, inner, true)?,
            context_embedder: weights.pp("context_embedder").linear(config.joint_attention_dim, inner, true)?,
            time_text_embed: if config.guidance_embeds {
                TimeTextEmbed::with_guidance(pooled, inner, &time_text_embed)?
            } else {
                TimeTextEmbed::new(pooled, inner, &time_text_embed)?
            },
            dtype: weights.dtype(),
        })
    }

    /// Tokens, and the vector of time, guidance and pooled text, `(batch, inner)`.
    fn forward(&self, input: &FluxInput<'_>) -> Result<(Tokens, Tensor)> {
        let narrowed = |x: &Tensor| x.to_dtype(self.dtype);
        let picture = self.x_embedder.forward(&narrowed(input.picture)?)?;
        let text = self.context_embedder.forward(&narrowed(input.text)?)?;
        // The reference divides by a thousand and multiplies again, in the model's type.
        let share = rounded(rounded(input.timestep, self.dtype) / 1000.0, self.dtype);
        let timestep = rounded(share * 1000.0, self.dtype);
        let guidance = rounded(rounded(input.guidance, self.dtype) * 1000.0, self.dtype);
        let embedding = self.time_text_embed.guided(timestep, guidance, &narrowed(input.pooled)?)?;
        Ok((Tokens { picture, text }, embedding))
    }
}

/// The nearest number of a type.
fn rounded(number: f64, dtype: DType) -> f64 {
    match dtype {
        DType::BF16 => bf16::from_f64(number).to_f64(),
        DType::F16 => f16::from_f64(number).to_f64(),
        DType::F64 => number,
        _ => f64::from(number as f32),
    }
}

/// The transformer of the Flux models.
pub struct FluxTransformer2DModel {
    config: FluxConfig,
    dtype: DType,
    device: Device,
    stem: Stem,
    blocks: Blocks,
    norm_out: AdaptiveNorm,
    proj_out: Linear,
}

impl FluxTransformer2DModel {
    /// Values per token that a model with these weights reads; none when it is not a Flux transformer.
    pub fn inputs(weights: &Weights) -> Option<usize> {
        weights.shape_of("x_embedder.weight")?.dims().get(1).copied()
    }

    /// Builds the transformer from weights under diffusers' names.
    pub fn new(config: &FluxConfig, weights: Weights) -> Result<Self> {
        config.check()?;
        let inner = config.inner_dim();
        Ok(Self {
            dtype: weights.dtype(),
            device: weights.device().clone(),
            stem: Stem::new(config, &weights)?,
            blocks: Blocks::new(config, &weights)?,
            norm_out: AdaptiveNorm::new(inner, &weights.pp("norm_out"))?,
            proj_out: weights.pp("proj_out").linear(inner, config.predicted_channels(), true)?,
            config: config.clone(),
        })
    }

    /// The configuration it was built from.
    pub fn config(&self) -> &FluxConfig {
        &self.config
    }

    /// The type it runs in.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where it is.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The prediction for each token, `(batch, tokens, predicted_channels)`. `residuals` are those of ControlNets.
    pub fn forward(&self, input: &FluxInput<'_>, residuals: Option<&FluxResiduals>) -> Result<Tensor> {
        let (tokens, embedding) = self.stem.forward(input)?;
        let picture =
            self.blocks.forward(tokens, &embedding, input.rotary, Additions { residuals, images: input.images })?;
        self.proj_out.forward(&self.norm_out.forward(&picture, &embedding)?)
    }

    /// The same with most blocks skipped where `memory` says so. `is_edge` tells the first and last step of a call.
    pub fn forward_remembering(
        &self,
        input: &FluxInput<'_>,
        residuals: Option<&FluxResiduals>,
        (memory, is_edge): (&mut Memory, bool),
    ) -> Result<Tensor> {
        let (tokens, embedding) = self.stem.forward(input)?;
        let (memory, added) = ((memory, is_edge), Additions { residuals, images: input.images });
        let picture = self.blocks.forward_remembering(tokens, &embedding, input.rotary, added, memory)?;
        self.proj_out.forward(&self.norm_out.forward(&picture, &embedding)?)
    }
}
