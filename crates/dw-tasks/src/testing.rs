//! What the tests of the commands share: calling one by its name, and making pictures.

use std::{path::Path, sync::Arc};

use dw_core::{
    arguments::{Arguments, ArtifactRef},
    artifact::Artifact,
    cancel::CancellationToken,
};
use image::DynamicImage;
use serde_json::Value;

use crate::{TaskContext, TaskError, TaskOutput, registry};

/// Calls a command with the crate's folder as the workflow's, and no network.
pub(crate) fn call(command: &str, arguments: &Arguments) -> Result<TaskOutput, TaskError> {
    call_in(Path::new(env!("CARGO_MANIFEST_DIR")), command, arguments)
}

/// Calls a command of a workflow that lies in `base_dir`. Its URLs answer with a red PNG of 2 x 2
/// pixels, unless they contain `missing`.
pub(crate) fn call_in(base_dir: &Path, command: &str, arguments: &Arguments) -> Result<TaskOutput, TaskError> {
    let fetch = |url: &str| {
        if url.contains("missing") {
            Err(format!("`{url}` answered 404"))
        } else {
            Ok(png(&image::RgbImage::from_pixel(2, 2, image::Rgb([255, 0, 0])).into()))
        }
    };
    let context =
        TaskContext { base_dir, events: &dw_core::event::Silent, cancel: &CancellationToken::default(), fetch: &fetch };
    (registry::find(command).expect("a known command").run)(arguments, &context)
}

/// A picture as the bytes of a PNG file.
pub(crate) fn png(picture: &DynamicImage) -> Vec<u8> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    picture.write_to(&mut bytes, image::ImageFormat::Png).expect("memory takes every byte");
    bytes.into_inner()
}

/// Arguments whose `image` is `picture`.
pub(crate) fn with_picture(picture: DynamicImage) -> Arguments {
    let mut arguments = Arguments::default();
    arguments.values.insert("image".into(), ArtifactRef(0).to_value());
    arguments.artifacts.insert(0, Artifact::image(picture));
    arguments
}

/// Arguments whose `image` is an RGB picture of that size, each pixel telling where it is.
pub(crate) fn picture_of(width: u32, height: u32) -> Arguments {
    with_picture(image::RgbImage::from_fn(width, height, |x, y| image::Rgb([x as u8, y as u8, 200])).into())
}

/// `arguments` with some more values, given as a JSON object.
pub(crate) fn and(mut arguments: Arguments, more: Value) -> Arguments {
    let Value::Object(more) = more else { panic!("arguments are an object") };
    arguments.values.extend(more);
    arguments
}

/// The one picture that a command gave.
pub(crate) fn picture(output: TaskOutput) -> Arc<DynamicImage> {
    match output {
        TaskOutput::One(Artifact::Image(picture)) => picture,
        other => panic!("expected one picture, found {other:?}"),
    }
}
