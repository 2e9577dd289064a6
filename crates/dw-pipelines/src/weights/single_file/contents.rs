//! What a checkpoint holds, read off the names and shapes of its tensors: which components, under which prefix and
//! naming, of which family. The file's name plays no part.
//!
//! Owns recognition and the refusal of files that are something else. What the configuration of a recognised
//! component looks like is said by [`super::configs`].

use std::collections::BTreeMap;

use super::{
    index::{Shapes, Tensors},
    key_map::KeyMap,
    unet::{LabelEmbedding, UnetLayout},
};

/// A component that a checkpoint can hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Part {
    Unet,
    Transformer,
    Vae,
    TextEncoder,
    TextEncoder2,
    TextEncoder3,
    ControlNet,
}

impl Part {
    pub(super) const ALL: [Self; 7] = [
        Self::Unet,
        Self::Transformer,
        Self::Vae,
        Self::TextEncoder,
        Self::TextEncoder2,
        Self::TextEncoder3,
        Self::ControlNet,
    ];

    /// Its name as a component, which is its folder in the diffusers layout.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Unet => "unet",
            Self::Transformer => "transformer",
            Self::Vae => "vae",
            Self::TextEncoder => "text_encoder",
            Self::TextEncoder2 => "text_encoder_2",
            Self::ControlNet => "controlnet",
            Self::TextEncoder3 => "text_encoder_3",
        }
    }

    /// The component of this name.
    pub(crate) fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|part| part.name() == name)
    }

    /// What the names of its tensors can start with, the most telling first.
    fn prefixes(self) -> &'static [&'static str] {
        match self {
            Self::Unet => &["model.diffusion_model.", "diffusion_model.", "unet.", ""],
            Self::ControlNet => &["control_model.", "controlnet.", ""],
            Self::Transformer => &["model.diffusion_model.", "diffusion_model.", "transformer.", ""],
            Self::Vae => &["first_stage_model.", "vae.", ""],
            Self::TextEncoder => &[
                "cond_stage_model.transformer.",
                "cond_stage_model.model.",
                "conditioner.embedders.0.transformer.",
                "text_encoders.clip_l.transformer.",
                "text_encoder.",
                "",
            ],
            Self::TextEncoder2 => &[
                "conditioner.embedders.1.model.",
                "conditioner.embedders.0.model.",
                "text_encoders.clip_g.transformer.",
                T5,
                "text_encoder_2.",
                "",
            ],
            Self::TextEncoder3 => &[T5, "text_encoder_3.", ""],
        }
    }

    /// How its tensors are named, when they are there.
    fn naming(self, tensors: &Tensors<'_>) -> Option<Naming> {
        let has = |names: &[&str]| names.iter().all(|name| tensors.has(name));
        let is_clip =
            || has(&["text_model.embeddings.token_embedding.weight"]) || has(&["embeddings.token_embedding.weight"]);
        let (original, canonical) = match self {
            Self::Unet => (
                has(&["input_blocks.0.0.weight", "time_embed.0.weight"]) && !tensors.has(ORIGINAL_HINT),
                has(&["conv_in.weight", "time_embedding.linear_1.weight"]) && !tensors.has(CANONICAL_HINT),
            ),
            Self::ControlNet => {
                (has(&[ORIGINAL_HINT, "time_embed.0.weight"]), has(&[CANONICAL_HINT, "time_embedding.linear_1.weight"]))
            }
            Self::Vae => (
                has(&["decoder.conv_in.weight", "decoder.up.0.block.0.norm1.weight"]),
                has(&["decoder.conv_in.weight", "decoder.up_blocks.0.resnets.0.norm1.weight"]),
            ),
            Self::Transformer if tensors.has("controlnet_blocks.0.weight") => return None,
            Self::Transformer => (
                has(&["double_blocks.0.img_mod.lin.weight", "img_in.weight"])
                    || has(&["joint_blocks.0.x_block.attn.qkv.weight", "x_embedder.proj.weight"]),
                has(&[
                    "transformer_blocks.0.norm1_context.linear.weight",
                    "single_transformer_blocks.0.attn.to_q.weight",
                ]) || has(&["transformer_blocks.0.norm1_context.linear.weight", "pos_embed.proj.weight"]),
            ),
            Self::TextEncoder => (has(OPEN_CLIP), is_clip()),
            Self::TextEncoder2 => (has(OPEN_CLIP), is_clip() || is_t5(tensors)),
            Self::TextEncoder3 => (false, is_t5(tensors)),
        };
        original.then_some(Naming::Original).or(canonical.then_some(Naming::Canonical))
    }
}

