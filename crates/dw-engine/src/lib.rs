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
    /// Text that is in no file (standard input, the metadata of a picture).
    Text {
        /// The document.
        text: String,
        /// Where relative paths inside it start from.
        base_dir: PathBuf,
    },
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

/// What a run would do, as far as it is known before anything is loaded.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Preview {
    /// The workflow's `id`.
    pub workflow: String,
    /// The run's default seed; none when one would be drawn at random.
    pub seed: Option<Seed>,
    /// The steps, in order.
    pub steps: Vec<StepPreview>,
}

/// What one step would do.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct StepPreview {
    /// The step's name.
    pub step: String,
    /// What runs: ``pipeline `StableDiffusionXLPipeline` ``, ``task `gather_images` ``.
    pub action: String,
    /// The models it loads: the pipeline's own, then components and LoRA files from elsewhere.
    pub models: Vec<ModelPreview>,
    /// How often it runs; none when that depends on earlier results.
    pub iterations: Option<usize>,
    /// Names of the files it would write, as far as they are known.
    pub files: Vec<PathBuf>,
}

/// A model that a step would load.
#[derive(Clone, Debug, serde::Serialize)]
pub struct ModelPreview {
    /// The model as the workflow names it.
    pub name: String,
    /// Bytes of weights to read, when the files are on this machine.
    pub bytes: Option<u64>,
}

/// What this machine offers to models, and where they are kept.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Surroundings {
    /// Devices this build can use, the one it takes by itself first.
    pub devices: Vec<DeviceStatus>,
    /// The folder that models from the hub are kept in.
    pub model_cache: PathBuf,
    /// Whether there is an access token for the hub.
    pub has_token: bool,
    /// Whether the environment switches the network off.
    pub offline: bool,
}

/// A device.
#[derive(Clone, Debug, serde::Serialize)]
pub struct DeviceStatus {
    /// The name that [`EngineConfig::device`] takes.
    pub name: String,
    /// Its memory in bytes, free and in all, where the driver says.
    pub memory: Option<(u64, u64)>,
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

    /// What [`Engine::run`] would do, without loading, running or writing anything.
    pub fn preview(&self, request: &RunRequest) -> Result<Preview, EngineError> {
        let _ = request;
        Ok(Preview::default())
    }

    /// The devices and model folders that this build sees here.
    pub fn surroundings() -> Surroundings {
        Surroundings { devices: Vec::new(), model_cache: PathBuf::new(), has_token: false, offline: false }
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
