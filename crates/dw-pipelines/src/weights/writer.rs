//! Writes the quantized weights of one component: GGUF for GGML's blocks, safetensors for the others, in the layouts
//! that other programs read (bitsandbytes' `quant_state` and `SCB`).
//!
//! Sizes follow from the formats, so the header is written first and each tensor afterwards at its place; no more than
//! one tensor is in memory at a time. Where the file goes is the caller's matter.

use std::{
    io::{Seek, SeekFrom, Write},
    path::PathBuf,
};

use candle_core::DType;
use half::{bf16, f16};
use safetensors::Dtype;
use serde_json::{Map, Value, json};

use super::{
    file::Encoding,
    gguf::{self, ARCHITECTURE, DEFAULT_ALIGNMENT, MAGIC},
    logical::{Logical, TensorFiles},
    single_file::{Change, CheckpointPart, Reading},
};
use crate::{
    Error, Result,
    quant::{FOUR_BIT_BLOCK, Format, Quantized, Scheme, Weight},
};

/// What was written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// Matrices in the format that was asked for.
    pub quantized: usize,
    /// Matrices in the next smaller blocks, because their rows are no multiple of the larger ones.
    pub smaller_blocks: usize,
    /// Tensors that stay as they were.
    pub kept: usize,
    /// Bytes before.
    pub bytes_before: u64,
    /// Bytes after.
    pub bytes_after: u64,
}

/// Where the tensors of a component are.
#[derive(Clone, Copy)]
pub enum Source<'a> {
    /// In files of its own, under canonical names.
    Files(&'a [PathBuf]),
    /// In a checkpoint.
    Part(&'a CheckpointPart),
}

/// A tensor of the component, and what it becomes.
struct Item<'a> {
    /// Its canonical name, under which it is written.
    name: String,
    /// Its name in the file.
    stored: &'a str,
    tensor: &'a Logical,
    change: Change,
    /// As it is written.
    shape: Vec<usize>,
    /// None where it stays as it is.
    format: Option<Format>,
    /// The type of a tensor that stays.
    dtype: Dtype,
}

/// One entry of the file that is written.
struct Entry {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: usize,
}

/// Writes a component of the class `class` with its layers in `format`. `architecture` is what a GGUF file says it is.
/// `progress` hears of bytes read so far; an error from it ends the writing.
pub fn write_quantized(
    source: Source<'_>,
    (format, class): (Format, &str),
    architecture: &str,
    out: &mut (impl Write + Seek),
    progress: &mut dyn FnMut(u64, u64) -> Result<()>,
) -> Result<Written> {
    let opened;
    let (files, tensors) = match source {
        Source::Files(paths) => {
            opened = TensorFiles::open(paths)?;
            let tensors = opened.tensors().iter();
            let placed = tensors.map(|(name, tensor)| (name.clone(), name.as_str(), tensor, Change::None));
            (&opened, placed.collect::<Vec<Placed<'_>>>())
        }
        Source::Part(part) => {
            let readings = part.readings()?.into_iter();
            let placed = readings.flat_map(|Reading { name, tensor, targets }| {
                targets.into_iter().map(move |target| (target.name, name, tensor, target.change))
            });
            (part.files(), placed.collect())
        }
    };
    let items = items(files, tensors, &Scheme::of_checkpoint(format, class), format)?;
    let bytes_before: u64 = items.iter().map(Item::bytes).sum();
    let entries: Vec<Vec<Entry>> = items.iter().map(Item::entries).collect();
    let places = if format.is_ggml() {
        write_gguf_header(&items, &entries, architecture, out)?
    } else {
        write_safetensors_header(&entries, out)?
    };
    let mut read = 0;
    for ((item, entries), places) in items.iter().zip(&entries).zip(&places) {
        let contents = item.contents(files)?;
        for ((entry, place), content) in entries.iter().zip(places).zip(contents) {
            if content.len() != entry.bytes {
                let (name, found, expected) = (&entry.name, content.len(), entry.bytes);
                return Err(Error::Unsupported(format!("`{name}` takes {found} bytes instead of {expected}")));
            }
            out.seek(SeekFrom::Start(*place))?;
            out.write_all(&content)?;
        }
        files.forget(item.tensor);
        read += item.bytes();
        progress(read, bytes_before)?;
    }
    let bytes_after = out.seek(SeekFrom::End(0))?;
    let count = |is_counted: &dyn Fn(&Item<'_>) -> bool| items.iter().filter(|item| is_counted(item)).count();
    Ok(Written {
        quantized: count(&|item| item.format == Some(format)),
        smaller_blocks: count(&|item| item.format.is_some_and(|found| found != format)),
        kept: count(&|item| item.format.is_none()),
        bytes_before,
        bytes_after,
    })
}

/// A tensor under its canonical name, its name in the file, and what is done on the way.
type Placed<'a> = (String, &'a str, &'a Logical, Change);

/// What becomes of each tensor, in the order of the files.
fn items<'a>(
    files: &'a TensorFiles<'_>,
    tensors: Vec<Placed<'a>>,
    scheme: &Scheme,
    format: Format,
) -> Result<Vec<Item<'a>>> {
    let mut items = Vec::new();
    for (name, stored, tensor, change) in tensors {
        let Some((dtype, _)) = files.raw(tensor) else {
            return Err(Error::BadFile {
                path: files.path(tensor).to_owned(),
                reason: format!("tensor `{stored}` is quantized already; quantize the model in its original type"),
            });
        };
        files.check(stored, tensor)?;
        let shape = change.shape(tensor.shape()).unwrap_or_else(|| tensor.shape().to_vec());
        let is_layer = files.is_float(tensor) && scheme.covers(&name, &shape);
        let format = if is_layer { format.fitting(shape.last().copied().unwrap_or(1)) } else { None };
        let dtype = if dtype == Dtype::F64 { Dtype::F32 } else { dtype };
        items.push(Item { name, stored, tensor, change, shape, format, dtype });
    }
    if items.iter().all(|item| item.format.is_none()) {
        return Err(Error::Unsupported(format!("no layer of this component can be stored as `{format}`")));
    }
    items.sort_by_key(|item| item.tensor.position());
    Ok(items)
}

