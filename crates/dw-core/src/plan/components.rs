//! A pipeline step: its parts made plain, and what cannot go together.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::{PipelineStep, builder::Report, sources, step::Context};
use crate::{
    catalog::{Catalog, CatalogEntry},
    document::child_pointer,
    media, paths,
    workflow::{
        Chain, Component, NumberOrText, Offload, OneOrMany, Pipeline, PipelineConfiguration, QuantizationConfig,
        Residency, Scheduler, join_words, nearest,
    },
};

/// Makes the parts of a pipeline plain and checks them. None when an undeclared component cannot be read.
pub(super) fn plan(
    report: &mut Report,
    context: &mut Context,
    pipeline: Pipeline,
    pointer: &str,
) -> Option<PipelineStep> {
    let catalog = context.inputs.catalog;
    let class = class_name(&pipeline.configuration.component_type);
    let known = check_class(report, catalog, &class, pointer);
    check_configuration(report, &pipeline.configuration, pointer);
    sources::check(
        report,
        catalog,
        &pipeline.from_pretrained_arguments,
        &child_pointer(pointer, "from_pretrained_arguments"),
    );
    check_combinations(report, &pipeline, pointer);
    for (key, scheduler) in [("scheduler", &pipeline.scheduler), ("audio_scheduler", &pipeline.audio_scheduler)] {
        if let Some(scheduler) = scheduler {
            check_scheduler(report, catalog, scheduler, known, &child_pointer(pointer, key));
        }
    }
    check_adapters(report, catalog, &pipeline, pointer);
    if let Some(chain) = &pipeline.chain {
        check_chain(report, chain, &child_pointer(pointer, "chain"));
    }
    let mut step = into_step(report, pipeline, class, pointer)?;
    check_sharing(report, context, &step, pointer);
    for (name, components) in &step.components {
        check_components(report, catalog, name, components, pointer);
    }
    step.configuration.component_type.clone_from(&step.class);
    Some(step)
}

/// The bare name of a class of the diffusers library.
pub(super) fn class_name(text: &str) -> String {
    let bare = text.strip_prefix("diffusers.").and_then(|rest| rest.rsplit('.').next());
    bare.unwrap_or(text).to_owned()
}

/// Whether the build has the class; says so when not.
fn check_class(report: &mut Report, catalog: &Catalog, class: &str, pointer: &str) -> bool {
    if catalog.pipeline(class).is_some() || media::is_reference(class) {
        return true;
    }
    let pointer = format!("{pointer}/configuration/component_type");
    let near = nearest(class, names(&catalog.pipelines));
    let remedy =
        near.map_or("`dw pipelines` lists what it can run".to_owned(), |near| format!("did you mean `{near}`?"));
    report
        .unsupported("unknown-pipeline", &pointer, format!("this build of dw has no pipeline class `{class}`"))
        .remedy = Some(remedy);
    false
}

fn names(entries: &[CatalogEntry]) -> impl Iterator<Item = &str> {
    entries.iter().map(|entry| entry.name.as_str())
}

fn into_step(report: &mut Report, mut pipeline: Pipeline, class: String, pointer: &str) -> Option<PipelineStep> {
    let mut components = declared_components(&mut pipeline);
    let mut whole = true;
    for (name, value) in &pipeline.rest {
        if value.get("from_pretrained_arguments").is_none() {
            continue;
        }
        match serde_json::from_value::<Component>(value.clone()) {
            Ok(component) => drop(components.insert(name.clone(), vec![component])),
            Err(error) => {
                let message = format!("the component `{name}` cannot be read: {error}");
                report.error("component", &child_pointer(pointer, name), message);
                whole = false;
            }
        }
    }
    let both = |a: &Option<Vec<String>>, b: &Option<Vec<String>>| -> Vec<String> {
        a.iter().chain(b).flatten().cloned().collect()
    };
    let configuration = pipeline.configuration;
    whole.then(|| PipelineStep {
        class,
        omitted: pipeline.from_pretrained_arguments.omitted(),
        from_pretrained: pipeline.from_pretrained_arguments,
        components,
        scheduler: pipeline.scheduler,
        audio_scheduler: pipeline.audio_scheduler,
        loras: pipeline.loras.unwrap_or_default(),
        ip_adapters: pipeline.ip_adapter.map_or(Vec::new(), OneOrMany::into_vec),
        textual_inversions: pipeline.textual_inversions.unwrap_or_default(),
        remote_text_encoder: pipeline.remote_text_encoder,
        shared_components: both(&pipeline.shared_components, &configuration.shared_components),
        reused_components: both(&pipeline.reused_components, &configuration.reused_components),
        configuration,
        chain: pipeline.chain,
        arguments: pipeline.arguments,
    })
}

