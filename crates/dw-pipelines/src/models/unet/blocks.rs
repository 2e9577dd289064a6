//! The levels of a UNet: residual blocks, each followed by attention where the block's class has it, and the
//! change of size at the end.

use candle_core::Tensor;

use super::{
    config::{BlockPlan, UnetConfig},
    image_prompt::ImagePrompts,
    transformer::Transformer2d,
};
use crate::{
    Error, Result,
    models::{
        blocks::{Downsample, PixelAttention, ResnetBlock, ResnetOptions, Upsample},
        config::unsupported,
    },
    weights::Weights,
};

/// What every block is told besides its feature map.
#[derive(Clone, Copy)]
pub(crate) struct Conditioning<'a> {
    /// `(batch, time_channels)`.
    pub(crate) time: &'a Tensor,
    /// `(batch, tokens, text_dim)`.
    pub(crate) text: &'a Tensor,
    /// What attention to the text sees besides.
    pub(crate) image_prompts: Option<&'a ImagePrompts>,
}

/// The kind of attention that a block's class stands for.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Plain,
    Cross,
    Pixels,
}

/// What follows a residual block.
enum Mixer {
    None,
    Cross(Transformer2d),
    Pixels(PixelAttention),
}

/// A residual block and its attention.
struct Layer {
    resnet: ResnetBlock,
    mixer: Mixer,
}

impl Layer {
    fn forward(&self, x: &Tensor, conditioning: Conditioning) -> Result<Tensor> {
        let x = self.resnet.forward(x, Some(conditioning.time))?;
        match &self.mixer {
            Mixer::None => Ok(x),
            Mixer::Cross(transformer) => transformer.forward(&x, conditioning),
            Mixer::Pixels(attention) => attention.forward(&x),
        }
    }
}

/// What building a block needs besides its plan.
struct Parts<'a> {
    config: &'a UnetConfig,
    options: ResnetOptions,
    kind: Kind,
    weights: &'a Weights,
}

impl Parts<'_> {
    fn layer(&self, plan: &BlockPlan, i: usize, inputs: usize) -> Result<Layer> {
        let resnet = ResnetBlock::new(inputs, plan.channels, &self.options, &self.weights.pp("resnets").pp(i))?;
        let weights = self.weights.pp("attentions").pp(i);
        let mixer = match self.kind {
            Kind::Plain => Mixer::None,
            Kind::Cross => Mixer::Cross(Transformer2d::new(
                plan,
                plan.transformer_layers[i],
                self.options.groups,
                self.config.use_linear_projection,
                &weights,
            )?),
            Kind::Pixels => {
                if plan.head_dim == 0 || plan.head_dim > plan.channels {
                    return Err(unsupported("attention_head_dim", plan.head_dim));
                }
                let heads = plan.channels / plan.head_dim;
                Mixer::Pixels(PixelAttention::new(plan.channels, heads, &self.options, &weights)?)
            }
        };
        Ok(Layer { resnet, mixer })
    }
}

/// One level on the way down.
pub(crate) struct DownBlock {
    layers: Vec<Layer>,
    downsample: Option<Downsample>,
}

impl DownBlock {
    pub(crate) fn new(config: &UnetConfig, plan: &BlockPlan, inputs: usize, weights: &Weights) -> Result<Self> {
        let kind = match plan.class.as_str() {
            "DownBlock2D" => Kind::Plain,
            "CrossAttnDownBlock2D" => Kind::Cross,
            "AttnDownBlock2D" => Kind::Pixels,
            other => return Err(unsupported("down_block_types", other)),
        };
        let parts = Parts { config, options: config.resnet_options(1.0)?, kind, weights };
        let layers = (0..plan.layers)
            .map(|i| parts.layer(plan, i, if i == 0 { inputs } else { plan.channels }))
            .collect::<Result<_>>()?;
        let downsample = (!plan.is_last)
            .then(|| Downsample::new(plan.channels, config.downsample_padding, &weights.pp("downsamplers.0")))
            .transpose()?;
        Ok(Self { layers, downsample })
    }

