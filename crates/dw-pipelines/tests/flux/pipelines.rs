//! Whole calls, without text encoders: the prompts come encoded.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Mutex,
};

use candle_core::{Device, Tensor};
use dw_core::{
    arguments::Arguments,
    artifact::{Array, Artifact, Entry},
    cancel::CancellationToken,
    event::{Event, Silent},
    seed::Seed,
};
use dw_pipelines::{
    Result,
    hub::Hub,
    models::{AutoencoderKl, FluxControlNetModel, FluxTransformer2DModel, Reuse},
    pipelines::{ComponentCache, Pipeline},
    request::{
        ComponentChoice, ComponentRequest, Context, LoraRequest, MemoryRequest, ModelSource, PipelineRequest,
        SchedulerRequest,
    },
    rng::{Generators, NoiseDialect},
};
use image::{DynamicImage, RgbImage};
use serde_json::{Value, json};

use crate::{
    assert_like, input,
    support::tiny::{self, Autoencoder, Recorder},
    transformer_config,
};

/// A model in the diffusers layout, gone with the value.
pub(crate) struct Model(pub(crate) PathBuf);

impl Drop for Model {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub(crate) fn write(path: &Path, value: &Value) {
    std::fs::create_dir_all(path.parent().expect("a file in a folder")).expect("the folder is writable");
    std::fs::write(path, value.to_string()).expect("the folder is writable");
}

impl Model {
    /// A model for `test` whose transformer reads `in_channels` values for each token.
    pub(crate) fn new(test: &str, in_channels: usize) -> Self {
        let root = std::env::temp_dir().join(format!("dw-flux-{test}-{}", std::process::id()));
        let index = json!({
            "_class_name": "FluxPipeline", "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": [null, null], "text_encoder_2": [null, null], "tokenizer": [null, null],
            "tokenizer_2": [null, null], "transformer": ["diffusers", "FluxTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"]
        });
        write(&root.join("model_index.json"), &index);
        let scheduler = json!({ "shift": 3.0, "use_dynamic_shifting": true });
        write(&root.join("scheduler/scheduler_config.json"), &scheduler);

        let mut transformer = transformer_config();
        transformer["in_channels"] = json!(in_channels);
        transformer["out_channels"] = json!(64);
        write(&root.join("transformer/config.json"), &transformer);
        let heard = Recorder::default();
        let settings = serde_json::from_value(transformer).expect("a configuration");
        FluxTransformer2DModel::new(&settings, heard.listening(tiny::weights("flux/dev"))).expect("it can be built");
        heard.write(&root.join("transformer/diffusion_pytorch_model.safetensors"));

        let (down, up) = ("DownEncoderBlock2D", "UpDecoderBlock2D");
        let vae = json!({
            "_class_name": "AutoencoderKL", "block_out_channels": [8, 16, 16, 16], "down_block_types": [down, down, down, down],
            "latent_channels": 16, "layers_per_block": 1, "norm_num_groups": 4, "scaling_factor": 0.3611,
            "shift_factor": 0.1159, "up_block_types": [up, up, up, up], "use_post_quant_conv": false, "use_quant_conv": false
        });
        write(&root.join("vae/config.json"), &vae);
        let heard = Recorder::default();
        let settings = serde_json::from_value(vae).expect("a configuration");
        AutoencoderKl::new(&settings, heard.listening(Autoencoder::FLUX.weights("flux/vae"))).expect("it can be built");
        heard.write(&root.join("vae/diffusion_pytorch_model.safetensors"));
        Self(root)
    }

    /// A ControlNet for text of `features` features, in a folder of the model's.
    pub(crate) fn controlnet(&self, features: usize) -> ComponentChoice {
        ComponentChoice::Load(vec![self.net("flux/cn", &json!({ "joint_attention_dim": features }))])
    }

