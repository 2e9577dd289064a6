//! Runs a plan: gets pipelines from the model cache or loads them, walks the steps, expands
//! iterations, emits events and hands artifacts to the writers of `dw-core`.
//!
//! Knows all three neighbours (the language, the models, the tasks) and no terminal: it prints
//! nothing. [`Engine`] keeps what it loaded, so a second run of the same workflow reads no weights.

mod builtin;
mod catalog;
mod engine;
mod error;
mod fetch;
mod fingerprint;
pub mod host;
mod latent_preview;
mod media;
mod memory;
mod pipelines;
mod placement;
mod preview;
mod quantize;
mod run;
mod surroundings;
pub mod worker;
mod workflows;

pub use builtin::{names as builtin_workflow_names, workflow as builtin_workflow};
pub use dw_pipelines::{Error as QuantizeError, keep_freed_memory, quant::Format, start_threads, weights::Written};
pub use engine::{Engine, EngineConfig, PlannedRun, Previews, RunRequest, Source, Summary, check};
pub use error::EngineError;
pub use latent_preview::LatentPreview;
pub use memory::{LoadedComponent, MemoryReport};
pub use preview::{ModelPreview, Preview, StepPreview};
pub use quantize::{QuantizeRequest, quantize};
pub use surroundings::{DeviceStatus, Surroundings, surroundings};
