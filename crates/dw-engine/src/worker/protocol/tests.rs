//! Every message as it is on the wire. A change here is a change for programs in other languages: it needs
//! docs/worker-protocol.md, and usually another [`PROTOCOL_VERSION`].

use std::collections::BTreeSet;

use dw_core::finding::{Place, Severity};
use serde::de::DeserializeOwned;
use serde_json::json;

use super::*;
use crate::{LoadedComponent, worker::frame};

/// Checks that a message is written as `wire` and read from it.
#[track_caller]
fn is_on_the_wire<M: Serialize + DeserializeOwned + Named + PartialEq + std::fmt::Debug>(message: &M, wire: &Value) {
    assert_eq!(&serde_json::to_value(message).expect("JSON"), wire);
    assert_eq!(&frame::decode::<M>(wire.to_string().as_bytes()).expect("a message"), message);
    assert!(M::NAMES.contains(&wire["type"].as_str().expect("a type")));
}

fn report() -> MemoryReport {
    MemoryReport {
        device_name: "cpu".into(),
        allocated: 5,
        reserved: Some(7),
        free: Some(11),
        total: None,
        components: vec![LoadedComponent {
            name: "unet".into(),
            class: "UNet2DConditionModel".into(),
            bytes: 5,
            workflows: BTreeSet::from(["ab12".to_owned()]),
        }],
        budget: Some(13),
        host_rss: Some(7),
        growth_since_last_run: Some(-3),
        run_count: 2,
    }
}

fn report_on_the_wire() -> Value {
    json!({
        "device_name": "cpu",
        "allocated": 5,
        "reserved": 7,
        "free": 11,
        "total": null,
        "components": [{ "name": "unet", "class": "UNet2DConditionModel", "bytes": 5, "workflows": ["ab12"] }],
        "budget": 13,
        "host_rss": 7,
        "growth_since_last_run": -3,
        "run_count": 2
    })
}

#[test]
fn commands_are_on_the_wire_as_documented() {
    let engine = EngineConfig { device: Some("cuda:1".into()), offline: true, cuda_noise: false, ignore_fit: false };
    is_on_the_wire(
        &Command::Hello { protocol: 1, engine, cache_budget: Some(1000) },
        &json!({
            "type": "hello",
            "protocol": 1,
            "engine": { "device": "cuda:1", "offline": true, "cuda_noise": false, "ignore_fit": false },
            "cache_budget": 1000
        }),
    );
    let arguments = json!({ "prompt": "a boat" }).as_object().expect("an object").clone();
    is_on_the_wire(
        &Command::Execute(Execute {
            workflow_path: "/w/a.json".into(),
            arguments,
            output_dir: "/out".into(),
            log_level: Some("INFO".into()),
            seed: Some(Seed::One(7)),
            metadata: true,
            preview_every: Some(5),
        }),
        &json!({
            "type": "execute",
            "workflow_path": "/w/a.json",
            "arguments": { "prompt": "a boat" },
            "output_dir": "/out",
            "log_level": "INFO",
            "seed": 7,
            "metadata": true,
            "preview_every": 5
        }),
    );
    is_on_the_wire(&Command::Cancel, &json!({ "type": "cancel" }));
    is_on_the_wire(&Command::Shutdown, &json!({ "type": "shutdown" }));
    is_on_the_wire(&Command::Ping, &json!({ "type": "ping" }));
    is_on_the_wire(&Command::ClearMemory, &json!({ "type": "clear_memory" }));
    is_on_the_wire(&Command::MemoryStatus, &json!({ "type": "memory_status" }));
}

#[test]
fn an_execute_of_the_format_leaves_out_what_is_dws_own() {
    let text = r#"{"type":"execute","workflow_path":"a","arguments":{},"output_dir":"o","log_level":"INFO"}"#;
    let Command::Execute(execute) = frame::decode(text.as_bytes()).expect("a command") else { panic!("no execute") };
    assert_eq!((execute.seed, execute.metadata, execute.preview_every), (None, true, None));
}

