//! Tensors that stay where they are stored until somebody asks for them: in mapped files, in files inside the program,
//! and in checkpoints.

use std::sync::Arc;

use candle_core::{DType, Device};

use super::{
    logical::{Logical, TensorFiles},
    random,
    reader::{self, Target},
    single_file::{Change, CheckpointPart},
};
use crate::{
    Error, Result,
    quant::{Scheme, Weight},
};

/// Where a tensor is.
#[derive(Clone)]
enum Source {
    Files(Arc<TensorFiles<'static>>),
    Checkpoint(CheckpointPart),
    /// In no file: its values are drawn from its name.
    Random,
}

/// One tensor that was not read yet.
#[derive(Clone)]
pub(super) struct Stored {
    source: Source,
    /// Its name in the file.
    name: String,
    /// Its name in the model.
    canonical: String,
    /// As the model sees it.
    dims: Vec<usize>,
    change: Change,
    /// Bytes that it takes in a form that no type changes: quantized, or whole numbers.
    fixed_bytes: Option<u64>,
    /// Whether its values are whole numbers.
    is_whole: bool,
    scheme: Option<Arc<Scheme>>,
}

/// Tensors under their canonical names.
type Named = Vec<(String, Stored)>;

/// A tensor as the header of its file lists it, under its canonical name.
pub(crate) struct Listed {
    pub(crate) name: String,
    stored: Stored,
}

impl Listed {
    pub(super) fn all(tensors: Vec<(String, Stored)>) -> Vec<Self> {
        tensors.into_iter().map(|(name, stored)| Self { name, stored }).collect()
    }

    /// Its sizes, outermost first.
    pub(crate) fn dims(&self) -> &[usize] {
        &self.stored.dims
    }

    /// Bytes that it takes when the model is of type `dtype`. On a CPU a 16-bit convolution also has its kernel in
    /// f32, in which it computes.
    pub(crate) fn bytes(&self, dtype: DType, is_on_cpu: bool) -> u64 {
        let is_widened = is_on_cpu && self.stored.dims.len() == 4 && dtype.size_in_bytes() == 2;
        let wide = if is_widened { self.stored.bytes_as(DType::F32) } else { 0 };
        self.stored.bytes_as(dtype) + wide
    }

    /// Whether it is brought into fewer bits when it is read, and so rests in host memory from then on.
    pub(crate) fn is_to_quantize(&self) -> bool {
        self.stored.is_to_quantize()
    }

    /// Whether it stays in the form in which it is stored, whatever the model's type.
    pub(crate) fn is_quantized(&self) -> bool {
        self.stored.fixed_bytes.is_some()
    }
}

impl Stored {
    /// All tensors of the files of a component.
    pub(super) fn of_files(files: TensorFiles<'static>, scheme: Option<&Scheme>) -> Result<Vec<(String, Self)>> {
        let (files, scheme) = (Arc::new(files), scheme.cloned().map(Arc::new));
        let stored = |(name, tensor): (&String, &Logical)| {
            files.check(name, tensor)?;
            let source = Source::Files(Arc::clone(&files));
            let settled = Self::new(source, &files, (name, tensor), (name, Change::None), scheme.as_ref());
            Ok((name.clone(), settled))
        };
        files.tensors().iter().map(stored).collect()
    }

    /// All tensors of a component of a checkpoint under canonical names, and the names of those without a place.
    pub(super) fn of_part(part: &CheckpointPart, scheme: Option<&Scheme>) -> Result<(Named, Vec<String>)> {
        let scheme = scheme.cloned().map(Arc::new);
        let (mut tensors, mut passed_over) = (Vec::new(), Vec::new());
        for reading in part.readings()? {
            part.files().check(reading.name, reading.tensor)?;
            if reading.targets.is_empty() {
                passed_over.push(reading.name.to_owned());
            }
            for target in reading.targets {
                let (source, place) = (Source::Checkpoint(part.clone()), (target.name.as_str(), target.change));
                let named = (reading.name, reading.tensor);
                let stored = Self::new(source, part.files(), named, place, scheme.as_ref());
                tensors.push((target.name, stored));
            }
        }
        Ok((tensors, passed_over))
    }

