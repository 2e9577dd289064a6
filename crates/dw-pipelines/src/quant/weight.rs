//! A weight as a layer holds it: dense or quantized.

use std::ops::Range;

use candle_core::{DType, Device, Tensor};

use super::{Format, Quantized};
use crate::Result;

/// A tensor, or a matrix in fewer bits.
#[derive(Clone, Debug)]
pub enum Weight {
    /// Values of a tensor type.
    Dense(Tensor),
    /// Codes or blocks.
    Quantized(Quantized),
}

impl Weight {
    /// Its shape.
    pub fn dims(&self) -> Vec<usize> {
        match self {
            Self::Dense(tensor) => tensor.dims().to_vec(),
            Self::Quantized(matrix) => vec![matrix.shape().0, matrix.shape().1],
        }
    }

    /// How many bytes it takes.
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Dense(tensor) => (tensor.elem_count() * tensor.dtype().size_in_bytes()) as u64,
            Self::Quantized(matrix) => matrix.bytes(),
        }
    }

    /// The storage format of a quantized one.
    pub fn format(&self) -> Option<Format> {
        match self {
            Self::Dense(_) => None,
            Self::Quantized(matrix) => Some(matrix.format()),
        }
    }

    /// The tensor of a dense one.
    pub fn as_dense(&self) -> Option<&Tensor> {
        match self {
            Self::Dense(tensor) => Some(tensor),
            Self::Quantized(_) => None,
        }
    }

    /// The values as a tensor: a dense one as it is, a quantized one in `dtype`.
    pub fn dense(&self, dtype: DType) -> Result<Tensor> {
        match self {
            Self::Dense(tensor) => Ok(tensor.clone()),
            Self::Quantized(matrix) => matrix.dequantize(dtype),
        }
    }

    /// Dense floating point values in `dtype`; everything else as it is.
    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        Ok(match self {
            Self::Dense(tensor) if tensor.dtype().is_float() => Self::Dense(tensor.to_dtype(dtype)?),
            other => other.clone(),
        })
    }

    /// Some of the rows, in the same storage.
    pub fn rows(&self, rows: &Range<usize>) -> Result<Self> {
        Ok(match self {
            Self::Dense(tensor) => Self::Dense(tensor.narrow(0, rows.start, rows.len())?.contiguous()?),
            Self::Quantized(matrix) => Self::Quantized(matrix.rows(rows)?),
        })
    }

    /// The rows of several, one after the other: quantized where that needs no new rounding, else dense.
    pub fn joined(parts: &[Self]) -> Result<Self> {
        let quantized: Option<Vec<Quantized>> = parts.iter().map(|part| part.quantized().cloned()).collect();
        if let Some(joined) = quantized.map_or(Ok(None), |parts| Quantized::joined(&parts))? {
            return Ok(Self::Quantized(joined));
        }
        let dense = parts.iter().map(|part| part.dense(DType::F32)).collect::<Result<Vec<_>>>()?;
        Ok(Self::Dense(Tensor::cat(&dense, 0)?))
    }

    /// On another device.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        Ok(match self {
            Self::Dense(tensor) => Self::Dense(tensor.to_device(device)?),
            Self::Quantized(matrix) => Self::Quantized(matrix.to_device(device)?),
        })
    }

    /// `x Wᵀ` for `x` of shape `(n, inputs)` and a weight of shape `(outputs, inputs)`.
    pub fn product(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Dense(weight) => Ok(x.matmul(&weight.t()?)?),
            Self::Quantized(matrix) => matrix.product(x),
        }
    }

    fn quantized(&self) -> Option<&Quantized> {
        match self {
            Self::Dense(_) => None,
            Self::Quantized(matrix) => Some(matrix),
        }
    }
}
