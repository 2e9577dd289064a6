//! ControlNets of the Flux models (diffusers `FluxControlNetModel`): a short copy of the transformer that reads a picture
//! beside the latents and says what is added after the transformer's blocks. One net may know several kinds of
//! pictures (union). Those of XLabs read the picture itself, others its latents.

use candle_core::{DType, Device, Tensor};
use serde::Deserialize;

use super::{
    FluxConfig, FluxInput, FluxResiduals, Stem,
    blocks::{Additions, BlockObserver, Blocks, Tokens},
    packed,
};
use crate::{
    Error, Result,
    models::{config::unsupported, controlnet::condition::ConditionEmbedding},
    nn::{Embedding, Linear},
    weights::Weights,
};

/// The `config.json` of a Flux ControlNet; what it leaves out has diffusers' defaults.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct FluxControlNetConfig {
    /// The transformer that it copies.
    #[serde(flatten)]
    pub transformer: FluxConfig,
    /// How many kinds of pictures a union net knows.
    pub num_mode: Option<usize>,
    /// Of nets that read pixels instead of latents: channels of the feature maps they make of them, of which
    /// `patch_size` x `patch_size` values become a token.
    pub conditioning_embedding_channels: Option<usize>,
}

/// Channels between the picture and the feature maps in nets that read pixels.
const PIXEL_CHANNELS: [usize; 4] = [16; 4];

impl FluxControlNetConfig {
    fn check(&self) -> Result<()> {
        let Some(channels) = self.conditioning_embedding_channels else { return self.transformer.check() };
        let FluxConfig { patch_size, in_channels, .. } = self.transformer;
        if patch_size == 0 || channels * patch_size * patch_size != in_channels {
            return Err(unsupported("conditioning_embedding_channels", channels));
        }
        // The patches are those of the picture; a token of the latents stays one.
        FluxConfig { patch_size: 1, ..self.transformer.clone() }.check()
    }
}

/// What a ControlNet reads in a step.
#[derive(Clone, Copy)]
pub struct FluxControlNetInput<'a> {
    /// What the transformer reads. The rotations are those of [`FluxControlNetModel::words`] words.
    pub input: FluxInput<'a>,
    /// The encoded picture, packed, `(batch, tokens, in_channels)`; of nets that read pixels the picture in -1 to 1,
    /// `(batch, 3, height, width)`.
    pub condition: &'a Tensor,
    /// What the picture shows; for union nets.
    pub mode: Option<usize>,
    /// What the residuals are multiplied with.
    pub scale: f64,
}

/// A ControlNet.
pub struct FluxControlNetModel {
    config: FluxControlNetConfig,
    dtype: DType,
    device: Device,
    stem: Stem,
    /// Where it reads pixels.
    input_hint_block: Option<ConditionEmbedding>,
    controlnet_x_embedder: Linear,
    mode_embedder: Option<Embedding>,
    blocks: Blocks,
    controlnet_blocks: Vec<Linear>,
    controlnet_single_blocks: Vec<Linear>,
}

impl FluxControlNetModel {
    /// Builds the net from weights under diffusers' names.
    pub fn new(config: &FluxControlNetConfig, weights: Weights) -> Result<Self> {
        let transformer = &config.transformer;
        config.check()?;
        let inner = transformer.inner_dim();
        let outputs = |name: &str, count: usize| {
            let at = weights.pp(name);
            (0..count).map(|i| at.pp(i).linear(inner, inner, true)).collect::<Result<Vec<_>>>()
        };
        let hint =
            |channels| ConditionEmbedding::of_channels(&PIXEL_CHANNELS, (3, channels), &weights.pp("input_hint_block"));
        let modes = |count: usize| weights.pp("controlnet_mode_embedder").embedding(count, inner);
        Ok(Self {
            dtype: weights.dtype(),
            device: weights.device().clone(),
            stem: Stem::new(transformer, &weights)?,
            input_hint_block: config.conditioning_embedding_channels.map(hint).transpose()?,
            controlnet_x_embedder: weights.pp("controlnet_x_embedder").linear(transformer.in_channels, inner, true)?,
            mode_embedder: config.num_mode.map(modes).transpose()?,
            blocks: Blocks::new(transformer, &weights)?,
            controlnet_blocks: outputs("controlnet_blocks", transformer.num_layers)?,
            controlnet_single_blocks: outputs("controlnet_single_blocks", transformer.num_single_layers)?,
            config: config.clone(),
        })
    }

    /// The configuration it was built from.
    pub fn config(&self) -> &FluxControlNetConfig {
        &self.config
    }

    /// Whether it reads pictures, and not their latents.
    pub fn reads_pixels(&self) -> bool {
        self.input_hint_block.is_some()
    }

    /// How many words it sees of a prompt of `words`: union nets see the kind of the picture as one more.
    pub fn words(&self, words: usize) -> usize {
        words + usize::from(self.mode_embedder.is_some())
    }

    /// What is added after the transformer's blocks.
    pub fn forward(&self, input: &FluxControlNetInput<'_>) -> Result<FluxResiduals> {
        let (Tokens { picture, text }, embedding) = self.stem.forward(&input.input)?;
        let condition = input.condition.to_dtype(self.dtype)?;
        let condition = match &self.input_hint_block {
            Some(hint) => packed(&hint.forward(&condition)?, self.config.transformer.patch_size)?,
            None => condition,
        };
        let condition = self.controlnet_x_embedder.forward(&condition)?;
        let tokens = Tokens { picture: (picture + condition)?, text: self.with_mode(text, input.mode)? };
        let mut seen = Seen::default();
        self.blocks.forward_observed(tokens, &embedding, input.input.rotary, Additions::default(), &mut seen)?;
        let outputs = |layers: &[Linear], states: &[Tensor]| {
            let scaled = |(layer, state): (&Linear, &Tensor)| Ok((layer.forward(state)? * input.scale)?);
            layers.iter().zip(states).map(scaled).collect::<Result<Vec<_>>>()
        };
        Ok(FluxResiduals {
            blocks: outputs(&self.controlnet_blocks, &seen.joint)?,
            single_blocks: outputs(&self.controlnet_single_blocks, &seen.single)?,
            is_repeated: self.reads_pixels(),
        })
    }

    /// The text with the kind of the picture before it, where the net knows kinds.
    fn with_mode(&self, text: Tensor, mode: Option<usize>) -> Result<Tensor> {
        let Some(embedder) = &self.mode_embedder else { return Ok(text) };
        let Some(mode) = mode else {
            return Err(Error::Argument {
                name: "control_mode".into(),
                reason: "is missing; this ControlNet has to be told with a number what the control picture shows"
                    .into(),
            });
        };
        let (batch, _, inner) = text.dims3()?;
        let row = embedder.forward(&Tensor::new(&[mode as u32], &self.device)?)?;
        Ok(Tensor::cat(&[&row.unsqueeze(0)?.broadcast_as((batch, 1, inner))?, &text], 1)?)
    }
}

/// The picture's tokens after each block.
#[derive(Default)]
struct Seen {
    joint: Vec<Tensor>,
    single: Vec<Tensor>,
}

impl BlockObserver for Seen {
    fn joint(&mut self, picture: &Tensor) {
        self.joint.push(picture.clone());
    }

    fn single(&mut self, joined: &Tensor, pixels: usize) -> Result<()> {
        self.single.push(joined.narrow(1, 0, pixels)?.contiguous()?);
        Ok(())
    }
}
