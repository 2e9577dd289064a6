//! A Flux transformer with its conditioning: what every pipeline of the family does in a denoising step, and the packing
//! of latents into tokens.

use std::ops::Range;

use candle_core::Tensor;

use super::controlnet::Control;
use crate::{
    Result,
    models::{self, FluxImagePrompts, FluxInput, FluxTransformer2DModel, Memory, Reuse},
    nn::Rotary,
    pipelines::prompt::Embeddings,
};

/// Latents to tokens, 2 x 2 latents each: `(batch, channels, height, width)` to
/// `(batch, height / 2 * width / 2, 4 * channels)`.
pub(super) fn packed(latents: &Tensor) -> Result<Tensor> {
    models::flux::packed(latents, 2)
}

/// Tokens of `rows` rows back to latents.
pub(super) fn unpacked(tokens: &Tensor, rows: usize) -> Result<Tensor> {
    let (batch, count, values) = tokens.dims3()?;
    let (columns, channels) = (count / rows.max(1), values / 4);
    let pieces = tokens.reshape(&[batch, rows, columns, channels, 2, 2][..])?;
    let latents = pieces.permute(vec![0, 3, 1, 4, 2, 5])?;
    Ok(latents.reshape((batch, channels, 2 * rows, 2 * columns))?)
}

/// The positions of a picture's tokens, row by row; `picture` tells pictures apart.
pub(super) fn grid(rows: usize, columns: usize, picture: u32) -> Vec<[u32; 3]> {
    let row = |row: usize| (0..columns).map(move |column| [picture, row as u32, column as u32]);
    (0..rows).flat_map(row).collect()
}

/// How strongly prompts are followed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Guiding {
    /// As an input of the model.
    pub(super) guidance: f64,
    /// By a second prediction; when there is a negative prompt.
    pub(super) true_cfg_scale: f64,
}

/// An encoded prompt, one row for each picture, with the rotations that go with its length.
pub(super) struct Text {
    pub(super) embeddings: Embeddings,
    rotary: Rotary,
    /// What the IP-Adapters show beside it; none without them.
    pub(super) images: Option<FluxImagePrompts>,
    /// Where steps are skipped, what is remembered for it.
    memory: Option<Memory>,
}

impl Text {
    /// `positions` are those of all tokens beside the text.
    pub(super) fn new(
        transformer: &FluxTransformer2DModel,
        embeddings: Embeddings,
        positions: &[[u32; 3]],
        reuse: Option<Reuse>,
    ) -> Result<Self> {
        let words = embeddings.embeds.dim(1)?;
        let rotary = transformer.config().rotary(positions, words, transformer.device())?;
        Ok(Self { embeddings, rotary, images: None, memory: reuse.map(Memory::new) })
    }
}

impl Text {
    fn input<'t>(&'t self, picture: &'t Tensor, timestep: f64, guidance: f64) -> FluxInput<'t> {
        let Embeddings { embeds, pooled } = &self.embeddings;
        FluxInput {
            picture,
            text: embeds,
            pooled,
            timestep,
            guidance,
            rotary: &self.rotary,
            images: self.images.as_ref(),
        }
    }
}

/// A transformer and everything it is told in each step.
pub(super) struct Conditioned<'a> {
    pub(super) transformer: &'a FluxTransformer2DModel,
    pub(super) positive: Text,
    /// None when one prediction is enough.
    pub(super) negative: Option<Text>,
    pub(super) guiding: Guiding,
    /// What is read beside the latents, `(batch, channels, height / 8, width / 8)`: a control picture, or a masked picture
    /// and its mask.
    pub(super) surrounding: Option<Tensor>,
    /// Tokens that follow the picture's: another picture.
    pub(super) following: Option<Tensor>,
    pub(super) control: Option<Control<'a>>,
}

impl Conditioned<'_> {
    /// The prediction for `latents`, `(batch, channels, height / 8, width / 8)`, of the same shape. `index` is the
    /// place of `timestep` in the schedule, of which `steps` are run.
    pub(super) fn predict(
        &mut self,
        latents: &Tensor,
        timestep: f64,
        (index, steps): (usize, &Range<usize>),
    ) -> Result<Tensor> {
        let tokens = match &self.surrounding {
            Some(surrounding) => packed(&Tensor::cat(&[latents, surrounding], 1)?)?,
            None => packed(latents)?,
        };
        let count = tokens.dim(1)?;
        let picture = match &self.following {
            Some(following) => Tensor::cat(&[&tokens, following], 1)?,
            None => tokens,
        };
        // The reference steers both predictions by what its ControlNets say about the prompt.
        let residuals = match &self.control {
            Some(control) => {
                control.residuals(&self.positive.input(&picture, timestep, self.guiding.guidance), index)?
            }
            None => None,
        };
        let residuals = residuals.as_ref();
        let is_edge = index == steps.start || index + 1 == steps.end;
        let predicted = |text: &mut Text| -> Result<Tensor> {
            let mut memory = text.memory.take();
            let input = text.input(&picture, timestep, self.guiding.guidance);
            let prediction = match &mut memory {
                Some(memory) => self.transformer.forward_remembering(&input, residuals, (memory, is_edge))?,
                None => self.transformer.forward(&input, residuals)?,
            };
            text.memory = memory;
            Ok(prediction.narrow(1, 0, count)?)
        };
        let mut prediction = predicted(&mut self.positive)?;
        if let Some(negative) = &mut self.negative {
            let negative = predicted(negative)?;
            prediction = (&negative + ((prediction - &negative)? * self.guiding.true_cfg_scale)?)?;
        }
        unpacked(&prediction, latents.dim(2)? / 2)
    }

    /// What is remembered for each prompt.
    pub(super) fn memories(&self) -> Vec<&Memory> {
        let texts = [Some(&self.positive), self.negative.as_ref()];
        texts.into_iter().flatten().filter_map(|text| text.memory.as_ref()).collect()
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn packing_takes_squares_of_four_and_can_be_undone() {
        let latents = Tensor::arange(0f32, 2.0 * 4.0 * 6.0, &Device::Cpu).and_then(|x| x.reshape((1, 2, 4, 6)));
        let latents = latents.expect("48 numbers");
        let tokens = packed(&latents).expect("even sides");
        assert_eq!(tokens.dims(), [1, 6, 8]);
        let first = tokens.narrow(1, 0, 1).and_then(|x| x.flatten_all()?.to_vec1::<f32>()).expect("8 numbers");
        assert_eq!(first, [0.0, 1.0, 6.0, 7.0, 24.0, 25.0, 30.0, 31.0]);
        let back = unpacked(&tokens, 2).expect("two rows");
        let numbers = |x: &Tensor| x.flatten_all().and_then(|x| x.to_vec1::<f32>()).expect("48 numbers");
        assert_eq!(numbers(&back), numbers(&latents));
    }

    #[test]
    fn tokens_lie_on_a_grid_of_their_picture() {
        assert_eq!(grid(2, 2, 1), [[1, 0, 0], [1, 0, 1], [1, 1, 0], [1, 1, 1]]);
    }
}
