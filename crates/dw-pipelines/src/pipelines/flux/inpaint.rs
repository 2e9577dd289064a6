//! Flux inpainting with a plain model (diffusers `FluxInpaintPipeline`): text to image inside a mask, with the picture
//! around it brought back after each step.

use dw_core::{arguments::Arguments, artifact::Entry};
use serde_json::Value;

use super::{Call, ENCODING, check_inputs, class_schema, guided_groups, img2img, size, with_class_defaults};
use crate::{
    Result,
    pipelines::{
        arguments::{group, group_schema, refuse_unknown},
        call::Surroundings,
        components::Parts,
        flow::first_index,
        image_to_image::StartPictures,
        inpaint::{Beginning, MaskArguments, Opening, Repaint},
        stable_diffusion_3_img2img::Strength,
    },
};

/// The arguments that classes with a mask take.
pub(super) fn groups() -> [Value; 3] {
    [group_schema::<StartPictures>(), group_schema::<MaskArguments>(), group_schema::<Strength>()]
}

/// The arguments of the class.
pub(crate) fn schema() -> Value {
    let more = groups().into_iter().chain(guided_groups());
    class_schema("FluxInpaintPipeline", more, &[img2img::DEFAULTS])
}

/// One call.
pub(crate) fn run(parts: &Parts, arguments: &Arguments, surroundings: Surroundings<'_>) -> Result<Entry> {
    refuse_unknown(parts.class, arguments, &schema())?;
    check_inputs(parts)?;
    repainted(parts, &with_class_defaults(arguments, img2img::DEFAULTS), surroundings)
}

/// One call of a class with a mask, with its defaults filled in.
pub(super) fn repainted(parts: &Parts, arguments: &Arguments, surroundings: Surroundings<'_>) -> Result<Entry> {
    let size = size(parts, arguments, surroundings.context)?;
    let call = Call::new(parts, arguments, size, surroundings.generators)?;
    let repaint = Repaint::read(parts, &call.generation, arguments, call.size)?;
    let Strength { strength } = group(arguments)?;
    let mut scheduler = call.scheduler()?;
    let index = first_index(&*scheduler, call.steps(), strength)?;

    let mut conditioned = call.conditioned(surroundings.context)?;
    let beginning = Beginning {
        scheduler: &*scheduler,
        index,
        // Noise of the first level is noise alone where that level is 1.
        is_pure_noise: false,
        adds_noise: true,
        given_noise: call.given_noise()?,
        encoding: ENCODING,
    };
    let Opening { latents, kept, surrounding } =
        repaint.open(parts, call.pictures(), beginning, surroundings.generators)?;
    conditioned.surrounding = surrounding;
    let indices = index..scheduler.timesteps().len();
    let entry = call.denoised(conditioned, latents, &mut *scheduler, (indices, kept), surroundings)?;
    Ok(repaint.paste_back(entry))
}
