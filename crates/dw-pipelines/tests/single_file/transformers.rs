//! Diffusion transformers in single files: tiny ones, written in the layout of the original code block by block, so that
//! nothing is shared with the maps under test, must load as the very same tensors.

use candle_core::{DType, Device, Tensor};
use dw_pipelines::request::ModelSource;
use serde_json::{Value, json};

use super::{TempFolder, assert_identical, complaint, open, original::Tensors, request, single, weights};

const WIDTH: usize = 32;
const TEXT: usize = 48;

/// Canonical tensors with numbers that differ everywhere.
struct Canonical(Tensors);

impl Canonical {
    fn put(&mut self, name: &str, shape: &[usize]) {
        let (first, count) = (self.0.len() as f32, shape.iter().product::<usize>());
        let values: Vec<f32> = (0..count).map(|at| first + at as f32 / count as f32).collect();
        let tensor = Tensor::from_vec(values, shape, &Device::Cpu).expect("as many values as the shape has");
        self.0.insert(name.to_owned(), tensor);
    }

    fn linear(&mut self, name: &str, out: usize, input: usize) {
        self.put(&format!("{name}.weight"), &[out, input]);
        self.put(&format!("{name}.bias"), &[out]);
    }
}

/// Writes canonical tensors under original names.
struct Original<'a> {
    canonical: &'a Tensors,
    tensors: Tensors,
}

impl Original<'_> {
    fn tensor(&mut self, original: &str, canonical: &str) {
        self.tensors.insert(original.to_owned(), self.canonical[canonical].clone());
    }

    /// A layer whose rows are those of several.
    fn fused(&mut self, original: &str, canonical: &[String]) {
        for kind in ["weight", "bias"] {
            let parts: Vec<&Tensor> = canonical.iter().map(|name| &self.canonical[&format!("{name}.{kind}")]).collect();
            let fused = Tensor::cat(&parts, 0).expect("of one width");
            self.tensors.insert(format!("{original}.{kind}"), fused);
        }
    }

    fn layer(&mut self, original: &str, canonical: &str) {
        self.fused(original, &[canonical.to_owned()]);
    }

    /// A modulation whose halves are the other way round.
    fn swapped(&mut self, original: &str, canonical: &str) {
        for kind in ["weight", "bias"] {
            let halves = self.canonical[&format!("{canonical}.{kind}")].chunk(2, 0).expect("an even number of rows");
            let swapped = Tensor::cat(&[&halves[1], &halves[0]], 0).expect("of one width");
            self.tensors.insert(format!("{original}.{kind}"), swapped);
        }
    }
}

fn embedders(canonical: &mut Canonical, names: &[(&str, usize)]) {
    for (name, input) in names {
        canonical.linear(&format!("time_text_embed.{name}.linear_1"), WIDTH, *input);
        canonical.linear(&format!("time_text_embed.{name}.linear_2"), WIDTH, WIDTH);
    }
    canonical.linear("context_embedder", WIDTH, TEXT);
    canonical.linear("norm_out.linear", 2 * WIDTH, WIDTH);
    canonical.linear("proj_out", 64, WIDTH);
}

/// A Flux with one block of each kind.
fn flux() -> Tensors {
    let mut canonical = Canonical(Tensors::new());
    embedders(&mut canonical, &[("timestep_embedder", 256), ("text_embedder", 24), ("guidance_embedder", 256)]);
    canonical.linear("x_embedder", WIDTH, 64);
    let (double, single) = ("transformer_blocks.0", "single_transformer_blocks.0");
    for name in ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"] {
        canonical.linear(&format!("{double}.attn.{name}"), WIDTH, WIDTH);
    }
    for name in ["norm_q", "norm_k", "norm_added_q", "norm_added_k"] {
        canonical.put(&format!("{double}.attn.{name}.weight"), &[16]);
    }
    for stream in ["", "_context"] {
        canonical.linear(&format!("{double}.norm1{stream}.linear"), 6 * WIDTH, WIDTH);
        canonical.linear(&format!("{double}.ff{stream}.net.0.proj"), 4 * WIDTH, WIDTH);
        canonical.linear(&format!("{double}.ff{stream}.net.2"), WIDTH, 4 * WIDTH);
    }
    for name in ["to_q", "to_k", "to_v"] {
        canonical.linear(&format!("{single}.attn.{name}"), WIDTH, WIDTH);
    }
    for name in ["norm_q", "norm_k"] {
        canonical.put(&format!("{single}.attn.{name}.weight"), &[16]);
    }
    canonical.linear(&format!("{single}.norm.linear"), 3 * WIDTH, WIDTH);
    canonical.linear(&format!("{single}.proj_mlp"), 4 * WIDTH, WIDTH);
    canonical.linear(&format!("{single}.proj_out"), WIDTH, 5 * WIDTH);
    canonical.0
}

