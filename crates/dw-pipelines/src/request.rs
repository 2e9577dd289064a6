//! What the caller asks for: which pipeline class, from where, with which parts replaced.

mod memory;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use candle_core::{DType, Device};
use dw_core::{cancel::CancellationToken, event::EventSink};
use serde_json::{Map, Value};

pub use self::memory::{CallSize, ComponentMemory, MemoryRequest, Offload, Paging, TilingRequest};
use crate::{Error, Result, quant::QuantizationRequest};

/// Where a model's files come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelSource {
    /// A folder in the diffusers layout.
    Folder(PathBuf),
    /// A repository on the HuggingFace hub.
    Hub {
        /// `owner/name`.
        repo: String,
        /// Branch, tag or commit; `main` when none.
        revision: Option<String>,
    },
    /// A model inside the program, by name.
    Builtin(String),
    /// One checkpoint file with everything inside, and optionally where configs and tokenizers come from.
    SingleFile {
        /// The checkpoint.
        path: PathBuf,
        /// Folder, repository or built-in model of the diffusers layout.
        config: Option<Box<ModelSource>>,
    },
    /// The same, with the checkpoint in a repository of the hub.
    HubFile {
        /// `owner/name`.
        repo: String,
        /// Branch, tag or commit; `main` when none.
        revision: Option<String>,
        /// The checkpoint's path in the repository.
        file: String,
        /// Folder, repository or built-in model of the diffusers layout.
        config: Option<Box<ModelSource>>,
    },
}

/// How addresses of files on the hub begin.
const HUB_ADDRESSES: [&str; 4] = ["https://huggingface.co/", "https://hf.co/", "huggingface.co/", "hf.co/"];

impl ModelSource {
    /// The source a workflow means by `name`: `builtin:NAME`, a folder (absolute, or below `base`), or
    /// `owner/name` on the hub. Text that looks like a path is one even when nothing is there.
    pub fn named(name: &str, revision: Option<&str>, base: &Path) -> Self {
        let name = name.trim();
        if let Some(builtin) = name.strip_prefix("builtin:") {
            return Self::Builtin(builtin.to_owned());
        }
        let path = base.join(name);
        let is_path = Path::new(name).is_absolute()
            || name.starts_with(['.', '~'])
            || name.contains('\\')
            || Path::new(name).extension().is_some_and(|ending| ending == "safetensors");
        if is_path || path.exists() || name.split('/').count() > 2 {
            return Self::Folder(path);
        }
        Self::Hub { repo: name.to_owned(), revision: revision.map(str::to_owned) }
    }

    /// The source a workflow means by the checkpoint `name`: a file (absolute, or below `base`), the address of a file
    /// on the hub, or `owner/name/file` there.
    pub fn single_file(name: &str, revision: Option<&str>, base: &Path, config: Option<Self>) -> Self {
        let (name, config) = (name.trim(), config.map(Box::new));
        let address = HUB_ADDRESSES.iter().find_map(|start| name.strip_prefix(start));
        let path = base.join(name);
        let is_path = Path::new(name).is_absolute() || name.starts_with(['.', '~']) || name.contains(['\\', ':']);
        if address.is_none() && (is_path || path.exists()) {
            return Self::SingleFile { path: if name.contains("://") { name.into() } else { path }, config };
        }
        match hub_file(address.unwrap_or(name)) {
            Some((repo, own_revision, file)) => {
                let revision = own_revision.or(revision.map(str::to_owned));
                Self::HubFile { repo, revision, file, config }
            }
            None => Self::SingleFile { path, config },
        }
    }
}

/// Repository, revision if it is named, and file of `owner/name/file`, `owner/name/blob/REVISION/file` or
/// `owner/name/resolve/REVISION/file`.
fn hub_file(address: &str) -> Option<(String, Option<String>, String)> {
    let address = address.split(['?', '#']).next().unwrap_or(address);
    let mut parts = address.splitn(3, '/');
    let (owner, name, rest) = (parts.next()?, parts.next()?, parts.next()?);
    let pinned = rest.strip_prefix("blob/").or_else(|| rest.strip_prefix("resolve/"));
    let (revision, file) = match pinned.and_then(|pinned| pinned.split_once('/')) {
        Some((revision, file)) => (Some(revision.to_owned()), file),
        None => (None, rest),
    };
    (!file.is_empty()).then(|| (format!("{owner}/{name}"), revision, file.to_owned()))
}

/// A component (`unet`, `vae`, `text_encoder_2`, …) that does not come with the pipeline.
#[derive(Clone, Debug, PartialEq)]
pub struct ComponentRequest {
    /// Its class, as the reference names it (`AutoencoderKL`).
    pub class: String,
    /// Where its files come from.
    pub source: ModelSource,
    /// A folder inside the source.
    pub subfolder: Option<String>,
    /// `fp16` and the like: part of the weight file's name.
    pub variant: Option<String>,
    /// The type its weights are converted to; the pipeline's when none.
    pub dtype: Option<DType>,
    /// How its layers are stored; as the files store them when none.
    pub quantization: Option<QuantizationRequest>,
}

