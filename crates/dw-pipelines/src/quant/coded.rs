//! Matrices of codes: each byte stands for one or two values of a table, and a group of values shares a scale.
//!
//! One form for bitsandbytes' 4-bit types (two codes in a byte, the first in the upper half; groups of 64 that run
//! over the ends of rows), 8-bit integers (a group is a row) and 8-bit floating point (a group is a row or the whole
//! matrix). On a GPU the same is said with look-ups, on the device.

use std::ops::Range;

use candle_core::{DType, Device, Storage, Tensor};
use half::f16;
use rayon::prelude::*;

use super::{
    Format,
    code_book::{
        EightBit, FLOAT8_MAX, FOUR_BIT_BLOCK, FourBit, eight_bit_table, positive_float8, through_eight_bits, to_float8,
    },
};
use crate::{Error, Result};

/// Codes with what they stand for.
#[derive(Clone, Debug)]
pub(crate) struct Coded {
    format: Format,
    rows: usize,
    columns: usize,
    /// `(bytes,)` of u8.
    codes: Tensor,
    /// What a byte stands for, `(256, 1)` or `(256, 2)`, f32.
    table: Tensor,
    /// `(groups,)`, f32.
    scales: Tensor,
    /// How many values share a scale.
    group: usize,
    /// The first value that belongs to this matrix; those before belong to other parts of the same codes.
    start: usize,
}

impl Coded {
    /// 4-bit codes, two in a byte, with a scale for each `block` values. `values` are the 16 of the code.
    pub(crate) fn four_bit(
        (rows, columns): (usize, usize),
        kind: FourBit,
        values: &[f32],
        codes: Vec<u8>,
        (scales, block): (Vec<f32>, usize),
    ) -> Result<Self> {
        let count = rows * columns;
        if block == 0 || values.len() != 16 || codes.len() != count.div_ceil(2) || scales.len() != count.div_ceil(block)
        {
            return Err(Error::Unsupported(format!(
                "{} codes and {} scales do not make a [{rows}, {columns}] matrix in blocks of {block}",
                codes.len() * 2,
                scales.len()
            )));
        }
        let table = (0..=u8::MAX).flat_map(|byte| [values[usize::from(byte >> 4)], values[usize::from(byte & 15)]]);
        let format = if kind == FourBit::Nf4 { Format::Nf4 } else { Format::Fp4 };
        Self::new(format, (rows, columns), codes, (table.collect(), 2), (scales, block))
    }

    /// 8-bit codes with one scale for each row, or one for all.
    pub(crate) fn eight_bit(
        (rows, columns): (usize, usize),
        kind: EightBit,
        codes: Vec<u8>,
        scales: Vec<f32>,
    ) -> Result<Self> {
        let group = if scales.len() == rows { columns } else { rows * columns };
        if codes.len() != rows * columns || (scales.len() != rows && scales.len() != 1) {
            return Err(Error::Unsupported(format!(
                "{} codes and {} scales do not make a [{rows}, {columns}] matrix",
                codes.len(),
                scales.len()
            )));
        }
        let format = if kind == EightBit::Integer { Format::Int8 } else { Format::Float8 };
        Self::new(format, (rows, columns), codes, (eight_bit_table(kind), 1), (scales, group))
    }

    fn new(
        format: Format,
        (rows, columns): (usize, usize),
        codes: Vec<u8>,
        (table, per_byte): (Vec<f32>, usize),
        (scales, group): (Vec<f32>, usize),
    ) -> Result<Self> {
        let cpu = &Device::Cpu;
        let (bytes, groups) = (codes.len(), scales.len());
        Ok(Self {
            format,
            rows,
            columns,
            codes: Tensor::from_vec(codes, bytes, cpu)?,
            table: Tensor::from_vec(table, (256, per_byte), cpu)?,
            scales: Tensor::from_vec(scales, groups, cpu)?,
            group: group.max(1),
            start: 0,
        })
    }

