//! The order of the checks: structure, variables, structure again once they are bound, then each step.

use std::path::PathBuf;

use serde_json::{Map, Value};

use super::{Plan, PlanInputs, PlannedStep, Purpose, features, late, references, step, subworkflow, unknown_keys};
use crate::{
    document::{self, Document, child_pointer},
    finding::{self, Finding, Severity},
    paths::{self, InputError, MAX_STEPS},
    seed::Seed,
    variables::{self, Bindings, Substitution, VARIABLE_PREFIX, VariableError},
    workflow::{self, Structure},
};

/// Findings about one document, with what is needed to place them.
pub(super) struct Report<'a> {
    pub(super) document: &'a Document,
    pub(super) purpose: Purpose,
    pub(super) findings: Vec<Finding>,
    substitutions: Vec<Substitution>,
}

impl Report<'_> {
    /// Notes an error; the finding can be given a remedy.
    pub(super) fn error(&mut self, code: &'static str, pointer: &str, message: impl Into<String>) -> &mut Finding {
        self.note(Severity::Error, code, pointer, message.into())
    }

    /// Notes a warning.
    pub(super) fn warning(&mut self, code: &'static str, pointer: &str, message: impl Into<String>) -> &mut Finding {
        self.note(Severity::Warning, code, pointer, message.into())
    }

    /// Notes what this build cannot do: a warning for whoever validates, an error for whoever runs.
    pub(super) fn unsupported(&mut self, code: &'static str, pointer: &str, message: String) -> &mut Finding {
        let severity = if self.purpose == Purpose::Run { Severity::Error } else { Severity::Warning };
        self.note(severity, code, pointer, message)
    }

    /// Notes that a path, URL or name is refused.
    pub(super) fn refused(&mut self, code: &'static str, pointer: &str, error: &InputError) {
        self.error(code, pointer, error.to_string()).remedy = document::input_remedy(error).map(str::to_owned);
    }

    fn note(&mut self, severity: Severity, code: &'static str, pointer: &str, message: String) -> &mut Finding {
        let inside = |substitution: &&Substitution| is_at_or_below(pointer, &substitution.pointer);
        let message = match self.substitutions.iter().find(inside) {
            Some(substitution) => format!("{message} (from the variable `{}`)", substitution.name),
            None => message,
        };
        let place = self.document.place(pointer);
        self.findings.push(Finding { severity, code, message, remedy: None, place });
        self.findings.last_mut().expect("a finding has just been added")
    }

    /// Whether an error is known at a pointer or inside it.
    fn has_error_at(&self, pointer: &str) -> bool {
        let errors = self.findings.iter().filter(|finding| finding.severity == Severity::Error);
        errors.into_iter().any(|finding| is_at_or_below(&finding.place.pointer, pointer))
    }

    /// Whether the value at a pointer, or one around it, was put there by a variable.
    pub(super) fn comes_from_variable(&self, pointer: &str) -> bool {
        self.substitutions.iter().any(|substitution| is_at_or_below(pointer, &substitution.pointer))
    }
}

