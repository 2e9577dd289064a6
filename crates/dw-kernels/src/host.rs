//! Reading and making tensors in host memory.

use std::{marker::PhantomData, ops::Deref};

use candle_core::{DType, Device, Result, Shape, Storage, Tensor};

/// Whether the fast paths take this tensor.
pub(crate) fn is_host_f32(tensor: &Tensor) -> bool {
    tensor.dtype() == DType::F32 && matches!(tensor.device(), Device::Cpu)
}

/// The numbers of an f32 tensor in host memory, while its storage is locked for reading.
pub(crate) struct HostSlice<Guard> {
    storage: Guard,
    start: usize,
    end: usize,
}

/// The numbers of a contiguous f32 tensor in host memory.
pub(crate) fn contiguous(tensor: &Tensor) -> Result<HostSlice<impl Deref<Target = Storage>>> {
    let (storage, layout) = tensor.storage_and_layout();
    let Some((start, end)) = layout.contiguous_offsets() else { candle_core::bail!("tensor is not contiguous") };
    HostSlice::new(storage, start, end)
}

/// Everything from an f32 tensor's first number to its last, for callers that walk the strides themselves.
pub(crate) fn strided(tensor: &Tensor) -> Result<HostSlice<impl Deref<Target = Storage>>> {
    let (storage, layout) = tensor.storage_and_layout();
    let start = layout.start_offset();
    let reach = layout.dims().iter().zip(layout.stride()).map(|(&n, &stride)| n.saturating_sub(1) * stride);
    let end = if layout.shape().elem_count() == 0 { start } else { start + reach.sum::<usize>() + 1 };
    HostSlice::new(storage, start, end)
}

impl<Guard: Deref<Target = Storage>> HostSlice<Guard> {
    fn new(storage: Guard, start: usize, end: usize) -> Result<Self> {
        match &*storage {
            Storage::Cpu(numbers) if numbers.as_slice::<f32>()?.len() >= end => {}
            _ => candle_core::bail!("tensor is not in host memory"),
        }
        Ok(Self { storage, start, end })
    }
}

impl<Guard: Deref<Target = Storage>> Deref for HostSlice<Guard> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &*self.storage {
            Storage::Cpu(numbers) => {
                &numbers.as_slice::<f32>().expect("the type was checked when the slice was made")[self.start..self.end]
            }
            _ => unreachable!("the device was checked when the slice was made"),
        }
    }
}

/// A host tensor of these numbers.
pub(crate) fn tensor(numbers: Vec<f32>, shape: impl Into<Shape>) -> Result<Tensor> {
    Tensor::from_vec(numbers, shape.into(), &Device::Cpu)
}

/// Output that several tasks write different parts of.
pub(crate) struct SharedOutput<'a> {
    start: *mut f32,
    len: usize,
    borrow: PhantomData<&'a mut [f32]>,
}

// SAFETY: parts are only handed out by `part`, whose caller promises that no two of them overlap.
#[allow(unsafe_code)]
unsafe impl Sync for SharedOutput<'_> {}

impl<'a> SharedOutput<'a> {
    /// Borrows the whole output for as long as tasks write to it.
    pub(crate) fn new(output: &'a mut [f32]) -> Self {
        Self { start: output.as_mut_ptr(), len: output.len(), borrow: PhantomData }
    }

    /// `len` numbers from `start` on.
    ///
    /// # Safety
    ///
    /// No two parts that exist at the same time may overlap.
    #[allow(unsafe_code, clippy::mut_from_ref)]
    pub(crate) unsafe fn part(&self, start: usize, len: usize) -> &mut [f32] {
        assert!(start <= self.len && len <= self.len - start, "part lies inside the output");
        // SAFETY: inside the borrowed output, and not overlapping by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }
}
