//! What a build of dw can run, described as data: the plan checks workflows against it, `dw pipelines`
//! and its siblings print it, and the published schema completes from it. Filled by `dw-engine` from
//! the typed argument structs of `dw-pipelines` and `dw-tasks`.

use serde::Serialize;
use serde_json::Value;

/// One pipeline class, scheduler class or task command.
#[derive(Clone, Debug, Serialize)]
pub struct CatalogEntry {
    /// The name a workflow uses.
    pub name: String,
    /// What it does, in a sentence.
    pub summary: String,
    /// JSON Schema (draft 2020-12, an `object`) of its arguments or configuration, with defaults.
    pub schema: Value,
}

/// Everything a build can run.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Catalog {
    /// Pipeline classes, as `component_type` names them.
    pub pipelines: Vec<CatalogEntry>,
    /// Scheduler classes, as `scheduler_type` names them.
    pub schedulers: Vec<CatalogEntry>,
    /// Task commands.
    pub tasks: Vec<CatalogEntry>,
    /// Models built into the program, as `builtin:NAME` names them (without the prefix).
    pub models: Vec<String>,
    /// Keys of a pipeline that this build honours, as JSON pointers from the pipeline (`/loras`,
    /// `/configuration/offload`): of those that are optional for a build.
    pub features: Vec<String>,
}

impl Catalog {
    /// The pipeline class called `name`.
    pub fn pipeline(&self, name: &str) -> Option<&CatalogEntry> {
        self.pipelines.iter().find(|entry| entry.name == name)
    }

    /// The scheduler class called `name`.
    pub fn scheduler(&self, name: &str) -> Option<&CatalogEntry> {
        self.schedulers.iter().find(|entry| entry.name == name)
    }

    /// Whether this build honours an optional key of a pipeline.
    pub fn honours(&self, pointer: &str) -> bool {
        self.features.iter().any(|feature| feature == pointer)
    }

    /// The task command called `name`.
    pub fn task(&self, name: &str) -> Option<&CatalogEntry> {
        self.tasks.iter().find(|entry| entry.name == name)
    }
}
