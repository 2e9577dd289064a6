//! `dw inspect` and `dw rerun` on pictures that hold nothing.

use crate::Sandbox;

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
