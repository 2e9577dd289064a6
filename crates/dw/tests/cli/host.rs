//! `dw worker --stdio`: the program as another program's worker.

use serde_json::{Value, json};

use super::Sandbox;

fn picture(id: &str, more: Value) -> String {
    let mut parameters = json!({
        "model_id": "builtin:landscapes", "prompt": "a sea at night", "width": 64, "height": 64,
        "num_inference_steps": 2, "guidance_scale": 1.0, "seed": 3,
    });
    parameters.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    json!({ "request_id": id, "worker_type": "sdxl_worker", "method": "text2img", "parameters": parameters })
        .to_string()
}

/// Speaks to a worker and hands out what it answers; its last line ends with the input.
fn conversation(sandbox: &Sandbox, lines: &[String]) -> Vec<Value> {
    let words = ["worker", "--stdio", "--offline", "--device", "cpu"];
    let (out, _) = sandbox.pipe(&words, &(lines.join("\n") + "\n")).exits(0);
    out.lines().map(|line| serde_json::from_str(line).expect("one JSON object a line")).collect()
}

#[test]
fn pictures_are_written_where_a_request_says_and_models_stay() {
    let sandbox = Sandbox::new();
    let answers = conversation(
        &sandbox,
        &[picture("a", json!({ "output": "first.png" })), picture("b", json!({ "output": "second.webp" }))],
    );
    assert_eq!(answers[0]["type"], "ready");
    let results: Vec<&Value> = answers.iter().filter(|answer| answer["type"] == "request_result").collect();
    assert_eq!(results.len(), 2, "{answers:#?}");
    let file = |answer: &Value| {
        let path = answer["result"]["images"][0]["path"].as_str().expect("a path").to_owned();
        image::open(sandbox.path(path)).expect("a picture").to_rgb8()
    };
    assert_eq!(file(results[0]).dimensions(), (64, 64));
    assert!(sandbox.path("first.png").is_file());
    assert_eq!(results[1]["result"]["images"][0]["content_type"], "image/webp");
    assert!(!answers.iter().any(|answer| answer["type"] == "request_loading" && answer["request_id"] == "b"));
}

#[test]
fn a_bad_line_and_a_bad_request_get_an_error_and_the_next_one_a_picture() {
    let sandbox = Sandbox::new();
    let answers = conversation(
        &sandbox,
        &[
            "{ this is no JSON".to_owned(),
            picture("unknown", json!({ "scheduler": "EulerDiscretScheduler" })),
            picture("size", json!({ "width": 63 })),
            picture("good", json!({ "output": "base64" })),
        ],
    );
    let error = |id: Value| {
        let found = answers.iter().find(|answer| answer["type"] == "request_error" && answer["request_id"] == id);
        found.unwrap_or_else(|| panic!("{id}: {answers:#?}"))["error"].clone()
    };
    assert_eq!(error(Value::Null)["code"], "bad_line");
    let scheduler = error(json!("unknown"));
    assert!(scheduler.to_string().contains("EulerDiscreteScheduler"), "{scheduler}");
    assert!(error(json!("size")).to_string().contains("63"));
    let good = answers.iter().find(|answer| answer["type"] == "request_result").expect("a result");
    assert_eq!(good["request_id"], "good");
    assert!(good["result"]["images"][0]["base64"].is_string());
}
