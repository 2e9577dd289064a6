//! Flux steered by edges or depth with a model made for it (diffusers `FluxControlPipeline`): the transformer reads the
//! latents of the control picture beside its own.

use candle_core::Tensor;
use dw_core::{arguments::Arguments, artifact::Entry};
use image::DynamicImage;
use serde_json::Value;

use super::{Call, ENCODING, check_inputs, class_schema, size, with_class_defaults};
use crate::{
    Result,
    pipelines::{
        arguments::{group, group_schema, refuse_unknown},
        call::Surroundings,
        components::Parts,
        control::{ControlPictures, all_pictures},
        fit::Fit,
        image_to_image::encoded,
        prompt::repeat_rows,
        text_to_image::refuse,
    },
    rng::Generators,
};

/// The arguments of the class.
pub(crate) fn schema() -> Value {
    class_schema("FluxControlPipeline", [group_schema::<ControlPictures>()], &[])
}

/// One call.
pub(crate) fn run(parts: &Parts, arguments: &Arguments, surroundings: Surroundings<'_>) -> Result<Entry> {
    refuse_unknown(parts.class, arguments, &schema())?;
    let arguments = &with_class_defaults(arguments, &[]);
    check_inputs(parts)?;
    let name = "control_image";
    let pictures = all_pictures(arguments, name, group::<ControlPictures>(arguments)?.control_image)?;
    let size = size(parts, arguments, surroundings.context)?;
    let call = Call::new(parts, arguments, size, surroundings.generators)?;
    check_prompts(name, pictures.len(), call.prompts.count)?;
    let mut scheduler = call.scheduler()?;

    let mut conditioned = call.conditioned(surroundings.context)?;
    conditioned.surrounding = Some(picture_latents(&call, &pictures, surroundings.generators)?);
    let latents = call.noise(&*scheduler, surroundings.generators)?;
    let indices = 0..scheduler.timesteps().len();
    call.denoised(conditioned, latents, &mut *scheduler, (indices, None), surroundings)
}

/// Refuses lists of pictures that do not go with the prompts.
pub(super) fn check_prompts(name: &str, pictures: usize, prompts: usize) -> Result<()> {
    if pictures == 1 || pictures == prompts {
        return Ok(());
    }
    Err(refuse(name, format!("has {pictures} pictures for {prompts} prompt(s); give one, or one for each prompt")))
}

/// Control pictures at the size of the call, one row for each picture of the result, in -1 to 1.
pub(super) fn picture_pixels(call: &Call<'_>, pictures: &[&DynamicImage]) -> Result<Tensor> {
    let pixels = pictures.iter().map(|picture| Fit::whole(call.size).signed(picture, &call.parts.device));
    let pixels = Tensor::cat(&pixels.collect::<Result<Vec<_>>>()?, 0)?;
    let times = if pictures.len() == 1 { call.pictures() } else { call.generation.num_images_per_prompt };
    repeat_rows(&pixels, times)
}

/// The latents of control pictures, one row for each picture of the result, sampled with the call's noise.
pub(super) fn picture_latents(
    call: &Call<'_>,
    pictures: &[&DynamicImage],
    generators: &mut Generators,
) -> Result<Tensor> {
    encoded(call.parts, &picture_pixels(call, pictures)?, call.pictures(), ENCODING, generators)
}
