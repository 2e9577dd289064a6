//! The table of commands: one row each, sorted by name.

use dw_core::nearest::nearest;

use crate::{Task, arguments, border, canny, crop, frames, gather, picture, qr, resize, text, watermark};

/// A row: name, argument struct, function, and what it does in a sentence.
macro_rules! row {
    ($name:literal, $arguments:ty, $run:path, $summary:literal) => {
        Task {
            name: $name,
            summary: $summary,
            schema: arguments::schema::<$arguments>,
            run: |raw, context| $run(arguments::parse::<$arguments>($name, raw)?, &arguments::Call { raw, context }),
        }
    };
}

#[rustfmt::skip]
static TASKS: &[Task] = &[
    row!("add_border_and_mask", border::Border, border::add_border_and_mask,
        "Puts a black border around a picture and makes the mask that outpaints it."),
    row!("add_border_and_mask_with_size", border::Canvas, border::add_border_and_mask_with_size,
        "Fits a picture into a black canvas of a given size and makes the mask that outpaints it."),
    row!("add_watermark", watermark::Watermark, watermark::add_watermark,
        "Writes a line of half-transparent text on a picture."),
    row!("canny_cv", canny::Thresholds, canny::canny_cv,
        "Finds the edges of a picture with the Canny detector, as OpenCV computes it."),
    row!("crop_square", picture::Picture, crop::crop_square,
        "Cuts the largest square out of the middle of a picture."),
    row!("extract_sections", text::Extraction, text::extract_sections,
        "Keeps the labelled sections of a text, in the order asked for."),
    row!("format_chat_message", text::Chat, text::format_chat_message,
        "Makes a chat of a system prompt and a user message."),
    row!("gather_images", gather::Images, gather::gather_images,
        "Reads pictures from files and URLs, one result for each."),
    row!("gather_inputs", gather::Anything, gather::gather_inputs,
        "Gives back what it is given."),
    row!("get_dict_value", text::Lookup, text::get_dict_value,
        "Takes one value out of an object; null when the key is not there."),
    row!("get_first_frame", frames::Edge, frames::get_first_frame,
        "The first picture of a video."),
    row!("get_frame", frames::Place, frames::get_frame,
        "One picture of a video, counted from its start or, when negative, from its end."),
    row!("get_image_size", picture::Picture, picture::get_image_size,
        "The width and height of a picture, as an object."),
    row!("get_last_frame", frames::Edge, frames::get_last_frame,
        "The last picture of a video."),
    row!("invert_image", picture::Picture, picture::invert_image,
        "Turns light to dark and dark to light; a mask then marks the other part. Alpha stays."),
    row!("qr_code", qr::Message, qr::qr_code,
        "Draws a QR code that a third of may be painted over and that still reads."),
    row!("resize_bucket", resize::Bucket, resize::resize_bucket,
        "Resizes a picture to the nearest of the usual aspect ratios."),
    row!("resize_center_crop", resize::Size, crop::resize_center_crop,
        "Cuts the largest square out of the middle of a picture and resizes it."),
    row!("resize_resample", resize::Resample, resize::resize_resample,
        "Resizes a picture so that its short side has the resolution, each side a multiple of 64."),
    row!("resize_rescale", resize::Size, resize::resize_rescale,
        "Resizes a picture to a width and height, whatever that does to its aspect."),
    row!("strip_exif", picture::Picture, picture::strip_exif,
        "The same picture without metadata."),
];

/// Every command of this build, sorted by name.
pub fn tasks() -> &'static [Task] {
    TASKS
}

/// The command called `name` (case matters).
pub fn find(name: &str) -> Option<&'static Task> {
    tasks().iter().find(|task| task.name == name)
}

/// What is wrong with a command name that [`find`] does not know, with the nearest one it does know.
pub fn unknown_command(name: &str) -> String {
    let known: Vec<&str> = tasks().iter().map(|task| task.name).collect();
    let hint = nearest(name, known.iter().copied()).map(|name| format!(". Did you mean `{name}`?"));
    let list = known.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    format!("Unknown task command: `{name}`. Registered commands: {list}{}", hint.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::{find, tasks, unknown_command};

    #[test]
    fn rows_are_sorted_by_name_and_none_comes_twice() {
        for pair in tasks().windows(2) {
            assert!(pair[0].name < pair[1].name, "`{}` stands before `{}`", pair[0].name, pair[1].name);
        }
    }

    #[test]
    fn every_argument_is_described_and_every_summary_is_a_sentence() {
        for task in tasks() {
            assert!(task.summary.ends_with('.'), "{}", task.name);
            let schema = (task.schema)();
            assert_eq!(schema["type"], "object", "{}", task.name);
            for (name, argument) in schema["properties"].as_object().into_iter().flatten() {
                assert!(argument["description"].is_string(), "`{name}` of `{}`", task.name);
            }
        }
    }

    #[test]
    fn a_schema_says_defaults_and_what_is_required() {
        let schema = (find("resize_rescale").expect("known").schema)();
        assert_eq!(schema["properties"]["width"]["default"], 768);
        assert_eq!(schema["properties"]["width"]["minimum"], 1);
        assert_eq!(schema["required"], serde_json::json!(["image"]));
        assert_eq!(schema["additionalProperties"], Value::Bool(false));
    }

    #[test]
    fn a_command_is_found_by_its_exact_name_only() {
        assert!(find("resize_rescale").is_some());
        assert!(find("RESIZE_RESCALE").is_none() && find("resize_rescle").is_none());
    }

    #[test]
    fn an_unknown_command_is_answered_with_the_nearest_and_all_there_are() {
        for name in ["resize_rescle", "RESIZE_RESCALE"] {
            let message = unknown_command(name);
            let start = format!("Unknown task command: `{name}`. Registered commands: `add_border_and_mask`, ");
            assert!(message.ends_with("`strip_exif`. Did you mean `resize_rescale`?"), "{message}");
            assert!(message.starts_with(&start), "{message}");
        }
        assert!(unknown_command("frobnicate").ends_with("`strip_exif`"));
    }
}
