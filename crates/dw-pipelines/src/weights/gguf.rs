//! The header of GGUF files (versions 2 and 3 of the format): what they say about themselves, and where each tensor is.
//!
//! Every length is checked against the file before anything is taken by it; every complaint names the tensor or the
//! key that it is about.

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
};

use candle_core::quantized::GgmlDType;
use safetensors::Dtype;

use super::file::{Encoding, Record, bad_file};
use crate::{Error, Result};

/// The first bytes of a GGUF file.
pub(crate) const MAGIC: &[u8] = b"GGUF";

/// Where data begin when a file does not say otherwise: at multiples of this.
pub(crate) const DEFAULT_ALIGNMENT: usize = 32;

/// The key under which a file says which model it is.
pub(crate) const ARCHITECTURE: &str = "general.architecture";

const ALIGNMENT: &str = "general.alignment";
/// Under this key and the tensor's name, files of stable-diffusion models keep the shape of a tensor that was stored
/// flat.
const ORIGINAL_SHAPE: &str = "comfy.gguf.orig_shape.";

/// More than any model has.
const MAX_TENSORS: u64 = 1 << 20;
const MAX_KEYS: u64 = 1 << 16;
const MAX_DIMENSIONS: u32 = 4;
const MAX_DEPTH: usize = 4;

/// Types of single values in a header, by number, and how many bytes they take.
const SIZES: [usize; 13] = [1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8];
const LIST: u32 = 9;

/// The types of values that are written.
pub(crate) const UNSIGNED: u32 = 4;
pub(crate) const TEXT: u32 = 8;

/// Tensor types by number, with their names in llama.cpp.
const TYPES: [(u32, &str, Option<Encoding>); 42] = [
    (0, "F32", Some(Encoding::Plain(Dtype::F32))),
    (1, "F16", Some(Encoding::Plain(Dtype::F16))),
    (2, "Q4_0", Some(Encoding::Blocks(GgmlDType::Q4_0))),
    (3, "Q4_1", Some(Encoding::Blocks(GgmlDType::Q4_1))),
    (4, "Q4_2", None),
    (5, "Q4_3", None),
    (6, "Q5_0", Some(Encoding::Blocks(GgmlDType::Q5_0))),
    (7, "Q5_1", Some(Encoding::Blocks(GgmlDType::Q5_1))),
    (8, "Q8_0", Some(Encoding::Blocks(GgmlDType::Q8_0))),
    (9, "Q8_1", Some(Encoding::Blocks(GgmlDType::Q8_1))),
    (10, "Q2_K", Some(Encoding::Blocks(GgmlDType::Q2K))),
    (11, "Q3_K", Some(Encoding::Blocks(GgmlDType::Q3K))),
    (12, "Q4_K", Some(Encoding::Blocks(GgmlDType::Q4K))),
    (13, "Q5_K", Some(Encoding::Blocks(GgmlDType::Q5K))),
    (14, "Q6_K", Some(Encoding::Blocks(GgmlDType::Q6K))),
    (15, "Q8_K", Some(Encoding::Blocks(GgmlDType::Q8K))),
    (16, "IQ2_XXS", None),
    (17, "IQ2_XS", None),
    (18, "IQ3_XXS", None),
    (19, "IQ1_S", None),
    (20, "IQ4_NL", None),
    (21, "IQ3_S", None),
    (22, "IQ2_S", None),
    (23, "IQ4_XS", None),
    (24, "I8", None),
    (25, "I16", Some(Encoding::Plain(Dtype::I16))),
    (26, "I32", Some(Encoding::Plain(Dtype::I32))),
    (27, "I64", Some(Encoding::Plain(Dtype::I64))),
    (28, "F64", Some(Encoding::Plain(Dtype::F64))),
    (29, "IQ1_M", None),
    (30, "BF16", Some(Encoding::Plain(Dtype::BF16))),
    (31, "Q4_0_4_4", None),
    (32, "Q4_0_4_8", None),
    (33, "Q4_0_8_8", None),
    (34, "TQ1_0", None),
    (35, "TQ2_0", None),
    (36, "IQ4_NL_4_4", None),
    (37, "IQ4_NL_4_8", None),
    (38, "IQ4_NL_8_8", None),
    (39, "MXFP4", None),
    (40, "NVFP4", None),
    (41, "Q1_0", None),
];

/// What llama.cpp calls a type.
fn type_name(encoding: Encoding) -> &'static str {
    TYPES.iter().find(|(_, _, known)| *known == Some(encoding)).map_or("values", |(_, name, _)| name)
}

/// The number of a type in files.
pub(crate) fn type_number(encoding: Encoding) -> Option<u32> {
    TYPES.iter().find(|(_, _, known)| *known == Some(encoding)).map(|(number, _, _)| *number)
}

/// How many bytes `count` values take, whose rows have `columns`; none when rows are no whole number of blocks, or
/// the number is beyond all files.
pub(crate) fn byte_count(encoding: Encoding, count: usize, columns: usize) -> Option<usize> {
    match encoding {
        Encoding::Plain(dtype) => count.checked_mul(dtype.bitsize() / 8),
        Encoding::Blocks(dtype) if columns.is_multiple_of(dtype.block_size()) => {
            (count / dtype.block_size()).checked_mul(dtype.type_size())
        }
        Encoding::Blocks(_) => None,
    }
}

