//! Reading LoRA files: every dialect becomes the same changes.

use std::{collections::HashMap, path::PathBuf};

use candle_core::{DType, Device, safetensors};
use dw_core::{cancel::CancellationToken, event::Silent};

use super::*;
use crate::{adapters::file::Place, hub::Hub, request::Context, request::ModelSource};

/// A file in the temporary folder that goes when the test ends.
struct Written(PathBuf);

impl Written {
    fn new(test: &str, tensors: &[(&str, &[usize])]) -> Self {
        let path = std::env::temp_dir().join(format!("dw-lora-{test}-{}.safetensors", std::process::id()));
        let ones = |shape: &[usize]| Tensor::ones(shape, DType::F32, &Device::Cpu).expect("ones");
        let tensors: HashMap<&str, Tensor> = tensors.iter().map(|(name, shape)| (*name, ones(shape))).collect();
        safetensors::save(&tensors, &path).expect("the temporary folder is writable");
        Self(path)
    }

    fn file(&self) -> AdapterFile {
        let hub = Hub { cache: PathBuf::new(), endpoint: String::new(), token: None, offline: true };
        let cancel = CancellationToken::default();
        let source = ModelSource::Folder(self.0.clone());
        let place = Place { source: &source, subfolder: None, weight_name: None };
        AdapterFile::find(place, &hub, Context { events: &Silent, cancel: &cancel }).expect("the file is there")
    }
}

impl Drop for Written {
    fn drop(&mut self) {
        // A file left in the temporary folder does no harm.
        let _ = std::fs::remove_file(&self.0);
    }
}

const TO_Q: &str = "up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q";
const TO_K: &str = "up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k";

/// A component with two layers of `(8, 8)` and `(8, 6)`, without biases.
fn unet() -> Weights {
    let ones = |shape: (usize, usize)| Tensor::ones(shape, DType::F32, &Device::Cpu).expect("ones");
    let tensors = HashMap::from([(format!("{TO_Q}.weight"), ones((8, 8))), (format!("{TO_K}.weight"), ones((8, 6)))]);
    Weights::from_tensors(tensors, "unet")
}

fn check_unet(file: &AdapterFile) -> Result<()> {
    check(file, Denoiser::Unet)
}

/// What applying the file to [`unet`] says: nothing, a warning, or an error.
fn applied(test: &str, tensors: &[(&str, &[usize])]) -> Result<Option<String>, String> {
    let written = Written::new(test, tensors);
    let lora = Lora::read(&written.file()).map_err(|error| error.to_string())?;
    let weights = unet();
    let mut unmatched = lora.left_out(&[("unet", &weights)]);
    let plan = lora.plan("unet", &weights, &mut unmatched).map_err(|error| error.to_string())?;
    lora.report(&[plan], &unmatched).map_err(|error| error.to_string())
}

#[test]
fn a_file_that_matches_in_full_says_nothing() {
    let (down, up) = (format!("unet.{TO_Q}.lora_A.weight"), format!("unet.{TO_Q}.lora_B.weight"));
    assert_eq!(applied("full", &[(&down, &[2, 8]), (&up, &[8, 2])]), Ok(None));
}

#[test]
fn tensors_that_belong_to_nothing_are_counted_and_named_in_a_warning() {
    let (down, up) = (format!("unet.{TO_Q}.lora_A.weight"), format!("unet.{TO_Q}.lora_B.weight"));
    let bias = format!("unet.{TO_Q}.diff_b");
    let others: [(&str, &[usize]); 5] = [
        (&down, &[2, 8]),
        (&up, &[8, 2]),
        (&bias, &[8]),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1.diff", &[8, 8]),
        ("something.else", &[1]),
    ];
    let warning = applied("some", &others).expect("two tensors match").expect("three do not");
    assert!(warning.contains("2 tensor(s) were applied") && warning.contains("3 belong to nothing"), "{warning}");
    assert!(warning.contains("`something.else`") && warning.contains(&bias), "{warning}");
}

