//! The configurations that a checkpoint does not carry, in the form of the diffusers layout: what follows from the
//! shapes of tensors is read off them, the rest are facts about the published models.
//!
//! Values that are neither (the heads of a model of unusual width) are refused with the way out: a `config`.

use serde_json::{Map, Value, json};

use super::{
    clip,
    contents::{Contents, Family, Located, Naming, Part, is_t5},
    index::{Shapes, Tensors, count},
    key_map::KeyMap,
    transformer,
    unet::{LabelEmbedding, Level, UnetLayout},
    vae::VaeLayout,
};

/// Features of an attention head in every model but Stable Diffusion 1, which has eight heads throughout.
const HEAD_FEATURES: usize = 64;

/// The heads of Stable Diffusion 1.
const HEADS: usize = 8;

/// Groups of the norms.
const NORM_GROUPS: usize = 32;

/// Values per added number in SDXL.
const ADDED_FEATURES: usize = 256;

/// A configuration, or what about the file prevents one.
pub(super) type Generated = Result<Value, String>;

/// The shapes of one component, by canonical name.
pub(super) struct Component<'a> {
    pub(super) tensors: Tensors<'a>,
    pub(super) map: KeyMap,
}

impl Component<'_> {
    pub(super) fn shape(&self, name: &str) -> Option<Vec<usize>> {
        let original = self.map.original(name)?;
        let shape = self.tensors.shape(&original)?;
        let targets = self.map.canonical(&original);
        targets.iter().find(|target| target.name == name)?.change.shape(shape)
    }

    /// The size along one axis of a tensor that must be there.
    pub(super) fn size(&self, name: &str, axis: usize) -> Result<usize, String> {
        let size = self.shape(name).and_then(|shape| shape.get(axis).copied());
        size.ok_or_else(|| {
            let original = self.map.original(name).unwrap_or_else(|| name.to_owned());
            format!("tensor `{original}` (`{name}` in diffusers) is missing or misshapen; the file is incomplete")
        })
    }
}

/// The `model_index.json` of the pipeline that a checkpoint is for.
pub(crate) fn model_index(contents: &Contents, shapes: &Shapes) -> Generated {
    if contents.family.denoiser() == Part::Transformer {
        return transformer::model_index(contents);
    }
    let special = match contents.in_channels {
        _ if shapes.contains_key("edm_mean") => Some("Playground 2.5, which has a schedule and latents of its own"),
        Some(4 | 8 | 9) | None => None,
        Some(_) => Some("a model with more inputs (depth, upscaling) than text and masks"),
    };
    if let Some(special) = special {
        return Err(format!("is {special}; add `config`, a folder or repository of it in the diffusers layout"));
    }
    let is_xl = matches!(contents.family, Family::Xl | Family::XlRefiner);
    let class = match (is_xl, contents.in_channels) {
        (true, Some(9)) => "StableDiffusionXLInpaintPipeline",
        (true, Some(8)) => "StableDiffusionXLInstructPix2PixPipeline",
        (true, _) if contents.family == Family::XlRefiner => "StableDiffusionXLImg2ImgPipeline",
        (true, _) => "StableDiffusionXLPipeline",
        (false, Some(9)) => "StableDiffusionInpaintPipeline",
        (false, Some(8)) => "StableDiffusionInstructPix2PixPipeline",
        (false, _) => "StableDiffusionPipeline",
    };
    let mut index = json!({
        "_class_name": class,
        "scheduler": ["diffusers", scheduler_class(contents)],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    });
    if contents.family != Family::XlRefiner {
        index["tokenizer"] = json!(["transformers", "CLIPTokenizer"]);
        index["text_encoder"] = json!(["transformers", "CLIPTextModel"]);
    }
    if is_xl {
        index["tokenizer_2"] = json!(["transformers", "CLIPTokenizer"]);
        index["text_encoder_2"] = json!(["transformers", "CLIPTextModelWithProjection"]);
        index["force_zeros_for_empty_prompt"] = json!(contents.family == Family::Xl);
        index["requires_aesthetics_score"] = json!(contents.family == Family::XlRefiner);
    }
    Ok(index)
}