    /// The ControlNet of this tag with some settings `changed`, in a folder of the model's.
    fn net(&self, tag: &str, changed: &Value) -> ComponentRequest {
        let mut settings = transformer_config();
        settings["_class_name"] = json!("FluxControlNetModel");
        settings["num_single_layers"] = json!(1);
        settings.as_object_mut().expect("an object").extend(changed.as_object().expect("an object").clone());
        let folder = self.0.join(format!("{}-{}", tag.replace('/', "-"), settings["joint_attention_dim"]));
        write(&folder.join("config.json"), &settings);
        let heard = Recorder::default();
        let settings = serde_json::from_value(settings).expect("a configuration");
        FluxControlNetModel::new(&settings, heard.listening(tiny::weights(tag))).expect("it can be built");
        heard.write(&folder.join("diffusion_pytorch_model.safetensors"));
        ComponentRequest {
            class: "FluxControlNetModel".into(),
            source: ModelSource::Folder(folder),
            subfolder: None,
            variant: None,
            dtype: None,
            quantization: None,
        }
    }

    pub(crate) fn request(&self, class: &str) -> PipelineRequest {
        PipelineRequest {
            class: class.into(),
            source: ModelSource::Folder(self.0.clone()),
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

    pub(crate) fn load(&self, class: &str) -> Pipeline {
        load(&self.request(class)).expect("a complete model")
    }
}

pub(crate) fn load(request: &PipelineRequest) -> Result<Pipeline> {
    let hub = Hub { cache: PathBuf::new(), endpoint: String::new(), token: None, offline: true };
    let cancel = CancellationToken::default();
    Pipeline::load(request, &hub, &mut ComponentCache::default(), Context { events: &Silent, cancel: &cancel })
}

pub(crate) fn array(tensor: &Tensor) -> Artifact {
    let data = tensor.flatten_all().and_then(|x| x.to_vec1()).expect("f32 numbers");
    Artifact::Array(Array { shape: tensor.dims().to_vec(), data }.into())
}

pub(crate) fn picture(width: u32, height: u32) -> Artifact {
    let at = |x: u32, y: u32| image::Rgb([(x * 3) as u8, (y * 5) as u8, 90]);
    Artifact::image(DynamicImage::from(RgbImage::from_fn(width, height, at)))
}

/// A call in 3 steps with an encoded prompt, and `more`; `artifacts` are arguments, too.
pub(crate) fn arguments(more: &Value, artifacts: Vec<(&str, Artifact)>) -> Arguments {
    let mut arguments = Arguments::default();
    let prompt = [("prompt_embeds", input("prompt", &[1, 7, 64])), ("pooled_prompt_embeds", input("pooled", &[1, 32]))];
    let prompt = prompt.map(|(name, tensor)| (name, array(&tensor)));
    for (id, (name, artifact)) in prompt.into_iter().chain(artifacts).enumerate() {
        arguments.artifacts.insert(id as u64, artifact);
        arguments.values.insert(name.into(), json!({ "$artifact": id }));
    }
    let size = json!({ "height": 64, "width": 80, "num_inference_steps": 3 });
    for values in [&size, more] {
        arguments.values.extend(values.as_object().expect("an object").clone());
    }
    arguments
}

fn run_with_events(pipeline: &mut Pipeline, arguments: &Arguments) -> Result<(Entry, Vec<String>)> {
    let told = Mutex::new(Vec::new());
    let events = |event: Event| {
        if let Event::Warning { message } = event {
            told.lock().expect("one thread").push(message);
        }
    };
    let cancel = CancellationToken::default();
    let mut generators = Generators::from_seed(&Seed::One(5), NoiseDialect::Cpu);
    let entry = pipeline.run(arguments, &mut generators, Context { events: &events, cancel: &cancel })?;
    Ok((entry, told.into_inner().expect("one thread")))
}

pub(crate) fn run(pipeline: &mut Pipeline, arguments: &Arguments) -> Result<Entry> {
    run_with_events(pipeline, arguments).map(|(entry, _)| entry)
}

pub(crate) fn message(pipeline: &mut Pipeline, arguments: &Arguments) -> String {
    run(pipeline, arguments).expect_err("refused").to_string()
}

/// The latents of a call that asks for them.
pub(crate) fn latents(pipeline: &mut Pipeline, more: Value, mut artifacts: Vec<(&str, Artifact)>) -> Tensor {
    let mut more = more;
    more["output_type"] = json!("latent");
    let entry = run(pipeline, &arguments(&more, std::mem::take(&mut artifacts))).expect("a valid call");
    let Some(Artifact::Array(array)) = entry.artifacts.first() else { panic!("no latents") };
    Tensor::from_slice(&array.data, array.shape.as_slice(), &Device::Cpu).expect("the shape fits")
}

pub(crate) fn same(a: &Tensor, b: &Tensor) -> bool {
    let numbers = |x: &Tensor| x.flatten_all().and_then(|x| x.to_vec1::<f32>()).expect("f32 numbers");
    numbers(a) == numbers(b)
}

#[test]
fn text_to_image_agrees_with_the_reference_with_and_without_a_negative_prompt() {
    let model = Model::new("t2i", 64);
    let mut pipeline = model.load("DiffusionPipeline");
    assert_eq!(pipeline.class(), "FluxPipeline");
    let plain = latents(&mut pipeline, json!({}), Vec::new());
    assert_eq!(plain.dims(), [1, 16, 8, 10]);
    let expected = [0.080_046_1, 1.689_376_5, -3.580_413_3, -1.912_401_6, 0.807_230_5, -0.494_692_1, 1.169_032_3];
    assert_like("latents", &plain, expected);
    let negative = || {
        let embeds = array(&input("negative", &[1, 7, 64]));
        vec![("negative_prompt_embeds", embeds), ("negative_pooled_prompt_embeds", array(&input("pooled2", &[1, 32])))]
    };
    let guided = latents(&mut pipeline, json!({ "true_cfg_scale": 2.5 }), negative());
    let expected = [-1.147_344_6, 1.934_456_3, -5.356_988_4, -2.249_895_6, 2.455_522_8, 0.059_523_8, 1.638_014_8];
    assert_like("guided latents", &guided, expected);
    assert!(same(&latents(&mut pipeline, json!({}), negative()), &plain), "a scale of 1 does nothing");
}

#[test]
fn noise_may_be_given_packed_or_as_latents() {
    let model = Model::new("noise", 64);
    let mut pipeline = model.load("FluxPipeline");
    let noise = tiny::drawn("noise", (1, 16, 8, 10)).expect("f32 noise");
    let packed = noise
        .reshape(&[1usize, 16, 4, 2, 5, 2][..])
        .and_then(|x| x.permute(vec![0, 2, 4, 1, 3, 5])?.contiguous()?.reshape((1, 20, 64)))
        .expect("even sides");
    let from = |pipeline: &mut Pipeline, noise: &Tensor| latents(pipeline, json!({}), vec![("latents", array(noise))]);
    assert!(same(&from(&mut pipeline, &noise), &from(&mut pipeline, &packed)));
    let short = packed.narrow(1, 0, 19).expect("fewer tokens");
    let message = message(&mut pipeline, &arguments(&json!({}), vec![("latents", array(&short))]));
    assert!(message.contains("[1, 20, 64]"), "{message}");
}

#[test]
fn bad_calls_say_what_is_wrong() {
    let model = Model::new("bad", 64);
    let mut pipeline = model.load("FluxPipeline");
    let wrong = |pipeline: &mut Pipeline, more: Value, artifacts| message(pipeline, &arguments(&more, artifacts));
    let size = wrong(&mut pipeline, json!({ "height": 15 }), Vec::new());
    assert!(size.contains("`height`") && size.contains("at least 16"), "{size}");
    let narrow = wrong(&mut pipeline, json!({}), vec![("prompt_embeds", array(&input("prompt", &[1, 7, 32])))]);
    assert!(narrow.contains("prompt_embeds") && narrow.contains("64"), "{narrow}");
    let pooled = wrong(&mut pipeline, json!({ "pooled_prompt_embeds": null }), Vec::new());
    assert!(pooled.contains("pooled_prompt_embeds"), "{pooled}");
    let mut text = arguments(&json!({ "prompt": "a house" }), Vec::new());
    text.values.retain(|name, _| !name.ends_with("prompt_embeds"));
    let missing = message(&mut pipeline, &text);
    assert!(missing.contains("prompt_embeds") && missing.contains("`text_encoder`"), "{missing}");
    let long = wrong(&mut pipeline, json!({ "max_sequence_length": 513 }), Vec::new());
    assert!(long.contains("at most 512"), "{long}");
}

#[test]
fn sides_are_cut_down_to_whole_tokens_and_the_change_is_told() {
    let model = Model::new("sides", 64);
    let mut pipeline = model.load("FluxPipeline");
    let plain = latents(&mut pipeline, json!({}), Vec::new());
    let cut = arguments(&json!({ "height": 79, "width": 95, "output_type": "latent" }), Vec::new());
    let (entry, told) = run_with_events(&mut pipeline, &cut).expect("a valid call");
    let Some(Artifact::Array(array)) = entry.artifacts.first() else { panic!("no latents") };
    assert_eq!((array.shape.as_slice(), plain.dims()), (&[1, 16, 8, 10][..], &[1, 16, 8, 10][..]));
    assert!(told.len() == 1 && told[0].contains("`80 x 64` pixels instead of `95 x 79`"), "{told:?}");
    // Kontext takes a shape from the sides.
    let edit = arguments(&json!({ "max_area": 4096 }), Vec::new());
    let (_, told) = run_with_events(&mut model.load("FluxKontextPipeline"), &edit).expect("a valid call");
    assert!(told.len() == 1 && told[0].contains("`64 x 48`") && told[0].contains("`max_area`"), "{told:?}");
}

#[test]
fn start_pictures_of_several_sizes_are_brought_to_the_size_of_the_call() {
    let model = Model::new("sizes", 64);
    let mut pipeline = model.load("FluxImg2ImgPipeline");
    let mut call = arguments(&json!({ "num_images_per_prompt": 2, "strength": 0.5 }), Vec::new());
    for (id, artifact) in [(7, picture(70, 50)), (8, picture(9, 12))] {
        call.artifacts.insert(id, artifact);
    }
    call.values.insert("image".into(), json!([{ "$artifact": 7 }, { "$artifact": 8 }]));
    assert_eq!(run(&mut pipeline, &call).expect("a valid call").artifacts.len(), 2);
}

#[test]
fn a_model_made_for_another_class_names_that_class() {
    let fill = Model::new("fill", 384);
    let refused = |model: &Model, class: &str| load(&model.request(class)).err().expect("refused").to_string();
    let said = refused(&fill, "FluxPipeline");
    assert!(said.contains("use `FluxFillPipeline`"), "{said}");
    let dev = Model::new("dev", 64);
    let said = refused(&dev, "FluxControlPipeline");
    assert!(said.contains("use `FluxPipeline`"), "{said}");
}

#[test]
fn pictures_are_edited_continued_and_repainted_at_the_size_of_the_call() {
    let size = |entry: Entry| match entry.artifacts.first() {
        Some(Artifact::Image(picture)) => (picture.width(), picture.height()),
        _ => panic!("no picture"),
    };
    let fill = Model::new("pictures-fill", 384);
    let call = arguments(&json!({}), vec![("image", picture(70, 50)), ("mask_image", picture(70, 50))]);
    assert_eq!(size(run(&mut fill.load("FluxFillPipeline"), &call).expect("a valid call")), (80, 64));
    let dev = Model::new("pictures", 64);
    assert_eq!(size(run(&mut dev.load("FluxInpaintPipeline"), &call).expect("a valid call")), (80, 64));
    let start = arguments(&json!({ "strength": 0.5 }), vec![("image", picture(70, 50))]);
    assert_eq!(size(run(&mut dev.load("FluxImg2ImgPipeline"), &start).expect("a valid call")), (80, 64));
    // Kontext keeps the area: 64 by 80 becomes about 4096 pixels of the same shape.
    let edit = arguments(&json!({ "max_area": 4096, "_auto_resize": false }), vec![("image", picture(70, 50))]);
    assert_eq!(size(run(&mut dev.load("FluxKontextPipeline"), &edit).expect("a valid call")), (64, 48));
}

#[test]
fn a_controlnet_steers_in_its_window_and_must_belong_to_the_model() {
    let model = Model::new("controlnet", 64);
    let mut request = model.request("AutoPipelineForText2Image");
    request.components.insert("controlnet".into(), model.controlnet(64));
    let mut pipeline = load(&request).expect("a complete model");
    assert_eq!(pipeline.class(), "FluxControlNetPipeline");
    let control = || vec![("control_image", picture(64, 64))];
    let steered = latents(&mut pipeline, json!({}), control());
    let weak = latents(&mut pipeline, json!({ "controlnet_conditioning_scale": 0.0 }), control());
    assert!(!same(&steered, &weak));
    // No step lies wholly in this window.
    let window = json!({ "control_guidance_start": 0.4, "control_guidance_end": 0.5 });
    assert!(same(&latents(&mut pipeline, window, control()), &weak));

    request.components.insert("controlnet".into(), model.controlnet(48));
    let refused = load(&request).err().expect("another model's net").to_string();
    assert!(refused.contains("`controlnet`") && refused.contains("48") && refused.contains("64"), "{refused}");
}

/// Latents of a call with these nets, pictures and settings, at the guidance of the stored numbers.
fn steered(request: &mut PipelineRequest, nets: Vec<ComponentRequest>, pictures: Vec<Artifact>, more: Value) -> Tensor {
    request.components.insert("controlnet".into(), ComponentChoice::Load(nets));
    let mut pipeline = load(request).expect("a complete model");
    let mut call = json!({ "guidance_scale": 3.5, "output_type": "latent" });
    call.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    let mut call = arguments(&call, Vec::new());
    let ids = 10..10 + pictures.len() as u64;
    call.artifacts.extend(ids.clone().zip(pictures));
    let handles: Vec<Value> = ids.map(|id| json!({ "$artifact": id })).collect();
    call.values.insert("control_image".into(), json!(handles));
    let entry = run(&mut pipeline, &call).expect("a valid call");
    let Some(Artifact::Array(array)) = entry.artifacts.first() else { panic!("no latents") };
    Tensor::from_slice(&array.data, array.shape.as_slice(), &Device::Cpu).expect("the shape fits")
}

#[test]
fn nets_of_several_depths_and_nets_of_pixels_steer_as_in_the_reference() {
    let model = Model::new("nets", 64);
    let mut request = model.request("FluxControlNetPipeline");
    let shallow = json!({ "num_layers": 1, "num_single_layers": 0 });
    let both = vec![model.net("flux/cn", &json!({})), model.net("flux/shallow", &shallow)];
    // Nets that know one kind of picture do not look at the number of a kind.
    let more = json!({ "controlnet_conditioning_scale": [0.7, 0.5], "control_mode": [0, null] });
    let found = steered(&mut request, both, vec![picture(80, 64), picture(40, 64)], more);
    let expected = [-1.622_538_3, -0.547_669_5, 1.105_109_7, -1.150_133_1, -1.477_626_1, -0.957_236_8, 1.233_882_5];
    assert_like("two nets", &found, expected);

    let pixels = || model.net("flux/hints", &json!({ "patch_size": 2, "conditioning_embedding_channels": 16 }));
    let more = json!({ "controlnet_conditioning_scale": 0.7 });
    let found = steered(&mut request, vec![pixels()], vec![picture(70, 50)], more);
    let expected = [0.666_019, 1.876_167_2, -3.560_670_4, -1.959_628_5, 0.171_698_2, 0.073_285, 1.126_068_5];
    assert_like("net of pixels", &found, expected);

    let mixed = ComponentChoice::Load(vec![model.net("flux/cn", &json!({})), pixels()]);
    request.components.insert("controlnet".into(), mixed);
    let control = || vec![("control_image", picture(64, 64))];
    let refused = message(&mut load(&request).expect("a complete model"), &arguments(&json!({}), control()));
    assert!(refused.contains("1 picture(s) for 2 ControlNets") || refused.contains("read pixels"), "{refused}");
}

#[test]
fn only_text_to_image_leaves_the_noise_levels_to_a_scheduler_of_flows() {
    let model = Model::new("flow", 64);
    let mut request = model.request("FluxControlNetPipeline");
    let config = json!({ "use_flow_sigmas": true, "prediction_type": "flow_prediction" });
    let config = config.as_object().expect("an object").clone();
    request.scheduler = Some(SchedulerRequest { class: Some("UniPCMultistepScheduler".into()), config, shift: None });
    let found = steered(&mut request, vec![model.net("flux/cn", &json!({}))], vec![picture(80, 64)], json!({}));
    let expected = [0.459_408_2, 0.092_451_2, -2.014_309_4, 0.857_595_5, -1.295_591_1, 0.119_533_5, 1.189_160_2];
    assert_like("net and even noise levels", &found, expected);

    request.class = "FluxPipeline".into();
    request.components.clear();
    let mut pipeline = load(&request).expect("a complete model");
    let given = arguments(&json!({ "sigmas": [1.0, 0.5] }), Vec::new());
    let (_, told) = run_with_events(&mut pipeline, &given).expect("a valid call");
    assert!(told.len() == 1 && told[0].contains("`sigmas` is not looked at"), "{told:?}");
}

#[test]
fn a_lora_is_refused_where_nothing_is_denoised_and_a_name_counts_once() {
    let model = Model::new("loras", 64);
    let lora = || LoraRequest {
        source: ModelSource::Folder(model.0.join("x.safetensors")),
        weight_name: None,
        subfolder: None,
        adapter_name: "x".into(),
        scale: 1.0,
    };
    let mut request = model.request("FluxPriorReduxPipeline");
    request.loras = vec![lora()];
    let index = json!({
        "_class_name": "FluxPriorReduxPipeline", "image_encoder": ["transformers", "SiglipVisionModel"],
        "image_embedder": ["diffusers", "ReduxImageEncoder"]
    });
    let redux = Model(model.0.join("redux"));
    write(&redux.0.join("model_index.json"), &index);
    request.source = ModelSource::Folder(redux.0.clone());
    let refused = load(&request).err().expect("refused").to_string();
    assert!(refused.contains("`FluxPriorReduxPipeline` takes no LoRA"), "{refused}");

    let heard = Recorder::default();
    let linear = heard.listening(tiny::weights("lora"));
    let name = "transformer.transformer_blocks.0.attn.to_q";
    for (part, shape) in [("lora_A.weight", (2, 32)), ("lora_B.weight", (32, 2))] {
        linear.pp(name).get(shape, part).expect("made as asked for");
    }
    heard.write(&model.0.join("x.safetensors"));
    let mut request = model.request("FluxPipeline");
    request.loras = vec![lora(), lora()];
    let refused = load(&request).err().expect("refused").to_string();
    assert!(refused.contains("`adapter_name` `x` twice"), "{refused}");
}

#[test]
fn steps_are_skipped_as_the_rule_says_and_the_count_is_told() {
    let model = Model::new("cache", 64);
    let mut pipeline = model.load("FluxPipeline");
    let call = arguments(&json!({ "num_inference_steps": 6, "output_type": "latent" }), Vec::new());
    let (_, quiet) = run_with_events(&mut pipeline, &call).expect("a valid call");
    assert!(quiet.is_empty(), "{quiet:?}");
    let mut told = |rule| {
        assert!(pipeline.reuse_steps(Some(rule)));
        run_with_events(&mut pipeline, &call).expect("a valid call").1.join("; ")
    };
    let never = told(Reuse::FirstBlock { threshold: 0.0 });
    assert!(never.contains("none of 6"), "{never}");
    let always = told(Reuse::FirstBlock { threshold: 1e6 });
    assert!(always.contains("5 of 6"), "{always}");
    // The first and last step are computed.
    let tea = told(Reuse::Tea { threshold: 1e9, coefficients: [0.0, 0.0, 0.0, 1.0, 0.0] });
    assert!(tea.contains("4 of 6"), "{tea}");
}
