//! Whole calls against HuggingFace diffusers: the same tiny model, arguments and seed must give the same
//! latents after every step and the same picture (`tests/parity/make.py` rebuilds the fixtures).

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use candle_core::{DType, Device, Tensor};
use dw_core::{
    arguments::{Arguments, ArtifactRef},
    artifact::{Artifact, Entry},
    cancel::CancellationToken,
    event::Silent,
    picture,
    seed::Seed,
};
use dw_pipelines::{
    hub::Hub,
    pipelines::{ComponentCache, Pipeline},
    request::{
        ComponentChoice, ComponentRequest, Context, IpAdapterRequest, IpAdapterScale, LoraRequest, MemoryRequest,
        ModelSource, PipelineRequest, SchedulerRequest, TextualInversionRequest,
    },
    rng::{Generators, NoiseDialect},
    weights::Weights,
};
use serde_json::Value;

/// How far latents may be from the reference's, unless the reference itself is less certain.
const LATENT_TOLERANCE: f64 = 1e-3;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity")
}

fn hub() -> Hub {
    Hub { cache: PathBuf::new(), endpoint: String::new(), token: None, offline: true }
}

/// One recorded call, or several where each goes on with what the one before it made.
struct Case {
    name: String,
    given: Value,
    tensors: Weights,
}

/// One call of a case.
struct Stage<'a> {
    case: &'a Case,
    given: &'a Value,
    /// What the names of its tensors start with.
    prefix: String,
}

impl Case {
    /// Every case whose name starts with one of `prefixes`.
    fn all(prefixes: &[&str]) -> Vec<Self> {
        let folders = std::fs::read_dir(fixtures().join("cases")).expect("the fixtures are there");
        let mut cases: Vec<Self> = folders
            .map(|folder| folder.expect("a readable folder").file_name().to_string_lossy().into_owned())
            .filter(|name| prefixes.iter().any(|prefix| name.starts_with(prefix)))
            .map(|name| Self::open(&name))
            .collect();
        cases.sort_by(|a, b| a.name.cmp(&b.name));
        cases
    }

    fn open(name: &str) -> Self {
        let folder = fixtures().join("cases").join(name);
        let text = std::fs::read_to_string(folder.join("case.json")).expect("the case is there");
        let file = folder.join("tensors.safetensors");
        let tensors = Weights::load(&[file], DType::F32, &Device::Cpu, &mut |_| Ok(())).expect("valid tensors");
        Self { name: name.into(), given: serde_json::from_str(&text).expect("valid JSON"), tensors }
    }

    /// Runs all calls; every complaint is one line.
    fn run(&self, cache: &mut ComponentCache) -> Result<(), String> {
        let calls: Vec<Stage> = match self.given.get("stages").and_then(Value::as_array) {
            None => vec![Stage { case: self, given: &self.given, prefix: String::new() }],
            Some(stages) => {
                let stage = |(at, given)| Stage { case: self, given, prefix: format!("s{at}.") };
                stages.iter().enumerate().map(stage).collect()
            }
        };
        let mut before = Vec::new();
        for call in calls {
            before.push(call.run(&before, cache)?);
        }
        Ok(())
    }
}

