//! Everything a workflow step can do that is not a diffusion pipeline: pictures, text, gathering.
//!
//! One row per command in [`registry`]; each command declares its arguments as a struct, from which
//! validation, documentation and the schema come. Knows no step, no model and no command line.

mod arguments;
mod border;
mod canny;
mod crop;
mod frames;
mod gather;
mod picture;
mod qr;
pub mod registry;
mod resize;
#[cfg(test)]
mod testing;
mod text;
mod watermark;

use std::path::Path;

use dw_core::{arguments::Arguments, artifact::Artifact, cancel::CancellationToken, event::EventSink};

/// What goes with every task call.
#[derive(Clone, Copy)]
pub struct TaskContext<'a> {
    /// Folder that relative paths start from: the workflow's.
    pub base_dir: &'a Path,
    /// Takes warnings.
    pub events: &'a dyn EventSink,
    /// Looked at between pictures.
    pub cancel: &'a CancellationToken,
    /// Fetches a picture from an `http(s)` URL; an error text when that is not possible.
    pub fetch: &'a dyn Fn(&str) -> Result<Vec<u8>, String>,
}

/// What a task returned.
#[derive(Clone, Debug)]
pub enum TaskOutput {
    /// One result entry.
    One(Artifact),
    /// Several result entries, one for each artifact.
    Many(Vec<Artifact>),
}

/// Why a task failed.
#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    /// The caller asked to stop.
    #[error(transparent)]
    Cancelled(#[from] dw_core::cancel::Cancelled),
    /// An argument is missing, unknown or of the wrong type.
    #[error("argument `{name}`: {reason}")]
    Argument {
        /// The argument.
        name: String,
        /// What is wrong, and the remedy.
        reason: String,
    },
    /// The command ran and could not do its work.
    #[error("{0}")]
    Failed(String),
}

/// One command.
pub struct Task {
    /// What a workflow writes as `command`.
    pub name: &'static str,
    /// What it does, in a sentence.
    pub summary: &'static str,
    /// JSON Schema of its arguments.
    pub schema: fn() -> serde_json::Value,
    /// Runs it.
    pub run: fn(&Arguments, &TaskContext) -> Result<TaskOutput, TaskError>,
}
