//! Checkpoints in a single file: the tiny fixture models, written in the layout of the original code, must load as the
//! very same tensors, and anything that is wrong with a file must be said before a model runs.

mod controlnet;
mod original;
mod transformers;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Mutex,
    sync::atomic::{AtomicUsize, Ordering},
};

use candle_core::{DType, Device, Tensor};
use dw_core::{
    arguments::Arguments,
    artifact::Artifact,
    cancel::CancellationToken,
    event::{Event, Silent},
    seed::Seed,
};
use dw_pipelines::{
    Result,
    hub::{Hub, ModelFiles, WeightFiles},
    pipelines::{ComponentCache, Pipeline},
    request::{ComponentChoice, ComponentRequest, Context, MemoryRequest, ModelSource, PipelineRequest},
    rng::{Generators, NoiseDialect},
    weights::Weights,
};
use original::{SD15_BLOCKS, SDXL_BLOCKS, Tensors};
use serde_json::json;

/// A folder that goes when the test ends.
struct TempFolder(PathBuf);

impl TempFolder {
    fn new() -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let name = format!("dw-single-file-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).expect("the temporary folder is writable");
        Self(path)
    }

    fn write(&self, tensors: &Tensors) -> PathBuf {
        let path = self.0.join("model.safetensors");
        candle_core::safetensors::save(tensors, &path).expect("the temporary folder is writable");
        path
    }
}

impl Drop for TempFolder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn model(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity/models").join(name)
}

fn component(model_name: &str, folder: &str) -> Tensors {
    let folder = model(model_name).join(folder);
    let name = ["diffusion_pytorch_model.safetensors", "model.safetensors"]
        .into_iter()
        .find(|name| folder.join(name).is_file());
    let file = folder.join(name.expect("the fixture is complete"));
    candle_core::safetensors::load(file, &Device::Cpu).expect("valid tensors")
}

fn number(value: f32) -> Tensor {
    Tensor::new(&[value], &Device::Cpu).expect("one number")
}

/// Stable Diffusion 1 as its original code saves it, with what training leaves behind.
fn sd15() -> Tensors {
    let mut tensors = original::unet(&component("sd15", "unet"), SD15_BLOCKS, "model.diffusion_model.");
    tensors.extend(original::vae(&component("sd15", "vae"), "first_stage_model."));
    tensors.extend(original::clip(&component("sd15", "text_encoder"), "cond_stage_model.transformer."));
    for name in ["alphas_cumprod", "betas", "model_ema.decay", "model_ema.diffusion_modelout2bias"] {
        tensors.insert(name.to_owned(), number(1.0));
    }
    tensors.insert("cond_stage_model.transformer.text_model.embeddings.position_ids".to_owned(), number(0.0));
    tensors
}

fn sdxl() -> Tensors {
    let mut tensors = original::unet(&component("sdxl", "unet"), SDXL_BLOCKS, "model.diffusion_model.");
    tensors.extend(original::vae(&component("sdxl", "vae"), "first_stage_model."));
    tensors.extend(original::clip(&component("sdxl", "text_encoder"), "conditioner.embedders.0.transformer."));
    tensors.extend(original::open_clip(&component("sdxl", "text_encoder_2"), "conditioner.embedders.1.model."));
    tensors.insert("conditioner.embedders.1.model.logit_scale".to_owned(), number(1.0));
    tensors.insert("denoiser.sigmas".to_owned(), number(1.0));
    tensors
}

fn hub() -> Hub {
    Hub { cache: PathBuf::new(), endpoint: String::new(), token: None, offline: true }
}

fn single(path: PathBuf, config: Option<&str>) -> ModelSource {
    ModelSource::SingleFile { path, config: config.map(|name| Box::new(ModelSource::Folder(model(name)))) }
}

fn open(source: &ModelSource) -> Result<ModelFiles> {
    let cancel = CancellationToken::default();
    hub().open(source, Context { events: &Silent, cancel: &cancel })
}

