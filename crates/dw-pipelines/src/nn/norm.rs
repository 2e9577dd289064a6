//! Group, layer and root-mean-square normalisation, computed in f32 for 16-bit models, as the reference does.

use candle_core::{D, Tensor};

use super::wide;
use crate::{Error, Result, weights::Weights};

/// Normalises groups of channels of `(batch, channels, height, width)`; Wu and He 2018, arXiv:1803.08494.
#[derive(Clone, Debug)]
pub struct GroupNorm {
    /// `(channels,)`, f32 for a 16-bit model.
    weight: Tensor,
    bias: Tensor,
    groups: usize,
    eps: f64,
}

impl GroupNorm {
    /// Same shape and type as the input, which has four dimensions.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let wide = x.to_dtype(self.weight.dtype())?;
        let normed = dw_kernels::group_norm(&wide, self.groups, &self.weight, &self.bias, self.eps, false)?;
        Ok(normed.to_dtype(x.dtype())?)
    }
}

/// Normalises the last dimension; Ba, Kiros and Hinton 2016, arXiv:1607.06450.
#[derive(Clone, Debug)]
pub struct LayerNorm {
    /// `(size,)`, f32 for a 16-bit model.
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    /// Same shape and type as the input.
    ///
    /// The variance is that of the centred values: `E[x²] - E[x]²` in f32 loses the small channels of text encoders,
    /// whose largest activations are a thousand times the rest.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let wide = x.to_dtype(self.weight.dtype())?;
        let centred = wide.broadcast_sub(&wide.mean_keepdim(D::Minus1)?)?;
        let deviation = (centred.sqr()?.mean_keepdim(D::Minus1)? + self.eps)?.sqrt()?;
        let normed = centred.broadcast_div(&deviation)?;
        Ok(normed.broadcast_mul(&self.weight)?.broadcast_add(&self.bias)?.to_dtype(x.dtype())?)
    }
}

impl LayerNorm {
    /// The same without weight and bias: `x` brought to mean 0 and deviation 1, in the type of `x`.
    pub fn plain(x: &Tensor, eps: f64) -> Result<Tensor> {
        let input = x.to_dtype(wide(x.dtype()))?;
        let centred = input.broadcast_sub(&input.mean_keepdim(D::Minus1)?)?;
        let deviation = (centred.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
        Ok(centred.broadcast_div(&deviation)?.to_dtype(x.dtype())?)
    }
}

/// Divides the last dimension by its root mean square; Zhang and Sennrich 2019, arXiv:1910.07467.
#[derive(Clone, Debug)]
pub struct RmsNorm {
    /// `(size,)`, f32 for a 16-bit model.
    weight: Tensor,
    eps: f64,
}

impl RmsNorm {
    /// Same shape and type as the input.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let input = x.to_dtype(self.weight.dtype())?.contiguous()?;
        let normed = candle_nn::ops::rms_norm(&input, &self.weight, self.eps as f32)?;
        Ok(normed.to_dtype(x.dtype())?)
    }
}

impl Weights {
    /// The RMS norm at this path: `weight` of shape `(size,)`.
    pub fn rms_norm(&self, size: usize, eps: f64) -> Result<RmsNorm> {
        let weight = self.get(size, "weight")?;
        Ok(RmsNorm { weight: weight.to_dtype(wide(weight.dtype()))?, eps })
    }

    /// The group norm at this path: `weight` and `bias` of shape `(channels,)`.
    pub fn group_norm(&self, groups: usize, channels: usize, eps: f64) -> Result<GroupNorm> {
        if groups == 0 || !channels.is_multiple_of(groups) {
            return Err(Error::Unsupported(format!(
                "`norm_num_groups` is `{groups}`, which does not divide the `{channels}` channels of a layer"
            )));
        }
        let parameter = |name: &str| -> Result<Tensor> {
            let values = self.get(channels, name)?;
            Ok(values.to_dtype(wide(values.dtype()))?)
        };
        Ok(GroupNorm { weight: parameter("weight")?, bias: parameter("bias")?, groups, eps })
    }

