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
    adapt::Adapters,
    cache::ComponentCache,
    clip_pixels::ClipPixels,
    components::{Component, Model, Parts, SchedulerSetup, SharedComponent, numbered},
    ip_adapter::{Found, IpAdapters, check_encoder},
};
use crate::{
    Error, Result, device,
    hub::{Hub, ModelFiles, Need, TOKENIZER_FILES, WeightFiles, sub},
    models::{
        AutoencoderKl, ClipTextModel, ClipVisionModel, ControlNetConfig, ControlNetModel, ControlNetUnionModel,
        Unet2DConditionModel, UnetConfig, config::without_nulls,
    },
    registry::Implementation,
    request::{ComponentChoice, ComponentRequest, Context, PipelineRequest, SchedulerRequest},
    schedulers,
    text::ClipTokenizer,
    weights::Weights,
};

const CONTROLNET: &str = "ControlNetModel";
const CONTROLNET_UNION: &str = "ControlNetUnionModel";

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
    /// A `ControlNetModel` or `ControlNetUnionModel`; a step may list several.
    ControlNet,
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
            Self::ControlNet => &[CONTROLNET, CONTROLNET_UNION],
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
    name: String,
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
    let scheduler = scheduler_setup("scheduler", request.scheduler.as_ref(), (&files, &index), context)?;
    let has_low_res = index.pointer("/low_res_scheduler/1").is_some_and(Value::is_string);
    let low_res_scheduler =
        has_low_res.then(|| scheduler_setup("low_res_scheduler", None, (&files, &index), context)).transpose()?;
    let found: Vec<Found> =
        request.ip_adapters.iter().map(|adapter| Found::find(adapter, hub, context)).collect::<Result<_>>()?;
    let mut planner = Planner { request, files, index: &index, hub, cache, context, variant: VariantUse::default() };
    let mut origins = Vec::new();
    for slot in implementation.slots {
        let planned = planner.plan(*slot)?;
        // Prompts can come encoded and latents can be the result, but nothing replaces the denoiser and what steers it.
        if planned.is_empty() && matches!(slot.kind, Kind::Unet | Kind::ControlNet) {
            let (class, name) = (implementation.class, slot.name);
            return Err(Error::Unsupported(format!(
                "`{class}` needs the component `{name}`, which the model does not have or the step leaves out; add \
                 `{name}` to the step"
            )));
        }
        origins.extend(planned);
    }
    planner.check_variant()?;
    check_family(&origins)?;
    if let Some(planned) = planner.own_image_encoder(&found, &origins)? {
        origins.push((planned.name.clone(), Origin::Loaded(planned)));
    }
    let pixels = planner.clip_pixels(&found)?;
    let adapters = Adapters::find(request, hub, context)?;
    let mut components = read_all(origins, &request.device, cache, context)?;
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
        prompt_weighting: request.prompt_weighting,
        ip_adapters: None,
    };
    parts.ip_adapters = read_ip_adapters(&parts, &found, pixels, context)?.map(Arc::new);
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
    Ok(())
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

/// Refuses ControlNets that were made for another family of models, before weights are read.
fn check_family(origins: &[(String, Origin)]) -> Result<()> {
    let mut unet = None;
    for (name, origin) in origins {
        let Some((kind, config)) = origin.unet_config()? else { continue };
        if kind == Kind::Unet {
            unet = Some(config);
            continue;
        }
        let Some(unet) = &unet else { continue };
        let (of_net, of_unet) = (&config.cross_attention_dim, &unet.cross_attention_dim);
        let reason = if of_net != of_unet {
            let show = |dim| serde_json::to_string(dim).unwrap_or_default();
            format!("reads text of {} features, but the model's UNet reads {}", show(of_net), show(of_unet))
        } else if config.block_out_channels != unet.block_out_channels {
            let (net, unet) = (&config.block_out_channels, &unet.block_out_channels);
            format!("has levels of {net:?} channels, but the model's UNet has {unet:?}")
        } else if config.addition_embed_type != unet.addition_embed_type || config.in_channels != unet.out_channels {
            "has other inputs than the model's UNet".to_owned()
        } else {
            continue;
        };
        return Err(Error::Unsupported(format!(
            "component `{name}` {reason}; use a ControlNet made for this family of models"
        )));
    }
    Ok(())
}

