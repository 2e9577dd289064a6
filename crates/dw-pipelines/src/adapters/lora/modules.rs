//! The modules of one component under every name that LoRA files have for them.

use std::collections::{BTreeSet, HashMap};

use super::original;
use crate::weights::{
    Weights,
    single_file::{
        flux::FluxLayout,
        key_map::{Change as Pick, KeyMap},
        sd3::Sd3Layout,
    },
};

/// What the text encoder's names may or may not start with.
const TEXT_MODEL: &str = "text_model_";

/// What attention in text encoders was called before PEFT, and is called in the model.
const OLD_TEXT_ATTENTION: [(&str, &str); 4] = [
    ("_self_attn_to_q", "_self_attn_q_proj"),
    ("_self_attn_to_k", "_self_attn_k_proj"),
    ("_self_attn_to_v", "_self_attn_v_proj"),
    ("_self_attn_to_out", "_self_attn_out_proj"),
];

/// A module of the model, and which rows of what a file has for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// Its path, with dots, as its tensors are named in the model.
    pub(crate) path: String,
    pub(crate) pick: Pick,
}

impl Place {
    fn whole(path: &str) -> Self {
        Self { path: path.to_owned(), pick: Pick::None }
    }
}

/// The modules of a component by name, elements joined by `_`. A name of layers that the original computes as one stands
/// for several modules.
pub(crate) struct Modules {
    places: HashMap<String, Vec<Place>>,
}

impl Modules {
    /// The modules that `weights` has tensors for.
    pub(crate) fn of(weights: &Weights) -> Self {
        let module = |name| str::strip_suffix(name, ".weight").or_else(|| name.strip_suffix(".bias"));
        let modules: BTreeSet<&str> = weights.names().filter_map(module).collect();
        let mut places: HashMap<String, Vec<Place>> = HashMap::new();
        if modules.iter().any(|module| module.starts_with("up_blocks.")) {
            for (name, module) in original::names(&modules) {
                places.insert(name.replace('.', "_"), vec![Place::whole(module)]);
            }
        }
        if let Some(map) = transformer_names(weights) {
            for module in &modules {
                add_originals(&mut places, &map, module);
            }
        }
        for module in modules {
            let name = module.replace('.', "_");
            let short = name.strip_prefix(TEXT_MODEL).unwrap_or(&name).to_owned();
            // The model's own name counts before an original one that is spelled alike.
            places.insert(short, vec![Place::whole(module)]);
        }
        Self { places }
    }

    /// The modules behind the name that a file has for them; none when the model has no such module.
    pub(crate) fn find(&self, name: &str) -> &[Place] {
        let name = name.strip_prefix(TEXT_MODEL).unwrap_or(name);
        if let Some(places) = self.places.get(name) {
            return places;
        }
        // Before PEFT the output projection was named without its place in a list.
        let listed = name.ends_with("_to_out").then(|| format!("{name}_0"));
        let renamed =
            OLD_TEXT_ATTENTION.iter().find_map(|(old, new)| Some(format!("{}{new}", name.strip_suffix(old)?)));
        let other = [listed, renamed].into_iter().flatten().find_map(|name| self.places.get(&name));
        other.map_or(&[], Vec::as_slice)
    }
}

/// The original names of a diffusion transformer's tensors; none for other models.
fn transformer_names(weights: &Weights) -> Option<KeyMap> {
    let shape = |name: &str| weights.shape_of(name).map(|shape| shape.dims().to_vec());
    if weights.contains("single_transformer_blocks.0.attn.to_q.weight") {
        return FluxLayout::of_canonical(shape).map(FluxLayout::key_map);
    }
    let is_mmdit =
        weights.contains("pos_embed.proj.weight") && weights.contains("transformer_blocks.0.attn.to_q.weight");
    is_mmdit.then(|| Sd3Layout::of_canonical(|name| weights.contains(name)).key_map())
}

