//! Scaled dot-product attention: one function with one signature for every model.
//!
//! Owns the splitting into heads, the bound on memory and the choice of an implementation. Leaves projections
//! to the models.

use candle_core::{D, DType, Tensor};

use super::{compute_dtype, limits};
use crate::{Error, Result};

/// Which keys a query may look at.
#[derive(Clone, Copy, Debug, Default)]
pub enum Mask<'a> {
    /// All of them.
    #[default]
    None,
    /// Those up to its own position.
    Causal,
    /// A bias added to the scores, broadcast to `(batch, heads, queries, keys)`.
    Bias(&'a Tensor),
}

/// What attention needs besides its three inputs.
#[derive(Clone, Copy, Debug)]
pub struct AttentionOptions<'a> {
    /// Into how many heads the features are split.
    pub heads: usize,
    /// What scores are multiplied with; `1 / sqrt(head size)` when none.
    pub scale: Option<f64>,
    /// Which keys a query may look at.
    pub mask: Mask<'a>,
}

impl AttentionOptions<'_> {
    /// Full attention with the usual scale.
    pub fn heads(heads: usize) -> Self {
        Self { heads, scale: None, mask: Mask::None }
    }
}

/// `softmax(q kᵀ · scale + mask) v` per head (Vaswani et al. 2017, arXiv:1706.03762).
///
/// `q` is `(batch, queries, features)`, `k` and `v` are `(batch, keys, features)`; features are heads × head
/// size, heads outermost. The result is `(batch, queries, features)` in the type of `q`. Queries are taken in
/// slices so that the scores stay within [`super::Limits::score_bytes`]; the softmax is computed in f32.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, options: AttentionOptions) -> Result<Tensor> {
    let (batch, queries, features) = q.dims3()?;
    let heads = options.heads;
    if heads == 0 || !features.is_multiple_of(heads) {
        return Err(Error::Unsupported(format!(
            "`{features}` features cannot be split into `{heads}` attention heads"
        )));
    }
    let compute = compute_dtype(q.dtype(), q.device());
    let per_head = |x: &Tensor| -> Result<Tensor> {
        let (batch, length, features) = x.dims3()?;
        Ok(x.reshape((batch, length, heads, features / heads))?.transpose(1, 2)?.to_dtype(compute)?)
    };
    let scale = options.scale.unwrap_or_else(|| 1.0 / ((features / heads) as f64).sqrt());
    if matches!(options.mask, Mask::None) && compute == DType::F32 && q.device().is_cpu() {
        let joined = dw_kernels::attention(&per_head(q)?, &per_head(k)?, &per_head(v)?, scale)?;
        return Ok(joined.transpose(1, 2)?.reshape((batch, queries, ()))?.to_dtype(q.dtype())?);
    }
    let split = |x: &Tensor| -> Result<Tensor> { Ok(per_head(x)?.contiguous()?) };
    let query = (split(q)? * scale)?;
    let key = split(k)?.transpose(2, 3)?;
    let value = split(v)?;

    let keys = key.dim(3)?;
    let rows = (limits::current().score_bytes / (4 * batch * heads * keys).max(1)).max(1);
    let mut slices = Vec::with_capacity(queries.div_ceil(rows));
    for start in (0..queries).step_by(rows) {
        let length = rows.min(queries - start);
        let slice = query.narrow(2, start, length)?;
        slices.push(attend(&slice, &key, &value, &options.mask, start)?);
    }
    let joined = match slices.as_slice() {
        [one] => one.clone(),
        many => Tensor::cat(many, 2)?,
    };
    Ok(joined.transpose(1, 2)?.reshape((batch, queries, ()))?.to_dtype(q.dtype())?)
}

/// Attention of one slice of queries, whose first is number `start`. All tensors are `(batch, heads, …)`.
fn attend(query: &Tensor, key_t: &Tensor, value: &Tensor, mask: &Mask, start: usize) -> Result<Tensor> {
    let scores = query.contiguous()?.matmul(key_t)?.to_dtype(DType::F32)?;
    let scores = match mask {
        Mask::None => scores,
        Mask::Causal => scores.broadcast_add(&causal_bias(&scores, start)?)?,
        Mask::Bias(bias) => {
            let bias = slice_bias(bias, start, query.dim(2)?)?;
            scores.broadcast_add(&bias.to_dtype(DType::F32)?)?
        }
    };
    let probabilities = candle_nn::ops::softmax_last_dim(&scores)?.to_dtype(value.dtype())?;
    Ok(probabilities.matmul(value)?)
}

/// `(queries, keys)`: 0 where the key is not after the query, -inf elsewhere.
fn causal_bias(scores: &Tensor, start: usize) -> Result<Tensor> {
    let (queries, keys) = (scores.dim(D::Minus2)?, scores.dim(D::Minus1)?);
    let bias: Vec<f32> = (start..start + queries)
        .flat_map(|query| (0..keys).map(move |key| if key <= query { 0.0 } else { f32::NEG_INFINITY }))
        .collect();
    Ok(Tensor::from_vec(bias, (queries, keys), scores.device())?)
}

