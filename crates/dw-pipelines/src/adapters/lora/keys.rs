//! The names of tensors in LoRA files, in every dialect: which component, which module, which part.
//!
//! A module's name is reduced to its path with `_` between the elements, the form in which dialects with dots and
//! those without meet; [`super::modules`] finds the module of the model behind it.

use super::Denoiser;

/// What one tensor of a file is for its module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Part {
    /// Low rank, towards the rank: `(rank, in, …)`.
    Down,
    /// Low rank, from the rank: `(out, rank, …)`.
    Up,
    /// The core between them: `(rank, rank, height, width)`.
    Mid,
    /// What the rank is divided into: a number.
    Alpha,
    /// DoRA's length of each row, as PEFT writes it.
    Magnitude,
    /// DoRA's length of each row or column, as LyCORIS writes it.
    DoraScale,
    /// LoHa: two low-rank products, multiplied by element, with optional cores.
    HadaW1A,
    HadaW1B,
    HadaW2A,
    HadaW2B,
    HadaT1,
    HadaT2,
    /// LoKr: a Kronecker product, each side whole or of low rank, the second with an optional core.
    LokrW1,
    LokrW1A,
    LokrW1B,
    LokrW2,
    LokrW2A,
    LokrW2B,
    LokrT2,
    /// What is added to the weight.
    Diff,
    /// What is added to the bias.
    DiffBias,
    /// The bias of the layer from the rank: added to the bias, scaled like the product.
    UpBias,
    /// What stands in the weight's place, at any strength.
    Replacement,
}

/// A component that files have changes for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Component {
    /// The UNet or the transformer.
    Denoiser,
    TextEncoder,
    TextEncoder2,
    TextEncoder3,
    /// The T5 encoder, whichever place it has in the pipeline.
    T5,
}

impl Component {
    /// Whether pipelines have it under `name`, where a T5 encoder may be or not.
    pub(crate) fn is(self, name: &str, is_t5: bool) -> bool {
        match self {
            Self::Denoiser => matches!(name, "unet" | "transformer"),
            Self::TextEncoder => name == "text_encoder",
            Self::TextEncoder2 => name == "text_encoder_2",
            Self::TextEncoder3 => name == "text_encoder_3",
            Self::T5 => is_t5,
        }
    }

    /// The names under which training settings of it are recorded.
    pub(crate) fn names(self) -> &'static [&'static str] {
        match self {
            Self::Denoiser => &["unet", "transformer"],
            Self::TextEncoder => &["text_encoder"],
            Self::TextEncoder2 => &["text_encoder_2"],
            Self::TextEncoder3 | Self::T5 => &["text_encoder_3"],
        }
    }
}

/// A tensor's name, understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Key {
    pub(crate) component: Component,
    /// The module's path inside it, elements joined by `_`.
    pub(crate) module: String,
    pub(crate) part: Part,
}

