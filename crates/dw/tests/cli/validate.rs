//! `dw validate`: files, patterns, formats and exit codes.

use serde_json::Value;

use crate::Sandbox;

/// A workflow that every build can run.
const GOOD: &str = r#"{
  "id": "good",
  "variables": { "text": "hello" },
  "steps": [
    { "name": "code", "task": { "command": "qr_code", "arguments": { "qr_code_contents": "variable:text" } },
      "result": { "content_type": "image/png" } }
  ]
}"#;

/// The same with a variable that is not declared, on line 5.
const BAD: &str = r#"{
  "id": "bad",
  "variables": { "text": "hello" },
  "steps": [
    { "name": "code", "task": { "command": "qr_code", "arguments": { "qr_code_contents": "variable:txt" } },
      "result": { "content_type": "image/png" } }
  ]
}"#;

#[test]
fn a_good_workflow_is_said_to_be_valid() {
    let sandbox = Sandbox::new();
    sandbox.write("good.json", GOOD);
    let (out, err) = sandbox.run(&["validate", "good.json"]).exits(0);
    assert_eq!((out.as_str(), err.as_str()), ("Workflow validated successfully\n", ""));
}

#[test]
fn standard_input_can_be_validated() {
    let (out, _) = Sandbox::new().pipe(&["validate", "-"], GOOD).exits(0);
    assert_eq!(out, "Workflow validated successfully\n");
}

#[test]
fn a_finding_has_its_place_the_line_and_a_remedy() {
    let sandbox = Sandbox::new();
    sandbox.write("bad.json", BAD);
    let (out, _) = sandbox.run(&["validate", "bad.json"]).exits(1);
    assert!(out.contains("bad.json:5:"), "{out}");
    assert!(out.contains("error[") && out.contains("^^^^"), "{out}");
    assert!(out.contains("did you mean `variable:text`?"), "the declared variable is offered: {out}");
}

#[test]
fn all_files_are_checked_in_one_go_and_patterns_are_expanded() {
    let sandbox = Sandbox::new();
    for (name, text) in [("a/good.json", GOOD), ("a/bad.json", BAD), ("a/b/truncated.json", "{")] {
        sandbox.write(name, text);
    }
    let (out, _) = sandbox.run(&["validate", "a/**/*.json"]).exits(1);
    assert!(out.contains("good.json: valid"), "{out}");
    assert!(out.contains("bad.json: 1 error"), "{out}");
    assert!(out.contains("2 of 3 workflows cannot run"), "{out}");
}

#[test]
fn what_cannot_be_read_is_wrong_usage_and_the_rest_is_still_checked() {
    let sandbox = Sandbox::new();
    sandbox.write("good.json", GOOD);
    sandbox.write("bad.json", BAD);
    let (out, err) = sandbox.run(&["validate", "bad.json", "missing.json", "none*.json", "good.json"]).exits(2);
    assert!(out.contains("good.json: valid") && out.contains("bad.json:5:"), "{out}");
    assert!(err.contains("missing.json") && err.contains("no file matches `none*.json`"), "{err}");
}

#[test]
fn programs_get_one_json_array() {
    let sandbox = Sandbox::new();
    sandbox.write("good.json", GOOD);
    sandbox.write("bad.json", BAD);
    let (out, _) = sandbox.run(&["validate", "good.json", "bad.json", "--format", "json"]).exits(1);
    let findings: Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!(findings[0]["severity"], "error");
    assert_eq!(findings[0]["line"], 5);
    assert!(findings[0]["file"].as_str().is_some_and(|file| file.ends_with("bad.json")), "{out}");
    let (out, _) = sandbox.run(&["validate", "good.json", "--format", "json"]).exits(0);
    assert_eq!(out.trim(), "[]");
}

#[test]
fn github_gets_workflow_commands() {
    let sandbox = Sandbox::new();
    sandbox.write("bad.json", BAD);
    let (out, _) = sandbox.run(&["validate", "bad.json", "--format", "github"]).exits(1);
    assert!(out.starts_with("::error file=") && out.contains("bad.json,line=5,col="), "{out}");
}

#[test]
fn colours_appear_only_when_asked_for() {
    let sandbox = Sandbox::new();
    sandbox.write("bad.json", BAD);
    let (out, _) = sandbox.run(&["validate", "bad.json"]).exits(1);
    assert!(!out.contains('\u{1b}'), "{out}");
    let (out, _) = sandbox.run(&["validate", "bad.json", "--color", "always"]).exits(1);
    assert!(out.contains('\u{1b}'), "{out}");
}
