//! Names and shapes of the published checkpoints with diffusion transformers, built the way the original code builds its
//! modules (Flux' `model.py` and `layers.py`, `mmditx.py`), and of what ComfyUI packs beside them. Knows nothing of key
//! maps.

use super::{index::Shapes, ldm_shapes};

/// A transformer of Stable Diffusion 3.
pub(super) struct Mmdit {
    pub(super) blocks: usize,
    pub(super) width: usize,
    /// Height and width of the table of positions.
    positions: usize,
    has_norms: bool,
    /// How many blocks from the first on have a second attention.
    dual: usize,
}

pub(super) const MEDIUM: Mmdit = Mmdit { blocks: 24, width: 1536, positions: 192, has_norms: false, dual: 0 };

pub(super) const LARGE_35: Mmdit = Mmdit { blocks: 38, width: 2432, has_norms: true, ..MEDIUM };

pub(super) const MEDIUM_35: Mmdit = Mmdit { positions: 384, has_norms: true, dual: 13, ..MEDIUM };

fn linear(shapes: &mut Shapes, name: String, out: usize, input: usize) {
    shapes.insert(format!("{name}.weight"), vec![out, input]);
    shapes.insert(format!("{name}.bias"), vec![out]);
}

fn embedder(shapes: &mut Shapes, layers: [String; 2], width: usize, input: usize) {
    for (layer, input) in layers.into_iter().zip([input, width]) {
        linear(shapes, layer, width, input);
    }
}

/// The transformer of Flux below `prefix`, with so many features of a patch as input.
pub(super) fn flux(shapes: &mut Shapes, prefix: &str, guidance: bool, inputs: usize) {
    let (width, head) = (3072, 128);
    linear(shapes, format!("{prefix}img_in"), width, inputs);
    linear(shapes, format!("{prefix}txt_in"), width, 4096);
    let embedders = [("time_in", 256), ("vector_in", 768), ("guidance_in", 256)];
    for (name, input) in embedders.into_iter().take(if guidance { 3 } else { 2 }) {
        let layers = ["in_layer", "out_layer"].map(|layer| format!("{prefix}{name}.{layer}"));
        embedder(shapes, layers, width, input);
    }
    for block in (0..19).map(|block| format!("{prefix}double_blocks.{block}")) {
        for stream in ["img", "txt"] {
            let stream = format!("{block}.{stream}");
            linear(shapes, format!("{stream}_mod.lin"), 6 * width, width);
            linear(shapes, format!("{stream}_attn.qkv"), 3 * width, width);
            linear(shapes, format!("{stream}_attn.proj"), width, width);
            linear(shapes, format!("{stream}_mlp.0"), 4 * width, width);
            linear(shapes, format!("{stream}_mlp.2"), width, 4 * width);
            shapes.insert(format!("{stream}_attn.norm.query_norm.scale"), vec![head]);
            shapes.insert(format!("{stream}_attn.norm.key_norm.scale"), vec![head]);
        }
    }
    for block in (0..38).map(|block| format!("{prefix}single_blocks.{block}")) {
        linear(shapes, format!("{block}.modulation.lin"), 3 * width, width);
        linear(shapes, format!("{block}.linear1"), 7 * width, width);
        linear(shapes, format!("{block}.linear2"), width, 5 * width);
        shapes.insert(format!("{block}.norm.query_norm.scale"), vec![head]);
        shapes.insert(format!("{block}.norm.key_norm.scale"), vec![head]);
    }
    linear(shapes, format!("{prefix}final_layer.adaLN_modulation.1"), 2 * width, width);
    linear(shapes, format!("{prefix}final_layer.linear"), 64, width);
}

