//! ControlNets of Stable Diffusion 3 against the reference, on tiny models that are made from seeds: several nets that
//! differ, lists of pictures, and nets made for inpainting. `tests/parity/make_sd3_controlnet.py` prints the numbers.

mod support;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, LazyLock},
};

use candle_core::{DType, Device};
use dw_core::{
    arguments::{Arguments, ArtifactRef},
    artifact::{Array, Artifact},
    cancel::CancellationToken,
    event::Silent,
    picture,
    seed::Seed,
};
use dw_pipelines::{
    Result,
    hub::Hub,
    models::{AutoencoderKl, Sd3ControlNetModel, Sd3Transformer2DModel},
    pipelines::{ComponentCache, Pipeline},
    request::{ComponentChoice, ComponentRequest, Context, MemoryRequest, ModelSource, PipelineRequest},
    rng::{Generator, Generators, NoiseDialect},
    weights::Weights,
};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use support::tiny::{Autoencoder, Recorder, weights};

/// How far rounding in another order of summation may lead.
const TOLERANCE: f32 = 2e-4;

fn config<C: DeserializeOwned>(value: Value) -> C {
    serde_json::from_value(value).expect("the configuration is of this model")
}

fn with(mut base: Value, more: Value) -> Value {
    let Value::Object(more) = more else { panic!("settings are an object") };
    base.as_object_mut().expect("settings are an object").extend(more);
    base
}

/// What transformer and nets have in common.
fn shared_config() -> Value {
    json!({
        "sample_size": 8, "patch_size": 2, "in_channels": 16, "attention_head_dim": 8, "num_attention_heads": 4,
        "joint_attention_dim": 80, "caption_projection_dim": 32, "pooled_projection_dim": 64, "out_channels": 16,
        "pos_embed_max_size": 24,
    })
}

fn vae_config() -> Value {
    json!({
        "block_out_channels": [8, 16, 16, 16], "down_block_types": vec!["DownEncoderBlock2D"; 4],
        "up_block_types": vec!["UpDecoderBlock2D"; 4], "in_channels": 3, "latent_channels": 16, "layers_per_block": 1,
        "norm_num_groups": 4, "out_channels": 3, "sample_size": 64, "scaling_factor": 1.5305, "shift_factor": 0.0609,
        "use_quant_conv": false, "use_post_quant_conv": false,
    })
}

fn inputs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity/inputs")
}

fn write(folder: &Path, name: &str, value: &Value) {
    fs_err::create_dir_all(folder).expect("the folder is writable");
    fs_err::write(folder.join(name), value.to_string()).expect("the folder is writable");
}

/// A component's configuration and the weights that `build` asks for.
fn write_component(folder: &Path, settings: &Value, weights: Weights, build: &dyn Fn(Value, Weights)) {
    write(folder, "config.json", settings);
    let recorder = Recorder::default();
    build(settings.clone(), recorder.listening(weights));
    recorder.write(&folder.join("model.safetensors"));
}

