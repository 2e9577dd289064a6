//! `dw run`: files, streams, exit codes.

use serde_json::Value;

use crate::Sandbox;

/// One small QR code.
pub(crate) const CODE: &str = r#"{
  "id": "code",
  "variables": { "text": "hello", "side": 64 },
  "steps": [
    {
      "name": "draw",
      "task": {
        "command": "qr_code",
        "arguments": { "qr_code_contents": "variable:text", "width": "variable:side", "height": "variable:side" }
      },
      "result": { "content_type": "image/png" }
    }
  ]
}"#;

pub(crate) fn with_workflow() -> Sandbox {
    let sandbox = Sandbox::new();
    sandbox.write("code.json", CODE);
    sandbox
}

/// Lines of JSON.
fn events(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))).collect()
}

#[test]
fn paths_go_to_standard_output_and_the_rest_to_standard_error() {
    let sandbox = with_workflow();
    let (out, err) = sandbox.run(&["run", "code.json", "text=abc", "-o", "new/pictures"]).exits(0);
    let path = out.strip_suffix('\n').expect("one line");
    assert!(sandbox.path(path).is_file(), "{out}");
    assert!(err.contains("Created output directory: ") && err.contains("new/pictures"), "{err}");
    assert!(err.contains("[1/1] draw") && err.contains("Finished code in ") && err.contains(path), "{err}");
}

#[test]
fn quiet_means_silence_as_long_as_nothing_goes_wrong() {
    let sandbox = with_workflow();
    let (_, err) = sandbox.run(&["run", "code.json", "-q"]).exits(0);
    assert_eq!(err, "");
    let (_, err) = sandbox.run(&["run", "missing.json", "-q"]).exits(2);
    assert!(err.contains("Path does not exist"), "{err}");
}

#[test]
fn json_is_one_event_per_line_and_ends_with_the_summary() {
    let sandbox = with_workflow();
    let (out, _) = sandbox.run(&["run", "code.json", "--json", "--seed", "7"]).exits(0);
    let events = events(&out);
    assert_eq!(events[0]["event"], "run_started");
    assert_eq!(events[0]["seed"], 7);
    let last = events.last().expect("a last event");
    assert_eq!((&last["event"], &last["workflow"]), (&"run_finished".into(), &"code".into()));
    assert_eq!(last["files"].as_array().map(Vec::len), Some(1));
}

#[test]
fn json_says_why_a_run_could_not_be() {
    let sandbox = with_workflow();
    let (out, err) = sandbox.run(&["run", "code.json", "txt=1", "--json"]).exits(2);
    let events = events(&out);
    assert_eq!((events.len(), &events[0]["event"], &events[0]["exit_code"]), (1, &"run_failed".into(), &2.into()));
    assert_eq!(events[0]["findings"].as_array().map(Vec::len), Some(1));
    assert!(err.starts_with("Error validating workflow 'code.json': 1 error"), "{err}");
}

#[test]
fn a_workflow_can_come_from_standard_input() {
    let sandbox = Sandbox::new();
    let (out, _) = sandbox.pipe(&["run", "-", "text=abc"], CODE).exits(0);
    assert_eq!(out.lines().count(), 1);
}

#[test]
fn a_dry_run_says_what_would_run_and_writes_nothing() {
    let sandbox = with_workflow();
    let (out, _) = sandbox.run(&["run", "code.json", "--dry-run"]).exits(0);
    assert!(out.contains("[1/1] draw") && out.contains("task `qr_code`"), "{out}");
    assert!(!sandbox.path("outputs").exists());
}

#[test]
fn a_dry_run_reads_the_headers_of_files_and_fails_for_damaged_ones() {
    let sandbox = Sandbox::new();
    sandbox.write("cut.gguf", "GGUF\u{3}\0\0\0");
    let model = format!("{}/../../tests/parity/models/sd15", env!("CARGO_MANIFEST_DIR"));
    let workflow = serde_json::json!({
        "id": "cut",
        "steps": [{
            "name": "draw",
            "pipeline": {
                "configuration": { "component_type": "StableDiffusionPipeline" },
                "from_pretrained_arguments": { "model_name": model },
                "unet": {
                    "configuration": { "component_type": "UNet2DConditionModel" },
                    "from_pretrained_arguments": { "from_single_file": "cut.gguf" }
                },
                "arguments": { "prompt": "a boat" }
            },
            "result": { "content_type": "image/png" }
        }]
    });
    sandbox.write("cut.json", workflow.to_string());
    let (_, err) = sandbox.run(&["run", "cut.json", "--dry-run", "--offline", "--device", "cpu"]).exits(1);
    assert!(err.contains("cut.gguf`: ends within its header"), "{err}");
}

#[test]
fn an_unknown_variable_is_answered_with_the_declared_ones() {
    let sandbox = with_workflow();
    let (out, err) = sandbox.run(&["run", "code.json", "txt=1"]).exits(2);
    assert_eq!(out, "");
    assert!(err.contains("Unknown variable 'txt'; declared variables: side, text"), "{err}");
    assert!(err.contains("did you mean `text`?"), "{err}");
    assert!(!sandbox.path("outputs").exists());
}

#[test]
fn broken_json_is_one_message_with_its_place() {
    let sandbox = Sandbox::new();
    sandbox.write("broken.json", "{\n  \"id\": ");
    let (_, err) = sandbox.run(&["run", "broken.json"]).exits(2);
    assert!(err.contains("broken.json:2:"), "{err}");
    assert!(!err.contains("panicked"), "{err}");
}

#[test]
fn an_output_folder_that_cannot_be_made_is_a_failure() {
    let sandbox = with_workflow();
    sandbox.write("file", "");
    let (_, err) = sandbox.run(&["run", "code.json", "-o", "file/pictures"]).exits(1);
    assert!(err.contains("cannot create the output folder"), "{err}");
}

#[cfg(unix)]
#[test]
fn ctrl_c_keeps_the_finished_files_and_exits_with_130() {
    use std::{
        io::{BufRead, BufReader, Read},
        process::{Command, Stdio},
    };

    let sandbox = Sandbox::new();
    let inputs: Vec<_> =
        (0..5000).map(|number| serde_json::json!({ "qr_code_contents": number.to_string() })).collect();
    let workflow = serde_json::json!({ "id": "many", "steps": [{
        "name": "draw",
        "task": { "command": "qr_code", "inputs": inputs },
        "result": { "content_type": "image/png" },
    }]});
    sandbox.write("many.json", workflow.to_string());
    let mut command = sandbox.command(&["run", "many.json"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program runs");
    let mut paths = BufReader::new(child.stdout.take().expect("a pipe"));
    let mut first = String::new();
    paths.read_line(&mut first).expect("the first file");
    Command::new("kill").args(["-INT", &child.id().to_string()]).status().expect("a signal");
    let mut rest = String::new();
    paths.read_to_string(&mut rest).expect("the other files");
    let output = child.wait_with_output().expect("the program ends");
    assert_eq!(output.status.code(), Some(130));
    assert!(sandbox.path(first.trim()).is_file());
    assert!(rest.lines().count() < 4999 && rest.lines().all(|path| sandbox.path(path).is_file()));
    assert!(String::from_utf8_lossy(&output.stderr).contains("Cancelled: "));
}
