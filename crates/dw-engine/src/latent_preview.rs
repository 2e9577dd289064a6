//! Looks at a picture while it is being made: latents to a small PNG by one linear map from channels to
//! colours, without the decoder.

use std::sync::{
    Mutex, MutexGuard, PoisonError,
    atomic::{AtomicUsize, Ordering},
};

use candle_core::{DType, Device, Tensor};
use dw_core::event::{Event, EventSink};
use dw_pipelines::pipelines::LatentFormat;
use image::{ExtendedColorType, ImageEncoder, Rgb, RgbImage, codecs::png::PngEncoder};
use serde::{Deserialize, Serialize};

use crate::{Previews, worker::protocol::base64_text};

/// A look at the picture after a denoising step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LatentPreview {
    /// How many denoising steps are done, from 1.
    pub step: usize,
    /// How many there are.
    pub of: usize,
    /// A PNG file, an eighth of the picture's size in each direction. The first picture of a batch.
    #[serde(with = "base64_text")]
    pub png: Vec<u8>,
}

/// How channels become colours: `rgb = latents · factors + bias`, -1 dark and 1 light.
struct ColorMap {
    /// What latents are divided by before they are decoded, which tells the autoencoders apart.
    scaling_factor: f64,
    /// Red, green and blue for each channel.
    factors: &'static [[f32; 3]],
    bias: [f32; 3],
}

/// Least-squares fits of small pictures to latents. Those of Stable Diffusion and Flux are the ones that ComfyUI
/// publishes (comfy/latent_formats.py), the last one was fitted to 120 training pictures of the built-in model.
const COLOR_MAPS: &[ColorMap] = &[
    // Stable Diffusion 1 and 2.
    ColorMap {
        scaling_factor: 0.18215,
        factors: &[
            [0.3512, 0.2297, 0.3227],
            [0.3250, 0.4974, 0.2350],
            [-0.2829, 0.1762, 0.2721],
            [-0.2120, -0.2616, -0.7177],
        ],
        bias: [0.0; 3],
    },
    // Stable Diffusion XL.
    ColorMap {
        scaling_factor: 0.13025,
        factors: &[
            [0.3651, 0.4232, 0.4341],
            [-0.2533, -0.0042, 0.1068],
            [0.1076, 0.1111, -0.0362],
            [-0.3165, -0.2492, -0.2188],
        ],
        bias: [0.1084, -0.0175, -0.0011],
    },
    // Stable Diffusion 3.
    ColorMap {
        scaling_factor: 1.5305,
        factors: &[
            [-0.0922, -0.0175, 0.0749],
            [0.0311, 0.0633, 0.0954],
            [0.1994, 0.0927, 0.0458],
            [0.0856, 0.0339, 0.0902],
            [0.0587, 0.0272, -0.0496],
            [-0.0006, 0.1104, 0.0309],
            [0.0978, 0.0306, 0.0427],
            [-0.0042, 0.1038, 0.1358],
            [-0.0194, 0.0020, 0.0669],
            [-0.0488, 0.0130, -0.0268],
            [0.0922, 0.0988, 0.0951],
            [-0.0278, 0.0524, -0.0542],
            [0.0332, 0.0456, 0.0895],
            [-0.0069, -0.0030, -0.0810],
            [-0.0596, -0.0465, -0.0293],
            [-0.1448, -0.1463, -0.1189],
        ],
        bias: [0.2394, 0.2135, 0.1925],
    },
    // Flux.
    ColorMap {
        scaling_factor: 0.3611,
        factors: &[
            [-0.0346, 0.0244, 0.0681],
            [0.0034, 0.0210, 0.0687],
            [0.0275, -0.0668, -0.0433],
            [-0.0174, 0.0160, 0.0617],
            [0.0859, 0.0721, 0.0329],
            [0.0004, 0.0383, 0.0115],
            [0.0405, 0.0861, 0.0915],
            [-0.0236, -0.0185, -0.0259],
            [-0.0245, 0.0250, 0.1180],
            [0.1008, 0.0755, -0.0421],
            [-0.0515, 0.0201, 0.0011],
            [0.0428, -0.0012, -0.0036],
            [0.0817, 0.0765, 0.0749],
            [-0.1264, -0.0522, -0.1103],
            [-0.0280, -0.0881, -0.0499],
            [-0.1262, -0.0982, -0.0778],
        ],
        bias: [-0.0329, -0.0718, -0.0851],
    },
    // `builtin:landscapes`.
    ColorMap {
        scaling_factor: 0.5638,
        factors: &[
            [-1.1356, 0.6387, 0.3692],
            [-0.1948, -0.1176, -1.5059],
            [-0.0441, 0.4428, -0.0839],
            [-0.4972, 0.4116, 1.8738],
        ],
        bias: [0.0955, -0.0834, -0.0751],
    },
];

/// Shows the latents of one pipeline call. Stands between the call and the sink of its events, because those say
/// how many steps there are.
pub(crate) struct Viewer<'a> {
    previews: &'a Previews<'a>,
    colors: &'static ColorMap,
    events: &'a dyn EventSink,
    /// The picture after the step whose event comes next.
    waiting: Mutex<Option<Vec<u8>>>,
    total: AtomicUsize,
}

