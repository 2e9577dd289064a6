//! Writes a model with some of its components in fewer bits: a folder that loads directly, and that other programs read.
//!
//! Everything goes into a folder beside the wanted one, which is renamed when it is complete.

use std::{
    io::BufWriter,
    path::{Path, PathBuf},
};

use dw_core::{cancel::CancellationToken, document::with_finite_numbers};
use dw_pipelines::{
    Error, Result,
    quant::Format,
    weights::{Written, folder, write_quantized},
};
use fs_err as fs;
use serde_json::{Value, json};

/// Components that are quantized when none is named: what removes the noise.
const DENOISERS: [&str; 2] = ["transformer", "unet"];

/// What to quantize.
#[derive(Clone, Debug)]
pub struct QuantizeRequest {
    /// A model in the diffusers layout, or a folder with one component.
    pub model: PathBuf,
    /// The format of its layers.
    pub format: Format,
    /// Where the new folder goes; must not exist, or be empty.
    pub output: PathBuf,
    /// Components to quantize; the denoiser when none is named.
    pub components: Vec<String>,
}

/// Quantizes and writes. `progress` hears of the component and the bytes read of how many. Gives what was written, by
/// component; the name is empty where the folder is one component.
pub fn quantize(
    request: &QuantizeRequest,
    cancel: &CancellationToken,
    progress: &mut dyn FnMut(&str, u64, u64),
) -> Result<Vec<(String, Written)>> {
    let components = components(request)?;
    check_output(&request.output)?;
    let parent = request.output.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(parent)?;
    let staging = tempfile::Builder::new().prefix(".dw-").suffix(".tmp").tempdir_in(parent)?;
    copy_folder(&request.model, staging.path(), &components, cancel)?;
    let mut written = Vec::new();
    for component in components {
        let source = request.model.join(&component);
        let target = staging.path().join(&component);
        let mut tell = |done: u64, total: u64| {
            cancel.check()?;
            progress(&component, done, total);
            Ok(())
        };
        let report = write_component(&source, &target, request.format, &mut tell)?;
        written.push((component.clone(), report));
    }
    if request.output.is_dir() {
        fs::remove_dir(&request.output)?;
    }
    let staging = staging.keep();
    fs::rename(&staging, &request.output).inspect_err(|_| drop(fs::remove_dir_all(&staging)))?;
    Ok(written)
}

/// The components to quantize as folders below the model; one empty name for a folder that is a component itself.
fn components(request: &QuantizeRequest) -> Result<Vec<String>> {
    let (model, place) = (&request.model, request.model.display());
    if !model.is_dir() {
        return Err(Error::Source(format!(
            "`{place}` is no folder; name a model in the diffusers layout on this machine (a model of the hub must be \
             downloaded first)"
        )));
    }
    if !model.join("model_index.json").is_file() {
        if !model.join("config.json").is_file() {
            return Err(Error::BadFile {
                path: model.clone(),
                reason: "holds neither `model_index.json` nor `config.json`; name a model in the diffusers layout, or \
                         the folder of one component"
                    .into(),
            });
        }
        return match request.components.first() {
            None => Ok(vec![String::new()]),
            Some(name) => Err(Error::Unsupported(format!(
                "`{place}` is one component and has no part `{name}`; leave `--component` out"
            ))),
        };
    }
    let is_there = |name: &str| folder::weight_files(&model.join(name), None).is_ok();
    if request.components.is_empty() {
        let found = DENOISERS.into_iter().find(|name| is_there(name));
        let found = found.ok_or_else(|| {
            let names = DENOISERS.join("` or `");
            Error::BadFile {
                path: model.clone(),
                reason: format!("has no `{names}`; name a component with `--component`"),
            }
        })?;
        return Ok(vec![found.to_owned()]);
    }
    for name in &request.components {
        let is_plain = Path::new(name).file_name().is_some_and(|file| file == name.as_str());
        if !is_plain {
            return Err(Error::Unsupported(format!("`{name}` is no name of a component; use one like `transformer`")));
        }
        folder::weight_files(&model.join(name), None)?;
    }
    Ok(request.components.clone())
}