fn weights(files: &ModelFiles, folder: &str, dtype: DType) -> Weights {
    let WeightFiles::Part(part) = files.weights(folder, None).expect("the component is there") else {
        panic!("`{folder}` does not come from the file")
    };
    Weights::from_checkpoint(&part, dtype, &Device::Cpu, None, &mut |_| Ok(())).expect("a readable file")
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    let values = tensor.flatten_all().and_then(|flat| flat.to_dtype(DType::F32)?.to_vec1::<f32>());
    values.expect("a tensor of numbers").into_iter().map(f32::to_bits).collect()
}

/// Every tensor of `folder` in the diffusers layout is there under its name, bit for bit.
fn assert_identical(found: &Weights, expected: &Tensors) {
    for (name, tensor) in expected {
        let same = found.get(tensor.shape().clone(), name).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(bits(&same), bits(tensor), "{name}");
    }
    assert_eq!(found.unused(), Vec::<String>::new());
}

#[test]
fn a_file_of_stable_diffusion_1_holds_the_very_tensors_of_its_folder() {
    let folder = TempFolder::new();
    let files = open(&single(folder.write(&sd15()), Some("sd15"))).expect("a valid checkpoint");
    for name in ["unet", "vae", "text_encoder"] {
        assert_identical(&weights(&files, name, DType::F32), &component("sd15", name));
    }
}

#[test]
fn a_file_of_stable_diffusion_xl_holds_the_very_tensors_of_its_folder() {
    let folder = TempFolder::new();
    let files = open(&single(folder.write(&sdxl()), Some("sdxl"))).expect("a valid checkpoint");
    for name in ["unet", "vae", "text_encoder", "text_encoder_2"] {
        assert_identical(&weights(&files, name, DType::F32), &component("sdxl", name));
    }
}

#[test]
fn the_names_of_the_original_code_are_the_known_ones() {
    let tensors = sdxl();
    for name in [
        "model.diffusion_model.input_blocks.8.1.transformer_blocks.2.attn2.to_out.0.bias",
        "model.diffusion_model.label_emb.0.0.weight",
        "model.diffusion_model.output_blocks.5.2.conv.weight",
        "first_stage_model.decoder.up.1.upsample.conv.bias",
        "first_stage_model.decoder.mid.attn_1.proj_out.weight",
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias",
        "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight",
        "conditioner.embedders.1.model.text_projection",
    ] {
        assert!(tensors.contains_key(name), "{name}");
    }
}

#[test]
fn half_precision_is_converted_like_everywhere() {
    let folder = TempFolder::new();
    let half = |tensor: &Tensor| tensor.to_dtype(DType::F16).expect("numbers");
    let tensors: Tensors = sdxl().iter().map(|(name, tensor)| (name.clone(), half(tensor))).collect();
    let files = open(&single(folder.write(&tensors), Some("sdxl"))).expect("a valid checkpoint");
    let encoder = component("sdxl", "text_encoder_2");
    let expected: Tensors = encoder.iter().map(|(name, tensor)| (name.clone(), half(tensor))).collect();
    assert_identical(&weights(&files, "text_encoder_2", DType::F32), &expected);
}

