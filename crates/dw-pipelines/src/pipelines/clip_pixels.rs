//! Pictures as CLIP's image encoder takes them (transformers `CLIPImageProcessor`): resized, cropped,
//! normalised.

use candle_core::{Device, Tensor};
use dw_core::picture::{Filter, resize, to_rgb};
use image::{DynamicImage, RgbImage};
use serde_json::Value;

use crate::Result;

/// The mean of CLIP's training pictures, by channel.
const MEAN: [f32; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
/// Their standard deviation.
const DEVIATION: [f32; 3] = [0.268_629_54, 0.261_302_58, 0.275_777_11];

/// The numbers of a `preprocessor_config.json`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ClipPixels {
    /// What the shorter side is resized to; the encoder's size when none.
    shortest: Option<u32>,
    mean: [f32; 3],
    deviation: [f32; 3],
}

impl ClipPixels {
    /// Reads a `preprocessor_config.json`; what it leaves out is CLIP's own.
    pub(crate) fn new(config: Option<&Value>) -> Self {
        let three = |key: &str, default: [f32; 3]| {
            let list = config.and_then(|config| config.get(key)?.as_array());
            let numbers: Option<Vec<f32>> =
                list.and_then(|list| list.iter().map(|number| Some(number.as_f64()? as f32)).collect());
            numbers.and_then(|numbers| numbers.try_into().ok()).unwrap_or(default)
        };
        let size = config.and_then(|config| config.get("size"));
        let size = size.and_then(|size| size.as_u64().or_else(|| size.get("shortest_edge")?.as_u64()));
        Self {
            shortest: size.and_then(|size| u32::try_from(size).ok()),
            mean: three("image_mean", MEAN),
            deviation: three("image_std", DEVIATION),
        }
    }

    /// Reads the `preprocessor_config.json` of a SigLIP encoder; what it leaves out is SigLIP's own.
    pub(crate) fn of_siglip(config: Option<&Value>) -> Self {
        let own = serde_json::json!({ "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5] });
        Self::new(Some(config.filter(|config| config.get("image_mean").is_some()).unwrap_or(&own)))
    }

    /// A picture as `(1, 3, side, side)` in f32: all of it, whatever its shape was.
    pub(crate) fn stretched(&self, picture: &DynamicImage, side: usize, device: &Device) -> Result<Tensor> {
        let size = side as u32;
        let picture = resize(&to_rgb(picture).into(), size, size, Filter::Bicubic).to_rgb8();
        self.normalised(&picture, (0, 0), side, device)
    }

    /// A picture as `(1, 3, side, side)` in f32: its middle, `side` being what the encoder takes.
    pub(crate) fn prepare(&self, picture: &DynamicImage, side: usize, device: &Device) -> Result<Tensor> {
        let (width, height) = (picture.width().max(1), picture.height().max(1));
        let wanted = side as u32;
        // A processor made for another encoder would leave too little to crop.
        let shortest = self.shortest.unwrap_or(wanted).max(wanted);
        let longer = |long: u32, short: u32| (u64::from(shortest) * u64::from(long) / u64::from(short)) as u32;
        let (new_width, new_height) =
            if width <= height { (shortest, longer(height, width)) } else { (longer(width, height), shortest) };
        let picture = resize(&to_rgb(picture).into(), new_width, new_height, Filter::Bicubic).to_rgb8();
        self.normalised(&picture, ((new_width - wanted) / 2, (new_height - wanted) / 2), side, device)
    }

    /// A black picture as `(1, 3, side, side)` in f32.
    pub(crate) fn black(&self, side: usize, device: &Device) -> Result<Tensor> {
        let wanted = side as u32;
        self.normalised(&RgbImage::new(wanted, wanted), (0, 0), side, device)
    }

    /// The square of a picture whose left upper corner is named.
    fn normalised(&self, picture: &RgbImage, (left, top): (u32, u32), side: usize, device: &Device) -> Result<Tensor> {
        let wanted = side as u32;
        let mut values = Vec::with_capacity(3 * side * side);
        for channel in 0..3 {
            for y in top..top + wanted {
                for x in left..left + wanted {
                    let value = f32::from(picture.get_pixel(x, y).0[channel]) / 255.0;
                    values.push((value - self.mean[channel]) / self.deviation[channel]);
                }
            }
        }
        Ok(Tensor::from_vec(values, (1, 3, side, side), device)?)
    }
}

#[cfg(test)]
mod tests {
    use image::Rgb;
    use serde_json::json;

    use super::*;

    #[test]
    fn the_middle_of_a_picture_is_kept_and_normalised() {
        // Red on the left and right, white in the middle square.
        let picture =
            RgbImage::from_fn(12, 4, |x, _| if (4..8).contains(&x) { Rgb([255; 3]) } else { Rgb([255, 0, 0]) });
        let pixels = ClipPixels::new(None).prepare(&picture.into(), 4, &Device::Cpu).expect("a picture");
        assert_eq!(pixels.dims(), [1, 3, 4, 4]);
        let pixels = pixels.flatten_all().and_then(|flat| flat.to_vec1::<f32>()).expect("floats");
        for channel in 0..3 {
            let white = (1.0 - MEAN[channel]) / DEVIATION[channel];
            assert!(pixels[16 * channel..][..16].iter().all(|value| (value - white).abs() < 1e-6));
        }
    }

    #[test]
    fn the_model_may_bring_its_own_numbers() {
        let own = json!({ "size": { "shortest_edge": 8 }, "image_mean": [0.5, 0.5, 0.5], "image_std": [1, 1, 1] });
        let pixels = ClipPixels::new(Some(&own));
        assert_eq!(pixels, ClipPixels { shortest: Some(8), mean: [0.5; 3], deviation: [1.0; 3] });
        assert_eq!(ClipPixels::new(Some(&json!({ "size": 24 }))).shortest, Some(24));
    }
}
