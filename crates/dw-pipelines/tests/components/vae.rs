//! The autoencoder.

use candle_core::{DType, Device, Tensor};
use dw_pipelines::models::{AutoencoderKl, VaeConfig};

use crate::{Case, assert_close, assert_within, component};

fn vae(model: &str) -> AutoencoderKl {
    let (config, weights): (VaeConfig, _) = component(model, "vae");
    let vae = AutoencoderKl::new(&config, weights.clone()).expect("the weights fit");
    assert!(weights.unused().is_empty(), "unused: {:?}", weights.unused());
    vae
}

#[test]
fn the_decoder_agrees_with_the_reference() {
    for (model, name) in [("sd15", "sd15_i2i"), ("sdxl", "sdxl_i2i"), ("sdxl", "sdxl_t2i_96x64")] {
        let case = Case::open(name);
        let picture = vae(model).decode(&case.get("vae.decode.0.in")).expect("the latents fit");
        assert_close(name, &picture, &case.get("vae.decode.0.out"));
    }
}

#[test]
fn the_encoder_agrees_with_the_reference() {
    for (model, name) in [("sd15", "sd15_i2i"), ("sdxl", "sdxl_i2i")] {
        let case = Case::open(name);
        let (mean, log_variance) = vae(model).encode(&case.get("vae.encode.0.in")).expect("the picture fits");
        assert_close("mean", &mean, &case.get("vae.encode.0.mean"));
        assert_close("logvar", &log_variance, &case.get("vae.encode.0.logvar"));
    }
}

#[test]
fn an_autoencoder_widened_from_float16_decodes_in_float32() {
    let case = Case::open("sdxl_i2i");
    let (config, weights): (VaeConfig, _) = component("sdxl", "vae");
    let half = AutoencoderKl::new(&config, weights.to_dtype(DType::F16).expect("f32 narrows")).expect("it fits");
    let wide = half.with_dtype(DType::F32).expect("f16 widens");
    let picture = wide.decode(&case.get("vae.decode.0.in")).expect("the latents fit");
    assert_eq!(picture.dtype(), DType::F32);
    assert_within("picture", &picture, &case.get("vae.decode.0.out"), 0.05);
}

/// `sin(step * i)` for the i-th value, as the reference was given it.
fn wave(shape: (usize, usize, usize, usize), step: f32) -> Tensor {
    let count = shape.0 * shape.1 * shape.2 * shape.3;
    let values: Vec<f32> = (0..count).map(|i| (i as f32 * step).sin()).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).expect("the count fits the shape")
}

/// Ten values spread over a tensor, and the sum of all magnitudes, against those of the reference.
fn assert_samples(what: &str, found: &Tensor, expected: [f32; 10], magnitudes: f64) {
    let values: Vec<f32> = found.flatten_all().and_then(|values| values.to_vec1()).expect("f32");
    for (i, expected) in expected.iter().enumerate() {
        let found = values[i * values.len() / 11 + 3];
        assert!((found - expected).abs() < 2e-5 * expected.abs().max(1.0), "{what} {i}: {found} is not {expected}");
    }
    let sum: f64 = values.iter().map(|value| f64::from(value.abs())).sum();
    assert!((sum - magnitudes).abs() < 1e-5 * magnitudes, "{what}: {sum} is not {magnitudes}");
}

/// diffusers 0.42.1: `AutoencoderKL.enable_tiling()`, then `decode` and `encode` of these waves.
#[test]
fn tiles_are_blended_as_the_reference_blends_them() {
    let (latents, pixels) = (wave((1, 4, 13, 10), 0.37), wave((1, 3, 104, 80), 0.013));
    let tiled = |model: &str| {
        let vae = vae(model);
        let tiling = vae.config().tiling(None, None).expect("the training size makes usable tiles");
        let (mean, log_variance) = vae.encode_tiled(&pixels, &tiling).expect("the picture fits");
        (vae.decode_tiled(&latents, &tiling).expect("the latents fit"), mean, log_variance)
    };
    let (picture, mean, log_variance) = tiled("sd15");
    let expected =
        [-0.193427, -0.008071, -0.071219, 0.219184, 0.163550, -0.054628, 0.160810, 0.008772, -0.179006, -0.407321];
    assert_samples("sd15 picture", &picture, expected, 5827.941545175065);
    let expected =
        [0.200906, 0.750660, -1.487138, 1.772368, 0.730722, 0.044746, 0.978917, 0.013351, -1.050677, -3.371167];
    assert_samples("sd15 mean", &mean, expected, 794.2408739095554);
    let expected =
        [-1.495533, -1.465567, -1.443244, -1.346823, -1.405359, -1.411810, -1.819167, -1.828285, -1.610412, -1.473295];
    assert_samples("sd15 logvar", &log_variance, expected, 770.2856934070587);
    let (picture, mean, _) = tiled("sdxl");
    let expected =
        [-0.276199, -0.497787, -0.178347, -0.510314, -0.207265, -0.069287, -0.099770, -0.384140, -0.245455, -0.130069];
    assert_samples("sdxl picture", &picture, expected, 4236.145153121424);
    let expected =
        [4.023086, 3.159329, 3.105304, 0.217067, -7.156389, 1.092716, -3.051260, 5.647060, -3.627620, 2.820836];
    assert_samples("sdxl mean", &mean, expected, 1703.5729805119336);
}

#[test]
fn a_picture_of_one_tile_is_the_same_with_and_without_tiling() {
    let vae = vae("sd15");
    let tiling = vae.config().tiling(None, None).expect("the training size makes usable tiles");
    let latents = wave((1, 4, 8, 8), 0.37);
    let whole = vae.decode(&latents).expect("the latents fit");
    assert_within("picture", &vae.decode_tiled(&latents, &tiling).expect("the latents fit"), &whole, 0.0);
}