/// How names end. Where one ending is part of another, the longer one comes first.
const ENDINGS: &[(&str, Part)] = &[
    // PEFT and diffusers.
    (".lora_A.weight", Part::Down),
    (".lora_B.weight", Part::Up),
    (".lora_B.bias", Part::UpBias),
    (".lora_magnitude_vector.weight", Part::Magnitude),
    (".lora_magnitude_vector", Part::Magnitude),
    // diffusers before PEFT: attention processors, text encoders.
    (".lora_linear_layer.down.weight", Part::Down),
    (".lora_linear_layer.up.weight", Part::Up),
    (".lora_linear_layer.alpha", Part::Alpha),
    ("_lora.down.weight", Part::Down),
    ("_lora.up.weight", Part::Up),
    ("_lora.alpha", Part::Alpha),
    (".lora.down.weight", Part::Down),
    (".lora.up.weight", Part::Up),
    (".lora.alpha", Part::Alpha),
    // kohya and LyCORIS.
    (".lora_down.weight", Part::Down),
    (".lora_up.weight", Part::Up),
    (".lora_mid.weight", Part::Mid),
    (".dora_scale", Part::DoraScale),
    (".hada_w1_a", Part::HadaW1A),
    (".hada_w1_b", Part::HadaW1B),
    (".hada_w2_a", Part::HadaW2A),
    (".hada_w2_b", Part::HadaW2B),
    (".hada_t1", Part::HadaT1),
    (".hada_t2", Part::HadaT2),
    (".lokr_w1_a", Part::LokrW1A),
    (".lokr_w1_b", Part::LokrW1B),
    (".lokr_w1", Part::LokrW1),
    (".lokr_w2_a", Part::LokrW2A),
    (".lokr_w2_b", Part::LokrW2B),
    (".lokr_w2", Part::LokrW2),
    (".lokr_t2", Part::LokrT2),
    (".diff_b", Part::DiffBias),
    (".diff", Part::Diff),
    (".b_norm", Part::DiffBias),
    (".w_norm", Part::Diff),
    (".alpha", Part::Alpha),
];

/// Norms of query and key, which control LoRAs replace: the end of the path, and the tensor's own name.
const NORMS: [(&str, &str); 6] = [
    (".query_norm", ".scale"),
    (".key_norm", ".scale"),
    (".norm_q", ".weight"),
    (".norm_k", ".weight"),
    (".norm_added_q", ".weight"),
    (".norm_added_k", ".weight"),
];

/// How names begin, and what of that belongs to the path. Where one beginning is part of another, the longer one comes
/// first. After the first group come files that hold one component and do not name it.
const BEGINNINGS: &[(&str, &str, Component)] = &[
    ("unet.", "", Component::Denoiser),
    ("transformer.", "", Component::Denoiser),
    ("text_encoder_3.", "", Component::TextEncoder3),
    ("text_encoder_2.", "", Component::TextEncoder2),
    ("text_encoder.", "", Component::TextEncoder),
    ("lora_unet_", "", Component::Denoiser),
    ("lora_transformer_", "", Component::Denoiser),
    ("lora_te1_", "", Component::TextEncoder),
    ("lora_te2_", "", Component::TextEncoder2),
    ("lora_te3_", "", Component::T5),
    ("lora_te_", "", Component::TextEncoder),
    ("lycoris_", "", Component::Denoiser),
    ("model.diffusion_model.", "", Component::Denoiser),
    ("diffusion_model.", "", Component::Denoiser),
    ("text_encoders.clip_l.transformer.", "", Component::TextEncoder),
    ("text_encoders.clip_g.transformer.", "", Component::TextEncoder2),
    ("text_encoders.t5xxl.transformer.", "", Component::T5),
    ("text_model.", "text_model.", Component::TextEncoder),
    ("down_blocks.", "down_blocks.", Component::Denoiser),
    ("mid_block.", "mid_block.", Component::Denoiser),
    ("up_blocks.", "up_blocks.", Component::Denoiser),
    ("transformer_blocks.", "transformer_blocks.", Component::Denoiser),
    ("single_transformer_blocks.", "single_transformer_blocks.", Component::Denoiser),
    ("double_blocks.", "double_blocks.", Component::Denoiser),
    ("single_blocks.", "single_blocks.", Component::Denoiser),
    ("joint_blocks.", "joint_blocks.", Component::Denoiser),
    ("pos_embed.", "pos_embed.", Component::Denoiser),
    ("x_embedder", "x_embedder", Component::Denoiser),
    ("context_embedder", "context_embedder", Component::Denoiser),
    ("time_text_embed.", "time_text_embed.", Component::Denoiser),
    ("t_embedder.", "t_embedder.", Component::Denoiser),
    ("y_embedder.", "y_embedder.", Component::Denoiser),
    ("norm_out.", "norm_out.", Component::Denoiser),
    ("proj_out", "proj_out", Component::Denoiser),
    ("img_in", "img_in", Component::Denoiser),
    ("txt_in", "txt_in", Component::Denoiser),
    ("time_in.", "time_in.", Component::Denoiser),
    ("vector_in.", "vector_in.", Component::Denoiser),
    ("guidance_in.", "guidance_in.", Component::Denoiser),
    ("final_layer.", "final_layer.", Component::Denoiser),
];

