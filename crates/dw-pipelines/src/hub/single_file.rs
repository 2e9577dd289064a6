//! A checkpoint in a single file, made to look like a folder in the diffusers layout: the weights come from the file,
//! everything else from `config` or, without one, from what the file's tensors say.
//!
//! Owns that answer. What is in the file is read by [`crate::weights::single_file`]. CLIP's vocabulary is in no
//! checkpoint: without `config` it is taken from a model in the hub's cache.

use std::{
    borrow::Cow,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

use dw_core::event::Event;
use serde_json::Value;

use super::{Hub, HubModel, ModelFiles, Need, WeightFiles, sub};
use crate::{
    Error, Result,
    request::{Context, ModelSource},
    text::TokenizerFiles,
    weights::single_file::{Checkpoint, CheckpointPart, Part},
};

/// How many names of stray tensors a warning lists.
const LISTED_NAMES: usize = 5;

/// Repositories with CLIP's vocabulary, and the folder it is in. The models that take it share one vocabulary.
const VOCABULARIES: [(&str, &str); 9] = [
    ("openai/clip-vit-large-patch14", ""),
    ("stable-diffusion-v1-5/stable-diffusion-v1-5", "tokenizer"),
    ("runwayml/stable-diffusion-v1-5", "tokenizer"),
    ("stabilityai/stable-diffusion-xl-base-1.0", "tokenizer"),
    ("stabilityai/stable-diffusion-2-1", "tokenizer"),
    ("stabilityai/stable-diffusion-2-1-base", "tokenizer"),
    ("stabilityai/sdxl-turbo", "tokenizer"),
    ("CompVis/stable-diffusion-v1-4", "tokenizer"),
    ("laion/CLIP-ViT-bigG-14-laion2B-39B-b160k", ""),
];

/// A checkpoint with its configuration.
#[derive(Debug)]
pub struct SingleFileModel {
    checkpoint: Arc<Checkpoint>,
    config: Option<Box<ModelFiles>>,
    /// The model of which it replaces a component.
    kin: Option<Arc<ModelFiles>>,
    hub: Hub,
    vocabulary: OnceLock<Option<Vocabulary>>,
}

/// A model with CLIP's vocabulary.
#[derive(Debug)]
struct Vocabulary {
    files: ModelFiles,
    folder: &'static str,
}

/// The path of a checkpoint in a repository of the hub, downloaded if need be.
pub(super) fn fetch(
    hub: &Hub,
    repo: &str,
    revision: Option<&str>,
    file: &str,
    context: Context<'_>,
) -> Result<PathBuf> {
    refuse_ending(Path::new(file))?;
    if file.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return Err(Error::Source(format!("`{file}` is not the name of a file on the hub; use `owner/name/file`")));
    }
    let fetched = HubModel::open(hub, repo, revision.unwrap_or("main"), context).and_then(|model| {
        model.fetch("", Need::File(file), context)?;
        Ok(super::join(model.root(), file))
    });
    fetched.map_err(|error| match error {
        Error::Source(reason) => {
            Error::Source(format!("`{repo}/{file}` is not a file here, and cannot be had from the hub: {reason}"))
        }
        other => other,
    })
}

/// Refuses pickles, and files that are no safetensors by their ending.
fn refuse_ending(path: &Path) -> Result<()> {
    let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default().to_ascii_lowercase();
    match ending.as_str() {
        "ckpt" | "pt" | "pth" | "bin" => Err(Error::Unsupported(format!(
            "`{}` is a pickle, which can run code when it is read, and is refused; convert it to safetensors",
            path.display()
        ))),
        "gguf" => Err(Error::Unsupported(format!(
            "`{}` is a GGUF file, which cannot be loaded by this build; use the model as safetensors",
            path.display()
        ))),
        _ => Ok(()),
    }
}

impl SingleFileModel {
    /// Opens a checkpoint, and the model that `config` names.
    pub(super) fn open(hub: &Hub, path: &Path, config: Option<&ModelSource>, context: Context<'_>) -> Result<Self> {
        refuse_ending(path)?;
        if !path.is_file() {
            return Err(Error::Source(not_a_file(path)));
        }
        let checkpoint = Arc::new(Checkpoint::open(path)?);
        let config = match config {
            Some(ModelSource::SingleFile { .. } | ModelSource::HubFile { .. }) => {
                return Err(Error::Unsupported(String::from(
                    "`config` names a single file; it takes a folder, a repository or a built-in model in the diffusers layout",
                )));
            }
            Some(source) => Some(Box::new(hub.open(source, context)?)),
            None => None,
        };
        let model = Self { checkpoint, config, kin: None, hub: hub.clone(), vocabulary: OnceLock::new() };
        model.warn(context);
        Ok(model)
    }