/// A tiny Stable Diffusion 3.5 without text encoders, as `model`, and nets for it: a shallow one that is given no pooled
/// text, a deep one that is, and one made for inpainting.
static FOLDER: LazyLock<tempfile::TempDir> = LazyLock::new(|| {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let model = folder.path().join("model");
    let medium =
        with(shared_config(), json!({ "num_layers": 3, "qk_norm": "rms_norm", "dual_attention_layers": [0, 1] }));
    write_component(&model.join("transformer"), &medium, weights("sd35/tr"), &|settings, weights| {
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
    write(&model, "model_index.json", &index);
    for (name, more) in [
        ("net-a", json!({ "num_layers": 2 })),
        ("net-b", json!({ "num_layers": 3, "force_zeros_for_pooled_projection": false })),
        ("net-c", json!({ "num_layers": 2, "extra_conditioning_channels": 1 })),
    ] {
        let settings = with(shared_config(), more);
        write_component(
            &folder.path().join(name),
            &settings,
            weights(&format!("sd35/{name}")),
            &|settings, weights| {
                drop(Sd3ControlNetModel::new(&config(settings), weights).expect("made"));
            },
        );
    }
    folder
});

/// The model with these nets.
fn steered(class: &str, nets: &[&str]) -> PipelineRequest {
    let net = |name: &&str| ComponentRequest {
        class: "SD3ControlNetModel".into(),
        source: ModelSource::Folder(FOLDER.path().join(name)),
        subfolder: None,
        variant: None,
        dtype: None,
        quantization: None,
    };
    let nets = ComponentChoice::Load(nets.iter().map(net).collect());
    PipelineRequest {
        class: class.into(),
        source: ModelSource::Folder(FOLDER.path().join("model")),
        variant: None,
        dtype: None,
        device: Device::Cpu,
        components: BTreeMap::from([("controlnet".to_owned(), nets)]),
        scheduler: None,
        loras: Vec::new(),
        textual_inversions: Vec::new(),
        prompt_weighting: false,
        ip_adapters: Vec::new(),
        memory: MemoryRequest::default(),
    }
}

fn array(seed: i128, shape: &[usize]) -> Artifact {
    let drawn = Generator::new(seed, NoiseDialect::Cpu).randn(shape, DType::F32, &Device::Cpu);
    let data = drawn.and_then(|drawn| Ok(drawn.flatten_all()?.to_vec1()?)).expect("a small tensor");
    Artifact::Array(Arc::new(Array { shape: shape.to_vec(), data }))
}

/// A call with so many encoded prompts. Texts among the arguments that name a picture of the fixtures stand for it.
fn call(rows: usize, more: Value) -> Arguments {
    let base = json!({
        "guidance_scale": 4.0, "num_inference_steps": 4, "height": 64, "width": 96, "output_type": "latent",
    });
    let mut arguments = Arguments::default();
    let mut number = 0;
    let mut handle = |artifact| {
        arguments.artifacts.insert(number, artifact);
        number += 1;
        ArtifactRef(number - 1).to_value()
    };
    let Value::Object(mut values) = with(base, with_pictures(more, &mut handle)) else { panic!("an object") };
    for (seed, name, shape) in [
        (11, "prompt_embeds", vec![rows, 20, 80]),
        (12, "pooled_prompt_embeds", vec![rows, 64]),
        (13, "negative_prompt_embeds", vec![rows, 20, 80]),
        (14, "negative_pooled_prompt_embeds", vec![rows, 64]),
    ] {
        values.insert(name.to_owned(), handle(array(seed, &shape)));
    }
    Arguments { values, ..arguments }
}

fn with_pictures(value: Value, handle: &mut dyn FnMut(Artifact) -> Value) -> Value {
    match value {
        Value::String(name) => {
            let file = inputs().join(format!("{name}_64x64.png"));
            handle(Artifact::image(picture::load(&file).expect("the fixture is there")))
        }
        Value::Array(items) => items.into_iter().map(|item| with_pictures(item, handle)).collect(),
        Value::Object(entries) => {
            entries.into_iter().map(|(name, entry)| (name, with_pictures(entry, handle))).collect()
        }
        other => other,
    }
}

/// The latents of one call.
fn run(request: &PipelineRequest, arguments: &Arguments) -> Result<Vec<f32>> {
    let hub = Hub { cache: PathBuf::new(), endpoint: String::new(), token: None, offline: true };
    let cancel = CancellationToken::default();
    let context = Context { events: &Silent, cancel: &cancel };
    let mut pipeline = Pipeline::load(request, &hub, &mut ComponentCache::default(), context)?;
    let mut generators = Generators::from_seed(&Seed::One(5), NoiseDialect::Cpu);
    let entry = pipeline.run(arguments, &mut generators, context)?;
    let latents = entry.artifacts.iter().map(|artifact| match artifact {
        Artifact::Array(latents) => latents.data.clone(),
        other => panic!("latents were asked for, found {other:?}"),
    });
    Ok(latents.collect::<Vec<_>>().concat())
}

fn refused(request: &PipelineRequest, arguments: &Arguments) -> String {
    run(request, arguments).expect_err("the call is wrong").to_string()
}

/// Sixteen latents from first to last.
fn assert_latents(what: &str, latents: &[f32], expected: [f32; 16]) {
    for (i, expected) in expected.into_iter().enumerate() {
        let found = latents[i * (latents.len() - 1) / 15];
        let off = (found - expected).abs();
        assert!(off < TOLERANCE, "{what}: {found} is not {expected} (off by {off})");
    }
}

const PLAIN: &str = "StableDiffusion3ControlNetPipeline";
const INPAINTING: &str = "StableDiffusion3ControlNetInpaintingPipeline";

#[test]
fn nets_that_differ_act_together_as_in_the_reference() {
    // Each acts in half of the steps. The first decides what both are given, the shallower one how deep both reach.
    let call = call(
        1,
        json!({
            "control_image": ["edges", "scene"], "controlnet_conditioning_scale": [0.5, 0.7],
            "control_guidance_start": [0.0, 0.5], "control_guidance_end": [0.5, 1.0],
        }),
    );
    let shallow_first = [
        -0.943_976, 0.481_233, -0.157_373, 1.356_359, -2.999_897, 3.111_974, -3.755_692, 2.227_879, 3.102_782,
        -0.371_268, 2.535_213, 2.379_577, 1.796_145, -4.705_833, 1.224_900, -1.774_027,
    ];
    let deep_first = [
        3.779_538, -2.675_051, -0.589_627, 1.485_515, -4.853_353, 0.770_532, 4.607_794, 0.642_405, 1.425_161,
        -1.378_711, 2.157_606, -0.075_239, 2.223_779, -3.179_963, -4.931_099, 0.047_546,
    ];
    for (nets, expected) in [(["net-a", "net-b"], shallow_first), (["net-b", "net-a"], deep_first)] {
        let latents = run(&steered(PLAIN, &nets), &call).expect("the call is valid");
        assert_latents(nets[0], &latents, expected);
    }
}

#[test]
fn each_of_several_nets_may_have_a_picture_for_each_prompt() {
    let request = steered(PLAIN, &["net-b", "net-a"]);
    let lists = json!([["edges", "scene"], ["scene", "edges"]]);
    let call_with =
        |pictures: Value| call(2, json!({ "control_image": pictures, "controlnet_conditioning_scale": [0.5, 0.7] }));
    let expected = [
        0.446_994, 0.104_437, -3.502_390, 2.234_662, 2.826_386, -1.150_919, 0.736_577, -3.499_437, -3.347_646,
        -2.652_214, 6.684_119, 4.340_958, 4.432_392, 0.997_199, 0.555_585, 1.577_050,
    ];
    assert_latents("lists", &run(&request, &call_with(lists)).expect("the call is valid"), expected);
    let message = refused(&request, &call_with(json!(["edges", "scene", "edges"])));
    assert!(message.contains("3 entries for 2 ControlNets"), "{message}");
    let message = refused(&request, &call_with(json!([["edges", "scene", "edges"], "scene"])));
    assert!(message.contains("has 3 pictures for 2 prompt(s)"), "{message}");
}

#[test]
fn a_net_made_for_inpainting_paints_as_in_the_reference() {
    let painting = json!({ "control_image": "scene", "control_mask": "mask", "controlnet_conditioning_scale": 0.8 });
    let expected = [
        2.438_097, -2.564_938, -0.350_774, -1.130_192, -5.130_093, 1.832_399, 1.585_299, 2.176_139, 2.575_369,
        -3.450_902, 0.592_196, 0.324_633, 4.858_857, -1.627_816, -4.256_166, 1.354_237,
    ];
    let latents = run(&steered(INPAINTING, &["net-c"]), &call(1, painting.clone())).expect("the call is valid");
    assert_latents("painted", &latents, expected);

    let message = refused(&steered(INPAINTING, &["net-c"]), &call(1, json!({ "control_image": "scene" })));
    assert!(message.contains("`control_mask`") && message.contains("is missing"), "{message}");
    let message = refused(&steered(INPAINTING, &["net-a"]), &call(1, painting));
    assert!(message.contains("made for inpainting") && message.contains(PLAIN), "{message}");
    let message = refused(&steered(PLAIN, &["net-c"]), &call(1, json!({ "control_image": "scene" })));
    assert!(message.contains("made for inpainting") && message.contains(INPAINTING), "{message}");
}
