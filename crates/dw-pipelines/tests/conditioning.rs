//! How weighted prompts and pictures as prompts behave in whole calls.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use candle_core::Device;
use dw_core::{
    arguments::{Arguments, ArtifactRef},
    artifact::{Array, Artifact},
    cancel::CancellationToken,
    event::Silent,
    seed::Seed,
};
use dw_pipelines::{
    Result,
    hub::Hub,
    pipelines::{ComponentCache, Pipeline},
    request::{
        ComponentChoice, ComponentRequest, Context, IpAdapterRequest, IpAdapterScale, MemoryRequest, ModelSource,
        PipelineRequest,
    },
    rng::{Generators, NoiseDialect},
};
use image::{DynamicImage, Rgb, RgbImage};
use serde_json::{Value, json};

fn model(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity/models").join(name)
}

fn request(class: &str, name: &str) -> PipelineRequest {
    PipelineRequest {
        class: class.into(),
        source: ModelSource::Folder(model(name)),
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

fn weighting(class: &str, name: &str) -> PipelineRequest {
    PipelineRequest { prompt_weighting: true, ..request(class, name) }
}

fn ip_adapter(scale: &Value) -> IpAdapterRequest {
    IpAdapterRequest {
        source: ModelSource::Folder(model("sdxl-ip-adapter")),
        weight_name: Some("ip-adapter.safetensors".into()),
        subfolder: Some("models".into()),
        image_encoder_folder: Some("image_encoder".into()),
        scale: IpAdapterScale::from_json(scale).expect("a scale"),
    }
}

fn with_adapters(adapters: Vec<IpAdapterRequest>) -> PipelineRequest {
    PipelineRequest { ip_adapters: adapters, ..request("StableDiffusionXLPipeline", "sdxl") }
}

fn load(request: &PipelineRequest) -> Result<Pipeline> {
    load_with(request, &mut ComponentCache::default())
}

fn load_with(request: &PipelineRequest, cache: &mut ComponentCache) -> Result<Pipeline> {
    let hub = Hub { cache: PathBuf::new(), endpoint: String::new(), token: None, offline: true };
    let cancel = CancellationToken::default();
    Pipeline::load(request, &hub, cache, Context { events: &Silent, cancel: &cancel })
}

fn why_not(request: &PipelineRequest) -> String {
    load(request).map(|_| ()).expect_err("it cannot be loaded").to_string()
}

/// The latents of a call of one step at 64 x 64 pixels; artifacts 0 and 1 are pictures.
fn latents(pipeline: &mut Pipeline, more: Value) -> Result<Vec<f32>> {
    let mut values = json!({
        "prompt": "a small red house", "num_inference_steps": 1, "height": 64, "width": 64, "output_type": "latent"
    });
    let values = values.as_object_mut().expect("an object");
    values.extend(more.as_object().expect("an object").clone());
    let mut arguments = Arguments { values: values.clone(), ..Arguments::default() };
    let picture = |step: u32| RgbImage::from_fn(50, 40, |x, y| Rgb([(x * step) as u8, (y * step) as u8, 90]));
    arguments.artifacts.insert(0, Artifact::image(DynamicImage::from(picture(5))));
    arguments.artifacts.insert(1, Artifact::image(DynamicImage::from(picture(2))));
    let array = |shape: &[usize]| Array { shape: shape.to_vec(), data: vec![0.1; shape.iter().product()] };
    arguments.artifacts.insert(2, Artifact::Array(array(&[2, 1, 40]).into()));
    let cancel = CancellationToken::default();
    let context = Context { events: &Silent, cancel: &cancel };
    let mut generators = Generators::from_seed(&Seed::One(3), NoiseDialect::Cpu);
    let entry = pipeline.run(&arguments, &mut generators, context)?;
    match entry.artifacts.as_slice() {
        [Artifact::Array(array)] => Ok(array.data.clone()),
        other => panic!("expected latents, found {other:?}"),
    }
}

fn refused(pipeline: &mut Pipeline, more: Value) -> String {
    latents(pipeline, more).map(|_| ()).expect_err("a wrong argument").to_string()
}

#[test]
fn plain_text_gives_the_same_bits_with_and_without_weighting() {
    for (class, name) in [("StableDiffusionXLPipeline", "sdxl"), ("StableDiffusionPipeline", "sd15")] {
        let mut plain = load(&request(class, name)).expect("the model is complete");
        let mut weighted = load(&weighting(class, name)).expect("the model is complete");
        for call in [json!({}), json!({ "negative_prompt": "blurry", "clip_skip": 1 }), json!({ "prompt": "" })] {
            let (a, b) = (latents(&mut plain, call.clone()), latents(&mut weighted, call));
            assert_eq!(a.expect("valid"), b.expect("valid"), "{name}");
        }
    }
}

#[test]
fn weights_act_in_prompts_and_negative_prompts() {
    for (class, name) in [("StableDiffusionXLPipeline", "sdxl"), ("StableDiffusionPipeline", "sd15")] {
        let mut weighted = load(&weighting(class, name)).expect("the model is complete");
        let plain = latents(&mut weighted, json!({ "negative_prompt": "blurry sky" })).expect("valid");
        for call in [
            json!({ "prompt": "a small (red:1.4) house", "negative_prompt": "blurry sky" }),
            json!({ "negative_prompt": "blurry [sky]" }),
            json!({ "prompt": "a small BREAK red house", "negative_prompt": "blurry sky" }),
        ] {
            let changed = latents(&mut weighted, call.clone()).expect("valid");
            assert!(changed.iter().all(|value| value.is_finite()));
            assert_ne!(changed, plain, "{name}: {call}");
        }
        let same = json!({ "prompt": "a small (red:1.0) house", "negative_prompt": "(blurry:1) sky" });
        assert_eq!(latents(&mut weighted, same).expect("valid"), plain, "{name}: weights of 1 change nothing");
    }
}

#[test]
fn the_end_of_a_long_prompt_counts_and_the_other_prompt_is_filled_up() {
    for (class, name) in [("StableDiffusionXLPipeline", "sdxl"), ("StableDiffusionPipeline", "sd15")] {
        let mut weighted = load(&weighting(class, name)).expect("the model is complete");
        let long = |end: &str| format!("{}{end}", "a house, ".repeat(60));
        let mut of = |more: Value| latents(&mut weighted, more).expect("valid");
        assert_ne!(of(json!({ "prompt": long("the sea") })), of(json!({ "prompt": long("a cat") })), "{name}");
        let negative = |end: &str| json!({ "negative_prompt": long(end) });
        assert_ne!(of(negative("the sea")), of(negative("a cat")), "{name}");
    }
}

#[test]
fn a_malformed_weight_names_its_argument_and_place() {
    let mut xl = load(&weighting("StableDiffusionXLPipeline", "sdxl")).expect("the model is complete");
    let said = refused(&mut xl, json!({ "prompt": "(a:1.2.3)" }));
    assert!(said.contains("argument `prompt`: has the weight `1.2.3` at character 4"), "{said}");
    let said = refused(&mut xl, json!({ "negative_prompt": "(a:..)" }));
    assert!(said.contains("argument `negative_prompt`"), "{said}");
}

#[test]
fn scales_decide_where_and_how_strongly_a_picture_acts() {
    let plain = latents(&mut load(&request("StableDiffusionXLPipeline", "sdxl")).expect("complete"), json!({}));
    let plain = plain.expect("valid");
    let of = |scale: Value| {
        let mut pipeline = load(&with_adapters(vec![ip_adapter(&scale)])).expect("the model is complete");
        latents(&mut pipeline, json!({ "ip_adapter_image": ArtifactRef(0).to_value() })).expect("valid")
    };
    assert_eq!(of(json!(0)), plain);
    assert_eq!(of(json!({ "mid": 0.0 })), plain);
    assert_ne!(of(json!(0.5)), plain);
    assert_eq!(of(json!(0.5)), of(json!({ "down": 0.5, "mid": [0.5], "up": 0.5 })));
    assert_eq!(of(json!([0.5])), of(json!("0.5")));
    assert_ne!(of(json!({ "up": 0.5 })), of(json!({ "down": 0.5 })));
}

#[test]
fn several_pictures_several_adapters_and_embeddings_are_taken() {
    let (one, other) = (ArtifactRef(0).to_value(), ArtifactRef(1).to_value());
    let mut single = load(&with_adapters(vec![ip_adapter(&json!(1))])).expect("the model is complete");
    let mut of = |image: Value| latents(&mut single, json!({ "ip_adapter_image": image })).expect("valid");
    let alone = of(json!(one));
    assert_eq!(alone, of(json!([one])));
    assert_ne!(alone, of(json!([one, other])));
    assert_eq!(of(json!([one, other])), of(json!([[one, other]])));
    let embeds = latents(&mut single, json!({ "ip_adapter_image_embeds": ArtifactRef(2).to_value() }));
    assert_ne!(embeds.expect("valid"), alone);
    let unguided = json!({ "ip_adapter_image": one, "guidance_scale": 1.0, "prompt": ["a", "b"] });
    assert_eq!(latents(&mut single, unguided).expect("valid").len(), 2 * 256);

    let two = vec![ip_adapter(&json!(0.5)), ip_adapter(&json!(0.5))];
    let mut two = load(&with_adapters(two)).expect("the model is complete");
    assert!(latents(&mut two, json!({ "ip_adapter_image": [one, [one, other]] })).is_ok());
    let said = refused(&mut two, json!({ "ip_adapter_image": one }));
    assert!(said.contains("has 1 entries for 2 IP-Adapters"), "{said}");
}

#[test]
fn what_is_wrong_with_the_pictures_is_said() {
    let mut pipeline = load(&with_adapters(vec![ip_adapter(&json!(1))])).expect("the model is complete");
    let image = ArtifactRef(0).to_value();
    for (call, expected) in [
        (json!({}), "argument `ip_adapter_image`: is missing"),
        (json!({ "ip_adapter_image": { "$artifact": 9 } }), "refers to a result"),
        (json!({ "ip_adapter_image": { "$artifact": 2 } }), "argument `ip_adapter_image`: must be a picture"),
        (json!({ "ip_adapter_image": image, "ip_adapter_image_embeds": image }), "cannot be combined"),
        (json!({ "ip_adapter_image_embeds": { "$artifact": 2 }, "guidance_scale": 1 }), "needs (1, pictures, 40)"),
    ] {
        let said = refused(&mut pipeline, call);
        assert!(said.contains(expected), "{said}");
    }
    let mut without = load(&request("StableDiffusionXLPipeline", "sdxl")).expect("the model is complete");
    let said = refused(&mut without, json!({ "ip_adapter_image": image }));
    assert!(said.contains("loads no IP-Adapter"), "{said}");
}

#[test]
fn what_is_wrong_with_an_adapter_is_said_when_it_is_loaded() {
    let right = || ip_adapter(&json!(1));
    let pickle = IpAdapterRequest { weight_name: Some("ip-adapter_sdxl.bin".into()), ..right() };
    let said = why_not(&with_adapters(vec![pickle]));
    assert!(said.contains("use `ip-adapter_sdxl.safetensors`"), "{said}");

    let missing = IpAdapterRequest { weight_name: Some("other.safetensors".into()), ..right() };
    assert!(why_not(&with_adapters(vec![missing])).contains("correct `model_name`"));

    let no_encoder = IpAdapterRequest { image_encoder_folder: Some("encoder".into()), ..right() };
    let said = why_not(&with_adapters(vec![no_encoder]));
    assert!(said.contains("needs an image encoder") && said.contains("`models/encoder`"), "{said}");

    let other_family = PipelineRequest { ip_adapters: vec![right()], ..request("StableDiffusionPipeline", "sd15") };
    let mut cache = ComponentCache::default();
    let said = load_with(&other_family, &mut cache).map(|_| ()).expect_err("it has other layers").to_string();
    assert!(said.contains("does not fit this model"), "{said}");
    assert_eq!(cache.bytes(), 0, "the model was read first");

    let wrong_block = ip_adapter(&json!({ "down": { "block_9": 1 } }));
    assert!(why_not(&with_adapters(vec![wrong_block])).contains("no block `block_9`"));
    assert!(IpAdapterScale::from_json(&json!("x")).is_err() && IpAdapterScale::from_json(&json!([0.5, "x"])).is_err());
}

#[test]
fn an_image_processor_of_the_step_prepares_the_pictures() {
    let folder = std::env::temp_dir().join(format!("dw-image-processor-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("the temporary folder is writable");
    let settings = json!({ "image_mean": [0.1, 0.2, 0.3], "image_std": [1.0, 1.0, 1.0], "size": 40 });
    std::fs::write(folder.join("preprocessor_config.json"), settings.to_string()).expect("a writable folder");
    let own = |class: &str| {
        let component = ComponentRequest {
            class: class.into(),
            source: ModelSource::Folder(folder.clone()),
            subfolder: None,
            variant: None,
            dtype: None,
            quantization: None,
        };
        let mut request = with_adapters(vec![ip_adapter(&json!(1))]);
        request.components.insert("feature_extractor".into(), ComponentChoice::Load(vec![component]));
        request
    };
    let shown = json!({ "ip_adapter_image": ArtifactRef(0).to_value() });
    let drawn = |request: &PipelineRequest| {
        latents(&mut load(request).expect("the model is complete"), shown.clone()).expect("the call is valid")
    };
    assert_ne!(drawn(&own("CLIPImageProcessor")), drawn(&with_adapters(vec![ip_adapter(&json!(1))])));
    let said = why_not(&own("CLIPTokenizer"));
    assert!(said.contains("`feature_extractor` of class `CLIPTokenizer`") && said.contains("`CLIPImageProcessor`"));
    std::fs::remove_dir_all(&folder).expect("the folder is there");
}

#[test]
fn without_an_image_encoder_embeddings_are_asked_for() {
    let mut request = with_adapters(vec![ip_adapter(&json!(1))]);
    request.components.insert("image_encoder".into(), ComponentChoice::Omit);
    let mut pipeline = load(&request).expect("the rest is complete");
    let said = refused(&mut pipeline, json!({ "ip_adapter_image": ArtifactRef(0).to_value() }));
    assert!(said.contains("give `ip_adapter_image_embeds` instead"), "{said}");
    assert!(latents(&mut pipeline, json!({ "ip_adapter_image_embeds": ArtifactRef(2).to_value() })).is_ok());
}
