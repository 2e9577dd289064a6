//! The client's side: starts workers, gives them work, notices when they die or hang, and cleans up after them.
//!
//! Whatever a worker does, every function here returns, and the next run starts a fresh one when it has to. What a
//! process is made of is in [`super::process`]; this file is what is said to it.

use std::{
    ffi::OsString,
    path::{Path, PathBuf, absolute},
    time::{Duration, Instant},
};

use dw_core::{event::Event, finding::Finding, seed::Seed};
use serde_json::{Map, Value};

use super::{
    CancelSwitch, CrashReport,
    liveness::SILENCE_LIMIT,
    process::{Loss, Process},
    protocol::{Answer, Command, Execute},
    switch::Wish,
};
use crate::{EngineConfig, LatentPreview, MemoryReport, Summary};

/// How long a memory report may take.
const MEMORY_STATUS_LIMIT: Duration = Duration::from_secs(5);

/// How long giving up models may take.
const CLEAR_MEMORY_LIMIT: Duration = Duration::from_secs(30);

/// How workers are started.
#[derive(Clone, Debug)]
pub struct WorkerLaunch {
    /// The program, usually dw itself.
    pub program: PathBuf,
    /// What it is given before `--connect NAME`: the command that makes it a worker.
    pub arguments: Vec<OsString>,
    /// Variables beside those that it inherits.
    pub environment: Vec<(OsString, OsString)>,
    /// The device and how it is used.
    pub engine: EngineConfig,
    /// Bytes of weights that may stay loaded between runs; none for 80 % of the device's memory.
    pub cache_budget: Option<u64>,
    /// The worker's log file; none for the program's usual one.
    pub log_file: Option<PathBuf>,
    /// How long a worker may send nothing, not even heartbeats, before it counts as hung.
    pub silence_limit: Duration,
}

impl WorkerLaunch {
    /// Starts `program worker`, with everything else at its default.
    pub fn new(program: impl Into<PathBuf>) -> Self {
        Self {
            program: program.into(),
            arguments: vec!["worker".into(), "--verbose".into()],
            environment: Vec::new(),
            engine: EngineConfig::default(),
            cache_budget: None,
            log_file: None,
            silence_limit: SILENCE_LIMIT,
        }
    }
}

/// One run of a workflow.
#[derive(Clone, Debug)]
pub struct Job {
    /// The workflow's file.
    pub workflow: PathBuf,
    /// Values for its variables: text as from a command line, or any JSON.
    pub variables: Map<String, Value>,
    /// A seed instead of the workflow's own.
    pub seed: Option<Seed>,
    /// Where files go; created when missing.
    pub output_dir: PathBuf,
    /// Whether PNG files carry metadata where the workflow does not say.
    pub metadata: bool,
    /// A preview after every so many denoising steps; none for no previews.
    pub preview_every: Option<usize>,
    /// `DEBUG`, `INFO`, `WARNING`, `ERROR` or `CRITICAL`: how much the worker logs.
    pub log_level: String,
}

/// Something that arrives during a run.
#[derive(Clone, Debug, PartialEq)]
pub enum Update {
    /// Something happened in the run.
    Event(Event),
    /// A line for the person who waits.
    Output(String),
    /// A workflow was read and checked that the worker has not run before in this form.
    WorkflowLoaded {
        /// The workflow's `id`.
        name: String,
    },
    /// The memory after the run.
    Memory(MemoryReport),
    /// A look at the picture that is being made.
    Preview(LatentPreview),
    /// Something the user should know that does not stop the run.
    Warning(String),
}

/// A run that reached its end.
#[derive(Clone, Debug, PartialEq)]
pub struct Finished {
    /// What it did.
    pub summary: Summary,
    /// Runs that this worker has finished.
    pub run_count: u64,
    /// The memory after it.
    pub memory: MemoryReport,
}

/// Why a worker did not do what it was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WorkerError {
    /// The run failed. The worker goes on.
    #[error("{message}")]
    Failed {
        /// What happened and what to do.
        message: String,
    },
    /// The workflow or its arguments are wrong. The worker goes on.
    #[error("{message}")]
    Invalid {
        /// How much is wrong.
        message: String,
        /// What is wrong.
        findings: Vec<Finding>,
    },
    /// The run was cancelled; finished files and loaded models stay.
    #[error("cancelled")]
    Cancelled,
    /// The worker was killed because its user asked for it; finished files stay.
    #[error("the worker was stopped; the next run starts a fresh one")]
    Killed,
    /// The worker died.
    #[error("{0}")]
    Crashed(Box<CrashReport>),
    /// The worker sent no heartbeat for too long and was killed.
    #[error(
        "the worker gave no sign of life for {} seconds and was stopped; the next run starts a fresh one",
        silence.as_secs()
    )]
    Hung {
        /// How long nothing came.
        silence: Duration,
        /// Its last log lines, oldest first.
        log_lines: Vec<String>,
    },
    /// The worker did not answer in time. It goes on.
    #[error("the worker did not answer within {} seconds", .0.as_secs())]
    TimedOut(Duration),
    /// There is no worker, and the question was not worth starting one.
    #[error("No worker process running")]
    NotRunning,
    /// No worker could be started, or what it said made no sense.
    #[error("{0}")]
    Unreachable(String),
}