impl Origin {
    /// What a UNet, or the UNet that a ControlNet was copied from, looks like; none for other components.
    fn unet_config(&self) -> Result<Option<(Kind, UnetConfig)>> {
        Ok(match self {
            Self::Loaded(planned) => match planned.kind {
                Kind::Unet => Some((Kind::Unet, planned.config()?)),
                Kind::ControlNet => Some((Kind::ControlNet, planned.config::<ControlNetConfig>()?.unet)),
                _ => None,
            },
            Self::Shared(component) => match &component.model {
                Model::Unet(unet) => Some((Kind::Unet, unet.config().clone())),
                Model::ControlNet(net) => Some((Kind::ControlNet, net.config().unet.clone())),
                Model::ControlNetUnion(net) => Some((Kind::ControlNet, net.config().unet.clone())),
                _ => None,
            },
        })
    }
}

/// Decides for each component where it comes from.
struct Planner<'a> {
    request: &'a PipelineRequest,
    files: Arc<ModelFiles>,
    index: &'a Value,
    hub: &'a Hub,
    cache: &'a ComponentCache,
    context: Context<'a>,
    variant: VariantUse,
}

/// Which components of the model itself have weights of the variant that is asked for.
#[derive(Default)]
struct VariantUse {
    found: usize,
    /// Those that are read without it, and the first complaint about that.
    plain: Vec<&'static str>,
    complaint: Option<Error>,
}

impl Planner<'_> {
    /// The components for a slot, by name: none, one, or for ControlNets a list.
    fn plan(&mut self, slot: Slot) -> Result<Vec<(String, Origin)>> {
        let name = slot.name;
        let single = |origin: Origin| vec![(name.to_owned(), origin)];
        match self.request.components.get(name) {
            Some(ComponentChoice::Omit) => Ok(Vec::new()),
            Some(ComponentChoice::Shared) => self.shared(slot).map(Origin::Shared).map(single),
            Some(ComponentChoice::Load(list)) => match list.as_slice() {
                [component] => self.replacement(slot, component, 0).map(Origin::Loaded).map(single),
                list if slot.kind == Kind::ControlNet => {
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
                let class = class.to_owned();
                self.own(slot, &class).map(Origin::Loaded).map(single)
            }
        }
    }

    /// A component of the model itself: with the request's variant, or without where it has none of that, as in the
    /// reference.
    fn own(&mut self, slot: Slot, class: &str) -> Result<Planned> {
        let dtype = self.request.dtype.unwrap_or(DType::F32);
        let planned = |variant| self.planned((slot, 0), class, Arc::clone(&self.files), slot.name, variant, dtype);
        let Some(variant) = self.request.variant.as_deref().filter(|_| slot.kind != Kind::Tokenizer) else {
            return planned(None);
        };
        match planned(Some(variant)) {
            Ok(found) => {
                self.variant.found += 1;
                Ok(found)
            }
            Err(complaint @ Error::Cancelled(_)) => Err(complaint),
            Err(complaint) => {
                let Ok(plain) = planned(None) else { return Err(complaint) };
                self.variant.plain.push(slot.name);
                self.variant.complaint.get_or_insert(complaint);
                Ok(plain)
            }
        }
    }

    /// Says which components were found without the variant; a variant that none has is an error.
    fn check_variant(&mut self) -> Result<()> {
        let VariantUse { found, plain, complaint } = std::mem::take(&mut self.variant);
        let Some(complaint) = complaint else { return Ok(()) };
        if found == 0 {
            return Err(complaint);
        }
        let variant = self.request.variant.as_deref().unwrap_or_default();
        let names = plain.join("`, `");
        let message =
            format!("`{names}` of the model have no weights of variant `{variant}`; those without a variant are read");
        self.context.events.emit(Event::Warning { message });
        Ok(())
    }

    /// The image encoder that comes with the first adapter that has one, unless the pipeline has its own or the
    /// step leaves it out.
    fn own_image_encoder(&self, found: &[Found<'_>], origins: &[(String, Origin)]) -> Result<Option<Planned>> {
        let slot = Slot { name: "image_encoder", kind: Kind::ClipVision };
        let is_settled =
            self.request.components.contains_key(slot.name) || origins.iter().any(|(name, _)| name == slot.name);
        let Some((adapter, folder)) = found.iter().find_map(|found| Some((found, found.image_encoder()?))) else {
            return Ok(None);
        };
        if is_settled {
            return Ok(None);
        }
        let dtype = self.request.dtype.unwrap_or(DType::F32);
        let files = Arc::clone(&adapter.files);
        let planned = self.planned((slot, 0), "CLIPVisionModelWithProjection", files, &folder, None, dtype);
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
        let dtype = component.dtype.or(self.request.dtype).unwrap_or(DType::F32);
        self.planned((slot, at), &component.class, files, folder.trim_matches('/'), component.variant.as_deref(), dtype)
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
            name: numbered(slot.name, at),
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
    origins: Vec<(String, Origin)>,
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
            context.events.emit(Event::Reused { component: name.clone() });
            components.insert(name, component);
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
            context.events.emit(Event::Loading { component: planned.name.clone(), bytes: before, total });
        }
        cache.insert(Arc::clone(&component));
        components.insert(planned.name, component);
    }
    Ok(components)
}

