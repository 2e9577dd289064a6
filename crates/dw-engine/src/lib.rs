//! Runs a plan: gets pipelines from the model cache or loads them, walks the steps, expands
//! iterations, emits events and hands artifacts to the writers of `dw-core`. Prints nothing.

use std::path::PathBuf;

use dw_core::{cancel::CancellationToken, catalog::Catalog, event::EventSink, finding::Finding, seed::Seed};
use serde_json::{Map, Value};

/// Where the workflow text comes from.
#[derive(Clone, Debug)]
pub enum Source {
    /// A file; relative paths inside it start from its folder.
    File(PathBuf),
    /// Text (standard input); relative paths start from the current folder.
    Text(String),
}

/// Settings of an engine that do not change from run to run.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// `cpu`, `cuda`, `cuda:1`, `metal`; none to take the best there is.
    pub device: Option<String>,
    /// Never asks the network.
    pub offline: bool,
    /// `torch-cpu` noise (the default), or the dialect of torch's CUDA generator.
    pub cuda_noise: bool,
}

/// One run.
#[derive(Clone, Debug)]
pub struct RunRequest {
    /// The workflow.
    pub source: Source,
    /// `name=value` overrides: text from a command line, or any JSON from a program.
    pub variables: Map<String, Value>,
    /// A seed instead of the workflow's own, for the whole run.
    pub seed: Option<Seed>,
    /// Where files go; created when missing.
    pub output_dir: PathBuf,
    /// Whether PNG files carry metadata where the workflow does not say (`embed_metadata`).
    pub metadata: bool,
}

/// What a run did.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Summary {
    /// The workflow's `id`.
    pub workflow: String,
    /// Files written, in order.
    pub files: Vec<PathBuf>,
    /// The run's default seed.
    pub seed: Option<Seed>,
    /// Seconds from start to end.
    pub seconds: f64,
}

/// Why a run did not finish.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The document or its arguments are wrong; nothing was loaded.
    #[error("{} problem(s) in the workflow", .0.len())]
    Invalid(Vec<Finding>),
    /// Somebody asked to stop; finished files stay.
    #[error("cancelled")]
    Cancelled,
    /// A step failed.
    #[error("step `{step}`{iteration}: {message}")]
    Step {
        /// The step's name.
        step: String,
        /// ` (iteration 3 of 8)`, or empty when there is one.
        iteration: String,
        /// What happened and what to do.
        message: String,
    },
    /// Something outside the steps failed: the output folder, the device.
    #[error("{0}")]
    Setup(String),
}

/// The engine: a model cache and the device it lives on.
pub struct Engine {
    config: EngineConfig,
}

impl Engine {
    /// An engine with nothing loaded.
    pub fn new(config: EngineConfig) -> Result<Self, EngineError> {
        Ok(Self { config })
    }

    /// Everything this build can run.
    pub fn catalog() -> Catalog {
        Catalog::default()
    }

    /// Everything that is wrong with a workflow, as far as it can be known without loading a model.
    pub fn check(&self, request: &RunRequest) -> Vec<Finding> {
        let _ = (&self.config, request);
        Vec::new()
    }

    /// Runs a workflow.
    pub fn run(
        &mut self,
        request: &RunRequest,
        events: &dyn EventSink,
        cancel: &CancellationToken,
    ) -> Result<Summary, EngineError> {
        let _ = (request, events, cancel);
        Ok(Summary::default())
    }
}
