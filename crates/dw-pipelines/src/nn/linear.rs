//! The one linear layer.
//!
//! [`Weights::linear`] is the only place where one is made, so storage formats and adapters are added here and
//! no model changes.

use candle_core::{D, Tensor};

use crate::{
    Result,
    weights::{Weights, paging::Layer},
};

/// `y = x Wᵀ + b` over the last dimension.
#[derive(Clone, Debug)]
pub struct Linear(Layer<Dense>);

/// A linear layer on its device.
#[derive(Clone, Debug)]
struct Dense {
    /// `(out, in)`.
    weight: Tensor,
    /// `(out,)`.
    bias: Option<Tensor>,
}

impl Linear {
    /// `(…, in)` to `(…, out)`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.0.get()?.forward(x)
    }
}

impl Dense {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (out, _) = self.weight.dims2()?;
        let mut shape = x.dims().to_vec();
        let rows = x.flatten_to(D::Minus2)?.matmul(&self.weight.t()?)?;
        let rows = match &self.bias {
            Some(bias) => rows.broadcast_add(bias)?,
            None => rows,
        };
        if let Some(last) = shape.last_mut() {
            *last = out;
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
            Ok(Dense {
                weight: weights.get((outputs, inputs), &weight)?,
                bias: bias.as_deref().map(|name| weights.get(outputs, name)).transpose()?,
            })
        };
        Ok(Linear(self.layer(&parameters[..1 + usize::from(parameters[0] != parameters[1])], build)?))
    }
}
