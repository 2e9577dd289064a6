//! A matrix with products of thin matrices added to it, in one pass over its numbers: `W + s B A`, what LoRA does to
//! a weight (Hu et al. 2021, arXiv:2106.09685).

use std::mem::MaybeUninit;

use candle_core::{CpuStorage, DType, Device, Result, Storage, Tensor, WithDType};
use half::{bf16, f16, slice::HalfFloatSliceExt};
use rayon::prelude::*;

use crate::matrix::{Into, Matrix, multiply};

/// How many numbers one task works on: as many as stay in the second-level cache while every product is added.
const PIECE: usize = 1 << 18;

/// A product of two thin matrices, each of any floating point type.
#[derive(Clone, Copy, Debug)]
pub struct ThinProduct<'a> {
    /// `(rows, rank)`, further axes flattened.
    pub left: &'a Tensor,
    /// `(rank, columns)`, further axes flattened.
    pub right: &'a Tensor,
    /// What the product is multiplied by.
    pub factor: f64,
}

/// `base` with every product added, computed in f32 and rounded once to the type of `base`.
///
/// `base` is `(rows, …)`: everything behind its first axis counts as columns. Keeps its shape, type and device.
pub fn add_products(base: &Tensor, products: &[ThinProduct<'_>]) -> Result<Tensor> {
    let (rows, columns) = extent(base);
    for product in products {
        let ((left_rows, rank), (right_rank, right_columns)) = (extent(product.left), extent(product.right));
        if (left_rows, right_columns) != (rows, columns) || rank != right_rank {
            candle_core::bail!(
                "a product of {:?} and {:?} cannot be added to {:?}",
                product.left.dims(),
                product.right.dims(),
                base.dims()
            );
        }
    }
    match (base.device(), base.dtype()) {
        (Device::Cpu, DType::F32) => fused::<f32>(base, products),
        (Device::Cpu, DType::F16) => fused::<f16>(base, products),
        (Device::Cpu, DType::BF16) => fused::<bf16>(base, products),
        _ => composed(base, products),
    }
}

/// A tensor's shape as rows and columns.
fn extent(tensor: &Tensor) -> (usize, usize) {
    let dims = tensor.dims();
    (dims.first().copied().unwrap_or(1), dims.iter().skip(1).product())
}

/// Numbers as they are stored, computed with in f32.
trait Stored: WithDType {
    /// Lets `change` work on the numbers as f32. `room` is memory to work in.
    fn update(numbers: &mut [Self], room: &mut Vec<f32>, change: impl FnOnce(&mut [f32]));

    /// The numbers as f32.
    fn widened(numbers: &[Self]) -> Vec<f32>;
}

impl Stored for f32 {
    fn update(numbers: &mut [Self], _room: &mut Vec<f32>, change: impl FnOnce(&mut [f32])) {
        change(numbers);
    }

    fn widened(numbers: &[Self]) -> Vec<f32> {
        numbers.to_vec()
    }
}

impl Stored for f16 {
    fn update(numbers: &mut [Self], room: &mut Vec<f32>, change: impl FnOnce(&mut [f32])) {
        room.resize(numbers.len(), 0.0);
        numbers.convert_to_f32_slice(room);
        change(room);
        numbers.convert_from_f32_slice(room);
    }

    fn widened(numbers: &[Self]) -> Vec<f32> {
        numbers.to_f32_vec()
    }
}

impl Stored for bf16 {
    fn update(numbers: &mut [Self], room: &mut Vec<f32>, change: impl FnOnce(&mut [f32])) {
        room.resize(numbers.len(), 0.0);
        numbers.convert_to_f32_slice(room);
        change(room);
        numbers.convert_from_f32_slice(room);
    }

    fn widened(numbers: &[Self]) -> Vec<f32> {
        numbers.to_f32_vec()
    }
}

/// The factors of a product as f32 numbers, row after row.
struct Factors {
    left: Vec<f32>,
    right: Vec<f32>,
    rank: usize,
    factor: f32,
}

impl Factors {
    fn new(product: &ThinProduct<'_>) -> Result<Self> {
        let (left, right) = (widened(product.left)?, widened(product.right)?);
        Ok(Self { left, right, rank: extent(product.right).0, factor: product.factor as f32 })
    }
}

/// The numbers of a tensor on any device as f32 in host memory.
fn widened(tensor: &Tensor) -> Result<Vec<f32>> {
    let tensor = tensor.to_device(&Device::Cpu)?.contiguous()?;
    match tensor.dtype() {
        DType::F32 => with_numbers::<f32, _>(&tensor, <f32 as Stored>::widened),
        DType::F16 => with_numbers::<f16, _>(&tensor, <f16 as Stored>::widened),
        DType::BF16 => with_numbers::<bf16, _>(&tensor, <bf16 as Stored>::widened),
        _ => tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1(),
    }
}

/// What `read` makes of the numbers of a contiguous tensor in host memory.
fn with_numbers<T: WithDType, R>(tensor: &Tensor, read: impl FnOnce(&[T]) -> R) -> Result<R> {
    let (storage, layout) = tensor.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(numbers), Some((start, end))) => Ok(read(&CpuStorage::as_slice::<T>(numbers)?[start..end])),
        _ => candle_core::bail!("tensor is not contiguous in host memory"),
    }
}