#[test]
fn a_file_of_which_nothing_matches_is_an_error_with_the_family_it_seems_to_be_for() {
    let name = "down_blocks_7_attentions_0_transformer_blocks_0_attn2_to_k";
    let (down, up) = (format!("lora_unet_{name}.lora_down.weight"), format!("lora_unet_{name}.lora_up.weight"));
    let error = applied("none", &[(&down, &[2, 768]), (&up, &[8, 2])]).expect_err("nothing matches");
    assert!(error.contains("none of its 2 tensor(s)") && error.contains("Stable Diffusion 1.x"), "{error}");
}

#[test]
fn a_tensor_of_the_wrong_shape_is_an_error_with_both_shapes() {
    let (down, up) = (format!("unet.{TO_K}.lora_A.weight"), format!("unet.{TO_K}.lora_B.weight"));
    let error = applied("shape", &[(&down, &[2, 2048]), (&up, &[8, 2])]).expect_err("the model reads 6 features");
    for part in [&format!("`{down}` [2, 2048]"), "[8, 2048]", &format!("`{TO_K}`"), "[8, 6]", "Stable Diffusion XL"] {
        assert!(error.contains(part), "`{part}` is not in: {error}");
    }
}

#[test]
fn half_a_module_is_an_error() {
    let down = format!("unet.{TO_Q}.lora_A.weight");
    let error = applied("half", &[(&down, &[2, 8])]).expect_err("the other half is missing");
    assert!(error.contains("part of a module") && error.contains(&down), "{error}");
}

#[test]
fn files_for_other_models_or_of_another_kind_are_refused_before_anything_is_loaded() {
    let checked = |test: &str, name: &str| {
        let written = Written::new(test, &[(name, &[2, 2])]);
        check_unet(&written.file()).map_err(|error| error.to_string())
    };
    let flux = checked("flux", "transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight");
    assert!(flux.expect_err("no UNet").contains("made for Flux"));
    let other = checked("vector", "emb_params").expect_err("no LoRA");
    assert!(other.contains("holds no LoRA") && other.contains("`emb_params`"), "{other}");
    assert_eq!(checked("fitting", &format!("unet.{TO_Q}.lora_A.weight")), Ok(()));
    let broken = Written::new("broken", &[]);
    std::fs::write(&broken.0, b"not a safetensors file at all").expect("the temporary folder is writable");
    let message = check_unet(&broken.file()).expect_err("corrupt").to_string();
    assert!(message.contains("not a valid safetensors file"), "{message}");
}

/// The layers of a Flux with one block of each kind and 8 features, each with other numbers.
fn flux() -> Weights {
    let (double, single) = ("transformer_blocks.0", "single_transformer_blocks.0");
    let mut layers: Vec<(String, usize, usize)> = ["to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"]
        .map(|name| (format!("{double}.attn.{name}"), 8, 8))
        .to_vec();
    layers.extend(["to_q", "to_k", "to_v"].map(|name| (format!("{single}.attn.{name}"), 8, 8)));
    layers.push((format!("{single}.proj_mlp"), 32, 8));
    layers.push((format!("{single}.proj_out"), 8, 40));
    layers.push(("x_embedder".into(), 8, 4));
    layers.push(("norm_out.linear".into(), 16, 8));
    let mut tensors = HashMap::new();
    for (number, (layer, rows, columns)) in layers.into_iter().enumerate() {
        tensors.insert(format!("{layer}.weight"), numbers(&[rows, columns], number));
        tensors.insert(format!("{layer}.bias"), numbers(&[rows], number));
    }
    tensors.insert(format!("{double}.attn.norm_q.weight"), numbers(&[4], 99));
    Weights::from_tensors(tensors, "flux")
}

fn numbers(shape: &[usize], seed: usize) -> Tensor {
    let count = shape.iter().product::<usize>();
    let values: Vec<f32> = (0..count).map(|at| ((at * 5 + seed * 3 + at * at) % 11) as f32 / 4.0 - 1.0).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).expect("as many values as the shape has")
}

