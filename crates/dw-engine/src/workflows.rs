//! Sub-workflow steps: the child is planned again for each iteration, with the iteration's arguments
//! as its variables, and runs as a scope of its own inside the same run.

use dw_core::{
    arguments::Arguments,
    artifact::Entry,
    plan::{self, PlanInputs, PlannedStep, Purpose, WorkflowStep},
};

use crate::{
    builtin,
    error::EngineError,
    run::{Scope, Session},
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
    let catalog = std::sync::Arc::clone(&session.engine.catalog);
    let inputs = PlanInputs {
        overrides: arguments.values.clone(),
        seed: None,
        catalog: &catalog,
        builtin_workflow: &builtin::workflow,
        ancestors: parent.plan.ancestors.clone(),
        purpose: Purpose::Run,
    };
    let document =
        plan::load_workflow(&workflow.source, &inputs, &parent.plan.base_dir).map_err(EngineError::Invalid)?;
    let child = plan::build(&document, &inputs).map_err(EngineError::Invalid)?;
    let inherited = step.seed.clone().unwrap_or_else(|| parent.seed.clone());
    let seed = child.seed.clone().unwrap_or(inherited);
    let prefix = format!("{}{}/", parent.prefix, step.name);
    Scope::new(&child, seed, arguments.artifacts.clone(), prefix).run(session)
}