fn fused<T: Stored>(base: &Tensor, products: &[ThinProduct<'_>]) -> Result<Tensor> {
    let factors = products.iter().map(Factors::new).collect::<Result<Vec<_>>>()?;
    let columns = extent(base).1.max(1);
    let changed = with_numbers::<T, _>(&base.contiguous()?, |numbers| added(numbers, columns, &factors))?;
    Tensor::from_vec(changed, base.shape().clone(), &Device::Cpu)
}

/// The numbers of a matrix with the products added. No number is written before its rows are worked on, so that
/// fresh memory is touched once.
fn added<T: Stored>(numbers: &[T], columns: usize, products: &[Factors]) -> Vec<T> {
    let rows = (PIECE / columns).max(1);
    let mut output: Vec<T> = Vec::with_capacity(numbers.len());
    let pieces = output.spare_capacity_mut()[..numbers.len()].par_chunks_mut(rows * columns);
    let pieces = pieces.zip(numbers.par_chunks(rows * columns)).enumerate();
    pieces.for_each_init(Vec::new, |room, (piece, (output, numbers)): (_, (&mut [MaybeUninit<T>], &[T]))| {
        let output = output.write_copy_of_slice(numbers);
        T::update(output, room, |wide| {
            for product in products {
                let count = wide.len() / columns;
                let start = piece * rows * product.rank;
                let left = &product.left[start..start + count * product.rank];
                let left = Matrix::rows(left, count, product.rank, product.rank);
                let right = Matrix::rows(&product.right, product.rank, columns, columns);
                multiply(wide, columns, Into::Add, product.factor, left, right);
            }
        });
    });
    // SAFETY: the pieces cover the first `numbers.len()` places, and each was written in full.
    #[allow(unsafe_code)]
    unsafe {
        output.set_len(numbers.len());
    }
    output
}

/// The same by candle's operations, on the device of `base`.
fn composed(base: &Tensor, products: &[ThinProduct<'_>]) -> Result<Tensor> {
    let wide = |tensor: &Tensor| tensor.to_device(base.device())?.to_dtype(DType::F32)?.reshape(extent(tensor));
    let mut sum = wide(base)?;
    for product in products {
        // The factor goes into the smaller matrix.
        let right = wide(product.right)?.affine(product.factor, 0.0)?;
        sum = (sum + wide(product.left)?.matmul(&right)?)?;
    }
    sum.reshape(base.shape())?.to_dtype(base.dtype())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, wave};

    /// The fast path and candle's operations on a weight of this shape.
    fn both(shape: &[usize], rank: usize, dtype: DType) -> (Tensor, Tensor) {
        let columns = shape[1..].iter().product::<usize>();
        let base = wave(shape, 1).to_dtype(dtype).expect("a floating point type");
        let (left, right) = (wave(&[shape[0], rank], 2), wave(&[rank, columns], 3));
        let (narrow, other) = (right.to_dtype(dtype).expect("as above"), wave(&[shape[0], 3], 4));
        let third = wave(&[3, columns], 5);
        let products = [
            ThinProduct { left: &left, right: &narrow, factor: 0.7 },
            ThinProduct { left: &other, right: &third, factor: -1.5 },
        ];
        let found = add_products(&base, &products).expect("the shapes fit");
        assert_eq!(found.dtype(), dtype);
        (found, composed(&base, &products).expect("the shapes fit"))
    }

    #[test]
    fn products_are_added_in_every_type_and_shape() {
        for (shape, rank) in [(vec![5, 7], 4), (vec![300, 1024], 8), (vec![3, 4, 3, 3], 2), (vec![1, 1 << 19], 1)] {
            for (dtype, tolerance) in [(DType::F32, 1e-6), (DType::F16, 1e-3), (DType::BF16, 8e-3)] {
                let (found, expected) = both(&shape, rank, dtype);
                assert_close(&found, &expected, tolerance);
            }
        }
    }

    #[test]
    fn a_view_is_a_base_like_any_other() {
        let whole = wave(&[6, 8], 1);
        let base = whole.narrow(0, 2, 3).expect("inside").narrow(1, 1, 4).expect("inside");
        let (left, right) = (wave(&[3, 2], 2), wave(&[2, 4], 3));
        let products = [ThinProduct { left: &left, right: &right, factor: 1.0 }];
        let found = add_products(&base, &products).expect("the shapes fit");
        assert_close(&found, &composed(&base, &products).expect("the shapes fit"), 1e-6);
    }

    #[test]
    fn products_of_another_shape_are_refused() {
        let (base, left, right) = (wave(&[4, 4], 1), wave(&[4, 2], 2), wave(&[2, 5], 3));
        let products = [ThinProduct { left: &left, right: &right, factor: 1.0 }];
        assert!(add_products(&base, &products).is_err());
    }
}
