//! A Stable Diffusion 3 transformer with its conditioning: what every pipeline of the family does in a denoising step.

use std::ops::Range;

use candle_core::Tensor;

use super::{guidance::Guidance, latent_control::LatentControl, sd3_image_prompt::ImageConditioning};
use crate::{
    Result,
    models::{Memory, Sd3ImagePrompt, Sd3Input, Sd3Transformer2DModel},
};

/// Skip-layer guidance in a call.
pub(crate) struct SkippedLayers {
    /// The blocks that are left out.
    pub(crate) layers: Vec<usize>,
    pub(crate) scale: f64,
    /// It acts in steps whose number, from 0, lies between these.
    pub(crate) after: f64,
    pub(crate) before: f64,
}

impl SkippedLayers {
    fn act_in(&self, step: usize) -> bool {
        let step = step as f64;
        step > self.after && step < self.before
    }
}

/// A transformer and everything it is told in each step.
pub(crate) struct ConditionedTransformer<'a> {
    pub(crate) transformer: &'a Sd3Transformer2DModel,
    /// `(batch, tokens, features)`, or `(2 * batch, …)` with the negative half first.
    pub(crate) encoder_hidden_states: Tensor,
    /// `(batch, features)`, or twice as many rows.
    pub(crate) pooled_projections: Tensor,
    /// None when one prediction is enough.
    pub(crate) guidance: Option<Guidance>,
    pub(crate) skipped: Option<SkippedLayers>,
    /// What inpainting models read after the latents in each step: mask and masked picture,
    /// `(batch, channels + 1, height / 8, width / 8)`.
    pub(crate) surrounding: Option<Tensor>,
    pub(crate) control: Option<LatentControl<'a>>,
    /// What an IP-Adapter knows of pictures.
    pub(crate) image: Option<ImageConditioning<'a>>,
    /// What is remembered of earlier steps where some of them are skipped.
    pub(crate) memory: Option<Memory>,
}

impl ConditionedTransformer<'_> {
    /// The prediction for `latents`, `(batch, channels, height / 8, width / 8)`, of the same shape. `index` is the
    /// place of `timestep` in the schedule, of which `steps` are run.
    pub(crate) fn predict(
        &mut self,
        latents: &Tensor,
        timestep: f64,
        (index, steps): (usize, &Range<usize>),
    ) -> Result<Tensor> {
        let latents = self.doubled(latents)?;
        let sample = match &self.surrounding {
            Some(surrounding) => Tensor::cat(&[&latents, &self.doubled(surrounding)?], 1)?,
            None => latents.clone(),
        };
        let image_prompt = self.image.as_ref().map(|image| image.at(timestep)).transpose()?;
        let input = Sd3Input {
            sample: &sample,
            timestep,
            encoder_hidden_states: &self.encoder_hidden_states,
            pooled_projections: &self.pooled_projections,
            block_residuals: &[],
            skip_layers: &[],
            image_prompt: image_prompt.as_ref(),
        };
        let residuals = match &self.control {
            Some(control) => control.residuals(self.transformer, &Sd3Input { sample: &latents, ..input }, index)?,
            None => Vec::new(),
        };
        let steered = Sd3Input { block_residuals: &residuals, ..input };
        let is_edge = index == steps.start || index + 1 == steps.end;
        let prediction = match &mut self.memory {
            Some(memory) => self.transformer.forward_remembering(&steered, (memory, is_edge))?,
            None => self.transformer.forward(&steered)?,
        };
        let Some(guidance) = self.guidance else { return Ok(prediction) };
        let guided = guidance.combine(&prediction)?;
        match &self.skipped {
            Some(skipped) if skipped.act_in(index) => {
                let without = self.without(&skipped.layers, &input)?;
                Ok((guided + ((second_half(&prediction)? - without)? * skipped.scale)?)?)
            }
            _ => Ok(guided),
        }
    }

    /// The prediction of the prompted half of `input` with `layers` left out.
    fn without(&self, layers: &[usize], input: &Sd3Input<'_>) -> Result<Tensor> {
        let image_prompt = input.image_prompt.map(Sd3ImagePrompt::of_one_half).transpose()?;
        self.transformer.forward(&Sd3Input {
            image_prompt: image_prompt.as_ref(),
            sample: &second_half(input.sample)?,
            encoder_hidden_states: &second_half(input.encoder_hidden_states)?,
            pooled_projections: &second_half(input.pooled_projections)?,
            skip_layers: layers,
            ..*input
        })
    }

    /// The same rows for both halves when both are predicted.
    fn doubled(&self, rows: &Tensor) -> Result<Tensor> {
        Ok(if self.guidance.is_some() { Tensor::cat(&[rows, rows], 0)? } else { rows.clone() })
    }
}

/// The rows with the prompt.
fn second_half(rows: &Tensor) -> Result<Tensor> {
    let half = rows.dim(0)? / 2;
    Ok(rows.narrow(0, half, half)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_skipped_strictly_between_the_two_fractions_of_the_steps() {
        let skipped = SkippedLayers { layers: vec![1], scale: 2.8, after: 0.06, before: 3.0 };
        let acting: Vec<usize> = (0..6).filter(|&step| skipped.act_in(step)).collect();
        assert_eq!(acting, [1, 2]);
    }
}
