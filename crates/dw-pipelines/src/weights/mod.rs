//! Where a model's tensors come from: named tensors under a path prefix, read from safetensors files
//! or bytes, converted on the host and uploaded once.
//!
//! Owns names, shapes and the account of which tensors a model took. Leaves the finding of files in a
//! folder to [`folder`], the layout of whole checkpoints to [`single_file`], and what the tensors mean to the models.

pub mod folder;
mod generated;
mod reader;
pub mod single_file;

pub(crate) use reader::{read_metadata, read_names, read_stored};

use std::{
    collections::{BTreeSet, HashMap},
    fmt::Display,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use candle_core::{DType, Device, Shape, Tensor};

use self::single_file::CheckpointPart;
use crate::{Error, Result};

/// Tensors that old checkpoints carry and no model needs: position counters that were once saved as buffers.
const HARMLESS: &[&str] = &["embeddings.position_ids"];

/// One tensor and the file it was read from.
#[derive(Clone)]
struct Entry {
    tensor: Tensor,
    origin: Arc<str>,
}

/// All tensors of one component, and the names that were asked for so far.
struct Store {
    entries: HashMap<String, Entry>,
    origin: Arc<str>,
    dtype: DType,
    device: Device,
    taken: Mutex<BTreeSet<String>>,
    /// Where the names were translated when the tensors were read.
    foreign: Option<Foreign>,
    /// Makes tensors that are in no file.
    generated: Option<generated::Generated>,
}

/// The names in the file that the tensors were read from.
struct Foreign {
    part: CheckpointPart,
    /// Tensors without a place in the model, which were not read.
    passed_over: Vec<String>,
}

/// A view on named tensors at a path prefix; cheap to clone. All views on one store share the account of
/// which tensors were taken.
#[derive(Clone)]
pub struct Weights {
    store: Arc<Store>,
    /// Canonical name to stored name, when the stored names are foreign.
    names: Option<Arc<HashMap<String, String>>>,
    prefix: String,
}

impl Store {
    /// What a canonical name is called in the file, where that differs, as an insertion into a message.
    fn aside(&self, canonical: &str) -> String {
        let original = self.foreign.as_ref().and_then(|foreign| foreign.part.original(canonical));
        let original = original.filter(|original| original != canonical);
        original.map_or(String::new(), |original| format!(" (in the file `{original}`)"))
    }
}

impl Weights {
    /// A view on tensors that are already on their device and of their type. `origin` is what errors
    /// call the place they came from.
    pub fn from_tensors(tensors: HashMap<String, Tensor>, origin: impl Into<String>) -> Self {
        let origin: Arc<str> = origin.into().into();
        let (dtype, device) = tensors
            .values()
            .find(|tensor| tensor.dtype().is_float())
            .map_or((DType::F32, Device::Cpu), |tensor| (tensor.dtype(), tensor.device().clone()));
        let entries =
            tensors.into_iter().map(|(name, tensor)| (name, Entry { tensor, origin: origin.clone() })).collect();
        Self::from_entries(entries, origin, dtype, device)
    }

    /// Reads all tensors of safetensors files (the shards of one component), converts floating point ones to
    /// `dtype` on the host and uploads them to `device`. `progress` is called after each tensor with the bytes
    /// read so far, over all files; an error from it ends the reading.
    pub fn load(
        files: &[PathBuf],
        dtype: DType,
        device: &Device,
        progress: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<Self> {
        let mut entries = HashMap::new();
        let mut read = 0;
        for file in files {
            let bytes = reader::map(file)?;
            let target = reader::Target { dtype, device };
            reader::read_all(&bytes, file, &target, &mut read, progress, &mut entries)?;
        }
        let origin = match files {
            [file] => file.display().to_string(),
            [first, ..] => first.parent().unwrap_or(first).display().to_string(),
            [] => String::from("no file"),
        };
        Ok(Self::from_entries(entries, origin.into(), dtype, device.clone()))
    }

    /// Reads a safetensors file that is already in memory (a model inside the program). `origin` is what errors
    /// call it; otherwise as [`Weights::load`].
    pub fn from_bytes(
        bytes: &[u8],
        origin: &str,
        dtype: DType,
        device: &Device,
        progress: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<Self> {
        let mut entries = HashMap::new();
        let target = reader::Target { dtype, device };
        reader::read_all(bytes, &PathBuf::from(origin), &target, &mut 0, progress, &mut entries)?;
        Ok(Self::from_entries(entries, origin.into(), dtype, device.clone()))
    }

    /// Reads one component of a checkpoint under canonical names; otherwise as [`Weights::load`].
    pub fn from_checkpoint(
        part: &CheckpointPart,
        dtype: DType,
        device: &Device,
        progress: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<Self> {
        let mut entries = HashMap::new();
        let passed_over = reader::read_part(part, &reader::Target { dtype, device }, progress, &mut entries)?;
        let origin: Arc<str> = part.path().display().to_string().into();
        let foreign = Some(Foreign { part: part.clone(), passed_over });
        let store =
            Store { entries, origin, dtype, device: device.clone(), taken: Mutex::default(), foreign, generated: None };
        Ok(Self { store: Arc::new(store), names: None, prefix: String::new() })
    }

    fn from_entries(entries: HashMap<String, Entry>, origin: Arc<str>, dtype: DType, device: Device) -> Self {
        let store = Store { entries, origin, dtype, device, taken: Mutex::default(), foreign: None, generated: None };
        Self { store: Arc::new(store), names: None, prefix: String::new() }
    }

    /// The same tensors seen from one path element further down: `pp("mid_block").pp(0)` sees
    /// `mid_block.0.*`.
    #[must_use]
    pub fn pp(&self, name: impl Display) -> Self {
        Self { store: self.store.clone(), names: self.names.clone(), prefix: self.full_name(&name.to_string()) }
    }

    /// The path this view starts at, without a point at the end.
    pub fn path(&self) -> &str {
        &self.prefix
    }

    /// The tensor `name` below this prefix, which must have exactly this shape.
    pub fn get(&self, shape: impl Into<Shape>, name: &str) -> Result<Tensor> {
        let expected = shape.into();
        let full = self.full_name(name);
        let stored = self.stored_name(&full);
        let Some(entry) = self.store.entries.get(stored) else {
            return match &self.store.generated {
                Some(generated) => generated.make(&full, &expected, self.store.dtype, &self.store.device),
                None => Err(self.missing(&full, &expected)),
            };
        };
        if entry.tensor.shape() != &expected {
            return Err(Error::BadFile {
                path: PathBuf::from(&*entry.origin),
                reason: format!(
                    "tensor `{stored}`{} has shape {:?}, but the model's configuration asks for {:?}; \
                     use the config.json that belongs to these weights",
                    self.store.aside(stored),
                    entry.tensor.dims(),
                    expected.dims()
                ),
            });
        }
        self.store.taken.lock().unwrap_or_else(PoisonError::into_inner).insert(stored.to_owned());
        Ok(entry.tensor.clone())
    }

    /// Whether the tensor `name` exists below this prefix.
    pub fn contains(&self, name: &str) -> bool {
        self.store.entries.contains_key(self.stored_name(&self.full_name(name)))
    }

    /// The shape of the tensor `name` below this prefix, if it exists.
    pub fn shape_of(&self, name: &str) -> Option<Shape> {
        let entry = self.store.entries.get(self.stored_name(&self.full_name(name)))?;
        Some(entry.tensor.shape().clone())
    }

    /// The names, as stored, that no model asked for, sorted; tensors known to be harmless are left out.
    pub fn unused(&self) -> Vec<String> {
        let taken = self.store.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let is_left = |name: &&String| !taken.contains(*name) && !HARMLESS.iter().any(|end| name.ends_with(end));
        let mut names: Vec<String> = self.store.entries.keys().filter(is_left).cloned().collect();
        if let Some(foreign) = &self.store.foreign {
            for name in &mut names {
                *name = foreign.part.original(name).unwrap_or_else(|| name.clone());
            }
            names.extend(foreign.passed_over.iter().cloned());
        }
        names.sort();
        names
    }

    /// How many bytes all tensors of the store take on their device.
    pub fn bytes(&self) -> u64 {
        let size = |entry: &Entry| (entry.tensor.elem_count() * entry.tensor.dtype().size_in_bytes()) as u64;
        let made = self.store.generated.as_ref().map_or(0, generated::Generated::bytes);
        self.store.entries.values().map(size).sum::<u64>() + made
    }

    /// The type of the floating point tensors.
    pub fn dtype(&self) -> DType {
        self.store.dtype
    }

    /// Where the tensors are.
    pub fn device(&self) -> &Device {
        &self.store.device
    }

    /// What errors call the place the tensors came from.
    pub fn origin(&self) -> &str {
        &self.store.origin
    }

    /// The same tensors under canonical names: `rename` gives the canonical name of a name, or none where the
    /// name stands. Meant for a view without prefix.
    #[must_use]
    pub fn renamed(self, rename: impl Fn(&str) -> Option<String>) -> Self {
        let canonical = |name: &str| rename(name).unwrap_or_else(|| name.to_owned());
        let names: HashMap<String, String> = match &self.names {
            Some(names) => names.iter().map(|(seen, stored)| (canonical(seen), stored.clone())).collect(),
            None => self.store.entries.keys().map(|name| (canonical(name), name.clone())).collect(),
        };
        Self { names: Some(Arc::new(names)), ..self }
    }

    /// A copy whose floating point tensors are converted to `dtype`; the same view when they are already.
    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        if self.store.dtype == dtype {
            return Ok(self.clone());
        }
        let convert = |(name, entry): (&String, &Entry)| -> Result<(String, Entry)> {
            let tensor =
                if entry.tensor.dtype().is_float() { entry.tensor.to_dtype(dtype)? } else { entry.tensor.clone() };
            Ok((name.clone(), Entry { tensor, origin: entry.origin.clone() }))
        };
        let entries = self.store.entries.iter().map(convert).collect::<Result<_>>()?;
        let root = Self::from_entries(entries, self.store.origin.clone(), dtype, self.store.device.clone());
        Ok(Self { store: root.store, names: self.names.clone(), prefix: self.prefix.clone() })
    }

    /// The tensor `name` below this prefix as it is, if it exists. It does not count as taken.
    pub fn find(&self, name: &str) -> Option<&Tensor> {
        Some(&self.store.entries.get(self.stored_name(&self.full_name(name)))?.tensor)
    }

    /// The canonical names of all tensors of the store, in no order.
    pub fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        match &self.names {
            Some(names) => Box::new(names.keys().map(String::as_str)),
            None => Box::new(self.store.entries.keys().map(String::as_str)),
        }
    }

    /// The same tensors, in memory only once, but with others under some of the canonical names. Nothing counts
    /// as taken yet.
    #[must_use]
    pub fn replacing(&self, tensors: HashMap<String, Tensor>) -> Self {
        let mut entries = self.store.entries.clone();
        for (name, tensor) in tensors {
            let stored = self.stored_name(&name).to_owned();
            let origin = self.store.origin.clone();
            entries.insert(stored, Entry { tensor, origin });
        }
        let root = Self::from_entries(entries, self.store.origin.clone(), self.store.dtype, self.store.device.clone());
        Self { store: root.store, names: self.names.clone(), prefix: self.prefix.clone() }
    }

    fn full_name(&self, name: &str) -> String {
        if self.prefix.is_empty() { name.to_owned() } else { format!("{}.{name}", self.prefix) }
    }

    fn stored_name<'a>(&'a self, full: &'a str) -> &'a str {
        match &self.names {
            // A name that was mapped away must not be found under its old name.
            Some(names) => names.get(full).map_or("", String::as_str),
            None => full,
        }
    }

    fn missing(&self, full: &str, expected: &Shape) -> Error {
        Error::BadFile {
            path: PathBuf::from(&*self.store.origin),
            reason: format!(
                "tensor `{full}`{} of shape {:?} is missing; the file is incomplete or does not belong to this model",
                self.store.aside(full),
                expected.dims()
            ),
        }
    }
}

#[cfg(test)]
mod tests;
