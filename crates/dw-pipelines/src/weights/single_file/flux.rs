//! The transformer of a Flux checkpoint: names of Black Forest Labs' code (`flux/model.py`) and diffusers'
//! (`convert_flux_transformer_checkpoint_to_diffusers` in its `single_file_utils.py`).
//!
//! The original computes query, key, value (and in single blocks the first layer of the feed-forward) in one layer, whose
//! rows are split here, and has shift before scale in the last modulation, where diffusers has them the other way
//! round. [`FluxLayout::key_map`] says all of it; it serves safetensors and GGUF files, and the names in LoRA files.

use super::{
    index::{Tensors, count},
    key_map::{Change, KeyMap},
};

/// The modules outside of the blocks: original, canonical.
const FIXED: [(&str, &str); 9] = [
    ("img_in", "x_embedder"),
    ("txt_in", "context_embedder"),
    ("time_in.in_layer", "time_text_embed.timestep_embedder.linear_1"),
    ("time_in.out_layer", "time_text_embed.timestep_embedder.linear_2"),
    ("vector_in.in_layer", "time_text_embed.text_embedder.linear_1"),
    ("vector_in.out_layer", "time_text_embed.text_embedder.linear_2"),
    ("guidance_in.in_layer", "time_text_embed.guidance_embedder.linear_1"),
    ("guidance_in.out_layer", "time_text_embed.guidance_embedder.linear_2"),
    ("final_layer.linear", "proj_out"),
];

/// The modules of a block with streams of its own for picture and text.
const DOUBLE: [(&str, &str); 8] = [
    ("img_mod.lin", "norm1.linear"),
    ("txt_mod.lin", "norm1_context.linear"),
    ("img_attn.proj", "attn.to_out.0"),
    ("txt_attn.proj", "attn.to_add_out"),
    ("img_mlp.0", "ff.net.0.proj"),
    ("img_mlp.2", "ff.net.2"),
    ("txt_mlp.0", "ff_context.net.0.proj"),
    ("txt_mlp.2", "ff_context.net.2"),
];

/// The fused projections of such a block and what they become.
const DOUBLE_FUSED: [(&str, [&str; 3]); 2] = [
    ("img_attn.qkv", ["attn.to_q", "attn.to_k", "attn.to_v"]),
    ("txt_attn.qkv", ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"]),
];

/// The norms of query and key in such a block.
const DOUBLE_NORMS: [(&str, &str); 4] = [
    ("img_attn.norm.query_norm.scale", "attn.norm_q.weight"),
    ("img_attn.norm.key_norm.scale", "attn.norm_k.weight"),
    ("txt_attn.norm.query_norm.scale", "attn.norm_added_q.weight"),
    ("txt_attn.norm.key_norm.scale", "attn.norm_added_k.weight"),
];

/// The modules of a block with one stream.
const SINGLE: [(&str, &str); 2] = [("modulation.lin", "norm.linear"), ("linear2", "proj_out")];

/// The norms of query and key in such a block.
const SINGLE_NORMS: [(&str, &str); 2] =
    [("norm.query_norm.scale", "attn.norm_q.weight"), ("norm.key_norm.scale", "attn.norm_k.weight")];

/// How large a Flux transformer is, as far as its names depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FluxLayout {
    /// Blocks with two streams.
    pub(crate) double: usize,
    /// Blocks with one stream.
    pub(crate) single: usize,
    /// Features of a token.
    pub(crate) width: usize,
}

impl FluxLayout {
    /// What names and shapes of an original transformer say; none when it is incomplete.
    pub(crate) fn of_original(tensors: &Tensors<'_>) -> Option<Self> {
        Some(Self {
            double: tensors.entries("double_blocks"),
            single: tensors.entries("single_blocks"),
            width: *tensors.shape("img_in.weight")?.first()?,
        })
    }

    /// What names and shapes of a transformer in diffusers' layout say; none when it is incomplete.
    pub(crate) fn of_canonical(shape: impl Fn(&str) -> Option<Vec<usize>>) -> Option<Self> {
        let blocks = |kind: &str| count(|block| shape(&format!("{kind}.{block}.attn.to_q.weight")).is_some());
        Some(Self {
            double: blocks("transformer_blocks"),
            single: blocks("single_transformer_blocks"),
            width: *shape("x_embedder.weight")?.first()?,
        })
    }

