//! Values for tensors that are in no file, of the magnitude that trained ones have: for measuring models of full size
//! without their checkpoints. The same name and shape always gives the same values.

use candle_core::{Device, Tensor};
use rayon::prelude::*;

use crate::Result;

/// Values that one task makes.
const CHUNK: usize = 1 << 16;

/// The tensor `name`, in f32 on the host. Matrices and kernels keep the spread of what they are applied to, norms leave
/// it alone, biases are 0.
pub(super) fn values(name: &str, dims: &[usize]) -> Result<Tensor> {
    let inputs: usize = dims.iter().skip(1).product();
    if dims.len() < 2 {
        let value = if name.ends_with("bias") { 0f32 } else { 1f32 };
        return Ok(Tensor::full(value, dims, &Device::Cpu)?);
    }
    // A uniform distribution of this width has variance 1 / inputs.
    let bound = (3.0 / inputs.max(1) as f32).sqrt();
    let seed = name
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
    let mut values = vec![0f32; inputs * dims[0]];
    values.par_chunks_mut(CHUNK).enumerate().for_each(|(chunk, values)| {
        let mut state = seed ^ (chunk as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        for value in values {
            *value = bound * signed_unit(&mut state);
        }
    });
    Ok(Tensor::from_vec(values, dims, &Device::Cpu)?)
}

/// The next number in -1 to 1 (SplitMix64; Steele et al. 2014).
fn signed_unit(state: &mut u64) -> f32 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^= mixed >> 31;
    (mixed >> 40) as f32 / (1 << 23) as f32 - 1.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_follow_from_the_name_and_have_the_spread_that_a_layer_wants() {
        let all = |name| values(name, &[300, 400]).and_then(|x| Ok(x.flatten_all()?.to_vec1::<f32>()?));
        let (first, again, other) = (all("a.weight"), all("a.weight"), all("b.weight"));
        let first = first.expect("a small tensor");
        assert!(first == again.expect("a small tensor") && first != other.expect("a small tensor"));
        let variance = first.iter().map(|x| f64::from(x * x)).sum::<f64>() / first.len() as f64;
        assert!((variance * 400.0 - 1.0).abs() < 0.05, "{variance}");
        let mean = first.iter().map(|x| f64::from(*x)).sum::<f64>() / first.len() as f64;
        assert!(mean.abs() < 1e-3, "{mean}");
    }

    #[test]
    fn norms_scale_by_one_and_biases_add_nothing() {
        let all = |name| values(name, &[2]).and_then(|x| Ok(x.to_vec1::<f32>()?)).expect("a small tensor");
        assert_eq!((all("norm.weight"), all("norm.bias")), (vec![1.0, 1.0], vec![0.0, 0.0]));
    }
}
