//! Checkpoints in one file: a whole Stable Diffusion model, or one component of it, in the layout of its original
//! code (latent-diffusion, sgm) or already under diffusers' names.
//!
//! Owns the mapped file, what is recognised in it and the way of each tensor to its canonical name. Where the file and
//! the configuration beside it come from is the hub's matter.

mod clip;
mod configs;
mod contents;
mod controlnet;
mod index;
mod key_map;
mod unet;
mod vae;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use memmap2::Mmap;
use safetensors::{Dtype, tensor::Metadata, tensor::TensorView};
use serde_json::Value;

pub(crate) use self::contents::Part;
use self::{
    contents::{Contents, Located, Naming},
    controlnet::ControlNetLayout,
    index::{Shapes, Tensors},
    key_map::KeyMap,
    unet::UnetLayout,
    vae::VaeLayout,
};
use super::reader;
use crate::{
    Error, Result,
    models::{ClipTextConfig, config::without_nulls},
};

/// A checkpoint: mapped into memory, its header checked, its components found.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    bytes: Mmap,
    /// Where the data of the tensors begin.
    data_start: usize,
    metadata: Metadata,
    shapes: Shapes,
    contents: Contents,
}

impl Checkpoint {
    /// Maps a file and recognises what it holds. Fails for a file that is damaged, or is something else than a Stable
    /// Diffusion model or a component of one.
    pub fn open(path: &Path) -> Result<Self> {
        let bytes = reader::map(path)?;
        let (data_start, metadata) = reader::header(&bytes, path)?;
        let shapes: Shapes = metadata.tensors().into_iter().map(|(name, info)| (name, info.shape.clone())).collect();
        let contents =
            Contents::recognise(&shapes).map_err(|reason| Error::BadFile { path: path.to_owned(), reason })?;
        Ok(Self { path: path.to_owned(), bytes, data_start, metadata, shapes, contents })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The components it holds, as the diffusers layout calls their folders (`unet`, `text_encoder_2`).
    pub fn components(&self) -> impl Iterator<Item = &'static str> {
        self.contents.names()
    }

    /// Names of tensors that belong to no component and are not known to be left over from training.
    pub fn strays(&self) -> Vec<&str> {
        self.contents.strays(&self.shapes)
    }

    /// Whether the file leaves open if its model predicts noise or velocity (Stable Diffusion 2).
    pub(crate) fn is_ambiguous(&self) -> bool {
        configs::is_ambiguous(&self.contents)
    }

    /// The `model_index.json` of its pipeline.
    pub(crate) fn model_index(&self) -> Result<Value> {
        configs::model_index(&self.contents, &self.shapes).map_err(|reason| self.bad(reason))
    }

    /// The `scheduler_config.json` of its pipeline.
    pub(crate) fn scheduler_config(&self) -> Value {
        configs::scheduler(&self.contents, &self.shapes, self.global_step())
    }

    /// The `tokenizer_config.json` of the tokenizer in `folder`.
    pub(crate) fn tokenizer_config(&self, folder: &str) -> Value {
        configs::tokenizer(self.contents.family, folder)
    }

    /// The `config.json` of a component, none when the file does not hold it. `kin` is the configuration of the
    /// component that it replaces, for what shapes do not say.
    pub(crate) fn component_config(&self, part: Part, kin: Option<Value>) -> Result<Option<Value>> {
        let Some(located) = self.contents.find(part) else { return Ok(None) };
        let config = configs::component(part, located, &self.contents, &self.shapes, kin);
        config.map(Some).map_err(|reason| self.bad(reason))
    }

    fn bad(&self, reason: String) -> Error {
        Error::BadFile { path: self.path.clone(), reason }
    }

    /// How many steps the model was trained for, where the file says so.
    fn global_step(&self) -> Option<i64> {
        let view = self.view("global_step").ok()?;
        let bytes: [u8; 8] = view.data().try_into().ok().filter(|_| view.dtype() == Dtype::I64)?;
        Some(i64::from_le_bytes(bytes))
    }

    fn view(&self, name: &str) -> Result<TensorView<'_>> {
        let info = self.metadata.info(name).ok_or_else(|| self.bad(format!("tensor `{name}` is missing")))?;
        let (start, end) = info.data_offsets;
        let data = self.bytes.get(self.data_start + start..self.data_start + end);
        let data = data
            .ok_or_else(|| self.bad(format!("the data of tensor `{name}` lie outside of the file; fetch it again")))?;
        TensorView::new(info.dtype, info.shape.clone(), data)
            .map_err(|error| self.bad(format!("tensor `{name}` cannot be read ({error}); fetch the file again")))
    }
}

