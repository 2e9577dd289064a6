//! The models against HuggingFace diffusers, component by component: tiny random models of the real
//! architectures, and what the reference computed with them (`tests/parity/make.py` rebuilds both).

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use dw_pipelines::{
    Result,
    models::{
        AddedConditions, AutoencoderKl, ClipTextConfig, ClipTextModel, ClipTextOutput, Unet2DConditionModel,
        UnetConfig, UnetInput, VaeConfig,
    },
    weights::{Weights, folder::weight_files},
};
use serde::de::DeserializeOwned;

/// How far rounding in another order of summation may lead, as a part of the largest value: the reference itself, run
/// with other kernels or in float64, moves by about a tenth of this.
const TOLERANCE: f32 = 2e-5;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity")
}

fn load(files: &[PathBuf]) -> Result<Weights> {
    Weights::load(files, DType::F32, &Device::Cpu, &mut |_| Ok(()))
}

/// What the reference computed in one case.
struct Case(Weights);

impl Case {
    fn open(name: &str) -> Self {
        let file = fixtures().join("components").join(format!("{name}.safetensors"));
        Self(load(&[file]).expect("the fixture is there"))
    }

    fn find(&self, name: &str) -> Option<Tensor> {
        let shape = self.0.shape_of(name)?;
        Some(self.0.get(shape, name).expect("a tensor has its own shape"))
    }

    fn get(&self, name: &str) -> Tensor {
        self.find(name).unwrap_or_else(|| panic!("the fixture has no `{name}`"))
    }
}

/// Configuration and weights of one component of a model.
fn component<C: DeserializeOwned>(model: &str, name: &str) -> (C, Weights) {
    let dir = fixtures().join("models").join(model).join(name);
    let config = std::fs::read_to_string(dir.join("config.json")).expect("the fixture has a configuration");
    let config = serde_json::from_str(&config).expect("the configuration is of this model");
    let files = weight_files(&dir, None).expect("the fixture has weights");
    (config, load(&files).expect("the weights are valid"))
}

fn text_encoder(model: &str, name: &str) -> ClipTextModel {
    let (config, weights): (ClipTextConfig, _) = component(model, name);
    let encoder = ClipTextModel::new(&config, weights.clone()).expect("the weights fit");
    assert!(weights.unused().is_empty(), "unused: {:?}", weights.unused());
    encoder
}

fn unet(model: &str) -> Unet2DConditionModel {
    let (config, weights): (UnetConfig, _) = component(model, "unet");
    let unet = Unet2DConditionModel::new(&config, weights.clone()).expect("the weights fit");
    assert!(weights.unused().is_empty(), "unused: {:?}", weights.unused());
    unet
}

fn vae(model: &str) -> AutoencoderKl {
    let (config, weights): (VaeConfig, _) = component(model, "vae");
    let vae = AutoencoderKl::new(&config, weights.clone()).expect("the weights fit");
    assert!(weights.unused().is_empty(), "unused: {:?}", weights.unused());
    vae
}

fn largest(values: &Tensor) -> f32 {
    let largest = values.abs().and_then(|values| values.flatten_all()?.max(0)?.to_scalar::<f32>());
    largest.expect("values are f32")
}

fn assert_close(what: &str, found: &Tensor, expected: &Tensor) {
    assert_within(what, found, expected, TOLERANCE * largest(expected).max(1.0));
}

fn assert_within(what: &str, found: &Tensor, expected: &Tensor, tolerance: f32) {
    assert_eq!(found.dims(), expected.dims(), "{what}");
    let found = found.to_dtype(DType::F32).expect("every type widens");
    let difference = largest(&(found - expected).expect("equal shapes"));
    assert!(difference <= tolerance, "{what}: differs by {difference:e}, allowed are {tolerance:e}");
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

fn text_of(case: &Case) -> Tensor {
    Tensor::cat(&[case.get("negative_prompt_embeds"), case.get("prompt_embeds")], 0).expect("equal shapes")
}

fn predict(unet: &Unet2DConditionModel, case: &Case) -> Result<Tensor> {
    let text_embeds = case.find("denoiser.0.in.added_cond_kwargs.text_embeds");
    let time_ids = case.find("denoiser.0.in.added_cond_kwargs.time_ids");
    let (sample, text) = (case.get("denoiser.0.in.sample"), text_of(case));
    let timestep = case.get("denoiser.0.in.timestep").to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?[0];
    let added = text_embeds.as_ref().zip(time_ids.as_ref());
    unet.forward(&UnetInput {
        added: added.map(|(text_embeds, time_ids)| AddedConditions { text_embeds, time_ids }),
        ..UnetInput::new(&sample, timestep, &text)
    })
}

#[test]
fn the_unet_of_every_family_and_size_agrees_with_the_reference() {
    for (model, name) in [("sd15", "sd15_i2i"), ("sdxl", "sdxl_i2i"), ("sdxl", "sdxl_t2i_96x64")] {
        let case = Case::open(name);
        let prediction = predict(&unet(model), &case).expect("the inputs fit");
        assert_close(name, &prediction, &case.get("denoiser.0.out"));
    }
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
fn odd_latents_come_back_in_their_own_size() {
    let case = Case::open("sdxl_i2i");
    let unet = unet("sdxl");
    let sample = Tensor::zeros((2, 4, 7, 5), DType::F32, &Device::Cpu).expect("a small tensor");
    let text = text_of(&case);
    let text_embeds = case.get("denoiser.0.in.added_cond_kwargs.text_embeds");
    let time_ids = case.get("denoiser.0.in.added_cond_kwargs.time_ids");
    let added = Some(AddedConditions { text_embeds: &text_embeds, time_ids: &time_ids });
    let prediction = unet.forward(&UnetInput { added, ..UnetInput::new(&sample, 500.0, &text) });
    assert_eq!(prediction.expect("odd sizes work").dims(), [2, 4, 7, 5]);
}

#[test]
fn a_bfloat16_model_stays_near_the_reference_and_keeps_its_type() {
    let case = Case::open("sd15_i2i");
    let (config, weights): (UnetConfig, _) = component("sd15", "unet");
    let half = weights.to_dtype(DType::BF16).expect("f32 narrows");
    let prediction = predict(&Unet2DConditionModel::new(&config, half).expect("the weights fit"), &case);
    let prediction = prediction.expect("the inputs fit");
    assert_eq!(prediction.dtype(), DType::BF16);
    assert_within("bf16", &prediction, &case.get("denoiser.0.out"), 0.2);
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

#[test]
fn a_model_that_needs_micro_conditioning_says_so() {
    let case = Case::open("sdxl_i2i");
    let (sample, text) = (case.get("denoiser.0.in.sample"), text_of(&case));
    let error = unet("sdxl").forward(&UnetInput::new(&sample, 1.0, &text)).expect_err("`added` is missing");
    assert!(error.to_string().contains("text_embeds"), "{error}");
}

#[test]
fn latents_of_the_wrong_channels_are_refused() {
    let case = Case::open("sd15_i2i");
    let sample = Tensor::zeros((2, 9, 8, 8), DType::F32, &Device::Cpu).expect("a small tensor");
    let error = unet("sd15").forward(&UnetInput::new(&sample, 1.0, &text_of(&case))).expect_err("9 channels");
    assert!(error.to_string().contains("9 channels"), "{error}");
}
