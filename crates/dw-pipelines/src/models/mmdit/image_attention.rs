//! What the attention of a block sees of pictures besides its own tokens (diffusers
//! `SD3IPAdapterJointAttnProcessor2_0`): the block's picture tokens look at each other and at a picture's tokens, and
//! what they learn is added to what the block itself gives.

use candle_core::Tensor;

use super::{EPS, Modulation, Sizes, modulated, normed_heads};
use crate::{
    Result,
    nn::{AttentionOptions, LayerNorm, Linear, RmsNorm, attention},
    weights::Weights,
};

/// The weights of one such attention.
pub(in crate::models) struct ImageAttention {
    norm: Modulation<2>,
    to_k: Linear,
    to_v: Linear,
    norm_q: RmsNorm,
    norm_k: RmsNorm,
    norm_image_k: RmsNorm,
    sizes: Sizes,
}

impl ImageAttention {
    /// `times` is how many features the vector of the timestep has.
    pub(in crate::models) fn new(sizes: Sizes, times: usize, weights: &Weights) -> Result<Self> {
        let inner = sizes.inner();
        let norm = |name: &str| weights.pp(name).rms_norm(sizes.head, EPS);
        Ok(Self {
            norm: Modulation::of(weights.pp("norm_ip.linear").linear(times, 2 * inner, true)?),
            to_k: weights.pp("to_k_ip").linear(inner, inner, false)?,
            to_v: weights.pp("to_v_ip").linear(inner, inner, false)?,
            norm_q: norm("norm_q")?,
            norm_k: norm("norm_k")?,
            norm_image_k: norm("norm_ip_k")?,
            sizes,
        })
    }
}

/// One attention and what it looks at.
#[derive(Clone, Copy)]
pub(in crate::models) struct JointImages<'a> {
    pub(in crate::models) attention: &'a ImageAttention,
    /// `(batch, tokens, inner)`.
    pub(in crate::models) tokens: &'a Tensor,
    /// The vector of the timestep, `(1, features)`.
    pub(in crate::models) time: &'a Tensor,
    /// What the result is multiplied with.
    pub(in crate::models) scale: f64,
}

impl JointImages<'_> {
    /// What is added to the attention of picture tokens whose queries, keys and values, before their norms, are given:
    /// `(batch, tokens, inner)` each, like the result.
    pub(super) fn learned(&self, [q, k, v]: &[Tensor; 3]) -> Result<Tensor> {
        let ImageAttention { norm, to_k, to_v, norm_q, norm_k, norm_image_k, sizes } = self.attention;
        let [shift, scale] = norm.forward(self.time)?;
        let tokens = modulated(&LayerNorm::plain(self.tokens, EPS)?, &scale, &shift)?;
        let image_key = normed_heads(&to_k.forward(&tokens)?, norm_image_k, *sizes)?;
        let key = Tensor::cat(&[normed_heads(k, norm_k, *sizes)?, image_key], 1)?;
        let value = Tensor::cat(&[v, &to_v.forward(&tokens)?], 1)?;
        let query = normed_heads(q, norm_q, *sizes)?;
        Ok((attention(&query, &key, &value, AttentionOptions::heads(sizes.heads))? * self.scale)?)
    }
}

/// What the attentions of one block see.
#[derive(Clone, Copy)]
pub(in crate::models) struct BlockImages<'a> {
    /// That of picture and text tokens.
    pub(in crate::models) joint: JointImages<'a>,
    /// That of picture tokens alone, in blocks that have one.
    pub(in crate::models) alone: Option<JointImages<'a>>,
}
