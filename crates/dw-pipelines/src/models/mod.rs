//! The models: each takes a configuration (the fields of its `config.json`) and weights under diffusers' or
//! transformers' names, and turns tensors into tensors.
//!
//! A model knows no file, no workflow and no command line.

mod blocks;
pub mod clip;
pub mod config;
pub mod unet;
pub mod vae;

pub use clip::{ClipTextConfig, ClipTextModel, ClipTextOutput};
pub use unet::{AddedConditions, Unet2DConditionModel, UnetConfig, UnetInput};
pub use vae::{AutoencoderKl, VaeConfig};
