//! The protocol as docs/worker-protocol.md tells it, spoken by hand: what a program in another language does, and
//! what a broken one does.

use std::{
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use serde_json::{Value, json};

use crate::{Home, landscape};

const SECRET: &str = "swordfish";

/// A worker, and our end of the connection to it.
struct Client {
    child: Child,
    stream: UnixStream,
}

impl Client {
    /// Starts a worker and hears its `hello`.
    fn start(home: &Home) -> Self {
        let path = home.path("socket");
        let listener = UnixListener::bind(&path).expect("a socket");
        let mut command = Command::new(env!("CARGO_BIN_EXE_dw"));
        command.args(["worker", "--connect"]).arg(&path).env("HOME", home.path("")).current_dir(home.path(""));
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().expect("the program starts");
        writeln!(child.stdin.take().expect("a pipe"), "{SECRET}").expect("written");
        let (stream, _) = listener.accept().expect("the worker connects");
        // Only so that a broken worker ends the test instead of stopping it.
        stream.set_read_timeout(Some(Duration::from_mins(2))).expect("set");
        let mut client = Self { child, stream };
        let hello = client.receive().expect("a message");
        assert_eq!((&hello["type"], &hello["protocol"]), (&json!("hello"), &json!(1)));
        assert_eq!((&hello["secret"], &hello["process_id"]), (&json!(SECRET), &json!(client.child.id())));
        assert!(!path.exists(), "a worker that has connected removes the socket's file");
        client
    }

    /// Starts a worker and waits until it is ready.
    fn ready(home: &Home) -> Self {
        let mut client = Self::start(home);
        client.send(&json!({ "type": "hello", "protocol": 1, "engine": { "device": "cpu", "offline": true } }));
        assert_eq!(client.until("ready")["device"], "cpu");
        client
    }

    fn send(&mut self, message: &Value) {
        let body = message.to_string();
        self.send_bytes(&[&(body.len() as u32).to_le_bytes(), body.as_bytes()].concat());
    }

    fn send_bytes(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).expect("sent");
    }

    /// The next message that is no heartbeat; none when the worker has gone.
    fn receive(&mut self) -> Option<Value> {
        loop {
            let mut length = [0; 4];
            self.stream.read_exact(&mut length).ok()?;
            let mut body = vec![0; u32::from_le_bytes(length) as usize];
            self.stream.read_exact(&mut body).expect("a whole frame");
            let message: Value = serde_json::from_slice(&body).expect("JSON");
            if message["type"] != "heartbeat" {
                return Some(message);
            }
        }
    }

    /// The next message of this type.
    fn until(&mut self, kind: &str) -> Value {
        loop {
            let message = self.receive().unwrap_or_else(|| panic!("the worker went before `{kind}` came"));
            if message["type"] == kind {
                return message;
            }
        }
    }

    /// Waits for the worker to end by itself.
    fn end(mut self) -> ExitStatus {
        while self.receive().is_some() {}
        self.child.wait().expect("it ends")
    }
}

fn execute(home: &Home, steps: usize) -> Value {
    let mut workflow = landscape();
    workflow["steps"][0]["pipeline"]["arguments"]["num_inference_steps"] = json!(steps);
    let path = home.write(&format!("{steps}.json"), &workflow);
    json!({ "type": "execute", "workflow_path": path, "arguments": {}, "output_dir": home.path("out"), "log_level": "INFO" })
}

#[test]
fn the_messages_of_the_format_are_enough_for_a_run() {
    let home = Home::new();
    let mut client = Client::ready(&home);
    client.send(&execute(&home, 1));
    assert_eq!(client.until("workflow_loaded")["workflow_name"], "landscape");
    assert_eq!(client.until("memory_info")["info"]["device_name"], "cpu");
    let success = client.until("success");
    assert_eq!((&success["message"], &success["run_count"]), (&json!("Workflow completed successfully"), &json!(1)));
    assert_eq!(home.files(), ["landscape-paint.0-0.0.png"]);
    client.send(&json!({ "type": "clear_memory" }));
    assert_eq!(client.until("memory_cleared")["info"]["allocated"], 0);
    client.send(&json!({ "type": "shutdown" }));
    assert_eq!(client.receive().expect("a last message")["type"], "shutdown_complete");
    assert!(client.end().success());
}

