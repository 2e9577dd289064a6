//! The modules of one component under every name that LoRA files have for them.

use std::collections::{BTreeSet, HashMap};

use super::original;
use crate::weights::Weights;

/// What the text encoder's names may or may not start with.
const TEXT_MODEL: &str = "text_model_";

/// What attention in text encoders was called before PEFT, and is called in the model.
const OLD_TEXT_ATTENTION: [(&str, &str); 4] = [
    ("_self_attn_to_q", "_self_attn_q_proj"),
    ("_self_attn_to_k", "_self_attn_k_proj"),
    ("_self_attn_to_v", "_self_attn_v_proj"),
    ("_self_attn_to_out", "_self_attn_out_proj"),
];

/// The modules of a component by name, elements joined by `_`.
pub(crate) struct Modules {
    paths: HashMap<String, String>,
}

impl Modules {
    /// The modules that `weights` has tensors for.
    pub(crate) fn of(weights: &Weights) -> Self {
        let module = |name| str::strip_suffix(name, ".weight").or_else(|| name.strip_suffix(".bias"));
        let modules: BTreeSet<&str> = weights.names().filter_map(module).collect();
        let is_unet = modules.iter().any(|module| module.starts_with("up_blocks."));
        let originals = if is_unet { original::names(&modules) } else { Vec::new() };
        let mut paths: HashMap<String, String> =
            originals.into_iter().map(|(name, module)| (name.replace('.', "_"), module.to_owned())).collect();
        for module in modules {
            let name = module.replace('.', "_");
            let short = name.strip_prefix(TEXT_MODEL).unwrap_or(&name).to_owned();
            paths.insert(short, module.to_owned());
        }
        Self { paths }
    }

    /// The path of the module that a file calls `name`, with dots, as its tensors are named in the model.
    pub(crate) fn find(&self, name: &str) -> Option<&str> {
        let name = name.strip_prefix(TEXT_MODEL).unwrap_or(name);
        if let Some(path) = self.paths.get(name) {
            return Some(path);
        }
        // Before PEFT the output projection was named without its place in a list.
        let listed = name.ends_with("_to_out").then(|| format!("{name}_0"));
        let renamed =
            OLD_TEXT_ATTENTION.iter().find_map(|(old, new)| Some(format!("{}{new}", name.strip_suffix(old)?)));
        [listed, renamed].into_iter().flatten().find_map(|name| self.paths.get(&name)).map(String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Tensor};

    use super::*;

    fn modules(names: &[&str]) -> Modules {
        let tensor = Tensor::zeros(1, DType::F32, &Device::Cpu).expect("one value");
        let tensors = names.iter().map(|name| ((*name).to_owned(), tensor.clone())).collect();
        Modules::of(&Weights::from_tensors(tensors, "test"))
    }

    #[test]
    fn a_module_of_a_unet_is_found_by_its_own_and_its_original_name() {
        let to_out = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0";
        let modules =
            modules(&[&format!("{to_out}.weight"), "down_blocks.0.resnets.0.conv1.bias", "up_blocks.0.x.weight"]);
        let inner = "transformer_blocks_0_attn1_to_out";
        assert_eq!(modules.find(&format!("down_blocks_0_attentions_0_{inner}_0")), Some(to_out));
        assert_eq!(modules.find(&format!("down_blocks_0_attentions_0_{inner}")), Some(to_out));
        assert_eq!(modules.find(&format!("input_blocks_1_1_{inner}_0")), Some(to_out));
        assert_eq!(modules.find("input_blocks_1_0_in_layers_2"), Some("down_blocks.0.resnets.0.conv1"));
        assert_eq!(modules.find("down_blocks_0_attentions_1_proj_in"), None);
    }

    #[test]
    fn a_module_of_a_text_encoder_is_found_with_or_without_its_prefix() {
        for path in ["text_model.encoder.layers.0.self_attn.q_proj", "encoder.layers.0.self_attn.q_proj"] {
            let modules = modules(&[&format!("{path}.weight")]);
            assert_eq!(modules.find("text_model_encoder_layers_0_self_attn_q_proj"), Some(path));
            assert_eq!(modules.find("encoder_layers_0_self_attn_q_proj"), Some(path));
            assert_eq!(modules.find("text_model_encoder_layers_0_self_attn_to_q"), Some(path));
        }
    }
}
