//! DPM-Solver++ for models in the EDM formulation.

use candle_core::Tensor;

use super::{
    NoiseSource, Scheduler, StepOptions, StepOutput, TimestepRequest,
    alphas::Limit,
    basics, check_index,
    config::{FinalSigmas, PredictionType, config, option_error},
    dpm_solver::{Algorithm, Multistep, Solver, check_order},
    edm::{Edm, SigmaSchedule},
    exponential::{History, Level},
    flow::Precision,
    levels::add_noise,
    numeric,
    registry::FromConfig,
    spacing, tensors,
};
use crate::Result;

config! {
    /// Options of `EDMDPMSolverMultistepScheduler`.
    EdmDpmSolverMultistepConfig {
        sigma_min: f64 = 0.002,
        sigma_max: f64 = 80.0,
        sigma_data: f64 = 0.5,
        sigma_schedule: SigmaSchedule = SigmaSchedule::Karras,
        num_train_timesteps: usize = 1000,
        prediction_type: PredictionType = PredictionType::Epsilon,
        rho: f64 = 7.0,
        solver_order: usize = 2,
        thresholding: bool = false,
        dynamic_thresholding_ratio: f64 = 0.995,
        sample_max_value: f64 = 1.0,
        algorithm_type: Algorithm = Algorithm::DpmSolverPlusPlus,
        solver_type: Solver = Solver::Midpoint,
        lower_order_final: bool = true,
        euler_at_final: bool = false,
        final_sigmas_type: FinalSigmas = FinalSigmas::Zero,
    }
}

/// `EDMDPMSolverMultistepScheduler`.
pub(super) struct EdmDpmSolverMultistep {
    config: EdmDpmSolverMultistepConfig,
    edm: Edm,
    limit: Limit,
    timesteps: Vec<f64>,
    sigmas: Vec<f32>,
    run: Multistep,
}

impl FromConfig for EdmDpmSolverMultistep {
    const CLASS: &'static str = "EDMDPMSolverMultistepScheduler";
    type Config = EdmDpmSolverMultistepConfig;

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
        let algorithm = config.algorithm_type;
        if !algorithm.predicts_original() {
            let reason = "choose `dpmsolver++` or `sde-dpmsolver++`";
            return Err(option_error(Self::CLASS, "algorithm_type", reason));
        }
        check_order(Self::CLASS, config.solver_order, if algorithm.is_stochastic() { 2 } else { 3 })?;
        let run = Multistep {
            algorithm,
            solver: config.solver_type,
            order: config.solver_order,
            lower_order_final: config.lower_order_final,
            first_order_last: config.euler_at_final || config.final_sigmas_type == FinalSigmas::Zero,
            history: History::default(),
        };
        let (ratio, max) = (config.dynamic_thresholding_ratio, config.sample_max_value);
        let limit = Limit::chosen(config.thresholding, ratio, max, false, 0.0);
        Ok(Self { config, edm, limit, timesteps: Vec::new(), sigmas: Vec::new(), run })
    }
}

impl Scheduler for EdmDpmSolverMultistep {
    basics!(sigmas);

    fn set_timesteps(&mut self, request: &TimestepRequest) -> Result<()> {
        spacing::refuse_custom(Self::CLASS, request, false, false)?;
        spacing::check_steps(Self::CLASS, request, self.config.num_train_timesteps)?;
        let ramp: Vec<f64> = numeric::linspace_f32(0.0, 1.0, request.steps).into_iter().map(f64::from).collect();
        self.sigmas = self.edm.sigmas(&ramp, Precision::Single);
        self.timesteps = self.sigmas.iter().map(|&sigma| Edm::timestep(sigma)).collect();
        self.sigmas.push(match self.config.final_sigmas_type {
            FinalSigmas::Zero => 0.0,
            FinalSigmas::SigmaMin => self.config.sigma_min as f32,
        });
        self.run.history.clear();
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
        noise: &mut NoiseSource<'_>,
        _options: &StepOptions,
    ) -> Result<StepOutput> {
        check_index(index, &self.timesteps)?;
        let (output, sample) = (tensors::single(model_output)?, tensors::single(sample)?);
        let denoised = self.limit.apply(self.edm.denoised(&output, &sample, self.sigmas[index])?)?;
        let fresh = if self.config.algorithm_type.is_stochastic() {
            Some(tensors::single(&noise(model_output.dims(), model_output.dtype())?)?)
        } else {
            None
        };
        let sigmas = &self.sigmas;
        // Levels are given to the model scaled, so the sample's own signal factor is 1.
        let level = |i: usize| Level::of(1.0, sigmas[i]);
        let position = (index, self.timesteps.len());
        let moved = self.run.step(denoised.clone(), &sample, position, level, fresh.as_ref())?;
        StepOutput::new(&moved, Some(&denoised), model_output)
    }

    fn add_noise(&self, original: &Tensor, noise: &Tensor, index: usize) -> Result<Tensor> {
        check_index(index, &self.timesteps)?;
        add_noise(original, noise, self.sigmas[index])
    }
}
