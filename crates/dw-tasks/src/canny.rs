//! Canny edges as OpenCV's `Canny` computes them (`modules/imgproc/src/canny.cpp`): Sobel 3x3 with a
//! replicated border, L1 gradient, integer non-maximum suppression, hysteresis. Of several channels
//! the one with the strongest gradient counts, pixel by pixel.

use dw_core::{
    arguments::ArtifactRef,
    picture::{eight_bit, to_luma, to_rgb},
};
use image::{DynamicImage, GrayImage, RgbImage};
use schemars::JsonSchema;
use serde::Deserialize;

use crate::{
    TaskError, TaskOutput,
    arguments::{Call, argument_error},
    picture::one,
};

/// Arguments of `canny_cv`.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Thresholds {
    /// The picture.
    image: ArtifactRef,
    /// Gradients up to this are no edge.
    #[serde(default = "low_threshold")]
    low_threshold: f64,
    /// Gradients above this start an edge; those between the two continue one.
    #[serde(default = "high_threshold")]
    high_threshold: f64,
    /// Accepted and ignored: pictures are worked on by the CPU.
    #[serde(default, rename = "device")]
    _device: Option<String>,
}

fn low_threshold() -> f64 {
    100.0
}

fn high_threshold() -> f64 {
    200.0
}

pub(crate) fn canny_cv(arguments: Thresholds, call: &Call) -> Result<TaskOutput, TaskError> {
    let (low, high) = (arguments.low_threshold, arguments.high_threshold);
    for (name, threshold) in [("low_threshold", low), ("high_threshold", high)] {
        if !threshold.is_finite() || threshold < 0.0 {
            return Err(argument_error(name, format!("expected a number of 0 or more, found `{threshold}`")));
        }
    }
    let edges = canny(&*call.picture("image", arguments.image)?, low, high);
    let (width, height) = edges.dimensions();
    Ok(one(RgbImage::from_fn(width, height, |x, y| image::Rgb([edges.get_pixel(x, y)[0]; 3]))))
}

/// White edges on black. The thresholds are rounded down and put in order; alpha is not looked at.
pub(crate) fn canny(picture: &DynamicImage, low: f64, high: f64) -> GrayImage {
    let (low, high) = (low.min(high).floor() as i32, low.max(high).floor() as i32);
    let gradients = Gradients::of(picture);
    let mut edges = GrayImage::new(picture.width(), picture.height());
    let (mut weak, mut strong) = (edges.clone(), Vec::new());
    for y in 0..picture.height() {
        for x in 0..picture.width() {
            if !gradients.is_ridge(x.into(), y.into(), low) {
                continue;
            }
            weak.put_pixel(x, y, image::Luma([255]));
            if gradients.at(x.into(), y.into()).strength > high {
                strong.push((x, y));
            }
        }
    }
    follow(&mut edges, &weak, strong);
    edges
}

/// Marks the `strong` pixels and every weak one that touches a marked one, corners included.
fn follow(edges: &mut GrayImage, weak: &GrayImage, mut strong: Vec<(u32, u32)>) {
    while let Some((x, y)) = strong.pop() {
        if edges.get_pixel(x, y)[0] == 255 {
            continue;
        }
        edges.put_pixel(x, y, image::Luma([255]));
        for y in y.saturating_sub(1)..=(y + 1).min(weak.height() - 1) {
            for x in x.saturating_sub(1)..=(x + 1).min(weak.width() - 1) {
                if weak.get_pixel(x, y)[0] == 255 && edges.get_pixel(x, y)[0] == 0 {
                    strong.push((x, y));
                }
            }
        }
    }
}

/// A gradient: its two components and `|dx| + |dy|`.
#[derive(Clone, Copy, Default)]
struct Gradient {
    dx: i32,
    dy: i32,
    strength: i32,
}

/// The gradient of every pixel; none (0) outside the picture.
struct Gradients {
    width: i64,
    values: Vec<Gradient>,
}

impl Gradients {
    fn of(picture: &DynamicImage) -> Self {
        let (width, height) = (i64::from(picture.width()), i64::from(picture.height()));
        let (bytes, channels) = match eight_bit(picture.clone()) {
            grey @ (DynamicImage::ImageLuma8(_) | DynamicImage::ImageLumaA8(_)) => (to_luma(&grey).into_raw(), 1),
            colour => (to_rgb(&colour).into_raw(), 3),
        };
        let sample = |x: i64, y: i64, channel: usize| {
            let at = y.clamp(0, height - 1) * width + x.clamp(0, width - 1);
            i32::from(bytes[at as usize * channels + channel])
        };
        let places = (0..height).flat_map(|y| (0..width).map(move |x| (x, y)));
        let values = places
            .map(|(x, y)| {
                (0..channels)
                    .map(|channel| sobel(|dx, dy| sample(x + dx, y + dy, channel)))
                    .reduce(|best, next| if next.strength > best.strength { next } else { best })
                    .unwrap_or_default()
            })
            .collect();
        Self { width, values }
    }

