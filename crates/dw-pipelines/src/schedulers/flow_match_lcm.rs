//! Latent consistency models on a rectified flow: at each step to the clean sample and back with fresh noise, on the
//! schedule of `FlowMatchEulerDiscreteScheduler`.

use candle_core::Tensor;
use serde_json::{Map, Value};

use super::{
    NoiseSource, Scheduler, StepOptions, StepOutput, TimestepRequest,
    config::{self, config, option_error},
    flow::TimeShift,
    flow_match_euler_discrete::FlowMatchEulerDiscrete,
    registry::FromConfig,
};
use crate::Result;

config! {
    /// Options of `FlowMatchLCMScheduler`.
    FlowMatchLcmConfig {
        num_train_timesteps: usize = 1000,
        shift: f64 = 1.0,
        use_dynamic_shifting: bool = false,
        base_shift: f64 = 0.5,
        max_shift: f64 = 1.15,
        base_image_seq_len: usize = 256,
        max_image_seq_len: usize = 4096,
        invert_sigmas: bool = false,
        shift_terminal: Option<f64> = None,
        use_karras_sigmas: bool = false,
        use_exponential_sigmas: bool = false,
        use_beta_sigmas: bool = false,
        time_shift_type: TimeShift = TimeShift::Exponential,
        scale_factors: Option<Vec<f64>> = None,
        upscale_mode: Option<String> = Some("bicubic".into()),
    }
}

/// `FlowMatchLCMScheduler`.
pub(super) struct FlowMatchLcm {
    config: FlowMatchLcmConfig,
    /// Euler's sampler with fresh noise, which takes the same steps.
    steps: FlowMatchEulerDiscrete,
}

impl FromConfig for FlowMatchLcm {
    const CLASS: &'static str = "FlowMatchLCMScheduler";
    type Config = FlowMatchLcmConfig;

    fn from_config(config: Self::Config) -> Result<Self> {
        if config.scale_factors.as_ref().is_some_and(|factors| !factors.is_empty()) {
            let reason = "lets pictures grow from step to step, which is not possible here - remove it";
            return Err(option_error(Self::CLASS, "scale_factors", reason));
        }
        let mut shared = config::to_map(Self::CLASS, &config);
        shared.insert("stochastic_sampling".into(), true.into());
        let steps = FlowMatchEulerDiscrete::of(Self::CLASS, config::read(Self::CLASS, &shared)?)?;
        Ok(Self { config, steps })
    }
}

impl Scheduler for FlowMatchLcm {
    fn class(&self) -> &'static str {
        Self::CLASS
    }

    fn config_json(&self) -> Map<String, Value> {
        config::to_map(Self::CLASS, &self.config)
    }

    fn timesteps(&self) -> &[f64] {
        self.steps.timesteps()
    }

    fn num_train_timesteps(&self) -> usize {
        self.config.num_train_timesteps
    }

    fn sigmas(&self) -> Option<&[f32]> {
        self.steps.sigmas()
    }

    fn set_timesteps(&mut self, request: &TimestepRequest) -> Result<()> {
        self.steps.set_timesteps(request)
    }

    fn step(
        &mut self,
        model_output: &Tensor,
        index: usize,
        sample: &Tensor,
        noise: &mut NoiseSource<'_>,
        options: &StepOptions,
    ) -> Result<StepOutput> {
        self.steps.step(model_output, index, sample, noise, options)
    }

    fn add_noise(&self, original: &Tensor, noise: &Tensor, index: usize) -> Result<Tensor> {
        self.steps.add_noise(original, noise, index)
    }

    fn set_shift(&mut self, shift: f64) -> Result<()> {
        self.steps.set_shift(shift)?;
        self.config.shift = shift;
        Ok(())
    }

    fn accepts_timesteps(&self) -> bool {
        true
    }

    fn accepts_sigmas(&self) -> bool {
        true
    }
}
