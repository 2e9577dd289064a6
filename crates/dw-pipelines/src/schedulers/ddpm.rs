//! Denoising diffusion probabilistic models (Ho et al. 2020, equations 6 and 7): the mean of the posterior
//! and fresh noise at every step but the one at timestep 0.

use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    NoiseSource, Scheduler, StepOptions, StepOutput, TimestepRequest,
    alphas::{self, Alphas, Limit},
    basics,
    betas::{BetaSchedule, beta_options},
    check_index,
    config::{PredictionType, TimestepSpacing, config, option_error},
    registry::FromConfig,
    spacing, tensors,
};
use crate::Result;

/// Where the variance of the fresh noise comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum VarianceType {
    /// The posterior's variance.
    FixedSmall,
    /// The posterior's variance, found through its logarithm.
    FixedSmallLog,
    /// The step's beta.
    FixedLarge,
    /// The logarithm of the step's beta.
    FixedLargeLog,
    /// The model gives it.
    Learned,
    /// The model says where between the two it lies.
    LearnedRange,
}

config! {
    /// Options of `DDPMScheduler`.
    DdpmConfig {
        num_train_timesteps: usize = 1000,
        beta_start: f64 = 0.0001,
        beta_end: f64 = 0.02,
        beta_schedule: BetaSchedule = BetaSchedule::Linear,
        trained_betas: Option<Vec<f64>> = None,
        variance_type: VarianceType = VarianceType::FixedSmall,
        clip_sample: bool = true,
        prediction_type: PredictionType = PredictionType::Epsilon,
        thresholding: bool = false,
        dynamic_thresholding_ratio: f64 = 0.995,
        clip_sample_range: f64 = 1.0,
        sample_max_value: f64 = 1.0,
        timestep_spacing: TimestepSpacing = TimestepSpacing::Leading,
        steps_offset: i64 = 0,
        rescale_betas_zero_snr: bool = false,
    }
}

/// `DDPMScheduler`.
pub(super) struct Ddpm {
    config: DdpmConfig,
    alphas: Alphas,
    limit: Limit,
    timesteps: Vec<f64>,
}

/// Cumulative alphas at both ends of a step, and the step's own alpha and beta.
struct Step {
    alpha: f32,
    next: f32,
    own_alpha: f32,
    own_beta: f32,
}

impl Ddpm {
    fn at(&self, index: usize) -> Step {
        let alpha = self.alphas.at(self.timesteps[index]);
        let next = self.timesteps.get(index + 1).map_or(1.0, |&timestep| self.alphas.at(timestep));
        let own_alpha = alpha / next;
        Step { alpha, next, own_alpha, own_beta: 1.0 - own_alpha }
    }

    /// Fresh noise with the step's variance.
    fn scaled_noise(&self, step: &Step, learned: Option<&Tensor>, fresh: &Tensor) -> Result<Tensor> {
        let variance = ((1.0 - step.next) / (1.0 - step.alpha) * step.own_beta).max(1e-20);
        match (self.config.variance_type, learned) {
            (VarianceType::FixedLarge, _) => tensors::scale(fresh, step.own_beta.sqrt()),
            (VarianceType::FixedSmallLog, _) => tensors::scale(fresh, (0.5 * variance.ln()).exp()),
            (VarianceType::Learned, Some(learned)) => Ok((learned.sqrt()? * fresh)?),
            (VarianceType::LearnedRange, Some(learned)) => {
                let (min, max) = (f64::from(variance.ln()), f64::from(step.own_beta.ln()));
                let logarithm = learned.affine((max - min) / 2.0, f64::midpoint(max, min))?;
                Ok(((logarithm / 2.0)?.exp()? * fresh)?)
            }
            (VarianceType::Learned | VarianceType::LearnedRange, None) => {
                let reason =
                    "the model gives no variance (its output has as many channels as the latents) - use `fixed_small`";
                Err(option_error(Self::CLASS, "variance_type", reason))
            }
            (VarianceType::FixedSmall | VarianceType::FixedLargeLog, _) => tensors::scale(fresh, variance.sqrt()),
        }
    }
}

impl FromConfig for Ddpm {
    const CLASS: &'static str = "DDPMScheduler";
    type Config = DdpmConfig;

    fn from_config(config: Self::Config) -> Result<Self> {
        use PredictionType::{Epsilon, Sample, VPrediction};
        config.prediction_type.one_of(Self::CLASS, &[Epsilon, Sample, VPrediction])?;
        if config.variance_type == VarianceType::FixedLargeLog {
            let reason = "`fixed_large_log` takes the square root of a negative logarithm - use `fixed_large`";
            return Err(option_error(Self::CLASS, "variance_type", reason));
        }
        let alphas = Alphas::new(beta_options!(Self::CLASS, config).alphas_cumprod()?, true);
        let (ratio, max) = (config.dynamic_thresholding_ratio, config.sample_max_value);
        let limit = Limit::chosen(config.thresholding, ratio, max, config.clip_sample, config.clip_sample_range);
        Ok(Self { config, alphas, limit, timesteps: Vec::new() })
    }
}

impl Scheduler for Ddpm {
    basics!();

    fn set_timesteps(&mut self, request: &TimestepRequest) -> Result<()> {
        spacing::refuse_custom(Self::CLASS, request, true, false)?;
        let (train, offset) = (self.config.num_train_timesteps, self.config.steps_offset);
        self.timesteps = if let Some(timesteps) = &request.timesteps {
            spacing::falling(timesteps)?
        } else {
            spacing::check_steps(Self::CLASS, request, train)?;
            spacing::whole_timesteps(self.config.timestep_spacing, train, request.steps, offset)
        };
        spacing::check_within(&self.timesteps, train)
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
        let step = self.at(index);
        let sample = tensors::single(sample)?;
        let (output, learned) = alphas::split_variance(&tensors::single(model_output)?, &sample)?;
        let original = alphas::original(self.config.prediction_type, &output, &sample, step.alpha)?;
        let original = self.limit.apply(original)?;
        let original_weight = step.next.sqrt() * step.own_beta / (1.0 - step.alpha);
        let sample_weight = step.own_alpha.sqrt() * (1.0 - step.next) / (1.0 - step.alpha);
        let mut moved = tensors::combine(&[(original_weight, &original), (sample_weight, &sample)])?;
        if self.timesteps[index] > 0.0 {
            let fresh = tensors::single(&noise(output.dims(), model_output.dtype())?)?;
            moved = (moved + self.scaled_noise(&step, learned.as_ref(), &fresh)?)?;
        }
        StepOutput::new(&moved, Some(&original), model_output)
    }

    fn add_noise(&self, original: &Tensor, noise: &Tensor, index: usize) -> Result<Tensor> {
        check_index(index, &self.timesteps)?;
        self.alphas.add_noise(original, noise, self.timesteps[index])
    }

    fn accepts_timesteps(&self) -> bool {
        true
    }
}
