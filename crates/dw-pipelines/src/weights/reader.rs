//! Reads safetensors bytes: maps files, checks headers, converts tensors on the host.
//!
//! Everything a hostile or truncated file can claim is checked here, so that the rest of the crate
//! only meets tensors. Which file to read is decided by [`super::folder`].

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
    sync::Arc,
};

use candle_core::{DType, Device, safetensors::Load};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};

use super::Entry;
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
        if entries.insert(name.to_owned(), Entry { tensor, origin: origin.clone() }).is_some() {
            return Err(bad_file(path, &format!("tensor `{name}` is in two shards; fetch the model again")));
        }
        *read += view.data().len() as u64;
        progress(*read)?;
    }
    Ok(())
}

/// Every tensor of a safetensors file as it is stored, on the host: small files that change a model.
pub(crate) fn read_stored(path: &Path) -> Result<BTreeMap<String, candle_core::Tensor>> {
    let bytes = map(path)?;
    let tensors = parse(&bytes, path)?;
    let read = |(name, view): (&str, TensorView)| Ok((name.to_owned(), load(name, &view, path)?));
    tensors.iter().map(read).collect()
}

/// The text that a safetensors file holds beside its tensors, by key.
pub(crate) fn read_metadata(path: &Path) -> Result<HashMap<String, String>> {
    let bytes = map(path)?;
    parse(&bytes, path)?;
    let header = SafeTensors::read_metadata(&bytes).ok();
    Ok(header.and_then(|(_, header)| header.metadata().clone()).unwrap_or_default())
}

/// The names of the tensors of a safetensors file, read from its header.
pub(crate) fn read_names(path: &Path) -> Result<Vec<String>> {
    let bytes = map(path)?;
    Ok(parse(&bytes, path)?.names().into_iter().map(str::to_owned).collect())
}

fn parse<'a>(bytes: &'a [u8], path: &Path) -> Result<SafeTensors<'a>> {
    SafeTensors::deserialize(bytes).map_err(|error| {
        if bytes.starts_with(LFS_POINTER) {
            bad_file(path, "this is a git-lfs pointer, not the weights; run `git lfs pull` in its repository")
        } else {
            bad_file(path, &format!("not a valid safetensors file ({error}); fetch it again"))
        }
    })
}

fn convert(name: &str, view: &TensorView, path: &Path, target: &Target) -> Result<candle_core::Tensor> {
    let tensor = load(name, view, path)?;
    let tensor = if tensor.dtype().is_float() { tensor.to_dtype(target.dtype)? } else { tensor };
    Ok(tensor.to_device(target.device)?)
}

/// The tensor as it is stored, on the host.
fn load(name: &str, view: &TensorView, path: &Path) -> Result<candle_core::Tensor> {
    match view.dtype() {
        Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16 => {}
        Dtype::I64 | Dtype::I32 | Dtype::I16 | Dtype::U32 | Dtype::U8 => {}
        other => {
            return Err(bad_file(
                path,
                &format!(
                    "tensor `{name}` holds `{other:?}` values, which cannot be read; use the model in float16, bfloat16 or float32"
                ),
            ));
        }
    }
    Ok(view.load(&Device::Cpu)?)
}

fn bad_file(path: &Path, reason: &str) -> Error {
    Error::BadFile { path: path.to_owned(), reason: reason.to_owned() }
}
