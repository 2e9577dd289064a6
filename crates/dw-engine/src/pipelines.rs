//! The pipelines of one workflow scope: from a step's typed description to a loaded pipeline, and the
//! calls made on it.

use std::{collections::BTreeMap, path::Path};

use candle_core::DType;
use dw_core::{
    arguments::Arguments,
    artifact::Entry,
    event::Event,
    plan::{PipelineStep, PlannedStep, ReferenceStep},
    seed::Seed,
    workflow::{
        CacheType, Component, Dtype, FromPretrained, IpAdapter, Lora, NumberOrText, PipelineConfiguration,
        QuantizationConfig, TeaCache, TextualInversion,
    },
};
use dw_pipelines::{
    Error, Result,
    models::Reuse,
    pipelines::{ComponentCache, ComponentSummary, Pipeline, memory::Gauge},
    quant::QuantizationRequest,
    request::{
        ComponentChoice, ComponentRequest, Context, IpAdapterRequest, IpAdapterScale, LoraRequest, ModelSource,
        PipelineRequest, SchedulerRequest, TextualInversionRequest,
    },
    rng::{Generators, NoiseDialect},
};
use serde_json::Value;

use crate::{
    Previews,
    engine::Engine,
    error::EngineError,
    latent_preview::Viewer,
    placement,
    run::{Scope, Session, StepEvents, failed, pipeline_failed, stage},
};

/// What is said about a pipeline in the metadata of its pictures.
#[derive(Clone, Default)]
pub(crate) struct Facts {
    pub(crate) model_name: Option<String>,
    pub(crate) scheduler: Option<Value>,
    pub(crate) loras: Option<Value>,
}

struct Loaded {
    pipeline: Pipeline,
    /// Measures from before the pipeline was loaded.
    gauge: Gauge,
    seed: Option<Seed>,
    facts: Facts,
}

/// The pipelines that the steps of a scope have loaded, by step name.
#[derive(Default)]
pub(crate) struct LoadedPipelines(BTreeMap<String, Loaded>);

/// The calls of one step on a pipeline: the generator advances from iteration to iteration.
pub(crate) struct PipelineCall {
    pipeline: String,
    generators: Generators,
    /// The seed the generator started from; none when the step asked for no generator.
    pub(crate) seed: Option<Seed>,
    pub(crate) facts: Facts,
}

impl LoadedPipelines {
    /// One call, with looks at the pictures while they are made.
    pub(crate) fn run(
        &mut self,
        call: &mut PipelineCall,
        arguments: &Arguments,
        context: Context,
        previews: Option<&Previews>,
    ) -> Result<Entry> {
        let loaded = self.0.get_mut(&call.pipeline).ok_or_else(|| {
            Error::Unsupported(format!(
                "the pipeline of step `{}` was released before; remove its `release_pipeline`",
                call.pipeline
            ))
        })?;
        let generators = &mut call.generators;
        let viewer = previews
            .zip(loaded.pipeline.latent_format())
            .and_then(|(previews, format)| Viewer::new(previews, format, context.events));
        let Some(viewer) = viewer else { return loaded.pipeline.run(arguments, generators, context) };
        let context = Context { events: &viewer, ..context };
        loaded.pipeline.run_observed(arguments, generators, context, &mut |step, latents| viewer.look(step, latents))
    }

    /// What the pipeline of a step needed since it was loaded, beside what was planned; none where nobody says.
    pub(crate) fn memory_used(&self, step: &str) -> Option<Event> {
        let loaded = self.0.get(step)?;
        let fit = loaded.pipeline.fit();
        Some(Event::MemoryUsed { device: fit.device.clone(), peak: loaded.gauge.peak()?, planned: fit.peak })
    }

    /// Unloads the pipeline of a step, and its components from the cache.
    pub(crate) fn release(&mut self, step: &str, cache: &mut ComponentCache) {
        let Some(loaded) = self.0.remove(step) else { return };
        for component in loaded.pipeline.components() {
            cache.release(&component.key);
        }
    }
}

