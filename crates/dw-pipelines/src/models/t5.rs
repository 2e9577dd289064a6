//! The T5 text encoder (transformers `T5EncoderModel`); Raffel et al. 2020, arXiv:1910.10683.
//!
//! Takes token ids and returns the last state. Leaves tokens to the tokenizer, and how many of them there are to the
//! pipelines.

use candle_core::{DType, Device, Tensor};
use serde::Deserialize;

use super::config::unsupported;
use crate::{
    Result,
    nn::{Activation, AttentionOptions, Embedding, Linear, Mask, RmsNorm, attention},
    weights::Weights,
};

/// How far below the largest number of float16 states are kept.
const F16_ROOM: f64 = 1000.0;

/// The `config.json` of a T5 encoder; what it leaves out has transformers' defaults.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct T5Config {
    /// How many tokens there are.
    pub vocab_size: usize,
    /// Features per token.
    pub d_model: usize,
    /// Features per head.
    pub d_kv: usize,
    /// Features inside the feed-forward layers.
    pub d_ff: usize,
    /// How many layers there are.
    pub num_layers: usize,
    /// Heads per layer.
    pub num_heads: usize,
    /// Into how many buckets the distances between tokens fall, half of them for each direction.
    pub relative_attention_num_buckets: usize,
    /// The distance in tokens from which on all fall into the last bucket.
    pub relative_attention_max_distance: usize,
    /// The epsilon of the norms.
    pub layer_norm_epsilon: f64,
    /// The activation of the feed-forward layers, after `gated-` where they are gated.
    pub feed_forward_proj: String,
}

impl Default for T5Config {
    fn default() -> Self {
        Self {
            vocab_size: 32128,
            d_model: 512,
            d_kv: 64,
            d_ff: 2048,
            num_layers: 6,
            num_heads: 8,
            relative_attention_num_buckets: 32,
            relative_attention_max_distance: 128,
            layer_norm_epsilon: 1e-6,
            feed_forward_proj: String::from("relu"),
        }
    }
}

impl T5Config {
    /// Whether the feed-forward layers are gated, and their activation.
    fn feed_forward(&self) -> Result<(bool, Activation)> {
        let (is_gated, name) = match self.feed_forward_proj.strip_prefix("gated-") {
            // What the configuration calls gelu is its tanh approximation here.
            Some("gelu") => (true, "gelu_new"),
            Some(name) => (true, name),
            None => (false, self.feed_forward_proj.as_str()),
        };
        Ok((is_gated, Activation::parse("feed_forward_proj", name)?))
    }
}

/// The T5 text encoder.
pub struct T5EncoderModel {
    config: T5Config,
    dtype: DType,
    device: Device,
    shared: Embedding,
    layers: Vec<Layer>,
    final_layer_norm: RmsNorm,
}

impl T5EncoderModel {
    /// Builds the encoder from weights that hold the token table as `shared` or as `encoder.embed_tokens`.
    pub fn new(config: &T5Config, weights: Weights) -> Result<Self> {
        if config.relative_attention_num_buckets < 4 {
            return Err(unsupported("relative_attention_num_buckets", config.relative_attention_num_buckets));
        }
        let encoder = weights.pp("encoder");
        let layers = (0..config.num_layers).map(|i| Layer::new(config, i == 0, &encoder.pp("block").pp(i).pp("layer")));
        let tables = ["shared", "encoder.embed_tokens"].map(|name| weights.pp(name));
        let is_there = |table: &&Weights| table.contains("weight");
        let mut found = tables.iter().filter(is_there);
        let shared = found.next().unwrap_or(&tables[0]).embedding(config.vocab_size, config.d_model)?;
        // Some files hold the one table twice.
        for copy in found {
            copy.embedding(config.vocab_size, config.d_model)?;
        }
        Ok(Self {
            dtype: weights.dtype(),
            device: weights.device().clone(),
            shared,
            layers: layers.collect::<Result<_>>()?,
            final_layer_norm: encoder.pp("final_layer_norm").rms_norm(config.d_model, config.layer_norm_epsilon)?,
            config: config.clone(),
        })
    }

