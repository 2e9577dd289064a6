//! `pipeline` of a step: where its weights come from, what is added to it, and its arguments.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{
    configuration::{GroupOffload, LayerwiseCasting, PipelineConfiguration},
    values::{self, NumberOrText, OneOrMany},
};
use crate::seed::Seed;

/// A pipeline and the arguments of its call.
///
/// Any further key whose value is an object with `from_pretrained_arguments` is a component of that name.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct Pipeline {
    /// Which class to load and how to place and run it.
    pub configuration: PipelineConfiguration,
    /// Where the weights come from.
    pub from_pretrained_arguments: FromPretrained,
    /// Arguments of the call.
    pub arguments: Map<String, Value>,
    /// Components that later steps may reuse.
    pub shared_components: Option<Vec<String>>,
    /// Components taken from earlier steps that shared them.
    pub reused_components: Option<Vec<String>>,
    /// Another scheduler, or other settings of the model's own.
    pub scheduler: Option<Scheduler>,
    /// The same for the scheduler of the sound.
    pub audio_scheduler: Option<Scheduler>,
    /// A whole model.
    pub model: Option<Component>,
    /// The denoising transformer.
    pub transformer: Option<Component>,
    /// The second denoising transformer.
    pub transformer_2: Option<Component>,
    /// The autoencoder.
    pub vae: Option<Component>,
    /// The denoising UNet.
    pub unet: Option<Component>,
    /// The text encoder.
    pub text_encoder: Option<Component>,
    /// The second text encoder.
    pub text_encoder_2: Option<Component>,
    /// The third text encoder.
    pub text_encoder_3: Option<Component>,
    /// The tokenizer.
    pub tokenizer: Option<Component>,
    /// The second tokenizer.
    pub tokenizer_2: Option<Component>,
    /// The third tokenizer.
    pub tokenizer_3: Option<Component>,
    /// The encoder of reference pictures.
    pub image_encoder: Option<Component>,
    /// What prepares reference pictures.
    pub feature_extractor: Option<Component>,
    /// The head that rewrites prompts.
    pub prompt_enhancer_head: Option<Component>,
    /// One ControlNet, or several.
    pub controlnet: Option<OneOrMany<ControlNet>>,
    /// LoRA files, in the order they are applied.
    pub loras: Option<Vec<Lora>>,
    /// One IP-Adapter, or several.
    pub ip_adapter: Option<OneOrMany<IpAdapter>>,
    /// Learned words.
    pub textual_inversions: Option<Vec<TextualInversion>>,
    /// A service that encodes prompts.
    pub remote_text_encoder: Option<RemoteTextEncoder>,
    /// Seed of this pipeline, instead of the step's.
    pub seed: Option<Seed>,
    /// Makes a long video out of several calls.
    pub chain: Option<Chain>,
    /// Whatever else the pipeline says; objects with `from_pretrained_arguments` are components.
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

/// Where weights come from: at most one of `model_name`, `from_single_file` and `task`. Further keys go to the loader.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[schemars(extend("oneOf" = [
    { "required": ["model_name"] },
    { "required": ["from_single_file"] },
    { "required": ["task"] },
    { "not": { "anyOf": [
        { "required": ["model_name"] }, { "required": ["from_single_file"] }, { "required": ["task"] }
    ] } }
]))]
pub struct FromPretrained {
    /// A repository on the HuggingFace hub (`owner/name`), a local folder, or `builtin:NAME`.
    pub model_name: Option<String>,
    /// One checkpoint file: local, a hub URL, or `owner/name/file`.
    pub from_single_file: Option<String>,
    /// Task of a library pipeline.
    pub task: Option<String>,
    /// Folder or repository that holds the configuration of a single file.
    #[serde(default)]
    #[schemars(schema_with = "values::text_or_null_schema")]
    pub config: Option<String>,
    /// Part of the weight files' names, `fp16` for example.
    #[serde(default)]
    #[schemars(schema_with = "values::text_or_null_schema")]
    pub variant: Option<String>,
    /// A folder inside the repository.
    #[serde(default)]
    #[schemars(schema_with = "values::text_or_null_schema")]
    pub subfolder: Option<String>,
    /// Branch, tag or commit of the repository.
    #[serde(default)]
    #[schemars(schema_with = "values::text_or_null_schema")]
    pub revision: Option<String>,
    /// Type of the weights, `torch.float16` for example.
    #[serde(default)]
    #[schemars(schema_with = "values::text_or_null_schema")]
    pub torch_dtype: Option<String>,
    /// Further settings; a component's name with `null` leaves it out.
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

impl FromPretrained {
    /// Names of the components that are left out (`"text_encoder": null`).
    pub fn omitted(&self) -> Vec<String> {
        self.rest.iter().filter(|(_, value)| value.is_null()).map(|(name, _)| name.clone()).collect()
    }
}

/// A component that does not come with the pipeline.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct Component {
    /// Its class and placement.
    pub configuration: ComponentConfiguration,
    /// Where its weights come from.
    pub from_pretrained_arguments: FromPretrained,
    /// How its weights are quantized.
    pub quantization_config: Option<QuantizationConfig>,
    /// Moves groups of its layers to the device as they are needed.
    pub group_offload: Option<GroupOffload>,
    /// Stores weights in a smaller type than they are computed in.
    pub enable_layerwise_casting: Option<LayerwiseCasting>,
}

/// Class and placement of a component.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct ComponentConfiguration {
    /// Its class, `AutoencoderKL` for example.
    pub component_type: String,
    /// Where it lives; the pipeline's device when absent.
    pub device: Option<String>,
    /// Further settings.
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

/// A ControlNet.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct ControlNet {
    /// Its class and placement.
    pub configuration: PipelineConfiguration,
    /// Where its weights come from.
    pub from_pretrained_arguments: FromPretrained,
}

