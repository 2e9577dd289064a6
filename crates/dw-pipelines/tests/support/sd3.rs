//! The tiny Stable Diffusion 3.5 of the reference as a folder, and calls of it.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use candle_core::{DType, Device};
use dw_core::{
    arguments::Arguments,
    artifact::{Array, Artifact, Entry},
    cancel::CancellationToken,
    event::Silent,
    picture,
    seed::Seed,
};
use dw_pipelines::{
    Result,
    hub::Hub,
    models::{AutoencoderKl, Sd3Transformer2DModel},
    pipelines::{ComponentCache, Pipeline},
    request::{ComponentChoice, ComponentRequest, Context, MemoryRequest, ModelSource, PipelineRequest},
    rng::{Generator, Generators, NoiseDialect},
    weights::Weights,
};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::tiny::{Autoencoder, Recorder, weights};

pub(crate) fn config<C: DeserializeOwned>(value: Value) -> C {
    serde_json::from_value(value).expect("the configuration is of this model")
}

/// Settings with others on top.
pub(crate) fn with(mut base: Value, more: Value) -> Value {
    let Value::Object(more) = more else { panic!("settings are an object") };
    base.as_object_mut().expect("settings are an object").extend(more);
    base
}

/// The tiny transformer's configuration with other settings on top; its ControlNets share it.
pub(crate) fn transformer_config(more: Value) -> Value {
    with(
        json!({
            "sample_size": 8, "patch_size": 2, "in_channels": 16, "num_layers": 3, "attention_head_dim": 8,
            "num_attention_heads": 4, "joint_attention_dim": 80, "caption_projection_dim": 32,
            "pooled_projection_dim": 64, "out_channels": 16, "pos_embed_max_size": 24,
        }),
        more,
    )
}

/// The transformer of Stable Diffusion 3.5 medium.
pub(crate) fn medium_35() -> Value {
    transformer_config(json!({ "qk_norm": "rms_norm", "dual_attention_layers": [0, 1] }))
}

pub(crate) fn vae_config() -> Value {
    json!({
        "act_fn": "silu", "block_out_channels": [8, 16, 16, 16], "down_block_types": vec!["DownEncoderBlock2D"; 4],
        "up_block_types": vec!["UpDecoderBlock2D"; 4], "force_upcast": true, "in_channels": 3, "latent_channels": 16,
        "layers_per_block": 1, "norm_num_groups": 4, "out_channels": 3, "sample_size": 64, "scaling_factor": 1.5305,
        "shift_factor": 0.0609, "use_quant_conv": false, "use_post_quant_conv": false,
    })
}

pub(crate) fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity")
}

pub(crate) fn write(folder: &Path, name: &str, value: &Value) {
    fs_err::create_dir_all(folder).expect("the folder is writable");
    fs_err::write(folder.join(name), value.to_string()).expect("the folder is writable");
}

/// A component's configuration and the weights that `build` asks for.
pub(crate) fn write_component(folder: &Path, settings: &Value, weights: Weights, build: &dyn Fn(Value, Weights)) {
    write(folder, "config.json", settings);
    let recorder = Recorder::default();
    build(settings.clone(), recorder.listening(weights));
    recorder.write(&folder.join("model.safetensors"));
}