    /// Tensors of these names and shapes that are in no file.
    pub(super) fn of_nothing(tensors: &[(String, Vec<usize>)], scheme: Option<&Scheme>) -> Vec<(String, Self)> {
        let scheme = scheme.cloned().map(Arc::new);
        let stored = |(name, dims): &(String, Vec<usize>)| {
            let fixed_bytes = scheme.as_ref().and_then(|scheme| scheme.bytes(name, dims));
            Self {
                source: Source::Random,
                name: name.clone(),
                canonical: name.clone(),
                dims: dims.clone(),
                change: Change::None,
                scheme: scheme.clone().filter(|_| fixed_bytes.is_some()),
                is_whole: false,
                fixed_bytes,
            }
        };
        tensors.iter().map(|tensor| (tensor.0.clone(), stored(tensor))).collect()
    }

    fn new(
        source: Source,
        files: &TensorFiles<'_>,
        (name, tensor): (&str, &Logical),
        (canonical, change): (&str, Change),
        scheme: Option<&Arc<Scheme>>,
    ) -> Self {
        let dims = change.shape(tensor.shape()).unwrap_or_else(|| tensor.shape().to_vec());
        let count = |dims: &[usize]| dims.iter().product::<usize>().max(1) as u64;
        let (is_float, is_quantized) = (files.is_float(tensor), files.is_quantized(tensor));
        // Some of the rows of a stored matrix take their part of its bytes.
        let part = tensor.bytes() * count(&dims) / count(tensor.shape());
        let to_be = scheme.filter(|_| is_float).and_then(|scheme| scheme.bytes(canonical, &dims));
        let is_whole = !is_float && files.raw(tensor).is_some();
        Self {
            source,
            name: name.to_owned(),
            canonical: canonical.to_owned(),
            dims,
            change,
            fixed_bytes: to_be.or((is_quantized || is_whole).then_some(part)),
            is_whole,
            scheme: scheme.filter(|_| to_be.is_some()).cloned(),
        }
    }

    /// Its shape, as the model sees it.
    pub(super) fn dims(&self) -> &[usize] {
        &self.dims
    }

    /// Whether its values are whole numbers that stand for themselves.
    pub(super) fn holds_whole_numbers(&self) -> bool {
        self.is_whole
    }

    /// Whether it is brought into fewer bits when it is read.
    pub(super) fn is_to_quantize(&self) -> bool {
        self.scheme.is_some()
    }

    /// How many bytes it takes when its floating point numbers are of type `dtype`.
    pub(super) fn bytes_as(&self, dtype: DType) -> u64 {
        let dense = self.dims.iter().product::<usize>() * dtype.size_in_bytes();
        self.fixed_bytes.unwrap_or(dense as u64)
    }

    /// The weight in the type and at the place where it is used. What was read of a file does not stay in memory
    /// beside it.
    pub(super) fn read(&self, dtype: DType, device: &Device) -> Result<Weight> {
        let target = Target { dtype, device, scheme: self.scheme.as_deref() };
        let files = match &self.source {
            Source::Files(files) => files,
            Source::Checkpoint(part) => part.files(),
            Source::Random => {
                let weight = Weight::Dense(random::values(&self.name, &self.dims)?);
                return reader::settle(&weight, &self.canonical, self.change, &target)?.to_device(device);
            }
        };
        let missing = || Error::Unsupported(format!("tensor `{}` is not in its file any more", self.name));
        let tensor = files.tensors().get(&self.name).ok_or_else(missing)?;
        let wanted = (!self.is_to_quantize()).then_some(dtype);
        let stored = files.read(&self.name, tensor, wanted)?;
        files.forget(tensor);
        reader::settle(&stored, &self.canonical, self.change, &target)?.to_device(device)
    }
}
