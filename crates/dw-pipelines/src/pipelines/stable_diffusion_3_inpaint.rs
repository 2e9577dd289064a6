//! Stable Diffusion 3 inpainting (diffusers `StableDiffusion3InpaintPipeline`): text to image inside a mask, with the
//! picture around it kept.

use dw_core::{arguments::Arguments, artifact::Entry};
use serde_json::Value;

use super::{
    arguments::{filled, group, group_schema, merged_schema, refuse_unknown, with_defaults},
    call::{Denoising, Surroundings, steps},
    components::Parts,
    decode::Scaling,
    flow::first_index,
    image_to_image::{Encoding, StartPictures},
    inpaint::{Beginning, MaskArguments, Opening, Repaint},
    sd3_prompt::Prompts,
    stable_diffusion_3::{Call, condition, denoised, groups, schedule},
    stable_diffusion_3_img2img::{DEFAULTS, ENCODING, Strength},
    text_to_image::{StartingNoise, check_generators},
    unet::given_noise,
};
use crate::Result;

/// The arguments of the class.
pub(crate) fn schema() -> Value {
    let mut groups = groups();
    groups.extend([
        group_schema::<StartPictures>(),
        group_schema::<MaskArguments>(),
        group_schema::<Strength>(),
        group_schema::<StartingNoise>(),
    ]);
    with_defaults(merged_schema("StableDiffusion3InpaintPipeline", &groups), DEFAULTS)
}

/// One call.
pub(crate) fn run(parts: &Parts, arguments: &Arguments, surroundings: Surroundings<'_>) -> Result<Entry> {
    refuse_unknown(parts.class, arguments, &schema())?;
    let arguments = &filled(arguments, DEFAULTS);
    let Call { generation: call, prompts: given, size } = Call::read(parts, arguments)?;
    let Strength { strength } = group(arguments)?;
    let repaint = Repaint::read(parts, &call, arguments, size)?;
    let prompts = Prompts::new(parts, &call, &given, arguments)?;
    let pictures = prompts.count * call.num_images_per_prompt;
    check_generators(surroundings.generators, pictures)?;
    let mut scheduler = schedule(parts, arguments, &call, size, surroundings.context)?;
    let first = first_index(&*scheduler, steps(&call), strength)?;

    let mut conditioned = condition(parts, prompts, given.guidance_scale, arguments, surroundings.context)?;
    let beginning = Beginning {
        scheduler: &*scheduler,
        index: first,
        is_pure_noise: strength == 1.0,
        adds_noise: true,
        given_noise: given_noise(parts, arguments)?,
        encoding: Encoding { for_each_picture: false, ..ENCODING },
    };
    let Opening { latents, kept, surrounding } = repaint.open(parts, pictures, beginning, surroundings.generators)?;
    conditioned.surrounding = surrounding;
    let indices = first..scheduler.timesteps().len();
    // The reference does not undo the shift here, unlike in its other pipelines of the family.
    let denoising = Denoising { parts, call: &call, indices, scaling: Scaling::Factor, upcast: false, kept };
    Ok(repaint.paste_back(denoised(denoising, conditioned, latents, &mut *scheduler, surroundings)?))
}
