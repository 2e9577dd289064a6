//! Whole conversations against the built-in model.

use std::{io::Cursor, path::Path, sync::Mutex};

use base64::{Engine as _, prelude::BASE64_STANDARD};

use super::*;
use crate::EngineConfig;

/// Everything that is said to these lines.
fn answers(lines: &[Value], folder: &Path) -> Vec<Value> {
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    spoken(text.into_bytes(), folder)
}

fn spoken(input: Vec<u8>, folder: &Path) -> Vec<Value> {
    let heard: Arc<Mutex<Vec<Value>>> = Arc::default();
    let ear = Arc::clone(&heard);
    let say: Say = Arc::new(move |line: &str| {
        ear.lock().expect("unbroken").push(serde_json::from_str(line).expect("one JSON object a line"));
        true
    });
    let config = EngineConfig { device: Some("cpu".into()), offline: true, cuda_noise: false, ignore_fit: false };
    let engine = Engine::new(config).expect("a CPU");
    let options = HostOptions { output_dir: folder.to_owned(), set_log_level: |_| Ok(()) };
    serve_lines(Cursor::new(input), say, engine, options).expect("no fault");
    let heard = heard.lock().expect("unbroken");
    heard.clone()
}

fn request(id: &str, method: &str, parameters: Value) -> Value {
    json!({ "request_id": id, "worker_type": "sdxl_worker", "method": method, "parameters": parameters })
}

fn tiny(extra: Value) -> Value {
    let mut parameters = json!({
        "model_id": "builtin:landscapes", "prompt": "a sea at night", "width": 64, "height": 64,
        "num_inference_steps": 2, "guidance_scale": 1.0, "seed": 3, "output": "base64",
    });
    parameters.as_object_mut().expect("object").extend(extra.as_object().expect("object").clone());
    parameters
}

/// The lines about one request, by type.
fn about<'a>(answers: &'a [Value], id: &str, kind: &str) -> Vec<&'a Value> {
    answers.iter().filter(|answer| answer["request_id"] == id && answer["type"] == kind).collect()
}

/// The first picture of a result, decoded.
fn pixels(answer: &Value) -> Vec<u8> {
    let text = answer["result"]["images"][0]["base64"].as_str().expect("text");
    let file = BASE64_STANDARD.decode(text).expect("base64");
    image::load_from_memory(&file).expect("a picture").to_rgb8().into_raw()
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a folder")
}

#[test]
fn requests_are_queued_and_each_gets_progress_and_one_result() {
    let folder = folder();
    let answers = answers(
        &[request("a", "text2img", tiny(json!({ "preview_every": 1 }))), request("b", "text2img", tiny(json!({})))],
        folder.path(),
    );
    assert_eq!(answers[0], json!({ "type": "ready", "device": "cpu" }));
    let (a, b) = (about(&answers, "a", "request_result"), about(&answers, "b", "request_result"));
    assert_eq!((a.len(), b.len()), (1, 1));
    assert!(pixels(a[0]) == pixels(b[0]), "the same seed, the same picture");
    assert_eq!(a[0]["result"]["seed"], 3);
    let progress = about(&answers, "a", "request_progress");
    assert_eq!(progress.len(), 2);
    assert!(progress.iter().all(|line| line["preview"].is_string() && line["of"] == 2), "{progress:?}");
    assert!(!about(&answers, "a", "request_loading").is_empty());
    assert!(about(&answers, "b", "request_loading").is_empty(), "the model was there");
    assert_eq!(std::fs::read_dir(folder.path()).expect("the folder").count(), 0, "base64 leaves no file");
}

#[test]
fn stages_go_on_from_each_other_in_one_request() {
    let folder = folder();
    let second = json!({ "prompt": "a sea at day", "strength": 0.5, "num_inference_steps": 4, "guidance_scale": 1.0 });
    let mut first = tiny(json!({}));
    first.as_object_mut().expect("object").remove("output");
    let stages = json!([
        { "method": "text2img", "parameters": first },
        { "method": "img2img", "parameters": second },
    ]);
    let line = request("two", "batch", json!({ "stages": stages, "output": folder.path().join("x.png") }));
    let answers = answers(&[line], folder.path());
    let result = about(&answers, "two", "request_result");
    let images = result[0]["result"]["images"].as_array().expect("images");
    assert_eq!(images.len(), 1);
    assert!(folder.path().join("x.png").is_file());
    let stages: Vec<u64> =
        about(&answers, "two", "request_progress").iter().filter_map(|line| line["stage"].as_u64()).collect();
    assert_eq!(stages, [1, 1, 2, 2]);
}

#[test]
fn bad_lines_get_an_error_line_and_the_next_one_is_served() {
    let folder = folder();
    let mut input = b"not json\n[1]\n{}\n\xff\xfe\n".to_vec();
    input.extend(
        b"{\"type\":\"dance\"}\n{\"request_id\":\"a\",\"method\":\"paint\",\"worker_type\":\"sdxl_worker\"}\n\n",
    );
    input.extend(b"{\"type\":\"ping\"}\n");
    let answers = spoken(input, folder.path());
    let codes: Vec<&str> = answers.iter().filter_map(|answer| answer["error"]["code"].as_str()).collect();
    assert_eq!(codes, ["bad_line", "bad_line", "bad_line", "bad_line", "bad_request", "bad_request"]);
    assert!(answers.iter().all(|answer| answer.get("error").is_none() || answer["error"]["remedy"].is_string()));
    assert_eq!(answers.last().expect("an answer"), &json!({ "type": "pong", "run_count": 0 }));
}