fn scheduler_class(contents: &Contents) -> &'static str {
    match (contents.family, contents.in_channels) {
        (Family::Xl | Family::XlRefiner, _) => "EulerDiscreteScheduler",
        (_, Some(8)) => "EulerAncestralDiscreteScheduler",
        (Family::StableDiffusion2, Some(4)) => "DDIMScheduler",
        _ => "PNDMScheduler",
    }
}

/// The `scheduler_config.json` of the published model, as diffusers takes it for a single file.
///
/// Whether a Stable Diffusion 2 predicts noise or velocity does not show in its tensors. diffusers takes the
/// configuration of 2.1, which predicts velocity, unless the file counts the training steps of the base model
/// (`_legacy_load_scheduler`). A tensor named `v_pred` says velocity in any family.
pub(crate) fn scheduler(contents: &Contents, shapes: &Shapes, global_step: Option<i64>) -> Value {
    if contents.family.denoiser() == Part::Transformer {
        return transformer::scheduler(contents, shapes);
    }
    let is_velocity_2 = is_ambiguous(contents) && global_step != Some(BASE_MODEL_STEPS);
    let is_velocity = is_velocity_2 || shapes.contains_key("v_pred");
    json!({
        "_class_name": scheduler_class(contents),
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": false,
        "interpolation_type": "linear",
        "prediction_type": if is_velocity { "v_prediction" } else { "epsilon" },
        "rescale_betas_zero_snr": shapes.contains_key("ztsnr"),
        "set_alpha_to_one": false,
        "skip_prk_steps": true,
        "steps_offset": 1,
        "timestep_spacing": "leading",
    })
}

/// The training steps of Stable Diffusion 2.0 base, by which diffusers tells that it predicts noise.
const BASE_MODEL_STEPS: i64 = 875_000;

/// Whether the tensors leave open what the model predicts.
pub(crate) fn is_ambiguous(contents: &Contents) -> bool {
    contents.family == Family::StableDiffusion2 && contents.in_channels == Some(4)
}

/// The `tokenizer_config.json` that goes with CLIP's vocabulary. The second tokenizer of SDXL and the one of Stable
/// Diffusion 2 pad with `!`, the token with the number 0.
pub(crate) fn tokenizer(family: Family, folder: &str) -> Value {
    if has_t5_tokenizer(family, folder) {
        return json!({
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "<pad>",
            "model_max_length": 512,
            "tokenizer_class": "T5Tokenizer",
        });
    }
    let pads_with_zero = family == Family::StableDiffusion2 || folder == "tokenizer_2";
    json!({
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": if pads_with_zero { "!" } else { "<|endoftext|>" },
        "model_max_length": 77,
        "tokenizer_class": "CLIPTokenizer",
    })
}

/// Whether the tokenizer in `folder` of a model of this family is that of a T5.
pub(crate) fn has_t5_tokenizer(family: Family, folder: &str) -> bool {
    matches!((family, folder), (Family::Flux, "tokenizer_2") | (Family::StableDiffusion3, "tokenizer_3"))
}

/// The `config.json` of a component. `kin` is that of the component it replaces, for what shapes do not say.
pub(crate) fn component(
    part: Part,
    at: Located,
    contents: &Contents,
    shapes: &Shapes,
    kin: Option<Value>,
) -> Generated {
    let tensors = Tensors::below(shapes, at.prefix);
    let kin = match kin {
        Some(Value::Object(kin)) => kin,
        _ => Map::new(),
    };
    match part {
        Part::Unet => unet(tensors, at.naming, contents, kin),
        Part::Transformer => transformer::config(tensors, at.naming, contents.family, kin),
        Part::Vae => vae(tensors, at.naming, contents, kin),
        Part::TextEncoder2 | Part::TextEncoder3 if is_t5(&tensors) => t5(tensors, kin),
        Part::TextEncoder | Part::TextEncoder2 | Part::TextEncoder3 => {
            text_encoder(part, tensors, at.naming, contents, kin)
        }
    }
}

