//! The convolutional blocks that the UNet and the autoencoder share: residual blocks, up- and downsampling, and
//! attention between pixels.

use candle_core::Tensor;

use crate::{
    Result,
    nn::{
        Activation, AttentionOptions, Conv2d, Conv2dOptions, GroupNorm, Linear, attention, upsample_nearest,
        upsample_nearest_2x,
    },
    weights::Weights,
};

/// What the residual blocks of one model have in common.
#[derive(Clone, Debug)]
pub(crate) struct ResnetOptions {
    /// Groups of the norms.
    pub(crate) groups: usize,
    /// The epsilon of the norms.
    pub(crate) eps: f64,
    /// The activation.
    pub(crate) act: Activation,
    /// Values of the time embedding; none where there is no time.
    pub(crate) time_channels: Option<usize>,
    /// Whether the time scales and shifts the second norm instead of being added before it.
    pub(crate) is_scale_shift: bool,
    /// What the sum at the end is divided by.
    pub(crate) output_scale: f64,
}

/// Two convolutions around a shortcut (diffusers `ResnetBlock2D`); He et al. 2016, arXiv:1603.05027.
pub(crate) struct ResnetBlock {
    norm1: GroupNorm,
    conv1: Conv2d,
    time_emb_proj: Option<Linear>,
    norm2: GroupNorm,
    conv2: Conv2d,
    conv_shortcut: Option<Conv2d>,
    options: ResnetOptions,
}

impl ResnetBlock {
    pub(crate) fn new(inputs: usize, outputs: usize, options: &ResnetOptions, weights: &Weights) -> Result<Self> {
        let time_outputs = if options.is_scale_shift { 2 * outputs } else { outputs };
        let time_emb_proj = options
            .time_channels
            .map(|channels| weights.pp("time_emb_proj").linear(channels, time_outputs, true))
            .transpose()?;
        let conv_shortcut = if inputs == outputs {
            None
        } else {
            Some(weights.pp("conv_shortcut").conv2d(inputs, outputs, Conv2dOptions::same(1))?)
        };
        Ok(Self {
            norm1: weights.pp("norm1").group_norm(options.groups, inputs, options.eps)?,
            conv1: weights.pp("conv1").conv2d(inputs, outputs, Conv2dOptions::same(3))?,
            time_emb_proj,
            norm2: weights.pp("norm2").group_norm(options.groups, outputs, options.eps)?,
            conv2: weights.pp("conv2").conv2d(outputs, outputs, Conv2dOptions::same(3))?,
            conv_shortcut,
            options: options.clone(),
        })
    }

    /// `x` is `(batch, inputs, height, width)`, `time` is `(batch, time_channels)`.
    pub(crate) fn forward(&self, x: &Tensor, time: Option<&Tensor>) -> Result<Tensor> {
        let act = self.options.act;
        let hidden = self.conv1.forward(&act.forward(&self.norm1.forward(x)?)?)?;
        let hidden = match (&self.time_emb_proj, time) {
            (Some(proj), Some(time)) => self.modulate(&hidden, proj, time)?,
            _ => self.norm2.forward(&hidden)?,
        };
        let hidden = self.conv2.forward(&act.forward(&hidden)?)?;
        let shortcut = match &self.conv_shortcut {
            Some(conv) => conv.forward(x)?,
            None => x.clone(),
        };
        let sum = (shortcut + hidden)?;
        Ok(if self.options.output_scale == 1.0 { sum } else { (sum / self.options.output_scale)? })
    }

    /// The second norm, with the time added before it or scaling and shifting its result.
    fn modulate(&self, hidden: &Tensor, proj: &Linear, time: &Tensor) -> Result<Tensor> {
        let time = proj.forward(&self.options.act.forward(time)?)?.unsqueeze(2)?.unsqueeze(3)?;
        if !self.options.is_scale_shift {
            return self.norm2.forward(&hidden.broadcast_add(&time)?);
        }
        let channels = time.dim(1)? / 2;
        let (scale, shift) = (time.narrow(1, 0, channels)?, time.narrow(1, channels, channels)?);
        Ok(self.norm2.forward(hidden)?.broadcast_mul(&(scale + 1.0)?)?.broadcast_add(&shift)?)
    }
}

