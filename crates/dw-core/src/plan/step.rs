//! One step: its action, checked against the catalog and the steps before it.

use std::path::PathBuf;

use serde_json::{Map, Value};

use super::{
    Action, PlanInputs, PlannedStep, ReferenceStep, TaskInput, TaskStep, arguments, builder::Report, components, late,
    references, subworkflow,
};
use crate::{
    catalog::Catalog,
    document::child_pointer,
    paths,
    workflow::{Chain, Pipeline, PipelineReference, Step, Task, nearest},
};

/// What checks of one step need to know about the others.
pub(super) struct Context<'a> {
    pub(super) inputs: &'a PlanInputs<'a>,
    /// Workflows that led here, this one last.
    pub(super) ancestors: &'a [PathBuf],
    /// Names of all steps.
    pub(super) names: Vec<String>,
    /// Index and class of the pipeline steps so far.
    pub(super) pipelines: Vec<(usize, String)>,
    /// Components shared so far.
    pub(super) shared: Vec<String>,
}

impl Context<'_> {
    /// Remembers what later steps may refer to, although the step itself cannot be read.
    pub(super) fn note_broken(&mut self, index: usize, step: &Value) {
        let Some(pipeline) = step.get("pipeline") else { return };
        let class = pipeline.pointer("/configuration/component_type").and_then(Value::as_str).unwrap_or_default();
        self.pipelines.push((index, components::class_name(class)));
        for list in ["/shared_components", "/configuration/shared_components"] {
            let names = pipeline.pointer(list).and_then(Value::as_array).into_iter().flatten();
            self.shared.extend(names.filter_map(Value::as_str).map(str::to_owned));
        }
    }

    /// The last pipeline step before now that is called `name`.
    fn pipeline(&self, name: &str) -> Option<&(usize, String)> {
        self.pipelines.iter().rev().find(|(index, _)| self.names[*index] == name)
    }
}

/// Whether a step has exactly one action; steps that have not are known to be wrong.
pub(super) fn has_one_action(step: &Step) -> bool {
    let actions =
        [step.task.is_some(), step.pipeline.is_some(), step.pipeline_reference.is_some(), step.workflow.is_some()];
    actions.into_iter().filter(|there| *there).count() == 1
}

/// Plans and checks a step; none when its action cannot be made out.
pub(super) fn plan(report: &mut Report, context: &mut Context, index: usize, step: Step) -> Option<PlannedStep> {
    let pointer = format!("/steps/{index}");
    check_names(report, &step, &pointer);
    let pipeline_seed = step.pipeline.as_ref().and_then(|pipeline| pipeline.seed.clone());
    let action = if let Some(pipeline) = step.pipeline {
        plan_pipeline(report, context, index, *pipeline, &child_pointer(&pointer, "pipeline"))
    } else if let Some(reference) = step.pipeline_reference {
        plan_reference(report, context, index, reference, &child_pointer(&pointer, "pipeline_reference"))
    } else if let Some(task) = step.task {
        plan_task(report, context, index, task, &child_pointer(&pointer, "task"))
    } else {
        let workflow = step.workflow?;
        subworkflow::plan(report, context, index, workflow, &child_pointer(&pointer, "workflow")).map(Action::Workflow)
    };
    Some(PlannedStep {
        name: step.name,
        index,
        seed: pipeline_seed.or(step.seed),
        action: action?,
        result: step.result,
        release_pipeline: step.release_pipeline.unwrap_or(false),
        release_models: step.release_models.unwrap_or(false),
        pointer,
    })
}

/// Names that become part of file names may not leave the output folder.
fn check_names(report: &mut Report, step: &Step, pointer: &str) {
    if let Err(error) = paths::check_base_name(&step.name) {
        report.refused("output-name", &child_pointer(pointer, "name"), &error);
    }
    let base_name = step.result.as_ref().and_then(|result| result.file_base_name.as_deref());
    if let Some(Err(error)) = base_name.map(paths::check_base_name) {
        report.refused("output-name", &format!("{pointer}/result/file_base_name"), &error);
    }
}

