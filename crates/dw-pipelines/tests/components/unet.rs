//! The UNet.

use candle_core::{DType, Device, Tensor};
use dw_pipelines::{
    Result,
    models::{AddedConditions, Unet2DConditionModel, UnetConfig, UnetInput},
};

use crate::{Case, assert_close, assert_within, component};

fn unet(model: &str) -> Unet2DConditionModel {
    let (config, weights): (UnetConfig, _) = component(model, "unet");
    let unet = Unet2DConditionModel::new(&config, weights.clone()).expect("the weights fit");
    assert!(weights.unused().is_empty(), "unused: {:?}", weights.unused());
    unet
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
