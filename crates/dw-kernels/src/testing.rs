//! Inputs and comparisons of the tests.

use candle_core::{DType, Device, Tensor};

/// Numbers between -1 and 1 without a pattern.
pub(crate) fn wave(shape: &[usize], seed: u64) -> Tensor {
    let count = shape.iter().product::<usize>();
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let numbers: Vec<f32> = (0..count)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect();
    Tensor::from_vec(numbers, shape, &Device::Cpu).expect("the count fits the shape")
}

/// Fails where a number is further off than `tolerance` times the largest expected one.
pub(crate) fn assert_close(found: &Tensor, expected: &Tensor, tolerance: f64) {
    assert_eq!(found.dims(), expected.dims());
    let numbers = |tensor: &Tensor| {
        tensor.to_dtype(DType::F64).and_then(|t| t.flatten_all()?.to_vec1::<f64>()).expect("f64 holds it")
    };
    let (found, expected) = (numbers(found), numbers(expected));
    let largest = expected.iter().map(|x| x.abs()).fold(f64::MIN_POSITIVE, f64::max);
    for (i, (a, b)) in found.iter().zip(&expected).enumerate() {
        assert!((a - b).abs() <= tolerance * largest, "number {i}: {a} instead of {b} (largest {largest})");
    }
}
