//! What can be seen in a picture of the built-in model without looking: how warm, how bright and how
//! even its parts are.

use image::RgbImage;

/// A picture of a landscape, sky above and ground below.
pub(crate) struct Scene(pub(crate) RgbImage);

impl Scene {
    /// The mean colour (red, green, blue) of the rows between two parts of the height, from the top.
    fn mean(&self, from: f64, to: f64) -> [f64; 3] {
        let height = f64::from(self.0.height());
        let rows = (height * from) as u32..(height * to) as u32;
        let pixels: Vec<_> =
            self.0.enumerate_rows().filter(|(row, _)| rows.contains(row)).flat_map(|(_, row)| row).collect();
        let mean = |channel: usize| {
            pixels.iter().map(|(_, _, pixel)| f64::from(pixel[channel])).sum::<f64>() / pixels.len() as f64
        };
        [mean(0), mean(1), mean(2)]
    }

    /// Red less blue in the sky above the horizon: far above 0 at sunset, far below at day.
    pub(crate) fn warmth(&self) -> f64 {
        let [red, _, blue] = self.mean(0.25, 0.48);
        red - blue
    }

    /// The mean of all samples, 0 to 255.
    pub(crate) fn brightness(&self) -> f64 {
        self.mean(0.0, 1.0).iter().sum::<f64>() / 3.0
    }

    /// How far samples lie from their mean: small when the picture shows nothing.
    pub(crate) fn contrast(&self) -> f64 {
        let mean = self.brightness();
        let samples = self.0.as_raw();
        let squares: f64 = samples.iter().map(|&sample| (f64::from(sample) - mean).powi(2)).sum();
        (squares / samples.len() as f64).sqrt()
    }

    /// What speaks against this being a sunset over the sea.
    pub(crate) fn doubts_about_sunset_over_sea(&self) -> Vec<String> {
        let [sky, _, _] = self.mean(0.35, 0.48);
        let [sea, _, _] = self.mean(0.75, 0.95);
        let doubts = [
            (self.0.dimensions() != (128, 128), format!("its size is {:?}, not 128 x 128", self.0.dimensions())),
            (self.contrast() < 15.0, format!("it shows nothing: contrast {:.0}", self.contrast())),
            (self.warmth() < 25.0, format!("the sky is not warm: red less blue is {:.0}", self.warmth())),
            (sky - sea < 15.0, format!("the sea is as red as the sky: {sea:.0} and {sky:.0}")),
        ];
        doubts.into_iter().filter_map(|(doubtful, doubt)| doubtful.then_some(doubt)).collect()
    }
}
