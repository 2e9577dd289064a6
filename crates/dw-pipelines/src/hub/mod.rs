//! Turns a model's name into readable files: a local folder, a repository of the HuggingFace hub (its
//! local cache first, then the network), or a model inside the program.
//!
//! Owns where files are and how they get there; what is in them is read by `weights`, `text` and the
//! loader, which all work on [`ModelFiles`] and do not see where a model came from.

mod builtin;
mod remote;
mod single_file;

use std::{
    borrow::Cow,
    env,
    path::{Path, PathBuf},
    sync::Arc,
};

use dw_core::document::with_finite_numbers;
use serde_json::Value;

pub use builtin::{BuiltinModel, builtin_models, random_models};
pub use remote::HubModel;
pub use single_file::SingleFileModel;

use crate::{
    Error, Result,
    quant::Scheme,
    request::{Context, ModelSource},
    text::TokenizerFiles,
    weights::{self, Listed, folder, single_file::CheckpointPart},
};

/// The hub's address when `HF_ENDPOINT` does not name another.
const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

/// Where models are looked for, and whether the network may be asked.
#[derive(Clone, Debug)]
pub struct Hub {
    /// The cache folder in the layout of `huggingface_hub` (`models--OWNER--NAME/snapshots/…`).
    pub cache: PathBuf,
    /// The hub's address, without a slash at the end.
    pub endpoint: String,
    /// The access token for private and gated repositories.
    pub token: Option<String>,
    /// Never asks the network.
    pub offline: bool,
}

impl Hub {
    /// What the environment says: `HF_HOME`, `HF_HUB_CACHE`, `HF_ENDPOINT`, `HF_TOKEN` or the token file,
    /// and `HF_HUB_OFFLINE`. `offline` switches the network off whatever the environment says.
    pub fn from_env(offline: bool) -> Self {
        Self::from_vars(offline, |name| env::var(name).ok())
    }

    fn from_vars(offline: bool, var: impl Fn(&str) -> Option<String>) -> Self {
        let set = |name: &str| var(name).filter(|value| !value.trim().is_empty());
        let home = set("HF_HOME").map_or_else(default_home, PathBuf::from);
        let cache = set("HF_HUB_CACHE").or_else(|| set("HUGGINGFACE_HUB_CACHE"));
        let token_file = set("HF_TOKEN_PATH").map_or_else(|| home.join("token"), PathBuf::from);
        let token = set("HF_TOKEN").or_else(|| set("HUGGING_FACE_HUB_TOKEN"));
        let token = token.or_else(|| fs_err::read_to_string(token_file).ok());
        let endpoint = set("HF_ENDPOINT").unwrap_or_else(|| DEFAULT_ENDPOINT.into());
        Self {
            cache: cache.map_or_else(|| home.join("hub"), PathBuf::from),
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token: token.map(|token| token.trim().to_owned()).filter(|token| !token.is_empty()),
            offline: offline || set("HF_HUB_OFFLINE").is_some_and(|value| is_true(&value)),
        }
    }

    /// The files of a model. For a repository of the hub this finds the snapshot; single files are fetched
    /// when [`ModelFiles::fetch`] asks for them.
    pub fn open(&self, source: &ModelSource, context: Context<'_>) -> Result<ModelFiles> {
        match source {
            ModelSource::Folder(path) if path.is_dir() => Ok(ModelFiles::Folder(path.clone())),
            ModelSource::Folder(path) => Err(Error::Source(format!(
                "model folder `{}` does not exist; correct the path, or use `owner/name` of a model on the hub",
                path.display()
            ))),
            ModelSource::Builtin(name) => builtin::find(name).map(ModelFiles::Builtin),
            ModelSource::Hub { repo, revision } => {
                HubModel::open(self, repo, revision.as_deref().unwrap_or("main"), context).map(ModelFiles::Hub)
            }
            ModelSource::SingleFile { path, config } => {
                let model = SingleFileModel::open(self, path, config.as_deref(), context)?;
                Ok(ModelFiles::SingleFile(Box::new(model)))
            }
            ModelSource::HubFile { repo, revision, file, config } => {
                let path = single_file::fetch(self, repo, revision.as_deref(), file, context)?;
                let model = SingleFileModel::open(self, &path, config.as_deref(), context)?;
                Ok(ModelFiles::SingleFile(Box::new(model)))
            }
        }
    }
}

fn default_home() -> PathBuf {
    let cache = env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| env::home_dir().map(|home| home.join(".cache")));
    cache.unwrap_or_else(env::temp_dir).join("huggingface")
}

fn is_true(value: &str) -> bool {
    matches!(value.trim().to_ascii_lowercase().as_str(), "1" | "true" | "yes" | "on")
}