    fn at(&self, x: i64, y: i64) -> Gradient {
        if x < 0 || x >= self.width || y < 0 {
            return Gradient::default();
        }
        self.values.get((y * self.width + x) as usize).copied().unwrap_or_default()
    }

    /// Whether the gradient is above `low` and a maximum across the edge, in the one of four directions
    /// that is nearest. Boundaries lie at tan 22.5° and tan 67.5°, in 15-bit fixed point.
    fn is_ridge(&self, x: i64, y: i64, low: i32) -> bool {
        const TAN_22: i64 = 13_573;
        let Gradient { dx, dy, strength } = self.at(x, y);
        if strength <= low {
            return false;
        }
        let neighbour = |dx, dy| self.at(x + dx, y + dy).strength;
        let (across, up) = (i64::from(dx.abs()), i64::from(dy.abs()) << 15);
        let flat = across * TAN_22;
        if up < flat {
            strength > neighbour(-1, 0) && strength >= neighbour(1, 0)
        } else if up > flat + (across << 16) {
            strength > neighbour(0, -1) && strength >= neighbour(0, 1)
        } else {
            let slope = if (dx ^ dy) < 0 { -1 } else { 1 };
            strength > neighbour(-slope, -1) && strength > neighbour(slope, 1)
        }
    }
}

/// The Sobel gradient of the 3x3 neighbourhood that `sample` reads by offset.
fn sobel(sample: impl Fn(i64, i64) -> i32) -> Gradient {
    let column = |x| sample(x, -1) + 2 * sample(x, 0) + sample(x, 1);
    let row = |y| sample(-1, y) + 2 * sample(0, y) + sample(1, y);
    let (dx, dy) = (column(1) - column(-1), row(1) - row(-1));
    Gradient { dx, dy, strength: dx.abs() + dy.abs() }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use image::DynamicImage;
    use safetensors::SafeTensors;
    use serde_json::json;

    use super::canny;
    use crate::testing::{and, call, picture, picture_of, with_picture};

    fn fixture(name: &str) -> PathBuf {
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity/imageops").join(name)
    }

    fn input(name: &str, expected: &SafeTensors) -> DynamicImage {
        let stored = |name: &str| expected.tensor(name).expect("the input is stored").data().to_vec();
        match name {
            "noise" => image::RgbImage::from_raw(61, 47, stored("noise")).expect("three channels").into(),
            "grey" => image::GrayImage::from_raw(75, 53, stored("grey.luma")).expect("one channel").into(),
            name => image::open(fixture(&format!("{name}.png"))).expect("a picture").to_rgb8().into(),
        }
    }

    #[test]
    fn edges_are_opencvs_edges() {
        let bytes = std::fs::read(fixture("expected.safetensors")).expect("the fixture is in the repository");
        let expected = SafeTensors::deserialize(&bytes).expect("a safetensors file");
        let mut compared = 0;
        for name in expected.names() {
            let Some((source, thresholds)) = name.split_once(".canny.") else { continue };
            let (low, high) = match thresholds {
                "50.5.400.25" => (50.5, 400.25),
                whole => {
                    let (low, high) = whole.split_once('.').expect("two numbers");
                    (low.parse().expect("a number"), high.parse().expect("a number"))
                }
            };
            let edges = canny(&input(source, &expected), low, high);
            let want = expected.tensor(name).expect("listed").data();
            let differing = edges.as_raw().iter().zip(want).filter(|(a, b)| a != b).count();
            assert!(edges.as_raw().len() == want.len() && differing == 0, "{name}: {differing} pixels differ");
            assert!(source != "noise" || want.contains(&255), "{name} proves nothing without an edge");
            compared += 1;
        }
        assert_eq!(compared, 20);
    }

    #[test]
    fn the_result_has_the_pictures_size_and_three_equal_channels() {
        let square = image::GrayAlphaImage::from_fn(40, 30, |x, _| image::LumaA([if x < 20 { 0 } else { 255 }, 9]));
        let edges = picture(call("canny_cv", &with_picture(square.into())).expect("a picture"));
        assert_eq!((edges.width(), edges.height(), edges.color()), (40, 30, image::ColorType::Rgb8));
        let edges = edges.to_rgb8();
        assert!(edges.pixels().all(|pixel| pixel[0] == pixel[1] && pixel[1] == pixel[2]));
        assert_eq!(edges.pixels().filter(|pixel| pixel[0] == 255).count(), 30, "one line from top to bottom");
    }

    #[test]
    fn a_negative_threshold_is_refused() {
        let error = call("canny_cv", &and(picture_of(8, 8), json!({"low_threshold": -1}))).expect_err("negative");
        assert!(error.to_string().starts_with("argument `low_threshold`: "), "{error}");
    }
}
