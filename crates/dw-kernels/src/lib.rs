//! Fast operations that candle lacks on the CPU: convolution, group normalisation, attention, the elementwise
//! functions of diffusion models and the merging of thin products, for tensors in host memory.
//!
//! Every function takes any tensor. Those it has no fast path for (another device, another type) go
//! through candle's own operations, so callers need not choose. Which instructions are used is decided
//! when the program runs; work is cut into pieces by the shapes alone, so a result does not depend on the
//! number of threads. Knows tensors only: no model, no weight file, no layer.

mod activation;
mod allocator;
mod attention;
mod conv;
mod decode;
mod host;
mod low_rank;
mod matrix;
mod norm;
mod simd;
mod softmax;
#[cfg(test)]
mod testing;
mod threads;

pub use activation::{gelu_erf, gelu_tanh, silu};
pub use allocator::{keep_freed_memory, release_freed_memory};
pub use attention::attention;
pub use conv::conv2d;
pub use decode::tensor_from_bytes;
pub use low_rank::{ThinProduct, add_products};
pub use norm::group_norm;
pub use softmax::softmax;
pub use threads::start_threads;
