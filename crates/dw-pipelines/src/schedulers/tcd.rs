//! Trajectory consistency distillation (Zheng et al. 2024): like LCM, but each step lands part of the way
//! down and adds noise up from there; `eta` (the paper's gamma) says how far.

use candle_core::Tensor;

use super::{
    NoiseSource, Scheduler, StepOptions, StepOutput, TimestepRequest,
    alphas::{self, Alphas},
    basics, check_index, config,
    lcm::ConsistencyConfig,
    registry::FromConfig,
    tensors,
};
use crate::Result;

const DEFAULT_GAMMA: f64 = 0.3;

/// `TCDScheduler`.
pub(super) struct Tcd {
    config: ConsistencyConfig,
    alphas: Alphas,
    timesteps: Vec<f64>,
}

impl FromConfig for Tcd {
    const CLASS: &'static str = "TCDScheduler";
    type Config = ConsistencyConfig;

    fn from_config(config: Self::Config) -> Result<Self> {
        let alphas = config.alphas(Self::CLASS)?;
        Ok(Self { config, alphas, timesteps: Vec::new() })
    }
}

impl Scheduler for Tcd {
    basics!();

    fn set_timesteps(&mut self, request: &TimestepRequest) -> Result<()> {
        let candidates = if request.original_inference_steps.is_some() {
            (0..(self.config.num_train_timesteps as f64 * request.strength) as usize).collect()
        } else {
            self.config.distilled(self.config.original_inference_steps, request.strength)?
        };
        self.timesteps = self.config.timesteps(Self::CLASS, request, &candidates)?;
        Ok(())
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
        let gamma = options.eta.unwrap_or(DEFAULT_GAMMA);
        if !(0.0..=1.0).contains(&gamma) {
            return Err(config::request_error("eta", "must lie between 0 and 1 for `TCDScheduler`"));
        }
        let next = self.timesteps.get(index + 1).copied();
        let landing = f64::from(((1.0 - gamma) as f32 * next.unwrap_or(0.0) as f32).floor());
        let (alpha, landed) = (self.alphas.at(self.timesteps[index]), self.alphas.at(landing));
        let (output, sample) = (tensors::single(model_output)?, tensors::single(sample)?);
        let original = alphas::original(self.config.prediction_type, &output, &sample, alpha)?;
        let epsilon = alphas::epsilon(self.config.prediction_type, &output, &sample, alpha)?;
        let noised = tensors::combine(&[(landed.sqrt(), &original), ((1.0 - landed).sqrt(), &epsilon)])?;
        let moved = match next {
            Some(next) if gamma > 0.0 => {
                let kept = self.alphas.at(next) / landed;
                let fresh = tensors::single(&noise(model_output.dims(), model_output.dtype())?)?;
                tensors::combine(&[(kept.sqrt(), &noised), ((1.0 - kept).sqrt(), &fresh)])?
            }
            _ => noised,
        };
        StepOutput::new(&moved, Some(&original), model_output)
    }

    fn add_noise(&self, original: &Tensor, noise: &Tensor, index: usize) -> Result<Tensor> {
        check_index(index, &self.timesteps)?;
        self.alphas.add_noise(original, noise, self.timesteps[index])
    }

    fn accepts_timesteps(&self) -> bool {
        true
    }

    fn uses_eta(&self) -> bool {
        true
    }
}
