//! What people and programs see of a run. One sink takes the engine's events, keeps a record of them
//! for the summary, and passes them to the view that fits the terminal and the options.

mod excerpt;
pub(crate) mod findings;
mod json;
pub(crate) mod memory;
mod plain;
pub(crate) mod record;
pub(crate) mod summary;
pub(crate) mod table;
mod terminal;
pub(crate) mod text;

use std::{
    io::IsTerminal,
    sync::{Mutex, MutexGuard, PoisonError},
};

use dw_core::event::{Event, EventSink};

use crate::session::Session;
use record::Record;

pub(crate) use json::Line;

/// One way to show a run. The record already holds the event.
trait View: Send {
    /// Shows an event.
    fn show(&mut self, event: &Event, record: &Record);
    /// Says a line without disturbing what is being drawn.
    fn say(&mut self, line: &str);
    /// Takes away what was only meant to be seen during the run.
    fn clear(&mut self);
}

/// The sink that the engine reports to.
pub(crate) struct Reporter {
    state: Mutex<State>,
}

struct State {
    record: Record,
    view: Box<dyn View>,
    /// Whether the path of each file goes to standard output as it is written.
    list_files: bool,
}

impl Reporter {
    /// The view that fits: JSON when asked for, a progress bar on a terminal, lines elsewhere.
    pub(crate) fn new(json: bool, session: &Session) -> Self {
        let view: Box<dyn View> = if json {
            Box::new(json::JsonView)
        } else if session.quiet {
            Box::new(Quiet)
        } else if std::io::stderr().is_terminal() && !session.logs_to_console {
            Box::new(terminal::TerminalView::new())
        } else {
            Box::new(plain::PlainView::default())
        };
        let list_files = !json && !std::io::stdout().is_terminal();
        Self { state: Mutex::new(State { record: Record::default(), view, list_files }) }
    }

    /// A reporter that only keeps the record.
    pub(crate) fn silent() -> Self {
        Self { state: Mutex::new(State { record: Record::default(), view: Box::new(Quiet), list_files: false }) }
    }

    /// Says a line to the person at the terminal.
    pub(crate) fn say(&self, line: &str) {
        self.state().view.say(line);
    }

    /// Ends the display and hands out what happened.
    pub(crate) fn finish(&self) -> Record {
        let mut state = self.state();
        state.view.clear();
        std::mem::take(&mut state.record)
    }

    /// A panic elsewhere does not make the record unusable.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl EventSink for Reporter {
    fn emit(&self, event: Event) {
        log(&event);
        let state = &mut *self.state();
        state.record.add(&event);
        state.view.show(&event, &state.record);
        if let Event::FileWritten { path } = &event
            && state.list_files
        {
            // A reader that went away must not stop the pictures.
            let _ = text::print(&format!("{}\n", path.display()));
        }
    }
}

/// Puts into the log what may be looked for later.
fn log(event: &Event) {
    match event {
        Event::RunStarted { workflow, seed, .. } => tracing::info!("running {workflow}, seed {}", text::seed(seed)),
        Event::StepFinished { step, seconds, .. } => tracing::info!("step {step} took {seconds:.3} s"),
        Event::FileWritten { path } => tracing::info!("wrote {}", path.display()),
        Event::Warning { message } => tracing::warn!("{message}"),
        other => tracing::trace!("{other:?}"),
    }
}

/// Shows nothing.
struct Quiet;

impl View for Quiet {
    fn show(&mut self, _: &Event, _: &Record) {}

    fn say(&mut self, _: &str) {}

    fn clear(&mut self) {}
}
