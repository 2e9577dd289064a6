//! Checkpoints in one file: a whole Stable Diffusion or Flux model, or one component of it, in the layout of its original
//! code (latent-diffusion, sgm, mmdit, Flux), in that of ComfyUI with everything inside, or already under diffusers'
//! names.
//!
//! Owns the mapped file, what is recognised in it and the way of each tensor to its canonical name. Where the file and
//! the configuration beside it come from is the hub's matter.

mod clip;
mod configs;
mod contents;
mod controlnet;
pub(crate) mod flux;
mod index;
pub(crate) mod key_map;
pub(crate) mod sd3;
mod transformer;
mod unet;
mod vae;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use safetensors::Dtype;
use serde_json::Value;

pub(crate) use self::{contents::Part, key_map::Change};
use self::{
    contents::{Contents, Family, Located, Naming},
    controlnet::ControlNetLayout,
    index::{Shapes, Tensors},
    key_map::KeyMap,
    unet::UnetLayout,
    vae::VaeLayout,
};
use super::{
    file::WeightFile,
    gguf::ARCHITECTURE,
    logical::{Logical, TensorFiles},
};
use crate::{
    Error, Result,
    models::{ClipTextConfig, config::without_nulls},
};

/// A checkpoint: mapped into memory, its header checked, its components found.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    files: TensorFiles<'static>,
    shapes: Shapes,
    contents: Contents,
}

impl Checkpoint {
    /// Maps a file and recognises what it holds. Fails for a file that is damaged, or is something else than a Stable
    /// Diffusion model or a component of one.
    pub fn open(path: &Path) -> Result<Self> {
        let files = TensorFiles::open(&[path.to_owned()])?;
        let shapes: Shapes =
            files.tensors().iter().map(|(name, tensor)| (name.clone(), tensor.shape().to_vec())).collect();
        let contents = Contents::recognise(&shapes).map_err(|reason| {
            let says = files.files().iter().find_map(|file| file.metadata().get(ARCHITECTURE));
            let says = says.map_or(String::new(), |says| format!("is a GGUF file of the architecture `{says}` and "));
            Error::BadFile { path: path.to_owned(), reason: says + &reason }
        })?;
        Ok(Self { path: path.to_owned(), files, shapes, contents })
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

    /// The component that removes the noise in models of its family.
    pub(crate) fn denoiser(&self) -> Part {
        self.contents.family.denoiser()
    }

    /// The class of that component.
    pub(crate) fn denoiser_class(&self) -> &'static str {
        self.contents.family.denoiser_class()
    }

