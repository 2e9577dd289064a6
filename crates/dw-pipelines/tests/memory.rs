//! Memory: every way to keep a model gives the same picture, plans come before reading, and float16 that overflows is
//! computed again.

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
    sync::Mutex,
};

use candle_core::{DType, Device, Tensor};
use dw_core::{
    arguments::Arguments,
    artifact::Artifact,
    cancel::CancellationToken,
    event::{Event, Silent},
    fit::{FitPlan, Verdict},
    seed::Seed,
};
use dw_pipelines::{
    Result,
    hub::Hub,
    pipelines::{ComponentCache, Pipeline},
    request::{
        CallSize, ComponentMemory, Context, IpAdapterRequest, IpAdapterScale, LoraRequest, MemoryRequest, ModelSource,
        Offload, Paging, PipelineRequest, TilingRequest,
    },
    rng::{Generators, NoiseDialect},
};
use serde_json::{Value, json};

fn models() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity/models")
}

fn hub() -> Hub {
    Hub { cache: PathBuf::new(), endpoint: String::new(), token: None, offline: true }
}

fn request(class: &str, folder: PathBuf, memory: MemoryRequest) -> PipelineRequest {
    PipelineRequest {
        class: class.into(),
        source: ModelSource::Folder(folder),
        variant: None,
        dtype: None,
        device: Device::Cpu,
        components: BTreeMap::new(),
        scheduler: None,
        loras: Vec::new(),
        textual_inversions: Vec::new(),
        prompt_weighting: false,
        ip_adapters: Vec::new(),
        memory,
    }
}

fn xl(memory: MemoryRequest) -> PipelineRequest {
    request("StableDiffusionXLPipeline", models().join("sdxl"), memory)
}

fn offload(paging: Paging) -> MemoryRequest {
    MemoryRequest { offload: Some(Offload::Paged(paging)), ..MemoryRequest::default() }
}

struct Drawn {
    pixels: Vec<u8>,
    events: Vec<Event>,
}

impl Drawn {
    fn warnings(&self) -> Vec<&str> {
        let warnings = self.events.iter().filter_map(|event| match event {
            Event::Warning { message } => Some(message.as_str()),
            _ => None,
        });
        warnings.collect()
    }

    fn plan(&self) -> &FitPlan {
        let mut plans = self.events.iter().filter_map(|event| match event {
            Event::FitPlan { plan } => Some(plan),
            _ => None,
        });
        plans.next().expect("a plan comes with every load")
    }
}

/// Loads and runs a short call, twice: what has gone must come again.
fn draw(request: &PipelineRequest, size: usize) -> Result<Drawn> {
    let Value::Object(values) = json!({
        "prompt": "a small red house", "num_inference_steps": 2, "height": size, "width": size,
    }) else {
        panic!("arguments are an object")
    };
    let arguments = Arguments { values, ..Arguments::default() };
    let events = Mutex::new(Vec::new());
    let sink = |event: Event| events.lock().expect("no test panics here").push(event);
    let cancel = CancellationToken::default();
    let context = Context { events: &sink, cancel: &cancel };
    let mut pipeline = Pipeline::load(request, &hub(), &mut ComponentCache::default(), context)?;
    let mut run = || -> Result<Vec<u8>> {
        let mut generators = Generators::from_seed(&Seed::One(7), NoiseDialect::Cpu);
        let entry = pipeline.run(&arguments, &mut generators, context)?;
        let [Artifact::Image(picture)] = entry.artifacts.as_slice() else { panic!("one picture") };
        Ok(picture.to_rgb8().into_raw())
    };
    let (first, second) = (run()?, run()?);
    assert!(first == second, "the second run differs from the first");
    Ok(Drawn { pixels: first, events: events.into_inner().expect("no test panics here") })
}

fn drawn(request: &PipelineRequest) -> Drawn {
    draw(request, 64).expect("the model is complete")
}

const WAYS: [Paging; 5] = [
    Paging::Whole,
    Paging::Layers,
    Paging::Groups { blocks: 1, prefetch: true },
    Paging::Groups { blocks: 2, prefetch: false },
    Paging::Groups { blocks: 0, prefetch: true },
];

