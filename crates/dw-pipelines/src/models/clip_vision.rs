//! The CLIP image encoder (transformers `CLIPVisionModelWithProjection`); Radford et al. 2021, arXiv:2103.00020.
//!
//! Takes pictures that are already resized and normalised, and returns every hidden state. Preparing pictures is
//! the pipelines' part.

use candle_core::{DType, Device, Tensor};
use serde::Deserialize;

use super::{
    clip::{EncoderLayer, Sizes},
    config::unsupported,
};
use crate::{
    Error, Result,
    nn::{Activation, Conv2d, Conv2dOptions, LayerNorm, Linear},
    weights::Weights,
};

/// The `config.json` of a CLIP image encoder; what it leaves out has transformers' defaults.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct ClipVisionConfig {
    /// Features per patch.
    pub hidden_size: usize,
    /// Features inside the feed-forward layers.
    pub intermediate_size: usize,
    /// Features of the projected pooled state.
    pub projection_dim: usize,
    /// How many layers there are.
    pub num_hidden_layers: usize,
    /// Heads per layer.
    pub num_attention_heads: usize,
    /// Channels of a picture.
    pub num_channels: usize,
    /// Height and width of a picture.
    pub image_size: usize,
    /// Height and width of a patch.
    pub patch_size: usize,
    /// The activation of the feed-forward layers.
    pub hidden_act: String,
    /// The epsilon of the layer norms.
    pub layer_norm_eps: f64,
}

impl Default for ClipVisionConfig {
    fn default() -> Self {
        Self {
            hidden_size: 768,
            intermediate_size: 3072,
            projection_dim: 512,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            num_channels: 3,
            image_size: 224,
            patch_size: 32,
            hidden_act: String::from("quick_gelu"),
            layer_norm_eps: 1e-5,
        }
    }
}

impl Sizes {
    fn of_vision(config: &ClipVisionConfig) -> Self {
        Self {
            hidden: config.hidden_size,
            intermediate: config.intermediate_size,
            heads: config.num_attention_heads,
            eps: config.layer_norm_eps,
            is_causal: false,
        }
    }
}

/// What the encoder says about a batch of pictures.
#[derive(Clone, Debug)]
pub struct ClipVisionOutput {
    /// The embeddings after their norm, then the state after each layer: each `(batch, 1 + patches, hidden)`.
    pub hidden_states: Vec<Tensor>,
    /// The last state, without the norm at the end, `(batch, 1 + patches, hidden)`.
    pub last_hidden_state: Tensor,
    /// The last state of the class token after the norm at the end, `(batch, hidden)`.
    pub pooled: Tensor,
    /// The pooled state after the projection, `(batch, projection)`, where the model has one.
    pub image_embeds: Option<Tensor>,
}

/// The CLIP image encoder.
pub struct ClipVisionModel {
    config: ClipVisionConfig,
    dtype: DType,
    device: Device,
    /// `(hidden,)`.
    class_embedding: Tensor,
    patch_embedding: Conv2d,
    /// `(1 + patches, hidden)`.
    position_embedding: Tensor,
    pre_layer_norm: LayerNorm,
    layers: Vec<EncoderLayer>,
    post_layer_norm: LayerNorm,
    visual_projection: Option<Linear>,
}

impl ClipVisionModel {
    /// Builds the encoder from weights whose names may or may not start with `vision_model.`.
    pub fn new(config: &ClipVisionConfig, weights: Weights) -> Result<Self> {
        if config.patch_size == 0 {
            return Err(unsupported("patch_size", 0));
        }
        let act = Activation::parse("hidden_act", &config.hidden_act)?;
        let root = if weights.contains("vision_model.post_layernorm.weight") {
            weights.pp("vision_model")
        } else {
            weights.clone()
        };
        // A file of the whole of CLIP holds the other tower, too.
        for other in ["text_model.", "text_projection.", "logit_scale"] {
            weights.pass_over(other);
        }
        let (size, eps) = (config.hidden_size, config.layer_norm_eps);
        let sizes = Sizes::of_vision(config);
        let embeddings = root.pp("embeddings");
        let patch = Conv2dOptions { kernel: config.patch_size, stride: config.patch_size, padding: 0, bias: false };
        let positions = (config.image_size / config.patch_size).pow(2) + 1;
        let visual_projection = weights
            .contains("visual_projection.weight")
            .then(|| weights.pp("visual_projection").linear(size, config.projection_dim, false))
            .transpose()?;
        Ok(Self {
            dtype: weights.dtype(),
            device: weights.device().clone(),
            class_embedding: embeddings.get(size, "class_embedding")?,
            patch_embedding: embeddings.pp("patch_embedding").conv2d(config.num_channels, size, patch)?,
            position_embedding: embeddings.get((positions, size), "position_embedding.weight")?,
            // The misspelling is the published weights'.
            pre_layer_norm: root.pp("pre_layrnorm").layer_norm(size, eps)?,
            layers: (0..config.num_hidden_layers)
                .map(|i| EncoderLayer::new(&sizes, act, &root.pp("encoder.layers").pp(i)))
                .collect::<Result<_>>()?,
            post_layer_norm: root.pp("post_layernorm").layer_norm(size, eps)?,
            visual_projection,
            config: config.clone(),
        })
    }

    /// The configuration it was built from.
    pub fn config(&self) -> &ClipVisionConfig {
        &self.config
    }

    /// The type of the states.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where the encoder is.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Encodes normalised pictures `(batch, channels, image_size, image_size)`.
    pub fn forward(&self, pixels: &Tensor) -> Result<ClipVisionOutput> {
        let (batch, _, height, width) = pixels.dims4()?;
        let expected = self.config.image_size;
        if (height, width) != (expected, expected) {
            return Err(Error::Argument {
                name: String::from("image"),
                reason: format!("the image encoder reads {expected}x{expected} pixels, not {width}x{height}"),
            });
        }
        let patches = self.patch_embedding.forward(&pixels.to_dtype(self.dtype)?)?;
        let patches = patches.flatten_from(2)?.transpose(1, 2)?;
        let class = self.class_embedding.broadcast_as((batch, 1, self.config.hidden_size))?;
        let embeddings = Tensor::cat(&[&class, &patches], 1)?.broadcast_add(&self.position_embedding)?;
        let mut states = vec![self.pre_layer_norm.forward(&embeddings)?];
        for layer in &self.layers {
            let next = layer.forward(&states[states.len() - 1])?;
            states.push(next);
        }
        let last_hidden_state = states[states.len() - 1].clone();
        let class = last_hidden_state.narrow(1, 0, 1)?.squeeze(1)?.contiguous()?;
        let pooled = self.post_layer_norm.forward(&class)?;
        let image_embeds = self.visual_projection.as_ref().map(|layer| layer.forward(&pooled)).transpose()?;
        Ok(ClipVisionOutput { hidden_states: states, last_hidden_state, pooled, image_embeds })
    }
}