/// Keeps at most one worker, and starts it when there is work.
#[derive(Debug)]
pub struct Supervisor {
    launch: WorkerLaunch,
    process: Option<Process>,
}

impl Supervisor {
    /// A supervisor without a worker.
    pub fn new(launch: WorkerLaunch) -> Self {
        Self { launch, process: None }
    }

    /// How workers are started. Changes take effect with the next worker.
    pub fn launch_mut(&mut self) -> &mut WorkerLaunch {
        &mut self.launch
    }

    /// Whether there is a living worker. A dead one is cleaned up.
    pub fn is_running(&mut self) -> bool {
        if self.process.as_mut().is_some_and(|process| !process.is_alive()) {
            self.bury();
        }
        self.process.is_some()
    }

    /// The worker's process.
    pub fn process_id(&self) -> Option<u32> {
        self.process.as_ref().map(Process::id)
    }

    /// The worker's device (`cpu`, `cuda:0`).
    pub fn device_name(&self) -> Option<&str> {
        self.process.as_ref().map(Process::device)
    }

    /// Starts a worker when there is none.
    ///
    /// # Errors
    /// When it cannot be started, or cannot use its device.
    pub fn start(&mut self) -> Result<(), WorkerError> {
        if !self.is_running() {
            self.process = Some(Process::start(&self.launch)?);
        }
        Ok(())
    }

    /// Runs one workflow; starts a worker when none is there. `updates` sees everything as it arrives, in order.
    /// Turning `cancel` stops the run.
    ///
    /// # Errors
    /// What stopped the run. After [`WorkerError::Crashed`], [`WorkerError::Hung`] and [`WorkerError::Killed`] there
    /// is no worker any more.
    pub fn execute(
        &mut self,
        job: &Job,
        updates: &mut dyn FnMut(Update),
        cancel: &CancelSwitch,
    ) -> Result<Finished, WorkerError> {
        self.start()?;
        let output_dir = full_path(&job.output_dir);
        self.running()?.writes_to(&output_dir);
        let execute = Execute {
            workflow_path: full_path(&job.workflow),
            arguments: job.variables.clone(),
            output_dir,
            log_level: Some(job.log_level.clone()).filter(|level| !level.is_empty()),
            seed: job.seed.clone(),
            metadata: job.metadata,
            preview_every: job.preview_every,
        };
        self.send(&Command::Execute(execute))?;
        let mut memory = MemoryReport::default();
        let mut has_cancelled = false;
        loop {
            match cancel.wish() {
                Wish::Kill => {
                    self.bury();
                    return Err(WorkerError::Killed);
                }
                Wish::Cancel if !has_cancelled => {
                    has_cancelled = true;
                    self.send(&Command::Cancel)?;
                }
                Wish::Cancel | Wish::GoOn => {}
            }
            match self.next()? {
                None => {}
                Some(Answer::Event { event }) => updates(Update::Event(event)),
                Some(Answer::Output { message }) => updates(Update::Output(message)),
                Some(Answer::WorkflowLoaded { workflow_name: name }) => updates(Update::WorkflowLoaded { name }),
                Some(Answer::Preview(preview)) => updates(Update::Preview(preview)),
                Some(Answer::Warning { message }) => updates(Update::Warning(message)),
                Some(Answer::MemoryInfo { info }) => {
                    memory = info.clone();
                    updates(Update::Memory(info));
                }
                Some(Answer::Success { run_count, summary, .. }) => return Ok(Finished { summary, run_count, memory }),
                Some(Answer::Cancelled { .. }) => return Err(WorkerError::Cancelled),
                Some(Answer::Error { message, findings }) if findings.is_empty() => {
                    return Err(WorkerError::Failed { message });
                }
                Some(Answer::Error { message, findings }) => return Err(WorkerError::Invalid { message, findings }),
                Some(Answer::WorkerCrashed { message, .. }) => return Err(self.crashed(Some(message))),
                // Late answers to questions that were given up.
                Some(_) => {}
            }
        }
    }

