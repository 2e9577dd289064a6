//! DPM-Solver-2 in the sigma form: a half step to the geometric mean of two noise levels, then the whole
//! step with the slope found there (Karras et al. 2022, algorithm 2; k-diffusion's `sample_dpm_2`).

use candle_core::Tensor;

use super::{
    NoiseSource, Scheduler, StepOptions, StepOutput, TimestepRequest, basics,
    betas::{BetaSchedule, beta_options},
    check_index,
    config::{PredictionType, TimestepSpacing, config},
    levels::{NoiseLevels, add_noise, doubled, geometric_mean, initial_sigma, interleaved, scale_input},
    registry::FromConfig,
    spacing::{self, SigmaCurve},
    tensors,
};
use crate::Result;

config! {
    /// Options of `KDPM2DiscreteScheduler` and `KDPM2AncestralDiscreteScheduler`.
    KDpm2Config {
        num_train_timesteps: usize = 1000,
        beta_start: f64 = 0.00085,
        beta_end: f64 = 0.012,
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

impl KDpm2Config {
    /// Checks the options and computes the noise levels of the training schedule.
    pub(super) fn levels(&self, class: &'static str) -> Result<NoiseLevels> {
        use PredictionType::{Epsilon, VPrediction};
        self.prediction_type.one_of(class, &[Epsilon, VPrediction])?;
        spacing::one_curve(class, self.use_karras_sigmas, self.use_exponential_sigmas, self.use_beta_sigmas)?;
        Ok(NoiseLevels::new(&beta_options!(class, self, false).alphas_cumprod()?))
    }

    /// Timesteps and sigmas of a run, one for each step, the final sigma 0 included.
    pub(super) fn run(
        &self,
        class: &str,
        levels: &NoiseLevels,
        request: &TimestepRequest,
    ) -> Result<(Vec<f64>, Vec<f32>)> {
        spacing::refuse_custom(class, request, false, false)?;
        spacing::check_steps(class, request, self.num_train_timesteps)?;
        let timesteps =
            spacing::timesteps(self.timestep_spacing, self.num_train_timesteps, request.steps, self.steps_offset);
        let curve = SigmaCurve::chosen(self.use_karras_sigmas, self.use_exponential_sigmas, self.use_beta_sigmas);
        let (mut timesteps, sigmas) = levels.run(timesteps, curve, None, None);
        if curve == Some(SigmaCurve::Karras) {
            spacing::round(&mut timesteps);
        }
        Ok((timesteps, sigmas.into_iter().chain([0.0]).map(|sigma| sigma as f32).collect()))
    }
}

/// `KDPM2DiscreteScheduler`.
pub(super) struct KDpm2Discrete {
    config: KDpm2Config,
    levels: NoiseLevels,
    timesteps: Vec<f64>,
    sigmas: Vec<f32>,
    /// The level half way into the step that ends at each entry of `sigmas`.
    middle_sigmas: Vec<f32>,
    /// Where the step began, while its second half is due; f32.
    start: Option<Tensor>,
}

impl FromConfig for KDpm2Discrete {
    const CLASS: &'static str = "KDPM2DiscreteScheduler";
    type Config = KDpm2Config;

    fn from_config(config: Self::Config) -> Result<Self> {
        let levels = config.levels(Self::CLASS)?;
        let (timesteps, sigmas, middle_sigmas) = (Vec::new(), Vec::new(), Vec::new());
        Ok(Self { config, levels, timesteps, sigmas, middle_sigmas, start: None })
    }
}

impl Scheduler for KDpm2Discrete {
    basics!(sigmas);

    fn set_timesteps(&mut self, request: &TimestepRequest) -> Result<()> {
        let (timesteps, sigmas) = self.config.run(Self::CLASS, &self.levels, request)?;
        // Entry 0 has no step before it and is never read.
        let middle: Vec<f32> =
            (0..sigmas.len()).map(|i| geometric_mean(sigmas[i], sigmas[i.saturating_sub(1)])).collect();
        let middle_timesteps: Vec<f64> =
            middle[1..sigmas.len() - 1].iter().map(|&sigma| self.levels.timestep_of(f64::from(sigma))).collect();
        self.timesteps = interleaved(&timesteps, &middle_timesteps);
        self.sigmas = doubled(&sigmas);
        self.sigmas.push(0.0);
        self.middle_sigmas = doubled(&middle);
        self.start = None;
        Ok(())
    }

    fn init_noise_sigma(&self) -> f64 {
        initial_sigma(&self.sigmas, self.config.timestep_spacing)
    }

    fn scale_model_input(&mut self, sample: &Tensor, index: usize) -> Result<Tensor> {
        check_index(index, &self.timesteps)?;
        let sigma = if self.start.is_none() { self.sigmas[index] } else { self.middle_sigmas[index] };
        scale_input(sample, sigma)
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
        let prediction = self.config.prediction_type;
        let (moved, denoised) = match self.start.take() {
            None => {
                let sigma = self.sigmas[index];
                let denoised = tensors::denoised(prediction, &output, &sample, sigma)?;
                let moved = tensors::euler_step(&sample, &denoised, sigma, self.middle_sigmas[index + 1] - sigma)?;
                self.start = Some(sample);
                (moved, denoised)
            }
            Some(start) => {
                let (sigma, middle, next) = (self.sigmas[index - 1], self.middle_sigmas[index], self.sigmas[index]);
                let denoised = tensors::denoised(prediction, &output, &sample, middle)?;
                let derivative = tensors::derivative(&sample, &denoised, middle)?;
                (tensors::combine(&[(1.0, &start), (next - sigma, &derivative)])?, denoised)
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
