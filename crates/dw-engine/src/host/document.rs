//! The workflow that a request stands for: one step for each stage, pictures given as base64 in files of their own.

use std::path::{Path, PathBuf};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use fs_err as fs;
use serde_json::{Map, Value, json};
use tempfile::TempDir;

use super::{
    answer::{Failure, FailureCode, Picture},
    request::{Batch, Call, Generation, Loras, Model, Request, Stage, StageMethod, missing_model},
};

/// The `output` that asks for pictures in the answer.
pub const OUTPUT_BASE64: &str = "base64";

/// What the workflow of a `load` request is called.
const LOAD_STEP: &str = "load";

/// Where the pictures of a request go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Into the answer.
    Base64,
    /// Into a folder, under names of dw's choosing.
    Folder(PathBuf),
    /// Into a file of this name; further pictures get `-1`, `-2` … before its ending.
    File(PathBuf),
}

/// The formats pictures are written in, by the endings of files.
pub(super) const FORMATS: [(&str, &str); 4] =
    [("png", "image/png"), ("jpg", "image/jpeg"), ("jpeg", "image/jpeg"), ("webp", "image/webp")];

impl Output {
    fn parse(output: Option<&str>, default_dir: &Path) -> Result<Self, Failure> {
        let Some(output) = output.map(str::trim).filter(|output| !output.is_empty()) else {
            return Ok(Self::Folder(default_dir.to_owned()));
        };
        if output.eq_ignore_ascii_case(OUTPUT_BASE64) {
            return Ok(Self::Base64);
        }
        let path = PathBuf::from(output);
        let Some(ending) = path.extension().filter(|_| !path.is_dir()) else { return Ok(Self::Folder(path)) };
        let ending = ending.to_string_lossy().to_lowercase();
        if FORMATS.iter().any(|(known, _)| *known == ending) {
            return Ok(Self::File(path));
        }
        Err(Failure::bad_request(format!("`output` ends in `.{ending}`, which is no picture format of dw"))
            .with_remedy("use `.png`, `.jpg` or `.webp`, a folder, or `base64`"))
    }

    /// The format pictures are written in.
    fn content_type(&self) -> &'static str {
        let ending = match self {
            Self::File(path) => path.extension().map(|ending| ending.to_string_lossy().to_lowercase()),
            Self::Base64 | Self::Folder(_) => None,
        };
        FORMATS.iter().find(|(known, _)| Some(*known) == ending.as_deref()).map_or("image/png", |(_, format)| format)
    }
}

/// A request as a workflow, with the files that belong to it.
#[derive(Debug)]
pub struct Prepared {
    /// The workflow's JSON text.
    pub text: String,
    /// Where the engine is to write.
    pub output_dir: PathBuf,
    /// How many stages make pictures.
    pub stages: usize,
    /// Every how many steps a preview is wanted.
    pub preview_every: Option<usize>,
    output: Output,
    /// Holds given pictures, and results on their way; goes with this value.
    _folder: TempDir,
}

impl Prepared {
    /// The workflow of a request that makes pictures or loads a model. Files without a folder of their own go to
    /// `default_dir`.
    ///
    /// # Errors
    /// When the request is incomplete, or the files it brings cannot be written.
    pub fn new(request: &Request, default_dir: &Path) -> Result<Self, Failure> {
        let (stages, chained, output, preview_every) = match &request.call {
            Call::Text2img(call) => one(StageMethod::Text2img, call),
            Call::Img2img(call) => one(StageMethod::Img2img, call),
            Call::Inpaint(call) => one(StageMethod::Inpaint, call),
            Call::Batch(Batch { stages, requests, output, preview_every }) => {
                let chained = !stages.is_empty();
                let all = if chained { stages } else { requests };
                (all.clone(), chained, output.clone(), *preview_every)
            }
            Call::Load(model) => (vec![loading(model)], false, None, None),
            Call::Unload(_) | Call::Status | Call::Cancel(_) => {
                return Err(Failure::bad_request(format!("`{}` makes no pictures", request.call.method())));
            }
        };
        let output = Output::parse(output.as_deref(), default_dir)?;
        let folder = match &output {
            // On the same file system, so that finished files only need another name.
            Output::File(path) => {
                let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
                fs::create_dir_all(parent).and_then(|()| tempfile::Builder::new().prefix(".dw-").tempdir_in(parent))
            }
            Output::Base64 | Output::Folder(_) => tempfile::Builder::new().prefix("dw-").tempdir(),
        };
        let folder = folder.map_err(|error| Failure::new(FailureCode::SetupFailed, error.to_string()))?;
        let output_dir = match &output {
            Output::Folder(folder) => folder.clone(),
            Output::Base64 | Output::File(_) => folder.path().join("results"),
        };
        let names = Names { base: file_name(&request.request_id.to_string()), content_type: output.content_type() };
        let text = document(&stages, chained, &names, folder.path())?.to_string();
        let preview_every = preview_every.map(|every| every as usize);
        Ok(Self { text, output_dir, stages: stages.len(), preview_every, output, _folder: folder })
    }

