//! The CLIP text encoder (transformers `CLIPTextModel` and `CLIPTextModelWithProjection`); Radford et al. 2021,
//! arXiv:2103.00020.
//!
//! Takes token ids and returns every hidden state, so that pipelines choose the layer they were trained with.
//! Leaves tokens to the tokenizer and the choice of a layer to the pipelines.

use candle_core::{DType, Device, Shape, Tensor};
use serde::Deserialize;

use super::config::{OneOrMany, unsupported};
use crate::{
    Error, Result,
    nn::{Activation, AttentionOptions, Embedding, LayerNorm, Linear, Mask, attention},
    weights::Weights,
};

/// The `config.json` of a CLIP text encoder; what it leaves out has transformers' defaults.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct ClipTextConfig {
    /// Class names; `CLIPTextModelWithProjection` has a projection after the pooled state.
    pub architectures: Option<Vec<String>>,
    /// How many tokens there are.
    pub vocab_size: usize,
    /// Features per token.
    pub hidden_size: usize,
    /// Features inside the feed-forward layers.
    pub intermediate_size: usize,
    /// Features of the projected pooled state.
    pub projection_dim: usize,
    /// How many layers there are.
    pub num_hidden_layers: usize,
    /// Heads per layer.
    pub num_attention_heads: usize,
    /// The longest sequence, in tokens.
    pub max_position_embeddings: usize,
    /// The activation of the feed-forward layers.
    pub hidden_act: String,
    /// The epsilon of the layer norms.
    pub layer_norm_eps: f64,
    /// The token whose state is the pooled state; 2 stands for the largest token id of the prompt.
    pub eos_token_id: OneOrMany<u32>,
}

impl Default for ClipTextConfig {
    fn default() -> Self {
        Self {
            architectures: None,
            vocab_size: 49408,
            hidden_size: 512,
            intermediate_size: 2048,
            projection_dim: 512,
            num_hidden_layers: 12,
            num_attention_heads: 8,
            max_position_embeddings: 77,
            hidden_act: String::from("quick_gelu"),
            layer_norm_eps: 1e-5,
            eos_token_id: OneOrMany::One(49407),
        }
    }
}

impl ClipTextConfig {
    fn has_projection(&self) -> bool {
        let names = self.architectures.as_deref().unwrap_or_default();
        names.iter().any(|name| name == "CLIPTextModelWithProjection")
    }
}

/// What the encoder says about a batch of prompts.
#[derive(Clone, Debug)]
pub struct ClipTextOutput {
    /// The embeddings, then the state after each layer, without the final norm: each `(batch, tokens, hidden)`.
    pub hidden_states: Vec<Tensor>,
    /// The last state after the final norm, `(batch, tokens, hidden)`.
    pub last_hidden_state: Tensor,
    /// The last state of the end token, after the final norm, `(batch, hidden)`.
    pub pooled: Tensor,
    /// The pooled state after the projection, `(batch, projection)`, where the model has one.
    pub text_embeds: Option<Tensor>,
}

/// What the table of words may be called.
const WORD_TABLES: [&str; 2] = ["text_model.embeddings.token_embedding.weight", "embeddings.token_embedding.weight"];

/// The CLIP text encoder.
pub struct ClipTextModel {
    config: ClipTextConfig,
    dtype: DType,
    device: Device,
    token_embedding: Embedding,
    /// `(max_position_embeddings, hidden)`.
    position_embedding: Tensor,
    layers: Vec<EncoderLayer>,
    final_layer_norm: LayerNorm,
    text_projection: Option<Linear>,
}

