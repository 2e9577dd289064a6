//! The blocks of the Flux models, in their order.

use candle_core::{D, DType, Tensor};

use super::{FluxConfig, FluxResiduals, ip_adapter::FluxImagePrompts};
use crate::{
    Result,
    models::{
        mmdit::{BlockForm, EPS, Images, JointBlock, Modulation, Projections, Sizes, modulated},
        reuse::{Memory, Reuse},
        unet::ImageBranch,
    },
    nn::{Activation, AttentionOptions, LayerNorm, Linear, Rotary, attention},
    weights::Weights,
};

/// How many times wider the feed-forward layers are, which no configuration names.
const WIDENING: usize = 4;

/// The tokens of picture and text, `(batch, tokens, inner)` each.
pub(super) struct Tokens {
    pub(super) picture: Tensor,
    pub(super) text: Tensor,
}

/// What is added to the picture's tokens on their way.
#[derive(Clone, Copy, Default)]
pub(super) struct Additions<'a> {
    /// What ControlNets add after each block.
    pub(super) residuals: Option<&'a FluxResiduals>,
    /// What the blocks of the first kind see of other pictures.
    pub(super) images: Option<&'a FluxImagePrompts>,
}

impl<'a> Additions<'a> {
    fn images_of(self, block: usize) -> &'a [ImageBranch] {
        self.images.map_or(&[], |images| images.of(block))
    }
}

/// All blocks.
pub(super) struct Blocks {
    joint: Vec<JointBlock>,
    single: Vec<SingleBlock>,
}

impl Blocks {
    pub(super) fn new(config: &FluxConfig, weights: &Weights) -> Result<Self> {
        let sizes = Sizes::new(config.num_attention_heads, config.attention_head_dim, Some("rms_norm"))?;
        let form = BlockForm { is_last: false, is_dual: false };
        let joint = weights.pp("transformer_blocks");
        let single = weights.pp("single_transformer_blocks");
        Ok(Self {
            joint: (0..config.num_layers).map(|i| JointBlock::new(sizes, form, &joint.pp(i))).collect::<Result<_>>()?,
            single: (0..config.num_single_layers)
                .map(|i| SingleBlock::new(sizes, &single.pp(i)))
                .collect::<Result<_>>()?,
        })
    }

    /// The picture's tokens after all blocks, of which most are skipped where `memory` says so. The first and last step
    /// of a call are its edges.
    pub(super) fn forward_remembering(
        &self,
        tokens: Tokens,
        embedding: &Tensor,
        rotary: &Rotary,
        added: Additions<'_>,
        (memory, is_edge): (&mut Memory, bool),
    ) -> Result<Tensor> {
        let Some(first) = self.joint.first() else {
            return self.forward(tokens, embedding, rotary, added);
        };
        if matches!(memory.rule(), Reuse::Tea { .. }) {
            let before = tokens.picture.clone();
            let signal = first.modulated_picture(&before, embedding)?;
            if let Some(residual) = memory.recalled(signal, is_edge)? {
                return Ok((before + residual)?);
            }
            let picture = self.forward(tokens, embedding, rotary, added)?;
            memory.keep((&picture - before)?);
            return Ok(picture);
        }
        let (picture, text) = first.forward_seeing(
            &tokens.picture,
            &tokens.text,
            embedding,
            Some(rotary),
            Images::Apart(added.images_of(0)),
        )?;
        if let Some(residual) = memory.recalled((&picture - &tokens.picture)?, is_edge)? {
            return Ok((picture + residual)?);
        }
        let (head, tokens) = (picture.clone(), Tokens { picture, text: within_f16(text)? });
        let picture = self.after_first(tokens, embedding, rotary, added, &mut Unobserved)?;
        memory.keep((&picture - head)?);
        Ok(picture)
    }

