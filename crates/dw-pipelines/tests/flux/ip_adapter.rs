//! IP-Adapters in whole calls: an adapter in XLabs' layout with a tiny CLIP beside it.

use std::{collections::HashMap, path::Path};

use candle_core::{DType, Device, Shape, Tensor};
use dw_core::artifact::Artifact;
use dw_pipelines::{
    models::{ClipVisionModel, Reuse},
    pipelines::Pipeline,
    request::{ComponentChoice, ComponentRequest, IpAdapterRequest, IpAdapterScale, ModelSource, PipelineRequest},
    weights::Weights,
};
use image::{DynamicImage, Luma};
use serde_json::{Value, json};

use crate::{
    assert_like, input,
    pipelines::{Model, arguments, array, latents, load, message, picture, run, same, write},
    support::tiny::{self, Recorder},
};

/// How far a number may be from the reference's.
const TOLERANCE: f32 = 1e-4;

/// Features of the tiny image encoder.
const FEATURES: usize = 24;

fn why_not(request: &PipelineRequest) -> String {
    load(request).err().expect("refused").to_string()
}

/// Names and shapes of an adapter's tensors for `blocks` blocks, under diffusers' names.
fn tensors(blocks: usize) -> Vec<(String, Vec<usize>)> {
    let mut all = vec![
        ("image_proj.proj.weight".into(), vec![4 * 64, FEATURES]),
        ("image_proj.proj.bias".into(), vec![4 * 64]),
        ("image_proj.norm.weight".into(), vec![64]),
        ("image_proj.norm.bias".into(), vec![64]),
    ];
    for block in 0..blocks {
        for layer in ["to_k_ip", "to_v_ip"] {
            all.push((format!("ip_adapter.{block}.{layer}.weight"), vec![32, 64]));
            all.push((format!("ip_adapter.{block}.{layer}.bias"), vec![32]));
        }
    }
    all
}

/// What XLabs calls a tensor.
fn xlabs(name: &str) -> String {
    let name = name.replace("image_proj.", "ip_adapter_proj_model.").replace("ip_adapter.", "double_blocks.");
    name.replace("to_k_ip", "processor.ip_adapter_double_stream_k_proj")
        .replace("to_v_ip", "processor.ip_adapter_double_stream_v_proj")
}

/// Writes an adapter whose tensors are called as `named` says.
fn write_adapter(file: &Path, tensors: &[(String, Vec<usize>)], named: impl Fn(&str) -> String) {
    let tensor = |(name, shape): &(String, Vec<usize>)| {
        let made = tiny::parameter("flux/ip", name, &Shape::from(shape.as_slice())).expect("f32 noise");
        (named(name), made)
    };
    let all: HashMap<String, Tensor> = tensors.iter().map(tensor).collect();
    candle_core::safetensors::save(&all, file).expect("the folder is writable");
}

/// The settings of the tiny image encoder.
fn vision_config(projection_dim: usize) -> Value {
    json!({
        "hidden_size": 32, "intermediate_size": 48, "projection_dim": projection_dim, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": 32, "patch_size": 8
    })
}

fn write_encoder(folder: &Path, projection_dim: usize, config: &Value) {
    write(&folder.join("config.json"), config);
    // The encoder asks for names without the prefix that the reference's parameters have.
    let made = |name: &str, shape: &Shape| {
        let is_projection = name.starts_with("visual_projection");
        let name = if is_projection { name.to_owned() } else { format!("vision_model.{name}") };
        tiny::parameter("flux/clip-vision", &name, shape)
    };
    let heard = Recorder::default();
    let weights = heard.listening(Weights::generated(made, DType::F32, &Device::Cpu));
    let settings = serde_json::from_value(vision_config(projection_dim)).expect("a configuration");
    ClipVisionModel::new(&settings, weights.clone()).expect("it can be built");
    weights.get((projection_dim, 32), "visual_projection.weight").expect("f32 noise");
    heard.write(&folder.join("model.safetensors"));
}