/// What is needed of one folder of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need<'a> {
    /// One file, by name.
    File(&'a str),
    /// `config.json` and one set of weights, of the variant if one is named.
    Weights(Option<&'a str>),
    /// Whatever a tokenizer is made of.
    Tokenizer,
}

/// The files a tokenizer may consist of. The vocabulary comes last, so that an interrupted download is
/// not taken for a complete one.
pub(crate) const TOKENIZER_FILES: [&str; 5] =
    ["tokenizer_config.json", "special_tokens_map.json", "merges.txt", "vocab.json", "tokenizer.json"];

/// The weights of one component, ready to be read.
#[derive(Clone, Debug)]
pub enum WeightFiles {
    /// safetensors files on disk, in reading order.
    Disk(Vec<PathBuf>),
    /// One safetensors file in memory.
    Memory {
        /// What messages call it.
        name: String,
        /// The file.
        bytes: &'static [u8],
    },
    /// One component of a checkpoint in a single file.
    Part(CheckpointPart),
    /// Tensors that are in no file: a component of a model of full size for measuring.
    Random {
        /// What messages call it.
        name: String,
        /// Names and shapes; they follow from the configuration and are filled in by the loader.
        tensors: Arc<Vec<(String, Vec<usize>)>>,
    },
}

impl WeightFiles {
    /// How many bytes there are to read.
    pub fn bytes(&self) -> Result<u64> {
        match self {
            Self::Disk(files) => files.iter().map(|file| Ok(fs_err::metadata(file)?.len())).sum(),
            Self::Memory { bytes, .. } => Ok(bytes.len() as u64),
            Self::Part(part) => Ok(part.bytes()),
            Self::Random { tensors, .. } => {
                Ok(tensors.iter().map(|(_, dims)| 2 * dims.iter().product::<usize>() as u64).sum())
            }
        }
    }

    /// The tensors that the headers list, under canonical names. `scheme` says how layers are to be stored.
    pub(crate) fn list(&self, scheme: Option<&Scheme>) -> Result<Vec<Listed>> {
        match self {
            Self::Disk(files) => weights::list_files(files, scheme),
            Self::Memory { name, bytes } => weights::list_bytes(bytes, name, scheme),
            Self::Part(part) => weights::list_part(part, scheme),
            Self::Random { tensors, .. } => Ok(weights::list_random(tensors, scheme)),
        }
    }

    /// Whether they are in a GGUF file.
    pub(crate) fn is_gguf(&self) -> bool {
        match self {
            Self::Disk(files) => files.iter().any(|file| has_gguf_ending(file)),
            Self::Memory { .. } | Self::Random { .. } => false,
            Self::Part(part) => part.is_gguf(),
        }
    }

    /// Text that changes when the weights do: path, size and modification time of each file.
    pub fn fingerprint(&self) -> Result<String> {
        match self {
            Self::Disk(files) => files.iter().map(|file| fingerprint(file)).collect(),
            Self::Memory { name, bytes } => Ok(format!("{name}:{};", bytes.len())),
            Self::Part(part) => Ok(format!("{}{};", part.name(), fingerprint(part.path())?)),
            Self::Random { name, .. } => Ok(format!("{name};")),
        }
    }
}

/// Whether a file is called a GGUF file.
pub(crate) fn has_gguf_ending(file: &Path) -> bool {
    file.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("gguf"))
}

/// Path, size and modification time of a file, as text.
fn fingerprint(file: &Path) -> Result<String> {
    let place = fs_err::canonicalize(file)?;
    let metadata = fs_err::metadata(file)?;
    let modified = metadata.modified().ok().and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok());
    let nanos = modified.map_or(0, |time| time.as_nanos());
    Ok(format!("{}:{}:{nanos};", place.display(), metadata.len()))
}

/// The readable files of one model, wherever they are. Paths are relative and use `/`.
#[derive(Debug)]
pub enum ModelFiles {
    /// A folder on disk.
    Folder(PathBuf),
    /// A snapshot in the hub's cache.
    Hub(HubModel),
    /// Embedded in the program.
    Builtin(&'static BuiltinModel),
    /// A checkpoint in a single file, with its configuration.
    SingleFile(Box<SingleFileModel>),
}

impl ModelFiles {
    /// Makes sure that what `folder` must hold is there. Only a repository of the hub does anything here.
    pub fn fetch(&self, folder: &str, need: Need<'_>, context: Context<'_>) -> Result<()> {
        match self {
            Self::Hub(model) => model.fetch(folder, need, context),
            Self::SingleFile(model) => model.fetch(folder, need, context),
            Self::Folder(_) | Self::Builtin(_) => Ok(()),
        }
    }

    /// The folder on disk; none for a model that has none.
    fn root(&self) -> Option<&Path> {
        match self {
            Self::Folder(path) => Some(path),
            Self::Hub(model) => Some(model.root()),
            Self::Builtin(_) | Self::SingleFile(_) => None,
        }
    }

    /// The names of the files directly inside `folder`, sorted; none of a model that is no folder.
    pub fn names(&self, folder: &str, context: Context<'_>) -> Result<Vec<String>> {
        match self {
            Self::Builtin(_) | Self::SingleFile(_) => Ok(Vec::new()),
            Self::Folder(root) => file_names(&join(root, folder)),
            Self::Hub(model) => model.names(folder, context),
        }
    }