    /// The picture's tokens after all blocks.
    pub(super) fn forward(
        &self,
        tokens: Tokens,
        embedding: &Tensor,
        rotary: &Rotary,
        added: Additions<'_>,
    ) -> Result<Tensor> {
        self.forward_observed(tokens, embedding, rotary, added, &mut Unobserved)
    }

    /// The same, with a look at the picture's tokens after each block.
    pub(super) fn forward_observed(
        &self,
        tokens: Tokens,
        embedding: &Tensor,
        rotary: &Rotary,
        added: Additions<'_>,
        observer: &mut dyn BlockObserver,
    ) -> Result<Tensor> {
        let Some(first) = self.joint.first() else {
            return self.after_joint(tokens, embedding, rotary, added, observer);
        };
        let (picture, text) = first.forward_seeing(
            &tokens.picture,
            &tokens.text,
            embedding,
            Some(rotary),
            Images::Apart(added.images_of(0)),
        )?;
        let tokens = Tokens { picture, text: within_f16(text)? };
        self.after_first(tokens, embedding, rotary, added, observer)
    }

    /// What follows the first block.
    fn after_first(
        &self,
        tokens: Tokens,
        embedding: &Tensor,
        rotary: &Rotary,
        added: Additions<'_>,
        observer: &mut dyn BlockObserver,
    ) -> Result<Tensor> {
        let Tokens { mut picture, mut text } = tokens;
        for (i, block) in self.joint.iter().enumerate() {
            if i > 0 {
                let (next_picture, next_text) = block.forward_seeing(
                    &picture,
                    &text,
                    embedding,
                    Some(rotary),
                    Images::Apart(added.images_of(i)),
                )?;
                (picture, text) = (next_picture, within_f16(next_text)?);
            }
            observer.joint(&picture);
            if let Some(residual) = added.residuals.and_then(|all| all.after_joint(i, self.joint.len())) {
                picture = (picture + residual)?;
            }
        }
        self.after_joint(Tokens { picture, text }, embedding, rotary, added, observer)
    }

    /// What follows the blocks of the first kind.
    fn after_joint(
        &self,
        Tokens { picture, text }: Tokens,
        embedding: &Tensor,
        rotary: &Rotary,
        added: Additions<'_>,
        observer: &mut dyn BlockObserver,
    ) -> Result<Tensor> {
        let (pixels, words) = (picture.dim(1)?, text.dim(1)?);
        let mut joined = Tensor::cat(&[&picture, &text], 1)?;
        for (i, block) in self.single.iter().enumerate() {
            joined = within_f16(block.forward(&joined, embedding, rotary)?)?;
            observer.single(&joined, pixels)?;
            if let Some(residual) = added.residuals.and_then(|all| all.after_single(i, self.single.len())) {
                joined = (joined + residual.pad_with_zeros(1, 0, words)?)?;
            }
        }
        Ok(joined.narrow(1, 0, pixels)?.contiguous()?)
    }
}

/// Sees the picture's tokens after each block.
pub(super) trait BlockObserver {
    /// After a block of the first kind: `(batch, pixels, inner)`.
    fn joint(&mut self, picture: &Tensor);
    /// After a block of the second kind: the first `pixels` of `(batch, pixels + words, inner)`.
    fn single(&mut self, joined: &Tensor, pixels: usize) -> Result<()>;
}

/// Looks away.
struct Unobserved;

impl BlockObserver for Unobserved {
    fn joint(&mut self, _: &Tensor) {}

    fn single(&mut self, _: &Tensor, _: usize) -> Result<()> {
        Ok(())
    }
}

impl FluxResiduals {
    fn after_joint(&self, block: usize, blocks: usize) -> Option<&Tensor> {
        match self.blocks.len() {
            0 => None,
            count if self.is_repeated => self.blocks.get(block % count),
            _ => spread(&self.blocks, block, blocks),
        }
    }

    fn after_single(&self, block: usize, blocks: usize) -> Option<&Tensor> {
        spread(&self.single_blocks, block, blocks)
    }
}

