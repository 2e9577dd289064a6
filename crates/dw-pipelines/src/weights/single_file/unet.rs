//! The UNet of an original checkpoint: how its numbered blocks correspond to diffusers' levels
//! (`convert_ldm_unet_checkpoint` in diffusers' `single_file_utils.py`), and which levels it has.
//!
//! The original numbers its blocks through (`input_blocks.4.1`); diffusers counts levels and layers within them
//! (`down_blocks.1.attentions.0`). [`UnetLayout`] is what is needed to get from one to the other.

use super::{
    index::{Tensors, count},
    key_map::KeyMap,
};
use crate::{Error, Result, models::UnetConfig};

/// The parts of a residual block: original, canonical.
const RESNET: [(&str, &str); 6] = [
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
];

/// The modules outside of the blocks.
const FIXED: [(&str, &str); 5] = [
    ("time_embed.0", "time_embedding.linear_1"),
    ("time_embed.2", "time_embedding.linear_2"),
    ("input_blocks.0.0", "conv_in"),
    ("out.0", "conv_norm_out"),
    ("out.2", "conv_out"),
];

/// One level of the way down or up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Level {
    /// Residual blocks.
    pub(crate) layers: usize,
    /// Whether a transformer follows each of them.
    pub(crate) has_attention: bool,
}

impl Level {
    fn new(layers: usize, class: &str) -> Self {
        Self { layers, has_attention: class.contains("CrossAttn") }
    }
}

/// Residual blocks of every level of a configuration whose `key` lists the levels' classes.
fn layers(config: &UnetConfig, key: &str, types: &[String]) -> Result<Vec<usize>> {
    let (levels, found) = (config.block_out_channels.len(), types.len());
    if found == levels {
        return config.layers_per_block.per_block("layers_per_block", levels);
    }
    Err(Error::Unsupported(format!(
        "`{key}` names {found} blocks, but `block_out_channels` has {levels} values; they must agree"
    )))
}

/// What the original calls `label_emb`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LabelEmbedding {
    /// There is none.
    None,
    /// Two layers on SDXL's pooled text and sizes.
    Added,
    /// Two layers on a class vector.
    Projected,
    /// A table of classes.
    Table,
}

/// Which blocks a UNet has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct UnetLayout {
    /// From the full size downwards.
    pub(crate) down: Vec<Level>,
    /// Whether the middle has a transformer between its two residual blocks.
    pub(crate) has_mid_attention: bool,
    /// From the smallest size upwards.
    pub(crate) up: Vec<Level>,
    pub(crate) label: LabelEmbedding,
}

impl UnetLayout {
    /// What a configuration says.
    pub(crate) fn of_config(config: &UnetConfig) -> Result<Self> {
        let layers = layers(config, "up_block_types", &config.up_block_types)?;
        let up = layers.iter().rev().zip(&config.up_block_types).map(|(n, class)| Level::new(n + 1, class)).collect();
        Ok(Self { up, ..Self::of_way_down(config)? })
    }

    /// What a configuration says of everything down to the middle.
    pub(crate) fn of_way_down(config: &UnetConfig) -> Result<Self> {
        let layers = layers(config, "down_block_types", &config.down_block_types)?;
        Ok(Self {
            down: layers.iter().zip(&config.down_block_types).map(|(n, class)| Level::new(*n, class)).collect(),
            has_mid_attention: config.mid_block_type.as_deref().is_some_and(|class| class.contains("CrossAttn")),
            up: Vec::new(),
            label: match (config.addition_embed_type.as_deref(), config.class_embed_type.as_deref()) {
                (Some("text_time"), _) => LabelEmbedding::Added,
                (_, Some("timestep" | "projection")) => LabelEmbedding::Projected,
                _ if config.num_class_embeds.is_some() => LabelEmbedding::Table,
                _ => LabelEmbedding::None,
            },
        })
    }

    /// What the names of an original UNet say.
    pub(crate) fn of_original(tensors: &Tensors<'_>) -> Self {
        let is_level_end = |block: &str, at: usize| tensors.has(&format!("{block}.{at}.conv.weight"));
        let label = if tensors.has("label_emb.0.0.weight") {
            LabelEmbedding::Added
        } else if tensors.has("label_emb.weight") {
            LabelEmbedding::Table
        } else {
            LabelEmbedding::None
        };
        let has_attention = |block: &str| tensors.has(&format!("{block}.1.norm.weight"));
        let (mut down, mut up) = (LevelCount::default(), LevelCount::default());
        for block in (1..).map(|n| format!("input_blocks.{n}")) {
            if tensors.has(&format!("{block}.0.op.weight")) {
                down.close();
            } else if tensors.has(&format!("{block}.0.in_layers.0.weight")) {
                down.layer(has_attention(&block));
            } else {
                break;
            }
        }
        for block in (0..).map(|n| format!("output_blocks.{n}")) {
            if !tensors.has(&format!("{block}.0.in_layers.0.weight")) {
                break;
            }
            up.layer(has_attention(&block));
            if is_level_end(&block, 1) || is_level_end(&block, 2) {
                up.close();
            }
        }
        Self { down: down.levels(), has_mid_attention: has_attention("middle_block"), up: up.levels(), label }
    }

