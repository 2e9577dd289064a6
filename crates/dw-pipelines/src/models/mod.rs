//! The models: each takes a configuration (the fields of its `config.json`) and weights under diffusers' or
//! transformers' names, and turns tensors into tensors.
//!
//! A model knows no file, no workflow and no command line.

mod blocks;
pub mod clip;
pub mod clip_vision;
pub mod config;
pub mod controlnet;
pub mod ip_adapter;
pub mod tiling;
pub mod unet;
pub mod vae;

pub use clip::{ClipTextConfig, ClipTextModel, ClipTextOutput};
pub use clip_vision::{ClipVisionConfig, ClipVisionModel, ClipVisionOutput};
pub use controlnet::{
    ConditionConfig, ControlNetConfig, ControlNetInput, ControlNetModel, ControlNetOutput, ControlNetUnionConfig,
    ControlNetUnionInput, ControlNetUnionModel,
};
pub use ip_adapter::{ImageFeatures, IpAdapter};
pub use tiling::Tiling;
pub use unet::{AddedConditions, ImagePrompts, Unet2DConditionModel, UnetConfig, UnetInput};
pub use vae::{AutoencoderKl, VaeConfig};
