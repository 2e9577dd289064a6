//! Activation functions by the names that configurations use.

use candle_core::{D, Tensor};

use crate::{Error, Result};

/// A function applied to each element.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x · sigmoid(x)`.
    Silu,
    /// `x · Φ(x)`, exact.
    Gelu,
    /// The tanh approximation of [`Activation::Gelu`].
    GeluTanh,
    /// `x · sigmoid(1.702 x)`.
    QuickGelu,
    /// `max(x, 0)`.
    Relu,
    /// `x · tanh(ln(1 + eˣ))`.
    Mish,
}

impl Activation {
    /// The activation that a configuration calls `name` under `key`.
    pub fn parse(key: &str, name: &str) -> Result<Self> {
        match name.to_ascii_lowercase().as_str() {
            "silu" | "swish" => Ok(Self::Silu),
            "gelu" => Ok(Self::Gelu),
            "gelu_new" | "gelu_pytorch_tanh" | "gelu-approximate" => Ok(Self::GeluTanh),
            "quick_gelu" => Ok(Self::QuickGelu),
            "relu" => Ok(Self::Relu),
            "mish" => Ok(Self::Mish),
            _ => Err(Error::Unsupported(format!("`{key}` is `{name}`, an activation this version does not know"))),
        }
    }

    /// Same shape and type as the input.
    pub fn forward(self, x: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Self::Silu => dw_kernels::silu(x)?,
            Self::Gelu => dw_kernels::gelu_erf(x)?,
            Self::GeluTanh => dw_kernels::gelu_tanh(x)?,
            Self::QuickGelu => (x * candle_nn::ops::sigmoid(&(x * 1.702)?)?)?,
            Self::Relu => x.relu()?,
            Self::Mish => candle_nn::ops::mish(x)?,
        })
    }
}

/// The gated unit of the transformer blocks: the first half of the last dimension times gelu of the second;
/// Shazeer 2020, arXiv:2002.05202. `(…, 2n)` to `(…, n)`.
pub fn geglu(x: &Tensor) -> Result<Tensor> {
    let half = x.dim(D::Minus1)? / 2;
    let value = x.narrow(D::Minus1, 0, half)?;
    let gate = x.narrow(D::Minus1, half, half)?.contiguous()?;
    Ok((value * Activation::Gelu.forward(&gate)?)?)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn values(activation: Activation) -> Vec<f32> {
        let x = Tensor::new(&[-1.5f32, 0.0, 0.5, 3.0], &Device::Cpu).expect("a small tensor");
        activation.forward(&x).and_then(|y| Ok(y.to_vec1()?)).expect("activations of f32 work")
    }

    #[test]
    fn activations_have_the_values_of_their_definitions() {
        let table = [
            (Activation::Silu, [-0.273_638_5, 0.0, 0.311_229_67, 2.857_722_3]),
            (Activation::Gelu, [-0.100_210_8, 0.0, 0.345_731_23, 2.995_950_3]),
            (Activation::GeluTanh, [-0.100_428_43, 0.0, 0.345_714_0, 2.996_362_6]),
            (Activation::QuickGelu, [-0.108_369_43, 0.0, 0.350_388_24, 2.981_918]),
            (Activation::Relu, [0.0, 0.0, 0.5, 3.0]),
            (Activation::Mish, [-0.298_027_7, 0.0, 0.375_248_85, 2.986_535]),
        ];
        for (activation, expected) in table {
            for (value, expected) in values(activation).into_iter().zip(expected) {
                assert!((value - expected).abs() < 1e-4, "{activation:?}: {value} is not {expected}");
            }
        }
    }

    #[test]
    fn geglu_gates_the_first_half_by_the_second() {
        let x = Tensor::new(&[[2.0f32, 3.0, 0.0, 0.5]], &Device::Cpu).expect("a small tensor");
        let y: Vec<Vec<f32>> = geglu(&x).and_then(|y| Ok(y.to_vec2()?)).expect("an even width");
        assert_eq!(y[0][0], 0.0);
        assert!((y[0][1] - 3.0 * 0.345_731_23).abs() < 1e-5);
    }
}
