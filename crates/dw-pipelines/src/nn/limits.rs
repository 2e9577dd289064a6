//! How much memory layers may use at a time. A call sets it for the thread it runs in, and the layers look it up: models
//! pass nothing on.

use std::cell::Cell;

use candle_core::Tensor;

use crate::Result;

/// Bounds that trade speed for memory and change results by rounding alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// How many bytes of attention scores (f32) exist at a time, where scores exist at all.
    pub score_bytes: usize,
    /// Whether feed-forward layers take the rows of a batch one by one (diffusers `enable_forward_chunking`).
    pub chunks_feed_forward: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self { score_bytes: 256 << 20, chunks_feed_forward: false }
    }
}

impl Limits {
    /// What `enable_attention_slicing` stands for: an eighth of the scores.
    pub const SLICED_SCORE_BYTES: usize = 32 << 20;

    /// Runs `work` under these limits.
    pub fn during<T>(self, work: impl FnOnce() -> T) -> T {
        /// Restores what was before, also when the work panics.
        struct Restore(Limits);
        impl Drop for Restore {
            fn drop(&mut self) {
                LIMITS.set(self.0);
            }
        }
        let _restore = Restore(LIMITS.replace(self));
        work()
    }
}

thread_local! {
    static LIMITS: Cell<Limits> = Cell::new(Limits::default());
}

/// The limits of this thread.
pub(super) fn current() -> Limits {
    LIMITS.get()
}

/// A feed-forward layer on `(batch, rows, features)`: at once, or one row of the batch after the other.
pub(crate) fn feed_forward(x: &Tensor, layer: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
    let batch = x.dim(0)?;
    if !current().chunks_feed_forward || batch < 2 {
        return layer(x);
    }
    let rows = (0..batch).map(|row| layer(&x.narrow(0, row, 1)?)).collect::<Result<Vec<_>>>()?;
    Ok(Tensor::cat(&rows, 0)?)
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    #[test]
    fn limits_hold_for_their_work_alone() {
        let limits = Limits { score_bytes: 1, chunks_feed_forward: true };
        assert_eq!(limits.during(current), limits);
        assert_eq!(current(), Limits::default());
    }

    #[test]
    fn a_chunked_feed_forward_layer_sees_one_row_of_the_batch_at_a_time() {
        let x = Tensor::ones((3, 2, 4), DType::F32, &Device::Cpu).expect("a small tensor");
        let layer = |x: &Tensor| {
            assert_eq!(x.dims(), [1, 2, 4]);
            Ok((x * 2.0)?)
        };
        let limits = Limits { chunks_feed_forward: true, ..Limits::default() };
        let y = limits.during(|| feed_forward(&x, layer)).expect("the shapes fit");
        assert_eq!(y.dims(), x.dims());
        assert_eq!(y.sum_all().and_then(|sum| sum.to_scalar::<f32>()).expect("a number"), 48.0);
    }
}