impl Scope<'_> {
    /// Loads the pipeline of a step and sets up its generator.
    pub(crate) fn load_pipeline(
        &mut self,
        step: &PlannedStep,
        description: &PipelineStep,
        label: &str,
        session: &mut Session,
    ) -> std::result::Result<PipelineCall, EngineError> {
        let started = std::time::Instant::now();
        let events = StepEvents { step: label, inner: session.events };
        let request =
            request(description, &self.plan.base_dir, session.engine).map_err(|error| failed(label, "", error))?;
        let context = Context { events: &events, cancel: session.cancel };
        let gauge = Gauge::start(&request.device);
        // The step's earlier pipeline goes first, so that two never need to fit at once.
        self.pipelines.0.remove(&step.name);
        let mut pipeline = Pipeline::load(&request, &session.engine.hub, &mut session.engine.cache, context)
            .map_err(|error| pipeline_failed(label, "", error))?;
        reuse_steps(&mut pipeline, &description.configuration, context).map_err(|error| failed(label, "", error))?;
        let from = &description.from_pretrained;
        let model = from.model_name.as_ref().or(from.from_single_file.as_ref()).cloned().unwrap_or_default();
        let of_model = session.engine.models.entry(model).or_default();
        for component in pipeline.components() {
            session.engine.cache.own(&component.key, &component.name, &session.planned.fingerprint);
            of_model.insert(component.key);
        }
        dw_core::event::EventSink::emit(&events, stage("load", started));
        share(&pipeline, description, session).map_err(|message| failed(label, "", message))?;
        let wants_generator = !description.configuration.no_generator.unwrap_or(false);
        let seed = wants_generator.then(|| step.seed.clone().unwrap_or_else(|| self.seed.clone()));
        let facts = facts(description);
        let call = call(&step.name, seed.clone(), facts.clone(), session)?;
        self.pipelines.0.insert(step.name.clone(), Loaded { pipeline, gauge, seed, facts });
        Ok(call)
    }

    /// What the pipeline of a step consists of.
    pub(crate) fn components(&self, step: &str) -> Vec<ComponentSummary> {
        self.pipelines.0.get(step).map(|loaded| loaded.pipeline.components()).unwrap_or_default()
    }

    /// Sets up calls on the pipeline of an earlier step. It keeps that step's seed unless the step names
    /// one itself.
    pub(crate) fn refer_to_pipeline(
        &mut self,
        step: &PlannedStep,
        reference: &ReferenceStep,
        session: &Session,
    ) -> std::result::Result<PipelineCall, EngineError> {
        let loaded = self.pipelines.0.get(&reference.reference_name);
        let seed = step.seed.clone().or_else(|| loaded.and_then(|loaded| loaded.seed.clone()));
        let facts = loaded.map(|loaded| loaded.facts.clone()).unwrap_or_default();
        call(&reference.reference_name, seed, facts, session)
    }
}

fn call(
    pipeline: &str,
    seed: Option<Seed>,
    facts: Facts,
    session: &Session,
) -> std::result::Result<PipelineCall, EngineError> {
    let dialect = if session.engine.config.cuda_noise { NoiseDialect::CUDA } else { NoiseDialect::Cpu };
    let start = match &seed {
        Some(seed) => seed.clone(),
        None => Seed::random().map_err(crate::engine::setup)?,
    };
    Ok(PipelineCall { pipeline: pipeline.to_owned(), generators: Generators::from_seed(&start, dialect), seed, facts })
}

/// Sets up the skipping of steps that the step asks for; what is not known has no effect but a warning.
fn reuse_steps(pipeline: &mut Pipeline, configuration: &PipelineConfiguration, context: Context) -> Result<()> {
    let warn = |key: &str, what: &str| {
        let message = format!("`{key}` has no effect: {what}; every step is computed");
        context.events.emit(dw_core::event::Event::Warning { message });
    };
    let (key, rule) = match (&configuration.cache, &configuration.teacache) {
        (Some(cache), _) if cache.kind == CacheType::FirstBlock => {
            let threshold =
                cache.threshold.as_ref().map(|threshold| number("cache.threshold", threshold)).transpose()?;
            ("cache", Reuse::FirstBlock { threshold: threshold.unwrap_or(FIRST_BLOCK_THRESHOLD) })
        }
        (Some(_), _) => {
            warn("cache", "this build knows the type `first_block` only");
            return Ok(());
        }
        (None, Some(tea)) => ("teacache", tea_cache(tea, pipeline.tea_defaults())?),
        (None, None) => return Ok(()),
    };
    if !pipeline.reuse_steps(Some(rule)) {
        warn(key, &format!("`{}` cannot skip steps in this build", pipeline.class()));
    }
    Ok(())
}

/// The threshold of `first_block` when the step names none.
const FIRST_BLOCK_THRESHOLD: f64 = 0.05;

/// What `teacache` asks for; what it leaves out is as `defaults` has it, threshold and polynomial.
fn tea_cache(tea: &TeaCache, defaults: (f64, [f64; 5])) -> Result<Reuse> {
    let wrong = |name: &str, reason: String| Error::Argument { name: format!("teacache.{name}"), reason };
    let coefficients = match (&tea.coefficients, tea.variant.as_deref()) {
        (Some(list), _) => list
            .as_slice()
            .try_into()
            .map_err(|_| wrong("coefficients", format!("must have 5 numbers, found {}", list.len())))?,
        (None, None) => defaults.1,
        (None, Some("flux")) if defaults.1 == Reuse::FLUX => defaults.1,
        (None, Some(variant)) => {
            let known = if defaults.1 == Reuse::FLUX { "`flux`" } else { "none for this model; give `coefficients`" };
            return Err(wrong("variant", format!("`{variant}` is not known here; this build knows {known}")));
        }
    };
    Ok(Reuse::Tea { threshold: tea.rel_l1_thresh.unwrap_or(defaults.0), coefficients })
}

