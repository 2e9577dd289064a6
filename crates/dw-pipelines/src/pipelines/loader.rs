//! Loads the components of a pipeline: which ones, from where, out of the cache or off the disk.
//!
//! Works in two passes, so that everything that can be known without reading weights is checked first and
//! progress can say how much there is to read.

use std::{collections::BTreeMap, sync::Arc};

use candle_core::DType;
use dw_core::{event::Event, fit::FitPlan};
use serde_json::{Map, Value};

use super::{
    adapt::Adapters,
    cache::ComponentCache,
    clip_pixels::ClipPixels,
    components::{Model, Parts, SchedulerSetup, SharedComponent, numbered},
    ip_adapter::Found,
    memory::{Call, Decision, Memory, Need as MemoryNeed, base_name, decide, refuse_if_too_large},
    text_to_image::refuse,
};
use crate::{
    Error, Result, device,
    hub::{Hub, ModelFiles, Need, TOKENIZER_FILES, WeightFiles, sub},
    registry::{Family, Implementation, Task},
    request::{ComponentChoice, ComponentRequest, Context, PipelineRequest, SchedulerRequest},
    schedulers,
};

mod flux_family;
mod planned;
mod sd3_family;
mod sd3_ip_adapter;
mod unet_family;

use planned::Planned;

/// What prepares pictures for image encoders.
const FEATURE_EXTRACTOR: &str = "feature_extractor";
/// The classes that do.
const IMAGE_PROCESSORS: [&str; 5] = [
    "CLIPImageProcessor",
    "CLIPImageProcessorFast",
    "CLIPFeatureExtractor",
    "SiglipImageProcessor",
    "SiglipImageProcessorFast",
];
const CONTROLNET: &str = "ControlNetModel";
const AUTOENCODER_TINY: &str = "AutoencoderTiny";
const CONTROLNET_UNION: &str = "ControlNetUnionModel";

/// What components that remove the noise are called.
const DENOISERS: [&str; 2] = ["unet", "transformer"];

/// What kind of part a component is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A CLIP tokenizer.
    Tokenizer,
    /// A CLIP text encoder.
    ClipText,
    /// A T5 tokenizer.
    T5Tokenizer,
    /// A T5 text encoder.
    T5,
    /// A CLIP image encoder.
    ClipVision,
    /// A `UNet2DConditionModel`.
    Unet,
    /// An `AutoencoderKL` or `AutoencoderTiny`.
    Vae,
    /// A `ControlNetModel` or `ControlNetUnionModel`; a step may list several.
    ControlNet,
    /// An `SD3Transformer2DModel`.
    Sd3Transformer,
    /// An `SD3ControlNetModel`; a step may list several.
    Sd3ControlNet,
    /// A `FluxTransformer2DModel`.
    FluxTransformer,
    /// A `FluxControlNetModel`; a step may list several.
    FluxControlNet,
    /// A SigLIP image encoder.
    Siglip,
    /// A `ReduxImageEncoder`.
    Redux,
}

impl Kind {
    /// The classes that are read as this kind.
    fn classes(self) -> &'static [&'static str] {
        match self {
            Self::Tokenizer => &["CLIPTokenizer", "CLIPTokenizerFast"],
            Self::ClipText => &["CLIPTextModel", "CLIPTextModelWithProjection"],
            Self::T5Tokenizer => &["T5Tokenizer", "T5TokenizerFast"],
            Self::T5 => &["T5EncoderModel"],
            Self::ClipVision => &["CLIPVisionModelWithProjection"],
            Self::Unet => &["UNet2DConditionModel"],
            Self::Vae => &["AutoencoderKL", AUTOENCODER_TINY],
            Self::ControlNet => &[CONTROLNET, CONTROLNET_UNION],
            Self::Sd3Transformer => &["SD3Transformer2DModel"],
            Self::Sd3ControlNet => &["SD3ControlNetModel"],
            Self::FluxTransformer => &["FluxTransformer2DModel"],
            Self::FluxControlNet => &["FluxControlNetModel"],
            Self::Siglip => &["SiglipVisionModel"],
            Self::Redux => &["ReduxImageEncoder"],
        }
    }

    /// Whether a step may list several.
    fn is_listed(self) -> bool {
        matches!(self, Self::ControlNet | Self::Sd3ControlNet | Self::FluxControlNet)
    }

    /// Whether it is made of a vocabulary and has no weights.
    fn is_tokenizer(self) -> bool {
        matches!(self, Self::Tokenizer | Self::T5Tokenizer)
    }

    /// Whether nothing can stand in for it. Prompts can come encoded and latents can be the result, but nothing
    /// replaces the denoiser and what steers it.
    fn is_needed(self) -> bool {
        matches!(self, Self::Unet | Self::Sd3Transformer | Self::FluxTransformer | Self::Redux) || self.is_listed()
    }

    /// Whether LoRAs may act on it.
    fn takes_adapters(self) -> bool {
        matches!(self, Self::ClipText | Self::T5 | Self::Unet | Self::Sd3Transformer | Self::FluxTransformer)
    }
}