/// The first layer that reads the picture of a ControlNet, by which a copy of a UNet is told from a UNet.
const ORIGINAL_HINT: &str = "input_hint_block.0.weight";
const CANONICAL_HINT: &str = "controlnet_cond_embedding.conv_in.weight";
/// Where a file in ComfyUI's layout has its T5 encoder.
const T5: &str = "text_encoders.t5xxl.transformer.";

/// What every OpenCLIP encoder has.
const OPEN_CLIP: &[&str] = &["token_embedding.weight", "positional_embedding"];

/// Whether these are the tensors of a T5 encoder, under the names of transformers.
pub(super) fn is_t5(tensors: &Tensors<'_>) -> bool {
    tensors.has("shared.weight") && tensors.has("encoder.block.0.layer.0.SelfAttention.q.weight")
}

/// Whose names the tensors of a component have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Naming {
    /// Those of latent-diffusion and sgm, of Flux and mmdit; of OpenCLIP for a text encoder.
    Original,
    /// Those of diffusers; of transformers for a text encoder.
    Canonical,
}

/// Where a component is in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Located {
    /// What the names of its tensors start with.
    pub(crate) prefix: &'static str,
    pub(crate) naming: Naming,
}

/// The models that share an architecture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    /// Stable Diffusion 1.x: one CLIP encoder of OpenAI, transformers that start with a convolution.
    StableDiffusion1,
    /// Stable Diffusion 2.x: one OpenCLIP encoder, transformers that start with a linear layer.
    StableDiffusion2,
    /// Stable Diffusion XL: both encoders.
    Xl,
    /// The refiner of Stable Diffusion XL: the second encoder only.
    XlRefiner,
    /// Stable Diffusion 3: three encoders, the third a T5.
    StableDiffusion3,
    /// Flux: CLIP and T5.
    Flux,
}

impl Family {
    /// The part of its models that removes the noise.
    pub(crate) fn denoiser(self) -> Part {
        match self {
            Self::StableDiffusion3 | Self::Flux => Part::Transformer,
            Self::StableDiffusion1 | Self::StableDiffusion2 | Self::Xl | Self::XlRefiner => Part::Unet,
        }
    }

    /// The class of that part.
    pub(crate) fn denoiser_class(self) -> &'static str {
        match self {
            Self::StableDiffusion3 => "SD3Transformer2DModel",
            Self::Flux => "FluxTransformer2DModel",
            Self::StableDiffusion1 | Self::StableDiffusion2 | Self::Xl | Self::XlRefiner => "UNet2DConditionModel",
        }
    }
}

/// What was found in a file.
#[derive(Clone, Debug)]
pub(crate) struct Contents {
    parts: BTreeMap<Part, Located>,
    pub(crate) family: Family,
    /// Channels of the denoiser's input. UNets: 4, with mask and masked picture 9, with a picture to edit 8. None
    /// without denoiser.
    pub(crate) in_channels: Option<usize>,
}

/// The width of the refiner's text, which tells its UNet from that of the base model.
const REFINER_TEXT: usize = 1280;

impl Contents {
    /// Recognises a checkpoint; the error says what the file is instead.
    pub(crate) fn recognise(shapes: &Shapes) -> Result<Self, String> {
        let locate = |part: Part| {
            part.prefixes().iter().find_map(|&prefix| {
                let naming = part.naming(&Tensors::below(shapes, prefix))?;
                Some((part, Located { prefix, naming }))
            })
        };
        let mut parts: BTreeMap<Part, Located> = Part::ALL.into_iter().filter_map(locate).collect();
        let is_whole = parts.get(&Part::Unet).is_some_and(|unet| !unet.prefix.is_empty())
            || parts.contains_key(&Part::Transformer)
            || parts.contains_key(&Part::ControlNet);
        if !is_whole && let Some(reason) = something_else(shapes) {
            return Err(reason);
        }
        if parts.is_empty() {
            let names: Vec<String> = shapes.keys().take(3).map(|name| format!("`{name}`")).collect();
            return Err(format!(
                "holds no Stable Diffusion or Flux model: none of its {} tensors ({}, …) has a known name; use a \
                 checkpoint of Stable Diffusion 1.x, 2.x, XL or 3, or of Flux",
                shapes.len(),
                names.join(", ")
            ));
        }
        if let Some(located) = parts.get(&Part::Transformer) {
            let transformer = Tensors::below(shapes, located.prefix);
            let family = transformer_family(&transformer);
            // A T5 is the second encoder of Flux and the third of Stable Diffusion 3.
            let other = if family == Family::Flux { Part::TextEncoder3 } else { Part::TextEncoder2 };
            if parts.get(&other).is_some_and(|located| located.prefix == T5) {
                parts.remove(&other);
            }
            let input = ["img_in.weight", "x_embedder.weight", "x_embedder.proj.weight", "pos_embed.proj.weight"];
            let in_channels = input.iter().find_map(|name| transformer.shape(name)?.get(1).copied());
            return Ok(Self { parts, family, in_channels });
        }
        let unet = parts.get(&Part::Unet).or(parts.get(&Part::ControlNet));
        let unet = unet.map(|unet| UnetKind::read(&Tensors::below(shapes, unet.prefix), unet.naming));
        let family = family(&parts, unet.as_ref());
        Ok(Self { parts, family, in_channels: unet.and_then(|unet| unet.in_channels) })
    }