    /// The configuration it was built from.
    pub fn config(&self) -> &T5Config {
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

    /// The last state of token ids `(batch, tokens)` of u32, after the final norm: `(batch, tokens, d_model)`. Padding
    /// is attended to like any other token, as the pipelines of the reference do.
    pub fn forward(&self, input_ids: &Tensor) -> Result<Tensor> {
        let (_, tokens) = input_ids.dims2()?;
        let ids = input_ids.to_dtype(DType::U32)?.to_device(&self.device)?;
        let mut state = self.shared.forward(&ids)?;
        let buckets = buckets(&self.config, tokens);
        let mut bias: Option<Tensor> = None;
        for layer in &self.layers {
            // Layers without a table of their own use the one before.
            if let Some(table) = &layer.relative_attention_bias {
                bias = Some(position_bias(table, &buckets, tokens)?);
            }
            state = layer.forward(&state, bias.as_ref())?;
        }
        Ok(self.final_layer_norm.forward(&state)?.to_dtype(self.dtype)?)
    }
}

/// The bucket of each pair of a query and a key, queries outermost, for `tokens` tokens: near distances have a bucket
/// each, far ones share buckets that grow as their logarithm.
fn buckets(config: &T5Config, tokens: usize) -> Vec<u32> {
    let by_distance: Vec<u32> = (0..tokens).map(|distance| bucket(config, distance)).collect();
    let after = (config.relative_attention_num_buckets / 2) as u32;
    let pair = |query: usize, key: usize| by_distance[query.abs_diff(key)] + if key > query { after } else { 0 };
    (0..tokens).flat_map(|query| (0..tokens).map(move |key| pair(query, key))).collect()
}

/// The bucket of a distance in one direction.
fn bucket(config: &T5Config, distance: usize) -> u32 {
    let count = config.relative_attention_num_buckets / 2;
    let exact = count / 2;
    if distance < exact {
        return distance as u32;
    }
    // In single precision, as the reference counts: it decides at powers of two.
    let share = (distance as f32 / exact as f32).ln();
    let whole = (config.relative_attention_max_distance as f64 / exact as f64).ln() as f32;
    let far = share / whole * (count - exact) as f32;
    (exact + far as usize).min(count - 1) as u32
}

/// What is added to the scores, `(1, heads, tokens, tokens)`.
fn position_bias(table: &Embedding, buckets: &[u32], tokens: usize) -> Result<Tensor> {
    let device = table.device();
    let rows = table.forward(&Tensor::new(buckets, device)?)?;
    Ok(rows.reshape((tokens, tokens, ()))?.permute((2, 0, 1))?.contiguous()?.unsqueeze(0)?)
}

/// One layer: attention, then the feed-forward layers, each with a norm before it.
struct Layer {
    attention_norm: RmsNorm,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    heads: usize,
    relative_attention_bias: Option<Embedding>,
    feed_forward_norm: RmsNorm,
    feed_forward: FeedForward,
}

impl Layer {
    fn new(config: &T5Config, is_first: bool, weights: &Weights) -> Result<Self> {
        let (size, inner) = (config.d_model, config.num_heads * config.d_kv);
        let attention = weights.pp("0.SelfAttention");
        let table = attention.pp("relative_attention_bias");
        let relative_attention_bias = (is_first || table.contains("weight"))
            .then(|| table.embedding(config.relative_attention_num_buckets, config.num_heads))
            .transpose()?;
        Ok(Self {
            attention_norm: weights.pp("0.layer_norm").rms_norm(size, config.layer_norm_epsilon)?,
            q: attention.pp("q").linear(size, inner, false)?,
            k: attention.pp("k").linear(size, inner, false)?,
            v: attention.pp("v").linear(size, inner, false)?,
            o: attention.pp("o").linear(inner, size, false)?,
            heads: config.num_heads,
            relative_attention_bias,
            feed_forward_norm: weights.pp("1.layer_norm").rms_norm(size, config.layer_norm_epsilon)?,
            feed_forward: FeedForward::new(config, &weights.pp("1.DenseReluDense"))?,
        })
    }

