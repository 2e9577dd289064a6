//! Brings pictures and masks to the size of a call, whole or one region of them, and pastes what was painted
//! there back into the whole picture (diffusers `VaeImageProcessor`).
//!
//! Which pictures a call takes, and what becomes of the tensors, belongs to the pipelines.

use candle_core::{Device, Tensor};
use dw_core::picture::{Filter, resize, to_luma, to_rgb};
use image::{DynamicImage, GrayImage, Rgb, RgbImage};

use super::text_to_image::refuse;
use crate::Result;

/// A part of a picture, in pixels; `right` and `bottom` are the first ones outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Region {
    left: i64,
    top: i64,
    right: i64,
    bottom: i64,
}

/// The size of a call, and which part of its pictures is shown at that size.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fit {
    pub(crate) height: usize,
    pub(crate) width: usize,
    /// The whole picture when none.
    pub(crate) region: Option<Region>,
}

impl Fit {
    /// Whole pictures at `(height, width)`.
    pub(crate) fn whole((height, width): (usize, usize)) -> Self {
        Self { height, width, region: None }
    }

    /// The picture in 0 to 1, `(1, 3, height, width)` in f32.
    pub(crate) fn unit(self, picture: &DynamicImage, device: &Device) -> Result<Tensor> {
        let values = self.picture(picture).into_raw().into_iter().map(|byte| f32::from(byte) / 255.0).collect();
        self.tensor(values, 3, device)
    }

    /// The picture in -1 to 1, `(1, 3, height, width)` in f32.
    pub(crate) fn signed(self, picture: &DynamicImage, device: &Device) -> Result<Tensor> {
        let values = self.picture(picture).into_raw();
        let values = values.into_iter().map(|byte| 2.0 * (f32::from(byte) / 255.0) - 1.0).collect();
        self.tensor(values, 3, device)
    }

    /// The mask, 1 where its grey is at least half and 0 elsewhere, `(1, 1, height, width)` in f32.
    pub(crate) fn mask(self, picture: &DynamicImage, device: &Device) -> Result<Tensor> {
        let grey = to_luma(&self.picture(picture).into());
        let values = grey.into_raw().into_iter().map(|byte| f32::from(u8::from(byte >= 128))).collect();
        self.tensor(values, 1, device)
    }

    fn tensor(self, values: Vec<f32>, channels: usize, device: &Device) -> Result<Tensor> {
        let values = Tensor::from_vec(values, (1, self.height, self.width, channels), &Device::Cpu)?;
        Ok(values.permute((0, 3, 1, 2))?.contiguous()?.to_device(device)?)
    }

    fn picture(self, picture: &DynamicImage) -> RgbImage {
        let (width, height) = (self.width as u32, self.height as u32);
        let picture = to_rgb(picture);
        match self.region {
            None => scaled(&picture, width, height),
            Some(region) => filled(&region.cut(&picture), width, height),
        }
    }
}

impl Region {
    /// The smallest part of `mask` that holds everything not black with `padding` pixels around it, made as wide
    /// for its height as `width` is for `height` where the picture has room. None for a black mask.
    pub(crate) fn around(mask: &DynamicImage, (height, width): (usize, usize), padding: usize) -> Option<Self> {
        let mask = to_luma(mask);
        let marked = || mask.enumerate_pixels().filter(|(_, _, pixel)| pixel.0[0] > 0).map(|(x, y, _)| (x, y));
        let (left, right) = (marked().map(|at| at.0).min()?, marked().map(|at| at.0).max()?);
        let (top, bottom) = (marked().map(|at| at.1).min()?, marked().map(|at| at.1).max()?);
        let (columns, rows, padding) = (i64::from(mask.width()), i64::from(mask.height()), padding as i64);
        let across = ((i64::from(left) - padding).max(0), (i64::from(right) + 1 + padding).min(columns));
        let down = ((i64::from(top) - padding).max(0), (i64::from(bottom) + 1 + padding).min(rows));
        let (wide, high) = ((across.1 - across.0) as f64, (down.1 - down.0) as f64);
        let ratio = width as f64 / height as f64;
        let (across, down) = if wide / high > ratio {
            (across, widened(down, (wide / ratio - high) as i64, rows))
        } else {
            (widened(across, (high * ratio - wide) as i64, columns), down)
        };
        Some(Self { left: across.0, top: down.0, right: across.1, bottom: down.1 })
    }

