//! The parts a pipeline is made of, and typed access to them.

use std::{collections::BTreeMap, sync::Arc};

use candle_core::{DType, Device};
use serde_json::{Map, Value};

use super::{adapt::Adapters, ip_adapter::IpAdapters};
use crate::{
    Error, Result,
    models::{
        AutoencoderKl, ClipTextModel, ClipVisionModel, ConditionConfig, ControlNetModel, ControlNetUnionModel,
        Unet2DConditionModel,
    },
    schedulers::{self, Scheduler},
    text::ClipTokenizer,
    weights::Weights,
};

/// A loaded part, whichever it is.
pub enum Model {
    /// Text to token ids.
    Tokenizer(ClipTokenizer),
    /// Token ids to embeddings.
    ClipText(ClipTextModel),
    /// Pictures to embeddings.
    ClipVision(ClipVisionModel),
    /// The denoiser.
    Unet(Unet2DConditionModel),
    /// Latents to pictures and back.
    Vae(AutoencoderKl),
    /// Steers a UNet by a picture.
    ControlNet(ControlNetModel),
    /// Steers a UNet by pictures of several kinds.
    ControlNetUnion(ControlNetUnionModel),
}

/// A ControlNet of either sort.
#[derive(Clone, Copy)]
pub(crate) enum ControlModel<'a> {
    Plain(&'a ControlNetModel),
    Union(&'a ControlNetUnionModel),
}

impl<'a> ControlModel<'a> {
    /// How it reads pictures.
    pub(crate) fn condition(self) -> &'a ConditionConfig {
        match self {
            Self::Plain(model) => &model.config().condition,
            Self::Union(model) => &model.config().condition,
        }
    }

    /// How many kinds of pictures it knows.
    pub(crate) fn kinds(self) -> usize {
        match self {
            Self::Plain(_) => 1,
            Self::Union(model) => model.config().fuser.control_types,
        }
    }
}

/// The name of the component at place `at` of a list that a step gives for `name`.
pub(crate) fn numbered(name: &str, at: usize) -> String {
    if at == 0 { name.to_owned() } else { format!("{name}_{}", at + 1) }
}

/// One loaded part with what the cache and reports need to know of it.
pub struct Component {
    /// Its class, as the reference names it.
    pub class: String,
    /// What it is: source, files, type and device. Equal keys mean equal components.
    pub key: String,
    /// Bytes of its weights in memory.
    pub bytes: u64,
    /// The part itself.
    pub model: Model,
    /// What a model that takes adapters was built from; none for an adapted one.
    pub(crate) weights: Option<Weights>,
    /// What an adapted component is without its adapters.
    pub(crate) base: Option<SharedComponent>,
}

/// A component that pipelines and the cache hold together.
pub type SharedComponent = Arc<Component>;

/// Which sampler a pipeline runs with.
#[derive(Clone, Debug)]
pub(crate) struct SchedulerSetup {
    pub(crate) class: String,
    pub(crate) config: Map<String, Value>,
    pub(crate) shift: Option<f64>,
}

impl SchedulerSetup {
    /// A fresh sampler: every call of a pipeline starts from one.
    pub(crate) fn create(&self) -> Result<Box<dyn Scheduler>> {
        let mut scheduler = schedulers::create(&self.class, &self.config)?;
        if let Some(shift) = self.shift {
            scheduler.set_shift(shift)?;
        }
        Ok(scheduler)
    }
}

/// Everything a pipeline runs with.
#[derive(Clone)]
pub(crate) struct Parts {
    pub(crate) class: &'static str,
    pub(crate) components: BTreeMap<String, SharedComponent>,
    pub(crate) adapters: Adapters,
    pub(crate) scheduler: SchedulerSetup,
    /// What adds noise to the picture, in models that upscale noisy pictures.
    pub(crate) low_res_scheduler: Option<SchedulerSetup>,
    pub(crate) device: Device,
    pub(crate) dtype: DType,
    /// `model_index.json`, which holds a few settings of the pipeline itself.
    pub(crate) index: Value,
    /// Whether prompts are read as weighted.
    pub(crate) prompt_weighting: bool,
    /// None when no step asks for one.
    pub(crate) ip_adapters: Option<Arc<IpAdapters>>,
}

impl Parts {
    /// A boolean setting of `model_index.json`.
    pub(crate) fn setting(&self, name: &str, default: bool) -> bool {
        self.index.get(name).and_then(Value::as_bool).unwrap_or(default)
    }

    pub(crate) fn unet(&self) -> Result<&Unet2DConditionModel> {
        match self.components.get("unet").map(|component| &component.model) {
            Some(Model::Unet(unet)) => Ok(unet),
            other => Err(self.unusable("unet", other.is_some())),
        }
    }

    pub(crate) fn vae(&self) -> Result<&AutoencoderKl> {
        match self.components.get("vae").map(|component| &component.model) {
            Some(Model::Vae(vae)) => Ok(vae),
            other => Err(self.unusable("vae", other.is_some())),
        }
    }

    /// The ControlNets, in the order of the step's list; at least one.
    pub(crate) fn controlnets(&self) -> Result<Vec<ControlModel<'_>>> {
        let name = "controlnet";
        let models = (0..).map_while(|at| self.components.get(&numbered(name, at)));
        let models = models.map(|component| match &component.model {
            Model::ControlNet(model) => Ok(ControlModel::Plain(model)),
            Model::ControlNetUnion(model) => Ok(ControlModel::Union(model)),
            _ => Err(self.unusable(name, true)),
        });
        let models = models.collect::<Result<Vec<_>>>()?;
        if models.is_empty() { Err(self.unusable(name, false)) } else { Ok(models) }
    }

    /// The image encoder of the IP-Adapters; none when it is left out.
    pub(crate) fn image_encoder(&self) -> Result<Option<&ClipVisionModel>> {
        match self.components.get("image_encoder").map(|component| &component.model) {
            Some(Model::ClipVision(encoder)) => Ok(Some(encoder)),
            Some(_) => Err(self.unusable("image_encoder", true)),
            None => Ok(None),
        }
    }

    /// The text encoder with its tokenizer; none when the model has no such encoder.
    pub(crate) fn text_encoder(
        &self,
        encoder: &str,
        tokenizer: &str,
    ) -> Result<Option<(&ClipTokenizer, &ClipTextModel)>> {
        let model = |name: &str| self.components.get(name).map(|component| &component.model);
        match (model(tokenizer), model(encoder)) {
            (_, None) => Ok(None),
            (Some(Model::Tokenizer(tokenizer)), Some(Model::ClipText(encoder))) => Ok(Some((tokenizer, encoder))),
            (None, _) => Err(self.unusable(tokenizer, false)),
            (Some(Model::Tokenizer(_)), _) => Err(self.unusable(encoder, true)),
            _ => Err(self.unusable(tokenizer, true)),
        }
    }

    fn unusable(&self, name: &str, is_there: bool) -> Error {
        Error::Unsupported(if is_there {
            format!("component `{name}` of `{}` is of the wrong kind; share or load the right one", self.class)
        } else {
            format!(
                "`{}` needs the component `{name}`, which the model does not have or the step leaves out",
                self.class
            )
        })
    }
}
