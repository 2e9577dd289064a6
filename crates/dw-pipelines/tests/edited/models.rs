//! The models, drawn from seeds as `tests/parity/make_edited.py` draws them, and the stored calls of them.

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
};

use candle_core::{DType, Device, Tensor, safetensors};
use dw_core::{
    arguments::{Arguments, ArtifactRef},
    artifact::Artifact,
    cancel::CancellationToken,
    event::Silent,
    picture,
};
use dw_pipelines::{
    hub::Hub,
    pipelines::{ComponentCache, Pipeline},
    request::{Context, MemoryRequest, ModelSource, PipelineRequest},
    rng::{Generator, Generators, NoiseDialect},
};
use serde_json::{Map, Value, json};

/// How far a latent may be from the reference's, for each unit of the largest one.
const TOLERANCE: f64 = 1e-4;

type Tensors = HashMap<String, Tensor>;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity")
}

/// A new tensor, from the generator that belongs to its name (FNV-1a).
fn draw(name: &str, shape: &[usize], scale: f64) -> Tensor {
    let seed = name.bytes().fold(0x811C_9DC5_u32, |seed, byte| (seed ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    let mut generator = Generator::new(i128::from(seed), NoiseDialect::Cpu);
    let drawn = generator.randn(shape, DType::F32, &Device::Cpu).expect("noise of any shape");
    (drawn * scale).expect("f32")
}

/// A copy of a fixture's model, to be changed.
pub(crate) struct Model(tempfile::TempDir);

impl Model {
    pub(crate) fn copy(name: &str, class: &str) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        copy_all(&fixtures().join("models").join(name), folder.path());
        let model = Self(folder);
        model.json("model_index.json", |index| index["_class_name"] = json!(class));
        model
    }

    fn json(&self, file: &str, change: impl FnOnce(&mut Value)) {
        let path = self.0.path().join(file);
        let text = std::fs::read_to_string(&path).unwrap_or_else(|_| "{}".into());
        let mut value = serde_json::from_str(&text).expect("valid JSON");
        change(&mut value);
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("a writable folder");
        std::fs::write(&path, value.to_string()).expect("a writable folder");
    }

    fn tensors(&self, component: &str, change: impl FnOnce(Tensors) -> Tensors) {
        let folder = self.0.path().join(component);
        let files = std::fs::read_dir(&folder).expect("the component").map(|file| file.expect("a file").path());
        let file = files.into_iter().find(|file| file.extension().is_some_and(|ending| ending == "safetensors"));
        let file = file.expect("weights");
        let tensors = change(safetensors::load(&file, &Device::Cpu).expect("valid tensors"));
        safetensors::save(&tensors, &file).expect("a writable folder");
    }

    /// Lets the UNet read `extra` more channels.
    fn widen(&self, extra: usize) {
        self.json("unet/config.json", |config| config["in_channels"] = json!(4 + extra));
        self.tensors("unet", |mut tensors| {
            let weight = &tensors["conv_in.weight"];
            let (outputs, _, height, width) = weight.dims4().expect("a convolution");
            let more = draw("conv_in.weight", &[outputs, extra, height, width], 0.15);
            let wide = Tensor::cat(&[weight, &more], 1).expect("the same shape");
            tensors.insert("conv_in.weight".into(), wide);
            tensors
        });
    }

    /// The weights and configuration of the component anew.
    fn replace(&self, component: &str, config: &Value, tensors: Tensors) {
        self.json(&format!("{component}/config.json"), |old| *old = config.clone());
        self.tensors(component, |_| tensors);
    }

    fn scheduler(&self, name: &str, class: &str, config: &Value) {
        self.json("model_index.json", |index| index[name] = json!(["diffusers", class]));
        self.json(&format!("{name}/scheduler_config.json"), |old| *old = config.clone());
    }
}

fn copy_all(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).expect("the fixtures are there") {
        let (path, name) = entry.map(|entry| (entry.path(), entry.file_name())).expect("a readable folder");
        if path.is_dir() {
            std::fs::create_dir(to.join(&name)).expect("a writable folder");
            copy_all(&path, &to.join(&name));
        } else {
            std::fs::copy(&path, to.join(&name)).expect("a writable folder");
        }
    }
}

pub(crate) fn pix2pix(base: &str, class: &str) -> Model {
    let model = Model::copy(base, class);
    model.widen(4);
    model
}

