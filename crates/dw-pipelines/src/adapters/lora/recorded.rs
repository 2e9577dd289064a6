//! What diffusers records of a LoRA's training in its file (`lora_adapter_metadata`): the alphas, which this dialect
//! does not store as tensors.

use std::collections::HashMap;

use serde_json::{Map, Value};

use super::keys::Component;

/// The entry of the file's metadata, a JSON object as text.
const ENTRY: &str = "lora_adapter_metadata";

/// PEFT's alpha where the settings name none.
const USUAL_ALPHA: f64 = 8.0;

/// The recorded settings, keys beginning with a component's name (`unet.lora_alpha`).
#[derive(Clone, Debug, Default)]
pub(crate) struct Recorded(Map<String, Value>);

impl Recorded {
    /// Takes the settings out of a file's metadata; none recorded, or not readable, counts as nothing recorded.
    pub(crate) fn new(metadata: &HashMap<String, String>) -> Self {
        let settings = metadata.get(ENTRY).and_then(|text| serde_json::from_str(text).ok());
        Self(settings.unwrap_or_default())
    }

    /// What a low rank of the module at `path` (elements joined by `.`) is divided into, if its component's settings
    /// were recorded.
    pub(crate) fn alpha(&self, component: Component, path: &str, rank: usize) -> Option<f64> {
        component.names().iter().find_map(|component| self.alpha_of(component, path, rank))
    }

    fn alpha_of(&self, component: &str, path: &str, rank: usize) -> Option<f64> {
        let beginning = format!("{component}.");
        self.0.keys().find(|key| key.starts_with(&beginning))?;
        let setting = |name: &str| self.0.get(&format!("{beginning}{name}"));
        let own = setting("alpha_pattern").and_then(Value::as_object).and_then(|patterns| {
            let module = path.strip_prefix(&beginning).unwrap_or(path);
            let is_meant = |pattern: &str| match pattern.strip_prefix('^') {
                Some(whole) => module == whole,
                None => module.strip_suffix(pattern).is_some_and(|rest| rest.is_empty() || rest.ends_with('.')),
            };
            patterns.iter().find(|(pattern, _)| is_meant(pattern)).and_then(|(_, alpha)| alpha.as_f64())
        });
        let alpha = own.or_else(|| setting("lora_alpha")?.as_f64()).unwrap_or(USUAL_ALPHA);
        // Rank-stabilised LoRA (arXiv:2312.03732) divides by the root of the rank.
        let is_stabilised = setting("use_rslora").and_then(Value::as_bool).unwrap_or(false);
        Some(if is_stabilised { alpha * (rank as f64).sqrt() } else { alpha })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recorded(json: &str) -> Recorded {
        Recorded::new(&HashMap::from([(ENTRY.to_owned(), json.to_owned())]))
    }

    #[test]
    fn alphas_are_found_by_component_and_module() {
        let recorded = recorded(
            r#"{"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn2.to_k": 2.5}, "text_encoder.lora_alpha": 4,
                "text_encoder.use_rslora": true}"#,
        );
        assert_eq!(recorded.alpha(Component::Denoiser, "unet.mid_block.attn1.to_k", 16), Some(8.0));
        assert_eq!(recorded.alpha(Component::Denoiser, "unet.mid_block.attn2.to_k", 16), Some(2.5));
        assert_eq!(recorded.alpha(Component::TextEncoder, "text_encoder.layers.0.mlp.fc1", 16), Some(16.0));
        assert_eq!(recorded.alpha(Component::TextEncoder2, "text_encoder_2.layers.0.mlp.fc1", 16), None);
    }

    #[test]
    fn a_pattern_ends_a_path_at_whole_elements() {
        let recorded = recorded(
            r#"{"transformer.r": 4, "transformer.alpha_pattern": {"transformer_blocks.0.attn.to_q": 3, "^proj_out": 2}}"#,
        );
        let alpha = |path: &str| recorded.alpha(Component::Denoiser, path, 4);
        assert_eq!(alpha("transformer.transformer_blocks.0.attn.to_q"), Some(3.0));
        assert_eq!(alpha("transformer_blocks.0.attn.to_q"), Some(3.0));
        // Other blocks whose name only ends alike have PEFT's usual alpha, for none is recorded.
        assert_eq!(alpha("transformer.single_transformer_blocks.0.attn.to_q"), Some(8.0));
        assert_eq!(alpha("transformer.proj_out"), Some(2.0));
        assert_eq!(alpha("transformer.single_transformer_blocks.0.proj_out"), Some(8.0));
    }

    #[test]
    fn nothing_is_known_of_a_file_without_a_readable_record() {
        for recorded in [recorded("not JSON"), recorded("[]"), Recorded::new(&HashMap::new())] {
            assert_eq!(recorded.alpha(Component::Denoiser, "unet.conv_in", 4), None);
        }
    }
}
