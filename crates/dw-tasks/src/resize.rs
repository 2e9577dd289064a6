//! Commands that change a picture's size: to a width and height, to a resolution, to an aspect ratio.
//! The arithmetic rounds half to even, the pixels are those of `dw_core::picture`.

use dw_core::{
    arguments::ArtifactRef,
    picture::{Filter, resize, to_rgb},
};
use image::{DynamicImage, GenericImageView};
use schemars::JsonSchema;
use serde::Deserialize;

use crate::{
    TaskError, TaskOutput,
    arguments::{Call, argument_error},
    picture::{check_size, one},
};

/// Arguments of commands that resize to a width and height.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Size {
    /// The picture.
    pub(crate) image: ArtifactRef,
    /// Height of the result in pixels.
    #[serde(default = "side")]
    pub(crate) height: u32,
    /// Width of the result in pixels.
    #[serde(default = "side")]
    pub(crate) width: u32,
    /// Accepted and ignored: pictures are worked on by the CPU.
    #[serde(default, rename = "device")]
    _device: Option<String>,
}

impl Size {
    /// Width and height, when a picture of that size can be made.
    pub(crate) fn checked(&self) -> Result<(u32, u32), TaskError> {
        let argument = if self.height == 0 { "height" } else { "width" };
        check_size(argument, f64::from(self.width), f64::from(self.height))
    }
}

fn side() -> u32 {
    768
}

pub(crate) fn resize_rescale(arguments: Size, call: &Call) -> Result<TaskOutput, TaskError> {
    let (width, height) = arguments.checked()?;
    let picture = to_rgb(&*call.picture("image", arguments.image)?);
    Ok(one(resize(&picture.into(), width, height, Filter::Bicubic)))
}

/// Arguments of `resize_resample`.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Resample {
    /// The picture.
    image: ArtifactRef,
    /// Length of the short side in pixels, before rounding to a multiple of 64.
    #[serde(default = "resolution")]
    resolution: u32,
    /// Accepted and ignored: pictures are worked on by the CPU.
    #[serde(default, rename = "device")]
    _device: Option<String>,
}

fn resolution() -> u32 {
    1024
}

pub(crate) fn resize_resample(arguments: Resample, call: &Call) -> Result<TaskOutput, TaskError> {
    let picture = call.picture("image", arguments.image)?;
    Ok(one(resample(&picture, arguments.resolution, "resolution")?))
}

/// `picture` in RGB with its short side `resolution` pixels, each side rounded to a multiple of 64.
/// `argument` is named when that makes no picture.
pub(crate) fn resample(picture: &DynamicImage, resolution: u32, argument: &str) -> Result<DynamicImage, TaskError> {
    let (width, height) = resampled(picture.dimensions(), resolution);
    let (width, height) = check_size(argument, width, height)?;
    Ok(resize(&to_rgb(picture).into(), width, height, Filter::Lanczos))
}

fn resampled((width, height): (u32, u32), resolution: u32) -> (f64, f64) {
    let scale = f64::from(resolution) / f64::from(width.min(height));
    (multiple_of(64, f64::from(width) * scale), multiple_of(64, f64::from(height) * scale))
}

/// The multiple of `step` nearest to `length`; of two as near, the even one.
pub(crate) fn multiple_of(step: u32, length: f64) -> f64 {
    (length / f64::from(step)).round_ties_even() * f64::from(step)
}

/// The usual aspect ratios, width to height. Of two as near, the first is taken.
const RATIOS: [[f64; 2]; 9] =
    [[1.0, 1.0], [4.0, 3.0], [3.0, 4.0], [3.0, 2.0], [2.0, 3.0], [16.0, 9.0], [9.0, 16.0], [21.0, 9.0], [9.0, 21.0]];

/// Arguments of `resize_bucket`.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Bucket {
    /// The picture.
    image: ArtifactRef,
    /// Length of the short side in pixels, before rounding to a multiple of `alignment`.
    #[serde(default = "resolution")]
    resolution: u32,
    /// Aspect ratios to choose from, as `[width, height]` pairs; without them 1:1, 4:3, 3:4, 3:2, 2:3,
    /// 16:9, 9:16, 21:9 and 9:21.
    #[serde(default)]
    ratios: Option<Vec<[f64; 2]>>,
    /// What both sides are multiples of.
    #[serde(default = "alignment")]
    alignment: u32,
    /// Accepted and ignored: pictures are worked on by the CPU.
    #[serde(default, rename = "device")]
    _device: Option<String>,
}

fn alignment() -> u32 {
    64
}

pub(crate) fn resize_bucket(arguments: Bucket, call: &Call) -> Result<TaskOutput, TaskError> {
    if arguments.alignment == 0 {
        return Err(argument_error("alignment", "it must be 1 or more"));
    }
    let ratios = arguments.ratios.as_deref().unwrap_or(&RATIOS);
    if ratios.is_empty() || ratios.iter().flatten().any(|side| !side.is_finite() || *side <= 0.0) {
        return Err(argument_error("ratios", "it must hold pairs of numbers greater than 0, at least one"));
    }
    let picture = call.picture("image", arguments.image)?;
    let (width, height) = bucket(picture.dimensions(), arguments.resolution, ratios, arguments.alignment);
    let (width, height) = check_size("resolution", width, height)?;
    Ok(one(resize(&to_rgb(&picture).into(), width, height, Filter::Lanczos)))
}

