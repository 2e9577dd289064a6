//! ControlNets for Stable Diffusion 3 (diffusers `SD3ControlNetModel`): blocks beside the transformer's that read a
//! picture's latents and say what is added after the transformer's blocks.

use candle_core::{DType, Tensor};
use serde::Deserialize;

use super::config::unsupported;
use super::mmdit::{BlockForm, JointBlock, PatchEmbed, Patches, PictureBlock, Sizes, TimeTextEmbed};
use crate::{Error, Result, nn::Linear, weights::Weights};

/// The `config.json` of a ControlNet; what it leaves out has diffusers' defaults.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct Sd3ControlNetConfig {
    /// Height and width of the training latents.
    pub sample_size: usize,
    /// Height and width of a patch in latents.
    pub patch_size: usize,
    /// Channels of the latents.
    pub in_channels: usize,
    /// How many blocks there are.
    pub num_layers: usize,
    /// Features per head.
    pub attention_head_dim: usize,
    /// Heads per attention.
    pub num_attention_heads: usize,
    /// Features per text token; null for nets that do not read the text (the 3.5 large ones).
    pub joint_attention_dim: Option<usize>,
    /// Features of the pooled text.
    pub pooled_projection_dim: usize,
    /// Patches per side of the table of positions.
    pub pos_embed_max_size: usize,
    /// Channels of the control picture's latents beyond those of latents.
    pub extra_conditioning_channels: usize,
    /// The blocks in which picture tokens attend among themselves, too.
    pub dual_attention_layers: Vec<usize>,
    /// How queries and keys are normalised.
    pub qk_norm: Option<String>,
    /// Whether it makes tokens of latents itself; else it takes the transformer's.
    pub use_pos_embed: bool,
    /// Whether it is given zeros for the pooled text; such nets (InstantX) read pictures that are scaled, not shifted.
    pub force_zeros_for_pooled_projection: bool,
}

impl Default for Sd3ControlNetConfig {
    fn default() -> Self {
        Self {
            sample_size: 128,
            patch_size: 2,
            in_channels: 16,
            num_layers: 18,
            attention_head_dim: 64,
            num_attention_heads: 18,
            joint_attention_dim: Some(4096),
            pooled_projection_dim: 2048,
            pos_embed_max_size: 96,
            extra_conditioning_channels: 0,
            dual_attention_layers: Vec::new(),
            qk_norm: None,
            use_pos_embed: true,
            force_zeros_for_pooled_projection: true,
        }
    }
}

/// What a ControlNet reads in a step.
#[derive(Clone, Copy, Debug)]
pub struct Sd3ControlNetInput<'a> {
    /// Noisy latents, `(batch, in_channels, height, width)`.
    pub sample: &'a Tensor,
    /// The same as the transformer's tokens, `(batch, tokens, inner)`, for nets without patches of their own.
    pub tokens: Option<&'a Tensor>,
    /// The control picture's latents, `(batch, channels, height, width)`.
    pub condition: &'a Tensor,
    /// The timestep, 0 to 1000.
    pub timestep: f64,
    /// Text states, `(batch, tokens, joint_attention_dim)`.
    pub encoder_hidden_states: &'a Tensor,
    /// Pooled text, `(batch, pooled_projection_dim)`.
    pub pooled_projections: &'a Tensor,
    /// How strongly it acts.
    pub scale: f64,
}

/// The blocks of either sort.
enum Blocks {
    Joint { context_embedder: Linear, blocks: Vec<JointBlock> },
    Picture(Vec<PictureBlock>),
}

/// A ControlNet.
pub struct Sd3ControlNetModel {
    config: Sd3ControlNetConfig,
    dtype: DType,
    pos_embed: Option<PatchEmbed>,
    time_text_embed: TimeTextEmbed,
    blocks: Blocks,
    controlnet_blocks: Vec<Linear>,
    pos_embed_input: PatchEmbed,
}

