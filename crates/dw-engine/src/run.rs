//! One run: the steps of a plan in order, each expanded into iterations, each iteration saved as soon
//! as it is done. Sub-workflows are runs inside a run.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::LazyLock,
    time::Instant,
};

use dw_core::{
    arguments::Arguments,
    artifact::{Artifact, Entry},
    cancel::CancellationToken,
    event::{Event, EventSink},
    metadata::{self, Metadata},
    output::{SaveSpec, StepLabel, Writer},
    plan::{Action, Plan, PlannedStep, TaskInput, TaskStep},
    references::{self, Results},
    seed::Seed,
};
use dw_pipelines::request::Context;
use dw_tasks::{TaskContext, TaskOutput};
use serde_json::{Map, Value};

use crate::{
    engine::{Engine, PlannedRun, Summary, setup},
    error::EngineError,
    fetch::fetch,
    media::Media,
    pipelines::{LoadedPipelines, PipelineCall},
    workflows,
};

/// Runs a plan to its end.
pub(crate) fn run(
    engine: &mut Engine,
    planned: &PlannedRun,
    events: &dyn EventSink,
    cancel: &CancellationToken,
) -> Result<Summary, EngineError> {
    let started = Instant::now();
    let writer = Writer::new(&planned.request.output_dir).map_err(setup)?;
    let (seed, random_seed) = match &planned.plan.seed {
        Some(seed) => (seed.clone(), false),
        None => (Seed::random().map_err(setup)?, true),
    };
    events.emit(Event::RunStarted {
        workflow: planned.plan.id.clone(),
        steps: planned.plan.steps.len(),
        seed: seed.clone(),
        random_seed,
    });
    let document = with_seed(&planned.document, &seed);
    let mut session = Session { engine, planned, document, events, cancel, writer, files: Vec::new() };
    let mut scope = Scope::new(&planned.plan, seed.clone(), BTreeMap::new(), String::new());
    let outcome = scope.run(&mut session);
    let files = std::mem::take(&mut session.files);
    engine.cache.unshare_all();
    outcome?;
    Ok(Summary {
        workflow: planned.plan.id.clone(),
        files,
        seed: Some(seed),
        random_seed,
        seconds: started.elapsed().as_secs_f64(),
    })
}

/// The document with the seed that this run starts from, so that running it again gives the same pictures.
fn with_seed(document: &Value, seed: &Seed) -> Value {
    let mut document = document.clone();
    if let (Some(members), Ok(seed)) = (document.as_object_mut(), serde_json::to_value(seed)) {
        members.insert("seed".to_owned(), seed);
    }
    document
}

/// What all steps of a run share, those of sub-workflows included.
pub(crate) struct Session<'a> {
    pub(crate) engine: &'a mut Engine,
    pub(crate) planned: &'a PlannedRun,
    /// The workflow as it is embedded in pictures.
    document: Value,
    pub(crate) events: &'a dyn EventSink,
    pub(crate) cancel: &'a CancellationToken,
    pub(crate) writer: Writer,
    pub(crate) files: Vec<PathBuf>,
}

/// One workflow of a run: the main one, or a sub-workflow.
pub(crate) struct Scope<'p> {
    pub(crate) plan: &'p Plan,
    pub(crate) seed: Seed,
    pub(crate) media: Media,
    pub(crate) results: Results,
    pub(crate) pipelines: LoadedPipelines,
    /// `parent/` for a sub-workflow, empty for the main one: goes before step names in events.
    pub(crate) prefix: String,
}

impl<'p> Scope<'p> {
    pub(crate) fn new(plan: &'p Plan, seed: Seed, artifacts: BTreeMap<u64, Artifact>, prefix: String) -> Self {
        Self {
            plan,
            seed,
            media: Media::with(artifacts),
            results: Results::default(),
            pipelines: LoadedPipelines::default(),
            prefix,
        }
    }

    /// Runs all steps; the entries of the last one are what a parent workflow receives.
    pub(crate) fn run(&mut self, session: &mut Session) -> Result<Vec<Entry>, EngineError> {
        let mut last = Vec::new();
        let templates: Vec<Value> = self.plan.steps.iter().map(template).collect();
        for (index, step) in self.plan.steps.iter().enumerate() {
            last = self.step(step, session)?;
            self.results.insert(step.name.clone(), last.clone());
            self.results.release_except(&templates[index + 1..].iter().collect::<Vec<_>>());
            if step.release_pipeline {
                self.pipelines.release(&step.name, &mut session.engine.cache);
            }
        }
        Ok(last)
    }

