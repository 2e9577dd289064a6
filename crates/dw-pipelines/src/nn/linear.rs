//! The one linear layer.
//!
//! [`Weights::linear`] is the only place where one is made, so storage formats and adapters are added here and
//! no model changes.

use candle_core::{D, Tensor};

use crate::{
    Result,
    quant::Weight,
    weights::{Branch, Weights, paging::Layer},
};

/// `y = x Wᵀ + b` over the last dimension, and what adapters add beside it.
#[derive(Clone, Debug)]
pub struct Linear(Layer<Parameters>);

/// A linear layer on its device.
#[derive(Clone, Debug)]
struct Parameters {
    /// `(out, in)`.
    weight: Weight,
    /// `(out,)`.
    bias: Option<Tensor>,
    /// Adapters that are not merged into the weight.
    branches: Vec<Branch>,
}

impl Linear {
    /// `(…, in)` to `(…, out)`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.0.get()?.forward(x)
    }
}

impl Parameters {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
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
        self.expect((outputs, inputs), weight)?;
        bias.map_or(Ok(()), |name| self.expect(outputs, name))?;
        let parameters = [weight, bias.unwrap_or(weight)];
        let (weight, bias) = (weight.to_owned(), bias.map(str::to_owned));
        let build = move |weights: &Self| {
            Ok(Parameters {
                weight: weights.take((outputs, inputs), &weight)?,
                bias: bias.as_deref().map(|name| weights.get(outputs, name)).transpose()?,
                branches: weights.branches(&weight).to_vec(),
            })
        };
        Ok(Linear(self.layer(&parameters[..=usize::from(parameters[0] != parameters[1])], build)?))
    }
}
