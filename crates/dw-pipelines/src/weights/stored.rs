//! Tensors that stay where they are stored until somebody asks for them: named ranges of mapped files, of files
//! inside the program, and of checkpoints.

use std::{ops::Range, path::Path, sync::Arc};

use candle_core::{DType, Device, Tensor};
use memmap2::Mmap;
use safetensors::{Dtype, tensor::TensorView};

use super::{
    random,
    reader::{self, Target},
    single_file::{Change, CheckpointPart},
};
use crate::{Error, Result};

/// The bytes that a tensor is a range of.
#[derive(Clone)]
enum Bytes {
    Mapped(Arc<Mmap>),
    Embedded(&'static [u8]),
    /// The tensor is found by its name.
    Checkpoint(CheckpointPart),
    /// The tensor is in no file: its values are drawn from its name.
    Random,
}

/// One tensor that was not read yet.
#[derive(Clone)]
pub(super) struct Stored {
    bytes: Bytes,
    /// Its name in the file.
    name: String,
    path: Arc<Path>,
    dtype: Dtype,
    /// As it is in the file.
    shape: Vec<usize>,
    /// As the model sees it.
    dims: Vec<usize>,
    range: Range<usize>,
    change: Change,
}

/// A tensor as the header of its file lists it, under its canonical name.
pub(crate) struct Listed {
    pub(crate) name: String,
    stored: Stored,
}

impl Listed {
    pub(super) fn all(tensors: Vec<(String, Stored)>) -> Vec<Self> {
        tensors.into_iter().map(|(name, stored)| Self { name, stored }).collect()
    }

    /// Bytes that it takes when the model is of type `dtype`. On a CPU a 16-bit convolution also has its kernel in
    /// f32, in which it computes.
    pub(crate) fn bytes(&self, dtype: DType, is_on_cpu: bool) -> u64 {
        let is_widened = is_on_cpu && self.stored.dims.len() == 4 && dtype.size_in_bytes() == 2;
        let wide = if is_widened { self.stored.bytes_as(DType::F32) } else { 0 };
        self.stored.bytes_as(dtype) + wide
    }
}

impl Stored {
    /// All tensors of a mapped file.
    pub(super) fn of_file(path: &Path) -> Result<Vec<(String, Self)>> {
        let map = Arc::new(reader::map(path)?);
        let bytes = Bytes::Mapped(Arc::clone(&map));
        Self::all(&map, &bytes, path)
    }

    /// All tensors of a file inside the program.
    pub(super) fn of_memory(bytes: &'static [u8], name: &str) -> Result<Vec<(String, Self)>> {
        Self::all(bytes, &Bytes::Embedded(bytes), Path::new(name))
    }

    /// All tensors of a component of a checkpoint under canonical names, and the names of those without a place.
    pub(super) fn of_part(part: &CheckpointPart) -> Result<(Vec<(String, Self)>, Vec<String>)> {
        let path: Arc<Path> = part.path().into();
        let (mut tensors, mut passed_over) = (Vec::new(), Vec::new());
        for reading in part.readings()? {
            reader::check_dtype(reading.name, reading.view.dtype(), part.path())?;
            if reading.targets.is_empty() {
                passed_over.push(reading.name.to_owned());
            }
            for target in reading.targets {
                let shape = reading.view.shape().to_vec();
                let dims = target.change.shape(&shape).unwrap_or_else(|| shape.clone());
                let stored = Self {
                    bytes: Bytes::Checkpoint(part.clone()),
                    name: reading.name.to_owned(),
                    path: Arc::clone(&path),
                    dtype: reading.view.dtype(),
                    range: 0..reading.view.data().len(),
                    shape,
                    dims,
                    change: target.change,
                };
                tensors.push((target.name, stored));
            }
        }
        Ok((tensors, passed_over))
    }

    /// Tensors of these names and shapes that are in no file, as large as float16.
    pub(super) fn of_nothing(tensors: &[(String, Vec<usize>)], origin: &str) -> Vec<(String, Self)> {
        let path: Arc<Path> = Path::new(origin).into();
        let stored = |(name, dims): &(String, Vec<usize>)| Self {
            bytes: Bytes::Random,
            name: name.clone(),
            path: Arc::clone(&path),
            dtype: Dtype::F16,
            shape: dims.clone(),
            dims: dims.clone(),
            range: 0..0,
            change: Change::None,
        };
        tensors.iter().map(|tensor| (tensor.0.clone(), stored(tensor))).collect()
    }

    fn all(content: &[u8], bytes: &Bytes, path: &Path) -> Result<Vec<(String, Self)>> {
        let (start, metadata) = reader::header(content, path)?;
        // Also checks that the data lie inside of the file.
        reader::parse(content, path)?;
        let shared: Arc<Path> = path.into();
        let stored = |(name, info): (String, &safetensors::tensor::TensorInfo)| {
            reader::check_dtype(&name, info.dtype, path)?;
            let stored = Self {
                bytes: bytes.clone(),
                name: name.clone(),
                path: Arc::clone(&shared),
                dtype: info.dtype,
                shape: info.shape.clone(),
                dims: info.shape.clone(),
                range: start + info.data_offsets.0..start + info.data_offsets.1,
                change: Change::None,
            };
            Ok((name, stored))
        };
        metadata.tensors().into_iter().map(stored).collect()
    }

    /// Its shape, as the model sees it.
    pub(super) fn dims(&self) -> &[usize] {
        &self.dims
    }

    /// Whether its numbers are floating point.
    pub(super) fn is_float(&self) -> bool {
        matches!(self.dtype, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16)
    }

    /// How many bytes it takes when its floating point numbers are of type `dtype`.
    pub(super) fn bytes_as(&self, dtype: DType) -> u64 {
        let count: usize = self.dims.iter().product();
        let size = if self.is_float() { dtype.size_in_bytes() } else { self.dtype.bitsize() / 8 };
        (count * size) as u64
    }

    /// The tensor in the type and at the place where it is used. What was read of a file does not stay in memory
    /// beside it.
    pub(super) fn read(&self, dtype: DType, device: &Device) -> Result<Tensor> {
        let tensor = match &self.bytes {
            Bytes::Mapped(map) => {
                let tensor = self.load(map.get(self.range.clone()))?;
                reader::forget(map, self.range.clone());
                tensor
            }
            Bytes::Embedded(bytes) => self.load(bytes.get(self.range.clone()))?,
            Bytes::Checkpoint(part) => {
                let tensor = reader::load(&self.name, &part.view(&self.name)?, &self.path)?;
                part.forget(&self.name);
                tensor
            }
            Bytes::Random => random::values(&self.name, &self.dims)?,
        };
        reader::settle(&self.change.apply(&tensor)?, &Target { dtype, device })
    }

    fn load(&self, data: Option<&[u8]>) -> Result<Tensor> {
        let bad = |reason: String| Error::BadFile { path: self.path.to_path_buf(), reason };
        let data = data.ok_or_else(|| bad(format!("the data of tensor `{}` lie outside of the file", self.name)))?;
        let view = TensorView::new(self.dtype, self.shape.clone(), data)
            .map_err(|error| bad(format!("tensor `{}` cannot be read ({error}); fetch the file again", self.name)))?;
        reader::load(&self.name, &view, &self.path)
    }
}
