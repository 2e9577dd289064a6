//! What a run would do, said without loading, running or writing anything.

use std::path::{Path, PathBuf};

use dw_core::{
    cancel::CancellationToken,
    event::Silent,
    fit::FitPlan,
    output::{SaveSpec, StepLabel, file_name},
    plan::{Action, PipelineStep, PlannedStep, TaskInput, WorkflowSource},
    references,
    seed::Seed,
};
use dw_pipelines::{
    hub::Hub,
    pipelines::Pipeline,
    request::{Context, ModelSource},
};
use serde::Serialize;
use serde_json::{Map, Value};

use crate::{
    engine::{Engine, PlannedRun},
    pipelines,
};

/// What a run would do, as far as it is known before anything is loaded.
#[derive(Clone, Debug, Serialize)]
pub struct Preview {
    /// The workflow's `id`.
    pub workflow: String,
    /// The run's default seed; none when one would be drawn at random.
    pub seed: Option<Seed>,
    /// The steps, in order.
    pub steps: Vec<StepPreview>,
}

/// What one step would do.
#[derive(Clone, Debug, Serialize)]
pub struct StepPreview {
    /// The step's name.
    pub step: String,
    /// What runs: ``pipeline `StableDiffusionXLPipeline` ``, ``task `gather_images` ``.
    pub action: String,
    /// The models it loads: the pipeline's own, then components and LoRA files from elsewhere.
    pub models: Vec<ModelPreview>,
    /// How often it runs; none when that depends on earlier results.
    pub iterations: Option<usize>,
    /// Names of the files it would write, as far as they are known.
    pub files: Vec<PathBuf>,
    /// What its pipeline will need of the device's memory, when its files are on this machine.
    pub fit: Option<FitPlan>,
    /// What is wrong with the files of its pipeline, as far as they are on this machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// A model that a step would load.
#[derive(Clone, Debug, Serialize)]
pub struct ModelPreview {
    /// The model as the workflow names it.
    pub name: String,
    /// Bytes of weights to read, when the files are on this machine.
    pub bytes: Option<u64>,
}

impl Engine {
    /// What [`Engine::run`] would do.
    pub fn preview(&self, planned: &PlannedRun) -> Preview {
        let plan = &planned.plan;
        let steps = plan.steps.iter().map(|step| self.preview_step(step, planned)).collect();
        Preview { workflow: plan.id.clone(), seed: plan.seed.clone(), steps }
    }

    fn preview_step(&self, step: &PlannedStep, planned: &PlannedRun) -> StepPreview {
        let (action, models, calls) = match &step.action {
            Action::Pipeline(pipeline) => {
                let models = self.models(pipeline, &planned.plan.base_dir);
                (format!("pipeline `{}`", pipeline.class), models, calls(&pipeline.arguments))
            }
            Action::Reference(reference) => {
                let action = format!("the pipeline of step `{}`", reference.reference_name);
                (action, Vec::new(), calls(&reference.arguments))
            }
            Action::Task(task) => {
                let calls = match &task.input {
                    TaskInput::Inputs(inputs) => Some(inputs.len()),
                    TaskInput::Arguments(arguments) => calls(arguments),
                };
                (format!("task `{}`", task.command), Vec::new(), calls)
            }
            Action::Workflow(workflow) => {
                let action = match &workflow.source {
                    WorkflowSource::File(path) => format!("workflow `{}`", path.display()),
                    WorkflowSource::Builtin(name) => format!("workflow `builtin:{name}`"),
                };
                (action, Vec::new(), calls(&workflow.arguments))
            }
        };
        let files = files(step, &planned.plan.id, calls);
        let fit = match &step.action {
            Action::Pipeline(pipeline) => self.fit(pipeline, &planned.plan.base_dir),
            Action::Reference(_) | Action::Task(_) | Action::Workflow(_) => Ok(None),
        };
        let (fit, problem) = fit.map_or_else(|problem| (None, Some(problem)), |fit| (fit, None));
        StepPreview { step: step.name.clone(), action, models, iterations: calls, files, fit, problem }
    }

