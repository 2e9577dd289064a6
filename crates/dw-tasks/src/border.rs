//! Commands that put a picture on a larger black canvas and make the mask an outpainting model fills:
//! 255 where there is border, 0 where the picture stays.

use dw_core::{
    arguments::ArtifactRef,
    artifact::Artifact,
    picture::{Filter, resize, to_rgb},
};
use image::{GrayImage, Luma, RgbImage, imageops};
use schemars::JsonSchema;
use serde::Deserialize;

use crate::{
    TaskError, TaskOutput,
    arguments::{Call, argument_error},
    picture::check_size,
    resize::multiple_of,
};

/// Both sides of a canvas are multiples of this.
const ALIGNMENT: u32 = 32;

/// Arguments of `add_border_and_mask`.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Border {
    /// The picture.
    image: ArtifactRef,
    /// How many times as large the canvas is in both directions; 1 adds nothing.
    #[serde(default = "one")]
    zoom_all: f64,
    /// Border to add on the left, in widths of the picture.
    #[serde(default)]
    zoom_left: f64,
    /// Border to add on the right, in widths of the picture.
    #[serde(default)]
    zoom_right: f64,
    /// Border to add above, in heights of the picture.
    #[serde(default)]
    zoom_up: f64,
    /// Border to add below, in heights of the picture.
    #[serde(default)]
    zoom_down: f64,
    /// How far the mask reaches into the picture on each side, in sides of the picture.
    #[serde(default)]
    overlap: f64,
    /// Accepted and ignored: pictures are worked on by the CPU.
    #[serde(default, rename = "device")]
    _device: Option<String>,
}

fn one() -> f64 {
    1.0
}

pub(crate) fn add_border_and_mask(arguments: Border, call: &Call) -> Result<TaskOutput, TaskError> {
    let Border { zoom_all, zoom_left, zoom_right, zoom_up, zoom_down, overlap, .. } = arguments;
    let zooms = [("zoom_left", zoom_left), ("zoom_right", zoom_right), ("zoom_up", zoom_up), ("zoom_down", zoom_down)];
    for (name, zoom) in zooms.into_iter().chain([("zoom_all", zoom_all)]) {
        if !zoom.is_finite() || zoom < 0.0 {
            return Err(argument_error(name, format!("expected a number of 0 or more, found `{zoom}`")));
        }
    }
    let picture = to_rgb(&*call.picture("image", arguments.image)?);
    let pad = |side: u32, zoom: f64| {
        let all = if zoom_all > 1.0 { f64::from(side) * (zoom_all - 1.0) / 2.0 } else { 0.0 };
        (f64::from(side) * zoom).trunc() + all.trunc()
    };
    let (width, height) = (picture.width(), picture.height());
    let at = (pad(width, zoom_left), pad(height, zoom_up));
    let canvas_width = f64::from(width) + at.0 + pad(width, zoom_right);
    let canvas_height = f64::from(height) + at.1 + pad(height, zoom_down);
    let canvas = check_size("zoom_all", aligned(canvas_width), aligned(canvas_height))?;
    on_canvas(&picture, canvas, (at.0 as i64, at.1 as i64), overlap)
}

/// The nearest multiple of [`ALIGNMENT`] that is not 0.
fn aligned(side: f64) -> f64 {
    multiple_of(ALIGNMENT, side).max(f64::from(ALIGNMENT))
}

/// Arguments of `add_border_and_mask_with_size`.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Canvas {
    /// The picture.
    image: ArtifactRef,
    /// Width of the canvas in pixels, rounded to a multiple of 32.
    width: u32,
    /// Height of the canvas in pixels, rounded to a multiple of 32.
    height: u32,
    /// How far the mask reaches into the picture on each side, in sides of the fitted picture.
    #[serde(default)]
    overlap: f64,
    /// Accepted and ignored: pictures are worked on by the CPU.
    #[serde(default, rename = "device")]
    _device: Option<String>,
}

