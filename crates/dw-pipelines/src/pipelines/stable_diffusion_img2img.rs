//! Stable Diffusion 1.x and 2.x image to image (diffusers `StableDiffusionImg2ImgPipeline`; Meng et al.
//! 2021): text to image that starts from a noised picture.

use dw_core::{arguments::Arguments, artifact::Entry};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::Value;

use super::{
    arguments::{group, group_schema, merged_schema, number, refuse_unknown},
    call::{Denoising, Surroundings, set_timesteps, steps},
    components::Parts,
    control::ControlCall,
    decode::Scaling,
    fit::Fit,
    image_to_image::{Encoding, StartPictures, clean_latents, first_index, noisy_latents},
    stable_diffusion::{GuidanceArguments, Prompts, condition},
    text_to_image::{Generation, check_generators},
    unet::check_parts,
};
use crate::Result;

/// How far the result moves away from the picture.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(default)]
pub(crate) struct Strength {
    /// How far the result moves away from the picture, above 0 and at most 1: the fraction of the steps that is run.
    #[serde(deserialize_with = "number")]
    #[schemars(extend("exclusiveMinimum" = 0, "maximum" = 1))]
    pub(crate) strength: f64,
}

impl Default for Strength {
    fn default() -> Self {
        Self { strength: 0.8 }
    }
}

/// The arguments of the class.
pub(crate) fn schema() -> Value {
    let groups = [
        group_schema::<Generation>(),
        group_schema::<GuidanceArguments>(),
        group_schema::<StartPictures>(),
        group_schema::<Strength>(),
    ];
    merged_schema("StableDiffusionImg2ImgPipeline", &groups)
}

/// One call.
pub(crate) fn run(parts: &Parts, arguments: &Arguments, surroundings: Surroundings<'_>) -> Result<Entry> {
    refuse_unknown(parts.class, arguments, &schema())?;
    generate(parts, arguments, None, surroundings)
}

/// One call of any image-to-image class of the family, with its defaults filled in.
pub(crate) fn generate(
    parts: &Parts,
    arguments: &Arguments,
    control: Option<ControlCall<'_>>,
    surroundings: Surroundings<'_>,
) -> Result<Entry> {
    let call: Generation = group(arguments)?;
    let GuidanceArguments { guidance_scale } = group(arguments)?;
    let Strength { strength } = group(arguments)?;
    let start: StartPictures = group(arguments)?;
    call.check(guidance_scale)?;
    check_parts(parts, &call)?;
    let start = start.read(parts, arguments, &group(arguments)?)?;
    let prompts = Prompts::new(parts, &call, arguments)?;
    let pictures = prompts.count * call.num_images_per_prompt;
    check_generators(surroundings.generators, pictures)?;
    control.as_ref().map_or(Ok(()), |control| control.check_prompts(prompts.count))?;
    let mut scheduler = parts.scheduler.create()?;
    set_timesteps(&mut *scheduler, &call)?;
    let first = first_index(&*scheduler, steps(&call), strength)?;
    let schedule = (first, scheduler.timesteps().len());
    let (size, _) = start.size(parts)?;

    let control = control.map(|control| control.prepare(parts, Fit::whole(size), prompts.counts(), schedule));
    let mut conditioned = condition(parts, &call, &prompts, guidance_scale, surroundings.context)?;
    conditioned.control = control.transpose()?;
    let encoding = Encoding { scaling: Scaling::Factor, upcast: false, for_each_picture: true };
    let clean = clean_latents(parts, &start, pictures, encoding, surroundings.generators)?;
    let latents = noisy_latents(&clean, &*scheduler, first, surroundings.generators)?;
    let indices = first..scheduler.timesteps().len();
    Denoising { parts, call: &call, indices, scaling: Scaling::Factor, upcast: false, kept: None }.run(
        &mut |latents, timestep, index| conditioned.predict(latents, timestep, index),
        latents,
        &mut *scheduler,
        surroundings,
    )
}
