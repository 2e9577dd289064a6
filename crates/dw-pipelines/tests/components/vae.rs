//! The autoencoder.

use candle_core::DType;
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
