//! What requests become.

use serde_json::{Value, json};

use super::*;

fn request(method: &str, parameters: Value) -> Result<Request, Failure> {
    let line = json!({ "request_id": "r 1", "worker_type": "sdxl_worker", "method": method, "parameters": parameters });
    Request::read(line.as_object().expect("an object")).map_err(|(id, failure)| {
        assert!(id.is_some(), "the request had a name");
        failure
    })
}

fn prepared(method: &str, parameters: Value) -> Result<(Prepared, Value), Failure> {
    let prepared = Prepared::new(&request(method, parameters)?, Path::new("outputs"))?;
    let document = serde_json::from_str(&prepared.text).expect("JSON");
    Ok((prepared, document))
}

fn failure(method: &str, parameters: Value) -> Failure {
    prepared(method, parameters).expect_err("a failure")
}

#[test]
fn text2img_becomes_one_step_with_everything_it_says() {
    let (prepared, document) = prepared(
        "text2img",
        json!({
            "model_id": "builtin:landscapes", "prompt": "a sea", "negative_prompt": "a boat", "width": 128, "height": 64,
            "num_inference_steps": 3, "guidance_scale": 4.0, "scheduler": "EulerDiscreteScheduler", "seed": 7,
            "num_images": 2, "lora": { "enabled": true, "adapters": [{ "model_id": "a.safetensors", "weight": 0.5 }] },
        }),
    )
    .expect("a workflow");
    assert_eq!(prepared.output_dir, Path::new("outputs"));
    assert_eq!(
        document,
        json!({
            "id": "r_1",
            "seed": 7,
            "steps": [{
                "name": "stage1",
                "seed": 7,
                "pipeline": {
                    "configuration": { "component_type": "AutoPipelineForText2Image" },
                    "from_pretrained_arguments": { "model_name": "builtin:landscapes" },
                    "scheduler": { "configuration": { "scheduler_type": "EulerDiscreteScheduler" } },
                    "loras": [{ "model_name": "a.safetensors", "scale": 0.5 }],
                    "arguments": {
                        "prompt": "a sea", "negative_prompt": "a boat", "guidance_scale": 4.0,
                        "num_images_per_prompt": 2, "num_inference_steps": 3, "width": 128, "height": 64,
                    },
                },
                "result": { "content_type": "image/png", "file_base_name": "r_1-stage1" },
            }],
        })
    );
}

#[test]
fn stages_go_on_with_model_and_picture_of_the_one_before() {
    let stages = json!([
        { "method": "text2img", "parameters": { "model_id": "m.safetensors", "prompt": "a" } },
        { "method": "img2img", "parameters": { "prompt": "b", "strength": 0.5, "width": 64, "height": 64 } },
    ]);
    let (prepared, document) = prepared("batch", json!({ "stages": stages, "output": "base64" })).expect("a workflow");
    assert_eq!(prepared.stages, 2);
    let steps = document["steps"].as_array().expect("steps");
    assert_eq!(steps.len(), 3, "a step resizes");
    assert_eq!(steps[1]["task"]["arguments"]["image"], "previous_result:stage1");
    assert_eq!(steps[2]["pipeline"]["arguments"]["image"], "previous_result:stage2-size");
    assert_eq!(steps[2]["pipeline"]["from_pretrained_arguments"]["from_single_file"], "m.safetensors");
    assert!(steps[0].get("result").is_none() && steps[2].get("result").is_some());
}

#[test]
fn presets_name_a_scheduler_and_steps_that_the_request_can_override() {
    let call = |extra: Value| {
        let mut parameters = json!({ "model_id": "m", "prompt": "a", "scheduler": "best" });
        parameters.as_object_mut().expect("object").extend(extra.as_object().expect("object").clone());
        prepared("text2img", parameters).expect("a workflow").1["steps"][0]["pipeline"].clone()
    };
    assert_eq!(call(json!({}))["arguments"]["num_inference_steps"], 50);
    assert_eq!(call(json!({ "num_inference_steps": 9 }))["arguments"]["num_inference_steps"], 9);
    assert_eq!(call(json!({}))["scheduler"]["from_config_args"]["use_karras_sigmas"], true);
    assert!(call(json!({ "scheduler": "fast" })).get("scheduler").is_none());
}

