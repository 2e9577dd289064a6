//! `dw quantize`: what it writes loads, and what it refuses leaves nothing behind.

use serde_json::json;

use super::{Outcome, Sandbox};

fn model() -> String {
    format!("{}/../../tests/parity/models/sd15", env!("CARGO_MANIFEST_DIR"))
}

fn draws(sandbox: &Sandbox, model: &str) -> Outcome {
    let workflow = json!({
        "id": "small",
        "steps": [{
            "name": "draw", "seed": 1,
            "pipeline": {
                "configuration": { "component_type": "StableDiffusionPipeline" },
                "from_pretrained_arguments": { "model_name": model },
                "arguments": { "prompt": "a boat", "num_inference_steps": 2, "width": 64, "height": 64 }
            },
            "result": { "content_type": "image/png" }
        }]
    });
    sandbox.write("small.json", workflow.to_string());
    sandbox.run(&["run", "small.json", "--offline", "--device", "cpu", "--quiet"])
}

#[test]
fn a_quantized_model_loads_as_any_other() {
    for (format, file) in [("q8_0", "diffusion_pytorch_model.gguf"), ("nf4", "diffusion_pytorch_model.safetensors")] {
        let sandbox = Sandbox::new();
        let (out, _) = sandbox.run(&["quantize", &model(), "--to", format, "-o", "small-model"]).exits(0);
        assert!(out.contains("unet: ") && out.contains(&format!("matrices in {format}")), "{out}");
        assert!(sandbox.path("small-model/unet").join(file).is_file());
        draws(&sandbox, "small-model").exits(0);
    }
}

#[test]
fn a_single_file_becomes_the_folder_of_a_component() {
    let sandbox = Sandbox::new();
    let file = format!("{}/unet/diffusion_pytorch_model.safetensors", model());
    let config = model();
    let words = ["quantize", file.as_str(), "--to", "q8_0", "-o", "unet-q8"];
    let quantize = |more: &[&str]| sandbox.run(&[&words[..], more].concat());
    let (_, error) = quantize(&["--component", "vae"]).exits(1);
    assert!(error.contains("no component `vae`; it holds `unet`"), "{error}");
    let (out, _) = quantize(&["--config", &config]).exits(0);
    assert!(out.contains("unet: "), "{out}");
    assert!(sandbox.path("unet-q8/config.json").is_file());
    let (out, _) = sandbox.run(&["quantize", &model(), "--to", "q8_0", "-o", "whole-q8"]).exits(0);
    assert!(out.contains("unet: "), "{out}");
    let bytes =
        |folder: &str| fs_err::read(sandbox.path(folder).join("diffusion_pytorch_model.gguf")).expect("written");
    assert!(bytes("unet-q8") == bytes("whole-q8/unet"), "the file and the folder hold the same model");
}

#[test]
fn what_cannot_be_quantized_is_said_and_leaves_nothing() {
    let sandbox = Sandbox::new();
    let (_, error) = sandbox.run(&["quantize", &model(), "--to", "q9_k", "-o", "new"]).exits(2);
    assert!(error.contains("q9_k") && error.contains("q4_k"), "{error}");
    let (_, error) = sandbox.run(&["quantize", "nowhere", "--to", "q8_0", "-o", "new"]).exits(1);
    assert!(error.contains("nowhere"), "{error}");
    sandbox.write("full/file", "kept");
    let (_, error) = sandbox.run(&["quantize", &model(), "--to", "q8_0", "-o", "full"]).exits(1);
    assert!(error.contains("is there already"), "{error}");
    sandbox.write("cut/config.json", "{}");
    sandbox.write("cut/model.safetensors", "not a header");
    let (_, error) = sandbox.run(&["quantize", "cut", "--to", "q8_0", "-o", "new"]).exits(1);
    assert!(error.contains("model.safetensors"), "{error}");
    assert!(!sandbox.path("new").exists());
    let left = fs_err::read_dir(sandbox.path(".")).expect("the folder").flatten();
    assert!(left.map(|entry| entry.file_name()).all(|name| !name.to_string_lossy().ends_with(".tmp")));
}
