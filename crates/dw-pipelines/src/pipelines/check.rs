//! What can be said about the arguments of a call before a model is loaded. The calls themselves check all of it once
//! more, and what depends on the model.

use dw_core::arguments::Arguments;
use image::DynamicImage;
use serde_json::Value;

use super::{
    arguments::group,
    call::steps,
    flow::check_strength,
    image_to_image::{Given, StartPictures, pictures, steps_of},
    inpaint::MaskArguments,
    text_to_image::{Generation, refuse},
};
use crate::{Result, registry::Task};

/// Checks a call of a class of the Stable Diffusion families with UNets with this `schema`. The remarks are about what
/// works, but was probably not meant.
pub(crate) fn check(task: Task, schema: &Value, arguments: &Arguments) -> Result<Vec<String>> {
    let arguments = &with_schedule(schema, arguments);
    let call: Generation = group(arguments)?;
    let strength = arguments.values.get("strength").and_then(Value::as_f64);
    if let (Some(strength), None) = (strength, given(arguments, "denoising_start")) {
        steps_of(steps(&call), strength)?;
    }
    check_generation(task, &call, arguments)
}

/// Checks a call of a class of a family of rectified flows with this `schema`, like [`check`].
pub(crate) fn check_flow_call(task: Task, schema: &Value, arguments: &Arguments) -> Result<Vec<String>> {
    if let Some(strength) = arguments.values.get("strength").and_then(Value::as_f64) {
        check_strength(strength)?;
    }
    let takes = |name: &str| schema.pointer(&format!("/properties/{name}")).is_some();
    for (name, pictures) in [("control_image", "the picture that steers the result"), ("control_mask", "a mask")] {
        if takes(name) && given(arguments, name).is_none() {
            return Err(refuse(name, format!("is missing; give {pictures}")));
        }
    }
    // A ControlNet that paints has picture and mask of its own.
    let task = if takes("control_mask") { Task::TextToImage } else { task };
    check_generation(task, &group(arguments)?, arguments)
}

fn check_generation(task: Task, call: &Generation, arguments: &Arguments) -> Result<Vec<String>> {
    call.check(1.0)?;
    let mut remarks = Vec::new();
    match task {
        Task::TextToImage => remarks.extend(empty_prompt(call)),
        Task::ImageToImage | Task::Edit | Task::Upscale => {
            group::<StartPictures>(arguments)?.given(arguments)?;
        }
        Task::Inpaint => remarks.extend(masks(arguments)?),
        // None of these families makes prompts for another.
        Task::Prior => {}
    }
    Ok(remarks)
}

/// An argument that is there and not null.
fn given<'a>(arguments: &'a Arguments, name: &str) -> Option<&'a Value> {
    arguments.values.get(name).filter(|value| !value.is_null())
}

/// The arguments with the class's own number of steps and strength where the call names none.
fn with_schedule(schema: &Value, arguments: &Arguments) -> Arguments {
    let mut filled = arguments.clone();
    for name in ["num_inference_steps", "strength"] {
        let default = schema.pointer(&format!("/properties/{name}/default"));
        if let (None, Some(default)) = (given(arguments, name), default) {
            filled.values.insert(name.to_owned(), default.clone());
        }
    }
    filled
}

fn empty_prompt(call: &Generation) -> Option<String> {
    let texts = call.prompt.as_ref()?.list();
    let is_empty = texts.iter().all(|text| text.trim().is_empty());
    is_empty.then(|| "`prompt` is empty, so the picture shows whatever the model likes".to_owned())
}

/// Masks have to be there; of another size than the picture, they are stretched with it.
fn masks(arguments: &Arguments) -> Result<Option<String>> {
    let start = group::<StartPictures>(arguments)?;
    let mask: MaskArguments = group(arguments)?;
    let masks = pictures(("mask_image", "a picture"), arguments, mask.handles()?)?;
    let Given::Pictures(painted) = start.given(arguments)? else { return Ok(None) };
    let differs = |mask: &&&DynamicImage| painted.iter().all(|picture| size(picture) != size(mask));
    let Some(mask_image) = masks.iter().find(differs) else { return Ok(None) };
    let (of_mask, of_picture) = (shown(mask_image), shown(painted[0]));
    if mask.padding_mask_crop.is_some() {
        let reason = format!(
            "is {of_mask} pixels, but `image` is {of_picture}; with `padding_mask_crop` both must be of one size"
        );
        return Err(refuse("mask_image", reason));
    }
    Ok(Some(format!(
        "`mask_image` is {of_mask} pixels and `image` {of_picture}: both are stretched to the size of the result; make \
         the mask as large as the picture if that is not meant"
    )))
}

fn size(picture: &DynamicImage) -> (u32, u32) {
    (picture.width(), picture.height())
}

fn shown(picture: &DynamicImage) -> String {
    format!("`{} x {}`", picture.width(), picture.height())
}
