//! A component of which everything is known but its weights, and how those are read.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use candle_core::{DType, Device, Shape, Tensor};
use dw_core::event::Event;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{AUTOENCODER_TINY, CONTROLNET_UNION, Kind};
use crate::{
    Error, Result, device,
    hub::{ModelFiles, WeightFiles, sub},
    models::{
        Autoencoder, AutoencoderKl, AutoencoderTiny, ClipTextModel, ClipVisionModel, ControlNetModel,
        ControlNetUnionModel, FluxControlNetModel, FluxTransformer2DModel, ReduxImageEncoder, Sd3ControlNetModel,
        Sd3Transformer2DModel, SiglipVisionModel, T5EncoderModel, Unet2DConditionModel, config::without_nulls,
    },
    pipelines::{
        components::{Component, Model},
        memory::stage_of,
    },
    quant::{QuantizationRequest, Scheme},
    request::{Context, Paging},
    text::{ClipTokenizer, T5Tokenizer},
    weights::{Occupancy, Placement, Rest, Weights, paging::Pager},
};

/// Values of `quant_method` of which the tensors say everything.
const READABLE: [&str; 3] = ["bitsandbytes", "gguf", "fp8"];

/// How many names of unused tensors a warning lists.
const LISTED_NAMES: usize = 5;

/// A component that will be loaded, as far as it is known before its weights are read.
pub(super) struct Planned {
    pub(super) name: String,
    pub(super) kind: Kind,
    pub(super) class: String,
    pub(super) key: String,
    pub(super) files: Arc<ModelFiles>,
    pub(super) folder: String,
    /// None for a tokenizer.
    pub(super) weights: Option<WeightFiles>,
    /// Whether its weights are of the variant that is asked for; none when none is, or it is not the model's own.
    pub(super) has_variant: Option<bool>,
    pub(super) dtype: DType,
    /// How its layers are stored, where the step says so.
    pub(super) scheme: Option<Scheme>,
    /// Where it runs.
    pub(super) device: Device,
    /// When its layers come and go; none when they stay.
    pub(super) paging: Option<Paging>,
}

/// Refuses weights that another library stored in a way of its own, as far as their configuration says so.
pub(super) fn check_quantization(files: &ModelFiles, folder: &str) -> Result<()> {
    let path = sub(folder, "config.json");
    let config = files.read_json(&path)?;
    let method = config.as_ref().and_then(|config| config.pointer("/quantization_config/quant_method")?.as_str());
    match method.filter(|method| !READABLE.contains(method)) {
        None => Ok(()),
        Some(method) => Err(Error::BadFile {
            path: files.place(&path),
            reason: format!(
                "says that the weights are quantized in the way of `{method}`, which cannot be read; use the model in \
                 its original type with a `quantization_config` in the step, or its GGUF or bitsandbytes files"
            ),
        }),
    }
}

impl Planned {
    /// The same component with its layers stored as a step asks for.
    pub(super) fn quantized(self, request: &QuantizationRequest, context: Context<'_>) -> Result<Self> {
        let scheme = Scheme::of(request, &self.class)?;
        let Some(weights) = &self.weights else {
            let name = &self.name;
            return Err(Error::Unsupported(format!(
                "component `{name}` has no weights; remove its `quantization_config`"
            )));
        };
        if scheme.format.is_none() && !weights.is_gguf() {
            return Err(Error::Unsupported(format!(
                "`{}` of component `{}` is for GGUF files; name one in `from_single_file`, or use another class",
                request.class, self.name
            )));
        }
        let warn = |message: String| context.events.emit(Event::Warning { message });
        if let Some(message) = &scheme.message {
            warn(format!("component `{}`: {message}", self.name));
        }
        if let Some(compute) = request.compute_dtype.filter(|compute| *compute != self.dtype) {
            warn(format!(
                "component `{}` computes in `{}`, its `torch_dtype`, not in `{}`; name one type in both places",
                self.name,
                self.dtype.as_str(),
                compute.as_str()
            ));
        }
        let counts = |scheme| -> Result<usize> {
            Ok(weights.list(scheme)?.iter().filter(|listed| listed.is_quantized()).count())
        };
        let (stored, settled) = (counts(None)?, counts(Some(&scheme))?);
        if scheme.format.is_some() && stored > 0 {
            let (name, class) = (&self.name, &request.class);
            warn(format!(
                "component `{name}` is quantized in its files already, which stays; its `{class}` acts on the rest only"
            ));
        } else if settled == 0 {
            let (name, class) = (&self.name, &request.class);
            warn(format!(
                "`{class}` of component `{name}` quantizes nothing: its layers are few and small, or all stay dense"
            ));
        }
        let key = format!("{}|{}", self.key, scheme.key());
        Ok(Self { key, scheme: Some(scheme), ..self })
    }

