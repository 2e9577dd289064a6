//! A conversation in lines of JSON with a program that hosts dw: plain requests and commands in, answers out.

use std::{
    io::{self, BufRead, Read},
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
};

use dw_core::cancel::CancellationToken;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{
    answer::{Answer, Failure, FailureCode, Picture, RequestResult},
    document::{FORMATS, Prepared},
    progress::Progress,
    queue::{Job, Queue, Stopped, Work},
    request::{Call, Request, RequestId},
};
use crate::{
    Engine, EngineError, LatentPreview, PlannedRun, Previews, RunRequest, Source, Summary,
    memory::MemoryProbe,
    worker::protocol::{self, Command, Execute},
};

/// The longest line; pictures in base64 make lines long.
const LONGEST_LINE: u64 = 64 * 1024 * 1024;

/// Takes one line without its end; false when nobody reads any more.
pub type Say = Arc<dyn Fn(&str) -> bool + Send + Sync>;

/// What the program around the conversation decides.
pub struct HostOptions {
    /// Where the files of requests without an `output` go.
    pub output_dir: PathBuf,
    /// Changes how much is logged (`DEBUG`, `INFO`, …); an error says why that is no level.
    pub set_log_level: fn(&str) -> Result<(), String>,
}

/// Serves a host that writes to `reader` and reads what `say` gets, until it shuts the worker down or its input ends;
/// requests that wait then are still done.
///
/// # Errors
/// When a run ended in a fault of dw itself: what the engine looks like after that is unknown.
pub fn serve_lines(
    reader: impl BufRead + Send + 'static,
    say: Say,
    mut engine: Engine,
    options: HostOptions,
) -> Result<(), String> {
    let outbox = Outbox { say, is_gone: Arc::default() };
    outbox.say(&protocol::Answer::Ready { device: engine.device_name() });
    let desk = Arc::new(Desk {
        outbox,
        probe: engine.memory_probe(),
        queue: Queue::default(),
        unnamed: AtomicU64::new(0),
        options,
    });
    let at_the_desk = Arc::clone(&desk);
    let reading = thread::spawn(move || at_the_desk.read_all(reader));
    desk.work(&mut engine)?;
    drop(engine);
    if reading.join().unwrap_or(End::Input) == End::Shutdown {
        desk.outbox.say(&protocol::Answer::ShutdownComplete);
    }
    Ok(())
}

/// The way out, shared by both threads.
#[derive(Clone)]
pub(super) struct Outbox {
    say: Say,
    is_gone: Arc<AtomicBool>,
}

impl Outbox {
    /// Sends an answer as one line.
    pub(super) fn say(&self, answer: &impl Serialize) {
        let line = serde_json::to_string(answer).expect("answers have text keys only");
        if !(self.say)(&line) {
            self.is_gone.store(true, Ordering::SeqCst);
        }
    }

    /// Whether nobody reads any more.
    pub(super) fn is_gone(&self) -> bool {
        self.is_gone.load(Ordering::SeqCst)
    }

    fn fail(&self, request_id: Option<RequestId>, error: Failure) {
        self.say(&Answer::RequestError { request_id, error });
    }
}

/// Why no more lines come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Shutdown,
    Input,
}

/// What both threads share.
struct Desk {
    outbox: Outbox,
    probe: MemoryProbe,
    queue: Queue,
    /// How many workflows came without a name.
    unnamed: AtomicU64,
    options: HostOptions,
}

