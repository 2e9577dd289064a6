//! The tensor arithmetic that samplers share: everything in f32, the result in the model output's type.

use candle_core::{DType, Tensor};

use super::config::PredictionType;
use crate::Result;

/// The tensor as f32.
pub(super) fn single(tensor: &Tensor) -> Result<Tensor> {
    Ok(tensor.to_dtype(DType::F32)?)
}

/// The tensor in the type of another.
pub(super) fn like(tensor: &Tensor, other: &Tensor) -> Result<Tensor> {
    Ok(tensor.to_dtype(other.dtype())?)
}

/// The tensor times a number.
pub(super) fn scale(tensor: &Tensor, factor: f32) -> Result<Tensor> {
    Ok(tensor.affine(f64::from(factor), 0.0)?)
}

/// The f32 tensor divided by a number, rounded once (a product with the reciprocal rounds twice).
pub(super) fn divide(tensor: &Tensor, divisor: f32) -> Result<Tensor> {
    let divisor = Tensor::new(divisor, tensor.device())?;
    Ok(tensor.broadcast_div(&divisor)?)
}

/// The sum of tensors with a factor each, from left to right. At least one term; f32.
pub(super) fn combine(terms: &[(f32, &Tensor)]) -> Result<Tensor> {
    let (factor, tensor) = terms[0];
    let mut sum = scale(tensor, factor)?;
    for (factor, tensor) in &terms[1..] {
        sum = (sum + scale(tensor, *factor)?)?;
    }
    Ok(sum)
}

/// The clean sample behind `sample` at noise level `sigma` of the variance-exploding form. All f32.
pub(super) fn denoised(prediction: PredictionType, output: &Tensor, sample: &Tensor, sigma: f32) -> Result<Tensor> {
    match prediction {
        PredictionType::Epsilon | PredictionType::FlowPrediction => combine(&[(1.0, sample), (-sigma, output)]),
        PredictionType::Sample => Ok(output.clone()),
        PredictionType::VPrediction => {
            let power = sigma * sigma + 1.0;
            combine(&[(-sigma / power.sqrt(), output), (1.0 / power, sample)])
        }
    }
}

/// `sample` moved along the ODE from noise level `sigma`, where `denoised` was found, by `dt`. All f32.
pub(super) fn euler_step(sample: &Tensor, denoised: &Tensor, sigma: f32, dt: f32) -> Result<Tensor> {
    combine(&[(1.0, sample), (dt, &derivative(sample, denoised, sigma)?)])
}

/// The slope of the probability-flow ODE at noise level `sigma` (Karras et al. 2022, equation 3).
pub(super) fn derivative(sample: &Tensor, denoised: &Tensor, sigma: f32) -> Result<Tensor> {
    divide(&(sample - denoised)?, sigma)
}
