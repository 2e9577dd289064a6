//! Resizing, byte for byte as Pillow does it (`src/libImaging/Resample.c` and `Geometry.c`): two
//! passes of a separable filter with 22-bit fixed-point weights, widened when the picture shrinks.
//! Alpha is premultiplied for the passes and divided out again.

use std::f64::consts::PI;

use image::{DynamicImage, GrayAlphaImage, GrayImage, RgbImage, RgbaImage};

use super::eight_bit;

/// Fractional bits of a weight: 32, less 8 for the pixel, less 2 for the filter's overshoot and sign.
const PRECISION_BITS: u32 = 32 - 8 - 2;

/// A resampling filter, under the name Pillow has for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    /// The nearest pixel; no smoothing.
    Nearest,
    /// The mean of the pixels covered.
    Box,
    /// A triangle, two source pixels wide.
    Bilinear,
    /// A cubic with `a = -0.5`, four source pixels wide.
    Bicubic,
    /// A windowed sinc, six source pixels wide.
    Lanczos,
}

impl Filter {
    /// Half the filter's width in source pixels; none for the filter that takes single pixels.
    fn support(self) -> Option<f64> {
        match self {
            Self::Nearest => None,
            Self::Box => Some(0.5),
            Self::Bilinear => Some(1.0),
            Self::Bicubic => Some(2.0),
            Self::Lanczos => Some(3.0),
        }
    }

    fn weight(self, x: f64) -> f64 {
        match self {
            Self::Nearest | Self::Box => f64::from(u8::from(x > -0.5 && x <= 0.5)),
            Self::Bilinear => (1.0 - x.abs()).max(0.0),
            Self::Bicubic => cubic(x.abs()),
            Self::Lanczos if (-3.0..3.0).contains(&x) => sinc(x) * sinc(x / 3.0),
            Self::Lanczos => 0.0,
        }
    }
}

fn cubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

fn sinc(x: f64) -> f64 {
    if x == 0.0 { 1.0 } else { (x * PI).sin() / (x * PI) }
}

/// `picture` at `width` x `height` pixels, 8 bits a channel, grey or colour and alpha as it was.
/// A picture that has the size already comes back as it is; one without pixels becomes black.
pub fn resize(picture: &DynamicImage, width: u32, height: u32, filter: Filter) -> DynamicImage {
    let from = (picture.width() as usize, picture.height() as usize);
    let to = (width as usize, height as usize);
    let sample = |bytes: &[u8], channels| match filter.support() {
        _ if bytes.is_empty() => vec![0; to.0 * to.1 * channels],
        None => nearest(bytes, channels, from, to),
        Some(_) if channels % 2 == 0 => {
            divide_alpha(resample(&multiply_alpha(bytes, channels), channels, from, to, filter), channels)
        }
        Some(_) => resample(bytes, channels, from, to, filter),
    };
    let whole = "the passes give a byte for every sample";
    match picture {
        picture if from == to => eight_bit(picture.clone()),
        DynamicImage::ImageLuma8(grey) => GrayImage::from_raw(width, height, sample(grey, 1)).expect(whole).into(),
        DynamicImage::ImageLumaA8(grey) => {
            GrayAlphaImage::from_raw(width, height, sample(grey, 2)).expect(whole).into()
        }
        DynamicImage::ImageRgb8(rgb) => RgbImage::from_raw(width, height, sample(rgb, 3)).expect(whole).into(),
        DynamicImage::ImageRgba8(rgba) => RgbaImage::from_raw(width, height, sample(rgba, 4)).expect(whole).into(),
        deep => resize(&eight_bit(deep.clone()), width, height, filter),
    }
}

/// The source pixels that make one output pixel: consecutive ones from `first`, weighted.
struct Taps {
    first: usize,
    weights: Vec<i32>,
}

impl Taps {
    fn end(&self) -> usize {
        self.first + self.weights.len()
    }
}

fn taps(from: usize, to: usize, filter: Filter) -> Vec<Taps> {
    let scale = from as f64 / to as f64;
    let stretch = scale.max(1.0);
    let support = filter.support().unwrap_or(0.5) * stretch;
    (0..to)
        .map(|output| {
            let center = (output as f64 + 0.5) * scale;
            let first = (center - support + 0.5).max(0.0) as usize;
            let end = ((center + support + 0.5) as usize).min(from);
            let weight = |source: usize| filter.weight((source as f64 - center + 0.5) * (1.0 / stretch));
            Taps { first, weights: fixed_point(&(first..end).map(weight).collect::<Vec<_>>()) }
        })
        .collect()
}

/// Weights that sum to one, with [`PRECISION_BITS`] fractional bits.
fn fixed_point(weights: &[f64]) -> Vec<i32> {
    let sum: f64 = weights.iter().sum();
    let scaled = weights.iter().map(|weight| if sum == 0.0 { *weight } else { weight / sum });
    scaled.map(|weight| (weight * f64::from(1 << PRECISION_BITS) + 0.5_f64.copysign(weight)) as i32).collect()
}

