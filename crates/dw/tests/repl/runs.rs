//! Runs in one worker: what is loaded stays loaded.

use crate::Talk;

/// Whether a run read any weights.
fn loads(heard: &str) -> bool {
    heard.lines().any(|line| line.starts_with("  loading "))
}

#[test]
fn a_second_run_and_one_with_another_prompt_load_nothing() {
    let mut talk = Talk::start();
    let first = talk.run();
    assert!(loads(&first), "{first}");
    let second = talk.run();
    assert!(!loads(&second), "{second}");
    assert!(second.contains("Reusing loaded models from cache"), "{second}");

    talk.say("arg set prompt=\"a desert at night\"");
    let other = talk.run();
    assert!(!loads(&other), "{other}");

    let file = talk.path("paint.json");
    let text = fs_err::read_to_string(&file).expect("the workflow");
    fs_err::write(&file, text.replace("mountains at day", "the sea at day")).expect("edited");
    talk.say("arg clear");
    let edited = talk.run();
    assert!(!loads(&edited), "{edited}");

    let picture = talk.path("outputs/landscape-paint.0-0.0.png");
    let metadata = dw_core::metadata::read(&picture).expect("a picture").expect("metadata").to_value().to_string();
    assert!(metadata.contains("the sea at day"), "the edited prompt was used: {metadata}");

    talk.say("memory show");
    let memory = talk.settle();
    assert!(memory.contains("Runs in this session: 4") && memory.contains("unet"), "{memory}");
    talk.say("memory clear");
    let cleared = talk.settle();
    assert!(cleared.contains("Memory cleared successfully") && cleared.contains("Loaded: nothing"), "{cleared}");
    let after = talk.run();
    assert!(loads(&after), "a run after `memory clear` loads again: {after}");
    assert_eq!(talk.end(), Some(2), "the signs that the test asks for are unknown commands");
}

#[test]
fn a_seed_that_is_kept_makes_the_same_picture() {
    let mut talk = Talk::start();
    let read = |talk: &Talk| image::open(talk.path("outputs/landscape-paint.0-0.0.png")).expect("a picture").to_rgb8();
    talk.run();
    let first = read(&talk);
    talk.say("seed keep");
    talk.run();
    assert!(first == read(&talk), "the same seed makes the same picture");
    talk.say("seed random");
    talk.run();
    assert!(first != read(&talk), "another seed makes another picture");
}

#[test]
fn previews_are_written_during_the_run() {
    let mut talk = Talk::start();
    talk.say("config set preview_every 1");
    let heard = talk.run();
    assert!(heard.contains("preview after 1/2: "), "{heard}");
    assert!(image::open(talk.path("outputs/preview.png")).is_ok());
}

#[test]
fn a_run_that_fails_is_told_and_the_next_one_runs() {
    let mut talk = Talk::start();
    fs_err::write(talk.path("file"), "").expect("a file");
    talk.say("config set output_dir file");
    talk.say("workflow run");
    let heard = talk.settle();
    assert!(heard.contains("Output path exists but is not a directory"), "{heard}");
    talk.say("config set output_dir outputs");
    talk.run();
}