/// One line of the input.
enum Line {
    Text(String),
    Wrong(&'static str),
    End,
}

fn read_line(reader: &mut impl BufRead) -> io::Result<Line> {
    let mut bytes = Vec::new();
    let read = reader.by_ref().take(LONGEST_LINE).read_until(b'\n', &mut bytes)?;
    if read == 0 {
        return Ok(Line::End);
    }
    if bytes.last() != Some(&b'\n') && read as u64 == LONGEST_LINE {
        // The rest of the line goes unseen.
        while reader.by_ref().take(LONGEST_LINE).read_until(b'\n', &mut bytes)? > 0 && bytes.last() != Some(&b'\n') {
            bytes.clear();
        }
        return Ok(Line::Wrong("is longer than 64 MiB"));
    }
    Ok(String::from_utf8(bytes).map_or(Line::Wrong("is not UTF-8"), Line::Text))
}

impl Desk {
    /// Reads lines until there will be no more. A line that cannot be used gets an error, and the next one is read.
    fn read_all(&self, mut reader: impl BufRead) -> End {
        let end = loop {
            if self.outbox.is_gone() {
                break End::Input;
            }
            match read_line(&mut reader) {
                Ok(Line::Text(text)) if text.trim().is_empty() => {}
                Ok(Line::Text(text)) => {
                    if self.take(&text) == Some(End::Shutdown) {
                        break End::Shutdown;
                    }
                }
                Ok(Line::Wrong(reason)) => self.bad_line(reason),
                Ok(Line::End) | Err(_) => break End::Input,
            }
        };
        let drop_all = end == End::Shutdown || self.outbox.is_gone();
        for id in self.queue.close(drop_all) {
            let message = "the worker was shut down before the request began";
            self.outbox.fail(Some(id), Failure::new(FailureCode::ShuttingDown, message));
        }
        end
    }

    fn bad_line(&self, reason: &str) {
        let failure = Failure::new(FailureCode::BadLine, format!("the line {reason}"))
            .with_remedy("write one JSON object a line, with `method` or `type`");
        self.outbox.fail(None, failure);
    }

    fn take(&self, text: &str) -> Option<End> {
        let members = match serde_json::from_str::<Value>(text) {
            Ok(Value::Object(members)) => members,
            Ok(_) => {
                self.bad_line("is no JSON object");
                return None;
            }
            Err(error) => {
                self.bad_line(&format!("is no JSON: {error}"));
                return None;
            }
        };
        if members.contains_key("method") {
            self.request(&members);
            return None;
        }
        if members.contains_key("type") {
            return self.command(members);
        }
        self.bad_line("has neither `method` nor `type`");
        None
    }

    fn request(&self, members: &Map<String, Value>) {
        let Request { request_id, call } = match Request::read(members) {
            Ok(request) => request,
            Err((id, failure)) => return self.outbox.fail(id, failure),
        };
        let method = call.method().to_owned();
        match call {
            Call::Status => {
                let result = RequestResult::report(self.status());
                self.outbox.say(&Answer::RequestResult { request_id, method, result });
            }
            Call::Cancel(target) => match self.stop(&target.request_id) {
                Ok(what) => {
                    let result = RequestResult::report(json!({ "request_id": target.request_id, "was": what }));
                    self.outbox.say(&Answer::RequestResult { request_id, method, result });
                }
                Err(failure) => self.outbox.fail(Some(request_id), failure),
            },
            call => self.enqueue(request_id.clone(), Work::Request(Request { request_id, call })),
        }
    }

    fn stop(&self, id: &RequestId) -> Result<&'static str, Failure> {
        match self.queue.stop(Some(id)) {
            Stopped::Running => Ok("running"),
            Stopped::Waiting => {
                self.outbox.fail(Some(id.clone()), Failure::new(FailureCode::Cancelled, "cancelled"));
                Ok("waiting")
            }
            Stopped::Unknown => {
                Err(Failure::new(FailureCode::UnknownRequest, format!("no request `{id}` waits or runs"))
                    .with_remedy("`status` lists those that do"))
            }
        }
    }

    fn enqueue(&self, id: RequestId, work: Work) {
        if self.queue.has(&id) {
            let failure = Failure::bad_request(format!("a request `{id}` waits or runs already"))
                .with_remedy("give each request a name of its own");
            return self.outbox.fail(Some(id), failure);
        }
        // Told before it is there: afterwards it may have begun.
        let (running, waiting) = self.queue.ids();
        let before = waiting.len() + usize::from(running.is_some());
        self.outbox.say(&Answer::RequestQueued { request_id: id.clone(), before });
        self.queue.push(Job { id, work, token: CancellationToken::default() });
    }