fn clip(sum: i32) -> u8 {
    (sum >> PRECISION_BITS).clamp(0, 255) as u8
}

const HALF: i32 = 1 << (PRECISION_BITS - 1);

fn resample(bytes: &[u8], channels: usize, from: (usize, usize), to: (usize, usize), filter: Filter) -> Vec<u8> {
    let horizontal = |bytes: Vec<u8>| match (from.0 == to.0, channels) {
        (true, _) => bytes,
        (_, 1) => across::<1>(&bytes, from.0, &taps(from.0, to.0, filter)),
        (_, 2) => across::<2>(&bytes, from.0, &taps(from.0, to.0, filter)),
        (_, 3) => across::<3>(&bytes, from.0, &taps(from.0, to.0, filter)),
        _ => across::<4>(&bytes, from.0, &taps(from.0, to.0, filter)),
    };
    let vertical = |bytes: Vec<u8>, width: usize| {
        if from.1 == to.1 { bytes } else { down(&bytes, width * channels, &taps(from.1, to.1, filter)) }
    };
    if vertical_first(from, to) {
        horizontal(vertical(bytes.to_vec(), from.0))
    } else {
        vertical(horizontal(bytes.to_vec()), to.0)
    }
}

/// Each pass rounds to bytes, so their order shows. Pillow 13 begins with the rows where that removes
/// more than twice as many rows as the other pass removes columns; older versions never do.
fn vertical_first(from: (usize, usize), to: (usize, usize)) -> bool {
    to.1 < from.1 && (from.1 - to.1) as i64 > 2 * (from.0 as i64 - to.0 as i64)
}

/// The horizontal pass over rows of `width` pixels of `C` channels.
fn across<const C: usize>(bytes: &[u8], width: usize, taps: &[Taps]) -> Vec<u8> {
    let mut output = Vec::with_capacity(bytes.len() / width.max(1) * taps.len());
    for row in bytes.chunks_exact((width * C).max(1)) {
        let (pixels, _) = row.as_chunks::<C>();
        for taps in taps {
            let mut sums = [HALF; C];
            for (pixel, weight) in pixels[taps.first..taps.end()].iter().zip(&taps.weights) {
                for (sum, sample) in sums.iter_mut().zip(pixel) {
                    *sum += i32::from(*sample) * weight;
                }
            }
            output.extend(sums.map(clip));
        }
    }
    output
}

/// The vertical pass over rows of `stride` bytes.
fn down(bytes: &[u8], stride: usize, taps: &[Taps]) -> Vec<u8> {
    let mut output = Vec::with_capacity(stride * taps.len());
    let mut sums = vec![HALF; stride];
    for taps in taps {
        sums.fill(HALF);
        let rows = bytes[taps.first * stride..taps.end() * stride].chunks_exact(stride.max(1));
        for (row, weight) in rows.zip(&taps.weights) {
            for (sum, sample) in sums.iter_mut().zip(row) {
                *sum += i32::from(*sample) * weight;
            }
        }
        output.extend(sums.iter().map(|&sum| clip(sum)));
    }
    output
}

fn nearest(bytes: &[u8], channels: usize, from: (usize, usize), to: (usize, usize)) -> Vec<u8> {
    let (columns, rows) = (nearest_indices(from.0, to.0), nearest_indices(from.1, to.1));
    let mut output = Vec::with_capacity(to.0 * to.1 * channels);
    for row in rows {
        for column in &columns {
            let start = (row * from.0 + column) * channels;
            output.extend_from_slice(&bytes[start..start + channels]);
        }
    }
    output
}

/// The source index of each output index. The position is summed up step by step, as the reference
/// does: a product would round differently.
fn nearest_indices(from: usize, to: usize) -> Vec<usize> {
    let step = from as f64 / to as f64;
    let positions = std::iter::successors(Some(step * 0.5), |position| Some(position + step));
    positions.take(to).map(|position| (position as usize).min(from.saturating_sub(1))).collect()
}

fn multiply_alpha(bytes: &[u8], channels: usize) -> Vec<u8> {
    let mut output = bytes.to_vec();
    for pixel in output.chunks_exact_mut(channels) {
        if let [colour @ .., alpha] = pixel {
            for sample in colour {
                *sample = multiply_255(*sample, *alpha);
            }
        }
    }
    output
}

/// `a * b / 255`, rounded to nearest.
fn multiply_255(a: u8, b: u8) -> u8 {
    let product = u32::from(a) * u32::from(b) + 128;
    (((product >> 8) + product) >> 8) as u8
}

fn divide_alpha(mut bytes: Vec<u8>, channels: usize) -> Vec<u8> {
    for pixel in bytes.chunks_exact_mut(channels) {
        if let [colour @ .., alpha @ 1..=254] = pixel {
            let alpha = u32::from(*alpha);
            for sample in colour {
                *sample = (255 * u32::from(*sample) / alpha).min(255) as u8;
            }
        }
    }
    bytes
}