/// A request for a class of `model`, which is given an adapter and an image encoder.
fn request(model: &Model, class: &str, scale: &Value) -> PipelineRequest {
    if !model.0.join("image_encoder").is_dir() {
        write_encoder(&model.0.join("image_encoder"), FEATURES, &vision_config(FEATURES));
        write_adapter(&model.0.join("xlabs.safetensors"), &tensors(2), xlabs);
        write_adapter(&model.0.join("diffusers.safetensors"), &tensors(2), str::to_owned);
    }
    let adapter = IpAdapterRequest {
        source: ModelSource::Folder(model.0.clone()),
        weight_name: Some("xlabs.safetensors".into()),
        subfolder: None,
        image_encoder_folder: Some("image_encoder".into()),
        scale: IpAdapterScale::from_json(scale).expect("a scale"),
    };
    PipelineRequest { ip_adapters: vec![adapter], ..model.request(class) }
}

fn pipeline(model: &Model, scale: &Value) -> Pipeline {
    load(&request(model, "FluxPipeline", scale)).expect("everything is there")
}

fn shown() -> (&'static str, Artifact) {
    ("ip_adapter_image", picture(48, 40))
}

/// What makes a call guided, and `more`.
fn guided(more: Vec<(&'static str, Artifact)>) -> (Value, Vec<(&'static str, Artifact)>) {
    let mut given = vec![
        ("negative_prompt_embeds", array(&input("negative", &[1, 7, 64]))),
        ("negative_pooled_prompt_embeds", array(&input("pooled2", &[1, 32]))),
    ];
    given.extend(more);
    (json!({ "true_cfg_scale": 2.5 }), given)
}

/// Compares every eightieth number, one of each channel, with the reference's.
fn assert_channels(what: &str, found: &Tensor, expected: [f32; 16]) {
    let all = found.flatten_all().and_then(|x| x.to_vec1::<f32>()).expect("f32 numbers");
    assert_eq!(all.len(), 16 * 80, "{what}");
    let seen: Vec<f32> = all.iter().copied().step_by(80).collect();
    let worst = seen.iter().zip(expected).fold(0f32, |worst, (a, b)| worst.max((a - b).abs()));
    assert!(worst <= TOLERANCE, "{what}: {seen:?} are not {expected:?}, by {worst}");
}

#[test]
fn a_picture_as_prompt_agrees_with_the_reference_at_one_scale_and_at_one_for_each_block() {
    let model = Model::new("ip-scale", 64);
    let everywhere = latents(&mut pipeline(&model, &json!(1.0)), json!({}), vec![shown()]);
    let expected = [
        -0.130_833_7,
        0.081_920_6,
        1.337_902_9,
        0.140_564_9,
        0.278_636_5,
        1.689_635_8,
        3.096_358_1,
        0.180_095_2,
        1.300_882_1,
        0.398_885_9,
        0.033_146_9,
        0.050_146_3,
        0.239_318_4,
        1.542_878_6,
        0.872_890_6,
        -0.352_404_1,
    ];
    assert_channels("one scale", &everywhere, expected);
    let by_block = latents(&mut pipeline(&model, &json!([0.3, 0.9])), json!({}), vec![shown()]);
    let expected = [
        0.131_147_1,
        -0.204_981_5,
        1.594_285_4,
        -0.099_009_3,
        0.479_857_4,
        1.880_967_1,
        2.801_103_8,
        -0.457_149_2,
        1.241_431_6,
        0.449_252_7,
        -0.170_088_8,
        0.198_293_1,
        0.366_987_6,
        1.250_498_1,
        0.729_525_6,
        0.415_220_3,
    ];
    assert_channels("a scale for each block", &by_block, expected);

    let mut off = pipeline(&model, &json!([0.0, 0.0]));
    let without = latents(&mut model.load("FluxPipeline"), json!({}), Vec::new());
    assert!(same(&latents(&mut off, json!({}), vec![shown()]), &without), "a scale of 0 shows nothing");
    let mut request = request(&model, "FluxPipeline", &json!(1.0));
    request.ip_adapters[0].weight_name = Some("diffusers.safetensors".into());
    let named = latents(&mut load(&request).expect("diffusers' names"), json!({}), vec![shown()]);
    assert!(same(&named, &everywhere), "names do not matter");
}

