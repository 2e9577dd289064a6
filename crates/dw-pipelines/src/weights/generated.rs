//! Weights that are in no file: made when a model asks for them. A model of any size can be built so without a
//! checkpoint, for measuring and for tests.

use std::{
    collections::HashMap,
    sync::atomic::{AtomicU64, Ordering},
};

use candle_core::{DType, Device, Shape, Tensor};

use super::{Store, Weights};
use crate::Result;

/// Makes the tensor of a (full) name and shape, on any device and of any floating point type.
type Make = dyn Fn(&str, &Shape) -> Result<Tensor> + Send + Sync;

/// A source of tensors, and how much it has made.
pub(super) struct Generated {
    make: Box<Make>,
    bytes: AtomicU64,
}

impl Generated {
    pub(super) fn make(&self, name: &str, shape: &Shape, dtype: DType, device: &Device) -> Result<Tensor> {
        let tensor = (self.make)(name, shape)?.to_dtype(dtype)?.to_device(device)?;
        self.bytes.fetch_add((tensor.elem_count() * dtype.size_in_bytes()) as u64, Ordering::Relaxed);
        Ok(tensor)
    }

    /// Bytes of everything that was made; tensors that were asked for twice count twice.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }
}

impl Weights {
    /// Weights that have every tensor a model asks for: `make` is given its name and shape, and what it returns is
    /// converted to `dtype` and brought to `device`. Nothing is kept, and nothing counts as there before it is asked
    /// for ([`Weights::contains`] is false), so that models build their plainest form.
    pub fn generated(
        make: impl Fn(&str, &Shape) -> Result<Tensor> + Send + Sync + 'static,
        dtype: DType,
        device: &Device,
    ) -> Self {
        let store = Store::new(HashMap::new(), "generated weights".into(), dtype, device.clone());
        let generated = Some(Generated { make: Box::new(make), bytes: AtomicU64::new(0) });
        Self::of(Store { generated, ..store })
    }
}