    /// Brings finished files to where the host wants them.
    ///
    /// # Errors
    /// When a file cannot be read or renamed.
    pub fn deliver(&self, files: &[PathBuf]) -> Result<Vec<Picture>, Failure> {
        let content_type = self.output.content_type().to_owned();
        let place = |(at, file): (usize, &PathBuf)| {
            let (path, base64) = match &self.output {
                Output::Folder(_) => (Some(file.clone()), None),
                Output::Base64 => (None, Some(STANDARD.encode(fs::read(file)?))),
                Output::File(path) => {
                    let target = numbered(path, at);
                    fs::rename(file, &target)?;
                    (Some(target), None)
                }
            };
            Ok(Picture { path, base64, content_type: content_type.clone() })
        };
        let pictures: std::io::Result<Vec<Picture>> = files.iter().enumerate().map(place).collect();
        pictures.map_err(|error| Failure::new(FailureCode::SetupFailed, error.to_string()))
    }
}

type Stages = (Vec<Stage>, bool, Option<String>, Option<u32>);

fn one(method: StageMethod, call: &Generation) -> Stages {
    (vec![Stage { method, parameters: call.clone() }], false, call.output.clone(), call.preview_every)
}

/// A stage that only says what is loaded.
fn loading(model: &Model) -> Stage {
    let parameters = Generation {
        model_id: Some(model.model_id.clone()),
        torch_dtype: model.torch_dtype.clone(),
        prompt: LOAD_STEP.to_owned(),
        lora: model.lora.clone(),
        ..Generation::default()
    };
    Stage { method: StageMethod::Text2img, parameters }
}

/// The name of the picture at place `at` of a request for one file.
fn numbered(path: &Path, at: usize) -> PathBuf {
    let (Some(stem), Some(ending), true) = (path.file_stem(), path.extension(), at > 0) else {
        return path.to_owned();
    };
    path.with_file_name(format!("{}-{at}.{}", stem.to_string_lossy(), ending.to_string_lossy()))
}

/// A request's name as part of a file's name.
fn file_name(id: &str) -> String {
    let allowed = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '-' | '_') { c } else { '_' };
    let name: String = id.chars().take(64).map(allowed).collect();
    if name.is_empty() { "request".to_owned() } else { name }
}

struct Names {
    base: String,
    content_type: &'static str,
}

fn document(stages: &[Stage], chained: bool, names: &Names, folder: &Path) -> Result<Value, Failure> {
    let mut steps = Vec::new();
    let mut model: Option<(String, Option<String>)> = None;
    let mut seed = None;
    for (index, stage) in stages.iter().enumerate() {
        let name = format!("stage{}", index + 1);
        let previous = (chained && index > 0).then(|| format!("previous_result:stage{index}"));
        let call = &stage.parameters;
        if let Some(id) = call.model_id.as_deref().map(str::trim).filter(|id| !id.is_empty()) {
            model = Some((id.to_owned(), call.torch_dtype.clone()));
        }
        let (id, dtype) = model.clone().ok_or_else(|| missing_model("model_id"))?;
        seed = call.seed.or(seed);
        let saved = (!chained || index + 1 == stages.len())
            .then(|| json!({ "content_type": names.content_type, "file_base_name": format!("{}-{name}", names.base) }));
        let mut inputs = Inputs { call, previous, folder, name: &name, extra: Vec::new() };
        let arguments = inputs.arguments(stage.method)?;
        steps.append(&mut inputs.extra);
        let mut step = Map::new();
        step.insert("name".into(), name.into());
        if let Some(seed) = starting(seed)? {
            step.insert("seed".into(), seed.into());
        }
        step.insert("pipeline".into(), pipeline(stage.method, (&id, dtype.as_deref()), call, arguments)?);
        if let Some(result) = saved {
            step.insert("result".into(), result);
        }
        steps.push(Value::Object(step));
    }
    // The run has the first stage's seed, so that this is the one its result names.
    let first = steps.iter().find(|step| step.get("pipeline").is_some());
    let seed = first.and_then(|step| step.get("seed")).cloned();
    let mut document = json!({ "id": names.base, "steps": steps });
    if let Some(seed) = seed {
        document["seed"] = seed;
    }
    Ok(document)
}

