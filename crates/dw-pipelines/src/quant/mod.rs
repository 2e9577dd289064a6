//! Weights that are stored in fewer bits than they are computed in: GGML blocks, bitsandbytes' 4-bit codes, 8-bit
//! integers with a scale for each row, 8-bit floating point.
//!
//! Owns the formats, the way there and back, and the product with activations, which never makes the whole matrix
//! dense on the CPU. Which file holds what is known to [`crate::weights`]; a layer asks for a [`Weight`] and does not
//! see which kind it is.

mod code_book;
mod coded;
mod format;
pub(crate) mod ggml;
mod matrix;
mod scheme;
mod skip;
mod weight;

pub use format::Format;
pub use matrix::Quantized;
pub use scheme::{QuantizationRequest, Scheme};
pub use skip::Skip;
pub use weight::Weight;

pub(crate) use code_book::{EightBit, FOUR_BIT_BLOCK, FourBit};
pub(crate) use coded::Coded;

#[cfg(test)]
mod tests;
