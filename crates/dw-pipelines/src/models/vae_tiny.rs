//! The small autoencoder that stands in for a full one (diffusers `AutoencoderTiny`; TAESD,
//! <https://github.com/madebyollin/taesd>): convolutions alone, no posterior to draw from.

use candle_core::{DType, Device, Tensor};
use serde::Deserialize;

use super::{config::unsupported, tiling::Tiling, vae::VaeConfig};
use crate::{
    Error, Result,
    nn::{Activation, Conv2d, Conv2dOptions, upsample_nearest},
    weights::Weights,
};

/// Height and width in pixels of a tile, where nothing else is asked for.
const TILE: usize = 512;
/// How much of a tile its neighbour sees too, where nothing else is asked for.
const OVERLAP: f64 = 0.125;
/// Beyond this magnitude latents are bent back before they are decoded.
const LATENT_BOUND: f64 = 3.0;

/// The `config.json` of a small autoencoder; what it leaves out has diffusers' defaults.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct TinyVaeConfig {
    /// Channels of a picture to encode.
    pub in_channels: usize,
    /// Channels of a decoded picture.
    pub out_channels: usize,
    /// Channels per level of the encoder, from the picture inwards; all the same.
    pub encoder_block_out_channels: Vec<usize>,
    /// Channels per level of the decoder, from the latents outwards; all the same.
    pub decoder_block_out_channels: Vec<usize>,
    /// The activation.
    pub act_fn: String,
    /// How the decoder grows its maps.
    pub upsample_fn: String,
    /// Channels of the latents.
    pub latent_channels: usize,
    /// How much the decoder grows its maps per level.
    pub upsampling_scaling_factor: usize,
    /// Residual blocks per level of the encoder.
    pub num_encoder_blocks: Vec<usize>,
    /// Residual blocks per level of the decoder.
    pub num_decoder_blocks: Vec<usize>,
    /// What latents are multiplied with for the denoiser.
    pub scaling_factor: f64,
    /// What is taken off latents before they are scaled.
    pub shift_factor: f64,
}

impl Default for TinyVaeConfig {
    fn default() -> Self {
        Self {
            in_channels: 3,
            out_channels: 3,
            encoder_block_out_channels: vec![64; 4],
            decoder_block_out_channels: vec![64; 4],
            act_fn: String::from("relu"),
            upsample_fn: String::from("nearest"),
            latent_channels: 4,
            upsampling_scaling_factor: 2,
            num_encoder_blocks: vec![1, 3, 3, 3],
            num_decoder_blocks: vec![3, 3, 3, 1],
            scaling_factor: 1.0,
            shift_factor: 0.0,
        }
    }
}

impl TinyVaeConfig {
    /// What pipelines ask an autoencoder's configuration about, in the words of the full one's.
    fn as_full(&self) -> VaeConfig {
        VaeConfig {
            in_channels: self.in_channels,
            out_channels: self.out_channels,
            block_out_channels: self.decoder_block_out_channels.clone(),
            latent_channels: self.latent_channels,
            sample_size: TILE.into(),
            scaling_factor: self.scaling_factor,
            shift_factor: Some(self.shift_factor),
            force_upcast: false,
            ..VaeConfig::default()
        }
    }

    fn check(&self) -> Result<()> {
        if self.upsample_fn != "nearest" {
            return Err(unsupported("upsample_fn", &self.upsample_fn));
        }
        for (channels, blocks, what) in [
            (&self.encoder_block_out_channels, &self.num_encoder_blocks, "encoder"),
            (&self.decoder_block_out_channels, &self.num_decoder_blocks, "decoder"),
        ] {
            if channels.is_empty() || channels.len() != blocks.len() || channels.iter().any(|all| *all != channels[0]) {
                return Err(Error::Unsupported(format!(
                    "`{what}_block_out_channels` is {channels:?} and `num_{what}_blocks` {blocks:?}; they must be of \
                     one length, and the channels the same in all levels"
                )));
            }
        }
        Ok(())
    }
}

/// The small autoencoder.
pub struct AutoencoderTiny {
    config: TinyVaeConfig,
    full: VaeConfig,
    encoder: Vec<Layer>,
    decoder: Vec<Layer>,
    /// Kept to rebuild the model in another type; the tensors are shared with the layers.
    weights: Weights,
}

