//! The worker's process: connects to whoever started it, runs the workflows it is given, and ends when the
//! other side does.

use std::{
    backtrace::Backtrace,
    io::{Read, Write},
    panic,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use dw_core::{
    cancel::CancellationToken,
    event::{Event, EventSink},
    finding::Finding,
};

use super::{
    frame::FrameError,
    protocol::{Answer, Execute},
    session::{Desk, Outbox, converse},
    socket::{self, Connection},
};
use crate::{Engine, EngineError, LatentPreview, Previews, RunRequest, Source, Summary, fingerprint::Familiarity};

/// What the program around the worker does for it.
pub struct WorkerOptions<'a> {
    /// Changes how much is logged (`DEBUG`, `INFO`, …); an error says why that is no level.
    pub set_log_level: &'a dyn Fn(&str) -> Result<(), String>,
    /// How long after the end of the conversation a run that does not stop may go on; then the process exits.
    /// None to wait for it.
    pub exit_after: Option<Duration>,
}

/// Why a worker ended before its client told it to.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Nobody listens under the name.
    #[error("cannot connect to `{name}`: {reason}; a worker is started by dw itself, not by hand")]
    Connect {
        /// The name.
        name: String,
        /// What the system said.
        reason: std::io::Error,
    },
    /// The client sent something that is no message.
    #[error("the client broke the protocol: {0}")]
    Protocol(#[from] FrameError),
    /// The client is of another version.
    #[error("the client speaks version {0} of the protocol, this worker version {version}; use the same dw for both", version = super::protocol::PROTOCOL_VERSION)]
    Version(u32),
    /// The client did not say who it is.
    #[error("the first message was no `hello`")]
    NoHello,
    /// The engine could not be set up.
    #[error("{0}")]
    Engine(EngineError),
    /// A run panicked.
    #[error("a run ended in a panic: {0}")]
    Panic(String),
}

/// Connects to the client that listens under `name`, proves itself with `secret`, and serves it.
///
/// # Errors
/// When the conversation could not begin, or ended for another reason than that one side wanted it to.
pub fn serve(name: &str, secret: String, options: &WorkerOptions) -> Result<(), ServeError> {
    keep_panics();
    let connect = |reason| ServeError::Connect { name: name.to_owned(), reason };
    let connection = socket::connect(name).map_err(connect)?;
    tracing::info!("connected");
    let ended = converse(Half(connection.clone()), Half(connection), secret, options);
    match &ended {
        Ok(()) => tracing::info!("the conversation is over"),
        Err(error) => tracing::error!("{error}"),
    }
    ended
}

/// A connection as a reader or a writer of its own.
struct Half(Connection);

impl Read for Half {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        (&*self.0).read(buffer)
    }
}

impl Write for Half {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        (&*self.0).write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        (&*self.0).flush()
    }
}

/// Where the last panic happened.
static LAST_PANIC: Mutex<Option<String>> = Mutex::new(None);

/// Keeps the place of panics for [`Answer::WorkerCrashed`]; they are printed as well.
fn keep_panics() {
    let print = panic::take_hook();
    panic::set_hook(Box::new(move |panic| {
        let text = format!("{panic}\n{}", Backtrace::force_capture());
        *LAST_PANIC.lock().unwrap_or_else(PoisonError::into_inner) = Some(text);
        print(panic);
    }));
}

pub(super) fn last_panic() -> Option<String> {
    LAST_PANIC.lock().unwrap_or_else(PoisonError::into_inner).take()
}

/// Runs one workflow and tells the client all about it.
pub(super) fn run(
    desk: &Desk,
    engine: &mut Engine,
    execute: &Execute,
    token: &CancellationToken,
    options: &WorkerOptions,
) {
    if let Some(Err(reason)) = execute.log_level.as_deref().map(options.set_log_level) {
        desk.outbox.send(&Answer::Warning { message: reason });
    }
    tracing::info!(workflow = %execute.workflow_path.display(), "run");
    let result = run_planned(desk, engine, execute, token);
    match &result {
        Ok(_) => tracing::info!("run finished"),
        Err(error) => tracing::warn!("run ended: {error}"),
    }
    let run_count = desk.probe.run_count();
    desk.outbox.send(&Answer::MemoryInfo { info: desk.probe.report() });
    desk.outbox.send(&match result {
        Ok(summary) => Answer::Success { message: "Workflow completed successfully".to_owned(), run_count, summary },
        Err(EngineError::Cancelled) => Answer::Cancelled { run_count },
        Err(EngineError::Invalid(findings)) => {
            let message = format!("Workflow execution error: {}", EngineError::Invalid(findings.clone()));
            Answer::Error { message, findings }
        }
        Err(error) => Answer::Error { message: format!("Workflow execution error: {error}"), findings: Vec::new() },
    });
}