#[test]
fn base64_pictures_become_files_and_results_come_back_as_base64() {
    let png = STANDARD.encode(b"\x89PNG bytes");
    let (prepared, document) =
        prepared("img2img", json!({ "model_id": "m", "prompt": "a", "image": png, "output": "base64" }))
            .expect("a workflow");
    let location = document["steps"][0]["pipeline"]["arguments"]["image"]["location"].as_str().expect("a path");
    assert_eq!(fs::read(location).expect("the file"), b"\x89PNG bytes");
    let file = PathBuf::from(location);
    let pictures = prepared.deliver(std::slice::from_ref(&file)).expect("pictures");
    assert_eq!(pictures[0].base64.as_deref(), Some(png.as_str()));
    drop(prepared);
    assert!(!file.exists(), "given pictures go with the request");
}

#[test]
fn a_named_file_gets_the_first_picture_and_numbers_the_others() {
    let folder = tempfile::tempdir().expect("a folder");
    let target = folder.path().join("x.jpg");
    let (prepared, document) =
        prepared("text2img", json!({ "model_id": "m", "prompt": "a", "output": target })).expect("a workflow");
    assert_eq!(document["steps"][0]["result"]["content_type"], "image/jpeg");
    fs::create_dir_all(&prepared.output_dir).expect("a folder");
    let files: Vec<PathBuf> = ["a", "b"].map(|name| prepared.output_dir.join(name)).into();
    for file in &files {
        fs::write(file, "picture").expect("a file");
    }
    let pictures = prepared.deliver(&files).expect("pictures");
    assert_eq!(pictures[0].path.as_deref(), Some(target.as_path()));
    assert_eq!(pictures[1].path, Some(folder.path().join("x-1.jpg")));
    drop(prepared);
    assert_eq!(fs::read_dir(folder.path()).expect("the folder").count(), 2, "nothing else is left behind");
}

#[test]
fn every_wrong_request_says_what_to_do() {
    for (method, parameters, part) in [
        ("text2img", json!({ "prompt": "a" }), "`model_id` is missing"),
        ("text2img", json!({ "model_id": "m" }), "`prompt` is missing"),
        ("text2img", json!({ "model_id": "m", "prompt": "a", "image": "x.png" }), "`image` has no effect"),
        ("text2img", json!({ "model_id": "m", "prompt": "a", "seed": -5 }), "`seed` is `-5`"),
        ("text2img", json!({ "model_id": "m", "prompt": "a", "scheduler": "quick" }), "`scheduler` is `quick`"),
        ("text2img", json!({ "model_id": "m", "prompt": "a", "output": "x.tga" }), "`.tga`"),
        ("text2img", json!({ "model_id": "m", "prompt": 5 }), "`parameters.prompt`"),
        ("text2img", json!({ "model_id": "m", "promt": "a" }), "unknown field `promt`"),
        ("img2img", json!({ "model_id": "m", "prompt": "a" }), "`image` is missing"),
        ("img2img", json!({ "model_id": "m", "prompt": "a", "image": "/no/where.png" }), "neither a file nor"),
        ("inpaint", json!({ "model_id": "m", "prompt": "a", "image": "Cargo.toml" }), "`mask_image` is missing"),
        ("batch", json!({}), "either `stages` or `requests`"),
        ("load", json!({}), "`parameters.model_id` is missing"),
        ("paint", json!({}), "`method` is `paint`"),
    ] {
        let failure = failure(method, parameters);
        assert!(failure.message.contains(part), "{method}: {}", failure.message);
        assert!(failure.remedy.is_some(), "{method}: {}", failure.message);
    }
}

#[test]
fn a_request_without_a_name_is_refused_without_one() {
    let line = json!({ "worker_type": "sdxl_worker", "method": "status" });
    let (id, failure) = Request::read(line.as_object().expect("an object")).expect_err("no name");
    assert!(id.is_none() && failure.message.contains("`request_id`"));
}

#[test]
fn a_model_loader_makes_no_pictures() {
    let line = json!({ "request_id": 4, "worker_type": "model_loader", "method": "text2img" });
    let (id, failure) = Request::read(line.as_object().expect("an object")).expect_err("no such method");
    assert_eq!(id.map(|id| id.to_string()).as_deref(), Some("4"));
    assert!(failure.message.contains("`model_loader`"));
}