    /// The memory that a pipeline will need; none when its files are not on this machine, or components come from
    /// earlier steps. The error says what is wrong with a file that is here.
    fn fit(&self, step: &PipelineStep, base_dir: &Path) -> Result<Option<FitPlan>, String> {
        let cancel = CancellationToken::default();
        let context = Context { events: &Silent, cancel: &cancel };
        let hub = Hub { offline: true, ..self.hub.clone() };
        let Ok(request) = pipelines::request(step, base_dir, self) else { return Ok(None) };
        match Pipeline::plan(&request, &hub, &self.cache, context) {
            Ok(plan) => Ok(Some(plan)),
            Err(error @ dw_pipelines::Error::BadFile { .. }) => Err(error.to_string()),
            Err(_) => Ok(None),
        }
    }

    /// The model of a pipeline step and whatever it takes from elsewhere.
    fn models(&self, step: &PipelineStep, base_dir: &Path) -> Vec<ModelPreview> {
        let from = &step.from_pretrained;
        let own = from.model_name.iter().map(|name| {
            let source = ModelSource::named(name, from.revision.as_deref(), base_dir);
            ModelPreview { name: name.clone(), bytes: self.weight_bytes(&source, from.variant.as_deref()) }
        });
        let elsewhere =
            from.from_single_file.iter().chain(step.components.values().flatten().filter_map(|component| {
                let from = &component.from_pretrained_arguments;
                from.model_name.as_ref().or(from.from_single_file.as_ref())
            }));
        let loras = step.loras.iter().map(|lora| &lora.model_name);
        let others = elsewhere.chain(loras).map(|name| ModelPreview { name: name.clone(), bytes: None });
        own.chain(others).collect()
    }

    /// Bytes of weights of a model that is on this machine; none when it is not.
    fn weight_bytes(&self, source: &ModelSource, variant: Option<&str>) -> Option<u64> {
        let cancel = CancellationToken::default();
        let context = Context { events: &Silent, cancel: &cancel };
        let hub = Hub { offline: true, ..self.hub.clone() };
        let files = hub.open(source, context).ok()?;
        let index = files.read_json("model_index.json").ok()??;
        let folders = index.as_object()?.iter().filter(|(_, value)| value.get(1).is_some_and(Value::is_string));
        let bytes = folders.filter_map(|(folder, _)| files.weights(folder, variant).ok()?.bytes().ok());
        Some(bytes.sum::<u64>()).filter(|bytes| *bytes > 0)
    }
}

/// How many iterations arguments expand to; none when they refer to earlier results.
fn calls(arguments: &Map<String, Value>) -> Option<usize> {
    let each = references::collect_members(arguments).iter().any(|found| !found.reference.all);
    (!each).then_some(1)
}

/// The files of a step, when the number of its pictures follows from its arguments alone.
fn files(step: &PlannedStep, workflow_id: &str, calls: Option<usize>) -> Vec<PathBuf> {
    let pictures = match &step.action {
        Action::Pipeline(pipeline) => pictures(&pipeline.arguments),
        Action::Reference(reference) => pictures(&reference.arguments),
        Action::Task(_) | Action::Workflow(_) => None,
    };
    let result = step.result.as_ref().and_then(|result| serde_json::to_value(result).ok());
    let (Some(pictures), Some(calls), Ok(Some(spec))) = (pictures, calls, SaveSpec::from_result(result.as_ref()))
    else {
        return Vec::new();
    };
    let label = StepLabel { workflow_id, step_name: &step.name, step_index: step.index };
    let places = (0..calls).flat_map(|entry| (0..pictures).map(move |artifact| (entry, artifact)));
    places.filter_map(|(entry, artifact)| file_name(&spec, label, entry, artifact).ok()).map(PathBuf::from).collect()
}

/// Pictures of one call: prompts times pictures for each prompt.
fn pictures(arguments: &Map<String, Value>) -> Option<usize> {
    let prompts = match arguments.get("prompt")? {
        Value::Array(prompts) => prompts.len(),
        Value::String(_) => 1,
        _ => return None,
    };
    let each = match arguments.get("num_images_per_prompt") {
        None | Some(Value::Null) => 1,
        Some(number) => usize::try_from(number.as_u64()?).ok()?,
    };
    Some(prompts * each)
}
