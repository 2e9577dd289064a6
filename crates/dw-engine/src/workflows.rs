//! Sub-workflow steps: the child is planned again for each iteration, with the iteration's arguments
//! as its variables, and runs as a scope of its own inside the same run.

use dw_core::{
    arguments::Arguments,
    artifact::Entry,
    document::Document,
    plan::{self, PlanInputs, PlannedStep, Purpose, WorkflowStep},
};

use crate::{
    builtin,
    catalog::catalog,
    error::EngineError,
    run::{Scope, Session, failed},
};

/// Runs a child workflow once. It inherits the parent's seed unless it names one, and saves its own
/// results under its own id.
pub(crate) fn run(
    workflow: &WorkflowStep,
    step: &PlannedStep,
    arguments: &Arguments,
    parent: &Scope,
    session: &mut Session,
) -> Result<Vec<Entry>, EngineError> {
    let label = format!("{}{}", parent.prefix, step.name);
    let document = read(workflow).map_err(EngineError::Invalid)?;
    let inherited = step.seed.clone().unwrap_or_else(|| parent.seed.clone());
    let catalog = catalog();
    let inputs = PlanInputs {
        overrides: arguments.values.clone(),
        seed: None,
        catalog: &catalog,
        builtin_workflow: &builtin::workflow,
        ancestors: workflow.ancestors.clone(),
        purpose: Purpose::Run,
    };
    let plan = plan::build(&document, &inputs).map_err(EngineError::Invalid)?;
    if plan.steps.is_empty() {
        return Err(failed(&label, "", "the sub-workflow has no steps"));
    }
    let seed = plan.seed.clone().unwrap_or(inherited);
    Scope::new(&plan, seed, arguments.artifacts.clone(), format!("{label}/")).run(session)
}

fn read(workflow: &WorkflowStep) -> Result<Document, Vec<dw_core::finding::Finding>> {
    match workflow.builtin.as_deref().and_then(builtin::workflow) {
        Some(text) => Document::from_text(text, &workflow.path),
        None => Document::load(&workflow.path),
    }
}
