//! Latent consistency models (Luo et al. 2023): a few steps picked from a distillation schedule, each
//! jumping to a clean sample and back to a lower noise level with fresh noise.

use candle_core::Tensor;

use super::{
    NoiseSource, Scheduler, StepOptions, StepOutput, TimestepRequest,
    alphas::{self, Alphas, Limit},
    basics,
    betas::{BetaSchedule, beta_options},
    check_index,
    config::{self, PredictionType, TimestepSpacing, config, option_error},
    registry::FromConfig,
    spacing, tensors,
};
use crate::Result;

/// Standard deviation of the data that the boundary condition assumes.
const SIGMA_DATA: f32 = 0.5;

config! {
    /// Options of `LCMScheduler` and `TCDScheduler`.
    ConsistencyConfig {
        num_train_timesteps: usize = 1000,
        beta_start: f64 = 0.00085,
        beta_end: f64 = 0.012,
        beta_schedule: BetaSchedule = BetaSchedule::ScaledLinear,
        trained_betas: Option<Vec<f64>> = None,
        original_inference_steps: usize = 50,
        clip_sample: bool = false,
        clip_sample_range: f64 = 1.0,
        set_alpha_to_one: bool = true,
        steps_offset: i64 = 0,
        prediction_type: PredictionType = PredictionType::Epsilon,
        thresholding: bool = false,
        dynamic_thresholding_ratio: f64 = 0.995,
        sample_max_value: f64 = 1.0,
        timestep_spacing: TimestepSpacing = TimestepSpacing::Leading,
        timestep_scaling: f64 = 10.0,
        rescale_betas_zero_snr: bool = false,
    }
}

impl ConsistencyConfig {
    /// Checks the options and computes the alphas.
    pub(super) fn alphas(&self, class: &'static str) -> Result<Alphas> {
        use PredictionType::{Epsilon, Sample, VPrediction};
        self.prediction_type.one_of(class, &[Epsilon, Sample, VPrediction])?;
        if !(1..=self.num_train_timesteps).contains(&self.original_inference_steps) {
            let reason = "must be at least 1 and at most `num_train_timesteps`";
            return Err(option_error(class, "original_inference_steps", reason));
        }
        Ok(Alphas::new(beta_options!(class, self).alphas_cumprod()?, self.set_alpha_to_one))
    }

    /// The timesteps of a run: given ones, or so many picked evenly from `candidates` (rising).
    pub(super) fn timesteps(&self, class: &str, request: &TimestepRequest, candidates: &[usize]) -> Result<Vec<f64>> {
        spacing::refuse_custom(class, request, true, false)?;
        if let Some(timesteps) = &request.timesteps {
            return self.given_timesteps(timesteps, request.strength);
        }
        spacing::check_steps(class, request, self.num_train_timesteps)?;
        if request.steps > candidates.len() {
            let reason = format!(
                "{} steps, but the distillation schedule has {} at this strength - ask for fewer steps or more strength",
                request.steps,
                candidates.len()
            );
            return Err(config::request_error("num_inference_steps", reason));
        }
        let stride = candidates.len() as f64 / request.steps as f64;
        let picked = (0..request.steps).map(|i| (i as f64 * stride).floor() as usize);
        Ok(picked.map(|position| candidates[candidates.len() - 1 - position] as f64).collect())
    }

    fn given_timesteps(&self, timesteps: &[f64], strength: f64) -> Result<Vec<f64>> {
        let run = ((timesteps.len() as f64 * strength) as usize).min(timesteps.len());
        let timesteps = spacing::falling(timesteps)?.split_off(timesteps.len() - run);
        spacing::check_within(&timesteps, self.num_train_timesteps)?;
        Ok(timesteps)
    }

    /// Every `num_train_timesteps / original_steps`-th training timestep, cut at `strength`; rising.
    pub(super) fn distilled(&self, original_steps: usize, strength: f64) -> Result<Vec<usize>> {
        if !(1..=self.num_train_timesteps).contains(&original_steps) {
            let reason = format!("must be at least 1 and at most {}", self.num_train_timesteps);
            return Err(config::request_error("original_inference_steps", reason));
        }
        let stride = self.num_train_timesteps / original_steps;
        Ok((1..=(original_steps as f64 * strength) as usize).map(|i| i * stride - 1).collect())
    }
}

/// `LCMScheduler`.
pub(super) struct Lcm {
    config: ConsistencyConfig,
    alphas: Alphas,
    limit: Limit,
    timesteps: Vec<f64>,
}

impl Lcm {
    /// Weights of the sample and of the model's guess that make the guess exact at timestep 0.
    fn boundary_weights(&self, timestep: f64) -> (f32, f32) {
        let scaled = timestep as f32 * self.config.timestep_scaling as f32;
        let power = scaled * scaled + SIGMA_DATA * SIGMA_DATA;
        (SIGMA_DATA * SIGMA_DATA / power, scaled / power.sqrt())
    }
}

impl FromConfig for Lcm {
    const CLASS: &'static str = "LCMScheduler";
    type Config = ConsistencyConfig;

    fn from_config(config: Self::Config) -> Result<Self> {
        let alphas = config.alphas(Self::CLASS)?;
        let (ratio, max) = (config.dynamic_thresholding_ratio, config.sample_max_value);
        let limit = Limit::chosen(config.thresholding, ratio, max, config.clip_sample, config.clip_sample_range);
        Ok(Self { config, alphas, limit, timesteps: Vec::new() })
    }
}

impl Scheduler for Lcm {
    basics!();

    fn set_timesteps(&mut self, request: &TimestepRequest) -> Result<()> {
        let original_steps = request.original_inference_steps.unwrap_or(self.config.original_inference_steps);
        let candidates = self.config.distilled(original_steps, request.strength)?;
        self.timesteps = self.config.timesteps(Self::CLASS, request, &candidates)?;
        Ok(())
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
        let timestep = self.timesteps[index];
        let (output, sample) = (tensors::single(model_output)?, tensors::single(sample)?);
        let original = alphas::original(self.config.prediction_type, &output, &sample, self.alphas.at(timestep))?;
        let original = self.limit.apply(original)?;
        let (skip, out) = self.boundary_weights(timestep);
        let denoised = tensors::combine(&[(out, &original), (skip, &sample)])?;
        let moved = match self.timesteps.get(index + 1) {
            None => denoised.clone(),
            Some(&next) => {
                let alpha = self.alphas.at(next);
                let fresh = tensors::single(&noise(model_output.dims(), model_output.dtype())?)?;
                tensors::combine(&[(alpha.sqrt(), &denoised), ((1.0 - alpha).sqrt(), &fresh)])?
            }
        };
        StepOutput::new(&moved, Some(&denoised), model_output)
    }

    fn add_noise(&self, original: &Tensor, noise: &Tensor, index: usize) -> Result<Tensor> {
        check_index(index, &self.timesteps)?;
        self.alphas.add_noise(original, noise, self.timesteps[index])
    }

    fn accepts_timesteps(&self) -> bool {
        true
    }
}
