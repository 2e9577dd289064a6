//! Euler's method on a rectified flow, with the reference's `FlowMatchEulerDiscreteScheduler` schedule:
//! what SD3, Flux and their descendants use.

use candle_core::{DType, Tensor};

use super::{
    NoiseSource, Scheduler, StepOptions, StepOutput, TimestepRequest, basics, check_index,
    config::{self, config, option_error},
    flow::{Precision, TimeShift},
    numeric,
    registry::FromConfig,
    spacing::{self, SigmaCurve},
    tensors,
};
use crate::Result;

config! {
    /// Options of `FlowMatchEulerDiscreteScheduler`.
    FlowMatchEulerDiscreteConfig {
        num_train_timesteps: usize = 1000,
        shift: f64 = 1.0,
        use_dynamic_shifting: bool = false,
        base_shift: Option<f64> = Some(0.5),
        max_shift: Option<f64> = Some(1.15),
        base_image_seq_len: usize = 256,
        max_image_seq_len: usize = 4096,
        invert_sigmas: bool = false,
        shift_terminal: Option<f64> = None,
        use_karras_sigmas: bool = false,
        use_exponential_sigmas: bool = false,
        use_beta_sigmas: bool = false,
        time_shift_type: TimeShift = TimeShift::Exponential,
        stochastic_sampling: bool = false,
    }
}

/// `FlowMatchEulerDiscreteScheduler`.
pub(super) struct FlowMatchEulerDiscrete {
    /// What messages call it.
    class: &'static str,
    config: FlowMatchEulerDiscreteConfig,
    /// Both ends of the training schedule, shifted by the shift of the configuration.
    sigma_min: f32,
    sigma_max: f32,
    timesteps: Vec<f64>,
    sigmas: Vec<f32>,
}

/// Refuses shifts that turn times around.
pub(super) fn check_shift(class: &str, shift: f64) -> Result<()> {
    if shift.is_finite() && shift > 0.0 {
        return Ok(());
    }
    Err(option_error(class, "shift", "must be a number above 0; 1 leaves the schedule as it is"))
}

/// The first and last time of the training schedule: the last is one training timestep above 0. Shifted
/// in single precision.
pub(super) fn ends(num_train_timesteps: usize, shift: f64) -> (f32, f32) {
    let last = Precision::Single.round(1.0 / num_train_timesteps as f64);
    (Precision::Single.shifted(last, shift) as f32, Precision::Single.shifted(1.0, shift) as f32)
}

impl FlowMatchEulerDiscrete {
    /// The sampler as another `class` runs it.
    pub(super) fn of(class: &'static str, config: FlowMatchEulerDiscreteConfig) -> Result<Self> {
        check_shift(class, config.shift)?;
        spacing::one_curve(class, config.use_karras_sigmas, config.use_exponential_sigmas, config.use_beta_sigmas)?;
        if config.num_train_timesteps == 0 {
            return Err(option_error(class, "num_train_timesteps", "must be at least 1"));
        }
        let shift = if config.use_dynamic_shifting { 1.0 } else { config.shift };
        let (sigma_min, sigma_max) = ends(config.num_train_timesteps, shift);
        Ok(Self { class, config, sigma_min, sigma_max, timesteps: Vec::new(), sigmas: Vec::new() })
    }

    /// The times of a run before any shift, and the precision the reference has them in.
    fn unshifted(&self, request: &TimestepRequest) -> Result<(Vec<f64>, Precision)> {
        let train = self.config.num_train_timesteps as f64;
        let single = |value: f64| Precision::Single.round(value);
        match (&request.sigmas, &request.timesteps) {
            (Some(sigmas), Some(timesteps)) if sigmas.len() != timesteps.len() => {
                let reason = format!(
                    "{} entries, but `sigmas` has {} - give lists of one length",
                    timesteps.len(),
                    sigmas.len()
                );
                Err(config::request_error("timesteps", reason))
            }
            (Some(sigmas), _) => Ok((sigmas.iter().map(|&sigma| single(sigma)).collect(), Precision::Single)),
            (None, Some(timesteps)) => {
                let sigmas = timesteps.iter().map(|&timestep| single(single(timestep) / train)).collect();
                Ok((sigmas, Precision::Single))
            }
            (None, None) if request.steps == 0 => {
                Err(config::request_error("num_inference_steps", "must be at least 1"))
            }
            (None, None) => {
                // The ends carry the static shift already and are shifted again below, as in the reference.
                let (first, last) = (f64::from(self.sigma_max) * train, f64::from(self.sigma_min) * train);
                let timesteps = numeric::linspace(first, last, request.steps);
                Ok((timesteps.into_iter().map(|timestep| timestep / train).collect(), Precision::Double))
            }
        }
    }

