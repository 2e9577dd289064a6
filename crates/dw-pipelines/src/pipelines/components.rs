//! The parts a pipeline is made of, and typed access to them.

use std::{collections::BTreeMap, sync::Arc};

use candle_core::{DType, Device};
use dw_core::fit::FitPlan;
use serde_json::{Map, Value};

use super::{
    adapt::Adapters, flux::ip_adapter::FluxIpAdapters, ip_adapter::IpAdapters, memory::Memory,
    sd3_image_prompt::ScaledSd3Adapter,
};
use crate::{
    Error, Result,
    models::{
        Autoencoder, ClipTextModel, ClipVisionModel, ConditionConfig, ControlNetModel, ControlNetUnionModel,
        FluxControlNetModel, FluxTransformer2DModel, ReduxImageEncoder, Reuse, Sd3ControlNetModel,
        Sd3Transformer2DModel, SiglipVisionModel, T5EncoderModel, Unet2DConditionModel, config::OneOrMany,
    },
    schedulers::{self, Scheduler},
    text::{ClipTokenizer, T5Tokenizer},
    weights::Weights,
};

/// A loaded part, whichever it is.
#[expect(clippy::large_enum_variant, reason = "a handful of them, none of which moves once it is loaded")]
pub enum Model {
    /// Text to token ids.
    Tokenizer(ClipTokenizer),
    /// Token ids to embeddings.
    ClipText(ClipTextModel),
    /// Text to token ids of a T5 encoder.
    T5Tokenizer(T5Tokenizer),
    /// Token ids to embeddings, by T5.
    T5(T5EncoderModel),
    /// Pictures to embeddings.
    ClipVision(ClipVisionModel),
    /// The denoiser.
    Unet(Unet2DConditionModel),
    /// Latents to pictures and back.
    Vae(Autoencoder),
    /// Steers a UNet by a picture.
    ControlNet(ControlNetModel),
    /// Steers a UNet by pictures of several kinds.
    ControlNetUnion(ControlNetUnionModel),
    /// The denoiser of Stable Diffusion 3.
    Sd3Transformer(Sd3Transformer2DModel),
    /// Steers such a denoiser by a picture.
    Sd3ControlNet(Sd3ControlNetModel),
    /// The denoiser of Flux.
    FluxTransformer(FluxTransformer2DModel),
    /// Steers such a denoiser by a picture.
    FluxControlNet(FluxControlNetModel),
    /// Pictures to states, by SigLIP.
    Siglip(SiglipVisionModel),
    /// Such states to words of a prompt.
    Redux(ReduxImageEncoder),
}