/// The seed of a stage; hosts write -1 for one that is drawn.
fn starting(seed: Option<i64>) -> Result<Option<u64>, Failure> {
    match seed {
        None | Some(-1) => Ok(None),
        Some(seed) => u64::try_from(seed).map(Some).map_err(|_| {
            Failure::bad_request(format!("`seed` is `{seed}`")).with_remedy("use 0 or more, or -1 to have one drawn")
        }),
    }
}

fn pipeline(
    method: StageMethod,
    (id, dtype): (&str, Option<&str>),
    call: &Generation,
    arguments: Map<String, Value>,
) -> Result<Value, Failure> {
    let class = match method {
        StageMethod::Text2img => "AutoPipelineForText2Image",
        StageMethod::Img2img => "AutoPipelineForImage2Image",
        StageMethod::Inpaint => "AutoPipelineForInpainting",
    };
    let is_file = [".safetensors", ".gguf", ".ckpt"].iter().any(|ending| id.to_lowercase().ends_with(ending));
    let mut from = Map::new();
    from.insert(if is_file { "from_single_file" } else { "model_name" }.into(), id.into());
    if let Some(dtype) = dtype {
        from.insert("torch_dtype".into(), dtype.into());
    }
    let mut pipeline = Map::new();
    pipeline.insert("configuration".into(), json!({ "component_type": class }));
    pipeline.insert("from_pretrained_arguments".into(), Value::Object(from));
    if let Some(scheduler) = call.scheduler.as_deref().map(preset).transpose()?.flatten() {
        pipeline.insert("scheduler".into(), scheduler);
    }
    if let Some(loras) = call.lora.as_ref().filter(|loras| loras.enabled) {
        pipeline.insert("loras".into(), self::loras(loras));
    }
    pipeline.insert("arguments".into(), Value::Object(arguments));
    Ok(Value::Object(pipeline))
}

fn loras(loras: &Loras) -> Value {
    let adapter = |lora: &super::LoraAdapter| json!({ "model_name": lora.model_id, "scale": lora.weight });
    Value::Array(loras.adapters.iter().map(adapter).collect())
}

/// A name, the scheduler with whether its sigmas are Karras', and the number of steps.
type Preset = (&'static str, Option<(&'static str, bool)>, u32);

/// The presets. `fast` keeps the model's own scheduler.
const PRESETS: [Preset; 3] = [
    ("fast", None, 20),
    ("balanced", Some(("DPMSolverMultistepScheduler", true)), 28),
    ("best", Some(("DPMSolverMultistepScheduler", true)), 50),
];

/// The `scheduler` of a pipeline for a preset or a class.
fn preset(name: &str) -> Result<Option<Value>, Failure> {
    let name = name.trim();
    if let Some((_, scheduler, _)) = PRESETS.iter().find(|(preset, ..)| preset.eq_ignore_ascii_case(name)) {
        return Ok(scheduler.map(|(class, karras)| {
            json!({ "configuration": { "scheduler_type": class }, "from_config_args": { "use_karras_sigmas": karras } })
        }));
    }
    if name.ends_with("Scheduler") {
        return Ok(Some(json!({ "configuration": { "scheduler_type": name } })));
    }
    Err(Failure::bad_request(format!("`scheduler` is `{name}`"))
        .with_remedy("use a scheduler class (`dw schedulers` lists them), or `fast`, `balanced` or `best`"))
}

/// The arguments of one stage, and the steps and files they need.
struct Inputs<'a> {
    call: &'a Generation,
    previous: Option<String>,
    folder: &'a Path,
    name: &'a str,
    extra: Vec<Value>,
}