/// The weights of [`flux`] with a file of these tensors put on.
fn adapted(test: &str, tensors: HashMap<String, Tensor>) -> Weights {
    let written = Written::new(test, &[]);
    safetensors::save(&tensors, &written.0).expect("the temporary folder is writable");
    let told = std::sync::Mutex::new(Vec::new());
    let sink = |event: Event| told.lock().expect("no sink panics").push(event);
    let cancel = CancellationToken::default();
    let context = Context { events: &sink, cancel: &cancel };
    let lora = Lora::read(&written.file()).expect("valid");
    let adapted = lora.put_on("transformer", &flux(), 0.5, context).expect("the file fits");
    assert_eq!(told.lock().expect("no sink panics").len(), 0, "every tensor has a place");
    adapted
}

fn assert_same(found: &Weights, expected: &Weights) {
    let mut names: Vec<&str> = expected.names().collect();
    names.sort_unstable();
    for name in names {
        let (found, expected) = (values_of(found, name), values_of(expected, name));
        assert_eq!(found.len(), expected.len(), "{name}");
        assert!(found.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-5), "{name}");
    }
}

/// The numbers of a tensor, with what stands beside it.
fn values_of(weights: &Weights, name: &str) -> Vec<f32> {
    let mut tensor = weights.find(name).expect("readable").expect("both have it");
    for branch in weights.branches(name) {
        tensor = branch.delta().and_then(|delta| Ok((tensor + delta)?)).expect("of one shape");
    }
    tensor.flatten_all().and_then(|tensor| tensor.to_vec1::<f32>()).expect("f32 values")
}

/// A low-rank change of a fused layer, and the same of the layers it consists of.
fn fused_and_split(fused: [&str; 2], split: &[(&str, usize)], columns: usize) -> [HashMap<String, Tensor>; 2] {
    let rows = split.iter().map(|(_, rows)| rows).sum();
    let (down, up) = (numbers(&[3, columns], 5), numbers(&[rows, 3], 6));
    let mut parts = HashMap::new();
    let mut start = 0;
    for (name, rows) in split {
        parts.insert(format!("transformer.{name}.lora_A.weight"), down.clone());
        let up = up.narrow(0, start, *rows).and_then(|up| up.contiguous()).expect("inside");
        parts.insert(format!("transformer.{name}.lora_B.weight"), up);
        start += rows;
    }
    let [down_name, up_name] = fused.map(str::to_owned);
    [HashMap::from([(down_name, down), (up_name, up)]), parts]
}

#[test]
fn a_fused_layer_changes_like_the_layers_it_consists_of() {
    let (double, single) = ("transformer_blocks.0.attn", "single_transformer_blocks.0");
    let split = |names: [&str; 3]| names.map(|name| format!("{double}.{name}"));
    let text = split(["add_q_proj", "add_k_proj", "add_v_proj"]);
    let single_parts = ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"].map(|name| format!("{single}.{name}"));
    let text: Vec<(&str, usize)> = text.iter().map(|name| (name.as_str(), 8)).collect();
    let parts: Vec<(&str, usize)> = single_parts.iter().map(String::as_str).zip([8, 8, 8, 32]).collect();
    let kohya = "lora_unet_single_blocks_0_linear1";
    let kohya = [format!("{kohya}.lora_down.weight"), format!("{kohya}.lora_up.weight")];
    let xlabs = "double_blocks.0.processor.qkv_lora2";
    let xlabs = [format!("{xlabs}.down.weight"), format!("{xlabs}.up.weight")];
    let xlabs_single = "single_blocks.0.processor.qkv_lora";
    let xlabs_single = [format!("{xlabs_single}.down.weight"), format!("{xlabs_single}.up.weight")];
    let comfy = "diffusion_model.double_blocks.0.txt_attn.qkv";
    let comfy = [format!("{comfy}.lora_A.weight"), format!("{comfy}.lora_B.weight")];
    for (at, (names, split)) in
        [(kohya, &parts[..]), (xlabs, &text), (xlabs_single, &parts[..3]), (comfy, &text)].into_iter().enumerate()
    {
        let [fused, split] = fused_and_split(names.each_ref().map(String::as_str), split, 8);
        let (fused, split) = (adapted(&format!("fused{at}"), fused), adapted(&format!("split{at}"), split));
        assert_same(&fused, &split);
    }
}

