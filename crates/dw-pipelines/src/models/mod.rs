//! The models: each takes a configuration (the fields of its `config.json`) and weights under diffusers' or
//! transformers' names, and turns tensors into tensors.
//!
//! A model knows no file, no workflow and no command line.

pub mod autoencoder;
mod blocks;
pub mod clip;
pub mod clip_vision;
pub mod config;
pub mod controlnet;
pub mod flux;
pub mod ip_adapter;
mod mmdit;
pub mod reuse;
pub mod sd3;
pub mod sd3_controlnet;
pub mod sd3_ip_adapter;
pub mod siglip;
pub mod t5;
pub mod tiling;
pub mod unet;
pub mod vae;
pub mod vae_tiny;

pub use autoencoder::{Autoencoder, Encoded};
pub use clip::{ClipTextConfig, ClipTextModel, ClipTextOutput};
pub use clip_vision::{ClipVisionConfig, ClipVisionModel, ClipVisionOutput};
pub use controlnet::{
    ConditionConfig, ControlNetConfig, ControlNetInput, ControlNetModel, ControlNetOutput, ControlNetUnionConfig,
    ControlNetUnionInput, ControlNetUnionModel,
};
pub use flux::{
    FluxConfig, FluxInput, FluxResiduals, FluxTransformer2DModel,
    controlnet::{FluxControlNetConfig, FluxControlNetInput, FluxControlNetModel},
    ip_adapter::{FluxImagePrompts, FluxIpAdapter},
    redux::{ReduxConfig, ReduxImageEncoder},
};
pub use ip_adapter::{ImageFeatures, IpAdapter};
pub use reuse::{Memory, Reuse};
pub use sd3::{Sd3Config, Sd3Input, Sd3Transformer2DModel};
pub use sd3_controlnet::{Sd3ControlNetConfig, Sd3ControlNetInput, Sd3ControlNetModel};
pub use sd3_ip_adapter::{Sd3ImagePrompt, Sd3IpAdapter};
pub use siglip::{SiglipVisionConfig, SiglipVisionModel};
pub use t5::{T5Config, T5EncoderModel};
pub use tiling::Tiling;
pub use unet::{AddedConditions, ImagePrompts, Unet2DConditionModel, UnetConfig, UnetInput};
pub use vae::{AutoencoderKl, VaeConfig};
pub use vae_tiny::{AutoencoderTiny, TinyVaeConfig};
