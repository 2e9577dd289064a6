//! One conversation, from the worker's side, over any pair of byte streams: who reads, who writes, who works.
//!
//! The thread that calls [`converse`] owns the engine and runs workflows. A second thread reads, so that
//! `cancel`, `ping` and `memory_status` are answered during a run; a third sends heartbeats.

use std::{
    any::Any,
    collections::VecDeque,
    io::{Read, Write},
    panic::{AssertUnwindSafe, catch_unwind},
    process,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, Receiver, RecvTimeoutError, Sender},
    },
    thread,
    time::Duration,
};

use dw_core::cancel::CancellationToken;

use super::{
    frame::{self, FrameError},
    liveness::HEARTBEAT_INTERVAL,
    protocol::{Answer, Command, Execute, PROTOCOL_VERSION},
    server::{ServeError, WorkerOptions},
};
use crate::{Engine, EngineConfig, memory::MemoryProbe};

/// The way out, shared by all threads. A message that cannot be sent is dropped: the reading thread notices
/// that the client is gone.
#[derive(Clone)]
pub(super) struct Outbox(Arc<Mutex<dyn Write + Send>>);

impl Outbox {
    pub(super) fn new(writer: impl Write + Send + 'static) -> Self {
        Self(Arc::new(Mutex::new(writer)))
    }

    /// Sends a message; false when the connection is gone.
    pub(super) fn send(&self, answer: &Answer) -> bool {
        let mut writer = lock(&self.0);
        frame::write(&mut *writer, answer).is_ok()
    }
}

/// What the reading thread hands to the one that works.
pub(super) enum Task {
    /// A workflow, and the token that stops it.
    Run(Box<Execute>, CancellationToken),
    /// Give up loaded models.
    Clear,
}

/// What the reading and the working thread share.
pub(super) struct Desk {
    pub(super) outbox: Outbox,
    pub(super) probe: MemoryProbe,
    /// Tokens of the runs that have not ended, the one that runs first.
    open_runs: Mutex<VecDeque<CancellationToken>>,
    /// Whether everything that waits is to be dropped.
    closing: AtomicBool,
}

/// Speaks with the client until it ends the conversation. `secret` proves to the client who we are.
pub(super) fn converse(
    mut reader: impl Read + Send + 'static,
    writer: impl Write + Send + 'static,
    secret: String,
    options: &WorkerOptions,
) -> Result<(), ServeError> {
    let outbox = Outbox::new(writer);
    let hello = Answer::Hello {
        protocol: PROTOCOL_VERSION,
        secret,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        process_id: process::id(),
    };
    outbox.send(&hello);
    let (config, cache_budget) = match read_hello(&mut reader) {
        Ok(Some(hello)) => hello,
        Ok(None) => return Ok(()),
        Err(error) => {
            outbox.send(&Answer::Error { message: error.to_string(), findings: Vec::new() });
            return Err(error);
        }
    };
    let _heart = Heart::start(outbox.clone());
    let mut engine = Engine::with_budget(config, cache_budget).map_err(|error| {
        outbox.send(&Answer::Error { message: error.to_string(), findings: Vec::new() });
        ServeError::Engine(error)
    })?;
    outbox.send(&Answer::Ready { device: engine.device_name() });
    let desk = Arc::new(Desk {
        outbox,
        probe: engine.memory_probe(),
        open_runs: Mutex::default(),
        closing: AtomicBool::new(false),
    });
    let (tasks, waiting) = mpsc::channel();
    let at_the_desk = Arc::clone(&desk);
    let exit_after = options.exit_after;
    let reading = thread::spawn(move || at_the_desk.read_all(&mut reader, &tasks, exit_after));
    desk.work(&waiting, &mut engine, options)?;
    let end = reading.join().unwrap_or(Ok(End::Gone))?;
    // Loaded models go before the last message, so that a client which waits for it finds the memory free.
    drop(engine);
    if end == End::Shutdown {
        desk.outbox.send(&Answer::ShutdownComplete);
    }
    Ok(())
}

/// The client's `hello`; none when it left without a word.
fn read_hello(reader: &mut impl Read) -> Result<Option<(EngineConfig, Option<u64>)>, ServeError> {
    let Some(body) = frame::read(reader)? else { return Ok(None) };
    match frame::decode(&body)? {
        Command::Hello { protocol: PROTOCOL_VERSION, engine, cache_budget } => Ok(Some((engine, cache_budget))),
        Command::Hello { protocol, .. } => Err(ServeError::Version(protocol)),
        _ => Err(ServeError::NoHello),
    }
}

/// Why a conversation ended in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Shutdown,
    Gone,
}