#[test]
fn answers_of_a_conversation_are_on_the_wire_as_documented() {
    is_on_the_wire(
        &Answer::Hello { protocol: 1, secret: "abc".into(), version: "0.1.0".into(), process_id: 42 },
        &json!({ "type": "hello", "protocol": 1, "secret": "abc", "version": "0.1.0", "process_id": 42 }),
    );
    is_on_the_wire(&Answer::Ready { device: "cpu".into() }, &json!({ "type": "ready", "device": "cpu" }));
    is_on_the_wire(&Answer::Heartbeat, &json!({ "type": "heartbeat" }));
    is_on_the_wire(&Answer::Pong { run_count: 3 }, &json!({ "type": "pong", "run_count": 3 }));
    is_on_the_wire(&Answer::ShutdownComplete, &json!({ "type": "shutdown_complete" }));
    let info = report_on_the_wire();
    is_on_the_wire(&Answer::MemoryCleared { info: report() }, &json!({ "type": "memory_cleared", "info": info }));
    is_on_the_wire(&Answer::MemoryStatus { info: report() }, &json!({ "type": "memory_status", "info": info }));
}

#[test]
fn answers_of_a_run_are_on_the_wire_as_documented() {
    is_on_the_wire(&Answer::Output { message: "hi".into() }, &json!({ "type": "output", "message": "hi" }));
    is_on_the_wire(
        &Answer::WorkflowLoaded { workflow_name: "a".into() },
        &json!({ "type": "workflow_loaded", "workflow_name": "a" }),
    );
    is_on_the_wire(
        &Answer::Event { event: Event::DenoiseStep { done: 1, of: 4 } },
        &json!({ "type": "event", "event": { "event": "denoise_step", "done": 1, "of": 4 } }),
    );
    let started =
        Event::RunStarted { workflow: "a".into(), steps: 1, seed: Seed::Each(vec![-1, 1]), random_seed: false };
    is_on_the_wire(
        &Answer::Event { event: started },
        &json!({
            "type": "event",
            "event": { "event": "run_started", "workflow": "a", "steps": 1, "seed": [-1, 1], "random_seed": false }
        }),
    );
    is_on_the_wire(
        &Answer::Preview(LatentPreview { step: 2, of: 4, png: b"\x89PNG".to_vec() }),
        &json!({ "type": "preview", "step": 2, "of": 4, "png": "iVBORw==" }),
    );
    is_on_the_wire(&Answer::Warning { message: "hm".into() }, &json!({ "type": "warning", "message": "hm" }));
    is_on_the_wire(
        &Answer::MemoryInfo { info: report() },
        &json!({ "type": "memory_info", "info": report_on_the_wire() }),
    );
}

#[test]
fn ends_of_a_run_are_on_the_wire_as_documented() {
    let summary = Summary {
        workflow: "a".into(),
        files: vec!["/out/a.png".into()],
        seed: Some(Seed::One(7)),
        random_seed: true,
        seconds: 1.5,
    };
    is_on_the_wire(
        &Answer::Success { message: "Workflow completed successfully".into(), run_count: 2, summary },
        &json!({
            "type": "success",
            "message": "Workflow completed successfully",
            "run_count": 2,
            "summary": { "workflow": "a", "files": ["/out/a.png"], "seed": 7, "random_seed": true, "seconds": 1.5 }
        }),
    );
    is_on_the_wire(&Answer::Cancelled { run_count: 2 }, &json!({ "type": "cancelled", "run_count": 2 }));
    let place = Place { file: Some("/w/a.json".into()), line: 3, column: 5, pointer: "/steps".into() };
    let finding = Finding {
        severity: Severity::Error,
        code: "unknown-variable",
        message: "no".into(),
        remedy: Some("yes".into()),
        place,
    };
    is_on_the_wire(
        &Answer::Error { message: "bad".into(), findings: vec![finding] },
        &json!({
            "type": "error",
            "message": "bad",
            "findings": [{
                "severity": "error",
                "code": "unknown-variable",
                "message": "no",
                "remedy": "yes",
                "file": "/w/a.json",
                "line": 3,
                "column": 5,
                "pointer": "/steps"
            }]
        }),
    );
    is_on_the_wire(
        &Answer::WorkerCrashed { message: "index".into(), traceback: "at".into() },
        &json!({ "type": "worker_crashed", "message": "index", "traceback": "at" }),
    );
}

#[test]
fn members_that_are_not_known_are_passed_over() {
    let command = frame::decode::<Command>(br#"{"type":"ping","of":"tomorrow"}"#).expect("a command");
    assert_eq!(command, Command::Ping);
}
