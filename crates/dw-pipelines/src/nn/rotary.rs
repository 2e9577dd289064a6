//! Rotary position embeddings; Su et al. 2021, arXiv:2104.09864.

use candle_core::{DType, Device, Tensor};

use crate::{Error, Result};

/// The longest period of the rotations.
const THETA: f64 = 10000.0;

/// How far the features of each token are turned: pairs of neighbouring features are the planes.
#[derive(Clone, Debug)]
pub struct Rotary {
    /// `(tokens, heads * head / 2)` each, f32, the same for every head.
    cos: Tensor,
    sin: Tensor,
}

impl Rotary {
    /// Rotations for tokens at `positions`, one coordinate for each axis. Of the features of a head, the first
    /// `axes[0]` turn with the first coordinate, and so on. Angles are computed in f64, as the reference does (diffusers
    /// `FluxPosEmbed`).
    pub fn new(positions: &[[u32; 3]], axes: &[usize], heads: usize, device: &Device) -> Result<Self> {
        if axes.len() != 3 || axes.iter().any(|size| size % 2 == 1) {
            return Err(Error::Unsupported(format!("rotations of {axes:?} features; three even numbers are known")));
        }
        let frequencies = |size: usize| (0..size / 2).map(move |i| THETA.powf(-((2 * i) as f64) / size as f64));
        let of_token = |position: &[u32; 3]| {
            let axes = axes.iter().zip(*position);
            let angles = axes.flat_map(|(&size, at)| frequencies(size).map(move |turn| f64::from(at) * turn));
            angles.collect::<Vec<f64>>()
        };
        let angles: Vec<f64> = positions.iter().flat_map(of_token).collect();
        let table = |values: Vec<f32>| -> Result<Tensor> {
            let table = Tensor::from_vec(values, (positions.len(), axes.iter().sum::<usize>() / 2), device)?;
            Ok(table.repeat((1, heads))?)
        };
        Ok(Self {
            cos: table(angles.iter().map(|angle| angle.cos() as f32).collect())?,
            sin: table(angles.iter().map(|angle| angle.sin() as f32).collect())?,
        })
    }

    /// `(batch, tokens, heads * head)` with heads outermost, turned in f32; same shape and type.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        // Heads lie side by side, so that they turn as the features of one.
        let wide = x.to_dtype(DType::F32)?.unsqueeze(1)?.contiguous()?;
        Ok(candle_nn::rotary_emb::rope_i(&wide, &self.cos, &self.sin)?.squeeze(1)?.to_dtype(x.dtype())?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbouring_features_turn_by_the_angle_of_their_axis() {
        let rotary = Rotary::new(&[[0, 0, 0], [0, 3, 0]], &[2, 4, 2], 2, &Device::Cpu).expect("even axes");
        let x = Tensor::new([1f32, 0.0].repeat(16), &Device::Cpu).and_then(|x| x.reshape((1, 2, 16)));
        let turned = rotary.forward(&x.expect("32 values")).expect("the shapes fit");
        let turned = turned.reshape((2, 2, 8)).and_then(|x| x.to_vec3::<f32>()).expect("32 values");
        assert_eq!(turned[0], vec![[1.0, 0.0].repeat(4); 2]);
        let slow = 3.0 / 100f32;
        let expected = [1.0, 0.0, 3f32.cos(), 3f32.sin(), slow.cos(), slow.sin(), 1.0, 0.0];
        for head in &turned[1] {
            for (value, expected) in head.iter().zip(expected) {
                assert!((value - expected).abs() < 1e-6, "{head:?}");
            }
        }
    }

    #[test]
    fn axes_that_have_no_pairs_are_refused() {
        assert!(Rotary::new(&[], &[3, 2, 3], 1, &Device::Cpu).is_err());
        assert!(Rotary::new(&[], &[4, 4], 1, &Device::Cpu).is_err());
    }
}
