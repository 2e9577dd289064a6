//! Euler's method for models in the EDM formulation (Karras et al. 2022, algorithm 1 without its second
//! half).

use candle_core::Tensor;

use super::{
    NoiseSource, Scheduler, StepOptions, StepOutput, TimestepRequest, basics, check_index,
    config::{FinalSigmas, PredictionType, config},
    edm::{Edm, SigmaSchedule},
    flow::Precision,
    levels::add_noise,
    numeric,
    registry::FromConfig,
    spacing, tensors,
};
use crate::Result;

config! {
    /// Options of `EDMEulerScheduler`.
    EdmEulerConfig {
        sigma_min: f64 = 0.002,
        sigma_max: f64 = 80.0,
        sigma_data: f64 = 0.5,
        sigma_schedule: SigmaSchedule = SigmaSchedule::Karras,
        num_train_timesteps: usize = 1000,
        prediction_type: PredictionType = PredictionType::Epsilon,
        rho: f64 = 7.0,
        final_sigmas_type: FinalSigmas = FinalSigmas::Zero,
    }
}

/// `EDMEulerScheduler`.
pub(super) struct EdmEuler {
    config: EdmEulerConfig,
    edm: Edm,
    timesteps: Vec<f64>,
    sigmas: Vec<f32>,
}

impl FromConfig for EdmEuler {
    const CLASS: &'static str = "EDMEulerScheduler";
    type Config = EdmEulerConfig;

    fn from_config(config: Self::Config) -> Result<Self> {
        let edm = Edm {
            sigma_min: config.sigma_min,
            sigma_max: config.sigma_max,
            sigma_data: config.sigma_data,
            schedule: config.sigma_schedule,
            rho: config.rho,
            prediction: config.prediction_type,
        };
        edm.check(Self::CLASS)?;
        Ok(Self { config, edm, timesteps: Vec::new(), sigmas: Vec::new() })
    }
}

impl Scheduler for EdmEuler {
    basics!(sigmas);

    fn set_timesteps(&mut self, request: &TimestepRequest) -> Result<()> {
        spacing::refuse_custom(Self::CLASS, request, false, false)?;
        spacing::check_steps(Self::CLASS, request, self.config.num_train_timesteps)?;
        self.sigmas = self.edm.sigmas(&numeric::linspace(0.0, 1.0, request.steps), Precision::Double);
        self.timesteps = self.sigmas.iter().map(|&sigma| Edm::timestep(sigma)).collect();
        let last = match self.config.final_sigmas_type {
            FinalSigmas::Zero => 0.0,
            FinalSigmas::SigmaMin => self.sigmas[request.steps - 1],
        };
        self.sigmas.push(last);
        Ok(())
    }

    fn init_noise_sigma(&self) -> f64 {
        self.edm.initial_sigma()
    }

    fn scale_model_input(&mut self, sample: &Tensor, index: usize) -> Result<Tensor> {
        check_index(index, &self.timesteps)?;
        self.edm.scale_input(sample, self.sigmas[index])
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
        let denoised = self.edm.denoised(&output, &sample, sigma)?;
        let moved = tensors::euler_step(&sample, &denoised, sigma, next - sigma)?;
        StepOutput::new(&moved, Some(&denoised), model_output)
    }

    fn add_noise(&self, original: &Tensor, noise: &Tensor, index: usize) -> Result<Tensor> {
        check_index(index, &self.timesteps)?;
        add_noise(original, noise, self.sigmas[index])
    }
}