pub(crate) fn add_border_and_mask_with_size(arguments: Canvas, call: &Call) -> Result<TaskOutput, TaskError> {
    for (name, side) in [("width", arguments.width), ("height", arguments.height)] {
        if side == 0 {
            return Err(argument_error(name, "it must be 1 or more"));
        }
    }
    let picture = call.picture("image", arguments.image)?;
    let sides = (f64::from(arguments.width), f64::from(arguments.height));
    let canvas = check_size("width", aligned(sides.0), aligned(sides.1))?;
    let (width, height) = fitted((picture.width(), picture.height()), canvas);
    let fitted = resize(&to_rgb(&picture).into(), width, height, Filter::Lanczos).into_rgb8();
    let at = (i64::from((canvas.0 - width) / 2), i64::from((canvas.1 - height) / 2));
    on_canvas(&fitted, canvas, at, arguments.overlap)
}

/// The largest size of a picture's aspect that fits into `canvas`, in whole pixels.
fn fitted(picture: (u32, u32), canvas: (u32, u32)) -> (u32, u32) {
    let (width, height) = (u64::from(picture.0), u64::from(picture.1));
    let (canvas_width, canvas_height) = (u64::from(canvas.0), u64::from(canvas.1));
    let (fit_width, fit_height) = if width * canvas_height > height * canvas_width {
        (canvas_width, canvas_width * height / width)
    } else {
        (canvas_height * width / height, canvas_height)
    };
    (fit_width.max(1) as u32, fit_height.max(1) as u32)
}

/// `picture` pasted on a black canvas, and its mask. What does not fit on the canvas is cut off.
fn on_canvas(picture: &RgbImage, canvas: (u32, u32), at: (i64, i64), overlap: f64) -> Result<TaskOutput, TaskError> {
    if !(0.0..=0.5).contains(&overlap) {
        return Err(argument_error("overlap", format!("expected a number from 0 to 0.5, found `{overlap}`")));
    }
    let mut bordered = RgbImage::new(canvas.0, canvas.1);
    imageops::replace(&mut bordered, picture, at.0, at.1);
    let kept = |start: i64, side: u32| {
        let inset = (f64::from(side) * overlap) as i64;
        start + inset..start + i64::from(side) - inset
    };
    let (columns, rows) = (kept(at.0, picture.width()), kept(at.1, picture.height()));
    let mask = GrayImage::from_fn(canvas.0, canvas.1, |x, y| {
        Luma([if columns.contains(&i64::from(x)) && rows.contains(&i64::from(y)) { 0 } else { 255 }])
    });
    Ok(TaskOutput::One(Artifact::Map(vec![
        ("bordered_image".to_owned(), Artifact::image(bordered.into())),
        ("mask".to_owned(), Artifact::image(mask.into())),
    ])))
}

#[cfg(test)]
mod tests {
    use dw_core::artifact::Artifact;
    use image::{DynamicImage, GrayImage, RgbImage};
    use serde_json::{Value, json};

    use crate::{
        TaskOutput,
        testing::{and, call, picture_of, with_picture},
    };

