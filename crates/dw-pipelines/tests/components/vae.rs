//! The autoencoder.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use dw_pipelines::{
    models::{AutoencoderKl, AutoencoderTiny, TinyVaeConfig, VaeConfig},
    weights::Weights,
};

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

/// The weights of a small autoencoder with one block of four channels at each of four levels: a wave for each tensor,
/// its step by the length of the tensor's name.
fn tiny_weights() -> Weights {
    let mut shapes = vec![
        (String::from("encoder.layers.0"), (4, 3, true)),
        (String::from("encoder.layers.8"), (4, 4, true)),
        (String::from("decoder.layers.0"), (4, 4, true)),
        (String::from("decoder.layers.12"), (3, 4, true)),
    ];
    shapes.extend([2, 4, 6].map(|at| (format!("encoder.layers.{at}"), (4, 4, false))));
    shapes.extend([4, 7, 10].map(|at| (format!("decoder.layers.{at}"), (4, 4, false))));
    for block in [1, 3, 5, 7]
        .map(|at| format!("encoder.layers.{at}"))
        .into_iter()
        .chain([2, 5, 8, 11].map(|at| format!("decoder.layers.{at}")))
    {
        shapes.extend([0, 2, 4].map(|at| (format!("{block}.conv.{at}"), (4, 4, true))));
    }
    let mut tensors = HashMap::new();
    for (name, (outputs, inputs, has_bias)) in shapes {
        let named = |what: &str, shape| {
            let name = format!("{name}.{what}");
            let values = wave(shape, 0.37 + 0.01 * name.len() as f32).affine(0.2, 0.0).expect("a small tensor");
            (name, values)
        };
        let (weight, values) = named("weight", (outputs, inputs, 3, 3));
        tensors.insert(weight, values);
        if has_bias {
            let (bias, values) = named("bias", (outputs, 1, 1, 1));
            tensors.insert(bias, values.flatten_all().expect("a small tensor"));
        }
    }
    Weights::from_tensors(tensors, "waves")
}

/// diffusers 0.42.1: `AutoencoderTiny` of these weights, whole and with `tile_sample_min_size` 64,
/// `tile_latent_min_size` 8 and `tile_overlap_factor` 0.25.
#[test]
fn a_small_autoencoder_agrees_with_the_reference_whole_and_in_tiles() {
    let config = r#"{"encoder_block_out_channels": [4, 4, 4, 4], "decoder_block_out_channels": [4, 4, 4, 4],
        "num_encoder_blocks": [1, 1, 1, 1], "num_decoder_blocks": [1, 1, 1, 1]}"#;
    let config: TinyVaeConfig = serde_json::from_str(config).expect("a configuration of known keys");
    let weights = tiny_weights();
    let vae = AutoencoderTiny::new(&config, weights.clone()).expect("the weights fit");
    assert!(weights.unused().is_empty(), "unused: {:?}", weights.unused());

    let latents = vae.encode(&wave((1, 3, 32, 24), 0.05)).expect("the picture fits");
    let expected =
        [0.0617938, 0.140804, -0.0602459, 0.22908, 0.0642845, 0.474393, -0.222565, 0.140099, -0.0892353, 0.135567];
    assert_samples("latents", &latents, expected, 11.03486101);
    let picture = vae.decode(&wave((1, 4, 4, 3), 0.3)).expect("the latents fit");
    let expected =
        [-0.22099, -1.22834, -0.786666, -1.11265, -0.947507, -1.0525, -0.955207, -0.903355, -0.345536, -0.657429];
    assert_samples("picture", &picture, expected, 1670.024578);

    let tiling = vae.tiling(Some(64), Some(0.25)).expect("usable tiles");
    let picture = vae.decode_tiled(&wave((1, 4, 9, 10), 0.3), &tiling).expect("the latents fit");
    let expected =
        [0.105284, -0.366217, -0.793819, -0.786407, -0.210921, -1.05687, -1.03135, -1.0778, -0.015037, -0.491798];
    assert_samples("tiled picture", &picture, expected, 12791.74735);
    let latents = vae.encode_tiled(&wave((1, 3, 72, 80), 0.05), &tiling).expect("the picture fits");
    let expected =
        [0.514959, -0.0526009, -0.089368, 0.00264735, 0.162737, 0.218594, 0.0213981, 0.123693, 0.17998, 0.259834];
    assert_samples("tiled latents", &latents, expected, 67.71679021);
}
