//! Pictures as bytes: decoding them from files, the 8-bit modes a workflow works in, and resizing.
//!
//! Every conversion gives the bytes that Pillow gives, because the reference pipelines prepare their
//! pictures with it. Turning pictures into tensors belongs to `dw-pipelines`, writing them to files to
//! [`crate::output`].

mod resize;

use std::{
    io::{BufRead, BufReader, Cursor, Seek},
    path::Path,
};

use image::{
    DynamicImage, GrayImage, ImageBuffer, ImageDecoder, ImageError, ImageFormat, ImageReader, Limits, Pixel, RgbImage,
    metadata::Orientation,
};

pub use resize::{Filter, resize};

/// Longest side, in pixels, of a picture that is decoded.
pub const MAX_SIDE: u32 = 16_384;

/// Most bytes that one decoded picture may take.
pub const MAX_DECODED_BYTES: u64 = 512 << 20;

/// Why a picture could not be read. `name` is its path or URL.
#[derive(Debug, thiserror::Error)]
pub enum PictureError {
    /// The file could not be opened.
    #[error("cannot read the picture `{name}`: {source}")]
    Read {
        /// The path.
        name: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The bytes are no picture, or a damaged one.
    #[error("`{name}` cannot be decoded: {reason}; dw reads PNG, JPEG, WebP, GIF, BMP and TIFF")]
    Decode {
        /// The path or URL.
        name: String,
        /// What the decoder said.
        reason: String,
    },
    /// The picture is larger than dw decodes.
    #[error("`{name}` is too large: at most {MAX_SIDE} pixels a side and {} MiB decoded are allowed", MAX_DECODED_BYTES >> 20)]
    TooLarge {
        /// The path or URL.
        name: String,
    },
}

/// Reads the picture in a file: upright, 8 bits a channel, as grey, RGB or RGBA.
///
/// The format is told from the content, not from the name. Of a moving picture this is the first frame.
pub fn load(path: &Path) -> Result<DynamicImage, PictureError> {
    let name = path.display().to_string();
    match std::fs::File::open(path) {
        Ok(file) => read(BufReader::new(file), &name),
        Err(source) => Err(PictureError::Read { name, source }),
    }
}

/// Reads the picture in `bytes`, as [`load`] does; `name` says in messages where they came from.
pub fn decode(bytes: &[u8], name: &str) -> Result<DynamicImage, PictureError> {
    read(Cursor::new(bytes), name)
}

fn read(source: impl BufRead + Seek, name: &str) -> Result<DynamicImage, PictureError> {
    let failed = |error| decode_error(error, name);
    let mut reader = ImageReader::new(source)
        .with_guessed_format()
        .map_err(|source| PictureError::Read { name: name.to_owned(), source })?;
    let mut limits = Limits::default();
    limits.max_image_width = Some(MAX_SIDE);
    limits.max_image_height = Some(MAX_SIDE);
    limits.max_alloc = Some(MAX_DECODED_BYTES);
    reader.limits(limits);
    let format = reader.format();
    let mut decoder = reader.into_decoder().map_err(failed)?;
    if decoder.total_bytes() > MAX_DECODED_BYTES {
        return Err(PictureError::TooLarge { name: name.to_owned() });
    }
    // A damaged orientation tag is no reason to refuse the picture.
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let mut picture = DynamicImage::from_decoder(decoder).map_err(failed)?;
    picture.apply_orientation(orientation);
    Ok(working_mode(picture, format))
}

fn decode_error(error: ImageError, name: &str) -> PictureError {
    match error {
        ImageError::Limits(_) => PictureError::TooLarge { name: name.to_owned() },
        error => PictureError::Decode { name: name.to_owned(), reason: error.to_string() },
    }
}

/// Grey, RGB or RGBA with 8 bits a channel.
fn working_mode(picture: DynamicImage, format: Option<ImageFormat>) -> DynamicImage {
    match eight_bit(picture) {
        picture @ DynamicImage::ImageLumaA8(_) => picture.to_rgba8().into(),
        // The GIF decoder always gives an alpha channel; one without a transparent pixel says nothing.
        DynamicImage::ImageRgba8(picture)
            if format == Some(ImageFormat::Gif) && picture.pixels().all(|pixel| pixel[3] == 255) =>
        {
            to_rgb(&picture.into()).into()
        }
        picture => picture,
    }
}

/// The same picture with 8 bits a channel: the high byte of 16 bits, or `[0, 1]` scaled to bytes.
pub fn eight_bit(picture: DynamicImage) -> DynamicImage {
    match picture {
        DynamicImage::ImageLuma16(picture) => narrow::<_, image::Luma<u8>>(&picture, high_byte).into(),
        DynamicImage::ImageLumaA16(picture) => narrow::<_, image::LumaA<u8>>(&picture, high_byte).into(),
        DynamicImage::ImageRgb16(picture) => narrow::<_, image::Rgb<u8>>(&picture, high_byte).into(),
        DynamicImage::ImageRgba16(picture) => narrow::<_, image::Rgba<u8>>(&picture, high_byte).into(),
        DynamicImage::ImageRgb32F(picture) => narrow::<_, image::Rgb<u8>>(&picture, unit_to_byte).into(),
        DynamicImage::ImageRgba32F(picture) => narrow::<_, image::Rgba<u8>>(&picture, unit_to_byte).into(),
        picture => picture,
    }
}

fn high_byte(sample: u16) -> u8 {
    (sample >> 8) as u8
}

fn narrow<P, Q>(picture: &ImageBuffer<P, Vec<P::Subpixel>>, convert: fn(P::Subpixel) -> u8) -> ImageBuffer<Q, Vec<u8>>
where
    P: Pixel,
    Q: Pixel<Subpixel = u8>,
{
    let bytes = picture.as_raw().iter().map(|&sample| convert(sample)).collect();
    ImageBuffer::from_raw(picture.width(), picture.height(), bytes)
        .expect("both pixel types have the same number of channels")
}

/// The picture in RGB. An alpha channel is dropped, not blended, as Pillow's `convert("RGB")` does.
pub fn to_rgb(picture: &DynamicImage) -> RgbImage {
    match picture {
        DynamicImage::ImageLuma8(_)
        | DynamicImage::ImageLumaA8(_)
        | DynamicImage::ImageRgb8(_)
        | DynamicImage::ImageRgba8(_) => picture.to_rgb8(),
        deep => eight_bit(deep.clone()).to_rgb8(),
    }
}

/// The picture in grey: ITU-R 601-2 luma in 16-bit fixed point, as Pillow's `convert("L")` rounds it.
/// An alpha channel is dropped.
pub fn to_luma(picture: &DynamicImage) -> GrayImage {
    match picture {
        DynamicImage::ImageLuma8(grey) => grey.clone(),
        DynamicImage::ImageLumaA8(grey) => {
            ImageBuffer::from_fn(grey.width(), grey.height(), |x, y| image::Luma([grey.get_pixel(x, y)[0]]))
        }
        DynamicImage::ImageLuma16(_) | DynamicImage::ImageLumaA16(_) => to_luma(&eight_bit(picture.clone())),
        colour => {
            let rgb = to_rgb(colour);
            let luma = rgb.pixels().map(|pixel| luma(pixel.0)).collect();
            GrayImage::from_raw(rgb.width(), rgb.height(), luma).expect("one byte for each pixel")
        }
    }
}

fn luma([red, green, blue]: [u8; 3]) -> u8 {
    let weighted = u32::from(red) * 19_595 + u32::from(green) * 38_470 + u32::from(blue) * 7_471;
    ((weighted + 0x8000) >> 16) as u8
}

/// The byte for a value in `[0, 1]`: clipped, times 255, rounded half to even. NaN gives 0.
pub fn unit_to_byte(value: f32) -> u8 {
    (value.clamp(0.0, 1.0) * 255.0).round_ties_even() as u8
}

/// A picture from values in `[0, 1]`, rows of interleaved channels (height, width, channels) with 1, 3
/// or 4 channels; none when `values` has another length or channel count.
pub fn from_unit_floats(width: u32, height: u32, channels: usize, values: &[f32]) -> Option<DynamicImage> {
    let bytes: Vec<u8> = values.iter().map(|&value| unit_to_byte(value)).collect();
    if bytes.len() as u64 != u64::from(width) * u64::from(height) * channels as u64 {
        return None;
    }
    match channels {
        1 => GrayImage::from_raw(width, height, bytes).map(DynamicImage::from),
        3 => RgbImage::from_raw(width, height, bytes).map(DynamicImage::from),
        4 => image::RgbaImage::from_raw(width, height, bytes).map(DynamicImage::from),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