impl ClipTextModel {
    /// Builds the encoder from weights whose names may or may not start with `text_model.`.
    pub fn new(config: &ClipTextConfig, weights: Weights) -> Result<Self> {
        let act = Activation::parse("hidden_act", &config.hidden_act)?;
        let root = if weights.contains("text_model.final_layer_norm.weight") {
            weights.pp("text_model")
        } else {
            weights.clone()
        };
        let size = config.hidden_size;
        let embeddings = root.pp("embeddings");
        let layers = (0..config.num_hidden_layers)
            .map(|i| EncoderLayer::new(&Sizes::of_text(config), act, &root.pp("encoder.layers").pp(i)))
            .collect::<Result<_>>()?;
        // A projection that the configuration does not mention is taken when it fits, and left alone otherwise.
        let fitting = Shape::from((config.projection_dim, size));
        let has_fitting = weights.shape_of("text_projection.weight").is_some_and(|shape| shape == fitting);
        let text_projection = (config.has_projection() || has_fitting)
            .then(|| weights.pp("text_projection").linear(size, config.projection_dim, false))
            .transpose()?;
        Ok(Self {
            dtype: weights.dtype(),
            device: weights.device().clone(),
            token_embedding: embeddings.pp("token_embedding").embedding(config.vocab_size, size)?,
            position_embedding: embeddings.get((config.max_position_embeddings, size), "position_embedding.weight")?,
            layers,
            final_layer_norm: root.pp("final_layer_norm").layer_norm(size, config.layer_norm_eps)?,
            text_projection,
            config: config.clone(),
        })
    }

    /// The table of words in the weights of an encoder, with its name.
    pub(crate) fn word_table(weights: &Weights) -> Result<Option<(&'static str, Tensor)>> {
        let Some(name) = WORD_TABLES.into_iter().find(|name| weights.contains(name)) else { return Ok(None) };
        Ok(weights.find(name)?.map(|table| (name, table)))
    }

    /// How many words the weights of an encoder have a row for.
    pub(crate) fn words(weights: &Weights) -> Option<usize> {
        WORD_TABLES.into_iter().find_map(|name| weights.shape_of(name))?.dims().first().copied()
    }