/// What the way from pictures to latents and back must know of a denoiser, whatever kind it is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Denoiser {
    /// The channels of the latents it predicts.
    pub(crate) channels: usize,
    /// The channels it reads: the latents', and those of what it reads beside them.
    pub(crate) in_channels: usize,
    /// The type it runs in.
    pub(crate) dtype: DType,
    /// How many latents a side of its smallest piece has.
    pub(crate) patch: usize,
    /// Height and width of the training latents, where the configuration names them.
    pub(crate) sample_size: Option<(usize, usize)>,
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
    /// Bytes of its weights that stay in memory: none of a component that comes and goes.
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
    /// That of pipelines without denoising steps, which never create it.
    pub(crate) fn unused() -> Self {
        Self { class: String::from("none"), config: Map::new(), shift: None }
    }

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
    /// How the image encoder of the model itself takes pictures (`preprocessor_config.json`).
    pub(crate) feature_extractor: Option<Value>,
    /// Which denoising steps are skipped; none when every step is computed.
    pub(crate) reuse: Option<Reuse>,
    /// Whether prompts are read as weighted.
    pub(crate) prompt_weighting: bool,
    /// None when no step asks for one.
    pub(crate) ip_adapters: Option<Arc<IpAdapters>>,
    /// The IP-Adapter of a Stable Diffusion 3; none when the step asks for none.
    pub(crate) sd3_ip_adapter: Option<Arc<ScaledSd3Adapter>>,
    /// Those of a Flux model; none when the step asks for none.
    pub(crate) flux_ip_adapters: Option<Arc<FluxIpAdapters>>,
    /// What calls know about memory.
    pub(crate) memory: Memory,
    /// What was said about memory before anything was read.
    pub(crate) fit: Arc<FitPlan>,
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

    /// The denoiser as far as pictures and latents are concerned.
    pub(crate) fn denoiser(&self) -> Result<Denoiser> {
        if let Some(Model::Sd3Transformer(transformer)) = self.model("transformer") {
            let config = transformer.config();
            return Ok(Denoiser {
                channels: config.latent_channels(),
                in_channels: config.in_channels,
                dtype: transformer.dtype(),
                patch: config.patch_size,
                sample_size: Some((config.sample_size, config.sample_size)),
            });
        }
        if let Some(Model::FluxTransformer(transformer)) = self.model("transformer") {
            let config = transformer.config();
            return Ok(Denoiser {
                channels: config.predicted_channels() / 4,
                in_channels: config.in_channels / 4,
                dtype: transformer.dtype(),
                patch: 2,
                sample_size: None,
            });
        }
        let unet = self.unet()?;
        let config = unet.config();
        Ok(Denoiser {
            channels: config.out_channels,
            in_channels: config.in_channels,
            dtype: unet.dtype(),
            patch: 1,
            sample_size: match &config.sample_size {
                Some(OneOrMany::One(side)) => Some((*side, *side)),
                Some(OneOrMany::Many(sides)) if sides.len() == 2 => Some((sides[0], sides[1])),
                _ => None,
            },
        })
    }

    pub(crate) fn sd3_transformer(&self) -> Result<&Sd3Transformer2DModel> {
        match self.model("transformer") {
            Some(Model::Sd3Transformer(transformer)) => Ok(transformer),
            other => Err(self.unusable("transformer", other.is_some())),
        }
    }

    /// The ControlNets of Stable Diffusion 3, in the order of the step's list; at least one.
    pub(crate) fn sd3_controlnets(&self) -> Result<Vec<&Sd3ControlNetModel>> {
        let name = "controlnet";
        let models = (0..).map_while(|at| self.model(&numbered(name, at)));
        let models = models.map(|model| match model {
            Model::Sd3ControlNet(model) => Ok(model),
            _ => Err(self.unusable(name, true)),
        });
        let models = models.collect::<Result<Vec<_>>>()?;
        if models.is_empty() { Err(self.unusable(name, false)) } else { Ok(models) }
    }

    pub(crate) fn flux(&self) -> Result<&FluxTransformer2DModel> {
        match self.model("transformer") {
            Some(Model::FluxTransformer(transformer)) => Ok(transformer),
            other => Err(self.unusable("transformer", other.is_some())),
        }
    }

    /// The ControlNets of Flux, in the order of the step's list; at least one.
    pub(crate) fn flux_controlnets(&self) -> Result<Vec<&FluxControlNetModel>> {
        let name = "controlnet";
        let models = (0..).map_while(|at| self.model(&numbered(name, at)));
        let models = models.map(|model| match model {
            Model::FluxControlNet(model) => Ok(model),
            _ => Err(self.unusable(name, true)),
        });
        let models = models.collect::<Result<Vec<_>>>()?;
        if models.is_empty() { Err(self.unusable(name, false)) } else { Ok(models) }
    }

    pub(crate) fn siglip(&self) -> Result<&SiglipVisionModel> {
        match self.model("image_encoder") {
            Some(Model::Siglip(encoder)) => Ok(encoder),
            other => Err(self.unusable("image_encoder", other.is_some())),
        }
    }

    /// The same where a call can do without it.
    pub(crate) fn siglip_if_any(&self) -> Result<Option<&SiglipVisionModel>> {
        self.model("image_encoder").is_some().then(|| self.siglip()).transpose()
    }

    pub(crate) fn redux(&self) -> Result<&ReduxImageEncoder> {
        match self.model("image_embedder") {
            Some(Model::Redux(embedder)) => Ok(embedder),
            other => Err(self.unusable("image_embedder", other.is_some())),
        }
    }

    fn model(&self, name: &str) -> Option<&Model> {
        self.components.get(name).map(|component| &component.model)
    }

    pub(crate) fn vae(&self) -> Result<&Autoencoder> {
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

    /// The T5 encoder with its tokenizer; none when the model has no such encoder, or it is left out.
    pub(crate) fn t5_encoder(&self, encoder: &str, tokenizer: &str) -> Result<Option<(&T5Tokenizer, &T5EncoderModel)>> {
        let model = |name: &str| self.components.get(name).map(|component| &component.model);
        match (model(tokenizer), model(encoder)) {
            (_, None) => Ok(None),
            (Some(Model::T5Tokenizer(tokenizer)), Some(Model::T5(encoder))) => Ok(Some((tokenizer, encoder))),
            (None, _) => Err(self.unusable(tokenizer, false)),
            (Some(Model::T5Tokenizer(_)), _) => Err(self.unusable(encoder, true)),
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
