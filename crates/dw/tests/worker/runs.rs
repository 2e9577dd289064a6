//! Runs: what they do, how they are stopped, and that a worker can do many.

use std::path::PathBuf;

use dw_core::{event::Event, seed::Seed};
use dw_engine::worker::{Supervisor, Update, WorkerError, WorkerLaunch};
use serde_json::json;

use crate::{Home, Run};

/// A picture without a model.
fn code(home: &Home, text: &str) -> PathBuf {
    home.write(
        "code.json",
        &json!({
            "id": "code",
            "variables": { "text": text },
            "steps": [{
                "name": "draw",
                "task": { "command": "qr_code", "arguments": { "qr_code_contents": "variable:text", "width": 64, "height": 64 } },
                "result": { "content_type": "image/png" }
            }]
        }),
    )
}

#[test]
fn variables_seed_and_folder_reach_the_run() {
    let home = Home::new();
    let mut supervisor = home.supervisor();
    let mut job = home.job(&code(&home, "one"));
    job.variables.insert("text".into(), json!("two"));
    job.seed = Some(Seed::One(11));
    job.output_dir = home.path("elsewhere/deep");
    let run = Run::of(&mut supervisor, &job);
    let summary = &run.succeeds().summary;
    assert_eq!((&summary.seed, summary.random_seed), (&Some(Seed::One(11)), false));
    assert_eq!(summary.files, [home.path("elsewhere/deep/code-draw.0-0.0.png")]);
    let embedded = fs_err::read(&summary.files[0]).expect("the picture");
    assert!(embedded.windows(3).any(|bytes| bytes == b"two"), "the metadata tells the variable");
    assert!(!run.says("Reusing"), "a task has no models to reuse");
}

#[test]
fn a_failed_or_invalid_run_leaves_the_worker_as_it_was() {
    let home = Home::new();
    let mut supervisor = home.supervisor();
    let good = home.job(&code(&home, "x"));
    Run::of(&mut supervisor, &good).succeeds();
    let worker = supervisor.process_id();
    let mut unknown = good.clone();
    unknown.variables.insert("txt".into(), json!("x"));
    match Run::of(&mut supervisor, &unknown).result {
        Err(WorkerError::Invalid { findings, .. }) => assert_eq!(findings[0].code, "unknown-variable"),
        other => panic!("{other:?}"),
    }
    let mut failing = good.clone();
    failing.output_dir = home.write("file", &json!("in the way"));
    match Run::of(&mut supervisor, &failing).result {
        Err(WorkerError::Failed { message }) => assert!(message.contains("Workflow execution error: "), "{message}"),
        other => panic!("{other:?}"),
    }
    Run::of(&mut supervisor, &good).succeeds();
    assert_eq!(supervisor.process_id(), worker);
}

#[test]
fn cancelling_stops_at_the_next_step_and_keeps_worker_and_models() {
    let home = Home::new();
    let mut supervisor = home.supervisor();
    let path = home.landscape("a.json", |workflow| {
        workflow["steps"][0]["pipeline"]["arguments"]["num_inference_steps"] = json!(500);
    });
    let run = Run::watched(&mut supervisor, &home.job(&path), |update, switch| {
        if matches!(update, Update::Event(Event::DenoiseStep { done: 2, .. })) {
            switch.press();
        }
    });
    assert_eq!(run.result, Err(WorkerError::Cancelled));
    assert!(run.events().filter(|event| matches!(event, Event::DenoiseStep { .. })).count() < 500);
    assert!(home.files().is_empty());
    assert_eq!(supervisor.ping(), Ok(0));
    let next = Run::of(&mut supervisor, &home.job(&home.landscape("b.json", |_| {})));
    next.succeeds();
    assert!(next.loaded().is_empty(), "{:#?}", next.updates);
}

#[test]
fn a_second_ctrl_c_kills_the_worker_and_the_next_run_has_a_fresh_one() {
    let home = Home::new();
    let mut supervisor = home.supervisor();
    let job = home.job(&home.landscape("a.json", |_| {}));
    let run = Run::watched(&mut supervisor, &job, |update, switch| {
        if matches!(update, Update::Event(Event::DenoiseStep { .. })) {
            switch.press();
            switch.press();
        }
    });
    assert_eq!(run.result, Err(WorkerError::Killed));
    assert!(!supervisor.is_running());
    assert_eq!(supervisor.memory(), Err(WorkerError::NotRunning));
    assert_eq!(Run::of(&mut supervisor, &job).succeeds().run_count, 1);
}

