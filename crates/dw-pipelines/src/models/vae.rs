//! The autoencoder between pictures and latents (diffusers `AutoencoderKL`); Rombach et al. 2022,
//! arXiv:2112.10752.
//!
//! Takes and returns what its layers compute. Scaling and shifting of latents, and the sampling of the
//! posterior, are the pipelines' part.

use candle_core::{DType, Device, Tensor};
use serde::Deserialize;

use super::{
    blocks::{Downsample, PixelAttention, ResnetBlock, ResnetOptions, Upsample},
    config::unsupported,
    tiling::Tiling,
};
use crate::{
    Error, Result,
    nn::{Activation, Conv2d, Conv2dOptions, GroupNorm},
    weights::Weights,
};

/// The epsilon of the autoencoder's norms, which no configuration names.
const NORM_EPS: f64 = 1e-6;

/// The bounds of the posterior's log variance (diffusers `DiagonalGaussianDistribution`).
const LOG_VARIANCE: (f64, f64) = (-30.0, 20.0);

/// The `config.json` of an autoencoder; what it leaves out has diffusers' defaults.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct VaeConfig {
    /// Channels of a picture to encode.
    pub in_channels: usize,
    /// Channels of a decoded picture.
    pub out_channels: usize,
    /// One block class per level of the encoder.
    pub down_block_types: Vec<String>,
    /// One block class per level of the decoder.
    pub up_block_types: Vec<String>,
    /// Channels per level, from the picture inwards.
    pub block_out_channels: Vec<usize>,
    /// Residual blocks per level of the encoder; the decoder has one more.
    pub layers_per_block: usize,
    /// The activation.
    pub act_fn: String,
    /// Channels of the latents.
    pub latent_channels: usize,
    /// Groups of the norms.
    pub norm_num_groups: usize,
    /// Height and width of the training pictures.
    pub sample_size: serde_json::Value,
    /// What latents are multiplied with for the denoiser.
    pub scaling_factor: f64,
    /// What is taken off latents before they are scaled.
    pub shift_factor: Option<f64>,
    /// Per-channel mean of the latents.
    pub latents_mean: Option<Vec<f64>>,
    /// Per-channel standard deviation of the latents.
    pub latents_std: Option<Vec<f64>>,
    /// Whether the model overflows in float16 and wants float32.
    pub force_upcast: bool,
    /// Whether a 1x1 convolution follows the encoder.
    pub use_quant_conv: bool,
    /// Whether a 1x1 convolution precedes the decoder.
    pub use_post_quant_conv: bool,
    /// Whether the middle has attention.
    pub mid_block_add_attention: bool,
}

impl Default for VaeConfig {
    fn default() -> Self {
        Self {
            in_channels: 3,
            out_channels: 3,
            down_block_types: vec![String::from("DownEncoderBlock2D")],
            up_block_types: vec![String::from("UpDecoderBlock2D")],
            block_out_channels: vec![64],
            layers_per_block: 1,
            act_fn: String::from("silu"),
            latent_channels: 4,
            norm_num_groups: 32,
            sample_size: serde_json::Value::from(32),
            scaling_factor: 0.18215,
            shift_factor: None,
            latents_mean: None,
            latents_std: None,
            force_upcast: true,
            use_quant_conv: true,
            use_post_quant_conv: true,
            mid_block_add_attention: true,
        }
    }
}

impl VaeConfig {
    /// How many pixels a latent stands for, per side.
    pub fn scale_factor(&self) -> usize {
        1 << self.block_out_channels.len().saturating_sub(1)
    }

    /// Tiles of the training size, as the reference chooses them, or of `sample` pixels.
    pub fn tiling(&self, sample: Option<usize>, overlap: Option<f64>) -> Result<Tiling> {
        let trained = self.sample_size.as_u64().or_else(|| self.sample_size.get(0)?.as_u64());
        let sample = sample.or(trained.map(|side| side as usize)).unwrap_or_default();
        Tiling::new(sample, self.scale_factor(), overlap)
    }

