//! Wrong and unusual command lines.

use crate::Sandbox;

#[test]
fn without_arguments_the_help_is_shown_and_the_exit_code_is_2() {
    let (_, err) = Sandbox::new().run(&[]).exits(2);
    for command in ["run", "validate", "schema", "pipelines", "doctor", "inspect", "rerun", "bench", "completions"] {
        assert!(err.contains(&format!("  {command}")), "{err}");
    }
}

#[test]
fn the_version_names_what_the_build_can_do() {
    let (out, _) = Sandbox::new().run(&["--version"]).exits(0);
    assert!(out.starts_with(&format!("dw {} (features: cpu", env!("CARGO_PKG_VERSION"))), "{out}");
}

#[test]
fn every_command_has_a_help_text() {
    let sandbox = Sandbox::new();
    let commands =
        ["run", "validate", "schema", "pipelines", "schedulers", "tasks", "doctor", "inspect", "rerun", "bench"];
    for command in commands {
        let (out, _) = sandbox.run(&[command, "--help"]).exits(0);
        assert!(out.contains("Usage: dw "), "{command}: {out}");
    }
}

#[test]
fn a_variable_that_is_not_name_equals_value_is_wrong_usage() {
    let sandbox = Sandbox::new();
    sandbox.write("w.json", "{}");
    let (_, err) = sandbox.run(&["run", "w.json", "prompt"]).exits(2);
    assert!(err.contains("Error: Variable 'prompt' is not in name=value format"), "{err}");
    let (_, err) = sandbox.run(&["run", "w.json", "bad;name=1"]).exits(2);
    assert!(err.contains("Error: Invalid variable input: Invalid variable name: bad;name"), "{err}");
}

#[test]
fn a_missing_workflow_is_wrong_usage_and_named_in_full() {
    let sandbox = Sandbox::new();
    let (_, err) = sandbox.run(&["run", "missing.json"]).exits(2);
    assert!(err.contains("Path does not exist: ") && err.contains("missing.json"), "{err}");
    assert!(!sandbox.path("outputs").exists(), "nothing is created for a run that cannot be");
}

#[test]
fn a_folder_is_not_a_workflow() {
    let sandbox = Sandbox::new();
    sandbox.write("folder/w.json", "{}");
    let (_, err) = sandbox.run(&["run", "folder"]).exits(2);
    assert!(err.contains("`folder` is a folder"), "{err}");
}

#[test]
fn an_unknown_device_or_seed_is_wrong_usage() {
    let sandbox = Sandbox::new();
    let (_, err) = sandbox.run(&["run", "w.json", "--device", "gpu"]).exits(2);
    assert!(err.contains("cuda:N"), "{err}");
    let (_, err) = sandbox.run(&["run", "w.json", "--seed", "x"]).exits(2);
    assert!(err.contains("--seed 42"), "{err}");
}

#[test]
fn completions_are_written_for_every_shell() {
    let sandbox = Sandbox::new();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let (out, _) = sandbox.run(&["completions", shell]).exits(0);
        assert!(out.contains("validate") && out.contains("dry-run"), "{shell}");
    }
}

#[cfg(unix)]
#[test]
fn a_reader_that_went_away_ends_the_program_quietly() {
    use std::process::Stdio;

    let sandbox = Sandbox::new();
    let mut command = sandbox.command(&["completions", "bash"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program runs");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("the program ends");
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    assert_eq!(output.status.code(), Some(0));
}

#[cfg(unix)]
#[test]
fn an_argument_that_is_not_utf_8_is_refused_in_words() {
    use std::{ffi::OsStr, os::unix::ffi::OsStrExt};

    let sandbox = Sandbox::new();
    sandbox.write("w.json", "{}");
    let mut command = sandbox.command(&["run", "w.json"]);
    let output = command.arg(OsStr::from_bytes(b"prompt=\xff")).output().expect("the program runs");
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("is not UTF-8 text"), "{output:?}");
}

#[test]
fn a_benchmark_has_cold_and_warm_times_and_leaves_no_files() {
    let sandbox = crate::run::with_workflow();
    let (out, err) = sandbox.run(&["bench", "code.json", "--runs", "2", "--json"]).exits(0);
    let benchmark: serde_json::Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!(benchmark["runs"].as_array().map(Vec::len), Some(3));
    assert!(benchmark["stages"].as_array().is_some_and(|stages| stages.iter().any(|row| row["stage"] == "total")));
    assert!(err.contains("warm run 2 of 2"), "{err}");
    assert!(!sandbox.path("outputs").exists());
}