/// The one of `residuals` that belongs to a block when each serves as many blocks in a row.
fn spread(residuals: &[Tensor], block: usize, blocks: usize) -> Option<&Tensor> {
    let each = blocks.div_ceil(residuals.len().max(1)).max(1);
    residuals.get(block / each)
}

/// Brings float16 numbers that have overflowed back to the largest there is, as the reference does.
fn within_f16(tokens: Tensor) -> Result<Tensor> {
    if tokens.dtype() != DType::F16 {
        return Ok(tokens);
    }
    let bound = f64::from(half::f16::MAX);
    Ok(tokens.clamp(-bound, bound)?)
}

/// A block that treats picture and text alike, with attention and feed-forward layers side by side (diffusers
/// `FluxSingleTransformerBlock`; Dehghani et al. 2023, arXiv:2302.05442).
struct SingleBlock {
    norm: Modulation<3>,
    projections: Projections,
    proj_mlp: Linear,
    proj_out: Linear,
    heads: usize,
}

impl SingleBlock {
    fn new(sizes: Sizes, weights: &Weights) -> Result<Self> {
        let inner = sizes.inner();
        Ok(Self {
            norm: Modulation::new(inner, &weights.pp("norm"))?,
            projections: Projections::of_picture(sizes, &weights.pp("attn"))?,
            proj_mlp: weights.pp("proj_mlp").linear(inner, WIDENING * inner, true)?,
            proj_out: weights.pp("proj_out").linear((1 + WIDENING) * inner, inner, true)?,
            heads: sizes.heads,
        })
    }

    /// `(batch, tokens, inner)` to the same.
    fn forward(&self, x: &Tensor, embedding: &Tensor, rotary: &Rotary) -> Result<Tensor> {
        let [shift, scale, gate] = self.norm.forward(embedding)?;
        let normed = modulated(&LayerNorm::plain(x, EPS)?, &scale, &shift)?;
        let inner = Activation::GeluTanh.forward(&self.proj_mlp.forward(&normed)?)?;
        let [q, k, v] = self.projections.forward(&normed)?;
        let (q, k) = (rotary.forward(&q)?, rotary.forward(&k)?);
        let attended = attention(&q, &k, &v, AttentionOptions::heads(self.heads))?;
        let out = self.proj_out.forward(&Tensor::cat(&[attended, inner], D::Minus1)?)?;
        Ok((x + out.broadcast_mul(&gate)?)?)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn residuals(count: usize) -> Vec<Tensor> {
        (0..count).map(|i| Tensor::new(i as f32, &Device::Cpu).expect("a number")).collect()
    }

    fn taken(residuals: &FluxResiduals, blocks: usize) -> Vec<Option<f32>> {
        let number = |residual: &Tensor| residual.to_scalar::<f32>().expect("a number");
        (0..blocks).map(|block| residuals.after_joint(block, blocks).map(number)).collect()
    }

    #[test]
    fn few_residuals_are_spread_over_the_blocks_or_taken_in_turn() {
        let spread = FluxResiduals { blocks: residuals(2), ..FluxResiduals::default() };
        assert_eq!(taken(&spread, 5), [0.0, 0.0, 0.0, 1.0, 1.0].map(Some));
        let in_turn = FluxResiduals { is_repeated: true, ..spread };
        assert_eq!(taken(&in_turn, 5), [0.0, 1.0, 0.0, 1.0, 0.0].map(Some));
        assert_eq!(taken(&FluxResiduals::default(), 2), [None, None]);
    }

    #[test]
    fn overflown_float16_numbers_become_the_largest() {
        let x = Tensor::new(&[f32::INFINITY, 1.0], &Device::Cpu).and_then(|x| x.to_dtype(DType::F16));
        let x = within_f16(x.expect("two numbers")).and_then(|x| Ok(x.to_dtype(DType::F32)?.to_vec1::<f32>()?));
        assert_eq!(x.expect("two numbers"), [65504.0, 1.0]);
    }
}
