//! ControlNets, for one kind of picture and for several.

use candle_core::{DType, Tensor};
use dw_pipelines::models::{
    AddedConditions, ControlNetConfig, ControlNetInput, ControlNetModel, ControlNetOutput, ControlNetUnionConfig,
    ControlNetUnionInput, ControlNetUnionModel, UnetInput,
};

use crate::{Case, assert_close, component};

fn controlnet() -> ControlNetModel {
    let (config, weights): (ControlNetConfig, _) = component("sdxl-controlnet-a", "");
    let model = ControlNetModel::new(&config, weights.clone()).expect("the weights fit");
    assert!(weights.unused().is_empty(), "unused: {:?}", weights.unused());
    model
}

fn union() -> ControlNetUnionModel {
    let (config, weights): (ControlNetUnionConfig, _) = component("sdxl-controlnet-union", "");
    let model = ControlNetUnionModel::new(&config, weights.clone()).expect("the weights fit");
    assert!(weights.unused().is_empty(), "unused: {:?}", weights.unused());
    model
}

/// What a ControlNet shares with the UNet in one case.
struct Shared {
    sample: Tensor,
    text: Tensor,
    text_embeds: Tensor,
    time_ids: Tensor,
    timestep: f64,
}

impl Shared {
    /// The whole batch of a case, or only its positive half.
    fn of(case: &Case, is_positive_only: bool) -> Self {
        let (sample, positive) = (case.get("denoiser.0.in.sample"), case.get("prompt_embeds"));
        let timestep = case.get("denoiser.0.in.timestep").to_dtype(DType::F64).and_then(|t| t.to_scalar::<f64>());
        let both = || Tensor::cat(&[&case.get("negative_prompt_embeds"), &positive], 0).expect("equal shapes");
        Self {
            text: if is_positive_only { positive.clone() } else { both() },
            sample: if is_positive_only { sample.narrow(0, 1, 1).expect("two rows") } else { sample },
            text_embeds: case.get("controlnet.0.in.added_cond_kwargs.text_embeds"),
            time_ids: case.get("controlnet.0.in.added_cond_kwargs.time_ids"),
            timestep: timestep.expect("one number"),
        }
    }

    fn input(&self) -> UnetInput<'_> {
        let added = Some(AddedConditions { text_embeds: &self.text_embeds, time_ids: &self.time_ids });
        UnetInput { added, ..UnetInput::new(&self.sample, self.timestep, &self.text) }
    }
}

fn assert_agrees(output: &ControlNetOutput, case: &Case) {
    assert_eq!(output.down.len(), 9);
    for (i, residual) in output.down.iter().enumerate() {
        let name = format!("controlnet.0.out.0.{i}");
        assert_close(&name, residual, &case.get(&name));
    }
    assert_close("mid", &output.mid, &case.get("controlnet.0.out.1"));
}

fn check_single(name: &str, scale: f64, is_guess: bool) {
    let case = Case::open(name);
    let shared = Shared::of(&case, is_guess);
    let condition = case.get("controlnet.0.in.controlnet_cond");
    let input = ControlNetInput { unet: shared.input(), condition: &condition, scale, is_guess };
    assert_agrees(&controlnet().forward(&input).expect("the inputs fit"), &case);
}

fn check_union(name: &str, control_types: &[usize]) {
    let case = Case::open(name);
    let shared = Shared::of(&case, false);
    let picture = |i| case.get(&format!("controlnet.0.in.controlnet_cond.{i}"));
    let conditions: Vec<Tensor> = (0..control_types.len()).map(picture).collect();
    let scales = vec![0.8; control_types.len()];
    let input = ControlNetUnionInput {
        unet: shared.input(),
        conditions: &conditions,
        control_types,
        scales: &scales,
        is_guess: false,
        is_one_of_many: false,
    };
    assert_agrees(&union().forward(&input).expect("the inputs fit"), &case);
}

#[test]
fn a_controlnet_agrees_with_the_reference() {
    check_single("sdxl_controlnet", 0.7, false);
}

#[test]
fn guess_mode_agrees_with_the_reference() {
    check_single("sdxl_controlnet_guess", 1.0, true);
}

#[test]
fn a_union_controlnet_agrees_with_the_reference_for_one_and_two_pictures() {
    check_union("sdxl_controlnet_union_single", &[3]);
    check_union("sdxl_controlnet_union_two", &[1, 3]);
}

#[test]
fn a_kind_of_picture_that_a_union_controlnet_does_not_know_is_refused() {
    let case = Case::open("sdxl_controlnet_union_single");
    let shared = Shared::of(&case, false);
    let input = ControlNetUnionInput {
        unet: shared.input(),
        conditions: &[case.get("controlnet.0.in.controlnet_cond.0")],
        control_types: &[6],
        scales: &[1.0],
        is_guess: false,
        is_one_of_many: false,
    };
    let error = union().forward(&input).expect_err("there are six kinds");
    assert!(error.to_string().contains("kind `6`"), "{error}");
}
