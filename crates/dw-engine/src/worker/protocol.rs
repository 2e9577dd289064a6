//! Everything that a worker and its client say to each other: one enum for each direction, each message a
//! JSON object with its name as `type`.
//!
//! How messages travel is [`super::frame`]'s business. A message may have more members than are listed here;
//! they are passed over, so that a newer side can talk to an older one of the same [`PROTOCOL_VERSION`].

use std::path::PathBuf;

use dw_core::{event::Event, finding::Finding, seed::Seed};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::frame::Named;
use crate::{EngineConfig, LatentPreview, MemoryReport, Summary};

/// Both sides have to say the same number in their `hello`.
pub const PROTOCOL_VERSION: u32 = 1;

/// From the client to the worker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Command {
    /// The answer to the worker's `hello`, and what it is to be.
    Hello {
        /// [`PROTOCOL_VERSION`].
        protocol: u32,
        /// The device and how it is used.
        #[serde(default)]
        engine: EngineConfig,
        /// Bytes of weights that may stay loaded between runs; none for 80 % of the device's memory.
        #[serde(default)]
        cache_budget: Option<u64>,
    },
    /// Runs a workflow. Several wait for each other.
    Execute(Execute),
    /// Stops the workflow that runs at its next chance, which is the next denoising step. Models stay loaded.
    Cancel,
    /// Ends the worker once the workflow that runs has been stopped.
    Shutdown,
    /// Asks whether the worker is there. Answered during a run.
    Ping,
    /// Gives up every loaded model, after the workflow that runs.
    ClearMemory,
    /// Asks for the memory report. Answered during a run.
    MemoryStatus,
}

/// A workflow to run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Execute {
    /// The workflow's file.
    pub workflow_path: PathBuf,
    /// Values for its variables: text as from a command line, or any JSON.
    #[serde(default)]
    pub arguments: Map<String, Value>,
    /// Where files go; created when missing.
    pub output_dir: PathBuf,
    /// `DEBUG`, `INFO`, `WARNING`, `ERROR` or `CRITICAL`: how much the worker logs; none to leave it as it is.
    #[serde(default)]
    pub log_level: Option<String>,
    /// A seed instead of the workflow's own.
    #[serde(default)]
    pub seed: Option<Seed>,
    /// Whether PNG files carry metadata where the workflow does not say.
    #[serde(default = "yes")]
    pub metadata: bool,
    /// A preview after every so many denoising steps; none for no previews.
    #[serde(default)]
    pub preview_every: Option<usize>,
}

fn yes() -> bool {
    true
}

/// From the worker to the client.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Answer {
    /// The first message of all.
    Hello {
        /// [`PROTOCOL_VERSION`].
        protocol: u32,
        /// What the client gave the worker to prove itself with.
        secret: String,
        /// dw's version.
        version: String,
        /// The worker's process.
        process_id: u32,
    },
    /// The device is there and workflows can come.
    Ready {
        /// The device (`cpu`, `cuda:0`).
        device: String,
    },
    /// A line for the person who waits.
    Output {
        /// The line.
        message: String,
    },
    /// A workflow was read and checked that this worker has not run before in this form.
    WorkflowLoaded {
        /// The workflow's `id`.
        workflow_name: String,
    },
    /// Something happened in the run.
    Event {
        /// What.
        event: Event,
    },
    /// A look at the picture that is being made.
    Preview(LatentPreview),
    /// Something the user should know that does not stop the run.
    Warning {
        /// What, and what to do about it.
        message: String,
    },
    /// The memory after a run; comes before the run's last message.
    MemoryInfo {
        /// The report.
        info: MemoryReport,
    },
    /// The run is done. Last message of a run.
    Success {
        /// `Workflow completed successfully`.
        message: String,
        /// Runs that this worker has finished.
        run_count: u64,
        /// What the run did.
        summary: Summary,
    },
    /// The run was stopped by `cancel`; finished files stay. Last message of a run.
    Cancelled {
        /// Runs that this worker has finished.
        run_count: u64,
    },
    /// A command could not be done. Last message of a run. The worker goes on.
    Error {
        /// What happened and what to do.
        message: String,
        /// What is wrong with the workflow, where that is the reason.
        #[serde(default)]
        findings: Vec<Finding>,
    },
    /// The run ended in a fault of dw itself. The worker ends after this message.
    WorkerCrashed {
        /// What happened.
        message: String,
        /// Where, as far as it is known.
        traceback: String,
    },
    /// The answer to `shutdown`. Last message of all.
    ShutdownComplete,
    /// The answer to `ping`.
    Pong {
        /// Runs that this worker has finished.
        run_count: u64,
    },
    /// The answer to `clear_memory`.
    MemoryCleared {
        /// What is left.
        info: MemoryReport,
    },
    /// The answer to `memory_status`.
    MemoryStatus {
        /// The report.
        info: MemoryReport,
    },
    /// The worker's process is alive; comes every second, during long operations too.
    Heartbeat,
}

impl Named for Command {
    const NAMES: &'static [&'static str] =
        &["hello", "execute", "cancel", "shutdown", "ping", "clear_memory", "memory_status"];
}

impl Named for Answer {
    const NAMES: &'static [&'static str] = &[
        "hello",
        "ready",
        "output",
        "workflow_loaded",
        "event",
        "preview",
        "warning",
        "memory_info",
        "success",
        "cancelled",
        "error",
        "worker_crashed",
        "shutdown_complete",
        "pong",
        "memory_cleared",
        "memory_status",
        "heartbeat",
    ];
}

/// Bytes as base64 text, for members that hold a picture.
pub(crate) mod base64_text {
    use base64::{Engine as _, prelude::BASE64_STANDARD};

    use serde::{Deserialize, Deserializer, Serializer, de::Error as _};

    pub(crate) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&BASE64_STANDARD.encode(bytes))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(deserializer)?;
        BASE64_STANDARD.decode(text).map_err(D::Error::custom)
    }
}