    /// The names of these blocks in the original and in diffusers.
    pub(crate) fn key_map(self) -> KeyMap {
        let mut map = KeyMap::default();
        for (original, canonical) in FIXED {
            map.module(original, canonical);
        }
        map.fused("final_layer.adaLN_modulation.1", &[(String::from("norm_out.linear"), Change::SwapHalves)]);
        for block in 0..self.double {
            let (from, to) = (format!("double_blocks.{block}"), format!("transformer_blocks.{block}"));
            for (original, canonical) in DOUBLE {
                map.module(format!("{from}.{original}"), format!("{to}.{canonical}"));
            }
            for (original, canonical) in DOUBLE_FUSED {
                let third = |part: usize| (format!("{to}.{}", canonical[part]), Change::Third(part));
                map.fused(&format!("{from}.{original}"), &[third(0), third(1), third(2)]);
            }
            for (original, canonical) in DOUBLE_NORMS {
                map.tensor(format!("{from}.{original}"), format!("{to}.{canonical}"), Change::None);
            }
        }
        for block in 0..self.single {
            let (from, to) = (format!("single_blocks.{block}"), format!("single_transformer_blocks.{block}"));
            for (original, canonical) in SINGLE {
                map.module(format!("{from}.{original}"), format!("{to}.{canonical}"));
            }
            map.fused(&format!("{from}.linear1"), &self.first_layer(&to));
            for (original, canonical) in SINGLE_NORMS {
                map.tensor(format!("{from}.{original}"), format!("{to}.{canonical}"), Change::None);
            }
        }
        map
    }

    /// The layers that the first layer of a single block consists of.
    fn first_layer(self, block: &str) -> [(String, Change); 4] {
        let rows = |start: usize, end: Option<usize>| Change::Rows { start: start * self.width, end };
        [("attn.to_q", 0), ("attn.to_k", 1), ("attn.to_v", 2), ("proj_mlp", 3)].map(|(name, part)| {
            // Everything behind the value belongs to the feed-forward.
            (format!("{block}.{name}"), rows(part, (part < 3).then_some((part + 1) * self.width)))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_of_both_kinds_of_blocks_has_its_place() {
        let map = FluxLayout { double: 2, single: 3, width: 8 }.key_map();
        for (original, canonical) in [
            ("img_in.bias", "x_embedder.bias"),
            ("vector_in.out_layer.weight", "time_text_embed.text_embedder.linear_2.weight"),
            ("guidance_in.in_layer.weight", "time_text_embed.guidance_embedder.linear_1.weight"),
            ("double_blocks.1.txt_mod.lin.bias", "transformer_blocks.1.norm1_context.linear.bias"),
            ("double_blocks.0.txt_attn.proj.weight", "transformer_blocks.0.attn.to_add_out.weight"),
            ("double_blocks.0.txt_attn.norm.key_norm.scale", "transformer_blocks.0.attn.norm_added_k.weight"),
            ("double_blocks.0.txt_mlp.2.weight", "transformer_blocks.0.ff_context.net.2.weight"),
            ("single_blocks.2.modulation.lin.weight", "single_transformer_blocks.2.norm.linear.weight"),
            ("single_blocks.2.linear2.weight", "single_transformer_blocks.2.proj_out.weight"),
            ("single_blocks.2.norm.query_norm.scale", "single_transformer_blocks.2.attn.norm_q.weight"),
            ("final_layer.linear.bias", "proj_out.bias"),
        ] {
            let targets = map.canonical(original);
            let names: Vec<&str> = targets.iter().map(|target| target.name.as_str()).collect();
            assert_eq!(names, [canonical], "{original}");
            assert_eq!(map.original(canonical).as_deref(), Some(original));
        }
        assert!(map.canonical("double_blocks.2.img_mod.lin.bias").is_empty());
        assert!(map.canonical("double_stream_modulation_img.lin.weight").is_empty());
    }

    #[test]
    fn fused_layers_are_split_by_the_width_of_this_model() {
        let map = FluxLayout { double: 1, single: 1, width: 8 }.key_map();
        let split = |name: &str, rows: usize| -> Vec<(String, Vec<usize>)> {
            let split =
                |target: super::super::key_map::Target| (target.name, target.change.shape(&[rows]).expect("fits"));
            map.canonical(name).into_iter().map(split).collect()
        };
        let block = "single_transformer_blocks.0";
        let expected = [("attn.to_q", 8), ("attn.to_k", 8), ("attn.to_v", 8), ("proj_mlp", 30)];
        let expected = expected.map(|(name, rows)| (format!("{block}.{name}.bias"), vec![rows]));
        assert_eq!(split("single_blocks.0.linear1.bias", 54), expected);
        let value = &map.canonical("double_blocks.0.txt_attn.qkv.weight")[2];
        assert_eq!(
            (value.name.as_str(), value.change),
            ("transformer_blocks.0.attn.add_v_proj.weight", Change::Third(2))
        );
        let swapped = &map.canonical("final_layer.adaLN_modulation.1.weight")[0];
        assert_eq!((swapped.name.as_str(), swapped.change), ("norm_out.linear.weight", Change::SwapHalves));
    }
}