/// Takes the components that have keys of their own.
fn declared_components(pipeline: &mut Pipeline) -> BTreeMap<String, Vec<Component>> {
    let single = [
        ("model", &mut pipeline.model),
        ("transformer", &mut pipeline.transformer),
        ("transformer_2", &mut pipeline.transformer_2),
        ("vae", &mut pipeline.vae),
        ("unet", &mut pipeline.unet),
        ("text_encoder", &mut pipeline.text_encoder),
        ("text_encoder_2", &mut pipeline.text_encoder_2),
        ("text_encoder_3", &mut pipeline.text_encoder_3),
        ("tokenizer", &mut pipeline.tokenizer),
        ("tokenizer_2", &mut pipeline.tokenizer_2),
        ("tokenizer_3", &mut pipeline.tokenizer_3),
        ("image_encoder", &mut pipeline.image_encoder),
        ("feature_extractor", &mut pipeline.feature_extractor),
        ("prompt_enhancer_head", &mut pipeline.prompt_enhancer_head),
    ];
    let mut components: BTreeMap<String, Vec<Component>> =
        single.into_iter().filter_map(|(name, part)| Some((name.to_owned(), vec![part.take()?]))).collect();
    if let Some(controlnets) = pipeline.controlnet.take() {
        components.insert("controlnet".into(), controlnets.into_vec().into_iter().map(Component::from).collect());
    }
    components
}

fn check_components(report: &mut Report, catalog: &Catalog, name: &str, components: &[Component], pointer: &str) {
    let pointer = child_pointer(pointer, name);
    let listed = report.document.value.pointer(&pointer).is_some_and(Value::is_array);
    for (index, component) in components.iter().enumerate() {
        let pointer = if listed { child_pointer(&pointer, &index.to_string()) } else { pointer.clone() };
        let source = child_pointer(&pointer, "from_pretrained_arguments");
        sources::check(report, catalog, &component.from_pretrained_arguments, &source);
        if let Some(quantization) = &component.quantization_config {
            check_quantization(report, quantization, &child_pointer(&pointer, "quantization_config"));
        }
    }
}

fn check_quantization(report: &mut Report, quantization: &QuantizationConfig, pointer: &str) {
    for (key, value) in &quantization.arguments {
        if key.ends_with("compute_dtype") {
            sources::check_dtype(report, value.as_str(), &format!("{pointer}/arguments/{key}"));
        }
    }
}

fn check_configuration(report: &mut Report, configuration: &PipelineConfiguration, pointer: &str) {
    let pointer = child_pointer(pointer, "configuration");
    let part = |key: &str| format!("{pointer}/{key}/torch_dtype");
    let vae = configuration.vae.as_ref().and_then(|settings| settings.torch_dtype.as_deref());
    sources::check_dtype(report, vae, &part("vae"));
    for (key, settings) in [
        ("unet", &configuration.unet),
        ("transformer", &configuration.transformer),
        ("text_encoder", &configuration.text_encoder),
    ] {
        let dtype = settings.as_ref().and_then(|settings| settings.torch_dtype.as_deref());
        sources::check_dtype(report, dtype, &part(key));
    }
    if let Some(casting) = &configuration.enable_layerwise_casting {
        let pointer = child_pointer(&pointer, "enable_layerwise_casting");
        sources::check_dtype(report, Some(&casting.storage_dtype), &child_pointer(&pointer, "storage_dtype"));
        sources::check_dtype(report, Some(&casting.compute_dtype), &child_pointer(&pointer, "compute_dtype"));
    }
    for (name, placement) in configuration.components.iter().flatten() {
        if placement.group_offload.is_some() && placement.residency == Some(Residency::OnDemand) {
            let place = child_pointer(&child_pointer(&pointer, "components"), name);
            let message = format!("`{name}` has both `group_offload` and `residency: on_demand`");
            report.error("conflict", &place, message).remedy = Some("pick one of them".into());
        }
    }
    if configuration.exclude_from_cpu_offload.is_some() && configuration.offload != Some(Offload::Sequential) {
        let place = child_pointer(&pointer, "exclude_from_cpu_offload");
        let message = "`exclude_from_cpu_offload` does nothing without `offload: sequential`";
        report.warning("conflict", &place, message).remedy = Some("set `offload`, or remove it".into());
    }
    if let Some(threshold) = configuration.cache.as_ref().and_then(|cache| cache.threshold.as_ref()) {
        check_number(report, threshold, &format!("{pointer}/cache/threshold"), "threshold");
        check_not_negative(report, threshold.number(), &pointer, "cache/threshold");
    }
    let tea = configuration.teacache.as_ref().and_then(|tea| tea.rel_l1_thresh);
    check_not_negative(report, tea, &pointer, "teacache/rel_l1_thresh");
}