    /// Where a component is; none when the file does not hold it.
    pub(crate) fn find(&self, part: Part) -> Option<Located> {
        self.parts.get(&part).copied()
    }

    /// The names of the components that are there.
    pub(crate) fn names(&self) -> impl Iterator<Item = &'static str> {
        self.parts.keys().map(|part| part.name())
    }

    /// Names of tensors that belong to no component and are not known to be harmless.
    pub(crate) fn strays<'a>(&self, shapes: &'a Shapes) -> Vec<&'a str> {
        let is_placed = |name: &str| self.parts.values().any(|located| name.starts_with(located.prefix));
        shapes.keys().map(String::as_str).filter(|name| !is_placed(name) && !is_leftover(name)).collect()
    }
}

fn transformer_family(tensors: &Tensors<'_>) -> Family {
    let is_flux = ["double_blocks.0.img_mod.lin.weight", "single_transformer_blocks.0.attn.to_q.weight"]
        .iter()
        .any(|name| tensors.has(name));
    if is_flux { Family::Flux } else { Family::StableDiffusion3 }
}

/// The few facts about a UNet that tell families apart.
struct UnetKind {
    in_channels: Option<usize>,
    text: Option<usize>,
    is_linear: bool,
    label: LabelEmbedding,
}

impl UnetKind {
    fn read(tensors: &Tensors<'_>, naming: Naming) -> Self {
        let (layout, map) = match naming {
            Naming::Original => {
                let layout = UnetLayout::of_original(tensors);
                let map = layout.key_map();
                (layout, map)
            }
            Naming::Canonical => (UnetLayout::of_canonical(tensors), KeyMap::identity()),
        };
        let shape = |name: &str| tensors.shape(&map.original(name)?);
        let attention = layout.down.iter().position(|level| level.has_attention);
        let attention = attention.map(|level| format!("down_blocks.{level}.attentions.0"));
        let below = |name: &str| attention.as_ref().and_then(|attention| shape(&format!("{attention}.{name}")));
        Self {
            in_channels: shape("conv_in.weight").and_then(|shape| shape.get(1).copied()),
            text: below("transformer_blocks.0.attn2.to_k.weight").and_then(|shape| shape.get(1).copied()),
            is_linear: below("proj_in.weight").is_some_and(|shape| shape.len() == 2),
            label: layout.label,
        }
    }
}

/// The encoders tell families apart; where none is in the file, the UNet does. An autoencoder alone counts as
/// Stable Diffusion 1, as in diffusers.
fn family(parts: &BTreeMap<Part, Located>, unet: Option<&UnetKind>) -> Family {
    let prefix = |part: Part| parts.get(&part).map_or("", |located| located.prefix);
    match (prefix(Part::TextEncoder), prefix(Part::TextEncoder2)) {
        (_, "conditioner.embedders.1.model.") | ("conditioner.embedders.0.transformer.", _) => return Family::Xl,
        (_, "conditioner.embedders.0.model.") => return Family::XlRefiner,
        ("cond_stage_model.model.", _) => return Family::StableDiffusion2,
        _ => {}
    }
    match unet {
        Some(UnetKind { label: LabelEmbedding::Added, text: Some(REFINER_TEXT), .. }) => Family::XlRefiner,
        Some(UnetKind { label: LabelEmbedding::Added, .. }) => Family::Xl,
        Some(UnetKind { is_linear: true, .. }) => Family::StableDiffusion2,
        _ => Family::StableDiffusion1,
    }
}

/// What training leaves in a checkpoint beside the model: exact names.
const LEFTOVERS: [&str; 20] = [
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "betas",
    "edm_mean",
    "edm_std",
    "epoch",
    "global_step",
    "log_one_minus_alphas_cumprod",
    "logvar",
    "lvlb_weights",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "posterior_variance",
    "scale_factor",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "v_pred",
];

/// The same, by how their names start.
const LEFTOVER_PREFIXES: [&str; 5] = ["model_ema.", "denoiser.", "embedding_manager.", "loss.", "ztsnr"];

