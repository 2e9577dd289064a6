//! The diffusion a model was trained with: betas and the cumulative alphas made of them (Ho et al. 2020).
//!
//! All tables are f32, computed as torch does: products accumulate in f64 and are rounded at each entry.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{config::option_error, numeric};
use crate::Result;

/// How the betas of the training schedule run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum BetaSchedule {
    /// Evenly spaced.
    Linear,
    /// Evenly spaced square roots: what latent diffusion models use.
    ScaledLinear,
    /// From a squared cosine of the cumulative alphas.
    SquaredcosCapV2,
    /// Along a sigmoid (DDPM only).
    Sigmoid,
    /// From a Laplace distribution of the noise levels (DDPM only).
    Laplace,
    /// From exponentially falling cumulative alphas (Heun only).
    Exp,
}

/// What the betas are computed from.
pub(super) struct BetaOptions<'a> {
    pub(super) class: &'static str,
    pub(super) num_train_timesteps: usize,
    pub(super) beta_start: f64,
    pub(super) beta_end: f64,
    pub(super) beta_schedule: BetaSchedule,
    pub(super) trained_betas: Option<&'a [f64]>,
    pub(super) rescale_betas_zero_snr: bool,
}

/// Collects [`BetaOptions`] from a config struct that has the six fields.
macro_rules! beta_options {
    ($class:expr, $config:expr) => {
        $crate::schedulers::betas::beta_options!($class, $config, $config.rescale_betas_zero_snr)
    };
    ($class:expr, $config:expr, $rescale:expr) => {
        $crate::schedulers::betas::BetaOptions {
            class: $class,
            num_train_timesteps: $config.num_train_timesteps,
            beta_start: $config.beta_start,
            beta_end: $config.beta_end,
            beta_schedule: $config.beta_schedule,
            trained_betas: $config.trained_betas.as_deref(),
            rescale_betas_zero_snr: $rescale,
        }
    };
}
pub(super) use beta_options;

impl BetaOptions<'_> {
    /// The betas, one for each training timestep.
    pub(super) fn betas(&self) -> Result<Vec<f32>> {
        self.check()?;
        let mut betas = match self.trained_betas {
            Some(trained) => trained.iter().map(|&beta| beta as f32).collect(),
            None => self.computed(),
        };
        if self.rescale_betas_zero_snr {
            betas = rescale_zero_terminal_snr(&betas);
        }
        Ok(betas)
    }

    /// The cumulative products of (1 - beta), f32.
    pub(super) fn alphas_cumprod(&self) -> Result<Vec<f32>> {
        Ok(cumulative_alphas(&self.betas()?))
    }

    /// [`alphas_cumprod`](Self::alphas_cumprod) for samplers that divide by them: with zero terminal SNR
    /// the last one is the smallest half-precision number instead of 0.
    pub(super) fn positive_alphas_cumprod(&self) -> Result<Vec<f32>> {
        let mut alphas = self.alphas_cumprod()?;
        if self.rescale_betas_zero_snr
            && let Some(last) = alphas.last_mut()
        {
            *last = 2.0_f32.powi(-24);
        }
        Ok(alphas)
    }

    fn check(&self) -> Result<()> {
        if self.num_train_timesteps < 2 {
            return Err(option_error(
                self.class,
                "num_train_timesteps",
                "must be at least 2; models are trained with 1000",
            ));
        }
        let only = match self.beta_schedule {
            BetaSchedule::Sigmoid | BetaSchedule::Laplace => Some("DDPMScheduler"),
            BetaSchedule::Exp => Some("HeunDiscreteScheduler"),
            _ => None,
        };
        if only.is_some_and(|class| class != self.class) {
            let reason =
                "choose `linear`, `scaled_linear` or `squaredcos_cap_v2`; other schedules are not for this class";
            return Err(option_error(self.class, "beta_schedule", reason));
        }
        let betas = [self.beta_start, self.beta_end];
        let given = self.trained_betas.unwrap_or(&betas);
        if given.iter().any(|beta| !(0.0..1.0).contains(beta)) {
            let key = if self.trained_betas.is_some() { "trained_betas" } else { "beta_start" };
            return Err(option_error(self.class, key, "betas must be at least 0 and below 1"));
        }
        if given.len() != self.num_train_timesteps && self.trained_betas.is_some() {
            let reason = format!(
                "has {} entries but `num_train_timesteps` is {} - give one beta for each training timestep",
                given.len(),
                self.num_train_timesteps
            );
            return Err(option_error(self.class, "trained_betas", &reason));
        }
        Ok(())
    }

    fn computed(&self) -> Vec<f32> {
        let count = self.num_train_timesteps;
        match self.beta_schedule {
            BetaSchedule::Linear => numeric::linspace_f32(self.beta_start, self.beta_end, count),
            BetaSchedule::ScaledLinear => numeric::linspace_f32(self.beta_start.sqrt(), self.beta_end.sqrt(), count)
                .into_iter()
                .map(|root| root * root)
                .collect(),
            BetaSchedule::SquaredcosCapV2 => {
                from_alpha_bar(count, |t| ((t + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2).cos().powi(2))
            }
            BetaSchedule::Laplace => from_alpha_bar(count, laplace_alpha_bar),
            BetaSchedule::Exp => from_alpha_bar(count, |t| (t * -12.0).exp()),
            BetaSchedule::Sigmoid => numeric::linspace_f32(-6.0, 6.0, count)
                .into_iter()
                .map(|x| 1.0 / (1.0 + (-x).exp()) * (self.beta_end - self.beta_start) as f32 + self.beta_start as f32)
                .collect(),
        }
    }
}