    /// What the names of a UNet in diffusers' layout say.
    pub(crate) fn of_canonical(tensors: &Tensors<'_>) -> Self {
        let levels = |side: &str| {
            let level = |at: usize| {
                let block = format!("{side}.{at}");
                let layers = count(|layer| tensors.has(&format!("{block}.resnets.{layer}.norm1.weight")));
                Level { layers, has_attention: tensors.has(&format!("{block}.attentions.0.norm.weight")) }
            };
            (0..count(|at| level(at).layers > 0)).map(level).collect()
        };
        let label = if tensors.has("add_embedding.linear_1.weight") {
            LabelEmbedding::Added
        } else if tensors.has("class_embedding.linear_1.weight") {
            LabelEmbedding::Projected
        } else if tensors.has("class_embedding.weight") {
            LabelEmbedding::Table
        } else {
            LabelEmbedding::None
        };
        let has_mid_attention = tensors.has("mid_block.attentions.0.norm.weight");
        Self { down: levels("down_blocks"), has_mid_attention, up: levels("up_blocks"), label }
    }

    /// The names of these blocks in the original and in diffusers.
    pub(crate) fn key_map(&self) -> KeyMap {
        let mut map = KeyMap::default();
        for (original, canonical) in FIXED {
            map.module(original, canonical);
        }
        self.map_label(&mut map);
        self.map_down(&mut map);
        resnet(&mut map, "middle_block.0", "mid_block.resnets.0");
        if self.has_mid_attention {
            map.module("middle_block.1", "mid_block.attentions.0");
        }
        resnet(&mut map, &format!("middle_block.{}", 1 + usize::from(self.has_mid_attention)), "mid_block.resnets.1");
        self.map_up(&mut map);
        map
    }

    fn map_label(&self, map: &mut KeyMap) {
        let name = match self.label {
            LabelEmbedding::None => return,
            LabelEmbedding::Table => return map.module("label_emb", "class_embedding"),
            LabelEmbedding::Added => "add_embedding",
            LabelEmbedding::Projected => "class_embedding",
        };
        map.module("label_emb.0.0", format!("{name}.linear_1"));
        map.module("label_emb.0.2", format!("{name}.linear_2"));
    }

    fn map_down(&self, map: &mut KeyMap) {
        let mut number = 1;
        for (at, level) in self.down.iter().enumerate() {
            for layer in 0..level.layers {
                resnet(map, &format!("input_blocks.{number}.0"), &format!("down_blocks.{at}.resnets.{layer}"));
                if level.has_attention {
                    map.module(format!("input_blocks.{number}.1"), format!("down_blocks.{at}.attentions.{layer}"));
                }
                number += 1;
            }
            if at + 1 < self.down.len() {
                map.module(format!("input_blocks.{number}.0.op"), format!("down_blocks.{at}.downsamplers.0.conv"));
                number += 1;
            }
        }
    }

    fn map_up(&self, map: &mut KeyMap) {
        let mut number = 0;
        for (at, level) in self.up.iter().enumerate() {
            for layer in 0..level.layers {
                resnet(map, &format!("output_blocks.{number}.0"), &format!("up_blocks.{at}.resnets.{layer}"));
                if level.has_attention {
                    map.module(format!("output_blocks.{number}.1"), format!("up_blocks.{at}.attentions.{layer}"));
                }
                if layer + 1 == level.layers && at + 1 < self.up.len() {
                    // The upsampling stands behind the transformer, or in its place.
                    let place = 1 + usize::from(level.has_attention);
                    let canonical = format!("up_blocks.{at}.upsamplers.0.conv");
                    map.module(format!("output_blocks.{number}.{place}.conv"), canonical);
                }
                number += 1;
            }
        }
    }
}

fn resnet(map: &mut KeyMap, original: &str, canonical: &str) {
    for (from, to) in RESNET {
        map.module(format!("{original}.{from}"), format!("{canonical}.{to}"));
    }
}

/// Collects levels while blocks are walked through.
#[derive(Default)]
struct LevelCount {
    closed: Vec<Level>,
    open: Option<Level>,
}

impl LevelCount {
    fn layer(&mut self, has_attention: bool) {
        let level = self.open.get_or_insert(Level { layers: 0, has_attention });
        level.layers += 1;
    }

    fn close(&mut self) {
        self.closed.extend(self.open.take());
    }