/// A place for a component in a family of pipelines.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot {
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
}

/// Where a component comes from.
#[expect(clippy::large_enum_variant, reason = "a handful of them, which live while a pipeline is loaded")]
enum Origin {
    Loaded(Planned),
    Shared(SharedComponent),
}

/// Loads what `implementation` needs. `files` is the opened model, `index` its `model_index.json`.
pub(crate) fn load(
    request: &PipelineRequest,
    implementation: &Implementation,
    files: Arc<ModelFiles>,
    index: Value,
    (hub, cache): (&Hub, &mut ComponentCache),
    context: Context<'_>,
) -> Result<Parts> {
    check_names(request, implementation)?;
    check_loras(request, implementation)?;
    check_ip_adapters(request, implementation)?;
    let scheduler = match implementation.task {
        // Nothing is denoised.
        Task::Prior => SchedulerSetup::unused(),
        _ => scheduler_setup("scheduler", request.scheduler.as_ref(), (&files, &index), context)?,
    };
    let has_low_res = index.pointer("/low_res_scheduler/1").is_some_and(Value::is_string);
    let low_res_scheduler =
        has_low_res.then(|| scheduler_setup("low_res_scheduler", None, (&files, &index), context)).transpose()?;
    let found: Vec<Found> =
        request.ip_adapters.iter().map(|adapter| Found::find(adapter, hub, context)).collect::<Result<_>>()?;
    let planner = Planner { request, files, index: &index, hub, cache, context };
    let mut origins = planner.origins(implementation, &found)?;
    let pixels = planner.clip_pixels(&found)?;
    let preprocessor = sd3_ip_adapter::preprocessor(&found, &origins, context)?;
    let feature_extractor = planner.own_feature_extractor(implementation)?;
    let adapters = Adapters::find(request, implementation.family.denoiser(), hub, context)?;
    let unet = unet_family::Unet::of(&origins)?;
    unet.as_ref().map_or(Ok(()), |unet| adapters.check_unet(&unet.config))?;
    // Small beside the model, and what does not belong to it is found before the model is read.
    let ip_adapters = unet.map(|unet| unet_family::read_ip_adapters(&unet, &origins, &found, pixels.clone(), context));
    let ip_adapters = ip_adapters.transpose()?.flatten().map(Arc::new);
    let Decision { paging, tiling, plan } = planner.decide(&origins, &found)?;
    context.events.emit(Event::FitPlan { plan: plan.clone() });
    refuse_if_too_large(&plan, &request.memory)?;
    planner.check_weights(&origins)?;
    for (_, origin) in &mut origins {
        if let Origin::Loaded(planned) = origin {
            planned.page(request.memory.paging(base_name(&planned.name), paging));
        }
    }
    let mut components = read_all(origins, cache, context)?;
    adapters.put_on(&mut components, cache, context)?;
    let mut parts = Parts {
        class: implementation.class,
        components,
        adapters,
        scheduler,
        low_res_scheduler,
        device: request.device.clone(),
        dtype: request.dtype.unwrap_or(DType::F32),
        index,
        feature_extractor,
        reuse: None,
        prompt_weighting: request.prompt_weighting,
        ip_adapters,
        sd3_ip_adapter: None,
        flux_ip_adapters: None,
        memory: Memory::new(&request.memory, tiling, Arc::clone(cache.occupancy())),
        fit: Arc::new(plan),
    };
    if implementation.family == Family::StableDiffusion3 {
        parts.sd3_ip_adapter = sd3_ip_adapter::read(&parts, &found, preprocessor.as_ref(), context)?.map(Arc::new);
    } else if implementation.family == Family::Flux {
        parts.flux_ip_adapters = flux_family::read_ip_adapters(&parts, &found, pixels, context)?.map(Arc::new);
    }
    Ok(parts)
}

