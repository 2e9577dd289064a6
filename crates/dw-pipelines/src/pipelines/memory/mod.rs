//! Memory of a pipeline: what it will need, what it may use, what it did use.
//!
//! Owns the fit plan and the policy that follows from it. How layers come and go is the matter of
//! [`crate::weights::paging`], how a device tells its memory that of [`crate::device`].

mod gauge;
mod needs;
mod plan;

use std::sync::{Arc, Mutex, PoisonError};

pub use self::gauge::Gauge;
pub(crate) use self::{
    needs::{Call, Need, stage_of},
    plan::{Decision, base_name, decide, refuse_if_too_large},
};
use crate::{
    Result,
    models::{Autoencoder, Tiling},
    nn::Limits,
    request::{MemoryRequest, TilingRequest},
    weights::Occupancy,
};

/// What a loaded pipeline knows about memory.
#[derive(Clone)]
pub(crate) struct Memory {
    pub(crate) occupancy: Arc<Occupancy>,
    pub(crate) limits: Limits,
    tiling: Option<TilingRequest>,
    /// What is to be said after the call that found it out.
    notes: Arc<Mutex<Vec<String>>>,
}

impl Memory {
    pub(crate) fn new(request: &MemoryRequest, tiling: Option<TilingRequest>, occupancy: Arc<Occupancy>) -> Self {
        let usual = Limits::default();
        let score_bytes = if request.slices_attention { Limits::SLICED_SCORE_BYTES } else { usual.score_bytes };
        let limits = Limits { score_bytes, chunks_feed_forward: request.chunks_feed_forward };
        Self { occupancy, limits, tiling, notes: Arc::default() }
    }

    /// The tiles in which `vae` works; none when it works in one piece.
    pub(crate) fn tiling(&self, vae: &Autoencoder) -> Result<Option<Tiling>> {
        self.tiling.map(|TilingRequest { sample, overlap }| vae.tiling(sample, overlap)).transpose()
    }

    /// Has something said at the end of the call.
    pub(crate) fn note(&self, message: String) {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner).push(message);
    }

    /// What is to be said.
    pub(crate) fn take_notes(&self) -> Vec<String> {
        std::mem::take(&mut *self.notes.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