#[test]
fn a_control_lora_replaces_norms_shifts_biases_and_brings_inputs() {
    let modulation = "final_layer.adaLN_modulation.1";
    let norm = numbers(&[4], 7);
    let tensors = HashMap::from([
        ("double_blocks.0.img_attn.norm.query_norm.scale".to_owned(), norm.clone()),
        ("img_in.lora_A.weight".to_owned(), numbers(&[2, 6], 1)),
        ("img_in.lora_B.weight".to_owned(), numbers(&[8, 2], 2)),
        (format!("{modulation}.lora_A.weight"), numbers(&[2, 8], 3)),
        (format!("{modulation}.lora_B.weight"), numbers(&[16, 2], 4)),
        (format!("{modulation}.lora_B.bias"), numbers(&[16], 5)),
    ]);
    let (base, found) = (flux(), adapted("control", tensors));
    let written = |tensor: &Tensor| tensor.flatten_all().and_then(|tensor| tensor.to_vec1::<f32>()).expect("values");
    assert_eq!(values_of(&found, "transformer_blocks.0.attn.norm_q.weight"), written(&norm), "at any strength");
    let product = numbers(&[8, 2], 2).matmul(&numbers(&[2, 6], 1)).expect("they fit");
    let product = product.to_vec2::<f32>().expect("a matrix");
    let (wide, narrow) = (values_of(&found, "x_embedder.weight"), values_of(&base, "x_embedder.weight"));
    for row in 0..8 {
        for column in 0..6 {
            let own = if column < 4 { narrow[row * 4 + column] } else { 0.0 };
            assert!((wide[row * 6 + column] - own - 0.5 * product[row][column]).abs() < 1e-5, "{row} {column}");
        }
    }
    // The halves of the modulation change places.
    let shift = written(&numbers(&[16], 5));
    let (bias, own) = (values_of(&found, "norm_out.linear.bias"), values_of(&base, "norm_out.linear.bias"));
    for row in 0..16 {
        assert!((bias[row] - own[row] - 0.5 * shift[(row + 8) % 16]).abs() < 1e-5, "{row}");
    }
}

#[test]
fn a_plain_change_of_a_layer_stands_beside_it_and_one_of_a_table_does_not() {
    let (layer, table) = ("transformer_blocks.0.attn.to_q", "token_embedding");
    let weights = flux();
    let tensors = [(format!("{table}.weight"), numbers(&[6, 8], 3))].into();
    let weights = weights.replacing(tensors).expect("a new name");
    let mut changed = HashMap::new();
    for (name, rows) in [(layer, 8), (table, 6)] {
        changed.insert(format!("transformer.{name}.lora_A.weight"), numbers(&[2, 8], 1));
        changed.insert(format!("transformer.{name}.lora_B.weight"), numbers(&[rows, 2], 2));
    }
    let written = Written::new("beside", &[]);
    safetensors::save(&changed, &written.0).expect("the temporary folder is writable");
    let lora = Lora::read(&written.file()).expect("valid");
    let cancel = CancellationToken::default();
    let context = Context { events: &Silent, cancel: &cancel };
    let adapted = lora.put_on("transformer", &weights, 0.5, context).expect("the file fits");
    for (name, branches) in [(layer, 1), (table, 0)] {
        let name = format!("{name}.weight");
        assert_eq!(adapted.branches(&name).len(), branches, "{name}");
        assert_ne!(values_of(&adapted, &name), values_of(&weights, &name), "{name}");
    }
}

