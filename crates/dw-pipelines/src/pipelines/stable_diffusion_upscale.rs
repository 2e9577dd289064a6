//! Stable Diffusion's upscaler by four (diffusers `StableDiffusionUpscalePipeline`): a UNet that reads the small
//! picture, with noise on it, after latents of the picture's own size, and is told how much noise that is.

use candle_core::Tensor;
use dw_core::{
    arguments::Arguments,
    artifact::Entry,
    picture::{Filter, resize, to_rgb},
};
use image::DynamicImage;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::Value;

use super::{
    arguments::{Defaults, filled, group, group_schema, merged_schema, refuse_unknown, whole, with_defaults},
    call::{Denoising, Surroundings, check_decoder, set_timesteps},
    components::Parts,
    decode::Scaling,
    fit::{Fit, own_size},
    image_to_image::{Given, Start, StartPictures, tiled},
    stable_diffusion::{GuidanceArguments, Prompts, condition},
    text_to_image::{Generation, StartingNoise, check_generators, refuse},
    unet::{check_extra_channels, scale_factor, starting_noise_of},
};
use crate::{Error, Result, rng::Generators, schedulers::TimestepRequest};

const DEFAULTS: Defaults = &[("num_inference_steps", 75.0), ("guidance_scale", 9.0)];

/// The factor of every model of this class: the reference sets it, whatever the autoencoder's configuration says.
const LATENT_SCALE: f64 = 0.08333;

/// The largest noise level of a model that does not name one.
const MAX_NOISE_LEVEL: u64 = 350;

/// Channels of a picture.
const COLOURS: usize = 3;

/// How much noise is put on the picture.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(default)]
struct NoiseLevel {
    /// How much noise is put on the picture before it is made larger, 0 to 350 (or the model's `max_noise_level`):
    /// more changes it more.
    #[serde(deserialize_with = "whole")]
    #[schemars(range(min = 0))]
    noise_level: usize,
}

impl Default for NoiseLevel {
    fn default() -> Self {
        Self { noise_level: 20 }
    }
}

impl NoiseLevel {
    /// The level, checked against what the model was trained on.
    fn checked(self, parts: &Parts) -> Result<usize> {
        let level = self.noise_level;
        let most = parts.index.get("max_noise_level").and_then(Value::as_u64).unwrap_or(MAX_NOISE_LEVEL);
        if level as u64 <= most {
            return Ok(level);
        }
        Err(refuse("noise_level", format!("must be at most {most} for this model, found `{level}`")))
    }
}

/// The arguments of the class.
pub(crate) fn schema() -> Value {
    let groups = [
        group_schema::<Generation>(),
        group_schema::<GuidanceArguments>(),
        group_schema::<NoiseLevel>(),
        group_schema::<StartPictures>(),
        group_schema::<StartingNoise>(),
    ];
    with_defaults(merged_schema("StableDiffusionUpscalePipeline", &groups), DEFAULTS)
}

/// One call.
pub(crate) fn run(parts: &Parts, arguments: &Arguments, surroundings: Surroundings<'_>) -> Result<Entry> {
    refuse_unknown(parts.class, arguments, &schema())?;
    let arguments = &filled(arguments, DEFAULTS);
    let call: Generation = group(arguments)?;
    let GuidanceArguments { guidance_scale } = group(arguments)?;
    let level = group::<NoiseLevel>(arguments)?.checked(parts)?;
    call.check(guidance_scale)?;
    check_decoder(parts, &call)?;
    check_extra_channels(parts, COLOURS, "the picture")?;
    let pixels = small_pictures(parts, arguments)?;
    let prompts = Prompts::new(parts, &call, arguments)?;
    let pictures = prompts.count * call.num_images_per_prompt;
    check_generators(surroundings.generators, pictures)?;
    let mut scheduler = parts.scheduler.create()?;
    set_timesteps(&mut *scheduler, &call)?;

    let mut conditioned = condition(parts, &call, &prompts, guidance_scale, surroundings.context)?;
    let pixels = tiled(&noisy(parts, &pixels, level, surroundings.generators)?, pictures)?;
    let (_, _, height, width) = pixels.dims4()?;
    let labels = Tensor::full(level as u32, pictures, &parts.device)?;
    conditioned.class_labels = Some(conditioned.guidance.rows(&labels)?);
    conditioned.surrounding = Some(pixels);
    let shape = [pictures, parts.vae()?.config().latent_channels, height, width];
    let sigma = scheduler.init_noise_sigma();
    let latents = starting_noise_of(parts, arguments, &shape, surroundings.generators, sigma)?;
    let indices = 0..scheduler.timesteps().len();
    Denoising { parts, call: &call, indices, scaling: Scaling::By(LATENT_SCALE), upcast: true, kept: None }.run(
        &mut |latents, timestep, index| conditioned.predict(latents, timestep, index),
        latents,
        &mut *scheduler,
        surroundings,
    )
}

/// The pictures in -1 to 1, `(pictures, 3, height, width)` in f32, their sides cut down to what the autoencoder takes.
fn small_pictures(parts: &Parts, arguments: &Arguments) -> Result<Tensor> {
    match group::<StartPictures>(arguments)?.given(arguments)? {
        Given::Arrays(_) => Err(refuse("image", "must be a picture; this class reads no latents")),
        Given::Pictures(pictures) => pixels(parts, &pictures, scale_factor(parts)),
    }
}

/// Pictures in -1 to 1, `(pictures, 3, height, width)` in f32, with sides that are multiples of `multiple`: other ones
/// are resized with the cubic filter of these classes.
pub(crate) fn pixels(parts: &Parts, pictures: &[&DynamicImage], multiple: usize) -> Result<Tensor> {
    let (height, width) = own_size("image", pictures[0], multiple)?;
    let fitted: Vec<DynamicImage> = pictures
        .iter()
        .map(|picture| resize(&to_rgb(picture).into(), width as u32, height as u32, Filter::Bicubic))
        .collect();
    let fitted: Vec<&DynamicImage> = fitted.iter().collect();
    match Start::pixels(&fitted, Fit::whole((height, width)), &parts.device)? {
        Start::Pixels(pixels) | Start::Latents(pixels) => Ok(pixels),
    }
}

/// The pictures with noise of the model's own schedule, in the denoiser's type.
fn noisy(parts: &Parts, pixels: &Tensor, level: usize, generators: &mut Generators) -> Result<Tensor> {
    let Some(setup) = &parts.low_res_scheduler else {
        return Err(Error::Unsupported(format!(
            "`{}` needs a `low_res_scheduler`, which `model_index.json` does not name; use a model made for this class",
            parts.class
        )));
    };
    let mut scheduler = setup.create()?;
    scheduler.set_timesteps(&TimestepRequest { timesteps: Some(vec![level as f64]), ..TimestepRequest::steps(1) })?;
    let pixels = pixels.to_dtype(parts.unet()?.dtype())?;
    let noise = generators.randn_first(pixels.dims(), pixels.dtype(), pixels.device())?;
    scheduler.add_noise(&pixels, &noise, 0)
}
