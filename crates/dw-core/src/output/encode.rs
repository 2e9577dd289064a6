//! From an artifact to the bytes of a file of some content type. Names and folders are left to the
//! writer.

use std::io::Cursor;

use image::{
    ColorType, Delay, DynamicImage, Frame, ImageEncoder, ImageFormat, RgbImage,
    codecs::{
        gif::{GifEncoder, Repeat},
        jpeg::JpegEncoder,
        webp::WebPEncoder,
    },
};
use serde::Serialize;
use serde_json::{Value, json};

use crate::{
    artifact::{Array, Artifact, Entry},
    metadata::{Metadata, PNG_KEYWORD, exif, placeholder},
};

/// Pillow's quality for JPEG when none is asked for.
pub(super) const DEFAULT_JPEG_QUALITY: u8 = 75;
/// The most bytes of an EXIF block that a JPEG segment holds: 65535 less its length and its header.
const MAX_JPEG_EXIF: usize = 65_535 - 2 - 6;
/// The name of the one tensor in a safetensors file.
const TENSOR_NAME: &str = "latents";

/// The bytes of a file, and what the user should know about them.
pub(super) struct Encoded {
    pub(super) bytes: Vec<u8>,
    pub(super) warning: Option<String>,
}

impl From<Vec<u8>> for Encoded {
    fn from(bytes: Vec<u8>) -> Self {
        Self { bytes, warning: None }
    }
}

/// A picture format that can be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Picture {
    Png,
    Jpeg { quality: u8 },
    WebP,
    Bmp,
    Tiff,
}

/// Encodes one picture. The error is a sentence.
pub(super) fn picture(image: &DynamicImage, format: Picture, metadata: Option<&Metadata>) -> Result<Encoded, String> {
    match format {
        Picture::Png => png(image, metadata).map(Encoded::from).map_err(|error| error.to_string()),
        Picture::Jpeg { quality } => jpeg(image, quality, metadata),
        Picture::WebP => webp(image, metadata).map(Encoded::from),
        Picture::Bmp => simple(image, ImageFormat::Bmp).map(Encoded::from),
        Picture::Tiff => simple(image, ImageFormat::Tiff).map(Encoded::from),
    }
}

fn simple(image: &DynamicImage, format: ImageFormat) -> Result<Vec<u8>, String> {
    let mut bytes = Cursor::new(Vec::new());
    // Neither encoder knows grey with transparency: one drops the transparency, the other fails.
    let colored = match image {
        DynamicImage::ImageLumaA8(_) => Some(DynamicImage::from(image.to_rgba8())),
        DynamicImage::ImageLumaA16(_) => Some(DynamicImage::from(image.to_rgba16())),
        _ => None,
    };
    colored.as_ref().unwrap_or(image).write_to(&mut bytes, format).map_err(|error| error.to_string())?;
    Ok(bytes.into_inner())
}

fn png(image: &DynamicImage, metadata: Option<&Metadata>) -> Result<Vec<u8>, png::EncodingError> {
    let converted = png_compatible(image);
    let image = converted.as_ref().unwrap_or(image);
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, image.width(), image.height());
    let (color, depth) = png_layout(image.color());
    encoder.set_color(color);
    encoder.set_depth(depth);
    if let Some(metadata) = metadata {
        let text = metadata.to_text();
        // The other Latin-1 code points are control characters, which text chunks should not hold.
        if text.chars().all(|c| matches!(c, '\u{20}'..='\u{7e}' | '\u{a0}'..='\u{ff}')) {
            encoder.add_text_chunk(PNG_KEYWORD.into(), text)?;
        } else {
            encoder.add_itxt_chunk(PNG_KEYWORD.into(), text)?;
        }
    }
    let mut writer = encoder.write_header()?;
    if depth == png::BitDepth::Sixteen {
        writer.write_image_data(&big_endian(image.as_bytes()))?;
    } else {
        writer.write_image_data(image.as_bytes())?;
    }
    writer.finish()?;
    Ok(bytes)
}

/// The picture in a layout PNG has, when its own is not one: floating point becomes 8-bit.
fn png_compatible(image: &DynamicImage) -> Option<DynamicImage> {
    match image.color() {
        ColorType::Rgb32F => Some(image.to_rgb8().into()),
        ColorType::Rgba32F => Some(image.to_rgba8().into()),
        _ => None,
    }
}

fn png_layout(color: ColorType) -> (png::ColorType, png::BitDepth) {
    let kind = match (color.has_color(), color.has_alpha()) {
        (false, false) => png::ColorType::Grayscale,
        (false, true) => png::ColorType::GrayscaleAlpha,
        (true, false) => png::ColorType::Rgb,
        (true, true) => png::ColorType::Rgba,
    };
    let bytes_per_channel = color.bytes_per_pixel() / color.channel_count();
    (kind, if bytes_per_channel == 2 { png::BitDepth::Sixteen } else { png::BitDepth::Eight })
}

/// 16-bit samples in the byte order of PNG.
fn big_endian(samples: &[u8]) -> Vec<u8> {
    let (pairs, _) = samples.as_chunks::<2>();
    pairs.iter().flat_map(|pair| u16::from_ne_bytes(*pair).to_be_bytes()).collect()
}

