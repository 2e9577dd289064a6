//! Classifier-free guidance: two predictions into one, its rescaling, and the embedding that distilled
//! models take instead.

use candle_core::{DType, Device, Tensor};

use crate::Result;

/// How the predictions of one step, one below the other in a batch, become one.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Guided {
    /// There is only one.
    Alone,
    /// The first is made without the prompt.
    ByPrompt(Guidance),
    /// The first is made with prompt and picture, the second without the prompt, the third without both.
    ByPicture(EditGuidance),
}

impl From<Option<Guidance>> for Guided {
    fn from(guidance: Option<Guidance>) -> Self {
        guidance.map_or(Self::Alone, Self::ByPrompt)
    }
}

impl Guided {
    /// Whether there is a prediction without the prompt.
    pub(crate) fn is_guided(self) -> bool {
        !matches!(self, Self::Alone)
    }

    /// The same rows for every prediction.
    pub(crate) fn rows(self, rows: &Tensor) -> Result<Tensor> {
        match self {
            Self::Alone => Ok(rows.clone()),
            Self::ByPrompt(_) => Ok(Tensor::cat(&[rows, rows], 0)?),
            Self::ByPicture(_) => Ok(Tensor::cat(&[rows, rows, rows], 0)?),
        }
    }

    /// What each prediction sees of a picture; one without it sees zeros.
    pub(crate) fn picture_rows(self, rows: &Tensor) -> Result<Tensor> {
        match self {
            Self::ByPicture(_) => Ok(Tensor::cat(&[rows, rows, &rows.zeros_like()?], 0)?),
            Self::Alone | Self::ByPrompt(_) => self.rows(rows),
        }
    }

    /// One prediction for each row of the latents.
    pub(crate) fn combine(self, prediction: Tensor) -> Result<Tensor> {
        match self {
            Self::Alone => Ok(prediction),
            Self::ByPrompt(guidance) => guidance.combine(&prediction),
            Self::ByPicture(guidance) => guidance.combine(&prediction),
        }
    }
}

/// How strongly prompt and picture are followed in an edit (Brooks, Holynski and Efros 2023, section 3.2.1).
#[derive(Clone, Copy, Debug)]
pub(crate) struct EditGuidance {
    /// The prompt: scale, and how far the result is brought back to the first prediction's deviation.
    pub(crate) prompt: Guidance,
    /// The weight of the difference between the predictions with and without the picture.
    pub(crate) image_scale: f64,
}

impl EditGuidance {
    /// One prediction from `(3 * batch, …)`, equation 3 of the paper.
    fn combine(self, prediction: &Tensor) -> Result<Tensor> {
        let thirds = prediction.chunk(3, 0)?;
        let (both, picture, neither) = (&thirds[0], &thirds[1], &thirds[2]);
        let by_prompt = ((both - picture)? * self.prompt.scale)?;
        let guided = ((neither + by_prompt)? + ((picture - neither)? * self.image_scale)?)?;
        if self.prompt.rescale > 0.0 { self.prompt.rescaled(&guided, both) } else { Ok(guided) }
    }
}

/// How strongly the prompt is followed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Guidance {
    /// The weight of the difference between conditional and unconditional prediction.
    pub(crate) scale: f64,
    /// How far the result is brought back to the conditional prediction's deviation, 0 to 1.
    pub(crate) rescale: f64,
}

impl Guidance {
    /// One prediction from `(2 * batch, …)`, unconditional half first (Ho and Salimans 2022, equation 6).
    pub(crate) fn combine(self, prediction: &Tensor) -> Result<Tensor> {
        let halves = prediction.chunk(2, 0)?;
        let (unconditional, conditional) = (&halves[0], &halves[1]);
        let guided = (unconditional + ((conditional - unconditional)? * self.scale)?)?;
        if self.rescale > 0.0 { self.rescaled(&guided, conditional) } else { Ok(guided) }
    }

    /// Lin et al. 2024, section 3.4 (diffusers `rescale_noise_cfg`).
    fn rescaled(self, guided: &Tensor, conditional: &Tensor) -> Result<Tensor> {
        let ratio = (deviation(conditional)? / deviation(guided)?)?;
        let rescaled = guided.broadcast_mul(&ratio)?;
        Ok(((rescaled * self.rescale)? + (guided * (1.0 - self.rescale))?)?)
    }
}

