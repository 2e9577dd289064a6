//! Heun's method on a rectified flow: an Euler step, then the same step with the mean of the slopes at
//! both ends. Two model calls for each step but the last.

use candle_core::Tensor;

use super::{
    NoiseSource, Scheduler, StepOptions, StepOutput, TimestepRequest, basics, check_index,
    config::{config, option_error},
    flow::Precision,
    flow_match_euler_discrete::{check_shift, ends, mix},
    levels::doubled,
    numeric,
    registry::FromConfig,
    spacing, tensors,
};
use crate::Result;

config! {
    /// Options of `FlowMatchHeunDiscreteScheduler`.
    FlowMatchHeunDiscreteConfig {
        num_train_timesteps: usize = 1000,
        shift: f64 = 1.0,
    }
}

/// What the first half of a step leaves for the second.
struct FirstHalf {
    derivative: Tensor,
    dt: f32,
    sample: Tensor,
}

/// `FlowMatchHeunDiscreteScheduler`.
pub(super) struct FlowMatchHeunDiscrete {
    config: FlowMatchHeunDiscreteConfig,
    timesteps: Vec<f64>,
    sigmas: Vec<f32>,
    first_half: Option<FirstHalf>,
}

impl FromConfig for FlowMatchHeunDiscrete {
    const CLASS: &'static str = "FlowMatchHeunDiscreteScheduler";
    type Config = FlowMatchHeunDiscreteConfig;

    fn from_config(config: Self::Config) -> Result<Self> {
        check_shift(Self::CLASS, config.shift)?;
        if config.num_train_timesteps == 0 {
            return Err(option_error(Self::CLASS, "num_train_timesteps", "must be at least 1"));
        }
        Ok(Self { config, timesteps: Vec::new(), sigmas: Vec::new(), first_half: None })
    }
}

impl Scheduler for FlowMatchHeunDiscrete {
    basics!(sigmas);

    fn set_timesteps(&mut self, request: &TimestepRequest) -> Result<()> {
        spacing::refuse_custom(Self::CLASS, request, false, false)?;
        spacing::check_steps(Self::CLASS, request, self.config.num_train_timesteps)?;
        let (shift, train) = (self.config.shift, self.config.num_train_timesteps as f64);
        // The ends carry the shift already and are shifted again, as in the reference.
        let (min, max) = ends(self.config.num_train_timesteps, shift);
        let sigmas: Vec<f32> = numeric::linspace(f64::from(max) * train, f64::from(min) * train, request.steps)
            .into_iter()
            .map(|timestep| Precision::Double.shifted(timestep / train, shift) as f32)
            .collect();
        let timesteps: Vec<f64> = sigmas.iter().map(|sigma| f64::from(sigma * train as f32)).collect();
        self.timesteps = doubled(&timesteps);
        self.sigmas = doubled(&sigmas);
        self.sigmas.push(0.0);
        self.first_half = None;
        Ok(())
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
        let original = tensors::combine(&[(1.0, &sample), (-sigma, &output)])?;
        let derivative = tensors::derivative(&sample, &original, sigma)?;
        let moved = match self.first_half.take() {
            None => {
                let dt = self.sigmas[index + 1] - sigma;
                let moved = tensors::combine(&[(1.0, &sample), (dt, &derivative)])?;
                self.first_half = Some(FirstHalf { derivative, dt, sample });
                moved
            }
            Some(first) => {
                let mean = tensors::scale(&(&first.derivative + &derivative)?, 0.5)?;
                tensors::combine(&[(1.0, &first.sample), (first.dt, &mean)])?
            }
        };
        StepOutput::new(&moved, Some(&original), model_output)
    }

    fn add_noise(&self, original: &Tensor, noise: &Tensor, index: usize) -> Result<Tensor> {
        check_index(index, &self.timesteps)?;
        mix(original, noise, self.sigmas[index])
    }

    fn order(&self) -> usize {
        2
    }
}