/// Three levels in the autoencoder, classes in the UNet.
pub(crate) fn upscaler() -> Model {
    let model = Model::copy("sd15", "StableDiffusionUpscalePipeline");
    model.widen(3);
    model.json("unet/config.json", |config| config["num_class_embeds"] = json!(1000));
    model.tensors("unet", |mut tensors| {
        let name = "class_embedding.weight";
        tensors.insert(name.into(), draw(name, &[1000, 32], 0.5));
        tensors
    });
    model.json("vae/config.json", |config| {
        for key in ["block_out_channels", "down_block_types", "up_block_types"] {
            config[key].as_array_mut().expect("a list").truncate(3);
        }
    });
    model.tensors("vae", |tensors| tensors.into_iter().filter_map(in_three_levels).collect());
    let betas = json!({ "beta_schedule": "scaled_linear", "beta_start": 0.0001, "beta_end": 0.02 });
    model.scheduler("low_res_scheduler", "DDPMScheduler", &betas);
    let config = json!({
        "beta_schedule": "scaled_linear", "clip_sample": false, "set_alpha_to_one": false, "steps_offset": 1,
        "prediction_type": "v_prediction"
    });
    model.scheduler("scheduler", "DDIMScheduler", &config);
    model.json("model_index.json", |index| index["max_noise_level"] = json!(350));
    model
}

/// The tensor as it is without the innermost level of encoder and decoder.
fn in_three_levels((name, tensor): (String, Tensor)) -> Option<(String, Tensor)> {
    let is_gone = ["encoder.down_blocks.3.", "encoder.down_blocks.2.downsamplers.", "decoder.up_blocks.0."];
    if is_gone.iter().any(|start| name.starts_with(start)) {
        return None;
    }
    let level = (1..4).find(|level| name.starts_with(&format!("decoder.up_blocks.{level}.")));
    let name = level.map_or(name.clone(), |level| {
        name.replace(&format!("up_blocks.{level}."), &format!("up_blocks.{}.", level - 1))
    });
    Some((name, tensor))
}

/// Names and shapes of a UNet of k-diffusion's blocks.
#[derive(Default)]
struct Shapes(BTreeMap<String, Vec<usize>>);

impl Shapes {
    const TIME: usize = 64;
    const TEXT: usize = 32;

    fn layer(&mut self, path: &str, weight: &[usize], has_bias: bool) {
        self.0.insert(format!("{path}.weight"), weight.to_vec());
        if has_bias {
            self.0.insert(format!("{path}.bias"), weight[..1].to_vec());
        }
    }

    fn resnet(&mut self, path: &str, inputs: usize, inner: usize, outputs: usize) {
        self.layer(&format!("{path}.norm1.linear"), &[2 * inputs, Self::TIME], true);
        self.layer(&format!("{path}.conv1"), &[inner, inputs, 3, 3], true);
        self.layer(&format!("{path}.norm2.linear"), &[2 * inner, Self::TIME], true);
        self.layer(&format!("{path}.conv2"), &[outputs, inner, 3, 3], true);
        if inputs != outputs {
            self.layer(&format!("{path}.conv_shortcut"), &[outputs, inputs, 1, 1], false);
        }
    }

    fn attention(&mut self, path: &str, channels: usize, has_self: bool) {
        for (name, context) in [("1", channels), ("2", Self::TEXT)] {
            if name == "1" && !has_self {
                continue;
            }
            self.layer(&format!("{path}.norm{name}.linear"), &[2 * channels, Self::TIME], true);
            let inner = format!("{path}.attn{name}");
            for (projection, inputs) in
                [("to_q", channels), ("to_k", context), ("to_v", context), ("to_out.0", channels)]
            {
                self.layer(&format!("{inner}.{projection}"), &[channels, inputs], true);
            }
            if name == "2" {
                self.layer(&format!("{inner}.norm_cross"), &[context], true);
            }
        }
    }

