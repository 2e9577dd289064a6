//! Measures the worker: what the process boundary costs, and how soon one is free again.
//!
//!     cargo run --release -p dw --example worker_timings -- target/release/dw
//!
//! Prints the rows of docs/benchmarks.md.

use std::{
    env, process,
    time::{Duration, Instant},
};

use dw_core::event::Event;
use dw_engine::{
    EngineConfig,
    worker::{CancelSwitch, Job, Supervisor, Update, WorkerError, WorkerLaunch},
};
use serde_json::{Map, json};

/// How often each thing is measured.
const REPETITIONS: usize = 10;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let program = env::args_os().nth(1).unwrap_or_else(|| {
        println!("usage: worker_timings PATH-TO-DW");
        process::exit(2);
    });
    let folder = tempfile::tempdir()?;
    let workflow = folder.path().join("landscape.json");
    fs_err::write(&workflow, landscape().to_string())?;
    let job = Job {
        workflow,
        variables: Map::new(),
        seed: None,
        output_dir: folder.path().join("out"),
        metadata: true,
        preview_every: None,
        log_level: "WARNING".into(),
    };
    let engine = EngineConfig { device: Some("cpu".into()), offline: true, ..EngineConfig::default() };
    let log_file = Some(folder.path().join("worker.log"));
    let mut supervisor = Supervisor::new(WorkerLaunch { engine, log_file, ..WorkerLaunch::new(program) });
    println!("| what | median | largest |\n|---|---|---|");
    first_step(&mut supervisor, &job)?;
    boundary(&mut supervisor, &job)?;
    cancel(&mut supervisor, &job);
    crash(&mut supervisor, &job)?;
    supervisor.shutdown();
    Ok(())
}

/// 10 steps on a picture of 128 x 128.
fn landscape() -> serde_json::Value {
    json!({
        "id": "landscape",
        "steps": [{
            "name": "paint",
            "pipeline": {
                "configuration": { "component_type": "StableDiffusionXLPipeline" },
                "from_pretrained_arguments": { "model_name": "builtin:landscapes" },
                "arguments": { "prompt": "mountains at day", "num_inference_steps": 10, "height": 128, "width": 128 }
            },
            "result": { "content_type": "image/png" }
        }]
    })
}

/// Runs the job and gives the time until the denoising step `step` was done, after doing `then`.
fn until_step(
    supervisor: &mut Supervisor,
    job: &Job,
    step: usize,
    mut then: impl FnMut(&CancelSwitch),
) -> (Duration, Result<f64, WorkerError>) {
    let (start, switch) = (Instant::now(), CancelSwitch::default());
    let mut reached = Duration::ZERO;
    let mut watch = |update: Update| {
        if matches!(update, Update::Event(Event::DenoiseStep { done, .. }) if done == step) {
            reached = start.elapsed();
            then(&switch);
        }
    };
    let result = supervisor.execute(job, &mut watch, &switch);
    (reached, result.map(|finished| finished.summary.seconds))
}

fn first_step(supervisor: &mut Supervisor, job: &Job) -> Result<(), WorkerError> {
    let (mut cold, mut warm) = (Vec::new(), Vec::new());
    for _ in 0..REPETITIONS {
        supervisor.shutdown();
        for times in [&mut cold, &mut warm] {
            let (time, result) = until_step(supervisor, job, 1, |_| {});
            result?;
            times.push(time);
        }
    }
    row("time to the first denoising step, cold (a new worker)", cold);
    row("time to the first denoising step, warm", warm);
    Ok(())
}

/// What the process boundary costs: there and back for a message, and what a warm run takes beyond its own seconds.
fn boundary(supervisor: &mut Supervisor, job: &Job) -> Result<(), WorkerError> {
    let mut there_and_back = Vec::new();
    for _ in 0..REPETITIONS * 50 {
        let start = Instant::now();
        supervisor.ping()?;
        there_and_back.push(start.elapsed());
    }
    row("a message there and its answer back", there_and_back);
    let mut beyond = Vec::new();
    for _ in 0..REPETITIONS {
        let start = Instant::now();
        let (_, result) = until_step(supervisor, job, 1, |_| {});
        beyond.push(start.elapsed().saturating_sub(Duration::from_secs_f64(result?)));
    }
    row("a warm run, beyond its own seconds", beyond);
    Ok(())
}

fn cancel(supervisor: &mut Supervisor, job: &Job) {
    let mut times = Vec::new();
    for _ in 0..REPETITIONS {
        let mut pressed = Instant::now();
        let (_, result) = until_step(supervisor, job, 5, |switch| {
            pressed = Instant::now();
            switch.press();
        });
        times.push(pressed.elapsed());
        assert_eq!(result, Err(WorkerError::Cancelled));
    }
    row("from Ctrl-C to the prompt (a step included)", times);
}

/// From the death of a worker to the prompt, and to the first step that a new one has done.
fn crash(supervisor: &mut Supervisor, job: &Job) -> Result<(), WorkerError> {
    let (mut noticed, mut working) = (Vec::new(), Vec::new());
    for _ in 0..REPETITIONS {
        supervisor.start()?;
        let id = supervisor.process_id().unwrap_or_default().to_string();
        let mut died = Instant::now();
        let (_, result) = until_step(supervisor, job, 5, |_| {
            died = Instant::now();
            let _ = process::Command::new("kill").args(["-9", &id]).status();
        });
        noticed.push(died.elapsed());
        assert!(matches!(result, Err(WorkerError::Crashed(_))), "{result:?}");
        let (first, result) = until_step(supervisor, job, 1, |_| {});
        result?;
        working.push(first);
    }
    row("from a crash to the prompt", noticed);
    row("from then to the next run's first denoising step", working);
    Ok(())
}

fn row(what: &str, mut times: Vec<Duration>) {
    times.sort();
    let shown = |time: Duration| format!("{:.2} ms", time.as_secs_f64() * 1000.0);
    let (middle, last) = (times[times.len() / 2], times[times.len() - 1]);
    println!("| {what} | {} | {} |", shown(middle), shown(last));
}
