//! A line of half-transparent text on a picture. The letters are Noto Sans Mono (OFL-1.1), rastered at
//! 32 pixels by the `noto-sans-mono-bitmap` crate and resized from there.

use dw_core::{
    arguments::ArtifactRef,
    picture::{Filter, resize, to_rgb},
};
use image::{GrayImage, RgbImage};
use noto_sans_mono_bitmap::{FontWeight, RasterHeight, get_raster, get_raster_width};
use schemars::JsonSchema;
use serde::Deserialize;

use crate::{
    TaskError, TaskOutput,
    arguments::{Call, argument_error},
    picture::one,
};

/// Largest font size.
const MAX_FONT_SIZE: u32 = 2048;

/// Arguments of `add_watermark`.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Watermark {
    /// The picture.
    image: ArtifactRef,
    /// What to write.
    #[serde(default = "text")]
    text: String,
    /// Where: `bottom-right`, `bottom-left`, `top-right`, `top-left` or `center`; anything else means `bottom-right`.
    #[serde(default = "position")]
    position: String,
    /// From 0, invisible, to 255, solid.
    #[serde(default = "opacity")]
    opacity: u8,
    /// Size of the font in pixels; 0 for a thirtieth of the picture's height, at least 12.
    #[serde(default)]
    font_size: u32,
    /// Distance from the picture's edges in pixels.
    #[serde(default = "margin")]
    margin: u32,
    /// Red, green and blue of the letters.
    #[serde(default = "white")]
    color: [u8; 3],
    /// Accepted and ignored: pictures are worked on by the CPU.
    #[serde(default, rename = "device")]
    _device: Option<String>,
}

fn text() -> String {
    "AI Generated".to_owned()
}

fn position() -> String {
    "bottom-right".to_owned()
}

fn opacity() -> u8 {
    128
}

fn margin() -> u32 {
    10
}

fn white() -> [u8; 3] {
    [255; 3]
}

pub(crate) fn add_watermark(arguments: Watermark, call: &Call) -> Result<TaskOutput, TaskError> {
    if arguments.font_size > MAX_FONT_SIZE {
        return Err(argument_error("font_size", format!("at most {MAX_FONT_SIZE} pixels are possible")));
    }
    let mut picture = to_rgb(&*call.picture("image", arguments.image)?);
    let auto = (picture.height() / 30).clamp(12, MAX_FONT_SIZE);
    // A line of this font is a third taller than its size.
    let height = if arguments.font_size == 0 { auto } else { arguments.font_size } * 4 / 3;
    let advance = advance(height);
    let width = arguments.text.chars().count() as i64 * i64::from(advance);
    let (mut x, y) = origin(&arguments, (picture.width(), picture.height()), (width, i64::from(height)));
    for letter in arguments.text.chars() {
        if x > -i64::from(advance) && x < i64::from(picture.width()) {
            stamp(&mut picture, &glyph(letter, height), (x, y), arguments.color, arguments.opacity);
        }
        x += i64::from(advance);
    }
    Ok(one(picture))
}

/// How wide a letter of that height is: the font is monospaced.
fn advance(height: u32) -> u32 {
    let cell = get_raster_width(FontWeight::Regular, RasterHeight::Size32) as f64 / RasterHeight::Size32.val() as f64;
    (f64::from(height) * cell).round().max(1.0) as u32
}

/// Where the text's top left corner lies.
fn origin(arguments: &Watermark, picture: (u32, u32), text: (i64, i64)) -> (i64, i64) {
    let margin = i64::from(arguments.margin);
    let (right, bottom) = (i64::from(picture.0) - text.0 - margin, i64::from(picture.1) - text.1 - margin);
    match arguments.position.as_str() {
        "bottom-left" => (margin, bottom),
        "top-right" => (right, margin),
        "top-left" => (margin, margin),
        "center" => (right.midpoint(margin), bottom.midpoint(margin)),
        _ => (right, bottom),
    }
}