/// How much may change cannot be less than nothing.
fn check_not_negative(report: &mut Report, number: Option<f64>, pointer: &str, key: &str) {
    if let Some(number) = number.filter(|number| *number < 0.0) {
        let name = key.rsplit('/').next().unwrap_or(key);
        let message = format!("`{name}` must be at least 0, found `{number}`");
        report.error("wrong-value", &format!("{pointer}/{key}"), message);
    }
}

/// Things that are right alone and wrong together.
fn check_combinations(report: &mut Report, pipeline: &Pipeline, pointer: &str) {
    let configuration = &pipeline.configuration;
    if configuration.cache.is_some() && configuration.teacache.is_some() {
        conflict(report, &format!("{pointer}/configuration/teacache"), &["cache", "teacache"]);
    }
    if configuration.prompt_weighting == Some(true) && pipeline.remote_text_encoder.is_some() {
        conflict(
            report,
            &format!("{pointer}/configuration/prompt_weighting"),
            &["prompt_weighting", "remote_text_encoder"],
        );
    }
    if let Some(Err(error)) = pipeline.remote_text_encoder.as_ref().map(|remote| paths::check_url(&remote.url)) {
        report.refused("url", &format!("{pointer}/remote_text_encoder/url"), &error);
    }
    check_prompts(report, &pipeline.arguments, &child_pointer(pointer, "arguments"));
}

fn conflict(report: &mut Report, pointer: &str, keys: &[&str]) {
    let message = format!("{} cannot be used together", join_words(keys, "and"));
    report.error("conflict", pointer, message).remedy = Some("pick one of them".into());
}

/// A prompt is given as text or as embeddings.
pub(super) fn check_prompts(report: &mut Report, arguments: &Map<String, Value>, pointer: &str) {
    for (text, embeddings) in [("prompt", "prompt_embeds"), ("negative_prompt", "negative_prompt_embeds")] {
        let given = |key: &str| arguments.get(key).is_some_and(|value| !value.is_null());
        if given(text) && given(embeddings) {
            conflict(report, &child_pointer(pointer, embeddings), &[text, embeddings]);
        }
    }
}

fn check_scheduler(report: &mut Report, catalog: &Catalog, scheduler: &Scheduler, known_pipeline: bool, pointer: &str) {
    if let Some(shift) = &scheduler.shift {
        check_number(report, shift, &child_pointer(pointer, "shift"), "shift");
    }
    let Some(configuration) = &scheduler.configuration else { return };
    let class = class_name(&configuration.scheduler_type);
    if media::is_reference(&class) {
        return;
    }
    let Some(entry) = catalog.scheduler(&class) else {
        let place = format!("{pointer}/configuration/scheduler_type");
        let message = format!("this build of dw has no scheduler class `{class}`");
        let near = nearest(&class, names(&catalog.schedulers));
        let finding = if known_pipeline {
            report.error("unknown-scheduler", &place, message)
        } else {
            // The pipeline may belong to another build, and its scheduler with it.
            report.unsupported("unknown-scheduler", &place, message)
        };
        let list = "`dw schedulers` lists what it has".to_owned();
        finding.remedy = Some(near.map_or(list, |near| format!("did you mean `{near}`?")));
        return;
    };
    let known = super::arguments::properties(&entry.schema);
    for key in scheduler.from_config_args.iter().flat_map(Map::keys) {
        if !known.is_empty() && !known.contains_key(key) && !key.starts_with('_') {
            let place = format!("{pointer}/from_config_args/{key}");
            let near = nearest(key, known.keys().map(String::as_str));
            report.warning("unknown-setting", &place, format!("`{class}` has no setting `{key}`")).remedy =
                Some(near.map_or("remove it".to_owned(), |near| format!("did you mean `{near}`?")));
        }
    }
}

