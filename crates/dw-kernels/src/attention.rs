//! Attention without the matrix of all scores: keys are taken in blocks and the softmax is corrected as
//! larger scores turn up (Milakov and Gimelshein 2018; Dao et al. 2022, algorithm 1).

use candle_core::{D, DType, Result, Tensor};
use rayon::prelude::*;

use crate::{
    host::{self, SharedOutput, is_host_f32},
    matrix::{Into, Matrix, multiply},
    simd,
    softmax::softmax,
};

/// Queries that one task takes.
const QUERIES: usize = 256;
/// Keys whose scores exist at a time.
const KEYS: usize = 512;

/// `softmax(q kᵀ · scale) v` for each head (Vaswani et al. 2017).
///
/// `q` is `(batch, heads, queries, size)`, `k` is `(batch, heads, keys, size)`, `v` is
/// `(batch, heads, keys, value size)`; views with heads and positions exchanged are as good as contiguous
/// ones. The result is `(batch, heads, queries, value size)` in the type of `q`; on the fast path it is
/// such a view itself, so that joining the heads again copies nothing.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64) -> Result<Tensor> {
    let (batch, heads, _, size) = q.dims4()?;
    let (_, _, keys, value_size) = v.dims4()?;
    if k.dims() != [batch, heads, keys, size] || v.dims()[..2] != [batch, heads] {
        candle_core::bail!("shapes of attention do not fit: q {:?}, k {:?}, v {:?}", q.dims(), k.dims(), v.dims());
    }
    if keys > 0 && size > 0 && value_size > 0 && [q, k, v].into_iter().all(is_host_f32) {
        return blocked(q, k, v, scale as f32);
    }
    let scores = (q.contiguous()?.matmul(&k.transpose(2, 3)?.contiguous()?)? * scale)?;
    let wide = if matches!(scores.dtype(), DType::F16 | DType::BF16) { DType::F32 } else { scores.dtype() };
    softmax(&scores.to_dtype(wide)?)?.to_dtype(v.dtype())?.matmul(&v.contiguous()?)
}

/// One of the three inputs: numbers and where each head's rows are.
struct Operand<'a> {
    numbers: &'a [f32],
    strides: [usize; 3],
    rows: usize,
    size: usize,
}

impl<'a> Operand<'a> {
    fn new(tensor: &Tensor, numbers: &'a [f32]) -> Result<Self> {
        let (_, _, rows, size) = tensor.dims4()?;
        let [batch, head, row, _] = tensor.stride() else { candle_core::bail!("attention takes four axes") };
        Ok(Self { numbers, strides: [*batch, *head, *row], rows, size })
    }

    /// Some rows of one head, as a matrix.
    fn rows(&self, batch: usize, head: usize, start: usize, count: usize) -> Matrix<'_> {
        let [batch_stride, head_stride, row_stride] = self.strides;
        let first = batch * batch_stride + head * head_stride + start * row_stride;
        Matrix::rows(&self.numbers[first..], count, self.size, row_stride)
    }
}

fn with_dense_rows(tensor: &Tensor) -> Result<Tensor> {
    if tensor.stride()[3] == 1 { Ok(tensor.clone()) } else { tensor.contiguous() }
}

fn blocked(q: &Tensor, k: &Tensor, v: &Tensor, scale: f32) -> Result<Tensor> {
    let (batch, heads, queries, _) = q.dims4()?;
    let value_size = v.dim(D::Minus1)?;
    let [q, k, v] = [with_dense_rows(q)?, with_dense_rows(k)?, with_dense_rows(v)?];
    let (q_numbers, k_numbers, v_numbers) = (host::strided(&q)?, host::strided(&k)?, host::strided(&v)?);
    let (q, k, v) = (Operand::new(&q, &q_numbers)?, Operand::new(&k, &k_numbers)?, Operand::new(&v, &v_numbers)?);
    // Heads innermost but one, as the layer after attention wants them.
    let mut output = vec![0.0; batch * queries * heads * value_size];
    let shared = SharedOutput::new(&mut output);
    let blocks = queries.div_ceil(QUERIES);
    (0..batch * heads * blocks).into_par_iter().for_each(|task| {
        let (block, head, picture) = (task % blocks, task / blocks % heads, task / blocks / heads);
        let start = block * QUERIES;
        let count = QUERIES.min(queries - start);
        let values = block_values(&q, &k, &v, (picture, head, start, count), scale);
        for (row, values) in values.chunks_exact(value_size).enumerate() {
            let first = ((picture * queries + start + row) * heads + head) * value_size;
            // SAFETY: every row of every head belongs to one task.
            #[allow(unsafe_code)]
            unsafe { shared.part(first, value_size) }.copy_from_slice(values);
        }
    });
    host::tensor(output, (batch, queries, heads, value_size))?.transpose(1, 2)
}

