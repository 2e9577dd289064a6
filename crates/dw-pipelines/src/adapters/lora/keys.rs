//! The names of tensors in LoRA files, in every dialect: which component, which module, which part.
//!
//! A module's name is reduced to its path with `_` between the elements, the form in which dialects with dots and
//! those without meet; [`super::modules`] finds the module of the model behind it.

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
}

/// A tensor's name, understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Key {
    /// The component, as pipelines name it.
    pub(crate) component: &'static str,
    /// The module's path inside it, elements joined by `_`.
    pub(crate) module: String,
    pub(crate) part: Part,
}

const UNET: &str = "unet";
const TRANSFORMER: &str = "transformer";
const TEXT_ENCODER: &str = "text_encoder";
const TEXT_ENCODER_2: &str = "text_encoder_2";

/// How names end. Where one ending is part of another, the longer one comes first.
const ENDINGS: &[(&str, Part)] = &[
    // PEFT and diffusers.
    (".lora_A.weight", Part::Down),
    (".lora_B.weight", Part::Up),
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

/// How names begin. Where one beginning is part of another, the longer one comes first. The last two rows are files
/// that hold one component and do not name it.
const BEGINNINGS: &[(&str, &str, &str)] = &[
    ("unet.", "", UNET),
    ("transformer.", "", TRANSFORMER),
    ("text_encoder_2.", "", TEXT_ENCODER_2),
    ("text_encoder.", "", TEXT_ENCODER),
    ("lora_unet_", "", UNET),
    ("lora_te1_", "", TEXT_ENCODER),
    ("lora_te2_", "", TEXT_ENCODER_2),
    ("lora_te_", "", TEXT_ENCODER),
    ("lycoris_", "", UNET),
    ("model.diffusion_model.", "", UNET),
    ("diffusion_model.", "", UNET),
    ("text_encoders.clip_l.transformer.", "", TEXT_ENCODER),
    ("text_encoders.clip_g.transformer.", "", TEXT_ENCODER_2),
    ("down_blocks.", "down_blocks.", UNET),
    ("mid_block.", "mid_block.", UNET),
    ("up_blocks.", "up_blocks.", UNET),
    ("text_model.", "text_model.", TEXT_ENCODER),
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
    Some(Key { component, module, part })
}

/// The module's path and the part its tensor is.
fn split_ending(name: &str) -> Option<(&str, Part)> {
    let known = ENDINGS.iter().find_map(|(ending, part)| Some((name.strip_suffix(ending)?, *part)));
    known.or_else(|| split_named_adapter(name))
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

/// Names that only the files of a family of transformers have, and the family. A dialect without dots and one with
/// them each have their spelling.
const FOREIGN: &[(&str, &str)] = &[
    ("single_transformer_blocks", "Flux"),
    ("double_blocks", "Flux"),
    ("single_blocks", "Flux"),
    ("joint_blocks", "Stable Diffusion 3"),
    ("attn.add_k_proj", "Stable Diffusion 3"),
    ("attn_add_k_proj", "Stable Diffusion 3"),
    ("cross_attn.k", "Wan"),
    ("cross_attn_k", "Wan"),
    ("txt_in", "a diffusion transformer"),
    ("img_mod", "a diffusion transformer"),
];

/// Beginnings that only files for diffusion transformers have.
const TRANSFORMERS: [&str; 3] = ["transformer.", "lora_transformer_", "base_model.model.transformer."];

/// What only the names of files for UNets have.
const UNETS: [&str; 5] = ["down_blocks", "up_blocks", "input_blocks", "output_blocks", "mid_block"];

/// The family whose denoiser is no UNet that a file with these names was made for; none when nothing speaks for
/// one.
pub(crate) fn foreign_family<'a>(names: impl Iterator<Item = &'a str> + Clone) -> Option<&'static str> {
    let named = FOREIGN.iter().find(|(mark, _)| names.clone().any(|name| name.contains(mark)));
    if let Some((_, family)) = named {
        return Some(family);
    }
    let mut names = names;
    names
        .any(|name| TRANSFORMERS.iter().any(|beginning| name.starts_with(beginning)))
        .then_some("a diffusion transformer")
}

