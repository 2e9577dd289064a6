//! The models alone.

use candle_core::{Device, Tensor};
use dw_pipelines::models::{
    FluxControlNetInput, FluxControlNetModel, FluxInput, FluxResiduals, FluxTransformer2DModel, ReduxImageEncoder,
    SiglipVisionModel,
};
use serde_json::json;

use crate::{assert_like, config, input, support::tiny, transformer_config};

/// The inputs of a step on a picture of 2 rows and 3 columns.
struct Step {
    picture: Tensor,
    text: Tensor,
    pooled: Tensor,
    positions: Vec<[u32; 3]>,
}

impl Step {
    fn new() -> Self {
        Self {
            picture: input("picture", &[1, 6, 64]),
            text: input("text", &[1, 5, 64]),
            pooled: input("pooled", &[1, 32]),
            positions: (0..6).map(|i| [0, i / 3, i % 3]).collect(),
        }
    }

    fn input<'a>(&'a self, rotary: &'a dw_pipelines::nn::Rotary) -> FluxInput<'a> {
        let Self { picture, text, pooled, .. } = self;
        FluxInput { picture, text, pooled, timestep: 700.0, guidance: 3.5, rotary, images: None }
    }
}

#[test]
fn the_transformer_and_its_controlnet_agree_with_the_reference() {
    let step = Step::new();
    let transformer = FluxTransformer2DModel::new(&config(), tiny::weights("flux/dev")).expect("it can be built");
    let rotary = config().rotary(&step.positions, 5, &Device::Cpu).expect("even axes");
    let plain = transformer.forward(&step.input(&rotary), None).expect("the shapes fit");
    let expected = [-1.541_775_7, 0.236_917_6, 0.549_774_5, -0.549_588_3, -0.135_293_2, 0.829_134_6, 0.938_792_5];
    assert_like("transformer", &plain, expected);

    let mut settings = transformer_config();
    settings["num_single_layers"] = json!(1);
    settings["num_mode"] = json!(3);
    let settings = serde_json::from_value(settings).expect("a configuration");
    let net = FluxControlNetModel::new(&settings, tiny::weights("flux/union")).expect("it can be built");
    let rotary_of_net = config().rotary(&step.positions, net.words(5), &Device::Cpu).expect("even axes");
    let call = FluxControlNetInput {
        input: step.input(&rotary_of_net),
        condition: &input("condition", &[1, 6, 64]),
        mode: Some(2),
        scale: 0.6,
    };
    let residuals = net.forward(&call).expect("the shapes fit");
    assert_eq!((residuals.blocks.len(), residuals.single_blocks.len()), (2, 1));
    let expected = [0.781_839_7, -1.229_429_2, 0.643_637_5, 0.442_828_5, 2.645_219_3, 0.034_228_2, 1.237_049_7];
    assert_like("last block", &residuals.blocks[1], expected);
    let expected = [0.004_833_7, -2.179_322_7, 1.140_306_6, 2.053_204_5, -0.007_890_4, 0.110_941_1, 1.196_024_5];
    assert_like("single block", &residuals.single_blocks[0], expected);
    let steered = transformer.forward(&step.input(&rotary), Some(&residuals)).expect("the shapes fit");
    let expected = [1.159_843_1, 0.533_579_6, -0.644_637_9, 0.863_476_3, 0.096_882_4, 0.631_585_7, 0.962_393_7];
    assert_like("steered transformer", &steered, expected);

    let message = net.forward(&FluxControlNetInput { mode: None, ..call }).expect_err("a union net").to_string();
    assert!(message.contains("`control_mode`") || message.contains("control_mode"), "{message}");
}

