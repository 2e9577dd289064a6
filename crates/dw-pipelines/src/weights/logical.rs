//! Tensors as models mean them: codes, scales and tables that a file stores apart are one matrix.
//!
//! Knows how bitsandbytes (4-bit with `quant_state`, 8-bit with `SCB`) and scaled 8-bit floating point are laid out in
//! safetensors files, GGML blocks, and everything that is stored plainly. All key maps work on what comes out, so a
//! fused projection is cut the same way whatever it is stored in.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use candle_core::{DType, Device, Tensor};
use safetensors::Dtype;
use serde::Deserialize;

use super::{
    decode,
    file::{Encoding, Record, WeightFile, bad_file},
};
use crate::{
    Error, Result,
    quant::{Coded, EightBit, FourBit, Quantized, Weight, ggml::Blocks},
};

/// Endings of the tensors that go with a 4-bit `weight`.
const FOUR_BIT_PARTS: [&str; 4] = ["absmax", "quant_map", "nested_absmax", "nested_quant_map"];

/// Endings beside a `weight` that say how activations were quantized, or repeat what the types say.
const BESIDE: [&str; 5] = ["input_scale", "scale_input", "weight_format", "comfy_quant", "output_scale"];

/// How the names of tensors end that only another library's quantized weights have, and who that is.
const FOREIGN: [(&str, &str); 9] = [
    (".weight_scale_inv", "8-bit floating point with scales for blocks"),
    (".weight_scale_2", "NVFP4"),
    ("._weight_qdata", "TorchAO"),
    (".weight._data", "Quanto"),
    (".weight._scale", "Quanto"),
    (".qweight", "GPTQ, AWQ or Nunchaku"),
    (".svd_up", "SDNQ"),
    (".zero_point", "SDNQ"),
    (".weight_packed", "compressed-tensors"),
];

/// Beside whole numbers called `weight`, this holds the scales of SDNQ.
const SDNQ_SCALES: &str = ".scale";

/// The mark of a file with scaled 8-bit floating point.
const FLOAT8_MARK: &str = "scaled_fp8";

/// A tensor of one of the files.
#[derive(Clone, Debug)]
struct Place {
    file: usize,
    record: Record,
}

/// What 4-bit codes say about themselves.
#[derive(Clone, Debug, Deserialize)]
struct QuantState {
    quant_type: String,
    blocksize: usize,
    shape: Vec<usize>,
    nested_blocksize: Option<usize>,
    nested_offset: Option<f32>,
}

/// The parts of 4-bit codes.
#[derive(Clone, Debug)]
struct FourBitParts {
    state: QuantState,
    absmax: Place,
    values: Option<Place>,
    nested: Option<(Place, Place)>,
}

#[derive(Clone, Debug)]
enum Kind {
    /// As it is stored.
    Plain,
    /// 4-bit codes of bitsandbytes.
    FourBit(Box<FourBitParts>),
    /// 8-bit codes with scales, which are multiplied by a factor.
    EightBit { kind: EightBit, scales: Option<Place>, factor: f32 },
}

/// One tensor as a model means it.
#[derive(Clone, Debug)]
pub(crate) struct Logical {
    place: Place,
    shape: Vec<usize>,
    kind: Kind,
    bytes: u64,
}

impl Logical {
    /// Its shape.
    pub(crate) fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// How many bytes it takes in its file, with everything that belongs to it.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Where it lies, for reading in order.
    pub(super) fn position(&self) -> (usize, usize) {
        (self.place.file, self.place.record.range.start)
    }
}

/// The files of one component, or of a whole checkpoint.
#[derive(Debug)]
pub(crate) struct TensorFiles<'a> {
    files: Vec<WeightFile<'a>>,
    tensors: BTreeMap<String, Logical>,
}

impl TensorFiles<'static> {
    /// Maps files and checks their headers.
    pub(crate) fn open(paths: &[PathBuf]) -> Result<Self> {
        Self::new(paths.iter().map(|path| WeightFile::open(path)).collect::<Result<_>>()?)
    }
}

impl<'a> TensorFiles<'a> {
    /// A file that is in memory already. `path` is what errors call it.
    pub(crate) fn of_bytes(bytes: &'a [u8], path: &Path) -> Result<Self> {
        Self::new(vec![WeightFile::of_bytes(bytes, path)?])
    }

