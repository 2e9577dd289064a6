//! A checkpoint in a single file, made to look like a folder in the diffusers layout: the weights come from the file,
//! everything else from `config` or, without one, from what the file's tensors say.
//!
//! Owns that answer. What is in the file is read by [`crate::weights::single_file`]. The vocabularies of CLIP and T5 are
//! in no checkpoint: without `config` they are taken from a model in the hub's cache.

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

/// The file that says of which parts a model consists.
const MODEL_INDEX: &str = "model_index.json";

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

/// Repositories with T5's vocabulary, and the folder it is in.
const T5_VOCABULARIES: [(&str, &str); 7] = [
    ("black-forest-labs/FLUX.1-dev", "tokenizer_2"),
    ("black-forest-labs/FLUX.1-schnell", "tokenizer_2"),
    ("black-forest-labs/FLUX.1-Kontext-dev", "tokenizer_2"),
    ("stabilityai/stable-diffusion-3.5-large", "tokenizer_3"),
    ("stabilityai/stable-diffusion-3.5-medium", "tokenizer_3"),
    ("stabilityai/stable-diffusion-3-medium-diffusers", "tokenizer_3"),
    ("google/t5-v1_1-xxl", ""),
];

/// A checkpoint with its configuration.
#[derive(Debug)]
pub struct SingleFileModel {
    checkpoint: Arc<Checkpoint>,
    config: Option<Box<ModelFiles>>,
    /// The model of which it replaces a component.
    kin: Option<Arc<ModelFiles>>,
    hub: Hub,
    clip: OnceLock<Option<Vocabulary>>,
    t5: OnceLock<Option<Vocabulary>>,
}

/// A model with the vocabulary of a text encoder.
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