impl Planned {
    fn read(&self, device: &Device, before: u64, total: u64, context: Context<'_>) -> Result<Component> {
        let Some(files) = &self.weights else {
            let model = Model::Tokenizer(self.tokenizer()?);
            return Ok(Component {
                class: self.class.clone(),
                key: self.key.clone(),
                bytes: 0,
                model,
                weights: None,
                base: None,
            });
        };
        let mut progress = |read: u64| {
            context.cancel.check()?;
            let component = self.name.clone();
            context.events.emit(Event::Loading { component, bytes: (before + read).min(total), total });
            Ok(())
        };
        let weights = match files {
            WeightFiles::Disk(files) => Weights::load(files, self.dtype, device, &mut progress)?,
            WeightFiles::Memory { name, bytes } => Weights::from_bytes(bytes, name, self.dtype, device, &mut progress)?,
            WeightFiles::Part(part) => Weights::from_checkpoint(part, self.dtype, device, &mut progress)?,
        };
        let model = self.build(weights.clone())?;
        self.warn_of_unused(&weights, context);
        let bytes = weights.bytes();
        let takes_adapters = matches!(self.kind, Kind::ClipText | Kind::Unet);
        let weights = takes_adapters.then_some(weights);
        Ok(Component { class: self.class.clone(), key: self.key.clone(), bytes, model, weights, base: None })
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
            Kind::ControlNet if self.class == CONTROLNET_UNION => {
                Model::ControlNetUnion(ControlNetUnionModel::new(&self.config()?, weights)?)
            }
            Kind::ControlNet => Model::ControlNet(ControlNetModel::new(&self.config()?, weights)?),
        })
    }

    /// The component's `config.json`.
    fn config<C: DeserializeOwned>(&self) -> Result<C> {
        let path = sub(&self.folder, "config.json");
        let config = self.files.require_json(&path)?;
        if let Some(other) = config.get("_class_name").and_then(Value::as_str)
            && (!self.kind.classes().contains(&other) || (self.kind == Kind::ControlNet && other != self.class))
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
