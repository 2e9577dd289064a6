//! DPM-Solver++ (SDE): a stochastic second-order method whose noise comes from one Brownian path over the
//! noise levels, so that more steps refine the same picture (k-diffusion's `sample_dpmpp_sde`).

use candle_core::Tensor;

use super::{
    NoiseSource, Scheduler, StepOptions, StepOutput, TimestepRequest, basics,
    betas::{BetaSchedule, beta_options},
    brownian::BrownianPath,
    check_index,
    config::{PredictionType, TimestepSpacing, config},
    levels::{NoiseLevels, add_noise, ancestral, doubled, initial_sigma, scale_input},
    registry::FromConfig,
    spacing::{self, SigmaCurve},
    tensors,
};
use crate::Result;

config! {
    /// Options of `DPMSolverSDEScheduler`.
    DpmSolverSdeConfig {
        num_train_timesteps: usize = 1000,
        beta_start: f64 = 0.00085,
        beta_end: f64 = 0.012,
        beta_schedule: BetaSchedule = BetaSchedule::Linear,
        trained_betas: Option<Vec<f64>> = None,
        prediction_type: PredictionType = PredictionType::Epsilon,
        use_karras_sigmas: bool = false,
        use_exponential_sigmas: bool = false,
        use_beta_sigmas: bool = false,
        noise_sampler_seed: Option<u64> = None,
        timestep_spacing: TimestepSpacing = TimestepSpacing::Linspace,
        steps_offset: i64 = 0,
    }
}

/// What the first half of a step leaves for the second.
struct FirstHalf {
    sample: Tensor,
    middle: f32,
}

/// `DPMSolverSDEScheduler`.
pub(super) struct DpmSolverSde {
    config: DpmSolverSdeConfig,
    levels: NoiseLevels,
    timesteps: Vec<f64>,
    sigmas: Vec<f32>,
    first_half: Option<FirstHalf>,
    path: Option<BrownianPath>,
}

/// The level half way between two in logarithms.
fn middle(sigma: f32, next: f32) -> f32 {
    let (t, t_next) = (-sigma.ln(), -next.ln());
    (-(t + (t_next - t) * 0.5)).exp()
}

impl DpmSolverSde {
    /// The path of the run. Without a seed of its own it takes one from the run's noise.
    fn path(&mut self, sample: &Tensor, noise: &mut NoiseSource<'_>) -> Result<&BrownianPath> {
        if self.path.is_none() {
            let seed = if let Some(seed) = self.config.noise_sampler_seed {
                seed
            } else {
                let draw = noise(sample.dims(), sample.dtype())?.flatten_all()?.get(0)?;
                u64::from(tensors::single(&draw)?.to_scalar::<f32>()?.to_bits())
            };
            let positive = || self.sigmas.iter().copied().filter(|&sigma| sigma > 0.0);
            let (min, max) = (positive().fold(f32::INFINITY, f32::min), positive().fold(0.0, f32::max));
            self.path = Some(BrownianPath::new(f64::from(min), f64::from(max), sample.dims(), seed)?);
        }
        Ok(self.path.as_ref().expect("set above"))
    }

    /// Moves `sample` from `sigma` down past `to` and adds the path's noise up to it. All f32.
    fn ancestral_step(
        &mut self,
        sample: &Tensor,
        original: &Tensor,
        sigma: f32,
        to: f32,
        noise: &mut NoiseSource<'_>,
    ) -> Result<Tensor> {
        let t = -sigma.ln();
        let sigma = (-t).exp();
        let (_, up) = ancestral(sigma, to);
        let up = up.min(to);
        let down = (to * to - up * up).sqrt();
        let down_t = -down.ln();
        // The path runs towards larger sigmas, the step towards smaller ones.
        let fresh = self.path(sample, noise)?.unit_noise(to, sigma)?.neg()?.to_device(sample.device())?;
        let kept = (-down_t).exp() / sigma;
        tensors::combine(&[(kept, sample), (-(t - down_t).exp_m1(), original), (up, &fresh)])
    }
}