#[test]
fn stable_diffusion_2_reads_its_encoder_without_the_last_layer() {
    let folder = TempFolder::new();
    let encoder = component("sdxl", "text_encoder_2");
    let mut tensors = original::unet(&component("sdxl", "unet"), SDXL_BLOCKS, "model.diffusion_model.");
    tensors.extend(original::open_clip(&encoder, "cond_stage_model.model."));
    let config = TempFolder::new();
    let mut text: serde_json::Value = serde_json::from_str(
        &std::fs::read_to_string(model("sdxl/text_encoder_2/config.json")).expect("the fixture is complete"),
    )
    .expect("valid JSON");
    text["num_hidden_layers"] = json!(3);
    text["architectures"] = json!(["CLIPTextModel"]);
    std::fs::create_dir_all(config.0.join("text_encoder")).expect("the temporary folder is writable");
    std::fs::write(config.0.join("text_encoder/config.json"), text.to_string()).expect("the folder is writable");
    let source = ModelSource::SingleFile {
        path: folder.write(&tensors),
        config: Some(Box::new(ModelSource::Folder(config.0.clone()))),
    };
    let found = weights(&open(&source).expect("a valid checkpoint"), "text_encoder", DType::F32);
    let kept = |name: &str| !name.contains("layers.3.") && name != "text_projection.weight";
    let expected = encoder.into_iter().filter(|(name, _)| kept(name)).collect();
    assert_identical(&found, &expected);
    assert!(!found.contains("text_projection.weight"));
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

fn load(request: &PipelineRequest, hub: &Hub) -> (Result<Pipeline>, Vec<Event>) {
    let events = Mutex::new(Vec::new());
    let sink = |event: Event| events.lock().expect("no test panics here").push(event);
    let cancel = CancellationToken::default();
    let context = Context { events: &sink, cancel: &cancel };
    let pipeline = Pipeline::load(request, hub, &mut ComponentCache::default(), context);
    (pipeline, events.into_inner().expect("no test panics here"))
}

fn warnings(events: &[Event]) -> Vec<String> {
    let warning = |event: &Event| if let Event::Warning { message } = event { Some(message.clone()) } else { None };
    events.iter().filter_map(warning).collect()
}

/// The message of a load that must fail.
fn complaint(request: &PipelineRequest) -> String {
    let (result, events) = load(request, &hub());
    let is_reading = events.iter().any(|event| matches!(event, Event::Loading { .. }));
    let message = result.err().expect("this must fail").to_string();
    assert!(!is_reading || message.contains("tensor"), "weights were read before: {message}");
    message
}

fn picture(request: &PipelineRequest) -> Vec<u8> {
    picture_with(request, &hub())
}

fn picture_with(request: &PipelineRequest, hub: &Hub) -> Vec<u8> {
    let (pipeline, events) = load(request, hub);
    let mut pipeline = pipeline.unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(warnings(&events), Vec::<String>::new());
    let values = json!({ "prompt": "a small red house", "num_inference_steps": 2, "height": 64, "width": 64 });
    let values = values.as_object().expect("an object").clone();
    let arguments = Arguments { values, ..Arguments::default() };
    let cancel = CancellationToken::default();
    let mut generators = Generators::from_seed(&Seed::One(7), NoiseDialect::Cpu);
    let context = Context { events: &Silent, cancel: &cancel };
    let entry = pipeline.run(&arguments, &mut generators, context).expect("a valid call");
    let [Artifact::Image(picture)] = entry.artifacts.as_slice() else { panic!("expected one picture") };
    picture.to_rgb8().into_raw()
}

#[test]
fn a_file_draws_the_picture_of_its_folder() {
    let temp = TempFolder::new();
    for (class, name, tensors) in
        [("StableDiffusionXLPipeline", "sdxl", sdxl()), ("StableDiffusionPipeline", "sd15", sd15())]
    {
        let folder = picture(&request(class, ModelSource::Folder(model(name))));
        assert_eq!(picture(&request(class, single(temp.write(&tensors), Some(name)))), folder);
    }
}

fn replacement(class: &str, source: ModelSource) -> ComponentChoice {
    ComponentChoice::Load(vec![ComponentRequest {
        class: class.into(),
        source,
        subfolder: None,
        variant: None,
        dtype: None,
        quantization: None,
    }])
}

#[test]
fn a_component_may_come_from_a_file_of_its_own_in_either_layout() {
    let mut base = request("StableDiffusionXLPipeline", ModelSource::Folder(model("sdxl")));
    let expected = picture(&base);
    let vae = component("sdxl", "vae");
    for tensors in [original::vae(&vae, ""), original::vae(&vae, "first_stage_model."), vae] {
        let temp = TempFolder::new();
        for config in [None, Some("sdxl"), Some("sdxl/vae")] {
            let source = single(temp.write(&tensors), config);
            base.components.insert("vae".into(), replacement("AutoencoderKL", source));
            assert_eq!(picture(&base), expected, "config {config:?}");
        }
    }
    base.components.clear();
    let unet = component("sdxl", "unet");
    for tensors in [original::unet(&unet, SDXL_BLOCKS, ""), unet] {
        let temp = TempFolder::new();
        base.components.insert("unet".into(), replacement("UNet2DConditionModel", single(temp.write(&tensors), None)));
        assert_eq!(picture(&base), expected);
    }
}

#[test]
fn a_component_that_is_not_in_its_file_is_not_taken_from_the_configuration() {
    let temp = TempFolder::new();
    let source = single(temp.write(&component("sdxl", "vae")), Some("sdxl"));
    let mut request = request("StableDiffusionXLPipeline", ModelSource::Folder(model("sdxl")));
    request.components.insert("unet".into(), replacement("UNet2DConditionModel", source));
    let message = complaint(&request);
    assert!(message.contains("holds no `unet`, only `vae`"), "{message}");
}

#[test]
fn a_tensor_that_is_missing_is_named_as_in_the_file_and_as_in_diffusers() {
    let temp = TempFolder::new();
    let mut tensors = sd15();
    tensors.remove("model.diffusion_model.middle_block.0.in_layers.2.weight").expect("the tensor is there");
    let message = complaint(&request("StableDiffusionPipeline", single(temp.write(&tensors), Some("sd15"))));
    for name in ["`model.diffusion_model.middle_block.0.in_layers.2.weight`", "`mid_block.resnets.0.conv1.weight`"] {
        assert!(message.contains(name), "{message}");
    }
}

#[test]
fn tensors_without_a_place_are_warned_of_by_the_name_they_have_in_the_file() {
    let temp = TempFolder::new();
    let mut tensors = sd15();
    for name in ["model.diffusion_model.input_blocks.99.weight", "cond_stage_model.transformer.extra", "odd.weight"] {
        tensors.insert(name.to_owned(), number(1.0));
    }
    let (pipeline, events) =
        load(&request("StableDiffusionPipeline", single(temp.write(&tensors), Some("sd15"))), &hub());
    assert!(pipeline.is_ok());
    let said = warnings(&events);
    assert_eq!(said.len(), 3, "{said:?}");
    for name in
        ["`model.diffusion_model.input_blocks.99.weight`", "`cond_stage_model.transformer.extra`", "`odd.weight`"]
    {
        assert!(said.iter().any(|message| message.contains(name)), "{name}: {said:?}");
    }
}

#[test]
fn an_encoder_that_is_not_in_the_file_comes_from_the_configuration_or_is_asked_for() {
    let temp = TempFolder::new();
    let mut tensors = sd15();
    tensors.retain(|name, _| !name.starts_with("cond_stage_model."));
    let path = temp.write(&tensors);
    let expected = picture(&request("StableDiffusionPipeline", ModelSource::Folder(model("sd15"))));
    assert_eq!(picture(&request("StableDiffusionPipeline", single(path.clone(), Some("sd15")))), expected);

    let config = TempFolder::new();
    for file in
        ["model_index.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json", "text_encoder/config.json"]
    {
        let to = config.0.join(file);
        std::fs::create_dir_all(to.parent().expect("a folder")).expect("the temporary folder is writable");
        std::fs::copy(model("sd15").join(file), to).expect("the fixture is complete");
    }
    let source = ModelSource::SingleFile { path, config: Some(Box::new(ModelSource::Folder(config.0.clone()))) };
    let message = complaint(&request("StableDiffusionPipeline", source));
    assert!(message.contains("holds no `text_encoder`") && message.contains("`model_name`"), "{message}");
}

#[test]
fn without_configuration_the_vocabulary_comes_from_the_cache_or_a_configuration_is_asked_for() {
    let temp = TempFolder::new();
    let path = temp.write(&sdxl());
    let message = complaint(&request("StableDiffusionXLPipeline", single(path.clone(), None)));
    assert!(message.contains("no tokenizer") && message.contains("add `config`"), "{message}");

    let cache = TempFolder::new();
    let snapshot = cache.0.join("models--openai--clip-vit-large-patch14/snapshots/main");
    std::fs::create_dir_all(&snapshot).expect("the temporary folder is writable");
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(model("sdxl/tokenizer").join(name), snapshot.join(name)).expect("the fixture is complete");
    }
    let hub = Hub { cache: cache.0.clone(), ..hub() };
    let cancel = CancellationToken::default();
    let files = hub.open(&single(path.clone(), None), Context { events: &Silent, cancel: &cancel }).expect("valid");
    let pad =
        |folder: &str| files.tokenizer(folder).expect("the cache has it").config.expect("written")["pad_token"].clone();
    assert_eq!((pad("tokenizer"), pad("tokenizer_2")), (json!("<|endoftext|>"), json!("!")));
    let index = files.require_json("model_index.json").expect("generated");
    assert_eq!(index["_class_name"], "StableDiffusionXLPipeline");

    // The tiny fixture has heads that no published model has.
    let (result, _) = load(&request("StableDiffusionXLPipeline", single(path, None)), &hub);
    let message = result.err().expect("unusual sizes").to_string();
    assert!(message.contains("unusual width") && message.contains("add `config`"), "{message}");
}