    /// A command of the worker's protocol.
    fn command(&self, members: Map<String, Value>) -> Option<End> {
        let id = members.get("request_id").and_then(|id| RequestId::deserialize(id).ok());
        let kind = members.get("type").and_then(Value::as_str).unwrap_or_default().to_owned();
        match serde_json::from_value(Value::Object(members)) {
            Ok(Command::Execute(execute)) => {
                let next = || format!("execute-{}", self.unnamed.fetch_add(1, Ordering::Relaxed) + 1);
                self.enqueue(id.unwrap_or_else(|| RequestId::Text(next())), Work::Workflow(execute));
            }
            Ok(Command::Cancel) => match &id {
                Some(id) => {
                    if let Err(failure) = self.stop(id) {
                        self.outbox.fail(Some(id.clone()), failure);
                    }
                }
                None => _ = self.queue.stop(None),
            },
            Ok(Command::Shutdown) => return Some(End::Shutdown),
            Ok(Command::Ping) => self.outbox.say(&protocol::Answer::Pong { run_count: self.probe.run_count() }),
            Ok(Command::MemoryStatus) => {
                self.outbox.say(&protocol::Answer::MemoryStatus { info: self.probe.report() });
            }
            Ok(Command::ClearMemory) => {
                let id = RequestId::Text("clear_memory".to_owned());
                self.queue.push(Job { id, work: Work::Clear, token: CancellationToken::default() });
            }
            Ok(Command::Hello { .. }) => {
                let failure = Failure::bad_request("`hello` belongs to connections over a socket")
                    .with_remedy("leave it out; device and budget are options of `dw worker --stdio`");
                self.outbox.fail(id, failure);
            }
            Err(error) => {
                let failure = Failure::bad_request(format!("command `{kind}` cannot be used: {error}"))
                    .with_remedy("docs/worker-protocol.md lists the commands and their members");
                self.outbox.fail(id, failure);
            }
        }
        None
    }

    fn status(&self) -> Value {
        let (running, waiting) = self.queue.ids();
        json!({ "running": running, "waiting": waiting, "memory": self.probe.report() })
    }

    /// Does what waits until nothing more can come.
    fn work(&self, engine: &mut Engine) -> Result<(), String> {
        while let Some(Job { id, work, token }) = self.queue.next() {
            if self.outbox.is_gone() {
                token.cancel();
            }
            let outcome = catch_unwind(AssertUnwindSafe(|| self.act(engine, &id, &work, &token)));
            self.queue.done();
            match outcome {
                Ok(()) => {}
                Err(panic) => {
                    let message = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
                    let message = message.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
                    let failure = Failure::new(FailureCode::InternalFault, message.clone())
                        .with_remedy("start the worker again; the log says where it happened");
                    self.outbox.fail(Some(id), failure);
                    return Err(format!("a run ended in a panic: {message}"));
                }
            }
        }
        Ok(())
    }

    fn act(&self, engine: &mut Engine, id: &RequestId, work: &Work, token: &CancellationToken) {
        let (method, outcome) = match work {
            Work::Clear => {
                engine.clear();
                self.outbox.say(&protocol::Answer::MemoryCleared { info: self.probe.report() });
                return;
            }
            Work::Workflow(execute) => ("execute", self.workflow(engine, id, execute, token)),
            Work::Request(request) => (request.call.method(), self.plain(engine, request, token)),
        };
        match outcome {
            Ok(result) => {
                let method = method.to_owned();
                self.outbox.say(&Answer::RequestResult { request_id: id.clone(), method, result });
            }
            Err(failure) => self.outbox.fail(Some(id.clone()), failure),
        }
    }

