//! Where a model's tensors come from: named tensors under a path prefix, read from safetensors and GGUF files
//! or bytes, converted on the host and uploaded once. Quantized matrices stay quantized.
//!
//! Owns names, shapes and the account of which tensors a model took. Leaves the finding of files in a
//! folder to [`folder`], the layout of whole checkpoints to [`single_file`], and what the tensors mean to the models.

mod branch;
mod decode;
pub(crate) mod file;
pub mod folder;
mod generated;
pub(crate) mod gguf;
pub(crate) mod logical;
pub(crate) mod paging;
mod random;
mod reader;
pub mod single_file;
mod stored;
mod t5_names;
mod writer;

pub use branch::Branch;
pub use paging::{Occupancy, Paging, Rest};
pub(crate) use stored::Listed;
pub use writer::{Source, Written, write_quantized};

pub(crate) use reader::{read_metadata, read_names, read_stored};

use std::{
    collections::{BTreeSet, HashMap},
    fmt::Display,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use candle_core::{DType, Device, Shape, Tensor};

use self::{logical::TensorFiles, paging::Pager, single_file::CheckpointPart, stored::Stored};
use crate::{
    Error, Result,
    quant::{Scheme, Weight},
};

/// Tensors that old checkpoints carry and no model needs: position counters that were once saved as buffers.
const HARMLESS: &[&str] = &["embeddings.position_ids"];

/// One tensor and the file it comes from.
#[derive(Clone)]
struct Entry {
    value: Value,
    origin: Arc<str>,
}

#[derive(Clone)]
enum Value {
    /// Read, on its device and of its type; on the host when the component is paged.
    Held(Weight),
    /// Still where it is stored.
    Stored(Arc<Stored>),
}

impl Entry {
    fn held(weight: Weight, origin: &Arc<str>) -> Self {
        Self { value: Value::Held(weight), origin: Arc::clone(origin) }
    }

    fn dims(&self) -> Vec<usize> {
        match &self.value {
            Value::Held(weight) => weight.dims(),
            Value::Stored(stored) => stored.dims().to_vec(),
        }
    }

    fn holds_whole_numbers(&self) -> bool {
        match &self.value {
            Value::Held(weight) => weight.as_dense().is_some_and(|tensor| !tensor.dtype().is_float()),
            Value::Stored(stored) => stored.holds_whole_numbers(),
        }
    }

    /// Bytes in memory when it is there.
    fn bytes(&self, dtype: DType) -> u64 {
        match &self.value {
            Value::Held(weight) => weight.bytes(),
            Value::Stored(stored) => stored.bytes_as(dtype),
        }
    }
}

/// Additions to the outputs of linear layers, by the canonical name of the weight.
pub type Branches = HashMap<String, Vec<Branch>>;

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
    /// Who decides what is on the device, when not everything is.
    pager: Option<Arc<Pager>>,
    /// Tensors that rest in host memory.
    resting: Mutex<HashMap<String, Weight>>,
}

/// Where the tensors of a paged component go, and when.
pub(crate) struct Placement<'a> {
    pub(crate) dtype: DType,
    pub(crate) device: &'a Device,
    pub(crate) pager: Arc<Pager>,
    /// How the weights of layers are stored, where that is to be changed.
    pub(crate) scheme: Option<&'a Scheme>,
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
    /// Whether layers are built now although the component is paged.
    is_fetching: bool,
    /// The type of floating point tensors, where that is not the store's.
    dtype: Option<DType>,
    branches: Arc<Branches>,
}

impl Store {
    fn new(entries: HashMap<String, Entry>, origin: Arc<str>, dtype: DType, device: Device) -> Self {
        Self {
            entries,
            origin,
            dtype,
            device,
            taken: Mutex::default(),
            foreign: None,
            generated: None,
            pager: None,
            resting: Mutex::default(),
        }
    }

    /// The weight of an entry, on the device. `dtype` is asked for instead of the store's own type.
    fn weight(&self, name: &str, entry: &Entry, dtype: Option<DType>) -> Result<Weight> {
        let weight = self.own_weight(name, entry, dtype)?;
        dtype.map_or(Ok(weight.clone()), |dtype| weight.to_dtype(dtype))
    }

