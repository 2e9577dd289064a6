//! Stable Diffusion 3 against the reference, on tiny models that are made from seeds: components, whole calls, and what
//! is said about calls that cannot be run. `tests/parity/make_sd3.py` prints the numbers of the components; those of the
//! whole calls are what the reference draws with the same models.

mod support;

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{LazyLock, Mutex},
};

use candle_core::{DType, Device, Shape, Tensor};
use dw_core::{
    arguments::{Arguments, ArtifactRef},
    artifact::{Artifact, Entry},
    cancel::CancellationToken,
    event::Event,
    picture,
    seed::Seed,
};
use dw_pipelines::{
    models::{
        ClipTextModel, Reuse, Sd3ControlNetInput, Sd3ControlNetModel, Sd3Input, Sd3Transformer2DModel, T5EncoderModel,
    },
    pipelines::Pipeline,
    request::{ComponentChoice, Context, LoraRequest, ModelSource, PipelineRequest, SchedulerRequest},
    rng::{Generator, Generators, NoiseDialect},
    weights::Weights,
};
use serde_json::{Value, json};
use support::{
    sd3::{
        self, components, config, fixtures, load, medium_35, run, transformer_config, with, write, write_component,
        write_model,
    },
    tiny::{parameter, weights},
};

/// How far rounding in another order of summation may lead.
const TOLERANCE: f32 = 5e-5;

fn t5_config() -> Value {
    json!({
        "vocab_size": 480, "d_model": 80, "d_kv": 8, "d_ff": 96, "num_layers": 2, "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
    })
}

fn drawn(seed: i128, shape: impl Into<Shape>) -> Tensor {
    Generator::new(seed, NoiseDialect::Cpu).randn(shape, DType::F32, &Device::Cpu).expect("a small tensor")
}

/// Six values from first to last and the mean size of all.
fn assert_values(what: &str, tensor: &Tensor, expected: [f32; 6], mean_size: f32) {
    let values: Vec<f32> = tensor.flatten_all().and_then(|flat| flat.to_vec1()).expect("an f32 tensor");
    for (i, expected) in expected.into_iter().enumerate() {
        let found = values[i * (values.len() - 1) / 5];
        assert!((found - expected).abs() < TOLERANCE * expected.abs().max(1.0), "{what}: {found} is not {expected}");
    }
    let mean = values.iter().map(|value| f64::from(value.abs())).sum::<f64>() / values.len() as f64;
    assert!((mean as f32 - mean_size).abs() < TOLERANCE, "{what}: the mean size {mean} is not {mean_size}");
}

#[test]
fn t5_states_are_those_of_the_reference() {
    let model = T5EncoderModel::new(&config(t5_config()), weights("sd35/t5")).expect("every tensor is made");
    let ids: Vec<u32> = (0..300).collect();
    let states = model.forward(&Tensor::from_vec(ids, (2, 150), &Device::Cpu).expect("300 ids")).expect("it runs");
    assert_values("t5", &states, [0.865_308, 0.739_675, 0.925_145, 0.738_153, 0.386_133, 0.049_409], 0.817_670);
}

/// The inputs of one evaluation: latents, text, pooled text.
fn inputs() -> [Tensor; 3] {
    [drawn(1, (2, 16, 8, 12)), drawn(2, (2, 45, 80)), drawn(3, (2, 64))]
}

fn input([sample, text, pooled]: &[Tensor; 3]) -> Sd3Input<'_> {
    Sd3Input {
        sample,
        timestep: 601.5,
        encoder_hidden_states: text,
        pooled_projections: pooled,
        block_residuals: &[],
        skip_layers: &[],
        image_prompt: None,
    }
}

fn transformer(tag: &str, settings: Value) -> Sd3Transformer2DModel {
    Sd3Transformer2DModel::new(&config(settings), weights(tag)).expect("every tensor is made")
}