/// What a header says about itself: single values as text, by key.
type Metadata = HashMap<String, String>;

/// The tensors of a file by name, and its metadata.
pub(super) fn read_header(bytes: &[u8], path: &Path) -> Result<(BTreeMap<String, Record>, Metadata)> {
    let mut header = Header { bytes, at: MAGIC.len(), path };
    let version = header.u32()?;
    if !matches!(version, 2 | 3) {
        let swapped = if matches!(version.swap_bytes(), 2 | 3) { " (its bytes are in the other order)" } else { "" };
        return Err(header.bad(&format!(
            "is GGUF version {version}{swapped}, and versions 2 and 3 can be read; convert it again with a newer program"
        )));
    }
    let (tensors, keys) = (header.u64()?, header.u64()?);
    if tensors > MAX_TENSORS || keys > MAX_KEYS {
        return Err(header.bad(&format!("claims {tensors} tensors and {keys} keys; it is damaged, fetch it again")));
    }
    let (mut metadata, mut shapes) = (Metadata::new(), HashMap::new());
    for _ in 0..keys {
        let key = header.text()?;
        let kind = header.u32()?;
        if let Some(tensor) = key.strip_prefix(ORIGINAL_SHAPE) {
            shapes.insert(tensor.to_owned(), header.numbers(kind, &key)?);
        } else if let Some(value) = header.value(kind, &key, 0)? {
            metadata.insert(key, value);
        }
    }
    let infos = (0..tensors).map(|_| header.tensor()).collect::<Result<Vec<_>>>()?;
    let alignment = match metadata.get(ALIGNMENT) {
        None => DEFAULT_ALIGNMENT,
        Some(text) => {
            text.parse().ok().filter(|bytes: &usize| *bytes > 0 && bytes.is_multiple_of(8)).ok_or_else(|| {
                header.bad(&format!(
                    "`{ALIGNMENT}` is a multiple of 8, found `{text}`; the file is damaged, fetch it again"
                ))
            })?
        }
    };
    let start = header.at.next_multiple_of(alignment);
    let mut records = BTreeMap::new();
    for mut info in infos {
        if let Some(shape) = shapes.remove(&info.name) {
            info.reshape(shape, path)?;
        }
        let name = info.name.clone();
        let record = info.locate(bytes.len(), start, alignment, path)?;
        if records.insert(name.clone(), record).is_some() {
            return Err(bad_file(path, &format!("holds tensor `{name}` twice; it is damaged, fetch it again")));
        }
    }
    check_overlaps(&records, path)?;
    Ok((records, metadata))
}

/// Refuses tensors that share bytes.
fn check_overlaps(records: &BTreeMap<String, Record>, path: &Path) -> Result<()> {
    let mut order: Vec<(&String, &Record)> = records.iter().filter(|(_, record)| !record.range.is_empty()).collect();
    order.sort_by_key(|(_, record)| record.range.start);
    match order.windows(2).find(|pair| pair[1].1.range.start < pair[0].1.range.end) {
        None => Ok(()),
        Some(pair) => {
            let (first, second) = (pair[0].0, pair[1].0);
            let reason = format!("tensors `{first}` and `{second}` overlap; the file is damaged, fetch it again");
            Err(bad_file(path, &reason))
        }
    }
}

/// A tensor as the header describes it.
struct Info {
    name: String,
    /// From the slowest to the fastest, as everywhere else.
    shape: Vec<usize>,
    encoding: Encoding,
    offset: u64,
}

impl Info {
    /// The shape it had before it was stored flat.
    fn reshape(&mut self, shape: Vec<usize>, path: &Path) -> Result<()> {
        let count = |shape: &[usize]| shape.iter().try_fold(1usize, |count, dim| count.checked_mul(*dim));
        if count(&shape) != count(&self.shape) {
            let name = &self.name;
            return Err(bad_file(
                path,
                &format!("tensor `{name}` of shape {:?} cannot have shape {shape:?}", self.shape),
            ));
        }
        self.shape = shape;
        Ok(())
    }

    /// Its place in the file.
    fn locate(self, length: usize, start: usize, alignment: usize, path: &Path) -> Result<Record> {
        let Self { name, shape, encoding, offset } = self;
        let bad = |reason: String| Err(bad_file(path, &format!("tensor `{name}` {reason}")));
        let count = shape.iter().try_fold(1usize, |count, dim| count.checked_mul(*dim));
        let columns = shape.last().copied().unwrap_or(1);
        let bytes = count.and_then(|count| byte_count(encoding, count, columns));
        let Some(bytes) = bytes else {
            return bad(format!(
                "of shape {shape:?} is no whole number of blocks of `{}`; the file is damaged, fetch it again",
                type_name(encoding)
            ));
        };
        let first = usize::try_from(offset).ok().filter(|offset| offset.is_multiple_of(alignment));
        let Some(first) = first.and_then(|offset| offset.checked_add(start)) else {
            return bad(format!(
                "lies at {offset}, which is no multiple of {alignment}; the file is damaged, fetch it again"
            ));
        };
        match first.checked_add(bytes) {
            Some(end) if end <= length => Ok(Record { encoding, shape, range: first..end }),
            _ => bad(format!(
                "takes {bytes} bytes from {first} on, but the file ends at {length}; it is cut off, fetch it again"
            )),
        }
    }
}