    /// What a command makes of a red picture: the bordered picture and the mask.
    fn bordered(command: &str, size: (u32, u32), more: Value) -> (RgbImage, GrayImage) {
        let red = RgbImage::from_pixel(size.0, size.1, image::Rgb([255, 0, 0]));
        match call(command, &and(with_picture(red.into()), more)).expect("a pair of pictures") {
            TaskOutput::One(Artifact::Map(pair)) => match &pair[..] {
                [(first, Artifact::Image(bordered)), (second, Artifact::Image(mask))] => {
                    assert_eq!((first.as_str(), second.as_str()), ("bordered_image", "mask"));
                    let DynamicImage::ImageLuma8(mask) = &**mask else { panic!("the mask is grey") };
                    (bordered.to_rgb8(), mask.clone())
                }
                other => panic!("{other:?}"),
            },
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_canvas_grows_by_each_zoom_and_is_rounded_to_32() {
        let cases = [
            (json!({}), (96, 96)),
            (json!({"zoom_left": 0.5}), (160, 96)),
            (json!({"zoom_right": 0.5}), (160, 96)),
            (json!({"zoom_up": 0.25, "zoom_down": 0.25}), (96, 160)),
            (json!({"zoom_all": 2}), (192, 192)),
        ];
        for (more, size) in cases {
            let (picture, mask) = bordered("add_border_and_mask", (100, 100), more.clone());
            assert_eq!((picture.dimensions(), mask.dimensions()), (size, size), "{more}");
        }
    }

    #[test]
    fn the_mask_is_white_on_the_border_and_black_on_the_picture() {
        let (picture, mask) = bordered("add_border_and_mask", (100, 100), json!({"zoom_left": 0.5}));
        assert_eq!((mask.get_pixel(49, 50)[0], mask.get_pixel(50, 50)[0]), (255, 0));
        assert_eq!((picture.get_pixel(49, 50).0, picture.get_pixel(50, 50).0), ([0; 3], [255, 0, 0]));
        let (_, mask) = bordered("add_border_and_mask", (100, 100), json!({"zoom_left": 0.5, "overlap": 0.1}));
        assert_eq!((mask.get_pixel(55, 50)[0], mask.get_pixel(60, 50)[0]), (255, 0));
    }

    #[test]
    fn zoom_all_pads_both_sides_by_half_and_overlap_shrinks_the_kept_part() {
        let (picture, mask) = bordered("add_border_and_mask", (1024, 768), json!({"zoom_all": 1.5, "overlap": 0.05}));
        assert_eq!(picture.dimensions(), (1536, 1152));
        assert_eq!((picture.get_pixel(255, 192)[0], picture.get_pixel(256, 192)[0]), (0, 255));
        let kept = mask.enumerate_pixels().filter(|(_, _, value)| value[0] == 0).map(|(x, y, _)| (x, y));
        let (first, last) = kept.fold(((u32::MAX, u32::MAX), (0, 0)), |(low, high), (x, y)| {
            ((low.0.min(x), low.1.min(y)), (high.0.max(x), high.1.max(y)))
        });
        assert_eq!((first, last), ((307, 230), (1228, 921)));
    }

    /// The box that the picture fills on the canvas: left, top, width, height.
    fn content(picture: &RgbImage) -> (u32, u32, u32, u32) {
        let filled = |x: u32, y: u32| picture.get_pixel(x, y)[0] > 0;
        let (middle_x, middle_y) = (picture.width() / 2, picture.height() / 2);
        let across = (0..picture.width()).filter(|&x| filled(x, middle_y));
        let down = (0..picture.height()).filter(|&y| filled(middle_x, y));
        let (left, top) = (across.clone().next().unwrap_or(0), down.clone().next().unwrap_or(0));
        (left, top, across.count() as u32, down.count() as u32)
    }

    #[test]
    fn a_picture_is_fitted_into_the_canvas_and_centred() {
        let cases = [
            ((200, 100), (512, 512), (512, 512), (0, 128, 512, 256)),
            ((100, 200), (500, 500), (512, 512), (128, 0, 256, 512)),
            ((400, 100), (256, 256), (256, 256), (0, 96, 256, 64)),
            ((1000, 750), (832, 480), (832, 480), (96, 0, 640, 480)),
        ];
        for (from, asked, canvas, filled) in cases {
            let more = json!({"width": asked.0, "height": asked.1});
            let (picture, mask) = bordered("add_border_and_mask_with_size", from, more);
            assert_eq!((picture.dimensions(), content(&picture)), (canvas, filled), "{from:?}");
            for (pixel, marked) in picture.pixels().zip(mask.pixels()) {
                assert_eq!(pixel[0] > 0, marked[0] == 0, "the mask marks the bars of {from:?}");
            }
        }
    }

    #[test]
    fn numbers_that_make_no_border_are_refused() {
        let cases = [
            ("add_border_and_mask", json!({"zoom_left": -1}), "argument `zoom_left`: "),
            ("add_border_and_mask", json!({"zoom_all": 1e9}), "argument `zoom_all`: "),
            ("add_border_and_mask", json!({"overlap": 0.6}), "argument `overlap`: "),
            ("add_border_and_mask_with_size", json!({"width": 0, "height": 8}), "argument `width`: "),
            ("add_border_and_mask_with_size", json!({"height": 8}), "argument `width`: "),
        ];
        for (command, more, start) in cases {
            let error = call(command, &and(picture_of(64, 64), more)).expect_err("no border").to_string();
            assert!(error.starts_with(start), "{command}: {error}");
        }
    }
}