    /// Settles when its layers come and go; a component that is kept in another way is another component.
    pub(super) fn page(&mut self, paging: Option<Paging>) {
        if let Some(paging) = paging.filter(|_| self.weights.is_some()) {
            self.key = format!("{}|{paging:?}", self.key);
            self.paging = Some(paging);
        }
    }

    /// Names and shapes of the parameters that its configuration asks for.
    pub(super) fn parameters(&self) -> Result<Vec<(String, Vec<usize>)>> {
        let asked: Arc<Mutex<BTreeMap<String, Vec<usize>>>> = Arc::default();
        let seen = Arc::clone(&asked);
        // One zero stands for all values, so that nothing of the model's size is made.
        let make = move |name: &str, shape: &Shape| {
            let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
            seen.insert(name.to_owned(), shape.dims().to_vec());
            Ok(Tensor::zeros(1, DType::F32, &Device::Cpu)?.broadcast_as(shape)?)
        };
        self.build(Weights::generated(make, DType::F32, &Device::Cpu))?;
        let asked = std::mem::take(&mut *asked.lock().unwrap_or_else(PoisonError::into_inner));
        Ok(asked.into_iter().collect())
    }

    /// Refuses files that lack a tensor which the configuration asks for, or have it in another shape. Only headers
    /// are read.
    pub(super) fn check_weights(&self) -> Result<()> {
        match &self.weights {
            None | Some(WeightFiles::Random { .. }) => Ok(()),
            Some(files) => self.build(self.open(files, Paging::Whole, &Arc::default())?).map(drop),
        }
    }

    /// Its weights, left where they are stored.
    pub(super) fn open(&self, files: &WeightFiles, paging: Paging, occupancy: &Arc<Occupancy>) -> Result<Weights> {
        // On a CPU host memory is the device; elsewhere it spares the conversion, and the disk, as long as there is some.
        let host = device::memory(&Device::Cpu);
        let has_room = host.is_some_and(|host| files.bytes().is_ok_and(|bytes| host.free / 2 > bytes));
        let rest = if !self.device.is_cpu() && has_room { Rest::Host } else { Rest::File };
        let pager = Pager::new(paging, rest, stage_of(&self.name), occupancy);
        let scheme = self.scheme.as_ref();
        let placement = Placement { dtype: self.dtype, device: &self.device, pager, scheme };
        match files {
            WeightFiles::Disk(files) => Weights::open(files, placement),
            WeightFiles::Memory { name, bytes } => Weights::open_bytes(bytes, name, placement),
            WeightFiles::Part(part) => Weights::open_part(part, placement),
            WeightFiles::Random { name, tensors } => Ok(Weights::open_random(tensors, name, placement)),
        }
    }