/// Whether a file with these names was made for a UNet.
pub(crate) fn is_for_unet<'a>(mut names: impl Iterator<Item = &'a str>) -> bool {
    names.any(|name| UNETS.iter().any(|mark| name.contains(mark)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> Option<(&'static str, String, Part)> {
        parse(name).map(|key| (key.component, key.module, key.part))
    }

    fn is(name: &str, component: &'static str, module: &str, part: Part) {
        assert_eq!(key(name), Some((component, module.to_owned(), part)), "{name}");
    }

    const TO_Q: &str = "down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q";

    #[test]
    fn peft_and_diffusers_names_are_read() {
        let path = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q";
        is(&format!("unet.{path}.lora_A.weight"), UNET, TO_Q, Part::Down);
        is(&format!("unet.{path}.lora_B.weight"), UNET, TO_Q, Part::Up);
        is(&format!("unet.{path}.lora_magnitude_vector"), UNET, TO_Q, Part::Magnitude);
        is(&format!("base_model.model.unet.{path}.lora_A.weight"), UNET, TO_Q, Part::Down);
        is(&format!("unet.base_model.model.{path}.lora_A.default.weight"), UNET, TO_Q, Part::Down);
        is(&format!("base_model.model.{path}.lora_magnitude_vector.default.weight"), UNET, TO_Q, Part::Magnitude);
        let text = "text_encoder_2.text_model.encoder.layers.3.mlp.fc1.lora_B.weight";
        is(text, TEXT_ENCODER_2, "text_model_encoder_layers_3_mlp_fc1", Part::Up);
        is(&format!("unet.{path}.lora.down.weight"), UNET, TO_Q, Part::Down);
    }

    #[test]
    fn names_of_the_old_attention_processors_are_read() {
        let path = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora";
        is(&format!("{path}.down.weight"), UNET, TO_Q, Part::Down);
        is(&format!("unet.{path}.up.weight"), UNET, TO_Q, Part::Up);
        let text = "text_encoder.text_model.encoder.layers.0.self_attn.k_proj.lora_linear_layer.up.weight";
        is(text, TEXT_ENCODER, "text_model_encoder_layers_0_self_attn_k_proj", Part::Up);
    }

    #[test]
    fn kohya_names_are_read_with_diffusers_and_with_original_blocks() {
        is(&format!("lora_unet_{TO_Q}.lora_down.weight"), UNET, TO_Q, Part::Down);
        is(&format!("lora_unet_{TO_Q}.alpha"), UNET, TO_Q, Part::Alpha);
        is(&format!("lora_unet_{TO_Q}.dora_scale"), UNET, TO_Q, Part::DoraScale);
        let original = "input_blocks_4_1_transformer_blocks_0_attn1_to_q";
        is(&format!("lora_unet_{original}.lora_up.weight"), UNET, original, Part::Up);
        let dotted = "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.lora_A.weight";
        is(dotted, UNET, original, Part::Down);
        let layer = "text_model_encoder_layers_0_mlp_fc1";
        for (beginning, component) in
            [("lora_te_", TEXT_ENCODER), ("lora_te1_", TEXT_ENCODER), ("lora_te2_", TEXT_ENCODER_2)]
        {
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
            is(&format!("lora_unet_{TO_Q}.{ending}"), UNET, TO_Q, part);
            is(&format!("lycoris_{TO_Q}.{ending}"), UNET, TO_Q, part);
        }
    }

    #[test]
    fn other_names_are_not_read() {
        for name in
            ["emb_params", "unet.conv_in.weight", "lora_unet_x.scale", "vae.x.lora_A.weight", "unet.x.lora_B.bias"]
        {
            assert_eq!(key(name), None, "{name}");
        }
    }

    #[test]
    fn files_for_transformers_are_told_from_files_for_unets() {
        let family = |name: &'static str| foreign_family([name].into_iter());
        assert_eq!(family("lora_unet_double_blocks_0_img_attn_proj.alpha"), Some("Flux"));
        assert_eq!(
            family("transformer.transformer_blocks.0.attn.add_k_proj.lora_A.weight"),
            Some("Stable Diffusion 3")
        );
        assert_eq!(family("transformer.x.lora_A.weight"), Some("a diffusion transformer"));
        assert_eq!(family("lora_unet_output_blocks_2_2_conv.alpha"), None);
        assert_eq!(family("unet.mid_block.attentions.0.proj_in.lora_A.weight"), None);
    }
}