/// What PEFT puts before the names of the model it wraps.
const WRAPPER: &str = "base_model.model.";

/// Understands a tensor's name; none when it is of no known dialect.
pub(crate) fn parse(name: &str) -> Option<Key> {
    let (path, part) = split_ending(name)?;
    let path = path.strip_prefix(WRAPPER).unwrap_or(path);
    let (rest, kept, component) = BEGINNINGS
        .iter()
        .find_map(|(beginning, kept, component)| Some((path.strip_prefix(beginning)?, kept, component)))?;
    let rest = rest.strip_prefix(WRAPPER).unwrap_or(rest);
    let module = format!("{kept}{rest}").replace(".processor.", ".").replace('.', "_");
    Some(Key { component: *component, module, part })
}

/// The path of the module that a tensor belongs to, as the file spells it, with the component's name before it.
pub(crate) fn path(name: &str) -> Option<&str> {
    split_ending(name).map(|(path, _)| path)
}

/// The module's path and the part its tensor is.
fn split_ending(name: &str) -> Option<(&str, Part)> {
    let known = ENDINGS.iter().find_map(|(ending, part)| Some((name.strip_suffix(ending)?, *part)));
    known.or_else(|| split_numbered(name)).or_else(|| split_norm(name)).or_else(|| split_named_adapter(name))
}

/// XLabs numbers what its attention processors have: 1 for the picture, 2 for the text (`qkv_lora1.down.weight`). The
/// number stays in the path.
fn split_numbered(name: &str) -> Option<(&str, Part)> {
    let parts = [(".down.weight", Part::Down), (".up.weight", Part::Up)];
    let (path, part) = parts.into_iter().find_map(|(ending, part)| Some((name.strip_suffix(ending)?, part)))?;
    ["_lora1", "_lora2"].iter().any(|ending| path.ends_with(ending)).then_some((path, part))
}

fn split_norm(name: &str) -> Option<(&str, Part)> {
    let path = NORMS.iter().find_map(|(norm, own)| name.strip_suffix(own).filter(|path| path.ends_with(norm)))?;
    Some((path, Part::Replacement))
}

/// PEFT may keep the adapter's name: `….lora_A.default.weight`, `….lora_magnitude_vector.default`.
fn split_named_adapter(name: &str) -> Option<(&str, Part)> {
    let parts = [(".lora_A.", Part::Down), (".lora_B.", Part::Up), (".lora_magnitude_vector.", Part::Magnitude)];
    parts.into_iter().find_map(|(marker, part)| {
        let (path, rest) = name.rsplit_once(marker)?;
        let adapter = rest.strip_suffix(".weight").unwrap_or(rest);
        (!adapter.is_empty() && !adapter.contains('.') && adapter != "bias").then_some((path, part))
    })
}

/// What kind of model a file was made for, as far as its names say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MadeFor {
    /// A pipeline with this denoiser.
    Denoiser(Denoiser),
    /// Some diffusion transformer.
    Transformer,
    /// A family that no pipeline here has.
    Other(&'static str),
}

