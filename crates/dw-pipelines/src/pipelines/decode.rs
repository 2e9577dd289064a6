//! Latents to pictures: scaling, the autoencoder, and rounding to bytes.

use candle_core::{DType, Tensor};
use dw_core::{
    artifact::{Array, Artifact},
    event::Event,
    picture::from_unit_floats,
};
use image::DynamicImage;

use super::{
    components::Parts,
    denoise::{check_finite, is_finite},
};
use crate::{
    Error, Result,
    models::{Autoencoder, Encoded, VaeConfig},
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
    /// Divided by `scaling_factor`, then moved by `shift_factor` (models of 16 latent channels).
    Shifted,
}

impl Scaling {
    fn factor(self, config: &VaeConfig) -> f64 {
        match self {
            Self::By(factor) => factor,
            Self::Factor | Self::Statistics | Self::Shifted => config.scaling_factor,
        }
    }
}

/// One picture for each row of `latents`, `(batch, channels, height / 8, width / 8)`. With `upcast`, an
/// autoencoder in float16 that overflows there (`force_upcast`) runs in float32; so does any that turns out to.
pub(crate) fn decode(
    parts: &Parts,
    latents: &Tensor,
    scaling: Scaling,
    upcast: bool,
    context: Context<'_>,
) -> Result<Vec<Artifact>> {
    let vae = parts.vae()?;
    let upcast = upcast && vae.dtype() == DType::F16 && vae.config().force_upcast;
    let mut wide = if upcast { Some(vae.with_dtype(DType::F32)?) } else { None };
    let tiling = parts.memory.tiling(vae)?;
    let decode = |vae: &Autoencoder, row: usize| -> Result<Tensor> {
        let latents = latents.narrow(0, row, 1)?.to_device(vae.device())?.to_dtype(vae.dtype())?;
        let latents = unscaled(&latents, vae.config(), scaling)?;
        vae.decode(&latents, tiling.as_ref())
    };
    let mut pictures = Vec::with_capacity(latents.dim(0)?);
    for row in 0..latents.dim(0)? {
        context.cancel.check()?;
        let mut picture = decode(wide.as_ref().unwrap_or(vae), row)?;
        if wide.is_none() && vae.dtype() == DType::F16 && !is_finite(&picture)? {
            context.events.emit(Event::Warning { message: overflowed("decoded") });
            picture = decode(wide.insert(vae.with_dtype(DType::F32)?), row)?;
        }
        check_finite("image", &picture, String::new)?;
        pictures.push(Artifact::image(to_picture(&picture.squeeze(0)?)?));
    }
    Ok(pictures)
}

/// What is said when the autoencoder had to run in float32.
fn overflowed(done: &str) -> String {
    format!(
        "the autoencoder overflowed in float16, so the picture was {done} again in float32; set \
         `configuration.vae.torch_dtype` to torch.float32 or torch.bfloat16 to spare the first attempt"
    )
}

/// What the autoencoder says about pictures `(batch, channels, height, width)` in -1 to 1:
/// `(batch, latent channels, height / 8, width / 8)` in the type of the autoencoder or, with `upcast`, in float32.
/// Pictures go one by one, in tiles where the step asks for them, and again in float32 when float16 overflows.
pub(crate) fn encode(parts: &Parts, pixels: &Tensor, upcast: bool) -> Result<Encoded> {
    let vae = parts.vae()?;
    let mut wide = if upcast { Some(vae.with_dtype(DType::F32)?) } else { None };
    let tiling = parts.memory.tiling(vae)?;
    let encode = |vae: &Autoencoder, row: usize| vae.encode(&pixels.narrow(0, row, 1)?, tiling.as_ref());
    let (mut latents, mut log_variances) = (Vec::new(), Vec::new());
    for row in 0..pixels.dim(0)? {
        let mut encoded = encode(wide.as_ref().unwrap_or(vae), row)?;
        if wide.is_none() && vae.dtype() == DType::F16 && !encoded.is_finite()? {
            parts.memory.note(overflowed("encoded"));
            encoded = encode(wide.insert(vae.with_dtype(DType::F32)?), row)?;
        }
        let dtype = if upcast { DType::F32 } else { vae.dtype() };
        let usable = |tensor: Tensor| -> Result<Tensor> { Ok(tensor.to_dtype(dtype)?.to_device(&parts.device)?) };
        latents.push(usable(encoded.latents)?);
        log_variances.extend(encoded.log_variance.map(usable).transpose()?);
    }
    let log_variance = if log_variances.is_empty() { None } else { Some(Tensor::cat(&log_variances, 0)?) };
    Ok(Encoded { latents: Tensor::cat(&latents, 0)?, log_variance })
}

impl Encoded {
    fn is_finite(&self) -> Result<bool> {
        Ok(is_finite(&self.latents)? && self.log_variance.as_ref().map_or(Ok(true), is_finite)?)
    }
}

/// Latents of the denoiser to latents of the autoencoder.
fn unscaled(latents: &Tensor, config: &VaeConfig, scaling: Scaling) -> Result<Tensor> {
    if scaling == Scaling::Shifted {
        return Ok(((latents / config.scaling_factor)? + config.shift_factor.unwrap_or(0.0))?);
    }
    let (Scaling::Statistics, Some(mean), Some(std)) = (scaling, &config.latents_mean, &config.latents_std) else {
        return Ok((latents / scaling.factor(config))?);
    };
    let spread = (latents.broadcast_mul(&by_channel(std, latents)?)? / config.scaling_factor)?;
    Ok(spread.broadcast_add(&by_channel(mean, latents)?)?)
}

/// Latents of the autoencoder to latents of the denoiser: the inverse of what [`decode`] does first.
pub(crate) fn scaled(latents: &Tensor, config: &VaeConfig, scaling: Scaling) -> Result<Tensor> {
    if scaling == Scaling::Shifted {
        return Ok(((latents - config.shift_factor.unwrap_or(0.0))? * config.scaling_factor)?);
    }
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