    /// The noise levels of a run, falling from noise, without the final one.
    fn schedule(&self, request: &TimestepRequest) -> Result<Vec<f64>> {
        let config = &self.config;
        let (times, precision) = self.unshifted(request)?;
        let mut sigmas: Vec<f64> = match (config.use_dynamic_shifting, request.mu) {
            (true, None) => {
                let reason = "must be given, because this scheduler has `use_dynamic_shifting`";
                return Err(config::request_error("mu", reason));
            }
            (true, Some(mu)) => {
                times.iter().map(|&time| precision.time_shifted(time, config.time_shift_type, mu)).collect()
            }
            (false, _) => times.iter().map(|&time| precision.shifted(time, config.shift)).collect(),
        };
        if let Some(terminal) = config.shift_terminal.filter(|&terminal| terminal != 0.0) {
            sigmas = precision.stretched(&sigmas, terminal);
        }
        let curve = SigmaCurve::chosen(config.use_karras_sigmas, config.use_exponential_sigmas, config.use_beta_sigmas);
        Ok(match curve {
            Some(curve) => curve.sigmas(sigmas[0], sigmas[sigmas.len() - 1], sigmas.len()),
            None => sigmas,
        })
    }
}

impl FromConfig for FlowMatchEulerDiscrete {
    const CLASS: &'static str = "FlowMatchEulerDiscreteScheduler";
    type Config = FlowMatchEulerDiscreteConfig;

    fn from_config(config: Self::Config) -> Result<Self> {
        Self::of(Self::CLASS, config)
    }
}

impl Scheduler for FlowMatchEulerDiscrete {
    basics!(sigmas);

    fn set_timesteps(&mut self, request: &TimestepRequest) -> Result<()> {
        spacing::refuse_custom(self.class, request, true, true)?;
        let mut sigmas: Vec<f32> = self.schedule(request)?.into_iter().map(|sigma| sigma as f32).collect();
        let train = self.config.num_train_timesteps as f32;
        if self.config.invert_sigmas {
            for sigma in &mut sigmas {
                *sigma = 1.0 - *sigma;
            }
        }
        self.timesteps = match &request.timesteps {
            Some(timesteps) if !self.config.invert_sigmas => spacing::rounded_to_single(timesteps),
            _ => sigmas.iter().map(|sigma| f64::from(sigma * train)).collect(),
        };
        sigmas.push(if self.config.invert_sigmas { 1.0 } else { 0.0 });
        self.sigmas = sigmas;
        Ok(())
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
        let (sigma, next) = (self.sigmas[index], self.sigmas[index + 1]);
        let (output, sample) = (tensors::single(model_output)?, tensors::single(sample)?);
        let original = tensors::combine(&[(1.0, &sample), (-sigma, &output)])?;
        let moved = if self.config.stochastic_sampling {
            let fresh = noise(sample.dims(), DType::F32)?;
            tensors::combine(&[(1.0 - next, &original), (next, &fresh)])?
        } else {
            tensors::combine(&[(1.0, &sample), (next - sigma, &output)])?
        };
        StepOutput::new(&moved, Some(&original), model_output)
    }

    fn add_noise(&self, original: &Tensor, noise: &Tensor, index: usize) -> Result<Tensor> {
        check_index(index, &self.timesteps)?;
        mix(original, noise, self.sigmas[index])
    }

    fn set_shift(&mut self, shift: f64) -> Result<()> {
        check_shift(self.class, shift)?;
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

/// The point of the flow between clean latents and noise at time `sigma`.
pub(super) fn mix(original: &Tensor, noise: &Tensor, sigma: f32) -> Result<Tensor> {
    let terms = [(sigma, &tensors::single(noise)?), (1.0 - sigma, &tensors::single(original)?)];
    tensors::like(&tensors::combine(&terms)?, original)
}