    fn cut(self, picture: &RgbImage) -> RgbImage {
        placed(picture, (self.right - self.left) as u32, (self.bottom - self.top) as u32, (-self.left, -self.top))
    }

    /// `painted` in the place of this region, and the rest black: `size` is width and height.
    fn put_back(self, painted: &RgbImage, (columns, rows): (u32, u32)) -> RgbImage {
        let (width, height) = ((self.right - self.left) as u32, (self.bottom - self.top) as u32);
        let (inner, outer) = (ratio(painted.width(), painted.height()), ratio(width, height));
        let across = if outer > inner { width } else { painted.width() * height / painted.height() };
        let down = if outer <= inner { height } else { painted.height() * width / painted.width() };
        let painted = scaled(painted, across, down);
        let painted = placed(&painted, width, height, centred((width, height), (across, down)));
        placed(&painted, columns, rows, (self.left, self.top))
    }
}

/// The span with `more` pixels, half on each side, moved and cut to lie within `limit`.
fn widened((start, end): (i64, i64), more: i64, limit: i64) -> (i64, i64) {
    let (mut start, mut end) = (start - more / 2, end + more - more / 2);
    if end >= limit {
        (start, end) = (start - (end - limit), limit);
    }
    if start < 0 {
        (start, end) = (0, end - start);
    }
    (start, end.min(limit))
}

fn ratio(width: u32, height: u32) -> f64 {
    f64::from(width) / f64::from(height)
}

/// Where the middle of something `inner` large lies in the middle of something `outer` large.
fn centred(outer: (u32, u32), inner: (u32, u32)) -> (i64, i64) {
    let start = |outer: u32, inner: u32| i64::from(outer / 2) - i64::from(inner / 2);
    (start(outer.0, inner.0), start(outer.1, inner.1))
}

fn scaled(picture: &RgbImage, width: u32, height: u32) -> RgbImage {
    resize(&picture.clone().into(), width, height, Filter::Lanczos).to_rgb8()
}

/// A black picture with `picture` at a place that may lie partly outside.
fn placed(picture: &RgbImage, width: u32, height: u32, (left, top): (i64, i64)) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| {
        let at = (u32::try_from(i64::from(x) - left), u32::try_from(i64::from(y) - top));
        let pixel = at.0.ok().zip(at.1.ok()).and_then(|(x, y)| picture.get_pixel_checked(x, y));
        pixel.copied().unwrap_or(Rgb([0; 3]))
    })
}

/// The picture at a size of another shape: as large as fits, in the middle, its outermost lines drawn on to the
/// edges.
fn filled(picture: &RgbImage, width: u32, height: u32) -> RgbImage {
    let (outer, inner) = (ratio(width, height), ratio(picture.width(), picture.height()));
    let across = if outer < inner { width } else { picture.width() * height / picture.height() }.max(1);
    let down = if outer >= inner { height } else { picture.height() * width / picture.width() }.max(1);
    let picture = scaled(picture, across, down);
    let (left, top) = centred((width, height), (across, down));
    let inside = |at: u32, start: i64, length: u32| i64::from(at) - start < i64::from(length) && i64::from(at) >= start;
    RgbImage::from_fn(width, height, |x, y| {
        let (column, row) = ((i64::from(x) - left) as u32, (i64::from(y) - top) as u32);
        let line = |before: bool, back: u32, lines: u32| if before { back } else { lines - 1 - back };
        match (inside(x, left, across), inside(y, top, down)) {
            (true, true) => *picture.get_pixel(column, row),
            // An odd line that is left over stays black.
            (true, false) if i64::from(y) < 2 * top + i64::from(down) => {
                continued(&picture, |back| (column, line(i64::from(y) < top, back, down)), down)
            }
            (false, true) if i64::from(x) < 2 * left + i64::from(across) => {
                continued(&picture, |back| (line(i64::from(x) < left, back, across), row), across)
            }
            _ => Rgb([0; 3]),
        }
    })
}

/// A pixel beyond the edge: `at` finds the pixels 0 and 1 lines inside it. The weights are those of Pillow's cubic
/// filter over an empty box at the edge.
fn continued(picture: &RgbImage, at: impl Fn(u32) -> (u32, u32), lines: u32) -> Rgb<u8> {
    let pixel = |back: u32| {
        let (x, y) = at(back.min(lines - 1));
        picture.get_pixel(x, y).0
    };
    let (first, second) = (pixel(0), pixel(1));
    Rgb(std::array::from_fn(|channel| {
        let sum = 9 * i32::from(first[channel]) - i32::from(second[channel]);
        ((sum + 4) >> 3).clamp(0, 255) as u8
    }))
}