impl<'a> Viewer<'a> {
    /// A viewer, when there is a map for these latents.
    pub(crate) fn new(previews: &'a Previews<'a>, format: LatentFormat, events: &'a dyn EventSink) -> Option<Self> {
        let colors = COLOR_MAPS.iter().find(|map| {
            map.factors.len() == format.channels && (map.scaling_factor - format.scaling_factor).abs() < 1e-6
        })?;
        Some(Self { previews, colors, events, waiting: Mutex::default(), total: AtomicUsize::new(0) })
    }

    /// Takes the latents `(batch, channels, height / 8, width / 8)` after step `step`, from 0.
    pub(crate) fn look(&self, step: usize, latents: &Tensor) -> dw_pipelines::Result<()> {
        let done = step + 1;
        // The first event tells how many there are, so the last step is known unless it is the only one.
        let is_due = done.is_multiple_of(self.previews.every.max(1)) || done == self.total.load(Ordering::Relaxed);
        if is_due && latents.rank() == 4 {
            *self.lock() = Some(png(&colored(latents, self.colors)?));
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Option<Vec<u8>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl EventSink for Viewer<'_> {
    fn emit(&self, event: Event) {
        if let Event::DenoiseStep { done, of } = event {
            self.total.store(of, Ordering::Relaxed);
            if let Some(png) = self.lock().take() {
                (self.previews.sink)(LatentPreview { step: done, of, png });
            }
        }
        self.events.emit(event);
    }
}

/// The first picture of a batch in colours. Noise beyond the strength that clean latents have is scaled down, so that
/// early steps are not only black and white.
fn colored(latents: &Tensor, colors: &ColorMap) -> dw_pipelines::Result<RgbImage> {
    let latents = latents.get(0)?.to_dtype(DType::F32)?.to_device(&Device::Cpu)?;
    let (channels, height, width) = latents.dims3()?;
    let values = latents.reshape((channels, height * width))?.to_vec2::<f32>()?;
    let count = (channels * height * width) as f32;
    let strength = (values.iter().flatten().map(|value| value * value).sum::<f32>() / count).sqrt().max(1.0);
    let pixel = |place: usize| {
        let channel = |color: usize| {
            let sum: f32 = values.iter().zip(colors.factors).map(|(plane, factor)| plane[place] * factor[color]).sum();
            let light = sum / strength + colors.bias[color];
            ((light + 1.0) * 127.5).clamp(0.0, 255.0).round() as u8
        };
        Rgb([channel(0), channel(1), channel(2)])
    };
    Ok(RgbImage::from_fn(width as u32, height as u32, |x, y| pixel(y as usize * width + x as usize)))
}

fn png(image: &RgbImage) -> Vec<u8> {
    let mut bytes = Vec::new();
    let encoder = PngEncoder::new(&mut bytes);
    encoder
        .write_image(image.as_raw(), image.width(), image.height(), ExtendedColorType::Rgb8)
        .expect("writing to memory does not fail, and the buffer has the size of the picture");
    bytes
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use dw_core::event::Silent;

    use super::*;

    const SDXL: LatentFormat = LatentFormat { channels: 4, scaling_factor: 0.13025 };

    fn steps(every: usize, of: usize) -> Vec<LatentPreview> {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let sink = |preview| seen.lock().expect("unbroken").push(preview);
        let previews = Previews { every, sink: &sink };
        let viewer = Viewer::new(&previews, SDXL, &Silent).expect("a map");
        let latents = Tensor::zeros((2, 4, 2, 3), DType::F32, &Device::Cpu).expect("zeros");
        for step in 0..of {
            viewer.look(step, &latents).expect("shown");
            viewer.emit(Event::DenoiseStep { done: step + 1, of });
        }
        let seen = seen.lock().expect("unbroken");
        seen.clone()
    }

    #[test]
    fn every_so_many_steps_and_after_the_last_one_a_picture_comes() {
        let numbers = |every, of| steps(every, of).iter().map(|look| (look.step, look.of)).collect::<Vec<_>>();
        assert_eq!(numbers(2, 5), [(2, 5), (4, 5), (5, 5)]);
        assert_eq!(numbers(0, 2), [(1, 2), (2, 2)]);
    }

    #[test]
    fn zero_latents_are_the_bias_in_a_png_of_their_size() {
        let look = steps(1, 1).remove(0);
        let image = image::load_from_memory(&look.png).expect("a PNG").to_rgb8();
        assert_eq!((image.width(), image.height()), (3, 2));
        let level = |bias: f32| ((bias + 1.0) * 127.5).round() as u8;
        assert_eq!(image.get_pixel(2, 1).0, [level(0.1084), level(-0.0175), level(-0.0011)]);
    }

    #[test]
    fn strong_noise_is_shown_as_strong_as_clean_latents() {
        let colors = &COLOR_MAPS[1];
        let latents =
            |scale: f64| (Tensor::ones((1, 4, 1, 1), DType::F32, &Device::Cpu).expect("ones") * scale).expect("scaled");
        let shown = |scale| colored(&latents(scale), colors).expect("shown");
        assert_eq!(shown(14.0), shown(1.0));
        assert_ne!(shown(0.5), shown(1.0));
    }

    #[test]
    fn latents_of_an_unknown_autoencoder_are_not_shown() {
        let sink = |_| ();
        let previews = Previews { every: 1, sink: &sink };
        for format in [LatentFormat { channels: 16, ..SDXL }, LatentFormat { scaling_factor: 0.5, ..SDXL }] {
            assert!(Viewer::new(&previews, format, &Silent).is_none());
        }
    }
}