    pub(super) fn read(
        &self,
        occupancy: &Arc<Occupancy>,
        (before, total): (u64, u64),
        context: Context<'_>,
    ) -> Result<Component> {
        let Some(files) = &self.weights else {
            let model = self.tokenizer()?;
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
        let (dtype, device, scheme) = (self.dtype, &self.device, self.scheme.as_ref());
        let weights = match (self.paging, files) {
            (Some(paging), files) => self.open(files, paging, occupancy)?,
            (None, WeightFiles::Disk(files)) => Weights::load_as(files, dtype, device, scheme, &mut progress)?,
            (None, WeightFiles::Memory { name, bytes }) => {
                Weights::from_bytes(bytes, name, dtype, device, scheme, &mut progress)?
            }
            (None, WeightFiles::Part(part)) => Weights::from_checkpoint(part, dtype, device, scheme, &mut progress)?,
            (None, WeightFiles::Random { name, tensors }) => {
                Weights::random(tensors, name, (dtype, device), scheme, &mut progress)?
            }
        };
        let model = self.build(weights.clone())?;
        self.warn_of_unused(&weights, context);
        let bytes = if weights.is_paged() { 0 } else { weights.bytes() };
        let weights = self.kind.takes_adapters().then_some(weights);
        Ok(Component { class: self.class.clone(), key: self.key.clone(), bytes, model, weights, base: None })
    }

    fn tokenizer(&self) -> Result<Model> {
        let files = self.files.tokenizer(&self.folder)?;
        Ok(match self.kind {
            Kind::T5Tokenizer => Model::T5Tokenizer(T5Tokenizer::new(&files)?),
            _ => Model::Tokenizer(ClipTokenizer::new(&files)?),
        })
    }

    fn build(&self, weights: Weights) -> Result<Model> {
        Ok(match self.kind {
            Kind::Tokenizer | Kind::T5Tokenizer => self.tokenizer()?,
            Kind::T5 => Model::T5(T5EncoderModel::new(&self.config()?, weights)?),
            Kind::ClipText => Model::ClipText(ClipTextModel::new(&self.config()?, weights)?),
            Kind::ClipVision => Model::ClipVision(ClipVisionModel::new(&self.config()?, weights)?),
            Kind::Unet => Model::Unet(Unet2DConditionModel::new(&self.config()?, weights)?),
            Kind::Vae => Model::Vae(self.autoencoder(weights)?),
            Kind::ControlNet if self.class == CONTROLNET_UNION => {
                Model::ControlNetUnion(ControlNetUnionModel::new(&self.config()?, weights)?)
            }
            Kind::ControlNet => Model::ControlNet(ControlNetModel::new(&self.config()?, weights)?),
            Kind::Sd3Transformer => Model::Sd3Transformer(Sd3Transformer2DModel::new(&self.config()?, weights)?),
            Kind::Sd3ControlNet => Model::Sd3ControlNet(Sd3ControlNetModel::new(&self.config()?, weights)?),
            Kind::FluxTransformer => Model::FluxTransformer(FluxTransformer2DModel::new(&self.config()?, weights)?),
            Kind::FluxControlNet => Model::FluxControlNet(FluxControlNetModel::new(&self.config()?, weights)?),
            Kind::Siglip => Model::Siglip(SiglipVisionModel::new(&self.config()?, weights)?),
            Kind::Redux => Model::Redux(ReduxImageEncoder::new(&self.config()?, &weights)?),
        })
    }

    fn autoencoder(&self, weights: Weights) -> Result<Autoencoder> {
        Ok(if self.class == AUTOENCODER_TINY {
            Autoencoder::Tiny(AutoencoderTiny::new(&self.config()?, weights)?)
        } else {
            Autoencoder::Kl(AutoencoderKl::new(&self.config()?, weights)?)
        })
    }

    /// The component's `config.json` as it is.
    pub(super) fn raw_config(&self) -> Result<Value> {
        self.files.require_json(&sub(&self.folder, "config.json"))
    }

    /// The component's `config.json`.
    pub(super) fn config<C: DeserializeOwned>(&self) -> Result<C> {
        let path = sub(&self.folder, "config.json");
        let config = self.files.require_json(&path)?;
        // Repositories of a whole CLIP hold the settings of both towers.
        let config = match config.get("vision_config") {
            Some(vision) if self.kind == Kind::ClipVision => vision.clone(),
            _ => config,
        };
        if let Some(other) = config.get("_class_name").and_then(Value::as_str)
            && other != self.class
        {
            return Err(Error::BadFile {
                path: self.files.place(&path),
                reason: format!(
                    "describes a `{other}`, not a `{}`; correct the folder or the class of `{}`",
                    self.class, self.name
                ),
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
