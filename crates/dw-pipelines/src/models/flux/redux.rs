//! Pictures as prompts for Flux: the layers that turn what an image encoder says into words (diffusers
//! `ReduxImageEncoder`).

use candle_core::{DType, Tensor};
use serde::Deserialize;

use crate::{
    Result,
    nn::{Activation, Linear},
    weights::Weights,
};

/// The `config.json` of the layers; what it leaves out has diffusers' defaults.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct ReduxConfig {
    /// Features per token of the image encoder.
    pub redux_dim: usize,
    /// Features per token of the prompt.
    pub txt_in_features: usize,
}

impl Default for ReduxConfig {
    fn default() -> Self {
        Self { redux_dim: 1152, txt_in_features: 4096 }
    }
}

/// States of an image encoder to words of a prompt.
pub struct ReduxImageEncoder {
    config: ReduxConfig,
    dtype: DType,
    redux_up: Linear,
    redux_down: Linear,
}

impl ReduxImageEncoder {
    /// Builds the layers from weights under diffusers' names.
    pub fn new(config: &ReduxConfig, weights: &Weights) -> Result<Self> {
        let (inputs, outputs) = (config.redux_dim, config.txt_in_features);
        Ok(Self {
            dtype: weights.dtype(),
            redux_up: weights.pp("redux_up").linear(inputs, 3 * outputs, true)?,
            redux_down: weights.pp("redux_down").linear(3 * outputs, outputs, true)?,
            config: config.clone(),
        })
    }

    /// The configuration it was built from.
    pub fn config(&self) -> &ReduxConfig {
        &self.config
    }

    /// The type of the words.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// `(batch, tokens, redux_dim)` to `(batch, tokens, txt_in_features)`.
    pub fn forward(&self, states: &Tensor) -> Result<Tensor> {
        let inner = self.redux_up.forward(&states.to_dtype(self.dtype)?)?;
        self.redux_down.forward(&Activation::Silu.forward(&inner)?)
    }
}