    fn forward(&self, state: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let dtype = self.feed_forward.dtype;
        let normed = self.attention_norm.forward(state)?.to_dtype(dtype)?;
        let mask = bias.map_or(Mask::None, Mask::Bias);
        let attended = attention(
            &self.q.forward(&normed)?,
            &self.k.forward(&normed)?,
            &self.v.forward(&normed)?,
            // T5 was trained without the usual scale.
            AttentionOptions { scale: Some(1.0), mask, ..AttentionOptions::heads(self.heads) },
        )?;
        let attended = self.o.forward(&attended)?.to_dtype(state.dtype())?;
        let state = within_f16((state + attended)?)?;
        let normed = self.feed_forward_norm.forward(&state)?.to_dtype(dtype)?;
        let fed = self.feed_forward.forward(&normed)?;
        // In float16 the last product is wide, and the states are from there on.
        within_f16((state.to_dtype(fed.dtype())? + fed)?)
    }
}

/// Cuts float16 states that have overflowed to what the next layer can read.
fn within_f16(state: Tensor) -> Result<Tensor> {
    if state.dtype() != DType::F16 {
        return Ok(state);
    }
    let bound = f64::from(half::f16::MAX) - F16_ROOM;
    Ok(state.clamp(-bound, bound)?)
}

/// The feed-forward layers, gated or not.
struct FeedForward {
    /// The gate (`wi_0`), or the only layer (`wi`).
    gate: Linear,
    wi_1: Option<Linear>,
    act: Activation,
    wo: Linear,
    dtype: DType,
    /// The type that `wo` multiplies in.
    wo_dtype: DType,
}

impl FeedForward {
    fn new(config: &T5Config, weights: &Weights) -> Result<Self> {
        let (is_gated, act) = config.feed_forward()?;
        let wide = |name: &str| weights.pp(name).linear(config.d_model, config.d_ff, false);
        let (wo, wo_dtype) = output_layer(config, &weights.pp("wo"))?;
        Ok(Self {
            gate: wide(if is_gated { "wi_0" } else { "wi" })?,
            wi_1: is_gated.then(|| wide("wi_1")).transpose()?,
            act,
            wo,
            dtype: weights.dtype(),
            wo_dtype,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let gate = self.act.forward(&self.gate.forward(x)?)?;
        let inner = match &self.wi_1 {
            Some(layer) => (gate * layer.forward(x)?)?,
            None => gate,
        };
        self.wo.forward(&inner.to_dtype(self.wo_dtype)?)
    }
}

/// The last feed-forward layer with the type it multiplies in: float32 where the model is float16, which its results
/// overflow.
fn output_layer(config: &T5Config, weights: &Weights) -> Result<(Linear, DType)> {
    let (inputs, outputs) = (config.d_ff, config.d_model);
    let is_narrow = weights.dtype() == DType::F16;
    let weights = if is_narrow { &weights.widened(DType::F32) } else { weights };
    Ok((weights.linear(inputs, outputs, false)?, weights.dtype()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_distances_have_a_bucket_each_and_far_ones_share() {
        let config = T5Config::default();
        let found: Vec<u32> = [0, 1, 7, 8, 11, 12, 15, 16, 22, 23, 31, 32, 45, 46, 63, 64, 90, 91, 127, 128, 500]
            .map(|distance| bucket(&config, distance))
            .to_vec();
        // transformers `T5Attention._relative_position_bucket` for keys before the query.
        assert_eq!(found, [0, 1, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15, 15, 15]);
    }

    #[test]
    fn keys_after_the_query_have_the_second_half_of_the_buckets() {
        assert_eq!(buckets(&T5Config::default(), 3), [0, 17, 18, 1, 0, 17, 2, 1, 0]);
    }

    #[test]
    fn a_gated_gelu_is_its_tanh_approximation() {
        let with = |name: &str| T5Config { feed_forward_proj: name.into(), ..T5Config::default() };
        let parsed = |name: &str| with(name).feed_forward().expect("known");
        assert_eq!(parsed("gated-gelu"), (true, Activation::GeluTanh));
        assert_eq!(parsed("gated-silu"), (true, Activation::Silu));
        assert_eq!(parsed("relu"), (false, Activation::Relu));
        assert!(with("gated-step").feed_forward().is_err());
    }

    /// A model of one layer with the given weight in all matrices.
    fn tiny(dtype: DType, weight: f32) -> T5EncoderModel {
        let config = T5Config {
            vocab_size: 3,
            d_model: 4,
            d_kv: 2,
            d_ff: 4,
            num_layers: 1,
            num_heads: 2,
            feed_forward_proj: "gated-gelu".into(),
            ..T5Config::default()
        };
        let block = "encoder.block.0.layer";
        let shapes = [
            ("shared.weight".to_owned(), (3, 4)),
            (format!("{block}.0.SelfAttention.relative_attention_bias.weight"), (32, 2)),
        ];
        let square = ["0.SelfAttention.q", "0.SelfAttention.k", "0.SelfAttention.v", "0.SelfAttention.o"]
            .into_iter()
            .chain(["1.DenseReluDense.wi_0", "1.DenseReluDense.wi_1", "1.DenseReluDense.wo"])
            .map(|name| (format!("{block}.{name}.weight"), (4, 4)));
        let full = |(name, shape): (String, (usize, usize))| {
            (name, Tensor::full(weight, shape, &Device::Cpu).and_then(|x| x.to_dtype(dtype)).expect("a small tensor"))
        };
        let norms =
            [format!("{block}.0.layer_norm"), format!("{block}.1.layer_norm"), "encoder.final_layer_norm".into()]
                .map(|name| (format!("{name}.weight"), Tensor::ones(4, dtype, &Device::Cpu).expect("a small tensor")));
        let tensors = shapes.into_iter().chain(square).map(full).chain(norms).collect();
        T5EncoderModel::new(&config, Weights::from_tensors(tensors, "a test")).expect("the shapes fit")
    }

    #[test]
    fn float16_states_beyond_its_range_do_not_break_the_result() {
        let ids = Tensor::new(&[[0u32, 2, 1]], &Device::Cpu).expect("three ids");
        // The product of the last layer is about 4 * (4 * 15)² * 15 = 216000, beyond float16.
        let state = tiny(DType::F16, 15.0).forward(&ids).expect("it runs");
        assert_eq!(state.dtype(), DType::F16);
        let values: Vec<f32> = state.flatten_all().and_then(|x| x.to_dtype(DType::F32)?.to_vec1()).expect("floats");
        assert!(values.iter().all(|value| (value - 1.0).abs() < 1e-2), "{values:?}");
    }
}