    fn step(&mut self, step: &PlannedStep, session: &mut Session) -> Result<Vec<Entry>, EngineError> {
        let started = Instant::now();
        let label = format!("{}{}", self.prefix, step.name);
        session.cancel.check().map_err(|_| EngineError::Cancelled)?;
        session.events.emit(Event::StepStarted { step: label.clone(), index: step.index });
        let iterations = self.iterations(step, session).map_err(|message| failed(&label, "", message))?;
        if iterations.is_empty() {
            let message = format!("step `{label}` has nothing to do: a reference of its arguments has no values");
            session.events.emit(Event::Warning { message });
        }
        let mut runner = StepRunner::new(self, step, label.clone(), session)?;
        let mut entries = Vec::new();
        let count = iterations.len();
        for (iteration, arguments) in iterations.into_iter().enumerate() {
            session.cancel.check().map_err(|_| EngineError::Cancelled)?;
            session.events.emit(Event::IterationStarted { step: label.clone(), iteration, iterations: count });
            let place = if count > 1 { format!(" (iteration {} of {count})", iteration + 1) } else { String::new() };
            let fresh = runner.call(self, &arguments, session, &place)?;
            runner
                .save(&fresh, entries.len(), &arguments, self, session)
                .map_err(|error| failed(&label, &place, error))?;
            entries.extend(fresh);
        }
        if let (Action::Pipeline(_), Some(used)) = (&step.action, self.pipelines.memory_used(&step.name)) {
            session.events.emit(used);
        }
        let seed = runner.seed.clone();
        let seconds = started.elapsed().as_secs_f64();
        session.events.emit(Event::StepFinished { step: label, seconds, seed });
        Ok(entries)
    }

    /// The argument sets of a step, media loaded and references replaced.
    fn iterations(&mut self, step: &PlannedStep, session: &Session) -> Result<Vec<Arguments>, String> {
        let mut values = match &step.action {
            Action::Task(TaskStep { input: TaskInput::Inputs(inputs), .. }) => {
                return inputs.iter().map(|input| self.input(input, session)).collect();
            }
            action => named_arguments(action).clone(),
        };
        self.media.load(&mut values, &self.plan.base_dir, session.engine.config.offline)?;
        let template = Arguments { values, input: None, artifacts: self.media.artifacts.clone() };
        references::expand(&template, &self.results).map_err(|error| error.to_string())
    }

    /// One item of a task's `inputs`: an object is the named arguments, anything else the bare input.
    fn input(&mut self, input: &Value, session: &Session) -> Result<Arguments, String> {
        let Value::Object(values) = input else {
            return Ok(Arguments { input: Some(input.clone()), ..Arguments::default() });
        };
        let mut values = values.clone();
        self.media.load(&mut values, &self.plan.base_dir, session.engine.config.offline)?;
        Ok(Arguments { values, input: None, artifacts: self.media.artifacts.clone() })
    }
}

/// The named arguments of a step; the items of a task's `inputs` are none.
fn named_arguments(action: &Action) -> &Map<String, Value> {
    static NONE: LazyLock<Map<String, Value>> = LazyLock::new(Map::new);
    match action {
        Action::Pipeline(pipeline) => &pipeline.arguments,
        Action::Reference(reference) => &reference.arguments,
        Action::Task(TaskStep { input: TaskInput::Arguments(arguments), .. }) => arguments,
        Action::Task(TaskStep { input: TaskInput::Inputs(_), .. }) => &NONE,
        Action::Workflow(workflow) => &workflow.arguments,
    }
}

/// Everything of a step that may refer to earlier results.
fn template(step: &PlannedStep) -> Value {
    Value::Object(named_arguments(&step.action).clone())
}

/// A step being run: what is set up once for all of its iterations.
struct StepRunner<'s> {
    step: &'s PlannedStep,
    label: String,
    save: Option<SaveSpec>,
    call: Option<PipelineCall>,
    /// The seed the step's generator started from, when it has one.
    seed: Option<Seed>,
}

impl<'s> StepRunner<'s> {
    fn new(
        scope: &mut Scope,
        step: &'s PlannedStep,
        label: String,
        session: &mut Session,
    ) -> Result<Self, EngineError> {
        let result = step.result.as_ref().and_then(|result| serde_json::to_value(result).ok());
        let save = SaveSpec::from_result(result.as_ref()).map_err(|error| failed(&label, "", error))?;
        let call = match &step.action {
            Action::Pipeline(pipeline) => Some(scope.load_pipeline(step, pipeline, &label, session)?),
            Action::Reference(reference) => Some(scope.refer_to_pipeline(step, reference, session)?),
            Action::Task(_) | Action::Workflow(_) => None,
        };
        let seed = call.as_ref().and_then(|call| call.seed.clone());
        Ok(Self { step, label, save, call, seed })
    }

    fn call(
        &mut self,
        scope: &mut Scope,
        arguments: &Arguments,
        session: &mut Session,
        place: &str,
    ) -> Result<Vec<Entry>, EngineError> {
        let events = StepEvents { step: &self.label, inner: session.events };
        let started = Instant::now();
        match &self.step.action {
            Action::Pipeline(_) | Action::Reference(_) => {
                let call = self.call.as_mut().expect("set up in `new` for pipeline steps");
                let context = Context { events: &events, cancel: session.cancel };
                let entry = scope.pipelines.run(call, arguments, context);
                entry.map(|entry| vec![entry]).map_err(|error| pipeline_failed(&self.label, place, error))
            }
            Action::Task(task) => {
                let entries = run_task(&task.command, arguments, scope, session, &events);
                let entries = entries.map_err(|error| task_failed(&self.label, place, error))?;
                events.emit(stage("task", started));
                Ok(entries)
            }
            Action::Workflow(workflow) => workflows::run(workflow, self.step, arguments, scope, session),
        }
    }