    fn new(files: Vec<WeightFile<'a>>) -> Result<Self> {
        let mut places = BTreeMap::new();
        for (file, opened) in files.iter().enumerate() {
            for (name, record) in opened.records() {
                if places.insert(name.clone(), Place { file, record: record.clone() }).is_some() {
                    let reason = format!("tensor `{name}` is in two shards; fetch the model again");
                    return Err(bad_file(opened.path(), &reason));
                }
            }
        }
        let tensors = Grouping { files: &files, places }.group()?;
        Ok(Self { files, tensors })
    }

    /// The tensors by name.
    pub(crate) fn tensors(&self) -> &BTreeMap<String, Logical> {
        &self.tensors
    }

    /// The files themselves.
    pub(crate) fn files(&self) -> &[WeightFile<'a>] {
        &self.files
    }

    /// The file in which a tensor is.
    pub(crate) fn path(&self, tensor: &Logical) -> &Path {
        self.files[tensor.place.file].path()
    }

    /// Tells the system that a tensor is not needed in memory; it is read from the file again when it is.
    pub(crate) fn forget(&self, tensor: &Logical) {
        self.files[tensor.place.file].forget(&tensor.place.record);
    }

    /// Refuses a tensor whose type cannot be read.
    pub(super) fn check(&self, name: &str, tensor: &Logical) -> Result<()> {
        match self.raw(tensor) {
            Some((stored, _)) => decode::dtype(name, stored, self.path(tensor)).map(drop),
            None => Ok(()),
        }
    }

    /// Whether a tensor is stored plainly in a floating point type.
    pub(super) fn is_float(&self, tensor: &Logical) -> bool {
        matches!(self.raw(tensor), Some((Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16, _)))
    }

    /// Whether a tensor is a matrix that stays in fewer bits.
    pub(super) fn is_quantized(&self, tensor: &Logical) -> bool {
        self.raw(tensor).is_none() && tensor.shape.len() == 2
    }

    /// The bytes of a tensor that is stored plainly, and their type.
    pub(crate) fn raw(&self, tensor: &Logical) -> Option<(Dtype, &[u8])> {
        match (&tensor.kind, tensor.place.record.encoding) {
            (Kind::Plain, Encoding::Plain(dtype)) => Some((dtype, self.data(&tensor.place))),
            _ => None,
        }
    }

    /// The tensor `name` in host memory: dense ones with floating point values in `dtype` when one is named, else as
    /// stored.
    pub(crate) fn read(&self, name: &str, tensor: &Logical, dtype: Option<DType>) -> Result<Weight> {
        let path = self.path(tensor);
        let bad = |error: Error| match error {
            Error::Unsupported(reason) => bad_file(path, &format!("tensor `{name}`: {reason}; fetch the file again")),
            other => other,
        };
        self.read_kind(name, tensor, dtype).map_err(bad)
    }

    fn read_kind(&self, name: &str, tensor: &Logical, dtype: Option<DType>) -> Result<Weight> {
        let (shape, data) = (tensor.shape.as_slice(), self.data(&tensor.place));
        match (&tensor.kind, tensor.place.record.encoding, shape) {
            (Kind::Plain, Encoding::Plain(stored), _) => {
                decode::tensor(name, stored, shape, data, dtype, self.path(tensor)).map(Weight::Dense)
            }
            (Kind::Plain, Encoding::Blocks(ggml), [rows, columns]) => {
                Ok(Weight::Quantized(Blocks::from_bytes(ggml, (*rows, *columns), data, &Device::Cpu)?.into()))
            }
            // What is no matrix is used dense.
            (Kind::Plain, Encoding::Blocks(ggml), _) => {
                let columns = shape.last().copied().unwrap_or(1);
                let rows = shape.iter().product::<usize>() / columns.max(1);
                let blocks = Blocks::from_bytes(ggml, (rows, columns), data, &Device::Cpu)?;
                let dense = Quantized::from(blocks).dequantize(dtype.unwrap_or(DType::F32))?;
                Ok(Weight::Dense(dense.reshape(shape)?))
            }
            (Kind::FourBit(parts), _, _) => self.four_bit(parts, data, dtype),
            (Kind::EightBit { kind, scales, factor }, _, _) => {
                let mut scales = match scales {
                    Some(place) => self.floats(place)?,
                    None => vec![1.0],
                };
                for scale in &mut scales {
                    *scale *= factor;
                }
                let rows = shape.first().copied().unwrap_or(1);
                let columns = shape.iter().skip(1).product();
                let matrix = Quantized::from(Coded::eight_bit((rows, columns), *kind, data.to_vec(), scales)?);
                if shape.len() == 2 {
                    return Ok(Weight::Quantized(matrix));
                }
                Ok(Weight::Dense(matrix.dequantize(dtype.unwrap_or(DType::F32))?.reshape(shape)?))
            }
        }
    }