/// A tensor of the fixture with four times the channels, which have sizes that published models have.
fn enlarged(name: &str, tensor: &Tensor) -> Tensor {
    let is_fixed = |axis: usize, size: usize| {
        let is_latent = name.starts_with("quant_conv.") || (name.starts_with("encoder.conv_out.") && axis == 0);
        axis > 1 || matches!(size, 3 | 4 | 77 | 1000) || is_latent
    };
    let times: Vec<usize> =
        tensor.dims().iter().enumerate().map(|(axis, size)| if is_fixed(axis, *size) { 1 } else { 4 }).collect();
    let scale = if times.get(1) == Some(&4) { 0.25 } else { 1.0 };
    let large = tensor.repeat(times).expect("a tensor of numbers");
    // The copies differ a little, so that it matters which head and which group a channel is in.
    let ripple = Tensor::arange(0u32, large.elem_count() as u32, &Device::Cpu)
        .and_then(|at| ((at.to_dtype(DType::F32)?.sin()? * 0.1)? + 1.0)? * scale)
        .and_then(|ripple| ripple.reshape(large.shape()))
        .expect("as many values");
    (large * ripple).expect("tensors of one shape")
}

fn enlarged_component(folder: &str) -> Tensors {
    component("sd15", folder).iter().map(|(name, tensor)| (name.clone(), enlarged(name, tensor))).collect()
}