    /// Saves the fresh entries of one iteration, numbered on from the `before` earlier ones.
    fn save(
        &self,
        fresh: &[Entry],
        before: usize,
        arguments: &Arguments,
        scope: &Scope,
        session: &mut Session,
    ) -> Result<(), String> {
        let Some(spec) = &self.save else { return Ok(()) };
        let started = Instant::now();
        let events = StepEvents { step: &self.label, inner: session.events };
        let metadata =
            spec.embeds_metadata(session.planned.request.metadata).then(|| self.metadata(arguments, scope, session));
        let step = StepLabel { workflow_id: &scope.plan.id, step_name: &self.step.name, step_index: self.step.index };
        for (offset, entry) in fresh.iter().enumerate() {
            let saved = session.writer.save(spec, step, before + offset, entry, metadata.as_ref());
            let saved = saved.map_err(|error| error.to_string())?;
            saved.warnings.into_iter().for_each(|message| events.emit(Event::Warning { message }));
            for path in saved.overwritten.iter().filter(|path| session.files.contains(path)) {
                events.emit(Event::Warning { message: written_twice(path) });
            }
            for path in saved.files {
                events.emit(Event::FileWritten { path: path.clone() });
                session.files.push(path);
            }
        }
        events.emit(stage("save", started));
        Ok(())
    }

    fn metadata(&self, arguments: &Arguments, scope: &Scope, session: &Session) -> Metadata {
        let mut metadata = Metadata::new(&self.step.name);
        metadata.arguments = Some(metadata::shown(arguments, &scope.media.sources));
        metadata.seed = Some(self.seed.clone().unwrap_or_else(|| scope.seed.clone()));
        metadata.workflow_id = Some(scope.plan.id.clone());
        metadata.workflow.clone_from(&session.planned.file_name);
        metadata.base_dir = metadata::relative_base_dir(session.writer.dir(), &session.planned.plan.base_dir);
        metadata.workflow_document = Some(session.document.clone());
        match &self.step.action {
            Action::Task(task) => metadata.task_command = Some(task.command.clone()),
            _ => {
                if let Some(call) = &self.call {
                    metadata.model_name.clone_from(&call.facts.model_name);
                    metadata.scheduler.clone_from(&call.facts.scheduler);
                    metadata.loras.clone_from(&call.facts.loras);
                }
            }
        }
        metadata
    }
}

/// A sub-workflow that runs several times writes the same names each time.
fn written_twice(path: &Path) -> String {
    format!(
        "`{}` replaced a file of this run: a sub-workflow that runs several times writes the same names each time; give \
         the step that calls it a `result`, whose names count the iterations",
        path.display()
    )
}

fn run_task(
    command: &str,
    arguments: &Arguments,
    scope: &Scope,
    session: &Session,
    events: &dyn EventSink,
) -> Result<Vec<Entry>, dw_tasks::TaskError> {
    let offline = session.engine.config.offline;
    let context = TaskContext {
        base_dir: &scope.plan.base_dir,
        events,
        cancel: session.cancel,
        fetch: &|url| fetch(url, offline),
    };
    let task = dw_tasks::registry::find(command)
        .ok_or_else(|| dw_tasks::TaskError::Failed(format!("Unknown task command: '{command}'")))?;
    Ok(match (task.run)(arguments, &context)? {
        TaskOutput::One(artifact) => vec![Entry::from(artifact)],
        TaskOutput::Many(artifacts) => artifacts.into_iter().map(Entry::from).collect(),
    })
}

/// Fills in the step's name where a pipeline reports the end of a stage.
pub(crate) struct StepEvents<'a> {
    pub(crate) step: &'a str,
    pub(crate) inner: &'a dyn EventSink,
}

impl EventSink for StepEvents<'_> {
    fn emit(&self, event: Event) {
        self.inner.emit(match event {
            Event::StageFinished { stage, seconds, .. } => {
                Event::StageFinished { step: self.step.to_owned(), stage, seconds }
            }
            other => other,
        });
    }
}

pub(crate) fn stage(name: &str, started: Instant) -> Event {
    Event::StageFinished { step: String::new(), stage: name.to_owned(), seconds: started.elapsed().as_secs_f64() }
}

pub(crate) fn failed(step: &str, place: &str, message: impl std::fmt::Display) -> EngineError {
    EngineError::Step { step: step.to_owned(), iteration: place.to_owned(), message: message.to_string() }
}

pub(crate) fn pipeline_failed(step: &str, place: &str, error: dw_pipelines::Error) -> EngineError {
    match error {
        dw_pipelines::Error::Cancelled(_) => EngineError::Cancelled,
        other => failed(step, place, other),
    }
}

fn task_failed(step: &str, place: &str, error: dw_tasks::TaskError) -> EngineError {
    match error {
        dw_tasks::TaskError::Cancelled(_) => EngineError::Cancelled,
        other => failed(step, place, other),
    }
}
