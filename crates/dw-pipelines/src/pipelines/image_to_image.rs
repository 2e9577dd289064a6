//! What image-to-image calls of the Stable Diffusion families share: the start pictures, their way into
//! latents, and where in the schedule a call starts.

use candle_core::{DType, Device, Tensor};
use dw_core::{
    arguments::{Arguments, ArtifactRef},
    artifact::Artifact,
};
use image::DynamicImage;
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Deserializer, Serialize};

use super::{
    arguments::tensor,
    components::Parts,
    decode::{Scaling, encode, scaled},
    fit::{Fit, own_size},
    text_to_image::{Canvas, refuse},
    unet::{scale_factor, side_multiple, size_like},
};
use crate::{Result, models::Encoded, rng::Generators, schedulers::Scheduler};

/// One picture (or latents), or a list of them.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Pictures(Vec<ArtifactRef>);

impl Pictures {
    /// The handles, one or more where there are any.
    pub(crate) fn handles(&self) -> &[ArtifactRef] {
        &self.0
    }
}

impl<'de> Deserialize<'de> for Pictures {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = serde_json::Value::deserialize(deserializer)?;
        let items = value.as_array().cloned().unwrap_or_else(|| vec![value]);
        let handles = items.into_iter().map(ArtifactRef::deserialize).collect::<Result<Vec<_>, _>>();
        handles.map(Self).map_err(serde::de::Error::custom)
    }
}

impl JsonSchema for Pictures {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Pictures".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let one = ArtifactRef::json_schema(generator);
        schemars::json_schema!({ "anyOf": [one, { "type": "array", "items": one, "minItems": 1 }] })
    }
}

/// What the call starts from.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(default)]
pub(crate) struct StartPictures {
    /// The picture to start from, or a list of pictures of one size. It is resized to the size of the result: to
    /// `height` and `width` where the class takes them, else its own sides cut down to multiples of 8. Latents of an
    /// earlier step are taken as they are.
    pub(crate) image: Option<Pictures>,
}

/// What start pictures are before noise is added.
pub(crate) enum Start {
    /// Pixels in -1 to 1, `(pictures, 3, height, width)` in f32.
    Pixels(Tensor),
    /// Latents as a denoiser leaves them, `(pictures, channels, height / 8, width / 8)`.
    Latents(Tensor),
}

impl StartPictures {
    /// The pictures as tensors, resized to sides that the model can take: those of `canvas`, or their own.
    pub(crate) fn read(&self, parts: &Parts, arguments: &Arguments, canvas: &Canvas) -> Result<Start> {
        match self.given(arguments)? {
            Given::Arrays(handles) => {
                let start = latents(parts, arguments, &handles)?;
                // Refuses a size that does not suit, although latents have their own.
                size_like(parts, canvas, start.size(parts)?.0)?;
                Ok(start)
            }
            Given::Pictures(pictures) => {
                let multiple = side_multiple(parts);
                let sizes = pictures.iter().map(|picture| own_size("image", picture, multiple));
                let sizes = sizes.collect::<Result<Vec<_>>>()?;
                let size = size_like(parts, canvas, sizes[0])?;
                if let Some(other) = sizes.iter().find(|other| **other != sizes[0]) {
                    let show = |(height, width): (usize, usize)| format!("{width} x {height}");
                    let (first, other) = (show(sizes[0]), show(*other));
                    return Err(refuse(
                        "image",
                        format!("has pictures of `{first}` and `{other}` pixels; give pictures of one size"),
                    ));
                }
                Start::pixels(&pictures, Fit::whole(size), &parts.device)
            }
        }
    }

    /// What the argument holds; nothing is an error.
    pub(crate) fn given<'a>(&self, arguments: &'a Arguments) -> Result<Given<'a>> {
        let handles = match &self.image {
            Some(Pictures(handles)) if !handles.is_empty() => handles,
            _ => return Err(refuse("image", "is missing; give the picture to start from")),
        };
        let is_array = |handle: &ArtifactRef| matches!(arguments.get(*handle), Some(Artifact::Array(_)));
        if handles.iter().any(is_array) {
            return Ok(Given::Arrays(handles.clone()));
        }
        Ok(Given::Pictures(pictures(("image", "a picture or latents"), arguments, handles)?))
    }
}

/// Start pictures as they come.
pub(crate) enum Given<'a> {
    /// Latents.
    Arrays(Vec<ArtifactRef>),
    /// Pictures, one or more.
    Pictures(Vec<&'a DynamicImage>),
}

impl Start {
    /// Pictures at the size of the call.
    pub(crate) fn pixels(pictures: &[&DynamicImage], fit: Fit, device: &Device) -> Result<Self> {
        let rows = pictures.iter().map(|picture| fit.signed(picture, device)).collect::<Result<Vec<_>>>()?;
        Ok(Self::Pixels(Tensor::cat(&rows, 0)?))
    }

    /// Height and width in pixels, and how many pictures there are.
    pub(crate) fn size(&self, parts: &Parts) -> Result<((usize, usize), usize)> {
        let (Self::Pixels(tensor) | Self::Latents(tensor)) = self;
        let (pictures, _, height, width) = tensor.dims4()?;
        let scale = if matches!(self, Self::Latents(_)) { scale_factor(parts) } else { 1 };
        Ok(((height * scale, width * scale), pictures))
    }
}

