//! Heun's method: an Euler step, then the same step again with the mean of the slopes at both ends
//! (Karras et al. 2022, algorithm 1). Two model calls for each step but the last.

use candle_core::Tensor;

use super::{
    NoiseSource, Scheduler, StepOptions, StepOutput, TimestepRequest,
    alphas::Limit,
    basics,
    betas::{BetaSchedule, beta_options},
    check_index,
    config::{self, PredictionType, TimestepSpacing, config},
    levels::{NoiseLevels, add_noise, doubled, initial_sigma, scale_input},
    registry::FromConfig,
    spacing::{self, SigmaCurve},
    tensors,
};
use crate::Result;

config! {
    /// Options of `HeunDiscreteScheduler`.
    HeunDiscreteConfig {
        num_train_timesteps: usize = 1000,
        beta_start: f64 = 0.00085,
        beta_end: f64 = 0.012,
        beta_schedule: BetaSchedule = BetaSchedule::Linear,
        trained_betas: Option<Vec<f64>> = None,
        prediction_type: PredictionType = PredictionType::Epsilon,
        use_karras_sigmas: bool = false,
        use_exponential_sigmas: bool = false,
        use_beta_sigmas: bool = false,
        clip_sample: bool = false,
        clip_sample_range: f64 = 1.0,
        timestep_spacing: TimestepSpacing = TimestepSpacing::Linspace,
        steps_offset: i64 = 0,
    }
}

/// What the first half of a step leaves for the second.
struct FirstHalf {
    derivative: Tensor,
    dt: f32,
    sample: Tensor,
}

/// `HeunDiscreteScheduler`.
pub(super) struct HeunDiscrete {
    config: HeunDiscreteConfig,
    levels: NoiseLevels,
    timesteps: Vec<f64>,
    sigmas: Vec<f32>,
    first_half: Option<FirstHalf>,
}

impl HeunDiscrete {
    fn curve(&self) -> Option<SigmaCurve> {
        let config = &self.config;
        SigmaCurve::chosen(config.use_karras_sigmas, config.use_exponential_sigmas, config.use_beta_sigmas)
    }

    fn requested(&self, request: &TimestepRequest) -> Result<Vec<f64>> {
        match &request.timesteps {
            Some(_) if self.curve().is_some() => Err(config::request_error(
                "timesteps",
                "cannot be given with this scheduler's sigma curve - switch that off",
            )),
            Some(timesteps) => Ok(timesteps.clone()),
            None => {
                let (train, offset) = (self.config.num_train_timesteps, self.config.steps_offset);
                spacing::check_steps(Self::CLASS, request, train)?;
                Ok(spacing::timesteps(self.config.timestep_spacing, train, request.steps, offset))
            }
        }
    }
}

impl FromConfig for HeunDiscrete {
    const CLASS: &'static str = "HeunDiscreteScheduler";
    type Config = HeunDiscreteConfig;

    fn from_config(config: Self::Config) -> Result<Self> {
        use PredictionType::{Epsilon, Sample, VPrediction};
        config.prediction_type.one_of(Self::CLASS, &[Epsilon, Sample, VPrediction])?;
        spacing::one_curve(
            Self::CLASS,
            config.use_karras_sigmas,
            config.use_exponential_sigmas,
            config.use_beta_sigmas,
        )?;
        let levels = NoiseLevels::new(&beta_options!(Self::CLASS, config, false).alphas_cumprod()?);
        Ok(Self { config, levels, timesteps: Vec::new(), sigmas: Vec::new(), first_half: None })
    }
}

impl Scheduler for HeunDiscrete {
    basics!(sigmas);

    fn set_timesteps(&mut self, request: &TimestepRequest) -> Result<()> {
        spacing::refuse_custom(Self::CLASS, request, true, false)?;
        let (timesteps, sigmas) = self.levels.run(self.requested(request)?, self.curve(), None, None);
        self.timesteps = doubled(&spacing::rounded_to_single(&timesteps));
        let sigmas: Vec<f32> = sigmas.into_iter().map(|sigma| sigma as f32).collect();
        self.sigmas = doubled(&sigmas);
        self.sigmas.push(0.0);
        self.first_half = None;
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
        let (output, sample) = (tensors::single(model_output)?, tensors::single(sample)?);
        let sigma = self.sigmas[index];
        let limit = Limit::chosen(false, 0.0, 0.0, self.config.clip_sample, self.config.clip_sample_range);
        let denoised = limit.apply(tensors::denoised(self.config.prediction_type, &output, &sample, sigma)?)?;
        let derivative = tensors::derivative(&sample, &denoised, sigma)?;
        let moved = match self.first_half.take() {
            None => {
                let dt = self.sigmas[index + 1] - sigma;
                let moved = tensors::combine(&[(1.0, &sample), (dt, &derivative)])?;
                self.first_half = Some(FirstHalf { derivative, dt, sample });
                moved
            }
            Some(first) => {
                let mean = ((&first.derivative + &derivative)? / 2.0)?;
                tensors::combine(&[(1.0, &first.sample), (first.dt, &mean)])?
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

    fn accepts_timesteps(&self) -> bool {
        true
    }
}
