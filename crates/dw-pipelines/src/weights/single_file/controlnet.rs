//! The ControlNet of a checkpoint: the names of the original code (`cldm.py`; `convert_controlnet_checkpoint` in
//! diffusers' `single_file_utils.py`), and the configuration that neither layout carries in a single file.
//!
//! It is the way down of a UNet, so all of that is [`super::unet`]'s.

use serde_json::{Map, Value, json};

use super::{
    configs::{Component, Generated, groups, like, one_or_many, over, unet_attention, unet_labels},
    contents::Naming,
    index::{Tensors, count},
    key_map::KeyMap,
    unet::{LabelEmbedding, UnetLayout},
};
use crate::{Result, models::ControlNetConfig};

/// Features of the text of Stable Diffusion XL, for a ControlNet without attention that has no tensor to tell.
const XL_TEXT: usize = 2048;

/// Features of the transformer of the published ControlNets for several kinds of pictures, which has eight heads.
const UNION_CHANNELS: usize = 320;

/// Which layers a ControlNet has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ControlNetLayout {
    trunk: UnetLayout,
    /// Convolutions between the first and the last one that read the picture.
    hints: usize,
}

impl ControlNetLayout {
    /// What a configuration says.
    pub(crate) fn of_config(config: &ControlNetConfig) -> Result<Self> {
        let levels = config.condition.conditioning_embedding_out_channels.len();
        Ok(Self { trunk: UnetLayout::of_way_down(&config.unet)?, hints: 2 * levels.saturating_sub(1) })
    }

    fn of_original(tensors: &Tensors<'_>) -> Self {
        let convolutions = count(|at| tensors.has(&format!("input_hint_block.{}.weight", 2 * at)));
        Self { trunk: UnetLayout::of_original(tensors), hints: convolutions.saturating_sub(2) }
    }

    fn of_canonical(tensors: &Tensors<'_>) -> Self {
        let hints = count(|at| tensors.has(&format!("controlnet_cond_embedding.blocks.{at}.weight")));
        Self { trunk: UnetLayout::of_canonical(tensors), hints }
    }

    /// The additions to skip connections: one for the first feature map, each layer and each change of size.
    fn additions(&self) -> usize {
        let layers: usize = self.trunk.down.iter().map(|level| level.layers).sum();
        1 + layers + self.trunk.down.len().saturating_sub(1)
    }

    /// The names of these layers in the original and in diffusers.
    pub(crate) fn key_map(&self) -> KeyMap {
        let mut map = self.trunk.key_map();
        map.module("input_hint_block.0", "controlnet_cond_embedding.conv_in");
        for hint in 0..self.hints {
            // Activations have numbers, too.
            let original = format!("input_hint_block.{}", 2 * (hint + 1));
            map.module(original, format!("controlnet_cond_embedding.blocks.{hint}"));
        }
        map.module(format!("input_hint_block.{}", 2 * (self.hints + 1)), "controlnet_cond_embedding.conv_out");
        for addition in 0..self.additions() {
            map.module(format!("zero_convs.{addition}.0"), format!("controlnet_down_blocks.{addition}"));
        }
        map.module("middle_block_out.0", "controlnet_mid_block");
        map
    }
}

/// The `config.json` of a ControlNet. `kin` is that of the UNet that it steers, for what shapes do not say.
pub(super) fn config(tensors: Tensors<'_>, naming: Naming, kin: Map<String, Value>) -> Generated {
    let (layout, map) = match naming {
        Naming::Original => {
            let layout = ControlNetLayout::of_original(&tensors);
            let map = layout.key_map();
            (layout, map)
        }
        Naming::Canonical => (ControlNetLayout::of_canonical(&tensors), KeyMap::identity()),
    };
    let net = Component { tensors, map };
    let trunk = &layout.trunk;
    let channels = (0..trunk.down.len())
        .map(|level| net.size(&format!("down_blocks.{level}.resnets.0.conv1.weight"), 0))
        .collect::<Result<Vec<_>, String>>()?;
    if channels.is_empty() {
        return Err(String::from("its ControlNet has no levels; the file is incomplete"));
    }
    let kin = like(kin, "block_out_channels", &json!(channels));
    let class = |has_attention: bool| if has_attention { "CrossAttnDownBlock2D" } else { "DownBlock2D" };
    let hint = "controlnet_cond_embedding";
    let mut hints = vec![net.size(&format!("{hint}.conv_in.weight"), 0)?];
    for block in (1..layout.hints).step_by(2) {
        hints.push(net.size(&format!("{hint}.blocks.{block}.weight"), 0)?);
    }
    let mut config = json!({
        "_class_name": "ControlNetModel",
        "in_channels": net.size("conv_in.weight", 1)?,
        "block_out_channels": channels,
        "down_block_types": trunk.down.iter().map(|level| class(level.has_attention)).collect::<Value>(),
        "layers_per_block": one_or_many(trunk.down.iter().map(|level| json!(level.layers)).collect()),
        "mid_block_type": if trunk.has_mid_attention { "UNetMidBlock2DCrossAttn" } else { "UNetMidBlock2D" },
        "norm_num_groups": groups(&kin, &channels)?,
        "use_linear_projection": false,
        "conditioning_channels": net.size(&format!("{hint}.conv_in.weight"), 1)?,
        "conditioning_embedding_out_channels": hints,
        // A network trained with this (shuffle) looks like the others; a `config` tells.
        "global_pool_conditions": false,
    });
    if trunk.has_mid_attention {
        unet_attention(&mut config, &net, trunk, &channels, &kin)?;
    } else {
        without_attention(&mut config, trunk, &kin);
    }
    unet_labels(&mut config, &net, trunk.label, &kin)?;
    if naming == Naming::Canonical {
        union(&mut config, &net)?;
    }
    Ok(over(kin, config))
}

/// The small ControlNets of Stable Diffusion XL leave attention out; their text is known by the family.
fn without_attention(config: &mut Value, trunk: &UnetLayout, kin: &Map<String, Value>) {
    for key in ["attention_head_dim", "cross_attention_dim"] {
        if let Some(known) = kin.get(key) {
            config[key] = known.clone();
        }
    }
    if trunk.label == LabelEmbedding::Added && config.get("cross_attention_dim").is_none() {
        config["cross_attention_dim"] = json!(XL_TEXT);
    }
}

/// What a ControlNet for several kinds of pictures has besides.
fn union(config: &mut Value, net: &Component<'_>) -> Result<(), String> {
    let Some(&[kinds, channels]) = net.shape("task_embedding").as_deref() else { return Ok(()) };
    if channels != UNION_CHANNELS {
        return Err(format!(
            "the heads of its ControlNet's transformer cannot be told from tensors of an unusual width ({channels}); add \
             `config`, a folder or repository with the configuration of this ControlNet"
        ));
    }
    let layers = count(|layer| net.shape(&format!("transformer_layes.{layer}.ln_1.weight")).is_some());
    config["_class_name"] = json!("ControlNetUnionModel");
    config["num_control_type"] = json!(kinds);
    config["num_trans_channel"] = json!(channels);
    config["num_trans_layer"] = json!(layers);
    config["num_proj_channel"] = json!(net.size("spatial_ch_projs.weight", 0)?);
    Ok(())
}
