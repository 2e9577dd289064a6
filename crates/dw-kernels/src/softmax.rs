//! Softmax over the last axis.

use candle_core::{D, Result, Tensor};
use rayon::prelude::*;

use crate::{
    host::{self, is_host_f32},
    simd,
};

/// About how many numbers one task takes.
const PIECE: usize = 1 << 14;

/// `e^x / sum(e^x)` over the last axis, of at least one entry. Keeps shape and type.
pub fn softmax(x: &Tensor) -> Result<Tensor> {
    let width = x.dim(D::Minus1)?;
    if !is_host_f32(x) || width == 0 {
        let shifted = x.broadcast_sub(&x.max_keepdim(D::Minus1)?)?.exp()?;
        return shifted.broadcast_div(&shifted.sum_keepdim(D::Minus1)?);
    }
    let x = x.contiguous()?;
    let mut output = host::contiguous(&x)?.to_vec();
    let rows = (PIECE / width).max(1);
    output.par_chunks_mut(rows * width).for_each(|piece| {
        for row in piece.chunks_exact_mut(width) {
            let largest = simd::max(row);
            let sum = simd::exp_sum(row, largest);
            simd::scale(row, 1.0 / sum);
        }
    });
    host::tensor(output, x.shape().clone())
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;
    use crate::testing::{assert_close, wave};

    #[test]
    fn rows_are_those_of_the_formula_in_double_precision() {
        for shape in [&[1, 1][..], &[3, 77], &[2, 5, 33], &[4, 4096], &[40_000, 3]] {
            let x = (wave(shape, 3) * 8.0).expect("a product");
            let wide = x.to_dtype(DType::F64).expect("f64");
            assert_close(&softmax(&x).expect("softmax"), &softmax(&wide).expect("softmax"), 1e-6);
        }
    }
}
