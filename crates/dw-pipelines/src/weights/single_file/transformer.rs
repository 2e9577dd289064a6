//! The diffusion transformers of checkpoints, Flux and Stable Diffusion 3: which names they have, and the configurations
//! that follow from their shapes and from facts about the published models.

use serde_json::{Map, Value, json};

use super::{
    configs::{Component, Generated, like, over, unusual},
    contents::{Contents, Family, Naming},
    flux::FluxLayout,
    index::{Shapes, Tensors},
    key_map::KeyMap,
    sd3::Sd3Layout,
};

/// Features of an attention head in the published models of Stable Diffusion 3; those of 3.5 have norms that say it.
const HEAD_FEATURES: usize = 64;

/// Features of a head that each axis of Flux's positions turns, in the published models, whose heads have 128.
const FLUX_AXES: [usize; 3] = [16, 56, 56];

/// The names of an original transformer; none when it is incomplete.
pub(super) fn key_map(tensors: &Tensors<'_>, family: Family) -> Option<KeyMap> {
    match family {
        Family::Flux => FluxLayout::of_original(tensors).map(FluxLayout::key_map),
        _ => Some(Sd3Layout::of_original(tensors).key_map()),
    }
}

/// The `config.json` of a transformer. `kin` is that of the component it replaces, for what shapes do not say.
pub(super) fn config(tensors: Tensors<'_>, naming: Naming, family: Family, kin: Map<String, Value>) -> Generated {
    let map = match naming {
        Naming::Original => key_map(&tensors, family).ok_or("its transformer is incomplete; fetch the file again")?,
        Naming::Canonical => KeyMap::identity(),
    };
    let transformer = Component { tensors, map };
    match family {
        Family::Flux => flux(&transformer, kin),
        _ => stable_diffusion_3(&transformer, kin),
    }
}

/// How many blocks there are in the list `kind`, which the original calls `original`.
fn blocks(transformer: &Component<'_>, kind: &str, original: &str) -> usize {
    transformer.tensors.entries(kind).max(transformer.tensors.entries(original))
}

fn flux(transformer: &Component<'_>, kin: Map<String, Value>) -> Generated {
    let width = transformer.size("x_embedder.weight", 0)?;
    let head = transformer.size("transformer_blocks.0.attn.norm_q.weight", 0)?;
    let (inputs, outputs) = (transformer.size("x_embedder.weight", 1)?, transformer.size("proj_out.weight", 0)?);
    let kin = like(kin, "attention_head_dim", &json!(head));
    let axes = match kin.get("axes_dims_rope") {
        Some(axes) => axes.clone(),
        None if head == FLUX_AXES.iter().sum::<usize>() => json!(FLUX_AXES),
        None => return Err(unusual("the axes of its positions", &[head])),
    };
    let config = json!({
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": inputs,
        "out_channels": if inputs == outputs { Value::Null } else { json!(outputs) },
        "num_layers": blocks(transformer, "transformer_blocks", "double_blocks"),
        "num_single_layers": blocks(transformer, "single_transformer_blocks", "single_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": width / head.max(1),
        "joint_attention_dim": transformer.size("context_embedder.weight", 1)?,
        "pooled_projection_dim": transformer.size("time_text_embed.text_embedder.linear_1.weight", 1)?,
        "guidance_embeds": transformer.shape("time_text_embed.guidance_embedder.linear_1.weight").is_some(),
        "axes_dims_rope": axes,
    });
    Ok(over(kin, config))
}

fn stable_diffusion_3(transformer: &Component<'_>, kin: Map<String, Value>) -> Generated {
    let width = transformer.size("pos_embed.proj.weight", 0)?;
    let patch = transformer.size("pos_embed.proj.weight", 2)?.max(1);
    let kin = like(kin, "caption_projection_dim", &json!(width));
    let norm = transformer.shape("transformer_blocks.0.attn.norm_q.weight").and_then(|shape| shape.first().copied());
    let head = match (norm, kin.get("attention_head_dim").and_then(Value::as_u64)) {
        (Some(head), _) => head,
        (None, Some(head)) => head as usize,
        (None, None) if width.is_multiple_of(HEAD_FEATURES) => HEAD_FEATURES,
        (None, None) => return Err(unusual("the number of its attention heads", &[width])),
    };
    let blocks = blocks(transformer, "transformer_blocks", "joint_blocks");
    let is_dual = |block: &usize| transformer.shape(&format!("transformer_blocks.{block}.attn2.to_q.weight")).is_some();
    let config = json!({
        "_class_name": "SD3Transformer2DModel",
        "patch_size": patch,
        "in_channels": transformer.size("pos_embed.proj.weight", 1)?,
        "out_channels": transformer.size("proj_out.weight", 0)? / (patch * patch),
        "num_layers": blocks,
        "attention_head_dim": head,
        "num_attention_heads": width / head.max(1),
        "joint_attention_dim": transformer.size("context_embedder.weight", 1)?,
        "caption_projection_dim": width,
        "pooled_projection_dim": transformer.size("time_text_embed.text_embedder.linear_1.weight", 1)?,
        "pos_embed_max_size": transformer.size("pos_embed.pos_embed", 1)?.isqrt(),
        "sample_size": kin.get("sample_size").cloned().unwrap_or_else(|| json!(128)),
        "qk_norm": norm.map(|_| "rms_norm"),
        "dual_attention_layers": (0..blocks).filter(is_dual).collect::<Vec<_>>(),
    });
    Ok(over(kin, config))
}

/// The `model_index.json` of the pipeline that a checkpoint is for.
#[expect(clippy::unnecessary_wraps, reason = "all files that are made up have this form")]
pub(super) fn model_index(contents: &Contents) -> Generated {
    let clip = |class: &str| json!(["transformers", class]);
    if contents.family == Family::StableDiffusion3 {
        return Ok(json!({
            "_class_name": "StableDiffusion3Pipeline",
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "transformer": ["diffusers", "SD3Transformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
            "tokenizer": clip("CLIPTokenizer"),
            "text_encoder": clip("CLIPTextModelWithProjection"),
            "tokenizer_2": clip("CLIPTokenizer"),
            "text_encoder_2": clip("CLIPTextModelWithProjection"),
            "tokenizer_3": clip("T5Tokenizer"),
            "text_encoder_3": clip("T5EncoderModel"),
        }));
    }
    // Sixteen latent channels in each of four pixels of a patch: alone, with a picture that steers, with picture and mask.
    let class = match contents.in_channels {
        Some(128) => "FluxControlPipeline",
        Some(384) => "FluxFillPipeline",
        _ => "FluxPipeline",
    };
    Ok(json!({
        "_class_name": class,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "tokenizer": clip("CLIPTokenizer"),
        "text_encoder": clip("CLIPTextModel"),
        "tokenizer_2": clip("T5Tokenizer"),
        "text_encoder_2": clip("T5EncoderModel"),
    }))
}

/// The `scheduler_config.json` of the published model. Flux with guidance as an input (dev) shifts its schedule by the
/// size of the picture; without (schnell) it does not.
pub(super) fn scheduler(contents: &Contents, shapes: &Shapes) -> Value {
    let is_guided = shapes.keys().any(|name| name.contains("guidance_in.") || name.contains("guidance_embedder."));
    let is_flux = contents.family == Family::Flux;
    json!({
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": if is_flux && !is_guided { 1.0 } else { 3.0 },
        "use_dynamic_shifting": is_flux && is_guided,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
    })
}