fn flux_in_original_names(canonical: &Tensors, prefix: &str) -> Tensors {
    let mut original = Original { canonical, tensors: Tensors::new() };
    for (from, to) in [("time_in", "timestep"), ("vector_in", "text"), ("guidance_in", "guidance")] {
        original.layer(&format!("{prefix}{from}.in_layer"), &format!("time_text_embed.{to}_embedder.linear_1"));
        original.layer(&format!("{prefix}{from}.out_layer"), &format!("time_text_embed.{to}_embedder.linear_2"));
    }
    original.layer(&format!("{prefix}img_in"), "x_embedder");
    original.layer(&format!("{prefix}txt_in"), "context_embedder");
    original.layer(&format!("{prefix}final_layer.linear"), "proj_out");
    original.swapped(&format!("{prefix}final_layer.adaLN_modulation.1"), "norm_out.linear");
    let (block, to) = (format!("{prefix}double_blocks.0"), "transformer_blocks.0");
    for (stream, projections, output, context, norms) in [
        ("img", ["to_q", "to_k", "to_v"], "to_out.0", "", ["norm_q", "norm_k"]),
        ("txt", ["add_q_proj", "add_k_proj", "add_v_proj"], "to_add_out", "_context", ["norm_added_q", "norm_added_k"]),
    ] {
        original.fused(&format!("{block}.{stream}_attn.qkv"), &projections.map(|name| format!("{to}.attn.{name}")));
        original.layer(&format!("{block}.{stream}_attn.proj"), &format!("{to}.attn.{output}"));
        original.layer(&format!("{block}.{stream}_mod.lin"), &format!("{to}.norm1{context}.linear"));
        original.layer(&format!("{block}.{stream}_mlp.0"), &format!("{to}.ff{context}.net.0.proj"));
        original.layer(&format!("{block}.{stream}_mlp.2"), &format!("{to}.ff{context}.net.2"));
        for (name, norm) in [("query", norms[0]), ("key", norms[1])] {
            original
                .tensor(&format!("{block}.{stream}_attn.norm.{name}_norm.scale"), &format!("{to}.attn.{norm}.weight"));
        }
    }
    let (block, to) = (format!("{prefix}single_blocks.0"), "single_transformer_blocks.0");
    let parts = ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"].map(|name| format!("{to}.{name}"));
    original.fused(&format!("{block}.linear1"), &parts);
    original.layer(&format!("{block}.linear2"), &format!("{to}.proj_out"));
    original.layer(&format!("{block}.modulation.lin"), &format!("{to}.norm.linear"));
    for (name, norm) in [("query", "norm_q"), ("key", "norm_k")] {
        original.tensor(&format!("{block}.norm.{name}_norm.scale"), &format!("{to}.attn.{norm}.weight"));
    }
    original.tensors
}