    /// The feature map after the level; every intermediate one is pushed to `skips`.
    pub(crate) fn forward(&self, x: &Tensor, conditioning: Conditioning, skips: &mut Vec<Tensor>) -> Result<Tensor> {
        let mut x = x.clone();
        for layer in &self.layers {
            x = layer.forward(&x, conditioning)?;
            skips.push(x.clone());
        }
        if let Some(downsample) = &self.downsample {
            x = downsample.forward(&x)?;
            skips.push(x.clone());
        }
        Ok(x)
    }
}

/// The middle: a residual block and, with cross attention, a transformer and another residual block.
pub(crate) struct MidBlock {
    first: ResnetBlock,
    rest: Option<(Transformer2d, ResnetBlock)>,
}

impl MidBlock {
    /// The middle of the configured class; none where the configuration has none.
    pub(crate) fn new(config: &UnetConfig, weights: &Weights) -> Result<Option<Self>> {
        let Some(class) = config.mid_block_type.as_deref() else { return Ok(None) };
        let plan = config.mid_plan()?;
        let options = config.resnet_options(config.mid_block_scale_factor)?;
        let channels = plan.channels;
        let resnet = |i: usize| ResnetBlock::new(channels, channels, &options, &weights.pp("resnets").pp(i));
        let rest = match class {
            "UNetMidBlock2D" => None,
            "UNetMidBlock2DCrossAttn" => {
                let layers = plan.transformer_layers.first().copied().unwrap_or(1);
                let plan = BlockPlan { is_only_cross: false, ..plan };
                let is_linear = config.use_linear_projection;
                let transformer =
                    Transformer2d::new(&plan, layers, options.groups, is_linear, &weights.pp("attentions.0"))?;
                Some((transformer, resnet(1)?))
            }
            other => return Err(unsupported("mid_block_type", other)),
        };
        Ok(Some(Self { first: resnet(0)?, rest }))
    }

    pub(crate) fn forward(&self, x: &Tensor, conditioning: Conditioning) -> Result<Tensor> {
        let x = self.first.forward(x, Some(conditioning.time))?;
        match &self.rest {
            Some((transformer, resnet)) => {
                resnet.forward(&transformer.forward(&x, conditioning)?, Some(conditioning.time))
            }
            None => Ok(x),
        }
    }
}

/// One level on the way up.
pub(crate) struct UpBlock {
    layers: Vec<Layer>,
    upsample: Option<Upsample>,
}

impl UpBlock {
    /// `below` are the channels that come from the level below, `skip` those of the last skip connection, which
    /// was made by the next level up.
    pub(crate) fn new(
        config: &UnetConfig,
        plan: &BlockPlan,
        below: usize,
        skip: usize,
        weights: &Weights,
    ) -> Result<Self> {
        let kind = match plan.class.as_str() {
            "UpBlock2D" => Kind::Plain,
            "CrossAttnUpBlock2D" => Kind::Cross,
            "AttnUpBlock2D" => Kind::Pixels,
            other => return Err(unsupported("up_block_types", other)),
        };
        let parts = Parts { config, options: config.resnet_options(1.0)?, kind, weights };
        let layers = (0..plan.layers)
            .map(|i| {
                let inputs = if i == 0 { below } else { plan.channels };
                let skip = if i + 1 == plan.layers { skip } else { plan.channels };
                parts.layer(plan, i, inputs + skip)
            })
            .collect::<Result<_>>()?;
        let upsample =
            (!plan.is_last).then(|| Upsample::new(plan.channels, &weights.pp("upsamplers.0"))).transpose()?;
        Ok(Self { layers, upsample })
    }

    /// Takes one skip connection per residual block off the end of `skips`, and scales to the size of the one that
    /// comes next, so that odd sizes come back as they went.
    pub(crate) fn forward(&self, x: &Tensor, conditioning: Conditioning, skips: &mut Vec<Tensor>) -> Result<Tensor> {
        let mut x = x.clone();
        for layer in &self.layers {
            let skip = skips.pop().ok_or_else(|| {
                Error::Unsupported(String::from("`up_block_types` has more layers than the way down"))
            })?;
            x = layer.forward(&Tensor::cat(&[&x, &skip], 1)?, conditioning)?;
        }
        let Some(upsample) = &self.upsample else { return Ok(x) };
        let size = skips.last().map(Tensor::dims4).transpose()?.map(|(_, _, height, width)| (height, width));
        upsample.forward(&x, size)
    }
}
