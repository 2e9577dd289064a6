//! The one linear layer.
//!
//! [`Weights::linear`] is the only place where one is made, so storage formats and adapters are added here and
//! no model changes.

use candle_core::{D, Tensor};

use crate::{
    Result,
    quant::Weight,
    weights::{Branch, Weights},
};

/// `y = x Wᵀ + b` over the last dimension, and what adapters add beside it.
#[derive(Clone, Debug)]
pub struct Linear {
    /// `(out, in)`.
    weight: Weight,
    /// `(out,)`.
    bias: Option<Tensor>,
    /// Adapters of a weight that cannot take them into itself.
    branches: Vec<Branch>,
}

impl Linear {
    /// `(…, in)` to `(…, out)`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut shape = x.dims().to_vec();
        let x = x.flatten_to(D::Minus2)?;
        let mut rows = self.weight.product(&x)?;
        for branch in &self.branches {
            rows = (rows + branch.product(&x)?)?;
        }
        if let Some(bias) = &self.bias {
            rows = rows.broadcast_add(bias)?;
        }
        if let Some(last) = shape.last_mut() {
            *last = rows.dim(1)?;
        }
        Ok(rows.reshape(shape)?)
    }
}

impl Weights {
    /// The linear layer at this path: `weight` of shape `(outputs, inputs)` and, with `bias`, `bias`.
    pub fn linear(&self, inputs: usize, outputs: usize, bias: bool) -> Result<Linear> {
        self.linear_named("weight", bias.then_some("bias"), inputs, outputs)
    }

    /// The same for parameters with other names (`in_proj_weight`).
    pub fn linear_named(&self, weight: &str, bias: Option<&str>, inputs: usize, outputs: usize) -> Result<Linear> {
        let branches = self.branches(weight).to_vec();
        let weight = self.take((outputs, inputs), weight)?;
        let bias = bias.map(|name| self.get(outputs, name)).transpose()?;
        Ok(Linear { weight, bias, branches })
    }
}
