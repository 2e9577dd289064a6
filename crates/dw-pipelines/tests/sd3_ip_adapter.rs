//! IP-Adapters of Stable Diffusion 3 against the reference, on tiny models that are made from seeds: whole calls, and
//! what is said about files and calls that do not fit. `tests/parity/make_sd3_ip_adapter.py` prints the numbers.

mod support;

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::LazyLock,
};

use candle_core::{Shape, Tensor};
use dw_core::{
    arguments::{Arguments, ArtifactRef},
    artifact::Artifact,
};
use dw_pipelines::{
    Result,
    models::SiglipVisionModel,
    pipelines::Pipeline,
    request::{IpAdapterRequest, IpAdapterScale, ModelSource, PipelineRequest},
};
use serde_json::{Value, json};
use support::{
    sd3::{
        self, array, call_values, components, config, encoded_prompts, fixture_picture, fixtures, load, with,
        write_component, write_model,
    },
    tiny::{parameter, weights},
};

/// How far rounding in another order of summation may lead.
const TOLERANCE: f32 = 1e-4;

fn siglip_config() -> Value {
    json!({
        "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32,
        "patch_size": 8,
    })
}

/// Names and shapes of an adapter for `attentions` attentions of a transformer whose tokens have `inner` features.
fn adapter_shapes(inner: usize, attentions: usize) -> Vec<(String, Vec<usize>)> {
    let (width, hidden, features, times) = (48, 24, 128, 16);
    let mut shapes: Vec<(String, Vec<usize>)> = Vec::new();
    let mut add = |name: String, shape: &[usize]| shapes.push((name, shape.to_vec()));
    add("image_proj.latents".into(), &[1, 5, hidden]);
    for (name, outputs, inputs) in [
        ("time_embedding.linear_1", hidden, times),
        ("time_embedding.linear_2", hidden, hidden),
        ("proj_in", hidden, width),
        ("proj_out", inner, hidden),
    ] {
        add(format!("image_proj.{name}.weight"), &[outputs, inputs]);
        add(format!("image_proj.{name}.bias"), &[outputs]);
    }
    for part in ["weight", "bias"] {
        add(format!("image_proj.norm_out.{part}"), &[inner]);
    }
    for layer in (0..4).map(|i| format!("image_proj.layers.{i}")) {
        for norm in ["0.norm1", "0.norm2", "1.0"] {
            add(format!("{layer}.{norm}.weight"), &[hidden]);
            add(format!("{layer}.{norm}.bias"), &[hidden]);
        }
        add(format!("{layer}.0.to_q.weight"), &[features, hidden]);
        add(format!("{layer}.0.to_kv.weight"), &[2 * features, hidden]);
        add(format!("{layer}.0.to_out.weight"), &[hidden, features]);
        add(format!("{layer}.1.1.weight"), &[4 * hidden, hidden]);
        add(format!("{layer}.1.3.weight"), &[hidden, 4 * hidden]);
        add(format!("{layer}.2.1.weight"), &[4 * hidden, hidden]);
        add(format!("{layer}.2.1.bias"), &[4 * hidden]);
    }
    for layer in (0..attentions).map(|i| format!("ip_adapter.{i}")) {
        add(format!("{layer}.norm_ip.linear.weight"), &[2 * inner, hidden]);
        add(format!("{layer}.norm_ip.linear.bias"), &[2 * inner]);
        add(format!("{layer}.to_k_ip.weight"), &[inner, inner]);
        add(format!("{layer}.to_v_ip.weight"), &[inner, inner]);
        for norm in ["norm_q", "norm_k", "norm_ip_k"] {
            add(format!("{layer}.{norm}.weight"), &[8]);
        }
    }
    shapes
}

