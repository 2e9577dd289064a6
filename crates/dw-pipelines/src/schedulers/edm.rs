//! The EDM formulation (Karras et al. 2022): preconditioning around the model and its own noise levels.

use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    config::{PredictionType, option_error},
    flow::Precision,
    tensors,
};
use crate::Result;

/// The curve of the noise levels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum SigmaSchedule {
    /// Powers with `rho` (equation 5).
    Karras,
    /// Evenly spaced logarithms.
    Exponential,
}

/// Noise levels and preconditioning of an EDM model.
#[derive(Clone, Copy, Debug)]
pub(super) struct Edm {
    pub(super) sigma_min: f64,
    pub(super) sigma_max: f64,
    pub(super) sigma_data: f64,
    pub(super) schedule: SigmaSchedule,
    pub(super) rho: f64,
    pub(super) prediction: PredictionType,
}

impl Edm {
    /// Refuses options that give no numbers.
    pub(super) fn check(&self, class: &'static str) -> Result<()> {
        self.prediction.one_of(class, &[PredictionType::Epsilon, PredictionType::VPrediction])?;
        for (key, value) in [
            ("sigma_min", self.sigma_min),
            ("sigma_max", self.sigma_max),
            ("sigma_data", self.sigma_data),
            ("rho", self.rho),
        ] {
            if !(value.is_finite() && value > 0.0) {
                return Err(option_error(class, key, "must be a number above 0"));
            }
        }
        Ok(())
    }

    /// The levels at ramp values from 0 (most noise) to 1.
    pub(super) fn sigmas(&self, ramp: &[f64], precision: Precision) -> Vec<f32> {
        match self.schedule {
            SigmaSchedule::Karras => {
                let (low, high) = (self.sigma_min.powf(1.0 / self.rho), self.sigma_max.powf(1.0 / self.rho));
                let root =
                    |x: f64| precision.round(precision.round(x * precision.round(low - high)) + precision.round(high));
                ramp.iter().map(|&x| root(x).powf(self.rho) as f32).collect()
            }
            SigmaSchedule::Exponential => {
                let (low, high) = (self.sigma_min.ln(), self.sigma_max.ln());
                super::numeric::linspace_f32(low, high, ramp.len()).into_iter().rev().map(f32::exp).collect()
            }
        }
    }

    /// What the model is told about a level: a quarter of its logarithm.
    pub(super) fn timestep(sigma: f32) -> f64 {
        f64::from(0.25 * sigma.ln())
    }

    /// The standard deviation of the first latents.
    pub(super) fn initial_sigma(&self) -> f64 {
        (self.sigma_max * self.sigma_max + 1.0).sqrt()
    }

    /// Latents at unit variance.
    pub(super) fn scale_input(&self, sample: &Tensor, sigma: f32) -> Result<Tensor> {
        let scaled = tensors::scale(&tensors::single(sample)?, 1.0 / self.power(sigma).sqrt())?;
        tensors::like(&scaled, sample)
    }

    /// The clean sample that a model output implies. All f32.
    pub(super) fn denoised(&self, output: &Tensor, sample: &Tensor, sigma: f32) -> Result<Tensor> {
        let data = self.sigma_data as f32;
        let skip = (self.sigma_data * self.sigma_data) as f32 / self.power(sigma);
        let out = sigma * data / self.power(sigma).sqrt();
        let out = if self.prediction == PredictionType::VPrediction { -out } else { out };
        tensors::combine(&[(skip, sample), (out, output)])
    }

    fn power(&self, sigma: f32) -> f32 {
        sigma * sigma + (self.sigma_data * self.sigma_data) as f32
    }
}
