//! Sub-workflows: where they are, that they do not run themselves, and their own plans.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::{
    PlanInputs, WorkflowSource, WorkflowStep, arguments, builder::Report, late, sources::BUILTIN_PREFIX, step,
    step::Context,
};
use crate::{
    document::{Document, child_pointer},
    finding::Finding,
    paths::{self, Existence, InputError},
    variables::Bindings,
    workflow::WorkflowReference,
};

/// Deepest nesting of sub-workflows.
const MAX_DEPTH: usize = 32;

/// Checks a sub-workflow step and the workflow it runs.
pub(super) fn plan(
    report: &mut Report,
    context: &Context,
    index: usize,
    reference: WorkflowReference,
    pointer: &str,
) -> Option<WorkflowStep> {
    let given = reference.arguments.unwrap_or_default();
    let place = child_pointer(pointer, "arguments");
    step::check_call(report, context, index, &given, &place);
    arguments::check_media(report, &given, &place);
    let path_pointer = child_pointer(pointer, "path");
    let Some(path) = reference.path else {
        report.error("missing-key", pointer, "the sub-workflow has no `path`").remedy =
            Some("name a workflow file or `builtin:NAME.json`".into());
        return None;
    };
    let source = locate(report, context.inputs, &path, &path_pointer)?;
    check_child(report, context, &source, &given, pointer);
    Some(WorkflowStep { source, arguments: given })
}

fn locate(report: &mut Report, inputs: &PlanInputs, path: &str, pointer: &str) -> Option<WorkflowSource> {
    if let Some(name) = path.strip_prefix(BUILTIN_PREFIX) {
        if let Err(error) = paths::check_builtin_workflow_name(name) {
            report.refused("sub-workflow", pointer, &error);
            return None;
        }
        if (inputs.builtin_workflow)(name).is_none() {
            report.error("missing-file", pointer, format!("there is no built-in workflow `{name}`"));
            return None;
        }
        return Some(WorkflowSource::Builtin(name.to_owned()));
    }
    let resolved = paths::resolve_path(path, &report.document.base_dir, Existence::Required)
        .and_then(|path| paths::check_extension(&path, paths::WORKFLOW_EXTENSIONS, "File").map(|()| path));
    match resolved {
        Ok(path) => Some(WorkflowSource::File(path)),
        Err(error) => {
            let code = if matches!(error, InputError::PathMissing(_)) { "missing-file" } else { "sub-workflow" };
            report.refused(code, pointer, &error);
            None
        }
    }
}

/// Reads a sub-workflow; relative paths of a built-in one start from `base_dir`.
pub(super) fn load(source: &WorkflowSource, inputs: &PlanInputs, base_dir: &Path) -> Result<Document, Vec<Finding>> {
    match source {
        WorkflowSource::File(path) => Document::load(path),
        WorkflowSource::Builtin(name) => {
            let text = (inputs.builtin_workflow)(name).unwrap_or_default();
            Document::from_bytes(text.as_bytes(), Some(identity(source)), base_dir)
        }
    }
}

/// What a workflow is known by among the ancestors of its sub-workflows.
fn identity(source: &WorkflowSource) -> PathBuf {
    match source {
        WorkflowSource::File(path) => path.clone(),
        WorkflowSource::Builtin(name) => PathBuf::from(format!("{BUILTIN_PREFIX}{name}")),
    }
}

/// The ancestors of a document's sub-workflows: its own, and itself.
pub(super) fn ancestors_with(document: &Document, inputs: &PlanInputs) -> Vec<PathBuf> {
    let mut ancestors = inputs.ancestors.clone();
    if let Some(file) = &document.file {
        let file = fs_err::canonicalize(file).unwrap_or_else(|_| file.clone());
        if !ancestors.contains(&file) {
            ancestors.push(file);
        }
    }
    ancestors
}

fn check_child(
    report: &mut Report,
    context: &Context,
    source: &WorkflowSource,
    given: &Map<String, Value>,
    pointer: &str,
) {
    let path_pointer = child_pointer(pointer, "path");
    let itself = identity(source);
    if let Some(start) = context.ancestors.iter().position(|ancestor| *ancestor == itself) {
        let mut chain: Vec<String> = context.ancestors[start..].iter().map(|path| path.display().to_string()).collect();
        chain.push(itself.display().to_string());
        let message = format!("the workflow runs itself: {}", chain.join(" -> "));
        report.error("recursion", &path_pointer, message).remedy = Some("break the circle".into());
        return;
    }
    if context.ancestors.len() >= MAX_DEPTH {
        report.error("recursion", &path_pointer, format!("sub-workflows are nested more than {MAX_DEPTH} deep"));
        return;
    }
    let child = match load(source, context.inputs, &report.document.base_dir) {
        Ok(child) => child,
        Err(findings) => {
            report.findings.extend(findings);
            return;
        }
    };
    let known = arguments::with_absolute_media(given, &report.document.base_dir);
    let overrides = checked_arguments(report, &child, &known, pointer);
    let inputs = PlanInputs {
        overrides,
        seed: None,
        catalog: context.inputs.catalog,
        builtin_workflow: context.inputs.builtin_workflow,
        ancestors: context.ancestors.to_vec(),
        purpose: context.inputs.purpose,
    };
    match super::build(&child, &inputs) {
        Ok(plan) => report.findings.extend(plan.warnings),
        Err(findings) => report.findings.extend(findings),
    }
}

/// The arguments that the child can take, checked here so that mistakes are shown where they are made.
fn checked_arguments(
    report: &mut Report,
    child: &Document,
    given: &Map<String, Value>,
    pointer: &str,
) -> Map<String, Value> {
    let mut overrides: Map<String, Value> =
        given.iter().map(|(name, value)| (name.clone(), late::opaque(value))).collect();
    let declared = child.value.get("variables").and_then(Value::as_object);
    let (_, errors) = Bindings::new(declared, &overrides);
    for (name, error) in errors {
        // Errors of the child's own defaults are told by its own plan.
        if overrides.remove(&name).is_some() {
            let place = child_pointer(&child_pointer(pointer, "arguments"), &name);
            report.error(error.code(), &place, error.to_string()).remedy = error.remedy();
        }
    }
    overrides
}