    /// The configuration it was built from.
    pub fn config(&self) -> &ClipTextConfig {
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

    /// Encodes token ids `(batch, tokens)` of u32. Padding is attended to like any other token, as the
    /// reference does.
    pub fn forward(&self, input_ids: &Tensor) -> Result<ClipTextOutput> {
        let (_, tokens) = input_ids.dims2()?;
        if tokens > self.config.max_position_embeddings {
            return Err(Error::Argument {
                name: String::from("prompt"),
                reason: format!(
                    "{tokens} tokens are more than the {} this text encoder reads; shorten the prompt",
                    self.config.max_position_embeddings
                ),
            });
        }
        let input_ids = input_ids.to_dtype(DType::U32)?;
        let ids = input_ids.to_device(&self.device)?;
        let positions = self.position_embedding.narrow(0, 0, tokens)?;
        let mut states = vec![self.token_embedding.forward(&ids)?.broadcast_add(&positions)?];
        for layer in &self.layers {
            let next = layer.forward(&states[states.len() - 1])?;
            states.push(next);
        }
        let last_hidden_state = self.final_layer_norm(&states[states.len() - 1])?;
        let pooled = self.pool(&last_hidden_state, &input_ids)?;
        let text_embeds = self.text_projection.as_ref().map(|layer| layer.forward(&pooled)).transpose()?;
        Ok(ClipTextOutput { hidden_states: states, last_hidden_state, pooled, text_embeds })
    }

    /// The norm at the end, for a pipeline that takes an earlier state: same shape as the input.
    pub fn final_layer_norm(&self, state: &Tensor) -> Result<Tensor> {
        self.final_layer_norm.forward(state)
    }

    /// The state at each prompt's end token.
    fn pool(&self, state: &Tensor, input_ids: &Tensor) -> Result<Tensor> {
        let rows = input_ids.to_vec2::<u32>()?;
        let pooled = rows
            .iter()
            .enumerate()
            .map(|(at, ids)| Ok(state.get(at)?.get(end_position(ids, &self.config.eos_token_id))?))
            .collect::<Result<Vec<_>>>()?;
        Ok(Tensor::stack(&pooled, 0)?)
    }
}

/// Where a prompt ends: the first end token; with the historic setting 2, the first of the largest ids (transformers
/// `CLIPTextTransformer.forward`). A prompt without end token counts as ending at its first token, as there.
fn end_position(ids: &[u32], eos: &OneOrMany<u32>) -> usize {
    let is_end = |id: &u32| match eos {
        OneOrMany::One(2) => Some(id) == ids.iter().max(),
        OneOrMany::One(eos) => id == eos,
        OneOrMany::Many(eos) => eos.contains(id),
    };
    ids.iter().position(is_end).unwrap_or(0)
}

/// What the layers of one encoder have in common.
pub(crate) struct Sizes {
    pub(crate) hidden: usize,
    pub(crate) intermediate: usize,
    pub(crate) heads: usize,
    pub(crate) eps: f64,
    pub(crate) is_causal: bool,
}

impl Sizes {
    fn of_text(config: &ClipTextConfig) -> Self {
        Self {
            hidden: config.hidden_size,
            intermediate: config.intermediate_size,
            heads: config.num_attention_heads,
            eps: config.layer_norm_eps,
            is_causal: true,
        }
    }
}

/// One transformer layer with norms before attention and feed-forward; text and vision encoders share it.
pub(crate) struct EncoderLayer {
    layer_norm1: LayerNorm,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    out_proj: Linear,
    layer_norm2: LayerNorm,
    fc1: Linear,
    act: Activation,
    fc2: Linear,
    heads: usize,
    is_causal: bool,
}

impl EncoderLayer {
    pub(crate) fn new(sizes: &Sizes, act: Activation, weights: &Weights) -> Result<Self> {
        let Sizes { hidden, intermediate, heads, eps, is_causal } = *sizes;
        if heads == 0 || !hidden.is_multiple_of(heads) {
            return Err(unsupported("num_attention_heads", heads));
        }
        let attention = weights.pp("self_attn");
        let projection = |name: &str| attention.pp(name).linear(hidden, hidden, true);
        Ok(Self {
            layer_norm1: weights.pp("layer_norm1").layer_norm(hidden, eps)?,
            q_proj: projection("q_proj")?,
            k_proj: projection("k_proj")?,
            v_proj: projection("v_proj")?,
            out_proj: projection("out_proj")?,
            layer_norm2: weights.pp("layer_norm2").layer_norm(hidden, eps)?,
            fc1: weights.pp("mlp.fc1").linear(hidden, intermediate, true)?,
            act,
            fc2: weights.pp("mlp.fc2").linear(intermediate, hidden, true)?,
            heads,
            is_causal,
        })
    }

    /// `(batch, tokens, hidden)` to the same.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let normed = self.layer_norm1.forward(x)?;
        let mask = if self.is_causal { Mask::Causal } else { Mask::None };
        let attended = attention(
            &self.q_proj.forward(&normed)?,
            &self.k_proj.forward(&normed)?,
            &self.v_proj.forward(&normed)?,
            AttentionOptions { mask, ..AttentionOptions::heads(self.heads) },
        )?;
        let x = (x + self.out_proj.forward(&attended)?)?;
        let inner = self.act.forward(&self.fc1.forward(&self.layer_norm2.forward(&x)?)?)?;
        Ok((x + self.fc2.forward(&inner)?)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_historic_end_token_means_the_largest_id_and_any_other_the_first_match() {
        let ids = [998, 5, 1002, 999, 999];
        assert_eq!(end_position(&ids, &OneOrMany::One(2)), 2);
        assert_eq!(end_position(&ids, &OneOrMany::One(999)), 3);
        assert_eq!(end_position(&ids, &OneOrMany::Many(vec![7, 5])), 1);
        assert_eq!(end_position(&ids, &OneOrMany::One(7)), 0);
    }

    #[test]
    fn a_configuration_may_leave_everything_out() {
        let config: ClipTextConfig = serde_json::from_str("{}").expect("all keys have defaults");
        assert_eq!((config.hidden_size, config.num_hidden_layers), (512, 12));
        assert!(!config.has_projection());
    }
}