/// A Stable Diffusion 3.5 with two blocks, the first with a second attention.
fn sd3() -> Tensors {
    let mut canonical = Canonical(Tensors::new());
    embedders(&mut canonical, &[("timestep_embedder", 256), ("text_embedder", 24)]);
    canonical.put("pos_embed.pos_embed", &[1, 36, WIDTH]);
    canonical.put("pos_embed.proj.weight", &[WIDTH, 16, 2, 2]);
    canonical.put("pos_embed.proj.bias", &[WIDTH]);
    for (block, is_last) in [("transformer_blocks.0", false), ("transformer_blocks.1", true)] {
        for name in ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj"] {
            canonical.linear(&format!("{block}.attn.{name}"), WIDTH, WIDTH);
        }
        for name in ["norm_q", "norm_k", "norm_added_q", "norm_added_k"] {
            canonical.put(&format!("{block}.attn.{name}.weight"), &[8]);
        }
        canonical.linear(&format!("{block}.norm1.linear"), if is_last { 6 } else { 9 } * WIDTH, WIDTH);
        canonical.linear(&format!("{block}.norm1_context.linear"), if is_last { 2 } else { 6 } * WIDTH, WIDTH);
        canonical.linear(&format!("{block}.ff.net.0.proj"), 4 * WIDTH, WIDTH);
        canonical.linear(&format!("{block}.ff.net.2"), WIDTH, 4 * WIDTH);
        if !is_last {
            for name in ["to_q", "to_k", "to_v", "to_out.0"] {
                canonical.linear(&format!("{block}.attn2.{name}"), WIDTH, WIDTH);
            }
            for name in ["norm_q", "norm_k"] {
                canonical.put(&format!("{block}.attn2.{name}.weight"), &[8]);
            }
            canonical.linear(&format!("{block}.attn.to_add_out"), WIDTH, WIDTH);
            canonical.linear(&format!("{block}.ff_context.net.0.proj"), 4 * WIDTH, WIDTH);
            canonical.linear(&format!("{block}.ff_context.net.2"), WIDTH, 4 * WIDTH);
        }
    }
    canonical.0
}

fn sd3_in_original_names(canonical: &Tensors, prefix: &str) -> Tensors {
    let mut original = Original { canonical, tensors: Tensors::new() };
    for (from, to) in [("t_embedder", "timestep"), ("y_embedder", "text")] {
        original.layer(&format!("{prefix}{from}.mlp.0"), &format!("time_text_embed.{to}_embedder.linear_1"));
        original.layer(&format!("{prefix}{from}.mlp.2"), &format!("time_text_embed.{to}_embedder.linear_2"));
    }
    original.tensor(&format!("{prefix}pos_embed"), "pos_embed.pos_embed");
    original.layer(&format!("{prefix}x_embedder.proj"), "pos_embed.proj");
    original.layer(&format!("{prefix}context_embedder"), "context_embedder");
    original.layer(&format!("{prefix}final_layer.linear"), "proj_out");
    original.swapped(&format!("{prefix}final_layer.adaLN_modulation.1"), "norm_out.linear");
    for (number, is_last) in [(0, false), (1, true)] {
        let to = format!("transformer_blocks.{number}");
        let image = format!("{prefix}joint_blocks.{number}.x_block");
        let text = format!("{prefix}joint_blocks.{number}.context_block");
        let parts = |attention: &str, names: [&str; 3]| names.map(|name| format!("{to}.{attention}.{name}"));
        original.fused(&format!("{image}.attn.qkv"), &parts("attn", ["to_q", "to_k", "to_v"]));
        original.fused(&format!("{text}.attn.qkv"), &parts("attn", ["add_q_proj", "add_k_proj", "add_v_proj"]));
        original.layer(&format!("{image}.attn.proj"), &format!("{to}.attn.to_out.0"));
        for (name, own) in [("q", "norm_q"), ("k", "norm_k")] {
            original.tensor(&format!("{image}.attn.ln_{name}.weight"), &format!("{to}.attn.{own}.weight"));
        }
        for (name, own) in [("q", "norm_added_q"), ("k", "norm_added_k")] {
            original.tensor(&format!("{text}.attn.ln_{name}.weight"), &format!("{to}.attn.{own}.weight"));
        }
        original.layer(&format!("{image}.adaLN_modulation.1"), &format!("{to}.norm1.linear"));
        original.layer(&format!("{image}.mlp.fc1"), &format!("{to}.ff.net.0.proj"));
        original.layer(&format!("{image}.mlp.fc2"), &format!("{to}.ff.net.2"));
        let modulation = format!("{text}.adaLN_modulation.1");
        if is_last {
            original.swapped(&modulation, &format!("{to}.norm1_context.linear"));
            continue;
        }
        original.layer(&modulation, &format!("{to}.norm1_context.linear"));
        original.fused(&format!("{image}.attn2.qkv"), &parts("attn2", ["to_q", "to_k", "to_v"]));
        original.layer(&format!("{image}.attn2.proj"), &format!("{to}.attn2.to_out.0"));
        for (name, own) in [("q", "norm_q"), ("k", "norm_k")] {
            original.tensor(&format!("{image}.attn2.ln_{name}.weight"), &format!("{to}.attn2.{own}.weight"));
        }
        original.layer(&format!("{text}.attn.proj"), &format!("{to}.attn.to_add_out"));
        original.layer(&format!("{text}.mlp.fc1"), &format!("{to}.ff_context.net.0.proj"));
        original.layer(&format!("{text}.mlp.fc2"), &format!("{to}.ff_context.net.2"));
    }
    original.tensors
}

