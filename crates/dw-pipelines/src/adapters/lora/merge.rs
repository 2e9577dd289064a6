//! Adds the changes of LoRA files to the weights of one component.
//!
//! Every change is computed against the base weight, so that their order does not matter, in f32, and the sum is
//! rounded once to the type of the base. The base tensors are not touched. Plain low-rank changes, which most files
//! consist of, are added in one pass without the full matrix of the change.

use std::collections::{BTreeMap, HashMap};

use candle_core::{DType, Tensor};
use dw_kernels::add_products;
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
        let Some(base) = weights.find(&job.tensor) else { return Ok(None) };
        Ok(Some((job.tensor.clone(), job.apply(base)?)))
    };
    // A GPU does one thing after the other, however many threads ask.
    let merged: Result<Vec<_>> =
        if weights.device().is_cpu() { jobs.par_iter().map(run).collect() } else { jobs.iter().map(run).collect() };
    Ok(merged?.into_iter().flatten().collect())
}

fn jobs<'a>(files: &'a [Strengthened<'_>]) -> Vec<Job<'a>> {
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
    /// The changed tensor, of the type and device of `base`, and of its shape but where a change brings more inputs.
    fn apply(&self, base: &Tensor) -> Result<Tensor> {
        if self.is_bias {
            return self.apply_to_bias(base);
        }
        let inputs = base.dims().get(1).copied().unwrap_or(1);
        let is_wide =
            |change: &Change| base.rank() == 2 && change.extent().is_some_and(|(_, columns)| columns > inputs);
        let (wide, narrow): (Vec<_>, Vec<_>) = self.changes.iter().partition(|(change, _)| is_wide(change));
        let mut changed = added(base, &narrow)?;
        let columns = wide.iter().filter_map(|(change, _)| Some(change.extent()?.1)).max().unwrap_or(inputs);
        if columns > inputs {
            // What the new inputs are multiplied with is the change alone.
            changed = changed.pad_with_zeros(1, 0, columns - inputs)?.contiguous()?;
        }
        added(&changed, &wide)
    }

    fn apply_to_bias(&self, base: &Tensor) -> Result<Tensor> {
        let wide = base.to_dtype(DType::F32)?;
        let mut sum = wide.clone();
        for (change, strength) in &self.changes {
            if let Some(shift) = change.shift(&wide, *strength)? {
                sum = (sum + shift)?;
            }
        }
        Ok(sum.to_dtype(base.dtype())?)
    }
}

/// A weight with the changes.
fn added(base: &Tensor, changes: &[(&Change, f64)]) -> Result<Tensor> {
    if changes.is_empty() {
        return Ok(base.clone());
    }
    let thin = changes.iter().map(|(change, strength)| change.thin_product(*strength));
    if let Some(products) = thin.collect::<Option<Vec<_>>>() {
        return Ok(add_products(base, &products)?);
    }
    let wide = base.to_dtype(DType::F32)?;
    let mut sum = wide.clone();
    for (change, strength) in changes {
        if let Some(delta) = change.delta(&wide, *strength)? {
            sum = (sum + delta)?;
        }
    }
    Ok(sum.to_dtype(base.dtype())?)
}