/// `kin`, when it has the same sizes; else nothing, because its other values belong to another model.
pub(super) fn like(kin: Map<String, Value>, key: &str, size: &Value) -> Map<String, Value> {
    if kin.get(key) == Some(size) { kin } else { Map::new() }
}

/// What was read off the tensors, over what `kin` says.
pub(super) fn over(mut kin: Map<String, Value>, read: Value) -> Value {
    if let Value::Object(read) = read {
        kin.extend(read);
    }
    Value::Object(kin)
}

fn unet(tensors: Tensors<'_>, naming: Naming, contents: &Contents, kin: Map<String, Value>) -> Generated {
    let (layout, map) = match naming {
        Naming::Original => {
            let layout = UnetLayout::of_original(&tensors);
            let map = layout.key_map();
            (layout, map)
        }
        Naming::Canonical => (UnetLayout::of_canonical(&tensors), KeyMap::identity()),
    };
    if layout.down.is_empty() || layout.up.len() != layout.down.len() {
        return Err(format!(
            "its UNet has {} levels on the way down and {} on the way up; the file is incomplete",
            layout.down.len(),
            layout.up.len()
        ));
    }
    let unet = Component { tensors, map };
    let channels = (0..layout.down.len())
        .map(|level| unet.size(&format!("down_blocks.{level}.resnets.0.conv1.weight"), 0))
        .collect::<Result<Vec<_>, _>>()?;
    let kin = like(kin, "block_out_channels", &json!(channels));
    let mut config = json!({
        "_class_name": "UNet2DConditionModel",
        "in_channels": unet.size("conv_in.weight", 1)?,
        "out_channels": unet.size("conv_out.weight", 0)?,
        "block_out_channels": channels,
        "sample_size": kin.get("sample_size").cloned().unwrap_or_else(|| json!(latent_size(contents))),
        "norm_num_groups": groups(&kin, &channels)?,
        "use_linear_projection": false,
    });
    unet_levels(&mut config, &layout)?;
    unet_attention(&mut config, &unet, &layout, &channels, &kin)?;
    unet_labels(&mut config, &unet, layout.label, &kin)?;
    if let Some(width) = unet.shape("time_embedding.cond_proj.weight").and_then(|shape| shape.get(1).copied()) {
        config["time_cond_proj_dim"] = json!(width);
    }
    Ok(over(kin, config))
}

/// Height and width of the latents the published model was trained on.
fn latent_size(contents: &Contents) -> usize {
    match contents.family {
        Family::Xl | Family::XlRefiner | Family::StableDiffusion3 | Family::Flux => 128,
        Family::StableDiffusion2 if contents.in_channels == Some(4) => 96,
        Family::StableDiffusion1 | Family::StableDiffusion2 => 64,
    }
}

fn groups(kin: &Map<String, Value>, channels: &[usize]) -> Generated {
    if let Some(groups) = kin.get("norm_num_groups") {
        return Ok(groups.clone());
    }
    if channels.iter().all(|channels| channels.is_multiple_of(NORM_GROUPS)) {
        return Ok(json!(NORM_GROUPS));
    }
    Err(unusual("the groups of its norms", channels))
}

pub(super) fn unusual(what: &str, channels: &[usize]) -> String {
    format!(
        "{what} cannot be told from tensors of an unusual width ({channels:?}); add `config`, a folder or repository in \
         the diffusers layout with the configuration of this model"
    )
}