/// The transformer of a Stable Diffusion 3 below `prefix`.
pub(super) fn mmdit(shapes: &mut Shapes, prefix: &str, model: &Mmdit) {
    let width = model.width;
    shapes.insert(format!("{prefix}pos_embed"), vec![1, model.positions * model.positions, width]);
    shapes.insert(format!("{prefix}x_embedder.proj.weight"), vec![width, 16, 2, 2]);
    shapes.insert(format!("{prefix}x_embedder.proj.bias"), vec![width]);
    linear(shapes, format!("{prefix}context_embedder"), width, 4096);
    for (name, input) in [("t_embedder", 256), ("y_embedder", 2048)] {
        embedder(shapes, ["mlp.0", "mlp.2"].map(|layer| format!("{prefix}{name}.{layer}")), width, input);
    }
    for block in 0..model.blocks {
        let (is_last, is_dual) = (block + 1 == model.blocks, block < model.dual);
        let block = format!("{prefix}joint_blocks.{block}");
        for stream in ["x_block", "context_block"] {
            let is_text = stream == "context_block";
            let ends = is_text && is_last;
            let stream = format!("{block}.{stream}");
            let modulations = if ends { 2 } else { 6 + if is_dual && !is_text { 3 } else { 0 } };
            linear(shapes, format!("{stream}.adaLN_modulation.1"), modulations * width, width);
            let attentions = if is_dual && !is_text { &["attn", "attn2"][..] } else { &["attn"] };
            for attention in attentions.iter().map(|name| format!("{stream}.{name}")) {
                linear(shapes, format!("{attention}.qkv"), 3 * width, width);
                if !ends {
                    linear(shapes, format!("{attention}.proj"), width, width);
                }
                if model.has_norms {
                    shapes.insert(format!("{attention}.ln_q.weight"), vec![64]);
                    shapes.insert(format!("{attention}.ln_k.weight"), vec![64]);
                }
            }
            if !ends {
                linear(shapes, format!("{stream}.mlp.fc1"), 4 * width, width);
                linear(shapes, format!("{stream}.mlp.fc2"), width, 4 * width);
            }
        }
    }
    linear(shapes, format!("{prefix}final_layer.adaLN_modulation.1"), 2 * width, width);
    linear(shapes, format!("{prefix}final_layer.linear"), 64, width);
}

/// The autoencoder with 16 latent channels below `prefix`.
pub(super) fn vae(shapes: &mut Shapes, prefix: &str) {
    ldm_shapes::vae(shapes, prefix);
    for name in ["quant_conv", "post_quant_conv"] {
        shapes.remove(&format!("{prefix}{name}.weight"));
        shapes.remove(&format!("{prefix}{name}.bias"));
    }
    shapes.insert(format!("{prefix}encoder.conv_out.weight"), vec![32, 512, 3, 3]);
    shapes.insert(format!("{prefix}encoder.conv_out.bias"), vec![32]);
    shapes.insert(format!("{prefix}decoder.conv_in.weight"), vec![512, 16, 3, 3]);
}

/// The larger CLIP encoder under transformers' names below `prefix`.
pub(super) fn clip_g(shapes: &mut Shapes, prefix: &str) {
    let width = 1280;
    shapes.insert(format!("{prefix}text_model.embeddings.token_embedding.weight"), vec![49408, width]);
    shapes.insert(format!("{prefix}text_model.embeddings.position_embedding.weight"), vec![77, width]);
    let norm = |shapes: &mut Shapes, name: String| {
        shapes.insert(format!("{name}.weight"), vec![width]);
        shapes.insert(format!("{name}.bias"), vec![width]);
    };
    for layer in (0..32).map(|layer| format!("{prefix}text_model.encoder.layers.{layer}")) {
        for name in ["q_proj", "k_proj", "v_proj", "out_proj"] {
            linear(shapes, format!("{layer}.self_attn.{name}"), width, width);
        }
        linear(shapes, format!("{layer}.mlp.fc1"), 4 * width, width);
        linear(shapes, format!("{layer}.mlp.fc2"), width, 4 * width);
        norm(shapes, format!("{layer}.layer_norm1"));
        norm(shapes, format!("{layer}.layer_norm2"));
    }
    norm(shapes, format!("{prefix}text_model.final_layer_norm"));
    shapes.insert(format!("{prefix}text_projection.weight"), vec![width, width]);
}

/// The encoder of T5 v1.1 XXL below `prefix`.
pub(super) fn t5(shapes: &mut Shapes, prefix: &str) {
    let (width, inner) = (4096, 10240);
    shapes.insert(format!("{prefix}shared.weight"), vec![32128, width]);
    for block in 0..24 {
        let layer = format!("{prefix}encoder.block.{block}.layer");
        for name in ["q", "k", "v", "o"] {
            shapes.insert(format!("{layer}.0.SelfAttention.{name}.weight"), vec![width, width]);
        }
        if block == 0 {
            shapes.insert(format!("{layer}.0.SelfAttention.relative_attention_bias.weight"), vec![32, 64]);
        }
        for name in ["wi_0", "wi_1"] {
            shapes.insert(format!("{layer}.1.DenseReluDense.{name}.weight"), vec![inner, width]);
        }
        shapes.insert(format!("{layer}.1.DenseReluDense.wo.weight"), vec![width, inner]);
        shapes.insert(format!("{layer}.0.layer_norm.weight"), vec![width]);
        shapes.insert(format!("{layer}.1.layer_norm.weight"), vec![width]);
    }
    shapes.insert(format!("{prefix}encoder.final_layer_norm.weight"), vec![width]);
}
