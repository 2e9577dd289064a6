//! Pseudo numerical methods for diffusion models (Liu et al. 2022): Runge-Kutta to start with, unless
//! skipped, then linear multistep over the model outputs. The default of Stable Diffusion 1.

use candle_core::Tensor;

use super::{
    NoiseSource, Scheduler, StepOptions, StepOutput, TimestepRequest,
    alphas::{self, Alphas},
    basics,
    betas::{BetaSchedule, beta_options},
    check_index,
    config::{self, PredictionType, TimestepSpacing, config},
    registry::FromConfig,
    spacing, tensors,
};
use crate::Result;

const ORDER: usize = 4;

config! {
    /// Options of `PNDMScheduler`.
    PndmConfig {
        num_train_timesteps: usize = 1000,
        beta_start: f64 = 0.0001,
        beta_end: f64 = 0.02,
        beta_schedule: BetaSchedule = BetaSchedule::Linear,
        trained_betas: Option<Vec<f64>> = None,
        skip_prk_steps: bool = false,
        set_alpha_to_one: bool = false,
        prediction_type: PredictionType = PredictionType::Epsilon,
        timestep_spacing: TimestepSpacing = TimestepSpacing::Leading,
        steps_offset: i64 = 0,
    }
}

/// `PNDMScheduler`.
pub(super) struct Pndm {
    config: PndmConfig,
    alphas: Alphas,
    timesteps: Vec<f64>,
    /// How many of `timesteps` are Runge-Kutta calls.
    runge_kutta_calls: usize,
    /// Training timesteps from one step to the next.
    stride: usize,
    /// Calls since the run began, wherever it began.
    calls: usize,
    /// Model outputs of the steps before, the latest last; f32.
    outputs: Vec<Tensor>,
    /// Sum of the Runge-Kutta slopes of the current step.
    slopes: Option<Tensor>,
    /// Where the current step began, while more calls for it are due.
    start: Option<Tensor>,
}

impl Pndm {
    /// Equation 9 (the transfer part): from a timestep to another along one estimate of the noise.
    fn transfer(&self, sample: &Tensor, from: f64, to: f64, output: &Tensor) -> Result<Tensor> {
        let (alpha, next) = (self.alphas.at(from), self.alphas.at(to));
        let epsilon = alphas::epsilon(self.config.prediction_type, output, sample, alpha)?;
        let denominator = alpha * (1.0 - next).sqrt() + (alpha * (1.0 - alpha) * next).sqrt();
        tensors::combine(&[((next / alpha).sqrt(), sample), (-(next - alpha) / denominator, &epsilon)])
    }

    /// One of the four calls of a Runge-Kutta step.
    fn runge_kutta(&mut self, output: Tensor, index: usize, sample: &Tensor) -> Result<Tensor> {
        let half = if self.calls.is_multiple_of(2) { self.stride / 2 } else { 0 };
        let to = self.timesteps[index] - half as f64;
        let from = self.timesteps[self.calls / 4 * 4];
        let weight = if matches!(self.calls % 4, 0 | 3) { 1.0 / 6.0 } else { 1.0 / 3.0 };
        let weighted = tensors::scale(&output, weight)?;
        let slopes = match self.slopes.take() {
            Some(slopes) => (slopes + weighted)?,
            None => weighted,
        };
        let used = match self.calls % 4 {
            0 => {
                self.outputs.push(output.clone());
                self.start = Some(sample.clone());
                self.slopes = Some(slopes);
                output
            }
            3 => slopes,
            _ => {
                self.slopes = Some(slopes);
                output
            }
        };
        let start = self.start.clone().unwrap_or_else(|| sample.clone());
        self.transfer(&start, from, to, &used)
    }

    /// A multistep step. The second call of a run repeats the first step with the mean of both slopes.
    fn multistep(&mut self, output: Tensor, index: usize, sample: &Tensor) -> Result<Tensor> {
        let timestep = self.timesteps[index];
        let stride = self.stride as f64;
        if self.calls == 1
            && let Some(start) = self.start.take()
        {
            let first = self.outputs.last().expect("the first call pushed its output");
            let mean = ((&output + first)? / 2.0)?;
            return self.transfer(&start, timestep + stride, timestep, &mean);
        }
        let surplus = self.outputs.len().saturating_sub(ORDER - 1);
        self.outputs.drain(..surplus);
        self.outputs.push(output);
        if self.calls == 0 {
            self.start = Some(sample.clone());
        }
        let slope = self.extrapolated()?;
        self.transfer(sample, timestep, timestep - stride, &slope)
    }