impl Sd3ControlNetModel {
    /// Builds the net from weights under diffusers' names.
    pub fn new(config: &Sd3ControlNetConfig, weights: Weights) -> Result<Self> {
        let sizes = Sizes::new(config.num_attention_heads, config.attention_head_dim, config.qk_norm.as_deref())?;
        let inner = sizes.inner();
        let patches =
            Patches { size: config.patch_size, channels: config.in_channels, max_size: config.pos_embed_max_size };
        let condition = Patches { channels: config.in_channels + config.extra_conditioning_channels, ..patches };
        if config.patch_size == 0 {
            return Err(unsupported("patch_size", config.patch_size));
        }
        let base = config.sample_size / config.patch_size;
        let embed = |patches, base, name: &str| PatchEmbed::new(patches, base, inner, &weights.pp(name));
        let linear = |i| weights.pp("controlnet_blocks").pp(i).linear(inner, inner, true);
        Ok(Self {
            dtype: weights.dtype(),
            pos_embed: config.use_pos_embed.then(|| embed(patches, Some(base), "pos_embed")).transpose()?,
            time_text_embed: TimeTextEmbed::new(config.pooled_projection_dim, inner, &weights.pp("time_text_embed"))?,
            blocks: Blocks::new(config, sizes, &weights)?,
            controlnet_blocks: (0..config.num_layers).map(linear).collect::<Result<_>>()?,
            pos_embed_input: embed(condition, None, "pos_embed_input")?,
            config: config.clone(),
        })
    }

    /// The configuration it was built from.
    pub fn config(&self) -> &Sd3ControlNetConfig {
        &self.config
    }

    /// The type it runs in.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// What is added after the transformer's blocks, one `(batch, tokens, inner)` for each block of the net.
    pub fn forward(&self, input: &Sd3ControlNetInput<'_>) -> Result<Vec<Tensor>> {
        let own = self.pos_embed.as_ref().map(|embed| embed.forward(input.sample)).transpose()?;
        let tokens = own.as_ref().or(input.tokens).ok_or_else(|| {
            Error::Unsupported("this ControlNet has no patches of its own and needs the transformer's tokens".into())
        })?;
        let embedding = self.time_text_embed.forward(input.timestep, input.pooled_projections)?;
        let picture = (tokens + self.pos_embed_input.forward(input.condition)?)?;
        let states = self.blocks.forward(picture, input.encoder_hidden_states, &embedding)?;
        let residual = |(state, layer): (&Tensor, &Linear)| Ok((layer.forward(state)? * input.scale)?);
        states.iter().zip(&self.controlnet_blocks).map(residual).collect()
    }
}

impl Blocks {
    fn new(config: &Sd3ControlNetConfig, sizes: Sizes, weights: &Weights) -> Result<Self> {
        let at = |i: usize| weights.pp("transformer_blocks").pp(i);
        let Some(features) = config.joint_attention_dim else {
            let blocks = (0..config.num_layers).map(|i| PictureBlock::new(sizes, &at(i)));
            return Ok(Self::Picture(blocks.collect::<Result<_>>()?));
        };
        let form = |i: usize| BlockForm { is_last: false, is_dual: config.dual_attention_layers.contains(&i) };
        let blocks = (0..config.num_layers).map(|i| JointBlock::new(sizes, form(i), &at(i)));
        Ok(Self::Joint {
            context_embedder: weights.pp("context_embedder").linear(features, sizes.inner(), true)?,
            blocks: blocks.collect::<Result<_>>()?,
        })
    }

    /// The picture tokens after each block.
    fn forward(&self, picture: Tensor, text: &Tensor, embedding: &Tensor) -> Result<Vec<Tensor>> {
        let mut picture = picture;
        let mut states = Vec::new();
        match self {
            Self::Joint { context_embedder, blocks } => {
                let mut text = context_embedder.forward(text)?;
                for block in blocks {
                    (picture, text) = block.forward(&picture, &text, embedding, None)?;
                    states.push(picture.clone());
                }
            }
            Self::Picture(blocks) => {
                for block in blocks {
                    picture = block.forward(&picture, embedding)?;
                    states.push(picture.clone());
                }
            }
        }
        Ok(states)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::{super::config::without_nulls, *};

    #[test]
    fn a_net_reads_the_text_unless_its_configuration_says_null() {
        let text = |settings: Value| {
            let config = serde_json::from_value::<Sd3ControlNetConfig>(without_nulls(settings));
            config.expect("a configuration").joint_attention_dim
        };
        assert_eq!(text(json!({})), Some(4096));
        assert_eq!(text(json!({ "joint_attention_dim": 1536 })), Some(1536));
        assert_eq!(text(json!({ "joint_attention_dim": null, "qk_norm": null })), None);
    }
}
