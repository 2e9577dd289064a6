//! Workers that die, in every way and at every moment: the supervisor says what happened, the next run succeeds, and
//! nothing is left behind.

use std::{process::Command, thread, time::Duration};

use dw_core::event::Event;
use dw_engine::worker::{CrashReport, Job, Supervisor, Update, WorkerError};
use serde_json::json;

use crate::{Home, Run};

/// Sends a signal by its name (`KILL`).
fn signal(process: u32, name: &str) {
    let status = Command::new("kill").args([&format!("-{name}"), &process.to_string()]).status();
    assert!(status.expect("`kill` runs").success(), "process {process} was there");
}

/// Whether a process exists, be it as a zombie.
fn exists(process: u32) -> bool {
    let output = Command::new("kill").args(["-0", &process.to_string()]).output();
    output.expect("`kill` runs").status.success()
}

/// Sockets of dw that this process has open, on systems that tell.
fn open_sockets() -> usize {
    let listed = fs_err::read_to_string("/proc/net/unix").unwrap_or_default();
    listed.lines().filter(|line| line.contains(&format!("@dw-{}-", std::process::id()))).count()
}

/// Checks that nothing of a worker is left, and that the next run succeeds as if nothing had been.
fn recovers(home: &Home, supervisor: &mut Supervisor, dead: u32, job: &Job) {
    assert!(!supervisor.is_running());
    assert!(!exists(dead), "worker {dead} is still there");
    assert_eq!(open_sockets(), 0);
    assert_eq!(supervisor.memory(), Err(WorkerError::NotRunning));
    for name in home.files() {
        let path = home.path("out").join(&name);
        assert!(image::open(&path).is_ok(), "`{name}` is no whole picture");
    }
    let run = Run::of(supervisor, job);
    assert_eq!(run.succeeds().run_count, 1);
    assert!(run.succeeds().summary.files.iter().all(|file| image::open(file).is_ok()));
}

fn crash(error: WorkerError) -> CrashReport {
    match error {
        WorkerError::Crashed(report) => *report,
        other => panic!("{other:?}"),
    }
}

/// Several pictures in one run, each of them a file.
fn pictures(home: &Home) -> Job {
    home.job(&home.landscape("a.json", |workflow| {
        workflow["steps"][0]["pipeline"]["arguments"]["num_images_per_prompt"] = json!(4);
    }))
}

/// A run that takes far longer than a signal.
fn endless(home: &Home) -> Job {
    home.job(&home.landscape("a.json", |workflow| {
        workflow["steps"][0]["pipeline"]["arguments"]["num_inference_steps"] = json!(900);
    }))
}

/// Kills the worker when `is_moment` says so for the first time.
fn killed_at(is_moment: impl Fn(&Event) -> bool) {
    let home = Home::new();
    let mut supervisor = home.supervisor();
    let job = pictures(&home);
    supervisor.start().expect("started");
    let worker = supervisor.process_id().expect("a worker");
    let mut is_dead = false;
    let run = Run::watched(&mut supervisor, &job, |update, _| {
        if let Update::Event(event) = update
            && !is_dead
            && is_moment(event)
        {
            is_dead = true;
            signal(worker, "KILL");
        }
    });
    assert!(is_dead, "the moment came: {:#?}", run.updates);
    match run.result {
        Err(error) => {
            let report = crash(error);
            assert_eq!((report.signal, report.exit_code), (Some(9), None));
            assert!(report.advice.contains("memory"), "{report:?}");
        }
        // A worker can be faster than its murderer; then the run is whole, and it dies a little later.
        Ok(_) => {
            while supervisor.is_running() {
                std::thread::yield_now();
            }
        }
    }
    recovers(&home, &mut supervisor, worker, &job);
}

#[test]
fn killed_when_a_run_starts() {
    killed_at(|event| matches!(event, Event::RunStarted { .. }));
}

#[test]
fn killed_while_it_begins_to_load() {
    killed_at(|event| matches!(event, Event::Loading { .. }));
}

#[test]
fn killed_when_it_has_loaded() {
    killed_at(|event| matches!(event, Event::StageFinished { stage, .. } if stage == "load"));
}

#[test]
fn killed_at_the_first_denoising_step() {
    killed_at(|event| matches!(event, Event::DenoiseStep { done: 1, .. }));
}

