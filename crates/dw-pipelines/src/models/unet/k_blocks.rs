//! The levels of k-diffusion's UNets (diffusers `KDownBlock2D`, `KCrossAttnDownBlock2D`, `KUpBlock2D` and
//! `KCrossAttnUpBlock2D`; Karras et al. 2022, arXiv:2206.00364): norms whose scale and shift come from the time, sizes
//! changed by a fixed filter, and one skip connection for each level.

use candle_core::{DType, Tensor};

use super::{
    blocks::Conditioning,
    config::{BlockPlan, UnetConfig},
};
use crate::{
    Error, Result,
    models::{
        blocks::{to_map, to_rows},
        config::unsupported,
    },
    nn::{Activation, AttentionOptions, Conv2d, Conv2dOptions, LayerNorm, Linear, attention},
    weights::Weights,
};

/// Channels of a group of the norms, which no configuration names.
const GROUP_SIZE: usize = 32;
/// The epsilon of the norms inside attention, which no configuration names.
const NORM_EPS: f64 = 1e-5;
/// One side of the filter that changes sizes; the filter is its outer product with itself.
const FILTER: [f32; 4] = [0.125, 0.375, 0.375, 0.125];

/// Whether a block's class is one of these.
pub(crate) fn is_k_block(class: &str) -> bool {
    class.starts_with('K')
}

/// What all layers of one model have in common.
struct Shared {
    time_channels: usize,
    text_dim: usize,
    head_dim: usize,
    eps: f64,
    act: Activation,
}

impl Shared {
    fn new(config: &UnetConfig, plan: &BlockPlan) -> Result<Self> {
        let (time_channels, eps, act) = (config.time_embed_dim(), config.norm_eps, config.act()?);
        Ok(Self { time_channels, text_dim: plan.text_dim, head_dim: plan.head_dim, eps, act })
    }
}

/// A group norm whose scale and shift are read off the time (diffusers `AdaGroupNorm`).
struct ConditionedNorm {
    linear: Linear,
    /// `(channels,)`: the norm's own scale and shift do nothing.
    ones: Tensor,
    zeros: Tensor,
    groups: usize,
    eps: f64,
}

impl ConditionedNorm {
    fn new(channels: usize, eps: f64, shared: &Shared, weights: &Weights) -> Result<Self> {
        let groups = (channels / GROUP_SIZE).max(1);
        if !channels.is_multiple_of(groups) {
            return Err(unsupported("block_out_channels", channels));
        }
        let ones = Tensor::ones(channels, DType::F32, weights.device())?;
        let linear = weights.pp("linear").linear(shared.time_channels, 2 * channels, true)?;
        Ok(Self { linear, zeros: ones.zeros_like()?, ones, groups, eps })
    }

    /// `x` is `(batch, channels, height, width)`, `time` is `(batch, time_channels)`.
    fn forward(&self, x: &Tensor, time: &Tensor) -> Result<Tensor> {
        let both = self.linear.forward(time)?.unsqueeze(2)?.unsqueeze(3)?;
        let channels = self.ones.dim(0)?;
        let (scale, shift) = (both.narrow(1, 0, channels)?, both.narrow(1, channels, channels)?);
        let wide = x.to_dtype(DType::F32)?;
        let normed = dw_kernels::group_norm(&wide, self.groups, &self.ones, &self.zeros, self.eps, false)?;
        let normed = normed.to_dtype(x.dtype())?;
        Ok(normed.broadcast_mul(&(scale + 1.0)?)?.broadcast_add(&shift)?)
    }
}

/// Two convolutions around a shortcut (diffusers `ResnetBlockCondNorm2D`).
struct ResidualBlock {
    norm1: ConditionedNorm,
    conv1: Conv2d,
    norm2: ConditionedNorm,
    conv2: Conv2d,
    conv_shortcut: Option<Conv2d>,
    act: Activation,
}