#[test]
fn previews_come_as_often_as_asked_for_and_are_small_pictures() {
    let home = Home::new();
    let mut supervisor = home.supervisor();
    let mut job = home.job(&home.landscape("a.json", |_| {}));
    job.preview_every = Some(2);
    let run = Run::of(&mut supervisor, &job);
    run.succeeds();
    let looks = run.updates.iter().filter_map(|update| match update {
        Update::Preview(preview) => Some(preview),
        _ => None,
    });
    let looks: Vec<_> = looks.collect();
    assert_eq!(looks.iter().map(|look| (look.step, look.of)).collect::<Vec<_>>(), [(2, 3), (3, 3)]);
    for look in looks {
        let picture = image::load_from_memory(&look.png).expect("a PNG");
        assert_eq!((picture.width(), picture.height()), (8, 8));
    }
    job.preview_every = None;
    let silent = Run::of(&mut supervisor, &job);
    assert!(!silent.updates.iter().any(|update| matches!(update, Update::Preview(_))));
}

#[test]
fn events_arrive_in_order_and_the_memory_comes_last() {
    let home = Home::new();
    let mut supervisor = home.supervisor();
    let run = Run::of(&mut supervisor, &home.job(&home.landscape("a.json", |_| {})));
    run.succeeds();
    let steps = run.events().filter_map(|event| match event {
        Event::DenoiseStep { done, of } => Some((*done, *of)),
        _ => None,
    });
    let steps: Vec<_> = steps.collect();
    assert_eq!(steps, [(1, 3), (2, 3), (3, 3)]);
    assert!(matches!(run.events().next(), Some(Event::RunStarted { .. })));
    assert!(matches!(run.updates.last(), Some(Update::Memory(_))));
}

#[test]
fn restarting_and_shutting_down_end_the_worker_in_order() {
    let home = Home::new();
    let mut supervisor = home.supervisor();
    assert!(!supervisor.is_running());
    assert_eq!(supervisor.ping(), Err(WorkerError::NotRunning));
    supervisor.start().expect("started");
    assert_eq!(supervisor.device_name(), Some("cpu"));
    let first = supervisor.process_id();
    supervisor.restart().expect("started again");
    assert!(supervisor.process_id().is_some() && supervisor.process_id() != first);
    supervisor.shutdown();
    assert!(!supervisor.is_running());
    let log = fs_err::read_to_string(home.path("worker.log")).expect("the log");
    assert_eq!(log.matches("the conversation is over").count(), 2, "{log}");
}

#[test]
fn a_worker_that_cannot_be_started_is_an_error_with_its_reason() {
    let home = Home::new();
    let mut missing = Supervisor::new(WorkerLaunch { program: home.path("nothing"), ..home.launch() });
    match missing.start() {
        Err(WorkerError::Unreachable(message)) => assert!(message.contains("nothing"), "{message}"),
        other => panic!("{other:?}"),
    }
    let mut other_device = home.launch();
    other_device.engine.device = Some("cuda:99".into());
    match Supervisor::new(other_device).start() {
        Err(WorkerError::Unreachable(message)) => assert!(message.contains("cuda"), "{message}"),
        other => panic!("{other:?}"),
    }
    let mut no_worker = Supervisor::new(WorkerLaunch { arguments: vec!["nonsense".into()], ..home.launch() });
    match no_worker.start() {
        Err(WorkerError::Crashed(report)) => {
            assert_eq!(report.exit_code, Some(2));
            assert!(report.log_lines.iter().any(|line| line.contains("nonsense")), "{report:?}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_thousand_runs_leave_the_memory_as_it_was() {
    let home = Home::new();
    let mut supervisor = home.supervisor();
    let picture = home.landscape("a.json", |workflow| {
        workflow["steps"][0]["pipeline"]["arguments"]["num_inference_steps"] = json!(1);
    });
    // A picture now and then: the models stay, and what they compute with has to go.
    let jobs = [home.job(&code(&home, "x")), home.job(&picture)];
    let run = |supervisor: &mut Supervisor, number: usize| {
        Run::of(supervisor, &jobs[usize::from(number.is_multiple_of(20))]).succeeds();
    };
    (0..200).for_each(|number| run(&mut supervisor, number));
    let rss = |supervisor: &mut Supervisor| supervisor.memory().expect("a report").host_rss.expect("known");
    let warm = rss(&mut supervisor);
    (0..1000).for_each(|number| run(&mut supervisor, number));
    let after = rss(&mut supervisor);
    assert!(after as f64 <= warm as f64 * 1.05, "{warm} bytes when warm, {after} after 1000 more runs");
    assert_eq!(supervisor.ping(), Ok(1200));
}