#[test]
fn killed_at_the_last_denoising_step() {
    killed_at(|event| matches!(event, Event::DenoiseStep { done: 3, .. }));
}

#[test]
fn killed_while_it_decodes() {
    killed_at(|event| matches!(event, Event::StageFinished { stage, .. } if stage == "denoise"));
}

#[test]
fn killed_when_it_begins_to_write() {
    killed_at(|event| matches!(event, Event::StageFinished { stage, .. } if stage == "decode"));
}

#[test]
fn killed_between_two_files() {
    killed_at(|event| matches!(event, Event::FileWritten { .. }));
}

#[test]
fn killed_while_it_is_idle() {
    let home = Home::new();
    let mut supervisor = home.supervisor();
    let job = pictures(&home);
    for runs in [0, 1] {
        supervisor.start().expect("started");
        (0..runs).for_each(|_| _ = Run::of(&mut supervisor, &job).succeeds());
        let worker = supervisor.process_id().expect("a worker");
        signal(worker, "KILL");
        // Whoever asks first may still find the connection open; nobody waits for ever and nobody is lied to.
        while supervisor.is_running() {
            match supervisor.ping() {
                Ok(count) => assert_eq!(count, runs),
                Err(error) => assert!(matches!(error, WorkerError::Crashed(_) | WorkerError::NotRunning), "{error:?}"),
            }
        }
        recovers(&home, &mut supervisor, worker, &job);
        supervisor.shutdown();
    }
}

#[test]
fn killed_during_its_shutdown() {
    let home = Home::new();
    let mut supervisor = home.supervisor();
    let job = pictures(&home);
    Run::of(&mut supervisor, &job).succeeds();
    let worker = supervisor.process_id().expect("a worker");
    // Stopped, it cannot follow the request to end, so the kill meets it in the middle of that.
    signal(worker, "STOP");
    let murderer = thread::spawn(move || {
        thread::sleep(Duration::from_millis(100));
        signal(worker, "KILL");
    });
    supervisor.shutdown();
    murderer.join().expect("it did it");
    recovers(&home, &mut supervisor, worker, &job);
}

#[test]
fn each_signal_is_named_and_comes_with_the_last_log_lines() {
    let home = Home::new();
    let mut supervisor = home.supervisor();
    let job = endless(&home);
    for (name, number) in [("SEGV", 11), ("ABRT", 6), ("TERM", 15), ("ILL", 4)] {
        supervisor.start().expect("started");
        let worker = supervisor.process_id().expect("a worker");
        let run = Run::watched(&mut supervisor, &job, |update, _| {
            // Rust's own handler lets the first SIGSEGV pass that no bad address explains, so each step sends one.
            if matches!(update, Update::Event(Event::DenoiseStep { .. })) {
                signal(worker, name);
            }
        });
        let report = crash(run.result.expect_err("it died"));
        assert_eq!(report.signal, Some(number));
        assert!(report.to_string().contains(&format!("SIG{name}")), "{report}");
        assert!(report.log_lines.iter().any(|line| line.contains("a.json")), "{report:?}");
    }
}

#[test]
fn a_worker_whose_heart_has_stopped_is_found_and_killed() {
    let home = Home::new();
    let mut launch = home.launch();
    launch.silence_limit = Duration::from_secs(3);
    let mut supervisor = Supervisor::new(launch);
    supervisor.start().expect("started");
    let worker = supervisor.process_id().expect("a worker");
    let run = Run::watched(&mut supervisor, &endless(&home), |update, _| {
        if matches!(update, Update::Event(Event::DenoiseStep { done: 1, .. })) {
            signal(worker, "STOP");
        }
    });
    match run.result {
        Err(WorkerError::Hung { silence, .. }) => assert_eq!(silence, Duration::from_secs(3)),
        other => panic!("{other:?}"),
    }
    recovers(&home, &mut supervisor, worker, &pictures(&home));
}

#[test]
fn a_supervisor_that_goes_takes_its_worker_along() {
    let home = Home::new();
    let mut supervisor = home.supervisor();
    supervisor.start().expect("started");
    let worker = supervisor.process_id().expect("a worker");
    drop(supervisor);
    assert!(!exists(worker));
    assert_eq!(open_sockets(), 0);
}
