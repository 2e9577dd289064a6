//! What image-to-image calls of the Stable Diffusion families share: the start pictures, their way into
//! latents, and where in the schedule a call starts.

use candle_core::{DType, Device, Tensor};
use dw_core::{
    arguments::{Arguments, ArtifactRef},
    artifact::Artifact,
    picture::{Filter, resize, to_rgb},
};
use image::DynamicImage;
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Deserializer, Serialize};

use super::{
    arguments::tensor,
    components::Parts,
    decode::{Scaling, scaled},
    text_to_image::refuse,
    unet::scale_factor,
};
use crate::{Result, rng::Generators, schedulers::Scheduler};

/// One picture (or latents), or a list of them.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Pictures(Vec<ArtifactRef>);

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
    /// The picture to start from, or a list of pictures of one size. Sides are cut down to multiples of 8 by
    /// resizing. Latents of an earlier step are taken as they are.
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
    /// The pictures as tensors, resized to sides that the model can take.
    pub(crate) fn read(&self, parts: &Parts, arguments: &Arguments) -> Result<Start> {
        let handles = match &self.image {
            Some(Pictures(handles)) if !handles.is_empty() => handles,
            _ => return Err(refuse("image", "is missing; give the picture to start from")),
        };
        let is_array = |handle: &ArtifactRef| matches!(arguments.get(*handle), Some(Artifact::Array(_)));
        if handles.iter().any(is_array) {
            let rows = handles.iter().map(|&handle| tensor(arguments, "image", handle, DType::F32, &parts.device));
            return latents(parts, &rows.collect::<Result<Vec<_>>>()?);
        }
        let multiple = scale_factor(parts).max(8) as u32;
        let pictures = handles.iter().map(|&handle| pixels(picture(arguments, handle)?, multiple, &parts.device));
        let pictures = pictures.collect::<Result<Vec<_>>>()?;
        if let Some(other) = pictures.iter().find(|other| other.dims() != pictures[0].dims()) {
            let size = |picture: &Tensor| format!("{} x {}", picture.dims()[3], picture.dims()[2]);
            let (first, other) = (size(&pictures[0]), size(other));
            return Err(refuse(
                "image",
                format!("has pictures of `{first}` and `{other}` pixels; give pictures of one size"),
            ));
        }
        Ok(Start::Pixels(Tensor::cat(&pictures, 0)?))
    }
}

impl Start {
    /// Height and width in pixels, and how many pictures there are.
    pub(crate) fn size(&self, parts: &Parts) -> Result<((usize, usize), usize)> {
        let (Self::Pixels(tensor) | Self::Latents(tensor)) = self;
        let (pictures, _, height, width) = tensor.dims4()?;
        let scale = if matches!(self, Self::Latents(_)) { scale_factor(parts) } else { 1 };
        Ok(((height * scale, width * scale), pictures))
    }
}

fn latents(parts: &Parts, rows: &[Tensor]) -> Result<Start> {
    let channels = parts.unet()?.config().in_channels;
    match rows.iter().find(|row| row.rank() != 4 || row.dims()[1] != channels) {
        Some(row) => Err(refuse(
            "image",
            format!(
                "is an array of shape {:?}; latents must have shape (pictures, {channels}, height, width)",
                row.dims()
            ),
        )),
        None => Ok(Start::Latents(Tensor::cat(rows, 0)?)),
    }
}

fn picture(arguments: &Arguments, handle: ArtifactRef) -> Result<&DynamicImage> {
    match arguments.get(handle) {
        Some(Artifact::Image(picture)) => Ok(picture),
        Some(other) => Err(refuse("image", format!("must be a picture or latents, found {}", other.kind()))),
        None => Err(refuse("image", "refers to a result that is not there any more")),
    }
}

/// A picture as `(1, 3, height, width)` in -1 to 1 (diffusers `VaeImageProcessor.preprocess`).
fn pixels(picture: &DynamicImage, multiple: u32, device: &Device) -> Result<Tensor> {
    let (width, height) = (picture.width() / multiple * multiple, picture.height() / multiple * multiple);
    if width == 0 || height == 0 {
        let (width, height) = (picture.width(), picture.height());
        return Err(refuse("image", format!("is `{width} x {height}` pixels; use at least {multiple} x {multiple}")));
    }
    let picture = resize(&to_rgb(picture).into(), width, height, Filter::Lanczos).to_rgb8();
    let values: Vec<f32> = picture.as_raw().iter().map(|&byte| 2.0 * (f32::from(byte) / 255.0) - 1.0).collect();
    let values = Tensor::from_vec(values, (1, height as usize, width as usize, 3), &Device::Cpu)?;
    Ok(values.permute((0, 3, 1, 2))?.contiguous()?.to_device(device)?)
}

/// How start pictures are encoded.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Encoding {
    pub(crate) scaling: Scaling,
    /// Whether an autoencoder that asks for it (`force_upcast`) encodes in float32.
    pub(crate) upcast: bool,
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
    let dtype = parts.unet()?.dtype();
    let latents = match start {
        Start::Latents(latents) => latents.to_dtype(dtype)?,
        Start::Pixels(pixels) => {
            let vae = parts.vae()?;
            let wide =
                (encoding.upcast && vae.config().force_upcast).then(|| vae.with_dtype(DType::F32)).transpose()?;
            let vae = wide.as_ref().unwrap_or(vae);
            let (mut mean, mut log_variance) = vae.encode(pixels)?;
            if let Generators::Each(_) = generators {
                (mean, log_variance) = (tiled(&mean, pictures)?, tiled(&log_variance, pictures)?);
            }
            let noise = generators.randn(mean.dims(), mean.dtype(), mean.device())?;
            let sample = (&mean + ((log_variance * 0.5)?.exp()? * noise)?)?;
            scaled(&sample.to_dtype(dtype)?, vae.config(), encoding.scaling)?
        }
    };
    tiled(&latents, pictures)
}

/// All rows, over and over, until there are `rows` of them.
fn tiled(tensor: &Tensor, rows: usize) -> Result<Tensor> {
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

/// The first of the scheduler's timesteps that is run when a fraction `strength` of `steps` is.
pub(crate) fn first_index(scheduler: &dyn Scheduler, steps: usize, strength: f64) -> Result<usize> {
    if !(0.0..=1.0).contains(&strength) {
        return Err(refuse("strength", format!("must lie between 0 and 1, found `{strength}`")));
    }
    let run = ((steps as f64 * strength) as usize).min(steps);
    if run == 0 {
        return Err(refuse(
            "strength",
            format!("`{strength}` of {steps} steps leaves none; use a larger value or more steps"),
        ));
    }
    let first = (steps - run) * scheduler.order();
    Ok(first.min(scheduler.timesteps().len().saturating_sub(1)))
}
