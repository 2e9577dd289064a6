//! Writes a model with some of its components in fewer bits: a folder that loads directly, and that other programs read.
//!
//! Everything goes into a folder beside the wanted one, which is renamed when it is complete.

use std::{
    io::BufWriter,
    path::{Path, PathBuf},
    sync::Arc,
};

use dw_core::{cancel::CancellationToken, document::with_finite_numbers};
use dw_pipelines::{
    Error, Result,
    quant::Format,
    weights::{Source, Written, folder, single_file::Checkpoint, write_quantized},
};
use fs_err as fs;
use serde_json::{Value, json};

/// Components that are quantized when none is named: what removes the noise.
const DENOISERS: [&str; 2] = ["transformer", "unet"];

/// What to quantize.
#[derive(Clone, Debug)]
pub struct QuantizeRequest {
    /// A model in the diffusers layout, a folder with one component, or a checkpoint in a single file, of which one
    /// component is written.
    pub model: PathBuf,
    /// The format of its layers.
    pub format: Format,
    /// Where the new folder goes; must not exist, or be empty.
    pub output: PathBuf,
    /// Components to quantize; the denoiser when none is named.
    pub components: Vec<String>,
    /// A folder with the configuration of a component in a single file, where its shapes do not say everything: a model
    /// in the diffusers layout, or the component of one.
    pub config: Option<PathBuf>,
    /// The variant of their weights (`fp16`) that is read.
    pub variant: Option<String>,
}

/// Quantizes and writes. `progress` hears of the component and the bytes read of how many. Gives what was written, by
/// component; the name is empty where the folder is one component.
pub fn quantize(
    request: &QuantizeRequest,
    cancel: &CancellationToken,
    progress: &mut dyn FnMut(&str, u64, u64),
) -> Result<Vec<(String, Written)>> {
    let mut tell = |component: &str, done: u64, total: u64| {
        cancel.check()?;
        progress(component, done, total);
        Ok(())
    };
    if request.model.is_file() {
        return quantize_file(request, &mut tell);
    }
    let components = components(request)?;
    check_output(&request.output, &request.model)?;
    let staging = Staging::beside(&request.output)?;
    copy_folder(&request.model, staging.path(), &components, cancel)?;
    let mut written = Vec::new();
    for component in components {
        let (source, target) = (request.model.join(&component), staging.path().join(&component));
        let files = folder::weight_files(&source, request.variant.as_deref())?;
        let config = read_config(&target.join("config.json"))?;
        let mut tell = |done, total| tell(&component, done, total);
        let report = write_component(Source::Files(&files), config, &target, request.format, &mut tell)?;
        written.push((component.clone(), report));
    }
    staging.settle(&request.output)?;
    Ok(written)
}

/// Quantizes one component of a checkpoint in a single file into a folder of its own.
fn quantize_file(
    request: &QuantizeRequest,
    tell: &mut dyn FnMut(&str, u64, u64) -> Result<()>,
) -> Result<Vec<(String, Written)>> {
    let checkpoint = Arc::new(Checkpoint::open(&request.model)?);
    let place = request.model.display();
    let held = checkpoint.components().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    let name = match request.components.as_slice() {
        [] => checkpoint.main_component().ok_or_else(|| {
            Error::Unsupported(format!("`{place}` holds {held}; name one of them with `--component`"))
        })?,
        [one] => one.as_str(),
        _ => {
            return Err(Error::Unsupported(format!(
                "of a single file one component is written, to a folder of its own; name one `--component` of {held}"
            )));
        }
    };
    let config = request.config.as_deref().map(|folder| component_config(folder, name)).transpose()?;
    let (part, config) = checkpoint
        .component(name, config)?
        .ok_or_else(|| Error::Unsupported(format!("`{place}` has no component `{name}`; it holds {held}")))?;
    check_output(&request.output, &request.model)?;
    let staging = Staging::beside(&request.output)?;
    let mut tell = |done, total| tell(name, done, total);
    let written = write_component(Source::Part(&part), config, staging.path(), request.format, &mut tell)?;
    staging.settle(&request.output)?;
    Ok(vec![(name.to_owned(), written)])
}

/// The configuration of the component `name` in a model, or of the component itself.
fn component_config(folder: &Path, name: &str) -> Result<Value> {
    let of_model = folder.join(name).join("config.json");
    read_config(&if of_model.is_file() { of_model } else { folder.join("config.json") })
}

/// A folder beside the wanted one, which goes away unless it is settled.
struct Staging(tempfile::TempDir);