    /// What messages call a file of this model.
    pub fn place(&self, path: &str) -> PathBuf {
        match self {
            Self::Builtin(model) => PathBuf::from(format!("builtin:{}", model.name)).join(path),
            Self::Folder(root) => join(root, path),
            Self::Hub(model) => join(model.root(), path),
            Self::SingleFile(model) => model.place(path),
        }
    }

    /// The bytes of a file, or none when it is not there.
    pub fn read(&self, path: &str) -> Result<Option<Cow<'static, [u8]>>> {
        match self.root() {
            Some(root) => {
                let file = join(root, path);
                if file.is_file() { Ok(Some(Cow::Owned(fs_err::read(file)?))) } else { Ok(None) }
            }
            None => match self {
                Self::Builtin(model) => Ok(model.file(path).map(Cow::Borrowed)),
                Self::SingleFile(model) => model.read(path),
                Self::Folder(_) | Self::Hub(_) => Ok(None),
            },
        }
    }

    /// Text that changes when one of these files of `folder` does.
    pub fn fingerprint(&self, folder: &str, names: &[&str]) -> Result<String> {
        if let Self::SingleFile(model) = self {
            return model.fingerprint(folder, names);
        }
        let of = |name: &&str| {
            let path = sub(folder, name);
            match self.root().map(|root| join(root, &path)) {
                Some(file) if file.is_file() => fingerprint(&file),
                Some(_) => Ok(String::new()),
                None => Ok(format!("{};", self.place(&path).display())),
            }
        };
        names.iter().map(of).collect()
    }

    /// A JSON file, or none when it is not there.
    pub fn read_json(&self, path: &str) -> Result<Option<Value>> {
        let Some(bytes) = self.read(path)? else { return Ok(None) };
        let text = String::from_utf8_lossy(&bytes);
        serde_json::from_str(&with_finite_numbers(&text)).map(Some).map_err(|error| Error::BadFile {
            path: self.place(path),
            reason: format!("is not valid JSON ({error}); fetch the model again"),
        })
    }

    /// A JSON file that must be there.
    pub fn require_json(&self, path: &str) -> Result<Value> {
        self.read_json(path)?.ok_or_else(|| Error::BadFile {
            path: self.place(path),
            reason: "is missing; the folder must be a complete model in the diffusers layout".into(),
        })
    }

    /// The parsed files of the tokenizer in `folder`.
    pub fn tokenizer(&self, folder: &str) -> Result<TokenizerFiles> {
        if let Self::SingleFile(model) = self {
            return model.tokenizer(folder);
        }
        let merges = self.read(&sub(folder, "merges.txt"))?;
        Ok(TokenizerFiles {
            place: self.place(folder),
            tokenizer: self.read_json(&sub(folder, "tokenizer.json"))?,
            vocab: self.read_json(&sub(folder, "vocab.json"))?,
            merges: merges.map(|text| String::from_utf8_lossy(&text).into_owned()),
            config: self.read_json(&sub(folder, "tokenizer_config.json"))?,
            special_tokens_map: self.read_json(&sub(folder, "special_tokens_map.json"))?,
        })
    }

    /// The weights of the component in `folder`.
    pub fn weights(&self, folder: &str, variant: Option<&str>) -> Result<WeightFiles> {
        if let Self::SingleFile(model) = self {
            return model.weights(folder, variant);
        }
        let Some(root) = self.root() else {
            return self.embedded_weights(folder);
        };
        let dir = join(root, folder);
        if !dir.is_dir() {
            return Err(Error::BadFile {
                path: dir,
                reason: "is missing; the model must be complete and in the diffusers layout".into(),
            });
        }
        folder::weight_files(&dir, variant).map(WeightFiles::Disk)
    }

    /// A model inside the program has one file for each component, whatever variant is asked for.
    fn embedded_weights(&self, folder: &str) -> Result<WeightFiles> {
        if let Self::Builtin(BuiltinModel { is_random: true, .. }) = self {
            let name = self.place(folder).display().to_string();
            return Ok(WeightFiles::Random { name, tensors: Arc::default() });
        }
        let found = ["diffusion_pytorch_model.safetensors", "model.safetensors"].into_iter().find_map(|name| {
            let Self::Builtin(model) = self else { return None };
            let path = sub(folder, name);
            let bytes = model.file(&path)?;
            Some(WeightFiles::Memory { name: self.place(&path).display().to_string(), bytes })
        });
        found.ok_or_else(|| Error::BadFile { path: self.place(folder), reason: "has no weights".into() })
    }
}

/// `folder/name`, or `name` when the folder is the model itself.
pub(crate) fn sub(folder: &str, name: &str) -> String {
    if folder.is_empty() { name.to_owned() } else { format!("{folder}/{name}") }
}

/// The names of the files directly inside a folder on disk, sorted.
fn file_names(dir: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs_err::read_dir(dir)? {
        let entry = entry?;
        if entry.path().is_file() {
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    names.sort();
    Ok(names)
}

fn join(root: &Path, path: &str) -> PathBuf {
    path.split('/').filter(|part| !part.is_empty()).fold(root.to_owned(), |place, part| place.join(part))
}

#[cfg(test)]
mod tests;