    fn unet() -> Self {
        let mut shapes = Self::default();
        shapes.layer("conv_in", &[32, 8, 1, 1], true);
        shapes.layer("conv_out", &[5, 32, 1, 1], true);
        shapes.layer("time_proj", &[Self::TIME / 2], false);
        shapes.layer("time_embedding.cond_proj", &[Self::TIME, 160], false);
        shapes.layer("time_embedding.linear_1", &[Self::TIME, Self::TIME], true);
        shapes.layer("time_embedding.linear_2", &[Self::TIME, Self::TIME], true);
        for (level, inputs, channels) in [(0, 32, 32), (1, 32, 32), (2, 32, 64), (3, 64, 64)] {
            for layer in 0..2 {
                let path = |part: &str| format!("down_blocks.{level}.{part}.{layer}");
                let inputs = if layer == 0 { inputs } else { channels };
                shapes.resnet(&path("resnets"), inputs, channels, channels);
                if level > 0 {
                    shapes.attention(&path("attentions"), channels, level == 3);
                }
            }
        }
        for (level, inputs, channels, outputs) in [(0, 64, 64, 64), (1, 128, 64, 32), (2, 64, 32, 32), (3, 64, 32, 32)]
        {
            for layer in 0..2 {
                let path = |part: &str| format!("up_blocks.{level}.{part}.{layer}");
                let (inputs, own) = if layer == 0 { (inputs, channels) } else { (channels, outputs) };
                shapes.resnet(&path("resnets"), inputs, if level < 3 { channels } else { own }, own);
                if level < 3 {
                    shapes.attention(&path("attentions"), own, level == 0);
                }
            }
        }
        shapes
    }

    fn draw(self) -> Tensors {
        let tensor = |(name, shape): (String, Vec<usize>)| {
            let fan_in: usize = if shape.len() > 1 { shape[1..].iter().product() } else { 16 };
            let scale = if name == "time_proj.weight" { 0.5 } else { (fan_in as f64).powf(-0.5) };
            let mut drawn = draw(&name, &shape, scale);
            if name.ends_with("norm_cross.weight") {
                drawn = (drawn + 1.0).expect("f32");
            }
            (name, drawn)
        };
        self.0.into_iter().map(tensor).collect()
    }
}

pub(crate) fn latent_upscaler() -> Model {
    let model = Model::copy("sd15", "StableDiffusionLatentUpscalePipeline");
    let (cross_down, cross_up) = ("KCrossAttnDownBlock2D", "KCrossAttnUpBlock2D");
    let config = json!({
        "_class_name": "UNet2DConditionModel", "sample_size": 8, "in_channels": 8, "out_channels": 5,
        "block_out_channels": [32, 32, 64, 64], "layers_per_block": 2,
        "down_block_types": ["KDownBlock2D", cross_down, cross_down, cross_down], "mid_block_type": null,
        "up_block_types": [cross_up, cross_up, cross_up, "KUpBlock2D"], "act_fn": "gelu", "norm_num_groups": null,
        "cross_attention_dim": Shapes::TEXT, "attention_head_dim": 16, "resnet_time_scale_shift": "scale_shift",
        "time_embedding_type": "fourier", "timestep_post_act": "gelu", "time_cond_proj_dim": 160,
        "conv_in_kernel": 1, "conv_out_kernel": 1
    });
    model.replace("unet", &config, Shapes::unet().draw());
    let config = json!({
        "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
        "prediction_type": "original_sample"
    });
    model.scheduler("scheduler", "EulerDiscreteScheduler", &config);
    model
}

/// As many values of the tensor as the fixture keeps, evenly spaced.
fn kept(values: &[f32], count: usize) -> Vec<f64> {
    (0..count).map(|at| f64::from(values[at * (values.len() - 1) / (count - 1)])).collect()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().expect("numbers").iter().map(|number| number.as_f64().expect("a number")).collect()
}

/// The largest difference.
fn distance(found: &[f64], expected: &[f64]) -> f64 {
    found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, |worst, distance| distance.max(worst))
}

fn load(model: &Model, cache: &mut ComponentCache, context: Context<'_>) -> dw_pipelines::Result<Pipeline> {
    let hub = Hub { cache: PathBuf::new(), endpoint: String::new(), token: None, offline: true };
    let request = PipelineRequest {
        class: "DiffusionPipeline".into(),
        source: ModelSource::Folder(model.0.path().to_owned()),
        variant: None,
        dtype: None,
        device: Device::Cpu,
        components: BTreeMap::new(),
        scheduler: None,
        loras: Vec::new(),
        textual_inversions: Vec::new(),
        prompt_weighting: false,
        ip_adapters: Vec::new(),
        memory: MemoryRequest::default(),
    };
    Pipeline::load(&request, &hub, cache, context)
}

