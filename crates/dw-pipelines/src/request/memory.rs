//! What a step says about memory: where components rest and when they move, tiles, slices, types.

use std::collections::BTreeMap;

use candle_core::{DType, Device};

pub use crate::weights::Paging;

/// What a step says about memory.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MemoryRequest {
    /// What is not on the device all the time; none to keep everything there.
    pub offload: Option<Offload>,
    /// Components that stay on the device whatever [`Self::offload`] says.
    pub resident: Vec<String>,
    /// What is said of single components, by name.
    pub components: BTreeMap<String, ComponentMemory>,
    /// Works the autoencoder in tiles.
    pub vae_tiling: Option<TilingRequest>,
    /// Bounds the scores of attention more tightly.
    pub slices_attention: bool,
    /// Computes feed-forward layers row by row of the batch.
    pub chunks_feed_forward: bool,
    /// Bytes of the device that `auto` leaves free.
    pub reserve: u64,
    /// Loads although the fit plan says that there is too little memory.
    pub ignores_fit: bool,
    /// What the call will be, for the fit plan.
    pub call: CallSize,
}

/// What is not on the device all the time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offload {
    /// What the fit plan finds necessary.
    Auto,
    /// Every component, in this way.
    Paged(Paging),
}

/// What is said of one component.
#[derive(Clone, Debug, Default)]
pub struct ComponentMemory {
    /// Where it runs, when that is not where the pipeline does.
    pub device: Option<Device>,
    /// Its type, when that is not the pipeline's.
    pub dtype: Option<DType>,
    /// When its layers are on the device, when the pipeline's rule does not hold for it.
    pub paging: Option<Paging>,
}

impl PartialEq for ComponentMemory {
    fn eq(&self, other: &Self) -> bool {
        let device = |memory: &Self| memory.device.as_ref().map(crate::device::name);
        (device(self), self.dtype, self.paging) == (device(other), other.dtype, other.paging)
    }
}

/// Tiles of an autoencoder; what is not said has the reference's defaults.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TilingRequest {
    /// Height and width of a tile in pixels; the training size by default.
    pub sample: Option<usize>,
    /// Which part of a tile overlaps the next one; a quarter by default.
    pub overlap: Option<f64>,
}

/// How large a call will be, as far as it is known before it is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CallSize {
    /// In pixels; the model's own when not known.
    pub height: Option<usize>,
    /// In pixels; the model's own when not known.
    pub width: Option<usize>,
    /// Pictures that are made at once.
    pub pictures: usize,
    /// Whether each step also predicts without the prompt.
    pub is_guided: bool,
}

impl Default for CallSize {
    fn default() -> Self {
        Self { height: None, width: None, pictures: 1, is_guided: true }
    }
}

impl MemoryRequest {
    /// When the layers of the component `name` come and go under `offload`; none when they stay. Of several ControlNets
    /// all go by `controlnet`.
    pub(crate) fn paging(&self, name: &str, offload: Option<Paging>) -> Option<Paging> {
        let own = self.components.get(name).and_then(|memory| memory.paging);
        own.or_else(|| offload.filter(|_| !self.resident.iter().any(|resident| resident == name)))
    }

    /// The type of the component `name`, when the step gives it one.
    pub(crate) fn dtype(&self, name: &str) -> Option<DType> {
        self.components.get(name).and_then(|memory| memory.dtype)
    }

    /// Where the component `name` runs.
    pub(crate) fn device<'a>(&'a self, name: &str, pipeline: &'a Device) -> &'a Device {
        self.components.get(name).and_then(|memory| memory.device.as_ref()).unwrap_or(pipeline)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_of_a_component_goes_before_what_is_said_of_all() {
        let on_demand = ComponentMemory { paging: Some(Paging::Whole), ..ComponentMemory::default() };
        let memory = MemoryRequest {
            resident: vec!["vae".into(), "text_encoder".into()],
            components: BTreeMap::from([("text_encoder".into(), on_demand)]),
            ..MemoryRequest::default()
        };
        let paging = |name| memory.paging(name, Some(Paging::Layers));
        assert_eq!(paging("unet"), Some(Paging::Layers));
        assert_eq!(paging("vae"), None);
        assert_eq!(paging("text_encoder"), Some(Paging::Whole));
        assert_eq!(memory.paging("unet", None), None);
    }
}
