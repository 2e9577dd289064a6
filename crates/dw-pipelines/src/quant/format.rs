//! The storage formats and their names.

use std::fmt;

use candle_core::quantized::GgmlDType;

use super::code_book::{FOUR_BIT_BLOCK, FourBit};
use crate::{Error, Result};

/// How a matrix is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Blocks of a row, each with its scale (llama.cpp's formats).
    Ggml(GgmlDType),
    /// bitsandbytes' 4-bit normal floats: blocks of 64 values with their largest magnitude (Dettmers et al. 2023,
    /// arXiv:2305.14314).
    Nf4,
    /// bitsandbytes' 4-bit floating point, in the same blocks.
    Fp4,
    /// 8-bit integers with the largest magnitude of each row (the weights of LLM.int8(), Dettmers et al. 2022,
    /// arXiv:2208.07339).
    Int8,
    /// 8-bit floating point with 4 bits of exponent, with a scale for each row or for the matrix.
    Float8,
}

/// The formats that `dw quantize --to` and messages name.
const NAMED: [(&str, Format); 15] = [
    ("q2_k", Format::Ggml(GgmlDType::Q2K)),
    ("q3_k", Format::Ggml(GgmlDType::Q3K)),
    ("q4_0", Format::Ggml(GgmlDType::Q4_0)),
    ("q4_1", Format::Ggml(GgmlDType::Q4_1)),
    ("q4_k", Format::Ggml(GgmlDType::Q4K)),
    ("q5_0", Format::Ggml(GgmlDType::Q5_0)),
    ("q5_1", Format::Ggml(GgmlDType::Q5_1)),
    ("q5_k", Format::Ggml(GgmlDType::Q5K)),
    ("q6_k", Format::Ggml(GgmlDType::Q6K)),
    ("q8_0", Format::Ggml(GgmlDType::Q8_0)),
    ("q8_1", Format::Ggml(GgmlDType::Q8_1)),
    ("nf4", Format::Nf4),
    ("fp4", Format::Fp4),
    ("int8", Format::Int8),
    ("fp8", Format::Float8),
];

impl Format {
    /// The format of this name, in any case.
    pub fn parse(name: &str) -> Result<Self> {
        let found = NAMED.iter().find(|(known, _)| known.eq_ignore_ascii_case(name.trim()));
        found.map(|(_, format)| *format).ok_or_else(|| {
            let names = Self::names().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
            Error::Unsupported(format!("`{name}` is no storage format; use one of {names}"))
        })
    }

    /// The names of all formats that weights can be brought into.
    pub fn names() -> impl Iterator<Item = &'static str> {
        NAMED.iter().map(|(name, _)| *name)
    }

    /// Whether the matrices are written into GGUF files (else safetensors).
    pub fn is_ggml(self) -> bool {
        matches!(self, Self::Ggml(_))
    }

    /// The format for a matrix with this many columns, where the blocks of this one do not fit: the nearest with
    /// smaller blocks, as llama.cpp chooses. None when no block fits and the matrix stays dense.
    pub(crate) fn fitting(self, columns: usize) -> Option<Self> {
        let Self::Ggml(dtype) = self else { return Some(self) };
        if columns.is_multiple_of(dtype.block_size()) {
            return Some(self);
        }
        let smaller = match dtype {
            GgmlDType::Q2K | GgmlDType::Q3K => GgmlDType::Q4_0,
            GgmlDType::Q4K => GgmlDType::Q5_0,
            GgmlDType::Q5K => GgmlDType::Q5_1,
            GgmlDType::Q6K | GgmlDType::Q8K => GgmlDType::Q8_0,
            _ => return None,
        };
        columns.is_multiple_of(smaller.block_size()).then_some(Self::Ggml(smaller))
    }

    /// How many bytes a matrix takes whose rows are whole blocks.
    pub(crate) fn bytes(self, rows: usize, columns: usize) -> u64 {
        let count = rows * columns;
        let bytes = match self {
            Self::Ggml(dtype) => count / dtype.block_size() * dtype.type_size(),
            Self::Nf4 | Self::Fp4 => count.div_ceil(2) + count.div_ceil(FOUR_BIT_BLOCK) * size_of::<f32>(),
            Self::Int8 | Self::Float8 => count + rows * size_of::<f32>(),
        };
        bytes as u64
    }

    /// The 4-bit code, if it is one of those.
    pub(crate) fn four_bit(self) -> Option<FourBit> {
        match self {
            Self::Nf4 => Some(FourBit::Nf4),
            Self::Fp4 => Some(FourBit::Fp4),
            _ => None,
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match NAMED.iter().find(|(_, format)| format == self) {
            Some((name, _)) => f.write_str(name),
            None => write!(f, "{self:?}"),
        }
    }
}