/// How much of each pixel a letter covers, in a cell of that height. Letters that the font lacks are `?`.
fn glyph(letter: char, height: u32) -> GrayImage {
    let raster = |letter| get_raster(letter, FontWeight::Regular, RasterHeight::Size32);
    let coverage = raster(letter)
        .or_else(|| raster('?'))
        .and_then(|cell| GrayImage::from_raw(cell.width() as u32, cell.height() as u32, cell.pixels().to_vec()));
    resize(&coverage.unwrap_or_default().into(), advance(height), height, Filter::Bicubic).into_luma8()
}

fn stamp(picture: &mut RgbImage, glyph: &GrayImage, at: (i64, i64), color: [u8; 3], opacity: u8) {
    for (x, y, coverage) in glyph.enumerate_pixels() {
        let place = (u32::try_from(at.0 + i64::from(x)), u32::try_from(at.1 + i64::from(y)));
        let (Ok(x), Ok(y)) = place else { continue };
        if let Some(pixel) = picture.get_pixel_mut_checked(x, y) {
            let alpha = u32::from(coverage[0]) * u32::from(opacity);
            for (under, over) in pixel.0.iter_mut().zip(color) {
                let mixed = u32::from(*under) * (255 * 255 - alpha) + u32::from(over) * alpha;
                *under = ((mixed + 255 * 255 / 2) / (255 * 255)) as u8;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use image::{DynamicImage, RgbImage};
    use serde_json::{Value, json};

    use crate::testing::{and, call, picture, picture_of, with_picture};

    /// A black picture of 400 x 300 after the watermark.
    fn marked(more: Value) -> RgbImage {
        let arguments = and(with_picture(DynamicImage::new_rgba8(400, 300)), more);
        let picture = picture(call("add_watermark", &arguments).expect("a picture"));
        assert_eq!(picture.color(), image::ColorType::Rgb8);
        picture.to_rgb8()
    }

    /// The middle of what was written, as parts of the width and height.
    fn middle(picture: &RgbImage) -> (f64, f64) {
        let written: Vec<_> = picture.enumerate_pixels().filter(|(_, _, pixel)| pixel[0] > 0).collect();
        let sum = written.iter().fold((0.0, 0.0), |sum, (x, y, _)| (sum.0 + f64::from(*x), sum.1 + f64::from(*y)));
        let count = written.len() as f64;
        (sum.0 / count / f64::from(picture.width()), sum.1 / count / f64::from(picture.height()))
    }

    #[test]
    fn text_is_written_in_the_corner_asked_for() {
        for (position, right, bottom) in [
            ("bottom-right", true, true),
            ("bottom-left", false, true),
            ("top-right", true, false),
            ("top-left", false, false),
            ("somewhere", true, true),
        ] {
            let (x, y) = middle(&marked(json!({ "position": position })));
            assert_eq!((x > 0.5, y > 0.5), (right, bottom), "{position}: {x} {y}");
        }
        let (x, y) = middle(&marked(json!({"position": "center"})));
        assert!((x - 0.5).abs() < 0.05 && (y - 0.5).abs() < 0.05, "{x} {y}");
    }

    #[test]
    fn opacity_and_color_say_how_the_letters_look() {
        let solid = marked(json!({"opacity": 255, "color": [200, 100, 0], "font_size": 64}));
        assert!(solid.pixels().any(|pixel| pixel.0 == [200, 100, 0]), "a stroke is fully covered");
        let half = marked(json!({"opacity": 128, "font_size": 64}));
        assert_eq!(half.pixels().map(|pixel| pixel[0]).max(), Some(128));
        assert!(marked(json!({"opacity": 0})).pixels().all(|pixel| pixel[0] == 0));
    }

    #[test]
    fn text_larger_than_the_picture_is_cut_and_unknown_letters_are_drawn() {
        marked(json!({"text": "x".repeat(5000), "font_size": 2048}));
        marked(json!({"margin": 4_000_000_000_u32}));
        assert!(middle(&marked(json!({"text": "日本"}))).0 > 0.5);
        assert!(marked(json!({"text": ""})).pixels().all(|pixel| pixel[0] == 0));
    }

    #[test]
    fn a_font_size_out_of_reason_is_refused() {
        let error =
            call("add_watermark", &and(picture_of(8, 8), json!({"font_size": 1_000_000}))).expect_err("too large");
        assert_eq!(error.to_string(), "argument `font_size`: at most 2048 pixels are possible");
    }
}