    /// Brings a matrix of f32 values into a 4-bit type. `double` sends the scales through 8 bits, as bitsandbytes
    /// does when it stores them so.
    pub(super) fn quantize_four_bit(
        values: &[f32],
        shape: (usize, usize),
        kind: FourBit,
        double: bool,
    ) -> Result<Self> {
        let blocks = values.par_chunks(FOUR_BIT_BLOCK);
        let scales: Vec<f32> = blocks.map(largest).collect();
        // Codes are chosen by the exact scales, also where the stored ones are rounded.
        let code = |at: usize| {
            let scale = scales[at / FOUR_BIT_BLOCK];
            let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
            values.get(at).map_or(0, |x| kind.code(x * inverse))
        };
        let codes = (0..values.len().div_ceil(2)).into_par_iter();
        let codes =
            codes.map(|pair| code(2 * pair) << 4 | if 2 * pair + 1 < values.len() { code(2 * pair + 1) } else { 0 });
        let codes = codes.collect();
        let scales = if double { through_eight_bits(&scales) } else { scales };
        Self::four_bit(shape, kind, &kind.values(), codes, (scales, FOUR_BIT_BLOCK))
    }

    /// Brings a matrix of f32 values into 8-bit integers, row by row; from float16, as bitsandbytes does.
    pub(super) fn quantize_int8(values: &[f32], shape: (usize, usize)) -> Result<Self> {
        let (low, high) = (f16::MIN.to_f32(), f16::MAX.to_f32());
        let halves: Vec<f32> = values.par_iter().map(|x| f16::from_f32(x.clamp(low, high)).to_f32()).collect();
        let code = |x: f32, largest: f32| (x * (127.0 / largest)).round_ties_even().clamp(-127.0, 127.0) as i8 as u8;
        Self::quantize_rows(&halves, shape, EightBit::Integer, 127.0, code)
    }

    /// Brings a matrix of f32 values into 8-bit floating point, row by row.
    pub(super) fn quantize_float8(values: &[f32], shape: (usize, usize)) -> Result<Self> {
        let positive = positive_float8();
        let code = |x: f32, largest: f32| to_float8(x / (largest / FLOAT8_MAX), &positive);
        Self::quantize_rows(values, shape, EightBit::E4m3, FLOAT8_MAX, code)
    }

    /// `code` gives the code of a value by the largest magnitude of its row, which `top` stands for.
    fn quantize_rows(
        values: &[f32],
        shape: (usize, usize),
        kind: EightBit,
        top: f32,
        code: impl Fn(f32, f32) -> u8 + Sync,
    ) -> Result<Self> {
        let row = |row: &[f32]| {
            let largest = largest(row);
            (largest / top, row.iter().map(|x| if largest > 0.0 { code(*x, largest) } else { 0 }).collect::<Vec<u8>>())
        };
        let (scales, codes): (Vec<f32>, Vec<Vec<u8>>) = values.par_chunks(shape.1.max(1)).map(row).unzip();
        Self::eight_bit(shape, kind, codes.concat(), scales)
    }

    pub(super) fn format(&self) -> Format {
        self.format
    }

    pub(super) fn shape(&self) -> (usize, usize) {
        (self.rows, self.columns)
    }

    pub(super) fn device(&self) -> &Device {
        self.codes.device()
    }

    pub(super) fn bytes(&self) -> u64 {
        let values = self.rows * self.columns;
        (values.div_ceil(self.per_byte()) + values.div_ceil(self.group) * size_of::<f32>()) as u64
    }

    /// The codes, the scales and how many values share one, for writing. Only of a matrix that is no part of another.
    pub(crate) fn parts(&self) -> Result<(Vec<u8>, Vec<f32>, usize)> {
        Ok((self.codes.to_vec1()?, self.scales.to_vec1()?, self.group))
    }

    /// Some of the rows, on the same codes.
    pub(super) fn rows(&self, rows: &Range<usize>) -> Self {
        Self { rows: rows.len(), start: self.start + rows.start * self.columns, ..self.clone() }
    }

    pub(super) fn to_device(&self, device: &Device) -> Result<Self> {
        Ok(Self {
            codes: self.codes.to_device(device)?,
            table: self.table.to_device(device)?,
            scales: self.scales.to_device(device)?,
            ..self.clone()
        })
    }

    fn per_byte(&self) -> usize {
        self.table.dim(1).unwrap_or(1)
    }

