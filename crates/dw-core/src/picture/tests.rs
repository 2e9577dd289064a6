//! Against Pillow's own results (`tests/parity/imageops`), and pictures of every kind and defect.

use std::{io::Cursor, path::PathBuf};

use image::{DynamicImage, ImageFormat};
use safetensors::SafeTensors;

use super::*;

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity/imageops").join(name)
}

fn filter(name: &str) -> Option<Filter> {
    Some(match name {
        "nearest" => Filter::Nearest,
        "box" => Filter::Box,
        "bilinear" => Filter::Bilinear,
        "bicubic" => Filter::Bicubic,
        "lanczos" => Filter::Lanczos,
        _ => return None,
    })
}

/// The picture that the fixtures of a name start from.
fn input(name: &str, expected: &SafeTensors) -> DynamicImage {
    match name {
        "grey" => to_luma(&load(&fixture("photo_75x53.png")).expect("a picture")).into(),
        "alpha" => {
            let tensor = expected.tensor("alpha").expect("the input is stored");
            let (height, width) = (tensor.shape()[0] as u32, tensor.shape()[1] as u32);
            image::RgbaImage::from_raw(width, height, tensor.data().to_vec()).expect("four channels").into()
        }
        name => to_rgb(&load(&fixture(&format!("{name}.png"))).expect("a picture")).into(),
    }
}

#[test]
fn resizing_gives_pillows_bytes_for_every_filter_and_mode() {
    let bytes = std::fs::read(fixture("expected.safetensors")).expect("the fixture is in the repository");
    let expected = SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let mut compared = 0;
    for name in expected.names() {
        let parts: Vec<&str> = name.split('.').collect();
        let [source, _, kind] = parts[..] else { continue };
        let Some(filter) = filter(kind) else { continue };
        let want = expected.tensor(name).expect("listed");
        let (height, width) = (want.shape()[0] as u32, want.shape()[1] as u32);
        let got = resize(&input(source, &expected), width, height, filter);
        assert_eq!((got.width(), got.height()), (width, height), "{name}");
        let differing = got.as_bytes().iter().zip(want.data()).filter(|(a, b)| a != b).count();
        assert!(got.as_bytes().len() == want.data().len() && differing == 0, "{name}: {differing} bytes differ");
        compared += 1;
    }
    assert_eq!(compared, 85);
}

#[test]
fn grey_is_pillows_grey() {
    let bytes = std::fs::read(fixture("expected.safetensors")).expect("the fixture is in the repository");
    let expected = SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let grey = input("grey", &expected);
    assert_eq!(grey.as_bytes(), expected.tensor("grey.luma").expect("stored").data());
}

#[test]
fn a_picture_of_the_asked_size_comes_back_unchanged() {
    let picture: DynamicImage = image::RgbaImage::from_fn(5, 4, |x, y| image::Rgba([200, 10, x as u8, y as u8])).into();
    assert_eq!(resize(&picture, 5, 4, Filter::Lanczos), picture);
}

#[test]
fn sides_of_no_length_are_no_trouble() {
    for (from, to) in [((0, 5), (4, 4)), ((0, 0), (3, 2)), ((4, 4), (0, 7)), ((4, 4), (0, 0))] {
        for filter in [Filter::Nearest, Filter::Lanczos] {
            let resized = resize(&DynamicImage::new_rgba8(from.0, from.1), to.0, to.1, filter);
            assert_eq!((resized.width(), resized.height()), to);
        }
    }
}

#[test]
fn unit_floats_are_clipped_and_rounded_half_to_even() {
    let cases = [(0.5, 128), (-1.0, 0), (2.0, 255), (1.0, 255), (0.5 / 255.0, 0), (2.5 / 255.0, 2), (f32::NAN, 0)];
    for (value, byte) in cases {
        assert_eq!(unit_to_byte(value), byte, "{value}");
    }
    let picture = from_unit_floats(1, 1, 3, &[0.0, 0.5, 1.0]).expect("three values for one pixel");
    assert_eq!(picture.as_bytes(), [0, 128, 255]);
}

#[test]
fn unit_floats_of_another_length_or_channel_count_give_no_picture() {
    assert!(from_unit_floats(2, 1, 3, &[0.0; 3]).is_none());
    assert!(from_unit_floats(1, 1, 2, &[0.0; 2]).is_none());
}

#[test]
fn alpha_is_dropped_not_blended() {
    let picture: DynamicImage = image::RgbaImage::from_pixel(1, 1, image::Rgba([10, 20, 30, 0])).into();
    assert_eq!(to_rgb(&picture).as_raw(), &[10, 20, 30]);
    let grey: DynamicImage = image::GrayAlphaImage::from_pixel(1, 1, image::LumaA([77, 0])).into();
    assert_eq!(to_luma(&grey).as_raw(), &[77]);
}

fn encoded(picture: &DynamicImage, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    picture.write_to(&mut bytes, format).expect("this kind of picture can be written");
    bytes.into_inner()
}