/// Transformer, autoencoder and scheduler, and the index of a model that also names `more`.
pub(crate) fn write_model(model: &Path, more: Value) {
    write_component(&model.join("transformer"), &medium_35(), weights("sd35/tr"), &|settings, weights| {
        drop(Sd3Transformer2DModel::new(&config(settings), weights).expect("made"));
    });
    let vae = Autoencoder::SD35.weights("sd35/vae");
    write_component(&model.join("vae"), &vae_config(), vae, &|settings, weights| {
        drop(AutoencoderKl::new(&config(settings), weights).expect("made"));
    });
    let scheduler = json!({ "_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0 });
    write(&model.join("scheduler"), "scheduler_config.json", &scheduler);
    let index = json!({
        "_class_name": "StableDiffusion3Pipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    });
    write(model, "model_index.json", &with(index, more));
}

/// A pipeline of the model in this folder.
pub(crate) fn request(class: &str, model: PathBuf) -> PipelineRequest {
    PipelineRequest {
        class: class.into(),
        source: ModelSource::Folder(model),
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
    }
}

/// Components of `class` from folders of their own.
pub(crate) fn components(class: &str, folders: impl IntoIterator<Item = PathBuf>) -> ComponentChoice {
    let component = |folder| ComponentRequest {
        class: class.into(),
        source: ModelSource::Folder(folder),
        subfolder: None,
        variant: None,
        dtype: None,
        quantization: None,
    };
    ComponentChoice::Load(folders.into_iter().map(component).collect())
}

pub(crate) fn load(request: &PipelineRequest) -> Result<Pipeline> {
    let hub = Hub { cache: PathBuf::new(), endpoint: String::new(), token: None, offline: true };
    let cancel = CancellationToken::default();
    Pipeline::load(request, &hub, &mut ComponentCache::default(), Context { events: &Silent, cancel: &cancel })
}

pub(crate) fn run(pipeline: &mut Pipeline, arguments: &Arguments, seed: i128) -> Result<Entry> {
    let cancel = CancellationToken::default();
    let mut generators = Generators::from_seed(&Seed::One(seed), NoiseDialect::Cpu);
    pipeline.run(arguments, &mut generators, Context { events: &Silent, cancel: &cancel })
}

/// The picture of the fixtures that is called `name`.
pub(crate) fn fixture_picture(name: &str) -> Artifact {
    let file = fixtures().join(format!("inputs/{name}_64x64.png"));
    Artifact::image(picture::load(&file).expect("the fixture is there"))
}

pub(crate) fn array(seed: i128, shape: &[usize]) -> Artifact {
    let drawn = Generator::new(seed, NoiseDialect::Cpu).randn(shape, DType::F32, &Device::Cpu);
    let data = drawn.and_then(|drawn| Ok(drawn.flatten_all()?.to_vec1()?)).expect("a small tensor");
    Artifact::Array(Arc::new(Array { shape: shape.to_vec(), data }))
}

/// What stands for so many prompts, with and without guidance, by argument; drawn from `seed` and those after it.
pub(crate) fn encoded_prompts(seed: i128, rows: usize) -> impl Iterator<Item = (&'static str, Artifact)> {
    let prompts = [
        ("prompt_embeds", vec![rows, 20, 80]),
        ("pooled_prompt_embeds", vec![rows, 64]),
        ("negative_prompt_embeds", vec![rows, 20, 80]),
        ("negative_pooled_prompt_embeds", vec![rows, 64]),
    ];
    (seed..).zip(prompts).map(|(seed, (name, shape))| (name, array(seed, &shape)))
}

/// What calls with encoded prompts have in common, with other arguments on top.
pub(crate) fn call_values(more: Value) -> Value {
    let base = json!({
        "guidance_scale": 4.0, "num_inference_steps": 4, "height": 64, "width": 96, "output_type": "latent",
    });
    with(base, more)
}

/// The latents of all pictures, one after the other.
pub(crate) fn latents(entry: &Entry) -> Vec<f32> {
    let values = entry.artifacts.iter().map(|artifact| match artifact {
        Artifact::Array(latents) => latents.data.as_slice(),
        other => panic!("latents were asked for, found {other:?}"),
    });
    values.collect::<Vec<_>>().concat()
}

/// Sixteen latents from first to last.
pub(crate) fn assert_latents(what: &str, latents: &[f32], expected: [f32; 16], tolerance: f32) {
    for (i, expected) in expected.into_iter().enumerate() {
        let found = latents[i * (latents.len() - 1) / 15];
        let off = (found - expected).abs();
        assert!(off < tolerance, "{what}: {found} is not {expected} (off by {off})");
    }
}