/// Betas of a cumulative alpha given as a function of time in 0 to 1 (Nichol and Dhariwal 2021).
fn from_alpha_bar(count: usize, alpha_bar: impl Fn(f64) -> f64) -> Vec<f32> {
    const MAX_BETA: f64 = 0.999;
    let at = |i: usize| alpha_bar(i as f64 / count as f64);
    (0..count).map(|i| (1.0 - at(i + 1) / at(i)).min(MAX_BETA) as f32).collect()
}

fn laplace_alpha_bar(t: f64) -> f64 {
    let from_middle = 0.5 - t;
    let log_snr = -0.5 * 1.0_f64.copysign(from_middle) * (1.0 - 2.0 * from_middle.abs() + 1e-6).ln();
    let snr = log_snr.exp();
    (snr / (1.0 + snr)).sqrt()
}

/// `torch.cumprod(1 - betas)`.
pub(super) fn cumulative_alphas(betas: &[f32]) -> Vec<f32> {
    let mut product = 1.0_f64;
    betas
        .iter()
        .map(|beta| {
            product *= f64::from(1.0 - beta);
            product as f32
        })
        .collect()
}

/// Moves the schedule so that the last timestep is pure noise (Lin et al. 2024, algorithm 1).
fn rescale_zero_terminal_snr(betas: &[f32]) -> Vec<f32> {
    let roots: Vec<f32> = cumulative_alphas(betas).into_iter().map(f32::sqrt).collect();
    let (first, last) = (roots[0], roots[roots.len() - 1]);
    let scale = first / (first - last);
    let alphas_bar: Vec<f32> = roots.into_iter().map(|root| (root - last) * scale).map(|root| root * root).collect();
    let ratios = alphas_bar.windows(2).map(|pair| pair[1] / pair[0]);
    std::iter::once(alphas_bar[0]).chain(ratios).map(|alpha| 1.0 - alpha).collect()
}

/// The noise level of each training timestep in the variance-exploding form: sqrt((1 - alpha) / alpha).
pub(super) fn sigmas_of(alphas_cumprod: &[f32]) -> Vec<f32> {
    alphas_cumprod.iter().map(|alpha| ((1.0 - alpha) / alpha).sqrt()).collect()
}