    /// Rows as f32 values in host memory. Only of a matrix in host memory.
    pub(super) fn host_rows(&self, rows: &Range<usize>) -> Result<Vec<f32>> {
        let mut values = vec![0.0; rows.len() * self.columns];
        with_host::<u8, _>(&self.codes, |codes| {
            with_host::<f32, _>(&self.table, |table| {
                with_host::<f32, _>(&self.scales, |scales| {
                    let start = self.start + rows.start * self.columns;
                    let fill = if self.per_byte() == 2 { fill_pairs } else { fill_bytes };
                    fill(codes, table, &Scales { values: scales, group: self.group }, start, &mut values);
                })
            })
        })???;
        Ok(values)
    }

    /// All rows as f32, `(rows, columns)`, computed where the codes are.
    pub(super) fn dequantize(&self) -> Result<Tensor> {
        let (per_byte, count) = (self.per_byte(), self.rows * self.columns);
        let part = |all: &Tensor, per: usize| -> Result<(Tensor, usize)> {
            let first = self.start / per;
            Ok((all.narrow(0, first, (self.start + count).div_ceil(per) - first)?, self.start - first * per))
        };
        let (codes, skipped) = part(&self.codes, per_byte)?;
        // As 32-bit indices: candle takes the largest number of an index's type to mean "nothing", and 255 is a code.
        let codes = codes.to_dtype(DType::U32)?;
        let values = self.table.index_select(&codes, 0)?.flatten_all()?.narrow(0, skipped, count)?;
        let (scales, skipped) = part(&self.scales, self.group)?;
        let scales = scales.unsqueeze(1)?.broadcast_as((scales.dim(0)?, self.group))?.flatten_all()?;
        Ok((values * scales.narrow(0, skipped, count)?)?.reshape((self.rows, self.columns))?)
    }
}

struct Scales<'a> {
    values: &'a [f32],
    group: usize,
}

/// One value a byte.
fn fill_bytes(codes: &[u8], table: &[f32], scales: &Scales<'_>, start: usize, values: &mut [f32]) {
    let mut done = 0;
    while done < values.len() {
        let at = start + done;
        let run = (scales.group - at % scales.group).min(values.len() - done);
        let scale = scales.values[at / scales.group];
        for (value, code) in values[done..done + run].iter_mut().zip(&codes[at..at + run]) {
            *value = table[usize::from(*code)] * scale;
        }
        done += run;
    }
}

/// Two values a byte.
fn fill_pairs(codes: &[u8], table: &[f32], scales: &Scales<'_>, start: usize, values: &mut [f32]) {
    let single = |at: usize| table[2 * usize::from(codes[at / 2]) + at % 2] * scales.values[at / scales.group];
    let end = start + values.len();
    let mut at = start;
    while at < end {
        let run = (scales.group - at % scales.group).min(end - at);
        let (mut from, to) = (at, at + run);
        if from % 2 == 1 {
            values[from - start] = single(from);
            from += 1;
        }
        let pairs = (to - from) / 2;
        let scale = scales.values[at / scales.group];
        let (codes, out) = (&codes[from / 2..from / 2 + pairs], &mut values[from - start..from - start + 2 * pairs]);
        for (out, code) in out.chunks_exact_mut(2).zip(codes) {
            let pair = &table[2 * usize::from(*code)..2 * usize::from(*code) + 2];
            out[0] = pair[0] * scale;
            out[1] = pair[1] * scale;
        }
        if (to - from) % 2 == 1 {
            values[to - 1 - start] = single(to - 1);
        }
        at = to;
    }
}

/// Runs `read` on the values of a contiguous tensor in host memory.
fn with_host<T: candle_core::WithDType, R>(tensor: &Tensor, read: impl FnOnce(&[T]) -> R) -> Result<R> {
    let (storage, layout) = tensor.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(values), Some((start, end))) => Ok(read(&values.as_slice::<T>()?[start..end])),
        _ => Err(Error::Unsupported(String::from("codes are read in host memory only"))),
    }
}

fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |largest, x| largest.max(x.abs()))
}

/// The values of a tensor as f32 in host memory.
pub(super) fn host_values(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}