impl Stage<'_> {
    fn scheduler(&self) -> Option<SchedulerRequest> {
        let scheduler = self.given["load"].get("scheduler")?;
        Some(SchedulerRequest {
            class: scheduler["class"].as_str().map(str::to_owned),
            config: scheduler["config"].as_object().expect("a configuration").clone(),
            shift: None,
        })
    }

    /// Components beside those of the model: one, or a list.
    fn components(&self) -> BTreeMap<String, ComponentChoice> {
        let component = |given: &Value| ComponentRequest {
            class: given["class"].as_str().expect("a class").into(),
            source: ModelSource::Folder(fixtures().join(given["path"].as_str().expect("a folder"))),
            subfolder: None,
            variant: None,
            dtype: None,
            quantization: None,
        };
        let list = |given: &Value| match given {
            Value::Array(list) => list.iter().map(component).collect(),
            one => vec![component(one)],
        };
        let given = self.given["load"]["components"].as_object();
        given.into_iter().flatten().map(|(name, given)| (name.clone(), ComponentChoice::Load(list(given)))).collect()
    }

    fn ip_adapter(&self) -> Option<IpAdapterRequest> {
        let given = self.given["load"].get("ip_adapter")?;
        let text = |key: &str| given[key].as_str().map(str::to_owned);
        Some(IpAdapterRequest {
            source: ModelSource::Folder(fixtures().join(text("path").expect("a folder"))),
            weight_name: text("weight_name"),
            subfolder: text("subfolder"),
            image_encoder_folder: Some("image_encoder".into()),
            scale: IpAdapterScale::from_json(&given["scale"]).expect("a scale"),
        })
    }

    fn request(&self) -> PipelineRequest {
        let base = self.given["load"]["base"].as_str().expect("a model folder");
        PipelineRequest {
            class: self.given["load"]["pipeline_class"].as_str().expect("a class").into(),
            source: ModelSource::Folder(fixtures().join(base)),
            variant: None,
            dtype: None,
            device: Device::Cpu,
            components: self.components(),
            scheduler: self.scheduler(),
            loras: self.loras(),
            textual_inversions: self.textual_inversions(),
            prompt_weighting: false,
            ip_adapters: self.ip_adapter().into_iter().collect(),
            memory: MemoryRequest::default(),
        }
    }

    fn adapters(&self, kind: &str) -> impl Iterator<Item = &Value> {
        self.given["load"][kind].as_array().into_iter().flatten()
    }

    fn loras(&self) -> Vec<LoraRequest> {
        // Fused LoRAs act with the scale of the fusion besides their own.
        let fused = self.given["load"]["fuse_lora"].as_f64().unwrap_or(1.0);
        let lora = |lora: &Value| LoraRequest {
            source: ModelSource::Folder(fixtures().join(lora["path"].as_str().expect("a path"))),
            weight_name: None,
            subfolder: None,
            adapter_name: lora["adapter_name"].as_str().expect("a name").into(),
            scale: fused * lora["weight"].as_f64().expect("a number"),
        };
        self.adapters("lora").map(lora).collect()
    }

    fn textual_inversions(&self) -> Vec<TextualInversionRequest> {
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let inversion = |inversion: &Value| TextualInversionRequest {
            source: ModelSource::Folder(fixtures().join(inversion["path"].as_str().expect("a path"))),
            weight_name: None,
            subfolder: None,
            token: text(&inversion["token"]),
            text_encoder: text(&inversion["text_encoder"]),
        };
        self.adapters("textual_inversion").map(inversion).collect()
    }

    fn seed(&self) -> Seed {
        let number = |seed: &Value| i128::from(seed.as_i64().expect("a seed is a whole number"));
        match &self.given["seed"] {
            Value::Array(seeds) => Seed::Each(seeds.iter().map(number).collect()),
            seed => Seed::One(number(seed)),
        }
    }

    /// The call's arguments: pictures are loaded, results of earlier calls handed on.
    fn arguments(&self, before: &[Entry]) -> Arguments {
        let values = self.given["call"].as_object().expect("arguments").clone();
        let mut arguments = Arguments { values, ..Arguments::default() };
        for name in ["image", "mask_image", "control_image", "ip_adapter_image"] {
            let Some(mut value) = arguments.values.remove(name) else { continue };
            let items = match &mut value {
                Value::Array(items) => items.as_mut_slice(),
                one => std::slice::from_mut(one),
            };
            for item in items {
                let handle = ArtifactRef(arguments.artifacts.len() as u64);
                arguments.artifacts.insert(handle.0, artifact(item, before));
                *item = handle.to_value();
            }
            arguments.values.insert(name.to_owned(), value);
        }
        arguments
    }

    fn expected(&self, name: &str) -> Option<Tensor> {
        let name = format!("{}{name}", self.prefix);
        let shape = self.case.tensors.shape_of(&name)?;
        Some(self.case.tensors.get(shape, &name).expect("a tensor has its own shape"))
    }

    fn tolerance(&self, name: &str) -> f64 {
        let name = format!("{}{name}", self.prefix);
        self.case.given["tolerance_max_abs"][name].as_f64().unwrap_or(0.0).max(LATENT_TOLERANCE)
    }

    fn run(&self, before: &[Entry], cache: &mut ComponentCache) -> Result<Entry, String> {
        let cancel = CancellationToken::default();
        let context = Context { events: &Silent, cancel: &cancel };
        let said = |error: dw_pipelines::Error| error.to_string();
        let mut pipeline = Pipeline::load(&self.request(), &hub(), cache, context).map_err(said)?;
        let mut generators = Generators::from_seed(&self.seed(), NoiseDialect::Cpu);
        let (mut steps, mut complaint) = (0, None);
        let entry = pipeline
            .run_observed(&self.arguments(before), &mut generators, context, &mut |step, latents| {
                let name = format!("latents.step{step}");
                if let Some(expected) = self.expected(&name) {
                    steps += 1;
                    let distance = distance(latents, &expected);
                    if complaint.is_none() && (distance.is_nan() || distance > self.tolerance(&name)) {
                        complaint = Some(format!("{name} is off by {distance:.1e}"));
                    }
                }
                Ok(())
            })
            .map_err(said)?;
        if let Some(complaint) = complaint {
            return Err(complaint);
        }
        if steps == 0 || self.expected(&format!("latents.step{steps}")).is_some() {
            return Err(format!("{steps} steps are too few"));
        }
        self.compare_pictures(&entry.artifacts)?;
        Ok(entry)
    }

    fn compare_pictures(&self, artifacts: &[Artifact]) -> Result<(), String> {
        let Some(expected) = self.expected("image") else {
            return match artifacts {
                [Artifact::Array(latents)] if latents.shape.len() == 4 => Ok(()),
                other => Err(format!("expected latents, found {other:?}")),
            };
        };
        let expected: Vec<Vec<u8>> = (0..expected.dim(0).expect("a batch"))
            .map(|row| expected.get(row).and_then(|row| row.flatten_all()?.to_vec1()).expect("bytes"))
            .collect();
        if artifacts.len() != expected.len() {
            return Err(format!("{} pictures instead of {}", artifacts.len(), expected.len()));
        }
        for (artifact, expected) in artifacts.iter().zip(&expected) {
            let Artifact::Image(picture) = artifact else { return Err(format!("{} is no picture", artifact.kind())) };
            let bytes = picture.to_rgb8().into_raw();
            let worst = bytes.iter().zip(expected).map(|(a, b)| a.abs_diff(*b)).max();
            if bytes.len() != expected.len() || worst > Some(1) {
                return Err(format!("the picture is off by {worst:?} levels"));
            }
        }
        Ok(())
    }
}