    /// The same file as the source of a component that replaces one of `kin`.
    pub(crate) fn in_place_of(mut self: Box<Self>, kin: &Arc<ModelFiles>) -> Box<Self> {
        self.kin = Some(Arc::clone(kin));
        self
    }

    fn warn(&self, context: Context<'_>) {
        let path = self.checkpoint.path().display();
        let strays = self.checkpoint.strays();
        if !strays.is_empty() {
            let names = strays.iter().take(LISTED_NAMES).map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
            let more = if strays.len() > LISTED_NAMES { ", …" } else { "" };
            let message = format!(
                "`{path}`: {} tensor(s) belong to no part of the model and were passed over: {names}{more}",
                strays.len()
            );
            context.events.emit(Event::Warning { message });
        }
        if self.config.is_none() && self.checkpoint.is_ambiguous() {
            let prediction = self.checkpoint.scheduler_config()["prediction_type"].clone();
            let message = format!(
                "`{path}` is a Stable Diffusion 2, whose file does not say what the model predicts; it is run with \
                 `prediction_type` {prediction}. If pictures are nothing but noise or colours, name the other one of \
                 \"epsilon\" and \"v_prediction\" in `scheduler.from_config_args`, or add `config`"
            );
            context.events.emit(Event::Warning { message });
        }
    }

    /// Makes sure that what goes with the weights is there.
    pub(super) fn fetch(&self, folder: &str, need: Need<'_>, context: Context<'_>) -> Result<()> {
        let Some(config) = &self.config else {
            return if need == Need::Tokenizer { self.vocabulary().map(drop) } else { Ok(()) };
        };
        if !matches!(need, Need::Weights(_)) {
            return config.fetch(folder, need, context);
        }
        let nested = config.fetch(folder, Need::File("config.json"), context);
        // The `config` of a component may be the component's own repository.
        let is_component = nested.is_err() && self.kin.is_some();
        if is_component && config.fetch("", Need::File("config.json"), context).is_ok() { Ok(()) } else { nested }
    }

    /// What messages call a file of this model.
    pub(super) fn place(&self, path: &str) -> PathBuf {
        let is_configuration = path.rsplit_once('.').is_some_and(|(_, ending)| matches!(ending, "json" | "txt"));
        match &self.config {
            Some(config) if is_configuration => config.place(path),
            _ => super::join(self.checkpoint.path(), path),
        }
    }