impl ResidualBlock {
    /// `inner` are the channels between the convolutions.
    fn new(inputs: usize, inner: usize, outputs: usize, shared: &Shared, weights: &Weights) -> Result<Self> {
        let shortcut = Conv2dOptions { bias: false, ..Conv2dOptions::same(1) };
        let conv_shortcut =
            (inputs != outputs).then(|| weights.pp("conv_shortcut").conv2d(inputs, outputs, shortcut)).transpose()?;
        Ok(Self {
            norm1: ConditionedNorm::new(inputs, shared.eps, shared, &weights.pp("norm1"))?,
            conv1: weights.pp("conv1").conv2d(inputs, inner, Conv2dOptions::same(3))?,
            norm2: ConditionedNorm::new(inner, shared.eps, shared, &weights.pp("norm2"))?,
            conv2: weights.pp("conv2").conv2d(inner, outputs, Conv2dOptions::same(3))?,
            conv_shortcut,
            act: shared.act,
        })
    }

    fn forward(&self, x: &Tensor, time: &Tensor) -> Result<Tensor> {
        let hidden = self.conv1.forward(&self.act.forward(&self.norm1.forward(x, time)?)?)?;
        let hidden = self.conv2.forward(&self.act.forward(&self.norm2.forward(&hidden, time)?)?)?;
        let shortcut = self.conv_shortcut.as_ref().map_or_else(|| Ok(x.clone()), |conv| conv.forward(x))?;
        Ok((shortcut + hidden)?)
    }
}

/// Multi-head attention of pixels to each other or to the text, added to its input.
struct AttentionLayer {
    norm: ConditionedNorm,
    /// The norm of the text; none for attention between pixels.
    text_norm: Option<LayerNorm>,
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
    heads: usize,
}

impl AttentionLayer {
    /// `name` is `1` for attention between pixels and `2` for attention to the text.
    fn new(channels: usize, name: &str, shared: &Shared, weights: &Weights) -> Result<Self> {
        let is_cross = name == "2";
        let context = if is_cross { shared.text_dim } else { channels };
        if shared.head_dim == 0 || !channels.is_multiple_of(shared.head_dim) {
            return Err(unsupported("attention_head_dim", shared.head_dim));
        }
        let path = weights.pp(format!("attn{name}"));
        let text_norm = is_cross.then(|| path.pp("norm_cross").layer_norm(context, NORM_EPS)).transpose()?;
        Ok(Self {
            norm: ConditionedNorm::new(channels, NORM_EPS, shared, &weights.pp(format!("norm{name}")))?,
            text_norm,
            to_q: path.pp("to_q").linear(channels, channels, true)?,
            to_k: path.pp("to_k").linear(context, channels, true)?,
            to_v: path.pp("to_v").linear(context, channels, true)?,
            to_out: path.pp("to_out.0").linear(channels, channels, true)?,
            heads: channels / shared.head_dim,
        })
    }

    fn forward(&self, x: &Tensor, conditioning: Conditioning) -> Result<Tensor> {
        let (_, _, height, width) = x.dims4()?;
        let rows = to_rows(&self.norm.forward(x, conditioning.time)?)?;
        let context = match &self.text_norm {
            Some(norm) => norm.forward(conditioning.text)?,
            None => rows.clone(),
        };
        let (key, value) = (self.to_k.forward(&context)?, self.to_v.forward(&context)?);
        let attended = attention(&self.to_q.forward(&rows)?, &key, &value, AttentionOptions::heads(self.heads))?;
        Ok((to_map(&self.to_out.forward(&attended)?, height, width)? + x)?)
    }
}

/// A residual block and the attention after it: none, to the text, or between pixels and then to the text.
struct Layer {
    resnet: ResidualBlock,
    attentions: Vec<AttentionLayer>,
}

impl Layer {
    fn forward(&self, x: &Tensor, conditioning: Conditioning) -> Result<Tensor> {
        let mut x = self.resnet.forward(x, conditioning.time)?;
        for attention in &self.attentions {
            x = attention.forward(&x, conditioning)?;
        }
        Ok(x)
    }
}

/// Which attention the layers of a level have.
fn attention_names(is_cross: bool, has_self: bool) -> &'static [&'static str] {
    match (is_cross, has_self) {
        (false, _) => &[],
        (true, false) => &["2"],
        (true, true) => &["1", "2"],
    }
}

