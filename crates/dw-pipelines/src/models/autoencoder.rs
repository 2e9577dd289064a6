//! The autoencoders that pipelines take, behind one face.

use candle_core::{DType, Device, Tensor};

use super::{AutoencoderKl, AutoencoderTiny, Tiling, VaeConfig};
use crate::Result;

/// An autoencoder of any class.
#[expect(clippy::large_enum_variant, reason = "a pipeline has one")]
pub enum Autoencoder {
    /// The full one, whose encoder gives a distribution.
    Kl(AutoencoderKl),
    /// The small one, whose encoder gives latents.
    Tiny(AutoencoderTiny),
}

/// What an encoder says about pictures.
pub struct Encoded {
    /// The (most likely) latents, unscaled, `(batch, latent_channels, height / f, width / f)`.
    pub latents: Tensor,
    /// The logarithm of their variance, of the same shape, where there is something to draw.
    pub log_variance: Option<Tensor>,
}

impl Autoencoder {
    /// The configuration; of the small one what it has in common with the full one's.
    pub fn config(&self) -> &VaeConfig {
        match self {
            Self::Kl(vae) => vae.config(),
            Self::Tiny(vae) => vae.config(),
        }
    }

    /// Whether encoding draws from a distribution.
    pub fn is_sampled(&self) -> bool {
        matches!(self, Self::Kl(_))
    }

    /// The type pictures and latents have.
    pub fn dtype(&self) -> DType {
        match self {
            Self::Kl(vae) => vae.dtype(),
            Self::Tiny(vae) => vae.dtype(),
        }
    }

    /// Where the model is.
    pub fn device(&self) -> &Device {
        match self {
            Self::Kl(vae) => vae.device(),
            Self::Tiny(vae) => vae.device(),
        }
    }

    /// The same model with weights of another type.
    pub fn with_dtype(&self, dtype: DType) -> Result<Self> {
        Ok(match self {
            Self::Kl(vae) => Self::Kl(vae.with_dtype(dtype)?),
            Self::Tiny(vae) => Self::Tiny(vae.with_dtype(dtype)?),
        })
    }

    /// Tiles of `sample` pixels, or of the class's own size.
    pub fn tiling(&self, sample: Option<usize>, overlap: Option<f64>) -> Result<Tiling> {
        match self {
            Self::Kl(vae) => vae.config().tiling(sample, overlap),
            Self::Tiny(vae) => vae.tiling(sample, overlap),
        }
    }

    /// Latents `(batch, latent_channels, h, w)`, unscaled, to pictures `(batch, out_channels, f h, f w)` about in
    /// -1..1, in tiles where there are any.
    pub fn decode(&self, latents: &Tensor, tiling: Option<&Tiling>) -> Result<Tensor> {
        match (self, tiling) {
            (Self::Kl(vae), None) => vae.decode(latents),
            (Self::Kl(vae), Some(tiling)) => vae.decode_tiled(latents, tiling),
            (Self::Tiny(vae), None) => vae.decode(latents),
            (Self::Tiny(vae), Some(tiling)) => vae.decode_tiled(latents, tiling),
        }
    }

    /// Pictures `(batch, in_channels, height, width)` in -1..1 to latents, in tiles where there are any.
    pub fn encode(&self, pictures: &Tensor, tiling: Option<&Tiling>) -> Result<Encoded> {
        let (latents, log_variance) = match (self, tiling) {
            (Self::Kl(vae), None) => vae.encode(pictures).map(|(mean, spread)| (mean, Some(spread)))?,
            (Self::Kl(vae), Some(tiling)) => {
                vae.encode_tiled(pictures, tiling).map(|(mean, spread)| (mean, Some(spread)))?
            }
            (Self::Tiny(vae), None) => (vae.encode(pictures)?, None),
            (Self::Tiny(vae), Some(tiling)) => (vae.encode_tiled(pictures, tiling)?, None),
        };
        Ok(Encoded { latents, log_variance })
    }
}