/// Latents that an argument `image` holds.
pub(crate) fn latents(parts: &Parts, arguments: &Arguments, handles: &[ArtifactRef]) -> Result<Start> {
    let rows = handles.iter().map(|&handle| tensor(arguments, "image", handle, DType::F32, &parts.device));
    let rows = rows.collect::<Result<Vec<_>>>()?;
    let predicted = parts.denoiser()?.channels;
    let channels = parts.vae().map_or(predicted, |vae| vae.config().latent_channels);
    match rows.iter().find(|row| row.rank() != 4 || row.dims()[1] != channels) {
        Some(row) => Err(refuse(
            "image",
            format!(
                "is an array of shape {:?}; latents must have shape (pictures, {channels}, height, width)",
                row.dims()
            ),
        )),
        None => Ok(Start::Latents(Tensor::cat(&rows, 0)?)),
    }
}

/// The pictures behind the handles of the argument `name`; `what` says what may stand there.
pub(crate) fn pictures<'a>(
    (name, what): (&str, &str),
    arguments: &'a Arguments,
    handles: &[ArtifactRef],
) -> Result<Vec<&'a DynamicImage>> {
    let picture = |handle: &ArtifactRef| match arguments.get(*handle) {
        Some(Artifact::Image(picture)) => Ok(&**picture),
        Some(other) => Err(refuse(name, format!("must be {what}, found {}", other.kind()))),
        None => Err(refuse(name, "refers to a result that is not there any more")),
    };
    handles.iter().map(picture).collect()
}

/// How start pictures are encoded.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Encoding {
    pub(crate) scaling: Scaling,
    /// Whether an autoencoder that asks for it (`force_upcast`) encodes in float32.
    pub(crate) upcast: bool,
    /// What a list of seeds samples: with true every picture of the result, with false every start picture.
    pub(crate) for_each_picture: bool,
}

/// Clean latents for `pictures` pictures, in the denoiser's type. Draws the posterior's noise: for the start
/// pictures from one generator, for each picture from a list of them (numerics of `prepare_latents`).
pub(crate) fn clean_latents(
    parts: &Parts,
    start: &Start,
    pictures: usize,
    encoding: Encoding,
    generators: &mut Generators,
) -> Result<Tensor> {
    let dtype = parts.denoiser()?.dtype;
    let latents = match start {
        Start::Latents(latents) => latents.to_dtype(dtype)?,
        Start::Pixels(pixels) => encoded(parts, pixels, pictures, encoding, generators)?,
    };
    tiled(&latents, pictures)
}

/// Pixels in -1 to 1 as latents in the denoiser's type, one sample of the posterior for each row of `pixels`, or for
/// each of `pictures` where the encoding says so.
pub(crate) fn encoded(
    parts: &Parts,
    pixels: &Tensor,
    pictures: usize,
    encoding: Encoding,
    generators: &mut Generators,
) -> Result<Tensor> {
    let vae = parts.vae()?;
    let Encoded { mut latents, log_variance } = encode(parts, pixels, encoding.upcast && vae.config().force_upcast)?;
    if let Some(mut log_variance) = log_variance {
        if encoding.for_each_picture && matches!(generators, Generators::Each(_)) {
            (latents, log_variance) = (tiled(&latents, pictures)?, tiled(&log_variance, pictures)?);
        }
        let noise = generators.randn_first(latents.dims(), latents.dtype(), latents.device())?;
        latents = (latents + ((log_variance * 0.5)?.exp()? * noise)?)?;
    }
    scaled(&latents.to_dtype(parts.denoiser()?.dtype)?, vae.config(), encoding.scaling)
}

/// Pixels in -1 to 1 as the most likely latents in the denoiser's type; nothing is drawn.
pub(crate) fn most_likely(parts: &Parts, pixels: &Tensor, scaling: Scaling) -> Result<Tensor> {
    let vae = parts.vae()?;
    let Encoded { latents, .. } = encode(parts, pixels, false)?;
    scaled(&latents.to_dtype(parts.denoiser()?.dtype)?, vae.config(), scaling)
}

/// All rows, over and over, until there are `rows` of them.
pub(crate) fn tiled(tensor: &Tensor, rows: usize) -> Result<Tensor> {
    let have = tensor.dim(0)?;
    if have == 0 || !rows.is_multiple_of(have) {
        return Err(refuse(
            "image",
            format!("has {have} picture(s) for {rows} of the result; give one, or one for each"),
        ));
    }
    Ok(tensor.repeat((rows / have, 1, 1, 1))?)
}

/// Clean latents with noise of the level at which the call starts, drawn after the posterior's.
pub(crate) fn noisy_latents(
    clean: &Tensor,
    scheduler: &dyn Scheduler,
    index: usize,
    generators: &mut Generators,
) -> Result<Tensor> {
    let noise = generators.randn(clean.dims(), clean.dtype(), clean.device())?;
    scheduler.add_noise(clean, &noise, index)
}

/// How many of `steps` are run with this `strength`; none is an error.
pub(crate) fn steps_of(steps: usize, strength: f64) -> Result<usize> {
    if !(0.0..=1.0).contains(&strength) {
        return Err(refuse("strength", format!("must lie between 0 and 1, found `{strength}`")));
    }
    match ((steps as f64 * strength) as usize).min(steps) {
        0 => Err(refuse(
            "strength",
            format!("`{strength}` of {steps} steps leaves none; use a larger value or more steps"),
        )),
        run => Ok(run),
    }
}

/// The first of the scheduler's timesteps that is run when a fraction `strength` of `steps` is.
pub(crate) fn first_index(scheduler: &dyn Scheduler, steps: usize, strength: f64) -> Result<usize> {
    let first = (steps - steps_of(steps, strength)?) * scheduler.order();
    Ok(first.min(scheduler.timesteps().len().saturating_sub(1)))
}