/// Whether `pointer` is `parent` or inside it.
fn is_at_or_below(pointer: &str, parent: &str) -> bool {
    pointer.strip_prefix(parent).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

pub(super) fn build(document: &Document, inputs: &PlanInputs) -> Result<Plan, Vec<Finding>> {
    let mut report = Report { document, purpose: inputs.purpose, findings: Vec::new(), substitutions: Vec::new() };
    report.findings.extend(document.warnings.iter().cloned());
    report.findings.extend(workflow::check(document));
    let steps = document.value.get("steps").and_then(Value::as_array).map(Vec::len);
    if steps.is_none_or(|steps| steps > MAX_STEPS) {
        return Err(settled(report.findings));
    }
    check_id(&mut report);
    let bound = bind(&mut report, inputs);
    check_bound_structure(&mut report, &bound);
    unknown_keys::check(&mut report, &bound);
    let ancestors = subworkflow::ancestors_with(document, inputs);
    let steps = plan_steps(&mut report, inputs, &ancestors, &bound);
    let seed = bound.get("seed").and_then(|seed| serde_json::from_value::<Seed>(seed.clone()).ok());
    let findings = settled(report.findings);
    if findings.iter().any(|finding| finding.severity == Severity::Error) {
        return Err(findings);
    }
    Ok(Plan {
        id: bound["id"].as_str().unwrap_or_default().to_owned(),
        base_dir: document.base_dir.clone(),
        seed: inputs.seed.clone().or(seed),
        sha256: document.sha256.clone(),
        steps,
        ancestors,
        warnings: findings,
    })
}

fn settled(mut findings: Vec<Finding>) -> Vec<Finding> {
    finding::settle(&mut findings);
    findings
}

fn check_id(report: &mut Report) {
    if let Some(Err(error)) = report.document.value["id"].as_str().map(paths::check_base_name) {
        report.refused("output-name", "/id", &error);
    }
}

/// The document with variables bound and escapes removed.
fn bind(report: &mut Report, inputs: &PlanInputs) -> Value {
    let mut bound = report.document.value.clone();
    let declared = bound.get("variables").and_then(Value::as_object).cloned();
    let (bindings, errors) = Bindings::new(declared.as_ref(), &inputs.overrides);
    for (name, error) in errors {
        let pointer = if declared.as_ref().is_some_and(|declared| declared.contains_key(&name)) {
            child_pointer("/variables", &name)
        } else if declared.is_some() {
            "/variables".to_owned()
        } else {
            String::new()
        };
        report.error(error.code(), &pointer, error.to_string()).remedy = error.remedy();
    }
    let mut missing = Vec::new();
    for (key, value) in bound.as_object_mut().into_iter().flatten() {
        if !matches!(key.as_str(), "id" | "variables" | "description" | "$schema") {
            let done = bindings.substitute(value, &child_pointer("", key), &mut missing);
            report.substitutions.extend(done);
        }
    }
    // A misspelt name leaves the right one unused; one finding says both.
    if missing.is_empty() {
        check_unused(report, declared.as_ref());
    }
    for (pointer, error) in missing {
        note_missing(report, declared.is_some(), &pointer, &error);
    }
    if let Some(steps) = bound.get_mut("steps") {
        late::unescape(steps);
    }
    bound
}

/// A reference to a variable that is not there. Without any `variables` the format leaves the text as it is.
fn note_missing(report: &mut Report, declares: bool, pointer: &str, error: &VariableError) {
    if declares {
        report.error(error.code(), pointer, error.to_string()).remedy = error.remedy();
    } else {
        let message = format!("{error}: the workflow declares no variables, so the text stays as it is");
        report.warning(error.code(), pointer, message).remedy = error.remedy();
    }
}

fn check_unused(report: &mut Report, declared: Option<&Map<String, Value>>) {
    let used = variables::references(&report.document.value);
    for name in declared.into_iter().flat_map(Map::keys).filter(|name| !used.contains(*name)) {
        let message = format!("the variable `{name}` is never used");
        report.warning("unused-variable", &child_pointer("/variables", name), message).remedy =
            Some(format!("write `variable:{name}` where it belongs, or remove it"));
    }
}

/// Checks the structure again, now that variables have their values.
fn check_bound_structure(report: &mut Report, bound: &Value) {
    let run = report.purpose == Purpose::Run;
    let complaints = {
        let tolerate = |pointer: &str, value: &Value| {
            let unbound = value.as_str().is_some_and(|text| text.starts_with(VARIABLE_PREFIX));
            // A variable that is null stands for an absent key.
            (unbound && !run)
                || (value.is_null() && report.comes_from_variable(pointer))
                || variables::holds_artifact(value)
        };
        Structure::strict().complaints(bound, &tolerate)
    };
    for complaint in complaints {
        let known = report
            .findings
            .iter()
            .any(|finding| finding.severity == Severity::Error && finding.place.pointer == complaint.pointer);
        if !known {
            report.error(complaint.code, &complaint.pointer, complaint.message).remedy = complaint.remedy;
        }
    }
}

/// Plans every step that can be read.
fn plan_steps(report: &mut Report, inputs: &PlanInputs, ancestors: &[PathBuf], bound: &Value) -> Vec<PlannedStep> {
    let steps = bound["steps"].as_array().map_or(&[][..], Vec::as_slice);
    let names = steps.iter().map(|step| step["name"].as_str().unwrap_or_default().to_owned()).collect();
    let mut context = step::Context { inputs, ancestors, names, pipelines: Vec::new(), shared: Vec::new() };
    let mut planned = Vec::with_capacity(steps.len());
    for (index, value) in steps.iter().enumerate() {
        let pointer = format!("/steps/{index}");
        references::check_places(report, value, &pointer);
        match serde_json::from_value::<workflow::Step>(value.clone()) {
            Ok(typed) if step::has_one_action(&typed) => {
                if let Some(pipeline) = value.get("pipeline") {
                    features::check(report, inputs.catalog, pipeline, &format!("{pointer}/pipeline"));
                }
                planned.push(step::plan(report, &mut context, index, typed));
            }
            Ok(_) => planned.push(None),
            Err(error) => {
                if !report.has_error_at(&pointer) && !waits(report, value, &pointer) {
                    report.error("wrong-type", &pointer, format!("the step cannot be read: {error}"));
                }
                context.note_broken(index, value);
                planned.push(None);
            }
        }
    }
    planned.into_iter().flatten().collect()
}

/// Whether a step cannot be read only because a value in it is not known yet.
fn waits(report: &Report, step: &Value, pointer: &str) -> bool {
    let undeclared = report
        .findings
        .iter()
        .any(|finding| finding.code == "undefined-variable" && is_at_or_below(&finding.place.pointer, pointer));
    undeclared || late::holds_opaque(step)
}