#[test]
fn questions_are_answered_during_a_run_and_runs_wait_for_each_other() {
    let home = Home::new();
    let mut client = Client::ready(&home);
    client.send(&execute(&home, 300));
    client.send(&execute(&home, 1));
    client.until("event");
    client.send(&json!({ "type": "ping" }));
    assert_eq!(client.until("pong")["run_count"], 0);
    client.send(&json!({ "type": "memory_status" }));
    assert!(client.until("memory_status")["info"]["host_rss"].as_u64() > Some(0));
    client.send(&json!({ "type": "cancel" }));
    assert_eq!(client.until("cancelled")["run_count"], 0);
    assert_eq!(client.until("success")["run_count"], 1, "the second run was not cancelled");
    client.send(&json!({ "type": "shutdown" }));
    assert!(client.end().success());
}

#[test]
fn a_message_nobody_knows_is_answered_and_the_worker_goes_on() {
    let home = Home::new();
    let mut client = Client::ready(&home);
    for (message, answer) in [
        (json!({ "type": "x" }), "Unknown command type: x"),
        (json!({ "type": "execute" }), "message `execute` cannot be used: missing field `workflow_path`"),
        (json!({ "type": "hello", "protocol": 1 }), "`hello` comes once, at the beginning"),
    ] {
        client.send(&message);
        assert_eq!(client.until("error")["message"], answer);
    }
    client.send(&json!({ "type": "ping" }));
    assert_eq!(client.until("pong")["run_count"], 0);
    client.send(&json!({ "type": "shutdown" }));
    assert!(client.end().success());
}

#[test]
fn broken_frames_end_the_worker_with_an_error() {
    let home = Home::new();
    for (bytes, complaint) in [
        (&b"\xff\xff\xff\xffx"[..], "a frame of 4294967295 bytes"),
        (b"\x02\0\0\0\xff\xfe", "a frame holds no message: invalid utf-8"),
        (b"\x02\0\0\0[]", "a frame holds no message: it is no JSON object"),
        (b"\x00\0\0\0", "a frame holds no message: "),
    ] {
        let mut client = Client::ready(&home);
        client.send_bytes(bytes);
        let message = client.until("error")["message"].clone();
        assert!(message.as_str().is_some_and(|text| text.starts_with(complaint)), "{message}");
        assert_eq!(client.end().code(), Some(1));
    }
}

#[test]
fn another_version_and_a_client_without_manners_are_refused() {
    let home = Home::new();
    for (first, complaint) in [
        (json!({ "type": "hello", "protocol": 99 }), "the client speaks version 99 of the protocol"),
        (json!({ "type": "ping" }), "the first message was no `hello`"),
    ] {
        let mut client = Client::start(&home);
        client.send(&first);
        let message = client.until("error")["message"].clone();
        assert!(message.as_str().is_some_and(|text| text.starts_with(complaint)), "{message}");
        assert_eq!(client.end().code(), Some(1));
    }
}

#[test]
fn an_orphan_ends_by_itself_whatever_it_was_doing() {
    let home = Home::new();
    let idle = Client::ready(&home);
    let mut busy = Client::ready(&home);
    busy.send(&execute(&home, 900));
    busy.until("event");
    for Client { mut child, stream } in [idle, busy] {
        drop(stream);
        child.wait().expect("it ends");
    }
    // One that has not even connected.
    let mut command = Command::new(env!("CARGO_BIN_EXE_dw"));
    let mut child = command.args(["worker", "--connect"]).arg(home.path("nobody")).stdin(Stdio::null()).spawn();
    assert_eq!(child.as_mut().expect("started").wait().expect("it ends").code(), Some(1));
    assert!(home.files().is_empty());
}