/// Names that only the files of one family have; the first that is found decides. A dialect without dots and one with
/// them each have their spelling.
const MARKS: &[(&str, MadeFor)] = &[
    ("double_stream_modulation", MadeFor::Other("Flux 2")),
    ("to_qkv_mlp_proj", MadeFor::Other("Flux 2")),
    ("single_transformer_blocks", MadeFor::Denoiser(Denoiser::Flux)),
    ("double_blocks", MadeFor::Denoiser(Denoiser::Flux)),
    ("single_blocks", MadeFor::Denoiser(Denoiser::Flux)),
    ("joint_blocks", MadeFor::Denoiser(Denoiser::StableDiffusion3)),
    ("cross_attn.k", MadeFor::Other("Wan")),
    ("cross_attn_k", MadeFor::Other("Wan")),
    ("img_mod", MadeFor::Other("Qwen-Image")),
    ("attn.add_k_proj", MadeFor::Transformer),
    ("attn_add_k_proj", MadeFor::Transformer),
    ("txt_in", MadeFor::Transformer),
    ("down_blocks", MadeFor::Denoiser(Denoiser::Unet)),
    ("up_blocks", MadeFor::Denoiser(Denoiser::Unet)),
    ("mid_block", MadeFor::Denoiser(Denoiser::Unet)),
    ("input_blocks", MadeFor::Denoiser(Denoiser::Unet)),
    ("output_blocks", MadeFor::Denoiser(Denoiser::Unet)),
    ("middle_block", MadeFor::Denoiser(Denoiser::Unet)),
];

/// Beginnings that only files for diffusion transformers have.
const TRANSFORMERS: [&str; 3] = ["transformer.", "lora_transformer_", "base_model.model.transformer."];

/// What a file with these names was made for; none when nothing speaks for one family.
pub(crate) fn made_for<'a>(mut names: impl Iterator<Item = &'a str> + Clone) -> Option<MadeFor> {
    let marked = MARKS.iter().find(|(mark, _)| names.clone().any(|name| name.contains(mark)));
    let found = marked.map(|(_, family)| *family).or_else(|| {
        let is_transformer = names.clone().any(|name| TRANSFORMERS.iter().any(|beginning| name.starts_with(beginning)));
        is_transformer.then_some(MadeFor::Transformer)
    });
    match found {
        // Of the transformers here, those of Stable Diffusion 3.5 alone have a second attention.
        Some(MadeFor::Transformer) if names.any(|name| name.contains("attn2")) => {
            Some(MadeFor::Denoiser(Denoiser::StableDiffusion3))
        }
        found => found,
    }
}

impl MadeFor {
    /// Whether a file for it may fit a pipeline with this denoiser.
    pub(crate) fn fits(self, denoiser: Denoiser) -> bool {
        match self {
            Self::Denoiser(own) => own == denoiser,
            Self::Transformer => denoiser != Denoiser::Unet,
            Self::Other(_) => false,
        }
    }

    /// The family, as a message names it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Denoiser(denoiser) => denoiser.name(),
            Self::Transformer => "a diffusion transformer",
            Self::Other(name) => name,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> Option<(Component, String, Part)> {
        parse(name).map(|key| (key.component, key.module, key.part))
    }

    fn is(name: &str, component: Component, module: &str, part: Part) {
        assert_eq!(key(name), Some((component, module.to_owned(), part)), "{name}");
    }

    const TO_Q: &str = "down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q";

    #[test]
    fn peft_and_diffusers_names_are_read() {
        let path = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q";
        is(&format!("unet.{path}.lora_A.weight"), Component::Denoiser, TO_Q, Part::Down);
        is(&format!("unet.{path}.lora_B.weight"), Component::Denoiser, TO_Q, Part::Up);
        is(&format!("unet.{path}.lora_magnitude_vector"), Component::Denoiser, TO_Q, Part::Magnitude);
        is(&format!("base_model.model.unet.{path}.lora_A.weight"), Component::Denoiser, TO_Q, Part::Down);
        is(&format!("unet.base_model.model.{path}.lora_A.default.weight"), Component::Denoiser, TO_Q, Part::Down);
        is(
            &format!("base_model.model.{path}.lora_magnitude_vector.default.weight"),
            Component::Denoiser,
            TO_Q,
            Part::Magnitude,
        );
        let text = "text_encoder_2.text_model.encoder.layers.3.mlp.fc1.lora_B.weight";
        is(text, Component::TextEncoder2, "text_model_encoder_layers_3_mlp_fc1", Part::Up);
        is(&format!("unet.{path}.lora.down.weight"), Component::Denoiser, TO_Q, Part::Down);
    }