/// What is checked about the arguments of every kind of step.
pub(super) fn check_call(
    report: &mut Report,
    context: &Context,
    index: usize,
    arguments: &Map<String, Value>,
    pointer: &str,
) {
    for (name, value) in arguments {
        let pointer = child_pointer(pointer, name);
        references::check(report, context, index, &wrapped(name, value), parent(&pointer));
        late::check(report, value, &pointer);
    }
}

/// The argument inside an object, so that checks by key see its key.
fn wrapped(name: &str, value: &Value) -> Value {
    Value::Object(Map::from_iter([(name.to_owned(), value.clone())]))
}

fn parent(pointer: &str) -> &str {
    pointer.rsplit_once('/').map_or("", |(parent, _)| parent)
}

fn check_chain_prompts(report: &mut Report, context: &Context, index: usize, chain: Option<&Chain>, pointer: &str) {
    for (position, prompt) in chain.and_then(|chain| chain.prompts.as_ref()).into_iter().flatten().enumerate() {
        let place = format!("{pointer}/chain/prompts/{position}");
        references::check(report, context, index, &Value::from(prompt.as_str()), &place);
    }
}

fn plan_pipeline(
    report: &mut Report,
    context: &mut Context,
    index: usize,
    pipeline: Pipeline,
    pointer: &str,
) -> Option<Action> {
    let step = components::plan(report, context, pipeline, pointer)?;
    check_class_call(report, context, index, &step.class, &step.arguments, pointer);
    check_chain_prompts(report, context, index, step.chain.as_ref(), pointer);
    context.pipelines.push((index, step.class.clone()));
    Some(Action::Pipeline(Box::new(step)))
}

/// Checks arguments against the class that gets them, as far as this build knows it.
fn check_class_call(
    report: &mut Report,
    context: &Context,
    index: usize,
    class: &str,
    arguments: &Map<String, Value>,
    pointer: &str,
) {
    let pointer = child_pointer(pointer, "arguments");
    check_call(report, context, index, arguments, &pointer);
    match context.inputs.catalog.pipeline(class) {
        Some(entry) => arguments::check(report, entry, &format!("`{class}`"), arguments, &pointer, &[]),
        None => drop(arguments::check_media(report, arguments, &pointer)),
    }
}

fn plan_reference(
    report: &mut Report,
    context: &Context,
    index: usize,
    reference: PipelineReference,
    pointer: &str,
) -> Option<Action> {
    check_chain_prompts(report, context, index, reference.chain.as_ref(), pointer);
    if let Some(chain) = &reference.chain {
        components::check_chain(report, chain, &child_pointer(pointer, "chain"));
    }
    components::check_prompts(report, &reference.arguments, &child_pointer(pointer, "arguments"));
    let place = child_pointer(pointer, "reference_name");
    let Some((found, class)) = find_pipeline(report, context, index, &reference.reference_name, &place) else {
        let pointer = child_pointer(pointer, "arguments");
        check_call(report, context, index, &reference.arguments, &pointer);
        arguments::check_media(report, &reference.arguments, &pointer);
        return None;
    };
    check_class_call(report, context, index, &class, &reference.arguments, pointer);
    let PipelineReference { reference_name, arguments, chain } = reference;
    Some(Action::Reference(Box::new(ReferenceStep { reference_name, index: found, chain, arguments })))
}

/// The earlier pipeline step called `name`; says what is wrong when there is none.
fn find_pipeline(
    report: &mut Report,
    context: &Context,
    index: usize,
    name: &str,
    pointer: &str,
) -> Option<(usize, String)> {
    if let Some(found) = context.pipeline(name) {
        return Some(found.clone());
    }
    let (message, remedy) = if context.names[..index].iter().any(|earlier| earlier == name) {
        (format!("the step `{name}` is not a pipeline step"), Some("refer to a step with a `pipeline`".to_owned()))
    } else if context.names[index..].iter().any(|later| later == name) {
        (format!("the step `{name}` does not run before this one"), Some("refer to an earlier step".to_owned()))
    } else {
        let earlier = context.pipelines.iter().map(|(index, _)| context.names[*index].as_str());
        let near = nearest(name, earlier);
        (format!("there is no pipeline step `{name}`"), near.map(|near| format!("did you mean `{near}`?")))
    };
    report.error("unknown-step", pointer, message).remedy = remedy;
    None
}

