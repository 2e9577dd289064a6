//! Matrices in GGML's blocks, through candle's own readers and writers of them.

use std::{borrow::Cow, fmt, ops::Range, sync::Arc};

use candle_core::{
    Device, Tensor,
    quantized::{GgmlDType, QStorage, QTensor},
};

use crate::{Error, Result};

/// Blocks of `(rows, columns)` values; a row is a whole number of blocks.
#[derive(Clone)]
pub(crate) struct Blocks {
    tensor: Arc<QTensor>,
    rows: usize,
    columns: usize,
}

/// What the blocks of candle are aligned to at most.
const ALIGNMENT: usize = 4;

impl Blocks {
    /// Blocks as files store them.
    pub(crate) fn from_bytes(
        dtype: GgmlDType,
        (rows, columns): (usize, usize),
        bytes: &[u8],
        device: &Device,
    ) -> Result<Self> {
        let expected = row_bytes(dtype, columns).map(|row| row * rows);
        if expected != Some(bytes.len()) {
            return Err(Error::Unsupported(format!(
                "{} bytes do not make a [{rows}, {columns}] matrix of {dtype:?} blocks",
                bytes.len()
            )));
        }
        if bytes.as_ptr().align_offset(ALIGNMENT.min(align(dtype))) != 0 {
            return Err(Error::Unsupported(format!(
                "blocks of {dtype:?} do not lie at a multiple of {ALIGNMENT} bytes"
            )));
        }
        let storage = QStorage::from_data(Cow::Borrowed(bytes), device, dtype)?;
        Ok(Self { tensor: Arc::new(QTensor::new(storage, (rows, columns))?), rows, columns })
    }

    /// Brings a matrix `(rows, columns)` in host memory into blocks.
    pub(super) fn quantize(matrix: &Tensor, dtype: GgmlDType) -> Result<Self> {
        let (rows, columns) = matrix.dims2()?;
        // A copy of a part: candle would quantize all of the memory that a view lies in.
        let whole = matrix.force_contiguous()?;
        Ok(Self { tensor: Arc::new(QTensor::quantize(&whole, dtype)?), rows, columns })
    }

    pub(super) fn dtype(&self) -> GgmlDType {
        self.tensor.dtype()
    }

    pub(super) fn shape(&self) -> (usize, usize) {
        (self.rows, self.columns)
    }

    pub(super) fn device(&self) -> Device {
        self.tensor.device()
    }

    pub(super) fn bytes(&self) -> u64 {
        self.tensor.storage_size_in_bytes() as u64
    }

    /// The blocks as files store them.
    pub(crate) fn data(&self) -> Result<Cow<'_, [u8]>> {
        Ok(self.tensor.data()?)
    }

    /// A copy of some of the rows.
    pub(super) fn rows(&self, rows: &Range<usize>) -> Result<Self> {
        let row = self.row_bytes();
        let data = self.data()?;
        let bytes = data.get(rows.start * row..rows.end * row);
        let bytes = bytes.ok_or_else(|| Error::Unsupported(format!("rows {rows:?} of {} do not exist", self.rows)))?;
        Self::from_bytes(self.dtype(), (rows.len(), self.columns), bytes, &self.device())
    }

    /// The rows of several matrices of one type and width, one after the other; none for matrices that differ.
    pub(super) fn joined(parts: &[&Self]) -> Result<Option<Self>> {
        let Some(first) = parts.first() else { return Ok(None) };
        if parts.iter().any(|part| (part.dtype(), part.columns) != (first.dtype(), first.columns)) {
            return Ok(None);
        }
        let mut bytes = Vec::new();
        for part in parts {
            bytes.extend_from_slice(&part.data()?);
        }
        let rows = parts.iter().map(|part| part.rows).sum();
        Self::from_bytes(first.dtype(), (rows, first.columns), &bytes, &first.device()).map(Some)
    }

    pub(super) fn to_device(&self, device: &Device) -> Result<Self> {
        if self.device().same_device(device) {
            return Ok(self.clone());
        }
        Self::from_bytes(self.dtype(), self.shape(), &self.data()?, device)
    }

    /// Rows as f32 values in host memory. Only of a matrix in host memory.
    pub(super) fn host_rows(&self, rows: &Range<usize>) -> Result<Tensor> {
        let ids = Tensor::arange(rows.start as u32, rows.end as u32, &Device::Cpu)?;
        Ok(self.tensor.embedding(&ids)?)
    }

    /// All rows as f32, where the blocks are.
    pub(super) fn dequantize(&self) -> Result<Tensor> {
        Ok(self.tensor.dequantize(&self.device())?)
    }

    fn row_bytes(&self) -> usize {
        self.columns / self.dtype().block_size() * self.dtype().type_size()
    }
}

impl fmt::Debug for Blocks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Blocks({:?}, [{}, {}])", self.dtype(), self.rows, self.columns)
    }
}

/// How many bytes a row takes; none when it is no whole number of blocks.
fn row_bytes(dtype: GgmlDType, columns: usize) -> Option<usize> {
    columns.is_multiple_of(dtype.block_size()).then(|| columns / dtype.block_size() * dtype.type_size())
}

/// What candle's block of this type is aligned to.
fn align(dtype: GgmlDType) -> usize {
    match dtype {
        GgmlDType::F32 | GgmlDType::Q8K => 4,
        _ => 2,
    }
}