/// Attention of `count` queries of one head from `start` on: `(count, value size)`.
fn block_values(
    q: &Operand<'_>,
    k: &Operand<'_>,
    v: &Operand<'_>,
    (picture, head, start, count): (usize, usize, usize, usize),
    scale: f32,
) -> Vec<f32> {
    let (keys, value_size) = (k.rows, v.size);
    let width = KEYS.min(keys);
    let mut scores = vec![0.0; count * width];
    let mut values = vec![0.0; count * value_size];
    let mut largest = vec![f32::NEG_INFINITY; count];
    let mut totals = vec![0.0; count];
    let queries = q.rows(picture, head, start, count);
    for first in (0..keys).step_by(width) {
        let taken = width.min(keys - first);
        let block_keys = k.rows(picture, head, first, taken).transposed();
        multiply(&mut scores, width, Into::Overwrite, scale, queries, block_keys);
        for (row, scores) in scores.chunks_exact_mut(width).enumerate() {
            let scores = &mut scores[..taken];
            let new = simd::max(scores).max(largest[row]);
            let kept = (largest[row] - new).exp();
            let sum = simd::exp_sum(scores, new);
            if first > 0 {
                totals[row] = totals[row] * kept + sum;
                if kept != 1.0 {
                    simd::scale(&mut values[row * value_size..][..value_size], kept);
                }
            } else {
                totals[row] = sum;
            }
            largest[row] = new;
        }
        let into = if first > 0 { Into::Add } else { Into::Overwrite };
        let weights = Matrix::rows(&scores, count, taken, width);
        multiply(&mut values, value_size, into, 1.0, weights, v.rows(picture, head, first, taken));
    }
    for (values, total) in values.chunks_exact_mut(value_size).zip(&totals) {
        simd::scale(values, 1.0 / total);
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, wave};

    fn wide(tensor: &Tensor) -> Tensor {
        tensor.to_dtype(DType::F64).expect("f64")
    }

    #[test]
    fn attention_is_that_of_the_formula_in_double_precision() {
        // batch, heads, queries, keys, size, value size
        for (b, h, n, m, d, dv) in [
            (1, 1, 1, 1, 1, 1),
            (2, 3, 7, 5, 8, 8),
            (1, 2, 300, 77, 40, 40),
            (1, 1, 257, 1025, 64, 64),
            (2, 1, 33, 513, 16, 24),
            (1, 2, 512, 512, 160, 160),
        ] {
            let q = (wave(&[b, h, n, d], 1) * 3.0).expect("a product");
            let (k, v) = (wave(&[b, h, m, d], 2), wave(&[b, h, m, dv], 3));
            let scale = 1.0 / (d as f64).sqrt();
            let found = attention(&q, &k, &v, scale).expect("attention");
            let expected = attention(&wide(&q), &wide(&k), &wide(&v), scale).expect("attention");
            assert_close(&found, &expected, 2e-6);
        }
    }

    #[test]
    fn heads_need_not_be_split_off_by_copying() {
        let [q, k, v] = [4, 5, 6].map(|seed| wave(&[2, 19, 3, 8], seed).transpose(1, 2).expect("four axes"));
        let found = attention(&q, &k, &v, 0.3).expect("attention");
        let [q, k, v] = [q, k, v].map(|t| t.contiguous().expect("a copy"));
        assert_close(&found, &attention(&q, &k, &v, 0.3).expect("attention"), 1e-7);
        assert!(found.transpose(1, 2).expect("four axes").is_contiguous());
        let turned = k.transpose(2, 3).and_then(|t| t.contiguous()?.transpose(2, 3)).expect("a view");
        assert_close(&attention(&q, &turned, &v, 0.3).expect("attention"), &found, 1e-6);
    }

    #[test]
    fn large_scores_and_nan_are_handled() {
        let q = (wave(&[1, 1, 4, 8], 1) * 300.0).expect("a product");
        let found = attention(&q, &q, &q, 1.0).expect("attention");
        let expected = attention(&wide(&q), &wide(&q), &wide(&q), 1.0).expect("attention");
        assert_close(&found, &expected, 1e-5);
        let nan = (&q * f64::NAN).expect("a product");
        let sum = attention(&q, &q, &nan, 1.0).and_then(|x| x.sum_all()?.to_scalar::<f32>()).expect("a number");
        assert!(sum.is_nan());
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let (q, k) = (wave(&[1, 2, 3, 4], 1), wave(&[1, 1, 3, 4], 2));
        assert!(attention(&q, &k, &k, 1.0).is_err());
    }
}