    /// The layer norm at this path: `weight` and `bias` of shape `(size,)`.
    pub fn layer_norm(&self, size: usize, eps: f64) -> Result<LayerNorm> {
        let parameter = |name: &str| -> Result<Tensor> {
            let values = self.get(size, name)?;
            Ok(values.to_dtype(wide(values.dtype()))?)
        };
        Ok(LayerNorm { weight: parameter("weight")?, bias: parameter("bias")?, eps })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use candle_core::{DType, Device};

    use super::*;

    /// Weights for a norm over `size` features: `weight` rises from 1, `bias` is a half.
    fn weights(size: usize, dtype: DType) -> Weights {
        let rising: Vec<f32> = (0..size).map(|i| 1.0 + i as f32).collect();
        let tensors = [("weight", rising), ("bias", vec![0.5; size])].map(|(name, values)| {
            let tensor = Tensor::new(values, &Device::Cpu).and_then(|values| values.to_dtype(dtype));
            (name.to_owned(), tensor.expect("a small tensor"))
        });
        Weights::from_tensors(HashMap::from(tensors), "a test")
    }

    fn vec(x: &Tensor) -> Vec<f32> {
        x.flatten_all().and_then(|x| x.to_dtype(DType::F32)?.to_vec1()).expect("a float tensor")
    }

    /// `values` normalised, in f64.
    fn normalised(values: &[f32], eps: f64) -> Vec<f32> {
        let count = values.len() as f64;
        let mean = values.iter().map(|x| f64::from(*x)).sum::<f64>() / count;
        let variance = values.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>() / count;
        values.iter().map(|x| ((f64::from(*x) - mean) / (variance + eps).sqrt()) as f32).collect()
    }

    #[test]
    fn a_layer_norm_keeps_its_precision_far_from_zero() {
        let values = [4000.0f32, 4001.0, 4002.5, 3999.0];
        let x = Tensor::new(&values, &Device::Cpu).and_then(|x| x.reshape((1, 4))).expect("a small tensor");
        let norm = weights(4, DType::F32).layer_norm(4, 1e-5).expect("the shapes fit");
        let found = vec(&norm.forward(&x).expect("the shapes fit"));
        for (i, (found, expected)) in found.iter().zip(normalised(&values, 1e-5)).enumerate() {
            let expected = expected * (1.0 + i as f32) + 0.5;
            assert!((found - expected).abs() < 1e-3, "{found} is not {expected}");
        }
    }

    #[test]
    fn a_group_norm_normalises_each_group_of_channels_of_each_picture() {
        let values: Vec<f32> = (0..32).map(|i| (i as f32 * 1.7).sin() * 3.0 + i as f32).collect();
        let x = Tensor::new(&values[..], &Device::Cpu).and_then(|x| x.reshape((2, 4, 2, 2))).expect("a small tensor");
        let norm = weights(4, DType::F32).group_norm(2, 4, 1e-5).expect("the shapes fit");
        let found = vec(&norm.forward(&x).expect("the shapes fit"));
        let expected: Vec<f32> = values.chunks(8).flat_map(|group| normalised(group, 1e-5)).collect();
        for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
            let expected = expected * (1.0 + (i / 4 % 4) as f32) + 0.5;
            assert!((found - expected).abs() < 1e-4, "{found} is not {expected}");
        }
    }

    #[test]
    fn an_rms_norm_leaves_the_mean_where_it_is() {
        let x = Tensor::new(&[[3.0f32, 4.0, 0.0, 0.0]], &Device::Cpu).expect("a small tensor");
        let norm = weights(4, DType::F32).rms_norm(4, 0.0).expect("the shapes fit");
        let found = vec(&norm.forward(&x).expect("the shapes fit"));
        // The mean square is 6.25; the weights are 1, 2, 3, 4.
        for (found, expected) in found.iter().zip([1.2f32, 3.2, 0.0, 0.0]) {
            assert!((found - expected).abs() < 1e-6, "{found} is not {expected}");
        }
    }

    #[test]
    fn a_layer_norm_without_parameters_has_mean_0_and_deviation_1() {
        let values = [4000.0f32, 4001.0, 4002.5, 3999.0];
        let x = Tensor::new(&values, &Device::Cpu).and_then(|x| x.reshape((1, 4))).expect("a small tensor");
        let found = vec(&LayerNorm::plain(&x, 1e-6).expect("a float tensor"));
        for (found, expected) in found.iter().zip(normalised(&values, 1e-6)) {
            assert!((found - expected).abs() < 1e-3, "{found} is not {expected}");
        }
    }

    #[test]
    fn norms_of_sixteen_bit_models_return_sixteen_bit() {
        let x = Tensor::ones((1, 4, 2, 2), DType::F16, &Device::Cpu).expect("a small tensor");
        let half = weights(4, DType::F16);
        let grouped = half.group_norm(2, 4, 1e-5).and_then(|norm| norm.forward(&x)).expect("the shapes fit");
        assert_eq!(grouped.dtype(), DType::F16);
        let rows = x.reshape((4, 4)).expect("16 values");
        let layered = half.layer_norm(4, 1e-5).and_then(|norm| norm.forward(&rows)).expect("the shapes fit");
        assert_eq!(layered.dtype(), DType::F16);
    }

    #[test]
    fn groups_that_do_not_divide_the_channels_are_refused() {
        let error = weights(4, DType::F32).group_norm(3, 4, 1e-5).expect_err("3 does not divide 4");
        assert!(error.to_string().contains("`norm_num_groups` is `3`"), "{error}");
    }
}
