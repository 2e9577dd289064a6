//! ControlNets of Stable Diffusion 3 against the reference, on tiny models that are made from seeds: several nets that
//! differ, lists of pictures, and nets made for inpainting. `tests/parity/make_sd3_controlnet.py` prints the numbers.

mod support;

use std::{collections::BTreeMap, sync::LazyLock};

use dw_core::{
    arguments::{Arguments, ArtifactRef},
    artifact::Artifact,
};
use dw_pipelines::{Result, models::Sd3ControlNetModel, request::PipelineRequest};
use serde_json::{Value, json};
use support::{
    sd3::{
        self, call_values, components, config, encoded_prompts, fixture_picture, load, transformer_config,
        write_component, write_model,
    },
    tiny::weights,
};

/// How far rounding in another order of summation may lead.
const TOLERANCE: f32 = 2e-4;

/// A tiny Stable Diffusion 3.5 without text encoders, as `model`, and nets for it: a shallow one that is given no pooled
/// text, a deep one that is, and one made for inpainting.
static FOLDER: LazyLock<tempfile::TempDir> = LazyLock::new(|| {
    let folder = tempfile::tempdir().expect("a temporary folder");
    write_model(&folder.path().join("model"), json!({}));
    for (name, more) in [
        ("net-a", json!({ "num_layers": 2 })),
        ("net-b", json!({ "num_layers": 3, "force_zeros_for_pooled_projection": false })),
        ("net-c", json!({ "num_layers": 2, "extra_conditioning_channels": 1 })),
    ] {
        let (place, made) = (folder.path().join(name), weights(&format!("sd35/{name}")));
        write_component(&place, &transformer_config(more), made, &|settings, weights| {
            drop(Sd3ControlNetModel::new(&config(settings), weights).expect("made"));
        });
    }
    folder
});

/// The model with these nets.
fn steered(class: &str, nets: &[&str]) -> PipelineRequest {
    let nets = components("SD3ControlNetModel", nets.iter().map(|name| FOLDER.path().join(name)));
    PipelineRequest {
        components: BTreeMap::from([("controlnet".to_owned(), nets)]),
        ..sd3::request(class, FOLDER.path().join("model"))
    }
}

/// A call with so many encoded prompts. Texts among the arguments that name a picture of the fixtures stand for it.
fn call(rows: usize, more: Value) -> Arguments {
    let mut arguments = Arguments::default();
    let mut number = 0;
    let mut handle = |artifact| {
        arguments.artifacts.insert(number, artifact);
        number += 1;
        ArtifactRef(number - 1).to_value()
    };
    let Value::Object(mut values) = call_values(with_pictures(more, &mut handle)) else { panic!("an object") };
    for (name, prompt) in encoded_prompts(11, rows) {
        values.insert(name.to_owned(), handle(prompt));
    }
    Arguments { values, ..arguments }
}

fn with_pictures(value: Value, handle: &mut dyn FnMut(Artifact) -> Value) -> Value {
    match value {
        Value::String(name) => handle(fixture_picture(&name)),
        Value::Array(items) => items.into_iter().map(|item| with_pictures(item, handle)).collect(),
        Value::Object(entries) => {
            entries.into_iter().map(|(name, entry)| (name, with_pictures(entry, handle))).collect()
        }
        other => other,
    }
}

/// The latents of one call.
fn run(request: &PipelineRequest, arguments: &Arguments) -> Result<Vec<f32>> {
    Ok(sd3::latents(&sd3::run(&mut load(request)?, arguments, 5)?))
}

fn refused(request: &PipelineRequest, arguments: &Arguments) -> String {
    run(request, arguments).expect_err("the call is wrong").to_string()
}

fn assert_latents(what: &str, latents: &[f32], expected: [f32; 16]) {
    sd3::assert_latents(what, latents, expected, TOLERANCE);
}

