//! What a host program asks for in one line: a method with parameters, instead of a workflow.

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};

use super::Failure;

/// The name a host gives a request; every answer to it carries it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum RequestId {
    /// Text, a GUID say.
    Text(String),
    /// A number.
    Number(i64),
}

impl std::fmt::Display for RequestId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Text(text) => f.write_str(text),
            Self::Number(number) => write!(f, "{number}"),
        }
    }
}

/// Who is asked. All three are the same worker; the name says what for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum WorkerType {
    /// Makes pictures.
    SdxlWorker,
    /// Makes pictures in several stages.
    PipelineManager,
    /// Loads and unloads models.
    ModelLoader,
}

/// One request, read and checked as far as that goes without a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// The host's name for it.
    pub request_id: RequestId,
    /// What is to be done.
    pub call: Call,
}

/// What a host can ask for, as `method` and `parameters`.
#[derive(Clone, Debug, PartialEq)]
pub enum Call {
    /// A picture from a prompt.
    Text2img(Generation),
    /// A picture from a picture.
    Img2img(Generation),
    /// Part of a picture painted anew.
    Inpaint(Generation),
    /// Several of these, one after the other or each from the one before.
    Batch(Batch),
    /// Reads a model, so that the first picture comes sooner.
    Load(Model),
    /// Gives up a model's memory; every model's when none is named.
    Unload(Unload),
    /// What is running, waiting and loaded.
    Status,
    /// Stops a running request or removes a waiting one.
    Cancel(Cancel),
}

/// A model and what is put on it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Model {
    /// Folder, `owner/name`, `builtin:NAME`, or a single `.safetensors` or `.gguf` file.
    pub model_id: String,
    /// The type the model runs in: `float32`, `float16` or `bfloat16`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub torch_dtype: Option<String>,
    /// LoRA files.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora: Option<Loras>,
}

/// What a picture is made from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Generation {
    /// Folder, `owner/name`, `builtin:NAME`, or a single `.safetensors` or `.gguf` file. A later stage of a batch goes
    /// on with the model before when it names none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model_id: Option<String>,
    /// The type the model runs in: `float32`, `float16` or `bfloat16`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub torch_dtype: Option<String>,
    /// What the picture should show.
    pub prompt: String,
    /// What it should not show.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub negative_prompt: Option<String>,
    /// Pixels; the model's own size when not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub width: Option<u32>,
    /// Pixels; the model's own size when not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub height: Option<u32>,
    /// How many denoising steps; the preset's, or the pipeline's own number when not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_inference_steps: Option<u32>,
    /// How strongly the prompt is followed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guidance_scale: Option<f64>,
    /// A scheduler class (`EulerDiscreteScheduler`), or a preset: `fast`, `balanced`, `best`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scheduler: Option<String>,
    /// Where the noise starts from; drawn when not given, or -1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<i64>,
    /// How many pictures.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub num_images: Option<u32>,
    /// The picture to start from: a path, or the file's bytes as base64 (plain or as a `data:` URL). A later stage of a
    /// batch goes on with the picture before when it names none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// White where the picture is painted anew: a path or base64.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mask_image: Option<String>,
    /// How far the result may move away from `image`, 0 to 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub strength: Option<f64>,
    /// LoRA files.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora: Option<Loras>,
    /// `base64` to get the pictures in the answer, else where they go: a folder, or a file name ending in `.png`, `.jpg`
    /// or `.webp`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output: Option<String>,
    /// A small preview with the progress of every so many steps.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub preview_every: Option<u32>,
}

/// LoRA files, and whether they act.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Loras {
    /// Whether they act.
    #[serde(deserialize_with = "flag")]
    pub enabled: bool,
    /// The files.
    pub adapters: Vec<LoraAdapter>,
}

/// One LoRA file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LoraAdapter {
    /// A file, a folder or `owner/name`.
    pub model_id: String,
    /// How strongly it acts; may be negative.
    #[serde(default = "one")]
    pub weight: f64,
}

/// Several generations in one request: either `stages` or `requests`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Batch {
    /// Each goes on with the picture of the one before; the last one's pictures are the result.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub stages: Vec<Stage>,
    /// Each for itself; all pictures are the result.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub requests: Vec<Stage>,
    /// As in a single generation, for all of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output: Option<String>,
    /// As in a single generation, for all of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub preview_every: Option<u32>,
}

/// One generation of a batch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Stage {
    /// Which kind.
    pub method: StageMethod,
    /// What it is made from.
    pub parameters: Generation,
}

/// The kinds of generations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum StageMethod {
    /// A picture from a prompt.
    Text2img,
    /// A picture from a picture.
    Img2img,
    /// Part of a picture painted anew.
    Inpaint,
}

/// Which model to give up.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Unload {
    /// As it was named when it was loaded; all models when not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model_id: Option<String>,
}

/// Which request to stop.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Cancel {
    /// The `request_id` of that request.
    pub request_id: RequestId,
}

fn one() -> f64 {
    1.0
}

/// A switch as programs write it: a boolean; null counts as off.
fn flag<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    Ok(Option::<bool>::deserialize(deserializer)?.unwrap_or_default())
}

/// Which methods a worker type has.
fn has_method(worker: WorkerType, method: &str) -> bool {
    match worker {
        WorkerType::SdxlWorker | WorkerType::PipelineManager => true,
        WorkerType::ModelLoader => matches!(method, "load" | "unload" | "status" | "cancel"),
    }
}

/// The methods there are.
const METHODS: [&str; 8] = ["text2img", "img2img", "inpaint", "batch", "load", "unload", "status", "cancel"];

