//! Skipping most of a transformer in steps in which it would hardly say anything new.
//!
//! Owns the two rules that tell such steps and the memory they need. Where a model asks them stands in the model.

use candle_core::{DType, Tensor};

use crate::Result;

/// A rule that tells which steps may be skipped.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Reuse {
    /// Steps in which what the first block adds has changed by at most this part of itself since a step was last
    /// computed (diffusers `FirstBlockCache`). The first block is always computed.
    FirstBlock {
        /// The part, from 0.
        threshold: f64,
    },
    /// Steps up to which the input of the first block has changed by less than this, by a polynomial of the part it
    /// changes by in each step (Liu et al. 2024, arXiv:2411.19108). The first and last step are always computed.
    Tea {
        /// The sum of changes from which on a step is computed.
        threshold: f64,
        /// Of the polynomial, highest degree first.
        coefficients: [f64; 5],
    },
}

impl Reuse {
    /// The polynomial fitted to FLUX.1 (TeaCache's `TeaCache4FLUX`).
    pub const FLUX: [f64; 5] = [498.651_651, -283.781_631, 55.855_438_2, -3.820_214_01, 0.264_230_861];

    /// The change itself, for models to which nothing was fitted.
    pub const UNFITTED: [f64; 5] = [0.0, 0.0, 0.0, 1.0, 0.0];
}

/// What is remembered of earlier steps. Every prompt of a call has its own.
#[derive(Clone, Debug)]
pub struct Memory {
    rule: Reuse,
    /// What the rule looks at, when it was last kept.
    signal: Option<Tensor>,
    /// What the skipped part adds, as of the last step that was computed.
    residual: Option<Tensor>,
    /// The changes since then, added up.
    changed: f64,
    /// How many steps were skipped.
    pub skipped: usize,
    /// How many steps there were.
    pub steps: usize,
}

impl Memory {
    /// Nothing remembered yet.
    pub fn new(rule: Reuse) -> Self {
        Self { rule, signal: None, residual: None, changed: 0.0, skipped: 0, steps: 0 }
    }

    /// The rule that is followed.
    pub fn rule(&self) -> Reuse {
        self.rule
    }

    /// What the skipped part is to be taken for in a step with this signal; none when it has to be computed. The first
    /// and last step of a call are its `edge`s.
    pub(crate) fn recalled(&mut self, signal: Tensor, is_edge: bool) -> Result<Option<Tensor>> {
        self.steps += 1;
        let change = match &self.signal {
            Some(before) => Some(relative_change(&signal, before)?),
            None => None,
        };
        let is_skipped = match (self.rule, change) {
            (_, None) => false,
            (Reuse::FirstBlock { threshold }, Some(change)) => change <= threshold,
            (Reuse::Tea { threshold, coefficients }, Some(change)) => {
                self.changed += coefficients.iter().fold(0.0, |sum, factor| sum * change + factor);
                !is_edge && self.changed < threshold
            }
        };
        let recalled = self.residual.clone().filter(|_| is_skipped);
        if recalled.is_some() {
            self.skipped += 1;
        } else {
            self.changed = 0.0;
        }
        // The first rule compares with the last computed step, the second with the last step.
        if recalled.is_none() || matches!(self.rule, Reuse::Tea { .. }) {
            self.signal = Some(signal);
        }
        Ok(recalled)
    }

    /// Keeps what the part added in a step that was computed.
    pub(crate) fn keep(&mut self, residual: Tensor) {
        self.residual = Some(residual);
    }
}

/// The mean size of a change as a part of what it was before.
fn relative_change(now: &Tensor, before: &Tensor) -> Result<f64> {
    let mean =
        |x: &Tensor| -> Result<f64> { Ok(f64::from(x.abs()?.to_dtype(DType::F32)?.mean_all()?.to_scalar::<f32>()?)) };
    Ok(mean(&(now - before)?)? / mean(before)?)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn number(value: f32) -> Tensor {
        Tensor::new(&[value], &Device::Cpu).expect("a number")
    }

    /// Which of the steps with these signals are skipped.
    fn skipped(rule: Reuse, signals: &[f32]) -> Vec<bool> {
        let mut memory = Memory::new(rule);
        let step = |(i, &signal): (usize, &f32)| {
            let is_edge = i == 0 || i + 1 == signals.len();
            let recalled = memory.recalled(number(signal), is_edge).expect("numbers");
            if recalled.is_none() {
                memory.keep(number(signal));
            }
            recalled.is_some()
        };
        signals.iter().enumerate().map(step).collect()
    }

    #[test]
    fn the_first_block_is_compared_with_that_of_the_last_computed_step() {
        let rule = Reuse::FirstBlock { threshold: 0.1 };
        assert_eq!(skipped(rule, &[1.0, 1.05, 1.09, 1.15, 1.2]), [false, true, true, false, true]);
        assert_eq!(skipped(Reuse::FirstBlock { threshold: 0.0 }, &[1.0, 1.01, 1.02]), [false; 3]);
    }

    #[test]
    fn changes_add_up_until_a_step_is_computed_and_edges_always_are() {
        // The polynomial is the change itself.
        let rule = Reuse::Tea { threshold: 0.25, coefficients: [0.0, 0.0, 0.0, 1.0, 0.0] };
        let signals = [1.0, 1.1, 1.2, 1.3, 1.4, 1.4];
        assert_eq!(skipped(rule, &signals), [false, true, true, false, true, false]);
    }
}
