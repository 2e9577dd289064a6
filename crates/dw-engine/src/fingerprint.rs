//! Which workflow a run is of: the SHA-256 of its file with those of its sub-workflows, and what an engine has
//! run before.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use dw_core::{
    document::Document,
    paths::{self, Existence},
    plan::{Action, Plan, WorkflowSource},
};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::{
    builtin,
    engine::{PlannedRun, Source},
};

/// The fingerprint of a planned workflow, in hexadecimal: the file's own SHA-256 when it has no sub-workflows, else
/// one over all of them.
pub(crate) fn of(document: &Document, plan: &Plan) -> String {
    let mut found = BTreeMap::new();
    for step in &plan.steps {
        if let Action::Workflow(workflow) = &step.action {
            visit(&workflow.source, &plan.base_dir, &mut found);
        }
    }
    if found.is_empty() {
        return document.sha256.clone();
    }
    let mut sum = Sha256::new();
    sum.update(&document.sha256);
    for (name, sha256) in found {
        sum.update(format!("\n{name}\n{sha256}"));
    }
    hex(&sum.finalize())
}

/// Bytes as hexadecimal text.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}

/// Adds a sub-workflow and those below it. Planning has read all of them, so what cannot be read now is one whose
/// path depends on a variable, or one that has just gone; the run will say so.
fn visit(source: &WorkflowSource, base_dir: &Path, found: &mut BTreeMap<String, String>) {
    let (name, document) = match source {
        WorkflowSource::File(path) => (path.display().to_string(), Document::load(path)),
        WorkflowSource::Builtin(name) => {
            let text = builtin::workflow(name).unwrap_or_default();
            (format!("builtin:{name}"), Document::from_text(text, base_dir))
        }
    };
    let Ok(document) = document else { return };
    if found.insert(name, document.sha256.clone()).is_some() {
        return;
    }
    let steps = document.value.get("steps").and_then(Value::as_array);
    let paths = steps.into_iter().flatten().filter_map(|step| step.pointer("/workflow/path")?.as_str());
    for path in paths {
        let child = match path.strip_prefix("builtin:") {
            Some(name) => Some(WorkflowSource::Builtin(name.to_owned())),
            None => paths::resolve_path(path, &document.base_dir, Existence::Required).ok().map(WorkflowSource::File),
        };
        if let Some(child) = child {
            visit(&child, &document.base_dir, found);
        }
    }
}

/// How an engine knows a workflow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Familiarity {
    /// It has run as it is.
    Same,
    /// The file has run and was edited since.
    Changed,
    /// It has not run.
    New,
}

/// The workflows that an engine has run, by file. A workflow from text counts as a file of its own.
#[derive(Debug, Default)]
pub(crate) struct KnownWorkflows {
    by_file: BTreeMap<PathBuf, String>,
    texts: BTreeSet<String>,
}

impl KnownWorkflows {
    pub(crate) fn familiarity(&self, planned: &PlannedRun) -> Familiarity {
        let Source::File(file) = &planned.request.source else {
            return if self.texts.contains(&planned.fingerprint) { Familiarity::Same } else { Familiarity::New };
        };
        match self.by_file.get(&place(file)) {
            Some(known) if *known == planned.fingerprint => Familiarity::Same,
            Some(_) => Familiarity::Changed,
            None => Familiarity::New,
        }
    }

    /// Notes that a workflow has run. Gives the fingerprint that nobody has any more, when its file was edited.
    pub(crate) fn note(&mut self, planned: &PlannedRun) -> Option<String> {
        let Source::File(file) = &planned.request.source else {
            self.texts.insert(planned.fingerprint.clone());
            return None;
        };
        let before = self.by_file.insert(place(file), planned.fingerprint.clone())?;
        let is_there = self.by_file.values().chain(&self.texts).any(|known| *known == before);
        (!is_there).then_some(before)
    }
}

/// A file by its one true path.
fn place(file: &Path) -> PathBuf {
    file.canonicalize().unwrap_or_else(|_| file.to_owned())
}

#[cfg(test)]
mod tests {
    use dw_core::seed::Seed;
    use serde_json::{Map, json};

    use super::*;
    use crate::{Engine, EngineConfig, RunRequest};

    fn planned(file: &Path) -> PlannedRun {
        let engine =
            Engine::new(EngineConfig { device: Some("cpu".into()), ..EngineConfig::default() }).expect("a CPU");
        let request = RunRequest {
            source: Source::File(file.to_owned()),
            variables: Map::new(),
            seed: Some(Seed::One(1)),
            output_dir: "unused".into(),
            metadata: true,
        };
        engine.plan(request).expect("a valid workflow")
    }

    fn write(folder: &Path, name: &str, value: &Value) -> PathBuf {
        let path = folder.join(name);
        std::fs::write(&path, value.to_string()).expect("written");
        path
    }

    fn leaf(text: &str) -> Value {
        json!({ "id": "leaf", "steps": [{ "name": "a", "task": { "command": "qr_code", "arguments": { "qr_code_contents": text } } }] })
    }

    fn calling(path: &str) -> Value {
        json!({ "id": "caller", "steps": [{ "name": "a", "workflow": { "path": path } }] })
    }

    #[test]
    fn a_workflow_alone_has_the_hash_of_its_file() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = write(folder.path(), "leaf.json", &leaf("x"));
        let bytes = std::fs::read(&path).expect("readable");
        assert_eq!(planned(&path).fingerprint, hex(&Sha256::digest(bytes)));
    }

    #[test]
    fn a_change_two_levels_down_changes_the_fingerprint() {
        let folder = tempfile::tempdir().expect("a folder");
        write(folder.path(), "leaf.json", &leaf("x"));
        write(folder.path(), "middle.json", &calling("leaf.json"));
        let top = write(folder.path(), "top.json", &calling("middle.json"));
        let before = planned(&top).fingerprint;
        assert_eq!(planned(&top).fingerprint, before);
        write(folder.path(), "leaf.json", &leaf("y"));
        assert_ne!(planned(&top).fingerprint, before);
    }

    #[test]
    fn an_edited_file_gives_up_its_old_form_unless_another_file_has_it() {
        let folder = tempfile::tempdir().expect("a folder");
        let (first, second) = (write(folder.path(), "a.json", &leaf("x")), write(folder.path(), "b.json", &leaf("x")));
        let mut known = KnownWorkflows::default();
        let old = planned(&first);
        assert_eq!(known.familiarity(&old), Familiarity::New);
        assert_eq!(known.note(&old), None);
        assert_eq!(known.familiarity(&old), Familiarity::Same);
        assert_eq!(known.note(&planned(&second)), None);
        write(folder.path(), "a.json", &leaf("y"));
        let edited = planned(&first);
        assert_eq!(known.familiarity(&edited), Familiarity::Changed);
        assert_eq!(known.note(&edited), None, "`b.json` still is the old form");
        write(folder.path(), "b.json", &leaf("y"));
        assert_eq!(known.note(&planned(&second)), Some(old.fingerprint));
    }
}
