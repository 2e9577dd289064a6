//! The diffusion models of dw, on candle: weights, layers, models, samplers, noise and the pipelines
//! made of them.
//!
//! Knows candle, weights, schedulers, seeds and devices; knows no workflow, no step and no command
//! line. A pipeline takes typed arguments and returns artifacts; it never writes a file.

pub mod adapters;
pub mod device;
pub mod error;
pub mod hub;
pub mod models;
pub mod nn;
pub mod pipelines;
pub mod quant;
pub mod registry;
pub mod request;
pub mod rng;
pub mod schedulers;
pub mod text;
pub mod weights;

pub use dw_kernels::{keep_freed_memory, release_freed_memory, start_threads};
pub use error::{Error, Result};