    /// The components that a pipeline of its family has and the file has not.
    pub(crate) fn missing(&self) -> Vec<&'static str> {
        let parts: &[Part] = match self.contents.family {
            Family::StableDiffusion1 | Family::StableDiffusion2 => &[Part::Unet, Part::Vae, Part::TextEncoder],
            Family::Xl => &[Part::Unet, Part::Vae, Part::TextEncoder, Part::TextEncoder2],
            Family::XlRefiner => &[Part::Unet, Part::Vae, Part::TextEncoder2],
            Family::Flux => &[Part::Transformer, Part::Vae, Part::TextEncoder, Part::TextEncoder2],
            Family::StableDiffusion3 => {
                &[Part::Transformer, Part::Vae, Part::TextEncoder, Part::TextEncoder2, Part::TextEncoder3]
            }
        };
        parts.iter().filter(|part| self.contents.find(**part).is_none()).map(|part| part.name()).collect()
    }

    /// Whether the tokenizer in `folder` is that of a T5.
    pub(crate) fn has_t5_tokenizer(&self, folder: &str) -> bool {
        configs::has_t5_tokenizer(self.contents.family, folder)
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

    /// The component `name` with its configuration: `config`, or what shapes say. None when the file does not hold it.
    pub fn component(self: &Arc<Self>, name: &str, config: Option<Value>) -> Result<Option<(CheckpointPart, Value)>> {
        let Some(part) = Part::named(name) else { return Ok(None) };
        let config = if config.is_some() { config } else { self.component_config(part, None)? };
        let Some(config) = config else { return Ok(None) };
        Ok(CheckpointPart::new(self, part, config.clone())?.map(|found| (found, config)))
    }

    /// The component that is meant where none is named: what removes the noise, or the only one.
    pub fn main_component(&self) -> Option<&'static str> {
        let mut names = self.components();
        let denoiser = self.denoiser().name();
        match (names.next(), names.next()) {
            (only, None) => only,
            _ => self.components().find(|name| *name == denoiser),
        }
    }

    fn bad(&self, reason: String) -> Error {
        Error::BadFile { path: self.path.clone(), reason }
    }

    fn incomplete(&self, part: Part) -> Error {
        self.bad(format!("tensors of its `{}` are missing; fetch the file again", part.name()))
    }

    /// How many steps the model was trained for, where the file says so.
    fn global_step(&self) -> Option<i64> {
        let (dtype, bytes) = self.files.raw(self.files.tensors().get("global_step")?)?;
        let bytes: [u8; 8] = bytes.try_into().ok().filter(|_| dtype == Dtype::I64)?;
        Some(i64::from_le_bytes(bytes))
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
    pub(super) tensor: &'a Logical,
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
            (Naming::Original, Part::Transformer) => {
                let tensors = Tensors::below(&checkpoint.shapes, located.prefix);
                transformer::key_map(&tensors, checkpoint.contents.family).ok_or_else(|| checkpoint.incomplete(part))?
            }
            (Naming::Original, Part::TextEncoder | Part::TextEncoder2 | Part::TextEncoder3) => {
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

    /// Whether it is a GGUF file.
    pub(crate) fn is_gguf(&self) -> bool {
        self.files().files().iter().any(WeightFile::is_gguf)
    }

    /// How many bytes its tensors have in the file.
    pub fn bytes(&self) -> u64 {
        let size = |name: &str| self.files().tensors().get(name).map_or(0, Logical::bytes);
        self.tensors().names().filter(|(_, below)| !self.is_leftover(below)).map(|(full, _)| size(full)).sum()
    }

    /// The tensors of the whole checkpoint.
    pub(super) fn files(&self) -> &TensorFiles<'static> {
        &self.checkpoint.files
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
                let missing = || self.checkpoint.bad(format!("tensor `{name}` is missing"));
                let tensor = self.files().tensors().get(name).ok_or_else(missing)?;
                let targets = self.map.canonical(below);
                for target in &targets {
                    self.check(name, tensor, target)?;
                }
                Ok(Reading { name, tensor, targets })
            })
            .collect::<Result<Vec<_>>>()?;
        readings.sort_by_key(|reading| reading.tensor.position());
        Ok(readings)
    }

    fn check(&self, name: &str, tensor: &Logical, target: &key_map::Target) -> Result<()> {
        if target.change.shape(tensor.shape()).is_some() {
            return Ok(());
        }
        Err(Error::BadFile {
            path: self.path().to_owned(),
            reason: format!(
                "tensor `{name}` has shape {:?}, which cannot become `{}`; the file is damaged or not of this family",
                tensor.shape(),
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
        // The files of ComfyUI have CLIP's projection, which Flux does not use.
        let is_flux = self.checkpoint.contents.family == Family::Flux;
        let is_projection = is_flux && self.part == Part::TextEncoder && below == "text_projection.weight";
        contents::is_leftover(below) || is_projection || (is_second_last(self.located) && is_behind())
    }
}

/// Stable Diffusion 2 reads the last layer but one of its encoder, without projection.
fn is_second_last(located: Located) -> bool {
    located.prefix == "cond_stage_model.model."
}

#[cfg(test)]
mod dit_shapes;
#[cfg(test)]
mod ldm_shapes;
#[cfg(test)]
mod tests;