impl Item<'_> {
    fn rows_and_columns(&self) -> (usize, usize) {
        (self.shape.first().copied().unwrap_or(1), self.shape.get(1).copied().unwrap_or(1))
    }

    /// How many bytes of the file it is made of.
    fn bytes(&self) -> u64 {
        let count = |shape: &[usize]| shape.iter().product::<usize>().max(1) as u64;
        self.tensor.bytes() * count(&self.shape) / count(self.tensor.shape())
    }

    /// What the file holds of it.
    fn entries(&self) -> Vec<Entry> {
        let (rows, columns) = self.rows_and_columns();
        let count = self.shape.iter().product::<usize>();
        let entry = |ending: &str, dtype: Dtype, shape: &[usize]| Entry {
            name: format!("{}{ending}", self.name),
            dtype,
            shape: shape.to_vec(),
            bytes: shape.iter().product::<usize>() * dtype.bitsize() / 8,
        };
        let beside = |ending: &str, dtype: Dtype, shape: &[usize]| Entry {
            name: format!("{}{ending}", self.name.strip_suffix("weight").unwrap_or(&self.name)),
            ..entry("", dtype, shape)
        };
        match self.format {
            None => vec![entry("", self.dtype, &self.shape)],
            Some(format @ Format::Ggml(_)) => {
                vec![Entry { bytes: format.bytes(rows, columns) as usize, ..entry("", Dtype::U8, &self.shape) }]
            }
            Some(format @ (Format::Nf4 | Format::Fp4)) => {
                let state = self.quant_state(format).len();
                vec![
                    entry("", Dtype::U8, &[count.div_ceil(2), 1]),
                    entry(".absmax", Dtype::F32, &[count.div_ceil(FOUR_BIT_BLOCK)]),
                    entry(".quant_map", Dtype::F32, &[16]),
                    entry(&format!(".quant_state.bitsandbytes__{format}"), Dtype::U8, &[state]),
                ]
            }
            Some(Format::Int8) => vec![
                entry("", Dtype::I8, &[rows, columns]),
                beside("SCB", Dtype::F32, &[rows]),
                beside("weight_format", Dtype::U8, &[]),
            ],
            Some(Format::Float8) => {
                vec![entry("", Dtype::F8_E4M3, &[rows, columns]), beside("weight_scale", Dtype::F32, &[rows, 1])]
            }
        }
    }

    /// What bitsandbytes wants to know about 4-bit codes.
    fn quant_state(&self, format: Format) -> Vec<u8> {
        let dtype = match self.dtype {
            Dtype::F16 => "float16",
            Dtype::BF16 => "bfloat16",
            _ => "float32",
        };
        let state = json!({
            "quant_type": format.to_string(),
            "blocksize": FOUR_BIT_BLOCK,
            "dtype": dtype,
            "shape": self.shape,
        });
        state.to_string().into_bytes()
    }

    /// The bytes of its entries.
    fn contents(&self, files: &TensorFiles<'_>) -> Result<Vec<Vec<u8>>> {
        let Some(format) = self.format else {
            return Ok(vec![match files.raw(self.tensor) {
                Some((stored, bytes)) if stored == self.dtype && self.change == Change::None => bytes.to_vec(),
                _ => little_endian(&self.read(files, (self.dtype == Dtype::F32).then_some(DType::F32))?)?,
            }]);
        };
        let Weight::Dense(dense) = self.read(files, Some(DType::F32))? else {
            return Err(Error::Unsupported(format!("tensor `{}` is quantized already", self.stored)));
        };
        let matrix = Quantized::quantize(&dense, format, false)?;
        if let Some(blocks) = matrix.blocks() {
            return Ok(vec![blocks.data()?.into_owned()]);
        }
        let coded = matrix.coded().expect("what is not stored in blocks is stored in codes");
        let (codes, scales, _) = coded.parts()?;
        let floats = |values: &[f32], factor: f32| -> Vec<u8> {
            values.iter().flat_map(|value| (value * factor).to_le_bytes()).collect()
        };
        Ok(match format.four_bit() {
            Some(kind) => {
                vec![codes, floats(&scales, 1.0), floats(&kind.values(), 1.0), self.quant_state(format)]
            }
            None if format == Format::Int8 => vec![codes, floats(&scales, 127.0), vec![0]],
            None => vec![codes, floats(&scales, 1.0)],
        })
    }

    /// Its values, in `dtype` if one is named, changed as they must be.
    fn read(&self, files: &TensorFiles<'_>, dtype: Option<DType>) -> Result<Weight> {
        self.change.apply(&files.read(self.stored, self.tensor, dtype)?)
    }

    /// How a GGUF file stores it.
    fn encoding(&self) -> Encoding {
        match self.format {
            Some(Format::Ggml(dtype)) => Encoding::Blocks(dtype),
            _ => Encoding::Plain(self.dtype),
        }
    }
}