    fn own_weight(&self, name: &str, entry: &Entry, dtype: Option<DType>) -> Result<Weight> {
        let stored = match &entry.value {
            Value::Held(weight) if self.pager.is_none() => return Ok(weight.clone()),
            Value::Held(weight) => return weight.to_device(&self.device),
            Value::Stored(stored) => stored,
        };
        // What would have to be quantized again each time rests on the host.
        let is_read_again =
            self.pager.as_ref().is_none_or(|pager| pager.rest == Rest::File) && !stored.is_to_quantize();
        if is_read_again {
            return stored.read(dtype.unwrap_or(self.dtype), &self.device);
        }
        let resting = || self.resting.lock().unwrap_or_else(PoisonError::into_inner);
        let known = resting().get(name).cloned();
        let weight = match known {
            Some(weight) => weight,
            None => stored.read(self.dtype, &Device::Cpu)?,
        };
        resting().insert(name.to_owned(), weight.clone());
        weight.to_device(&self.device)
    }

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
        let held = |(name, tensor)| (name, Entry::held(Weight::Dense(tensor), &origin));
        let entries = tensors.into_iter().map(held).collect();
        Self::from_entries(entries, origin, dtype, device)
    }

    /// Reads all tensors of weight files (the shards of one component), converts floating point ones to `dtype` on the
    /// host and uploads them to `device`. Quantized matrices stay so. `progress` is called after each tensor with the
    /// bytes read so far, over all files; an error from it ends the reading.
    pub fn load(
        files: &[PathBuf],
        dtype: DType,
        device: &Device,
        progress: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<Self> {
        Self::load_as(files, dtype, device, None, progress)
    }

    /// As [`Weights::load`], with the weights of layers stored as `scheme` says.
    pub fn load_as(
        files: &[PathBuf],
        dtype: DType,
        device: &Device,
        scheme: Option<&Scheme>,
        progress: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<Self> {
        let target = reader::Target { dtype, device, scheme };
        Self::read(&TensorFiles::open(files)?, origin_of(files), &target, progress)
    }

    fn read(
        files: &TensorFiles<'_>,
        origin: Arc<str>,
        target: &reader::Target<'_>,
        progress: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<Self> {
        let mut entries = HashMap::new();
        reader::read_all(files, target, progress, &mut entries)?;
        Ok(Self::from_entries(entries, origin, target.dtype, target.device.clone()))
    }

    /// The same tensors, left in their files until the pager wants them.
    pub(crate) fn open(files: &[PathBuf], placement: Placement<'_>) -> Result<Self> {
        let origin = origin_of(files);
        let stored = Stored::of_files(TensorFiles::open(files)?, placement.scheme)?;
        Ok(Self::paged(stored_entries(stored, &origin), origin, None, placement))
    }

    /// As [`Weights::open`], of a file inside the program.
    pub(crate) fn open_bytes(bytes: &'static [u8], origin: &str, placement: Placement<'_>) -> Result<Self> {
        let files = TensorFiles::of_bytes(bytes, &PathBuf::from(origin))?;
        let stored = Stored::of_files(files, placement.scheme)?;
        let name: Arc<str> = origin.into();
        Ok(Self::paged(stored_entries(stored, &name), name, None, placement))
    }

    /// As [`Weights::open`], of one component of a checkpoint.
    pub(crate) fn open_part(part: &CheckpointPart, placement: Placement<'_>) -> Result<Self> {
        let origin: Arc<str> = part.path().display().to_string().into();
        let (tensors, passed_over) = Stored::of_part(part, placement.scheme)?;
        let foreign = Foreign { part: part.clone(), passed_over };
        Ok(Self::paged(stored_entries(tensors, &origin), origin, Some(foreign), placement))
    }

    /// As [`Weights::open`], of tensors that are in no file.
    pub(crate) fn open_random(tensors: &[(String, Vec<usize>)], origin: &str, placement: Placement<'_>) -> Self {
        let stored = Stored::of_nothing(tensors, placement.scheme);
        let name: Arc<str> = origin.into();
        Self::paged(stored_entries(stored, &name), name, None, placement)
    }

    /// Tensors of these names and shapes that are in no file, made now; otherwise as [`Weights::load`].
    pub(crate) fn random(
        tensors: &[(String, Vec<usize>)],
        origin: &str,
        (dtype, device): (DType, &Device),
        scheme: Option<&Scheme>,
        progress: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<Self> {
        let name: Arc<str> = origin.into();
        let (mut entries, mut made) = (HashMap::new(), 0);
        for (tensor, stored) in Stored::of_nothing(tensors, scheme) {
            entries.insert(tensor, Entry::held(stored.read(dtype, device)?, &name));
            made += stored.bytes_as(DType::F16);
            progress(made)?;
        }
        Ok(Self::from_entries(entries, name, dtype, device.clone()))
    }

    fn paged(
        entries: HashMap<String, Entry>,
        origin: Arc<str>,
        foreign: Option<Foreign>,
        Placement { dtype, device, pager, .. }: Placement<'_>,
    ) -> Self {
        let store = Store::new(entries, origin, dtype, device.clone());
        Self::of(Store { foreign, pager: Some(pager), ..store })
    }

    /// Reads a safetensors file that is already in memory (a model inside the program). `origin` is what errors
    /// call it; otherwise as [`Weights::load_as`].
    pub fn from_bytes(
        bytes: &[u8],
        origin: &str,
        dtype: DType,
        device: &Device,
        scheme: Option<&Scheme>,
        progress: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<Self> {
        let files = TensorFiles::of_bytes(bytes, &PathBuf::from(origin))?;
        Self::read(&files, origin.into(), &reader::Target { dtype, device, scheme }, progress)
    }

    /// Reads one component of a checkpoint under canonical names; otherwise as [`Weights::load_as`].
    pub fn from_checkpoint(
        part: &CheckpointPart,
        dtype: DType,
        device: &Device,
        scheme: Option<&Scheme>,
        progress: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<Self> {
        let mut entries = HashMap::new();
        let passed_over = reader::read_part(part, &reader::Target { dtype, device, scheme }, progress, &mut entries)?;
        let origin: Arc<str> = part.path().display().to_string().into();
        let foreign = Some(Foreign { part: part.clone(), passed_over });
        Ok(Self::of(Store { foreign, ..Store::new(entries, origin, dtype, device.clone()) }))
    }

    fn from_entries(entries: HashMap<String, Entry>, origin: Arc<str>, dtype: DType, device: Device) -> Self {
        Self::of(Store::new(entries, origin, dtype, device))
    }

    fn of(store: Store) -> Self {
        Self {
            store: Arc::new(store),
            names: None,
            prefix: String::new(),
            is_fetching: false,
            dtype: None,
            branches: Arc::default(),
        }
    }

    /// The same tensors seen from one path element further down: `pp("mid_block").pp(0)` sees
    /// `mid_block.0.*`.
    #[must_use]
    pub fn pp(&self, name: impl Display) -> Self {
        Self { prefix: self.full_name(&name.to_string()), ..self.clone() }
    }

    /// Who decides what is on the device; none where everything is, or where a layer is being built.
    fn pager(&self) -> Option<&Arc<Pager>> {
        self.store.pager.as_ref().filter(|_| !self.is_fetching)
    }

    /// The same view, whose layers are built at once.
    fn fetching(&self) -> Self {
        Self { is_fetching: true, ..self.clone() }
    }

    /// Bytes of the tensor `name` below this prefix on the device; 0 when there is none.
    fn bytes_of(&self, name: &str) -> u64 {
        let entry = self.store.entries.get(self.stored_name(&self.full_name(name)));
        entry.map_or(0, |entry| entry.bytes(self.dtype()))
    }

    /// The path this view starts at, without a point at the end.
    pub fn path(&self) -> &str {
        &self.prefix
    }

    /// The tensor `name` below this prefix, which must have exactly this shape; dense, whatever it is stored in.
    pub fn get(&self, shape: impl Into<Shape>, name: &str) -> Result<Tensor> {
        self.take(shape, name)?.dense(self.dtype())
    }

    /// The weight `name` below this prefix as it is stored, which must have exactly this shape.
    pub(crate) fn take(&self, shape: impl Into<Shape>, name: &str) -> Result<Weight> {
        let (full, shape) = (self.full_name(name), shape.into());
        if let Some(generated) = &self.store.generated {
            return generated.make(&full, &shape, self.dtype(), &self.store.device).map(Weight::Dense);
        }
        let (stored, entry) = self.entry(shape, &full)?;
        self.store.weight(stored, entry, self.dtype)
    }

    /// Checks that the tensor `name` below this prefix is there and has exactly this shape. It counts as taken.
    pub(crate) fn expect(&self, shape: impl Into<Shape>, name: &str) -> Result<()> {
        if self.store.generated.is_some() {
            return Ok(());
        }
        self.entry(shape.into(), &self.full_name(name)).map(|_| ())
    }

    fn entry<'a>(&'a self, expected: Shape, full: &'a str) -> Result<(&'a str, &'a Entry)> {
        let stored = self.stored_name(full);
        let Some(entry) = self.store.entries.get(stored) else {
            return Err(self.missing(full, &expected));
        };
        if entry.dims() != expected.dims() {
            return Err(Error::BadFile {
                path: PathBuf::from(&*entry.origin),
                reason: format!(
                    "tensor `{stored}`{} has shape {:?}, but the model's configuration asks for {:?}; \
                     use the config.json that belongs to these weights",
                    self.store.aside(stored),
                    entry.dims(),
                    expected.dims()
                ),
            });
        }
        let is_parameter = ["weight", "bias"].iter().any(|ending| stored.ends_with(ending));
        if is_parameter && entry.holds_whole_numbers() {
            return Err(Error::BadFile {
                path: PathBuf::from(&*entry.origin),
                reason: format!(
                    "tensor `{stored}`{} holds whole numbers without what they stand for; it is quantized in a way that \
                     cannot be read, use the model in float16, bfloat16 or float32",
                    self.store.aside(stored)
                ),
            });
        }
        self.store.taken.lock().unwrap_or_else(PoisonError::into_inner).insert(stored.to_owned());
        Ok((stored, entry))
    }

    /// Whether the tensor `name` exists below this prefix.
    pub fn contains(&self, name: &str) -> bool {
        self.store.entries.contains_key(self.stored_name(&self.full_name(name)))
    }

    /// The shape of the tensor `name` below this prefix, if it exists.
    pub fn shape_of(&self, name: &str) -> Option<Shape> {
        let entry = self.store.entries.get(self.stored_name(&self.full_name(name)))?;
        Some(Shape::from(entry.dims()))
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

    /// Counts the tensors whose names start with `start` below this prefix as taken: they belong to a part of the model
    /// that is not run.
    pub fn pass_over(&self, start: &str) {
        let start = self.full_name(start);
        let passed = self.names().filter(|name| name.starts_with(&start)).map(|name| self.stored_name(name).to_owned());
        self.store.taken.lock().unwrap_or_else(PoisonError::into_inner).extend(passed);
    }

    /// How many bytes all tensors of the store take on their device when they are there.
    pub fn bytes(&self) -> u64 {
        let made = self.store.generated.as_ref().map_or(0, generated::Generated::bytes);
        let branches = self.branches.values().flatten().map(Branch::bytes).sum::<u64>();
        self.store.entries.values().map(|entry| entry.bytes(self.store.dtype)).sum::<u64>() + made + branches
    }

    /// Whether the component is paged: not all of its layers are on the device all the time.
    pub fn is_paged(&self) -> bool {
        self.store.pager.is_some()
    }

    /// The type of the floating point tensors.
    pub fn dtype(&self) -> DType {
        self.dtype.unwrap_or(self.store.dtype)
    }

    /// The same tensors, of which each is converted when a layer asks for it.
    #[must_use]
    pub fn widened(&self, dtype: DType) -> Self {
        Self { dtype: Some(dtype), ..self.clone() }
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
            let converted = match &entry.value {
                Value::Held(weight) => Entry::held(weight.to_dtype(dtype)?, &entry.origin),
                Value::Stored(_) => entry.clone(),
            };
            Ok((name.clone(), converted))
        };
        let entries = self.store.entries.iter().map(convert).collect::<Result<_>>()?;
        Ok(self.with_entries(entries, dtype))
    }

    /// The same view on other tensors.
    fn with_entries(&self, entries: HashMap<String, Entry>, dtype: DType) -> Self {
        let store = Store::new(entries, self.store.origin.clone(), dtype, self.store.device.clone());
        let pager = self.store.pager.as_ref().map(|pager| pager.another());
        Self { store: Arc::new(Store { pager, ..store }), ..self.clone() }
    }

    /// The tensor `name` below this prefix on its device, dense, if it exists. It does not count as taken.
    pub fn find(&self, name: &str) -> Result<Option<Tensor>> {
        self.find_weight(name)?.map(|weight| weight.dense(self.dtype())).transpose()
    }

    /// The weight `name` below this prefix on its device as it is stored, if it exists. It does not count as taken.
    pub fn find_weight(&self, name: &str) -> Result<Option<Weight>> {
        let full = self.full_name(name);
        let stored = self.stored_name(&full);
        self.store.entries.get(stored).map(|entry| self.store.weight(stored, entry, self.dtype)).transpose()
    }

    /// The same tensors, in memory only once, with additions beside layers instead of those before. They come to the
    /// type and device of the tensors.
    pub fn with_branches(self, branches: &Branches) -> Result<Self> {
        let settle = |(name, list): (&String, &Vec<Branch>)| {
            let list = list.iter().map(|branch| branch.settle(self.store.dtype, &self.store.device));
            Ok((name.clone(), list.collect::<Result<Vec<_>>>()?))
        };
        let branches = Arc::new(branches.iter().map(settle).collect::<Result<Branches>>()?);
        Ok(Self { branches, ..self })
    }

    /// What is added beside the weight `name` below this prefix.
    pub(crate) fn branches(&self, name: &str) -> &[Branch] {
        self.branches.get(&self.full_name(name)).map_or(&[], Vec::as_slice)
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
    pub fn replacing(&self, tensors: HashMap<String, Tensor>) -> Result<Self> {
        let mut entries = self.store.entries.clone();
        for (name, tensor) in tensors {
            let stored = self.stored_name(&name).to_owned();
            // What is not stored anywhere rests on the host until a layer is wanted.
            let tensor = if self.is_paged() { tensor.to_device(&Device::Cpu)? } else { tensor };
            entries.insert(stored, Entry::held(Weight::Dense(tensor), &self.store.origin));
        }
        Ok(self.with_entries(entries, self.store.dtype))
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

/// What the headers of a component's files list. `scheme` says how layers are to be stored.
pub(crate) fn list_files(files: &[PathBuf], scheme: Option<&Scheme>) -> Result<Vec<Listed>> {
    Ok(Listed::all(Stored::of_files(TensorFiles::open(files)?, scheme)?))
}

/// The same for a file inside the program.
pub(crate) fn list_bytes(bytes: &'static [u8], origin: &str, scheme: Option<&Scheme>) -> Result<Vec<Listed>> {
    Ok(Listed::all(Stored::of_files(TensorFiles::of_bytes(bytes, &PathBuf::from(origin))?, scheme)?))
}

/// The same for tensors that are in no file.
pub(crate) fn list_random(tensors: &[(String, Vec<usize>)], scheme: Option<&Scheme>) -> Vec<Listed> {
    Listed::all(Stored::of_nothing(tensors, scheme))
}

/// The same for one component of a checkpoint.
pub(crate) fn list_part(part: &CheckpointPart, scheme: Option<&Scheme>) -> Result<Vec<Listed>> {
    Ok(Listed::all(Stored::of_part(part, scheme)?.0))
}

/// What errors call a component of several files.
fn origin_of(files: &[PathBuf]) -> Arc<str> {
    let origin = match files {
        [file] => file.display().to_string(),
        [first, ..] => first.parent().unwrap_or(first).display().to_string(),
        [] => String::from("no file"),
    };
    origin.into()
}

fn stored_entries(tensors: Vec<(String, Stored)>, origin: &Arc<str>) -> HashMap<String, Entry> {
    let entry = |stored| Entry { value: Value::Stored(Arc::new(stored)), origin: Arc::clone(origin) };
    tensors.into_iter().map(|(name, stored)| (name, entry(stored))).collect()
}

#[cfg(test)]
mod tests;