fn write_adapter(file: &Path, shapes: &[(String, Vec<usize>)]) {
    let tensor = |(name, shape): &(String, Vec<usize>)| {
        let shape = Shape::from(shape.as_slice());
        (name.clone(), parameter("sd35/ip", name, &shape).expect("a small tensor"))
    };
    let tensors: HashMap<String, Tensor> = shapes.iter().map(tensor).collect();
    candle_core::safetensors::save(&tensors, file).expect("the folder is writable");
}

fn write_encoder(folder: &Path, settings: &Value) {
    write_component(folder, settings, weights("sd35/siglip"), &|settings, weights| {
        drop(SiglipVisionModel::new(&config(settings), weights).expect("made"));
    });
}

/// A tiny Stable Diffusion 3.5 without text encoders, as `model`; an image encoder, as `siglip`; and adapters: one that
/// fits, with its image encoder (`adapter`) and without one (`alone`), and two of other models.
static FOLDER: LazyLock<tempfile::TempDir> = LazyLock::new(|| {
    let folder = tempfile::tempdir().expect("a temporary folder");
    write_model(
        &folder.path().join("model"),
        json!({ "image_encoder": [null, null], "feature_extractor": [null, null] }),
    );
    write_encoder(&folder.path().join("siglip"), &siglip_config());
    write_encoder(&folder.path().join("adapter/image_encoder"), &siglip_config());
    fs_err::create_dir_all(folder.path().join("alone")).expect("the folder is writable");
    let others = folder.path().join("others");
    fs_err::create_dir_all(&others).expect("the folder is writable");
    for place in ["adapter", "alone"] {
        write_adapter(&folder.path().join(place).join("ip-adapter.safetensors"), &adapter_shapes(32, 5));
    }
    write_adapter(&others.join("large.safetensors"), &adapter_shapes(64, 5));
    write_adapter(&others.join("short.safetensors"), &adapter_shapes(32, 3));
    folder
});

fn place(name: &str) -> PathBuf {
    FOLDER.path().join(name)
}

fn request(class: &str) -> PipelineRequest {
    sd3::request(class, place("model"))
}

/// The adapter in `folder`, whose image encoder, if it has one, lies beside it.
fn adapter(folder: &str, scale: f64) -> IpAdapterRequest {
    IpAdapterRequest {
        source: ModelSource::Folder(place(folder)),
        weight_name: None,
        subfolder: None,
        image_encoder_folder: Some("image_encoder".into()),
        scale: IpAdapterScale::Everywhere(scale),
    }
}

fn seeing(class: &str, adapter: IpAdapterRequest) -> PipelineRequest {
    PipelineRequest { ip_adapters: vec![adapter], ..request(class) }
}

fn refused(request: &PipelineRequest) -> String {
    load(request).err().map(|error| error.to_string()).expect("the request is wrong")
}

fn scene() -> Artifact {
    fixture_picture("scene")
}

fn edges() -> Artifact {
    fixture_picture("edges")
}

/// A call with encoded prompts, one row each; `given` are artifacts by argument.
fn call(more: Value, given: Vec<(&str, Vec<Artifact>)>) -> Arguments {
    call_of(11, 1, more, given)
}

/// The same with so many rows, which are drawn from `seed` and those after it.
fn call_of(seed: i128, rows: usize, more: Value, given: Vec<(&str, Vec<Artifact>)>) -> Arguments {
    let Value::Object(values) = call_values(more) else { panic!("arguments are an object") };
    let mut arguments = Arguments { values, ..Arguments::default() };
    let prompts = encoded_prompts(seed, rows).map(|(name, prompt)| (name, vec![prompt]));
    let mut number = 0;
    for (name, artifacts) in prompts.chain(given) {
        let mut handles = Vec::new();
        for artifact in artifacts {
            arguments.artifacts.insert(number, artifact);
            handles.push(ArtifactRef(number).to_value());
            number += 1;
        }
        let value = if let [one] = handles.as_slice() { one.clone() } else { Value::Array(handles) };
        arguments.values.insert(name.to_owned(), value);
    }
    arguments
}

