//! Euler's method on the probability-flow ODE (Karras et al. 2022, algorithm 2 without churn), with the
//! reference's `EulerDiscreteScheduler` schedule.

use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    NoiseSource, Scheduler, StepOptions, StepOutput, TimestepRequest, basics,
    betas::{BetaSchedule, beta_options},
    check_index,
    config::{self, FinalSigmas, PredictionType, TimestepSpacing, config},
    levels::{NoiseLevels, add_noise, initial_sigma, scale_input},
    registry::FromConfig,
    spacing::{self, SigmaCurve},
    tensors,
};
use crate::Result;

/// How noise levels between training timesteps are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum Interpolation {
    /// Linear in sigma.
    Linear,
    /// Evenly spaced logarithms over the whole schedule.
    LogLinear,
}

/// What the model is told at each step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum TimestepKind {
    /// A timestep.
    Discrete,
    /// A quarter of the logarithm of sigma, for velocity models.
    Continuous,
}

config! {
    /// Options of `EulerDiscreteScheduler`.
    EulerDiscreteConfig {
        num_train_timesteps: usize = 1000,
        beta_start: f64 = 0.0001,
        beta_end: f64 = 0.02,
        beta_schedule: BetaSchedule = BetaSchedule::Linear,
        trained_betas: Option<Vec<f64>> = None,
        prediction_type: PredictionType = PredictionType::Epsilon,
        interpolation_type: Interpolation = Interpolation::Linear,
        use_karras_sigmas: bool = false,
        use_exponential_sigmas: bool = false,
        use_beta_sigmas: bool = false,
        sigma_min: Option<f64> = None,
        sigma_max: Option<f64> = None,
        timestep_spacing: TimestepSpacing = TimestepSpacing::Linspace,
        timestep_type: TimestepKind = TimestepKind::Discrete,
        steps_offset: i64 = 0,
        rescale_betas_zero_snr: bool = false,
        final_sigmas_type: FinalSigmas = FinalSigmas::Zero,
    }
}

/// `EulerDiscreteScheduler`.
pub(super) struct EulerDiscrete {
    config: EulerDiscreteConfig,
    levels: NoiseLevels,
    timesteps: Vec<f64>,
    sigmas: Vec<f32>,
}

impl EulerDiscrete {
    fn curve(&self) -> Option<SigmaCurve> {
        let config = &self.config;
        SigmaCurve::chosen(config.use_karras_sigmas, config.use_exponential_sigmas, config.use_beta_sigmas)
    }

    fn tells_log_sigma(&self) -> bool {
        self.config.timestep_type == TimestepKind::Continuous
            && self.config.prediction_type == PredictionType::VPrediction
    }

    fn final_sigma(&self) -> f64 {
        match self.config.final_sigmas_type {
            FinalSigmas::Zero => 0.0,
            FinalSigmas::SigmaMin => f64::from(self.levels.smallest()),
        }
    }

    /// Timesteps and sigmas (the final one included) of a run.
    fn schedule(&self, request: &TimestepRequest) -> Result<(Vec<f64>, Vec<f64>)> {
        let config = &self.config;
        if let Some(sigmas) = &request.sigmas {
            let (_, visited) = sigmas.split_last().expect("checked to hold a number");
            return Ok((visited.iter().map(|&sigma| self.levels.timestep_of(sigma)).collect(), sigmas.clone()));
        }
        let timesteps = match &request.timesteps {
            Some(_) if self.curve().is_some() || self.tells_log_sigma() => {
                let reason =
                    "cannot be given with this scheduler's sigma curve or continuous timesteps - switch those off";
                return Err(config::request_error("timesteps", reason));
            }
            Some(timesteps) => timesteps.clone(),
            None => {
                spacing::check_steps(Self::CLASS, request, config.num_train_timesteps)?;
                let (train, offset) = (config.num_train_timesteps, config.steps_offset);
                spacing::timesteps(config.timestep_spacing, train, request.steps, offset)
            }
        };
        let (timesteps, mut sigmas) = match config.interpolation_type {
            Interpolation::Linear => self.levels.run(timesteps, self.curve(), config.sigma_min, config.sigma_max),
            Interpolation::LogLinear => {
                self.levels.log_linear_run(timesteps, self.curve(), config.sigma_min, config.sigma_max)
            }
        };
        sigmas.push(self.final_sigma());
        Ok((timesteps, sigmas))
    }
}

impl FromConfig for EulerDiscrete {
    const CLASS: &'static str = "EulerDiscreteScheduler";
    type Config = EulerDiscreteConfig;

    fn from_config(config: EulerDiscreteConfig) -> Result<Self> {
        use PredictionType::{Epsilon, Sample, VPrediction};
        config.prediction_type.one_of(Self::CLASS, &[Epsilon, Sample, VPrediction])?;
        spacing::one_curve(
            Self::CLASS,
            config.use_karras_sigmas,
            config.use_exponential_sigmas,
            config.use_beta_sigmas,
        )?;
        let levels = NoiseLevels::new(&beta_options!(Self::CLASS, config).positive_alphas_cumprod()?);
        Ok(Self { config, levels, timesteps: Vec::new(), sigmas: Vec::new() })
    }
}

impl Scheduler for EulerDiscrete {
    basics!(sigmas);

    fn set_timesteps(&mut self, request: &TimestepRequest) -> Result<()> {
        spacing::refuse_custom(Self::CLASS, request, true, true)?;
        let (timesteps, sigmas) = self.schedule(request)?;
        self.sigmas = sigmas.into_iter().map(|sigma| sigma as f32).collect();
        self.timesteps = if self.tells_log_sigma() {
            let visited = &self.sigmas[..self.sigmas.len() - 1];
            visited.iter().map(|sigma| f64::from(0.25 * sigma.ln())).collect()
        } else {
            spacing::rounded_to_single(&timesteps)
        };
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
        _noise: &mut NoiseSource<'_>,
        _options: &StepOptions,
    ) -> Result<StepOutput> {
        check_index(index, &self.timesteps)?;
        let (sigma, next) = (self.sigmas[index], self.sigmas[index + 1]);
        let (output, sample) = (tensors::single(model_output)?, tensors::single(sample)?);
        let denoised = tensors::denoised(self.config.prediction_type, &output, &sample, sigma)?;
        let moved = tensors::euler_step(&sample, &denoised, sigma, next - sigma)?;
        StepOutput::new(&moved, Some(&denoised), model_output)
    }

    fn add_noise(&self, original: &Tensor, noise: &Tensor, index: usize) -> Result<Tensor> {
        check_index(index, &self.timesteps)?;
        add_noise(original, noise, self.sigmas[index])
    }

    fn accepts_timesteps(&self) -> bool {
        true
    }

    fn accepts_sigmas(&self) -> bool {
        true
    }
}
