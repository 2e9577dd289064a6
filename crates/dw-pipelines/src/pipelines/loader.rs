//! Loads the components of a pipeline: which ones, from where, out of the cache or off the disk.
//!
//! Works in two passes, so that everything that can be known without reading weights is checked first and
//! progress can say how much there is to read.

use std::{collections::BTreeMap, sync::Arc};

use candle_core::{DType, Device};
use dw_core::event::Event;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::{
    cache::ComponentCache,
    clip_pixels::ClipPixels,
    components::{Component, Model, Parts, SchedulerSetup, SharedComponent},
    ip_adapter::{Found, IpAdapters, check_encoder},
};
use crate::{
    Error, Result, device,
    hub::{Hub, ModelFiles, Need, TOKENIZER_FILES, WeightFiles, sub},
    models::{AutoencoderKl, ClipTextModel, ClipVisionModel, Unet2DConditionModel},
    registry::Implementation,
    request::{ComponentChoice, ComponentRequest, Context, PipelineRequest, SchedulerRequest},
    text::ClipTokenizer,
    weights::Weights,
};

/// How many names of unused tensors a warning lists.
const LISTED_NAMES: usize = 5;

/// What kind of part a component is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A CLIP tokenizer.
    Tokenizer,
    /// A CLIP text encoder.
    ClipText,
    /// A CLIP image encoder.
    ClipVision,
    /// A `UNet2DConditionModel`.
    Unet,
    /// An `AutoencoderKL`.
    Vae,
}

impl Kind {
    /// The classes that are read as this kind.
    fn classes(self) -> &'static [&'static str] {
        match self {
            Self::Tokenizer => &["CLIPTokenizer", "CLIPTokenizerFast"],
            Self::ClipText => &["CLIPTextModel", "CLIPTextModelWithProjection"],
            Self::ClipVision => &["CLIPVisionModelWithProjection"],
            Self::Unet => &["UNet2DConditionModel"],
            Self::Vae => &["AutoencoderKL"],
        }
    }
}

/// A place for a component in a family of pipelines.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot {
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
}

/// A component that will be loaded, as far as it is known before its weights are read.
struct Planned {
    name: &'static str,
    kind: Kind,
    class: String,
    key: String,
    files: Arc<ModelFiles>,
    folder: String,
    /// None for a tokenizer.
    weights: Option<WeightFiles>,
    dtype: DType,
}

/// Where a component comes from.
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
    let scheduler = scheduler_setup(request.scheduler.as_ref(), &files, &index, context)?;
    let found: Vec<Found> =
        request.ip_adapters.iter().map(|adapter| Found::find(adapter, hub, context)).collect::<Result<_>>()?;
    let mut planner = Planner { request, files, index: &index, hub, cache, context };
    let mut origins = Vec::new();
    for slot in implementation.slots {
        match planner.plan(*slot)? {
            Some(origin) => origins.push((slot.name, origin)),
            // Prompts can come encoded and latents can be the result, but nothing replaces the denoiser.
            None if slot.kind == Kind::Unet => {
                let (class, name) = (implementation.class, slot.name);
                return Err(Error::Unsupported(format!(
                    "`{class}` needs the component `{name}`, which the model does not have or the step leaves out"
                )));
            }
            None => {}
        }
    }
    if let Some(planned) = planner.own_image_encoder(&found, &origins)? {
        origins.push((planned.name, Origin::Loaded(planned)));
    }
    let pixels = planner.clip_pixels(&found)?;
    let components = read_all(origins, &request.device, cache, context)?;
    let mut parts = Parts {
        class: implementation.class,
        components,
        scheduler,
        device: request.device.clone(),
        dtype: request.dtype.unwrap_or(DType::F32),
        index,
        prompt_weighting: request.prompt_weighting,
        ip_adapters: None,
    };
    parts.ip_adapters = read_ip_adapters(&parts, &found, pixels, context)?;
    Ok(parts)
}

/// Refuses replacements for components that the class does not have. Leaving such a component out is fine:
/// `"safety_checker": null` is common.
fn check_names(request: &PipelineRequest, implementation: &Implementation) -> Result<()> {
    let names = || implementation.slots.iter().map(|slot| slot.name);
    for (name, choice) in &request.components {
        if !matches!(choice, ComponentChoice::Omit) && !names().any(|known| known == name) {
            let known = names().collect::<Vec<_>>().join("`, `");
            let class = implementation.class;
            return Err(Error::Unsupported(format!(
                "`{class}` has no component `{name}` in this build; it has `{known}`"
            )));
        }
    }
    if request.loras.is_empty() {
        return Ok(());
    }
    Err(Error::Unsupported("LoRA files cannot be applied by this build; remove `loras` from the step".into()))
}