fn run(pipeline: &mut Pipeline, arguments: &Arguments) -> Result<Vec<f32>> {
    Ok(sd3::latents(&sd3::run(pipeline, arguments, 5)?))
}

fn assert_latents(what: &str, latents: &[f32], expected: [f32; 16]) {
    sd3::assert_latents(what, latents, expected, TOLERANCE);
}

const FULL: [f32; 16] = [
    5.013_805, 0.577_649, 0.588_812, 1.536_422, -6.147_681, 5.429_739, 2.481_501, 0.278_706, 3.862_436, -5.056_671,
    0.002_700, -1.150_750, 2.361_299, -2.516_451, -6.469_497, 1.711_661,
];

const HALF: [f32; 16] = [
    5.583_272, -0.727_639, 0.340_343, 2.000_001, -5.313_204, 4.366_183, 2.908_197, 0.408_250, 3.935_259, -3.891_944,
    1.207_254, -0.849_957, 2.801_633, -2.050_285, -4.325_740, 2.103_934,
];

const NONE: [f32; 16] = [
    5.450_132, -1.867_185, 0.341_273, 1.935_950, -4.452_345, 2.684_326, 3.782_453, 0.557_307, 4.103_438, -2.698_058,
    1.591_209, 0.105_023, 3.019_549, -2.974_926, -2.088_047, 1.885_694,
];

#[test]
fn a_picture_acts_by_its_scale_as_in_the_reference() {
    let arguments = call(json!({}), vec![("ip_adapter_image", vec![scene()])]);
    for (scale, expected) in [(1.0, FULL), (0.5, HALF), (0.0, NONE)] {
        let mut pipeline = load(&seeing("DiffusionPipeline", adapter("adapter", scale))).expect("the adapter fits");
        let latents = run(&mut pipeline, &arguments).expect("the call is valid");
        assert_latents(&format!("scale {scale}"), &latents, expected);
    }
    let unsaid = IpAdapterRequest { scale: IpAdapterScale::Usual, ..adapter("adapter", 1.0) };
    let mut pipeline = load(&seeing("DiffusionPipeline", unsaid)).expect("the adapter fits");
    assert_latents("no scale", &run(&mut pipeline, &arguments).expect("the call is valid"), HALF);
    let mut plain = load(&request("StableDiffusion3Pipeline")).expect("the model is complete");
    assert_latents("no adapter", &run(&mut plain, &call(json!({}), Vec::new())).expect("the call is valid"), NONE);
}

#[test]
fn the_image_encoder_may_be_a_component_of_the_step() {
    let mut request = seeing("StableDiffusion3Pipeline", adapter("alone", 1.0));
    request.components.insert("image_encoder".into(), components("SiglipVisionModel", [place("siglip")]));
    let mut pipeline = load(&request).expect("the encoder fits");
    let latents = run(&mut pipeline, &call(json!({}), vec![("ip_adapter_image", vec![scene()])]));
    assert_latents("component", &latents.expect("the call is valid"), FULL);
}

#[test]
fn skipped_layers_look_at_pictures_as_in_the_reference() {
    let mut pipeline = load(&seeing("StableDiffusion3Pipeline", adapter("adapter", 1.0))).expect("the adapter fits");
    let skipped = json!({ "skip_guidance_layers": [0], "skip_layer_guidance_stop": 0.9 });
    let latents = run(&mut pipeline, &call(skipped, vec![("ip_adapter_image", vec![scene()])]));
    let expected = [
        5.625_539, 1.118_104, 0.689_753, 2.853_116, -4.439_032, 2.745_675, 0.273_321, -0.865_690, 4.107_256,
        -6.381_655, 1.572_742, -0.856_609, 1.696_668, -2.000_912, -5.001_999, 2.265_067,
    ];
    assert_latents("skipped layers", &latents.expect("the call is valid"), expected);
}