    /// The worker's memory.
    ///
    /// # Errors
    /// [`WorkerError::NotRunning`] when there is no worker; [`WorkerError::TimedOut`] after 5 seconds.
    pub fn memory(&mut self) -> Result<MemoryReport, WorkerError> {
        self.ask(&Command::MemoryStatus, MEMORY_STATUS_LIMIT, |answer| match answer {
            Answer::MemoryStatus { info } => Some(info),
            _ => None,
        })
    }

    /// Gives up all loaded models. A worker that cannot do that within 30 seconds is stopped.
    ///
    /// # Errors
    /// [`WorkerError::NotRunning`] when there is no worker.
    pub fn clear_memory(&mut self) -> Result<MemoryReport, WorkerError> {
        let cleared = self.ask(&Command::ClearMemory, CLEAR_MEMORY_LIMIT, |answer| match answer {
            Answer::MemoryCleared { info } => Some(info),
            _ => None,
        });
        if matches!(cleared, Err(WorkerError::TimedOut(_))) {
            self.shutdown();
        }
        cleared
    }

    /// Asks the worker whether it is there; gives the number of runs it has finished.
    ///
    /// # Errors
    /// [`WorkerError::NotRunning`] when there is no worker; [`WorkerError::TimedOut`] after 5 seconds.
    pub fn ping(&mut self) -> Result<u64, WorkerError> {
        self.ask(&Command::Ping, MEMORY_STATUS_LIMIT, |answer| match answer {
            Answer::Pong { run_count } => Some(run_count),
            _ => None,
        })
    }

    /// Ends the worker and starts a fresh one.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn restart(&mut self) -> Result<(), WorkerError> {
        self.shutdown();
        self.start()
    }

    /// Ends the worker: asks it, after 10 seconds has it terminated, after 5 more killed.
    pub fn shutdown(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.shut_down();
        }
    }

    /// Asks one question and waits for its answer.
    fn ask<A>(
        &mut self,
        command: &Command,
        limit: Duration,
        answer: impl Fn(Answer) -> Option<A>,
    ) -> Result<A, WorkerError> {
        if !self.is_running() {
            return Err(WorkerError::NotRunning);
        }
        self.send(command)?;
        let deadline = Instant::now() + limit;
        while Instant::now() < deadline {
            match self.next()? {
                Some(Answer::Error { message, .. }) => return Err(WorkerError::Unreachable(message)),
                Some(other) => {
                    if let Some(answer) = answer(other) {
                        return Ok(answer);
                    }
                }
                None => {}
            }
        }
        Err(WorkerError::TimedOut(limit))
    }

    fn running(&mut self) -> Result<&mut Process, WorkerError> {
        self.process.as_mut().ok_or(WorkerError::NotRunning)
    }

    fn send(&mut self, command: &Command) -> Result<(), WorkerError> {
        match self.running()?.send(command) {
            Ok(()) => Ok(()),
            Err(loss) => Err(self.lost(loss)),
        }
    }

    /// The next answer; none when nothing has come for a moment.
    fn next(&mut self) -> Result<Option<Answer>, WorkerError> {
        match self.running()?.next() {
            Ok(answer) => Ok(answer),
            Err(loss) => Err(self.lost(loss)),
        }
    }

    /// What the loss of the worker means to the caller. Afterwards nothing of it is left.
    fn lost(&mut self, loss: Loss) -> WorkerError {
        match loss {
            Loss::Gone => self.crashed(None),
            Loss::Nonsense(reason) => {
                self.bury();
                WorkerError::Unreachable(format!("the worker broke the protocol ({reason}) and was stopped"))
            }
            Loss::Hung(silence) => {
                let log_lines = self.bury().map(|report| report.log_lines).unwrap_or_default();
                WorkerError::Hung { silence, log_lines }
            }
        }
    }

    fn crashed(&mut self, message: Option<String>) -> WorkerError {
        let Some(mut process) = self.process.take() else { return WorkerError::NotRunning };
        process.await_end();
        WorkerError::Crashed(Box::new(process.bury(message)))
    }

    /// Kills what there may be of a worker and removes what it left behind.
    fn bury(&mut self) -> Option<CrashReport> {
        self.process.take().map(|mut process| process.bury(None))
    }
}

/// A path that means the same in another process.
fn full_path(path: &Path) -> PathBuf {
    absolute(path).unwrap_or_else(|_| path.to_owned())
}