#[test]
fn all_forms_of_the_transformer_predict_what_the_reference_predicts() {
    let inputs = inputs();
    let check = |what, model: &Sd3Transformer2DModel, input: &Sd3Input<'_>, expected, mean| {
        assert_values(what, &model.forward(input).expect("it runs"), expected, mean);
    };
    let plain = input(&inputs);
    let model = transformer("sd35/tr", medium_35());
    let expected = [-1.017_295, 0.177_829, -0.148_587, -0.836_537, -1.444_358, -0.433_752];
    check("3.5 medium", &model, &plain, expected, 0.981_964);
    let expected = [-1.278_003, 0.096_700, -0.052_682, -0.878_595, -1.292_158, -1.048_328];
    check("with a block left out", &model, &Sd3Input { skip_layers: &[1], ..plain }, expected, 0.985_108);
    let residuals = [drawn(4, (2, 24, 32)), drawn(5, (2, 24, 32))];
    let expected = [-0.989_072, -0.053_841, 1.088_117, -1.502_040, -1.426_676, -0.894_238];
    check("with residuals", &model, &Sd3Input { block_residuals: &residuals, ..plain }, expected, 0.916_713);

    let large = transformer("sd35/large", transformer_config(json!({ "qk_norm": "rms_norm" })));
    let expected = [-1.019_462, 1.569_349, -1.848_076, -1.800_938, 0.044_810, -2.084_503];
    check("3.5 large", &large, &plain, expected, 0.936_568);
    let medium = transformer("sd3/medium", transformer_config(json!({})));
    let expected = [-0.298_512, -0.892_957, -0.440_007, -3.235_877, -0.557_515, -2.367_251];
    check("3 medium", &medium, &plain, expected, 0.921_830);
}

#[test]
fn a_picture_beyond_the_table_of_positions_is_refused() {
    let [_, text, pooled] = inputs();
    let inputs = [drawn(1, (2, 16, 8, 50)), text, pooled];
    let message = transformer("sd35/tr", medium_35()).forward(&input(&inputs)).expect_err("too wide").to_string();
    assert!(message.contains("48 x 48") && message.contains("50 x 8"), "{message}");
}

#[test]
fn controlnets_with_and_without_text_say_what_the_reference_says() {
    let [sample, text, pooled] = inputs();
    let tokens = transformer("sd35/tr", medium_35()).embedded(&sample).expect("it runs");
    let condition = drawn(6, (2, 16, 8, 12));
    let check = |tag, settings: Value, expected: [([f32; 6], f32); 2]| {
        let more = json!({ "num_layers": 2, "use_pos_embed": false });
        let settings = with(transformer_config(more), settings);
        let net = Sd3ControlNetModel::new(&config(settings), weights(tag)).expect("every tensor is made");
        let input = Sd3ControlNetInput {
            sample: &sample,
            tokens: Some(&tokens),
            condition: &condition,
            timestep: 601.5,
            encoder_hidden_states: &text,
            pooled_projections: &pooled,
            scale: 0.7,
        };
        let residuals = net.forward(&input).expect("it runs");
        assert_eq!(residuals.len(), 2);
        for (residual, (expected, mean)) in residuals.iter().zip(expected) {
            assert_values(tag, residual, expected, mean);
        }
    };
    let first = ([-0.520_916, 1.720_640, 0.075_413, -0.420_455, -1.027_495, -0.307_903], 0.943_841);
    let second = ([-0.773_468, -0.246_971, -0.423_988, -1.555_035, 1.342_410, 0.332_447], 0.864_744);
    check("sd35/cn", json!({ "qk_norm": "rms_norm" }), [first, second]);
    let first = ([-1.241_271, -1.656_759, -0.053_764, 0.929_990, -0.182_047, -2.422_594], 0.986_601);
    let second = ([0.293_278, 0.733_045, -0.863_276, 1.417_746, -0.534_029, -0.273_060], 0.952_136);
    let without_text = json!({ "joint_attention_dim": null, "force_zeros_for_pooled_projection": false });
    check("sd35/cn-large", without_text, [first, second]);
}

/// The weights of a CLIP encoder, which were named with a prefix when they were drawn.
fn clip_weights(tag: &'static str) -> Weights {
    let make = move |name: &str, shape: &Shape| {
        let is_inside = !name.starts_with("text_projection");
        parameter(tag, &format!("{}{name}", if is_inside { "text_model." } else { "" }), shape)
    };
    Weights::generated(make, DType::F32, &Device::Cpu)
}

fn clip_config(projection: usize, more: Value) -> Value {
    with(
        json!({
            "architectures": ["CLIPTextModelWithProjection"], "vocab_size": 1000, "hidden_size": 32,
            "intermediate_size": 64, "projection_dim": projection, "num_hidden_layers": 3, "num_attention_heads": 4,
            "max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "eos_token_id": 2,
        }),
        more,
    )
}

