//! Activation functions, applied to each number.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use crate::{
    host::{self, is_host_f32},
    simd,
};

/// How many numbers one task takes.
const PIECE: usize = 1 << 14;

/// `x * sigmoid(x)` (Elfwing et al. 2017). Any shape; keeps shape and type.
pub fn silu(x: &Tensor) -> Result<Tensor> {
    if is_host_f32(x) { map(x, simd::silu) } else { x.silu() }
}

/// `x * Φ(x)` with the exact normal distribution function (Hendrycks and Gimpel 2016). Any shape; keeps
/// shape and type.
pub fn gelu_erf(x: &Tensor) -> Result<Tensor> {
    if is_host_f32(x) { map(x, simd::gelu_erf) } else { x.gelu_erf() }
}

/// `x * Φ(x)` with the tanh approximation of Φ. Any shape; keeps shape and type.
pub fn gelu_tanh(x: &Tensor) -> Result<Tensor> {
    if is_host_f32(x) { map(x, simd::gelu_tanh) } else { x.gelu() }
}

fn map(x: &Tensor, function: impl Fn(&mut [f32], &[f32]) + Sync) -> Result<Tensor> {
    let x = x.contiguous()?;
    let numbers = host::contiguous(&x)?;
    let input: &[f32] = &numbers;
    let mut output = vec![0.0; input.len()];
    output.par_chunks_mut(PIECE).zip(input.par_chunks(PIECE)).for_each(|(output, input)| function(output, input));
    host::tensor(output, x.shape().clone())
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::testing::{assert_close, wave};

    #[test]
    fn activations_are_those_of_candle_in_double_precision() {
        let x = (wave(&[3, 7, 1001], 1) * 6.0).expect("a product");
        let wide = x.to_dtype(DType::F64).expect("f64");
        assert_close(&silu(&x).expect("silu"), &wide.silu().expect("silu"), 3e-7);
        assert_close(&gelu_erf(&x).expect("gelu"), &wide.gelu_erf().expect("gelu"), 3e-7);
        assert_close(&gelu_tanh(&x).expect("gelu"), &wide.gelu().expect("gelu"), 3e-7);
    }

    #[test]
    fn strided_input_and_other_types_work_too() {
        let x = wave(&[4, 6], 2);
        let turned = x.t().expect("two axes");
        assert_close(&silu(&turned).expect("silu"), &x.silu().and_then(|y| y.t()).expect("silu"), 1e-6);
        let half = x.to_dtype(DType::BF16).expect("bf16");
        assert_eq!(silu(&half).expect("silu").dtype(), DType::BF16);
        let empty = Tensor::zeros((0, 3), DType::F32, &Device::Cpu).expect("a tensor");
        assert_eq!(gelu_erf(&empty).expect("nothing").dims(), [0, 3]);
    }

    #[test]
    fn nan_is_not_hidden() {
        let x = Tensor::new(&[f32::NAN, 1.0], &Device::Cpu).expect("a tensor");
        for y in [silu(&x), gelu_erf(&x), gelu_tanh(&x)] {
            let y = y.and_then(|y| y.to_vec1::<f32>()).expect("numbers");
            assert!(y[0].is_nan() && y[1].is_finite());
        }
    }
}
