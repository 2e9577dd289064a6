//! Stable Diffusion 1.x and 2.x steered by ControlNets (diffusers `StableDiffusionControlNetPipeline` and its
//! image-to-image and inpainting forms): the plain calls of the family with a [`ControlCall`].

use dw_core::{arguments::Arguments, artifact::Entry};
use serde_json::Value;

use super::{
    arguments::{Defaults, filled, group, group_schema, merged_schema, refuse_unknown, with_defaults},
    call::Surroundings,
    components::Parts,
    control::{ControlArguments, ControlAsImage, ControlCall, ControlPictures, GuessMode},
    image_to_image::StartPictures,
    stable_diffusion::{self, GuidanceArguments},
    stable_diffusion_img2img::{self, Strength},
    stable_diffusion_inpaint,
    text_to_image::{Canvas, Generation, StartingNoise},
};
use crate::Result;

/// The arguments of `StableDiffusionControlNetPipeline`.
pub(crate) fn schema() -> Value {
    let groups = [
        group_schema::<Generation>(),
        group_schema::<ControlAsImage>(),
        group_schema::<ControlArguments>(),
        group_schema::<GuessMode>(),
        group_schema::<GuidanceArguments>(),
        group_schema::<Canvas>(),
        group_schema::<StartingNoise>(),
    ];
    merged_schema("StableDiffusionControlNetPipeline", &groups)
}

/// One call of `StableDiffusionControlNetPipeline`.
pub(crate) fn run(parts: &Parts, arguments: &Arguments, surroundings: Surroundings<'_>) -> Result<Entry> {
    refuse_unknown(parts.class, arguments, &schema())?;
    let ControlAsImage { image } = group(arguments)?;
    let control = ControlCall::read(parts, arguments, "image", image)?;
    stable_diffusion::generate(parts, arguments, Some(control), surroundings)
}

const IMG2IMG_DEFAULTS: Defaults = &[("controlnet_conditioning_scale", 0.8)];

/// The arguments of `StableDiffusionControlNetImg2ImgPipeline`.
pub(crate) fn img2img_schema() -> Value {
    let groups = [
        group_schema::<Generation>(),
        group_schema::<StartPictures>(),
        group_schema::<ControlPictures>(),
        group_schema::<ControlArguments>(),
        group_schema::<GuessMode>(),
        group_schema::<GuidanceArguments>(),
        group_schema::<Strength>(),
        group_schema::<Canvas>(),
    ];
    with_defaults(merged_schema("StableDiffusionControlNetImg2ImgPipeline", &groups), IMG2IMG_DEFAULTS)
}

/// One call of `StableDiffusionControlNetImg2ImgPipeline`.
pub(crate) fn run_img2img(parts: &Parts, arguments: &Arguments, surroundings: Surroundings<'_>) -> Result<Entry> {
    refuse_unknown(parts.class, arguments, &img2img_schema())?;
    let arguments = &filled(arguments, IMG2IMG_DEFAULTS);
    let ControlPictures { control_image } = group(arguments)?;
    let control = ControlCall::read(parts, arguments, "control_image", control_image)?;
    stable_diffusion_img2img::generate(parts, arguments, Some(control), surroundings)
}

const INPAINT_DEFAULTS: Defaults = &[("strength", 1.0), ("controlnet_conditioning_scale", 0.5)];

/// The arguments of `StableDiffusionControlNetInpaintPipeline`.
pub(crate) fn inpaint_schema() -> Value {
    let mut groups = stable_diffusion_inpaint::groups();
    groups.extend([group_schema::<ControlPictures>(), group_schema::<ControlArguments>(), group_schema::<GuessMode>()]);
    with_defaults(merged_schema("StableDiffusionControlNetInpaintPipeline", &groups), INPAINT_DEFAULTS)
}

/// One call of `StableDiffusionControlNetInpaintPipeline`.
pub(crate) fn run_inpaint(parts: &Parts, arguments: &Arguments, surroundings: Surroundings<'_>) -> Result<Entry> {
    refuse_unknown(parts.class, arguments, &inpaint_schema())?;
    let arguments = &filled(arguments, INPAINT_DEFAULTS);
    let ControlPictures { control_image } = group(arguments)?;
    let control = ControlCall::read(parts, arguments, "control_image", control_image)?;
    stable_diffusion_inpaint::generate(parts, arguments, Some(control), surroundings)
}
