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
