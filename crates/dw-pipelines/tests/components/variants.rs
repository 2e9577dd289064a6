//! Settings that the published models do not use (`tests/parity/make_variants.py` rebuilds the fixtures).

use candle_core::Tensor;
use dw_pipelines::models::{
    AutoencoderKl, ClipTextConfig, ClipTextModel, Unet2DConditionModel, UnetConfig, UnetInput, VaeConfig,
};

use crate::{Case, assert_close, component_at, fixtures};

fn variant(name: &str) -> std::path::PathBuf {
    fixtures().join("variants").join(name)
}

fn case(name: &str) -> Case {
    Case::read(&variant(name).join("case.safetensors"))
}

fn check_unet(name: &str) {
    let case = case(name);
    let (config, weights): (UnetConfig, _) = component_at(&variant(name));
    let unet = Unet2DConditionModel::new(&config, weights.clone()).expect("the weights fit");
    assert!(weights.unused().is_empty(), "unused: {:?}", weights.unused());
    let (class_labels, timestep_cond) = (case.find("class_labels"), case.find("timestep_cond"));
    let prediction = unet.forward(&UnetInput {
        class_labels: class_labels.as_ref(),
        timestep_cond: timestep_cond.as_ref(),
        ..UnetInput::new(&case.get("sample"), 421.0, &case.get("text"))
    });
    assert_close(name, &prediction.expect("the inputs fit"), &case.get("out"));
}

#[test]
fn a_unet_with_embedded_guidance_and_odd_latents_agrees_with_the_reference() {
    check_unet("unet-guided");
}

#[test]
fn a_unet_with_classes_and_scaling_times_agrees_with_the_reference() {
    check_unet("unet-classes");
}

#[test]
fn a_unet_with_attention_between_pixels_agrees_with_the_reference() {
    check_unet("unet-pixels");
}

#[test]
fn every_kind_of_class_embedding_agrees_with_the_reference() {
    check_unet("unet-class-times");
    check_unet("unet-class-features");
}

#[test]
fn an_autoencoder_without_quant_convolutions_agrees_with_the_reference_on_odd_pictures() {
    let case = case("vae-16");
    let (config, weights): (VaeConfig, _) = component_at(&variant("vae-16"));
    let vae = AutoencoderKl::new(&config, weights.clone()).expect("the weights fit");
    assert!(weights.unused().is_empty(), "unused: {:?}", weights.unused());
    let (mean, log_variance) = vae.encode(&case.get("picture")).expect("the picture fits");
    assert_close("mean", &mean, &case.get("mean"));
    assert_close("logvar", &log_variance, &case.get("logvar"));
    assert_close("out", &vae.decode(&case.get("latents")).expect("the latents fit"), &case.get("out"));
    assert_eq!((config.scale_factor(), config.shift_factor), (2, Some(0.0609)));
}

#[test]
fn a_text_encoder_without_name_prefix_pools_at_its_first_end_token() {
    let case = case("clip-end");
    let (config, weights): (ClipTextConfig, _) = component_at(&variant("clip-end"));
    let bare = |name: &str| name.strip_prefix("text_model.").map(str::to_owned);
    for weights in [weights.clone(), weights.renamed(bare)] {
        let encoder = ClipTextModel::new(&config, weights).expect("the weights fit");
        let output = encoder.forward(&case.get("ids")).expect("the ids fit");
        assert_close("last", &output.last_hidden_state, &case.get("last"));
        let embeds: Tensor = output.text_embeds.expect("the encoder has a projection");
        assert_close("out", &embeds, &case.get("out"));
    }
}