    fn levels(mut self) -> Vec<Level> {
        self.close();
        self.closed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(json: &str) -> UnetConfig {
        serde_json::from_str(json).expect("a configuration of known keys")
    }

    fn check(map: &KeyMap, pairs: &[(&str, &str)]) {
        for (original, canonical) in pairs {
            let targets = map.canonical(original);
            let names: Vec<&str> = targets.iter().map(|target| target.name.as_str()).collect();
            assert_eq!(names, [*canonical], "{original}");
            assert_eq!(map.original(canonical).as_deref(), Some(*original), "{canonical}");
        }
    }

    #[test]
    fn the_blocks_of_stable_diffusion_1_are_found_under_their_numbers() {
        let layout = UnetLayout::of_config(&UnetConfig::default()).expect("the default is Stable Diffusion 1");
        check(
            &layout.key_map(),
            &[
                ("time_embed.2.bias", "time_embedding.linear_2.bias"),
                ("input_blocks.0.0.weight", "conv_in.weight"),
                ("input_blocks.1.0.in_layers.0.weight", "down_blocks.0.resnets.0.norm1.weight"),
                ("input_blocks.3.0.op.weight", "down_blocks.0.downsamplers.0.conv.weight"),
                ("input_blocks.4.0.skip_connection.bias", "down_blocks.1.resnets.0.conv_shortcut.bias"),
                (
                    "input_blocks.8.1.transformer_blocks.0.attn2.to_out.0.bias",
                    "down_blocks.2.attentions.1.transformer_blocks.0.attn2.to_out.0.bias",
                ),
                ("input_blocks.11.0.out_layers.3.weight", "down_blocks.3.resnets.1.conv2.weight"),
                ("middle_block.0.emb_layers.1.weight", "mid_block.resnets.0.time_emb_proj.weight"),
                ("middle_block.1.proj_in.weight", "mid_block.attentions.0.proj_in.weight"),
                ("middle_block.2.in_layers.2.bias", "mid_block.resnets.1.conv1.bias"),
                ("output_blocks.2.1.conv.weight", "up_blocks.0.upsamplers.0.conv.weight"),
                ("output_blocks.5.2.conv.weight", "up_blocks.1.upsamplers.0.conv.weight"),
                ("output_blocks.11.1.norm.bias", "up_blocks.3.attentions.2.norm.bias"),
                ("output_blocks.11.0.skip_connection.weight", "up_blocks.3.resnets.2.conv_shortcut.weight"),
                ("out.0.weight", "conv_norm_out.weight"),
                ("out.2.bias", "conv_out.bias"),
            ],
        );
        assert!(layout.key_map().canonical("label_emb.0.0.weight").is_empty());
    }

    #[test]
    fn the_blocks_of_stable_diffusion_xl_are_found_under_their_numbers() {
        let config = config(
            r#"{"block_out_channels": [320, 640, 1280], "addition_embed_type": "text_time",
                "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
                "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
                "transformer_layers_per_block": [1, 2, 10]}"#,
        );
        let map = UnetLayout::of_config(&config).expect("the lists agree").key_map();
        check(
            &map,
            &[
                ("label_emb.0.0.weight", "add_embedding.linear_1.weight"),
                ("label_emb.0.2.bias", "add_embedding.linear_2.bias"),
                ("input_blocks.6.0.op.bias", "down_blocks.1.downsamplers.0.conv.bias"),
                (
                    "input_blocks.8.1.transformer_blocks.9.ff.net.0.proj.weight",
                    "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.0.proj.weight",
                ),
                ("output_blocks.2.2.conv.bias", "up_blocks.0.upsamplers.0.conv.bias"),
                ("output_blocks.5.2.conv.bias", "up_blocks.1.upsamplers.0.conv.bias"),
                ("output_blocks.8.0.in_layers.0.weight", "up_blocks.2.resnets.2.norm1.weight"),
            ],
        );
        assert!(map.canonical("input_blocks.2.1.norm.weight").is_empty(), "the first level has no transformers");
        assert!(map.canonical("input_blocks.9.0.op.weight").is_empty(), "the last level does not shrink");
    }

    #[test]
    fn levels_may_have_different_numbers_of_layers() {
        let config = config(
            r#"{"block_out_channels": [8, 16], "layers_per_block": [1, 3],
                "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
                "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]}"#,
        );
        let layout = UnetLayout::of_config(&config).expect("the lists agree");
        check(
            &layout.key_map(),
            &[
                ("input_blocks.2.0.op.bias", "down_blocks.0.downsamplers.0.conv.bias"),
                ("input_blocks.5.1.norm.bias", "down_blocks.1.attentions.2.norm.bias"),
                ("output_blocks.3.2.conv.bias", "up_blocks.0.upsamplers.0.conv.bias"),
                ("output_blocks.4.0.in_layers.0.bias", "up_blocks.1.resnets.0.norm1.bias"),
            ],
        );
    }
}
