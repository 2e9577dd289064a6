//! Reads safetensors bytes: maps files, checks headers, converts tensors on the host.
//!
//! Everything a hostile or truncated file can claim is checked here, so that the rest of the crate
//! only meets tensors. Which file to read is decided by [`super::folder`].

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
    sync::Arc,
};

use candle_core::{DType, Device, Tensor, safetensors::Load};
use memmap2::Mmap;
use safetensors::{
    Dtype, SafeTensors,
    tensor::{Metadata, SafeTensorError, TensorView},
};

use super::{Entry, single_file::CheckpointPart};
use crate::{Error, Result};

/// The first bytes of the text file that stands in for a file which git-lfs did not fetch.
const LFS_POINTER: &[u8] = b"version https://git-lfs";

/// What floating point tensors become and where tensors go.
pub(super) struct Target<'a> {
    pub(super) dtype: DType,
    pub(super) device: &'a Device,
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

/// Reads every tensor of `bytes` into `entries`. `read` counts the bytes over all files.
pub(super) fn read_all(
    bytes: &[u8],
    path: &Path,
    target: &Target,
    read: &mut u64,
    progress: &mut dyn FnMut(u64) -> Result<()>,
    entries: &mut HashMap<String, Entry>,
) -> Result<()> {
    let tensors = parse(bytes, path)?;
    let origin: Arc<str> = path.display().to_string().into();
    let mut views: Vec<(&str, TensorView)> = tensors.iter().collect();
    // In file order, so that a cold disk is read from front to back.
    views.sort_by_key(|(_, view)| view.data().as_ptr());
    for (name, view) in views {
        let tensor = convert(name, &view, path, target)?;
        if entries.insert(name.to_owned(), Entry::held(tensor, &origin)).is_some() {
            return Err(bad_file(path, &format!("tensor `{name}` is in two shards; fetch the model again")));
        }
        *read += view.data().len() as u64;
        progress(*read)?;
    }
    Ok(())
}

/// Reads the tensors of one component of a checkpoint into `entries`, each under its canonical name, and gives the
/// names of those that have no place in the model.
pub(super) fn read_part(
    part: &CheckpointPart,
    target: &Target,
    progress: &mut dyn FnMut(u64) -> Result<()>,
    entries: &mut HashMap<String, Entry>,
) -> Result<Vec<String>> {
    let origin: Arc<str> = part.path().display().to_string().into();
    let (mut passed_over, mut read) = (Vec::new(), 0);
    for reading in part.readings()? {
        if reading.targets.is_empty() {
            passed_over.push(reading.name.to_owned());
        } else {
            let stored = load(reading.name, &reading.view, part.path())?;
            for place in reading.targets {
                let tensor = settle(&place.change.apply(&stored)?, target)?;
                entries.insert(place.name, Entry::held(tensor, &origin));
            }
        }
        read += reading.view.data().len() as u64;
        progress(read)?;
    }
    Ok(passed_over)
}

/// Every tensor of a safetensors file as it is stored, on the host: small files that change a model.
pub(crate) fn read_stored(path: &Path) -> Result<BTreeMap<String, Tensor>> {
    let bytes = map(path)?;
    let tensors = parse(&bytes, path)?;
    let read = |(name, view): (&str, TensorView)| Ok((name.to_owned(), load(name, &view, path)?));
    tensors.iter().map(read).collect()
}

/// The text that a safetensors file holds beside its tensors, by key.
pub(crate) fn read_metadata(path: &Path) -> Result<HashMap<String, String>> {
    let bytes = map(path)?;
    let (_, header) = header(&bytes, path)?;
    Ok(header.metadata().clone().unwrap_or_default())
}

/// The names of the tensors of a safetensors file, read from its header.
pub(crate) fn read_names(path: &Path) -> Result<Vec<String>> {
    let bytes = map(path)?;
    Ok(parse(&bytes, path)?.names().into_iter().map(str::to_owned).collect())
}

/// The checked header of a file, and where its data begin.
pub(super) fn header(bytes: &[u8], path: &Path) -> Result<(usize, Metadata)> {
    let (length, metadata) = SafeTensors::read_metadata(bytes).map_err(|error| not_safetensors(bytes, path, &error))?;
    Ok((length + size_of::<u64>(), metadata))
}

pub(super) fn parse<'a>(bytes: &'a [u8], path: &Path) -> Result<SafeTensors<'a>> {
    SafeTensors::deserialize(bytes).map_err(|error| not_safetensors(bytes, path, &error))
}

fn not_safetensors(bytes: &[u8], path: &Path, error: &SafeTensorError) -> Error {
    if bytes.starts_with(LFS_POINTER) {
        return bad_file(path, "this is a git-lfs pointer, not the weights; run `git lfs pull` in its repository");
    }
    bad_file(path, &format!("not a valid safetensors file ({error}); fetch it again"))
}

fn convert(name: &str, view: &TensorView, path: &Path, target: &Target) -> Result<Tensor> {
    settle(&load(name, view, path)?, target)
}

/// A tensor as it is stored, on the host.
pub(super) fn load(name: &str, view: &TensorView, path: &Path) -> Result<Tensor> {
    check_dtype(name, view.dtype(), path)?;
    Ok(view.load(&Device::Cpu)?)
}

/// Refuses a type of numbers that cannot be read.
pub(super) fn check_dtype(name: &str, dtype: Dtype, path: &Path) -> Result<()> {
    match dtype {
        Dtype::F64
        | Dtype::F32
        | Dtype::F16
        | Dtype::BF16
        | Dtype::I64
        | Dtype::I32
        | Dtype::I16
        | Dtype::U32
        | Dtype::U8 => Ok(()),
        other => Err(bad_file(
            path,
            &format!(
                "tensor `{name}` holds `{other:?}` values, which cannot be read; use the model in float16, bfloat16 or float32"
            ),
        )),
    }
}

/// Tells the system that a part of a mapped file is not needed in memory; it is read from the file again when it is.
pub(super) fn forget(map: &Mmap, range: std::ops::Range<usize>) {
    #[cfg(unix)]
    {
        // SAFETY: the map is read-only and of a file, so a page that is dropped comes back with the same contents.
        #[allow(unsafe_code)]
        let advice = unsafe {
            map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.end - range.start)
        };
        // Without the advice the system drops the pages when memory gets short.
        drop(advice);
    }
    #[cfg(not(unix))]
    let _ = (map, range);
}

/// A tensor in the type and at the place where it is used. Whole numbers keep their type.
pub(super) fn settle(tensor: &Tensor, target: &Target) -> Result<Tensor> {
    let tensor = if tensor.dtype().is_float() { tensor.to_dtype(target.dtype)? } else { tensor.clone() };
    Ok(tensor.to_device(target.device)?)
}

fn bad_file(path: &Path, reason: &str) -> Error {
    Error::BadFile { path: path.to_owned(), reason: reason.to_owned() }
}
