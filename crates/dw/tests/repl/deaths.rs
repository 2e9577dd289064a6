//! Workers and loops that die, and what stays behind: nothing.

use std::{
    process::Command,
    thread,
    time::{Duration, Instant},
};

use crate::{PATIENCE, Talk};

fn signal(name: &str, process: u32) {
    let done = Command::new("kill").args([name, &process.to_string()]).status().expect("`kill` runs");
    assert!(done.success(), "{process} is there");
}

/// Whether a process is there and not merely waiting to be buried.
fn lives(process: u32) -> bool {
    let listed = Command::new("ps").args(["-o", "stat=", "-p", &process.to_string()]).output().expect("`ps` runs");
    let state = String::from_utf8_lossy(&listed.stdout).trim().to_owned();
    !state.is_empty() && !state.starts_with('Z')
}

#[track_caller]
fn is_gone(process: u32) {
    let start = Instant::now();
    while lives(process) {
        assert!(start.elapsed() < PATIENCE, "process {process} is still there");
        thread::sleep(Duration::from_millis(20));
    }
}

/// Lets the loop run a picture of many steps, until it is in the middle of it.
fn long_run(talk: &mut Talk) -> u32 {
    talk.run();
    let worker = talk.worker().expect("a worker");
    talk.say("arg set steps=500");
    talk.say("workflow run");
    talk.until("denoise 1/500");
    worker
}

#[test]
fn a_worker_that_is_killed_between_runs_is_replaced() {
    let mut talk = Talk::start();
    talk.run();
    let first = talk.worker().expect("a worker");
    signal("-KILL", first);
    is_gone(first);
    talk.say("memory show");
    talk.until("No worker process running");
    assert_eq!(talk.worker(), None);
    let heard = talk.run();
    assert!(heard.contains("loading unet"), "{heard}");
    let second = talk.worker().expect("a worker");
    assert_ne!(first, second);
    talk.end();
    is_gone(second);
}

#[test]
fn a_worker_that_is_killed_in_a_run_is_told_of_and_replaced() {
    let mut talk = Talk::start();
    let first = long_run(&mut talk);
    signal("-KILL", first);
    let heard = talk.settle();
    assert!(heard.contains("signal 9 (SIGKILL)") && heard.contains("The next run starts a fresh worker."), "{heard}");
    is_gone(first);
    talk.say("arg set steps=2");
    talk.run();
    let second = talk.worker().expect("a worker");
    talk.say("exit");
    assert_eq!(talk.child.wait().expect("the program ends").code(), Some(2));
    is_gone(second);
}

#[test]
fn ctrl_c_in_a_run_of_a_script_stops_both_and_exits_with_130() {
    let mut talk = Talk::start();
    talk.say("arg set steps=500");
    talk.say("workflow run");
    talk.until("denoise 1/500");
    signal("-INT", talk.child.id());
    talk.until("Stopping after the current step");
    talk.until("Cancelled: no file was finished");
    assert_eq!(talk.child.wait().expect("the program ends").code(), Some(130));
}

#[test]
fn a_worker_whose_loop_is_killed_ends_by_itself() {
    let mut talk = Talk::start();
    let worker = long_run(&mut talk);
    signal("-KILL", talk.child.id());
    talk.child.wait().expect("the program ends");
    is_gone(worker);
}