fn check_output(output: &Path) -> Result<()> {
    let is_free = !output.exists() || (output.is_dir() && fs::read_dir(output)?.next().is_none());
    if is_free {
        return Ok(());
    }
    Err(Error::BadFile {
        path: output.to_owned(),
        reason: "is there already; name a folder that does not exist, or an empty one".into(),
    })
}

/// Copies everything but the weights of the components that are quantized.
fn copy_folder(from: &Path, to: &Path, components: &[String], cancel: &CancellationToken) -> Result<()> {
    let dropped = components.iter().map(|name| from.join(name)).collect::<Vec<_>>();
    let mut open = vec![(from.to_owned(), to.to_owned())];
    while let Some((from, to)) = open.pop() {
        fs::create_dir_all(&to)?;
        for entry in fs::read_dir(&from)? {
            cancel.check()?;
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            // Hidden folders hold what version control and downloads leave behind.
            if name.starts_with('.') || (dropped.contains(&from) && is_weights(&name)) {
                continue;
            }
            if entry.path().is_dir() {
                open.push((entry.path(), to.join(&name)));
            } else {
                fs::copy(entry.path(), to.join(&name))?;
            }
        }
    }
    Ok(())
}

fn is_weights(name: &str) -> bool {
    let endings =
        [".safetensors", ".safetensors.index.json", ".bin", ".gguf", ".ckpt", ".pt", ".pth", ".msgpack", ".h5"];
    endings.iter().any(|ending| name.ends_with(ending)) || name.contains(".index.")
}

fn write_component(
    source: &Path,
    target: &Path,
    format: Format,
    progress: &mut dyn FnMut(u64, u64) -> Result<()>,
) -> Result<Written> {
    let files = folder::weight_files(source, None)?;
    let config_file = target.join("config.json");
    let mut config = read_config(&config_file)?;
    let stem = if config.get("_class_name").is_some() { "diffusion_pytorch_model" } else { "model" };
    let ending = if format.is_ggml() { "gguf" } else { "safetensors" };
    let file = fs::File::create(target.join(format!("{stem}.{ending}")))?;
    let mut out = BufWriter::new(file);
    let written = write_quantized(&files, format, architecture(&config), &mut out, progress)?;
    out.into_inner().map_err(std::io::IntoInnerError::into_error)?.sync_all()?;
    if let (Some(described), Some(config)) = (described(format), config.as_object_mut()) {
        config.insert("quantization_config".into(), described);
        let text = serde_json::to_string_pretty(&config).map_err(std::io::Error::from)?;
        fs::write(&config_file, text)?;
    }
    Ok(written)
}

fn read_config(path: &Path) -> Result<Value> {
    let bad = |reason: String| Error::BadFile { path: path.to_owned(), reason };
    if !path.is_file() {
        return Err(bad("is missing; the folder of a component has a `config.json`".into()));
    }
    let text = fs::read_to_string(path)?;
    serde_json::from_str(&with_finite_numbers(&text)).map_err(|error| bad(format!("is not valid JSON ({error})")))
}

/// What a GGUF file of the component with this configuration is called.
fn architecture(config: &Value) -> &'static str {
    let class = config.get("_class_name").and_then(Value::as_str);
    match (class, config.get("model_type").and_then(Value::as_str)) {
        (Some(class), _) if class.starts_with("Flux") => "flux",
        (Some(class), _) if class.starts_with("SD3") => "sd3",
        (Some("UNet2DConditionModel"), _) => match config.get("addition_embed_type") {
            Some(Value::String(_)) => "sdxl",
            _ => "sd1",
        },
        (_, Some("t5")) => "t5encoder",
        (_, Some("clip_text_model")) => "clip",
        _ => "diffusion",
    }
}

/// What the configuration says about the stored weights, for programs that ask it; GGUF files speak for themselves.
fn described(format: Format) -> Option<Value> {
    match format {
        Format::Nf4 | Format::Fp4 => Some(json!({
            "quant_method": "bitsandbytes",
            "load_in_4bit": true,
            "load_in_8bit": false,
            "bnb_4bit_quant_type": format.to_string(),
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_use_double_quant": false,
            "bnb_4bit_quant_storage": "uint8",
        })),
        Format::Int8 => Some(json!({ "quant_method": "bitsandbytes", "load_in_4bit": false, "load_in_8bit": true })),
        Format::Ggml(_) | Format::Float8 => None,
    }
}
