//! The update formulas of DPM-Solver and DPM-Solver++ (Lu et al. 2022a, 2022b), deterministic and
//! stochastic, orders 1 to 3. Multistep and singlestep samplers differ only in which levels and outputs
//! they put in.

use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    config::option_error,
    exponential::{History, Level},
    tensors,
};
use crate::Result;

/// What is integrated: the noise or the clean sample, as an ODE or an SDE.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub(super) enum Algorithm {
    /// The noise (DPM-Solver).
    #[serde(rename = "dpmsolver")]
    DpmSolver,
    /// The clean sample (DPM-Solver++). `deis`, from another class's configuration, counts as this.
    #[serde(rename = "dpmsolver++", alias = "deis")]
    DpmSolverPlusPlus,
    /// The noise, with fresh noise at each step.
    #[serde(rename = "sde-dpmsolver")]
    SdeDpmSolver,
    /// The clean sample, with fresh noise at each step.
    #[serde(rename = "sde-dpmsolver++")]
    SdeDpmSolverPlusPlus,
}

impl Algorithm {
    /// Whether model outputs are turned into clean samples (else into noise).
    pub(super) fn predicts_original(self) -> bool {
        matches!(self, Self::DpmSolverPlusPlus | Self::SdeDpmSolverPlusPlus)
    }

    /// Whether each step draws noise.
    pub(super) fn is_stochastic(self) -> bool {
        matches!(self, Self::SdeDpmSolver | Self::SdeDpmSolverPlusPlus)
    }
}

/// Which second-order formula is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum Solver {
    /// The difference quotient counts half. Names of other classes' solvers count as this.
    #[serde(alias = "logrho", alias = "bh1", alias = "bh2")]
    Midpoint,
    /// The difference quotient is integrated.
    Heun,
}

/// Refuses orders without a formula.
pub(super) fn check_order(class: &'static str, order: usize, max: usize) -> Result<()> {
    if (1..=max).contains(&order) {
        return Ok(());
    }
    Err(option_error(class, "solver_order", &format!("`{order}` is not possible here - choose 1 to {max}")))
}

/// Factors of the sample, of the outputs' zeroth, first and second differences, and of fresh noise.
#[derive(Clone, Copy, Debug)]
pub(super) struct Update {
    pub(super) sample: f32,
    pub(super) d0: f32,
    pub(super) d1: f32,
    pub(super) d2: f32,
    pub(super) noise: f32,
}

impl Update {
    /// From level `from`, whose outputs the differences are taken at, to level `to`.
    pub(super) fn new(algorithm: Algorithm, solver: Solver, from: Level, to: Level) -> Self {
        let h = to.lambda - from.lambda;
        let midpoint = solver == Solver::Midpoint;
        match algorithm {
            Algorithm::DpmSolverPlusPlus => {
                let e = (-h).exp() - 1.0;
                let d1 = if midpoint { -0.5 * (to.alpha * e) } else { to.alpha * (e / h + 1.0) };
                let d2 = -to.alpha * ((e + h) / (h * h) - 0.5);
                Self { sample: to.sigma / from.sigma, d0: -(to.alpha * e), d1, d2, noise: 0.0 }
            }
            Algorithm::DpmSolver => {
                let e = h.exp() - 1.0;
                let d1 = if midpoint { -0.5 * (to.sigma * e) } else { -to.sigma * (e / h - 1.0) };
                let d2 = -to.sigma * ((e - h) / (h * h) - 0.5);
                Self { sample: to.alpha / from.alpha, d0: -(to.sigma * e), d1, d2, noise: 0.0 }
            }
            Algorithm::SdeDpmSolverPlusPlus => {
                let q = 1.0 - (-2.0 * h).exp();
                let d1 = if midpoint { 0.5 * (to.alpha * q) } else { to.alpha * (q / (-2.0 * h) + 1.0) };
                let d2 = to.alpha * ((q - 2.0 * h) / (2.0 * h * (2.0 * h)) - 0.5);
                let noise = to.sigma * q.sqrt();
                Self { sample: to.sigma / from.sigma * (-h).exp(), d0: to.alpha * q, d1, d2, noise }
            }
            Algorithm::SdeDpmSolver => {
                let e = h.exp() - 1.0;
                let d1 = if midpoint { -(to.sigma * e) } else { -2.0 * (to.sigma * (e / h - 1.0)) };
                let noise = to.sigma * ((2.0 * h).exp() - 1.0).sqrt();
                Self { sample: to.alpha / from.alpha, d0: -2.0 * (to.sigma * e), d1, d2: 0.0, noise }
            }
        }
    }