/// Runs the call of a case; returns what it made, and the largest difference of a latent.
pub(crate) fn run(model: &Model, call: &Map<String, Value>, expected: &Value) -> Result<(Vec<Artifact>, f64), String> {
    let cancel = CancellationToken::default();
    let context = Context { events: &Silent, cancel: &cancel };
    let said = |error: dw_pipelines::Error| error.to_string();
    let mut pipeline = load(model, &mut ComponentCache::new(None), context).map_err(said)?;
    let mut values = call.clone();
    values.remove("model");
    let seed = values.remove("seed").and_then(|seed| seed.as_i64()).expect("a seed");
    let name = values.remove("image").expect("a picture");
    let path = fixtures().join(format!("inputs/{}.png", name.as_str().expect("a name")));
    let mut picture = picture::load(&path).expect("a picture");
    if let Some(crop) = values.remove("crop") {
        let sides = numbers(&crop);
        picture = picture.crop_imm(0, 0, sides[0] as u32, sides[1] as u32);
    }
    let handle = ArtifactRef(0);
    values.insert("image".into(), handle.to_value());
    let mut arguments = Arguments { values, ..Arguments::default() };
    arguments.artifacts.insert(handle.0, Artifact::image(picture));
    let mut generators = Generators::One(Generator::new(i128::from(seed), NoiseDialect::Cpu));
    let mut complaint = None;
    let (mut steps, mut worst) = (0, 0.0f64);
    let entry = pipeline.run_observed(&arguments, &mut generators, context, &mut |step, latents| {
        let expected = numbers(&expected["steps"][step]);
        let values = latents.flatten_all()?.to_vec1::<f32>()?;
        let size = expected.iter().fold(1.0, |size: f64, value| size.max(value.abs()));
        let distance = distance(&kept(&values, expected.len()), &expected);
        worst = worst.max(distance);
        if complaint.is_none() && (distance.is_nan() || distance > TOLERANCE * size) {
            complaint = Some(format!("the latents of step {step} are off by {distance:.1e}"));
        }
        steps += 1;
        Ok(())
    });
    let entry = entry.map_err(said)?;
    match complaint {
        Some(complaint) => Err(complaint),
        None if steps != expected["steps"].as_array().map_or(0, Vec::len) => Err(format!("{steps} steps")),
        None => Ok((entry.artifacts, worst)),
    }
}

/// All pictures as levels, one after the other.
fn levels(artifacts: &[Artifact]) -> (Vec<f64>, Vec<f32>) {
    let mut size = Vec::new();
    let mut levels = Vec::new();
    for artifact in artifacts {
        let Artifact::Image(picture) = artifact else { panic!("{} is no picture", artifact.kind()) };
        size = vec![f64::from(picture.width()), f64::from(picture.height())];
        levels.extend(picture.to_rgb8().into_raw().into_iter().map(f32::from));
    }
    (size, levels)
}

/// How far a case is from the reference.
pub(crate) struct Measured {
    /// The case.
    pub(crate) name: String,
    /// The largest difference of a kept latent after any step.
    pub(crate) latents: f64,
    /// The largest difference of a kept level of the picture.
    pub(crate) levels: f64,
}

/// Every stored case of a model; panics for one that cannot be compared.
pub(crate) fn measure(name: &str, model: &Model) -> Vec<Measured> {
    let text = std::fs::read_to_string(fixtures().join("edited.json")).expect("the fixture is there");
    let cases: Map<String, Value> = serde_json::from_str(&text).expect("valid JSON");
    let is_of_model = |(_, case): &(&String, &Value)| case["call"]["model"] == name;
    let measured = |(case, expected): (&String, &Value)| {
        let call = expected["call"].as_object().expect("a call");
        let (artifacts, latents) = run(model, call, expected).unwrap_or_else(|complaint| panic!("{case}: {complaint}"));
        let (size, levels) = levels(&artifacts);
        assert_eq!(size, numbers(&expected["size"]), "{case}");
        let expected = numbers(&expected["levels"]);
        Measured { name: case.clone(), latents, levels: distance(&kept(&levels, expected.len()), &expected) }
    };
    cases.iter().filter(is_of_model).map(measured).collect()
}
