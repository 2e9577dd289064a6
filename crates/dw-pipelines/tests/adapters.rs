//! How adapters behave around the numbers: put on, taken off and changed without reading the model again, and refused
//! when they do not fit.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Mutex,
};

use candle_core::Device;
use dw_core::{
    arguments::Arguments,
    artifact::Artifact,
    cancel::CancellationToken,
    event::{Event, Silent},
    seed::Seed,
};
use dw_pipelines::{
    Result,
    hub::Hub,
    pipelines::{ComponentCache, Pipeline},
    request::{Context, LoraRequest, MemoryRequest, ModelSource, PipelineRequest, TextualInversionRequest},
    rng::{Generators, NoiseDialect},
    text::ClipTokenizer,
};
use serde_json::{Value, json};

fn models() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity/models")
}

fn hub() -> Hub {
    Hub { cache: PathBuf::new(), endpoint: String::new(), token: None, offline: true }
}

fn adapter(name: &str) -> ModelSource {
    ModelSource::Folder(models().join("adapters").join(format!("{name}.safetensors")))
}

fn lora(name: &str, scale: f64) -> LoraRequest {
    LoraRequest { source: adapter(name), weight_name: None, subfolder: None, adapter_name: name.into(), scale }
}

fn word(name: &str, token: &str, text_encoder: Option<&str>) -> TextualInversionRequest {
    TextualInversionRequest {
        source: adapter(name),
        weight_name: None,
        subfolder: None,
        token: Some(token.into()),
        text_encoder: text_encoder.map(str::to_owned),
    }
}

fn xl(loras: Vec<LoraRequest>) -> PipelineRequest {
    PipelineRequest {
        class: "StableDiffusionXLPipeline".into(),
        source: ModelSource::Folder(models().join("sdxl")),
        variant: None,
        dtype: None,
        device: Device::Cpu,
        components: BTreeMap::new(),
        scheduler: None,
        loras,
        textual_inversions: Vec::new(),
        prompt_weighting: false,
        ip_adapters: Vec::new(),
        memory: MemoryRequest::default(),
    }
}

/// Loads with the components of `cache` and draws one small picture: its bytes, and what was told meanwhile.
fn draw(request: &PipelineRequest, more: Value, cache: &mut ComponentCache) -> Result<(Vec<u8>, Vec<Event>)> {
    let told = Mutex::new(Vec::new());
    let sink = |event: Event| told.lock().expect("no sink panics").push(event);
    let cancel = CancellationToken::default();
    let context = Context { events: &sink, cancel: &cancel };
    let mut pipeline = Pipeline::load(request, &hub(), cache, context)?;
    let mut values = json!({ "prompt": "a cat", "num_inference_steps": 1, "height": 64, "width": 64 });
    let (Value::Object(values), Value::Object(more)) = (&mut values, more) else { panic!("arguments are objects") };
    values.extend(more);
    let arguments = Arguments { values: values.clone(), ..Arguments::default() };
    let mut generators = Generators::from_seed(&Seed::One(1), NoiseDialect::Cpu);
    let entry = pipeline.run(&arguments, &mut generators, context)?;
    let [Artifact::Image(picture)] = entry.artifacts.as_slice() else { panic!("one picture") };
    Ok((picture.to_rgb8().into_raw(), told.into_inner().expect("no sink panics")))
}

fn picture(loras: Vec<LoraRequest>, cache: &mut ComponentCache) -> Vec<u8> {
    draw(&xl(loras), json!({}), cache).expect("the adapters fit").0
}

fn complaint(request: &PipelineRequest) -> String {
    draw(request, json!({}), &mut ComponentCache::new(None)).expect_err("this must fail").to_string()
}

fn has_read(events: &[Event]) -> bool {
    events.iter().any(|event| matches!(event, Event::Loading { .. }))
}

#[test]
fn adapters_are_put_on_changed_and_taken_off_without_reading_the_model_again() {
    let mut cache = ComponentCache::new(None);
    let plain = picture(Vec::new(), &mut cache);
    let mut pictures = vec![plain.clone()];
    for loras in [
        vec![lora("sdxl_lora_peft", 0.8)],
        vec![lora("sdxl_lora_peft", -0.8)],
        vec![lora("sdxl_lora_peft", 0.8), lora("sdxl_lora_kohya", 0.5)],
    ] {
        let (picture, events) = draw(&xl(loras), json!({}), &mut cache).expect("the adapters fit");
        assert!(!has_read(&events), "a base was read again: {events:?}");
        assert!(!pictures.contains(&picture), "adapters must change the picture");
        pictures.push(picture);
    }
    assert!(picture(vec![lora("sdxl_lora_peft", 0.0)], &mut cache) == plain, "a scale of 0 is the base");
    assert!(picture(Vec::new(), &mut cache) == plain, "without adapters it is the base");
}

#[test]
fn the_scale_of_a_call_multiplies_that_of_the_files() {
    let mut cache = ComponentCache::new(None);
    let scaled = |scale: f64, cache: &mut ComponentCache| {
        let more = json!({ "cross_attention_kwargs": { "scale": scale } });
        draw(&xl(vec![lora("sdxl_lora_peft", 0.5)]), more, cache).expect("the adapters fit").0
    };
    assert!(scaled(0.0, &mut cache) == picture(Vec::new(), &mut cache), "0 takes the adapters off");
    assert!(scaled(2.0, &mut cache) == picture(vec![lora("sdxl_lora_peft", 1.0)], &mut cache));
    assert!(scaled(1.0, &mut cache) == picture(vec![lora("sdxl_lora_peft", 0.5)], &mut cache));
}