impl Desk {
    /// Reads commands until there will be no more.
    fn read_all(
        &self,
        reader: &mut impl Read,
        tasks: &Sender<Task>,
        exit_after: Option<Duration>,
    ) -> Result<End, FrameError> {
        let end = self.read_until_end(reader, tasks);
        if let Err(error) = &end {
            self.outbox.send(&error_answer(error));
        }
        self.close();
        if let Some(patience) = exit_after {
            // The run should stop by itself at its next step. One that does not must not keep an orphan alive.
            thread::spawn(move || {
                thread::sleep(patience);
                process::exit(1);
            });
        }
        end
    }

    fn read_until_end(&self, reader: &mut impl Read, tasks: &Sender<Task>) -> Result<End, FrameError> {
        loop {
            let body = match frame::read(reader) {
                Ok(Some(body)) => body,
                // A client that dies in the middle of a word is gone all the same.
                Ok(None) | Err(FrameError::Io(_)) => return Ok(End::Gone),
                Err(error) => return Err(error),
            };
            match frame::decode(&body) {
                Ok(Command::Shutdown) => return Ok(End::Shutdown),
                Ok(command) => self.take(command, tasks),
                Err(error @ FrameError::Message(_)) => _ = self.outbox.send(&error_answer(&error)),
                Err(error) => return Err(error),
            }
        }
    }

    fn take(&self, command: Command, tasks: &Sender<Task>) {
        match command {
            Command::Execute(execute) => {
                let token = CancellationToken::default();
                lock(&self.open_runs).push_back(token.clone());
                // Fails only while the worker ends.
                let _ = tasks.send(Task::Run(Box::new(execute), token));
            }
            Command::Cancel => {
                if let Some(token) = lock(&self.open_runs).front() {
                    token.cancel();
                }
            }
            Command::Ping => _ = self.outbox.send(&Answer::Pong { run_count: self.probe.run_count() }),
            Command::ClearMemory => _ = tasks.send(Task::Clear),
            Command::MemoryStatus => _ = self.outbox.send(&Answer::MemoryStatus { info: self.probe.report() }),
            Command::Hello { .. } => {
                let message = "`hello` comes once, at the beginning".to_owned();
                self.outbox.send(&Answer::Error { message, findings: Vec::new() });
            }
            Command::Shutdown => unreachable!("`read_until_end` has dealt with it"),
        }
    }

    /// Stops everything that runs or waits.
    fn close(&self) {
        self.closing.store(true, Ordering::SeqCst);
        lock(&self.open_runs).iter().for_each(CancellationToken::cancel);
    }

    /// Runs what comes until nothing can come any more.
    fn work(&self, waiting: &Receiver<Task>, engine: &mut Engine, options: &WorkerOptions) -> Result<(), ServeError> {
        for task in waiting {
            if self.closing.load(Ordering::SeqCst) {
                continue;
            }
            match task {
                Task::Run(execute, token) => {
                    let run = AssertUnwindSafe(|| super::server::run(self, engine, &execute, &token, options));
                    if let Err(panic) = catch_unwind(run) {
                        return Err(self.crash(&*panic));
                    }
                    lock(&self.open_runs).pop_front();
                }
                Task::Clear => {
                    engine.clear();
                    self.outbox.send(&Answer::MemoryCleared { info: self.probe.report() });
                }
            }
        }
        Ok(())
    }

    /// Says that a run panicked. What the engine looks like after that is unknown, so the worker ends.
    fn crash(&self, panic: &(dyn Any + Send)) -> ServeError {
        let message = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
        let message = message.or_else(|| panic.downcast_ref::<String>().cloned());
        let message = message.unwrap_or_else(|| "a panic without a message".to_owned());
        let traceback = super::server::last_panic().unwrap_or_default();
        self.outbox.send(&Answer::WorkerCrashed { message: message.clone(), traceback });
        ServeError::Panic(message)
    }
}

fn error_answer(error: &FrameError) -> Answer {
    Answer::Error { message: error.to_string(), findings: Vec::new() }
}

/// Sends heartbeats from a thread of its own until it is dropped.
struct Heart(#[expect(dead_code, reason = "dropping it ends the thread")] Sender<()>);

impl Heart {
    fn start(outbox: Outbox) -> Self {
        let (alive, stopped) = mpsc::channel();
        thread::spawn(move || {
            while stopped.recv_timeout(HEARTBEAT_INTERVAL) == Err(RecvTimeoutError::Timeout) {
                if !outbox.send(&Answer::Heartbeat) {
                    break;
                }
            }
        });
        Self(alive)
    }
}

/// The content of a mutex. A thread that panicked while it held one has not broken what is inside: every change
/// here is a single step.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