fn unet_levels(config: &mut Value, layout: &UnetLayout) -> Result<(), String> {
    let mirrored = layout.down.iter().rev().zip(&layout.up).all(|(down, up)| down.layers + 1 == up.layers);
    if !mirrored {
        return Err(String::from(
            "the way up of its UNet does not mirror the way down; add `config`, a folder or repository in the diffusers \
             layout with the configuration of this model",
        ));
    }
    let types = |levels: &[Level], cross: &str, plain: &str| -> Value {
        levels.iter().map(|level| if level.has_attention { cross } else { plain }).collect()
    };
    config["down_block_types"] = types(&layout.down, "CrossAttnDownBlock2D", "DownBlock2D");
    config["up_block_types"] = types(&layout.up, "CrossAttnUpBlock2D", "UpBlock2D");
    config["mid_block_type"] = json!("UNetMidBlock2DCrossAttn");
    config["layers_per_block"] = one_or_many(layout.down.iter().map(|level| json!(level.layers)).collect());
    if layout.has_mid_attention {
        return Ok(());
    }
    Err(String::from(
        "the middle of its UNet has no transformer; add `config`, a folder or repository in the diffusers layout with \
         the configuration of this model",
    ))
}

/// A list whose values agree, as the one value.
fn one_or_many(values: Vec<Value>) -> Value {
    match values.as_slice() {
        [first, rest @ ..] if rest.iter().all(|value| value == first) => first.clone(),
        _ => Value::Array(values),
    }
}

fn unet_attention(
    config: &mut Value,
    unet: &Component<'_>,
    layout: &UnetLayout,
    channels: &[usize],
    kin: &Map<String, Value>,
) -> Result<(), String> {
    let middle = "mid_block.attentions.0";
    config["cross_attention_dim"] = json!(unet.size(&format!("{middle}.transformer_blocks.0.attn2.to_k.weight"), 1)?);
    let is_linear = unet.shape(&format!("{middle}.proj_in.weight")).is_some_and(|shape| shape.len() == 2);
    config["use_linear_projection"] = json!(is_linear);
    let depth = |attention: &str| {
        let norm = |layer: usize| unet.shape(&format!("{attention}.transformer_blocks.{layer}.norm1.weight")).is_some();
        json!(count(norm))
    };
    let depths = |side: &str, levels: &[Level]| -> Vec<Value> {
        let level = |(at, level): (usize, &Level)| {
            let layer = |layer: usize| depth(&format!("{side}.{at}.attentions.{layer}"));
            if level.has_attention { one_or_many((0..level.layers).map(layer).collect()) } else { Value::Null }
        };
        levels.iter().enumerate().map(level).collect()
    };
    let (mut down, mut up) = (depths("down_blocks", &layout.down), depths("up_blocks", &layout.up));
    // The middle takes its depth from the last level, whether that has transformers or not.
    for (at, level) in down.iter_mut().enumerate() {
        if level.is_null() {
            *level = if at + 1 == channels.len() { depth(middle) } else { json!(1) };
        }
    }
    let is_mirrored = up.iter().rev().zip(&down).all(|(up, down)| up.is_null() || up == down);
    config["transformer_layers_per_block"] = one_or_many(down);
    if !is_mirrored {
        up.iter_mut().filter(|level| level.is_null()).for_each(|level| *level = json!(1));
        config["reverse_transformer_layers_per_block"] = Value::Array(up);
    }
    config["attention_head_dim"] = match kin.get("attention_head_dim") {
        Some(heads) => heads.clone(),
        None => heads(channels, is_linear)?,
    };
    Ok(())
}

/// The number of heads, which `attention_head_dim` says in spite of its name.
fn heads(channels: &[usize], is_linear: bool) -> Generated {
    let unit = if is_linear { HEAD_FEATURES } else { HEADS };
    if !channels.iter().all(|channels| channels.is_multiple_of(unit)) {
        return Err(unusual("the number of its attention heads", channels));
    }
    Ok(if is_linear { channels.iter().map(|channels| channels / HEAD_FEATURES).collect() } else { json!(HEADS) })
}

