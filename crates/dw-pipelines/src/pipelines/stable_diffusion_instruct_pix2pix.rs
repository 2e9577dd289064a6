//! InstructPix2Pix with Stable Diffusion 1.x and 2.x (diffusers `StableDiffusionInstructPix2PixPipeline`; Brooks,
//! Holynski and Efros 2023, arXiv:2211.09800): a UNet that reads the picture's latents after the noisy ones, and
//! guidance by prompt and picture.

use std::time::Instant;

use candle_core::Tensor;
use dw_core::{arguments::Arguments, artifact::Entry};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::Value;

use super::{
    arguments::{Defaults, filled, group, group_schema, merged_schema, number, refuse_unknown, with_defaults},
    call::{Denoising, Surroundings, set_timesteps, stage_finished},
    components::Parts,
    decode::{Scaling, encode},
    guidance::{EditGuidance, Guidance, Guided},
    image_to_image::{Start, StartPictures, tiled},
    stable_diffusion::{GuidanceArguments, Prompts},
    text_to_image::{Canvas, Generation, StartingNoise, check_generators, refuse},
    unet::{ConditionedUnet, check_extra_channels, starting_noise_of},
};
use crate::Result;

const DEFAULTS: Defaults = &[("num_inference_steps", 100.0)];

/// How strongly the picture is followed.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(default)]
pub(crate) struct ImageGuidance {
    /// How strongly the picture is followed, from 1 on; more keeps more of it. Below 1 the call is not guided at all,
    /// by the prompt neither.
    #[serde(deserialize_with = "number")]
    pub(crate) image_guidance_scale: f64,
}

impl Default for ImageGuidance {
    fn default() -> Self {
        Self { image_guidance_scale: 1.5 }
    }
}

impl ImageGuidance {
    /// Guidance by prompt and picture, where both are asked for.
    pub(crate) fn with(self, call: &Generation, guidance_scale: f64) -> Result<Guided> {
        let image_scale = self.image_guidance_scale;
        if !image_scale.is_finite() {
            return Err(refuse("image_guidance_scale", format!("must be a finite number, found `{image_scale}`")));
        }
        let prompt = Guidance { scale: guidance_scale, rescale: call.guidance_rescale };
        let is_guided = guidance_scale > 1.0 && image_scale >= 1.0;
        Ok(if is_guided { Guided::ByPicture(EditGuidance { prompt, image_scale }) } else { Guided::Alone })
    }
}

/// The arguments of the class.
pub(crate) fn schema() -> Value {
    let groups = [
        group_schema::<Generation>(),
        group_schema::<GuidanceArguments>(),
        group_schema::<ImageGuidance>(),
        group_schema::<StartPictures>(),
        group_schema::<StartingNoise>(),
    ];
    with_defaults(merged_schema("StableDiffusionInstructPix2PixPipeline", &groups), DEFAULTS)
}

/// One call.
pub(crate) fn run(parts: &Parts, arguments: &Arguments, surroundings: Surroundings<'_>) -> Result<Entry> {
    refuse_unknown(parts.class, arguments, &schema())?;
    let arguments = &filled(arguments, DEFAULTS);
    let call: Generation = group(arguments)?;
    let GuidanceArguments { guidance_scale } = group(arguments)?;
    let start: StartPictures = group(arguments)?;
    call.check(guidance_scale)?;
    let guidance = group::<ImageGuidance>(arguments)?.with(&call, guidance_scale)?;
    check_extra_channels(parts, parts.vae()?.config().latent_channels, "the picture")?;
    let start = start.read(parts, arguments, &Canvas::default())?;
    let prompts = Prompts::new(parts, &call, arguments)?;
    let pictures = prompts.count * call.num_images_per_prompt;
    check_generators(surroundings.generators, pictures)?;
    let mut scheduler = parts.scheduler.create()?;
    set_timesteps(&mut *scheduler, &call)?;

    let started = Instant::now();
    let unet = parts.unet()?;
    let (positive, negative) = prompts.encode(guidance.is_guided(), surroundings.context)?;
    let surrounding = picture_latents(parts, &start, pictures, false)?;
    let latents_shape = surrounding.dims().to_vec();
    let conditioned = ConditionedUnet {
        unet,
        encoder_hidden_states: edit_rows(&positive, negative.as_ref())?.to_dtype(unet.dtype())?,
        added: None,
        timestep_cond: None,
        image_prompts: prompts.images.edit_prompts(guidance.is_guided(), positive.dim(0)?)?,
        guidance,
        surrounding: Some(surrounding),
        class_labels: None,
        control: None,
    };
    stage_finished(surroundings.context, "encode prompt", started);
    let sigma = scheduler.init_noise_sigma();
    let latents = starting_noise_of(parts, arguments, &latents_shape, surroundings.generators, sigma)?;
    let indices = 0..scheduler.timesteps().len();
    Denoising { parts, call: &call, indices, scaling: Scaling::Factor, upcast: false, kept: None }.run(
        &mut |latents, timestep, index| conditioned.predict(latents, timestep, index),
        latents,
        &mut *scheduler,
        surroundings,
    )
}

/// Rows for the three predictions of a guided edit, of which only the first sees the prompt.
pub(crate) fn edit_rows(positive: &Tensor, negative: Option<&Tensor>) -> Result<Tensor> {
    Ok(match negative {
        Some(negative) => Tensor::cat(&[positive, negative, negative], 0)?,
        None => positive.clone(),
    })
}

/// What the UNet sees of the pictures: the most likely latents, unscaled, `(pictures, channels, height / 8, width / 8)`
/// in the denoiser's type. With `upcast`, an autoencoder in float16 that overflows there encodes in float32.
pub(crate) fn picture_latents(parts: &Parts, start: &Start, pictures: usize, upcast: bool) -> Result<Tensor> {
    let latents = match start {
        Start::Latents(latents) => latents.clone(),
        Start::Pixels(pixels) => encode(parts, pixels, upcast && parts.vae()?.config().force_upcast)?.latents,
    };
    tiled(&latents.to_dtype(parts.unet()?.dtype())?, pictures)
}