    /// The sample at the new level. All f32; `noise` is given for stochastic algorithms only.
    pub(super) fn apply(&self, sample: &Tensor, differences: &[Tensor], noise: Option<&Tensor>) -> Result<Tensor> {
        let mut terms = vec![(self.sample, sample)];
        terms.extend([self.d0, self.d1, self.d2].into_iter().zip(differences));
        terms.extend(noise.map(|noise| (self.noise, noise)));
        tensors::combine(&terms)
    }
}

/// `1 / ratio * (a - b)`: a difference quotient.
pub(super) fn quotient(a: &Tensor, b: &Tensor, ratio: f32) -> Result<Tensor> {
    tensors::scale(&(a - b)?, 1.0 / ratio)
}

/// Differences of the last two outputs (latest first) of a multistep run, on the grid `to`, `s0`, `s1`.
pub(super) fn second_differences(outputs: [&Tensor; 2], to: Level, s0: Level, s1: Level) -> Result<Vec<Tensor>> {
    let ratio = (s0.lambda - s1.lambda) / (to.lambda - s0.lambda);
    Ok(vec![outputs[0].clone(), quotient(outputs[0], outputs[1], ratio)?])
}

/// Differences of the last three outputs (latest first) of a multistep run.
pub(super) fn third_differences(outputs: [&Tensor; 3], to: Level, from: [Level; 3]) -> Result<Vec<Tensor>> {
    let h = to.lambda - from[0].lambda;
    let (r0, r1) = ((from[0].lambda - from[1].lambda) / h, (from[1].lambda - from[2].lambda) / h);
    let newer = quotient(outputs[0], outputs[1], r0)?;
    let older = quotient(outputs[1], outputs[2], r1)?;
    let change = (&newer - older)?;
    let first = tensors::combine(&[(1.0, &newer), (r0 / (r0 + r1), &change)])?;
    Ok(vec![outputs[0].clone(), first, tensors::scale(&change, 1.0 / (r0 + r1))?])
}

/// The state of a multistep run: which order each step has and the outputs before it.
pub(super) struct Multistep {
    pub(super) algorithm: Algorithm,
    pub(super) solver: Solver,
    pub(super) order: usize,
    /// Short runs end with steps of lower order.
    pub(super) lower_order_final: bool,
    /// The last step is of first order, because of `euler_at_final` or because it ends at no noise.
    pub(super) first_order_last: bool,
    /// Clean samples or noises, whichever the algorithm integrates; f32.
    pub(super) history: History,
}

/// Runs shorter than this end with steps of lower order.
const SHORT_RUN: usize = 15;

impl Multistep {
    fn order_at(&self, index: usize, steps: usize) -> usize {
        let short = self.lower_order_final && steps < SHORT_RUN;
        let left = steps - index;
        let order = if left == 1 && (self.first_order_last || short) {
            1
        } else if left == 2 && short {
            2
        } else {
            self.order
        };
        order.min(self.order).min(self.history.len())
    }

    /// One step from `index` of `steps`. `level` gives the levels of the run by index, the final one
    /// included. All f32.
    pub(super) fn step(
        &mut self,
        output: Tensor,
        sample: &Tensor,
        (index, steps): (usize, usize),
        level: impl Fn(usize) -> Level,
        noise: Option<&Tensor>,
    ) -> Result<Tensor> {
        self.history.push(output, self.order);
        let outputs = &self.history;
        let (to, from) = (level(index + 1), level(index));
        let (solver, differences) = match self.order_at(index, steps) {
            1 => (self.solver, vec![outputs.ago(0).clone()]),
            2 => (self.solver, second_differences([outputs.ago(0), outputs.ago(1)], to, from, level(index - 1))?),
            // There is one third-order formula; its first difference counts as in Heun's.
            _ => {
                let levels = [from, level(index - 1), level(index - 2)];
                (Solver::Heun, third_differences([outputs.ago(0), outputs.ago(1), outputs.ago(2)], to, levels)?)
            }
        };
        Update::new(self.algorithm, solver, from, to).apply(sample, &differences, noise)
    }
}
