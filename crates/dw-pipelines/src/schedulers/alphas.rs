//! Samplers in the variance-preserving form look everything up in the cumulative alphas of the training
//! schedule, by whole timesteps: the table and the formulas they share.

use candle_core::Tensor;

use super::{config::PredictionType, tensors};
use crate::Result;

/// Cumulative alphas by training timestep, and the one that stands before the first.
pub(super) struct Alphas {
    cumprod: Vec<f32>,
    before_first: f32,
}

impl Alphas {
    /// With `one_at_end` the last step ends at a clean sample, else at the first training timestep.
    pub(super) fn new(cumprod: Vec<f32>, one_at_end: bool) -> Self {
        let before_first = if one_at_end { 1.0 } else { cumprod[0] };
        Self { cumprod, before_first }
    }

    /// The cumulative alpha of a timestep; negative timesteps lie before the first, too large ones count
    /// as the last.
    pub(super) fn at(&self, timestep: f64) -> f32 {
        let last = self.cumprod.len() - 1;
        if timestep < 0.0 { self.before_first } else { self.cumprod[last.min(timestep as usize)] }
    }

    /// Brings clean latents to the noise of a timestep (Ho et al. 2020, equation 4).
    pub(super) fn add_noise(&self, original: &Tensor, noise: &Tensor, timestep: f64) -> Result<Tensor> {
        let alpha = self.at(timestep);
        let terms = [(alpha.sqrt(), &tensors::single(original)?), ((1.0 - alpha).sqrt(), &tensors::single(noise)?)];
        tensors::like(&tensors::combine(&terms)?, original)
    }
}

/// The clean sample that a model output implies at cumulative alpha `alpha`. All f32.
pub(super) fn original(prediction: PredictionType, output: &Tensor, sample: &Tensor, alpha: f32) -> Result<Tensor> {
    let noise = (1.0 - alpha).sqrt();
    match prediction {
        PredictionType::Sample => Ok(output.clone()),
        PredictionType::VPrediction => tensors::combine(&[(alpha.sqrt(), sample), (-noise, output)]),
        PredictionType::Epsilon | PredictionType::FlowPrediction => {
            tensors::divide(&tensors::combine(&[(1.0, sample), (-noise, output)])?, alpha.sqrt())
        }
    }
}

/// The noise that a model output implies at cumulative alpha `alpha`. All f32.
pub(super) fn epsilon(prediction: PredictionType, output: &Tensor, sample: &Tensor, alpha: f32) -> Result<Tensor> {
    match prediction {
        PredictionType::Sample => noise_between(output, sample, alpha),
        PredictionType::VPrediction => tensors::combine(&[(alpha.sqrt(), output), ((1.0 - alpha).sqrt(), sample)]),
        PredictionType::Epsilon | PredictionType::FlowPrediction => Ok(output.clone()),
    }
}

/// The noise that turns the clean sample `original` into `sample` at cumulative alpha `alpha`.
pub(super) fn noise_between(original: &Tensor, sample: &Tensor, alpha: f32) -> Result<Tensor> {
    tensors::divide(&tensors::combine(&[(1.0, sample), (-alpha.sqrt(), original)])?, (1.0 - alpha).sqrt())
}

/// How a guess of the clean sample is kept in range.
#[derive(Clone, Copy, Debug)]
pub(super) enum Limit {
    /// Not at all.
    Free,
    /// Cut at plus and minus this.
    Clip(f64),
    /// Cut at a quantile of each picture's absolute values and divided by it (Saharia et al. 2022).
    Threshold {
        /// Which quantile.
        ratio: f64,
        /// Upper bound of what is divided by.
        max: f64,
    },
}

impl Limit {
    /// What a configuration's switches choose; thresholding wins over clipping.
    pub(super) fn chosen(thresholding: bool, ratio: f64, max: f64, clip: bool, range: f64) -> Self {
        match (thresholding, clip) {
            (true, _) => Self::Threshold { ratio, max },
            (false, true) => Self::Clip(range),
            (false, false) => Self::Free,
        }
    }

    /// The sample in range. f32 in, f32 out.
    pub(super) fn apply(self, sample: Tensor) -> Result<Tensor> {
        match self {
            Self::Free => Ok(sample),
            Self::Clip(range) => Ok(sample.clamp(-range, range)?),
            Self::Threshold { ratio, max } => threshold(&sample, ratio, max),
        }
    }
}

fn threshold(sample: &Tensor, ratio: f64, max: f64) -> Result<Tensor> {
    let pictures = sample.dims()[0];
    let absolute = sample.abs()?.flatten_from(1)?.to_vec2::<f32>()?;
    let bounds: Vec<f32> =
        absolute.into_iter().map(|values| quantile(values, ratio).max(1.0).min(max as f32)).collect();
    let mut shape = vec![1; sample.rank()];
    shape[0] = pictures;
    let bounds = Tensor::from_vec(bounds, shape, sample.device())?;
    let cut = sample.broadcast_minimum(&bounds)?.broadcast_maximum(&bounds.neg()?)?;
    Ok(cut.broadcast_div(&bounds)?)
}

/// `torch.quantile` with linear interpolation.
fn quantile(mut values: Vec<f32>, ratio: f64) -> f32 {
    values.sort_by(f32::total_cmp);
    let rank = ratio as f32 * (values.len() - 1) as f32;
    let (low, high) = (values[rank.floor() as usize], values[rank.ceil() as usize]);
    low + (high - low) * rank.fract()
}

/// Splits a model output with twice the sample's channels into prediction and variance. f32.
pub(super) fn split_variance(output: &Tensor, sample: &Tensor) -> Result<(Tensor, Option<Tensor>)> {
    let channels = sample.dim(1)?;
    if output.dim(1)? == 2 * channels {
        return Ok((output.narrow(1, 0, channels)?, Some(output.narrow(1, channels, channels)?)));
    }
    Ok((output.clone(), None))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn thresholding_divides_each_picture_by_its_own_quantile() {
        let sample = Tensor::new(&[[0.5_f32, -0.5, 0.1], [4.0, -8.0, 2.0]], &Device::Cpu).expect("a tensor");
        let limited = Limit::Threshold { ratio: 0.5, max: 10.0 }.apply(sample).expect("a tensor");
        let rows = limited.to_vec2::<f32>().expect("two rows");
        assert_eq!(rows, [[0.5, -0.5, 0.1], [1.0, -1.0, 0.5]]);
    }

    #[test]
    fn a_quantile_between_two_values_is_interpolated() {
        assert_eq!(quantile(vec![3.0, 1.0, 2.0, 4.0], 0.5), 2.5);
    }
}
