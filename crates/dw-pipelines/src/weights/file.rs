//! Weight files as they lie on disk: mapped, their headers checked, the bytes of each tensor found.
//!
//! Everything that a hostile or truncated file can claim is checked here and in [`super::gguf`]. Which tensors belong
//! together (codes and their scales) is known to [`super::logical`].

use std::{
    collections::{BTreeMap, HashMap},
    ops::{Deref, Range},
    path::{Path, PathBuf},
};

use candle_core::quantized::GgmlDType;
use memmap2::Mmap;
use safetensors::{
    Dtype, SafeTensors,
    tensor::{Metadata, SafeTensorError},
};

use super::{gguf, t5_names};
use crate::{Error, Result};

/// The first bytes of the text file that stands in for a file which git-lfs did not fetch.
const LFS_POINTER: &[u8] = b"version https://git-lfs";

/// How the values of a tensor are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Encoding {
    /// One after the other.
    Plain(Dtype),
    /// In GGML's blocks.
    Blocks(GgmlDType),
}

/// One tensor of a file.
#[derive(Clone, Debug)]
pub(crate) struct Record {
    pub(crate) encoding: Encoding,
    pub(crate) shape: Vec<usize>,
    /// Where its bytes are in the file.
    pub(crate) range: Range<usize>,
}

impl Record {
    /// How many values it has.
    pub(crate) fn count(&self) -> usize {
        self.shape.iter().product()
    }
}

/// The bytes of a file.
#[derive(Debug)]
enum Bytes<'a> {
    Mapped(Mmap),
    Borrowed(&'a [u8]),
}

impl Deref for Bytes<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Borrowed(bytes) => bytes,
        }
    }
}

/// A safetensors or GGUF file.
#[derive(Debug)]
pub(crate) struct WeightFile<'a> {
    path: PathBuf,
    bytes: Bytes<'a>,
    records: BTreeMap<String, Record>,
    metadata: HashMap<String, String>,
    is_gguf: bool,
}

impl WeightFile<'static> {
    /// Maps a file and checks its header.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        Self::new(Bytes::Mapped(map(path)?), path)
    }
}

impl<'a> WeightFile<'a> {
    /// A file that is in memory already. `path` is what errors call it.
    pub(crate) fn of_bytes(bytes: &'a [u8], path: &Path) -> Result<Self> {
        Self::new(Bytes::Borrowed(bytes), path)
    }

    fn new(bytes: Bytes<'a>, path: &Path) -> Result<Self> {
        let is_gguf = bytes.starts_with(gguf::MAGIC);
        let (records, metadata) = if is_gguf {
            let (records, metadata) = gguf::read_header(&bytes, path)?;
            (in_canonical_names(records), metadata)
        } else {
            let (start, metadata) = header(&bytes, path)?;
            // Also checks that the data lie inside of the file.
            SafeTensors::deserialize(&bytes).map_err(|error| not_safetensors(&bytes, path, &error))?;
            let record = |(name, info): (String, &safetensors::tensor::TensorInfo)| {
                let range = start + info.data_offsets.0..start + info.data_offsets.1;
                (name, Record { encoding: Encoding::Plain(info.dtype), shape: info.shape.clone(), range })
            };
            let records = metadata.tensors().into_iter().map(record).collect();
            (records, metadata.metadata().clone().unwrap_or_default())
        };
        Ok(Self { path: path.to_owned(), bytes, records, metadata, is_gguf })
    }

    /// What errors call it.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Its tensors by name.
    pub(crate) fn records(&self) -> &BTreeMap<String, Record> {
        &self.records
    }

    /// The text it holds beside its tensors. Of a GGUF file: the single values.
    pub(crate) fn metadata(&self) -> &HashMap<String, String> {
        &self.metadata
    }

    /// Whether it is a GGUF file.
    pub(crate) fn is_gguf(&self) -> bool {
        self.is_gguf
    }

    /// Tells the system that a tensor is not needed in memory; it is read from the file again when it is.
    pub(crate) fn forget(&self, record: &Record) {
        if let Bytes::Mapped(map) = &self.bytes {
            forget(map, &record.range);
        }
    }

    /// The bytes of a tensor.
    pub(crate) fn data(&self, record: &Record) -> &[u8] {
        // The ranges were checked against the length when the header was read.
        &self.bytes[record.range.clone()]
    }
}

/// The tensors of a T5 encoder of llama.cpp under the names of transformers; others under their own.
fn in_canonical_names(records: BTreeMap<String, Record>) -> BTreeMap<String, Record> {
    let Some(is_gated) = t5_names::recognise(|name| records.contains_key(name)) else { return records };
    let rename = |(name, record): (String, Record)| (t5_names::canonical(&name, is_gated).unwrap_or(name), record);
    records.into_iter().map(rename).collect()
}

/// Maps a file into memory for reading.
pub(super) fn map(path: &Path) -> Result<Mmap> {
    let file = fs_err::File::open(path)?;
    if file.metadata()?.len() == 0 {
        return Err(bad_file(path, "the file is empty; fetch it again"));
    }
    // SAFETY: the map is read-only and private to this process. Another process that truncates the file while
    // it is read could fault this one, which is the accepted price of not copying gigabytes; model files are
    // written once and then only read.
    #[allow(unsafe_code)]
    let map = unsafe { Mmap::map(file.file()) };
    Ok(map.map_err(|error| std::io::Error::new(error.kind(), format!("cannot map `{}`: {error}", path.display())))?)
}

fn forget(map: &Mmap, range: &Range<usize>) {
    #[cfg(unix)]
    {
        // SAFETY: the map is read-only and of a file, so a page that is dropped comes back with the same contents.
        #[allow(unsafe_code)]
        let advice =
            unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len()) };
        // Without the advice the system drops the pages when memory gets short.
        drop(advice);
    }
    #[cfg(not(unix))]
    let _ = (map, range);
}

/// The checked header of a safetensors file, and where its data begin.
fn header(bytes: &[u8], path: &Path) -> Result<(usize, Metadata)> {
    let (length, metadata) = SafeTensors::read_metadata(bytes).map_err(|error| not_safetensors(bytes, path, &error))?;
    Ok((length + size_of::<u64>(), metadata))
}

fn not_safetensors(bytes: &[u8], path: &Path, error: &SafeTensorError) -> Error {
    if bytes.starts_with(LFS_POINTER) {
        return bad_file(path, "this is a git-lfs pointer, not the weights; run `git lfs pull` in its repository");
    }
    let format = if crate::hub::has_gguf_ending(path) { "GGUF" } else { "safetensors" };
    let detail = if format == "GGUF" { "it does not begin with `GGUF`".to_owned() } else { error.to_string() };
    bad_file(path, &format!("not a valid {format} file ({detail}); fetch it again"))
}

pub(super) fn bad_file(path: &Path, reason: &str) -> Error {
    Error::BadFile { path: path.to_owned(), reason: reason.to_owned() }
}
