//! Plans: a workflow with its variables bound and everything checked that can be known before a model loads.
//!
//! Reads files only to see whether they are there. Running a plan is left to the engine, expanding
//! references between steps to [`crate::references`].

mod arguments;
mod builder;
mod components;
mod features;
mod late;
mod references;
mod sources;
mod step;
mod subworkflow;
mod unknown_keys;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde_json::{Map, Value};

use crate::{
    catalog::Catalog,
    document::Document,
    finding::Finding,
    seed::Seed,
    workflow::{
        Chain, Component, FromPretrained, IpAdapter, Lora, PipelineConfiguration, RemoteTextEncoder, ResultSpec,
        Scheduler, TextualInversion,
    },
};

pub use sources::{ModelName, SingleFile, model_name, single_file};

/// What a plan is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// To say what is wrong; what this build cannot run is a warning.
    Validate,
    /// To be run; what this build cannot run is an error.
    Run,
}

/// What a plan depends on besides the document.
pub struct PlanInputs<'a> {
    /// Values for declared variables: text from a command line, JSON from a program or a parent step.
    pub overrides: Map<String, Value>,
    /// A seed instead of the workflow's own.
    pub seed: Option<Seed>,
    /// What this build can run.
    pub catalog: &'a Catalog,
    /// The text of a built-in workflow, by its name without `builtin:` (`test.json`).
    pub builtin_workflow: &'a dyn Fn(&str) -> Option<&'static str>,
    /// Workflows that led here, outermost first: a sub-workflow may not be one of them.
    pub ancestors: Vec<PathBuf>,
    /// What the plan is for.
    pub purpose: Purpose,
}

/// A workflow that can run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The workflow's `id`.
    pub id: String,
    /// Folder that relative paths start from.
    pub base_dir: PathBuf,
    /// Default seed of the run; none when nothing names one.
    pub seed: Option<Seed>,
    /// SHA-256 of the document.
    pub sha256: String,
    /// What runs, in order. Under [`Purpose::Validate`], less the steps that wait for a variable nobody declared.
    pub steps: Vec<PlannedStep>,
    /// Workflows that led here and this one: the `ancestors` of its sub-workflows.
    pub ancestors: Vec<PathBuf>,
    /// What somebody should look at.
    pub warnings: Vec<Finding>,
}

/// A step of a plan. References to earlier steps are still in its arguments.
#[derive(Clone, Debug)]
pub struct PlannedStep {
    /// Its name.
    pub name: String,
    /// Its place, from 0.
    pub index: usize,
    /// Its seed: the pipeline's, else the step's; none for the run's default.
    pub seed: Option<Seed>,
    /// What it does.
    pub action: Action,
    /// How its result is saved.
    pub result: Option<ResultSpec>,
    /// Unloads its pipeline afterwards.
    pub release_pipeline: bool,
    /// Drops loaded task models afterwards.
    pub release_models: bool,
    /// JSON pointer of the step in its document.
    pub pointer: String,
}

/// What a step does.
#[derive(Clone, Debug)]
pub enum Action {
    /// Loads and runs a pipeline.
    Pipeline(Box<PipelineStep>),
    /// Runs the pipeline of an earlier step again.
    Reference(Box<ReferenceStep>),
    /// Runs a task.
    Task(TaskStep),
    /// Runs another workflow.
    Workflow(WorkflowStep),
}

/// A pipeline and its call.
#[derive(Clone, Debug)]
pub struct PipelineStep {
    /// Its class, without a leading `diffusers.`.
    pub class: String,
    /// How it is placed and run.
    pub configuration: PipelineConfiguration,
    /// Where its weights come from.
    pub from_pretrained: FromPretrained,
    /// Components that are left out.
    pub omitted: Vec<String>,
    /// Components that do not come with it, by name; several only for ControlNets.
    pub components: BTreeMap<String, Vec<Component>>,
    /// Another scheduler, or other settings.
    pub scheduler: Option<Scheduler>,
    /// The same for the scheduler of the sound.
    pub audio_scheduler: Option<Scheduler>,
    /// LoRA files, in the order they are applied.
    pub loras: Vec<Lora>,
    /// IP-Adapters.
    pub ip_adapters: Vec<IpAdapter>,
    /// Learned words.
    pub textual_inversions: Vec<TextualInversion>,
    /// A service that encodes prompts.
    pub remote_text_encoder: Option<RemoteTextEncoder>,
    /// Components that later steps may reuse.
    pub shared_components: Vec<String>,
    /// Components taken from earlier steps.
    pub reused_components: Vec<String>,
    /// Makes a long video out of several calls.
    pub chain: Option<Chain>,
    /// Arguments of the call.
    pub arguments: Map<String, Value>,
}

/// The pipeline of an earlier step, run again.
#[derive(Clone, Debug)]
pub struct ReferenceStep {
    /// Name of the earlier step.
    pub reference_name: String,
    /// Its place in the plan.
    pub index: usize,
    /// Makes a long video out of several calls.
    pub chain: Option<Chain>,
    /// Arguments of the call.
    pub arguments: Map<String, Value>,
}

/// A task.
#[derive(Clone, Debug)]
pub struct TaskStep {
    /// Its command.
    pub command: String,
    /// What it is given.
    pub input: TaskInput,
    /// The earlier pipeline step that `batch_decode_post_process` takes its processor from.
    pub pipeline_reference: Option<String>,
}

/// What a task is given.
#[derive(Clone, Debug)]
pub enum TaskInput {
    /// Named arguments, expanded to iterations.
    Arguments(Map<String, Value>),
    /// One iteration for each item, taken as it stands.
    Inputs(Vec<Value>),
}

/// Another workflow.
#[derive(Clone, Debug)]
pub struct WorkflowStep {
    /// Where it is.
    pub source: WorkflowSource,
    /// Values for its variables.
    pub arguments: Map<String, Value>,
}

/// Where a sub-workflow is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WorkflowSource {
    /// A file, absolute.
    File(PathBuf),
    /// A workflow inside the program, by its name without `builtin:`.
    Builtin(String),
}

/// Makes a plan of a document, or says everything that is wrong with it, in the order of its text.
pub fn build(document: &Document, inputs: &PlanInputs) -> Result<Plan, Vec<Finding>> {
    builder::build(document, inputs)
}

/// Reads the document of a sub-workflow. `base_dir` is where relative paths of a built-in one start.
pub fn load_workflow(source: &WorkflowSource, inputs: &PlanInputs, base_dir: &Path) -> Result<Document, Vec<Finding>> {
    subworkflow::load(source, inputs, base_dir)
}

#[cfg(test)]
mod tests;
