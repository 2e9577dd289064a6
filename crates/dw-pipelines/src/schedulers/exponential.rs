//! What the exponential-integrator samplers (DPM-Solver, DEIS, UniPC) share: noise levels as pairs of
//! alpha and sigma, the schedules of their runs, and turning a model output into the clean sample or the
//! noise.

use candle_core::Tensor;

use super::{
    config::{PredictionType, TimestepSpacing},
    levels::NoiseLevels,
    numeric,
    spacing::{self, SigmaCurve},
    tensors,
};
use crate::Result;

/// One noise level: the sample is `alpha * clean + sigma * noise`; `lambda` is half the log
/// signal-to-noise ratio.
#[derive(Clone, Copy, Debug)]
pub(super) struct Level {
    pub(super) alpha: f32,
    pub(super) sigma: f32,
    pub(super) lambda: f32,
}

impl Level {
    /// Of an entry of a run's sigmas: noise over signal, or with `flow` the noise's share of the mix.
    pub(super) fn new(sigma: f32, flow: bool) -> Self {
        if flow {
            return Self::of(1.0 - sigma, sigma);
        }
        let alpha = 1.0 / (sigma * sigma + 1.0).sqrt();
        Self::of(alpha, sigma * alpha)
    }

    /// From both factors.
    pub(super) fn of(alpha: f32, sigma: f32) -> Self {
        Self { alpha, sigma, lambda: alpha.ln() - sigma.ln() }
    }

    /// The clean sample that a model output implies here. f32.
    pub(super) fn original(self, kind: PredictionType, output: &Tensor, sample: &Tensor) -> Result<Tensor> {
        match kind {
            PredictionType::Epsilon => {
                tensors::divide(&tensors::combine(&[(1.0, sample), (-self.sigma, output)])?, self.alpha)
            }
            PredictionType::Sample => Ok(output.clone()),
            PredictionType::VPrediction => tensors::combine(&[(self.alpha, sample), (-self.sigma, output)]),
            PredictionType::FlowPrediction => tensors::combine(&[(1.0, sample), (-self.sigma, output)]),
        }
    }

    /// The noise that a model output implies here. f32.
    pub(super) fn epsilon(self, kind: PredictionType, output: &Tensor, sample: &Tensor) -> Result<Tensor> {
        match kind {
            PredictionType::Epsilon | PredictionType::FlowPrediction => Ok(output.clone()),
            PredictionType::Sample => self.noise_between(output, sample),
            PredictionType::VPrediction => tensors::combine(&[(self.alpha, output), (self.sigma, sample)]),
        }
    }

    /// The noise that turns the clean sample `original` into `sample` here. f32.
    pub(super) fn noise_between(self, original: &Tensor, sample: &Tensor) -> Result<Tensor> {
        tensors::divide(&tensors::combine(&[(1.0, sample), (-self.alpha, original)])?, self.sigma)
    }

    /// Brings clean latents to this level.
    pub(super) fn add_noise(self, original: &Tensor, noise: &Tensor) -> Result<Tensor> {
        let terms = [(self.alpha, &tensors::single(original)?), (self.sigma, &tensors::single(noise)?)];
        tensors::like(&tensors::combine(&terms)?, original)
    }
}

/// Whole timesteps of a run: one interval more than steps, so that none of them is the last level.
/// `last` is the length of the part of the training schedule that is used.
pub(super) fn timesteps(spacing: TimestepSpacing, train: usize, last: usize, steps: usize, offset: i64) -> Vec<f64> {
    let mut rising: Vec<f64> = match spacing {
        TimestepSpacing::Linspace => {
            numeric::linspace(0.0, last as f64 - 1.0, steps + 1).into_iter().map(f64::round_ties_even).collect()
        }
        TimestepSpacing::Leading => (0..=steps).map(|i| (i * (last / (steps + 1))) as f64 + offset as f64).collect(),
        TimestepSpacing::Trailing => return spacing::trailing(last as f64, train as f64 / steps as f64),
    };
    rising.reverse();
    rising.pop();
    rising
}

/// Timesteps and sigmas on a curve over the whole training schedule.
pub(super) fn on_curve(
    levels: &NoiseLevels,
    curve: SigmaCurve,
    steps: usize,
    min: Option<f64>,
    max: Option<f64>,
) -> (Vec<f64>, Vec<f64>) {
    let (min, max) = (min.unwrap_or(f64::from(levels.smallest())), max.unwrap_or(f64::from(levels.largest())));
    let sigmas = curve.sigmas(max, min, steps);
    (sigmas.iter().map(|&sigma| levels.timestep_of(sigma)).collect(), sigmas)
}

/// Timesteps and sigmas of a shifted rectified flow, falling from near 1.
pub(super) fn flow_run(train: usize, steps: usize, shift: f64) -> (Vec<f64>, Vec<f64>) {
    let mut sigmas: Vec<f64> = numeric::linspace(1.0, 1.0 / train as f64, steps + 1)
        .into_iter()
        .map(|alpha| 1.0 - alpha)
        .map(|sigma| shift * sigma / (1.0 + (shift - 1.0) * sigma))
        .rev()
        .collect();
    sigmas.pop();
    (sigmas.iter().map(|sigma| sigma * train as f64).collect(), sigmas)
}

/// How many training timesteps are left when those with a log signal-to-noise ratio below `min` are cut.
pub(super) fn unclipped(alphas_cumprod: &[f32], min: f64) -> usize {
    let lambda = |alpha: f32| alpha.sqrt().ln() - (1.0 - alpha).sqrt().ln();
    alphas_cumprod.iter().filter(|&&alpha| f64::from(lambda(alpha)) >= min).count()
}

/// The outputs of the steps before, the latest first; at most `order` of them.
#[derive(Default)]
pub(super) struct History(Vec<Tensor>);

impl History {
    /// Remembers an output and forgets what is older than `order` steps.
    pub(super) fn push(&mut self, output: Tensor, order: usize) {
        self.0.insert(0, output);
        self.0.truncate(order);
    }

    /// The output of so many steps ago; 0 is the latest.
    pub(super) fn ago(&self, steps: usize) -> &Tensor {
        &self.0[steps]
    }

    /// How many outputs are remembered.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}