/// A cursor in the header.
struct Header<'a> {
    bytes: &'a [u8],
    at: usize,
    path: &'a Path,
}

impl<'a> Header<'a> {
    fn bad(&self, reason: &str) -> Error {
        bad_file(self.path, reason)
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8]> {
        let taken = self.at.checked_add(count).and_then(|end| self.bytes.get(self.at..end));
        let taken = taken.ok_or_else(|| self.bad("ends within its header; it is cut off, fetch it again"))?;
        self.at += count;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        Ok(self.take(N)?.try_into().expect("as many bytes were taken"))
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn length(&mut self) -> Result<usize> {
        let length = self.u64()?;
        // What is longer than the file is found by `take`.
        Ok(usize::try_from(length).unwrap_or(usize::MAX))
    }

    fn text(&mut self) -> Result<String> {
        let length = self.length()?;
        Ok(String::from_utf8_lossy(self.take(length)?).trim_end_matches('\0').to_owned())
    }

    /// A value as text; none for a list, which is passed over.
    fn value(&mut self, kind: u32, key: &str, depth: usize) -> Result<Option<String>> {
        if kind == TEXT {
            return self.text().map(Some);
        }
        if kind == LIST {
            return self.list(key, depth).map(|()| None);
        }
        let size = self.size(kind, key)?;
        let raw = self.take(size)?;
        let mut wide = [0; 8];
        wide[..size].copy_from_slice(raw);
        let bits = u64::from_le_bytes(wide);
        // Signed numbers get their sign back from the width they are stored in.
        let unused = 64 - 8 * size as u32;
        let signed = (bits.cast_signed() << unused) >> unused;
        Ok(Some(match kind {
            1 | 3 | 5 | 11 => signed.to_string(),
            6 => f32::from_bits(bits as u32).to_string(),
            7 => (bits != 0).to_string(),
            12 => f64::from_bits(bits).to_string(),
            _ => bits.to_string(),
        }))
    }

    fn list(&mut self, key: &str, depth: usize) -> Result<()> {
        if depth == MAX_DEPTH {
            return Err(self.bad(&format!("`{key}` holds lists in lists; the file is damaged, fetch it again")));
        }
        let (kind, length) = (self.u32()?, self.length()?);
        if matches!(kind, TEXT | LIST) {
            for _ in 0..length {
                self.value(kind, key, depth + 1)?;
            }
            return Ok(());
        }
        let size = self.size(kind, key)?;
        self.take(length.saturating_mul(size)).map(drop)
    }

    /// A list of whole numbers.
    fn numbers(&mut self, kind: u32, key: &str) -> Result<Vec<usize>> {
        let path = self.path;
        let wrong = || bad_file(path, &format!("`{key}` is no list of sizes; the file is damaged, fetch it again"));
        if kind != LIST {
            return Err(wrong());
        }
        let (kind, length) = (self.u32()?, self.length()?);
        if length > MAX_DIMENSIONS as usize + 1 || matches!(kind, TEXT | LIST) {
            return Err(wrong());
        }
        let number = |_| self.value(kind, key, 0)?.and_then(|text| text.parse().ok()).ok_or_else(wrong);
        (0..length).map(number).collect()
    }

    fn size(&self, kind: u32, key: &str) -> Result<usize> {
        let size = SIZES.get(kind as usize).copied().filter(|size| *size > 0);
        size.ok_or_else(|| self.bad(&format!("`{key}` has a value of unknown type {kind}; fetch the file again")))
    }

    fn tensor(&mut self) -> Result<Info> {
        let name = self.text()?;
        let dimensions = self.u32()?;
        if dimensions > MAX_DIMENSIONS {
            return Err(
                self.bad(&format!("tensor `{name}` has {dimensions} dimensions; it is damaged, fetch it again"))
            );
        }
        let mut shape = (0..dimensions).map(|_| self.length()).collect::<Result<Vec<_>>>()?;
        // The fastest comes first in the file.
        shape.reverse();
        let number = self.u32()?;
        let offset = self.u64()?;
        let encoding = match TYPES.iter().find(|(known, _, _)| *known == number) {
            Some((_, _, Some(encoding))) => *encoding,
            known => {
                let what = known.map_or_else(|| format!("number {number}"), |(_, name, _)| format!("`{name}`"));
                return Err(self.bad(&format!(
                    "tensor `{name}` is of the type {what}, which cannot be read; use a file of one of the types Q2_K \
                     to Q8_0, F16 or BF16"
                )));
            }
        };
        Ok(Info { name, shape, encoding, offset })
    }
}