fn run_planned(
    desk: &Desk,
    engine: &mut Engine,
    execute: &Execute,
    token: &CancellationToken,
) -> Result<Summary, EngineError> {
    let output = |message: String| desk.outbox.send(&Answer::Output { message });
    let request = RunRequest {
        source: Source::File(execute.workflow_path.clone()),
        variables: execute.arguments.clone(),
        seed: execute.seed.clone(),
        output_dir: execute.output_dir.clone(),
        metadata: execute.metadata,
    };
    let planned = engine.plan(request).map_err(EngineError::Invalid)?;
    for Finding { message, remedy, place, .. } in &planned.plan.warnings {
        let remedy = remedy.as_ref().map(|remedy| format!("; {remedy}")).unwrap_or_default();
        desk.outbox.send(&Answer::Warning { message: format!("{place}: {message}{remedy}") });
    }
    match engine.familiarity(&planned) {
        Familiarity::Same => {}
        Familiarity::Changed => {
            output("Workflow file changed - loading what is new".to_owned());
            desk.outbox.send(&Answer::WorkflowLoaded { workflow_name: planned.plan.id.clone() });
        }
        Familiarity::New => {
            output(format!("Loading workflow from {}", execute.workflow_path.display()));
            desk.outbox.send(&Answer::WorkflowLoaded { workflow_name: planned.plan.id.clone() });
        }
    }
    output(format!("Executing workflow: {}", planned.plan.id));
    let events = RunEvents { outbox: desk.outbox.clone(), loading: Mutex::default() };
    let sink = |preview: LatentPreview| _ = desk.outbox.send(&Answer::Preview(preview));
    let previews = execute.preview_every.map(|every| Previews { every, sink: &sink });
    engine.run_with_previews(&planned, &events, token, previews.as_ref())
}

/// Sends the events of a run, and says when a step found its models loaded.
struct RunEvents {
    outbox: Outbox,
    loading: Mutex<Loading>,
}

/// What the step that runs has loaded so far.
#[derive(Default)]
struct Loading {
    reused: Vec<String>,
    has_read: bool,
}

impl EventSink for RunEvents {
    fn emit(&self, event: Event) {
        let reused = self.loading.lock().unwrap_or_else(PoisonError::into_inner).note(&event);
        self.outbox.send(&Answer::Event { event });
        if let Some(names) = reused {
            let message = format!("Reusing loaded models from cache: {}", names.join(", "));
            self.outbox.send(&Answer::Output { message });
        }
    }
}

impl Loading {
    /// Takes in an event. Gives the components of a step when it has loaded them without reading anything.
    fn note(&mut self, event: &Event) -> Option<Vec<String>> {
        match event {
            Event::StepStarted { .. } => *self = Self::default(),
            Event::Reused { component } => self.reused.push(component.clone()),
            Event::Loading { .. } | Event::Download { .. } => self.has_read = true,
            Event::StageFinished { stage, .. } if stage == "load" => {
                let Self { reused, has_read } = std::mem::take(self);
                return (!has_read && !reused.is_empty()).then_some(reused);
            }
            _ => {}
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(events: &[Event]) -> Vec<Vec<String>> {
        let mut loading = Loading::default();
        events.iter().filter_map(|event| loading.note(event)).collect()
    }

    fn reused(component: &str) -> Event {
        Event::Reused { component: component.into() }
    }

    fn stage(stage: &str) -> Event {
        Event::StageFinished { step: "a".into(), stage: stage.into(), seconds: 0.0 }
    }

    #[test]
    fn reuse_is_said_once_per_step_with_what_was_reused() {
        let start = Event::StepStarted { step: "a".into(), index: 0 };
        let events =
            [start.clone(), reused("unet"), reused("vae"), stage("load"), stage("denoise"), start, stage("load")];
        assert_eq!(said(&events), [["unet", "vae"]]);
    }

    #[test]
    fn a_step_that_read_anything_did_not_only_reuse() {
        let loading = Event::Loading { component: "unet".into(), bytes: 1, total: 1 };
        assert!(said(&[reused("vae"), loading, stage("load")]).is_empty());
    }
}