/// What [`load`] would say about memory, without reading weights.
pub(crate) fn fit(
    request: &PipelineRequest,
    implementation: &Implementation,
    files: Arc<ModelFiles>,
    index: &Value,
    (hub, cache): (&Hub, &ComponentCache),
    context: Context<'_>,
) -> Result<FitPlan> {
    check_names(request, implementation)?;
    check_loras(request, implementation)?;
    check_ip_adapters(request, implementation)?;
    let found: Vec<Found> =
        request.ip_adapters.iter().map(|adapter| Found::find(adapter, hub, context)).collect::<Result<_>>()?;
    let planner = Planner { request, files, index, hub, cache, context };
    let origins = planner.origins(implementation, &found)?;
    planner.check_weights(&origins)?;
    Ok(planner.decide(&origins, &found)?.plan)
}

/// Refuses replacements for components that the class does not have. Leaving such a component out is fine:
/// `"safety_checker": null` is common. Without a scheduler nothing can be denoised.
fn check_names(request: &PipelineRequest, implementation: &Implementation) -> Result<()> {
    let is_omitted = request.components.get("scheduler").is_some_and(|choice| matches!(choice, ComponentChoice::Omit));
    if is_omitted && request.scheduler.is_none() && implementation.task != Task::Prior {
        let reason = "is left out, and nothing can be denoised without; remove `\"scheduler\": null`, or name another one \
                      as `scheduler` of the step";
        return Err(refuse("scheduler", reason));
    }
    let names = || implementation.slots.iter().map(|slot| slot.name);
    for (name, choice) in &request.components {
        if let (FEATURE_EXTRACTOR, ComponentChoice::Load(components)) = (name.as_str(), choice) {
            check_image_processors(components)?;
            continue;
        }
        if !matches!(choice, ComponentChoice::Omit) && !names().any(|known| known == name) {
            let known = names().collect::<Vec<_>>().join("`, `");
            let class = implementation.class;
            return Err(Error::Unsupported(format!(
                "`{class}` has no component `{name}` in this build; it has `{known}`"
            )));
        }
    }
    Ok(())
}

/// Refuses LoRAs where there is no denoiser that they could change.
fn check_loras(request: &PipelineRequest, implementation: &Implementation) -> Result<()> {
    if request.loras.is_empty() || implementation.task != Task::Prior {
        return Ok(());
    }
    Err(Error::Unsupported(format!(
        "`{}` takes no LoRA; name it under `loras` of the step that makes the picture",
        implementation.class
    )))
}

/// Refuses other classes than image processors where one is to be.
fn check_image_processors(components: &[ComponentRequest]) -> Result<()> {
    match components.iter().find(|component| !IMAGE_PROCESSORS.contains(&component.class.as_str())) {
        None => Ok(()),
        Some(other) => Err(Error::Unsupported(format!(
            "component `{FEATURE_EXTRACTOR}` of class `{}` cannot be loaded for this pipeline; it takes `{}`",
            other.class,
            IMAGE_PROCESSORS.join("`, `")
        ))),
    }
}

/// Refuses IP-Adapters that the class does not take, before they are looked for.
fn check_ip_adapters(request: &PipelineRequest, implementation: &Implementation) -> Result<()> {
    if request.ip_adapters.is_empty() {
        return Ok(());
    }
    if implementation.family == Family::StableDiffusion3 {
        return sd3_ip_adapter::check_requests(&request.ip_adapters);
    }
    if implementation.slots.iter().any(|slot| matches!(slot.kind, Kind::Unet | Kind::ClipVision)) {
        return Ok(());
    }
    Err(Error::Unsupported(format!(
        "`{}` takes no IP-Adapter in this build; remove `ip_adapter` from the step",
        implementation.class
    )))
}