/// The model's scheduler, or the requested class with the model's configuration under the request's keys.
fn scheduler_setup(
    request: Option<&SchedulerRequest>,
    files: &ModelFiles,
    index: &Value,
    context: Context<'_>,
) -> Result<SchedulerSetup> {
    let own_class = index.pointer("/scheduler/1").and_then(Value::as_str);
    let mut config = Map::new();
    if own_class.is_some() {
        files.fetch("scheduler", Need::File("scheduler_config.json"), context)?;
        if let Value::Object(own) = files.require_json("scheduler/scheduler_config.json")? {
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
    fn plan(&mut self, slot: Slot) -> Result<Option<Origin>> {
        let name = slot.name;
        match self.request.components.get(name) {
            Some(ComponentChoice::Omit) => Ok(None),
            Some(ComponentChoice::Shared) => self.shared(slot).map(Origin::Shared).map(Some),
            Some(ComponentChoice::Load(list)) => match list.as_slice() {
                [component] => self.replacement(slot, component).map(Origin::Loaded).map(Some),
                list => Err(Error::Unsupported(format!("component `{name}` takes one model, found {}", list.len()))),
            },
            None => {
                // `[null, null]` stands for a component that the model does not have.
                let Some(class) = self.index.pointer(&format!("/{name}/1")).and_then(Value::as_str) else {
                    return Ok(None);
                };
                let dtype = self.request.dtype.unwrap_or(DType::F32);
                let variant = self.request.variant.as_deref();
                let files = Arc::clone(&self.files);
                self.planned(slot, class, files, name, variant, dtype).map(Origin::Loaded).map(Some)
            }
        }
    }

    /// The image encoder that comes with the first adapter that has one, unless the pipeline has its own or the
    /// step leaves it out.
    fn own_image_encoder(&self, found: &[Found<'_>], origins: &[(&str, Origin)]) -> Result<Option<Planned>> {
        let slot = Slot { name: "image_encoder", kind: Kind::ClipVision };
        let is_settled =
            self.request.components.contains_key(slot.name) || origins.iter().any(|(name, _)| *name == slot.name);
        let Some((adapter, folder)) = found.iter().find_map(|found| Some((found, found.image_encoder()?))) else {
            return Ok(None);
        };
        if is_settled {
            return Ok(None);
        }
        let dtype = self.request.dtype.unwrap_or(DType::F32);
        let files = Arc::clone(&adapter.files);
        let planned = self.planned(slot, "CLIPVisionModelWithProjection", files, &folder, None, dtype);
        planned.map(Some).map_err(|error| match error {
            Error::Cancelled(_) => error,
            other => Error::Unsupported(format!(
                "the IP-Adapter needs an image encoder, and `{folder}` holds none ({other}); name its folder as \
                 `image_encoder_folder` of the IP-Adapter, or load a component `image_encoder`"
            )),
        })
    }

    /// How the model prepares pictures for CLIP.
    fn clip_pixels(&self, found: &[Found<'_>]) -> Result<ClipPixels> {
        let class = self.index.pointer("/feature_extractor/1").and_then(Value::as_str);
        if found.is_empty() || class.is_none_or(|class| !class.starts_with("CLIP")) {
            return Ok(ClipPixels::new(None));
        }
        self.files.fetch("feature_extractor", Need::File("preprocessor_config.json"), self.context)?;
        let config = self.files.read_json("feature_extractor/preprocessor_config.json")?;
        Ok(ClipPixels::new(config.as_ref()))
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

    fn replacement(&self, slot: Slot, component: &ComponentRequest) -> Result<Planned> {
        let files = Arc::new(self.hub.open(&component.source, self.context)?);
        let folder = component.subfolder.clone().unwrap_or_default();
        let dtype = component.dtype.or(self.request.dtype).unwrap_or(DType::F32);
        self.planned(slot, &component.class, files, folder.trim_matches('/'), component.variant.as_deref(), dtype)
    }

    fn planned(
        &self,
        slot: Slot,
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
                "component `{name}` of class `{class}` cannot be loaded by this build; it reads `{known}`"
            )));
        }
        let (weights, contents) = if slot.kind == Kind::Tokenizer {
            files.fetch(folder, Need::Tokenizer, self.context)?;
            (None, files.fingerprint(folder, &TOKENIZER_FILES)?)
        } else {
            files.fetch(folder, Need::Weights(variant), self.context)?;
            let weights = files.weights(folder, variant)?;
            let contents = weights.fingerprint()? + &files.fingerprint(folder, &["config.json"])?;
            (Some(weights), contents)
        };
        let device = device::name(&self.request.device);
        let key = format!("{class}|{}|{device}|{contents}", dtype.as_str());
        Ok(Planned {
            name: slot.name,
            kind: slot.kind,
            class: class.to_owned(),
            key,
            files,
            folder: folder.to_owned(),
            weights,
            dtype,
        })
    }
}

/// Reads the adapters that were found; none when there are none.
fn read_ip_adapters(
    parts: &Parts,
    found: &[Found<'_>],
    pixels: ClipPixels,
    context: Context<'_>,
) -> Result<Option<IpAdapters>> {
    if found.is_empty() {
        return Ok(None);
    }
    let (unet, encoder) = (parts.unet()?, parts.image_encoder()?);
    let mut adapters = Vec::with_capacity(found.len());
    for found in found {
        let scaled = found.read(unet.config(), (unet.dtype(), unet.device()), context)?;
        if let Some(encoder) = encoder {
            check_encoder(&scaled.adapter, encoder.config())?;
        }
        adapters.push(scaled);
    }
    Ok(Some(IpAdapters { adapters, pixels }))
}

/// Takes components from the cache or reads them, and tells how far the reading is.
fn read_all(
    origins: Vec<(&'static str, Origin)>,
    device: &Device,
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
            context.events.emit(Event::Reused { component: name.into() });
            components.insert(name.to_owned(), component);
        }
    }
    let sizes = missing.iter().map(|planned| planned.weights.as_ref().map_or(Ok(0), WeightFiles::bytes));
    let total = sizes.sum::<Result<u64>>()?;
    let mut before = 0;
    for planned in missing {
        context.cancel.check()?;
        let component = Arc::new(planned.read(device, before, total, context)?);
        if let Some(weights) = &planned.weights {
            before += weights.bytes()?;
            context.events.emit(Event::Loading { component: planned.name.into(), bytes: before, total });
        }
        cache.insert(Arc::clone(&component));
        components.insert(planned.name.to_owned(), component);
    }
    Ok(components)
}

impl Planned {
    fn read(&self, device: &Device, before: u64, total: u64, context: Context<'_>) -> Result<Component> {
        let Some(files) = &self.weights else {
            let model = Model::Tokenizer(self.tokenizer()?);
            return Ok(Component { class: self.class.clone(), key: self.key.clone(), bytes: 0, model });
        };
        let mut progress = |read: u64| {
            context.cancel.check()?;
            let component = self.name.to_owned();
            context.events.emit(Event::Loading { component, bytes: (before + read).min(total), total });
            Ok(())
        };
        let weights = match files {
            WeightFiles::Disk(files) => Weights::load(files, self.dtype, device, &mut progress)?,
            WeightFiles::Memory { name, bytes } => Weights::from_bytes(bytes, name, self.dtype, device, &mut progress)?,
        };
        let model = self.build(weights.clone())?;
        self.warn_of_unused(&weights, context);
        Ok(Component { class: self.class.clone(), key: self.key.clone(), bytes: weights.bytes(), model })
    }

    fn tokenizer(&self) -> Result<ClipTokenizer> {
        ClipTokenizer::new(&self.files.tokenizer(&self.folder)?)
    }

    fn build(&self, weights: Weights) -> Result<Model> {
        Ok(match self.kind {
            Kind::Tokenizer => Model::Tokenizer(self.tokenizer()?),
            Kind::ClipText => Model::ClipText(ClipTextModel::new(&self.config()?, weights)?),
            Kind::ClipVision => Model::ClipVision(ClipVisionModel::new(&self.config()?, weights)?),
            Kind::Unet => Model::Unet(Unet2DConditionModel::new(&self.config()?, weights)?),
            Kind::Vae => Model::Vae(AutoencoderKl::new(&self.config()?, weights)?),
        })
    }

    /// The component's `config.json`.
    fn config<C: DeserializeOwned>(&self) -> Result<C> {
        let path = sub(&self.folder, "config.json");
        let config = self.files.require_json(&path)?;
        if let Some(other) = config.get("_class_name").and_then(Value::as_str)
            && !self.kind.classes().contains(&other)
        {
            return Err(Error::BadFile {
                path: self.files.place(&path),
                reason: format!("describes a `{other}`, not a `{}`; correct the folder of `{}`", self.class, self.name),
            });
        }
        serde_path_to_error::deserialize(without_nulls(config)).map_err(|error| Error::BadFile {
            path: self.files.place(&path),
            reason: format!("setting `{}` cannot be used: {}", error.path(), error.inner()),
        })
    }

    fn warn_of_unused(&self, weights: &Weights, context: Context<'_>) {
        let unused = weights.unused();
        if unused.is_empty() {
            return;
        }
        let names = unused.iter().take(LISTED_NAMES).map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
        let more = if unused.len() > LISTED_NAMES { ", …" } else { "" };
        context.events.emit(Event::Warning {
            message: format!(
                "{} tensor(s) of `{}` are not used by a `{}` and were passed over: {names}{more}; if pictures look wrong, \
                 the weights belong to another class",
                unused.len(),
                self.name,
                self.class
            ),
        });
    }
}

/// A configuration's nulls mean "not set", as everywhere in the reference.
fn without_nulls(config: Value) -> Value {
    match config {
        Value::Object(map) => Value::Object(map.into_iter().filter(|(_, value)| !value.is_null()).collect()),
        other => other,
    }
}
