//! The SigLIP image encoder (transformers `SiglipVisionModel`); Zhai et al. 2023, arXiv:2303.15343.
//!
//! Takes pictures that are already resized and normalised, and returns a state of every patch.

use candle_core::{DType, Device, Tensor};
use serde::Deserialize;

use super::{
    clip::{EncoderLayer, Sizes},
    config::unsupported,
};
use crate::{
    Error, Result,
    nn::{Activation, Conv2d, Conv2dOptions, LayerNorm},
    weights::Weights,
};

/// The `config.json` of a SigLIP image encoder; what it leaves out has transformers' defaults.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct SiglipVisionConfig {
    /// Features per patch.
    pub hidden_size: usize,
    /// Features inside the feed-forward layers.
    pub intermediate_size: usize,
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

impl Default for SiglipVisionConfig {
    fn default() -> Self {
        Self {
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            num_channels: 3,
            image_size: 224,
            patch_size: 16,
            hidden_act: String::from("gelu_pytorch_tanh"),
            layer_norm_eps: 1e-6,
        }
    }
}

/// The SigLIP image encoder.
pub struct SiglipVisionModel {
    config: SiglipVisionConfig,
    dtype: DType,
    device: Device,
    patch_embedding: Conv2d,
    /// `(patches, hidden)`.
    position_embedding: Tensor,
    layers: Vec<EncoderLayer>,
    post_layer_norm: LayerNorm,
}

impl SiglipVisionModel {
    /// Builds the encoder from weights whose names may or may not start with `vision_model.`.
    pub fn new(config: &SiglipVisionConfig, weights: Weights) -> Result<Self> {
        if config.patch_size == 0 {
            return Err(unsupported("patch_size", 0));
        }
        let act = Activation::parse("hidden_act", &config.hidden_act)?;
        let root = if weights.contains("vision_model.post_layernorm.weight") {
            weights.pp("vision_model")
        } else {
            weights.clone()
        };
        let size = config.hidden_size;
        let sizes = Sizes {
            hidden: size,
            intermediate: config.intermediate_size,
            heads: config.num_attention_heads,
            eps: config.layer_norm_eps,
            is_causal: false,
        };
        let embeddings = root.pp("embeddings");
        let patch = Conv2dOptions { kernel: config.patch_size, stride: config.patch_size, padding: 0, bias: true };
        let patches = (config.image_size / config.patch_size).pow(2);
        // The head that pools is published with the encoder; Flux reads the patches.
        root.pass_over("head.");
        Ok(Self {
            dtype: weights.dtype(),
            device: weights.device().clone(),
            patch_embedding: embeddings.pp("patch_embedding").conv2d(config.num_channels, size, patch)?,
            position_embedding: embeddings.get((patches, size), "position_embedding.weight")?,
            layers: (0..config.num_hidden_layers)
                .map(|i| EncoderLayer::new(&sizes, act, &root.pp("encoder.layers").pp(i)))
                .collect::<Result<_>>()?,
            post_layer_norm: root.pp("post_layernorm").layer_norm(size, config.layer_norm_eps)?,
            config: config.clone(),
        })
    }

    /// The configuration it was built from.
    pub fn config(&self) -> &SiglipVisionConfig {
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

    /// Normalised pictures `(batch, channels, image_size, image_size)` to `(batch, patches, hidden)`, after the norm at
    /// the end.
    pub fn forward(&self, pixels: &Tensor) -> Result<Tensor> {
        self.post_layer_norm.forward(&self.state(pixels, self.layers.len())?)
    }

    /// The state before the last layer, `(batch, patches, hidden)`, which IP-Adapters of Stable Diffusion 3 look at.
    pub fn before_last(&self, pixels: &Tensor) -> Result<Tensor> {
        self.state(pixels, self.layers.len().saturating_sub(1))
    }

    /// The state after so many layers.
    fn state(&self, pixels: &Tensor, layers: usize) -> Result<Tensor> {
        let (_, _, height, width) = pixels.dims4()?;
        let expected = self.config.image_size;
        if (height, width) != (expected, expected) {
            return Err(Error::Argument {
                name: String::from("image"),
                reason: format!("the image encoder reads {expected}x{expected} pixels, not {width}x{height}"),
            });
        }
        let patches = self.patch_embedding.forward(&pixels.to_dtype(self.dtype)?)?;
        let patches = patches.flatten_from(2)?.transpose(1, 2)?;
        let mut state = patches.broadcast_add(&self.position_embedding)?;
        for layer in &self.layers[..layers] {
            state = layer.forward(&state)?;
        }
        Ok(state)
    }
}
