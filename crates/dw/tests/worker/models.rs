//! What is loaded, what is kept, and what is given up.

use std::{collections::BTreeSet, path::Path};

use dw_engine::worker::Supervisor;
use serde_json::{Value, json};

use crate::{Home, Run};

const REUSING: &str = "Reusing loaded models from cache: ";

/// The same weights as the built-in model's, as files.
fn set_model_to_folder(workflow: &mut Value) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../dw-pipelines/builtin/landscapes");
    let folder = folder.canonicalize().expect("the model's files lie in the repository");
    workflow["steps"][0]["pipeline"]["from_pretrained_arguments"]["model_name"] = json!(folder);
}

#[track_caller]
fn reuses_everything(run: &Run) {
    run.succeeds();
    assert!(run.loaded().is_empty() && run.says(REUSING), "{:#?}", run.updates);
}

#[test]
fn a_second_run_reads_nothing_and_says_what_it_reuses() {
    let home = Home::new();
    let mut supervisor = home.supervisor();
    let job = home.job(&home.landscape("a.json", |_| {}));
    let first = Run::of(&mut supervisor, &job);
    assert_eq!(first.succeeds().run_count, 1);
    assert!(first.loaded().contains(&"unet") && first.is_new() && !first.says(REUSING), "{:#?}", first.updates);
    let second = Run::of(&mut supervisor, &job);
    reuses_everything(&second);
    assert!(second.says("unet") && !second.is_new());
    assert_eq!(second.succeeds().run_count, 2);
    assert_eq!(supervisor.ping(), Ok(2));
    assert_eq!(second.succeeds().summary.files, first.succeeds().summary.files);
}

#[test]
fn editing_the_prompt_reads_nothing_and_editing_the_model_does() {
    let home = Home::new();
    let mut supervisor = home.supervisor();
    let job = home.job(&home.landscape("a.json", |_| {}));
    let kept = Run::of(&mut supervisor, &job).succeeds().memory.components.len();
    home.landscape("a.json", |workflow| workflow["steps"][0]["pipeline"]["arguments"]["prompt"] = json!("a boat"));
    let other_prompt = Run::of(&mut supervisor, &job);
    reuses_everything(&other_prompt);
    assert!(other_prompt.is_new() && other_prompt.says("Workflow file changed"));
    home.landscape("a.json", set_model_to_folder);
    let other_model = Run::of(&mut supervisor, &job);
    let memory = &other_model.succeeds().memory;
    assert!(other_model.loaded().contains(&"unet") && !other_model.says(REUSING), "{:#?}", other_model.updates);
    assert_eq!(memory.components.len(), kept, "the model that no file names any more was given up");
}

#[test]
fn a_second_workflow_on_the_same_model_reads_nothing_and_both_own_it() {
    let home = Home::new();
    let mut supervisor = home.supervisor();
    Run::of(&mut supervisor, &home.job(&home.landscape("a.json", |_| {}))).succeeds();
    let second = home.landscape("b.json", |workflow| workflow["id"] = json!("another"));
    let run = Run::of(&mut supervisor, &home.job(&second));
    reuses_everything(&run);
    let owners: BTreeSet<usize> = run.succeeds().memory.components.iter().map(|part| part.workflows.len()).collect();
    assert_eq!(owners, BTreeSet::from([2]));
}

#[test]
fn a_change_in_a_sub_workflow_is_a_change_of_the_workflow() {
    let home = Home::new();
    let mut supervisor = home.supervisor();
    home.landscape("child.json", |_| {});
    let caller = json!({ "id": "caller", "steps": [{ "name": "call", "workflow": { "path": "child.json" } }] });
    let job = home.job(&home.write("caller.json", &caller));
    Run::of(&mut supervisor, &job).succeeds();
    assert!(!Run::of(&mut supervisor, &job).is_new());
    home.landscape("child.json", set_model_to_folder);
    let changed = Run::of(&mut supervisor, &job);
    changed.succeeds();
    assert!(changed.is_new() && changed.loaded().contains(&"unet"));
}

#[test]
fn beyond_the_budget_the_model_that_was_used_last_stays() {
    let home = Home::new();
    let mut launch = home.launch();
    // The built-in model has about 12 MB.
    launch.cache_budget = Some(16_000_000);
    let mut supervisor = Supervisor::new(launch);
    let (a, b) = (home.landscape("a.json", |_| {}), home.landscape("b.json", set_model_to_folder));
    for workflow in [&a, &b] {
        let run = Run::of(&mut supervisor, &home.job(workflow));
        assert!(run.succeeds().memory.allocated <= 16_000_000 && run.loaded().contains(&"unet"));
    }
    reuses_everything(&Run::of(&mut supervisor, &home.job(&b)));
    assert!(Run::of(&mut supervisor, &home.job(&a)).loaded().contains(&"unet"));
}

#[test]
fn the_memory_report_has_real_numbers_and_clearing_gives_everything_up() {
    let home = Home::new();
    let mut supervisor = home.supervisor();
    let path = home.landscape("a.json", |_| {});
    let job = home.job(&path);
    Run::of(&mut supervisor, &job).succeeds();
    Run::of(&mut supervisor, &job).succeeds();
    let report = supervisor.memory().expect("a report");
    assert_eq!((report.device_name.as_str(), report.run_count), ("cpu", 2));
    let (rss, total) = (report.host_rss.expect("known"), report.total.expect("known"));
    assert!(report.allocated > 10_000_000 && rss > report.allocated && total > rss, "{report:#?}");
    assert!(report.free.is_some() && report.growth_since_last_run.is_some());
    let unet = report.components.iter().find(|part| part.name == "unet").expect("the UNet");
    assert_eq!(unet.class, "UNet2DConditionModel");
    let cleared = supervisor.clear_memory().expect("cleared");
    assert_eq!((cleared.allocated, cleared.components.len()), (0, 0));
    // The format's own REPL fails here.
    let again = Run::of(&mut supervisor, &job);
    again.succeeds();
    assert!(again.loaded().contains(&"unet"));
}