/// A convolution of stride 2 to half the size.
pub(crate) struct Downsample {
    conv: Conv2d,
    /// Zeros are added right and below only, by hand, when the configured padding is 0.
    is_one_sided: bool,
}

impl Downsample {
    pub(crate) fn new(channels: usize, padding: usize, weights: &Weights) -> Result<Self> {
        let options = Conv2dOptions { kernel: 3, stride: 2, padding, bias: true };
        Ok(Self { conv: weights.pp("conv").conv2d(channels, channels, options)?, is_one_sided: padding == 0 })
    }

    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if self.is_one_sided {
            self.conv.forward(&x.pad_with_zeros(2, 0, 1)?.pad_with_zeros(3, 0, 1)?)
        } else {
            self.conv.forward(x)
        }
    }
}

/// Nearest neighbour to twice the size or to a given size, then a convolution.
pub(crate) struct Upsample {
    conv: Conv2d,
}

impl Upsample {
    pub(crate) fn new(channels: usize, weights: &Weights) -> Result<Self> {
        Ok(Self { conv: weights.pp("conv").conv2d(channels, channels, Conv2dOptions::same(3))? })
    }

    /// `size` is `(height, width)`; twice the input when none.
    pub(crate) fn forward(&self, x: &Tensor, size: Option<(usize, usize)>) -> Result<Tensor> {
        let larger = match size {
            Some((height, width)) => upsample_nearest(x, height, width)?,
            None => upsample_nearest_2x(x)?,
        };
        self.conv.forward(&larger)
    }
}

/// Attention between the pixels of a feature map, with a norm before and the input added after (diffusers
/// `Attention` with `residual_connection`).
pub(crate) struct PixelAttention {
    group_norm: GroupNorm,
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
    heads: usize,
    output_scale: f64,
}

impl PixelAttention {
    pub(crate) fn new(channels: usize, heads: usize, options: &ResnetOptions, weights: &Weights) -> Result<Self> {
        let projection = |name: &str| weights.pp(name).linear(channels, channels, true);
        Ok(Self {
            group_norm: weights.pp("group_norm").group_norm(options.groups, channels, options.eps)?,
            to_q: projection("to_q")?,
            to_k: projection("to_k")?,
            to_v: projection("to_v")?,
            to_out: projection("to_out.0")?,
            heads,
            output_scale: options.output_scale,
        })
    }

    /// `(batch, channels, height, width)` to the same.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (_, _, height, width) = x.dims4()?;
        let rows = to_rows(&self.group_norm.forward(x)?)?;
        let attended = attention(
            &self.to_q.forward(&rows)?,
            &self.to_k.forward(&rows)?,
            &self.to_v.forward(&rows)?,
            AttentionOptions::heads(self.heads),
        )?;
        let sum = (x + to_map(&self.to_out.forward(&attended)?, height, width)?)?;
        Ok(if self.output_scale == 1.0 { sum } else { (sum / self.output_scale)? })
    }
}

/// `(batch, channels, height, width)` to `(batch, height * width, channels)`.
pub(crate) fn to_rows(map: &Tensor) -> Result<Tensor> {
    Ok(map.flatten_from(2)?.transpose(1, 2)?.contiguous()?)
}

/// `(batch, height * width, channels)` to `(batch, channels, height, width)`.
pub(crate) fn to_map(rows: &Tensor, height: usize, width: usize) -> Result<Tensor> {
    let (batch, _, channels) = rows.dims3()?;
    Ok(rows.transpose(1, 2)?.contiguous()?.reshape((batch, channels, height, width))?)
}