    fn four_bit(&self, parts: &FourBitParts, data: &[u8], dtype: Option<DType>) -> Result<Weight> {
        let state = &parts.state;
        let kind = if state.quant_type == "nf4" { FourBit::Nf4 } else { FourBit::Fp4 };
        let values = parts.values.as_ref().map_or_else(|| Ok(kind.values().to_vec()), |place| self.floats(place))?;
        let scales = match &parts.nested {
            None => self.floats(&parts.absmax)?,
            Some((absmax, map)) => {
                let (outer, map) = (self.floats(absmax)?, self.floats(map)?);
                let block = state.nested_blocksize.unwrap_or(256).max(1);
                let offset = state.nested_offset.unwrap_or(0.0);
                let scale =
                    |(at, code): (usize, &u8)| Some(map.get(usize::from(*code))? * outer.get(at / block)? + offset);
                let codes = self.data(&parts.absmax);
                codes.iter().enumerate().map(scale).collect::<Option<_>>().ok_or_else(|| {
                    Error::Unsupported(format!("{} scales of scales do not cover {} scales", outer.len(), codes.len()))
                })?
            }
        };
        let rows = state.shape.first().copied().unwrap_or(1);
        let columns = state.shape.iter().skip(1).product();
        let coded = Coded::four_bit((rows, columns), kind, &values, data.to_vec(), (scales, state.blocksize))?;
        let matrix = Quantized::from(coded);
        if state.shape.len() == 2 {
            return Ok(Weight::Quantized(matrix));
        }
        let dense = matrix.dequantize(dtype.unwrap_or(DType::F32))?;
        Ok(Weight::Dense(dense.reshape(state.shape.as_slice())?))
    }

    /// The values of a small tensor as f32.
    fn floats(&self, place: &Place) -> Result<Vec<f32>> {
        let path = self.files[place.file].path();
        let Encoding::Plain(stored) = place.record.encoding else {
            return Err(Error::Unsupported(String::from("scales are stored in blocks")));
        };
        let tensor: Tensor =
            decode::tensor("scales", stored, &place.record.shape, self.data(place), Some(DType::F32), path)?;
        Ok(tensor.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?)
    }

    fn data(&self, place: &Place) -> &[u8] {
        self.files[place.file].data(&place.record)
    }
}

/// All tensors of the files, of which those that belong to others are taken away.
struct Grouping<'a> {
    files: &'a [WeightFile<'a>],
    places: BTreeMap<String, Place>,
}