/// A command that this build does not have: a command of the format is for another build, anything else
/// is a mistake.
fn note_missing_task(report: &mut Report, catalog: &Catalog, command: &str, pointer: &str) {
    let remedy = "`dw tasks` lists the commands";
    if COMMANDS_OF_THE_FORMAT.contains(&command) {
        let message = format!("this build of dw has no task `{command}`");
        report.unsupported("unsupported-task", pointer, message).remedy = Some(remedy.to_owned());
        return;
    }
    let near = nearest(command, catalog.tasks.iter().map(|entry| entry.name.as_str()));
    let remedy = near.map_or_else(|| remedy.to_owned(), |near| format!("did you mean `{near}`?"));
    report.error("unknown-task", pointer, format!("Unknown task command: '{command}'")).remedy = Some(remedy);
}

/// The commands that the workflow format knows, whether this build has them or not.
const COMMANDS_OF_THE_FORMAT: &[&str] = &[
    "add_border_and_mask",
    "add_border_and_mask_with_size",
    "add_watermark",
    "anyline",
    "batch_decode_post_process",
    "canny",
    "canny_cv",
    "concat_videos",
    "crop_square",
    "crossfade_audio",
    "depth",
    "depth_estimator",
    "depth_estimator_tensor",
    "diffusion_upscale",
    "dw_pose",
    "extract_sections",
    "format_chat_message",
    "gather_images",
    "gather_inputs",
    "gather_videos",
    "get_dict_value",
    "get_first_frame",
    "get_frame",
    "get_image_size",
    "get_last_frame",
    "hed",
    "image_to_text",
    "interpolate_frames",
    "leres",
    "lineart",
    "lineart_standard",
    "midas",
    "mlsd",
    "normal_bae",
    "openpose",
    "pair_audio",
    "pidi",
    "qr_code",
    "remove_background",
    "resize_bucket",
    "resize_center_crop",
    "resize_rescale",
    "resize_resample",
    "restore_faces",
    "sam",
    "scribble",
    "segment",
    "segmentation",
    "shuffle",
    "slice_audio",
    "strip_exif",
    "teed",
    "text_generation",
    "upscale",
    "video_frames",
    "zoe",
    "zoe_depth",
];

fn plan_task(report: &mut Report, context: &Context, index: usize, task: Task, pointer: &str) -> Option<Action> {
    /// Where a task runs; every command takes it.
    const ALWAYS: &[&str] = &["device"];
    let catalog = context.inputs.catalog;
    let entry = catalog.task(&task.command);
    if entry.is_none() {
        note_missing_task(report, catalog, &task.command, &child_pointer(pointer, "command"));
    }
    let owner = format!("the task `{}`", task.command);
    if let Some(arguments) = &task.arguments {
        let pointer = child_pointer(pointer, "arguments");
        check_call(report, context, index, arguments, &pointer);
        match entry {
            Some(entry) => arguments::check(report, entry, &owner, arguments, &pointer, ALWAYS),
            None => drop(arguments::check_media(report, arguments, &pointer)),
        }
    }
    for (position, input) in task.inputs.iter().flatten().enumerate() {
        let pointer = format!("{pointer}/inputs/{position}");
        late::check(report, input, &pointer);
        if let (Some(entry), Value::Object(arguments)) = (entry, input) {
            arguments::check(report, entry, &owner, arguments, &pointer, ALWAYS);
        }
    }
    if let Some(name) = &task.pipeline_reference {
        find_pipeline(report, context, index, name, &child_pointer(pointer, "pipeline_reference"));
    }
    let input = match (task.arguments, task.inputs) {
        (Some(arguments), _) => TaskInput::Arguments(arguments),
        (None, inputs) => TaskInput::Inputs(inputs?),
    };
    Some(Action::Task(TaskStep { command: task.command, input, pipeline_reference: task.pipeline_reference }))
}