/// The size of the bucket for a picture of `width` x `height`.
fn bucket((width, height): (u32, u32), resolution: u32, ratios: &[[f64; 2]], alignment: u32) -> (f64, f64) {
    let own = f64::from(width) / f64::from(height);
    let distance = |ratio: &f64| (ratio - own).abs();
    let ratios = ratios.iter().map(|[width, height]| width / height);
    let ratio = ratios.min_by(|a, b| distance(a).total_cmp(&distance(b))).unwrap_or(1.0);
    let short = multiple_of(alignment, f64::from(resolution));
    let long = multiple_of(alignment, short * ratio.max(1.0 / ratio));
    if ratio >= 1.0 { (long, short) } else { (short, long) }
}

#[cfg(test)]
mod tests {
    use image::{DynamicImage, GenericImageView};
    use serde_json::{Value, json};

    use super::{RATIOS, bucket, resampled};
    use crate::testing::{and, call, picture, picture_of, with_picture};

    /// The size that a command gives a picture of a size.
    fn size(command: &str, from: (u32, u32), more: Value) -> (u32, u32) {
        let arguments = and(with_picture(DynamicImage::new_rgba8(from.0, from.1)), more);
        let picture = picture(call(command, &arguments).expect("a picture"));
        assert_eq!(picture.color(), image::ColorType::Rgb8);
        picture.dimensions()
    }

    #[test]
    fn a_bucket_is_the_nearest_ratio_at_the_resolution() {
        let cases = [
            ((1600, 900), 1024, (1792.0, 1024.0)),
            ((1600, 900), 768, (1344.0, 768.0)),
            ((1600, 900), 512, (896.0, 512.0)),
            ((800, 600), 1024, (1344.0, 1024.0)),
            ((800, 600), 768, (1024.0, 768.0)),
            ((800, 600), 512, (704.0, 512.0)),
            ((600, 800), 1024, (1024.0, 1344.0)),
            ((1200, 800), 1024, (1536.0, 1024.0)),
            ((900, 1600), 1024, (1024.0, 1792.0)),
            ((2100, 900), 1024, (2368.0, 1024.0)),
            ((2100, 900), 512, (1216.0, 512.0)),
            ((2100, 900), 768, (1792.0, 768.0)),
            ((900, 2100), 1024, (1024.0, 2368.0)),
            ((1000, 900), 1024, (1024.0, 1024.0)),
            ((1280, 1024), 1024, (1344.0, 1024.0)),
            ((1234, 777), 1024, (1536.0, 1024.0)),
            ((3000, 1000), 1024, (2368.0, 1024.0)),
            ((500, 500), 160, (128.0, 128.0)),
            ((500, 500), 96, (128.0, 128.0)),
            ((500, 500), 1000, (1024.0, 1024.0)),
        ];
        for (from, resolution, to) in cases {
            assert_eq!(bucket(from, resolution, &RATIOS, 64), to, "{from:?} @{resolution}");
        }
    }

    #[test]
    fn a_bucket_follows_alignment_and_ratios_of_ones_own() {
        assert_eq!(bucket((800, 600), 512, &RATIOS, 32), (672.0, 512.0));
        assert_eq!(bucket((1800, 900), 1024, &[[1.0, 1.0], [2.0, 1.0]], 64), (2048.0, 1024.0));
        let more = json!({"resolution": 64, "alignment": 8, "ratios": [[1, 1], [2, 1]]});
        assert_eq!(size("resize_bucket", (180, 90), more), (128, 64));
        assert_eq!(size("resize_bucket", (160, 90), json!({"resolution": 64, "ratios": null})), (128, 64));
    }

    #[test]
    fn resampling_scales_the_short_side_and_rounds_both_to_64() {
        let cases = [
            ((640, 480), 1024, (1344.0, 1024.0)),
            ((640, 480), 512, (704.0, 512.0)),
            ((100, 50), 1024, (2048.0, 1024.0)),
            ((1920, 1080), 768, (1344.0, 768.0)),
        ];
        for (from, resolution, to) in cases {
            assert_eq!(resampled(from, resolution), to, "{from:?}");
        }
    }

    #[test]
    fn a_resampled_picture_has_that_size() {
        assert_eq!(size("resize_resample", (64, 48), json!({"resolution": 128})), (192, 128));
    }

    #[test]
    fn rescaling_takes_any_width_and_height() {
        assert_eq!(size("resize_rescale", (640, 480), json!({"height": 64, "width": 32})), (32, 64));
        assert_eq!(size("resize_rescale", (10, 20), json!({"device": "cuda"})), (768, 768));
    }

    #[test]
    fn a_size_that_is_no_picture_is_refused_with_the_argument() {
        let cases = [
            ("resize_rescale", json!({"width": 0}), "argument `width`: "),
            ("resize_rescale", json!({"height": 0}), "argument `height`: "),
            ("resize_rescale", json!({"width": 4_000_000}), "argument `width`: "),
            ("resize_resample", json!({"resolution": 31}), "argument `resolution`: "),
            ("resize_bucket", json!({"resolution": 4_000_000}), "argument `resolution`: "),
            ("resize_bucket", json!({"alignment": 0}), "argument `alignment`: "),
            ("resize_bucket", json!({"ratios": []}), "argument `ratios`: "),
            ("resize_bucket", json!({"ratios": [[0, 1]]}), "argument `ratios`: "),
        ];
        for (command, more, start) in cases {
            let error = call(command, &and(picture_of(64, 64), more)).expect_err("no picture").to_string();
            assert!(error.starts_with(start), "{command}: {error}");
        }
    }
}
