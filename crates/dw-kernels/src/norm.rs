//! Group normalisation, with an activation fused into it.

use candle_core::{D, DType, Result, Tensor};
use rayon::prelude::*;

use crate::{
    host::{self, is_host_f32},
    simd,
};

/// Sums are in f32 over this many numbers and in f64 beyond.
const PIECE: usize = 1 << 12;

/// Normalises each group of channels of each picture to mean 0 and variance 1, then scales and shifts
/// each channel (Wu and He 2018); with `silu` also applies that activation.
///
/// `x` is `(batch, channels, …)`, `weight` and `bias` are `(channels,)`. Keeps shape and type.
pub fn group_norm(x: &Tensor, groups: usize, weight: &Tensor, bias: &Tensor, eps: f64, silu: bool) -> Result<Tensor> {
    let channels = x.dim(1)?;
    if groups == 0 || !channels.is_multiple_of(groups) {
        candle_core::bail!("`{channels}` channels cannot be split into `{groups}` groups");
    }
    if weight.dims() != [channels] || bias.dims() != [channels] {
        candle_core::bail!("weight and bias must have `{channels}` entries, like the channels of the input");
    }
    if [x, weight, bias].into_iter().all(is_host_f32) {
        return fused(x, groups, weight, bias, eps, silu);
    }
    composed(x, groups, weight, bias, eps, silu)
}

fn fused(x: &Tensor, groups: usize, weight: &Tensor, bias: &Tensor, eps: f64, silu: bool) -> Result<Tensor> {
    let [x, weight, bias] = [x.contiguous()?, weight.contiguous()?, bias.contiguous()?];
    let (input, weight, bias) = (host::contiguous(&x)?, host::contiguous(&weight)?, host::contiguous(&bias)?);
    let (input, weight, bias): (&[f32], &[f32], &[f32]) = (&input, &weight, &bias);
    if input.is_empty() {
        return Ok(x.clone());
    }
    let pixels: usize = x.dims()[2..].iter().product();
    let per_group = weight.len() / groups;
    let apply = if silu { simd::scale_shift_silu } else { simd::scale_shift };
    let mut output = vec![0.0; input.len()];
    let pieces = output.par_chunks_mut(per_group * pixels).zip(input.par_chunks(per_group * pixels));
    pieces.enumerate().for_each(|(i, (output, input))| {
        let (mean, deviation) = moments(input, eps);
        let first = i % groups * per_group;
        let planes = output.chunks_exact_mut(pixels).zip(input.chunks_exact(pixels));
        for ((output, input), channel) in planes.zip(first..) {
            let factor = weight[channel] / deviation;
            apply(output, input, factor, bias[channel] - mean * factor);
        }
    });
    host::tensor(output, x.shape().clone())
}

/// Mean and standard deviation, `eps` added to the variance.
fn moments(numbers: &[f32], eps: f64) -> (f32, f32) {
    let count = numbers.len() as f64;
    let mean = numbers.chunks(PIECE).map(|piece| f64::from(simd::sum(piece))).sum::<f64>() / count;
    let mean = mean as f32;
    let variance = numbers.chunks(PIECE).map(|piece| f64::from(simd::sum_squares(piece, mean))).sum::<f64>() / count;
    (mean, (variance + eps).sqrt() as f32)
}

/// The same by candle's operations, in f32 where the type is narrower.
fn composed(x: &Tensor, groups: usize, weight: &Tensor, bias: &Tensor, eps: f64, silu: bool) -> Result<Tensor> {
    let dtype = x.dtype();
    let wide = if matches!(dtype, DType::F16 | DType::BF16) { DType::F32 } else { dtype };
    let (batch, channels) = (x.dim(0)?, x.dim(1)?);
    let grouped = x.to_dtype(wide)?.reshape((batch, groups, ()))?;
    let centred = grouped.broadcast_sub(&grouped.mean_keepdim(D::Minus1)?)?;
    let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
    let normal = centred.broadcast_div(&(variance + eps)?.sqrt()?)?.reshape(x.dims())?;
    let mut shape = vec![1; x.rank()];
    shape[1] = channels;
    let [weight, bias] = [weight, bias].map(|t| t.to_dtype(wide)?.reshape(shape.as_slice()));
    let y = normal.broadcast_mul(&weight?)?.broadcast_add(&bias?)?;
    if silu { y.silu()? } else { y }.to_dtype(dtype)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, wave};

    #[test]
    fn normalised_pictures_are_those_of_the_formula_in_double_precision() {
        for (shape, groups) in [
            (&[1, 4, 3, 5][..], 2),
            (&[2, 32, 8, 8], 32),
            (&[3, 6, 1, 1], 1),
            (&[2, 12, 7], 3),
            (&[1, 64, 33, 65], 32),
            (&[2, 8], 4),
        ] {
            let channels = shape[1];
            let x = ((wave(shape, 4) * 3.0).and_then(|x| x + 5.0)).expect("numbers");
            let (weight, bias) = (wave(&[channels], 5), wave(&[channels], 6));
            let [wide_x, wide_w, wide_b] = [&x, &weight, &bias].map(|t| t.to_dtype(DType::F64).expect("f64"));
            for silu in [false, true] {
                let found = group_norm(&x, groups, &weight, &bias, 1e-5, silu).expect("a norm");
                let expected = group_norm(&wide_x, groups, &wide_w, &wide_b, 1e-5, silu).expect("a norm");
                assert_close(&found, &expected, 2e-6);
            }
        }
    }

    #[test]
    fn sixteen_bit_pictures_keep_their_type() {
        let x = wave(&[1, 4, 5, 5], 7).to_dtype(DType::BF16).expect("bf16");
        let one = wave(&[4], 8).to_dtype(DType::BF16).expect("bf16");
        assert_eq!(group_norm(&x, 2, &one, &one, 1e-5, true).expect("a norm").dtype(), DType::BF16);
    }

    #[test]
    fn groups_that_do_not_divide_the_channels_are_refused() {
        let (x, one) = (wave(&[1, 4, 2, 2], 1), wave(&[4], 1));
        let error = group_norm(&x, 3, &one, &one, 1e-5, false).expect_err("3 does not divide 4");
        assert!(error.to_string().contains("`3` groups"), "{error}");
    }
}