/// The bytes of a dense floating point weight.
fn little_endian(weight: &Weight) -> Result<Vec<u8>> {
    let values = weight.dense(DType::F32)?.flatten_all()?;
    Ok(match values.dtype() {
        DType::F16 => values.to_vec1::<f16>()?.iter().flat_map(|value| value.to_le_bytes()).collect(),
        DType::BF16 => values.to_vec1::<bf16>()?.iter().flat_map(|value| value.to_le_bytes()).collect(),
        _ => values.to_dtype(DType::F32)?.to_vec1::<f32>()?.iter().flat_map(|value| value.to_le_bytes()).collect(),
    })
}

/// Writes the header of a safetensors file; where each entry goes. Larger types come first, so that all are aligned.
fn write_safetensors_header(entries: &[Vec<Entry>], out: &mut impl Write) -> Result<Vec<Vec<u64>>> {
    let mut order: Vec<(usize, usize)> =
        entries.iter().enumerate().flat_map(|(item, list)| (0..list.len()).map(move |at| (item, at))).collect();
    order.sort_by_key(|(item, at)| std::cmp::Reverse(entries[*item][*at].dtype.bitsize()));
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({ "format": "pt" }));
    let mut places: Vec<Vec<u64>> = entries.iter().map(|list| vec![0; list.len()]).collect();
    let mut end = 0;
    for (item, at) in order {
        let entry = &entries[item][at];
        let start = end;
        end += entry.bytes as u64;
        places[item][at] = start;
        let offsets = json!([start, end]);
        let described = json!({ "dtype": format!("{:?}", entry.dtype), "shape": entry.shape, "data_offsets": offsets });
        header.insert(entry.name.clone(), described);
    }
    let mut text = Value::Object(header).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    out.write_all(&(text.len() as u64).to_le_bytes())?;
    out.write_all(&text)?;
    let start = (size_of::<u64>() + text.len()) as u64;
    places.iter_mut().flatten().for_each(|place| *place += start);
    Ok(places)
}

