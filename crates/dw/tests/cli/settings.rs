//! Settings files, environment variables and the log.

use serde_json::Value;

use crate::Sandbox;

/// What `dw doctor` says, and whether it found everything in order.
fn doctor(sandbox: &Sandbox) -> (Value, i32) {
    let outcome = sandbox.run(&["doctor", "--json"]);
    let code = outcome.code.expect("an exit code");
    (serde_json::from_str(&outcome.out).unwrap_or_else(|error| panic!("{error}: {outcome:#?}")), code)
}

#[test]
fn without_a_settings_file_defaults_hold() {
    let (report, code) = doctor(&Sandbox::new());
    assert_eq!(code, 0, "{report:#}");
    assert_eq!(report["settings_found"], false);
    assert_eq!(report["version"], env!("CARGO_PKG_VERSION"));
}

#[cfg(target_os = "linux")]
#[test]
fn the_settings_file_in_the_configuration_folder_is_read() {
    let sandbox = Sandbox::new();
    sandbox.write(".config/dw/settings.json", r#"{"device": "cpu", "log_filename": "my.log"}"#);
    let (report, _) = doctor(&sandbox);
    assert_eq!(report["settings_found"], true);
    assert_eq!(report["device"], "cpu");
    assert!(report["log_file"].as_str().is_some_and(|path| path.ends_with(".config/dw/my.log")), "{report:#}");
    assert!(sandbox.path(".config/dw/my.log").exists());
}

#[test]
fn the_settings_file_of_diffusers_workflow_is_the_fallback() {
    let sandbox = Sandbox::new();
    sandbox.write(".diffusers_helper/settings.json", r#"{"device": "cpu"}"#);
    assert_eq!(doctor(&sandbox).0["device"], "cpu");

    let elsewhere = Sandbox::new();
    let sandbox = Sandbox::new().set("DIFFUSERS_HELPER_ROOT", elsewhere.path("").display().to_string());
    elsewhere.write("settings.json", r#"{"device": "cpu"}"#);
    assert_eq!(doctor(&sandbox).0["device"], "cpu");
}

#[test]
fn a_broken_settings_file_is_a_warning_and_no_more() {
    let sandbox = Sandbox::new();
    sandbox.write(".diffusers_helper/settings.json", "{ not json");
    let (_, err) = sandbox.run(&["doctor"]).exits(0);
    assert!(err.contains("Warning:") && err.contains("invalid settings file"), "{err}");
}

#[test]
fn the_environment_beats_the_settings() {
    let sandbox = Sandbox::new().set("DW_DEVICE", "cuda:7");
    sandbox.write(".diffusers_helper/settings.json", r#"{"device": "cpu"}"#);
    let (report, code) = doctor(&sandbox);
    assert_eq!(code, 1, "a device that this build does not have is a problem: {report:#}");
    let problems = report["problems"].to_string();
    assert!(problems.contains("cuda") || problems.contains("CUDA"), "{report:#}");
}

#[test]
fn variables_in_an_env_file_are_seen_but_do_not_replace_real_ones() {
    let sandbox = Sandbox::new();
    sandbox.write(".env", "HF_TOKEN=hf_secret\nDW_DEVICE=nonsense\n");
    let (report, code) = doctor(&sandbox);
    assert_eq!((code, &report["hub_token"]), (1, &Value::Bool(true)), "{report:#}");
    assert!(!report.to_string().contains("hf_secret"), "a token is never printed");

    let sandbox = Sandbox::new().set("DW_DEVICE", "cpu");
    sandbox.write(".env", "DW_DEVICE=nonsense\n");
    let (report, code) = doctor(&sandbox);
    assert_eq!((code, &report["device"]), (0, &Value::from("cpu")), "{report:#}");
}

#[test]
fn the_log_goes_where_it_is_asked_to_go() {
    let sandbox = Sandbox::new();
    sandbox.write("w.json", "{}");
    let _ = sandbox.run(&["run", "w.json", "--log-file", "here/my.log", "-l", "debug"]);
    let log = fs_err::read_to_string(sandbox.path("here/my.log")).expect("the log");
    assert!(log.contains(" [INFO] (dw"), "{log}");
}

#[test]
fn a_log_file_that_was_asked_for_must_be_writable() {
    let sandbox = Sandbox::new();
    sandbox.write("file", "");
    let (_, err) = sandbox.run(&["schema", "--log-file", "file/my.log"]).exits(2);
    assert!(err.contains("cannot write the log file"), "{err}");
}
