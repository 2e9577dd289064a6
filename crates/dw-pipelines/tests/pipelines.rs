//! How pipelines behave around the numbers: complaints, events, cancellation, batches, the cache.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Mutex,
};

use candle_core::{DType, Device, Tensor};
use dw_core::{
    arguments::{Arguments, ArtifactRef},
    artifact::{Array, Artifact, Entry},
    cancel::CancellationToken,
    event::{Event, Silent},
    seed::Seed,
};
use dw_pipelines::{
    Error, Result,
    hub::Hub,
    pipelines::{ComponentCache, Pipeline},
    request::{
        ComponentChoice, ComponentRequest, Context, MemoryRequest, ModelSource, PipelineRequest, SchedulerRequest,
    },
    rng::{Generator, Generators, NoiseDialect},
};
use image::DynamicImage;
use serde_json::{Map, Value, json};

fn model(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity/models").join(name)
}

fn hub() -> Hub {
    Hub { cache: PathBuf::new(), endpoint: String::new(), token: None, offline: true }
}

fn request(class: &str, source: ModelSource) -> PipelineRequest {
    PipelineRequest {
        class: class.into(),
        source,
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

fn xl() -> PipelineRequest {
    request("StableDiffusionXLPipeline", ModelSource::Folder(model("sdxl")))
}

fn component(class: &str, folder: PathBuf) -> ComponentChoice {
    ComponentChoice::Load(vec![ComponentRequest {
        class: class.into(),
        source: ModelSource::Folder(folder),
        subfolder: None,
        variant: None,
        dtype: None,
        quantization: None,
    }])
}

fn arguments(values: Value) -> Arguments {
    let Value::Object(values) = values else { panic!("arguments are an object") };
    Arguments { values, ..Arguments::default() }
}

fn short(mut more: Value) -> Arguments {
    let mut values = Map::from_iter([
        ("prompt".to_owned(), json!("a small red house")),
        ("num_inference_steps".to_owned(), json!(2)),
        ("height".to_owned(), json!(64)),
        ("width".to_owned(), json!(64)),
    ]);
    values.append(more.as_object_mut().expect("arguments are an object"));
    arguments(Value::Object(values))
}

fn seed(seed: i128) -> Generators {
    Generators::from_seed(&Seed::One(seed), NoiseDialect::Cpu)
}

fn seeds(seeds: &[i128]) -> Generators {
    Generators::from_seed(&Seed::Each(seeds.to_vec()), NoiseDialect::Cpu)
}

fn load(request: &PipelineRequest) -> Result<Pipeline> {
    let cancel = CancellationToken::default();
    Pipeline::load(request, &hub(), &mut ComponentCache::default(), Context { events: &Silent, cancel: &cancel })
}

fn run(pipeline: &mut Pipeline, arguments: &Arguments, mut generators: Generators) -> Result<Entry> {
    let cancel = CancellationToken::default();
    pipeline.run(arguments, &mut generators, Context { events: &Silent, cancel: &cancel })
}

/// Loads and runs, keeping every event.
fn recorded(request: &PipelineRequest, cache: &mut ComponentCache, arguments: &Arguments) -> Vec<Event> {
    let events = Mutex::new(Vec::new());
    let sink = |event: Event| events.lock().expect("no test panics here").push(event);
    let cancel = CancellationToken::default();
    let context = Context { events: &sink, cancel: &cancel };
    let mut pipeline = Pipeline::load(request, &hub(), cache, context).expect("the model is complete");
    pipeline.run(arguments, &mut seed(1), context).expect("the call is valid");
    events.into_inner().expect("no test panics here")
}

fn bytes(artifact: &Artifact) -> Vec<u8> {
    let Artifact::Image(picture) = artifact else { panic!("{} is no picture", artifact.kind()) };
    picture.to_rgb8().into_raw()
}

fn pictures(entry: &Entry) -> Vec<Vec<u8>> {
    entry.artifacts.iter().map(bytes).collect()
}

fn latents(entry: &Entry) -> &Array {
    match entry.artifacts.as_slice() {
        [Artifact::Array(array)] => array,
        other => panic!("expected latents, found {other:?}"),
    }
}

/// The same picture, give or take the rounding that another batch size brings.
fn assert_same(a: &[u8], b: &[u8]) {
    let worst = a.iter().zip(b).map(|(a, b)| a.abs_diff(*b)).max();
    assert!(a.len() == b.len() && worst <= Some(1), "pictures differ by {worst:?} levels");
}

struct TempFolder(PathBuf);

impl TempFolder {
    fn new(test: &str) -> Self {
        let path = std::env::temp_dir().join(format!("dw-pipelines-{test}-{}", std::process::id()));
        std::fs::create_dir_all(&path).expect("the temporary folder is writable");
        Self(path)
    }
}

impl Drop for TempFolder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn every_wrong_argument_is_named_with_what_to_do() {
    let mut xl = load(&xl()).expect("the model is complete");
    for (wrong, expected) in [
        (json!({ "height": 65 }), "argument `height`: must be a multiple of 8, found `65`; use `64` or `72`"),
        (json!({ "width": 4 }), "use `8`"),
        (json!({ "height": -8 }), "argument `height`: must be a whole number of at least 1, found `-8`"),
        (json!({ "width": "wide" }), "argument `width`: must be a whole number"),
        (json!({ "num_inference_steps": 0 }), "argument `num_inference_steps`: must be a whole number of at least 1"),
        (json!({ "num_images_per_prompt": 0 }), "argument `num_images_per_prompt`"),
        (json!({ "guidance_scale": "high" }), "argument `guidance_scale`: must be a number, found `\"high\"`"),
        (
            json!({ "promt": "a" }),
            "argument `promt`: `StableDiffusionXLPipeline` does not take it; did you mean `prompt`?",
        ),
        (json!({ "prompt": 3 }), "argument `prompt`: must be text or a list of texts, found `3`"),
        (json!({ "prompt": [] }), "argument `prompt`"),
        (
            json!({ "prompt": ["a", "b"], "negative_prompt": ["x", "y", "z"] }),
            "argument `negative_prompt`: has 3 texts",
        ),
        (json!({ "prompt": ["a", "b"], "prompt_2": ["x", "y", "z"] }), "argument `prompt_2`: has 3 texts"),
        (json!({ "prompt": null }), "argument `prompt`: is missing"),
        (json!({ "output_type": "gif" }), "argument `output_type`"),
        (json!({ "timesteps": [999, 1], "sigmas": [1.0] }), "argument `timesteps`"),
        (json!({ "timesteps": "all" }), "argument `timesteps`: must be a list of numbers"),
        (json!({ "original_size": [1, 2, 3] }), "argument `original_size`: must be two whole numbers"),
        (json!({ "denoising_end": 1.5 }), "argument `denoising_end`"),
        (json!({ "clip_skip": 9 }), "argument `clip_skip`"),
        (json!({ "cross_attention_kwargs": { "scala": 1 } }), "argument `cross_attention_kwargs"),
        (json!({ "latents": { "$artifact": 4 } }), "argument `latents`: refers to a result"),
        (json!({ "prompt_embeds": { "$artifact": 4 } }), "argument `prompt`"),
    ] {
        let said = run(&mut xl, &short(wrong.clone()), seed(0)).map(|_| ()).expect_err("a wrong argument").to_string();
        assert!(said.contains(expected), "{wrong}: {said}");
    }
}

#[test]
fn a_list_of_seeds_must_match_the_pictures() {
    let mut xl = load(&xl()).expect("the model is complete");
    let call = short(json!({ "num_images_per_prompt": 3 }));
    let said = run(&mut xl, &call, seeds(&[1, 2])).map(|_| ()).expect_err("two seeds").to_string();
    assert!(said.contains("argument `seed`: has 2 values for 3 picture(s)"), "{said}");
}

#[test]
fn pictures_of_a_batch_come_prompt_by_prompt_and_do_not_depend_on_each_other() {
    let mut xl = load(&xl()).expect("the model is complete");
    let batch = short(json!({
        "prompt": ["a cat", "the sea"], "negative_prompt": "blurry", "num_images_per_prompt": 2
    }));
    let together = pictures(&run(&mut xl, &batch, seeds(&[1, 2, 3, 4])).expect("four pictures"));
    assert_eq!(together.len(), 4);
    for (at, prompt) in ["a cat", "a cat", "the sea", "the sea"].into_iter().enumerate() {
        let single = short(json!({ "prompt": prompt, "negative_prompt": "blurry" }));
        let alone = pictures(&run(&mut xl, &single, seeds(&[at as i128 + 1])).expect("one picture"));
        assert_same(&together[at], &alone[0]);
    }
}

#[test]
fn an_empty_text_for_the_second_encoder_gives_way_and_a_list_of_empty_texts_does_not() {
    let mut pipeline = load(&xl()).expect("complete");
    let mut drawn = |more: Value| pictures(&run(&mut pipeline, &short(more), seed(3)).expect("valid"));
    let usual = drawn(json!({ "prompt": ["a house"] }));
    assert_eq!(drawn(json!({ "prompt": ["a house"], "prompt_2": "" })), usual);
    assert_ne!(drawn(json!({ "prompt": ["a house"], "prompt_2": [""] })), usual);
}

#[test]
fn sizes_may_be_written_as_lists_or_as_tuples_and_null_means_not_given() {
    let mut xl = load(&xl()).expect("the model is complete");
    let list = short(json!({ "original_size": [128, 96], "crops_coords_top_left": [4.0, 8] }));
    let tuple = short(json!({
        "original_size": { "$tuple": [128, 96] }, "crops_coords_top_left": { "$tuple": [4, 8] }, "target_size": null
    }));
    let list = pictures(&run(&mut xl, &list, seed(5)).expect("valid"));
    assert_eq!(list, pictures(&run(&mut xl, &tuple, seed(5)).expect("valid")));
    assert_ne!(list, pictures(&run(&mut xl, &short(json!({})), seed(5)).expect("valid")));
}

#[test]
fn the_model_decides_the_size_when_the_call_does_not() {
    let mut xl = load(&xl()).expect("the model is complete");
    let entry = run(&mut xl, &arguments(json!({ "prompt": "", "num_inference_steps": 1 })), seed(0)).expect("valid");
    let Artifact::Image(picture) = &entry.artifacts[0] else { panic!("a picture") };
    assert_eq!((picture.width(), picture.height()), (64, 64));
}

#[test]
fn given_latents_replace_the_drawn_noise_and_must_fit() {
    let mut xl = load(&xl()).expect("the model is complete");
    let drawn = pictures(&run(&mut xl, &short(json!({})), seed(3)).expect("valid"));
    let noise = Generator::new(3, NoiseDialect::Cpu).randn((1, 4, 8, 8), DType::F32, &Device::Cpu).expect("noise");
    let data = noise.flatten_all().and_then(|noise| noise.to_vec1()).expect("f32 values");
    let mut call = short(json!({ "latents": ArtifactRef(0).to_value() }));
    call.artifacts.insert(0, Artifact::Array(Array { shape: vec![1, 4, 8, 8], data: data.clone() }.into()));
    assert_eq!(drawn, pictures(&run(&mut xl, &call, seed(99)).expect("valid")));

    call.artifacts.insert(0, Artifact::Array(Array { shape: vec![1, 4, 4, 16], data }.into()));
    let said = run(&mut xl, &call, seed(99)).map(|_| ()).expect_err("the wrong shape").to_string();
    assert!(said.contains("argument `latents`: has shape [1, 4, 4, 16], but this call needs [1, 4, 8, 8]"), "{said}");
}

#[test]
fn broken_latents_are_an_error_at_the_step_where_they_appear() {
    let mut xl = load(&xl()).expect("the model is complete");
    let mut data = vec![0.5; 256];
    data[7] = f32::NAN;
    let mut call = short(json!({ "latents": ArtifactRef(0).to_value() }));
    call.artifacts.insert(0, Artifact::Array(Array { shape: vec![1, 4, 8, 8], data }.into()));
    let error = run(&mut xl, &call, seed(0)).map(|_| ()).expect_err("not a number");
    assert!(matches!(error, Error::NonFinite { what: "latents", .. }), "{error}");
    assert!(error.to_string().contains("after denoise step 1"), "{error}");
}

#[test]
fn latents_are_handed_on_with_their_batch_axis_and_a_decoder_is_not_needed_for_them() {
    let mut request = xl();
    request.components.insert("vae".into(), ComponentChoice::Omit);
    let mut xl = load(&request).expect("the rest is complete");
    let entry = run(&mut xl, &short(json!({ "output_type": "latent" })), seed(0)).expect("valid");
    assert_eq!(latents(&entry).shape, [1, 4, 8, 8]);
    let said = run(&mut xl, &short(json!({})), seed(0)).map(|_| ()).expect_err("no decoder").to_string();
    assert!(said.contains("`vae`"), "{said}");
}

#[test]
fn embeddings_stand_in_for_text_encoders_that_are_left_out() {
    let mut request = xl();
    for name in ["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"] {
        request.components.insert(name.into(), ComponentChoice::Omit);
    }
    let mut xl = load(&request).expect("UNet and decoder are there");
    let said = run(&mut xl, &short(json!({})), seed(0)).map(|_| ()).expect_err("no encoder").to_string();
    assert!(said.contains("`prompt_embeds`"), "{said}");

    let mut call = short(json!({
        "prompt": null,
        "prompt_embeds": ArtifactRef(0).to_value(),
        "pooled_prompt_embeds": ArtifactRef(1).to_value()
    }));
    let array = |shape: &[usize]| Array { shape: shape.to_vec(), data: vec![0.1; shape.iter().product()] };
    call.artifacts.insert(0, Artifact::Array(array(&[1, 77, 72]).into()));
    call.artifacts.insert(1, Artifact::Array(array(&[1, 40]).into()));
    assert_eq!(run(&mut xl, &call, seed(0)).expect("valid").artifacts.len(), 1);
    call.values.remove("pooled_prompt_embeds");
    let said = run(&mut xl, &call, seed(0)).map(|_| ()).expect_err("half of it").to_string();
    assert!(said.contains("argument `pooled_prompt_embeds`: is missing"), "{said}");
}

#[test]
fn events_tell_what_is_read_how_far_denoising_is_and_what_took_how_long() {
    let events = recorded(&xl(), &mut ComponentCache::default(), &short(json!({})));
    let loading = events.iter().filter_map(|event| match event {
        Event::Loading { bytes, total, .. } => Some((*bytes, *total)),
        _ => None,
    });
    let (read, total) = loading.max().expect("weights are read");
    assert_eq!(read, total);
    let steps: Vec<&Event> = events.iter().filter(|event| matches!(event, Event::DenoiseStep { .. })).collect();
    assert_eq!(steps, [&Event::DenoiseStep { done: 1, of: 2 }, &Event::DenoiseStep { done: 2, of: 2 }]);
    let stages: Vec<&str> = events
        .iter()
        .filter_map(|event| match event {
            Event::StageFinished { step, stage, .. } if step.is_empty() => Some(stage.as_str()),
            _ => None,
        })
        .collect();
    assert_eq!(stages, ["encode prompt", "denoise", "decode"]);
}

#[test]
fn a_second_load_reads_nothing_and_another_type_reads_again() {
    let mut cache = ComponentCache::new(None);
    recorded(&xl(), &mut cache, &short(json!({})));
    let again = recorded(&xl(), &mut cache, &short(json!({ "prompt": "another" })));
    assert_eq!(again.iter().filter(|event| matches!(event, Event::Reused { .. })).count(), 6);
    assert!(!again.iter().any(|event| matches!(event, Event::Loading { .. })));
    assert!(cache.bytes() > 2_000_000);

    let other = PipelineRequest { dtype: Some(DType::BF16), ..xl() };
    let events = recorded(&other, &mut cache, &short(json!({})));
    assert!(events.iter().any(|event| matches!(event, Event::Loading { .. })));
}

#[test]
fn changed_weights_are_read_again() {
    let folder = TempFolder::new("changed");
    for file in ["config.json", "diffusion_pytorch_model.safetensors"] {
        std::fs::copy(model("sdxl").join("vae").join(file), folder.0.join(file)).expect("a writable folder");
    }
    let mut request = xl();
    request.components.insert("vae".into(), component("AutoencoderKL", folder.0.clone()));
    let mut cache = ComponentCache::new(None);
    recorded(&request, &mut cache, &short(json!({})));
    let weights = folder.0.join("diffusion_pytorch_model.safetensors");
    let mut tensors = candle_core::safetensors::load(&weights, &Device::Cpu).expect("valid tensors");
    tensors.insert("leftover".into(), Tensor::zeros(3, DType::F32, &Device::Cpu).expect("a small tensor"));
    candle_core::safetensors::save(&tensors, &weights).expect("a writable folder");
    let events = recorded(&request, &mut cache, &short(json!({})));
    let read: Vec<&str> = events
        .iter()
        .filter_map(|event| match event {
            Event::Loading { component, .. } => Some(component.as_str()),
            _ => None,
        })
        .collect();
    assert!(!read.is_empty() && read.iter().all(|component| *component == "vae"), "{read:?}");
    let warned =
        events.iter().any(|event| matches!(event, Event::Warning { message } if message.contains("`leftover`")));
    assert!(warned, "an unused tensor is a warning that names it");
}

#[test]
fn a_prompt_that_is_too_long_is_a_warning_with_the_lost_text() {
    let prompt = format!("{}and a lost sheep", "word ".repeat(60));
    let events = recorded(&xl(), &mut ComponentCache::default(), &short(json!({ "prompt": prompt })));
    let warnings: Vec<&String> = events
        .iter()
        .filter_map(|event| match event {
            Event::Warning { message } => Some(message),
            _ => None,
        })
        .collect();
    assert!(matches!(warnings.as_slice(), [one] if one.contains("and a lost sheep`")), "{warnings:?}");
}

#[test]
fn cancelling_stops_between_two_steps() {
    let mut pipeline = load(&xl()).expect("the model is complete");
    let (cancel, steps) = (CancellationToken::default(), Mutex::new(0));
    let sink = |event: Event| {
        if matches!(event, Event::DenoiseStep { .. }) {
            *steps.lock().expect("no test panics here") += 1;
            cancel.cancel();
        }
    };
    let call = short(json!({ "num_inference_steps": 9 }));
    let error = pipeline.run(&call, &mut seed(0), Context { events: &sink, cancel: &cancel }).map(|_| ());
    assert!(matches!(error, Err(Error::Cancelled(_))), "{error:?}");
    assert_eq!(*steps.lock().expect("no test panics here"), 1);
    let error =
        Pipeline::load(&xl(), &hub(), &mut ComponentCache::default(), Context { events: &Silent, cancel: &cancel });
    assert!(matches!(error.map(|_| ()), Err(Error::Cancelled(_))));
}

#[test]
fn a_shared_component_is_used_and_a_missing_one_is_named() {
    let cancel = CancellationToken::default();
    let context = Context { events: &Silent, cancel: &cancel };
    let mut cache = ComponentCache::default();
    let first = Pipeline::load(&xl(), &hub(), &mut cache, context).expect("the model is complete");
    cache.share("vae", first.component("vae").expect("it has one"));
    let mut request = xl();
    request.components.insert("vae".into(), ComponentChoice::Shared);
    let second = Pipeline::load(&request, &hub(), &mut cache, context).expect("the decoder is shared");
    let key = |pipeline: &Pipeline| pipeline.component("vae").expect("it has one").key.clone();
    assert_eq!(key(&first), key(&second));
    request.components.insert("unet".into(), ComponentChoice::Shared);
    let said = Pipeline::load(&request, &hub(), &mut cache, context).map(|_| ()).expect_err("not shared").to_string();
    assert!(said.contains("`unet`") && said.contains("shared are `vae`"), "{said}");
}

#[test]
fn requests_that_cannot_be_loaded_say_why() {
    let with = |change: &dyn Fn(&mut PipelineRequest)| {
        let mut request = xl();
        change(&mut request);
        load(&request).map(|_| ()).expect_err("a request that cannot be loaded").to_string()
    };
    let scheduler =
        |class: &str| Some(SchedulerRequest { class: Some(class.to_owned()), config: Map::new(), shift: None });
    for (said, expected) in [
        (with(&|request| request.class = "StableDiffusionPipeline".into()), "use that class, or `DiffusionPipeline`"),
        (with(&|request| request.class = "StableDiffusionXL".into()), "did you mean `StableDiffusionXLPipeline`?"),
        (with(&|request| request.source = ModelSource::Folder(model("sdxl").join("unet"))), "model_index.json"),
        (with(&|request| request.scheduler = scheduler("EulerDiscret")), "EulerDiscreteScheduler"),
        (with(&|request| request.variant = Some("fp16".into())), "`fp16`"),
        (
            with(&|request| {
                request.components.insert("unet".into(), ComponentChoice::Omit);
            }),
            "needs the component `unet`",
        ),
        (
            with(&|request| {
                request.components.insert("vae".into(), component("AutoencoderTiny", model("sdxl").join("vae")));
            }),
            "`AutoencoderTiny`",
        ),
        (
            with(&|request| {
                request.components.insert("controlnet".into(), component("ControlNetModel", model("sdxl")));
            }),
            "has no component `controlnet`",
        ),
        (
            with(&|request| {
                request.components.insert("vae".into(), component("AutoencoderKL", model("sdxl").join("unet")));
            }),
            "describes a `UNet2DConditionModel`, not a `AutoencoderKL`",
        ),
    ] {
        assert!(said.contains(expected), "{said}");
    }
}

#[test]
fn leaving_out_a_component_that_the_class_does_not_have_is_fine() {
    let mut request = request("DiffusionPipeline", ModelSource::Folder(model("sd15")));
    request.components.insert("safety_checker".into(), ComponentChoice::Omit);
    let pipeline = load(&request).expect("the model is complete");
    assert_eq!(pipeline.class(), "StableDiffusionPipeline");
    assert_eq!(pipeline.scheduler_class(), "PNDMScheduler");
}

#[test]
fn wrong_start_pictures_are_named_with_what_to_do() {
    let request = request("AutoPipelineForImage2Image", ModelSource::Folder(model("sdxl")));
    let mut pipeline = load(&request).expect("the model is complete");
    assert_eq!(pipeline.class(), "StableDiffusionXLImg2ImgPipeline");
    let picture = |side| Artifact::image(DynamicImage::new_rgb8(side, side));
    let array = |shape: &[usize]| {
        Artifact::Array(Array { shape: shape.to_vec(), data: vec![0.0; shape.iter().product()] }.into())
    };
    let image = || json!({ "$artifact": 0 });
    for (artifacts, values, expected) in [
        (vec![], json!({}), "argument `image`: is missing"),
        (vec![picture(7)], json!({ "image": image() }), "argument `image`: is `7 x 7` pixels"),
        (vec![Artifact::Text("a".into())], json!({ "image": image() }), "must be a picture or latents, found text"),
        (
            vec![array(&[1, 3, 8, 8])],
            json!({ "image": image() }),
            "latents must have shape (pictures, 4, height, width)",
        ),
        (
            vec![picture(64), picture(72)],
            json!({ "image": [image(), { "$artifact": 1 }] }),
            "give pictures of one size",
        ),
        (
            vec![picture(64), picture(64)],
            json!({ "image": [image(), { "$artifact": 1 }] }),
            "has 2 picture(s) for 1 of the result",
        ),
        (
            vec![picture(64)],
            json!({ "image": image(), "strength": 1.5 }),
            "argument `strength`: must lie between 0 and 1",
        ),
        (vec![picture(64)], json!({ "image": image(), "strength": 0.1 }), "`0.1` of 4 steps leaves none"),
        (vec![picture(64)], json!({ "image": image(), "height": 64 }), "argument `height`"),
        (vec![picture(64)], json!({ "image": image(), "denoising_start": 0.0 }), "argument `denoising_start`"),
    ] {
        let mut call = arguments(values.clone());
        call.values.insert("prompt".into(), json!("a house"));
        call.values.insert("num_inference_steps".into(), json!(4));
        call.artifacts = (0..).zip(artifacts).collect();
        let said = run(&mut pipeline, &call, seed(0)).map(|_| ()).expect_err("a wrong picture").to_string();
        assert!(said.contains(expected), "{values}: {said}");
    }
}

#[test]
fn one_start_picture_serves_a_whole_batch_of_prompts() {
    let request = request("StableDiffusionImg2ImgPipeline", ModelSource::Folder(model("sd15")));
    let mut pipeline = load(&request).expect("the model is complete");
    let mut call = arguments(json!({
        "prompt": ["a cat", "the sea"], "image": { "$artifact": 0 }, "strength": 0.5, "num_inference_steps": 4
    }));
    call.artifacts.insert(0, Artifact::image(DynamicImage::new_rgb8(72, 65)));
    let entry = run(&mut pipeline, &call, seeds(&[1, 2])).expect("valid");
    let sizes: Vec<_> = entry
        .artifacts
        .iter()
        .map(|artifact| match artifact {
            Artifact::Image(picture) => (picture.width(), picture.height()),
            other => panic!("{} is no picture", other.kind()),
        })
        .collect();
    assert_eq!(sizes, [(72, 64), (72, 64)]);
}

#[test]
fn half_precision_runs_and_stays_near_full_precision() {
    let full = pictures(&run(&mut load(&xl()).expect("complete"), &short(json!({})), seed(0)).expect("valid"));
    for dtype in [DType::BF16, DType::F16] {
        // The latents of a generator depend on the type, so the same ones are given.
        let mut pipeline = load(&PipelineRequest { dtype: Some(dtype), ..xl() }).expect("complete");
        let noise = Generator::new(0, NoiseDialect::Cpu).randn((1, 4, 8, 8), DType::F32, &Device::Cpu).expect("noise");
        let data = noise.flatten_all().and_then(|noise| noise.to_vec1()).expect("f32 values");
        let mut call = short(json!({ "latents": ArtifactRef(0).to_value() }));
        call.artifacts.insert(0, Artifact::Array(Array { shape: vec![1, 4, 8, 8], data }.into()));
        let half = pictures(&run(&mut pipeline, &call, seed(0)).expect("valid"));
        let differences = half[0].iter().zip(&full[0]).map(|(a, b)| f64::from(a.abs_diff(*b)));
        let mean = differences.sum::<f64>() / half[0].len() as f64;
        assert!(mean < 8.0, "{dtype:?}: {mean} levels on average");
    }
}

#[test]
fn the_built_in_model_tells_a_sunset_from_a_day() {
    let request = request("AutoPipelineForText2Image", ModelSource::Builtin("landscapes".into()));
    let mut pipeline = load(&request).expect("it is inside the program");
    let mut redness = |prompt: &str| {
        let call = arguments(json!({ "prompt": prompt, "num_inference_steps": 8 }));
        let entry = run(&mut pipeline, &call, seed(7)).expect("valid");
        let picture = bytes(&entry.artifacts[0]);
        // The upper half is sky.
        let sky = &picture[..picture.len() / 2];
        let sum = |channel: usize| sky.iter().skip(channel).step_by(3).map(|&value| f64::from(value)).sum::<f64>();
        (sum(0) - sum(2)) / (sky.len() / 3) as f64
    };
    let (sunset, day) = (redness("a sunset over the sea, a sun"), redness("day over the sea, clouds"));
    assert!(sunset > day + 20.0, "sunset {sunset}, day {day}");
}

/// A call with a start picture, a mask and a control picture, as handles 0, 1 and 2.
fn with_pictures(values: Value) -> Arguments {
    let mut call = short(values);
    let ramp = |x: u32, y: u32| image::Rgb([(x * 3) as u8, (y * 3) as u8, 90]);
    let mask = |x: u32, y: u32| image::Luma([if (20..40).contains(&x) && y >= 30 { 255 } else { 0 }]);
    call.artifacts.insert(0, Artifact::image(image::RgbImage::from_fn(64, 64, ramp).into()));
    call.artifacts.insert(1, Artifact::image(image::GrayImage::from_fn(64, 64, mask).into()));
    call.artifacts.insert(2, Artifact::image(image::GrayImage::new(48, 80).into()));
    call
}

fn handle(at: u64) -> Value {
    ArtifactRef(at).to_value()
}

/// Runs a class of the SDXL family on arguments that are wrong; gives what it says.
fn said(pipeline: &mut Pipeline, base: &Value, wrong: &Value) -> String {
    let mut values = base.clone();
    values.as_object_mut().expect("an object").extend(wrong.as_object().expect("an object").clone());
    let result = run(pipeline, &with_pictures(values), seed(0));
    result.map(|_| ()).expect_err("a wrong argument").to_string()
}

#[test]
fn every_wrong_argument_of_inpainting_is_named_with_what_to_do() {
    let mut inpaint =
        load(&request("AutoPipelineForInpainting", ModelSource::Folder(model("sdxl")))).expect("complete");
    assert_eq!(inpaint.class(), "StableDiffusionXLInpaintPipeline");
    let base = json!({ "image": handle(0), "mask_image": handle(1) });
    for (wrong, expected) in [
        (json!({ "image": null }), "argument `image`: is missing"),
        (json!({ "mask_image": null }), "argument `mask_image`: is missing"),
        (json!({ "mask_image": [] }), "argument `mask_image`: is an empty list"),
        (json!({ "height": 68 }), "argument `height`: must be a multiple of 8, found `68`; use `64` or `72`"),
        (json!({ "strength": 0.0 }), "argument `strength`: `0` of 2 steps leaves none"),
        (json!({ "strength": 1.5 }), "argument `strength`: must lie between 0 and 1"),
        (json!({ "padding_mask_crop": -1 }), "argument `padding_mask_crop`: must be a whole number"),
        (json!({ "padding_mask_crop": 4, "mask_image": handle(2) }), "argument `mask_image`: is `48 x 80` pixels"),
        (json!({ "padding_mask_crop": 4, "output_type": "latent" }), "argument `padding_mask_crop`: gives pictures"),
        (json!({ "padding_mask_crop": 4, "image": [handle(0), handle(0)] }), "works on one picture with one mask"),
        (json!({ "mask_image": handle(9) }), "argument `mask_image`: refers to a result"),
        (json!({ "control_image": handle(2) }), "argument `control_image`: `StableDiffusionXLInpaintPipeline`"),
    ] {
        let said = said(&mut inpaint, &base, &wrong);
        assert!(said.contains(expected), "{wrong}: {said}");
    }
    let mut black = with_pictures(json!({ "image": handle(0), "mask_image": handle(1), "padding_mask_crop": 0 }));
    black.artifacts.insert(1, Artifact::image(image::GrayImage::new(64, 64).into()));
    let said = run(&mut inpaint, &black, seed(0)).map(|_| ()).expect_err("a black mask").to_string();
    assert!(said.contains("argument `mask_image`: is black"), "{said}");
}

#[test]
fn a_painted_region_leaves_the_rest_of_the_picture_as_it_is_byte_for_byte() {
    let class = "StableDiffusionXLInpaintPipeline";
    let mut inpaint = load(&request(class, ModelSource::Folder(model("sdxl")))).expect("complete");
    let call = with_pictures(json!({
        "image": handle(0), "mask_image": handle(1), "padding_mask_crop": 3, "strength": 1.0, "prompt": "a house"
    }));
    let entry = run(&mut inpaint, &call, seed(4)).expect("valid");
    let (painted, before) = (bytes(&entry.artifacts[0]), bytes(&call.artifacts[&0]));
    let is_masked = |pixel: usize| (20..40).contains(&(pixel % 64)) && pixel / 64 >= 30;
    let changed = |masked: bool| {
        let pixels = painted.chunks(3).zip(before.chunks(3)).enumerate();
        pixels.filter(|(at, (a, b))| is_masked(*at) == masked && a != b).count()
    };
    assert_eq!(changed(false), 0);
    assert!(changed(true) > 500, "{} of 680 pixels are new", changed(true));
}

#[test]
fn a_mask_of_another_size_is_resized_as_the_picture_is() {
    let class = "StableDiffusionXLInpaintPipeline";
    let mut inpaint = load(&request(class, ModelSource::Folder(model("sdxl")))).expect("complete");
    let small = json!({ "image": handle(0), "mask_image": handle(1), "strength": 0.9 });
    let mut large = with_pictures(small.clone());
    let mask = |x: u32, y: u32| image::Luma([if (40..80).contains(&x) && y >= 60 { 255 } else { 0 }]);
    large.artifacts.insert(1, Artifact::image(image::GrayImage::from_fn(128, 128, mask).into()));
    let small = pictures(&run(&mut inpaint, &with_pictures(small), seed(4)).expect("valid"));
    assert_eq!(small, pictures(&run(&mut inpaint, &large, seed(4)).expect("valid")));
}

fn controlled(class: &str, nets: &[(&str, &str)]) -> PipelineRequest {
    let net = |(class, folder): &(&str, &str)| ComponentRequest {
        class: (*class).into(),
        source: ModelSource::Folder(model(folder)),
        subfolder: None,
        variant: None,
        dtype: None,
        quantization: None,
    };
    let mut request = request(class, ModelSource::Folder(model("sdxl")));
    request.components.insert("controlnet".into(), ComponentChoice::Load(nets.iter().map(net).collect()));
    request
}

#[test]
fn every_wrong_argument_of_control_is_named_with_what_to_do() {
    let nets = [("ControlNetModel", "sdxl-controlnet-a"), ("ControlNetModel", "sdxl-controlnet-b")];
    let mut two = load(&controlled("StableDiffusionXLControlNetPipeline", &nets)).expect("complete");
    let base = json!({ "image": [handle(0), handle(2)] });
    for (wrong, expected) in [
        (json!({ "image": null }), "argument `image`: is missing"),
        (json!({ "image": handle(0) }), "argument `image`: has 1 picture(s) for 2 ControlNets"),
        (json!({ "image": "picture" }), "argument `image`"),
        (json!({ "controlnet_conditioning_scale": [1, 2, 3] }), "has 3 numbers for 2 ControlNet(s)"),
        (json!({ "controlnet_conditioning_scale": "strong" }), "must be a number or a list of numbers"),
        (json!({ "control_guidance_start": [0, 0.5, 0.7] }), "argument `control_guidance_start`: has 3 numbers"),
        (json!({ "control_guidance_start": 0.5, "control_guidance_end": 0.5 }), "must be smaller than"),
        (json!({ "control_guidance_end": 1.2 }), "argument `control_guidance_end`: must lie between 0 and 1"),
        (json!({ "guess_mode": 3 }), "argument `guess_mode`"),
        (json!({ "control_mode": [1] }), "argument `control_mode`: `StableDiffusionXLControlNetPipeline`"),
    ] {
        let said = said(&mut two, &base, &wrong);
        assert!(said.contains(expected), "{wrong}: {said}");
    }
    let mut one = load(&controlled("AutoPipelineForText2Image", &nets[..1])).expect("complete");
    assert_eq!(one.class(), "StableDiffusionXLControlNetPipeline");
    let said = said(&mut one, &json!({}), &json!({ "prompt": ["a", "b", "c"], "image": [handle(0), handle(2)] }));
    assert!(said.contains("argument `image`: has 2 pictures for 3 prompt(s)"), "{said}");
}

#[test]
fn a_union_controlnet_wants_a_known_kind_for_each_picture() {
    let net = [("ControlNetUnionModel", "sdxl-controlnet-union")];
    let mut union = load(&controlled("StableDiffusionXLControlNetUnionPipeline", &net)).expect("complete");
    let base = json!({ "control_image": [handle(0), handle(2)], "control_mode": [1, 3] });
    for (wrong, expected) in [
        (json!({ "control_mode": null }), "argument `control_mode`: is missing"),
        (json!({ "control_mode": [1] }), "argument `control_mode`: has 1 number(s) for 2 control picture(s)"),
        (json!({ "control_mode": [1, 6] }), "argument `control_mode`: has `6`, but this ControlNet knows 0 to 5"),
        (json!({ "control_mode": [1, 0.5] }), "argument `control_mode`: must be a whole number"),
    ] {
        let said = said(&mut union, &base, &wrong);
        assert!(said.contains(expected), "{wrong}: {said}");
    }
    let refused = |class: &str, nets: &[(&str, &str)]| {
        let mut pipeline = load(&controlled(class, nets)).expect("complete");
        let call = with_pictures(json!({ "image": handle(0) }));
        run(&mut pipeline, &call, seed(0)).map(|_| ()).expect_err("the wrong sort").to_string()
    };
    let said = refused("StableDiffusionXLControlNetPipeline", &net);
    assert!(said.contains("use `StableDiffusionXLControlNetUnionPipeline`"), "{said}");
}

#[test]
fn a_controlnet_of_another_family_or_none_is_refused_before_weights_are_read() {
    let refused = |nets: &[(&str, &str)]| {
        let class = "StableDiffusionXLControlNetPipeline";
        load(&controlled(class, nets)).map(|_| ()).expect_err("it does not fit").to_string()
    };
    let said = refused(&[("ControlNetModel", "sd15-controlnet")]);
    assert!(said.contains("component `controlnet` reads text of") && said.contains("family of models"), "{said}");
    let said = refused(&[("ControlNetModel", "sdxl-controlnet-a"), ("ControlNetModel", "sd15-controlnet")]);
    assert!(said.contains("component `controlnet_2` reads text of"), "{said}");
    let said = refused(&[("ControlNetModel", "sdxl-controlnet-union")]);
    assert!(said.contains("describes a `ControlNetUnionModel`"), "{said}");
    let missing = request("StableDiffusionXLControlNetPipeline", ModelSource::Folder(model("sdxl")));
    let said = load(&missing).map(|_| ()).expect_err("no ControlNet").to_string();
    assert!(said.contains("needs the component `controlnet`") && said.contains("add `controlnet`"), "{said}");
}

#[test]
fn control_takes_the_size_of_its_picture_and_a_scale_of_nothing_changes_nothing() {
    let net = [("ControlNetModel", "sdxl-controlnet-a")];
    let mut steered = load(&controlled("StableDiffusionXLControlNetPipeline", &net)).expect("complete");
    let call = with_pictures(json!({ "image": handle(2), "height": null, "width": null }));
    let entry = run(&mut steered, &call, seed(0)).expect("valid");
    let Artifact::Image(picture) = &entry.artifacts[0] else { panic!("a picture") };
    assert_eq!((picture.width(), picture.height()), (48, 80));

    let plain = pictures(&run(&mut load(&xl()).expect("complete"), &short(json!({})), seed(8)).expect("valid"));
    let scaled = |scale: f64| with_pictures(json!({ "image": handle(0), "controlnet_conditioning_scale": scale }));
    assert_eq!(plain, pictures(&run(&mut steered, &scaled(0.0), seed(8)).expect("valid")));
    assert_ne!(plain, pictures(&run(&mut steered, &scaled(1.0), seed(8)).expect("valid")));
}
