//! Denoising diffusion implicit models (Song et al. 2021, equation 12), from deterministic (eta 0) to as
//! noisy as DDPM (eta 1).

use candle_core::Tensor;

use super::{
    NoiseSource, Scheduler, StepOptions, StepOutput, TimestepRequest,
    alphas::{self, Alphas, Limit},
    basics,
    betas::{BetaSchedule, beta_options},
    check_index,
    config::{PredictionType, TimestepSpacing, config},
    registry::FromConfig,
    spacing, tensors,
};
use crate::Result;

config! {
    /// Options of `DDIMScheduler`.
    DdimConfig {
        num_train_timesteps: usize = 1000,
        beta_start: f64 = 0.0001,
        beta_end: f64 = 0.02,
        beta_schedule: BetaSchedule = BetaSchedule::Linear,
        trained_betas: Option<Vec<f64>> = None,
        clip_sample: bool = true,
        set_alpha_to_one: bool = true,
        steps_offset: i64 = 0,
        prediction_type: PredictionType = PredictionType::Epsilon,
        thresholding: bool = false,
        dynamic_thresholding_ratio: f64 = 0.995,
        clip_sample_range: f64 = 1.0,
        sample_max_value: f64 = 1.0,
        timestep_spacing: TimestepSpacing = TimestepSpacing::Leading,
        rescale_betas_zero_snr: bool = false,
    }
}

/// `DDIMScheduler`.
pub(super) struct Ddim {
    config: DdimConfig,
    alphas: Alphas,
    limit: Limit,
    timesteps: Vec<f64>,
    /// Training timesteps from one step to the next.
    stride: usize,
}

impl FromConfig for Ddim {
    const CLASS: &'static str = "DDIMScheduler";
    type Config = DdimConfig;

    fn from_config(config: Self::Config) -> Result<Self> {
        use PredictionType::{Epsilon, Sample, VPrediction};
        config.prediction_type.one_of(Self::CLASS, &[Epsilon, Sample, VPrediction])?;
        let alphas = Alphas::new(beta_options!(Self::CLASS, config).alphas_cumprod()?, config.set_alpha_to_one);
        let (ratio, max) = (config.dynamic_thresholding_ratio, config.sample_max_value);
        let limit = Limit::chosen(config.thresholding, ratio, max, config.clip_sample, config.clip_sample_range);
        Ok(Self { config, alphas, limit, timesteps: Vec::new(), stride: 1 })
    }
}

impl Scheduler for Ddim {
    basics!();

    fn set_timesteps(&mut self, request: &TimestepRequest) -> Result<()> {
        spacing::refuse_custom(Self::CLASS, request, false, false)?;
        let (train, offset) = (self.config.num_train_timesteps, self.config.steps_offset);
        spacing::check_steps(Self::CLASS, request, train)?;
        self.timesteps = spacing::whole_timesteps(self.config.timestep_spacing, train, request.steps, offset);
        self.stride = train / request.steps;
        spacing::check_within(&self.timesteps, train)
    }

    fn step(
        &mut self,
        model_output: &Tensor,
        index: usize,
        sample: &Tensor,
        noise: &mut NoiseSource<'_>,
        options: &StepOptions,
    ) -> Result<StepOutput> {
        check_index(index, &self.timesteps)?;
        let timestep = self.timesteps[index];
        let (alpha, next) = (self.alphas.at(timestep), self.alphas.at(timestep - self.stride as f64));
        let (output, sample) = (tensors::single(model_output)?, tensors::single(sample)?);
        let prediction = self.config.prediction_type;
        let original = self.limit.apply(alphas::original(prediction, &output, &sample, alpha)?)?;
        let epsilon = if options.use_clipped_model_output {
            alphas::noise_between(&original, &sample, alpha)?
        } else {
            alphas::epsilon(prediction, &output, &sample, alpha)?
        };
        let eta = options.eta.unwrap_or(0.0);
        let variance = (1.0 - next) / (1.0 - alpha) * (1.0 - alpha / next);
        let deviation = eta as f32 * variance.sqrt();
        let direction = (1.0 - next - deviation * deviation).sqrt();
        let mut moved = tensors::combine(&[(next.sqrt(), &original), (direction, &epsilon)])?;
        if eta > 0.0 {
            let fresh = tensors::single(&noise(model_output.dims(), model_output.dtype())?)?;
            moved = tensors::combine(&[(1.0, &moved), (deviation, &fresh)])?;
        }
        StepOutput::new(&moved, Some(&original), model_output)
    }

    fn add_noise(&self, original: &Tensor, noise: &Tensor, index: usize) -> Result<Tensor> {
        check_index(index, &self.timesteps)?;
        self.alphas.add_noise(original, noise, self.timesteps[index])
    }

    fn uses_eta(&self) -> bool {
        true
    }
}
