//! `configuration` of a pipeline: placement, memory, caches. A closed object: unknown keys are errors.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{
    pipeline::QuantizationConfig,
    values::{self, Integer, NumberOrText},
};

/// Which class to load and how to place and run it.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PipelineConfiguration {
    /// Class of the pipeline, `StableDiffusionXLPipeline` for example.
    pub component_type: String,
    /// Keeps parts in host memory while they are not needed.
    pub offload: Option<Offload>,
    /// Components that stay on the device under `offload: sequential`.
    pub exclude_from_cpu_offload: Option<Vec<String>>,
    /// Moves groups of layers to the device as they are needed.
    pub group_offload: Option<GroupOffload>,
    /// Device of this step, instead of the run's.
    pub device: Option<String>,
    /// Runs without a seeded generator.
    pub no_generator: Option<bool>,
    /// Computes attention in slices, which needs less memory.
    pub enable_attention_slicing: Option<bool>,
    /// Never computes attention in slices.
    pub disable_attention_slicing: Option<bool>,
    /// Attention implementation used during calls.
    pub attention_backend: Option<String>,
    /// Understands `(word:1.3)` in prompts.
    pub prompt_weighting: Option<bool>,
    /// Python modules loaded first; this program has none and ignores them.
    pub pre_load_modules: Option<Vec<String>>,
    /// Which components a modular pipeline loads.
    pub load_components: Option<LoadComponents>,
    /// Settings of a modular pipeline's blocks.
    #[serde(default)]
    #[schemars(schema_with = "values::block_configs_schema")]
    pub configs: Option<Map<String, Value>>,
    /// Placement of single components, by name or dotted path.
    pub components: Option<BTreeMap<String, ComponentPlacement>>,
    /// Leaves components where loading put them.
    pub preserve_device_placement: Option<bool>,
    /// A shared owner of component placement.
    pub components_manager: Option<ComponentsManager>,
    /// Components whose quantized matrix products are optimised.
    pub sdnq_optimize: Option<Vec<String>>,
    /// Reuses results of transformer blocks between denoising steps.
    pub cache: Option<Cache>,
    /// Skips denoising steps whose input hardly changes.
    pub teacache: Option<TeaCache>,
    /// Settings of the autoencoder.
    pub vae: Option<VaeSettings>,
    /// Settings of the UNet.
    pub unet: Option<ModuleSettings>,
    /// Settings of the transformer.
    pub transformer: Option<ModuleSettings>,
    /// Settings of the text encoder.
    pub text_encoder: Option<ModuleSettings>,
    /// Components that later steps may reuse.
    pub shared_components: Option<Vec<String>>,
    /// Components taken from earlier steps that shared them.
    pub reused_components: Option<Vec<String>>,
    /// Stores weights in a smaller type than they are computed in.
    pub enable_layerwise_casting: Option<LayerwiseCasting>,
    /// Calls the pipeline's inversion instead.
    pub inversion: Option<bool>,
    /// Calls the model's text generation instead.
    pub generate: Option<bool>,
}

/// What is kept in host memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Offload {
    /// Whole components that are not running.
    Model,
    /// Single layers.
    Sequential,
    /// Groups of layers.
    Group,
    /// Whatever the device's memory asks for.
    Auto,
}

/// Moves groups of layers to the device as they are needed.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct GroupOffload {
    /// `block_level` or `leaf_level`.
    pub offload_type: String,
    /// Where layers run; the pipeline's device when absent.
    pub onload_device: Option<String>,
    /// Where layers rest; `cpu` when absent.
    pub offload_device: Option<String>,
    /// Further settings.
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

/// Stores weights in a smaller type than they are computed in.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct LayerwiseCasting {
    /// Type that weights are stored in.
    pub storage_dtype: String,
    /// Type that weights are computed in.
    pub compute_dtype: String,
}

/// Which components a modular pipeline loads.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct LoadComponents {
    /// Their names; all when absent.
    pub names: Option<Vec<String>>,
    /// Type of their weights.
    pub dtype: Option<String>,
    /// Quantization by component.
    pub quantization_config: Option<BTreeMap<String, QuantizationConfig>>,
    /// Further settings.
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

