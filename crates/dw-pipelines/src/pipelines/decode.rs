//! Latents to pictures: scaling, the autoencoder, and rounding to bytes.

use candle_core::{DType, Tensor};
use dw_core::{
    artifact::{Array, Artifact},
    picture::from_unit_floats,
};
use image::DynamicImage;

use super::denoise::check_finite;
use crate::{
    Error, Result,
    models::{AutoencoderKl, VaeConfig},
    request::Context,
};

/// How latents of a denoiser become latents of an autoencoder.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Scaling {
    /// Divided by `scaling_factor`.
    Factor,
    /// Divided by this factor, whatever the configuration says.
    By(f64),
    /// Brought back to the latents' own mean and deviation first, where the configuration has them (SDXL
    /// finetunes such as Playground 2.5).
    Statistics,
}

impl Scaling {
    fn factor(self, config: &VaeConfig) -> f64 {
        match self {
            Self::By(factor) => factor,
            Self::Factor | Self::Statistics => config.scaling_factor,
        }
    }
}

/// One picture for each row of `latents`, `(batch, channels, height / 8, width / 8)`. With `upcast`, an
/// autoencoder in float16 that overflows there (`force_upcast`) runs in float32.
pub(crate) fn decode(
    vae: &AutoencoderKl,
    latents: &Tensor,
    scaling: Scaling,
    upcast: bool,
    context: Context<'_>,
) -> Result<Vec<Artifact>> {
    let upcast = upcast && vae.dtype() == DType::F16 && vae.config().force_upcast;
    let wide = if upcast { Some(vae.with_dtype(DType::F32)?) } else { None };
    let vae = wide.as_ref().unwrap_or(vae);
    let latents = unscaled(&latents.to_dtype(vae.dtype())?, vae.config(), scaling)?;
    let mut pictures = Vec::with_capacity(latents.dim(0)?);
    for row in 0..latents.dim(0)? {
        context.cancel.check()?;
        let picture = vae.decode(&latents.narrow(0, row, 1)?)?;
        check_finite("image", &picture, String::new)?;
        pictures.push(Artifact::image(to_picture(&picture.squeeze(0)?)?));
    }
    Ok(pictures)
}

/// Latents of the denoiser to latents of the autoencoder.
fn unscaled(latents: &Tensor, config: &VaeConfig, scaling: Scaling) -> Result<Tensor> {
    let (Scaling::Statistics, Some(mean), Some(std)) = (scaling, &config.latents_mean, &config.latents_std) else {
        return Ok((latents / scaling.factor(config))?);
    };
    let spread = (latents.broadcast_mul(&by_channel(std, latents)?)? / config.scaling_factor)?;
    Ok(spread.broadcast_add(&by_channel(mean, latents)?)?)
}

/// Latents of the autoencoder to latents of the denoiser: the inverse of what [`decode`] does first.
pub(crate) fn scaled(latents: &Tensor, config: &VaeConfig, scaling: Scaling) -> Result<Tensor> {
    let (Scaling::Statistics, Some(mean), Some(std)) = (scaling, &config.latents_mean, &config.latents_std) else {
        return Ok((latents * scaling.factor(config))?);
    };
    let centred = (latents.broadcast_sub(&by_channel(mean, latents)?)? * config.scaling_factor)?;
    Ok(centred.broadcast_div(&by_channel(std, latents)?)?)
}

/// One value for each channel, in the form and type of `like`: `(1, channels, 1, 1)`.
fn by_channel(values: &[f64], like: &Tensor) -> Result<Tensor> {
    let values = Tensor::new(values, like.device())?.to_dtype(like.dtype())?;
    Ok(values.reshape((1, (), 1, 1))?)
}

/// A picture `(channels, height, width)` in -1 to 1 as bytes, halves rounded to even as numpy does.
fn to_picture(picture: &Tensor) -> Result<DynamicImage> {
    let (channels, height, width) = picture.dims3()?;
    let picture = ((picture.to_dtype(DType::F32)? * 0.5)? + 0.5)?;
    let values = picture.permute((1, 2, 0))?.flatten_all()?.to_vec1::<f32>()?;
    from_unit_floats(width as u32, height as u32, channels, &values)
        .ok_or_else(|| Error::Unsupported(format!("the autoencoder made a picture of {channels} channels, not 3")))
}

/// Latents as the artifact that a later step goes on with; the batch axis stays.
pub(crate) fn latent_artifact(latents: &Tensor) -> Result<Artifact> {
    let data = latents.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    Ok(Artifact::Array(Array { shape: latents.dims().to_vec(), data }.into()))
}