    fn check(&self) -> Result<()> {
        let levels = self.block_out_channels.len();
        for (key, types, known) in [
            ("down_block_types", &self.down_block_types, "DownEncoderBlock2D"),
            ("up_block_types", &self.up_block_types, "UpDecoderBlock2D"),
        ] {
            if let Some(other) = types.iter().find(|name| *name != known) {
                return Err(unsupported(key, other));
            }
            if levels == 0 || types.len() != levels {
                return Err(Error::Unsupported(format!(
                    "`{key}` names {} blocks, but `block_out_channels` has {levels} values; they must agree",
                    types.len()
                )));
            }
        }
        Ok(())
    }
}

/// The autoencoder.
pub struct AutoencoderKl {
    config: VaeConfig,
    encoder: Encoder,
    quant_conv: Option<Conv2d>,
    post_quant_conv: Option<Conv2d>,
    decoder: Decoder,
    /// Kept to rebuild the model in another type; the tensors are shared with the layers.
    weights: Weights,
}

impl AutoencoderKl {
    /// Builds encoder and decoder. Attention weights may have their old names (`query`, `proj_attn`).
    pub fn new(config: &VaeConfig, weights: Weights) -> Result<Self> {
        config.check()?;
        let weights = weights.renamed(modern_attention_name);
        let latent = config.latent_channels;
        let quant_conv = config
            .use_quant_conv
            .then(|| weights.pp("quant_conv").conv2d(2 * latent, 2 * latent, Conv2dOptions::same(1)))
            .transpose()?;
        let post_quant_conv = config
            .use_post_quant_conv
            .then(|| weights.pp("post_quant_conv").conv2d(latent, latent, Conv2dOptions::same(1)))
            .transpose()?;
        Ok(Self {
            encoder: Encoder::new(config, &weights.pp("encoder"))?,
            quant_conv,
            post_quant_conv,
            decoder: Decoder::new(config, &weights.pp("decoder"))?,
            config: config.clone(),
            weights,
        })
    }

    /// The configuration it was built from.
    pub fn config(&self) -> &VaeConfig {
        &self.config
    }

    /// The type pictures and latents have.
    pub fn dtype(&self) -> DType {
        self.weights.dtype()
    }

    /// Where the model is.
    pub fn device(&self) -> &Device {
        self.weights.device()
    }

    /// The same model with weights of another type.
    pub fn with_dtype(&self, dtype: DType) -> Result<Self> {
        Self::new(&self.config, self.weights.to_dtype(dtype)?)
    }

    /// Latents `(batch, latent_channels, h, w)`, unscaled, to pictures `(batch, out_channels, f h, f w)` about in
    /// -1..1, where f is [`VaeConfig::scale_factor`].
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        let latents = latents.to_device(self.device())?.to_dtype(self.dtype())?;
        let latents = match &self.post_quant_conv {
            Some(conv) => conv.forward(&latents)?,
            None => latents,
        };
        self.decoder.forward(&latents)
    }

    /// As [`Self::decode`], in tiles where the latents are larger than one (diffusers `tiled_decode`).
    pub fn decode_tiled(&self, latents: &Tensor, tiling: &Tiling) -> Result<Tensor> {
        let steps = tiling.decoding();
        if steps.divide(latents)? { steps.run(latents, &mut |tile| self.decode(tile)) } else { self.decode(latents) }
    }

    /// Pictures `(batch, in_channels, height, width)` in -1..1 to mean and log variance of the posterior, each
    /// `(batch, latent_channels, height / f, width / f)`; the log variance is clamped to -30..20.
    pub fn encode(&self, pictures: &Tensor) -> Result<(Tensor, Tensor)> {
        self.posterior(&self.moments(pictures)?)
    }

    /// As [`Self::encode`], in tiles where the pictures are larger than one (diffusers `tiled_encode`).
    pub fn encode_tiled(&self, pictures: &Tensor, tiling: &Tiling) -> Result<(Tensor, Tensor)> {
        let steps = tiling.encoding();
        if !steps.divide(pictures)? {
            return self.encode(pictures);
        }
        self.posterior(&steps.run(pictures, &mut |tile| self.moments(tile))?)
    }

    /// What the encoder says, `(batch, 2 * latent_channels, height / f, width / f)`.
    fn moments(&self, pictures: &Tensor) -> Result<Tensor> {
        let moments = self.encoder.forward(&pictures.to_device(self.device())?.to_dtype(self.dtype())?)?;
        match &self.quant_conv {
            Some(conv) => conv.forward(&moments),
            None => Ok(moments),
        }
    }

    /// Mean and log variance.
    fn posterior(&self, moments: &Tensor) -> Result<(Tensor, Tensor)> {
        let latent = self.config.latent_channels;
        let mean = moments.narrow(1, 0, latent)?.contiguous()?;
        let log_variance = moments.narrow(1, latent, latent)?.contiguous()?.clamp(LOG_VARIANCE.0, LOG_VARIANCE.1)?;
        Ok((mean, log_variance))
    }
}

