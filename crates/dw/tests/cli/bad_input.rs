//! Wrong input to pipelines: one clear message, before a model is loaded where that can be known.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::Sandbox;

fn fixtures() -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity");
    fs_err::canonicalize(path).expect("the fixtures are there")
}

fn model(name: &str) -> String {
    fixtures().join("models").join(name).to_string_lossy().into_owned()
}

fn picture(name: &str) -> Value {
    let location = fixtures().join("inputs").join(name);
    json!({ "media_type": "image", "location": location.to_string_lossy() })
}

/// A pipeline of Stable Diffusion 1 with these arguments.
fn pipeline(class: &str, arguments: &Value) -> Value {
    let mut all = json!({ "prompt": "a hill", "num_inference_steps": 2, "height": 64, "width": 64 });
    if class.contains("Img2Img") {
        all = json!({ "prompt": "a hill", "num_inference_steps": 2, "image": picture("scene_64x64.png") });
    }
    for (name, value) in arguments.as_object().expect("arguments") {
        all[name] = value.clone();
    }
    json!({
        "configuration": { "component_type": class },
        "from_pretrained_arguments": { "model_name": model("sd15") },
        "arguments": all
    })
}

fn run(pipeline: &Value) -> (Option<i32>, String) {
    let sandbox = Sandbox::new();
    let steps = json!([{ "name": "s", "seed": 1, "pipeline": pipeline, "result": { "content_type": "image/png" } }]);
    sandbox.write("w.json", json!({ "id": "w", "steps": steps }).to_string());
    let outcome = sandbox.run(&["run", "w.json", "--offline"]);
    (outcome.code, outcome.err)
}

/// The call ends with `code` and a message with all of `words`, and no weights are read.
#[track_caller]
fn refused(pipeline: &Value, code: i32, words: &[&str]) {
    let (found, err) = run(pipeline);
    assert_eq!(found, Some(code), "{err}");
    assert!(words.iter().all(|word| err.contains(word)), "{words:?}: {err}");
    assert!(!err.contains("loading"), "weights were read before: {err}");
    assert_eq!(err.matches("rror").count(), if code == 2 { 3 } else { 1 }, "one message: {err}");
}

const IMAGE_TO_IMAGE: &str = "StableDiffusionImg2ImgPipeline";
const INPAINT: &str = "StableDiffusionInpaintPipeline";
const TEXT_TO_IMAGE: &str = "StableDiffusionPipeline";

#[test]
fn steps_and_strengths_that_leave_nothing_to_do_are_refused() {
    let steps = |value: i32| pipeline(TEXT_TO_IMAGE, &json!({ "num_inference_steps": value }));
    refused(&steps(0), 2, &["`num_inference_steps`", "at least 1"]);
    let strength = |value: f64| pipeline(IMAGE_TO_IMAGE, &json!({ "strength": value }));
    refused(&strength(0.0), 2, &["`strength`", "above 0"]);
    refused(&strength(2.0), 2, &["`strength`", "at most 1"]);
    refused(&strength(0.3), 1, &["`strength`", "`0.3` of 2 steps leaves none"]);
}

#[test]
fn a_prompt_or_picture_that_is_missing_is_asked_for() {
    refused(&pipeline(TEXT_TO_IMAGE, &json!({ "prompt": null })), 1, &["`prompt`", "is missing"]);
    refused(&pipeline(INPAINT, &json!({ "image": picture("scene_64x64.png") })), 1, &["`mask_image`", "is missing"]);
    let mask = picture("mask_64x64.png");
    refused(&pipeline(INPAINT, &json!({ "mask_image": mask })), 1, &["`image`", "is missing"]);
}

#[test]
fn an_empty_prompt_is_remarked_on_and_runs() {
    let (code, err) = run(&pipeline(TEXT_TO_IMAGE, &json!({ "prompt": "" })));
    assert_eq!(code, Some(0), "{err}");
    assert!(err.contains("`prompt` is empty"), "{err}");
}