/// Adds the original name of a module, and what XLabs calls it.
fn add_originals(places: &mut HashMap<String, Vec<Place>>, map: &KeyMap, module: &str) {
    let tensor = format!("{module}.weight");
    let Some(original) = map.original(&tensor) else { return };
    let Some(target) = map.canonical(&original).into_iter().find(|target| target.name == tensor) else { return };
    let Some((name, _)) = original.rsplit_once('.') else { return };
    let place = Place { path: module.to_owned(), pick: target.change };
    if let Some((name, pick)) = of_xlabs(name, target.change) {
        places.entry(name).or_default().push(Place { pick, ..place.clone() });
    }
    places.entry(name.replace('.', "_")).or_default().push(place);
}

/// What XLabs calls an original module of an attention, and which rows of its change belong to the module's part; none
/// where it has nothing for it.
fn of_xlabs(original: &str, pick: Pick) -> Option<(String, Pick)> {
    let (block, inner) =
        original.split_once(".img_attn.").map(|(block, inner)| (block, (inner, Some(1)))).or_else(|| {
            original
                .split_once(".txt_attn.")
                .map(|(block, inner)| (block, (inner, Some(2))))
                .or_else(|| original.rsplit_once('.').map(|(block, inner)| (block, (inner, None))))
        })?;
    let block = block.replace('.', "_");
    match (inner, pick) {
        (("qkv" | "proj", Some(stream)), _) => Some((format!("{block}_{}_lora{stream}", inner.0), pick)),
        (("linear2", None), _) => Some((format!("{block}_proj"), pick)),
        // Query, key and value only, where the original has the feed-forward behind them.
        (("linear1", None), Pick::Rows { start, end: Some(end) }) => {
            Some((format!("{block}_qkv"), Pick::Third(start / (end - start))))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Tensor};

    use super::*;

    fn modules(names: &[&str]) -> Modules {
        let tensor = Tensor::zeros((8, 8), DType::F32, &Device::Cpu).expect("small");
        let tensors = names.iter().map(|name| ((*name).to_owned(), tensor.clone())).collect();
        Modules::of(&Weights::from_tensors(tensors, "test"))
    }

    fn path<'a>(modules: &'a Modules, name: &str) -> Option<&'a str> {
        match modules.find(name) {
            [] => None,
            [Place { path, pick: Pick::None }] => Some(path),
            places => panic!("one module was expected, found {places:?}"),
        }
    }

    #[test]
    fn a_module_of_a_unet_is_found_by_its_own_and_its_original_name() {
        let to_out = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0";
        let modules =
            modules(&[&format!("{to_out}.weight"), "down_blocks.0.resnets.0.conv1.bias", "up_blocks.0.x.weight"]);
        let inner = "transformer_blocks_0_attn1_to_out";
        assert_eq!(path(&modules, &format!("down_blocks_0_attentions_0_{inner}_0")), Some(to_out));
        assert_eq!(path(&modules, &format!("down_blocks_0_attentions_0_{inner}")), Some(to_out));
        assert_eq!(path(&modules, &format!("input_blocks_1_1_{inner}_0")), Some(to_out));
        assert_eq!(path(&modules, "input_blocks_1_0_in_layers_2"), Some("down_blocks.0.resnets.0.conv1"));
        assert_eq!(path(&modules, "down_blocks_0_attentions_1_proj_in"), None);
    }

    #[test]
    fn a_module_of_a_text_encoder_is_found_with_or_without_its_prefix() {
        for expected in ["text_model.encoder.layers.0.self_attn.q_proj", "encoder.layers.0.self_attn.q_proj"] {
            let modules = modules(&[&format!("{expected}.weight")]);
            assert_eq!(path(&modules, "text_model_encoder_layers_0_self_attn_q_proj"), Some(expected));
            assert_eq!(path(&modules, "encoder_layers_0_self_attn_q_proj"), Some(expected));
            assert_eq!(path(&modules, "text_model_encoder_layers_0_self_attn_to_q"), Some(expected));
        }
    }

    fn flux() -> Modules {
        let (double, single) = ("transformer_blocks.0", "single_transformer_blocks.0");
        let names: Vec<String> =
            ["to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "norm_q"]
                .map(|name| format!("{double}.attn.{name}.weight"))
                .into_iter()
                .chain(
                    ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out"]
                        .map(|name| format!("{single}.{name}.weight")),
                )
                .chain(["x_embedder.weight", "norm_out.linear.weight"].map(str::to_owned))
                .collect();
        modules(&names.iter().map(String::as_str).collect::<Vec<_>>())
    }

    fn places(modules: &Modules, name: &str) -> Vec<(String, Pick)> {
        let mut places: Vec<(String, Pick)> =
            modules.find(name).iter().map(|place| (place.path.clone(), place.pick)).collect();
        places.sort_by(|a, b| a.0.cmp(&b.0));
        places
    }

    #[test]
    fn a_fused_layer_of_flux_stands_for_its_parts() {
        let modules = flux();
        let double = |name: &str| format!("transformer_blocks.0.attn.{name}");
        let thirds = |names: [&str; 3]| {
            // In the order of the names: key, query, value.
            names.into_iter().zip([1, 0, 2]).map(|(name, part)| (double(name), Pick::Third(part))).collect::<Vec<_>>()
        };
        assert_eq!(places(&modules, "double_blocks_0_img_attn_qkv"), thirds(["to_k", "to_q", "to_v"]));
        let text = thirds(["add_k_proj", "add_q_proj", "add_v_proj"]);
        assert_eq!(places(&modules, "double_blocks_0_txt_attn_qkv"), text);
        assert_eq!(places(&modules, "double_blocks_0_qkv_lora2"), text);
        let single = |name: &str| format!("single_transformer_blocks.0.{name}");
        let rows = |start: usize, end: Option<usize>| Pick::Rows { start, end };
        let expected = [
            (single("attn.to_k"), rows(8, Some(16))),
            (single("attn.to_q"), rows(0, Some(8))),
            (single("attn.to_v"), rows(16, Some(24))),
            (single("proj_mlp"), rows(24, None)),
        ];
        assert_eq!(places(&modules, "single_blocks_0_linear1"), expected);
        let expected = [("attn.to_k", 1), ("attn.to_q", 0), ("attn.to_v", 2)];
        let expected = expected.map(|(name, part)| (single(name), Pick::Third(part)));
        assert_eq!(places(&modules, "single_blocks_0_qkv"), expected);
        assert_eq!(path(&modules, "single_blocks_0_proj"), Some("single_transformer_blocks.0.proj_out"));
        assert_eq!(path(&modules, "double_blocks_0_proj_lora2"), Some("transformer_blocks.0.attn.to_add_out"));
    }

    #[test]
    fn other_layers_of_flux_are_found_by_their_own_and_their_original_names() {
        let modules = flux();
        for name in ["single_blocks_0_linear2", "single_transformer_blocks_0_proj_out"] {
            assert_eq!(path(&modules, name), Some("single_transformer_blocks.0.proj_out"));
        }
        assert_eq!(path(&modules, "img_in"), Some("x_embedder"));
        assert_eq!(
            path(&modules, "double_blocks_0_img_attn_norm_query_norm"),
            Some("transformer_blocks.0.attn.norm_q")
        );
        let swapped = [("norm_out.linear".to_owned(), Pick::SwapHalves)];
        assert_eq!(places(&modules, "final_layer_adaLN_modulation_1"), swapped);
        assert_eq!(path(&modules, "norm_out_linear"), Some("norm_out.linear"));
    }

    #[test]
    fn layers_of_stable_diffusion_3_are_found_by_their_original_names() {
        let block = "transformer_blocks.0";
        let names = ["attn.to_q", "attn.to_k", "attn.to_v", "attn2.to_q", "ff.net.2", "norm1_context.linear"];
        let mut names = names.map(|name| format!("{block}.{name}.weight")).to_vec();
        names.push("pos_embed.proj.weight".into());
        let modules = modules(&names.iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!(places(&modules, "joint_blocks_0_x_block_attn_qkv").len(), 3);
        assert_eq!(path(&modules, "joint_blocks_0_x_block_mlp_fc2"), Some("transformer_blocks.0.ff.net.2"));
        let swapped = [(format!("{block}.norm1_context.linear"), Pick::SwapHalves)];
        assert_eq!(places(&modules, "joint_blocks_0_context_block_adaLN_modulation_1"), swapped);
    }
}