fn attentions(channels: usize, names: &[&str], shared: &Shared, weights: &Weights) -> Result<Vec<AttentionLayer>> {
    names.iter().map(|name| AttentionLayer::new(channels, name, shared, weights)).collect()
}

/// One level on the way down.
pub(crate) struct KDownBlock {
    layers: Vec<Layer>,
    is_last: bool,
    /// Whether the level hands its map to the way up; the last one with attention does not.
    is_skipped_to: bool,
}

impl KDownBlock {
    pub(crate) fn new(config: &UnetConfig, plan: &BlockPlan, inputs: usize, weights: &Weights) -> Result<Self> {
        let is_cross = match plan.class.as_str() {
            "KDownBlock2D" => false,
            "KCrossAttnDownBlock2D" => true,
            other => return Err(unsupported("down_block_types", other)),
        };
        let shared = Shared::new(config, plan)?;
        let names = attention_names(is_cross, plan.is_last);
        let layer = |i: usize| -> Result<Layer> {
            let (inputs, channels) = (if i == 0 { inputs } else { plan.channels }, plan.channels);
            Ok(Layer {
                resnet: ResidualBlock::new(inputs, channels, channels, &shared, &weights.pp("resnets").pp(i))?,
                attentions: attentions(channels, names, &shared, &weights.pp("attentions").pp(i))?,
            })
        };
        let layers = (0..plan.layers).map(layer).collect::<Result<_>>()?;
        Ok(Self { layers, is_last: plan.is_last, is_skipped_to: !(is_cross && plan.is_last) })
    }

    /// The feature map after the level; the last one before the size changes is pushed to `skips`.
    pub(crate) fn forward(&self, x: &Tensor, conditioning: Conditioning, skips: &mut Vec<Tensor>) -> Result<Tensor> {
        let mut x = x.clone();
        for layer in &self.layers {
            x = layer.forward(&x, conditioning)?;
        }
        if self.is_skipped_to {
            skips.push(x.clone());
        }
        if self.is_last { Ok(x) } else { halved(&x) }
    }
}

/// One level on the way up.
pub(crate) struct KUpBlock {
    layers: Vec<Layer>,
    is_last: bool,
    takes_skip: bool,
}

impl KUpBlock {
    /// `outputs` are the channels of the next level up.
    pub(crate) fn new(config: &UnetConfig, plan: &BlockPlan, outputs: usize, weights: &Weights) -> Result<Self> {
        let is_cross = match plan.class.as_str() {
            "KUpBlock2D" => false,
            "KCrossAttnUpBlock2D" => true,
            other => return Err(unsupported("up_block_types", other)),
        };
        let shared = Shared::new(config, plan)?;
        let channels = plan.channels;
        // The reference knows the first level by its sizes.
        let is_first = is_cross && channels == outputs && channels == shared.time_channels;
        let names = attention_names(is_cross, is_first);
        // A level on the way up has one layer more in other models, but not in these.
        let layers = plan.layers.saturating_sub(1);
        let layer = |i: usize| -> Result<Layer> {
            let is_end = i + 1 == layers;
            let inputs = if i == 0 && !is_first { 2 * channels } else { channels };
            let own = if is_end { outputs } else { channels };
            let inner = if is_cross { channels } else { own };
            Ok(Layer {
                resnet: ResidualBlock::new(inputs, inner, own, &shared, &weights.pp("resnets").pp(i))?,
                attentions: attentions(own, names, &shared, &weights.pp("attentions").pp(i))?,
            })
        };
        let layers = (0..layers).map(layer).collect::<Result<_>>()?;
        Ok(Self { layers, is_last: plan.is_last, takes_skip: !is_first })
    }

