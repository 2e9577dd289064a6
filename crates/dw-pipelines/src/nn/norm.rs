//! Group and layer normalisation, computed in f32 for 16-bit models, as the reference does.

use candle_core::{D, Tensor};

use super::wide;
use crate::{Error, Result, weights::Weights};

/// Normalises groups of channels of `(batch, channels, height, width)`; Wu and He 2018, arXiv:1803.08494.
#[derive(Clone, Debug)]
pub struct GroupNorm {
    /// `(1, channels, 1, 1)`, f32 for a 16-bit model.
    weight: Tensor,
    bias: Tensor,
    groups: usize,
    eps: f64,
}

impl GroupNorm {
    /// Same shape and type as the input, which has four dimensions.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, channels, height, width) = x.dims4()?;
        let grouped =
            x.to_dtype(self.weight.dtype())?.reshape((batch, self.groups, channels / self.groups, height * width))?;
        // The mean of row means: short sums keep f32 exact enough on large pictures.
        let mean_of = |values: &Tensor| -> candle_core::Result<Tensor> { values.mean_keepdim(3)?.mean_keepdim(2) };
        let centred = grouped.broadcast_sub(&mean_of(&grouped)?)?;
        let deviation = (mean_of(&centred.sqr()?)? + self.eps)?.sqrt()?;
        let normed = centred.broadcast_div(&deviation)?.reshape((batch, channels, height, width))?;
        Ok(normed.broadcast_mul(&self.weight)?.broadcast_add(&self.bias)?.to_dtype(x.dtype())?)
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

impl Weights {
    /// The group norm at this path: `weight` and `bias` of shape `(channels,)`.
    pub fn group_norm(&self, groups: usize, channels: usize, eps: f64) -> Result<GroupNorm> {
        if groups == 0 || !channels.is_multiple_of(groups) {
            return Err(Error::Unsupported(format!(
                "`norm_num_groups` is `{groups}`, which does not divide the `{channels}` channels of a layer"
            )));
        }
        let parameter = |name: &str| -> Result<Tensor> {
            let values = self.get(channels, name)?;
            Ok(values.to_dtype(wide(values.dtype()))?.reshape((1, channels, 1, 1))?)
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
