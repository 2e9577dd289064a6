//! The engine: settings, the device, the model cache, and the way from a request to a summary.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::Arc,
};

use candle_core::Device;
use dw_core::{
    cancel::CancellationToken,
    catalog::Catalog,
    document::Document,
    event::{Event, EventSink},
    finding::Finding,
    plan::{self, Plan, PlanInputs, Purpose},
    seed::Seed,
    variables::Bindings,
};
use dw_pipelines::{
    hub::Hub,
    pipelines::{ComponentCache, ComponentSummary},
    release_freed_memory,
};
use serde_json::{Map, Value};

use crate::{
    LatentPreview, MemoryReport, builtin,
    catalog::catalog,
    error::EngineError,
    fingerprint::{self, Familiarity, KnownWorkflows},
    memory::MemoryProbe,
    run,
};

/// Where the workflow text comes from.
#[derive(Clone, Debug)]
pub enum Source {
    /// A file; relative paths inside it start from its folder.
    File(PathBuf),
    /// Text, with the folder that relative paths inside it start from.
    Text {
        /// The JSON text.
        text: String,
        /// The folder.
        base_dir: PathBuf,
    },
}

/// Settings of an engine that do not change from run to run.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct EngineConfig {
    /// `cpu`, `cuda`, `cuda:1`, `metal`; none to take the best there is.
    pub device: Option<String>,
    /// Never asks the network.
    pub offline: bool,
    /// Noise as torch's CUDA generator draws it, instead of its CPU generator.
    pub cuda_noise: bool,
    /// Loads what does not seem to fit into memory, too.
    pub ignore_fit: bool,
}

/// One run.
#[derive(Clone, Debug)]
pub struct RunRequest {
    /// The workflow.
    pub source: Source,
    /// `name=value` overrides: text from a command line, or any JSON from a program.
    pub variables: Map<String, Value>,
    /// A seed instead of the workflow's own. Steps that name a seed keep it.
    pub seed: Option<Seed>,
    /// Where files go; created when missing.
    pub output_dir: PathBuf,
    /// Whether PNG files carry metadata where the workflow does not say (`embed_metadata`).
    pub metadata: bool,
}

/// What a run did.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Summary {
    /// The workflow's `id`.
    pub workflow: String,
    /// Files written, in order.
    pub files: Vec<PathBuf>,
    /// The run's default seed.
    pub seed: Option<Seed>,
    /// Whether dw drew that seed itself.
    pub random_seed: bool,
    /// Seconds from start to end.
    pub seconds: f64,
}

/// A workflow that was read and checked, ready to run.
#[derive(Clone, Debug)]
pub struct PlannedRun {
    /// The steps, with every variable bound.
    pub plan: Plan,
    /// What was asked for.
    pub request: RunRequest,
    /// The workflow's JSON with the overrides as defaults, as it is embedded in pictures.
    pub(crate) document: Value,
    /// The workflow's file name.
    pub(crate) file_name: Option<String>,
    /// SHA-256 of the workflow with its sub-workflows, in hexadecimal.
    pub(crate) fingerprint: String,
}

/// Looks at the pictures of a run while they are made.
pub struct Previews<'a> {
    /// A look after every so many denoising steps, and after the last one.
    pub every: usize,
    /// Takes a look. Called from the thread that does the work, so it should be quick.
    pub sink: &'a (dyn Fn(LatentPreview) + Sync),
}

/// A model cache and the device it lives on.
pub struct Engine {
    pub(crate) config: EngineConfig,
    pub(crate) device: Device,
    pub(crate) hub: Hub,
    pub(crate) cache: ComponentCache,
    pub(crate) catalog: Arc<Catalog>,
    probe: MemoryProbe,
    known: KnownWorkflows,
    /// The keys of the components that came with each model, by the model's name as workflows write it.
    pub(crate) models: BTreeMap<String, BTreeSet<String>>,
}

impl Engine {
    /// An engine with nothing loaded, on the device of `config`, that keeps as much loaded as 80 % of the device's
    /// memory holds.
    ///
    /// # Errors
    /// When that device does not exist or this build cannot use it.
    pub fn new(config: EngineConfig) -> Result<Self, EngineError> {
        Self::with_budget(config, None)
    }