    /// The bytes of a file that the diffusers layout would have; weights are not among them.
    pub(super) fn read(&self, path: &str) -> Result<Option<Cow<'static, [u8]>>> {
        if let Some(config) = &self.config {
            return match (config.read(path)?, part_of(path)) {
                (None, Some(_)) if self.kin.is_some() => config.read("config.json"),
                (found, _) => Ok(found),
            };
        }
        let value = match (path, part_of(path)) {
            ("model_index.json", _) if !self.holds(Part::Unet) => return Err(self.missing(Part::Unet.name())),
            ("model_index.json", _) => Some(self.checkpoint.model_index()?),
            ("scheduler/scheduler_config.json", _) => Some(self.checkpoint.scheduler_config()),
            (_, Some(part)) => self.checkpoint.component_config(part, self.kin_config(path)?)?,
            _ => None,
        };
        Ok(value.map(|value| Cow::Owned(value.to_string().into_bytes())))
    }

    fn kin_config(&self, path: &str) -> Result<Option<Value>> {
        // A ControlNet is a copy of the UNet that it steers, and has the settings of that.
        let path = if part_of(path) == Some(Part::ControlNet) { "unet/config.json" } else { path };
        self.kin.as_ref().map_or(Ok(None), |kin| kin.read_json(path))
    }

    /// Text that changes when the configuration of `folder` does.
    pub(super) fn fingerprint(&self, folder: &str, names: &[&str]) -> Result<String> {
        let config = self.config.as_deref().map_or(Ok(String::new()), |config| config.fingerprint(folder, names))?;
        let of_kin = if folder == Part::ControlNet.name() { Part::Unet.name() } else { folder };
        let kin = self.kin.as_deref().map_or(Ok(String::new()), |kin| kin.fingerprint(of_kin, names))?;
        let vocabulary = self.vocabulary.get().and_then(Option::as_ref);
        let vocabulary = vocabulary.map_or(Ok(String::new()), |found| found.files.fingerprint(found.folder, names))?;
        Ok(config + &kin + &vocabulary)
    }

    /// The parsed files of the tokenizer in `folder`.
    pub(super) fn tokenizer(&self, folder: &str) -> Result<TokenizerFiles> {
        if let Some(config) = &self.config {
            return config.tokenizer(folder);
        }
        let found = self.vocabulary()?;
        let mut files = found.files.tokenizer(found.folder)?;
        files.config = Some(self.checkpoint.tokenizer_config(folder));
        files.special_tokens_map = None;
        Ok(files)
    }

    /// The weights of a component: of the file, else of the configuration's model where they are here already.
    pub(super) fn weights(&self, folder: &str, variant: Option<&str>) -> Result<WeightFiles> {
        let missing = || self.missing(folder);
        let Some(part) = Part::named(folder) else { return Err(missing()) };
        if !self.holds(part) {
            let elsewhere = self.config.as_ref().and_then(|config| config.weights(folder, variant).ok());
            return elsewhere.ok_or_else(missing);
        }
        let path = sub(folder, "config.json");
        let bytes = self.read(&path)?.ok_or_else(|| Error::BadFile {
            path: self.place(&path),
            reason: format!("is missing; `config` must be a model in the diffusers layout that has a `{folder}`"),
        })?;
        let config: Value = serde_json::from_slice(&bytes).map_err(|error| Error::BadFile {
            path: self.place(&path),
            reason: format!("is not valid JSON ({error}); fetch the model again"),
        })?;
        CheckpointPart::new(&self.checkpoint, part, config)?.map(WeightFiles::Part).ok_or_else(missing)
    }

    fn holds(&self, part: Part) -> bool {
        self.checkpoint.components().any(|name| name == part.name())
    }

    fn missing(&self, folder: &str) -> Error {
        if self.checkpoint.components().eq([Part::ControlNet.name()]) {
            let reason = "is a ControlNet, not a model; name it as `from_single_file` of the component `controlnet`";
            return Error::BadFile { path: self.checkpoint.path().to_owned(), reason: reason.into() };
        }
        let held = self.checkpoint.components().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
        Error::BadFile {
            path: self.checkpoint.path().to_owned(),
            reason: format!(
                "holds no `{folder}`, only {held}; load `{folder}` from elsewhere (as a component of the step with its own \
                 `model_name` and `subfolder`), or use a complete checkpoint"
            ),
        }
    }

    /// A model in the hub's cache with CLIP's vocabulary.
    fn vocabulary(&self) -> Result<&Vocabulary> {
        self.vocabulary.get_or_init(|| find_vocabulary(&self.hub)).as_ref().ok_or_else(|| Error::BadFile {
            path: self.checkpoint.path().to_owned(),
            reason: format!(
                "a checkpoint holds no tokenizer, and no model with CLIP's vocabulary is in the cache `{}`; add `config`, \
                 a folder or repository of the same family in the diffusers layout",
                self.hub.cache.display()
            ),
        })
    }
}

/// The component whose `config.json` this is.
fn part_of(path: &str) -> Option<Part> {
    Part::named(path.strip_suffix("/config.json")?)
}

fn not_a_file(path: &Path) -> String {
    let text = path.display();
    if text.to_string().contains("://") {
        return format!(
            "`{text}` is not on the hub; download it and name the file, or use an address of https://huggingface.co"
        );
    }
    if path.is_dir() {
        return format!("`{text}` is a folder, not a checkpoint; name the file in it, or use `model_name`");
    }
    format!("checkpoint `{text}` does not exist; correct the path, or use `owner/name/file` of a file on the hub")
}

/// Looks into the cache only: never asks the network.
fn find_vocabulary(hub: &Hub) -> Option<Vocabulary> {
    let hub = Hub { offline: true, ..hub.clone() };
    let cancel = dw_core::cancel::CancellationToken::default();
    let context = Context { events: &dw_core::event::Silent, cancel: &cancel };
    let find = |repo: &str, folder: &'static str| {
        let model = HubModel::open(&hub, repo, "main", context).ok()?;
        model.fetch(folder, Need::Tokenizer, context).ok()?;
        Some(Vocabulary { files: ModelFiles::Hub(model), folder })
    };
    let known = VOCABULARIES.iter().find_map(|(repo, folder)| find(repo, folder));
    known.or_else(|| cached_models(&hub).iter().find_map(|repo| find(repo, "tokenizer").filter(is_stable_diffusion)))
}

/// The names of all models in the cache.
fn cached_models(hub: &Hub) -> Vec<String> {
    let entries = fs_err::read_dir(&hub.cache).into_iter().flatten().flatten();
    let name = |entry: fs_err::DirEntry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        Some(name.strip_prefix("models--")?.replacen("--", "/", 1))
    };
    let mut names: Vec<String> = entries.filter_map(name).collect();
    names.sort();
    names
}

fn is_stable_diffusion(found: &Vocabulary) -> bool {
    let index = found.files.read_json("model_index.json").ok().flatten();
    let class = index.as_ref().and_then(|index| index.get("_class_name")?.as_str());
    class.is_some_and(|class| class.starts_with("StableDiffusion") && !class.starts_with("StableDiffusion3"))
}