#[test]
fn embeddings_stand_in_for_pictures_and_need_no_encoder() {
    let request = IpAdapterRequest { image_encoder_folder: None, ..adapter("alone", 0.7) };
    let mut pipeline = load(&seeing("StableDiffusion3Pipeline", request)).expect("no encoder is wanted");
    let shown = |array| call(json!({}), vec![("ip_adapter_image_embeds", vec![array])]);
    let latents = run(&mut pipeline, &shown(array(15, &[2, 16, 48]))).expect("the call is valid");
    let expected = [
        5.555_400, -0.855_022, 0.496_097, 1.820_320, -5.849_105, 4.939_868, 2.582_057, 0.703_339, 3.491_393,
        -3.860_018, 0.269_036, -0.648_522, 2.797_038, -2.224_205, -5.066_014, 2.062_662,
    ];
    assert_latents("embeddings", &latents, expected);

    for shape in [[1, 16, 48], [2, 16, 40]] {
        let message = run(&mut pipeline, &shown(array(15, &shape))).expect_err("the shape is wrong").to_string();
        assert!(
            message.contains(&format!("{shape:?}")) && message.contains("(2 × pictures, patches, 48)"),
            "{message}"
        );
    }
    let message = run(&mut pipeline, &call(json!({}), vec![("ip_adapter_image", vec![scene()])]));
    let message = message.expect_err("nothing reads the picture").to_string();
    assert!(message.contains("needs an image encoder") && message.contains("`ip_adapter_image_embeds`"), "{message}");
}

#[test]
fn all_pictures_of_a_list_are_seen_as_in_the_reference() {
    let mut pipeline = load(&seeing("StableDiffusion3Pipeline", adapter("adapter", 1.0))).expect("the adapter fits");
    let pictures = vec![("ip_adapter_image", vec![scene(), edges()])];
    let latents = run(&mut pipeline, &call(json!({ "guidance_scale": 1.0 }), pictures)).expect("the call is valid");
    let expected = [
        2.404_309, -1.207_901, -1.217_225, 0.746_728, -2.557_578, 1.950_464, 1.891_196, 1.936_026, 1.226_446,
        -2.004_060, 1.251_218, 0.266_226, 1.340_224, -2.767_030, -1.785_712, 2.244_552,
    ];
    assert_latents("two pictures", &latents, expected);
}

#[test]
fn all_prompts_of_a_call_see_the_picture_as_in_the_reference() {
    let mut pipeline = load(&seeing("StableDiffusion3Pipeline", adapter("adapter", 1.0))).expect("the adapter fits");
    let arguments = call_of(21, 2, json!({}), vec![("ip_adapter_image", vec![scene()])]);
    let latents = run(&mut pipeline, &arguments).expect("the call is valid");
    let expected = [
        0.182_851, 1.967_138, -6.228_509, 4.308_121, 3.717_046, 6.915_917, 6.378_450, 4.901_002, 9.287_373, 1.590_279,
        -7.159_659, -4.469_734, -0.779_813, -4.274_555, 0.911_413, -6.452_402,
    ];
    assert_latents("two prompts", &latents, expected);
}

#[test]
fn a_picture_becomes_another_with_an_adapter_as_in_the_reference() {
    let request = seeing("AutoPipelineForImage2Image", adapter("adapter", 1.0));
    let mut pipeline = load(&request).expect("the adapter fits");
    let more = json!({ "strength": 0.6, "width": 64 });
    let latents = run(&mut pipeline, &call(more, vec![("ip_adapter_image", vec![edges()]), ("image", vec![scene()])]));
    let expected = [
        3.107_924, -4.346_100, 6.154_222, 3.394_436, -0.912_199, 1.009_434, 3.167_631, -2.685_187, -0.784_362,
        -4.179_984, -3.045_996, 0.766_138, 1.410_887, 1.893_082, -6.064_496, -2.514_848,
    ];
    assert_latents("image to image", &latents.expect("the call is valid"), expected);
}