impl AutoencoderTiny {
    /// Builds encoder and decoder.
    pub fn new(config: &TinyVaeConfig, weights: Weights) -> Result<Self> {
        config.check()?;
        Ok(Self {
            encoder: encoder(config, &weights.pp("encoder.layers"))?,
            decoder: decoder(config, &weights.pp("decoder.layers"))?,
            full: config.as_full(),
            config: config.clone(),
            weights,
        })
    }

    /// The configuration in the words of the full autoencoder's.
    pub fn config(&self) -> &VaeConfig {
        &self.full
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

    /// Tiles of `sample` pixels, or of the reference's size.
    pub fn tiling(&self, sample: Option<usize>, overlap: Option<f64>) -> Result<Tiling> {
        self.full.tiling(sample, Some(overlap.unwrap_or(OVERLAP)))
    }

    /// Latents `(batch, latent_channels, h, w)`, unscaled, to pictures `(batch, out_channels, f h, f w)` about in
    /// -1..1, where f is [`VaeConfig::scale_factor`].
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        let bounded = ((self.own(latents)? / LATENT_BOUND)?.tanh()? * LATENT_BOUND)?;
        Ok(run(&self.decoder, bounded)?.affine(2.0, -1.0)?)
    }

    /// As [`Self::decode`], in tiles laid over each other (diffusers `AutoencoderTiny._tiled_decode`).
    pub fn decode_tiled(&self, latents: &Tensor, tiling: &Tiling) -> Result<Tensor> {
        let scale = self.full.scale_factor();
        let blend = (tiling.latent as f64 * tiling.overlap) as usize;
        let at = |latent: usize| latent * scale;
        let shape = (self.full.out_channels, tiling.latent, tiling.latent - blend, blend * scale);
        overlaid(&self.own(latents)?, shape, &at, &mut |tile| self.decode(tile))
    }

    /// Pictures `(batch, in_channels, height, width)` in -1..1 to latents `(batch, latent_channels, height / f,
    /// width / f)`.
    pub fn encode(&self, pictures: &Tensor) -> Result<Tensor> {
        run(&self.encoder, self.own(pictures)?.affine(0.5, 0.5)?)
    }

    /// As [`Self::encode`], in tiles laid over each other (diffusers `AutoencoderTiny._tiled_encode`).
    pub fn encode_tiled(&self, pictures: &Tensor, tiling: &Tiling) -> Result<Tensor> {
        let scale = self.full.scale_factor();
        let blend = (tiling.sample as f64 * tiling.overlap) as usize;
        let at = |pixel: usize| pixel / scale;
        let shape = (self.full.latent_channels, tiling.sample, tiling.sample - blend, blend / scale);
        overlaid(&self.own(pictures)?, shape, &at, &mut |tile| self.encode(tile))
    }

    /// In the model's type, on its device.
    fn own(&self, tensor: &Tensor) -> Result<Tensor> {
        Ok(tensor.to_device(self.device())?.to_dtype(self.dtype())?)
    }
}

/// One entry of the list that a half of the model is.
enum Layer {
    Convolution(Conv2d),
    Activation(Activation),
    Block(Block),
    Upsample(usize),
}

impl Layer {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Convolution(conv) => conv.forward(x),
            Self::Activation(activation) => activation.forward(x),
            Self::Block(block) => block.forward(x),
            Self::Upsample(factor) => {
                let (_, _, height, width) = x.dims4()?;
                upsample_nearest(x, height * factor, width * factor)
            }
        }
    }
}

fn run(layers: &[Layer], x: Tensor) -> Result<Tensor> {
    layers.iter().try_fold(x, |x, layer| layer.forward(&x))
}

/// Three convolutions beside their input.
struct Block {
    convolutions: [Conv2d; 3],
    activation: Activation,
}

impl Block {
    fn new(channels: usize, activation: Activation, weights: &Weights) -> Result<Self> {
        let conv = |at: usize| weights.pp("conv").pp(at).conv2d(channels, channels, Conv2dOptions::same(3));
        Ok(Self { convolutions: [conv(0)?, conv(2)?, conv(4)?], activation })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let [first, second, third] = &self.convolutions;
        let hidden = self.activation.forward(&first.forward(x)?)?;
        let hidden = self.activation.forward(&second.forward(&hidden)?)?;
        Activation::Relu.forward(&(third.forward(&hidden)? + x)?)
    }
}

/// Reads layers one after the other: the number in the list is the path.
struct Reader<'a> {
    layers: Vec<Layer>,
    activation: Activation,
    weights: &'a Weights,
}