#[test]
fn files_for_the_other_transformer_are_refused_by_their_names() {
    let said = |test: &str, name: &str, denoiser: Denoiser| {
        let written = Written::new(test, &[(name, &[2, 2])]);
        check(&written.file(), denoiser).map_err(|error| error.to_string())
    };
    let flux = "transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight";
    let sd3 = "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight";
    let either = "transformer.transformer_blocks.0.attn.to_k.lora_A.weight";
    let unet = "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight";
    for (at, (name, denoiser, expected)) in [
        (flux, Denoiser::StableDiffusion3, "made for Flux, and the model is Stable Diffusion 3"),
        (sd3, Denoiser::Flux, "made for Stable Diffusion 3, and the model is Flux"),
        (unet, Denoiser::Flux, "made for a Stable Diffusion with a UNet, and the model is Flux"),
        (either, Denoiser::Unet, "made for a diffusion transformer"),
    ]
    .into_iter()
    .enumerate()
    {
        let message = said(&format!("other{at}"), name, denoiser).expect_err("another family");
        assert!(message.contains(expected), "{message}");
    }
    assert_eq!(said("either", either, Denoiser::Flux), Ok(()));
    assert_eq!(said("either3", either, Denoiser::StableDiffusion3), Ok(()));
    assert_eq!(said("own", flux, Denoiser::Flux), Ok(()));
}

/// The first layer of a Flux transformer that sees as much beside the latents, and one of its blocks.
fn control_transformer() -> Weights {
    let ones = |shape: (usize, usize)| Tensor::ones(shape, DType::F32, &Device::Cpu).expect("ones");
    let names = [("x_embedder", (4, 6)), ("single_transformer_blocks.0.attn.to_q", (4, 4))];
    let tensors = names.map(|(name, shape)| (format!("{name}.weight"), ones(shape)));
    Weights::from_tensors(HashMap::from(tensors), "transformer")
}

#[test]
fn the_first_layer_of_a_model_with_more_inputs_takes_a_change_for_the_latents() {
    let names = ["transformer.x_embedder.lora_A.weight", "transformer.x_embedder.lora_B.weight"];
    let written = Written::new("narrow", &[(names[0], &[2, 3]), (names[1], &[4, 2])]);
    let lora = Lora::read(&written.file()).expect("a LoRA");
    let weights = control_transformer();
    let cancel = CancellationToken::default();
    let context = Context { events: &Silent, cancel: &cancel };
    let changed = lora.put_on("transformer", &weights, 1.0, context).expect("it fits");
    let layer = changed.pp("x_embedder").linear(6, 4, false).expect("the layer");
    let ones = Tensor::ones((1, 6), DType::F32, &Device::Cpu).expect("ones");
    let out = layer.forward(&ones).and_then(|out| Ok(out.flatten_all()?.to_vec1::<f32>()?)).expect("numbers");
    // Six ones of the layer itself, and twice three of the change, which sees the first three inputs only.
    assert_eq!(out, [12.0; 4]);

    let other = "transformer.single_transformer_blocks.0.attn.to_q";
    let names = [format!("{other}.lora_A.weight"), format!("{other}.lora_B.weight")];
    let written = Written::new("narrow-block", &[(&names[0], &[2, 3]), (&names[1], &[4, 2])]);
    let lora = Lora::read(&written.file()).expect("a LoRA");
    let refused = lora.put_on("transformer", &weights, 1.0, context).err().expect("a misfit").to_string();
    assert!(refused.contains("[4, 3]") && refused.contains("[4, 4]"), "{refused}");
}

#[test]
fn a_whole_model_is_no_lora_though_it_has_norms() {
    let norm = "double_blocks.0.img_attn.norm.query_norm.scale";
    let model = Written::new("model", &[(norm, &[4]), ("double_blocks.0.img_attn.qkv.weight", &[12, 4])]);
    let message = check(&model.file(), Denoiser::Flux).expect_err("a model").to_string();
    assert!(message.contains("holds no LoRA"), "{message}");
    let norms = Written::new("norms", &[(norm, &[4])]);
    assert!(check(&norms.file(), Denoiser::Flux).is_ok(), "norms alone are a change");
}
