//! DPM-Solver-2 with ancestral sampling: like `KDPM2DiscreteScheduler`, but each step goes below the next
//! noise level and adds fresh noise up to it (k-diffusion's `sample_dpm_2_ancestral`).

use candle_core::Tensor;

use super::{
    NoiseSource, Scheduler, StepOptions, StepOutput, TimestepRequest, basics, check_index,
    k_dpm_2_discrete::KDpm2Config,
    levels::{NoiseLevels, add_noise, ancestral, doubled, geometric_mean, initial_sigma, interleaved, scale_input},
    registry::FromConfig,
    tensors,
};
use crate::Result;

/// The levels of one step: start, deterministic middle and end, and the fresh noise that leads back up.
#[derive(Clone, Copy)]
struct Step {
    sigma: f32,
    middle: f32,
    down: f32,
    up: f32,
}

/// `KDPM2AncestralDiscreteScheduler`.
pub(super) struct KDpm2AncestralDiscrete {
    config: KDpm2Config,
    levels: NoiseLevels,
    timesteps: Vec<f64>,
    sigmas: Vec<f32>,
    /// The step that starts at each entry of `timesteps`, doubled like them.
    steps: Vec<Step>,
    /// Where the step began, while its second half is due; f32.
    start: Option<Tensor>,
}

impl FromConfig for KDpm2AncestralDiscrete {
    const CLASS: &'static str = "KDPM2AncestralDiscreteScheduler";
    type Config = KDpm2Config;

    fn from_config(config: Self::Config) -> Result<Self> {
        let levels = config.levels(Self::CLASS)?;
        let (timesteps, sigmas, steps) = (Vec::new(), Vec::new(), Vec::new());
        Ok(Self { config, levels, timesteps, sigmas, steps, start: None })
    }
}

/// The steps between neighbouring sigmas. The last one, to zero, is a single Euler step.
fn steps(sigmas: &[f32]) -> Vec<Step> {
    sigmas
        .windows(2)
        .map(|pair| {
            let (down, up) = ancestral(pair[0], pair[1]);
            let middle = if pair[1] == 0.0 { 0.0 } else { geometric_mean(pair[0], down) };
            Step { sigma: pair[0], middle, down, up }
        })
        .collect()
}

impl Scheduler for KDpm2AncestralDiscrete {
    basics!(sigmas);

    fn set_timesteps(&mut self, request: &TimestepRequest) -> Result<()> {
        let (timesteps, sigmas) = self.config.run(Self::CLASS, &self.levels, request)?;
        let steps = steps(&sigmas);
        let middle_timesteps: Vec<f64> =
            steps[..steps.len() - 1].iter().map(|step| self.levels.timestep_of(f64::from(step.middle))).collect();
        self.timesteps = interleaved(&timesteps, &middle_timesteps);
        self.sigmas = doubled(&sigmas);
        self.sigmas.push(0.0);
        self.steps = doubled(&steps);
        self.start = None;
        Ok(())
    }

    fn init_noise_sigma(&self) -> f64 {
        initial_sigma(&self.sigmas, self.config.timestep_spacing)
    }

    fn scale_model_input(&mut self, sample: &Tensor, index: usize) -> Result<Tensor> {
        check_index(index, &self.timesteps)?;
        let sigma = if self.start.is_none() { self.sigmas[index] } else { self.steps[index - 1].middle };
        scale_input(sample, sigma)
    }

    fn step(
        &mut self,
        model_output: &Tensor,
        index: usize,
        sample: &Tensor,
        noise: &mut NoiseSource<'_>,
        _options: &StepOptions,
    ) -> Result<StepOutput> {
        check_index(index, &self.timesteps)?;
        let (output, sample) = (tensors::single(model_output)?, tensors::single(sample)?);
        let prediction = self.config.prediction_type;
        let (moved, denoised) = match self.start.take() {
            None => {
                let Step { sigma, middle, .. } = self.steps[index];
                let denoised = tensors::denoised(prediction, &output, &sample, sigma)?;
                let moved = tensors::euler_step(&sample, &denoised, sigma, middle - sigma)?;
                self.start = Some(sample);
                (moved, denoised)
            }
            Some(start) => {
                let Step { sigma, middle, down, up } = self.steps[index - 1];
                let denoised = tensors::denoised(prediction, &output, &sample, middle)?;
                let derivative = tensors::derivative(&sample, &denoised, middle)?;
                let fresh = tensors::single(&noise(model_output.dims(), model_output.dtype())?)?;
                (tensors::combine(&[(1.0, &start), (down - sigma, &derivative), (up, &fresh)])?, denoised)
            }
        };
        StepOutput::new(&moved, Some(&denoised), model_output)
    }

    fn add_noise(&self, original: &Tensor, noise: &Tensor, index: usize) -> Result<Tensor> {
        check_index(index, &self.timesteps)?;
        add_noise(original, noise, self.sigmas[index])
    }

    fn order(&self) -> usize {
        2
    }
}