#[test]
fn a_mask_of_another_size_is_remarked_on_and_refused_where_only_its_surroundings_are_painted() {
    let mut arguments = json!({ "image": picture("scene_64x64.png"), "mask_image": picture("mask_128x128.png") });
    let (code, err) = run(&pipeline(INPAINT, &arguments));
    assert_eq!(code, Some(0), "{err}");
    assert!(err.contains("`mask_image` is `128 x 128` pixels and `image` `64 x 64`"), "{err}");
    arguments["padding_mask_crop"] = json!(4);
    refused(&pipeline(INPAINT, &arguments), 1, &["`mask_image`", "`128 x 128`", "`64 x 64`", "`padding_mask_crop`"]);
}

#[test]
fn a_scheduler_for_models_of_another_kind_is_refused() {
    for (class, kind) in [
        ("FlowMatchEulerDiscreteScheduler", "the velocity of a rectified flow"),
        ("FlowMatchHeunDiscreteScheduler", "the velocity of a rectified flow"),
        ("EDMEulerScheduler", "noise scaled as in EDM"),
    ] {
        let mut pipeline = pipeline(TEXT_TO_IMAGE, &json!({}));
        pipeline["scheduler"] = json!({ "configuration": { "scheduler_type": class } });
        refused(&pipeline, 1, &[class, kind, "`PNDMScheduler`"]);
    }
}

#[test]
fn a_dynamic_shift_that_no_pipeline_of_the_family_computes_is_refused() {
    let mut pipeline = pipeline(TEXT_TO_IMAGE, &json!({}));
    pipeline["scheduler"] = json!({
        "configuration": { "scheduler_type": "UniPCMultistepScheduler" },
        "from_config_args": { "use_dynamic_shifting": true }
    });
    refused(&pipeline, 1, &["`scheduler.use_dynamic_shifting`", "set it to false"]);
}

#[test]
fn a_controlnet_of_another_family_is_refused() {
    let arguments = json!({ "image": picture("edges_64x64.png") });
    let mut pipeline = pipeline("StableDiffusionControlNetPipeline", &arguments);
    let source = json!({ "model_name": model("sdxl-controlnet-a") });
    pipeline["controlnet"] =
        json!({ "configuration": { "component_type": "ControlNetModel" }, "from_pretrained_arguments": source });
    refused(&pipeline, 1, &["`controlnet`", "use a ControlNet made for this family"]);
}

#[test]
fn a_lora_of_another_family_is_refused() {
    let mut pipeline = pipeline(TEXT_TO_IMAGE, &json!({}));
    pipeline["loras"] = json!([{ "model_name": model("adapters"), "weight_name": "sdxl_lora_kohya.safetensors" }]);
    let (code, err) = run(&pipeline);
    assert_eq!(code, Some(1), "{err}");
    assert!(err.contains("choose a LoRA made for the model"), "{err}");
}

/// A copy of a fixture's model.
fn copy(from: &Path, to: &Path) {
    fs_err::create_dir_all(to).expect("a folder");
    for entry in fs_err::read_dir(from).expect("the fixtures are there") {
        let (path, name) = entry.map(|entry| (entry.path(), entry.file_name())).expect("a readable folder");
        if path.is_dir() {
            copy(&path, &to.join(name));
        } else {
            fs_err::copy(&path, to.join(name)).expect("a file");
        }
    }
}

#[test]
fn a_variant_that_some_components_have_is_read_for_those_and_remarked_on() {
    let mut with_variant = pipeline(TEXT_TO_IMAGE, &json!({}));
    with_variant["from_pretrained_arguments"]["variant"] = json!("fp16");
    refused(&with_variant, 1, &["no weights of variant `fp16`"]);

    let folder = tempfile::tempdir().expect("a temporary folder");
    copy(Path::new(&model("sd15")), folder.path());
    let weights = folder.path().join("unet/diffusion_pytorch_model.safetensors");
    fs_err::rename(&weights, weights.with_extension("fp16.safetensors")).expect("the weights");
    with_variant["from_pretrained_arguments"]["model_name"] = json!(folder.path().to_string_lossy());
    let (code, err) = run(&with_variant);
    assert_eq!(code, Some(0), "{err}");
    assert!(err.contains("`text_encoder`, `vae` of the model have no weights of variant `fp16`"), "{err}");
    with_variant["from_pretrained_arguments"]["variant"] = Value::Null;
    refused(&with_variant, 1, &["name the `variant`"]);
}