/// What was painted (in `region`, or everywhere) inside `original`, as far as `mask` is white: Pillow's arithmetic.
pub(crate) fn overlay(
    painted: &DynamicImage,
    original: &DynamicImage,
    mask: &DynamicImage,
    region: Region,
) -> DynamicImage {
    let (original, mask): (RgbImage, GrayImage) = (to_rgb(original), to_luma(mask));
    let painted = region.put_back(&to_rgb(painted), original.dimensions());
    RgbImage::from_fn(original.width(), original.height(), |x, y| {
        let opacity = 255 - u32::from(mask.get_pixel(x, y).0[0]);
        let (kept, below) = (original.get_pixel(x, y).0, painted.get_pixel(x, y).0);
        Rgb(std::array::from_fn(|channel| over(kept[channel], opacity, below[channel])))
    })
    .into()
}

/// One sample of a picture of this opacity (0 to 255) over an opaque one: premultiplied and divided out again, then
/// composed with 7 more bits, as Pillow does it.
fn over(sample: u8, opacity: u32, below: u8) -> u8 {
    let product = u32::from(sample) * opacity + 128;
    let premultiplied = ((product >> 8) + product) >> 8;
    let sample = match opacity {
        0 => return below,
        255 => premultiplied,
        _ => (255 * premultiplied / opacity).min(255),
    };
    let sum = (sample * opacity + u32::from(below) * (255 - opacity) + 128) << 7;
    ((((sum >> 8) + sum) >> 8) >> 7) as u8
}

/// Height and width of a picture, cut down to multiples of `multiple`.
pub(crate) fn own_size(name: &str, picture: &DynamicImage, multiple: usize) -> Result<(usize, usize)> {
    let (width, height) = (picture.width() as usize, picture.height() as usize);
    if width < multiple || height < multiple {
        return Err(refuse(name, format!("is `{width} x {height}` pixels; use at least {multiple} x {multiple}")));
    }
    Ok((height / multiple * multiple, width / multiple * multiple))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mask(size: (u32, u32), across: std::ops::Range<u32>, down: std::ops::Range<u32>) -> DynamicImage {
        let grey = |x, y| image::Luma([if across.contains(&x) && down.contains(&y) { 200 } else { 0 }]);
        GrayImage::from_fn(size.0, size.1, grey).into()
    }

    #[test]
    fn a_region_holds_the_mask_with_padding_and_has_the_shape_of_the_call() {
        let region = |mask: &DynamicImage, size, padding| {
            Region::around(mask, size, padding).map(|region| (region.left, region.top, region.right, region.bottom))
        };
        let wide = mask((128, 128), 70..100, 20..40);
        assert_eq!(region(&wide, (64, 64), 5), Some((65, 10, 105, 50)));
        // At the edge it moves inside, and where there is no room it stays narrower.
        assert_eq!(region(&mask((128, 128), 120..128, 20..60), (64, 64), 0), Some((88, 20, 128, 60)));
        assert_eq!(region(&mask((40, 128), 10..20, 0..100), (64, 64), 0), Some((0, 0, 40, 100)));
        assert_eq!(region(&mask((40, 40), 0..0, 0..0), (64, 64), 9), None);
    }

    #[test]
    fn a_region_of_another_shape_is_centred_and_its_outermost_lines_go_on() {
        let picture = RgbImage::from_fn(4, 2, |x, y| Rgb([40 * x as u8, 100 + 40 * y as u8, 7]));
        let filled = filled(&picture, 4, 6);
        assert_eq!(filled.get_pixel(1, 2).0, [40, 100, 7]);
        // 9/8 of the outermost line less 1/8 of the next one.
        assert_eq!(filled.get_pixel(1, 0).0, [40, 95, 7]);
        assert_eq!(filled.get_pixel(1, 5).0, [40, 145, 7]);
    }

    #[test]
    fn masks_count_from_half_grey_on() {
        let greys = GrayImage::from_raw(3, 1, vec![127, 128, 255]).expect("three pixels");
        let fit = Fit { height: 1, width: 3, region: None };
        let mask = fit.mask(&greys.into(), &Device::Cpu).and_then(|mask| Ok(mask.flatten_all()?.to_vec1::<f32>()?));
        assert_eq!(mask.expect("three values"), [0.0, 1.0, 1.0]);
    }
}