impl Staging {
    fn beside(output: &Path) -> Result<Self> {
        let parent = output.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        fs::create_dir_all(parent)?;
        Ok(Self(tempfile::Builder::new().prefix(".dw-").suffix(".tmp").tempdir_in(parent)?))
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    /// Gives it its name.
    fn settle(self, output: &Path) -> Result<()> {
        if output.is_dir() {
            fs::remove_dir(output)?;
        }
        let staging = self.0.keep();
        Ok(fs::rename(&staging, output).inspect_err(|_| drop(fs::remove_dir_all(&staging)))?)
    }
}

/// The components to quantize as folders below the model; one empty name for a folder that is a component itself.
fn components(request: &QuantizeRequest) -> Result<Vec<String>> {
    let (model, place) = (&request.model, request.model.display());
    if !model.is_dir() {
        return Err(Error::Source(format!(
            "nothing is at `{place}`; name a model in the diffusers layout or a checkpoint on this machine (a model of the \
             hub must be downloaded first)"
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
    if request.components.is_empty() {
        let found = DENOISERS.into_iter().find(|name| model.join(name).is_dir());
        let found = found.ok_or_else(|| {
            let names = DENOISERS.join("` or `");
            Error::BadFile {
                path: model.clone(),
                reason: format!("has no `{names}`; name a component with `--component`"),
            }
        })?;
        folder::weight_files(&model.join(found), request.variant.as_deref())?;
        return Ok(vec![found.to_owned()]);
    }
    for name in &request.components {
        let is_plain = Path::new(name).file_name().is_some_and(|file| file == name.as_str());
        if !is_plain {
            return Err(Error::Unsupported(format!("`{name}` is no name of a component; use one like `transformer`")));
        }
        if !model.join(name).is_dir() {
            return Err(Error::BadFile {
                path: model.clone(),
                reason: format!("has no component `{name}`; it has {}", parts(model)?),
            });
        }
        folder::weight_files(&model.join(name), request.variant.as_deref())?;
    }
    let mut components = request.components.clone();
    components.sort();
    components.dedup();
    Ok(components)
}

/// The folders of a model, for a message.
fn parts(model: &Path) -> Result<String> {
    let mut names = Vec::new();
    for entry in fs::read_dir(model)? {
        let entry = entry?;
        if entry.path().is_dir() {
            names.push(format!("`{}`", entry.file_name().to_string_lossy()));
        }
    }
    names.sort();
    Ok(names.join(", "))
}

/// Refuses an output that is taken, or lies inside of the model that is copied.
fn check_output(output: &Path, model: &Path) -> Result<()> {
    let whole = std::path::absolute(output)?;
    let known = whole.ancestors().find_map(|path| fs::canonicalize(path).ok());
    if known.is_some_and(|known| fs::canonicalize(model).is_ok_and(|model| model.is_dir() && known.starts_with(model)))
    {
        return Err(Error::BadFile {
            path: output.to_owned(),
            reason: "lies inside of the model; name a folder beside it".into(),
        });
    }
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

/// Writes weights and configuration of a component into the folder `target`.
fn write_component(
    source: Source<'_>,
    mut config: Value,
    target: &Path,
    format: Format,
    progress: &mut dyn FnMut(u64, u64) -> Result<()>,
) -> Result<Written> {
    let class = config.get("_class_name").or(config.pointer("/architectures/0")).and_then(Value::as_str);
    let class = class.unwrap_or_default().to_owned();
    let stem = if config.get("_class_name").is_some() { "diffusion_pytorch_model" } else { "model" };
    let ending = if format.is_ggml() { "gguf" } else { "safetensors" };
    let file = fs::File::create(target.join(format!("{stem}.{ending}")))?;
    let mut out = BufWriter::new(file);
    let written = write_quantized(source, (format, &class), architecture(&config), &mut out, progress)?;
    out.into_inner().map_err(std::io::IntoInnerError::into_error)?.sync_all()?;
    if let (Some(described), Some(config)) = (described(format), config.as_object_mut()) {
        config.insert("quantization_config".into(), described);
    }
    let config_file = target.join("config.json");
    // A copy that says everything stays as its publisher wrote it.
    if described(format).is_some() || !config_file.is_file() {
        fs::write(config_file, serde_json::to_string_pretty(&config).map_err(std::io::Error::from)?)?;
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

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use candle_core::{DType, Device, Tensor};
    use dw_pipelines::weights::Weights;

    use super::*;

    /// A model with a transformer of one layer and a file beside it.
    fn model(root: &Path) -> PathBuf {
        let model = root.join("model");
        fs::create_dir_all(model.join("transformer")).expect("a temporary folder");
        fs::create_dir_all(model.join("tokenizer")).expect("a temporary folder");
        let values: Vec<f32> = (0..512).map(|i| (i % 37) as f32 / 37.0 - 0.5).collect();
        let weight = Tensor::from_vec(values, (2, 256), &Device::Cpu).expect("a matrix");
        let tensors = HashMap::from([("proj.weight", weight)]);
        let file = model.join("transformer/diffusion_pytorch_model.safetensors");
        candle_core::safetensors::save(&tensors, file).expect("written");
        fs::write(model.join("model_index.json"), "{}").expect("written");
        fs::write(model.join("transformer/config.json"), r#"{"_class_name": "FluxTransformer2DModel"}"#)
            .expect("written");
        fs::write(model.join("tokenizer/vocab.json"), "{}").expect("written");
        model
    }

    fn run(model: &Path, output: &Path, to: &str, components: &[&str]) -> Result<Vec<(String, Written)>> {
        let request = QuantizeRequest {
            model: model.to_owned(),
            format: Format::parse(to)?,
            output: output.to_owned(),
            components: components.iter().map(|name| (*name).to_owned()).collect(),
            config: None,
            variant: None,
        };
        quantize(&request, &CancellationToken::default(), &mut |_, _, _| {})
    }

    #[test]
    fn the_new_folder_holds_the_quantized_component_and_everything_else() {
        for (to, file) in [("q4_k", "diffusion_pytorch_model.gguf"), ("nf4", "diffusion_pytorch_model.safetensors")] {
            let root = tempfile::tempdir().expect("a temporary folder");
            let (model, output) = (model(root.path()), root.path().join("new/model"));
            let written = run(&model, &output, to, &[]).expect("it is quantized");
            assert_eq!((written[0].0.as_str(), written[0].1.quantized), ("transformer", 1));
            assert!(output.join("tokenizer/vocab.json").is_file() && output.join("model_index.json").is_file());
            let config = fs::read_to_string(output.join("transformer/config.json")).expect("copied");
            assert_eq!(config.contains("bitsandbytes"), to == "nf4");
            let files = folder::weight_files(&output.join("transformer"), None).expect("they are found");
            assert_eq!(files, [output.join("transformer").join(file)]);
            let weights = Weights::load(&files, DType::F32, &Device::Cpu, &mut |_| Ok(())).expect("they are read");
            let stored = weights.find_weight("proj.weight").expect("readable").expect("it is there");
            assert_eq!(stored.format(), Format::parse(to).ok());
            assert_eq!(
                fs::read_dir(output.parent().expect("new")).expect("a folder").count(),
                1,
                "nothing is left behind"
            );
            let again = run(&output, &root.path().join("twice"), to, &[]).expect_err("it is quantized already");
            assert!(again.to_string().contains("quantized already"), "{again}");
            assert!(!root.path().join("twice").exists());
        }
    }

    #[test]
    fn what_cannot_be_quantized_is_refused_before_anything_is_written() {
        let root = tempfile::tempdir().expect("a temporary folder");
        let (model, output) = (model(root.path()), root.path().join("out"));
        let empty = root.path().join("empty");
        fs::create_dir_all(&empty).expect("a temporary folder");
        for (model, output, components, said) in [
            (root.path().join("none"), &output, vec![], "nothing is at"),
            (empty.clone(), &output, vec![], "neither `model_index.json` nor `config.json`"),
            (model.clone(), &model, vec![], "lies inside of the model"),
            (model.clone(), &model.join("new/q8"), vec![], "lies inside of the model"),
            (model.clone(), &root.path().to_owned(), vec![], "is there already"),
            (model.clone(), &output, vec!["unet"], "no component `unet`; it has `tokenizer`, `transformer`"),
            (model.clone(), &output, vec!["../model"], "no name of a component"),
            (model.clone(), &output, vec!["tokenizer"], "no `diffusion_pytorch_model.safetensors`"),
            (model.join("transformer"), &output, vec!["vae"], "is one component"),
        ] {
            let message = run(&model, output, "q8_0", &components).expect_err("refused").to_string();
            assert!(message.contains(said), "{message}");
        }
        assert!(!output.exists());
        let written = run(&model.join("transformer"), &empty, "int8", &[]).expect("one component");
        assert_eq!(written[0].0, "");
    }
}