fn check_adapters(report: &mut Report, catalog: &Catalog, pipeline: &Pipeline, pointer: &str) {
    for (index, lora) in pipeline.loras.iter().flatten().enumerate() {
        let pointer = format!("{pointer}/loras/{index}");
        let (weight, folder) = (lora.weight_name.as_deref(), lora.subfolder.as_deref());
        sources::check_adapter(report, catalog, &lora.model_name, weight, folder, &pointer);
        if let Some(scale) = &lora.scale {
            check_number(report, scale, &child_pointer(&pointer, "scale"), "scale");
        }
    }
    for (index, inversion) in pipeline.textual_inversions.iter().flatten().enumerate() {
        let pointer = format!("{pointer}/textual_inversions/{index}");
        let weight = inversion.weight_name.as_deref();
        sources::check_adapter(report, catalog, &inversion.model_name, weight, None, &pointer);
    }
    let adapters: Vec<_> = match &pipeline.ip_adapter {
        None => Vec::new(),
        Some(OneOrMany::One(adapter)) => vec![(format!("{pointer}/ip_adapter"), adapter)],
        Some(OneOrMany::Many(adapters)) => adapters
            .iter()
            .enumerate()
            .map(|(index, adapter)| (format!("{pointer}/ip_adapter/{index}"), adapter))
            .collect(),
    };
    for (pointer, adapter) in adapters {
        let folder = adapter.subfolder.as_deref();
        sources::check_model(report, catalog, &adapter.model_name, folder, &child_pointer(&pointer, "model_name"));
    }
}

/// Checks a text that has to hold a number.
fn check_number(report: &mut Report, value: &NumberOrText, pointer: &str, name: &str) {
    if let NumberOrText::Text(text) = value
        && value.number().is_none()
        && !media::is_reference(text)
    {
        report.error("wrong-type", pointer, format!("`{name}` must be a number, found the text `{text}`"));
    }
}

/// Checks what the schema leaves open about a chain.
pub(super) fn check_chain(report: &mut Report, chain: &Chain, pointer: &str) {
    /// Most segments of a chain.
    const MAX_SEGMENTS: f64 = 1000.0;
    if chain.segments.is_none() && chain.match_audio != Some(true) {
        let message = "A chain needs exactly one of 'segments' or 'match_audio'";
        report.error("conflict", &child_pointer(pointer, "match_audio"), message).remedy =
            Some("set `match_audio` to true, or give `segments` instead".into());
    }
    for (name, value) in [
        ("segments", &chain.segments),
        ("carry_frames", &chain.carry_frames),
        ("trim_frames", &chain.trim_frames),
        ("crossfade_ms", &chain.crossfade_ms),
        ("fps", &chain.fps),
    ] {
        if let Some(value) = value {
            check_number(report, value, &child_pointer(pointer, name), name);
        }
    }
    if let Some(segments) = chain.segments.as_ref().and_then(NumberOrText::number)
        && !(1.0..=MAX_SEGMENTS).contains(&segments)
    {
        let message = format!("Chain 'segments' must be between 1 and 1000, got {segments}");
        report.error("wrong-value", &child_pointer(pointer, "segments"), message);
    }
}

/// Keeps account of components that steps share, and checks that reused ones were.
fn check_sharing(report: &mut Report, context: &mut Context, step: &PipelineStep, pointer: &str) {
    for name in &step.reused_components {
        if context.shared.contains(name) || media::is_reference(name) {
            continue;
        }
        let shared =
            if context.shared.is_empty() { "nothing".to_owned() } else { format!("[{}]", context.shared.join(", ")) };
        let message = format!("Cannot reuse component '{name}' - no earlier step shared it. Shared so far: {shared}");
        let near = nearest(name, context.shared.iter().map(String::as_str));
        let place = reused_pointer(report, pointer, name);
        report.error("unshared-component", &place, message).remedy = Some(near.map_or_else(
            || format!("add `{name}` to the `shared_components` of an earlier step"),
            |near| format!("did you mean `{near}`?"),
        ));
    }
    context.shared.extend(step.shared_components.iter().cloned());
}

/// Where the text names a reused component: at the pipeline or in its configuration.
fn reused_pointer(report: &Report, pointer: &str, name: &str) -> String {
    for list in ["reused_components", "configuration/reused_components"] {
        let list = format!("{pointer}/{list}");
        let items = report.document.value.pointer(&list).and_then(Value::as_array);
        if let Some(index) = items.and_then(|items| items.iter().position(|item| item == name)) {
            return child_pointer(&list, &index.to_string());
        }
    }
    child_pointer(pointer, "reused_components")
}