/// What to do with one component of a pipeline.
#[derive(Clone, Debug, PartialEq)]
pub enum ComponentChoice {
    /// Leave it out (`"text_encoder": null`).
    Omit,
    /// Load it from elsewhere.
    Load(Vec<ComponentRequest>),
    /// Take the one an earlier step shared under this name.
    Shared,
}

/// A scheduler instead of the model's own.
#[derive(Clone, Debug, PartialEq)]
pub struct SchedulerRequest {
    /// The class; the model's own class when none.
    pub class: Option<String>,
    /// Keys that override the model's own scheduler configuration.
    pub config: Map<String, Value>,
    /// A sigma shift, for flow-matching schedulers.
    pub shift: Option<f64>,
}

/// A LoRA file to apply.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraRequest {
    /// Folder, file or repository.
    pub source: ModelSource,
    /// The file inside it; when none, the only `.safetensors` there.
    pub weight_name: Option<String>,
    /// A folder inside the source.
    pub subfolder: Option<String>,
    /// The adapter's name.
    pub adapter_name: String,
    /// How strongly it acts; may be negative.
    pub scale: f64,
}

/// A word that stands for learned vectors.
#[derive(Clone, Debug, PartialEq)]
pub struct TextualInversionRequest {
    /// Folder, file or repository.
    pub source: ModelSource,
    /// The file inside it; when none, the only `.safetensors` there.
    pub weight_name: Option<String>,
    /// A folder inside the source.
    pub subfolder: Option<String>,
    /// The word; when none, the one in the file, or the file's name.
    pub token: Option<String>,
    /// The text encoder that learns it (`text_encoder_2`); when none, the first that fits by width.
    pub text_encoder: Option<String>,
}

/// How strongly an IP-Adapter acts.
#[derive(Clone, Debug, PartialEq)]
pub enum IpAdapterScale {
    /// As the reference has it where nobody asks: 0.5 for Stable Diffusion 3, 1 for the other families.
    Usual,
    /// The same everywhere.
    Everywhere(f64),
    /// By block of the UNet: `{"down": {"block_2": [0.0, 1.0]}, "mid": 1.0, "up": 0.5}`; what is not named is 0.
    ByBlock(Map<String, Value>),
    /// A number for each transformer of a UNet that sees the text, or each block of a diffusion transformer, in the
    /// order in which they are evaluated.
    ByLayer(Vec<f64>),
}

impl IpAdapterScale {
    /// Reads a number (or text that holds one), an object by block, or a list: of one such entry, which is the list
    /// of a single adapter in the reference, or of a number for each layer, alone or in a list of its own; null is the family's own.
    pub fn from_json(value: &Value) -> Result<Self> {
        let wrong = || Error::Argument {
            name: "ip_adapter.scale".into(),
            reason: format!(
                "must be a number, numbers by block, a list with one of them, or a list of one number for each layer, \
                 found `{value}`; each of several adapters has a `scale` of its own"
            ),
        };
        match value {
            Value::Null => Ok(Self::Usual),
            Value::Object(blocks) => Ok(Self::ByBlock(blocks.clone())),
            Value::Array(list) => match list.as_slice() {
                [Value::Array(layers)] if !layers.iter().any(Value::is_array) => Self::by_layer(layers, wrong),
                [one] if !one.is_array() => Self::from_json(one),
                layers => Self::by_layer(layers, wrong),
            },
            Value::String(text) => {
                let number = text.trim().parse().ok().filter(|number: &f64| number.is_finite());
                number.map(Self::Everywhere).ok_or_else(wrong)
            }
            other => other.as_f64().map(Self::Everywhere).ok_or_else(wrong),
        }
    }

    fn by_layer(layers: &[Value], wrong: impl Fn() -> Error) -> Result<Self> {
        let numbers: Option<Vec<f64>> = layers.iter().map(Value::as_f64).collect();
        numbers.filter(|numbers| !numbers.is_empty()).map(Self::ByLayer).ok_or_else(wrong)
    }
}

/// An IP-Adapter to load.
#[derive(Clone, Debug, PartialEq)]
pub struct IpAdapterRequest {
    /// Folder or repository.
    pub source: ModelSource,
    /// The file inside it; when none, the only `.safetensors` there.
    pub weight_name: Option<String>,
    /// A folder inside the source.
    pub subfolder: Option<String>,
    /// Where the image encoder lies: a folder of `subfolder`, or with a slash in its name of the source. None when
    /// none is to be read, because the call gives embeddings.
    pub image_encoder_folder: Option<String>,
    /// How strongly it acts.
    pub scale: IpAdapterScale,
}