#[test]
fn every_way_to_offload_gives_the_same_picture() {
    let folder = models().join("sd15");
    let classic = |memory| request("StableDiffusionPipeline", folder.clone(), memory);
    let (small, large) = (drawn(&classic(MemoryRequest::default())), drawn(&xl(MemoryRequest::default())));
    for paging in WAYS {
        assert!(drawn(&classic(offload(paging))).pixels == small.pixels, "sd15 {paging:?}");
        assert!(drawn(&xl(offload(paging))).pixels == large.pixels, "sdxl {paging:?}");
    }
}

#[test]
fn sixteen_bit_models_and_lora_files_are_the_same_offloaded() {
    let lora = LoraRequest {
        source: ModelSource::Folder(models().join("adapters/sdxl_lora_peft.safetensors")),
        weight_name: None,
        subfolder: None,
        adapter_name: "a".into(),
        scale: 0.8,
    };
    let adapted = |memory| PipelineRequest { loras: vec![lora.clone()], ..xl(memory) };
    let half = |memory| PipelineRequest { dtype: Some(DType::BF16), ..xl(memory) };
    let (expected, expected_half) = (drawn(&adapted(MemoryRequest::default())), drawn(&half(MemoryRequest::default())));
    assert!(expected.pixels != drawn(&xl(MemoryRequest::default())).pixels, "the file changes the picture");
    for paging in [Paging::Whole, Paging::Layers, WAYS[2]] {
        assert!(drawn(&adapted(offload(paging))).pixels == expected.pixels, "{paging:?}");
        assert!(drawn(&half(offload(paging))).pixels == expected_half.pixels, "{paging:?}");
    }
}

#[test]
fn components_may_stay_come_on_demand_or_have_a_type_of_their_own() {
    let plain = drawn(&xl(MemoryRequest::default()));
    let on_demand = ComponentMemory { paging: Some(Paging::Whole), ..ComponentMemory::default() };
    let components = BTreeMap::from([("text_encoder".to_owned(), on_demand)]);
    let mixed = MemoryRequest { components, resident: vec!["vae".into()], ..offload(Paging::Layers) };
    let mixed = drawn(&xl(mixed));
    assert!(mixed.pixels == plain.pixels);
    let presence = |name: &str| {
        let component = mixed.plan().components.iter().find(|component| component.name == name);
        component.expect("the component is there").presence.clone()
    };
    assert_eq!(presence("text_encoder"), "in its stage");
    assert_eq!(presence("unet"), "layer by layer");
    assert_eq!(presence("vae"), "always");

    let wide = ComponentMemory { dtype: Some(DType::F32), ..ComponentMemory::default() };
    let memory = MemoryRequest { components: BTreeMap::from([("vae".into(), wide)]), ..MemoryRequest::default() };
    let half = PipelineRequest { dtype: Some(DType::BF16), ..xl(memory) };
    let half = drawn(&half);
    let dtype =
        |name: &str| half.plan().components.iter().find(|component| component.name == name).map(|c| c.dtype.clone());
    assert_eq!((dtype("vae").as_deref(), dtype("unet").as_deref()), (Some("f32"), Some("bf16")));
}

#[test]
fn slices_and_chunks_change_a_picture_by_rounding_at_most() {
    let plain = drawn(&xl(MemoryRequest::default()));
    let memory = MemoryRequest { slices_attention: true, chunks_feed_forward: true, ..MemoryRequest::default() };
    let sliced = drawn(&xl(memory));
    let worst = plain.pixels.iter().zip(&sliced.pixels).map(|(left, right)| left.abs_diff(*right)).max();
    assert!(worst.expect("a picture has pixels") <= 1, "{worst:?}");
}

#[test]
fn tiles_change_a_picture_only_when_it_is_larger_than_one() {
    let tiled = MemoryRequest { vae_tiling: Some(TilingRequest::default()), ..MemoryRequest::default() };
    let both = |size| {
        let picture = |memory| draw(&xl(memory), size).expect("the model is complete").pixels;
        (picture(MemoryRequest::default()), picture(tiled.clone()))
    };
    let (whole, in_tiles) = both(64);
    assert!(whole == in_tiles);
    let (whole, in_tiles) = both(96);
    assert!(whole.len() == in_tiles.len() && whole != in_tiles);
}

