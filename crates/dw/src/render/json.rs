//! A run as JSON: one event per line on standard output and nothing else. Beside the engine's events
//! there are lines of our own, one of which is always the last.

use dw_core::{event::Event, finding::Finding};
use dw_engine::{Preview, Summary};
use serde::Serialize;

use super::{View, record::Record, text};

/// A last line, for programs that read the events.
#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub(crate) enum Line<'a> {
    /// What a run would do, for `--dry-run`.
    Preview(&'a Preview),
    /// The run is through.
    RunFinished(&'a Summary),
    /// The run ended early.
    RunFailed {
        /// What happened, as it is also said on standard error.
        message: String,
        /// The exit code of the program.
        exit_code: u8,
        /// What is wrong with the workflow, when that is the reason.
        findings: &'a [Finding],
    },
}

impl Line<'_> {
    /// Writes the line. A reader that went away does not matter any more.
    pub(crate) fn print(&self) {
        print_line(self);
    }
}

/// Prints events as they come.
pub(super) struct JsonView;

impl View for JsonView {
    fn show(&mut self, event: &Event, _: &Record) {
        print_line(event);
    }

    fn say(&mut self, line: &str) {
        text::say(line);
    }

    fn clear(&mut self) {}
}

fn print_line(value: &impl Serialize) {
    match serde_json::to_string(value) {
        Ok(line) => {
            let _ = text::print(&format!("{line}\n"));
        }
        Err(error) => tracing::warn!("an event cannot be written as JSON: {error}"),
    }
}