/// The enlarged fixture as a folder, with the number of heads and groups of Stable Diffusion 1.
fn write_enlarged(folder: &Path) {
    for (name, changes) in [
        (
            "unet",
            json!({ "block_out_channels": [32, 64, 96, 96], "cross_attention_dim": 128, "attention_head_dim": 8, "norm_num_groups": 32 }),
        ),
        ("vae", json!({ "block_out_channels": [32, 64, 64, 64], "norm_num_groups": 32 })),
        ("text_encoder", json!({ "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2 })),
    ] {
        let text =
            std::fs::read_to_string(model("sd15").join(name).join("config.json")).expect("the fixture is complete");
        let mut config: serde_json::Value = serde_json::from_str(&text).expect("valid JSON");
        config.as_object_mut().expect("an object").extend(changes.as_object().expect("an object").clone());
        std::fs::create_dir_all(folder.join(name)).expect("the temporary folder is writable");
        std::fs::write(folder.join(name).join("config.json"), config.to_string()).expect("the folder is writable");
        candle_core::safetensors::save(&enlarged_component(name), folder.join(name).join("model.safetensors"))
            .expect("the folder is writable");
    }
    for file in [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
    ] {
        let to = folder.join(file);
        std::fs::create_dir_all(to.parent().expect("a folder")).expect("the temporary folder is writable");
        std::fs::copy(model("sd15").join(file), to).expect("the fixture is complete");
    }
}

#[test]
fn without_configuration_a_file_draws_the_picture_of_the_published_configuration() {
    let (temp, cache) = (TempFolder::new(), TempFolder::new());
    let snapshot = cache.0.join("models--somebody--large/snapshots/main");
    write_enlarged(&snapshot);
    let hub = Hub { cache: cache.0.clone(), ..hub() };
    let class = "StableDiffusionPipeline";
    let expected = picture_with(&request(class, ModelSource::Folder(snapshot)), &hub);
    let mut tensors = original::unet(&enlarged_component("unet"), SD15_BLOCKS, "model.diffusion_model.");
    tensors.extend(original::vae(&enlarged_component("vae"), "first_stage_model."));
    tensors.extend(original::clip(&enlarged_component("text_encoder"), "cond_stage_model.transformer."));
    assert!(expected.iter().any(|value| *value != expected[0]), "a picture that is one colour proves nothing");
    let found = request("DiffusionPipeline", single(temp.write(&tensors), None));
    assert_eq!(picture_with(&found, &hub), expected);
}

#[test]
fn a_vocabulary_is_found_in_any_cached_stable_diffusion() {
    let (temp, cache) = (TempFolder::new(), TempFolder::new());
    let snapshot = cache.0.join("models--somebody--my-model/snapshots/main");
    std::fs::create_dir_all(snapshot.join("tokenizer")).expect("the temporary folder is writable");
    for name in ["tokenizer/tokenizer.json", "model_index.json"] {
        std::fs::copy(model("sdxl").join(name), snapshot.join(name)).expect("the fixture is complete");
    }
    let hub = Hub { cache: cache.0.clone(), ..hub() };
    let cancel = CancellationToken::default();
    let source = single(temp.write(&sdxl()), None);
    let files = hub.open(&source, Context { events: &Silent, cancel: &cancel }).expect("valid");
    assert!(files.tokenizer("tokenizer").expect("the cache has it").tokenizer.is_some());
}

#[test]
fn a_checkpoint_is_read_from_a_repository_in_the_cache() {
    let cache = TempFolder::new();
    let snapshot = cache.0.join("models--owner--name/snapshots/main");
    std::fs::create_dir_all(&snapshot).expect("the temporary folder is writable");
    candle_core::safetensors::save(&sdxl(), snapshot.join("x.safetensors")).expect("the folder is writable");
    let hub = Hub { cache: cache.0.clone(), ..hub() };
    let cancel = CancellationToken::default();
    let open = |name: &str| {
        let config = ModelSource::Folder(model("sdxl"));
        let source = ModelSource::single_file(name, None, &cache.0, Some(config));
        hub.open(&source, Context { events: &Silent, cancel: &cancel })
    };
    for name in ["owner/name/x.safetensors", "https://huggingface.co/owner/name/blob/main/x.safetensors"] {
        let files = open(name).expect("the file is in the cache");
        assert!(weights(&files, "vae", DType::F32).contains("decoder.conv_in.weight"), "{name}");
    }
    for (name, expected) in [
        ("owner/name/y.safetensors", "offline"),
        ("owner/name/../y.safetensors", "`owner/name/file`"),
        ("owner/name/y.ckpt", "is a pickle"),
    ] {
        let message = open(name).expect_err("there is no such file").to_string();
        assert!(message.contains(expected), "{name}: {message}");
    }
}

#[test]
fn a_file_that_cannot_be_a_model_is_refused_before_anything_is_read() {
    let temp = TempFolder::new();
    let one = |name: &str| Tensors::from([(name.to_owned(), number(1.0))]);
    let class = "StableDiffusionXLPipeline";
    for (tensors, expected) in [
        (one("lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"), "is a LoRA"),
        (one("double_blocks.0.img_attn.proj.weight"), "Flux"),
        (one("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"), "Stable Diffusion 3"),
        (one("control_model.input_blocks.0.0.weight"), "ControlNet"),
        (sd15(), "`StableDiffusionPipeline`"),
        (original::vae(&component("sdxl", "vae"), ""), "holds no `unet`, only `vae`"),
    ] {
        let message = complaint(&request(class, single(temp.write(&tensors), None)));
        assert!(message.contains(expected), "{message}");
    }
    let path = temp.write(&sdxl());
    let bytes = std::fs::read(&path).expect("just written");
    for (name, bytes, expected) in [
        ("cut.safetensors", &bytes[..bytes.len() - 100], "not a valid safetensors file"),
        ("empty.safetensors", &bytes[..0], "the file is empty"),
        ("model.ckpt", &bytes[..], "is a pickle"),
        ("cut.gguf", &b"GGUF\x03\0\0\0\x01"[..], "ends within its header"),
    ] {
        let path = temp.0.join(name);
        std::fs::write(&path, bytes).expect("the temporary folder is writable");
        let message = complaint(&request(class, single(path, None)));
        assert!(message.contains(expected) && message.contains(name), "{message}");
    }
    let message = complaint(&request(class, single(temp.0.join("none.safetensors"), None)));
    assert!(message.contains("does not exist"), "{message}");
    let message = complaint(&request(class, single(temp.0.clone(), None)));
    assert!(message.contains("is a folder"), "{message}");
}