/// The model's scheduler `name`, or the requested class with the model's configuration under the request's keys.
fn scheduler_setup(
    name: &str,
    request: Option<&SchedulerRequest>,
    (files, index): (&ModelFiles, &Value),
    context: Context<'_>,
) -> Result<SchedulerSetup> {
    let own_class = index.pointer(&format!("/{name}/1")).and_then(Value::as_str);
    let mut config = Map::new();
    if own_class.is_some() {
        files.fetch(name, Need::File("scheduler_config.json"), context)?;
        if let Value::Object(own) = files.require_json(&sub(name, "scheduler_config.json"))? {
            config = own;
        }
    }
    let class = request.and_then(|request| request.class.as_deref()).or(own_class);
    let Some(class) = class.map(str::to_owned) else {
        return Err(Error::BadFile {
            path: files.place("model_index.json"),
            reason: "names no scheduler; name one in the step (`scheduler`)".into(),
        });
    };
    config.extend(request.into_iter().flat_map(|request| request.config.clone()));
    if let Some(own_class) = own_class {
        schedulers::check_kinship(&class, &config, own_class)?;
    }
    let setup = SchedulerSetup { class, config, shift: request.and_then(|request| request.shift) };
    // Made once here, so that a wrong class or option ends the load before anything is read.
    setup.create()?;
    Ok(setup)
}

/// Decides for each component where it comes from.
struct Planner<'a> {
    request: &'a PipelineRequest,
    files: Arc<ModelFiles>,
    index: &'a Value,
    hub: &'a Hub,
    cache: &'a ComponentCache,
    context: Context<'a>,
}