fn unet_labels(
    config: &mut Value,
    unet: &Component<'_>,
    label: LabelEmbedding,
    kin: &Map<String, Value>,
) -> Result<(), String> {
    match label {
        LabelEmbedding::None => config["addition_embed_type"] = Value::Null,
        LabelEmbedding::Added => {
            let width = unet.size("add_embedding.linear_1.weight", 1)?;
            config["addition_embed_type"] = json!("text_time");
            config["projection_class_embeddings_input_dim"] = json!(width);
            config["addition_time_embed_dim"] = match kin.get("addition_time_embed_dim") {
                Some(known) => known.clone(),
                // The published models have 1280 features of text and six (the refiner five) numbers.
                None if matches!(width, 2816 | 2560) => json!(ADDED_FEATURES),
                None => return Err(unusual("the width of its added conditions", &[width])),
            };
        }
        LabelEmbedding::Projected | LabelEmbedding::Table => {
            return Err(String::from(
                "its UNet takes classes or noise levels beside the text (an upscaler or an unCLIP model); add `config`, \
                 a folder or repository in the diffusers layout with the configuration of this model",
            ));
        }
    }
    Ok(())
}

fn vae(tensors: Tensors<'_>, naming: Naming, contents: &Contents, kin: Map<String, Value>) -> Generated {
    let (layout, map) = match naming {
        Naming::Original => {
            let layout = VaeLayout::of_original(&tensors);
            (layout, layout.key_map())
        }
        Naming::Canonical => (VaeLayout::of_canonical(&tensors), KeyMap::identity()),
    };
    let vae = Component { tensors, map };
    let channels = (0..layout.levels)
        .map(|level| vae.size(&format!("encoder.down_blocks.{level}.resnets.0.conv1.weight"), 0))
        .collect::<Result<Vec<_>, _>>()?;
    if channels.is_empty() {
        return Err(String::from("its autoencoder has no encoder; use a complete autoencoder"));
    }
    let kin = like(kin, "block_out_channels", &json!(channels));
    let latent_channels = vae.size("decoder.conv_in.weight", 1)?;
    let mut config = json!({
        "_class_name": "AutoencoderKL",
        "in_channels": vae.size("encoder.conv_in.weight", 1)?,
        "out_channels": vae.size("decoder.conv_out.weight", 0)?,
        "latent_channels": latent_channels,
        "block_out_channels": channels,
        "down_block_types": vec!["DownEncoderBlock2D"; layout.levels],
        "up_block_types": vec!["UpDecoderBlock2D"; layout.levels],
        "layers_per_block": layout.layers,
        "norm_num_groups": groups(&kin, &channels)?,
        "use_quant_conv": vae.shape("quant_conv.weight").is_some(),
        "use_post_quant_conv": vae.shape("post_quant_conv.weight").is_some(),
        "mid_block_add_attention": vae.shape("encoder.mid_block.attentions.0.group_norm.weight").is_some(),
    });
    if !kin.contains_key("scaling_factor") {
        let is_xl = matches!(contents.family, Family::Xl | Family::XlRefiner);
        let (scale, shift) = match (latent_channels, contents.family) {
            (4, _) => (if is_xl { 0.13025 } else { 0.18215 }, None),
            (16, Family::Flux) => (0.3611, Some(0.1159)),
            (16, Family::StableDiffusion3) => (1.5305, Some(0.0609)),
            _ => {
                return Err(format!(
                    "the scale of its {latent_channels} latent channels cannot be told from tensors; add `config`, a folder or \
                 repository in the diffusers layout with the configuration of this autoencoder"
                ));
            }
        };
        config["scaling_factor"] = json!(scale);
        config["shift_factor"] = json!(shift);
        config["sample_size"] = json!(latent_size(contents) << layout.levels.saturating_sub(1));
    }
    Ok(over(kin, config))
}

