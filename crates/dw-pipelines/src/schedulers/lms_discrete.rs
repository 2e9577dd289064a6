//! Linear multistep (Adams-Bashforth over the noise levels of the run), order 4
//! (k-diffusion's `sample_lms`).

use std::collections::VecDeque;

use candle_core::Tensor;

use super::{
    NoiseSource, Scheduler, StepOptions, StepOutput, TimestepRequest, basics,
    betas::{BetaSchedule, beta_options},
    check_index,
    config::{PredictionType, TimestepSpacing, config},
    levels::{NoiseLevels, add_noise, initial_sigma, scale_input},
    registry::FromConfig,
    spacing::{self, SigmaCurve},
    tensors,
};
use crate::Result;

const ORDER: usize = 4;

config! {
    /// Options of `LMSDiscreteScheduler`.
    LmsDiscreteConfig {
        num_train_timesteps: usize = 1000,
        beta_start: f64 = 0.0001,
        beta_end: f64 = 0.02,
        beta_schedule: BetaSchedule = BetaSchedule::Linear,
        trained_betas: Option<Vec<f64>> = None,
        use_karras_sigmas: bool = false,
        use_exponential_sigmas: bool = false,
        use_beta_sigmas: bool = false,
        prediction_type: PredictionType = PredictionType::Epsilon,
        timestep_spacing: TimestepSpacing = TimestepSpacing::Linspace,
        steps_offset: i64 = 0,
    }
}

/// `LMSDiscreteScheduler`.
pub(super) struct LmsDiscrete {
    config: LmsDiscreteConfig,
    levels: NoiseLevels,
    timesteps: Vec<f64>,
    sigmas: Vec<f32>,
    /// Slopes at the levels before, the latest first; f32.
    derivatives: VecDeque<Tensor>,
}

impl LmsDiscrete {
    /// The weight of the slope `back` levels before `index`: the integral over the step of the Lagrange
    /// polynomial that is 1 there. Three Gauss points are exact up to degree 5.
    fn weight(&self, order: usize, index: usize, back: usize) -> f32 {
        let sigma = |k: usize| f64::from(self.sigmas[index - k]);
        let lagrange = |tau: f64| {
            (0..order).filter(|&k| k != back).map(|k| (tau - sigma(k)) / (sigma(back) - sigma(k))).product::<f64>()
        };
        let (start, stop) = (sigma(0), f64::from(self.sigmas[index + 1]));
        let (middle, half) = (f64::midpoint(start, stop), (stop - start) / 2.0);
        let offset = half * 0.6_f64.sqrt();
        let sum = 5.0 * lagrange(middle - offset) + 8.0 * lagrange(middle) + 5.0 * lagrange(middle + offset);
        (half * sum / 9.0) as f32
    }
}

impl FromConfig for LmsDiscrete {
    const CLASS: &'static str = "LMSDiscreteScheduler";
    type Config = LmsDiscreteConfig;

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
        Ok(Self { config, levels, timesteps: Vec::new(), sigmas: Vec::new(), derivatives: VecDeque::new() })
    }
}

impl Scheduler for LmsDiscrete {
    basics!(sigmas);

    fn set_timesteps(&mut self, request: &TimestepRequest) -> Result<()> {
        let config = &self.config;
        spacing::refuse_custom(Self::CLASS, request, false, false)?;
        spacing::check_steps(Self::CLASS, request, config.num_train_timesteps)?;
        let timesteps =
            spacing::timesteps(config.timestep_spacing, config.num_train_timesteps, request.steps, config.steps_offset);
        let curve = SigmaCurve::chosen(config.use_karras_sigmas, config.use_exponential_sigmas, config.use_beta_sigmas);
        let (timesteps, sigmas) = self.levels.run(timesteps, curve, None, None);
        self.timesteps = spacing::rounded_to_single(&timesteps);
        self.sigmas = sigmas.into_iter().chain([0.0]).map(|sigma| sigma as f32).collect();
        self.derivatives.clear();
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
        let sigma = self.sigmas[index];
        let (output, sample) = (tensors::single(model_output)?, tensors::single(sample)?);
        let denoised = tensors::denoised(self.config.prediction_type, &output, &sample, sigma)?;
        self.derivatives.push_front(tensors::derivative(&sample, &denoised, sigma)?);
        self.derivatives.truncate(ORDER);
        // A run that starts in the middle has fewer slopes than its order: the reference computes the
        // weights for the order all the same.
        let order = ORDER.min(index + 1);
        let mut terms = vec![(1.0, &sample)];
        terms.extend(
            self.derivatives
                .iter()
                .take(order)
                .enumerate()
                .map(|(back, slope)| (self.weight(order, index, back), slope)),
        );
        StepOutput::new(&tensors::combine(&terms)?, Some(&denoised), model_output)
    }

    fn add_noise(&self, original: &Tensor, noise: &Tensor, index: usize) -> Result<Tensor> {
        check_index(index, &self.timesteps)?;
        add_noise(original, noise, self.sigmas[index])
    }
}