    #[test]
    fn names_of_the_old_attention_processors_are_read() {
        let path = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora";
        is(&format!("{path}.down.weight"), Component::Denoiser, TO_Q, Part::Down);
        is(&format!("unet.{path}.up.weight"), Component::Denoiser, TO_Q, Part::Up);
        let text = "text_encoder.text_model.encoder.layers.0.self_attn.k_proj.lora_linear_layer.up.weight";
        is(text, Component::TextEncoder, "text_model_encoder_layers_0_self_attn_k_proj", Part::Up);
    }

    #[test]
    fn kohya_names_are_read_with_diffusers_and_with_original_blocks() {
        is(&format!("lora_unet_{TO_Q}.lora_down.weight"), Component::Denoiser, TO_Q, Part::Down);
        is(&format!("lora_unet_{TO_Q}.alpha"), Component::Denoiser, TO_Q, Part::Alpha);
        is(&format!("lora_unet_{TO_Q}.dora_scale"), Component::Denoiser, TO_Q, Part::DoraScale);
        let original = "input_blocks_4_1_transformer_blocks_0_attn1_to_q";
        is(&format!("lora_unet_{original}.lora_up.weight"), Component::Denoiser, original, Part::Up);
        let dotted = "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.lora_A.weight";
        is(dotted, Component::Denoiser, original, Part::Down);
        let layer = "text_model_encoder_layers_0_mlp_fc1";
        for (beginning, component) in [
            ("lora_te_", Component::TextEncoder),
            ("lora_te1_", Component::TextEncoder),
            ("lora_te2_", Component::TextEncoder2),
        ] {
            is(&format!("{beginning}{layer}.lora_down.weight"), component, layer, Part::Down);
        }
    }

    #[test]
    fn lycoris_names_are_read() {
        let parts = [
            ("lora_mid.weight", Part::Mid),
            ("hada_w1_a", Part::HadaW1A),
            ("hada_w2_b", Part::HadaW2B),
            ("hada_t1", Part::HadaT1),
            ("lokr_w1", Part::LokrW1),
            ("lokr_w2_a", Part::LokrW2A),
            ("lokr_t2", Part::LokrT2),
            ("diff", Part::Diff),
            ("diff_b", Part::DiffBias),
            ("w_norm", Part::Diff),
        ];
        for (ending, part) in parts {
            is(&format!("lora_unet_{TO_Q}.{ending}"), Component::Denoiser, TO_Q, part);
            is(&format!("lycoris_{TO_Q}.{ending}"), Component::Denoiser, TO_Q, part);
        }
    }

    #[test]
    fn other_names_are_not_read() {
        for name in
            ["emb_params", "unet.conv_in.weight", "lora_unet_x.scale", "vae.x.lora_A.weight", "unet.x.lora_A.bias"]
        {
            assert_eq!(key(name), None, "{name}");
        }
    }

