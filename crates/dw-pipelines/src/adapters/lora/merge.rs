//! Adds the changes of LoRA files to the weights of one component.
//!
//! Every change is computed against the base weight, so that their order does not matter, in f32, and the sum is
//! rounded once to the type of the base. The base tensors are not touched. Plain low-rank changes, which most files
//! consist of, are added in one pass without the full matrix of the change. A quantized weight is never changed: its
//! layer gets the changes as branches beside it.

use std::collections::{BTreeMap, HashMap};

use candle_core::{DType, Tensor};
use dw_kernels::add_products;
use rayon::prelude::*;

use super::{Plan, change::Change};
use crate::{
    Result,
    quant::Weight,
    request::Context,
    weights::{Branch, Branches, Weights},
};

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

/// What becomes of the weights of one component.
#[derive(Default)]
pub(crate) struct Merged {
    /// Tensors that replace others, by name.
    pub(crate) tensors: HashMap<String, Tensor>,
    /// Additions beside quantized weights, by the name of the weight.
    pub(crate) branches: Branches,
}

impl Merged {
    /// `weights` with the changes.
    pub(crate) fn put_on(self, weights: &Weights) -> Result<Weights> {
        weights.replacing(self.tensors)?.with_branches(&self.branches)
    }

    /// Bytes of everything that the base does not hold already.
    pub(crate) fn bytes(&self) -> u64 {
        let size = |tensor: &Tensor| (tensor.elem_count() * tensor.dtype().size_in_bytes()) as u64;
        let tensors = self.tensors.values().map(size).sum::<u64>();
        tensors + self.branches.values().flatten().map(Branch::bytes).sum::<u64>()
    }
}

impl From<HashMap<String, Tensor>> for Merged {
    fn from(tensors: HashMap<String, Tensor>) -> Self {
        Self { tensors, branches: Branches::new() }
    }
}

/// What one job comes to.
enum Outcome {
    Replaced(Tensor),
    Beside(Vec<Branch>),
}

/// The changes of all files to `weights`.
pub(crate) fn merge(weights: &Weights, files: &[Strengthened<'_>], context: Context<'_>) -> Result<Merged> {
    let jobs = jobs(files);
    let run = |job: &Job<'_>| -> Result<Option<(String, Outcome)>> {
        context.cancel.check()?;
        let Some(base) = weights.find_weight(&job.tensor)? else { return Ok(None) };
        let outcome = match &base {
            Weight::Quantized(_) if !job.is_wide(&base.dims()) => Outcome::Beside(job.branches(&base)?),
            base => Outcome::Replaced(job.apply(&base.dense(weights.dtype())?)?),
        };
        Ok(Some((job.tensor.clone(), outcome)))
    };
    // A GPU does one thing after the other, however many threads ask.
    let outcomes: Result<Vec<_>> =
        if weights.device().is_cpu() { jobs.par_iter().map(run).collect() } else { jobs.iter().map(run).collect() };
    let mut merged = Merged::default();
    for (name, outcome) in outcomes?.into_iter().flatten() {
        match outcome {
            Outcome::Replaced(tensor) => drop(merged.tensors.insert(name, tensor)),
            Outcome::Beside(branches) => drop(merged.branches.insert(name, branches)),
        }
    }
    Ok(merged)
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
    /// Whether a change brings more inputs than a weight of this shape has.
    fn is_wide(&self, dims: &[usize]) -> bool {
        let is_wide = |change: &Change| change.extent().is_some_and(|(_, columns)| dims.get(1) < Some(&columns));
        self.changes.iter().any(|(change, _)| is_wide(change))
    }

    /// The changes as additions to what the layer computes.
    fn branches(&self, base: &Weight) -> Result<Vec<Branch>> {
        let mut branches = Vec::with_capacity(self.changes.len());
        for (change, strength) in &self.changes {
            if let Some(product) = change.thin_product(*strength) {
                let up = product.left.to_dtype(DType::F32)?.flatten_from(1)?.affine(product.factor, 0.0)?;
                branches.push(Branch::LowRank { down: product.right.flatten_from(1)?, up });
            } else if let Some(delta) = change.delta(&base.dense(DType::F32)?, *strength)? {
                branches.push(Branch::Full(delta));
            }
        }
        Ok(branches)
    }

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
