//! The typed form of a workflow document, and the JSON Schema that is generated from it.
//!
//! Unknown classes and commands stay text here: a document may be right for another build of dw.
//! Whether names exist and values fit is left to [`crate::plan`].

#[cfg(test)]
mod cases;
mod configuration;
mod pipeline;
mod schema;
mod validate;
mod values;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

pub(crate) use crate::nearest::nearest;
pub use configuration::{
    Cache, CacheType, CompileOptions, ComponentPlacement, ComponentsManager, GroupOffload, LayerwiseCasting,
    LoadComponents, MagRatios, ModuleSettings, Offload, PipelineConfiguration, Residency, TeaCache, Tiling,
    VaeSettings,
};
pub use pipeline::{
    Chain, Component, ComponentConfiguration, Continuity, ControlNet, FrameSnap, FromPretrained, IpAdapter, Lora,
    Pipeline, QuantizationClass, QuantizationConfig, RemoteTextEncoder, Scheduler, SchedulerConfiguration,
    TextualInversion,
};
pub use schema::{schema, strict_schema};
pub use validate::check;
pub(crate) use validate::{Structure, describe, join_words};
pub use values::{Dtype, Integer, NumberOrText, OneOrMany};

use crate::seed::Seed;

/// A declarative diffusion workflow: named steps that run in order.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct Workflow {
    /// Identity of the workflow; output file names begin with it.
    pub id: String,
    /// What the workflow does, for people.
    pub description: Option<String>,
    /// Declared variables with their defaults. The type of a default is the type of the variable; `null` leaves it open.
    pub variables: Option<Map<String, Value>>,
    /// Default seed of the run: a whole number, or a list with one seed for each picture.
    pub seed: Option<Seed>,
    /// What runs, in order.
    #[schemars(length(min = 1))]
    pub steps: Vec<Step>,
}

/// One step: a name and exactly one action (`task`, `pipeline`, `pipeline_reference` or `workflow`).
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[schemars(extend("oneOf" = [
    { "required": ["task"] },
    { "required": ["pipeline"] },
    { "required": ["pipeline_reference"] },
    { "required": ["workflow"] }
]))]
pub struct Step {
    /// Identity of the step: later steps refer to it, and output file names contain it.
    pub name: String,
    /// Seed of this step, instead of the workflow's.
    pub seed: Option<Seed>,
    /// Unloads this step's pipeline after the step.
    pub release_pipeline: Option<bool>,
    /// Drops the loaded task models after the step.
    pub release_models: Option<bool>,
    /// Runs a task.
    pub task: Option<Task>,
    /// Loads and runs a pipeline.
    pub pipeline: Option<Box<Pipeline>>,
    /// Runs the pipeline of an earlier step again.
    pub pipeline_reference: Option<PipelineReference>,
    /// Runs another workflow.
    pub workflow: Option<WorkflowReference>,
    /// How the step's result is saved; without it nothing is.
    pub result: Option<ResultSpec>,
}

/// A task: a command with either named `arguments` or a list of `inputs`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[schemars(extend("oneOf" = [{ "required": ["arguments"] }, { "required": ["inputs"] }]))]
pub struct Task {
    /// Name of the command.
    pub command: String,
    /// Named arguments; `previous_result:` references expand to iterations.
    pub arguments: Option<Map<String, Value>>,
    /// A list; each item is one iteration, taken as it stands.
    #[serde(default)]
    #[schemars(schema_with = "values::inputs_schema")]
    pub inputs: Option<Vec<Value>>,
    /// The earlier pipeline step whose processor decodes the result (`batch_decode_post_process` only).
    pub pipeline_reference: Option<String>,
}

/// A sub-workflow and the variables it is given.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct WorkflowReference {
    /// A workflow file, relative to this one, or `builtin:NAME.json`.
    pub path: Option<String>,
    /// Values for the variables that the sub-workflow declares.
    pub arguments: Option<Map<String, Value>>,
}

/// The pipeline of an earlier step, run again with other arguments.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct PipelineReference {
    /// Name of the earlier pipeline step.
    pub reference_name: String,
    /// Arguments of the call.
    pub arguments: Map<String, Value>,
    /// Makes a long video out of several calls.
    pub chain: Option<Chain>,
}

/// How the result of a step is saved.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[schemars(extend("additionalProperties" = { "type": ["string", "number", "object", "array", "boolean"] }))]
pub struct ResultSpec {
    /// MIME type of the files, `image/png` for example.
    pub content_type: String,
    /// Whether files are written at all; `true` when absent.
    pub save: Option<bool>,
    /// Prefix of the file names.
    pub file_base_name: Option<String>,
    /// Frames per second of videos and animated pictures; 8 when absent.
    pub fps: Option<Integer>,
    /// Samples per second of audio files; 44100 when absent.
    pub sample_rate: Option<Integer>,
    /// Samples per second of a video's sound, instead of what the pipeline reports.
    pub audio_sample_rate: Option<Integer>,
    /// Subtype of an audio container.
    pub subtype: Option<String>,
    /// Compression of flac, mp3 and ogg files, from 0 to 1.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub compression_level: Option<f64>,
    /// How mp3 files spend their bits.
    pub bitrate_mode: Option<BitrateMode>,
    /// Whether pictures carry the workflow's metadata.
    pub embed_metadata: Option<bool>,
    /// Whatever else the result says, for the writer.
    #[serde(flatten)]
    #[schemars(skip)]
    pub extras: Map<String, Value>,
}

/// How an mp3 file spends its bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "UPPERCASE")]
pub enum BitrateMode {
    /// The same everywhere.
    Constant,
    /// A given average.
    Average,
    /// As many as the sound needs.
    Variable,
}