/// The present name of an attention weight saved by an old diffusers.
fn modern_attention_name(name: &str) -> Option<String> {
    const NAMES: [(&str, &str); 4] =
        [(".query.", ".to_q."), (".key.", ".to_k."), (".value.", ".to_v."), (".proj_attn.", ".to_out.0.")];
    let (old, new) = NAMES.iter().find(|(old, _)| name.contains("mid_block.attentions.") && name.contains(old))?;
    Some(name.replace(old, new))
}

fn resnet_options(config: &VaeConfig) -> Result<ResnetOptions> {
    Ok(ResnetOptions {
        groups: config.norm_num_groups,
        eps: NORM_EPS,
        act: Activation::parse("act_fn", &config.act_fn)?,
        time_channels: None,
        is_scale_shift: false,
        output_scale: 1.0,
    })
}

fn last_channels(config: &VaeConfig) -> usize {
    config.block_out_channels.last().copied().unwrap_or_default()
}

struct Encoder {
    conv_in: Conv2d,
    levels: Vec<EncoderLevel>,
    middle: Middle,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

struct EncoderLevel {
    resnets: Vec<ResnetBlock>,
    downsample: Option<Downsample>,
}

impl Encoder {
    fn new(config: &VaeConfig, weights: &Weights) -> Result<Self> {
        let options = resnet_options(config)?;
        let channels = &config.block_out_channels;
        let last = last_channels(config);
        let level = |(i, &outputs): (usize, &usize)| -> Result<EncoderLevel> {
            let weights = weights.pp("down_blocks").pp(i);
            let inputs = channels[i.saturating_sub(1)];
            let downsample = (i + 1 < channels.len())
                .then(|| Downsample::new(outputs, 0, &weights.pp("downsamplers.0")))
                .transpose()?;
            Ok(EncoderLevel {
                resnets: resnets(inputs, outputs, config.layers_per_block, &options, &weights)?,
                downsample,
            })
        };
        Ok(Self {
            conv_in: weights.pp("conv_in").conv2d(config.in_channels, channels[0], Conv2dOptions::same(3))?,
            levels: channels.iter().enumerate().map(level).collect::<Result<_>>()?,
            middle: Middle::new(config, &options, &weights.pp("mid_block"))?,
            conv_norm_out: weights.pp("conv_norm_out").group_norm(config.norm_num_groups, last, NORM_EPS)?,
            conv_out: weights.pp("conv_out").conv2d(last, 2 * config.latent_channels, Conv2dOptions::same(3))?,
        })
    }