#[test]
fn guided_calls_show_the_negative_prompt_a_black_picture_or_the_one_they_name() {
    let model = Model::new("ip-guided", 64);
    let mut pipeline = pipeline(&model, &json!(0.7));
    let mut of = |more| {
        let (values, artifacts) = guided(more);
        latents(&mut pipeline, values, artifacts)
    };
    let negative = || ("negative_ip_adapter_image", picture(40, 64));
    let expected = [
        -1.523_927_7,
        1.705_452_9,
        2.261_788_4,
        -0.763_694_3,
        -3.740_104_2,
        3.778_910_6,
        4.443_555_4,
        1.927_771_1,
        0.455_583_9,
        0.203_939_2,
        0.443_787_5,
        -1.044_038_4,
        -1.677_284,
        1.610_410_2,
        1.890_916_5,
        3.421_627_5,
    ];
    assert_channels("black beside the negative prompt", &of(vec![shown()]), expected);
    let expected = [
        -1.997_242_5,
        2.585_655_2,
        2.586_395_3,
        -1.089_061_4,
        -4.071_962_8,
        3.416_616,
        4.704_801_6,
        2.163_481,
        0.835_779_7,
        -0.672_346_6,
        -0.292_069,
        -0.862_918_7,
        -1.178_316_7,
        1.311_387_9,
        1.161_684_6,
        2.855_637_6,
    ];
    assert_channels("two pictures", &of(vec![shown(), negative()]), expected);
    let expected = [
        -2.856_543_5,
        2.001_579,
        2.531_513_5,
        -1.735_365_5,
        -3.961_829_7,
        2.627_258_3,
        4.146_729,
        1.760_267_5,
        0.938_859_9,
        -1.299_994,
        -0.006_160_7,
        -0.562_055_5,
        -0.582_188,
        0.964_845_8,
        1.115_919_4,
        2.182_099_3,
    ];
    assert_channels("a negative picture alone", &of(vec![negative()]), expected);
    let embeds = vec![
        ("ip_adapter_image_embeds", array(&input("faces", &[1, 2, FEATURES]))),
        ("negative_ip_adapter_image_embeds", array(&input("faces2", &[1, 1, FEATURES]))),
    ];
    let expected = [
        -2.204_932_5,
        0.915_781_3,
        2.040_182_6,
        -0.276_181,
        -4.132_847_8,
        1.298_195_8,
        3.969_900_1,
        1.795_02,
        1.320_013_4,
        0.021_682_3,
        2.429_813_4,
        -2.284_023_3,
        -1.462_995_3,
        1.560_100_3,
        4.363_381_9,
        4.285_229_2,
    ];
    assert_channels("embeddings", &of(embeds), expected);
}