    /// Takes the skip connection of its level off the end of `skips`.
    pub(crate) fn forward(&self, x: &Tensor, conditioning: Conditioning, skips: &mut Vec<Tensor>) -> Result<Tensor> {
        let mut x = x.clone();
        if self.takes_skip {
            let skip = skips.pop().ok_or_else(|| {
                Error::Unsupported(String::from("`up_block_types` has more levels than the way down"))
            })?;
            x = Tensor::cat(&[&x, &skip], 1)?;
        }
        for layer in &self.layers {
            x = layer.forward(&x, conditioning)?;
        }
        if self.is_last { Ok(x) } else { doubled(&x) }
    }
}

/// Half the size, through the filter (diffusers `KDownsample2D`).
fn halved(x: &Tensor) -> Result<Tensor> {
    let (batch, channels, height, width) = x.dims4()?;
    if height < 2 || width < 2 {
        return Err(too_small(height, width));
    }
    let planes = reflected(&x.reshape((batch * channels, 1, height, width))?)?.to_dtype(DType::F32)?;
    let smaller = planes.conv2d(&filter(1.0, x)?, 0, 2, 1, 1)?;
    let (_, _, height, width) = smaller.dims4()?;
    Ok(smaller.reshape((batch, channels, height, width))?.to_dtype(x.dtype())?)
}

/// Twice the size, through the filter (diffusers `KUpsample2D`).
fn doubled(x: &Tensor) -> Result<Tensor> {
    let (batch, channels, height, width) = x.dims4()?;
    if height < 2 || width < 2 {
        return Err(too_small(height, width));
    }
    let planes = reflected(&x.reshape((batch * channels, 1, height, width))?)?.to_dtype(DType::F32)?;
    let larger = planes.conv_transpose2d(&filter(2.0, x)?, 3, 0, 2, 1)?;
    Ok(larger.reshape((batch, channels, 2 * height, 2 * width))?.to_dtype(x.dtype())?)
}

/// The filter as the weight of a convolution, `(1, 1, 4, 4)`, each side multiplied by `scale`.
fn filter(scale: f32, like: &Tensor) -> Result<Tensor> {
    let values: Vec<f32> = FILTER.iter().flat_map(|a| FILTER.map(|b| (a * scale) * (b * scale))).collect();
    Ok(Tensor::from_vec(values, (1, 1, FILTER.len(), FILTER.len()), like.device())?)
}

/// One line more on each side, mirrored at the outermost one.
fn reflected(planes: &Tensor) -> Result<Tensor> {
    let mut padded = planes.clone();
    for dim in [2, 3] {
        let length = padded.dim(dim)?;
        let lines = [padded.narrow(dim, 1, 1)?, padded.clone(), padded.narrow(dim, length - 2, 1)?];
        padded = Tensor::cat(&lines, dim)?;
    }
    Ok(padded)
}

fn too_small(height: usize, width: usize) -> Error {
    Error::Argument {
        name: "image".into(),
        reason: format!(
            "leaves a feature map of {width} x {height} inside the model, which is too small; use a larger picture"
        ),
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn values(x: &Tensor) -> Vec<f32> {
        x.flatten_all().and_then(|x| x.to_vec1()).expect("f32")
    }

    #[test]
    fn an_even_picture_stays_even_when_its_size_changes() {
        let x = Tensor::ones((2, 3, 4, 6), DType::F32, &Device::Cpu).expect("ones");
        let (half, twice) = (halved(&x).expect("even sides"), doubled(&x).expect("any sides"));
        assert_eq!((half.dims(), twice.dims()), (&[2, 3, 2, 3][..], &[2, 3, 8, 12][..]));
        assert!(values(&half).iter().chain(&values(&twice)).all(|value| (value - 1.0).abs() < 1e-6));
    }

    #[test]
    fn a_ramp_is_halved_between_its_pixels() {
        let ramp =
            Tensor::arange(0f32, 4.0, &Device::Cpu).and_then(|ramp| ramp.reshape((1, 1, 1, 4))?.repeat((1, 1, 2, 1)));
        let half = halved(&ramp.expect("a ramp")).expect("even sides");
        // Mirrored at the edge: (1, 0, 1, 2) and (1, 2, 3, 2) under the filter.
        assert_eq!(values(&half), [0.75, 2.25]);
    }
}
