//! Noise: the same random numbers torch draws for the same seed.
//!
//! Owns the generators ([`Generator`], [`Generators`]) and how tensors are filled from them. Two dialects:
//! torch's CPU generator (bit-exact, see [`mt19937`] and [`normal`]) and its CUDA generator ([`philox`]).
//! Leaves to the pipelines which draws happen in which order: that order is part of a picture's seed.

mod mt19937;
mod normal;
mod philox;

use candle_core::{DType, Device, Shape, Tensor};
use dw_core::seed::Seed;
use half::{bf16, f16};
use mt19937::Mt19937;
use philox::Philox;

use crate::{Error, Result};

/// Which of torch's generators a seed stands for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NoiseDialect {
    /// `torch.Generator("cpu")`: the same noise on every machine.
    #[default]
    Cpu,
    /// `torch.Generator("cuda")`. Draws of more elements than the GPU runs threads depend on the GPU.
    Cuda {
        /// Streaming multiprocessors of the GPU that is imitated.
        multiprocessors: u32,
        /// Resident threads of one multiprocessor.
        threads_per_multiprocessor: u32,
    },
}

impl NoiseDialect {
    /// The CUDA dialect as an H100 (132 multiprocessors) speaks it.
    pub const CUDA: Self = Self::Cuda { multiprocessors: 132, threads_per_multiprocessor: 2048 };
}

#[derive(Clone, Debug)]
enum Engine {
    Cpu(Box<Mt19937>),
    Cuda(Philox),
}

/// One stream of random numbers.
#[derive(Clone, Debug)]
pub struct Generator {
    engine: Engine,
}

impl Generator {
    /// A generator at the start of a seed's stream. The seed counts modulo 2^64, of which the CPU dialect
    /// looks at the low 32 bits only, as torch does.
    pub fn new(seed: i128, dialect: NoiseDialect) -> Self {
        let seed = seed as u64;
        let engine = match dialect {
            NoiseDialect::Cpu => Engine::Cpu(Box::new(Mt19937::new(seed as u32))),
            NoiseDialect::Cuda { multiprocessors, threads_per_multiprocessor } => {
                Engine::Cuda(Philox::new(seed, multiprocessors, threads_per_multiprocessor))
            }
        };
        Self { engine }
    }

    /// Standard normal numbers of a shape, as `torch.randn(shape, dtype, generator)` draws them.
    ///
    /// `dtype` is one of f32, f64, f16, bf16; the stream a call consumes depends on it.
    pub fn randn(&mut self, shape: impl Into<Shape>, dtype: DType, device: &Device) -> Result<Tensor> {
        let shape = shape.into();
        let count = shape.elem_count();
        let tensor = match (&mut self.engine, dtype) {
            (Engine::Cpu(engine), DType::F32) => Tensor::from_vec(normal::single(engine, count), shape, device)?,
            (Engine::Cpu(engine), DType::F64) => Tensor::from_vec(normal::double(engine, count), shape, device)?,
            (Engine::Cpu(engine), DType::F16 | DType::BF16) => {
                half_tensor(normal::half(engine, count), shape, dtype, device)?
            }
            (Engine::Cuda(engine), DType::F32) => Tensor::from_vec(engine.normal(count), shape, device)?,
            (Engine::Cuda(engine), DType::F16 | DType::BF16) => {
                half_tensor(engine.normal(count), shape, dtype, device)?
            }
            (_, other) => {
                let remedy = "draw f32, f16 or bf16 noise and convert it";
                return Err(Error::Unsupported(format!(
                    "this generator draws no noise of type `{}` - {remedy}",
                    other.as_str()
                )));
            }
        };
        Ok(tensor)
    }
}

/// Rounds on the host, so that every device holds the same bits.
fn half_tensor(values: Vec<f32>, shape: Shape, dtype: DType, device: &Device) -> Result<Tensor> {
    let tensor = if dtype == DType::F16 {
        Tensor::from_vec(values.into_iter().map(f16::from_f32).collect::<Vec<_>>(), shape, device)?
    } else {
        Tensor::from_vec(values.into_iter().map(bf16::from_f32).collect::<Vec<_>>(), shape, device)?
    };
    Ok(tensor)
}

/// The seed of torch's global generator when nothing seeds it (`c10::detail::default_rng_seed_val`).
const UNSEEDED: i128 = 67_280_421_310_721;

/// The generators of one pipeline call: one for the whole batch, or one for each picture.
#[derive(Clone, Debug)]
pub enum Generators {
    /// Every draw takes the whole batch from one stream.
    One(Generator),
    /// Picture `i` draws from stream `i`, so it does not depend on its neighbours.
    Each(Vec<Generator>),
}

impl Generators {
    /// Generators at the start of what a workflow's `seed` says.
    pub fn from_seed(seed: &Seed, dialect: NoiseDialect) -> Self {
        match seed {
            Seed::One(seed) => Self::One(Generator::new(*seed, dialect)),
            Seed::Each(seeds) => Self::Each(seeds.iter().map(|&seed| Generator::new(seed, dialect)).collect()),
        }
    }

    /// One generator as torch's global one is in a fresh process that nothing has seeded.
    pub fn unseeded() -> Self {
        Self::One(Generator::new(UNSEEDED, NoiseDialect::Cpu))
    }

    /// Standard normal numbers of `shape`, whose first axis is the batch: one draw of the whole shape, or
    /// one draw of shape (1, …) from each generator, concatenated along the batch.
    pub fn randn(&mut self, shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
        match self {
            Self::One(generator) => generator.randn(shape, dtype, device),
            Self::Each(generators) => {
                let batch = shape.first().copied().unwrap_or(0);
                if generators.is_empty() || generators.len() != batch {
                    return Err(batch_mismatch(generators.len(), batch));
                }
                self.randn_first(shape, dtype, device)
            }
        }
    }

    /// As [`Self::randn`], for a batch that may be smaller than the list of generators: the first ones draw.
    pub fn randn_first(&mut self, shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
        match self {
            Self::One(generator) => generator.randn(shape, dtype, device),
            Self::Each(generators) => {
                let batch = shape.first().copied().unwrap_or(0);
                if batch == 0 || generators.len() < batch {
                    return Err(batch_mismatch(generators.len(), batch));
                }
                let mut row = shape.to_vec();
                row[0] = 1;
                let rows = generators
                    .iter_mut()
                    .take(batch)
                    .map(|generator| generator.randn(row.as_slice(), dtype, device))
                    .collect::<Result<Vec<_>>>()?;
                Ok(Tensor::cat(&rows, 0)?)
            }
        }
    }
}

fn batch_mismatch(seeds: usize, batch: usize) -> Error {
    Error::Argument {
        name: "seed".into(),
        reason: format!(
            "{seeds} seeds for a batch of {batch} - give one seed for each picture of the batch, or a single seed"
        ),
    }
}

#[cfg(test)]
mod tests;