/// A picture of the fixtures, or what an earlier call made.
fn artifact(given: &Value, before: &[Entry]) -> Artifact {
    match (given.get("$image").and_then(Value::as_str), given["$stage"].as_u64()) {
        (Some(path), _) => Artifact::image(picture::load(&fixtures().join(path)).expect("a picture")),
        (None, Some(stage)) => before[stage as usize].artifacts[0].clone(),
        (None, None) => panic!("{given} is neither a picture nor an earlier result"),
    }
}

/// The largest absolute difference of two tensors.
fn distance(a: &Tensor, b: &Tensor) -> f64 {
    let difference = (a - b).and_then(|difference| difference.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>());
    f64::from(difference.expect("latents have the reference's shape"))
}

fn check(prefixes: &[&str], count: usize) {
    let cases = Case::all(prefixes);
    assert_eq!(cases.len(), count);
    let mut cache = ComponentCache::new(None);
    let failures: Vec<String> = cases
        .iter()
        .filter_map(|case| case.run(&mut cache).err().map(|complaint| format!("{}: {complaint}", case.name)))
        .collect();
    assert!(failures.is_empty(), "{} of {} cases differ:\n{}", failures.len(), cases.len(), failures.join("\n"));
}

#[test]
fn stable_diffusion_draws_the_reference_pictures() {
    check(&["sd15_t2i_"], 7);
}

#[test]
fn stable_diffusion_xl_draws_the_reference_pictures() {
    check(&["sdxl_t2i_", "sdxl_guidance_rescale"], 23);
}

#[test]
fn stable_diffusion_xl_draws_the_reference_pictures_with_every_sampler() {
    check(&["sdxl_sched_"], 10);
}

#[test]
fn image_to_image_draws_the_reference_pictures() {
    check(&["sd15_i2i", "sdxl_i2i", "sdxl_refiner_i2i"], 6);
}

#[test]
fn inpainting_draws_the_reference_pictures() {
    check(&["sd15_inpaint4", "sdxl_inpaint4"], 4);
}

#[test]
fn controlnets_draw_the_reference_pictures() {
    check(&["sd15_controlnet", "sdxl_controlnet"], 9);
}

#[test]
fn a_refiner_goes_on_with_the_latents_of_a_base_model() {
    check(&["sdxl_base_refiner_ensemble"], 1);
}

#[test]
fn lora_files_of_every_dialect_change_the_picture_as_in_the_reference() {
    check(&["sdxl_lora_", "sd15_lora_"], 8);
}

#[test]
fn learned_words_draw_the_reference_picture() {
    check(&["sdxl_textual_inversion"], 1);
}

#[test]
fn pictures_are_prompts_as_the_reference_has_it() {
    check(&["sdxl_ip_adapter"], 2);
}
