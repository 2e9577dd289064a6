//! Which timesteps and noise levels a run visits: even spacings of the training schedule, and the curves
//! that sigmas can be put on instead (Karras et al. 2022 and others).

use super::{
    TimestepRequest,
    config::{TimestepSpacing, at_most_one, request_error},
    numeric,
};
use crate::Result;

/// Refuses runs without steps and runs with more steps than the model was trained with.
pub(super) fn check_steps(class: &str, request: &TimestepRequest, num_train_timesteps: usize) -> Result<()> {
    if request.steps == 0 {
        return Err(request_error("num_inference_steps", "must be at least 1"));
    }
    if request.steps > num_train_timesteps {
        let reason = format!(
            "{} steps, but `{class}` knows {num_train_timesteps} training timesteps - ask for at most {num_train_timesteps}",
            request.steps
        );
        return Err(request_error("num_inference_steps", reason));
    }
    Ok(())
}

/// Refuses custom schedules for classes that compute their own.
pub(super) fn refuse_custom(class: &str, request: &TimestepRequest, timesteps: bool, sigmas: bool) -> Result<()> {
    for (name, given, taken) in
        [("timesteps", request.timesteps.is_some(), timesteps), ("sigmas", request.sigmas.is_some(), sigmas)]
    {
        if given && !taken {
            return Err(request_error(
                name,
                format!("`{class}` computes its own {name} - remove `{name}` or use another scheduler"),
            ));
        }
    }
    if request.timesteps.is_some() && request.sigmas.is_some() && !class.starts_with("FlowMatch") {
        return Err(request_error("timesteps", "cannot be combined with `sigmas` - give one of the two"));
    }
    for (name, values) in [("timesteps", &request.timesteps), ("sigmas", &request.sigmas)] {
        if let Some(values) = values
            && (values.is_empty() || values.iter().any(|value| !value.is_finite()))
        {
            return Err(request_error(name, "must be a list of at least one finite number"));
        }
    }
    Ok(())
}

/// Falling timesteps over the whole training schedule, both ends within reach: `linspace` is not rounded.
pub(super) fn timesteps(spacing: TimestepSpacing, train: usize, steps: usize, offset: i64) -> Vec<f64> {
    match spacing {
        TimestepSpacing::Linspace => {
            let mut values = numeric::linspace(0.0, (train - 1) as f64, steps);
            values.reverse();
            values
        }
        TimestepSpacing::Leading => {
            let ratio = train / steps;
            (0..steps).rev().map(|i| (i * ratio) as f64 + offset as f64).collect()
        }
        TimestepSpacing::Trailing => trailing(train as f64, train as f64 / steps as f64),
    }
}

/// Timesteps counted down from `last` in fractional steps, rounded, minus one.
pub(super) fn trailing(last: f64, step: f64) -> Vec<f64> {
    numeric::arange_down(last, step).into_iter().map(|t| t.round_ties_even() - 1.0).collect()
}

/// [`timesteps`] with `linspace` rounded too, for samplers that look alphas up by timestep.
pub(super) fn whole_timesteps(spacing: TimestepSpacing, train: usize, steps: usize, offset: i64) -> Vec<f64> {
    timesteps(spacing, train, steps, offset).into_iter().map(f64::round_ties_even).collect()
}

/// Refuses timesteps outside the training schedule, where tables have no entry.
pub(super) fn check_within(timesteps: &[f64], num_train_timesteps: usize) -> Result<()> {
    match timesteps.iter().find(|&&t| t < 0.0 || t >= num_train_timesteps as f64) {
        None => Ok(()),
        Some(t) => Err(request_error(
            "timesteps",
            format!(
                "timestep {t} is outside the training schedule of {num_train_timesteps} - check `steps_offset` and custom timesteps"
            ),
        )),
    }
}

/// Custom whole timesteps, each below the one before.
pub(super) fn falling(timesteps: &[f64]) -> Result<Vec<f64>> {
    if timesteps.windows(2).any(|pair| pair[1] >= pair[0]) {
        return Err(request_error("timesteps", "must fall from one to the next"));
    }
    Ok(timesteps.iter().map(|timestep| timestep.trunc()).collect())
}

/// Rounds timesteps to whole ones.
pub(super) fn round(timesteps: &mut [f64]) {
    for timestep in timesteps {
        *timestep = timestep.round_ties_even();
    }
}

/// The curve that sigmas are put on between the ends of the schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SigmaCurve {
    /// Powers with rho 7 (Karras et al. 2022, equation 5).
    Karras,
    /// Evenly spaced logarithms.
    Exponential,
    /// Quantiles of a beta(0.6, 0.6) distribution (Lee et al. 2024).
    Beta,
}

impl SigmaCurve {
    /// The one that a configuration's three switches choose.
    pub(super) fn chosen(karras: bool, exponential: bool, beta: bool) -> Option<Self> {
        match (karras, exponential, beta) {
            (true, _, _) => Some(Self::Karras),
            (_, true, _) => Some(Self::Exponential),
            (_, _, true) => Some(Self::Beta),
            _ => None,
        }
    }

    /// So many sigmas falling from `max` to `min`.
    pub(super) fn sigmas(self, max: f64, min: f64, count: usize) -> Vec<f64> {
        match self {
            Self::Karras => karras(max, min, count, 7.0),
            Self::Exponential => numeric::linspace(max.ln(), min.ln(), count).into_iter().map(f64::exp).collect(),
            Self::Beta => numeric::linspace(0.0, 1.0, count)
                .into_iter()
                .map(|x| min + numeric::beta_quantile(1.0 - x, 0.6, 0.6) * (max - min))
                .collect(),
        }
    }
}

/// Evenly spaced `rho`-th roots.
pub(super) fn karras(max: f64, min: f64, count: usize, rho: f64) -> Vec<f64> {
    let (low, high) = (min.powf(1.0 / rho), max.powf(1.0 / rho));
    numeric::linspace(0.0, 1.0, count).into_iter().map(|x| (high + x * (low - high)).powf(rho)).collect()
}

/// Refuses configurations that choose two curves.
pub(super) fn one_curve(class: &str, karras: bool, exponential: bool, beta: bool) -> Result<()> {
    at_most_one(
        class,
        &[("use_karras_sigmas", karras), ("use_exponential_sigmas", exponential), ("use_beta_sigmas", beta)],
    )
}

/// The numbers as f32 holds them.
pub(super) fn rounded_to_single(values: &[f64]) -> Vec<f64> {
    values.iter().map(|&value| f64::from(value as f32)).collect()
}