#[test]
fn the_other_classes_are_shown_pictures_as_in_the_reference() {
    let model = Model::new("ip-classes", 64);
    let white = || Artifact::image(DynamicImage::from(image::ImageBuffer::from_pixel(80, 64, Luma([255u8]))));
    let start = || ("image", picture(80, 64));
    let part = json!({ "strength": 0.7, "guidance_scale": 3.5 });
    let from_start = [-0.307_977_4, 0.133_089_1, -0.522_462_9, 1.396_188_6, 1.157_484_5, -1.578_002_8, 1.206_296_8];
    let edit = json!({ "_auto_resize": false, "max_area": 64 * 80 });
    let edited = [-0.483_435_3, 0.798_987_3, -3.255_857_2, -0.497_978_5, 1.948_939_8, -0.778_219_7, 1.247_008_6];
    for (class, more, artifacts, expected) in [
        ("FluxImg2ImgPipeline", part.clone(), vec![start()], from_start),
        ("FluxInpaintPipeline", part, vec![start(), ("mask_image", white())], from_start),
        ("FluxKontextPipeline", edit, vec![("image", picture(64, 64))], edited),
    ] {
        let mut pipeline = load(&request(&model, class, &json!(0.7))).expect("everything is there");
        let artifacts = [artifacts, vec![shown()]].concat();
        assert_like(class, &latents(&mut pipeline, more, artifacts), expected);
    }
    let mut request = request(&model, "FluxControlNetPipeline", &json!(0.7));
    request.components.insert("controlnet".into(), model.controlnet(64));
    let mut pipeline = load(&request).expect("everything is there");
    let steered =
        latents(&mut pipeline, json!({ "guidance_scale": 3.5 }), vec![("control_image", picture(80, 64)), shown()]);
    let expected = [0.285_989_2, -0.153_584_5, -2.211_086_5, 0.920_147_3, -1.228_330_1, 0.107_118_2, 1.192_186_1];
    assert_like("ControlNet", &steered, expected);
}

#[test]
fn steps_that_are_skipped_at_threshold_zero_change_nothing() {
    let model = Model::new("ip-cache", 64);
    let mut pipeline = pipeline(&model, &json!(0.7));
    let plain = latents(&mut pipeline, json!({}), vec![shown()]);
    assert!(pipeline.reuse_steps(Some(Reuse::FirstBlock { threshold: 0.0 })));
    assert!(same(&latents(&mut pipeline, json!({}), vec![shown()]), &plain));
}

#[test]
fn several_pictures_and_adapters_act_together() {
    let model = Model::new("ip-several", 64);
    let mut single = pipeline(&model, &json!(0.7));
    let list = |ids: Value, artifacts: &[Artifact]| {
        let mut call = arguments(&json!({ "output_type": "latent", "ip_adapter_image": ids }), Vec::new());
        let numbered = artifacts.iter().enumerate().map(|(id, artifact)| (100 + id as u64, artifact.clone()));
        call.artifacts.extend(numbered);
        call
    };
    let [first, second] = [json!({ "$artifact": 100 }), json!({ "$artifact": 101 })];
    let pictures = [picture(48, 40), picture(40, 64)];
    assert!(run(&mut single, &list(json!([first, second]), &pictures)).is_ok());

    let mut request = request(&model, "FluxPipeline", &json!(0.35));
    request.ip_adapters.push(request.ip_adapters[0].clone());
    let mut double = load(&request).expect("everything is there");
    assert!(run(&mut double, &list(json!([first, second]), &pictures)).is_ok());
    let said = message(&mut double, &list(first, &pictures));
    assert!(said.contains("has 1 entries for 2 IP-Adapters"), "{said}");
}

#[test]
fn what_is_wrong_with_an_adapter_is_said_before_anything_is_read() {
    let model = Model::new("ip-load", 64);
    let right = || request(&model, "FluxPipeline", &json!(1.0));
    drop(right());
    // Nothing is read: the transformer's file is not even a file of tensors.
    std::fs::write(model.0.join("transformer/diffusion_pytorch_model.safetensors"), b"nothing").expect("writable");
    let said = why_not(&request(&model, "FluxPipeline", &json!([0.1, 0.2, 0.3])));
    assert!(said.contains("has 3 numbers, but the transformer has 2 double blocks"), "{said}");

    // An adapter for a UNet numbers its layers 1, 3, 5.
    let of_unet = vec![("ip_adapter.1.to_k_ip.weight".into(), vec![32, 64])];
    write_adapter(&model.0.join("unet.safetensors"), &of_unet, str::to_owned);
    write_adapter(&model.0.join("small.safetensors"), &tensors(1), xlabs);
    for (file, expected) in [
        ("unet.safetensors", "no IP-Adapter for Flux"),
        ("small.safetensors", "lacks `ip_adapter.1.to_k_ip.weight`; the model has 2 such blocks"),
        ("missing.safetensors", "is missing; correct `model_name`"),
    ] {
        let mut request = right();
        request.ip_adapters[0].weight_name = Some(file.into());
        let said = why_not(&request);
        assert!(said.contains(expected) && said.contains(file), "{said}");
    }

    let mut no_encoder = right();
    no_encoder.ip_adapters[0].image_encoder_folder = Some("encoder".into());
    let said = why_not(&no_encoder);
    assert!(said.contains("needs an image encoder, and `encoder` holds none"), "{said}");

    write_encoder(&model.0.join("wide"), 40, &vision_config(40));
    let mut wide = right();
    wide.ip_adapters[0].image_encoder_folder = Some("wide".into());
    let said = why_not(&wide);
    assert!(said.contains("gives 40 features, but the IP-Adapter reads 24"), "{said}");

    for class in ["FluxFillPipeline", "FluxControlPipeline"] {
        let said = why_not(&request(&model, class, &json!(1.0)));
        assert!(said.contains(&format!("`{class}` takes no IP-Adapter")), "{said}");
    }
}