impl FromConfig for DpmSolverSde {
    const CLASS: &'static str = "DPMSolverSDEScheduler";
    type Config = DpmSolverSdeConfig;

    fn from_config(config: Self::Config) -> Result<Self> {
        use PredictionType::{Epsilon, VPrediction};
        config.prediction_type.one_of(Self::CLASS, &[Epsilon, VPrediction])?;
        spacing::one_curve(
            Self::CLASS,
            config.use_karras_sigmas,
            config.use_exponential_sigmas,
            config.use_beta_sigmas,
        )?;
        let levels = NoiseLevels::new(&beta_options!(Self::CLASS, config, false).alphas_cumprod()?);
        let (timesteps, sigmas) = (Vec::new(), Vec::new());
        Ok(Self { config, levels, timesteps, sigmas, first_half: None, path: None })
    }
}

impl Scheduler for DpmSolverSde {
    basics!(sigmas);

    fn set_timesteps(&mut self, request: &TimestepRequest) -> Result<()> {
        let config = &self.config;
        spacing::refuse_custom(Self::CLASS, request, false, false)?;
        let train = config.num_train_timesteps;
        spacing::check_steps(Self::CLASS, request, train)?;
        let timesteps = spacing::timesteps(config.timestep_spacing, train, request.steps, config.steps_offset);
        let curve = SigmaCurve::chosen(config.use_karras_sigmas, config.use_exponential_sigmas, config.use_beta_sigmas);
        let (timesteps, sigmas) = self.levels.run(timesteps, curve, None, None);
        let halves = sigmas.windows(2).map(|pair| (f64::midpoint(pair[0].ln(), pair[1].ln())).exp());
        let halves: Vec<f64> = halves.map(|sigma| self.levels.timestep_of(sigma)).collect();
        self.timesteps = doubled(&timesteps);
        for (slot, half) in self.timesteps.iter_mut().skip(1).step_by(2).zip(halves) {
            *slot = half;
        }
        let sigmas: Vec<f32> = sigmas.into_iter().map(|sigma| sigma as f32).collect();
        self.sigmas = doubled(&sigmas);
        self.sigmas.push(0.0);
        (self.first_half, self.path) = (None, None);
        Ok(())
    }

    fn init_noise_sigma(&self) -> f64 {
        initial_sigma(&self.sigmas, self.config.timestep_spacing)
    }

    fn scale_model_input(&mut self, sample: &Tensor, index: usize) -> Result<Tensor> {
        check_index(index, &self.timesteps)?;
        scale_input(sample, self.first_half.as_ref().map_or(self.sigmas[index], |first| first.middle))
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
        let prediction = self.config.prediction_type;
        let (moved, original) = match self.first_half.take() {
            None => {
                let (sigma, next) = (self.sigmas[index], self.sigmas[index + 1]);
                let original = tensors::denoised(prediction, &output, &sample, sigma)?;
                if next == 0.0 {
                    (tensors::euler_step(&sample, &original, sigma, -sigma)?, original)
                } else {
                    let middle = middle(sigma, next);
                    let moved = self.ancestral_step(&sample, &original, sigma, middle, noise)?;
                    self.first_half = Some(FirstHalf { sample, middle });
                    (moved, original)
                }
            }
            Some(first) => {
                let (sigma, next) = (self.sigmas[index - 1], self.sigmas[index]);
                let original = tensors::denoised(prediction, &output, &sample, first.middle)?;
                let to = (next.ln()).exp();
                (self.ancestral_step(&first.sample, &original, sigma, to, noise)?, original)
            }
        };
        StepOutput::new(&moved, Some(&original), model_output)
    }

    fn add_noise(&self, original: &Tensor, noise: &Tensor, index: usize) -> Result<Tensor> {
        check_index(index, &self.timesteps)?;
        add_noise(original, noise, self.sigmas[index])
    }

    fn order(&self) -> usize {
        2
    }
}