fn text_encoder(
    part: Part,
    tensors: Tensors<'_>,
    naming: Naming,
    contents: &Contents,
    kin: Map<String, Value>,
) -> Generated {
    // Stable Diffusion 3 reads the projections of both CLIP encoders.
    let is_projected = part == Part::TextEncoder2 || contents.family == Family::StableDiffusion3;
    let (layers, map, root) = match naming {
        Naming::Original => {
            let layers = open_clip_depth(&tensors, contents, part);
            (layers, clip::open_clip_key_map(layers, true), "text_model.")
        }
        Naming::Canonical => {
            let root = if tensors.has("text_model.embeddings.token_embedding.weight") { "text_model." } else { "" };
            (clip::clip_layers(&tensors, root), KeyMap::identity(), root)
        }
    };
    let encoder = Component { tensors, map };
    let hidden = encoder.size(&format!("{root}embeddings.token_embedding.weight"), 1)?;
    let kin = like(kin, "hidden_size", &json!(hidden));
    let heads = match kin.get("num_attention_heads") {
        Some(heads) => heads.clone(),
        None if hidden.is_multiple_of(HEAD_FEATURES) => json!(hidden / HEAD_FEATURES),
        None => return Err(unusual("the number of its text encoder's heads", &[hidden])),
    };
    let projection = encoder.shape("text_projection.weight").and_then(|shape| shape.first().copied());
    let mut config = json!({
        "architectures": [if is_projected { "CLIPTextModelWithProjection" } else { "CLIPTextModel" }],
        "vocab_size": encoder.size(&format!("{root}embeddings.token_embedding.weight"), 0)?,
        "max_position_embeddings": encoder.size(&format!("{root}embeddings.position_embedding.weight"), 0)?,
        "hidden_size": hidden,
        "intermediate_size": encoder.size(&format!("{root}encoder.layers.0.mlp.fc1.weight"), 0)?,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "projection_dim": projection.unwrap_or(hidden),
    });
    if !kin.contains_key("hidden_act") {
        // OpenAI's encoder has an approximated activation; OpenCLIP's, of which the narrowest has 1024 features, do not.
        let is_first = part == Part::TextEncoder && contents.family != Family::StableDiffusion2;
        let is_openai = is_first && naming == Naming::Canonical && hidden != 1024;
        config["hidden_act"] = json!(if is_openai { "quick_gelu" } else { "gelu" });
        config["eos_token_id"] = json!(2);
    }
    Ok(over(kin, config))
}

/// A T5 encoder (version 1.1, whose feed-forward is gated, or the first version).
fn t5(tensors: Tensors<'_>, kin: Map<String, Value>) -> Generated {
    let encoder = Component { tensors, map: KeyMap::identity() };
    let block = "encoder.block.0.layer";
    let width = encoder.size("shared.weight", 1)?;
    let heads = encoder.size(&format!("{block}.0.SelfAttention.relative_attention_bias.weight"), 1)?;
    let is_gated = encoder.shape(&format!("{block}.1.DenseReluDense.wi_0.weight")).is_some();
    let inner = if is_gated { "wi_0" } else { "wi" };
    let config = json!({
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "vocab_size": encoder.size("shared.weight", 0)?,
        "d_model": width,
        "d_kv": encoder.size(&format!("{block}.0.SelfAttention.q.weight"), 0)? / heads.max(1),
        "d_ff": encoder.size(&format!("{block}.1.DenseReluDense.{inner}.weight"), 0)?,
        "num_heads": heads,
        "num_layers": count(|layer| encoder.tensors.has(&format!("encoder.block.{layer}.layer.0.layer_norm.weight"))),
        "relative_attention_num_buckets":
            encoder.size(&format!("{block}.0.SelfAttention.relative_attention_bias.weight"), 0)?,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": if is_gated { "gated-gelu" } else { "relu" },
    });
    Ok(over(like(kin, "d_model", &json!(width)), config))
}

/// Stable Diffusion 2 reads the last layer but one: its encoder is built without the last. A file that was
/// converted back from diffusers has neither that layer nor the text projection.
fn open_clip_depth(tensors: &Tensors<'_>, contents: &Contents, part: Part) -> usize {
    let layers = clip::open_clip_layers(tensors);
    let is_second_last = contents.family == Family::StableDiffusion2 && part == Part::TextEncoder;
    let is_whole = layers == 24 || tensors.has("text_projection");
    if is_second_last && is_whole { layers.saturating_sub(1) } else { layers }
}