    fn workflow(
        &self,
        engine: &mut Engine,
        id: &RequestId,
        execute: &Execute,
        token: &CancellationToken,
    ) -> Result<RequestResult, Failure> {
        let progress = Progress::new(id, (&self.outbox, token), None);
        if let Some(Err(reason)) = execute.log_level.as_deref().map(self.options.set_log_level) {
            self.outbox.say(&Answer::RequestWarning { request_id: id.clone(), message: reason });
        }
        let request = RunRequest {
            source: Source::File(execute.workflow_path.clone()),
            variables: execute.arguments.clone(),
            seed: execute.seed.clone(),
            output_dir: execute.output_dir.clone(),
            metadata: execute.metadata,
        };
        let planned = self.planned(engine, request, &progress)?;
        let summary = self.run(engine, &planned, &progress, execute.preview_every, token)?;
        let images = summary.files.iter().map(|path| Picture {
            path: Some(path.clone()),
            base64: None,
            content_type: content_type(path),
        });
        Ok(RequestResult::of(&summary, images.collect()))
    }

    fn plain(
        &self,
        engine: &mut Engine,
        request: &Request,
        token: &CancellationToken,
    ) -> Result<RequestResult, Failure> {
        if let Call::Unload(unload) = &request.call {
            let report = match &unload.model_id {
                None => {
                    engine.clear();
                    json!({ "unloaded": true })
                }
                Some(model) => json!({ "unloaded": engine.unload(model) > 0 }),
            };
            return Ok(RequestResult::report(report));
        }
        let prepared = Prepared::new(request, &self.options.output_dir)?;
        let progress = Progress::new(&request.request_id, (&self.outbox, token), Some(prepared.stages));
        let base_dir = std::env::current_dir()
            .map_err(|error| Failure::new(FailureCode::SetupFailed, format!("no current folder: {error}")))?;
        let run = RunRequest {
            source: Source::Text { text: prepared.text.clone(), base_dir },
            variables: Map::new(),
            seed: None,
            output_dir: prepared.output_dir.clone(),
            metadata: true,
        };
        let planned = self.planned(engine, run, &progress)?;
        if let Call::Load(_) = &request.call {
            self.started(&request.request_id);
            let loaded = engine.load(&planned, &progress, token).map_err(|error| Failure::from(&error))?;
            let components: Vec<Value> = loaded
                .iter()
                .map(|part| json!({ "name": part.name, "class": part.class, "bytes": part.bytes }))
                .collect();
            return Ok(RequestResult::report(json!({ "components": components })));
        }
        let summary = self.run(engine, &planned, &progress, prepared.preview_every, token)?;
        Ok(RequestResult::of(&summary, prepared.deliver(&summary.files)?))
    }

    fn planned(&self, engine: &Engine, request: RunRequest, progress: &Progress) -> Result<PlannedRun, Failure> {
        let planned = engine.plan(request).map_err(|findings| Failure::from(&EngineError::Invalid(findings)))?;
        for finding in &planned.plan.warnings {
            let remedy = finding.remedy.as_ref().map(|remedy| format!("; {remedy}")).unwrap_or_default();
            let message = format!("{}{remedy}", finding.message);
            self.outbox.say(&Answer::RequestWarning { request_id: progress.id.clone(), message });
        }
        Ok(planned)
    }

    fn started(&self, id: &RequestId) {
        self.outbox.say(&Answer::RequestStarted { request_id: id.clone() });
    }

    fn run(
        &self,
        engine: &mut Engine,
        planned: &PlannedRun,
        progress: &Progress,
        preview_every: Option<usize>,
        token: &CancellationToken,
    ) -> Result<Summary, Failure> {
        self.started(progress.id);
        let sink = |preview: LatentPreview| progress.preview(&preview);
        let previews = preview_every.map(|every| Previews { every: every.max(1), sink: &sink });
        engine.run_with_previews(planned, progress, token, previews.as_ref()).map_err(|error| Failure::from(&error))
    }
}

/// What kind of file it is, by its ending.
fn content_type(path: &std::path::Path) -> String {
    let ending = path.extension().map(|ending| ending.to_string_lossy().to_lowercase()).unwrap_or_default();
    let known = FORMATS.iter().find(|(known, _)| *known == ending);
    known.map_or("application/octet-stream", |(_, format)| format).to_owned()
}

#[cfg(test)]
mod tests;
