//! The noise levels of a training schedule in the variance-exploding form, and the schedules of runs made
//! from them: what the samplers that came from k-diffusion share.

use candle_core::Tensor;

use super::{betas::sigmas_of, config::TimestepSpacing, numeric, spacing::SigmaCurve, tensors};
use crate::Result;

/// Sigma of each training timestep, and its logarithm; both rise.
pub(super) struct NoiseLevels {
    sigmas: Vec<f32>,
    log_sigmas: Vec<f32>,
}

impl NoiseLevels {
    pub(super) fn new(alphas_cumprod: &[f32]) -> Self {
        let sigmas = sigmas_of(alphas_cumprod);
        let log_sigmas = sigmas.iter().map(|&sigma| f64::from(sigma).ln() as f32).collect();
        Self { sigmas, log_sigmas }
    }

    /// The level of the first training timestep.
    pub(super) fn smallest(&self) -> f32 {
        self.sigmas[0]
    }

    /// The level of the last training timestep.
    pub(super) fn largest(&self) -> f32 {
        self.sigmas[self.sigmas.len() - 1]
    }

    /// Logarithms of the largest and the smallest level.
    pub(super) fn log_range(&self) -> (f64, f64) {
        (f64::from(self.log_sigmas[self.log_sigmas.len() - 1]), f64::from(self.log_sigmas[0]))
    }

    /// The level at a timestep that may lie between two training timesteps.
    pub(super) fn at(&self, timestep: f64) -> f64 {
        numeric::interpolate(timestep, &self.sigmas)
    }

    /// The (fractional) timestep with this level: linear between logarithms of training levels.
    pub(super) fn timestep_of(&self, sigma: f64) -> f64 {
        let log_sigma = sigma.max(1e-10).ln();
        let levels = &self.log_sigmas;
        let above = levels.partition_point(|&level| f64::from(level) <= log_sigma);
        let low = above.saturating_sub(1).min(levels.len() - 2);
        let (below, beyond) = (f64::from(levels[low]), f64::from(levels[low + 1]));
        let weight = ((below - log_sigma) / (below - beyond)).clamp(0.0, 1.0);
        (1.0 - weight) * low as f64 + weight * (low + 1) as f64
    }

    /// Timesteps and sigmas of a run: the levels at `timesteps`, put on a curve between the outermost of
    /// them (or `min` and `max`) if there is one.
    pub(super) fn run(
        &self,
        timesteps: Vec<f64>,
        curve: Option<SigmaCurve>,
        min: Option<f64>,
        max: Option<f64>,
    ) -> (Vec<f64>, Vec<f64>) {
        let sigmas = timesteps.iter().map(|&timestep| self.at(timestep)).collect();
        self.on_curve(timesteps, sigmas, curve, min, max)
    }

    /// Like [`run`](Self::run), with levels whose logarithms are evenly spaced over the whole training
    /// schedule, whatever the timesteps say. The last level is one more than there are timesteps.
    pub(super) fn log_linear_run(
        &self,
        timesteps: Vec<f64>,
        curve: Option<SigmaCurve>,
        min: Option<f64>,
        max: Option<f64>,
    ) -> (Vec<f64>, Vec<f64>) {
        let (start, stop) = (self.log_sigmas[self.log_sigmas.len() - 1], self.log_sigmas[0]);
        let sigmas = numeric::linspace_f32(f64::from(start), f64::from(stop), timesteps.len() + 1)
            .into_iter()
            .map(|log_sigma| f64::from(log_sigma.exp()))
            .collect();
        self.on_curve(timesteps, sigmas, curve, min, max)
    }

    fn on_curve(
        &self,
        timesteps: Vec<f64>,
        sigmas: Vec<f64>,
        curve: Option<SigmaCurve>,
        min: Option<f64>,
        max: Option<f64>,
    ) -> (Vec<f64>, Vec<f64>) {
        let Some(curve) = curve else { return (timesteps, sigmas) };
        let (first, last) = (sigmas[0], sigmas[sigmas.len() - 1]);
        let sigmas = curve.sigmas(max.unwrap_or(first), min.unwrap_or(last), timesteps.len());
        (sigmas.iter().map(|&sigma| self.timestep_of(sigma)).collect(), sigmas)
    }
}

/// The standard deviation of the first latents: with `leading` spacing the first level is below the
/// training schedule's end, and the clean sample counts too.
pub(super) fn initial_sigma(sigmas: &[f32], spacing: TimestepSpacing) -> f64 {
    let largest = sigmas.iter().copied().fold(0.0, f32::max);
    f64::from(if spacing == TimestepSpacing::Leading { (largest * largest + 1.0).sqrt() } else { largest })
}

/// Latents at unit variance: divided by sqrt(sigma^2 + 1).
pub(super) fn scale_input(sample: &Tensor, sigma: f32) -> Result<Tensor> {
    let scaled = tensors::divide(&tensors::single(sample)?, (sigma * sigma + 1.0).sqrt())?;
    tensors::like(&scaled, sample)
}

/// `original` plus noise of standard deviation `sigma`.
pub(super) fn add_noise(original: &Tensor, noise: &Tensor, sigma: f32) -> Result<Tensor> {
    let noisy = tensors::combine(&[(1.0, &tensors::single(original)?), (sigma, &tensors::single(noise)?)])?;
    tensors::like(&noisy, original)
}

/// Splits a step from `sigma` to `next` in a deterministic part down to the first number returned and fresh
/// noise of the second (k-diffusion's `get_ancestral_step`, eta 1).
pub(super) fn ancestral(sigma: f32, next: f32) -> (f32, f32) {
    let (power, next_power) = (sigma * sigma, next * next);
    let up = (next_power * (power - next_power) / power).sqrt();
    ((next_power - up * up).sqrt(), up)
}

/// The values of a second-order run: every value but the first occurs twice.
pub(super) fn doubled<T: Copy>(values: &[T]) -> Vec<T> {
    let (first, rest) = (values.iter().take(1), values.iter().skip(1));
    first.chain(rest.flat_map(|value| [value, value])).copied().collect()
}

/// The level half way between two in logarithms, as `torch.lerp` of them rounds it. Zero if either is.
pub(super) fn geometric_mean(a: f32, b: f32) -> f32 {
    if a == 0.0 || b == 0.0 {
        return 0.0;
    }
    let (log_a, log_b) = (a.ln(), b.ln());
    (log_b - (log_b - log_a) * 0.5).exp()
}

/// The timesteps of a run with a middle between each two steps: first, middle, second, middle, …
pub(super) fn interleaved(timesteps: &[f64], middle: &[f64]) -> Vec<f64> {
    let pairs = middle.iter().zip(&timesteps[1..]).flat_map(|(&middle, &timestep)| [middle, timestep]);
    timesteps[..1].iter().copied().chain(pairs).map(|timestep| f64::from(timestep as f32)).collect()
}