const PLAIN: &str = "StableDiffusion3ControlNetPipeline";
const INPAINTING: &str = "StableDiffusion3ControlNetInpaintingPipeline";

#[test]
fn nets_that_differ_act_together_as_in_the_reference() {
    // Each acts in half of the steps. The first decides what both are given, the shallower one how deep both reach.
    let call = call(
        1,
        json!({
            "control_image": ["edges", "scene"], "controlnet_conditioning_scale": [0.5, 0.7],
            "control_guidance_start": [0.0, 0.5], "control_guidance_end": [0.5, 1.0],
        }),
    );
    let shallow_first = [
        -0.943_976, 0.481_233, -0.157_373, 1.356_359, -2.999_897, 3.111_974, -3.755_692, 2.227_879, 3.102_782,
        -0.371_268, 2.535_213, 2.379_577, 1.796_145, -4.705_833, 1.224_900, -1.774_027,
    ];
    let deep_first = [
        3.779_538, -2.675_051, -0.589_627, 1.485_515, -4.853_353, 0.770_532, 4.607_794, 0.642_405, 1.425_161,
        -1.378_711, 2.157_606, -0.075_239, 2.223_779, -3.179_963, -4.931_099, 0.047_546,
    ];
    for (nets, expected) in [(["net-a", "net-b"], shallow_first), (["net-b", "net-a"], deep_first)] {
        let latents = run(&steered(PLAIN, &nets), &call).expect("the call is valid");
        assert_latents(nets[0], &latents, expected);
    }
}

#[test]
fn each_of_several_nets_may_have_a_picture_for_each_prompt() {
    let request = steered(PLAIN, &["net-b", "net-a"]);
    let lists = json!([["edges", "scene"], ["scene", "edges"]]);
    let call_with =
        |pictures: Value| call(2, json!({ "control_image": pictures, "controlnet_conditioning_scale": [0.5, 0.7] }));
    let expected = [
        0.446_994, 0.104_437, -3.502_390, 2.234_662, 2.826_386, -1.150_919, 0.736_577, -3.499_437, -3.347_646,
        -2.652_214, 6.684_119, 4.340_958, 4.432_392, 0.997_199, 0.555_585, 1.577_050,
    ];
    assert_latents("lists", &run(&request, &call_with(lists)).expect("the call is valid"), expected);
    let message = refused(&request, &call_with(json!(["edges", "scene", "edges"])));
    assert!(message.contains("3 entries for 2 ControlNets"), "{message}");
    let message = refused(&request, &call_with(json!([["edges", "scene", "edges"], "scene"])));
    assert!(message.contains("has 3 pictures for 2 prompt(s)"), "{message}");
}

#[test]
fn a_net_made_for_inpainting_paints_as_in_the_reference() {
    let painting = json!({ "control_image": "scene", "control_mask": "mask", "controlnet_conditioning_scale": 0.8 });
    let expected = [
        2.438_097, -2.564_938, -0.350_774, -1.130_192, -5.130_093, 1.832_399, 1.585_299, 2.176_139, 2.575_369,
        -3.450_902, 0.592_196, 0.324_633, 4.858_857, -1.627_816, -4.256_166, 1.354_237,
    ];
    let latents = run(&steered(INPAINTING, &["net-c"]), &call(1, painting.clone())).expect("the call is valid");
    assert_latents("painted", &latents, expected);

    let message = refused(&steered(INPAINTING, &["net-c"]), &call(1, json!({ "control_image": "scene" })));
    assert!(message.contains("`control_mask`") && message.contains("is missing"), "{message}");
    let message = refused(&steered(INPAINTING, &["net-a"]), &call(1, painting));
    assert!(message.contains("made for inpainting") && message.contains(PLAIN), "{message}");
    let message = refused(&steered(PLAIN, &["net-c"]), &call(1, json!({ "control_image": "scene" })));
    assert!(message.contains("made for inpainting") && message.contains(INPAINTING), "{message}");
}