impl From<ControlNet> for Component {
    fn from(controlnet: ControlNet) -> Self {
        let PipelineConfiguration { component_type, device, group_offload, enable_layerwise_casting, .. } =
            controlnet.configuration;
        Self {
            configuration: ComponentConfiguration { component_type, device, rest: Map::new() },
            from_pretrained_arguments: controlnet.from_pretrained_arguments,
            quantization_config: None,
            group_offload,
            enable_layerwise_casting,
        }
    }
}

/// How weights are quantized.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct QuantizationConfig {
    /// The method.
    pub configuration: QuantizationClass,
    /// Its settings.
    pub arguments: Map<String, Value>,
}

/// A quantization method.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct QuantizationClass {
    /// Its class, `GGUFQuantizationConfig` for example.
    pub config_type: String,
}

/// Another scheduler, or other settings of the model's own. At least one of `configuration` and `shift`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[schemars(extend("anyOf" = [{ "required": ["configuration"] }, { "required": ["shift"] }]))]
pub struct Scheduler {
    /// The class.
    pub configuration: Option<SchedulerConfiguration>,
    /// Settings that override the model's own scheduler configuration; a full configuration replaces it.
    pub from_config_args: Option<Map<String, Value>>,
    /// Sigma shift, above 0.
    #[serde(default)]
    #[schemars(schema_with = "values::positive_or_text_schema")]
    pub shift: Option<NumberOrText>,
}

/// Class of a scheduler.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct SchedulerConfiguration {
    /// Its name, `EulerDiscreteScheduler` for example.
    pub scheduler_type: String,
}

/// A LoRA file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Lora {
    /// Repository, folder or file.
    pub model_name: String,
    /// The file inside it.
    pub weight_name: Option<String>,
    /// A folder inside it.
    pub subfolder: Option<String>,
    /// Name of the adapter; its place in the list when absent.
    pub adapter_name: Option<String>,
    /// Strength; 1.0 when absent.
    pub scale: Option<NumberOrText>,
    /// Further settings of the loader.
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

/// An IP-Adapter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct IpAdapter {
    /// Repository or folder.
    pub model_name: String,
    /// The file inside it.
    pub weight_name: Option<String>,
    /// A folder inside it.
    #[serde(default)]
    #[schemars(schema_with = "values::text_or_null_schema")]
    pub subfolder: Option<String>,
    /// Strength: a number, a list, or numbers by block.
    #[serde(default)]
    #[schemars(schema_with = "values::adapter_scale_schema")]
    pub scale: Option<Value>,
    /// Further settings of the loader.
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

/// Learned words.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct TextualInversion {
    /// Repository, folder or file.
    pub model_name: String,
    /// The file inside it.
    pub weight_name: Option<String>,
    /// The word that prompts use.
    pub token: Option<String>,
    /// Component that learns it; the first that fits by width when absent.
    pub text_encoder: Option<String>,
    /// Further settings of the loader.
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

/// A service that encodes prompts.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct RemoteTextEncoder {
    /// Its address.
    pub url: String,
}

/// Makes a long video out of several calls. Exactly one of `segments` and `match_audio`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(extend("oneOf" = [{ "required": ["segments"] }, { "required": ["match_audio"] }]))]
pub struct Chain {
    /// Number of calls, from 1 to 1000.
    #[serde(default)]
    #[schemars(schema_with = "values::count_or_text_schema")]
    pub segments: Option<NumberOrText>,
    /// As many calls as the sound needs.
    pub match_audio: Option<bool>,
    /// What a segment takes over from the one before; `last_frame` when absent.
    pub continuity: Option<Continuity>,
    /// Argument that receives it; `image` when absent.
    pub segment_argument: Option<String>,
    /// Frames taken over by `last_segment`; all when absent.
    #[serde(default)]
    #[schemars(schema_with = "values::count_or_text_schema")]
    pub carry_frames: Option<NumberOrText>,
    /// Whether sound is taken over; `true` when absent.
    pub carry_audio: Option<bool>,
    /// Frames dropped at the start of later segments; 1 when absent.
    #[serde(default)]
    #[schemars(schema_with = "values::count_from_zero_or_text_schema")]
    pub trim_frames: Option<NumberOrText>,
    /// Crossfade of the sound in milliseconds; 75 when absent.
    #[serde(default)]
    #[schemars(schema_with = "values::from_zero_or_text_schema")]
    pub crossfade_ms: Option<NumberOrText>,
    /// Frames per second; the argument `frame_rate` when absent.
    #[serde(default)]
    #[schemars(schema_with = "values::positive_or_text_schema")]
    pub fps: Option<NumberOrText>,
    /// Frame counts that the pipeline accepts.
    pub frame_snap: Option<FrameSnap>,
    /// Prompts of the segments; the last one repeats.
    #[schemars(length(min = 1))]
    pub prompts: Option<Vec<String>>,
    /// Writes each segment to a file as it is finished.
    pub save_segments: Option<bool>,
    /// Keeps those files.
    pub keep_segments: Option<bool>,
}

/// What a segment takes over from the one before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Continuity {
    /// Its last frame.
    LastFrame,
    /// All of it, or its last frames.
    LastSegment,
}

/// Frame counts that a pipeline accepts: `modulus * n + remainder`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FrameSnap {
    /// Distance between accepted counts.
    #[schemars(range(min = 1))]
    pub modulus: values::Integer,
    /// What is left over.
    #[schemars(range(min = 0))]
    pub remainder: values::Integer,
    /// Least count.
    #[schemars(range(min = 1))]
    pub min_frames: Option<values::Integer>,
    /// Largest count.
    #[schemars(range(min = 1))]
    pub max_frames: Option<values::Integer>,
}