/// Writes the header of a GGUF file; where each entry goes.
fn write_gguf_header(
    items: &[Item<'_>],
    entries: &[Vec<Entry>],
    architecture: &str,
    out: &mut impl Write,
) -> Result<Vec<Vec<u64>>> {
    let mut header = MAGIC.to_vec();
    header.extend(3u32.to_le_bytes());
    header.extend((items.len() as u64).to_le_bytes());
    header.extend(2u64.to_le_bytes());
    push_text(&mut header, ARCHITECTURE);
    header.extend(gguf::TEXT.to_le_bytes());
    push_text(&mut header, architecture);
    push_text(&mut header, "general.quantization_version");
    header.extend(gguf::UNSIGNED.to_le_bytes());
    header.extend(2u32.to_le_bytes());
    let (mut places, mut end) = (Vec::new(), 0u64);
    for (item, list) in items.iter().zip(entries) {
        push_text(&mut header, &item.name);
        let shape = &item.shape;
        header.extend((shape.len() as u32).to_le_bytes());
        shape.iter().rev().for_each(|size| header.extend((*size as u64).to_le_bytes()));
        let number = gguf::type_number(item.encoding()).ok_or_else(|| {
            let (name, dtype) = (&item.name, item.dtype);
            Error::Unsupported(format!(
                "tensor `{name}` of type {dtype:?} has no place in a GGUF file; quantize to `nf4`"
            ))
        })?;
        header.extend(number.to_le_bytes());
        header.extend(end.to_le_bytes());
        let bytes = list.iter().map(|entry| entry.bytes as u64).sum::<u64>();
        places.push(vec![end]);
        end = (end + bytes).next_multiple_of(DEFAULT_ALIGNMENT as u64);
    }
    header.resize(header.len().next_multiple_of(DEFAULT_ALIGNMENT), 0);
    out.write_all(&header)?;
    let start = header.len() as u64;
    places.iter_mut().flatten().for_each(|place| *place += start);
    Ok(places)
}

fn push_text(header: &mut Vec<u8>, text: &str) {
    header.extend((text.len() as u64).to_le_bytes());
    header.extend(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use candle_core::{Device, Tensor};

    use super::*;
    use crate::weights::{Weights, single_file::Checkpoint};

    /// A component with a layer of each kind, as a safetensors file.
    fn component(test: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("dw-writer-{test}-{}.safetensors", std::process::id()));
        let tensor = |shape: &[usize]| {
            let count: usize = shape.iter().product();
            let values: Vec<f32> = (0..count).map(|i| ((i * 37) % 101) as f32 / 50.0 - 1.0).collect();
            Tensor::from_vec(values, shape, &Device::Cpu).expect("a tensor")
        };
        let tensors = [
            ("a.weight", tensor(&[4, 256])),
            ("a.bias", tensor(&[4])),
            ("b.weight", tensor(&[3, 96])),
            ("c.weight", tensor(&[2, 3, 3, 3])),
        ];
        let tensors: std::collections::HashMap<_, _> = tensors.into_iter().collect();
        candle_core::safetensors::save(&tensors, &path).expect("the temporary folder is writable");
        path
    }

    #[test]
    fn a_component_of_a_checkpoint_is_written_under_canonical_names_as_it_would_be_read() {
        let folder = std::env::temp_dir().join(format!("dw-writer-part-{}", std::process::id()));
        fs_err::create_dir_all(&folder).expect("the temporary folder is writable");
        let (file, target) = (folder.join("model.safetensors"), folder.join("written"));
        let tensor = |shape: &[usize], dtype: DType| {
            let count: usize = shape.iter().product();
            let values: Vec<f32> = (0..count).map(|i| ((i * 37) % 101) as f32 / 50.0 - 1.0).collect();
            Tensor::from_vec(values, shape, &Device::Cpu).and_then(|tensor| tensor.to_dtype(dtype)).expect("a tensor")
        };
        let tensors = std::collections::HashMap::from([
            ("x_embedder.proj.weight", tensor(&[2, 1, 2, 2], DType::F16)),
            ("joint_blocks.0.x_block.attn.qkv.weight", tensor(&[6, 64], DType::F32)),
            ("joint_blocks.0.x_block.attn.qkv.bias", tensor(&[6], DType::BF16)),
            ("final_layer.adaLN_modulation.1.weight", tensor(&[4, 32], DType::BF16)),
            ("final_layer.adaLN_modulation.1.bias", tensor(&[4], DType::F16)),
        ]);
        candle_core::safetensors::save(&tensors, &file).expect("the folder is writable");
        let checkpoint = std::sync::Arc::new(Checkpoint::open(&file).expect("a transformer of Stable Diffusion 3"));
        let found = checkpoint.component("transformer", Some(json!({}))).expect("readable");
        let (part, _) = found.expect("it is the only component");
        for name in ["q8_0", "nf4"] {
            let format = Format::parse(name).expect("a format");
            let mut out = Cursor::new(Vec::new());
            let kind = (format, "SD3Transformer2DModel");
            let written = write_quantized(Source::Part(&part), kind, "sd3", &mut out, &mut |_, _| Ok(()));
            assert_eq!(written.expect("it can be written").quantized, 4, "query, key, value and the modulation");
            fs_err::write(&target, out.into_inner()).expect("the folder is writable");
            let read = Weights::load(std::slice::from_ref(&target), DType::F32, &Device::Cpu, &mut |_| Ok(()));
            let scheme = Scheme::plain(format);
            let direct = Weights::from_checkpoint(&part, DType::F32, &Device::Cpu, Some(&scheme), &mut |_| Ok(()));
            let (read, direct) = (read.expect("it is read"), direct.expect("it is read"));
            let mut names: Vec<&str> = direct.names().collect();
            names.sort_unstable();
            assert_eq!(names.len(), 9, "{names:?}");
            for tensor in names {
                let values = |weights: &Weights| {
                    let found = weights.find(tensor).expect("readable").expect("it is there");
                    let flat = found.flatten_all().and_then(|flat| flat.to_vec1::<f32>());
                    (found.dims().to_vec(), flat.expect("f32"))
                };
                assert_eq!(values(&read), values(&direct), "{name} {tensor}");
            }
        }
        fs_err::remove_dir_all(&folder).expect("it was written");
    }

    #[test]
    fn what_is_written_is_read_again_as_what_was_quantized() {
        for (name, ending) in
            [("q4_k", "gguf"), ("q8_0", "gguf"), ("nf4", "s"), ("fp4", "s"), ("int8", "s"), ("fp8", "s")]
        {
            let format = Format::parse(name).expect("a format");
            let source = component(name);
            let mut file = Cursor::new(Vec::new());
            let files = Source::Files(std::slice::from_ref(&source));
            let written = write_quantized(files, (format, "Any"), "flux", &mut file, &mut |_, _| Ok(()));
            let written = written.expect("it can be written");
            let smaller = usize::from(name == "q4_k");
            assert_eq!((written.quantized, written.smaller_blocks, written.kept), (2 - smaller, smaller, 2), "{name}");
            let target = source.with_extension(format!("{ending}-{name}"));
            fs_err::write(&target, file.into_inner()).expect("the temporary folder is writable");
            let load = |path: &PathBuf, scheme: Option<&Scheme>| {
                let load =
                    Weights::load_as(std::slice::from_ref(path), DType::F32, &Device::Cpu, scheme, &mut |_| Ok(()));
                load.expect("it can be read")
            };
            let (read, quantized) = (load(&target, None), load(&source, Some(&Scheme::plain(format))));
            for tensor in ["a.weight", "a.bias", "b.weight", "c.weight"] {
                let values = |weights: &Weights| {
                    let found = weights.find(tensor).expect("readable").expect("it is there");
                    (found.dims().to_vec(), found.flatten_all().and_then(|flat| flat.to_vec1::<f32>()).expect("f32"))
                };
                let ((shape, found), (expected_shape, expected)) = (values(&read), values(&quantized));
                assert_eq!(shape, expected_shape);
                let largest = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(largest < 1e-6, "{name} {tensor}: {largest}");
            }
            assert!(read.unused().len() == 4, "{:?}", read.unused());
            for path in [source, target] {
                fs_err::remove_file(path).expect("it was written");
            }
        }
    }
}
