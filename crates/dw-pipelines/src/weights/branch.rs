//! What an adapter adds beside a weight that it cannot be merged into without rounding the weight again.

use candle_core::{DType, Device, Tensor};

use crate::Result;

/// An addition to the output of a linear layer.
#[derive(Clone, Debug)]
pub enum Branch {
    /// `x Aᵀ Bᵀ`: LoRA (Hu et al. 2021, arXiv:2106.09685). Strength and alpha are inside B.
    LowRank {
        /// A, `(rank, in)`.
        down: Tensor,
        /// B, `(out, rank)`.
        up: Tensor,
    },
    /// `x Δᵀ` for an adapter that is no product of two small matrices, `(out, in)`.
    Full(Tensor),
}

impl Branch {
    /// `(n, in)` to `(n, out)`, in the type of `x`.
    pub(crate) fn product(&self, x: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Self::LowRank { down, up } => x.matmul(&down.t()?)?.matmul(&up.t()?)?,
            Self::Full(delta) => x.matmul(&delta.t()?)?,
        })
    }

    /// The change of the weight that it stands for, `(out, in)`.
    pub fn delta(&self) -> Result<Tensor> {
        Ok(match self {
            Self::LowRank { down, up } => up.matmul(down)?,
            Self::Full(delta) => delta.clone(),
        })
    }

    /// How many bytes it takes.
    pub fn bytes(&self) -> u64 {
        let size = |tensor: &Tensor| (tensor.elem_count() * tensor.dtype().size_in_bytes()) as u64;
        match self {
            Self::LowRank { down, up } => size(down) + size(up),
            Self::Full(delta) => size(delta),
        }
    }

    /// In another type, on another device.
    pub(crate) fn settle(&self, dtype: DType, device: &Device) -> Result<Self> {
        let settle = |tensor: &Tensor| tensor.to_device(device)?.to_dtype(dtype)?.contiguous();
        Ok(match self {
            Self::LowRank { down, up } => Self::LowRank { down: settle(down)?, up: settle(up)? },
            Self::Full(delta) => Self::Full(settle(delta)?),
        })
    }
}
