//! The denoiser of Stable Diffusion 3 and 3.5 (diffusers `SD3Transformer2DModel`; Esser et al. 2024,
//! arXiv:2403.03206): blocks of picture and text tokens between patches and latents.

use std::ops::Range;

use candle_core::{DType, Tensor};
use serde::Deserialize;

use super::config::unsupported;
use super::mmdit::{
    AdaptiveNorm, BlockForm, Images, JointBlock, PatchEmbed, Patches, Sizes, TimeTextEmbed, unpatchified,
};
use super::reuse::{Memory, Reuse};
use super::sd3_ip_adapter::Sd3ImagePrompt;
use crate::{Error, Result, nn::Linear, weights::Weights};

/// The `config.json` of the transformer; what it leaves out has diffusers' defaults.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct Sd3Config {
    /// Height and width of the training latents.
    pub sample_size: usize,
    /// Height and width of a patch in latents.
    pub patch_size: usize,
    /// Channels it reads.
    pub in_channels: usize,
    /// How many blocks there are.
    pub num_layers: usize,
    /// Features per head.
    pub attention_head_dim: usize,
    /// Heads per attention.
    pub num_attention_heads: usize,
    /// Features per text token.
    pub joint_attention_dim: usize,
    /// Features of a text token inside the blocks; as many as picture tokens have.
    pub caption_projection_dim: usize,
    /// Features of the pooled text.
    pub pooled_projection_dim: usize,
    /// Channels it predicts; those it reads when not given.
    pub out_channels: Option<usize>,
    /// Patches per side of the table of positions.
    pub pos_embed_max_size: usize,
    /// The blocks in which picture tokens attend among themselves, too (3.5 medium).
    pub dual_attention_layers: Vec<usize>,
    /// How queries and keys are normalised (`rms_norm` in 3.5).
    pub qk_norm: Option<String>,
}

impl Default for Sd3Config {
    fn default() -> Self {
        Self {
            sample_size: 128,
            patch_size: 2,
            in_channels: 16,
            num_layers: 18,
            attention_head_dim: 64,
            num_attention_heads: 18,
            joint_attention_dim: 4096,
            caption_projection_dim: 1152,
            pooled_projection_dim: 2048,
            out_channels: None,
            pos_embed_max_size: 96,
            dual_attention_layers: Vec::new(),
            qk_norm: None,
        }
    }
}

impl Sd3Config {
    /// Channels of the latents that it predicts.
    pub fn latent_channels(&self) -> usize {
        self.out_channels.unwrap_or(self.in_channels)
    }

    /// How many attentions picture tokens take part in: one in each block, a second in some.
    pub(super) fn attentions(&self) -> usize {
        let is_dual = |block: &usize| self.dual_attention_layers.contains(block);
        self.num_layers + (0..self.num_layers).filter(is_dual).count()
    }

    pub(super) fn sizes(&self) -> Result<Sizes> {
        let sizes = Sizes::new(self.num_attention_heads, self.attention_head_dim, self.qk_norm.as_deref())?;
        if self.patch_size == 0 {
            return Err(unsupported("patch_size", self.patch_size));
        }
        if self.caption_projection_dim != sizes.inner() {
            return Err(Error::Unsupported(format!(
                "the model's configuration has `caption_projection_dim`: `{}`, but its picture tokens have {} features \
                 (`num_attention_heads` × `attention_head_dim`); they must agree",
                self.caption_projection_dim,
                sizes.inner()
            )));
        }
        Ok(sizes)
    }
}

/// What the transformer reads in a step.
#[derive(Clone, Copy, Debug)]
pub struct Sd3Input<'a> {
    /// Noisy latents, `(batch, in_channels, height, width)`.
    pub sample: &'a Tensor,
    /// The timestep, 0 to 1000.
    pub timestep: f64,
    /// Text states, `(batch, tokens, joint_attention_dim)`.
    pub encoder_hidden_states: &'a Tensor,
    /// Pooled text, `(batch, pooled_projection_dim)`.
    pub pooled_projections: &'a Tensor,
    /// What ControlNets add after the blocks, each `(batch, tokens, inner)`; spread evenly over the blocks.
    pub block_residuals: &'a [Tensor],
    /// Blocks that are left out, for skip-layer guidance.
    pub skip_layers: &'a [usize],
    /// What an IP-Adapter made of pictures for this timestep.
    pub image_prompt: Option<&'a Sd3ImagePrompt<'a>>,
}

/// The transformer.
pub struct Sd3Transformer2DModel {
    config: Sd3Config,
    dtype: DType,
    pos_embed: PatchEmbed,
    time_text_embed: TimeTextEmbed,
    context_embedder: Linear,
    transformer_blocks: Vec<JointBlock>,
    norm_out: AdaptiveNorm,
    proj_out: Linear,
}

/// Tokens between blocks, `(batch, tokens, inner)` each.
struct Tokens {
    picture: Tensor,
    text: Tensor,
}

