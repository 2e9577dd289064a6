//! Stable Diffusion 1.x and 2.x inpainting (diffusers `StableDiffusionInpaintPipeline`): text to image inside a mask,
//! with the picture around it kept.

use dw_core::{arguments::Arguments, artifact::Entry};
use serde_json::Value;

use super::{
    arguments::{Defaults, filled, group, group_schema, merged_schema, refuse_unknown, with_defaults},
    call::{Denoising, Surroundings, set_timesteps, steps},
    components::Parts,
    control::ControlCall,
    decode::Scaling,
    denoise::Predict,
    image_to_image::{Encoding, StartPictures, first_index},
    inpaint::{Beginning, MaskArguments, Opening, Repaint, start_size},
    stable_diffusion::{GuidanceArguments, Prompts, condition},
    stable_diffusion_img2img::Strength,
    text_to_image::{Canvas, Generation, StartingNoise, check_generators},
    unet::{given_noise, picture_size, size_like},
};
use crate::Result;

const DEFAULTS: Defaults = &[("strength", 1.0)];

/// The arguments that all inpainting classes of the family take.
pub(crate) fn groups() -> Vec<Value> {
    vec![
        group_schema::<Generation>(),
        group_schema::<GuidanceArguments>(),
        group_schema::<StartPictures>(),
        group_schema::<MaskArguments>(),
        group_schema::<Strength>(),
        group_schema::<Canvas>(),
        group_schema::<StartingNoise>(),
    ]
}

/// The arguments of the class.
pub(crate) fn schema() -> Value {
    with_defaults(merged_schema("StableDiffusionInpaintPipeline", &groups()), DEFAULTS)
}

/// One call.
pub(crate) fn run(parts: &Parts, arguments: &Arguments, surroundings: Surroundings<'_>) -> Result<Entry> {
    refuse_unknown(parts.class, arguments, &schema())?;
    generate(parts, &filled(arguments, DEFAULTS), None, surroundings)
}

/// One call of any inpainting class of the family, with its defaults filled in.
pub(crate) fn generate(
    parts: &Parts,
    arguments: &Arguments,
    control: Option<ControlCall<'_>>,
    surroundings: Surroundings<'_>,
) -> Result<Entry> {
    let call: Generation = group(arguments)?;
    let canvas: Canvas = group(arguments)?;
    let GuidanceArguments { guidance_scale } = group(arguments)?;
    let Strength { strength } = group(arguments)?;
    call.check(guidance_scale)?;
    let size = match &control {
        Some(_) => size_like(parts, &canvas, start_size(parts, arguments)?)?,
        None => picture_size(parts, &canvas, 64)?,
    };
    let repaint = Repaint::read(parts, &call, arguments, size)?;
    let prompts = Prompts::new(parts, &call, arguments)?;
    let pictures = prompts.count * call.num_images_per_prompt;
    check_generators(surroundings.generators, pictures)?;
    control.as_ref().map_or(Ok(()), |control| control.check_prompts(prompts.count))?;
    let mut scheduler = parts.scheduler.create()?;
    set_timesteps(&mut *scheduler, &call)?;
    let index = first_index(&*scheduler, steps(&call), strength)?;

    let schedule = (index, scheduler.timesteps().len());
    let control = control.map(|control| control.prepare(parts, repaint.fit, prompts.counts(), schedule));
    let mut conditioned = condition(parts, &call, &prompts, guidance_scale, surroundings.context)?;
    conditioned.control = control.transpose()?;
    let beginning = Beginning {
        scheduler: &*scheduler,
        index,
        is_pure_noise: strength == 1.0,
        adds_noise: true,
        given_noise: given_noise(parts, arguments)?,
        encoding: Encoding { scaling: Scaling::Factor, upcast: false, for_each_picture: false },
    };
    let Opening { latents, kept, surrounding } = repaint.open(parts, pictures, beginning, surroundings.generators)?;
    conditioned.surrounding = surrounding;
    let indices = index..scheduler.timesteps().len();
    let predict: Predict<'_> = &mut |latents, timestep, index| conditioned.predict(latents, timestep, index);
    let denoising = Denoising { parts, call: &call, indices, scaling: Scaling::Factor, upcast: false, kept };
    Ok(repaint.paste_back(denoising.run(predict, latents, &mut *scheduler, surroundings)?))
}
