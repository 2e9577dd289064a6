//! Commands that look at a whole picture without resizing it: its size, its negative, its bare pixels.

use dw_core::{
    arguments::ArtifactRef,
    artifact::Artifact,
    picture::{MAX_DECODED_BYTES, MAX_SIDE},
};
use image::DynamicImage;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::json;

use crate::{
    TaskError, TaskOutput,
    arguments::{Call, argument_error},
};

/// Arguments of commands that take a picture and nothing else.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Picture {
    /// The picture.
    image: ArtifactRef,
    /// Accepted and ignored: pictures are worked on by the CPU.
    #[serde(default, rename = "device")]
    _device: Option<String>,
}

impl Picture {
    /// The picture itself.
    pub(crate) fn of(&self, call: &Call) -> Result<std::sync::Arc<DynamicImage>, TaskError> {
        call.picture("image", self.image)
    }
}

/// A command's result that is one picture.
pub(crate) fn one(picture: impl Into<DynamicImage>) -> TaskOutput {
    TaskOutput::One(Artifact::image(picture.into()))
}

/// An error naming `argument` when a picture of this size cannot be made.
pub(crate) fn check_size(argument: &str, width: f64, height: f64) -> Result<(u32, u32), TaskError> {
    let sides = 1.0..=f64::from(MAX_SIDE);
    if sides.contains(&width) && sides.contains(&height) && width * height * 4.0 <= MAX_DECODED_BYTES as f64 {
        return Ok((width as u32, height as u32));
    }
    let limit = MAX_DECODED_BYTES >> 22;
    Err(argument_error(
        argument,
        format!(
            "it would make a picture of {width} x {height} pixels; sides from 1 to {MAX_SIDE} and at most {limit} megapixels are possible"
        ),
    ))
}

pub(crate) fn get_image_size(arguments: Picture, call: &Call) -> Result<TaskOutput, TaskError> {
    let picture = arguments.of(call)?;
    Ok(TaskOutput::One(Artifact::Json(json!({ "width": picture.width(), "height": picture.height() }))))
}

/// Decoded pictures carry no metadata, so the picture itself is the answer.
pub(crate) fn strip_exif(arguments: Picture, call: &Call) -> Result<TaskOutput, TaskError> {
    Ok(TaskOutput::One(Artifact::Image(arguments.of(call)?)))
}

pub(crate) fn invert_image(arguments: Picture, call: &Call) -> Result<TaskOutput, TaskError> {
    let mut picture = DynamicImage::clone(&*arguments.of(call)?);
    picture.invert();
    Ok(one(picture))
}

#[cfg(test)]
mod tests {
    use dw_core::artifact::Artifact;
    use serde_json::json;

    use crate::{
        TaskOutput,
        testing::{call, picture, picture_of, with_picture},
    };

    #[test]
    fn the_size_is_an_object_of_width_and_height() {
        let output = call("get_image_size", &picture_of(640, 480)).expect("a size");
        let TaskOutput::One(Artifact::Json(size)) = output else { panic!("expected data") };
        assert_eq!(size, json!({"width": 640, "height": 480}));
    }

    #[test]
    fn stripping_metadata_keeps_size_mode_and_pixels() {
        let rgba = image::RgbaImage::from_fn(200, 100, |x, y| image::Rgba([x as u8, y as u8, 3, 90]));
        let stripped = picture(call("strip_exif", &with_picture(rgba.clone().into())).expect("a picture"));
        assert_eq!(*stripped, rgba.into());
    }

    #[test]
    fn inverting_keeps_alpha_and_is_its_own_opposite() {
        let rgba = image::RgbaImage::from_pixel(2, 2, image::Rgba([0, 10, 255, 90]));
        let inverted = picture(call("invert_image", &with_picture(rgba.clone().into())).expect("a picture"));
        assert_eq!(inverted.as_bytes()[..4], [255, 245, 0, 90]);
        let again = picture(call("invert_image", &with_picture((*inverted).clone())).expect("a picture"));
        assert_eq!(*again, rgba.into());
    }
}
