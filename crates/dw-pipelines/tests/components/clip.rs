//! Text and image encoders.

use candle_core::Tensor;
use dw_pipelines::models::{ClipTextConfig, ClipTextModel, ClipTextOutput, ClipVisionConfig, ClipVisionModel};

use crate::{Case, assert_close, component};

fn text_encoder(model: &str, name: &str) -> ClipTextModel {
    let (config, weights): (ClipTextConfig, _) = component(model, name);
    let encoder = ClipTextModel::new(&config, weights.clone()).expect("the weights fit");
    assert!(weights.unused().is_empty(), "unused: {:?}", weights.unused());
    encoder
}

fn encode(encoder: &ClipTextModel, case: &Case, ids: &str) -> ClipTextOutput {
    encoder.forward(&case.get(ids)).expect("the ids fit")
}

fn check_sd15_text(name: &str, clip_skip: usize) {
    let (case, encoder) = (Case::open(name), text_encoder("sd15", "text_encoder"));
    let positive = encode(&encoder, &case, "text_encoder.0.input_ids");
    let skipped = &positive.hidden_states[positive.hidden_states.len() - 1 - clip_skip];
    let skipped = encoder.final_layer_norm(skipped).expect("the state fits");
    assert_close("prompt_embeds", &skipped, &case.get("prompt_embeds"));
    let negative = encode(&encoder, &case, "text_encoder.1.input_ids");
    assert_close("negative_prompt_embeds", &negative.last_hidden_state, &case.get("negative_prompt_embeds"));
}

#[test]
fn the_clip_text_encoder_agrees_with_the_reference() {
    check_sd15_text("sd15_i2i", 0);
}

#[test]
fn a_skipped_clip_layer_agrees_with_the_reference() {
    check_sd15_text("sd15_t2i_clip_skip", 1);
}

#[test]
fn both_sdxl_text_encoders_and_the_pooled_projection_agree_with_the_reference() {
    let case = Case::open("sdxl_i2i");
    let (one, two) = (text_encoder("sdxl", "text_encoder"), text_encoder("sdxl", "text_encoder_2"));
    let one = encode(&one, &case, "text_encoder.0.input_ids");
    let two = encode(&two, &case, "text_encoder_2.0.input_ids");
    let before_last = |output: &ClipTextOutput| output.hidden_states[output.hidden_states.len() - 2].clone();
    let embeds = Tensor::cat(&[before_last(&one), before_last(&two)], 2).expect("equal lengths");
    assert_close("prompt_embeds", &embeds, &case.get("prompt_embeds"));
    let pooled = two.text_embeds.expect("the second encoder has a projection");
    assert_close("pooled_prompt_embeds", &pooled, &case.get("pooled_prompt_embeds"));
    assert!(one.text_embeds.is_none(), "the first encoder has no projection");
}

#[test]
fn the_clip_image_encoder_agrees_with_the_reference() {
    let case = Case::open("sdxl_ip_adapter");
    let (config, weights): (ClipVisionConfig, _) = component("sdxl-ip-adapter/models", "image_encoder");
    let encoder = ClipVisionModel::new(&config, weights.clone()).expect("the weights fit");
    assert!(weights.unused().is_empty(), "unused: {:?}", weights.unused());
    let output = encoder.forward(&case.get("image_encoder.0.pixel_values")).expect("the picture fits");
    assert_close("last_hidden_state", &output.last_hidden_state, &case.get("image_encoder.0.last_hidden_state"));
    let embeds = output.image_embeds.expect("the encoder has a projection");
    assert_close("image_embeds", &embeds, &case.get("image_encoder.0.image_embeds"));
    assert_eq!(output.hidden_states.len(), config.num_hidden_layers + 1);
}
