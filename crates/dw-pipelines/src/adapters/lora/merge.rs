//! Adds the changes of LoRA files to the weights of one component.
//!
//! Every change is computed against the base weight, so that their order does not matter, in f32, and the sum is
//! rounded once to the type of the base. The base tensors are not touched.

use std::collections::{BTreeMap, HashMap};

use candle_core::{DType, Tensor};
use rayon::prelude::*;

use super::{Plan, change::Change};
use crate::{Result, request::Context, weights::Weights};

/// A file's changes to one component, and how strongly they act.
pub(crate) struct Strengthened<'a> {
    pub(crate) plan: Plan<'a>,
    pub(crate) strength: f64,
}

/// All changes to one tensor of a component.
struct Job<'a> {
    tensor: String,
    is_bias: bool,
    changes: Vec<(&'a Change, f64)>,
}

/// `weights` with the changes of all files: the changed tensors, by name.
pub(crate) fn merge(
    weights: &Weights,
    files: &[Strengthened<'_>],
    context: Context<'_>,
) -> Result<HashMap<String, Tensor>> {
    let jobs = jobs(files);
    let run = |job: &Job<'_>| -> Result<Option<(String, Tensor)>> {
        context.cancel.check()?;
        let Some(base) = weights.find(&job.tensor)? else { return Ok(None) };
        Ok(Some((job.tensor.clone(), job.apply(&base)?)))
    };
    // A GPU does one thing after the other, however many threads ask.
    let merged: Result<Vec<_>> =
        if weights.device().is_cpu() { jobs.par_iter().map(run).collect() } else { jobs.iter().map(run).collect() };
    Ok(merged?.into_iter().flatten().collect())
}

fn jobs<'a>(files: &[Strengthened<'a>]) -> Vec<Job<'a>> {
    let mut jobs: BTreeMap<(&str, bool), Vec<(&'a Change, f64)>> = BTreeMap::new();
    for file in files {
        for (path, change) in &file.plan.changes {
            if change.has_weight() {
                jobs.entry((path, false)).or_default().push((change, file.strength));
            }
            if change.bias().is_some() {
                jobs.entry((path, true)).or_default().push((change, file.strength));
            }
        }
    }
    jobs.into_iter()
        .map(|((path, is_bias), changes)| {
            let tensor = format!("{path}.{}", if is_bias { "bias" } else { "weight" });
            Job { tensor, is_bias, changes }
        })
        .collect()
}

impl Job<'_> {
    /// The changed tensor, of the type, shape and device of `base`.
    fn apply(&self, base: &Tensor) -> Result<Tensor> {
        let wide = base.to_dtype(DType::F32)?;
        let mut sum = wide.clone();
        for (change, strength) in &self.changes {
            let delta = if self.is_bias {
                let shift = |bias: &Tensor| -> Result<Tensor> {
                    let bias = bias.to_device(base.device())?.to_dtype(DType::F32)?;
                    Ok(bias.affine(*strength, 0.0)?.reshape(base.shape())?)
                };
                change.bias().map(shift).transpose()?
            } else {
                change.delta(&wide, *strength)?
            };
            if let Some(delta) = delta {
                sum = (sum + delta)?;
            }
        }
        Ok(sum.to_dtype(base.dtype())?)
    }
}