/// The rows of a bias that belong to a slice of queries; a bias with one row holds for all.
fn slice_bias(bias: &Tensor, start: usize, length: usize) -> Result<Tensor> {
    if bias.dim(D::Minus2)? == 1 { Ok(bias.clone()) } else { Ok(bias.narrow(D::Minus2, start, length)?) }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn ramp(shape: (usize, usize, usize), step: f32) -> Tensor {
        let count = shape.0 * shape.1 * shape.2;
        let values: Vec<f32> = (0..count).map(|i| (i as f32 * step).sin()).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).expect("the count fits the shape")
    }

    fn vec(x: &Tensor) -> Vec<f32> {
        x.flatten_all().and_then(|x| x.to_dtype(DType::F32)).and_then(|x| x.to_vec1()).expect("a float tensor")
    }

    /// Attention as the formula says it, in f64 loops.
    fn plain(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize, causal: bool) -> Vec<f32> {
        let (batch, queries, features) = q.dims3().expect("three dimensions");
        let keys = k.dims()[1];
        let size = features / heads;
        let (qs, ks, vs) = (vec(q), vec(k), vec(v));
        let at = |b: usize, n: usize, length: usize, f: usize| (b * length + n) * features + f;
        let mut out = vec![0f32; batch * queries * features];
        for b in 0..batch {
            for head in 0..heads {
                for i in 0..queries {
                    let score = |j: usize| -> f64 {
                        let dot: f64 = (0..size)
                            .map(|f| head * size + f)
                            .map(|f| qs[at(b, i, queries, f)] as f64 * ks[at(b, j, keys, f)] as f64)
                            .sum();
                        if causal && j > i { f64::NEG_INFINITY } else { dot / (size as f64).sqrt() }
                    };
                    let weights: Vec<f64> = (0..keys).map(|j| score(j).exp()).collect();
                    let total: f64 = weights.iter().sum();
                    for f in head * size..(head + 1) * size {
                        let sum: f64 = (0..keys).map(|j| weights[j] * vs[at(b, j, keys, f)] as f64).sum();
                        out[at(b, i, queries, f)] = (sum / total) as f32;
                    }
                }
            }
        }
        out
    }

    fn assert_close(left: &[f32], right: &[f32], tolerance: f32) {
        assert_eq!(left.len(), right.len());
        for (left, right) in left.iter().zip(right) {
            assert!((left - right).abs() < tolerance, "{left} is not {right}");
        }
    }

    #[test]
    fn attention_follows_its_formula_for_every_mask() {
        let (q, k, v) = (ramp((2, 5, 12), 0.7), ramp((2, 7, 12), 0.3), ramp((2, 7, 12), 1.1));
        let full = attention(&q, &k, &v, AttentionOptions::heads(3)).expect("shapes fit");
        assert_eq!(full.dims(), q.dims());
        assert_close(&vec(&full), &plain(&q, &k, &v, 3, false), 1e-6);

        let causal = AttentionOptions { mask: Mask::Causal, ..AttentionOptions::heads(3) };
        assert_close(&vec(&attention(&q, &k, &v, causal).expect("shapes fit")), &plain(&q, &k, &v, 3, true), 1e-6);

        let mut hidden = vec![0f32; 5 * 7];
        for i in 0..5 {
            for j in i + 1..7 {
                hidden[i * 7 + j] = f32::NEG_INFINITY;
            }
        }
        let bias = Tensor::from_vec(hidden, (5, 7), &Device::Cpu).expect("the count fits");
        let biased = AttentionOptions { mask: Mask::Bias(&bias), ..AttentionOptions::heads(3) };
        assert_close(&vec(&attention(&q, &k, &v, biased).expect("shapes fit")), &plain(&q, &k, &v, 3, true), 1e-6);
    }

    #[test]
    fn slices_of_queries_give_the_same_as_one_piece() {
        // 6000 keys and 3 heads leave room for 3728 rows of scores: two slices.
        let (q, k, v) = (ramp((1, 3800, 6), 0.37), ramp((1, 6000, 6), 0.11), ramp((1, 6000, 6), 0.19));
        let all = attention(&q, &k, &v, AttentionOptions::heads(3)).expect("shapes fit");
        for start in [0, 3700, 3795] {
            let part = q.narrow(1, start, 5).expect("inside");
            let part = attention(&part, &k, &v, AttentionOptions::heads(3)).expect("shapes fit");
            assert_close(&vec(&all.narrow(1, start, 5).expect("inside")), &vec(&part), 1e-6);
        }
    }

    #[test]
    fn a_tighter_bound_on_scores_changes_nothing_but_the_number_of_slices() {
        let (q, k, v) = (ramp((2, 40, 12), 0.7), ramp((2, 40, 12), 0.3), ramp((2, 40, 12), 1.1));
        let causal = AttentionOptions { mask: Mask::Causal, ..AttentionOptions::heads(3) };
        let whole = attention(&q, &k, &v, causal).expect("shapes fit");
        // Room for seven rows of scores.
        let limits = super::super::Limits { score_bytes: 7 * 4 * 2 * 3 * 40, ..Default::default() };
        let sliced = limits.during(|| attention(&q, &k, &v, causal)).expect("shapes fit");
        assert_close(&vec(&whole), &vec(&sliced), 1e-6);
    }

    #[test]
    fn sixteen_bit_inputs_keep_their_type_and_are_computed_wide() {
        let (q, k, v) = (ramp((1, 4, 8), 0.7), ramp((1, 4, 8), 0.3), ramp((1, 4, 8), 1.1));
        let wide = attention(&q, &k, &v, AttentionOptions::heads(2)).expect("shapes fit");
        let half = |x: &Tensor| x.to_dtype(DType::BF16).expect("f32 narrows");
        let narrow = attention(&half(&q), &half(&k), &half(&v), AttentionOptions::heads(2)).expect("shapes fit");
        assert_eq!(narrow.dtype(), DType::BF16);
        assert_close(&vec(&wide), &vec(&narrow), 2e-2);
    }

    #[test]
    fn heads_that_do_not_divide_the_features_are_refused() {
        let x = ramp((1, 2, 8), 0.7);
        let error = attention(&x, &x, &x, AttentionOptions::heads(3)).expect_err("8 is not a multiple of 3");
        assert!(error.to_string().contains("`8` features"), "{error}");
    }
}