/// Refuses pickles.
fn refuse_ending(path: &Path) -> Result<()> {
    let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default().to_ascii_lowercase();
    match ending.as_str() {
        "ckpt" | "pt" | "pth" | "bin" => Err(Error::Unsupported(format!(
            "`{}` is a pickle, which can run code when it is read, and is refused; convert it to safetensors",
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
        let (clip, t5) = (OnceLock::new(), OnceLock::new());
        let model = Self { checkpoint, config, kin: None, hub: hub.clone(), clip, t5 };
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
            return if need == Need::Tokenizer { self.vocabulary(folder).map(drop) } else { Ok(()) };
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
            if path == MODEL_INDEX {
                self.check_kinship(config)?;
            }
            return match (config.read(path)?, part_of(path)) {
                (None, Some(_)) if self.kin.is_some() => config.read("config.json"),
                (found, _) => Ok(found),
            };
        }
        let value = match (path, part_of(path)) {
            (MODEL_INDEX, _) if !self.holds(self.checkpoint.denoiser()) => {
                return Err(self.missing(self.checkpoint.denoiser().name()));
            }
            (MODEL_INDEX, _) => Some(self.checkpoint.model_index()?),
            ("scheduler/scheduler_config.json", _) => Some(self.checkpoint.scheduler_config()),
            (_, Some(part)) => self.checkpoint.component_config(part, self.kin_config(path)?)?,
            _ => None,
        };
        Ok(value.map(|value| Cow::Owned(value.to_string().into_bytes())))
    }

    /// Refuses the configuration of a model whose noise another class removes than that of the file.
    fn check_kinship(&self, config: &ModelFiles) -> Result<()> {
        let (denoiser, class) = (self.checkpoint.denoiser(), self.checkpoint.denoiser_class());
        let Some(index) = config.read_json(MODEL_INDEX)? else { return Ok(()) };
        let wanted = [Part::Unet, Part::Transformer].iter().find_map(|part| index[part.name()][1].as_str());
        if !self.holds(denoiser) || wanted.is_none_or(|wanted| wanted == class) {
            return Ok(());
        }
        let model = index["_class_name"].as_str().unwrap_or("model of another family");
        Err(self.of_another_family(format!("`config` is a `{model}`")))
    }

    fn of_another_family(&self, wanted: String) -> Error {
        Error::BadFile {
            path: self.checkpoint.path().to_owned(),
            reason: format!(
                "holds a `{}`, but {wanted}; use a file and a model of one family",
                self.checkpoint.denoiser_class()
            ),
        }
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
        let vocabularies = [&self.clip, &self.t5].into_iter().filter_map(|found| found.get()?.as_ref());
        let vocabularies = vocabularies.map(|found| found.files.fingerprint(found.folder, names));
        Ok(config + &kin + &vocabularies.collect::<Result<Vec<_>>>()?.concat())
    }

    /// The parsed files of the tokenizer in `folder`.
    pub(super) fn tokenizer(&self, folder: &str) -> Result<TokenizerFiles> {
        if let Some(config) = &self.config {
            return config.tokenizer(folder);
        }
        let found = self.vocabulary(folder)?;
        let mut files = found.files.tokenizer(found.folder)?;
        files.config = Some(self.checkpoint.tokenizer_config(folder));
        files.special_tokens_map = None;
        Ok(files)
    }

    /// The weights of a component: of the file, else of the configuration's model where they are here already. What
    /// replaces a component of another model must be in the file.
    pub(super) fn weights(&self, folder: &str, variant: Option<&str>) -> Result<WeightFiles> {
        let missing = || self.missing(folder);
        let Some(part) = Part::named(folder) else { return Err(missing()) };
        if !self.holds(part) {
            let config = self.config.as_ref().filter(|_| self.kin.is_none());
            let elsewhere = config.and_then(|config| config.weights(folder, variant).ok());
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
        let class = config["_class_name"].as_str().filter(|_| part == self.checkpoint.denoiser());
        if let Some(class) = class.filter(|class| *class != self.checkpoint.denoiser_class()) {
            return Err(self.of_another_family(format!("`config` describes a `{class}`")));
        }
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
        let listed = |names: &[&str]| names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
        let held: Vec<&str> = self.checkpoint.components().collect();
        // Without a denoiser the file is a component alone, and what else a pipeline needs is not its matter.
        let is_model = self.holds(self.checkpoint.denoiser());
        let mut missing = if is_model { self.checkpoint.missing() } else { Vec::new() };
        if !missing.contains(&folder) {
            missing.push(folder);
        }
        let them = if missing.len() == 1 { "it" } else { "them" };
        Error::BadFile {
            path: self.checkpoint.path().to_owned(),
            reason: format!(
                "holds no {}, only {}; load {them} from elsewhere (each as a component of the step with its own \
                 `model_name` and `subfolder`), or use a complete checkpoint",
                listed(&missing),
                listed(&held)
            ),
        }
    }

    /// A model in the hub's cache with the vocabulary of the tokenizer in `folder`.
    fn vocabulary(&self, folder: &str) -> Result<&Vocabulary> {
        let is_t5 = self.checkpoint.has_t5_tokenizer(folder);
        let (found, name) = if is_t5 {
            (
                self.t5.get_or_init(|| find_vocabulary(&self.hub, &T5_VOCABULARIES, &["tokenizer_2", "tokenizer_3"])),
                "T5",
            )
        } else {
            (self.clip.get_or_init(|| find_vocabulary(&self.hub, &VOCABULARIES, &["tokenizer"])), "CLIP")
        };
        found.as_ref().ok_or_else(|| Error::BadFile {
            path: self.checkpoint.path().to_owned(),
            reason: format!(
                "a checkpoint holds no tokenizer, and no model with {name}'s vocabulary is in the cache `{}`; add `config`, \
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

/// Looks into the cache only: never asks the network. After the known repositories come models of Stable Diffusion or
/// Flux that have one of these folders: the first tokenizer is CLIP's, a T5's goes with one of the later ones.
fn find_vocabulary(hub: &Hub, known: &[(&str, &'static str)], folders: &[&'static str]) -> Option<Vocabulary> {
    let hub = Hub { offline: true, ..hub.clone() };
    let cancel = dw_core::cancel::CancellationToken::default();
    let context = Context { events: &dw_core::event::Silent, cancel: &cancel };
    let find = |repo: &str, folder: &'static str| {
        let model = HubModel::open(&hub, repo, "main", context).ok()?;
        model.fetch(folder, Need::Tokenizer, context).ok()?;
        Some(Vocabulary { files: ModelFiles::Hub(model), folder })
    };
    known.iter().find_map(|(repo, folder)| find(repo, folder)).or_else(|| {
        let models = cached_models(&hub);
        models.iter().find_map(|repo| folders.iter().find_map(|folder| find(repo, folder).filter(is_same_vocabulary)))
    })
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

/// Whether the model belongs to a family whose tokenizer in this folder has the vocabulary of all of them.
fn is_same_vocabulary(found: &Vocabulary) -> bool {
    let index = found.files.read_json("model_index.json").ok().flatten();
    let class = index.as_ref().and_then(|index| index.get("_class_name")?.as_str()).unwrap_or_default();
    match found.folder {
        _ if class.starts_with("Flux2") => false,
        "tokenizer" => class.starts_with("StableDiffusion") || class.starts_with("Flux"),
        "tokenizer_2" => class.starts_with("Flux"),
        _ => class.starts_with("StableDiffusion3"),
    }
}