#[test]
fn a_controlnet_that_reads_pixels_agrees_with_the_reference() {
    let step = Step::new();
    let mut settings = transformer_config();
    settings["num_single_layers"] = json!(1);
    settings["patch_size"] = json!(2);
    settings["conditioning_embedding_channels"] = json!(16);
    let config_of = |settings: &serde_json::Value| serde_json::from_value(settings.clone()).expect("a configuration");
    let net = FluxControlNetModel::new(&config_of(&settings), tiny::weights("flux/hints")).expect("it can be built");
    let rotary = config().rotary(&step.positions, 5, &Device::Cpu).expect("even axes");
    let hint = input("hint", &[1, 3, 32, 48]);
    let call = FluxControlNetInput { input: step.input(&rotary), condition: &hint, mode: None, scale: 0.6 };
    let residuals = net.forward(&call).expect("the shapes fit");
    assert!(net.reads_pixels() && residuals.is_repeated);
    let expected = [-0.461_535_7, 1.100_779_9, 0.137_070_8, 0.194_572_6, -0.349_665_6, 0.167_298, 0.577_918];
    assert_like("last block of pixels", &residuals.blocks[1], expected);

    // Patches of another size do not make tokens of the model.
    settings["patch_size"] = json!(4);
    let refused = FluxControlNetModel::new(&config_of(&settings), tiny::weights("flux/hints"));
    let message = refused.err().expect("refused").to_string();
    assert!(message.contains("`conditioning_embedding_channels`"), "{message}");
}

#[test]
fn residuals_of_several_nets_are_added_as_far_as_both_go() {
    let number = |value: &f32| Tensor::new(*value, &Device::Cpu).expect("a number");
    let residuals = |blocks: &[f32], single_blocks: &[f32]| FluxResiduals {
        blocks: blocks.iter().map(number).collect(),
        single_blocks: single_blocks.iter().map(number).collect(),
        is_repeated: false,
    };
    let sum = residuals(&[1.0, 2.0], &[3.0]).add(&residuals(&[10.0], &[])).expect("numbers");
    let values = |list: &[Tensor]| list.iter().map(|x| x.to_scalar::<f32>().expect("a number")).collect::<Vec<_>>();
    assert_eq!((values(&sum.blocks), values(&sum.single_blocks)), (vec![11.0], vec![3.0]));
}

#[test]
fn the_encoders_of_redux_agree_with_the_reference() {
    let settings = json!({
        "hidden_size": 48, "image_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
        "num_hidden_layers": 2, "patch_size": 8
    });
    let settings = serde_json::from_value(settings).expect("a configuration");
    let encoder = SiglipVisionModel::new(&settings, tiny::weights("redux/siglip")).expect("it can be built");
    let states = encoder.forward(&input("pixels", &[1, 3, 32, 32])).expect("the right size");
    let expected = [-0.709_766_2, 0.480_806_9, -2.642_323_3, 0.575_202_5, -0.829_730_2, -0.065_842_4, 0.786_746];
    assert_like("siglip", &states, expected);
    let message = encoder.forward(&input("pixels", &[1, 3, 16, 16])).expect_err("too small").to_string();
    assert!(message.contains("32x32"), "{message}");

    let settings = serde_json::from_value(json!({ "redux_dim": 48, "txt_in_features": 64 })).expect("a configuration");
    let words = ReduxImageEncoder::new(&settings, &tiny::weights("redux/emb")).and_then(|redux| redux.forward(&states));
    let expected = [1.006_872_3, -0.188_876_3, 0.275_992, -0.184_679_2, -0.774_468_8, 0.935_588_2, 0.506_640_6];
    assert_like("redux", &words.expect("the widths fit"), expected);
}

#[test]
fn configurations_that_cannot_be_run_are_refused() {
    let built = |name: &str, value: serde_json::Value| {
        let mut settings = transformer_config();
        settings[name] = value;
        let settings = serde_json::from_value(settings).expect("a configuration");
        let built = FluxTransformer2DModel::new(&settings, tiny::weights("flux/dev"));
        built.err().expect("refused").to_string()
    };
    assert!(built("patch_size", json!(2)).contains("`patch_size`"));
    assert!(built("axes_dims_rope", json!([4, 6, 8])).contains("`axes_dims_rope`"));
}