/// Loads the transformer of a file, with this configuration beside it.
fn assert_loads(tensors: &Tensors, config: &Value, expected: &Tensors) {
    let (folder, model) = (TempFolder::new(), TempFolder::new());
    std::fs::create_dir_all(model.0.join("transformer")).expect("the temporary folder is writable");
    std::fs::write(model.0.join("transformer/config.json"), config.to_string()).expect("the folder is writable");
    let config = Some(Box::new(ModelSource::Folder(model.0.clone())));
    let source = ModelSource::SingleFile { path: folder.write(tensors), config };
    let files = open(&source).expect("a valid checkpoint");
    assert_identical(&weights(&files, "transformer", DType::F32), expected);
}

#[test]
fn a_flux_in_original_names_holds_the_very_tensors_of_its_folder() {
    let canonical = flux();
    for prefix in ["model.diffusion_model.", ""] {
        let tensors = flux_in_original_names(&canonical, prefix);
        assert_loads(&tensors, &json!({ "_class_name": "FluxTransformer2DModel" }), &canonical);
    }
}

#[test]
fn a_stable_diffusion_3_in_original_names_holds_the_very_tensors_of_its_folder() {
    let canonical = sd3();
    for prefix in ["model.diffusion_model.", ""] {
        let tensors = sd3_in_original_names(&canonical, prefix);
        assert_loads(&tensors, &json!({ "_class_name": "SD3Transformer2DModel" }), &canonical);
    }
}

#[test]
fn what_a_transformer_alone_lacks_is_named_at_once() {
    let folder = TempFolder::new();
    let tensors = flux_in_original_names(&flux(), "");
    let source = ModelSource::SingleFile { path: folder.write(&tensors), config: None };
    let files = open(&source).expect("a valid checkpoint");
    let message = files.weights("vae", None).expect_err("the file has none").to_string();
    let expected = "holds no `vae`, `text_encoder`, `text_encoder_2`, only `transformer`";
    assert!(message.contains(expected) && message.contains("`model_name`"), "{message}");
}

#[test]
fn a_transformer_whose_shapes_do_not_fit_together_is_refused() {
    let folder = TempFolder::new();
    let mut tensors = flux_in_original_names(&flux(), "");
    let odd = Tensor::zeros((3 * WIDTH - 1, WIDTH), DType::F32, &Device::Cpu).expect("a small tensor");
    tensors.insert("double_blocks.0.img_attn.qkv.weight".to_owned(), odd);
    let source = ModelSource::SingleFile { path: folder.write(&tensors), config: None };
    let files = open(&source).expect("the names are fine");
    let message = match files.weights("transformer", None) {
        Err(error) => error.to_string(),
        Ok(_) => String::from("nothing"),
    };
    assert!(message.contains("add `config`"), "heads of 16 features are unusual: {message}");
}

#[test]
fn a_file_of_another_family_than_its_configuration_is_refused() {
    let folder = TempFolder::new();
    let path = folder.write(&sd3_in_original_names(&sd3(), "model.diffusion_model."));
    let message = complaint(&request("StableDiffusionXLPipeline", single(path, Some("sdxl"))));
    assert!(message.contains("holds a `SD3Transformer2DModel`"), "{message}");
    assert!(message.contains("`config` is a `StableDiffusionXLPipeline`"), "{message}");
}
