//! Commands that cut the middle out of a picture.

use dw_core::picture::{Filter, resize};
use image::DynamicImage;

use crate::{
    TaskError, TaskOutput,
    arguments::Call,
    picture::{Picture, one},
    resize::Size,
};

pub(crate) fn crop_square(arguments: Picture, call: &Call) -> Result<TaskOutput, TaskError> {
    let picture = arguments.of(call)?;
    let side = picture.width().min(picture.height());
    Ok(one(picture.crop_imm((picture.width() - side) / 2, (picture.height() - side) / 2, side, side)))
}

pub(crate) fn resize_center_crop(arguments: Size, call: &Call) -> Result<TaskOutput, TaskError> {
    let (width, height) = arguments.checked()?;
    let square = center_square(&*call.picture("image", arguments.image)?);
    Ok(one(resize(&square, width, height, Filter::Bicubic)))
}

/// The middle square. Its edges may fall on half pixels; they round half to even, as Pillow's `crop`
/// rounds, and the cut is then a pixel off square.
fn center_square(picture: &DynamicImage) -> DynamicImage {
    let side = picture.width().min(picture.height());
    let edges = |length: u32| {
        let start = f64::from(length - side) / 2.0;
        let end = start + f64::from(side);
        (start.round_ties_even() as u32, end.round_ties_even() as u32)
    };
    let ((left, right), (top, bottom)) = (edges(picture.width()), edges(picture.height()));
    picture.crop_imm(left, top, right - left, bottom - top)
}

#[cfg(test)]
mod tests {
    use image::{DynamicImage, GenericImageView};
    use serde_json::json;

    use super::center_square;
    use crate::testing::{and, call, picture, picture_of, with_picture};

    #[test]
    fn the_square_lies_in_the_middle_at_whole_pixels() {
        for (width, left) in [(640, 80), (641, 80)] {
            let square = picture(call("crop_square", &picture_of(width, 480)).expect("a picture"));
            assert_eq!(square.dimensions(), (480, 480));
            assert_eq!(square.get_pixel(0, 7).0[..3], [left, 7, 200], "the pixel tells where it was");
        }
    }

    #[test]
    fn a_center_crop_is_resized_and_keeps_its_mode() {
        let arguments = and(with_picture(DynamicImage::new_luma8(640, 480)), json!({"height": 512, "width": 300}));
        let cropped = picture(call("resize_center_crop", &arguments).expect("a picture"));
        assert_eq!((cropped.dimensions(), cropped.color()), ((300, 512), image::ColorType::L8));
    }

    #[test]
    fn half_pixels_round_to_even() {
        assert_eq!(center_square(&DynamicImage::new_luma8(483, 480)).dimensions(), (480, 480));
        assert_eq!(center_square(&DynamicImage::new_luma8(4, 3)).dimensions(), (4, 3));
        let ramp = image::GrayImage::from_fn(483, 480, |x, _| image::Luma([x as u8]));
        assert_eq!(center_square(&ramp.into()).get_pixel(0, 0).0[0], 2, "1.5 rounds to 2");
    }
}