    /// The slope over the next step from the outputs so far (Adams-Bashforth, equation 12).
    fn extrapolated(&self) -> Result<Tensor> {
        let weights: &[f32] = match self.outputs.len() {
            1 => &[1.0],
            2 => &[3.0 / 2.0, -1.0 / 2.0],
            3 => &[23.0 / 12.0, -16.0 / 12.0, 5.0 / 12.0],
            _ => &[55.0 / 24.0, -59.0 / 24.0, 37.0 / 24.0, -9.0 / 24.0],
        };
        let terms: Vec<(f32, &Tensor)> = weights.iter().copied().zip(self.outputs.iter().rev()).collect();
        tensors::combine(&terms)
    }

    /// The timesteps of the Runge-Kutta calls, from the four highest of the run (rising).
    fn runge_kutta_timesteps(&self, rising: &[f64]) -> Vec<f64> {
        let half = (self.stride / 2) as f64;
        let highest = &rising[rising.len() - ORDER..];
        let with_halves: Vec<f64> = highest.iter().flat_map(|&timestep| [timestep, timestep + half]).collect();
        let twice: Vec<f64> = with_halves[..2 * ORDER - 1].iter().flat_map(|&timestep| [timestep; 2]).collect();
        twice[1..twice.len() - 1].iter().rev().copied().collect()
    }
}

impl FromConfig for Pndm {
    const CLASS: &'static str = "PNDMScheduler";
    type Config = PndmConfig;

    fn from_config(config: Self::Config) -> Result<Self> {
        use PredictionType::{Epsilon, VPrediction};
        config.prediction_type.one_of(Self::CLASS, &[Epsilon, VPrediction])?;
        let cumprod = beta_options!(Self::CLASS, config, false).alphas_cumprod()?;
        let alphas = Alphas::new(cumprod, config.set_alpha_to_one);
        let (timesteps, outputs, slopes, start) = (Vec::new(), Vec::new(), None, None);
        Ok(Self { config, alphas, timesteps, runge_kutta_calls: 0, stride: 1, calls: 0, outputs, slopes, start })
    }
}

impl Scheduler for Pndm {
    basics!();

    fn set_timesteps(&mut self, request: &TimestepRequest) -> Result<()> {
        spacing::refuse_custom(Self::CLASS, request, false, false)?;
        let (train, offset) = (self.config.num_train_timesteps, self.config.steps_offset);
        spacing::check_steps(Self::CLASS, request, train)?;
        if !self.config.skip_prk_steps && request.steps < ORDER {
            let reason = "Runge-Kutta start needs at least 4 steps - ask for more or set `skip_prk_steps`";
            return Err(config::request_error("num_inference_steps", reason));
        }
        self.stride = train / request.steps;
        let falling = spacing::whole_timesteps(self.config.timestep_spacing, train, request.steps, offset);
        let mut rising = falling.clone();
        rising.reverse();
        self.timesteps = if self.config.skip_prk_steps {
            // The second timestep comes twice.
            let (first, rest) = falling.split_at(falling.len().min(2));
            let again = first.get(1).copied();
            first.iter().copied().chain(again).chain(rest.iter().copied()).collect()
        } else {
            let later = rising[..rising.len() - 3].iter().rev().copied();
            self.runge_kutta_timesteps(&rising).into_iter().chain(later).collect()
        };
        self.runge_kutta_calls = if self.config.skip_prk_steps { 0 } else { 3 * ORDER };
        (self.calls, self.slopes, self.start) = (0, None, None);
        self.outputs.clear();
        spacing::check_within(&self.timesteps, train)
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
        let moved = if self.calls < self.runge_kutta_calls {
            self.runge_kutta(output, index, &sample)?
        } else {
            self.multistep(output, index, &sample)?
        };
        self.calls += 1;
        StepOutput::new(&moved, None, model_output)
    }

    fn add_noise(&self, original: &Tensor, noise: &Tensor, index: usize) -> Result<Tensor> {
        check_index(index, &self.timesteps)?;
        self.alphas.add_noise(original, noise, self.timesteps[index])
    }
}
