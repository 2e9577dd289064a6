//! `dw inspect` and `dw rerun` on pictures that hold nothing.

use serde_json::Value;

use crate::{Sandbox, run::with_workflow};

fn with_picture() -> Sandbox {
    let sandbox = Sandbox::new();
    image::RgbImage::new(4, 4).save(sandbox.path("plain.png")).expect("a picture");
    sandbox
}

#[test]
fn a_picture_that_does_not_say_how_it_was_made_is_a_failure_with_a_reason() {
    let sandbox = with_picture();
    for command in ["inspect", "rerun"] {
        let (_, err) = sandbox.run(&[command, "plain.png"]).exits(1);
        assert!(err.contains("`plain.png` does not say how it was made"), "{err}");
    }
}

#[test]
fn a_missing_picture_is_wrong_usage() {
    let (_, err) = Sandbox::new().run(&["inspect", "missing.png"]).exits(2);
    assert!(err.contains("Path does not exist"), "{err}");
}

#[test]
fn a_file_that_is_no_picture_is_named() {
    let sandbox = Sandbox::new();
    sandbox.write("notes.txt", "hello");
    let (_, err) = sandbox.run(&["inspect", "notes.txt"]).exits(1);
    assert!(err.contains("`notes.txt`"), "{err}");
}

#[test]
fn a_picture_tells_how_it_was_made_and_can_be_made_again() {
    let sandbox = with_workflow();
    let (out, _) = sandbox.run(&["run", "code.json", "text=first", "-o", "a"]).exits(0);
    let picture = out.trim();

    let (out, _) = sandbox.run(&["inspect", picture]).exits(0);
    assert!(out.contains("qr_code") && out.contains("first"), "{out}");
    let (out, _) = sandbox.run(&["inspect", picture, "--json"]).exits(0);
    let metadata: Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!((&metadata["workflow_id"], &metadata["step_name"]), (&"code".into(), &"draw".into()));

    let again = |words: &[&str], folder: &str| {
        let words = [&["rerun", picture, "-o", folder], words].concat();
        let (out, _) = sandbox.run(&words).exits(0);
        image::open(sandbox.path(out.trim())).expect("a picture").into_rgb8()
    };
    let original = image::open(sandbox.path(picture)).expect("a picture").into_rgb8();
    assert_eq!(again(&[], "b"), original);
    assert_ne!(again(&["text=second"], "c"), original);
}

#[test]
fn a_picture_without_metadata_is_had_by_asking() {
    let sandbox = with_workflow();
    let (out, _) = sandbox.run(&["run", "code.json", "--no-metadata"]).exits(0);
    sandbox.run(&["inspect", out.trim()]).exits(1);
}