/// Which pipeline to load.
#[derive(Clone, Debug)]
pub struct PipelineRequest {
    /// The class (`StableDiffusionXLPipeline`, or `DiffusionPipeline` to let the model decide).
    pub class: String,
    /// Where its files come from.
    pub source: ModelSource,
    /// `fp16` and the like: part of the weight files' names.
    pub variant: Option<String>,
    /// The type weights and activations have; f32 when none.
    pub dtype: Option<DType>,
    /// Where the model lives and runs.
    pub device: Device,
    /// Components that are left out, replaced or added, by name.
    pub components: BTreeMap<String, ComponentChoice>,
    /// A scheduler instead of the model's own.
    pub scheduler: Option<SchedulerRequest>,
    /// LoRA files, in the order they are applied.
    pub loras: Vec<LoraRequest>,
    /// Words with learned vectors.
    pub textual_inversions: Vec<TextualInversionRequest>,
    /// Whether prompts are read as weighted (`(word:1.3)`, `[word]`, `BREAK`) and long ones encoded in chunks.
    pub prompt_weighting: bool,
    /// IP-Adapters; a call shows each of them pictures.
    pub ip_adapters: Vec<IpAdapterRequest>,
    /// Where components rest, when they move, and what else saves memory.
    pub memory: MemoryRequest,
}

/// What goes with every long call: where events go and whether somebody asked to stop.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    /// Takes loading and denoising progress.
    pub events: &'a dyn EventSink,
    /// Looked at between tensors while loading and between denoising steps.
    pub cancel: &'a CancellationToken,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_model_name_is_a_folder_when_one_is_there_or_it_looks_like_one() {
        let base = Path::new(env!("CARGO_MANIFEST_DIR"));
        let folder = |path: &str| ModelSource::Folder(base.join(path));
        assert_eq!(ModelSource::named("src", None, base), folder("src"));
        assert_eq!(ModelSource::named("./missing", None, base), folder("./missing"));
        assert_eq!(ModelSource::named("a/b/c", None, base), folder("a/b/c"));
        assert_eq!(ModelSource::named("/no/where", None, base), ModelSource::Folder("/no/where".into()));
    }

    #[test]
    fn other_names_are_on_the_hub_or_built_in() {
        let base = Path::new(env!("CARGO_MANIFEST_DIR"));
        let hub = ModelSource::Hub { repo: "owner/name".into(), revision: Some("v1".into()) };
        assert_eq!(ModelSource::named("owner/name", Some("v1"), base), hub);
        assert_eq!(ModelSource::named("builtin:landscapes", None, base), ModelSource::Builtin("landscapes".into()));
    }

    #[test]
    fn the_scale_of_an_ip_adapter_is_read_in_every_form_of_the_reference() {
        let read = |value| IpAdapterScale::from_json(&value).map_err(|error| error.to_string());
        let blocks = json!({ "up": { "block_0": [0.0, 1.0, 0.0] } });
        let Value::Object(by_block) = blocks.clone() else { panic!("an object") };
        assert_eq!(read(json!(null)), Ok(IpAdapterScale::Usual));
        assert_eq!(read(json!([0.4])), Ok(IpAdapterScale::Everywhere(0.4)));
        assert_eq!(read(json!([blocks])), Ok(IpAdapterScale::ByBlock(by_block)));
        assert_eq!(read(json!([0.1, 1])), Ok(IpAdapterScale::ByLayer(vec![0.1, 1.0])));
        assert_eq!(read(json!([[0.1, 1]])), Ok(IpAdapterScale::ByLayer(vec![0.1, 1.0])));
        assert_eq!(read(json!("0.5")), Ok(IpAdapterScale::Everywhere(0.5)));
        for wrong in [json!([]), json!([[]]), json!([0.1, { "mid": 1 }]), json!([[0.1], [0.2]]), json!(true)] {
            assert!(read(wrong.clone()).expect_err("no scale").contains("of its own"), "{wrong}");
        }
    }

    #[test]
    fn a_checkpoint_is_a_file_here_or_one_on_the_hub() {
        let base = Path::new(env!("CARGO_MANIFEST_DIR"));
        let source = |name: &str| ModelSource::single_file(name, Some("v1"), base, None);
        let local = |path: PathBuf| ModelSource::SingleFile { path, config: None };
        for name in ["src/lib.rs", "./a/b/c.safetensors", "models/x.safetensors", "x.ckpt"] {
            assert_eq!(source(name), local(base.join(name)), "{name}");
        }
        assert_eq!(source("https://example.com/x.safetensors"), local("https://example.com/x.safetensors".into()));
        for (name, revision) in [
            ("owner/name/sub/x.safetensors", "v1"),
            ("https://huggingface.co/owner/name/sub/x.safetensors", "v1"),
            ("https://huggingface.co/owner/name/blob/main/sub/x.safetensors", "main"),
            ("hf.co/owner/name/resolve/abc/sub/x.safetensors?download=true", "abc"),
        ] {
            let (repo, revision) = (String::from("owner/name"), Some(revision.to_owned()));
            let file = String::from("sub/x.safetensors");
            assert_eq!(source(name), ModelSource::HubFile { repo, revision, file, config: None }, "{name}");
        }
    }
}
