//! The transformer of a Stable Diffusion 3 checkpoint: names of Stability AI's code (`mmdit.py`, `mmditx.py`) and
//! diffusers' (`convert_sd3_transformer_checkpoint_to_diffusers` in its `single_file_utils.py`).
//!
//! The original computes query, key and value in one layer, whose rows are split here. It has shift before scale in the
//! modulations without a gate (the last one, and that of the text in the last block), where diffusers has them the
//! other way round.

use super::{
    index::{Tensors, count},
    key_map::{Change, KeyMap},
};

/// The modules outside of the blocks: original, canonical.
const FIXED: [(&str, &str); 7] = [
    ("x_embedder.proj", "pos_embed.proj"),
    ("context_embedder", "context_embedder"),
    ("t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_1"),
    ("t_embedder.mlp.2", "time_text_embed.timestep_embedder.linear_2"),
    ("y_embedder.mlp.0", "time_text_embed.text_embedder.linear_1"),
    ("y_embedder.mlp.2", "time_text_embed.text_embedder.linear_2"),
    ("final_layer.linear", "proj_out"),
];

/// The modules of a block.
const BLOCK: [(&str, &str); 14] = [
    ("x_block.adaLN_modulation.1", "norm1.linear"),
    ("x_block.attn.proj", "attn.to_out.0"),
    ("x_block.attn.ln_q", "attn.norm_q"),
    ("x_block.attn.ln_k", "attn.norm_k"),
    ("x_block.attn2.proj", "attn2.to_out.0"),
    ("x_block.attn2.ln_q", "attn2.norm_q"),
    ("x_block.attn2.ln_k", "attn2.norm_k"),
    ("x_block.mlp.fc1", "ff.net.0.proj"),
    ("x_block.mlp.fc2", "ff.net.2"),
    ("context_block.attn.proj", "attn.to_add_out"),
    ("context_block.attn.ln_q", "attn.norm_added_q"),
    ("context_block.attn.ln_k", "attn.norm_added_k"),
    ("context_block.mlp.fc1", "ff_context.net.0.proj"),
    ("context_block.mlp.fc2", "ff_context.net.2"),
];

/// The fused projections of a block and what they become.
const FUSED: [(&str, [&str; 3]); 3] = [
    ("x_block.attn.qkv", ["attn.to_q", "attn.to_k", "attn.to_v"]),
    ("x_block.attn2.qkv", ["attn2.to_q", "attn2.to_k", "attn2.to_v"]),
    ("context_block.attn.qkv", ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"]),
];

/// How large a Stable Diffusion 3 transformer is, as far as its names depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sd3Layout {
    /// Blocks.
    pub(crate) blocks: usize,
}

impl Sd3Layout {
    /// What the names of an original transformer say.
    pub(crate) fn of_original(tensors: &Tensors<'_>) -> Self {
        Self { blocks: count(|block| tensors.has(&format!("joint_blocks.{block}.x_block.attn.qkv.weight"))) }
    }

    /// What the names of a transformer in diffusers' layout say.
    pub(crate) fn of_canonical(is_there: impl Fn(&str) -> bool) -> Self {
        Self { blocks: count(|block| is_there(&format!("transformer_blocks.{block}.attn.to_q.weight"))) }
    }

    /// The names of these blocks in the original and in diffusers.
    pub(crate) fn key_map(self) -> KeyMap {
        let mut map = KeyMap::default();
        for (original, canonical) in FIXED {
            map.module(original, canonical);
        }
        map.tensor("pos_embed", "pos_embed.pos_embed", Change::None);
        map.fused("final_layer.adaLN_modulation.1", &[(String::from("norm_out.linear"), Change::SwapHalves)]);
        for block in 0..self.blocks {
            let (from, to) = (format!("joint_blocks.{block}"), format!("transformer_blocks.{block}"));
            for (original, canonical) in BLOCK {
                map.module(format!("{from}.{original}"), format!("{to}.{canonical}"));
            }
            for (original, canonical) in FUSED {
                let third = |part: usize| (format!("{to}.{}", canonical[part]), Change::Third(part));
                map.fused(&format!("{from}.{original}"), &[third(0), third(1), third(2)]);
            }
            // The last block does not go on with the text: its modulation has no gate.
            let change = if block + 1 == self.blocks { Change::SwapHalves } else { Change::None };
            let modulation = format!("{from}.context_block.adaLN_modulation.1");
            map.fused(&modulation, &[(format!("{to}.norm1_context.linear"), change)]);
        }
        map
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_of_a_block_has_its_place() {
        let map = Sd3Layout { blocks: 2 }.key_map();
        for (original, canonical) in [
            ("pos_embed", "pos_embed.pos_embed"),
            ("x_embedder.proj.weight", "pos_embed.proj.weight"),
            ("y_embedder.mlp.2.bias", "time_text_embed.text_embedder.linear_2.bias"),
            ("joint_blocks.0.x_block.attn2.ln_k.weight", "transformer_blocks.0.attn2.norm_k.weight"),
            ("joint_blocks.1.context_block.attn.ln_q.weight", "transformer_blocks.1.attn.norm_added_q.weight"),
            ("joint_blocks.0.context_block.mlp.fc2.bias", "transformer_blocks.0.ff_context.net.2.bias"),
            ("joint_blocks.1.x_block.adaLN_modulation.1.weight", "transformer_blocks.1.norm1.linear.weight"),
        ] {
            let targets = map.canonical(original);
            let names: Vec<&str> = targets.iter().map(|target| target.name.as_str()).collect();
            assert_eq!(names, [canonical], "{original}");
            assert_eq!(map.original(canonical).as_deref(), Some(original));
        }
    }

    #[test]
    fn shift_and_scale_change_places_where_there_is_no_gate() {
        let map = Sd3Layout { blocks: 2 }.key_map();
        let change = |name: &str| map.canonical(name)[0].change;
        assert_eq!(change("joint_blocks.0.context_block.adaLN_modulation.1.weight"), Change::None);
        assert_eq!(change("joint_blocks.1.context_block.adaLN_modulation.1.bias"), Change::SwapHalves);
        assert_eq!(change("final_layer.adaLN_modulation.1.bias"), Change::SwapHalves);
        let key = &map.canonical("joint_blocks.0.x_block.attn2.qkv.bias")[1];
        assert_eq!((key.name.as_str(), key.change), ("transformer_blocks.0.attn2.to_k.bias", Change::Third(1)));
    }
}