/// A tokenizer of six words, for T5.
fn t5_tokenizer() -> Value {
    let space = json!({ "type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true });
    let vocab = json!([["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0], ["▁a", -1.0], ["▁cat", -1.0], ["▁moon", -1.0]]);
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": [], "pre_tokenizer": space, "decoder": space,
        "model": { "type": "Unigram", "unk_id": 2, "vocab": vocab, "byte_fallback": false },
    })
}

/// The tiny Stable Diffusion 3.5 as a folder, with and without its third text encoder.
struct Models {
    folder: tempfile::TempDir,
}

static MODELS: LazyLock<Models> = LazyLock::new(Models::write);

impl Models {
    fn write() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let model = folder.path().join("with-t5");
        for name in ["tokenizer", "tokenizer_2"] {
            fs_err::create_dir_all(model.join(name)).expect("the folder is writable");
            for file in fs_err::read_dir(fixtures().join("models/sdxl").join(name)).expect("the fixture is there") {
                let file = file.expect("a readable folder");
                fs_err::copy(file.path(), model.join(name).join(file.file_name())).expect("the folder is writable");
            }
        }
        write(&model.join("tokenizer_3"), "tokenizer.json", &t5_tokenizer());
        let clip = |settings, weights| drop(ClipTextModel::new(&config(settings), weights).expect("made"));
        let second = json!({
            "hidden_act": "gelu", "hidden_size": 40, "intermediate_size": 80, "num_hidden_layers": 4,
            "num_attention_heads": 5,
        });
        write_component(&model.join("text_encoder"), &clip_config(24, json!({})), clip_weights("sd35/te1"), &clip);
        write_component(&model.join("text_encoder_2"), &clip_config(40, second), clip_weights("sd35/te2"), &clip);
        write_component(&model.join("text_encoder_3"), &t5_config(), weights("sd35/t5"), &|settings, weights| {
            drop(T5EncoderModel::new(&config(settings), weights).expect("made"));
        });
        let net =
            transformer_config(json!({ "_class_name": "SD3ControlNetModel", "num_layers": 2, "qk_norm": "rms_norm" }));
        write_component(&folder.path().join("controlnet"), &net, weights("sd35/cn"), &|settings, weights| {
            drop(Sd3ControlNetModel::new(&config(settings), weights).expect("made"));
        });
        write_model(
            &model,
            json!({
                "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
                "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
                "text_encoder_3": ["transformers", "T5EncoderModel"],
                "tokenizer": ["transformers", "CLIPTokenizer"],
                "tokenizer_2": ["transformers", "CLIPTokenizer"],
                "tokenizer_3": ["transformers", "T5TokenizerFast"],
            }),
        );
        Self { folder }
    }

    fn model(&self) -> PathBuf {
        self.folder.path().join("with-t5")
    }
}

fn request(class: &str) -> PipelineRequest {
    sd3::request(class, MODELS.model())
}

fn without_t5(class: &str) -> PipelineRequest {
    let omitted = ["text_encoder_3", "tokenizer_3"].map(|name| (name.to_owned(), ComponentChoice::Omit));
    PipelineRequest { components: BTreeMap::from(omitted), ..request(class) }
}

fn steered(class: &str) -> PipelineRequest {
    let mut request = without_t5(class);
    let folder = MODELS.folder.path().join("controlnet");
    request.components.insert("controlnet".into(), components("SD3ControlNetModel", [folder]));
    request
}

/// Arguments with pictures of the fixtures in place of their names under `pictures`.
fn arguments(values: Value, pictures: &[(&str, &str)]) -> Arguments {
    let Value::Object(values) = values else { panic!("arguments are an object") };
    let mut arguments = Arguments { values, ..Arguments::default() };
    for (at, (name, file)) in pictures.iter().enumerate() {
        let picture = picture::load(&fixtures().join("inputs").join(file)).expect("the fixture is there");
        arguments.artifacts.insert(at as u64, Artifact::image(picture));
        arguments.values.insert((*name).to_owned(), ArtifactRef(at as u64).to_value());
    }
    arguments
}

fn bytes(entry: &Entry) -> Vec<u8> {
    match entry.artifacts.as_slice() {
        [Artifact::Image(picture)] => picture.to_rgb8().into_raw(),
        other => panic!("expected one picture, found {other:?}"),
    }
}

/// The picture of one call, by six of its bytes and the mean of all.
fn assert_picture(request: &PipelineRequest, arguments: &Arguments, seed: i128, expected: [u8; 6], mean: f64) {
    let mut pipeline = load(request).expect("the model is complete");
    let bytes = bytes(&run(&mut pipeline, arguments, seed).expect("the call is valid"));
    let found: Vec<u8> = (0..6).map(|i| bytes[i * (bytes.len() - 1) / 5]).collect();
    let is_close = found.iter().zip(&expected).all(|(found, expected)| found.abs_diff(*expected) <= 1);
    assert!(is_close, "{}: {found:?} is not {expected:?}", request.class);
    let found = bytes.iter().map(|byte| f64::from(*byte)).sum::<f64>() / bytes.len() as f64;
    assert!((found - mean).abs() < 0.02, "{}: the mean {found} is not {mean}", request.class);
}

const PROMPT: &str = "a cat sitting on a wooden table, watercolor";

#[test]
fn text_becomes_the_reference_picture_without_t5() {
    let call = json!({
        "prompt": PROMPT, "num_inference_steps": 3, "guidance_scale": 4.5, "height": 64, "width": 64,
        "output_type": "latent",
    });
    let mut pipeline = load(&without_t5("DiffusionPipeline")).expect("the model is complete");
    assert_eq!(pipeline.class(), "StableDiffusion3Pipeline");
    let entry = run(&mut pipeline, &arguments(call, &[]), 83).expect("the call is valid");
    let [Artifact::Array(latents)] = entry.artifacts.as_slice() else { panic!("latents were asked for") };
    let latents = Tensor::from_slice(&latents.data, latents.shape.as_slice(), &Device::Cpu).expect("they fit");
    let expected = [-2.841_200, 1.564_077, -3.149_535, 2.318_379, 3.078_349, -1.804_697];
    assert_values("latents", &latents, expected, 1.943_737);
}

#[test]
fn layers_are_skipped_for_guidance_as_in_the_reference() {
    let call = json!({
        "prompt": PROMPT, "negative_prompt": "blurry", "num_inference_steps": 6, "guidance_scale": 4.0, "height": 64,
        "width": 96, "max_sequence_length": 16, "skip_guidance_layers": [1], "skip_layer_guidance_stop": 0.5,
    });
    let request = without_t5("StableDiffusion3Pipeline");
    assert_picture(&request, &arguments(call, &[]), 4, [105, 131, 96, 68, 117, 138], 113.831);
}

#[test]
fn a_picture_becomes_another_as_in_the_reference() {
    let call = json!({
        "prompt": PROMPT, "strength": 0.5, "num_inference_steps": 5, "guidance_scale": 4.0, "max_sequence_length": 16,
    });
    let request = without_t5("AutoPipelineForImage2Image");
    let arguments = arguments(call, &[("image", "scene_64x64.png")]);
    assert_picture(&request, &arguments, 1, [123, 107, 104, 79, 139, 143], 117.453);
}

#[test]
fn a_part_of_a_picture_is_painted_as_in_the_reference() {
    let call = json!({
        "prompt": PROMPT, "strength": 0.8, "num_inference_steps": 4, "guidance_scale": 4.0, "height": 64, "width": 64,
        "max_sequence_length": 16,
    });
    let request = without_t5("StableDiffusion3InpaintPipeline");
    let arguments = arguments(call, &[("image", "scene_64x64.png"), ("mask_image", "mask_64x64.png")]);
    assert_picture(&request, &arguments, 2, [115, 110, 77, 61, 129, 154], 112.504);
}

#[test]
fn a_controlnet_steers_as_in_the_reference() {
    let call = json!({
        "prompt": PROMPT, "num_inference_steps": 3, "guidance_scale": 4.0, "height": 64, "width": 64,
        "controlnet_conditioning_scale": 0.7, "control_guidance_end": 0.7, "max_sequence_length": 16,
    });
    let request = steered("AutoPipelineForText2Image");
    let arguments = arguments(call, &[("control_image", "edges_64x64.png")]);
    assert_picture(&request, &arguments, 3, [112, 89, 58, 100, 112, 135], 112.799);
}

/// A call of two steps with other arguments on top.
fn short(more: Value) -> Arguments {
    let call = json!({ "prompt": "a cat", "num_inference_steps": 2, "height": 64, "width": 64 });
    arguments(with(with(call, json!({ "max_sequence_length": 6 })), more), &[])
}

#[test]
fn weights_in_a_prompt_reach_every_text_encoder() {
    let mut plain = load(&request("StableDiffusion3Pipeline")).expect("the model is complete");
    let weighted_request = PipelineRequest { prompt_weighting: true, ..request("StableDiffusion3Pipeline") };
    let mut weighted = load(&weighted_request).expect("the model is complete");
    let draw =
        |pipeline: &mut Pipeline, more: Value| bytes(&run(pipeline, &short(more), 1).expect("the call is valid"));
    assert_eq!(draw(&mut plain, json!({})), draw(&mut weighted, json!({})), "a prompt without weights is the same");
    let first = draw(&mut weighted, json!({ "prompt": "a (cat:1.6)", "prompt_3": "a cat" }));
    let third = draw(&mut weighted, json!({ "prompt_3": "a (cat:1.6)" }));
    assert_ne!(first, draw(&mut plain, json!({})));
    assert_ne!(third, draw(&mut plain, json!({})));
    assert_ne!(first, third);
}

#[test]
fn a_model_without_its_scheduler_is_refused() {
    let mut request = without_t5("StableDiffusion3Pipeline");
    request.components.insert("scheduler".into(), ComponentChoice::Omit);
    let message = refused(&request);
    assert!(message.contains("`scheduler`") && message.contains("left out"), "{message}");
}

#[test]
fn an_empty_second_prompt_stands_for_none_and_a_list_with_one_does_not() {
    let mut pipeline = load(&without_t5("StableDiffusion3Pipeline")).expect("the model is complete");
    let mut draw = |more: Value| bytes(&run(&mut pipeline, &short(more), 1).expect("the call is valid"));
    let plain = draw(json!({}));
    assert_eq!(draw(json!({ "prompt_2": "" })), plain);
    assert_eq!(draw(json!({ "prompt_2": ["a cat"] })), plain);
    assert_ne!(draw(json!({ "prompt_2": [""] })), plain);
}

#[test]
fn a_shift_that_the_scheduler_does_not_take_is_told() {
    let told = |scheduler: Value| {
        let Value::Object(config) = scheduler else { panic!("settings are an object") };
        let class = config["_class_name"].as_str().expect("a class").to_owned();
        let scheduler = Some(SchedulerRequest { class: Some(class), config, shift: None });
        let request = PipelineRequest { scheduler, ..without_t5("StableDiffusion3Pipeline") };
        let mut pipeline = load(&request).expect("the model is complete");
        let told = Mutex::new(String::new());
        let events = |event: Event| {
            if let Event::Warning { message } = event {
                told.lock().expect("unbroken").push_str(&message);
            }
        };
        let cancel = CancellationToken::default();
        let mut generators = Generators::from_seed(&Seed::One(1), NoiseDialect::Cpu);
        let context = Context { events: &events, cancel: &cancel };
        pipeline.run(&short(json!({ "mu": 0.5 })), &mut generators, context).expect("the call is valid");
        told.into_inner().expect("unbroken")
    };
    let fixed = told(json!({ "_class_name": "FlowMatchHeunDiscreteScheduler" }));
    assert!(fixed.contains("`mu` has no effect") && fixed.contains("`use_dynamic_shifting`"), "{fixed}");
    let dynamic = json!({ "_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": true });
    assert_eq!(told(dynamic), "");
}

#[test]
fn the_end_of_a_prompt_that_t5_cannot_read_is_told_and_changes_nothing() {
    let mut pipeline = load(&request("StableDiffusion3Pipeline")).expect("the model is complete");
    let messages = Mutex::new(Vec::new());
    let sink = |event: Event| {
        if let Event::Warning { message } = event {
            messages.lock().expect("no test panics here").push(message);
        }
    };
    let cancel = CancellationToken::default();
    let mut generators = Generators::from_seed(&Seed::One(1), NoiseDialect::Cpu);
    let long = short(json!({ "prompt_3": "a cat a cat a moon" }));
    let entry = pipeline.run(&long, &mut generators, Context { events: &sink, cancel: &cancel });
    let cut = run(&mut pipeline, &short(json!({ "prompt_3": "a cat a cat a" })), 1).expect("the call is valid");
    assert_eq!(bytes(&entry.expect("the call is valid")), bytes(&cut));
    let messages = messages.into_inner().expect("no test panics here");
    assert!(messages.iter().any(|message| message.contains("`moon`") && message.contains('6')), "{messages:?}");
}

#[test]
fn calls_that_cannot_be_run_are_refused_with_the_remedy() {
    let mut pipeline = load(&without_t5("StableDiffusion3Pipeline")).expect("the model is complete");
    let mut refused = |more: Value| run(&mut pipeline, &short(more), 1).expect_err("the call is wrong").to_string();
    let table = [
        (json!({ "width": 72 }), ["`width`", "`64` or `80`"]),
        (json!({ "max_sequence_length": 513 }), ["`max_sequence_length`", "at most 512"]),
        (json!({ "skip_guidance_layers": [3] }), ["`skip_guidance_layers`", "0 to 2"]),
        (json!({ "prompt": null }), ["`prompt`", "is missing"]),
        (json!({ "prompt_embeds": { "$artifact": 0 } }), ["`prompt`", "`prompt_embeds`"]),
        (json!({ "prompt": null, "prompt_2": "a", "prompt_embeds": { "$artifact": 0 } }), ["`prompt_2`", "combined"]),
        (json!({ "strength": 0.5 }), ["`strength`", "does not take it"]),
        (json!({ "prompt_3": ["a", "b"] }), ["`prompt_3`", "one for each prompt"]),
        (json!({ "clip_skip": 7 }), ["`clip_skip`", "smaller"]),
        (json!({ "sigmas": [] }), ["`sigmas`", "list"]),
    ];
    for (more, parts) in table {
        let message = refused(more);
        assert!(parts.iter().all(|part| message.contains(part)), "{message}");
    }
    let mut pipeline = load(&without_t5("StableDiffusion3Img2ImgPipeline")).expect("the model is complete");
    let call = json!({ "prompt": "a cat", "strength": -0.5 });
    let message = run(&mut pipeline, &arguments(call, &[("image", "scene_64x64.png")]), 1).expect_err("negative");
    assert!(message.to_string().contains("between 0 and 1"), "{message}");
}

fn refused(request: &PipelineRequest) -> String {
    load(request).err().map(|error| error.to_string()).expect("the model is wrong")
}

#[test]
fn parts_of_other_families_are_refused_before_they_are_read() {
    let message = refused(&request("StableDiffusionXLPipeline"));
    assert!(message.contains("`StableDiffusion3Pipeline`") && message.contains("`DiffusionPipeline`"), "{message}");

    let mut other = steered("StableDiffusion3ControlNetPipeline");
    let net = fixtures().join("models/sdxl-controlnet-a");
    other.components.insert("controlnet".into(), components("ControlNetModel", [net]));
    let message = refused(&other);
    assert!(message.contains("`controlnet`") && message.contains("`SD3ControlNetModel`"), "{message}");

    let net = MODELS.folder.path().join("other-controlnet");
    let settings = json!({ "_class_name": "SD3ControlNetModel", "num_attention_heads": 8 });
    write(&net, "config.json", &transformer_config(settings));
    fs_err::copy(MODELS.folder.path().join("controlnet/model.safetensors"), net.join("model.safetensors"))
        .expect("the folder is writable");
    other.components.insert("controlnet".into(), components("SD3ControlNetModel", [net]));
    let message = refused(&other);
    assert!(message.contains("64 features") && message.contains("made for this model"), "{message}");

    let message = refused(&without_t5("StableDiffusion3ControlNetPipeline"));
    assert!(message.contains("needs the component `controlnet`"), "{message}");

    let lora = LoraRequest {
        source: ModelSource::Folder(fixtures().join("models/adapters")),
        weight_name: Some("sdxl_lora_peft.safetensors".into()),
        subfolder: None,
        adapter_name: "a".into(),
        scale: 1.0,
    };
    let message = refused(&PipelineRequest { loras: vec![lora], ..without_t5("StableDiffusion3Pipeline") });
    assert!(message.contains("with a UNet") && message.contains("the model is Stable Diffusion 3"), "{message}");
}

#[test]
fn text_encoders_that_are_missing_or_of_another_model_are_named() {
    let mut request = without_t5("StableDiffusion3Pipeline");
    request.components.insert("text_encoder_2".into(), ComponentChoice::Omit);
    let mut pipeline = load(&request).expect("prompts may come encoded");
    let message = run(&mut pipeline, &short(json!({})), 1).expect_err("nothing encodes").to_string();
    assert!(message.contains("`prompt_embeds`") && message.contains("`text_encoder_2`"), "{message}");

    let folder = MODELS.folder.path().join("other-t5");
    let settings = with(t5_config(), json!({ "d_model": 48 }));
    write_component(&folder, &settings, weights("other/t5"), &|settings, weights| {
        drop(T5EncoderModel::new(&config(settings), weights).expect("made"));
    });
    let mut request = self::request("StableDiffusion3Pipeline");
    request.components.insert("text_encoder_3".into(), components("T5EncoderModel", [folder]));
    let message = refused(&request);
    assert!(message.contains("`text_encoder_3`") && message.contains("48") && message.contains("80"), "{message}");
}

#[test]
fn a_lora_changes_transformer_and_text_encoder_by_its_scale() {
    let folder = MODELS.folder.path().join("lora");
    fs_err::create_dir_all(&folder).expect("the folder is writable");
    let modules = [
        ("transformer.transformer_blocks.1.attn.add_k_proj", 32),
        ("transformer.transformer_blocks.0.attn2.to_out.0", 32),
        ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", 32),
    ];
    let pair = |(at, (module, size)): (usize, (&str, usize))| {
        let down = (format!("{module}.lora_A.weight"), drawn(at as i128, (4, size)));
        [down, (format!("{module}.lora_B.weight"), drawn(9 + at as i128, (size, 4)))]
    };
    let tensors = modules.into_iter().enumerate().flat_map(pair).collect();
    candle_core::safetensors::save(&tensors, folder.join("lora.safetensors")).expect("the folder is writable");
    let lora = LoraRequest {
        source: ModelSource::Folder(folder),
        weight_name: Some("lora.safetensors".into()),
        subfolder: None,
        adapter_name: "a".into(),
        scale: 0.8,
    };
    let mut plain = load(&without_t5("StableDiffusion3Pipeline")).expect("the model is complete");
    let adapted = PipelineRequest { loras: vec![lora], ..without_t5("StableDiffusion3Pipeline") };
    let mut adapted = load(&adapted).expect("the LoRA fits");
    let draw = |pipeline: &mut Pipeline, scale: f64| {
        let call = short(json!({ "joint_attention_kwargs": { "scale": scale } }));
        bytes(&run(pipeline, &call, 1).expect("the call is valid"))
    };
    let without = draw(&mut plain, 1.0);
    assert_ne!(draw(&mut adapted, 1.0), without);
    assert_eq!(draw(&mut adapted, 0.0), without);
}

#[test]
fn steps_are_skipped_as_the_rule_says_and_the_count_is_told() {
    let call = arguments(
        json!({
            "prompt": PROMPT, "num_inference_steps": 6, "guidance_scale": 4.5, "height": 64, "width": 64,
        }),
        &[],
    );
    let mut pipeline = load(&without_t5("StableDiffusion3Pipeline")).expect("the model is complete");
    let plain = bytes(&run(&mut pipeline, &call, 7).expect("the call is valid"));
    let mut told = |rule| {
        assert!(pipeline.reuse_steps(Some(rule)));
        let told = Mutex::new(Vec::new());
        let events = |event: Event| {
            if let Event::Warning { message } = event {
                told.lock().expect("unbroken").push(message);
            }
        };
        let cancel = CancellationToken::default();
        let mut generators = Generators::from_seed(&Seed::One(7), NoiseDialect::Cpu);
        let context = Context { events: &events, cancel: &cancel };
        let entry = pipeline.run(&call, &mut generators, context).expect("the call is valid");
        (bytes(&entry), told.into_inner().expect("unbroken").join("; "))
    };
    let (picture, never) = told(Reuse::FirstBlock { threshold: 0.0 });
    assert!(never.contains("none of 6") && picture == plain, "{never}");
    let (picture, always) = told(Reuse::FirstBlock { threshold: 1e6 });
    assert!(always.contains("5 of 6") && picture != plain, "{always}");
    // The first and last step are computed.
    let (_, tea) = told(Reuse::Tea { threshold: 1e9, coefficients: Reuse::UNFITTED });
    assert!(tea.contains("4 of 6"), "{tea}");
}