#[test]
fn the_order_of_files_does_not_matter() {
    let mut cache = ComponentCache::new(None);
    let [first, second] = [lora("sdxl_lora_peft", 0.5), lora("sdxl_dora_peft", 0.7)];
    let one_way = picture(vec![first.clone(), second.clone()], &mut cache);
    let other_way = picture(vec![second, first], &mut cache);
    let worst = one_way.iter().zip(&other_way).map(|(a, b)| a.abs_diff(*b)).max();
    assert!(worst <= Some(1), "off by {worst:?} levels");
}

#[test]
fn a_file_for_another_model_is_refused_with_what_does_not_fit() {
    let mut cache = ComponentCache::new(None);
    let refused = draw(&xl(vec![lora("sd15_lora_kohya", 1.0)]), json!({}), &mut cache);
    let message = refused.expect_err("it reads other text").to_string();
    assert!(message.contains("sd15_lora_kohya") && message.contains("the model's UNet reads 72"), "{message}");
    assert_eq!(cache.bytes(), 0, "the model was read first");
}

#[test]
fn a_file_that_is_no_lora_or_not_there_is_refused() {
    let message = complaint(&xl(vec![lora("sdxl_ti_clip_l", 1.0)]));
    assert!(message.contains("holds no LoRA") && message.contains("`emb_params`"), "{message}");
    let folder = |weight_name: Option<&str>| LoraRequest {
        source: ModelSource::Folder(models().join("adapters")),
        weight_name: weight_name.map(str::to_owned),
        ..lora("x", 1.0)
    };
    let message = complaint(&xl(vec![folder(Some("missing.safetensors"))]));
    assert!(message.contains("missing.safetensors") && message.contains("weight_name"), "{message}");
    let message = complaint(&xl(vec![folder(None)]));
    assert!(message.contains("name one as `weight_name`"), "{message}");
    let message = complaint(&xl(vec![folder(Some("../sdxl/unet/diffusion_pytorch_model.safetensors"))]));
    assert!(message.contains("does not lie inside"), "{message}");
    let message = complaint(&xl(vec![lora("sdxl_lora_peft", f64::NAN)]));
    assert!(message.contains("finite"), "{message}");
}

#[test]
fn a_learned_word_changes_only_prompts_that_use_it() {
    let mut cache = ComponentCache::new(None);
    let request = PipelineRequest {
        textual_inversions: vec![word("sdxl_ti_clip_l", "<obj>", None), word("sdxl_ti_clip_g", "<obj>", None)],
        prompt_weighting: false,
        ip_adapters: Vec::new(),
        ..xl(Vec::new())
    };
    let mut drawn = |request: &PipelineRequest, prompt: &str| {
        draw(request, json!({ "prompt": prompt }), &mut cache).expect("the words fit").0
    };
    let plain = xl(Vec::new());
    assert!(drawn(&request, "a cat") == drawn(&plain, "a cat"));
    assert!(drawn(&request, "a <obj>") != drawn(&plain, "a <obj>"));
}

#[test]
fn words_and_lora_files_go_together() {
    let mut cache = ComponentCache::new(None);
    let words = vec![word("sdxl_ti_clip_l", "<obj>", Some("text_encoder"))];
    let request = |loras| PipelineRequest { textual_inversions: words.clone(), ..xl(loras) };
    let mut drawn =
        |loras| draw(&request(loras), json!({ "prompt": "a <obj>" }), &mut cache).expect("the adapters fit").0;
    let learned = drawn(Vec::new());
    let both = drawn(vec![lora("sdxl_lora_peft", 0.8)]);
    assert!(learned != both && learned == drawn(vec![lora("sdxl_lora_peft", 0.0)]));
}

#[test]
fn a_word_that_fits_no_encoder_or_is_known_is_refused() {
    let request = |words| PipelineRequest { textual_inversions: words, ..xl(Vec::new()) };
    let message = complaint(&request(vec![word("sdxl_ti_clip_l", "<obj>", Some("text_encoder_2"))]));
    assert!(message.contains("32 values") && message.contains("`text_encoder_2` has 40"), "{message}");
    let twice = vec![word("sdxl_ti_clip_l", "<obj>", None), word("sdxl_ti_clip_l", "<obj>", None)];
    let message = complaint(&request(twice));
    assert!(message.contains("`<obj>` is a word of the tokenizer already"), "{message}");
}

#[test]
fn a_word_of_several_vectors_becomes_as_many_ids_and_counts_as_many() {
    let cancel = CancellationToken::default();
    let context = Context { events: &Silent, cancel: &cancel };
    let files = hub().open(&ModelSource::Folder(models().join("sdxl")), context).expect("the model is there");
    let mut tokenizer = ClipTokenizer::new(&files.tokenizer("tokenizer").expect("readable")).expect("complete");
    let before = tokenizer.encode("a cat").expect("short").ids;
    assert_eq!(tokenizer.learn("<Obj>", 3).expect("a new word"), 1000);
    assert_eq!(tokenizer.learn("<two>", 1).expect("a new word"), 1003);
    assert_eq!(tokenizer.encode("a cat").expect("short").ids, before);
    let ids = tokenizer.encode("<Obj>a <two> <Obj>_1").expect("short").ids;
    assert_eq!(ids[1..9], [1000, 1001, 1002, before[1], 1003, 1001, 999, 999]);
    let long = tokenizer.encode(&"<two> ".repeat(74)).expect("74 words").ids;
    assert_eq!(long[74..], [1003, 999, 999]);
    let cut = tokenizer.encode(&format!("{}<Obj>", "<two> ".repeat(74))).expect("77 words");
    assert_eq!((cut.ids[75], cut.lost.as_deref()), (1000, Some("<Obj>")));
}