#[test]
fn grey_rgb_and_rgba_keep_their_mode_and_others_become_one_of_them() {
    let cases: [(DynamicImage, image::ColorType); 6] = [
        (DynamicImage::new_luma8(3, 2), image::ColorType::L8),
        (DynamicImage::new_rgb8(3, 2), image::ColorType::Rgb8),
        (DynamicImage::new_rgba8(3, 2), image::ColorType::Rgba8),
        (DynamicImage::new_luma_a8(3, 2), image::ColorType::Rgba8),
        (DynamicImage::new_luma16(3, 2), image::ColorType::L8),
        (DynamicImage::new_rgb16(3, 2), image::ColorType::Rgb8),
    ];
    for (picture, colour) in cases {
        let read = decode(&encoded(&picture, ImageFormat::Png), "a.png").expect("a picture");
        assert_eq!(read.color(), colour, "{:?}", picture.color());
    }
}

#[test]
fn sixteen_bits_keep_their_high_byte() {
    let deep: DynamicImage =
        image::ImageBuffer::<image::Luma<u16>, Vec<u16>>::from_raw(2, 1, vec![0x12ff, 0xff00]).expect("two").into();
    assert_eq!(decode(&encoded(&deep, ImageFormat::Png), "a.png").expect("a picture").as_bytes(), [0x12, 0xff]);
}

#[test]
fn every_format_of_the_format_list_is_read_from_its_content() {
    let picture = DynamicImage::new_rgb8(8, 8);
    for format in [ImageFormat::Png, ImageFormat::Jpeg, ImageFormat::WebP, ImageFormat::Gif, ImageFormat::Bmp] {
        let read = decode(&encoded(&picture, format), "picture.txt").expect("a picture");
        assert_eq!((read.width(), read.height(), read.color()), (8, 8, image::ColorType::Rgb8), "{format:?}");
    }
}

/// A JPEG whose EXIF says that the camera was turned: 2 wide and 1 high as stored.
fn turned_jpeg() -> Vec<u8> {
    let mut picture = image::RgbImage::new(16, 8);
    picture.enumerate_pixels_mut().for_each(|(x, _, pixel)| pixel.0 = if x < 8 { [255, 0, 0] } else { [0, 0, 255] });
    let plain = encoded(&picture.into(), ImageFormat::Jpeg);
    let mut exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0".to_vec();
    let length = (exif.len() as u16 + 2).to_be_bytes();
    let mut bytes = vec![0xff, 0xd8, 0xff, 0xe1, length[0], length[1]];
    bytes.append(&mut exif);
    bytes.extend_from_slice(&plain[2..]);
    bytes
}

#[test]
fn a_picture_with_an_orientation_tag_is_turned_upright() {
    let picture = decode(&turned_jpeg(), "turned.jpg").expect("a picture");
    assert_eq!((picture.width(), picture.height()), (8, 16));
    let top = to_rgb(&picture).get_pixel(4, 2).0;
    assert!(top[0] > 200 && top[2] < 50, "the left half comes to the top, found {top:?}");
}

#[test]
fn of_a_moving_picture_the_first_frame_is_read() {
    let mut bytes = Vec::new();
    let mut encoder = image::codecs::gif::GifEncoder::new(&mut bytes);
    for shade in [255, 0] {
        let frame = image::RgbaImage::from_pixel(4, 4, image::Rgba([shade, shade, shade, 255]));
        encoder.encode_frame(image::Frame::new(frame)).expect("a frame can be written");
    }
    drop(encoder);
    assert_eq!(decode(&bytes, "a.gif").expect("a picture").as_bytes()[..3], [255, 255, 255]);
}

#[test]
fn bytes_that_are_no_picture_or_a_cut_one_are_refused_by_name() {
    let whole = encoded(&DynamicImage::new_rgb8(64, 64), ImageFormat::Png);
    for bytes in [&b"hello"[..], &[], &whole[..whole.len() / 2]] {
        let error = decode(bytes, "https://example.com/a.png").expect_err("no picture").to_string();
        assert!(error.starts_with("`https://example.com/a.png` cannot be decoded: "), "{error}");
    }
}

#[test]
fn a_missing_file_is_named() {
    let error = load(&fixture("absent.png")).expect_err("there is none").to_string();
    assert!(error.starts_with("cannot read the picture `") && error.contains("absent.png"), "{error}");
}

#[test]
fn a_picture_that_claims_an_enormous_size_is_refused_before_memory_is_taken() {
    for (width, height) in [(30_000_u32, 1_u32), (1, 30_000), (16_000, 16_000)] {
        let mut header = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR".to_vec();
        header.extend(width.to_be_bytes());
        header.extend(height.to_be_bytes());
        header.extend([8, 6, 0, 0, 0]);
        let mut crc = !0_u32;
        for byte in &header[12..] {
            crc ^= u32::from(*byte);
            (0..8).for_each(|_| crc = if crc & 1 == 1 { (crc >> 1) ^ 0xedb8_8320 } else { crc >> 1 });
        }
        header.extend((!crc).to_be_bytes());
        header.extend(b"\0\0\0\0IDAT\x35\xaf\x06\x1e");
        let error = decode(&header, "bomb.png").expect_err("too large");
        assert!(matches!(error, PictureError::TooLarge { .. }), "{width}x{height}: {error}");
    }
}
