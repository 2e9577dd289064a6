//! The autoencoder of an original checkpoint (`convert_ldm_vae_checkpoint` in diffusers' `single_file_utils.py`):
//! the decoder's levels are numbered the other way round, and the attention in the middle is made of 1x1
//! convolutions.

use super::{
    index::{Tensors, count},
    key_map::{Change, KeyMap},
};
use crate::models::VaeConfig;

/// The modules of encoder and decoder outside of the blocks.
const FIXED: [(&str, &str); 8] = [
    ("encoder.conv_in", "encoder.conv_in"),
    ("encoder.norm_out", "encoder.conv_norm_out"),
    ("encoder.conv_out", "encoder.conv_out"),
    ("decoder.conv_in", "decoder.conv_in"),
    ("decoder.norm_out", "decoder.conv_norm_out"),
    ("decoder.conv_out", "decoder.conv_out"),
    ("quant_conv", "quant_conv"),
    ("post_quant_conv", "post_quant_conv"),
];

/// The attention in the middle: original, canonical.
const ATTENTION: [(&str, &str); 4] = [("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")];

/// Which blocks an autoencoder has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct VaeLayout {
    /// Levels of the encoder and of the decoder.
    pub(crate) levels: usize,
    /// Residual blocks per level of the encoder; the decoder has one more.
    pub(crate) layers: usize,
}

impl VaeLayout {
    /// What a configuration says.
    pub(crate) fn of_config(config: &VaeConfig) -> Self {
        Self { levels: config.block_out_channels.len(), layers: config.layers_per_block }
    }

    /// What the names of an original autoencoder say.
    pub(crate) fn of_original(tensors: &Tensors<'_>) -> Self {
        Self::counted(|level, layer| tensors.has(&format!("encoder.down.{level}.block.{layer}.norm1.weight")))
    }

    /// What the names of an autoencoder in diffusers' layout say.
    pub(crate) fn of_canonical(tensors: &Tensors<'_>) -> Self {
        Self::counted(|level, layer| tensors.has(&format!("encoder.down_blocks.{level}.resnets.{layer}.norm1.weight")))
    }

    fn counted(is_there: impl Fn(usize, usize) -> bool) -> Self {
        let levels = count(|level| is_there(level, 0));
        Self { levels, layers: count(|layer| is_there(0, layer)) }
    }

    /// The names of these blocks in the original and in diffusers.
    pub(crate) fn key_map(self) -> KeyMap {
        let mut map = KeyMap::default();
        for (original, canonical) in FIXED {
            map.module(original, canonical);
        }
        for level in 0..self.levels {
            let (from, to) = (format!("encoder.down.{level}"), format!("encoder.down_blocks.{level}"));
            blocks(&mut map, &from, &to, self.layers);
            map.module(format!("{from}.downsample.conv"), format!("{to}.downsamplers.0.conv"));
            let (from, to) = (format!("decoder.up.{}", self.levels - 1 - level), format!("decoder.up_blocks.{level}"));
            blocks(&mut map, &from, &to, self.layers + 1);
            map.module(format!("{from}.upsample.conv"), format!("{to}.upsamplers.0.conv"));
        }
        for side in ["encoder", "decoder"] {
            middle(&mut map, &format!("{side}.mid"), &format!("{side}.mid_block"));
        }
        map
    }
}

fn blocks(map: &mut KeyMap, original: &str, canonical: &str, layers: usize) {
    for layer in 0..layers {
        let (from, to) = (format!("{original}.block.{layer}"), format!("{canonical}.resnets.{layer}"));
        map.module(format!("{from}.nin_shortcut"), format!("{to}.conv_shortcut"));
        map.module(from, to);
    }
}

fn middle(map: &mut KeyMap, original: &str, canonical: &str) {
    map.module(format!("{original}.block_1"), format!("{canonical}.resnets.0"));
    map.module(format!("{original}.block_2"), format!("{canonical}.resnets.1"));
    let (from, to) = (format!("{original}.attn_1"), format!("{canonical}.attentions.0"));
    map.module(format!("{from}.norm"), format!("{to}.group_norm"));
    for (old, new) in ATTENTION {
        map.tensor(format!("{from}.{old}.weight"), format!("{to}.{new}.weight"), Change::ConvToLinear);
        map.tensor(format!("{from}.{old}.bias"), format!("{to}.{new}.bias"), Change::None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_decoder_counts_its_levels_the_other_way_round() {
        let map = VaeLayout { levels: 4, layers: 2 }.key_map();
        for (original, canonical) in [
            ("encoder.down.0.block.1.conv2.bias", "encoder.down_blocks.0.resnets.1.conv2.bias"),
            ("encoder.down.2.downsample.conv.weight", "encoder.down_blocks.2.downsamplers.0.conv.weight"),
            ("encoder.down.1.block.0.nin_shortcut.weight", "encoder.down_blocks.1.resnets.0.conv_shortcut.weight"),
            ("decoder.up.3.block.0.norm1.weight", "decoder.up_blocks.0.resnets.0.norm1.weight"),
            ("decoder.up.3.upsample.conv.bias", "decoder.up_blocks.0.upsamplers.0.conv.bias"),
            ("decoder.up.0.block.2.conv1.weight", "decoder.up_blocks.3.resnets.2.conv1.weight"),
            ("encoder.mid.block_2.norm2.bias", "encoder.mid_block.resnets.1.norm2.bias"),
            ("decoder.mid.attn_1.norm.weight", "decoder.mid_block.attentions.0.group_norm.weight"),
            ("decoder.norm_out.bias", "decoder.conv_norm_out.bias"),
            ("post_quant_conv.weight", "post_quant_conv.weight"),
        ] {
            let targets = map.canonical(original);
            let names: Vec<&str> = targets.iter().map(|target| target.name.as_str()).collect();
            assert_eq!(names, [canonical], "{original}");
            assert_eq!(map.original(canonical).as_deref(), Some(original));
        }
        assert!(map.canonical("encoder.down.0.block.2.conv1.weight").is_empty());
    }

    #[test]
    fn the_weights_of_the_middle_attention_become_linear_layers() {
        let map = VaeLayout { levels: 4, layers: 2 }.key_map();
        let target = map.canonical("encoder.mid.attn_1.proj_out.weight").remove(0);
        assert_eq!(target.name, "encoder.mid_block.attentions.0.to_out.0.weight");
        assert_eq!(target.change, Change::ConvToLinear);
        assert_eq!(map.canonical("encoder.mid.attn_1.k.bias")[0].change, Change::None);
    }
}
