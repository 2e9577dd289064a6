//! Bytes of weight files to tensors: converted in one pass, by all threads.
//!
//! Memory is taken untouched from the system, so its pages are first written by the thread that fills them.

use candle_core::{DType, Device, Result, Tensor, WithDType};
use half::{bf16, f16, slice::HalfBitsSliceExt, slice::HalfFloatSliceExt, vec::HalfBitsVecExt};
use rayon::prelude::*;

/// How many values a thread converts before it takes more.
const PIECE: usize = 1 << 17;

/// How many half precision values are converted at once.
const LANE: usize = 512;

/// A host tensor of little-endian `bytes` that hold values of type `stored`, as `wanted`. None for pairs of types that
/// there is no fast way for.
pub fn tensor_from_bytes(bytes: &[u8], stored: DType, wanted: DType, shape: &[usize]) -> Result<Option<Tensor>> {
    if bytes.len() != shape.iter().product::<usize>() * stored.size_in_bytes() {
        candle_core::bail!("{} bytes do not make a {stored:?} tensor of shape {shape:?}", bytes.len());
    }
    let word = |pair: [u8; 2]| u16::from_le_bytes(pair);
    let wide = |quad: [u8; 4]| f32::from_le_bytes(quad);
    Ok(Some(match (stored, wanted) {
        (DType::F32, DType::F32) => tensor(each(bytes, wide), shape)?,
        (DType::F16, DType::F16) => tensor(each(bytes, word).reinterpret_into::<f16>(), shape)?,
        (DType::BF16, DType::BF16) => tensor(each(bytes, word).reinterpret_into::<bf16>(), shape)?,
        (DType::F16, DType::F32) => tensor(widened(bytes), shape)?,
        (DType::BF16, DType::F32) => tensor(each(bytes, |pair| f32::from_bits(u32::from(word(pair)) << 16)), shape)?,
        (DType::F32, DType::F16) => {
            tensor(each(bytes, |quad| f16::from_f32(wide(quad)).to_bits()).reinterpret_into::<f16>(), shape)?
        }
        (DType::F32, DType::BF16) => {
            tensor(each(bytes, |quad| bf16::from_f32(wide(quad)).to_bits()).reinterpret_into::<bf16>(), shape)?
        }
        _ => return Ok(None),
    }))
}

fn tensor<T: WithDType>(values: Vec<T>, shape: &[usize]) -> Result<Tensor> {
    Tensor::from_vec(values, shape, &Device::Cpu)
}

/// One value for each `N` bytes.
fn each<const N: usize, T: Send>(bytes: &[u8], value: impl Fn([u8; N]) -> T + Sync) -> Vec<T>
where
    Vec<T>: Zeroed,
{
    let mut values = Vec::<T>::zeroed(bytes.len() / N);
    values.par_chunks_mut(PIECE).zip(bytes.par_chunks(PIECE * N)).for_each(|(values, bytes)| {
        let (bytes, _) = bytes.as_chunks::<N>();
        for (out, bytes) in values.iter_mut().zip(bytes) {
            *out = value(*bytes);
        }
    });
    values
}

/// Half precision as f32.
fn widened(bytes: &[u8]) -> Vec<f32> {
    let mut values = Vec::<f32>::zeroed(bytes.len() / 2);
    values.par_chunks_mut(PIECE).zip(bytes.par_chunks(PIECE * 2)).for_each(|(values, bytes)| {
        let mut words = [0u16; LANE];
        for (values, bytes) in values.chunks_mut(LANE).zip(bytes.chunks(LANE * 2)) {
            let (pairs, _) = bytes.as_chunks::<2>();
            for (word, pair) in words.iter_mut().zip(pairs) {
                *word = u16::from_le_bytes(*pair);
            }
            words[..values.len()].reinterpret_cast::<f16>().convert_to_f32_slice(values);
        }
    });
    values
}

/// Vectors of zeros that the system gives without their being written.
trait Zeroed {
    fn zeroed(len: usize) -> Self;
}

impl Zeroed for Vec<f32> {
    fn zeroed(len: usize) -> Self {
        vec![0.0; len]
    }
}

impl Zeroed for Vec<u16> {
    fn zeroed(len: usize) -> Self {
        vec![0; len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// More than a piece, and no whole number of lanes.
    const COUNT: usize = PIECE + LANE + 3;

    fn values() -> Tensor {
        let values: Vec<f32> = (0..COUNT).map(|i| (i as f32 - 1e5) * 0.37).collect();
        Tensor::from_vec(values, (1, COUNT), &Device::Cpu).expect("a tensor")
    }

    fn bytes(tensor: &Tensor) -> Vec<u8> {
        let flat = tensor.flatten_all().expect("flat");
        match tensor.dtype() {
            DType::F32 => flat.to_vec1::<f32>().expect("f32").iter().flat_map(|x| x.to_le_bytes()).collect(),
            DType::F16 => flat.to_vec1::<f16>().expect("f16").iter().flat_map(|x| x.to_le_bytes()).collect(),
            _ => flat.to_vec1::<bf16>().expect("bf16").iter().flat_map(|x| x.to_le_bytes()).collect(),
        }
    }

    #[test]
    fn every_pair_of_types_gives_what_candle_gives() {
        let types = [DType::F32, DType::F16, DType::BF16];
        for stored in types {
            let stored_values = values().to_dtype(stored).expect("a cast");
            for wanted in types {
                let made =
                    tensor_from_bytes(&bytes(&stored_values), stored, wanted, &[1, COUNT]).expect("the bytes fit");
                let Some(made) = made else {
                    assert!(stored != wanted && stored != DType::F32 && wanted != DType::F32);
                    continue;
                };
                let expected = stored_values.to_dtype(wanted).expect("a cast");
                assert_eq!(made.dtype(), wanted);
                assert_eq!(bytes(&made), bytes(&expected), "{stored:?} to {wanted:?}");
            }
        }
    }

    #[test]
    fn bytes_that_do_not_fit_the_shape_are_refused() {
        assert!(tensor_from_bytes(&[0; 6], DType::F32, DType::F32, &[2]).is_err());
    }
}
