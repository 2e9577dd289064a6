//! Rectified flows: shifting and stretching the times of a run (Esser et al. 2024, section 5.3.2).

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How the dynamic shift `mu` acts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum TimeShift {
    /// The shift is the exponential of `mu`.
    Exponential,
    /// The shift is `mu` itself.
    Linear,
}

/// The precision that a schedule is computed in: the reference computes given sigmas in single precision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Precision {
    /// f32 after every operation.
    Single,
    /// f64.
    Double,
}

impl Precision {
    /// A number as this precision holds it.
    pub(super) fn round(self, value: f64) -> f64 {
        match self {
            Self::Single => f64::from(value as f32),
            Self::Double => value,
        }
    }

    /// Moves a time towards noise by a static shift.
    pub(super) fn shifted(self, time: f64, shift: f64) -> f64 {
        let above = self.round(self.round(shift) * time);
        let below = self.round(1.0 + self.round(self.round(shift - 1.0) * time));
        self.round(above / below)
    }

    /// Moves a time towards noise by a dynamic shift.
    pub(super) fn time_shifted(self, time: f64, kind: TimeShift, mu: f64) -> f64 {
        let shift = match kind {
            TimeShift::Exponential => self.round(mu.exp()),
            TimeShift::Linear => self.round(mu),
        };
        let odds = self.round(self.round(1.0 / time) - 1.0);
        self.round(shift / self.round(shift + odds))
    }

    /// Stretches falling times so that the last becomes `terminal`.
    pub(super) fn stretched(self, times: &[f64], terminal: f64) -> Vec<f64> {
        let Some(last) = times.last() else { return Vec::new() };
        let factor = self.round(self.round(1.0 - last) / self.round(1.0 - terminal));
        times.iter().map(|time| self.round(1.0 - self.round(self.round(1.0 - time) / factor))).collect()
    }
}
