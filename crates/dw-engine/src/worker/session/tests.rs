//! Conversations over memory instead of a socket: what broken input does to a worker, ten thousand times.

use std::io::{self, Cursor};

use serde_json::{Value, json};

use super::*;
use crate::worker::frame::MAX_FRAME_BYTES;

/// What a worker writes, for the test to read.
#[derive(Clone, Default)]
struct Paper(Arc<Mutex<Vec<u8>>>);

impl Write for Paper {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        lock(&self.0).extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Paper {
    /// All messages but heartbeats.
    fn messages(&self) -> Vec<Value> {
        let bytes = lock(&self.0).clone();
        let mut reader = bytes.as_slice();
        let bodies = std::iter::from_fn(|| frame::read(&mut reader).expect("whole frames"));
        let messages = bodies.map(|body| serde_json::from_slice(&body).expect("JSON"));
        messages.filter(|message: &Value| message["type"] != "heartbeat").collect()
    }

    fn kinds(&self) -> Vec<String> {
        self.messages().iter().map(|message| message["type"].as_str().expect("text").to_owned()).collect()
    }
}

fn frame_of(body: &[u8]) -> Vec<u8> {
    [&(body.len() as u32).to_le_bytes(), body].concat()
}

fn hello() -> Vec<u8> {
    frame_of(json!({ "type": "hello", "protocol": 1, "engine": { "device": "cpu" } }).to_string().as_bytes())
}

/// The worker's side of a conversation in which the client says all of `input` and leaves.
fn conversation(input: Vec<u8>) -> (Result<(), ServeError>, Paper) {
    let paper = Paper::default();
    let options = WorkerOptions { set_log_level: &|_| Ok(()), exit_after: None };
    let result = converse(Cursor::new(input), paper.clone(), "secret".into(), &options);
    (result, paper)
}

#[test]
fn a_client_that_says_hello_and_leaves_is_no_error() {
    let (result, paper) = conversation(hello());
    assert!(result.is_ok());
    assert_eq!(paper.kinds(), ["hello", "ready"]);
    let (result, paper) = conversation(Vec::new());
    assert!(result.is_ok());
    assert_eq!(paper.kinds(), ["hello"]);
}

#[test]
fn a_shutdown_is_acknowledged_last_of_all() {
    let ping = frame_of(br#"{"type":"ping"}"#);
    let (result, paper) = conversation([hello(), ping, frame_of(br#"{"type":"shutdown"}"#)].concat());
    assert!(result.is_ok());
    assert_eq!(paper.kinds(), ["hello", "ready", "pong", "shutdown_complete"]);
}

#[test]
fn a_run_that_comes_with_its_shutdown_is_dropped() {
    let execute = json!({ "type": "execute", "workflow_path": "/nowhere.json", "output_dir": "/nowhere" });
    let input = [hello(), frame_of(execute.to_string().as_bytes()), frame_of(br#"{"type":"shutdown"}"#)].concat();
    let (result, paper) = conversation(input);
    assert!(result.is_ok());
    assert_eq!(paper.kinds().last().map(String::as_str), Some("shutdown_complete"));
}

#[test]
fn a_device_that_is_not_there_is_said_and_ends_the_worker() {
    let hello = json!({ "type": "hello", "protocol": 1, "engine": { "device": "tpu" } });
    let (result, paper) = conversation(frame_of(hello.to_string().as_bytes()));
    assert!(matches!(result, Err(ServeError::Engine(_))));
    assert!(paper.messages()[1]["message"].as_str().expect("text").contains("`tpu`"));
}

/// A small generator of numbers, so that a failure can be had again.
struct Dice(u64);

impl Dice {
    /// xorshift64* (Vigna, "An experimental exploration of Marsaglia's xorshift generators, scrambled").
    fn roll(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.roll() % limit
    }

    fn bytes(&mut self, most: u64) -> Vec<u8> {
        (0..self.below(most)).map(|_| self.roll() as u8).collect()
    }
}

/// Bytes that are no frame with a message in it, and that end the connection.
fn malformed(dice: &mut Dice) -> Vec<u8> {
    match dice.below(8) {
        // A length beyond the limit.
        0 => [&(MAX_FRAME_BYTES + 1 + dice.below(1 << 30) as u32).to_le_bytes(), dice.bytes(20).as_slice()].concat(),
        // A frame that ends too early.
        1 => {
            let whole = frame_of(br#"{"type":"memory_status"}"#);
            whole[..=dice.below(whole.len() as u64 - 1) as usize].to_vec()
        }
        // A large length with nothing behind it.
        2 => [&(MAX_FRAME_BYTES - dice.below(1000) as u32).to_le_bytes(), dice.bytes(50).as_slice()].concat(),
        // No UTF-8.
        3 => frame_of(&[dice.bytes(20), vec![0xff, 0xfe], dice.bytes(20)].concat()),
        // UTF-8 that is no JSON.
        4 => frame_of(format!("{{{}", "x".repeat(dice.below(100) as usize)).as_bytes()),
        // JSON that is no message.
        5 => frame_of(["[]", "7", "{}", "null", r#"{"type":7}"#, r#""ping""#][dice.below(6) as usize].as_bytes()),
        // JSON that is too deep.
        6 => frame_of("[".repeat(200 + dice.below(5000) as usize).as_bytes()),
        // JSON with something behind it.
        _ => frame_of(br#"{"type":"ping"}{"type":"ping"}"#),
    }
}

#[test]
fn ten_thousand_malformed_frames_close_the_connection_with_an_error_and_harm_nothing() {
    let mut dice = Dice(0x5eed);
    for number in 0..10_000 {
        // Mostly as the first thing said, now and then after a good question.
        let is_first = number % 20 != 0;
        let bad = malformed(&mut dice);
        let good = if is_first { Vec::new() } else { [hello(), frame_of(br#"{"type":"ping"}"#)].concat() };
        // What comes after a malformed frame is not looked at.
        let (result, paper) = conversation([good, bad.clone(), frame_of(br#"{"type":"ping"}"#)].concat());
        let kinds = paper.kinds();
        let expected: &[&str] = if is_first { &["hello", "error"] } else { &["hello", "ready", "pong", "error"] };
        // A frame cut short runs into the next one, which may make it whole: then it is just no message.
        assert_eq!(kinds, expected, "{number}: {bad:?} {:?}", paper.messages().last());
        assert!(matches!(result, Err(ServeError::Protocol(_))), "{number}: {result:?}");
    }
}

#[test]
fn the_wrong_version_is_refused_before_anything_is_set_up() {
    for version in [0, 2, 99, u32::MAX] {
        let hello = json!({ "type": "hello", "protocol": version });
        let (result, paper) = conversation(frame_of(hello.to_string().as_bytes()));
        assert!(matches!(result, Err(ServeError::Version(said)) if said == version));
        assert_eq!(paper.kinds(), ["hello", "error"]);
    }
}

#[test]
fn a_panic_is_told_and_ends_the_conversation() {
    let desk = |outbox| Desk {
        outbox,
        probe: Engine::new(EngineConfig { device: Some("cpu".into()), ..EngineConfig::default() })
            .expect("a CPU")
            .memory_probe(),
        open_runs: Mutex::default(),
        closing: AtomicBool::new(false),
    };
    let paper = Paper::default();
    let panic: Box<dyn Any + Send> = Box::new("index out of bounds".to_owned());
    let error = desk(Outbox::new(paper.clone())).crash(&*panic);
    assert!(matches!(error, ServeError::Panic(message) if message == "index out of bounds"));
    assert_eq!(paper.messages()[0]["message"], "index out of bounds");
    assert_eq!(paper.kinds(), ["worker_crashed"]);
}
