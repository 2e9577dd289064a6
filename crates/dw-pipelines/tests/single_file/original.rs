//! The tiny fixture models under the names of the original code: written out block by block, so that it shares nothing
//! with the maps it tests.

use std::collections::HashMap;

use candle_core::Tensor;

pub(crate) type Tensors = HashMap<String, Tensor>;

/// Blocks of the UNet of Stable Diffusion 1: diffusers, original.
pub(crate) const SD15_BLOCKS: &[(&str, &str)] = &[
    ("down_blocks.0.resnets.0", "input_blocks.1.0"),
    ("down_blocks.0.attentions.0", "input_blocks.1.1"),
    ("down_blocks.0.resnets.1", "input_blocks.2.0"),
    ("down_blocks.0.attentions.1", "input_blocks.2.1"),
    ("down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
    ("down_blocks.1.resnets.0", "input_blocks.4.0"),
    ("down_blocks.1.attentions.0", "input_blocks.4.1"),
    ("down_blocks.1.resnets.1", "input_blocks.5.0"),
    ("down_blocks.1.attentions.1", "input_blocks.5.1"),
    ("down_blocks.1.downsamplers.0.conv", "input_blocks.6.0.op"),
    ("down_blocks.2.resnets.0", "input_blocks.7.0"),
    ("down_blocks.2.attentions.0", "input_blocks.7.1"),
    ("down_blocks.2.resnets.1", "input_blocks.8.0"),
    ("down_blocks.2.attentions.1", "input_blocks.8.1"),
    ("down_blocks.2.downsamplers.0.conv", "input_blocks.9.0.op"),
    ("down_blocks.3.resnets.0", "input_blocks.10.0"),
    ("down_blocks.3.resnets.1", "input_blocks.11.0"),
    ("up_blocks.0.resnets.0", "output_blocks.0.0"),
    ("up_blocks.0.resnets.1", "output_blocks.1.0"),
    ("up_blocks.0.resnets.2", "output_blocks.2.0"),
    ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.1.conv"),
    ("up_blocks.1.resnets.0", "output_blocks.3.0"),
    ("up_blocks.1.attentions.0", "output_blocks.3.1"),
    ("up_blocks.1.resnets.1", "output_blocks.4.0"),
    ("up_blocks.1.attentions.1", "output_blocks.4.1"),
    ("up_blocks.1.resnets.2", "output_blocks.5.0"),
    ("up_blocks.1.attentions.2", "output_blocks.5.1"),
    ("up_blocks.1.upsamplers.0.conv", "output_blocks.5.2.conv"),
    ("up_blocks.2.resnets.0", "output_blocks.6.0"),
    ("up_blocks.2.attentions.0", "output_blocks.6.1"),
    ("up_blocks.2.resnets.1", "output_blocks.7.0"),
    ("up_blocks.2.attentions.1", "output_blocks.7.1"),
    ("up_blocks.2.resnets.2", "output_blocks.8.0"),
    ("up_blocks.2.attentions.2", "output_blocks.8.1"),
    ("up_blocks.2.upsamplers.0.conv", "output_blocks.8.2.conv"),
    ("up_blocks.3.resnets.0", "output_blocks.9.0"),
    ("up_blocks.3.attentions.0", "output_blocks.9.1"),
    ("up_blocks.3.resnets.1", "output_blocks.10.0"),
    ("up_blocks.3.attentions.1", "output_blocks.10.1"),
    ("up_blocks.3.resnets.2", "output_blocks.11.0"),
    ("up_blocks.3.attentions.2", "output_blocks.11.1"),
];

/// Blocks of the UNet of Stable Diffusion XL.
pub(crate) const SDXL_BLOCKS: &[(&str, &str)] = &[
    ("down_blocks.0.resnets.0", "input_blocks.1.0"),
    ("down_blocks.0.resnets.1", "input_blocks.2.0"),
    ("down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
    ("down_blocks.1.resnets.0", "input_blocks.4.0"),
    ("down_blocks.1.attentions.0", "input_blocks.4.1"),
    ("down_blocks.1.resnets.1", "input_blocks.5.0"),
    ("down_blocks.1.attentions.1", "input_blocks.5.1"),
    ("down_blocks.1.downsamplers.0.conv", "input_blocks.6.0.op"),
    ("down_blocks.2.resnets.0", "input_blocks.7.0"),
    ("down_blocks.2.attentions.0", "input_blocks.7.1"),
    ("down_blocks.2.resnets.1", "input_blocks.8.0"),
    ("down_blocks.2.attentions.1", "input_blocks.8.1"),
    ("up_blocks.0.resnets.0", "output_blocks.0.0"),
    ("up_blocks.0.attentions.0", "output_blocks.0.1"),
    ("up_blocks.0.resnets.1", "output_blocks.1.0"),
    ("up_blocks.0.attentions.1", "output_blocks.1.1"),
    ("up_blocks.0.resnets.2", "output_blocks.2.0"),
    ("up_blocks.0.attentions.2", "output_blocks.2.1"),
    ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.2.conv"),
    ("up_blocks.1.resnets.0", "output_blocks.3.0"),
    ("up_blocks.1.attentions.0", "output_blocks.3.1"),
    ("up_blocks.1.resnets.1", "output_blocks.4.0"),
    ("up_blocks.1.attentions.1", "output_blocks.4.1"),
    ("up_blocks.1.resnets.2", "output_blocks.5.0"),
    ("up_blocks.1.attentions.2", "output_blocks.5.1"),
    ("up_blocks.1.upsamplers.0.conv", "output_blocks.5.2.conv"),
    ("up_blocks.2.resnets.0", "output_blocks.6.0"),
    ("up_blocks.2.resnets.1", "output_blocks.7.0"),
    ("up_blocks.2.resnets.2", "output_blocks.8.0"),
];

/// What both UNets share.
const UNET: &[(&str, &str)] = &[
    ("conv_in", "input_blocks.0.0"),
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("add_embedding.linear_1", "label_emb.0.0"),
    ("add_embedding.linear_2", "label_emb.0.2"),
    ("mid_block.resnets.0", "middle_block.0"),
    ("mid_block.attentions.0", "middle_block.1"),
    ("mid_block.resnets.1", "middle_block.2"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
];

const RESIDUAL: &[(&str, &str)] = &[
    (".norm1.", ".in_layers.0."),
    (".conv1.", ".in_layers.2."),
    (".time_emb_proj.", ".emb_layers.1."),
    (".norm2.", ".out_layers.0."),
    (".conv2.", ".out_layers.3."),
    (".conv_shortcut.", ".skip_connection."),
];

const VAE: &[(&str, &str)] = &[
    ("encoder.down_blocks.0.resnets.0", "encoder.down.0.block.0"),
    ("encoder.down_blocks.1.resnets.0", "encoder.down.1.block.0"),
    ("encoder.down_blocks.2.resnets.0", "encoder.down.2.block.0"),
    ("encoder.down_blocks.3.resnets.0", "encoder.down.3.block.0"),
    ("encoder.down_blocks.0.downsamplers.0", "encoder.down.0.downsample"),
    ("encoder.down_blocks.1.downsamplers.0", "encoder.down.1.downsample"),
    ("encoder.down_blocks.2.downsamplers.0", "encoder.down.2.downsample"),
    ("decoder.up_blocks.0.resnets", "decoder.up.3.block"),
    ("decoder.up_blocks.1.resnets", "decoder.up.2.block"),
    ("decoder.up_blocks.2.resnets", "decoder.up.1.block"),
    ("decoder.up_blocks.3.resnets", "decoder.up.0.block"),
    ("decoder.up_blocks.0.upsamplers.0", "decoder.up.3.upsample"),
    ("decoder.up_blocks.1.upsamplers.0", "decoder.up.2.upsample"),
    ("decoder.up_blocks.2.upsamplers.0", "decoder.up.1.upsample"),
];

const VAE_PARTS: &[(&str, &str)] = &[
    ("mid_block.resnets.0", "mid.block_1"),
    ("mid_block.resnets.1", "mid.block_2"),
    ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
    ("mid_block.attentions.0.to_q", "mid.attn_1.q"),
    ("mid_block.attentions.0.to_k", "mid.attn_1.k"),
    ("mid_block.attentions.0.to_v", "mid.attn_1.v"),
    ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
    ("conv_norm_out", "norm_out"),
    ("conv_shortcut", "nin_shortcut"),
];

const OPEN_CLIP: &[(&str, &str)] = &[
    ("text_model.embeddings.token_embedding", "token_embedding"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.final_layer_norm", "ln_final"),
    ("text_model.encoder.layers.", "transformer.resblocks."),
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
    ("self_attn.out_proj", "attn.out_proj"),
    ("text_projection.weight", "text_projection"),
];

fn replaced(name: &str, table: &[(&str, &str)]) -> String {
    table.iter().fold(name.to_owned(), |name, (from, to)| name.replace(from, to))
}

/// The original name of a UNet's tensor.
fn unet_name(name: &str, blocks: &[(&str, &str)]) -> String {
    let moved = |table: &[(&str, &str)]| {
        table.iter().find_map(|(from, to)| {
            let rest = name.strip_prefix(from)?;
            rest.starts_with('.').then(|| format!("{to}{rest}"))
        })
    };
    let moved = moved(blocks).or_else(|| moved(UNET)).unwrap_or_else(|| panic!("`{name}` is in no table"));
    if name.contains(".resnets.") { replaced(&moved, RESIDUAL) } else { moved }
}

/// A UNet under original names.
pub(crate) fn unet(tensors: &Tensors, blocks: &[(&str, &str)], prefix: &str) -> Tensors {
    let renamed = |(name, tensor): (&String, &Tensor)| (format!("{prefix}{}", unet_name(name, blocks)), tensor.clone());
    tensors.iter().map(renamed).collect()
}

/// A ControlNet under original names.
pub(crate) fn controlnet(tensors: &Tensors, blocks: &[(&str, &str)], prefix: &str) -> Tensors {
    let hint = |at: &str| format!("input_hint_block.{}", 2 * (at.parse::<usize>().expect("a number") + 1));
    let renamed = |(name, tensor): (&String, &Tensor)| {
        let (path, kind) = name.rsplit_once('.').expect("a parameter of a module");
        let path = match path.rsplit_once('.') {
            _ if path == "controlnet_mid_block" => "middle_block_out.0".to_owned(),
            _ if path == "controlnet_cond_embedding.conv_in" => "input_hint_block.0".to_owned(),
            _ if path == "controlnet_cond_embedding.conv_out" => "input_hint_block.14".to_owned(),
            Some(("controlnet_cond_embedding.blocks", at)) => hint(at),
            Some(("controlnet_down_blocks", at)) => format!("zero_convs.{at}.0"),
            _ => return (format!("{prefix}{}", unet_name(name, blocks)), tensor.clone()),
        };
        (format!("{prefix}{path}.{kind}"), tensor.clone())
    };
    tensors.iter().map(renamed).collect()
}

/// An autoencoder under original names, its attention as convolutions.
pub(crate) fn vae(tensors: &Tensors, prefix: &str) -> Tensors {
    let renamed = |(name, tensor): (&String, &Tensor)| {
        let is_attention = name.contains("mid_block.attentions.0.to_") && name.ends_with(".weight");
        let tensor = if is_attention {
            let (rows, columns) = tensor.dims2().expect("a linear layer");
            tensor.reshape((rows, columns, 1, 1)).expect("as many values")
        } else {
            tensor.clone()
        };
        (format!("{prefix}{}", replaced(&replaced(name, VAE), VAE_PARTS)), tensor)
    };
    tensors.iter().map(renamed).collect()
}

/// An OpenCLIP encoder under original names: query, key and value fused, the projection transposed.
pub(crate) fn open_clip(tensors: &Tensors, prefix: &str) -> Tensors {
    let mut original = Tensors::new();
    for (name, tensor) in tensors {
        if let Some((layer, kind)) = name.split_once(".self_attn.q_proj.") {
            let part = |name: &str| &tensors[&format!("{layer}.self_attn.{name}.{kind}")];
            let fused = Tensor::cat(&[part("q_proj"), part("k_proj"), part("v_proj")], 0).expect("parts of one size");
            original.insert(format!("{prefix}{}.attn.in_proj_{kind}", replaced(layer, OPEN_CLIP)), fused);
        } else if name == "text_projection.weight" {
            let transposed = tensor.t().and_then(|tensor| tensor.contiguous()).expect("a matrix");
            original.insert(format!("{prefix}text_projection"), transposed);
        } else if !name.contains("self_attn.k_proj") && !name.contains("self_attn.v_proj") {
            original.insert(format!("{prefix}{}", replaced(name, OPEN_CLIP)), tensor.clone());
        }
    }
    original
}

/// A CLIP encoder below a prefix.
pub(crate) fn clip(tensors: &Tensors, prefix: &str) -> Tensors {
    tensors.iter().map(|(name, tensor)| (format!("{prefix}{name}"), tensor.clone())).collect()
}