#[test]
fn the_plan_comes_before_reading_and_counts_what_the_files_hold() {
    let drawn = drawn(&PipelineRequest { dtype: Some(DType::F16), ..xl(MemoryRequest::default()) });
    let at = |wanted: fn(&Event) -> bool| drawn.events.iter().position(wanted).expect("the event comes");
    assert!(at(|event| matches!(event, Event::FitPlan { .. })) < at(|event| matches!(event, Event::Loading { .. })));
    let plan = drawn.plan();
    let names: Vec<&str> = plan.components.iter().map(|component| component.name.as_str()).collect();
    assert_eq!(names, ["text_encoder", "text_encoder_2", "unet", "vae"]);
    assert_eq!((plan.size, plan.offload.as_str()), ([64, 64], "none"));
    let file = models().join("sdxl/text_encoder/model.safetensors");
    let stored = std::fs::metadata(file).expect("the fixture is there").len();
    // The fixture is stored in float32; its header is small.
    let bytes = plan.components[0].bytes;
    assert!(bytes < stored / 2 && bytes > stored / 3, "{bytes} of {stored}");
    assert!(plan.peak > plan.components.iter().map(|component| component.bytes).sum());
}

#[test]
fn the_plan_counts_adapters_and_their_image_encoder_which_stay_whatever_is_offloaded() {
    let adapter = IpAdapterRequest {
        source: ModelSource::Folder(models().join("sdxl-ip-adapter")),
        weight_name: Some("ip-adapter.safetensors".into()),
        subfolder: Some("models".into()),
        image_encoder_folder: Some("image_encoder".into()),
        scale: IpAdapterScale::Everywhere(0.5),
    };
    let cancel = CancellationToken::default();
    let context = Context { events: &Silent, cancel: &cancel };
    let plan = |adapters: &[IpAdapterRequest]| {
        let request =
            PipelineRequest { dtype: Some(DType::F16), ip_adapters: adapters.to_vec(), ..xl(offload(Paging::Layers)) };
        Pipeline::plan(&request, &hub(), &ComponentCache::default(), context).expect("the model is complete")
    };
    let (without, with) = (plan(&[]), plan(&[adapter]));
    let of = |name: &str| with.components.iter().find(|component| component.name == name).expect("it is counted");
    let file = models().join("sdxl-ip-adapter/models/ip-adapter.safetensors");
    let stored = std::fs::metadata(file).expect("the fixture is there").len();
    let weights = of("ip_adapter");
    // The fixture is stored in float32; its header is small.
    assert!(weights.bytes <= stored / 2 && weights.bytes > stored / 3, "{} of {stored}", weights.bytes);
    assert_eq!((weights.presence.as_str(), weights.at_once), ("always", weights.bytes));
    assert_eq!(of("image_encoder").presence, "layer by layer");
    assert!(with.peak - with.in_use >= without.peak - without.in_use + weights.bytes);
}

#[test]
fn files_that_lack_a_tensor_are_found_before_anything_is_read() {
    let folder = copy("sd15");
    change(&folder, "vae", |tensors| drop(tensors.remove("decoder.conv_out.bias").expect("it has one")));
    let events = Mutex::new(Vec::new());
    let sink = |event: Event| events.lock().expect("no test panics here").push(event);
    let cancel = CancellationToken::default();
    let context = Context { events: &sink, cancel: &cancel };
    let request = request("StableDiffusionPipeline", folder.path().to_owned(), MemoryRequest::default());
    let plan = Pipeline::plan(&request, &hub(), &ComponentCache::default(), context).map(drop);
    let load = Pipeline::load(&request, &hub(), &mut ComponentCache::default(), context).map(drop);
    for refused in [plan, load] {
        let message = refused.expect_err("a bias is missing").to_string();
        assert!(message.contains("`decoder.conv_out.bias`") && message.contains("vae"), "{message}");
    }
    let is_loading = |event: &Event| matches!(event, Event::Loading { .. });
    assert!(!events.lock().expect("no test panics here").iter().any(is_loading));
}

#[test]
fn weights_that_another_library_quantized_are_refused_by_their_configuration() {
    let folder = copy("sd15");
    let path = folder.path().join("unet/config.json");
    let mut config: Value =
        serde_json::from_slice(&std::fs::read(&path).expect("the fixture is there")).expect("valid JSON");
    config["quantization_config"] = json!({ "quant_method": "quanto" });
    std::fs::write(&path, config.to_string()).expect("the folder is writable");
    let cancel = CancellationToken::default();
    let context = Context { events: &Silent, cancel: &cancel };
    let request = request("StableDiffusionPipeline", folder.path().to_owned(), MemoryRequest::default());
    let refused = Pipeline::plan(&request, &hub(), &ComponentCache::default(), context);
    let message = refused.expect_err("not readable").to_string();
    assert!(message.contains("`quanto`") && message.contains("unet"), "{message}");
}