    #[test]
    fn names_of_files_for_transformers_are_read() {
        let module = "single_transformer_blocks_0_attn_to_q";
        is("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", Component::Denoiser, module, Part::Down);
        is(&format!("lora_transformer_{module}.lora_down.weight"), Component::Denoiser, module, Part::Down);
        let fused = "double_blocks_3_img_attn_qkv";
        is("diffusion_model.double_blocks.3.img_attn.qkv.lora_B.weight", Component::Denoiser, fused, Part::Up);
        is("base_model.model.double_blocks.3.img_attn.qkv.lora_A.weight", Component::Denoiser, fused, Part::Down);
        is(&format!("lora_unet_{fused}.dora_scale"), Component::Denoiser, fused, Part::DoraScale);
        is(
            "final_layer.adaLN_modulation.1.lora_B.bias",
            Component::Denoiser,
            "final_layer_adaLN_modulation_1",
            Part::UpBias,
        );
        is("img_in.lora_A.weight", Component::Denoiser, "img_in", Part::Down);
        for path in
            ["x_embedder.proj", "context_embedder", "t_embedder.mlp.2", "y_embedder.mlp.0", "final_layer.linear"]
                .into_iter()
                .chain(["pos_embed.proj", "time_text_embed.text_embedder.linear_1", "norm_out.linear", "proj_out"])
        {
            let module = path.replace('.', "_");
            is(&format!("base_model.model.{path}.lora_B.weight"), Component::Denoiser, &module, Part::Up);
        }
        let joint = "joint_blocks_0_context_block_attn_qkv";
        is(&format!("lora_unet_{joint}.lora_up.weight"), Component::Denoiser, joint, Part::Up);
        let t5 = "encoder_block_0_layer_0_SelfAttention_q";
        is(&format!("lora_te3_{t5}.lora_down.weight"), Component::T5, t5, Part::Down);
        let comfy = "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.lora_down.weight";
        is(comfy, Component::T5, t5, Part::Down);
    }

    #[test]
    fn names_of_xlabs_keep_the_number_of_the_stream() {
        let double = "double_blocks.0.processor";
        is(&format!("{double}.qkv_lora1.down.weight"), Component::Denoiser, "double_blocks_0_qkv_lora1", Part::Down);
        is(&format!("{double}.proj_lora2.up.weight"), Component::Denoiser, "double_blocks_0_proj_lora2", Part::Up);
        let single = "diffusion_model.single_blocks.4.processor";
        is(&format!("{single}.qkv_lora.up.weight"), Component::Denoiser, "single_blocks_4_qkv", Part::Up);
    }

    #[test]
    fn norms_that_are_replaced_are_read_in_both_namings() {
        let original = "double_blocks.0.img_attn.norm.query_norm";
        is(&format!("{original}.scale"), Component::Denoiser, &original.replace('.', "_"), Part::Replacement);
        let path = "transformer_blocks.0.attn.norm_added_k";
        is(&format!("transformer.{path}.weight"), Component::Denoiser, &path.replace('.', "_"), Part::Replacement);
    }

    #[test]
    fn what_a_file_was_made_for_shows_in_its_names() {
        let family = |name: &'static str| made_for([name].into_iter());
        let of = |denoiser: Denoiser| Some(MadeFor::Denoiser(denoiser));
        assert_eq!(family("lora_unet_double_blocks_0_img_mod_lin.alpha"), of(Denoiser::Flux));
        assert_eq!(family("lora_unet_joint_blocks_0_x_block_mlp_fc1.alpha"), of(Denoiser::StableDiffusion3));
        assert_eq!(family("lora_unet_output_blocks_2_2_conv.alpha"), of(Denoiser::Unet));
        assert_eq!(family("unet.mid_block.attentions.0.proj_in.lora_A.weight"), of(Denoiser::Unet));
        assert_eq!(
            family("transformer.transformer_blocks.0.img_mod.1.lora_A.weight"),
            Some(MadeFor::Other("Qwen-Image"))
        );
        let either = family("transformer.transformer_blocks.0.attn.add_k_proj.lora_A.weight").expect("a transformer");
        assert_eq!(either, MadeFor::Transformer);
        assert!(either.fits(Denoiser::Flux) && either.fits(Denoiser::StableDiffusion3) && !either.fits(Denoiser::Unet));
        let second = "transformer.transformer_blocks.0.attn2.to_k.lora_A.weight";
        let both = ["transformer.transformer_blocks.0.attn.add_k_proj.lora_A.weight", second];
        assert_eq!(made_for(both.into_iter()), of(Denoiser::StableDiffusion3));
        assert_eq!(family("lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha"), None);
    }
}
