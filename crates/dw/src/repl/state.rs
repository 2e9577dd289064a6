//! What the loop remembers from command to command: the workflow, the values set for it, the seed, and
//! what was written.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use dw_core::{document::Document, finding::Finding, seed::Seed};
use dw_engine::{Engine, RunRequest, Source};
use serde_json::{Map, Value};

use super::{reply::Failure, values};

/// What is remembered.
#[derive(Debug, Default)]
pub(super) struct State {
    /// The current workflow.
    pub(super) workflow: Option<Loaded>,
    /// Values set with `arg set`, as typed.
    pub(super) arguments: Map<String, Value>,
    /// The seed for the runs that follow; none to leave it to the workflow.
    pub(super) seed: Option<Seed>,
    /// The seed of the last run.
    pub(super) last_seed: Option<Seed>,
    /// Files written, in order.
    pub(super) outputs: Vec<PathBuf>,
    /// Runs that finished.
    pub(super) runs: usize,
}

/// A workflow that was read and found valid.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Loaded {
    /// The file, absolute.
    pub(super) path: PathBuf,
    /// Its `id`.
    pub(super) id: String,
    /// What it says.
    pub(super) document: Value,
    /// The fingerprint of its bytes.
    pub(super) sha256: String,
    /// The values that its variables can have, where they can be listed.
    pub(super) choices: BTreeMap<String, Vec<String>>,
}

impl Loaded {
    /// Reads and checks a file. What a valid one is warned about comes with it.
    ///
    /// # Errors
    /// All findings when one of them is an error.
    pub(super) fn read(path: &Path) -> Result<(Self, Vec<Finding>), Vec<Finding>> {
        let document = Document::load(path)?;
        let found = check(path, &Map::new());
        if found.iter().any(is_error) {
            return Err(found);
        }
        let id = document.value["id"].as_str().unwrap_or_default().to_owned();
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let choices = values::choices(&document.value, &Engine::catalog());
        Ok((Self { path, id, document: document.value, sha256: document.sha256, choices }, found))
    }

    /// Its variables with their defaults, in the order of the file.
    pub(super) fn variables(&self) -> &Map<String, Value> {
        static NONE: std::sync::LazyLock<Map<String, Value>> = std::sync::LazyLock::new(Map::new);
        self.document["variables"].as_object().unwrap_or(&NONE)
    }
}

/// Everything that can be known to be wrong with a run of a file with these values.
pub(super) fn check(path: &Path, arguments: &Map<String, Value>) -> Vec<Finding> {
    dw_engine::check(&RunRequest {
        source: Source::File(path.to_owned()),
        variables: arguments.clone(),
        seed: None,
        output_dir: PathBuf::new(),
        metadata: true,
    })
}

/// Whether a finding keeps a workflow from running.
pub(super) fn is_error(finding: &Finding) -> bool {
    finding.severity == dw_core::finding::Severity::Error
}

impl State {
    /// The current workflow, or what to say when there is none.
    pub(super) fn loaded(&self) -> Result<&Loaded, Failure> {
        self.workflow
            .as_ref()
            .ok_or_else(|| Failure::usage("Error: No workflow loaded. Use 'workflow load' command first"))
    }
}
