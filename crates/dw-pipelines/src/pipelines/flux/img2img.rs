//! Flux image to image (diffusers `FluxImg2ImgPipeline`).

use dw_core::{arguments::Arguments, artifact::Entry};
use serde_json::Value;

use super::{Call, ENCODING, check_inputs, class_schema, guided_groups, size, with_class_defaults};
use crate::{
    Result,
    pipelines::{
        arguments::{Defaults, group, group_schema, refuse_unknown},
        call::Surroundings,
        components::Parts,
        fit::Fit,
        flow::first_index,
        image_to_image::{StartPictures, clean_latents, noisy_latents},
        inpaint::start,
        stable_diffusion_3_img2img::Strength,
    },
};

/// Defaults of the classes that start from a picture.
pub(super) const DEFAULTS: Defaults = &[("guidance_scale", 7.0)];

/// The arguments of the class.
pub(crate) fn schema() -> Value {
    let more = [group_schema::<StartPictures>(), group_schema::<Strength>()];
    class_schema("FluxImg2ImgPipeline", guided_groups().into_iter().chain(more), &[DEFAULTS])
}

/// One call.
pub(crate) fn run(parts: &Parts, arguments: &Arguments, surroundings: Surroundings<'_>) -> Result<Entry> {
    refuse_unknown(parts.class, arguments, &schema())?;
    let arguments = &with_class_defaults(arguments, DEFAULTS);
    check_inputs(parts)?;
    let size = size(parts, arguments, surroundings.context)?;
    // The result has the model's own size when the call names none, whatever the pictures' sizes are.
    let start = start(parts, arguments, &group::<StartPictures>(arguments)?, Fit::whole(size))?;
    let Strength { strength } = group(arguments)?;
    let call = Call::new(parts, arguments, size, surroundings.generators)?;
    let mut scheduler = call.scheduler()?;
    let first = first_index(&*scheduler, call.steps(), strength)?;

    let conditioned = call.conditioned(surroundings.context)?;
    let latents = if call.given_noise()?.is_some() {
        call.noise(&*scheduler, surroundings.generators)?
    } else {
        let clean = clean_latents(parts, &start, call.pictures(), ENCODING, surroundings.generators)?;
        noisy_latents(&clean, &*scheduler, first, surroundings.generators)?
    };
    let indices = first..scheduler.timesteps().len();
    call.denoised(conditioned, latents, &mut *scheduler, (indices, None), surroundings)
}