impl Grouping<'_> {
    fn group(mut self) -> Result<BTreeMap<String, Logical>> {
        let mut tensors = BTreeMap::new();
        self.check_foreign()?;
        self.places.retain(|name, _| name.rsplit('.').next() != Some(FLOAT8_MARK));
        let states = self.places.keys().filter(|name| name.contains(".quant_state.")).cloned().collect::<Vec<_>>();
        for name in states {
            let (weight, tensor) = self.four_bit(&name)?;
            tensors.insert(weight, tensor);
        }
        let bytes: Vec<String> = self
            .places
            .iter()
            .filter(|(_, place)| eight_bit(&place.record).is_some())
            .map(|(name, _)| name.clone())
            .collect();
        for name in bytes {
            if let Some(tensor) = self.eight_bit(&name)? {
                tensors.insert(name, tensor);
            }
        }
        for (name, place) in self.places {
            let (shape, bytes) = (place.record.shape.clone(), place.record.range.len() as u64);
            tensors.insert(name, Logical { place, shape, kind: Kind::Plain, bytes });
        }
        Ok(tensors)
    }

    /// Refuses weights that another library stored in a way of its own.
    fn check_foreign(&self) -> Result<()> {
        let is_code = |place: &Place| matches!(place.record.encoding, Encoding::Plain(Dtype::I8 | Dtype::U8));
        let foreign = self.places.iter().find_map(|(name, place)| {
            if let Some((_, library)) = FOREIGN.iter().find(|(ending, _)| name.ends_with(ending)) {
                return Some((name, place, *library));
            }
            let weight = name.strip_suffix(SDNQ_SCALES).and_then(|layer| self.places.get(&format!("{layer}.weight")));
            weight.filter(|weight| is_code(weight)).map(|_| (name, place, "SDNQ"))
        });
        match foreign {
            None => Ok(()),
            Some((name, place, library)) => Err(bad_file(
                self.path(place),
                &format!(
                    "has a tensor `{name}`, so it is quantized in the way of {library}, which cannot be read; use the \
                     model in float16, bfloat16 or float32, or its GGUF or bitsandbytes files"
                ),
            )),
        }
    }

    fn path(&self, place: &Place) -> &Path {
        self.files[place.file].path()
    }

    /// The matrix whose `quant_state` has this name.
    fn four_bit(&mut self, state_name: &str) -> Result<(String, Logical)> {
        let state = self.places.remove(state_name).expect("the name comes from this map");
        let path = self.path(&state).to_owned();
        let bad = |reason: String| bad_file(&path, &format!("`{state_name}` {reason}; fetch the file again"));
        let weight = state_name.split(".quant_state.").next().unwrap_or_default().to_owned();
        let parsed: QuantState = serde_json::from_slice(self.files[state.file].data(&state.record))
            .map_err(|error| bad(format!("does not say how the codes are stored ({error})")))?;
        if !matches!(parsed.quant_type.as_str(), "nf4" | "fp4") {
            return Err(bad(format!("names the type `{}`, and `nf4` and `fp4` can be read", parsed.quant_type)));
        }
        let place =
            self.places.remove(&weight).ok_or_else(|| bad(format!("belongs to `{weight}`, which is missing")))?;
        let mut parts = FOUR_BIT_PARTS.map(|part| self.places.remove(&format!("{weight}.{part}"))).into_iter();
        let mut next = || parts.next().flatten();
        let (absmax, values, nested_absmax, nested_map) = (next(), next(), next(), next());
        let absmax = absmax.ok_or_else(|| bad(format!("belongs to `{weight}`, whose `absmax` is missing")))?;
        let nested = match (nested_absmax, nested_map) {
            (Some(absmax), Some(map)) => Some((absmax, map)),
            (None, None) => None,
            _ => return Err(bad(format!("belongs to `{weight}`, of which a `nested` part is missing"))),
        };
        let bytes = (place.record.range.len() + absmax.record.range.len()) as u64;
        let shape = parsed.shape.clone();
        let kind = Kind::FourBit(Box::new(FourBitParts { state: parsed, absmax, values, nested }));
        Ok((weight, Logical { place, shape, kind, bytes }))
    }

    /// The tensor of 8-bit codes with this name and its scales; none for whole numbers without scales.
    fn eight_bit(&mut self, name: &str) -> Result<Option<Logical>> {
        let base = name.strip_suffix("weight").unwrap_or(name).to_owned();
        let Some(kind) = self.places.get(name).and_then(|place| eight_bit(&place.record)) else { return Ok(None) };
        let mut beside = |ending: &str| self.places.remove(&format!("{base}{ending}"));
        let (scales, factor) = match beside("SCB") {
            Some(place) => (Some(place), 1.0 / 127.0),
            None => (beside("weight_scale").or_else(|| beside("scale_weight")), 1.0),
        };
        for ending in BESIDE {
            beside(ending);
        }
        if kind == EightBit::Integer && scales.is_none() {
            return Ok(None);
        }
        let Some(place) = self.places.remove(name) else { return Ok(None) };
        let (rows, count) = (place.record.shape.first().copied().unwrap_or(1), place.record.count());
        if let Some(scales) = &scales
            && scales.record.count() != rows
            && scales.record.count() != 1
        {
            let path = self.path(&place);
            return Err(bad_file(
                path,
                &format!(
                    "tensor `{name}` of shape {:?} has {} scales, and one for each row or one for all can be read",
                    place.record.shape,
                    scales.record.count()
                ),
            ));
        }
        let (shape, bytes) = (place.record.shape.clone(), (count + 4 * rows) as u64);
        Ok(Some(Logical { place, shape, kind: Kind::EightBit { kind, scales, factor }, bytes }))
    }
}

/// The 8-bit type of a tensor, if it has one.
fn eight_bit(record: &Record) -> Option<EightBit> {
    match record.encoding {
        Encoding::Plain(Dtype::I8) => Some(EightBit::Integer),
        Encoding::Plain(Dtype::F8_E4M3) => Some(EightBit::E4m3),
        Encoding::Plain(Dtype::F8_E5M2) => Some(EightBit::E5m2),
        _ => None,
    }
}