/// Offers the components that the step shares to later steps.
fn share(pipeline: &Pipeline, description: &PipelineStep, session: &mut Session) -> std::result::Result<(), String> {
    for name in &description.shared_components {
        let component = pipeline.component(name).ok_or_else(|| {
            let names: Vec<_> = pipeline.components().into_iter().map(|component| component.name).collect();
            format!("`{}` has no component `{name}` to share; it has {}", pipeline.class(), names.join(", "))
        })?;
        session.engine.cache.share(name, component);
    }
    Ok(())
}

fn facts(description: &PipelineStep) -> Facts {
    Facts {
        model_name: description.from_pretrained.model_name.clone(),
        scheduler: description.scheduler.as_ref().and_then(|scheduler| serde_json::to_value(scheduler).ok()),
        loras: (!description.loras.is_empty()).then(|| serde_json::to_value(&description.loras).ok()).flatten(),
    }
}

pub(crate) fn request(description: &PipelineStep, base_dir: &Path, engine: &Engine) -> Result<PipelineRequest> {
    let from = &description.from_pretrained;
    let device = match description.configuration.device.as_deref() {
        Some(name) => dw_pipelines::device::pick(Some(name))?,
        None => engine.device.clone(),
    };
    let mut components = BTreeMap::new();
    for name in &description.omitted {
        components.insert(name.clone(), ComponentChoice::Omit);
    }
    for (name, specs) in &description.components {
        let requests = specs.iter().map(|spec| component(spec, base_dir)).collect::<Result<Vec<_>>>()?;
        components.insert(name.clone(), ComponentChoice::Load(requests));
    }
    for name in &description.reused_components {
        components.insert(name.clone(), ComponentChoice::Shared);
    }
    if let Some(encoder) = description.ip_adapters.iter().find_map(|spec| own_image_encoder(spec, base_dir)) {
        components.entry("image_encoder".into()).or_insert(ComponentChoice::Load(vec![encoder]));
    }
    Ok(PipelineRequest {
        class: description.class.clone(),
        source: source(from, base_dir)?,
        variant: from.variant.clone(),
        dtype: from.torch_dtype.as_deref().map(dtype).transpose()?.flatten(),
        device,
        components,
        scheduler: scheduler(description)?,
        loras: description
            .loras
            .iter()
            .enumerate()
            .map(|(index, spec)| lora(index, spec, base_dir))
            .collect::<Result<Vec<_>>>()?,
        textual_inversions: description.textual_inversions.iter().map(|spec| learned(spec, base_dir)).collect(),
        prompt_weighting: description.configuration.prompt_weighting.unwrap_or(false),
        ip_adapters: description.ip_adapters.iter().map(|spec| ip_adapter(spec, base_dir)).collect::<Result<_>>()?,
        memory: placement::request(&description.configuration, &description.arguments, engine.config.ignore_fit)?,
    })
}

fn component(spec: &Component, base_dir: &Path) -> Result<ComponentRequest> {
    let from = &spec.from_pretrained_arguments;
    Ok(ComponentRequest {
        class: spec.configuration.component_type.clone(),
        source: source(from, base_dir)?,
        subfolder: from.subfolder.clone(),
        variant: from.variant.clone(),
        dtype: from.torch_dtype.as_deref().map(dtype).transpose()?.flatten(),
        quantization: spec.quantization_config.as_ref().map(quantization).transpose()?,
    })
}

fn quantization(spec: &QuantizationConfig) -> Result<QuantizationRequest> {
    let named =
        ["compute_dtype", "bnb_4bit_compute_dtype"].into_iter().find_map(|name| spec.arguments.get(name)?.as_str());
    Ok(QuantizationRequest {
        class: spec.configuration.config_type.clone(),
        arguments: spec.arguments.clone(),
        compute_dtype: named.map(dtype).transpose()?.flatten(),
    })
}

/// Where the files of a pipeline or component come from.
fn source(from: &FromPretrained, base_dir: &Path) -> Result<ModelSource> {
    let named = |name: &str| ModelSource::named(name, from.revision.as_deref(), base_dir);
    match (&from.model_name, &from.from_single_file) {
        (Some(name), _) => Ok(named(name)),
        (None, Some(file)) => {
            let config = from.config.as_deref().map(named);
            Ok(ModelSource::single_file(file, from.revision.as_deref(), base_dir, config))
        }
        (None, None) => Err(Error::Unsupported(
            "`from_pretrained_arguments` names no model; add `model_name` (a folder, `owner/name` or `builtin:NAME`)"
                .into(),
        )),
    }
}

