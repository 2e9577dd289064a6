//! The layers every model shares: linear, convolution, norms, activations, attention, embeddings, resampling.
//!
//! Owns the numerics of one layer (what is computed in f32 although the model is not) and the choice of
//! the fastest implementation for a device. Leaves how layers are put together to the models.

mod activation;
mod attention;
mod conv;
mod embedding;
mod limits;
mod linear;
mod norm;
mod resample;
mod rotary;

pub use activation::{Activation, geglu};
pub use attention::{AttentionOptions, Mask, attention};
pub use conv::{Conv2d, Conv2dOptions};
pub use embedding::{Embedding, TimestepEmbedding, Timesteps};
pub use limits::Limits;
pub(crate) use limits::feed_forward;
pub use linear::Linear;
pub use norm::{GroupNorm, LayerNorm, RmsNorm};
pub use resample::{upsample_nearest, upsample_nearest_2x};
pub use rotary::Rotary;

use candle_core::{DType, Device};

/// The type a computation runs in where the reference does not trust 16 bit: f32 for the 16-bit types, the type
/// itself otherwise.
fn wide(dtype: DType) -> DType {
    match dtype {
        DType::F16 | DType::BF16 => DType::F32,
        other => other,
    }
}

/// The type convolutions and attention run in: the CPU gains nothing from 16 bit and lacks some operations in it.
fn compute_dtype(dtype: DType, device: &Device) -> DType {
    if device.is_cpu() { wide(dtype) } else { dtype }
}