impl Reader<'_> {
    fn convolution(&mut self, inputs: usize, outputs: usize, (stride, bias): (usize, bool)) -> Result<()> {
        let options = Conv2dOptions { stride, bias, ..Conv2dOptions::same(3) };
        let conv = self.weights.pp(self.layers.len()).conv2d(inputs, outputs, options)?;
        self.layers.push(Layer::Convolution(conv));
        Ok(())
    }

    fn blocks(&mut self, channels: usize, count: usize) -> Result<()> {
        for _ in 0..count {
            let block = Block::new(channels, self.activation, &self.weights.pp(self.layers.len()))?;
            self.layers.push(Layer::Block(block));
        }
        Ok(())
    }
}

fn reader<'a>(config: &TinyVaeConfig, weights: &'a Weights) -> Result<Reader<'a>> {
    Ok(Reader { layers: Vec::new(), activation: Activation::parse("act_fn", &config.act_fn)?, weights })
}

fn encoder(config: &TinyVaeConfig, weights: &Weights) -> Result<Vec<Layer>> {
    let channels = config.encoder_block_out_channels[0];
    let mut reader = reader(config, weights)?;
    for (level, &blocks) in config.num_encoder_blocks.iter().enumerate() {
        if level == 0 {
            reader.convolution(config.in_channels, channels, (1, true))?;
        } else {
            reader.convolution(channels, channels, (2, false))?;
        }
        reader.blocks(channels, blocks)?;
    }
    reader.convolution(channels, config.latent_channels, (1, true))?;
    Ok(reader.layers)
}

fn decoder(config: &TinyVaeConfig, weights: &Weights) -> Result<Vec<Layer>> {
    let channels = config.decoder_block_out_channels[0];
    let mut reader = reader(config, weights)?;
    reader.convolution(config.latent_channels, channels, (1, true))?;
    reader.layers.push(Layer::Activation(reader.activation));
    let levels = config.num_decoder_blocks.len();
    for (level, &blocks) in config.num_decoder_blocks.iter().enumerate() {
        reader.blocks(channels, blocks)?;
        if level + 1 < levels {
            reader.layers.push(Layer::Upsample(config.upsampling_scaling_factor));
            reader.convolution(channels, channels, (1, false))?;
        } else {
            reader.convolution(channels, config.out_channels, (1, true))?;
        }
    }
    Ok(reader.layers)
}

/// `run` on tiles of `input`, `(batch, channels, height, width)`, each laid over the ones before it: the first `blend`
/// rows and columns of a result go over from what lies there. `at` turns a place of the input into one of the result.
fn overlaid(
    input: &Tensor,
    (channels, tile, stride, blend): (usize, usize, usize, usize),
    at: &dyn Fn(usize) -> usize,
    run: &mut dyn FnMut(&Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let (batch, _, height, width) = input.dims4()?;
    let mut canvas = Tensor::zeros((batch, channels, at(height), at(width)), input.dtype(), input.device())?;
    let ramp = |start: usize, length: usize, shape: [usize; 4]| -> Result<Tensor> {
        let span = blend.saturating_sub(1).max(1) as f32;
        let value = |place: usize| if start == 0 { 1.0 } else { (place as f32 / span).min(1.0) };
        let values: Vec<f32> = (0..length).map(value).collect();
        Ok(Tensor::from_vec(values, &shape, input.device())?.to_dtype(input.dtype())?)
    };
    for top in (0..height).step_by(stride) {
        for left in (0..width).step_by(stride) {
            let part = input.narrow(2, top, tile.min(height - top))?.narrow(3, left, tile.min(width - left))?;
            let result = run(&part.contiguous()?)?;
            let (_, _, rows, columns) = result.dims4()?;
            let below = canvas.narrow(2, at(top), rows)?.narrow(3, at(left), columns)?;
            let share = ramp(top, rows, [1, 1, rows, 1])?.broadcast_mul(&ramp(left, columns, [1, 1, 1, columns])?)?;
            let mixed = (result.broadcast_mul(&share)? + below.broadcast_mul(&share.affine(-1.0, 1.0)?)?)?;
            let place = [0..batch, 0..channels, at(top)..at(top) + rows, at(left)..at(left) + columns];
            canvas = canvas.slice_assign(&place, &mixed)?;
        }
    }
    Ok(canvas)
}