/// The sample standard deviation of each batch row: `(batch, c, h, w)` to `(batch, 1, 1, 1)`.
fn deviation(tensor: &Tensor) -> Result<Tensor> {
    let rows = tensor.to_dtype(DType::F32)?.flatten_from(1)?;
    let deviation = rows.var_keepdim(1)?.sqrt()?.to_dtype(tensor.dtype())?;
    Ok(deviation.unsqueeze(2)?.unsqueeze(3)?)
}

/// The sinusoidal embedding of a guidance scale, `(batch, width)`, that latent consistency models add to
/// the timestep (diffusers `get_guidance_scale_embedding`, called with the scale minus 1).
pub(crate) fn guidance_embedding(
    scale: f64,
    batch: usize,
    width: usize,
    dtype: DType,
    device: &Device,
) -> Result<Tensor> {
    let half = width / 2;
    let step = 10000f32.ln() / (half.saturating_sub(1).max(1)) as f32;
    let value = ((scale - 1.0) * 1000.0) as f32;
    let angles: Vec<f32> = (0..half).map(|i| value * (-(step * i as f32)).exp()).collect();
    let mut row: Vec<f32> = angles.iter().map(|angle| angle.sin()).collect();
    row.extend(angles.iter().map(|angle| angle.cos()));
    row.resize(width, 0.0);
    let row = Tensor::from_vec(row, (1, width), device)?.to_dtype(dtype)?;
    Ok(row.repeat((batch, 1))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(values: [[f32; 4]; 2]) -> Tensor {
        Tensor::new(&values, &Device::Cpu).and_then(|rows| rows.reshape((2, 1, 2, 2))).expect("eight values")
    }

    fn values(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().and_then(|flat| flat.to_vec1()).expect("a small tensor")
    }

    #[test]
    fn guidance_moves_from_the_unconditional_past_the_conditional_prediction() {
        let both = rows([[0.0, 0.0, 1.0, 1.0], [1.0, 0.0, 1.0, 2.0]]);
        let guided = Guidance { scale: 3.0, rescale: 0.0 }.combine(&both).expect("two halves");
        assert_eq!(values(&guided), [3.0, 0.0, 1.0, 4.0]);
    }

    #[test]
    fn an_edit_weighs_prompt_and_picture_apart() {
        let thirds = rows([[4.0, 0.0, 1.0, 1.0], [1.0, 0.0, 1.0, 2.0]]);
        let thirds = Tensor::cat(&[&thirds, &thirds.narrow(0, 0, 1).expect("a row").zeros_like().expect("zeros")], 0);
        let guidance = EditGuidance { prompt: Guidance { scale: 2.0, rescale: 0.0 }, image_scale: 1.5 };
        let guided = Guided::ByPicture(guidance).combine(thirds.expect("three rows")).expect("three thirds");
        assert_eq!(values(&guided), [7.5, 0.0, 1.5, 1.0]);
    }

    #[test]
    fn a_prediction_without_the_picture_sees_zeros() {
        let picture = rows([[1.0; 4], [2.0; 4]]);
        let guidance = EditGuidance { prompt: Guidance { scale: 2.0, rescale: 0.0 }, image_scale: 1.5 };
        let seen = Guided::ByPicture(guidance).picture_rows(&picture).expect("rows");
        assert_eq!(values(&seen)[..16], values(&picture).repeat(2));
        assert_eq!(values(&seen)[16..], [0.0; 8]);
    }

    #[test]
    fn full_rescaling_gives_the_conditional_deviation_back() {
        let both = rows([[0.0, 0.5, 1.0, 1.0], [1.0, 0.0, -1.0, 2.0]]);
        let guided = Guidance { scale: 7.5, rescale: 1.0 }.combine(&both).expect("two halves");
        let (got, want) = (deviation(&guided), deviation(&both.narrow(0, 1, 1).expect("the second half")));
        let (got, want) = (values(&got.expect("a deviation"))[0], values(&want.expect("a deviation"))[0]);
        assert!((got - want).abs() < 1e-5, "{got} against {want}");
    }

    #[test]
    fn the_guidance_embedding_is_sines_then_cosines_and_pads_odd_widths() {
        let row = guidance_embedding(1.0, 2, 5, DType::F32, &Device::Cpu).expect("a small embedding");
        assert_eq!(row.dims(), [2, 5]);
        assert_eq!(values(&row)[..5], [0.0, 0.0, 1.0, 1.0, 0.0]);
    }
}
