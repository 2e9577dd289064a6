//! Stable Diffusion XL steered by ControlNets (diffusers `StableDiffusionXLControlNetPipeline`, its image-to-image and
//! inpainting forms, and `StableDiffusionXLControlNetUnionPipeline`): the plain calls of the family with a
//! [`ControlCall`].

use dw_core::{arguments::Arguments, artifact::Entry};
use serde_json::Value;

use super::{
    arguments::{Defaults, filled, group, group_schema, merged_schema, refuse_unknown, with_defaults},
    call::Surroundings,
    components::Parts,
    control::{ControlArguments, ControlAsImage, ControlCall, ControlModes, ControlPictures, GuessMode},
    image_to_image::StartPictures,
    stable_diffusion_xl::{self, SizeConditioning, XlPrompts},
    stable_diffusion_xl_img2img::{self, Refinement},
    stable_diffusion_xl_inpaint,
    text_to_image::{Canvas, DenoisingEnd, Generation, StartingNoise},
};
use crate::Result;

/// The arguments of text to image that have nothing to do with control.
fn groups() -> Vec<Value> {
    vec![
        group_schema::<Generation>(),
        group_schema::<Canvas>(),
        group_schema::<StartingNoise>(),
        group_schema::<XlPrompts>(),
        group_schema::<SizeConditioning>(),
        group_schema::<DenoisingEnd>(),
        group_schema::<ControlArguments>(),
        group_schema::<GuessMode>(),
    ]
}

/// The arguments of `StableDiffusionXLControlNetPipeline`.
pub(crate) fn schema() -> Value {
    let mut groups = groups();
    groups.push(group_schema::<ControlAsImage>());
    merged_schema("StableDiffusionXLControlNetPipeline", &groups)
}

/// One call of `StableDiffusionXLControlNetPipeline`.
pub(crate) fn run(parts: &Parts, arguments: &Arguments, surroundings: Surroundings<'_>) -> Result<Entry> {
    refuse_unknown(parts.class, arguments, &schema())?;
    let ControlAsImage { image } = group(arguments)?;
    let control = ControlCall::read(parts, arguments, "image", image)?;
    stable_diffusion_xl::generate(parts, arguments, Some(control), surroundings)
}

/// The arguments of `StableDiffusionXLControlNetUnionPipeline`.
pub(crate) fn union_schema() -> Value {
    let mut groups = groups();
    groups.extend([group_schema::<ControlPictures>(), group_schema::<ControlModes>()]);
    merged_schema("StableDiffusionXLControlNetUnionPipeline", &groups)
}

/// One call of `StableDiffusionXLControlNetUnionPipeline`.
pub(crate) fn run_union(parts: &Parts, arguments: &Arguments, surroundings: Surroundings<'_>) -> Result<Entry> {
    refuse_unknown(parts.class, arguments, &union_schema())?;
    let control = ControlCall::read_union(parts, arguments)?;
    stable_diffusion_xl::generate(parts, arguments, Some(control), surroundings)
}

const IMG2IMG_DEFAULTS: Defaults = &[("strength", 0.8), ("controlnet_conditioning_scale", 0.8)];

/// The arguments of `StableDiffusionXLControlNetImg2ImgPipeline`.
pub(crate) fn img2img_schema() -> Value {
    let groups = [
        group_schema::<Generation>(),
        group_schema::<StartPictures>(),
        group_schema::<ControlPictures>(),
        group_schema::<ControlArguments>(),
        group_schema::<GuessMode>(),
        group_schema::<Refinement>(),
        group_schema::<Canvas>(),
        group_schema::<XlPrompts>(),
        group_schema::<SizeConditioning>(),
        group_schema::<DenoisingEnd>(),
    ];
    with_defaults(merged_schema("StableDiffusionXLControlNetImg2ImgPipeline", &groups), IMG2IMG_DEFAULTS)
}

/// One call of `StableDiffusionXLControlNetImg2ImgPipeline`.
pub(crate) fn run_img2img(parts: &Parts, arguments: &Arguments, surroundings: Surroundings<'_>) -> Result<Entry> {
    refuse_unknown(parts.class, arguments, &img2img_schema())?;
    let arguments = &filled(arguments, IMG2IMG_DEFAULTS);
    let ControlPictures { control_image } = group(arguments)?;
    let control = ControlCall::read(parts, arguments, "control_image", control_image)?;
    stable_diffusion_xl_img2img::generate(parts, arguments, Some(control), surroundings)
}

const INPAINT_DEFAULTS: Defaults = &[("strength", 0.9999)];

/// The arguments of `StableDiffusionXLControlNetInpaintPipeline`.
pub(crate) fn inpaint_schema() -> Value {
    let mut groups = stable_diffusion_xl_inpaint::groups();
    groups.extend([group_schema::<ControlPictures>(), group_schema::<ControlArguments>(), group_schema::<GuessMode>()]);
    with_defaults(merged_schema("StableDiffusionXLControlNetInpaintPipeline", &groups), INPAINT_DEFAULTS)
}

/// One call of `StableDiffusionXLControlNetInpaintPipeline`.
pub(crate) fn run_inpaint(parts: &Parts, arguments: &Arguments, surroundings: Surroundings<'_>) -> Result<Entry> {
    refuse_unknown(parts.class, arguments, &inpaint_schema())?;
    let arguments = &filled(arguments, INPAINT_DEFAULTS);
    let ControlPictures { control_image } = group(arguments)?;
    let control = ControlCall::read(parts, arguments, "control_image", control_image)?;
    stable_diffusion_xl_inpaint::generate(parts, arguments, Some(control), surroundings)
}
