//! QR codes, as control pictures for diffusion: the strongest error correction, modules of 10 pixels,
//! a quiet zone of 4 modules, then resampled to the size asked for.

use image::{DynamicImage, RgbImage};
use qrcode::{Color, EcLevel, QrCode};
use schemars::JsonSchema;
use serde::Deserialize;

use crate::{
    TaskError, TaskOutput,
    arguments::{Call, argument_error},
    picture::one,
    resize::resample,
};

const MODULE: u32 = 10;
const QUIET_ZONE: u32 = 4;

/// Arguments of `qr_code`.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Message {
    /// The text that the code says.
    qr_code_contents: String,
    /// Height in pixels. The code is square: the larger of height and width counts, rounded to a multiple of 64.
    #[serde(default = "side")]
    height: u32,
    /// Width in pixels.
    #[serde(default = "side")]
    width: u32,
}

fn side() -> u32 {
    768
}

pub(crate) fn qr_code(arguments: Message, _: &Call) -> Result<TaskOutput, TaskError> {
    let contents = &arguments.qr_code_contents;
    let code = QrCode::with_error_correction_level(contents, EcLevel::H).map_err(|_| {
        let reason = format!("{} bytes are too many for a QR code; at most 1273 fit", contents.len());
        argument_error("qr_code_contents", reason)
    })?;
    let longer = if arguments.height > arguments.width { "height" } else { "width" };
    Ok(one(resample(&draw(&code), arguments.height.max(arguments.width), longer)?))
}

fn draw(code: &QrCode) -> DynamicImage {
    let modules = code.width() as u32;
    let side = (modules + 2 * QUIET_ZONE) * MODULE;
    let dark = |x: u32, y: u32| {
        let (column, row) = ((x / MODULE).checked_sub(QUIET_ZONE)?, (y / MODULE).checked_sub(QUIET_ZONE)?);
        (column < modules && row < modules).then(|| code[(column as usize, row as usize)] == Color::Dark)
    };
    let shade = |x, y| image::Rgb([if dark(x, y) == Some(true) { 0 } else { 255 }; 3]);
    RgbImage::from_fn(side, side, shade).into()
}

#[cfg(test)]
mod tests {
    use dw_core::arguments::Arguments;
    use image::GenericImageView;
    use serde_json::json;

    use super::{EcLevel, QrCode, draw};
    use crate::testing::{and, call, picture};

    #[test]
    fn the_code_is_square_with_the_larger_side_rounded_to_64() {
        let cases = [
            (json!({}), 768),
            (json!({"height": 1000, "width": 200}), 1024),
            (json!({"height": 300, "width": 200}), 320),
        ];
        for (more, side) in cases {
            let arguments = and(and(Arguments::default(), json!({"qr_code_contents": "https://example.com"})), more);
            let code = picture(call("qr_code", &arguments).expect("a picture"));
            assert_eq!((code.dimensions(), code.color()), ((side, side), image::ColorType::Rgb8));
        }
    }

    #[test]
    fn a_module_is_10_pixels_and_the_quiet_zone_4_modules() {
        let code = QrCode::with_error_correction_level("hello", EcLevel::H).expect("short");
        let drawn = draw(&code);
        assert_eq!(drawn.width(), (code.width() as u32 + 8) * 10);
        let dark = |x, y| drawn.get_pixel(x, y).0[0] == 0;
        assert!(
            !dark(39, 39) && dark(40, 40) && dark(109, 40) && !dark(110, 40),
            "the finder pattern is 7 modules wide"
        );
    }

    #[test]
    fn a_text_that_no_code_holds_is_refused() {
        let arguments = and(Arguments::default(), json!({"qr_code_contents": "x".repeat(1300)}));
        let error = call("qr_code", &arguments).expect_err("too long").to_string();
        assert_eq!(error, "argument `qr_code_contents`: 1300 bytes are too many for a QR code; at most 1273 fit");
    }
}