#[test]
fn a_request_that_cannot_run_says_why_and_the_next_one_runs() {
    let folder = folder();
    let wrong = request("a", "text2img", tiny(json!({ "model_id": "builtin:nothing" })));
    let odd = request("b", "text2img", tiny(json!({ "width": 65 })));
    let answers = answers(&[wrong, odd, request("c", "text2img", tiny(json!({})))], folder.path());
    let message = |id| about(&answers, id, "request_error")[0]["error"]["message"].as_str().expect("text").to_owned();
    assert!(message("a").contains("nothing"), "{}", message("a"));
    assert!(message("b").contains("width"), "{}", message("b"));
    assert_eq!(about(&answers, "c", "request_result").len(), 1);
}

#[test]
fn a_model_is_loaded_once_reported_and_given_up() {
    let folder = folder();
    let model = json!({ "model_id": "builtin:landscapes" });
    let lines = [
        request("load", "load", model.clone()),
        request("paint", "text2img", tiny(json!({}))),
        request("unload", "unload", model.clone()),
        request("again", "unload", model.clone()),
        request("reload", "load", model),
    ];
    let answers = answers(&lines, folder.path());
    let report = |id| about(&answers, id, "request_result")[0]["result"]["report"].clone();
    let names: Vec<Value> =
        report("load")["components"].as_array().expect("a list").iter().map(|part| part["name"].clone()).collect();
    assert!(names.contains(&json!("unet")), "{names:?}");
    assert!(about(&answers, "paint", "request_loading").is_empty());
    assert_eq!((report("unload"), report("again")), (json!({ "unloaded": true }), json!({ "unloaded": false })));
    assert!(!about(&answers, "reload", "request_loading").is_empty());
}

#[test]
fn waiting_requests_can_be_cancelled_and_shutdown_answers_those_that_remain() {
    let folder = folder();
    let lines = [
        request("a", "text2img", tiny(json!({ "num_inference_steps": 40 }))),
        request("b", "text2img", tiny(json!({}))),
        request("c", "text2img", tiny(json!({}))),
        request("x", "cancel", json!({ "request_id": "b" })),
        request("y", "cancel", json!({ "request_id": "nobody" })),
        json!({ "type": "shutdown" }),
    ];
    let answers = answers(&lines, folder.path());
    let code = |id| about(&answers, id, "request_error").first().map(|line| line["error"]["code"].clone());
    assert_eq!(code("b"), Some(json!("cancelled")));
    assert_eq!(about(&answers, "x", "request_result").len(), 1);
    assert_eq!(code("y"), Some(json!("unknown_request")));
    // `a` may have begun when the worker was told to stop.
    assert!(matches!(code("a"), Some(code) if code == "cancelled" || code == "shutting_down"), "{answers:?}");
    assert_eq!(code("c"), Some(json!("shutting_down")));
    assert_eq!(answers.last().expect("an answer"), &json!({ "type": "shutdown_complete" }));
}

#[test]
fn workflows_run_beside_plain_requests() {
    let folder = folder();
    let workflow = json!({
        "id": "w",
        "steps": [{
            "name": "code",
            "task": { "command": "qr_code", "arguments": { "qr_code_contents": "dw" } },
            "result": { "content_type": "image/png" },
        }],
    });
    let file = folder.path().join("w.json");
    std::fs::write(&file, workflow.to_string()).expect("written");
    let lines = [
        json!({ "type": "execute", "workflow_path": file, "output_dir": folder.path(), "request_id": "mine" }),
        json!({ "type": "execute", "workflow_path": folder.path().join("none.json"), "output_dir": folder.path() }),
        json!({ "type": "memory_status" }),
    ];
    let answers = answers(&lines, folder.path());
    let result = about(&answers, "mine", "request_result");
    assert_eq!(result[0]["method"], "execute");
    let path = result[0]["result"]["images"][0]["path"].as_str().expect("a path");
    assert!(Path::new(path).is_file());
    assert_eq!(about(&answers, "execute-1", "request_error")[0]["error"]["code"], "invalid_workflow");
    let report = answers.iter().find(|answer| answer["type"] == "memory_status").expect("a report");
    assert!(report["info"]["host_rss"].as_u64().is_some_and(|bytes| bytes > 0));
}

#[test]
fn a_host_that_no_longer_reads_ends_the_work() {
    let folder = folder();
    let lines: String = ["a", "b"]
        .map(|id| format!("{}\n", request(id, "text2img", tiny(json!({ "num_inference_steps": 50 })))))
        .concat();
    let said = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&said);
    let say: Say = Arc::new(move |line: &str| {
        counter.fetch_add(1, Ordering::SeqCst);
        !line.contains("request_progress")
    });
    let config = EngineConfig { device: Some("cpu".into()), offline: true, cuda_noise: false, ignore_fit: false };
    let options = HostOptions { output_dir: folder.path().to_owned(), set_log_level: |_| Ok(()) };
    let engine = Engine::new(config).expect("a CPU");
    serve_lines(Cursor::new(lines.into_bytes()), say, engine, options).expect("no fault");
    assert!(said.load(Ordering::SeqCst) < 100, "the first step's line was the last of its request");
}