/// The type that `torch_dtype` names; none for `auto`.
pub(crate) fn dtype(name: &str) -> Result<Option<DType>> {
    match Dtype::parse(name) {
        Some(Dtype::F32) => Ok(Some(DType::F32)),
        Some(Dtype::F16) => Ok(Some(DType::F16)),
        Some(Dtype::Bf16) => Ok(Some(DType::BF16)),
        Some(Dtype::Auto) => Ok(None),
        _ => Err(Error::Argument {
            name: "torch_dtype".into(),
            reason: format!("`{name}` is no type that models run in; use {}", Dtype::NAMES),
        }),
    }
}

fn scheduler(description: &PipelineStep) -> Result<Option<SchedulerRequest>> {
    let Some(scheduler) = &description.scheduler else { return Ok(None) };
    Ok(Some(SchedulerRequest {
        class: scheduler.configuration.as_ref().map(|configuration| configuration.scheduler_type.clone()),
        config: scheduler.from_config_args.clone().unwrap_or_default(),
        shift: scheduler.shift.as_ref().map(|shift| number("scheduler.shift", shift)).transpose()?,
    }))
}

fn lora(index: usize, spec: &Lora, base_dir: &Path) -> Result<LoraRequest> {
    let revision = spec.rest.get("revision").and_then(Value::as_str);
    Ok(LoraRequest {
        source: ModelSource::named(&spec.model_name, revision, base_dir),
        weight_name: spec.weight_name.clone(),
        subfolder: spec.subfolder.clone(),
        adapter_name: spec.adapter_name.clone().unwrap_or_else(|| index.to_string()),
        scale: spec.scale.as_ref().map_or(Ok(1.0), |scale| number("loras.scale", scale))?,
    })
}

fn learned(spec: &TextualInversion, base_dir: &Path) -> TextualInversionRequest {
    let text = |key: &str| spec.rest.get(key).and_then(Value::as_str);
    TextualInversionRequest {
        source: ModelSource::named(&spec.model_name, text("revision"), base_dir),
        weight_name: spec.weight_name.clone(),
        subfolder: text("subfolder").map(str::to_owned),
        token: spec.token.clone(),
        text_encoder: spec.text_encoder.clone(),
    }
}

fn ip_adapter(spec: &IpAdapter, base_dir: &Path) -> Result<IpAdapterRequest> {
    let revision = spec.rest.get("revision").and_then(Value::as_str);
    let image_encoder_folder = match spec.rest.get("image_encoder_folder") {
        None => Some("image_encoder".to_owned()),
        Some(folder) => folder.as_str().map(str::to_owned),
    };
    Ok(IpAdapterRequest {
        source: ModelSource::named(&spec.model_name, revision, base_dir),
        weight_name: spec.weight_name.clone(),
        subfolder: spec.subfolder.clone(),
        image_encoder_folder,
        scale: IpAdapterScale::from_json(spec.scale.as_ref().unwrap_or(&Value::Null))?,
    })
}

/// The image encoder that an IP-Adapter names apart from its own repository, as diffusers' loader for Flux takes it.
fn own_image_encoder(spec: &IpAdapter, base_dir: &Path) -> Option<ComponentRequest> {
    let text = |name: &str| spec.rest.get(name).and_then(Value::as_str).filter(|text| !text.is_empty());
    let name = text("image_encoder_pretrained_model_name_or_path")?;
    Some(ComponentRequest {
        class: "CLIPVisionModelWithProjection".into(),
        source: ModelSource::named(name, None, base_dir),
        subfolder: text("image_encoder_subfolder").map(str::to_owned),
        variant: None,
        dtype: None,
        quantization: None,
    })
}

fn number(name: &str, value: &NumberOrText) -> Result<f64> {
    value.number().ok_or_else(|| Error::Argument {
        name: name.into(),
        reason: format!("`{}` is not a number", serde_json::to_string(value).unwrap_or_default()),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_ip_adapter_may_name_the_repository_of_its_image_encoder() {
        let encoder = |spec: Value| {
            let spec: IpAdapter = serde_json::from_value(spec).expect("an IP-Adapter");
            own_image_encoder(&spec, Path::new("."))
        };
        let name = "image_encoder_pretrained_model_name_or_path";
        let found = encoder(json!({ "model_name": "o/a", name: "o/clip", "image_encoder_subfolder": "vision" }));
        let found = found.expect("an encoder is named");
        assert_eq!(found.source, ModelSource::Hub { repo: "o/clip".into(), revision: None });
        assert_eq!(
            (found.class.as_str(), found.subfolder.as_deref()),
            ("CLIPVisionModelWithProjection", Some("vision"))
        );
        assert_eq!(encoder(json!({ "model_name": "o/a", "image_encoder_folder": "models/clip" })), None);
    }
}