    fn forward(&self, pictures: &Tensor) -> Result<Tensor> {
        let mut x = self.conv_in.forward(pictures)?;
        for level in &self.levels {
            for resnet in &level.resnets {
                x = resnet.forward(&x, None)?;
            }
            if let Some(downsample) = &level.downsample {
                x = downsample.forward(&x)?;
            }
        }
        let x = self.middle.forward(&x)?;
        self.conv_out.forward(&Activation::Silu.forward(&self.conv_norm_out.forward(&x)?)?)
    }
}

struct Decoder {
    conv_in: Conv2d,
    middle: Middle,
    levels: Vec<DecoderLevel>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

struct DecoderLevel {
    resnets: Vec<ResnetBlock>,
    upsample: Option<Upsample>,
}

impl Decoder {
    fn new(config: &VaeConfig, weights: &Weights) -> Result<Self> {
        let options = resnet_options(config)?;
        let channels: Vec<usize> = config.block_out_channels.iter().rev().copied().collect();
        let first = config.block_out_channels[0];
        let level = |(i, &outputs): (usize, &usize)| -> Result<DecoderLevel> {
            let weights = weights.pp("up_blocks").pp(i);
            let inputs = channels[i.saturating_sub(1)];
            let upsample =
                (i + 1 < channels.len()).then(|| Upsample::new(outputs, &weights.pp("upsamplers.0"))).transpose()?;
            let count = config.layers_per_block + 1;
            Ok(DecoderLevel { resnets: resnets(inputs, outputs, count, &options, &weights)?, upsample })
        };
        Ok(Self {
            conv_in: weights.pp("conv_in").conv2d(config.latent_channels, channels[0], Conv2dOptions::same(3))?,
            middle: Middle::new(config, &options, &weights.pp("mid_block"))?,
            levels: channels.iter().enumerate().map(level).collect::<Result<_>>()?,
            conv_norm_out: weights.pp("conv_norm_out").group_norm(config.norm_num_groups, first, NORM_EPS)?,
            conv_out: weights.pp("conv_out").conv2d(first, config.out_channels, Conv2dOptions::same(3))?,
        })
    }

    fn forward(&self, latents: &Tensor) -> Result<Tensor> {
        let mut x = self.middle.forward(&self.conv_in.forward(latents)?)?;
        for level in &self.levels {
            for resnet in &level.resnets {
                x = resnet.forward(&x, None)?;
            }
            if let Some(upsample) = &level.upsample {
                x = upsample.forward(&x, None)?;
            }
        }
        self.conv_out.forward(&Activation::Silu.forward(&self.conv_norm_out.forward(&x)?)?)
    }
}

/// The residual blocks of one level: the first changes the channels.
fn resnets(
    inputs: usize,
    outputs: usize,
    count: usize,
    options: &ResnetOptions,
    weights: &Weights,
) -> Result<Vec<ResnetBlock>> {
    (0..count)
        .map(|i| {
            let inputs = if i == 0 { inputs } else { outputs };
            ResnetBlock::new(inputs, outputs, options, &weights.pp("resnets").pp(i))
        })
        .collect()
}

/// The middle of encoder and decoder: attention with one head between two residual blocks.
struct Middle {
    first: ResnetBlock,
    attention: Option<PixelAttention>,
    second: ResnetBlock,
}

impl Middle {
    fn new(config: &VaeConfig, options: &ResnetOptions, weights: &Weights) -> Result<Self> {
        let channels = last_channels(config);
        let attention = config
            .mid_block_add_attention
            .then(|| PixelAttention::new(channels, 1, options, &weights.pp("attentions.0")))
            .transpose()?;
        Ok(Self {
            first: ResnetBlock::new(channels, channels, options, &weights.pp("resnets.0"))?,
            attention,
            second: ResnetBlock::new(channels, channels, options, &weights.pp("resnets.1"))?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = self.first.forward(x, None)?;
        let x = match &self.attention {
            Some(attention) => attention.forward(&x)?,
            None => x,
        };
        self.second.forward(&x, None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_attention_names_are_read_as_the_present_ones() {
        let name = |old: &str| modern_attention_name(&format!("decoder.mid_block.attentions.0.{old}"));
        assert_eq!(name("query.weight").as_deref(), Some("decoder.mid_block.attentions.0.to_q.weight"));
        assert_eq!(name("proj_attn.bias").as_deref(), Some("decoder.mid_block.attentions.0.to_out.0.bias"));
        assert_eq!(name("to_q.weight"), None);
        assert_eq!(modern_attention_name("encoder.conv_in.weight"), None);
    }

    #[test]
    fn a_block_class_that_is_not_known_is_named_with_its_key() {
        let config: VaeConfig = serde_json::from_str(r#"{"up_block_types": ["AttnUpDecoderBlock2D"]}"#)
            .expect("a configuration of known keys");
        let error = config.check().expect_err("the block is not supported");
        assert!(error.to_string().contains("`up_block_types`: `AttnUpDecoderBlock2D`"), "{error}");
    }
}
