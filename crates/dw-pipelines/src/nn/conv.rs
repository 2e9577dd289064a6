//! The one two-dimensional convolution.
//!
//! [`Weights::conv2d`] is the only place where one is made.

use candle_core::Tensor;

use super::compute_dtype;
use crate::{
    Result,
    weights::{Weights, paging::Layer},
};

/// What a convolution has besides its channels.
#[derive(Clone, Copy, Debug)]
pub struct Conv2dOptions {
    /// Height and width of the kernel.
    pub kernel: usize,
    /// Step between output pixels.
    pub stride: usize,
    /// Zeros added on each side.
    pub padding: usize,
    /// Whether there is a `bias`.
    pub bias: bool,
}

impl Conv2dOptions {
    /// Stride 1, and the padding that keeps the size for an odd `kernel`.
    pub fn same(kernel: usize) -> Self {
        Self { kernel, stride: 1, padding: kernel.saturating_sub(1) / 2, bias: true }
    }
}

/// A convolution over `(batch, channels, height, width)`.
#[derive(Clone, Debug)]
pub struct Conv2d(Layer<Kernel>);

/// A convolution on its device.
#[derive(Clone, Debug)]
struct Kernel {
    /// `(out, in, kernel, kernel)`, in the type the convolution runs in.
    weight: Tensor,
    /// `(out,)`.
    bias: Option<Tensor>,
    stride: usize,
    padding: usize,
}

impl Conv2d {
    /// `(batch, in, height, width)` to `(batch, out, height', width')`, in the type of the input.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.0.get()?.forward(x)
    }
}

impl Kernel {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let wide = x.to_dtype(self.weight.dtype())?;
        let y = dw_kernels::conv2d(&wide, &self.weight, self.bias.as_ref(), self.stride, self.padding)?;
        Ok(y.to_dtype(x.dtype())?)
    }
}

impl Weights {
    /// The convolution at this path: `weight` of shape `(outputs, inputs, kernel, kernel)` and maybe `bias`.
    pub fn conv2d(&self, inputs: usize, outputs: usize, options: Conv2dOptions) -> Result<Conv2d> {
        let Conv2dOptions { kernel, stride, padding, bias } = options;
        let shape = (outputs, inputs, kernel, kernel);
        self.expect(shape, "weight")?;
        if bias {
            self.expect(outputs, "bias")?;
        }
        let build = move |weights: &Self| {
            let weight = weights.get(shape, "weight")?;
            let compute = compute_dtype(weight.dtype(), weight.device());
            let bias = if bias { Some(weights.get(outputs, "bias")?.to_dtype(compute)?) } else { None };
            Ok(Kernel { weight: weight.to_dtype(compute)?, bias, stride, padding })
        };
        Ok(Conv2d(self.layer(if bias { &["weight", "bias"] } else { &["weight"] }, build)?))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use candle_core::{DType, Device};

    use super::*;

    #[test]
    fn a_bfloat16_convolution_runs_on_the_cpu_and_keeps_its_type() {
        let tensor = |values: &[f32], shape: &[usize]| {
            Tensor::new(values, &Device::Cpu).and_then(|x| x.reshape(shape)?.to_dtype(DType::BF16)).expect("it fits")
        };
        let tensors =
            [("weight", tensor(&[0., 0., 0., 0., 2., 0., 0., 0., 0.], &[1, 1, 3, 3])), ("bias", tensor(&[1.], &[1]))];
        let weights = Weights::from_tensors(HashMap::from(tensors.map(|(name, x)| (name.to_owned(), x))), "a test");
        let conv = weights.conv2d(1, 1, Conv2dOptions::same(3)).expect("the shapes fit");
        let y = conv.forward(&tensor(&[1., 2., 3., 4.], &[1, 1, 2, 2])).expect("the shapes fit");
        assert_eq!(y.dtype(), DType::BF16);
        let y = y.flatten_all().and_then(|y| y.to_dtype(DType::F32)?.to_vec1::<f32>()).expect("it widens");
        assert_eq!(y, [3., 5., 7., 9.]);
    }
}