/// Placement and changes of one component.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct ComponentPlacement {
    /// Moves groups of its layers to the device as they are needed.
    pub group_offload: Option<GroupOffload>,
    /// Where it lives.
    pub device: Option<String>,
    /// Whether it stays on the device; `resident` when absent.
    pub residency: Option<Residency>,
    /// Works in tiles, which needs less memory; an object sets their sizes.
    pub enable_tiling: Option<Tiling>,
    /// Attention implementation of this component.
    pub attention_backend: Option<String>,
    /// Number of layers to keep, by dotted path of the layer list.
    #[serde(default)]
    #[schemars(schema_with = "values::layer_counts_schema")]
    pub truncate_layers: Option<BTreeMap<String, Integer>>,
    /// Dotted paths of modules to leave out.
    pub remove_modules: Option<Vec<String>>,
    /// Compilation of the component.
    pub compile: Option<CompileOptions>,
}

/// Whether a component stays on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Residency {
    /// It stays.
    Resident,
    /// It comes for each call and goes afterwards.
    OnDemand,
}

/// Whether a component works in tiles.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
#[schemars(inline)]
pub enum Tiling {
    /// On or off.
    Switch(bool),
    /// On, with these sizes.
    Settings(Map<String, Value>),
}

/// Compilation of a component.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct CompileOptions {
    /// Compiler mode.
    pub mode: Option<String>,
    /// Refuses graph breaks.
    pub fullgraph: Option<bool>,
    /// Keeps shapes open.
    pub dynamic: Option<bool>,
    /// Compiles the repeated blocks only.
    pub repeated_blocks: Option<bool>,
}

/// A shared owner of component placement.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct ComponentsManager {
    /// Moves components between device and host by itself.
    pub enable_auto_cpu_offload: Option<bool>,
    /// Device memory that is left free, `3GB` when absent.
    pub memory_reserve_margin: Option<String>,
}

/// Reuses results of transformer blocks between denoising steps.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct Cache {
    /// Which method.
    #[serde(rename = "type")]
    pub kind: CacheType,
    /// How much may change before a block is computed again (`first_block`, `mag`).
    pub threshold: Option<NumberOrText>,
    /// Number of denoising steps (`mag`).
    pub num_inference_steps: Option<Integer>,
    /// Most steps skipped in a row (`mag`).
    pub max_skip_steps: Option<Integer>,
    /// Share of steps at the start that are never skipped (`mag`).
    pub retention_ratio: Option<f64>,
    /// Ratios by step, or the name of a preset (`mag`).
    pub mag_ratios: Option<MagRatios>,
    /// Measures the ratios instead of using them (`mag`).
    pub calibrate: Option<bool>,
    /// Steps between full computations (`taylorseer`).
    pub cache_interval: Option<Integer>,
    /// Order of the extrapolation (`taylorseer`).
    pub max_order: Option<Integer>,
}

/// A block caching method.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum CacheType {
    /// Skips when the first block's residual hardly changes.
    FirstBlock,
    /// Skips attention of every other step.
    Faster,
    /// Skips by the magnitude of residuals.
    Mag,
    /// Extrapolates features.
    #[serde(rename = "taylorseer")]
    TaylorSeer,
    /// Keeps keys and values of the text.
    TextKv,
}

/// Magnitude ratios: a preset or a list.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
#[schemars(inline)]
pub enum MagRatios {
    /// Name of a preset.
    Preset(String),
    /// One ratio for each step.
    Ratios(Vec<f64>),
}

/// Skips denoising steps whose input hardly changes.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct TeaCache {
    /// How much may change before a step is computed.
    pub rel_l1_thresh: Option<f64>,
    /// Polynomial, highest degree first.
    #[schemars(length(min = 5, max = 5))]
    pub coefficients: Option<Vec<f64>>,
    /// Name of a known model.
    pub variant: Option<String>,
}

/// Settings of the autoencoder.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct VaeSettings {
    /// Decodes pictures one by one.
    pub enable_slicing: Option<bool>,
    /// Works in tiles.
    pub enable_tiling: Option<bool>,
    /// Memory layout with channels last.
    pub channels_last: Option<bool>,
    /// Type that the component is converted to.
    pub torch_dtype: Option<String>,
}

/// Settings of another component.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct ModuleSettings {
    /// Computes feed-forward layers in pieces.
    pub enable_forward_chunking: Option<bool>,
    /// Memory layout with channels last.
    pub channels_last: Option<bool>,
    /// Type that the component is converted to.
    pub torch_dtype: Option<String>,
    /// Class of the attention processor.
    pub attn_processor_type: Option<String>,
}