/// One component of a checkpoint with the map of its names; cheap to clone.
#[derive(Clone, Debug)]
pub struct CheckpointPart {
    checkpoint: Arc<Checkpoint>,
    part: Part,
    located: Located,
    map: Arc<KeyMap>,
    /// Layers of a text encoder.
    layers: usize,
}

/// A tensor of the file and what becomes of it.
pub(super) struct Reading<'a> {
    pub(super) name: &'a str,
    pub(super) view: TensorView<'a>,
    pub(super) targets: Vec<key_map::Target>,
}

impl CheckpointPart {
    /// The component `part` as its `config.json` describes it; none when the file does not hold it.
    pub(crate) fn new(checkpoint: &Arc<Checkpoint>, part: Part, config: Value) -> Result<Option<Self>> {
        let Some(located) = checkpoint.contents.find(part) else { return Ok(None) };
        let bad = |error: serde_json::Error| {
            Error::Unsupported(format!(
                "the configuration of `{}` for `{}` cannot be used: {error}; correct `config`",
                part.name(),
                checkpoint.path.display()
            ))
        };
        let config = without_nulls(config);
        let mut layers = 0;
        let map = match (located.naming, part) {
            (Naming::Canonical, _) => KeyMap::identity(),
            (Naming::Original, Part::Unet) => {
                UnetLayout::of_config(&serde_json::from_value(config).map_err(bad)?)?.key_map()
            }
            (Naming::Original, Part::ControlNet) => {
                ControlNetLayout::of_config(&serde_json::from_value(config).map_err(bad)?)?.key_map()
            }
            (Naming::Original, Part::Vae) => {
                VaeLayout::of_config(&serde_json::from_value(config).map_err(bad)?).key_map()
            }
            (Naming::Original, Part::TextEncoder | Part::TextEncoder2) => {
                let config: ClipTextConfig = serde_json::from_value(config).map_err(bad)?;
                layers = config.num_hidden_layers;
                clip::open_clip_key_map(layers, !is_second_last(located))
            }
        };
        Ok(Some(Self { checkpoint: Arc::clone(checkpoint), part, located, map: Arc::new(map), layers }))
    }

    /// The file.
    pub fn path(&self) -> &Path {
        self.checkpoint.path()
    }

    /// The component's name (`unet`).
    pub fn name(&self) -> &'static str {
        self.part.name()
    }

    /// How many bytes its tensors have in the file.
    pub fn bytes(&self) -> u64 {
        let size = |name: &str| {
            self.checkpoint.metadata.info(name).map_or(0, |info| info.data_offsets.1 - info.data_offsets.0)
        };
        self.tensors().names().filter(|(_, below)| !self.is_leftover(below)).map(|(full, _)| size(full) as u64).sum()
    }

    /// What a canonical name is called in the file.
    pub(super) fn original(&self, canonical: &str) -> Option<String> {
        Some(format!("{}{}", self.located.prefix, self.map.original(canonical)?))
    }

    /// Its tensors in the order of the file. Those without a place in the model have no target.
    pub(super) fn readings(&self) -> Result<Vec<Reading<'_>>> {
        let wanted = self.tensors().names().filter(|(_, below)| !self.is_leftover(below));
        let mut readings = wanted
            .map(|(name, below)| {
                let (view, targets) = (self.checkpoint.view(name)?, self.map.canonical(below));
                for target in &targets {
                    self.check(name, &view, target)?;
                }
                Ok(Reading { name, view, targets })
            })
            .collect::<Result<Vec<_>>>()?;
        readings.sort_by_key(|reading| reading.view.data().as_ptr());
        Ok(readings)
    }

    fn check(&self, name: &str, view: &TensorView<'_>, target: &key_map::Target) -> Result<()> {
        if target.change.shape(view.shape()).is_some() {
            return Ok(());
        }
        Err(Error::BadFile {
            path: self.path().to_owned(),
            reason: format!(
                "tensor `{name}` has shape {:?}, which cannot become `{}`; the file is damaged or not of this family",
                view.shape(),
                target.name
            ),
        })
    }

    fn tensors(&self) -> Tensors<'_> {
        Tensors::below(&self.checkpoint.shapes, self.located.prefix)
    }

    /// Whether a tensor below the prefix is known to play no part: left over from training or, in Stable Diffusion 2,
    /// behind the layer that the pipeline reads.
    fn is_leftover(&self, below: &str) -> bool {
        let is_behind = || {
            let last = format!("transformer.resblocks.{}.", self.layers);
            self.layers > 0 && (below == "text_projection" || below.starts_with(&last))
        };
        contents::is_leftover(below) || (is_second_last(self.located) && is_behind())
    }
}

/// Stable Diffusion 2 reads the last layer but one of its encoder, without projection.
fn is_second_last(located: Located) -> bool {
    located.prefix == "cond_stage_model.model."
}

#[cfg(test)]
mod ldm_shapes;
#[cfg(test)]
mod tests;
