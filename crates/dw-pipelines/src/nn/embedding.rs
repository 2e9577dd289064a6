//! Embeddings: rows of a table by number, and the sinusoids that stand for a time or a size.

use candle_core::{DType, Device, Tensor};

use super::{Activation, Linear};
use crate::{
    Result,
    weights::{Weights, paging::Layer},
};

/// A table of vectors.
#[derive(Clone, Debug)]
pub struct Embedding {
    /// `(count, size)`.
    table: Layer<Tensor>,
    device: Device,
}

impl Embedding {
    /// `(…)` of u32 to `(…, size)`.
    pub fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        let table = self.table.get()?;
        let mut shape = ids.dims().to_vec();
        shape.push(table.dim(1)?);
        Ok(table.index_select(&ids.flatten_all()?, 0)?.reshape(shape)?)
    }

    /// Where the table is.
    pub fn device(&self) -> &Device {
        &self.device
    }
}

impl Weights {
    /// The table at this path: `weight` of shape `(count, size)`.
    pub fn embedding(&self, count: usize, size: usize) -> Result<Embedding> {
        self.expect((count, size), "weight")?;
        let table = self.layer(&["weight"], move |weights| weights.get((count, size), "weight"))?;
        Ok(Embedding { table, device: self.device().clone() })
    }
}

/// The longest period of the sinusoids.
const MAX_PERIOD: f32 = 10000.0;

/// Numbers as sines and cosines of geometrically falling frequencies (diffusers `get_timestep_embedding`), always
/// computed in f32: at t = 999 a 16-bit phase would be noise.
#[derive(Clone, Debug)]
pub struct Timesteps {
    /// `(size / 2,)`, f32.
    frequencies: Tensor,
    cosine_first: bool,
    is_odd: bool,
}

impl Timesteps {
    /// Sinusoids with `size` values per number. `cosine_first` is the configuration's `flip_sin_to_cos`,
    /// `freq_shift` what is taken off the divisor of the exponents.
    pub fn new(size: usize, cosine_first: bool, freq_shift: f64, device: &Device) -> Result<Self> {
        let half = size / 2;
        let divisor = (half as f64 - freq_shift) as f32;
        let log_period = f64::from(MAX_PERIOD).ln() as f32;
        let frequencies: Vec<f32> = (0..half).map(|i| (-log_period * i as f32 / divisor).exp()).collect();
        let frequencies = Tensor::from_vec(frequencies, half, device)?;
        Ok(Self { frequencies, cosine_first, is_odd: size % 2 == 1 })
    }

    /// `(n,)` to `(n, size)`, f32.
    pub fn forward(&self, numbers: &Tensor) -> Result<Tensor> {
        let numbers = numbers.to_dtype(DType::F32)?.unsqueeze(1)?;
        self.waves(&numbers.broadcast_mul(&self.frequencies.unsqueeze(0)?)?)
    }

    /// One number to `(1, size)`, f32.
    pub fn of(&self, number: f64) -> Result<Tensor> {
        self.waves(&self.frequencies.affine(number, 0.0)?.unsqueeze(0)?)
    }

    fn waves(&self, phases: &Tensor) -> Result<Tensor> {
        let (sine, cosine) = (phases.sin()?, phases.cos()?);
        let pair = if self.cosine_first { [cosine, sine] } else { [sine, cosine] };
        let waves = Tensor::cat(&pair, 1)?;
        Ok(if self.is_odd { waves.pad_with_zeros(1, 0, 1)? } else { waves })
    }
}

/// The two linear layers that make an embedding of a sinusoid (`linear_1`, `linear_2`).
#[derive(Clone, Debug)]
pub struct TimestepEmbedding {
    cond_proj: Option<Linear>,
    linear_1: Linear,
    act: Activation,
    linear_2: Linear,
    post_act: Option<Activation>,
}

impl TimestepEmbedding {
    /// Layers of `inputs` to `size` values.
    pub fn new(inputs: usize, size: usize, act: Activation, weights: &Weights) -> Result<Self> {
        Ok(Self {
            cond_proj: None,
            linear_1: weights.pp("linear_1").linear(inputs, size, true)?,
            act,
            linear_2: weights.pp("linear_2").linear(size, size, true)?,
            post_act: None,
        })
    }

    /// Adds the projection of a condition of `cond_dim` values to the input (the guidance of distilled models),
    /// and an activation at the end.
    pub fn with_condition(
        inputs: usize,
        size: usize,
        act: Activation,
        cond_dim: Option<usize>,
        post_act: Option<Activation>,
        weights: &Weights,
    ) -> Result<Self> {
        let cond_proj = cond_dim.map(|dim| weights.pp("cond_proj").linear(dim, inputs, false)).transpose()?;
        Ok(Self { cond_proj, post_act, ..Self::new(inputs, size, act, weights)? })
    }

    /// `(batch, inputs)` and maybe a condition `(batch, cond_dim)` to `(batch, size)`.
    pub fn forward(&self, x: &Tensor, condition: Option<&Tensor>) -> Result<Tensor> {
        let x = match (&self.cond_proj, condition) {
            (Some(proj), Some(condition)) => x.broadcast_add(&proj.forward(&condition.to_dtype(x.dtype())?)?)?,
            _ => x.clone(),
        };
        let x = self.act.forward(&self.linear_1.forward(&x)?)?;
        let x = self.linear_2.forward(&x)?;
        match self.post_act {
            Some(act) => act.forward(&x),
            None => Ok(x),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(timesteps: &Timesteps, number: f32) -> Vec<f32> {
        let number = Tensor::new(&[number], &Device::Cpu).expect("one number");
        let rows: Vec<Vec<f32>> = timesteps.forward(&number).and_then(|x| Ok(x.to_vec2()?)).expect("f32 sinusoids");
        rows.into_iter().flatten().collect()
    }

    fn assert_close(left: &[f32], right: &[f32]) {
        assert_eq!(left.len(), right.len());
        for (left, right) in left.iter().zip(right) {
            assert!((left - right).abs() < 1e-6, "{left} is not {right}");
        }
    }

    #[test]
    fn sinusoids_follow_the_flags_of_the_configuration() {
        let plain = Timesteps::new(4, false, 1.0, &Device::Cpu).expect("a small table");
        assert_close(&rows(&plain, 2.0), &[2f32.sin(), 2e-4f32.sin(), 2f32.cos(), 2e-4f32.cos()]);
        let flipped = Timesteps::new(4, true, 0.0, &Device::Cpu).expect("a small table");
        assert_close(&rows(&flipped, 2.0), &[2f32.cos(), 0.02f32.cos(), 2f32.sin(), 0.02f32.sin()]);
        let odd = Timesteps::new(5, true, 0.0, &Device::Cpu).expect("a small table");
        assert_close(&rows(&odd, 2.0), &[2f32.cos(), 0.02f32.cos(), 2f32.sin(), 0.02f32.sin(), 0.0]);
    }

    #[test]
    fn one_number_and_a_tensor_of_one_number_agree() {
        let timesteps = Timesteps::new(16, true, 0.0, &Device::Cpu).expect("a small table");
        let one: Vec<Vec<f32>> = timesteps.of(801.0).and_then(|x| Ok(x.to_vec2()?)).expect("f32 sinusoids");
        assert_eq!(one[0], rows(&timesteps, 801.0));
    }
}
