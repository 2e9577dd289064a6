//! The main job from outside: the program, the workflow of the README and the model inside, with nothing
//! else on the machine. Prompts must show in the pictures.

mod scene;

use std::{path::Path, process::Command};

use scene::Scene;

/// The picture that `examples/landscape.json` makes of a prompt.
fn picture(prompt: &str) -> Scene {
    let home = tempfile::tempdir().expect("a temporary folder");
    let workflow = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/landscape.json");
    let workflow = workflow.canonicalize().expect("the example is in the repository");
    let mut command = Command::new(env!("CARGO_BIN_EXE_dw"));
    command.arg("run").arg(workflow).arg(format!("prompt={prompt}")).args(["--seed", "3", "--offline"]);
    command.current_dir(&home).env_clear().env("HOME", home.path()).env("USERPROFILE", home.path());
    let output = command.output().expect("the program runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let file = home.path().join("outputs/landscape-paint.0-0.0.png");
    Scene(image::open(file).expect("a picture").to_rgb8())
}

#[test]
fn the_workflow_of_the_readme_paints_a_sunset_over_the_sea() {
    let doubts = picture("a sunset over the sea, a sun and a boat").doubts_about_sunset_over_sea();
    assert!(doubts.is_empty(), "{doubts:?}");
}

#[test]
fn the_time_of_day_in_a_prompt_shows_in_the_picture() {
    let [day, sunset, night] = ["day", "sunset", "night"].map(|time| picture(&format!("the sea at {time}")));
    let (cold, warm) = (day.warmth(), sunset.warmth());
    assert!(warm - cold > 30.0, "the sky at sunset ({warm:.0}) is redder than at day ({cold:.0})");
    let (light, dark) = (day.brightness(), night.brightness());
    assert!(light - dark > 30.0, "day ({light:.0}) is brighter than night ({dark:.0})");
}