impl Planner<'_> {
    /// Where each component of `implementation` comes from, as far as the model has it.
    fn origins(&self, implementation: &Implementation, found: &[Found<'_>]) -> Result<Vec<(String, Origin)>> {
        let mut origins = Vec::new();
        for slot in implementation.slots {
            let planned = self.plan(*slot)?;
            // Where pictures become prompts nothing replaces the encoder; an IP-Adapter can be given embeddings.
            let is_needed = slot.kind.is_needed() || (slot.kind == Kind::Siglip && implementation.task == Task::Prior);
            if planned.is_empty() && is_needed {
                let (class, name) = (implementation.class, slot.name);
                return Err(Error::Unsupported(format!(
                    "`{class}` needs the component `{name}`, which the model does not have or the step leaves out; add \
                     `{name}` to the step"
                )));
            }
            origins.extend(planned);
        }
        self.check_variant(&origins)?;
        unet_family::check(&origins)?;
        sd3_family::check(&origins)?;
        flux_family::check((implementation.class, !self.request.loras.is_empty()), &origins)?;
        if let Some(planned) = self.own_image_encoder(implementation, found, &origins)? {
            origins.push((planned.name.clone(), Origin::Loaded(planned)));
        }
        sd3_ip_adapter::check(found, &origins)?;
        flux_family::check_ip_adapters(&origins, found)?;
        self.check_memory_names(&origins)?;
        Ok(origins)
    }

    /// Refuses what is said about the memory of components that the pipeline does not have, or cannot be done.
    fn check_memory_names(&self, origins: &[(String, Origin)]) -> Result<()> {
        let memory = &self.request.memory;
        let names = || origins.iter().map(|(name, _)| base_name(name));
        for (name, asked) in &memory.components {
            // A type for a component that is left out changes nothing, and is common.
            if (asked.paging.is_some() || asked.device.is_some()) && !names().any(|known| known == name) {
                let known = names().collect::<Vec<_>>().join("`, `");
                return Err(Error::Unsupported(format!(
                    "`configuration.components` names `{name}`, but the pipeline has no such component; it has `{known}`"
                )));
            }
            let is_elsewhere = asked.device.as_ref().is_some_and(|device| !device.same_device(&self.request.device));
            if is_elsewhere && name != "vae" {
                return Err(Error::Unsupported(format!(
                    "`configuration.components.{name}.device` differs from the device of the pipeline, and only `vae` \
                     can run elsewhere; use `\"residency\": \"on_demand\"` to have `{name}` on the device only while it \
                     computes"
                )));
            }
        }
        Ok(())
    }

    /// Refuses files that do not hold what the configurations ask for.
    fn check_weights(&self, origins: &[(String, Origin)]) -> Result<()> {
        origins.iter().try_for_each(|(_, origin)| match origin {
            Origin::Loaded(planned) if !self.cache.contains(&planned.key) => planned.check_weights(),
            Origin::Loaded(_) | Origin::Shared(_) => Ok(()),
        })
    }

    /// What stays on the device, and whether that fits.
    fn decide(&self, origins: &[(String, Origin)], found: &[Found<'_>]) -> Result<Decision> {
        let configs: BTreeMap<&str, Value> = origins
            .iter()
            .filter_map(|(name, origin)| match origin {
                Origin::Loaded(planned) if planned.weights.is_some() => {
                    Some(planned.raw_config().map(|config| (name.as_str(), config)))
                }
                _ => None,
            })
            .collect::<Result<_>>()?;
        let null = Value::Null;
        let denoiser = configs.iter().find(|(name, _)| DENOISERS.contains(*name));
        let vae = configs.get("vae").unwrap_or(&null);
        let memory = &self.request.memory;
        let call = Call::new(memory.call, memory.vae_tiling, denoiser.map_or(&null, |(_, config)| config), vae);
        let mut needs = Vec::new();
        for (name, origin) in origins {
            let Origin::Loaded(planned) = origin else { continue };
            let (Some(files), Some(config)) = (&planned.weights, configs.get(name.as_str())) else { continue };
            let mut need = MemoryNeed::new(
                name,
                (files, planned.scheme.as_ref()),
                config,
                (planned.dtype, &planned.device),
                &call,
            )?;
            need.is_loaded = self.cache.contains(&planned.key);
            needs.push(need);
        }
        let dtype = self.denoiser_dtype(origins);
        for (at, adapter) in found.iter().enumerate() {
            needs.push(MemoryNeed::of_adapter(&numbered("ip_adapter", at), &adapter.list()?, dtype));
        }
        Ok(decide(memory, &needs, call, &self.request.device))
    }

    /// The type in which the denoiser computes, and adapters with it.
    fn denoiser_dtype(&self, origins: &[(String, Origin)]) -> DType {
        let own = origins.iter().find_map(|(name, origin)| match origin {
            Origin::Loaded(planned) => DENOISERS.contains(&name.as_str()).then_some(planned.dtype),
            Origin::Shared(_) => None,
        });
        own.or(self.request.dtype).unwrap_or(DType::F32)
    }

    /// The components for a slot, by name: none, one, or for ControlNets a list.
    fn plan(&self, slot: Slot) -> Result<Vec<(String, Origin)>> {
        let name = slot.name;
        let single = |origin: Origin| vec![(name.to_owned(), origin)];
        match self.request.components.get(name) {
            Some(ComponentChoice::Omit) => Ok(Vec::new()),
            Some(ComponentChoice::Shared) => self.shared(slot).map(Origin::Shared).map(single),
            Some(ComponentChoice::Load(list)) => match list.as_slice() {
                [component] => self.replacement(slot, component, 0).map(Origin::Loaded).map(single),
                list if slot.kind.is_listed() => {
                    let origin = |(at, component)| {
                        Ok((numbered(name, at), Origin::Loaded(self.replacement(slot, component, at)?)))
                    };
                    list.iter().enumerate().map(origin).collect()
                }
                list => Err(Error::Unsupported(format!("component `{name}` takes one model, found {}", list.len()))),
            },
            None => {
                // `[null, null]` stands for a component that the model does not have.
                let Some(class) = self.index.pointer(&format!("/{name}/1")).and_then(Value::as_str) else {
                    return Ok(Vec::new());
                };
                self.own(slot, class).map(Origin::Loaded).map(single)
            }
        }
    }

    /// A component of the model itself: with the request's variant, or without where it has none of that, as in the
    /// reference.
    fn own(&self, slot: Slot, class: &str) -> Result<Planned> {
        let dtype = self.dtype(slot.name, None);
        let planned = |variant| self.planned((slot, 0), class, Arc::clone(&self.files), slot.name, variant, dtype);
        let plain = || planned(None);
        let Some(variant) = self.request.variant.as_deref() else { return plain() };
        match planned(Some(variant)) {
            Ok(found) => Ok(Planned { has_variant: found.weights.is_some().then_some(true), ..found }),
            Err(complaint @ Error::Cancelled(_)) => Err(complaint),
            Err(complaint) => plain().map(|found| Planned { has_variant: Some(false), ..found }).map_err(|_| complaint),
        }
    }

    /// Says which components of the model are read without the variant; a variant that none has is an error.
    fn check_variant(&self, origins: &[(String, Origin)]) -> Result<()> {
        let own = origins.iter().filter_map(|(_, origin)| match origin {
            Origin::Loaded(planned) => Some((planned, planned.has_variant?)),
            Origin::Shared(_) => None,
        });
        let (with, without): (Vec<_>, Vec<_>) = own.partition(|(_, has_variant)| *has_variant);
        let (Some((first, _)), Some(variant)) = (without.first(), self.request.variant.as_deref()) else {
            return Ok(());
        };
        if with.is_empty() {
            return first.files.weights(&first.folder, Some(variant)).map(drop);
        }
        let names = without.iter().map(|(planned, _)| planned.name.as_str()).collect::<Vec<_>>().join("`, `");
        let message =
            format!("`{names}` of the model have no weights of variant `{variant}`; those without a variant are read");
        self.context.events.emit(Event::Warning { message });
        Ok(())
    }

    /// The image encoder that comes with the first adapter that has one, unless the pipeline has its own or the
    /// step leaves it out.
    fn own_image_encoder(
        &self,
        implementation: &Implementation,
        found: &[Found<'_>],
        origins: &[(String, Origin)],
    ) -> Result<Option<Planned>> {
        let own = implementation.slots.iter().find(|slot| slot.name == "image_encoder");
        let slot = own.copied().unwrap_or(Slot { name: "image_encoder", kind: Kind::ClipVision });
        let is_settled =
            self.request.components.contains_key(slot.name) || origins.iter().any(|(name, _)| name == slot.name);
        let Some((adapter, folder)) = found.iter().find_map(|found| Some((found, found.image_encoder()?))) else {
            return Ok(None);
        };
        if is_settled {
            return Ok(None);
        }
        let dtype = self.dtype(slot.name, None);
        let files = Arc::clone(&adapter.files);
        let planned = self.planned((slot, 0), slot.kind.classes()[0], files, &folder, None, dtype);
        planned.map(Some).map_err(|error| match error {
            Error::Cancelled(_) => error,
            other => Error::Unsupported(format!(
                "the IP-Adapter needs an image encoder, and `{folder}` holds none ({other}); name its folder as \
                 `image_encoder_folder` of the IP-Adapter, or load a component `image_encoder`"
            )),
        })
    }

    /// How the model prepares pictures for an image encoder of its own.
    fn own_feature_extractor(&self, implementation: &Implementation) -> Result<Option<Value>> {
        let has_encoder = implementation.slots.iter().any(|slot| slot.kind == Kind::Siglip);
        Ok(if has_encoder { self.image_processor()?.map(|(_, config)| config) } else { None })
    }

    /// How pictures are prepared for CLIP.
    fn clip_pixels(&self, found: &[Found<'_>]) -> Result<ClipPixels> {
        let processor = if found.is_empty() { None } else { self.image_processor()? };
        let config = processor.filter(|(class, _)| class.starts_with("CLIP")).map(|(_, config)| config);
        Ok(ClipPixels::new(config.as_ref()))
    }

    /// The class and the settings of what prepares pictures: the step's own, else the model's; none when there is none.
    fn image_processor(&self) -> Result<Option<(String, Value)>> {
        const FILE: &str = "preprocessor_config.json";
        match self.request.components.get(FEATURE_EXTRACTOR) {
            Some(ComponentChoice::Omit) => return Ok(None),
            Some(ComponentChoice::Load(components)) => {
                let Some(component) = components.first() else { return Ok(None) };
                let files = self.hub.open(&component.source, self.context)?;
                let folder = component.subfolder.as_deref().unwrap_or_default().trim_matches('/');
                files.fetch(folder, Need::File(FILE), self.context)?;
                return Ok(Some((component.class.clone(), files.require_json(&sub(folder, FILE))?)));
            }
            Some(ComponentChoice::Shared) | None => {}
        }
        let Some(class) = self.index.pointer("/feature_extractor/1").and_then(Value::as_str) else { return Ok(None) };
        self.files.fetch(FEATURE_EXTRACTOR, Need::File(FILE), self.context)?;
        let config = self.files.read_json(&sub(FEATURE_EXTRACTOR, FILE))?;
        Ok(config.map(|config| (class.to_owned(), config)))
    }

    /// The type of a component whose own settings say `own`; what the configuration says is applied last.
    fn dtype(&self, name: &str, own: Option<DType>) -> DType {
        self.request.memory.dtype(name).or(own).or(self.request.dtype).unwrap_or(DType::F32)
    }

    fn shared(&self, slot: Slot) -> Result<SharedComponent> {
        let name = slot.name;
        self.cache.shared(name).ok_or_else(|| {
            let names = self.cache.shared_names().collect::<Vec<_>>().join("`, `");
            let so_far =
                if names.is_empty() { "nothing is shared yet".into() } else { format!("shared are `{names}`") };
            Error::Unsupported(format!(
                "component `{name}` cannot be reused, because no earlier step shares it ({so_far}); add it to \
                 `shared_components` of the step that loads it"
            ))
        })
    }

    fn replacement(&self, slot: Slot, component: &ComponentRequest, at: usize) -> Result<Planned> {
        let files = self.hub.open(&component.source, self.context)?;
        let (files, folder) = match files {
            // In a single file a component is found by its name, and the model tells what its shapes do not.
            ModelFiles::SingleFile(file) => {
                (ModelFiles::SingleFile(file.in_place_of(&self.files)), slot.name.to_owned())
            }
            files => (files, component.subfolder.clone().unwrap_or_default()),
        };
        let files = Arc::new(files);
        let quantization = component.quantization.as_ref();
        let compute = quantization.and_then(|quantization| quantization.compute_dtype);
        let dtype = self.dtype(slot.name, component.dtype.or(compute));
        let variant = component.variant.as_deref();
        let planned = self.planned((slot, at), &component.class, files, folder.trim_matches('/'), variant, dtype)?;
        match quantization {
            Some(quantization) => planned.quantized(quantization, self.context),
            None => Ok(planned),
        }
    }

    fn planned(
        &self,
        (slot, at): (Slot, usize),
        class: &str,
        files: Arc<ModelFiles>,
        folder: &str,
        variant: Option<&str>,
        dtype: DType,
    ) -> Result<Planned> {
        if !slot.kind.classes().contains(&class) {
            let known = slot.kind.classes().join("` or `");
            let name = slot.name;
            return Err(Error::Unsupported(format!(
                "component `{name}` of class `{class}` cannot be loaded for this pipeline; it takes `{known}`"
            )));
        }
        let (weights, contents) = if slot.kind.is_tokenizer() {
            files.fetch(folder, Need::Tokenizer, self.context)?;
            (None, files.fingerprint(folder, &TOKENIZER_FILES)?)
        } else {
            files.fetch(folder, Need::Weights(variant), self.context)?;
            planned::check_quantization(&files, folder)?;
            let weights = files.weights(folder, variant)?;
            let contents = weights.fingerprint()? + &files.fingerprint(folder, &["config.json"])?;
            (Some(weights), contents)
        };
        let device = self.request.memory.device(slot.name, &self.request.device).clone();
        let key = format!("{class}|{}|{}|{contents}", dtype.as_str(), device::name(&device));
        let mut planned = Planned {
            name: numbered(slot.name, at),
            kind: slot.kind,
            class: class.to_owned(),
            key,
            files,
            folder: folder.to_owned(),
            weights,
            has_variant: None,
            dtype,
            device,
            paging: None,
            scheme: None,
        };
        if let Some(WeightFiles::Random { name, .. }) = &planned.weights {
            let tensors = Arc::new(planned.parameters()?);
            planned.weights = Some(WeightFiles::Random { name: name.clone(), tensors });
        }
        Ok(planned)
    }
}

/// Takes components from the cache or reads them, and tells how far the reading is.
fn read_all(
    origins: Vec<(String, Origin)>,
    cache: &mut ComponentCache,
    context: Context<'_>,
) -> Result<BTreeMap<String, SharedComponent>> {
    let mut components = BTreeMap::new();
    let mut missing = Vec::new();
    for (name, origin) in origins {
        let found = match origin {
            Origin::Shared(component) => Some(component),
            Origin::Loaded(planned) => cache.get(&planned.key).or_else(|| {
                missing.push(planned);
                None
            }),
        };
        if let Some(component) = found {
            context.events.emit(Event::Reused { component: name.clone() });
            components.insert(name, component);
        }
    }
    let sizes = missing.iter().map(|planned| planned.weights.as_ref().map_or(Ok(0), WeightFiles::bytes));
    let total = sizes.sum::<Result<u64>>()?;
    cache.make_room(total);
    let mut before = 0;
    for planned in missing {
        context.cancel.check()?;
        let component = Arc::new(planned.read(cache.occupancy(), (before, total), context)?);
        if let Some(weights) = &planned.weights {
            before += weights.bytes()?;
            context.events.emit(Event::Loading { component: planned.name.clone(), bytes: before, total });
        }
        cache.insert(Arc::clone(&component));
        components.insert(planned.name, component);
    }
    Ok(components)
}
