//! Stable Diffusion XL inpainting (diffusers `StableDiffusionXLInpaintPipeline`): text to image inside a mask, with
//! the picture around it kept.

use dw_core::{arguments::Arguments, artifact::Entry};
use serde_json::Value;

use super::{
    arguments::{Defaults, filled, group, group_schema, merged_schema, refuse_unknown, with_defaults},
    call::{Denoising, Surroundings, set_timesteps, steps},
    components::Parts,
    control::ControlCall,
    decode::Scaling,
    denoise::Predict,
    image_to_image::{Encoding, StartPictures},
    inpaint::{Beginning, MaskArguments, Opening, Repaint, start_size},
    stable_diffusion_xl::{Prompts, SizeConditioning, XlPrompts, condition},
    stable_diffusion_xl_img2img::Refinement,
    text_to_image::{Canvas, DenoisingEnd, Generation, StartingNoise, check_generators},
    unet::{given_noise, picture_size, size_like},
};
use crate::Result;

const DEFAULTS: Defaults = &[("strength", 0.9999), ("guidance_scale", 7.5)];

/// The arguments that all inpainting classes of the family take.
pub(crate) fn groups() -> Vec<Value> {
    vec![
        group_schema::<Generation>(),
        group_schema::<StartPictures>(),
        group_schema::<MaskArguments>(),
        group_schema::<Refinement>(),
        group_schema::<Canvas>(),
        group_schema::<StartingNoise>(),
        group_schema::<XlPrompts>(),
        group_schema::<SizeConditioning>(),
        group_schema::<DenoisingEnd>(),
    ]
}

/// The arguments of the class.
pub(crate) fn schema() -> Value {
    with_defaults(merged_schema("StableDiffusionXLInpaintPipeline", &groups()), DEFAULTS)
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
    let xl: XlPrompts = group(arguments)?;
    let sizes: SizeConditioning = group(arguments)?;
    let refinement: Refinement = group(arguments)?;
    let DenoisingEnd { denoising_end } = group(arguments)?;
    call.check(xl.guidance_scale)?;
    let size = match &control {
        Some(_) => size_like(parts, &canvas, start_size(parts, arguments)?)?,
        None => picture_size(parts, &canvas, 128)?,
    };
    let repaint = Repaint::read(parts, &call, arguments, size)?;
    let prompts = Prompts::new(parts, &call, &xl, arguments)?;
    let pictures = prompts.count * call.num_images_per_prompt;
    check_generators(surroundings.generators, pictures)?;
    control.as_ref().map_or(Ok(()), |control| control.check_prompts(prompts.count))?;
    let mut scheduler = parts.scheduler.create()?;
    set_timesteps(&mut *scheduler, &call)?;
    let indices = refinement.indices(&*scheduler, steps(&call), denoising_end)?;

    let wants_score = parts.setting("requires_aesthetics_score", false);
    let time_ids = |guided| refinement.time_ids(&sizes, (size, wants_score), guided, pictures);
    let schedule = (indices.start, scheduler.timesteps().len());
    let control = control.map(|control| control.prepare(parts, repaint.fit, prompts.counts(), schedule));
    let mut conditioned = condition(parts, &call, prompts, (xl.guidance_scale, &time_ids), surroundings.context)?;
    conditioned.control = control.transpose()?;
    let beginning = Beginning {
        scheduler: &*scheduler,
        index: indices.start,
        is_pure_noise: refinement.strength == 1.0,
        adds_noise: refinement.denoising_start.is_none(),
        given_noise: given_noise(parts, arguments)?,
        // Unlike image to image, inpainting does not know the latents' statistics when it encodes.
        encoding: Encoding { scaling: Scaling::Factor, upcast: true, for_each_picture: false },
    };
    let Opening { latents, kept, surrounding } = repaint.open(parts, pictures, beginning, surroundings.generators)?;
    conditioned.surrounding = surrounding;
    let predict: Predict<'_> = &mut |latents, timestep, index| conditioned.predict(latents, timestep, index);
    let denoising = Denoising { parts, call: &call, indices, scaling: Scaling::Statistics, upcast: true, kept };
    Ok(repaint.paste_back(denoising.run(predict, latents, &mut *scheduler, surroundings)?))
}