impl Sd3Transformer2DModel {
    /// Builds the transformer from weights under diffusers' names.
    pub fn new(config: &Sd3Config, weights: Weights) -> Result<Self> {
        let sizes = config.sizes()?;
        let inner = sizes.inner();
        let patches =
            Patches { size: config.patch_size, channels: config.in_channels, max_size: config.pos_embed_max_size };
        let block = |i: usize| {
            let form =
                BlockForm { is_last: i + 1 == config.num_layers, is_dual: config.dual_attention_layers.contains(&i) };
            JointBlock::new(sizes, form, &weights.pp("transformer_blocks").pp(i))
        };
        let outputs = config.patch_size * config.patch_size * config.latent_channels();
        Ok(Self {
            dtype: weights.dtype(),
            pos_embed: PatchEmbed::new(
                patches,
                Some(config.sample_size / config.patch_size),
                inner,
                &weights.pp("pos_embed"),
            )?,
            time_text_embed: TimeTextEmbed::new(config.pooled_projection_dim, inner, &weights.pp("time_text_embed"))?,
            context_embedder: weights.pp("context_embedder").linear(config.joint_attention_dim, inner, true)?,
            transformer_blocks: (0..config.num_layers).map(block).collect::<Result<_>>()?,
            norm_out: AdaptiveNorm::new(inner, &weights.pp("norm_out"))?,
            proj_out: weights.pp("proj_out").linear(inner, outputs, true)?,
            config: config.clone(),
        })
    }

    /// The configuration it was built from.
    pub fn config(&self) -> &Sd3Config {
        &self.config
    }

    /// The type it runs in.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Latents as the tokens that the blocks read, with their positions: `(batch, tokens, inner)`.
    pub fn embedded(&self, sample: &Tensor) -> Result<Tensor> {
        self.pos_embed.forward(sample)
    }

    /// The predicted velocity, `(batch, out_channels, height, width)`.
    pub fn forward(&self, input: &Sd3Input<'_>) -> Result<Tensor> {
        let (tokens, embedding) = self.start(input)?;
        let tokens = self.blocks(0..self.transformer_blocks.len(), tokens, &embedding, input)?;
        self.finish(&tokens.picture, &embedding, input)
    }

    /// The same, with most blocks skipped where `memory` says so. The first and last step of a call are its edges.
    pub fn forward_remembering(&self, input: &Sd3Input<'_>, (memory, is_edge): (&mut Memory, bool)) -> Result<Tensor> {
        let Some(first) = self.transformer_blocks.first() else { return self.forward(input) };
        let (tokens, embedding) = self.start(input)?;
        let before = tokens.picture.clone();
        let (head, signal, computed) = match memory.rule() {
            Reuse::Tea { .. } => {
                let signal = first.modulated_picture(&before, &embedding)?;
                (tokens, signal, 0)
            }
            Reuse::FirstBlock { .. } => {
                let head = self.blocks(0..1, tokens, &embedding, input)?;
                let signal = (&head.picture - before)?;
                (head, signal, 1)
            }
        };
        if let Some(residual) = memory.recalled(signal, is_edge)? {
            return self.finish(&(head.picture + residual)?, &embedding, input);
        }
        let so_far = head.picture.clone();
        let tokens = self.blocks(computed..self.transformer_blocks.len(), head, &embedding, input)?;
        memory.keep((&tokens.picture - so_far)?);
        self.finish(&tokens.picture, &embedding, input)
    }

    /// What the first block reads: tokens, and the vector of timestep and text.
    fn start(&self, input: &Sd3Input<'_>) -> Result<(Tokens, Tensor)> {
        let picture = self.embedded(input.sample)?;
        let embedding = self.time_text_embed.forward(input.timestep, input.pooled_projections)?;
        let text = self.context_embedder.forward(input.encoder_hidden_states)?;
        Ok((Tokens { picture, text }, embedding))
    }

    /// Some of the blocks, with what is added after each.
    fn blocks(
        &self,
        range: Range<usize>,
        Tokens { mut picture, mut text }: Tokens,
        embedding: &Tensor,
        input: &Sd3Input<'_>,
    ) -> Result<Tokens> {
        for i in range {
            if !input.skip_layers.contains(&i) {
                let images = input.image_prompt.map(|prompt| prompt.of_block(i));
                let seen = images.as_ref().map_or(Images::None, Images::Joint);
                (picture, text) = self.transformer_blocks[i].forward_seeing(&picture, &text, embedding, None, seen)?;
            }
            if let Some(residual) = self.residual_after(i, input.block_residuals) {
                picture = (picture + residual)?;
            }
        }
        Ok(Tokens { picture, text })
    }

    /// The picture's tokens after all blocks to the prediction.
    fn finish(&self, picture: &Tensor, embedding: &Tensor, input: &Sd3Input<'_>) -> Result<Tensor> {
        let (_, _, height, width) = input.sample.dims4()?;
        let size = self.config.patch_size;
        let tokens = self.proj_out.forward(&self.norm_out.forward(picture, embedding)?)?;
        unpatchified(&tokens, (height / size, width / size), size)
    }

    /// What is added after block `i`. The reference adds nothing after the last.
    fn residual_after<'a>(&self, i: usize, residuals: &'a [Tensor]) -> Option<&'a Tensor> {
        let blocks = self.transformer_blocks.len();
        if i + 1 == blocks || residuals.is_empty() {
            return None;
        }
        // As the reference counts: fewer residuals than blocks serve several each.
        let interval = blocks as f64 / residuals.len() as f64;
        residuals.get((i as f64 / interval) as usize)
    }
}