fn jpeg(image: &DynamicImage, quality: u8, metadata: Option<&Metadata>) -> Result<Encoded, String> {
    let mut bytes = Vec::new();
    let mut encoder = JpegEncoder::new_with_quality(&mut bytes, quality);
    let mut warning = None;
    if let Some(metadata) = metadata {
        let (block, left_out) = jpeg_exif(metadata)?;
        warning = left_out.map(|what| format!("JPEG holds 64 KiB of metadata, so {what}; PNG has room for all of it"));
        if let Some(block) = block {
            encoder.set_exif_metadata(block).map_err(|error| error.to_string())?;
        }
    }
    let written = match image {
        DynamicImage::ImageLuma8(gray) => encoder.encode_image(gray),
        DynamicImage::ImageLuma16(_) => encoder.encode_image(&image.to_luma8()),
        _ => encoder.encode_image(&on_white(image)),
    };
    written.map_err(|error| error.to_string())?;
    Ok(Encoded { bytes, warning })
}

/// As much of the metadata as a JPEG segment holds, and what had to be left out.
fn jpeg_exif(metadata: &Metadata) -> Result<(Option<Vec<u8>>, Option<&'static str>), String> {
    let attempts = [
        (metadata.clone(), None),
        (metadata.without_document(), Some("the workflow was left out and `dw rerun` cannot use this picture")),
    ];
    for (metadata, left_out) in attempts {
        let block = exif::block(&metadata.to_text()).map_err(|error| error.to_string())?;
        if block.len() <= MAX_JPEG_EXIF {
            return Ok((Some(block), left_out));
        }
    }
    Ok((None, Some("it was left out")))
}

/// The picture as RGB, with what is transparent laid over white.
fn on_white(image: &DynamicImage) -> RgbImage {
    if !image.color().has_alpha() {
        return image.to_rgb8();
    }
    let source = image.to_rgba8();
    let mut flat = RgbImage::new(source.width(), source.height());
    for (to, from) in flat.pixels_mut().zip(source.pixels()) {
        let [red, green, blue, alpha] = from.0.map(u32::from);
        to.0 = [red, green, blue].map(|channel| ((channel * alpha + 255 * (255 - alpha) + 127) / 255) as u8);
    }
    flat
}

fn webp(image: &DynamicImage, metadata: Option<&Metadata>) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    let mut encoder = WebPEncoder::new_lossless(&mut bytes);
    if let Some(metadata) = metadata {
        let block = exif::block(&metadata.to_text()).map_err(|error| error.to_string())?;
        encoder.set_exif_metadata(block).map_err(|error| error.to_string())?;
    }
    image.write_with_encoder(encoder).map_err(|error| error.to_string())?;
    Ok(bytes)
}

/// Encodes frames as a GIF that repeats for ever; a single frame stands still.
pub(super) fn gif(frames: &[DynamicImage], fps: u32) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    {
        // 10 is the gif crate's own choice between the quality of the palette (1) and speed (30).
        let mut encoder = GifEncoder::new_with_speed(&mut bytes, 10);
        if frames.len() > 1 {
            encoder.set_repeat(Repeat::Infinite).map_err(|error| error.to_string())?;
        }
        let delay = Delay::from_numer_denom_ms((1000 / fps.max(1)).max(10), 1);
        for frame in frames {
            let frame = Frame::from_parts(frame.to_rgba8(), 0, 0, delay);
            encoder.encode_frame(frame).map_err(|error| error.to_string())?;
        }
    }
    Ok(bytes)
}

/// Encodes an array as a safetensors file with one f32 tensor, `latents`.
/// The layout is that of <https://github.com/huggingface/safetensors#format>.
pub(super) fn safetensors(array: &Array) -> Result<Vec<u8>, String> {
    if array.shape.iter().product::<usize>() != array.data.len() {
        return Err(format!("an array of shape {:?} cannot hold {} values", array.shape, array.data.len()));
    }
    let tensor = json!({"dtype": "F32", "shape": array.shape, "data_offsets": [0, array.data.len() * 4]});
    let mut header = json!({"__metadata__": {"format": "pt"}, TENSOR_NAME: tensor}).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut bytes = Vec::with_capacity(8 + header.len() + array.data.len() * 4);
    bytes.extend((header.len() as u64).to_le_bytes());
    bytes.extend(header);
    bytes.extend(array.data.iter().flat_map(|value| value.to_le_bytes()));
    Ok(bytes)
}

/// A whole entry as JSON text, indented by four spaces. One artifact stands for itself, several become
/// a list; what is not data becomes a short description.
pub(super) fn json(entry: &Entry) -> Vec<u8> {
    let value = match entry.artifacts.as_slice() {
        [artifact] => plain(artifact),
        artifacts => artifacts.iter().map(plain).collect(),
    };
    let mut bytes = Vec::new();
    let formatter = serde_json::ser::PrettyFormatter::with_indent(b"    ");
    let mut serializer = serde_json::Serializer::with_formatter(&mut bytes, formatter);
    value.serialize(&mut serializer).expect("a JSON value can always be written to memory");
    bytes
}

fn plain(artifact: &Artifact) -> Value {
    match artifact {
        Artifact::Json(value) => value.clone(),
        Artifact::Text(text) => Value::String(text.clone()),
        Artifact::Map(members) => members.iter().map(|(name, member)| (name.clone(), plain(member))).collect(),
        other => Value::String(placeholder(other)),
    }
}