#[test]
fn a_call_that_cannot_fit_is_refused_before_anything_is_read() {
    let huge = CallSize { height: Some(1 << 21), width: Some(1 << 21), ..CallSize::default() };
    let memory = MemoryRequest { call: huge, ..MemoryRequest::default() };
    let cancel = CancellationToken::default();
    let events = Mutex::new(Vec::new());
    let sink = |event: Event| events.lock().expect("no test panics here").push(event);
    let context = Context { events: &sink, cancel: &cancel };
    let load = |memory| Pipeline::load(&xl(memory), &hub(), &mut ComponentCache::default(), context).map(|_| ());
    let plan = Pipeline::plan(&xl(memory.clone()), &hub(), &ComponentCache::default(), context);
    if plan.expect("the model is complete").verdict == Verdict::Unknown {
        return;
    }
    let message = load(memory.clone()).expect_err("petabytes").to_string();
    assert!(message.contains("on `cpu`") && message.contains("--ignore-fit"), "{message}");
    let is_loading = |event: &Event| matches!(event, Event::Loading { .. });
    assert!(!events.lock().expect("no test panics here").iter().any(is_loading));
    load(MemoryRequest { ignores_fit: true, ..memory }).expect("loading alone fits");
}

#[test]
fn auto_keeps_everything_where_there_is_room() {
    let auto = MemoryRequest { offload: Some(Offload::Auto), ..MemoryRequest::default() };
    let drawn = drawn(&xl(auto));
    assert_eq!((drawn.plan().offload.as_str(), drawn.plan().is_chosen), ("none", true));
}

#[test]
fn what_is_said_of_components_that_are_not_there_is_refused() {
    let on_demand = ComponentMemory { paging: Some(Paging::Whole), ..ComponentMemory::default() };
    let components = BTreeMap::from([("transformer".to_owned(), on_demand)]);
    let request = xl(MemoryRequest { components, ..MemoryRequest::default() });
    let message = draw(&request, 64).map(|_| ()).expect_err("there is no transformer").to_string();
    assert!(message.contains("`transformer`") && message.contains("`unet`"), "{message}");
}

/// A copy of the model `name`.
fn copy(name: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let copy = |from: &Path, to: &Path| std::fs::copy(from, to).map(|_| ()).expect("files can be copied");
    let root = models().join(name);
    for entry in std::fs::read_dir(&root).expect("the fixture is there").flatten() {
        let target = folder.path().join(entry.file_name());
        if entry.path().is_dir() {
            std::fs::create_dir(&target).expect("a new folder");
            for file in std::fs::read_dir(entry.path()).expect("a folder").flatten() {
                copy(&file.path(), &target.join(file.file_name()));
            }
        } else {
            copy(&entry.path(), &target);
        }
    }
    folder
}

/// Writes the weights of a component again, as `change` leaves them.
fn change(folder: &tempfile::TempDir, component: &str, change: impl Fn(&mut HashMap<String, Tensor>)) {
    let file = folder.path().join(component).join("diffusion_pytorch_model.safetensors");
    let mut tensors = candle_core::safetensors::load(&file, &Device::Cpu).expect("the fixture is valid");
    change(&mut tensors);
    candle_core::safetensors::save(&tensors, &file).expect("the folder is writable");
}

#[test]
fn an_autoencoder_that_overflows_in_float16_decodes_again_in_float32_and_says_so() {
    let folder = copy("sd15");
    change(&folder, "vae", |tensors| {
        let kernel = tensors.get_mut("decoder.conv_in.weight").expect("the autoencoder has the tensor");
        *kernel = (&*kernel * 1e5).expect("a small tensor");
    });
    let of = |dtype| {
        let request = request("StableDiffusionPipeline", folder.path().to_owned(), MemoryRequest::default());
        drawn(&PipelineRequest { dtype: Some(dtype), ..request })
    };
    let half = of(DType::F16);
    assert!(half.warnings().iter().any(|message| message.contains("overflowed in float16")), "{:?}", half.warnings());
    let full = of(DType::F32);
    assert!(full.warnings().is_empty(), "{:?}", full.warnings());
    let differences = half.pixels.iter().zip(&full.pixels).map(|(left, right)| f64::from(left.abs_diff(*right)));
    let mean = differences.sum::<f64>() / full.pixels.len() as f64;
    assert!(mean < 8.0, "{mean}");
}