#[test]
fn calls_without_a_picture_or_an_encoder_for_it_say_so() {
    let model = Model::new("ip-calls", 64);
    let mut whole = pipeline(&model, &json!(1.0));
    let said = message(&mut whole, &arguments(&json!({}), Vec::new()));
    assert!(said.contains("argument `ip_adapter_image`: is missing"), "{said}");
    let embeds = |shape: &[usize]| ("ip_adapter_image_embeds", array(&input("faces", shape)));
    let said = message(&mut whole, &arguments(&json!({}), vec![shown(), embeds(&[1, 1, FEATURES])]));
    assert!(said.contains("cannot be combined with `ip_adapter_image_embeds`"), "{said}");
    let said = message(&mut whole, &arguments(&json!({}), vec![embeds(&[1, FEATURES])]));
    assert!(said.contains("needs (1, pictures, 24)"), "{said}");
    let said = message(&mut model.load("FluxPipeline"), &arguments(&json!({}), vec![shown()]));
    assert!(said.contains("loads no IP-Adapter"), "{said}");

    let mut request = request(&model, "FluxPipeline", &json!(1.0));
    request.components.insert("image_encoder".into(), ComponentChoice::Omit);
    let mut blind = load(&request).expect("the rest is complete");
    let said = message(&mut blind, &arguments(&json!({}), vec![shown()]));
    assert!(said.contains("needs an image encoder") && said.contains("`ip_adapter_image_embeds`"), "{said}");
    assert!(run(&mut blind, &arguments(&json!({}), vec![embeds(&[1, 1, FEATURES])])).is_ok());
    let (values, artifacts) = guided(vec![embeds(&[1, 1, FEATURES])]);
    let said = message(&mut blind, &arguments(&values, artifacts));
    assert!(said.contains("`negative_ip_adapter_image_embeds`"), "{said}");
}

#[test]
fn the_image_encoder_may_be_a_component_from_a_repository_of_the_whole_of_clip() {
    let model = Model::new("ip-clip", 64);
    let mut request = request(&model, "FluxPipeline", &json!(1.0));
    let expected = latents(&mut load(&request).expect("everything is there"), json!({}), vec![shown()]);
    let folder = model.0.join("clip");
    let whole = json!({ "model_type": "clip", "projection_dim": FEATURES, "vision_config": vision_config(FEATURES) });
    write_encoder(&folder, FEATURES, &whole);
    request.components.insert(
        "image_encoder".into(),
        ComponentChoice::Load(vec![ComponentRequest {
            class: "CLIPVisionModelWithProjection".into(),
            source: ModelSource::Folder(folder),
            subfolder: None,
            variant: None,
            dtype: None,
            quantization: None,
        }]),
    );
    let found = latents(&mut load(&request).expect("everything is there"), json!({}), vec![shown()]);
    assert!(same(&found, &expected));
}