impl Inputs<'_> {
    fn arguments(&mut self, method: StageMethod) -> Result<Map<String, Value>, Failure> {
        let call = self.call;
        if call.prompt.trim().is_empty() {
            return Err(Failure::bad_request("`prompt` is missing").with_remedy("say what the picture should show"));
        }
        let mut arguments = Map::new();
        let mut put = |name: &str, value: Option<Value>| {
            if let Some(value) = value {
                arguments.insert(name.to_owned(), value);
            }
        };
        put("prompt", Some(call.prompt.as_str().into()));
        put("negative_prompt", call.negative_prompt.as_deref().map(Value::from));
        put("guidance_scale", call.guidance_scale.map(Value::from));
        put("num_images_per_prompt", call.num_images.map(Value::from));
        let preset = |name: &str| PRESETS.iter().find(|(preset, ..)| preset.eq_ignore_ascii_case(name.trim()));
        let steps = call.scheduler.as_deref().and_then(preset).map(|(_, _, steps)| *steps);
        put("num_inference_steps", call.num_inference_steps.or(steps).map(Value::from));
        if method != StageMethod::Img2img {
            put("width", call.width.map(Value::from));
            put("height", call.height.map(Value::from));
        }
        if method == StageMethod::Text2img {
            for (name, given) in [
                ("image", call.image.is_some()),
                ("mask_image", call.mask_image.is_some()),
                ("strength", call.strength.is_some()),
            ] {
                if given {
                    return Err(Failure::bad_request(format!("`{name}` has no effect on `text2img`"))
                        .with_remedy("use `img2img` or `inpaint`, or leave it out"));
                }
            }
            return Ok(arguments);
        }
        put("strength", call.strength.map(Value::from));
        let picture = match (&call.image, &self.previous) {
            (Some(image), _) => self.media(image, "image")?,
            (None, Some(previous)) => previous.as_str().into(),
            (None, None) => {
                return Err(Failure::bad_request("`image` is missing").with_remedy("give a path or base64"));
            }
        };
        let picture = if method == StageMethod::Img2img { self.resized(picture)? } else { picture };
        arguments.insert("image".into(), picture);
        if method == StageMethod::Inpaint {
            let Some(mask) = &call.mask_image else {
                return Err(Failure::bad_request("`mask_image` is missing")
                    .with_remedy("give a picture that is white where something new is painted"));
            };
            arguments.insert("mask_image".into(), self.media(mask, "mask_image")?);
        } else if call.mask_image.is_some() {
            return Err(Failure::bad_request("`mask_image` has no effect on `img2img`")
                .with_remedy("use `inpaint`, or leave it out"));
        }
        Ok(arguments)
    }

    /// The picture in the size that the call asks for, by a step of its own.
    fn resized(&mut self, picture: Value) -> Result<Value, Failure> {
        let (width, height) = match (self.call.width, self.call.height) {
            (None, None) => return Ok(picture),
            (Some(width), Some(height)) => (width, height),
            _ => {
                return Err(Failure::bad_request("`width` and `height` of `img2img` go together")
                    .with_remedy("give both, or neither to keep the picture's size"));
            }
        };
        let name = format!("{}-size", self.name);
        let reference = format!("previous_result:{name}");
        let arguments = json!({ "image": picture, "width": width, "height": height });
        let task = json!({ "command": "resize_center_crop", "arguments": arguments });
        self.extra.push(json!({ "name": name, "task": task }));
        Ok(reference.into())
    }

    /// A picture given by path or as base64, as a workflow names it.
    fn media(&self, given: &str, what: &str) -> Result<Value, Failure> {
        let location = |path: &Path| json!({ "media_type": "image", "location": path.display().to_string() });
        if given.contains("://") {
            return Ok(json!({ "media_type": "image", "location": given }));
        }
        let inline = given.strip_prefix("data:").and_then(|url| url.split_once(";base64,")).map(|(_, bytes)| bytes);
        if inline.is_none() && (given.len() < 1024 && Path::new(given).exists()) {
            let path = std::path::absolute(given).map_err(|error| Failure::bad_request(error.to_string()))?;
            return Ok(location(&path));
        }
        let missing = || {
            let shown: String = given.chars().take(80).collect();
            Failure::bad_request(format!("`{what}` is neither a file nor a picture in base64: `{shown}`"))
                .with_remedy("give the path of a picture, or its bytes as base64")
        };
        let bytes = STANDARD.decode(inline.unwrap_or(given).trim()).map_err(|_| missing())?;
        let ending = match bytes.as_slice() {
            [0x89, b'P', b'N', b'G', ..] => "png",
            [0xff, 0xd8, ..] => "jpg",
            [b'R', b'I', b'F', b'F', ..] => "webp",
            [b'B', b'M', ..] => "bmp",
            _ => return Err(missing()),
        };
        let path = self.folder.join(format!("{}-{what}.{ending}", self.name));
        fs::write(&path, bytes).map_err(|error| Failure::new(FailureCode::SetupFailed, error.to_string()))?;
        Ok(location(&path))
    }
}

#[cfg(test)]
mod tests;
