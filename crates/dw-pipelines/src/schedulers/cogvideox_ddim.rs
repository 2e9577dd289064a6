//! DDIM as CogVideoX runs it: the signal-to-noise ratio of the training schedule is shifted down for
//! video, tables are in double precision, and no noise is added (reference
//! `scheduling_ddim_cogvideox.py`).

use candle_core::Tensor;

use super::{
    NoiseSource, Scheduler, StepOptions, StepOutput, TimestepRequest, basics,
    betas::{BetaSchedule, beta_options},
    check_index,
    config::{PredictionType, TimestepSpacing, config},
    numeric,
    registry::FromConfig,
    spacing, tensors,
};
use crate::Result;

config! {
    /// Options of `CogVideoXDDIMScheduler`.
    CogVideoXDdimConfig {
        num_train_timesteps: usize = 1000,
        beta_start: f64 = 0.00085,
        beta_end: f64 = 0.012,
        beta_schedule: BetaSchedule = BetaSchedule::ScaledLinear,
        trained_betas: Option<Vec<f64>> = None,
        clip_sample: bool = true,
        set_alpha_to_one: bool = true,
        steps_offset: i64 = 0,
        prediction_type: PredictionType = PredictionType::Epsilon,
        clip_sample_range: f64 = 1.0,
        sample_max_value: f64 = 1.0,
        timestep_spacing: TimestepSpacing = TimestepSpacing::Leading,
        rescale_betas_zero_snr: bool = false,
        snr_shift_scale: f64 = 3.0,
    }
}

/// `CogVideoXDDIMScheduler`.
pub(super) struct CogVideoXDdim {
    config: CogVideoXDdimConfig,
    alphas_cumprod: Vec<f64>,
    timesteps: Vec<f64>,
    /// Training timesteps from one step to the next.
    stride: usize,
}

impl CogVideoXDdim {
    fn alpha(&self, timestep: f64) -> f64 {
        match (timestep < 0.0, self.config.set_alpha_to_one) {
            (true, true) => 1.0,
            (true, false) => self.alphas_cumprod[0],
            (false, _) => self.alphas_cumprod[timestep as usize],
        }
    }
}

/// The double-precision tables of a configuration.
fn alphas_cumprod(config: &CogVideoXDdimConfig) -> Result<Vec<f64>> {
    let options = beta_options!(CogVideoXDdim::CLASS, config, false);
    let single = options.betas()?;
    let betas: Vec<f64> = if config.beta_schedule == BetaSchedule::ScaledLinear && config.trained_betas.is_none() {
        let (start, end) = (config.beta_start.sqrt(), config.beta_end.sqrt());
        numeric::linspace(start, end, config.num_train_timesteps).into_iter().map(|root| root * root).collect()
    } else {
        single.into_iter().map(f64::from).collect()
    };
    let shift = config.snr_shift_scale;
    let mut product = 1.0;
    let mut alphas: Vec<f64> = betas
        .into_iter()
        .map(|beta| {
            product *= 1.0 - beta;
            product / (shift + (1.0 - shift) * product)
        })
        .collect();
    if config.rescale_betas_zero_snr {
        let (first, last) = (alphas[0].sqrt(), alphas[alphas.len() - 1].sqrt());
        for alpha in &mut alphas {
            *alpha = ((alpha.sqrt() - last) * (first / (first - last))).powi(2);
        }
    }
    Ok(alphas)
}

impl FromConfig for CogVideoXDdim {
    const CLASS: &'static str = "CogVideoXDDIMScheduler";
    type Config = CogVideoXDdimConfig;

    fn from_config(config: Self::Config) -> Result<Self> {
        use PredictionType::{Epsilon, Sample, VPrediction};
        config.prediction_type.one_of(Self::CLASS, &[Epsilon, Sample, VPrediction])?;
        let alphas_cumprod = alphas_cumprod(&config)?;
        Ok(Self { config, alphas_cumprod, timesteps: Vec::new(), stride: 1 })
    }
}

impl Scheduler for CogVideoXDdim {
    basics!();

    fn set_timesteps(&mut self, request: &TimestepRequest) -> Result<()> {
        spacing::refuse_custom(Self::CLASS, request, false, false)?;
        let (train, offset) = (self.config.num_train_timesteps, self.config.steps_offset);
        spacing::check_steps(Self::CLASS, request, train)?;
        self.timesteps = spacing::whole_timesteps(self.config.timestep_spacing, train, request.steps, offset);
        self.stride = train / request.steps;
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
        let timestep = self.timesteps[index];
        let (alpha, next) = (self.alpha(timestep), self.alpha(timestep - self.stride as f64));
        let (output, sample) = (tensors::single(model_output)?, tensors::single(sample)?);
        let (signal, noise) = (alpha.sqrt() as f32, (1.0 - alpha).sqrt() as f32);
        let original = match self.config.prediction_type {
            PredictionType::Sample => output,
            PredictionType::VPrediction => tensors::combine(&[(signal, &sample), (-noise, &output)])?,
            PredictionType::Epsilon | PredictionType::FlowPrediction => {
                tensors::divide(&tensors::combine(&[(1.0, &sample), (-noise, &output)])?, signal)?
            }
        };
        let a = ((1.0 - next) / (1.0 - alpha)).sqrt();
        let b = next.sqrt() - alpha.sqrt() * a;
        let moved = tensors::combine(&[(a as f32, &sample), (b as f32, &original)])?;
        StepOutput::new(&moved, Some(&original), model_output)
    }

    fn add_noise(&self, original: &Tensor, noise: &Tensor, index: usize) -> Result<Tensor> {
        check_index(index, &self.timesteps)?;
        let alpha = self.alpha(self.timesteps[index]) as f32;
        let terms = [(alpha.sqrt(), &tensors::single(original)?), ((1.0 - alpha).sqrt(), &tensors::single(noise)?)];
        tensors::like(&tensors::combine(&terms)?, original)
    }
}