    /// As [`Self::new`], with at most `budget` bytes of weights kept loaded.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn with_budget(config: EngineConfig, budget: Option<u64>) -> Result<Self, EngineError> {
        let device = dw_pipelines::device::pick(config.device.as_deref()).map_err(setup)?;
        let hub = Hub::from_env(config.offline);
        let cache = ComponentCache::default();
        let probe = MemoryProbe::new(device.clone(), cache.inventory(), budget);
        let (catalog, known) = (Arc::new(catalog()), KnownWorkflows::default());
        Ok(Self { config, device, hub, cache, catalog, probe, known, models: BTreeMap::new() })
    }

    /// Everything this build can run.
    pub fn catalog() -> Catalog {
        catalog()
    }

    /// The name of the device that pipelines run on where the workflow does not say.
    pub fn device_name(&self) -> String {
        dw_pipelines::device::name(&self.device)
    }

    /// Reads and checks a workflow for a run. Nothing is loaded or written.
    ///
    /// # Errors
    /// All findings in one go when one of them is an error.
    pub fn plan(&self, request: RunRequest) -> Result<PlannedRun, Vec<Finding>> {
        prepare(request, &self.catalog)
    }

    /// Runs a checked workflow.
    ///
    /// # Errors
    /// What stopped the run. Files that were finished before stay.
    pub fn run(
        &mut self,
        planned: &PlannedRun,
        events: &dyn EventSink,
        cancel: &CancellationToken,
    ) -> Result<Summary, EngineError> {
        self.run_with_previews(planned, events, cancel, None)
    }

    /// As [`Self::run`], with looks at the pictures while they are made, where the model is one whose latents can
    /// be shown without decoding them.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn run_with_previews(
        &mut self,
        planned: &PlannedRun,
        events: &dyn EventSink,
        cancel: &CancellationToken,
        previews: Option<&Previews>,
    ) -> Result<Summary, EngineError> {
        self.cache.set_budget(self.probe.budget_now());
        let result = run::run(self, planned, events, cancel, previews);
        if result.is_ok()
            && let Some(gone) = self.known.note(planned)
        {
            self.cache.disown(&gone);
        }
        self.tidy();
        if let Some(message) = self.probe.settle(result.is_ok()) {
            events.emit(Event::Warning { message });
        }
        result
    }

    /// Loads the pipelines of a checked workflow and keeps their components, without running a step.
    ///
    /// # Errors
    /// What stopped the loading.
    pub fn load(
        &mut self,
        planned: &PlannedRun,
        events: &dyn EventSink,
        cancel: &CancellationToken,
    ) -> Result<Vec<ComponentSummary>, EngineError> {
        self.cache.set_budget(self.probe.budget_now());
        let loaded = run::load(self, planned, events, cancel);
        self.tidy();
        loaded
    }

    /// Leaves nothing in memory beyond what the cache may keep.
    fn tidy(&mut self) {
        self.cache.make_room(0);
        release_freed_memory();
    }

    /// Gives up the components that came with a model, named as workflows name it; how many there were. What a run
    /// holds stays until it ends.
    pub fn unload(&mut self, model: &str) -> usize {
        let keys = self.models.remove(model.trim()).unwrap_or_default();
        let count = keys.iter().filter(|key| self.cache.release(key)).count();
        release_freed_memory();
        count
    }

    /// Whether this engine has run a workflow before.
    pub(crate) fn familiarity(&self, planned: &PlannedRun) -> Familiarity {
        self.known.familiarity(planned)
    }

    /// The memory of the device and of this process.
    pub fn memory(&self) -> MemoryReport {
        self.probe.report()
    }

    /// Reports memory from other threads, during runs too.
    pub(crate) fn memory_probe(&self) -> MemoryProbe {
        self.probe.clone()
    }

    /// Forgets every loaded component that is not in use.
    pub fn clear(&mut self) {
        self.cache.clear();
        self.known = KnownWorkflows::default();
        self.models.clear();
        release_freed_memory();
    }
}

/// Everything that is wrong with a workflow, as far as it can be known without loading a model.
/// Needs no device. Warnings and errors, sorted by position.
pub fn check(request: &RunRequest) -> Vec<Finding> {
    let catalog = catalog();
    let document = match read(&request.source) {
        Ok(document) => document,
        Err(findings) => return findings,
    };
    match plan::build(&document, &inputs(request, &catalog, Purpose::Validate)) {
        Ok(plan) => plan.warnings,
        Err(findings) => findings,
    }
}

fn prepare(request: RunRequest, catalog: &Catalog) -> Result<PlannedRun, Vec<Finding>> {
    let document = read(&request.source)?;
    let plan = plan::build(&document, &inputs(&request, catalog, Purpose::Run))?;
    let file_name = match &request.source {
        Source::File(path) => path.file_name().map(|name| name.to_string_lossy().into_owned()),
        Source::Text { .. } => None,
    };
    let fingerprint = fingerprint::of(&document, &plan);
    let document = with_defaults(&document, &request.variables);
    Ok(PlannedRun { plan, request, document, file_name, fingerprint })
}

fn read(source: &Source) -> Result<Document, Vec<Finding>> {
    match source {
        Source::File(path) => Document::load(path),
        Source::Text { text, base_dir } => Document::from_text(text, base_dir),
    }
}

fn inputs<'a>(request: &RunRequest, catalog: &'a Catalog, purpose: Purpose) -> PlanInputs<'a> {
    PlanInputs {
        overrides: request.variables.clone(),
        seed: request.seed.clone(),
        catalog,
        builtin_workflow: &builtin::workflow,
        ancestors: Vec::new(),
        purpose,
    }
}

/// The document with overrides, converted, as the defaults of its variables: what a picture's metadata
/// holds, so that the picture can be made again.
fn with_defaults(document: &Document, overrides: &Map<String, Value>) -> Value {
    let mut value = document.value.clone();
    if let Some(variables) = value.get_mut("variables").and_then(Value::as_object_mut) {
        let (bindings, _) = Bindings::new(Some(&*variables), overrides);
        for (name, default) in variables.iter_mut().filter(|(name, _)| overrides.contains_key(*name)) {
            *default = bindings.get(name).cloned().unwrap_or_default();
        }
    }
    value
}

pub(crate) fn setup(error: impl std::fmt::Display) -> EngineError {
    EngineError::Setup(error.to_string())
}
