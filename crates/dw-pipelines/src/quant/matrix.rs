//! A matrix in any of the storage formats, and its product with activations.
//!
//! The product is exact with respect to the stored values: rows are made dense piece by piece (in f32) and multiplied
//! with activations in full precision. candle's own product of blocks rounds activations to 8 bits, which is what
//! language models are run with; diffusers dequantizes, and so does dw. docs/quantization.md says more.

use std::ops::Range;

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

use super::{Format, coded::Coded, coded::host_values, ggml::Blocks};
use crate::{Error, Result};

/// How many values are made dense at once, by one thread: 4 MB, which stay in the cache between the making and the
/// product.
const PIECE: usize = 1 << 20;

/// A matrix `(rows, columns)` whose values are stored in fewer bits.
#[derive(Clone, Debug)]
pub struct Quantized(Storage);

#[derive(Clone, Debug)]
enum Storage {
    Blocks(Blocks),
    Coded(Coded),
}

impl From<Blocks> for Quantized {
    fn from(blocks: Blocks) -> Self {
        Self(Storage::Blocks(blocks))
    }
}

impl From<Coded> for Quantized {
    fn from(coded: Coded) -> Self {
        Self(Storage::Coded(coded))
    }
}

impl Quantized {
    /// Brings a dense matrix `(rows, columns)` into `format`, in host memory. `double` also rounds the scales of the
    /// 4-bit types.
    pub fn quantize(matrix: &Tensor, format: Format, double: bool) -> Result<Self> {
        let shape = matrix.dims2()?;
        let host = || host_values(matrix);
        Ok(match format {
            Format::Ggml(dtype) => Blocks::quantize(&matrix.to_device(&Device::Cpu)?, dtype)?.into(),
            Format::Int8 => Coded::quantize_int8(&host()?, shape)?.into(),
            Format::Float8 => Coded::quantize_float8(&host()?, shape)?.into(),
            Format::Nf4 | Format::Fp4 => {
                let kind = format.four_bit().expect("these two are the 4-bit formats");
                Coded::quantize_four_bit(&host()?, shape, kind, double)?.into()
            }
        })
    }

    /// How it is stored.
    pub fn format(&self) -> Format {
        match &self.0 {
            Storage::Blocks(blocks) => Format::Ggml(blocks.dtype()),
            Storage::Coded(coded) => coded.format(),
        }
    }

    /// Rows and columns.
    pub fn shape(&self) -> (usize, usize) {
        match &self.0 {
            Storage::Blocks(blocks) => blocks.shape(),
            Storage::Coded(coded) => coded.shape(),
        }
    }

    /// Where it is.
    pub fn device(&self) -> Device {
        match &self.0 {
            Storage::Blocks(blocks) => blocks.device(),
            Storage::Coded(coded) => coded.device().clone(),
        }
    }

    /// How many bytes it takes.
    pub fn bytes(&self) -> u64 {
        match &self.0 {
            Storage::Blocks(blocks) => blocks.bytes(),
            Storage::Coded(coded) => coded.bytes(),
        }
    }

    /// The same on another device.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        Ok(Self(match &self.0 {
            Storage::Blocks(blocks) => Storage::Blocks(blocks.to_device(device)?),
            Storage::Coded(coded) => Storage::Coded(coded.to_device(device)?),
        }))
    }

    /// Some of the rows, still quantized (the parts of a fused projection).
    pub fn rows(&self, rows: &Range<usize>) -> Result<Self> {
        let (count, _) = self.shape();
        if rows.start > rows.end || rows.end > count {
            return Err(Error::Unsupported(format!("rows {rows:?} of a matrix with {count} rows do not exist")));
        }
        Ok(Self(match &self.0 {
            Storage::Blocks(blocks) => Storage::Blocks(blocks.rows(rows)?),
            Storage::Coded(coded) => Storage::Coded(coded.rows(rows)),
        }))
    }

    /// The rows of several matrices in blocks of one type and width, one after the other; none where that cannot be
    /// without new rounding.
    pub fn joined(parts: &[Self]) -> Result<Option<Self>> {
        let blocks: Option<Vec<&Blocks>> = parts.iter().map(Self::blocks).collect();
        let joined = blocks.map_or(Ok(None), |blocks| Blocks::joined(&blocks))?;
        Ok(joined.map(Self::from))
    }

    /// All values as `dtype`, `(rows, columns)`, on the same device.
    pub fn dequantize(&self, dtype: DType) -> Result<Tensor> {
        let dense = match &self.0 {
            _ if self.device().is_cpu() => {
                let pieces = self.pieces();
                let dense = |rows: &Range<usize>| -> Result<Tensor> { Ok(self.host_rows(rows)?.to_dtype(dtype)?) };
                let dense = pieces.par_iter().map(dense).collect::<Result<Vec<_>>>()?;
                match dense.as_slice() {
                    [one] => one.clone(),
                    [] => Tensor::zeros(self.shape(), dtype, &Device::Cpu)?,
                    several => Tensor::cat(several, 0)?,
                }
            }
            Storage::Blocks(blocks) => blocks.dequantize()?,
            Storage::Coded(coded) => coded.dequantize()?,
        };
        Ok(dense.to_dtype(dtype)?)
    }

    /// `(n, columns)` to `(n, rows)`: `x Wᵀ`, in the type of `x`. On the CPU it is computed in f32.
    pub fn product(&self, x: &Tensor) -> Result<Tensor> {
        if !x.device().is_cpu() {
            return Ok(x.matmul(&self.dequantize(x.dtype())?.t()?)?);
        }
        let wide = x.to_dtype(DType::F32)?;
        let pieces = self.pieces();
        let mut products = Vec::with_capacity(pieces.len());
        for together in pieces.chunks(rayon::current_num_threads().max(1)) {
            let dense = together.par_iter().map(|rows| self.host_rows(rows)).collect::<Result<Vec<_>>>()?;
            for dense in dense {
                products.push(wide.matmul(&dense.t()?)?);
            }
        }
        let product = match products.as_slice() {
            [one] => one.clone(),
            several => Tensor::cat(several, 1)?,
        };
        Ok(product.to_dtype(x.dtype())?)
    }

    /// The blocks of a matrix that is stored so.
    pub(crate) fn blocks(&self) -> Option<&Blocks> {
        match &self.0 {
            Storage::Blocks(blocks) => Some(blocks),
            Storage::Coded(_) => None,
        }
    }

    /// The codes of a matrix that is stored so.
    pub(crate) fn coded(&self) -> Option<&Coded> {
        match &self.0 {
            Storage::Coded(coded) => Some(coded),
            Storage::Blocks(_) => None,
        }
    }

    /// Ranges of rows with about [`PIECE`] values each.
    fn pieces(&self) -> Vec<Range<usize>> {
        let (rows, columns) = self.shape();
        let height = (PIECE / columns.max(1)).clamp(1, rows.max(1));
        (0..rows).step_by(height).map(|start| start..(start + height).min(rows)).collect()
    }

    /// Some rows as f32, `(rows, columns)`. Only of a matrix in host memory.
    fn host_rows(&self, rows: &Range<usize>) -> Result<Tensor> {
        match &self.0 {
            Storage::Blocks(blocks) => blocks.host_rows(rows),
            Storage::Coded(coded) => {
                let (_, columns) = coded.shape();
                Ok(Tensor::from_vec(coded.host_rows(rows)?, (rows.len(), columns), &Device::Cpu)?)
            }
        }
    }
}
