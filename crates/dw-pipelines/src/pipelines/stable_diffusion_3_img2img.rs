//! Stable Diffusion 3 image to image (diffusers `StableDiffusion3Img2ImgPipeline`).

use dw_core::{arguments::Arguments, artifact::Entry};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::Value;

use super::{
    arguments::{Defaults, filled, group, group_schema, merged_schema, number, refuse_unknown, with_defaults},
    call::{Denoising, Surroundings, check_decoder, steps},
    components::Parts,
    decode::Scaling,
    flow::first_index,
    image_to_image::{Encoding, StartPictures, clean_latents, noisy_latents},
    sd3_prompt::Prompts,
    stable_diffusion_3::{Call, condition, denoised, groups, refuse_other_inputs, schedule},
    text_to_image::{Canvas, check_generators},
};
use crate::Result;

/// How start pictures of the family are encoded.
pub(crate) const ENCODING: Encoding = Encoding { scaling: Scaling::Shifted, upcast: false, for_each_picture: true };

/// Defaults that the classes that start from a picture share.
pub(crate) const DEFAULTS: Defaults = &[("num_inference_steps", 50.0)];

/// How far the result moves away from the picture.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(default)]
pub(crate) struct Strength {
    /// How far the result moves away from the picture, 0 to 1: the fraction of the steps that is run.
    #[serde(deserialize_with = "number")]
    pub(crate) strength: f64,
}

impl Default for Strength {
    fn default() -> Self {
        Self { strength: 0.6 }
    }
}

/// The arguments of the class.
pub(crate) fn schema() -> Value {
    let mut groups = groups();
    groups.extend([group_schema::<StartPictures>(), group_schema::<Strength>()]);
    with_defaults(merged_schema("StableDiffusion3Img2ImgPipeline", &groups), DEFAULTS)
}

/// One call.
pub(crate) fn run(parts: &Parts, arguments: &Arguments, surroundings: Surroundings<'_>) -> Result<Entry> {
    refuse_unknown(parts.class, arguments, &schema())?;
    let arguments = &filled(arguments, DEFAULTS);
    let Call { generation: call, prompts: given, size: (height, width) } = Call::read(parts, arguments)?;
    let Strength { strength } = group(arguments)?;
    check_decoder(parts, &call)?;
    refuse_other_inputs(parts)?;
    // Unlike in the older families the result has the model's own size when the call names none.
    let canvas = Canvas { height: Some(height), width: Some(width) };
    let start = group::<StartPictures>(arguments)?.read(parts, arguments, &canvas)?;
    let prompts = Prompts::new(parts, &call, &given, arguments)?;
    let pictures = prompts.count * call.num_images_per_prompt;
    check_generators(surroundings.generators, pictures)?;
    let (size, _) = start.size(parts)?;
    let mut scheduler = schedule(parts, arguments, &call, size, surroundings.context)?;
    let first = first_index(&*scheduler, steps(&call), strength)?;

    let conditioned = condition(parts, prompts, given.guidance_scale, arguments, surroundings.context)?;
    let clean = clean_latents(parts, &start, pictures, ENCODING, surroundings.generators)?;
    let latents = noisy_latents(&clean, &*scheduler, first, surroundings.generators)?;
    let indices = first..scheduler.timesteps().len();
    let denoising = Denoising { parts, call: &call, indices, scaling: Scaling::Shifted, upcast: false, kept: None };
    denoised(denoising, conditioned, latents, &mut *scheduler, surroundings)
}