/// The same, by how their names end: below a component.
const LEFTOVER_ENDINGS: [&str; 5] =
    ["position_ids", "logit_scale", "attn_mask", "scaled_fp8", "encoder.embed_tokens.weight"];

/// Whether a tensor is known to play no part in a model. `name` is a full name, or one below a component's prefix.
pub(crate) fn is_leftover(name: &str) -> bool {
    LEFTOVERS.contains(&name)
        || LEFTOVER_PREFIXES.iter().any(|start| name.starts_with(start))
        || LEFTOVER_ENDINGS.iter().any(|end| name.ends_with(end))
}

/// A test of a tensor's name, and what the file is when it passes.
type Telltale = (fn(&str) -> bool, &'static str);

/// Files that are not what a pipeline is loaded from; the first that fits decides.
const TELLTALES: [Telltale; 12] = [
    (is_lora, LORA),
    (|name| name.starts_with("control_model.") || name.contains("input_hint_block."), CONTROLNET),
    (|name| name.starts_with("controlnet_cond_embedding.") || name.contains("zero_convs."), CONTROLNET),
    (|name| name.starts_with("controlnet_blocks.") || name.starts_with("controlnet_x_embedder."), CONTROLNET),
    (|name| name.starts_with("ip_adapter.") || name.starts_with("image_proj."), IP_ADAPTER),
    (|name| name.contains("motion_modules."), MOTION_MODULES),
    (|name| ["emb_params", "clip_l", "clip_g"].contains(&name) || name.starts_with("string_to_"), TEXTUAL_INVERSION),
    (|name| name.contains("joint_blocks.0."), STABLE_DIFFUSION_3),
    (|name| name.contains("double_blocks.0."), FLUX),
    (|name| name.starts_with("model.diffusion_model.") && !name.contains("_block"), OTHER_DENOISER),
    (|name| OTHER_MODULES.iter().any(|module| name.contains(module)), OTHER_DENOISER),
    (|name| VIDEO_MODULES.iter().any(|module| name.contains(module)), VIDEO_VAE),
];

/// Modules of denoisers that are no UNet.
const OTHER_MODULES: [&str; 10] = [
    "single_transformer_blocks.0.",
    "context_embedder.",
    "patchify_proj.",
    "patch_embedding.",
    "pos_embed.proj.",
    "cap_embedder.",
    "caption_projection.",
    "double_layers.0.",
    "down_blocks.1.0.channelwise",
    "clip_txt_mapper.",
];

/// Modules of autoencoders that are none of pictures.
const VIDEO_MODULES: [&str; 2] = ["decoder.middle.0.residual.", "decoder.mid_block.resnets.0.conv1.conv."];

const LORA: &str = "is a LoRA, not a model; name it under `loras` of the step";

const IP_ADAPTER: &str = "is an IP-Adapter, not a model; name it under `ip_adapter` of the step";

const TEXTUAL_INVERSION: &str = "is a textual inversion, not a model; name it under `textual_inversions` of the step";

const MOTION_MODULES: &str = "holds motion modules of AnimateDiff, which this build cannot run; use a Stable Diffusion \
    checkpoint";

const VIDEO_VAE: &str = "holds the autoencoder of a video model, which cannot be loaded from a single file by this build; \
    use a folder in the diffusers layout";

const STABLE_DIFFUSION_3: &str = "seems to be a Stable Diffusion 3 transformer, but tensors that each of them has are \
    missing; fetch the file again";

const FLUX: &str = "seems to be a transformer like Flux, but of another kind than FLUX.1, or incomplete; use a folder in \
    the diffusers layout (`model_name`)";

const CONTROLNET: &str = "holds a ControlNet, of which parts are missing; fetch the file again, or use a folder in the \
    diffusers layout";

const OTHER_DENOISER: &str = "holds a model of another family than Stable Diffusion and Flux, which cannot be loaded \
    from a single file by this build; use a folder in the diffusers layout (`model_name`)";

fn is_lora(name: &str) -> bool {
    let endings = [".alpha", ".diff", ".diff_b", ".lora_mid.weight", ".dora_scale"];
    name.starts_with("lora_")
        || [".lora_A.", ".lora_B.", ".lora_up.", ".lora_down.", ".lora.up.", ".lora.down.", "_lora.up.", "_lora.down."]
            .iter()
            .any(|mark| name.contains(mark))
        || [".hada_w", ".lokr_w", ".lora_linear_layer."].iter().any(|mark| name.contains(mark))
        || endings.iter().any(|end| name.ends_with(end))
}

/// What the file is when it is none of the models this module knows.
fn something_else(shapes: &Shapes) -> Option<String> {
    let found = TELLTALES.iter().find(|(is_one, _)| shapes.keys().any(|name| is_one(name)));
    found.map(|(_, what)| (*what).to_owned())
}