#[test]
fn adapters_of_other_models_are_refused_with_the_remedy() {
    let other = |name: &str| IpAdapterRequest { weight_name: Some(name.into()), ..adapter("others", 1.0) };
    let of_sdxl = IpAdapterRequest {
        source: ModelSource::Folder(fixtures().join("variants/ip-adapters")),
        weight_name: Some("plus.safetensors".into()),
        ..adapter("others", 1.0)
    };
    let table = [
        (other("large.safetensors"), "tokens of 64 features, the model's have 32"),
        (other("short.safetensors"), "3 attention layers, the model has 5"),
        (of_sdxl, "no IP-Adapter for Stable Diffusion 3"),
    ];
    for (adapter, expected) in table {
        let adapter = IpAdapterRequest { image_encoder_folder: None, ..adapter };
        let message = refused(&seeing("StableDiffusion3Pipeline", adapter));
        assert!(message.contains(expected) && message.contains("use the adapter made for the model"), "{message}");
    }
}

#[test]
fn what_the_family_does_not_take_is_refused_before_anything_is_looked_for() {
    let nowhere = || adapter("nowhere", 1.0);
    let two = PipelineRequest { ip_adapters: vec![nowhere(), nowhere()], ..request("StableDiffusion3Pipeline") };
    let message = refused(&two);
    assert!(message.contains("`ip_adapter`") && message.contains("lists 2 adapters"), "{message}");
    let by_layer = IpAdapterRequest { scale: IpAdapterScale::ByLayer(vec![0.5, 1.0]), ..nowhere() };
    let message = refused(&seeing("StableDiffusion3Pipeline", by_layer));
    assert!(message.contains("`ip_adapter.scale`") && message.contains("one number"), "{message}");
}

#[test]
fn a_missing_image_encoder_is_named() {
    let message = refused(&seeing("StableDiffusion3Pipeline", adapter("alone", 1.0)));
    assert!(message.contains("needs an image encoder") && message.contains("component `image_encoder`"), "{message}");

    let folder = place("other-siglip");
    write_encoder(&folder, &with(siglip_config(), json!({ "hidden_size": 32 })));
    let mut request = seeing("StableDiffusion3Pipeline", adapter("alone", 1.0));
    request.components.insert("image_encoder".into(), components("SiglipVisionModel", [folder]));
    let message = refused(&request);
    assert!(message.contains("gives 32 features") && message.contains("reads 48"), "{message}");

    let clip = components("CLIPVisionModelWithProjection", [place("siglip")]);
    request.components.insert("image_encoder".into(), clip);
    let message = refused(&request);
    assert!(message.contains("`image_encoder`") && message.contains("`SiglipVisionModel`"), "{message}");
}

#[test]
fn a_call_without_a_picture_for_the_adapter_is_refused_and_one_without_an_adapter_for_the_picture() {
    let mut pipeline = load(&seeing("StableDiffusion3Pipeline", adapter("adapter", 1.0))).expect("the adapter fits");
    let message = run(&mut pipeline, &call(json!({}), Vec::new())).expect_err("nothing is shown").to_string();
    assert!(message.contains("`ip_adapter_image`") && message.contains("is missing"), "{message}");
    let both = vec![("ip_adapter_image", vec![scene()]), ("ip_adapter_image_embeds", vec![array(15, &[2, 16, 48])])];
    let message = run(&mut pipeline, &call(json!({}), both)).expect_err("one is enough").to_string();
    assert!(message.contains("cannot be combined"), "{message}");

    let mut plain = load(&request("StableDiffusion3Pipeline")).expect("the model is complete");
    let message = run(&mut plain, &call(json!({}), vec![("ip_adapter_image", vec![scene()])]));
    let message = message.expect_err("nothing looks at it").to_string();
    assert!(message.contains("`ip_adapter_image`") && message.contains("add `ip_adapter`"), "{message}");
}
