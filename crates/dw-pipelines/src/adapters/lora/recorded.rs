//! What diffusers records of a LoRA's training in its file (`lora_adapter_metadata`): the alphas, which this dialect
//! does not store as tensors.

use std::collections::HashMap;

use serde_json::{Map, Value};

use super::keys::Component;

/// The entry of the file's metadata, a JSON object as text.
const ENTRY: &str = "lora_adapter_metadata";

/// The recorded settings, keys beginning with a component's name (`unet.lora_alpha`).
#[derive(Clone, Debug, Default)]
pub(crate) struct Recorded(Map<String, Value>);

impl Recorded {
    /// Takes the settings out of a file's metadata; none recorded, or not readable, counts as nothing recorded.
    pub(crate) fn new(metadata: &HashMap<String, String>) -> Self {
        let settings = metadata.get(ENTRY).and_then(|text| serde_json::from_str(text).ok());
        Self(settings.unwrap_or_default())
    }

    /// What a low rank of `module` (elements joined by `_`) is divided into, if that was recorded.
    pub(crate) fn alpha(&self, component: Component, module: &str, rank: usize) -> Option<f64> {
        component.names().iter().find_map(|component| self.alpha_of(component, module, rank))
    }

    fn alpha_of(&self, component: &str, module: &str, rank: usize) -> Option<f64> {
        let setting = |name: &str| self.0.get(&format!("{component}.{name}"));
        let own = setting("alpha_pattern").and_then(Value::as_object).and_then(|patterns| {
            let is_meant = |pattern: &str| {
                let name = pattern.trim_start_matches('^').replace('.', "_");
                module == name || module.ends_with(&format!("_{name}"))
            };
            patterns.iter().find(|(pattern, _)| is_meant(pattern)).and_then(|(_, alpha)| alpha.as_f64())
        });
        let alpha = own.or_else(|| setting("lora_alpha")?.as_f64())?;
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
        assert_eq!(recorded.alpha(Component::Denoiser, "mid_block_attn1_to_k", 16), Some(8.0));
        assert_eq!(recorded.alpha(Component::Denoiser, "mid_block_attn2_to_k", 16), Some(2.5));
        assert_eq!(recorded.alpha(Component::TextEncoder, "layers_0_mlp_fc1", 16), Some(16.0));
        assert_eq!(recorded.alpha(Component::TextEncoder2, "layers_0_mlp_fc1", 16), None);
    }

    #[test]
    fn nothing_is_known_of_a_file_without_a_readable_record() {
        for recorded in [recorded("not JSON"), recorded("[]"), Recorded::new(&HashMap::new())] {
            assert_eq!(recorded.alpha(Component::Denoiser, "conv_in", 4), None);
        }
    }
}