impl Request {
    /// Reads a request from the members of a line.
    ///
    /// # Errors
    /// What is wrong with it, and the `request_id` to answer to when there is one.
    pub fn read(members: &Map<String, Value>) -> Result<Self, (Option<RequestId>, Failure)> {
        let request_id = members.get("request_id").and_then(|id| RequestId::deserialize(id).ok());
        let read = || -> Result<Call, Failure> {
            for key in members.keys() {
                if !["request_id", "worker_type", "method", "parameters"].contains(&key.as_str()) {
                    return Err(Failure::bad_request(format!("`{key}` is no part of a request"))
                        .with_remedy("a request has `request_id`, `worker_type`, `method` and `parameters`"));
                }
            }
            let worker: WorkerType = part(members.get("worker_type").unwrap_or(&Value::Null), "worker_type")?;
            let method = members.get("method").and_then(Value::as_str).unwrap_or_default();
            if !METHODS.contains(&method) {
                return Err(Failure::bad_request(format!("`method` is `{method}`"))
                    .with_remedy(format!("use one of `{}`", METHODS.join("`, `"))));
            }
            if !has_method(worker, method) {
                return Err(Failure::bad_request(format!("a `model_loader` has no method `{method}`"))
                    .with_remedy("send it to `sdxl_worker` or `pipeline_manager`"));
            }
            let empty = Value::Object(Map::new());
            let parameters = members.get("parameters").filter(|value| !value.is_null()).unwrap_or(&empty);
            Call::read(method, parameters)
        };
        match (request_id, read()) {
            (Some(request_id), Ok(call)) => Ok(Self { request_id, call }),
            (Some(request_id), Err(failure)) => Err((Some(request_id), failure)),
            (None, _) => Err((
                None,
                Failure::bad_request("`request_id` is missing or neither text nor a whole number")
                    .with_remedy("give each request a name of its own; the answers carry it"),
            )),
        }
    }
}

impl Call {
    fn read(method: &str, parameters: &Value) -> Result<Self, Failure> {
        let call = match method {
            "text2img" => Self::Text2img(part(parameters, "parameters")?),
            "img2img" => Self::Img2img(part(parameters, "parameters")?),
            "inpaint" => Self::Inpaint(part(parameters, "parameters")?),
            "batch" => Self::Batch(part(parameters, "parameters")?),
            "load" => Self::Load(part(parameters, "parameters")?),
            "unload" => Self::Unload(part(parameters, "parameters")?),
            "status" => Self::Status,
            _ => Self::Cancel(part(parameters, "parameters")?),
        };
        call.check()?;
        Ok(call)
    }

    /// The `method` that asks for it.
    pub fn method(&self) -> &'static str {
        match self {
            Self::Text2img(_) => "text2img",
            Self::Img2img(_) => "img2img",
            Self::Inpaint(_) => "inpaint",
            Self::Batch(_) => "batch",
            Self::Load(_) => "load",
            Self::Unload(_) => "unload",
            Self::Status => "status",
            Self::Cancel(_) => "cancel",
        }
    }

    fn check(&self) -> Result<(), Failure> {
        match self {
            Self::Load(model) if model.model_id.trim().is_empty() => Err(missing_model("parameters.model_id")),
            Self::Batch(batch) if batch.stages.is_empty() == batch.requests.is_empty() => {
                Err(Failure::bad_request("a batch has either `stages` or `requests`, and at least one of them")
                    .with_remedy("`stages` go on from each other, `requests` are each for themselves"))
            }
            Self::Batch(batch) => {
                batch.stages.iter().chain(&batch.requests).find_map(|stage| stage.parameters.output.as_ref()).map_or(
                    Ok(()),
                    |_| {
                        Err(Failure::bad_request("`output` of a stage has no effect")
                            .with_remedy("give `output` to the batch itself"))
                    },
                )
            }
            _ => Ok(()),
        }
    }
}

/// Nothing says which model to run.
pub(super) fn missing_model(place: &str) -> Failure {
    Failure::bad_request(format!("`{place}` is missing"))
        .with_remedy("name a folder, `owner/name`, `builtin:NAME` or a `.safetensors` file")
}

/// A part of a request in its typed form.
fn part<T: DeserializeOwned>(value: &Value, name: &str) -> Result<T, Failure> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error.path().to_string();
        let place = if path == "." { name.to_owned() } else { format!("{name}.{path}") };
        Failure::bad_request(format!("`{place}`: {}", error.inner()))
            .with_remedy("see the schema of requests (`dw schema host-request`)")
    })
}

/// A request as it is written, for the schema.
#[derive(JsonSchema)]
#[allow(dead_code, reason = "only its shape is read")]
struct Written {
    /// The host's name for it; every answer to it carries it.
    request_id: RequestId,
    /// Who is asked.
    worker_type: WorkerType,
    /// What is to be done.
    #[schemars(flatten)]
    call: WrittenCall,
}

/// [`Call`] as `method` and `parameters`.
#[derive(JsonSchema)]
#[serde(tag = "method", content = "parameters", rename_all = "snake_case")]
#[allow(dead_code, reason = "only its shape is read")]
enum WrittenCall {
    /// A picture from a prompt.
    Text2img(Generation),
    /// A picture from a picture.
    Img2img(Generation),
    /// Part of a picture painted anew.
    Inpaint(Generation),
    /// Several of these, one after the other or each from the one before.
    Batch(Batch),
    /// Reads a model, so that the first picture comes sooner.
    Load(Model),
    /// Gives up a model's memory; every model's when none is named.
    Unload(Unload),
    /// What is running, waiting and loaded.
    Status,
    /// Stops a running request or removes a waiting one.
    Cancel(Cancel),
}

/// JSON Schema of a request.
pub fn schema() -> Value {
    let mut schema = schemars::schema_for!(Written);
    schema.insert("title".into(), "A plain request to `dw worker --stdio`".into());
    schema.to_value()
}
