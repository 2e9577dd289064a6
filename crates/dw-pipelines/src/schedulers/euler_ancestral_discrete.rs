//! Euler's method with ancestral sampling: each step goes below the next noise level and adds fresh noise
//! up to it (k-diffusion's `sample_euler_ancestral`).

use candle_core::Tensor;

use super::{
    NoiseSource, Scheduler, StepOptions, StepOutput, TimestepRequest, basics,
    betas::{BetaSchedule, beta_options},
    check_index,
    config::{PredictionType, TimestepSpacing, config},
    levels::{NoiseLevels, add_noise, ancestral, initial_sigma, scale_input},
    registry::FromConfig,
    spacing, tensors,
};
use crate::Result;

config! {
    /// Options of `EulerAncestralDiscreteScheduler`.
    EulerAncestralDiscreteConfig {
        num_train_timesteps: usize = 1000,
        beta_start: f64 = 0.0001,
        beta_end: f64 = 0.02,
        beta_schedule: BetaSchedule = BetaSchedule::Linear,
        trained_betas: Option<Vec<f64>> = None,
        prediction_type: PredictionType = PredictionType::Epsilon,
        timestep_spacing: TimestepSpacing = TimestepSpacing::Linspace,
        steps_offset: i64 = 0,
        rescale_betas_zero_snr: bool = false,
    }
}

/// `EulerAncestralDiscreteScheduler`.
pub(super) struct EulerAncestralDiscrete {
    config: EulerAncestralDiscreteConfig,
    levels: NoiseLevels,
    timesteps: Vec<f64>,
    sigmas: Vec<f32>,
}

impl FromConfig for EulerAncestralDiscrete {
    const CLASS: &'static str = "EulerAncestralDiscreteScheduler";
    type Config = EulerAncestralDiscreteConfig;

    fn from_config(config: Self::Config) -> Result<Self> {
        use PredictionType::{Epsilon, VPrediction};
        config.prediction_type.one_of(Self::CLASS, &[Epsilon, VPrediction])?;
        let levels = NoiseLevels::new(&beta_options!(Self::CLASS, config).positive_alphas_cumprod()?);
        Ok(Self { config, levels, timesteps: Vec::new(), sigmas: Vec::new() })
    }
}

impl Scheduler for EulerAncestralDiscrete {
    basics!(sigmas);

    fn set_timesteps(&mut self, request: &TimestepRequest) -> Result<()> {
        spacing::refuse_custom(Self::CLASS, request, false, false)?;
        let (train, offset) = (self.config.num_train_timesteps, self.config.steps_offset);
        spacing::check_steps(Self::CLASS, request, train)?;
        let timesteps = spacing::timesteps(self.config.timestep_spacing, train, request.steps, offset);
        self.timesteps = spacing::rounded_to_single(&timesteps);
        self.sigmas = self.timesteps.iter().map(|&timestep| self.levels.at(timestep) as f32).chain([0.0]).collect();
        Ok(())
    }

    fn init_noise_sigma(&self) -> f64 {
        initial_sigma(&self.sigmas, self.config.timestep_spacing)
    }

    fn scale_model_input(&mut self, sample: &Tensor, index: usize) -> Result<Tensor> {
        check_index(index, &self.timesteps)?;
        scale_input(sample, self.sigmas[index])
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
        let (sigma, next) = (self.sigmas[index], self.sigmas[index + 1]);
        let (output, sample) = (tensors::single(model_output)?, tensors::single(sample)?);
        let denoised = tensors::denoised(self.config.prediction_type, &output, &sample, sigma)?;
        let (down, up) = ancestral(sigma, next);
        let moved = tensors::euler_step(&sample, &denoised, sigma, down - sigma)?;
        // Drawn on the last step too, where it counts for nothing: the stream of noise must not shift.
        let fresh = tensors::single(&noise(model_output.dims(), model_output.dtype())?)?;
        let moved = tensors::combine(&[(1.0, &moved), (up, &fresh)])?;
        StepOutput::new(&moved, Some(&denoised), model_output)
    }

    fn add_noise(&self, original: &Tensor, noise: &Tensor, index: usize) -> Result<Tensor> {
        check_index(index, &self.timesteps)?;
        add_noise(original, noise, self.sigmas[index])
    }
}
