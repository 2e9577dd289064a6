//! Image prompts in a UNet's attention to the text: for each such layer further keys and values to look at
//! (decoupled cross-attention; Ye et al. 2023, arXiv:2308.06721).
//!
//! Owns which layers there are and what one looks at. Where keys and values come from is left to
//! [`crate::models::ip_adapter`].

use std::collections::BTreeMap;

use candle_core::Tensor;

use super::config::{BlockPlan, UnetConfig};
use crate::Result;

/// What one attention layer sees of one adapter's pictures.
#[derive(Clone, Debug)]
pub struct ImageBranch {
    /// `(batch, tokens, channels)`.
    pub key: Tensor,
    /// `(batch, tokens, channels)`.
    pub value: Tensor,
    /// What the result is multiplied with before it is added to what the text gives.
    pub scale: f64,
}

/// The branches of every layer, by the layer's name; layers without any see the text only.
#[derive(Clone, Debug, Default)]
pub struct ImagePrompts {
    layers: BTreeMap<String, Vec<ImageBranch>>,
}

impl ImagePrompts {
    /// Adds a branch to the layer called `name`.
    pub fn push(&mut self, name: &str, branch: ImageBranch) {
        self.layers.entry(name.to_owned()).or_default().push(branch);
    }

    /// The branches of the layer called `name`.
    pub(crate) fn of(&self, name: &str) -> &[ImageBranch] {
        self.layers.get(name).map_or(&[], Vec::as_slice)
    }
}

/// An attention layer that looks at the text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CrossAttentionLayer {
    /// Its path (`down_blocks.1.attentions.0.transformer_blocks.0.attn2`).
    pub name: String,
    /// The block it is in (`down_blocks.1`, `mid_block`).
    pub block: String,
    /// The number of its transformer in the block.
    pub transformer: usize,
    /// Features inside.
    pub channels: usize,
    /// Features of the text.
    pub text_dim: usize,
}

impl UnetConfig {
    /// All attention layers that look at the text, in the order in which IP-Adapters number them: down, up,
    /// then the middle.
    pub fn cross_attention_layers(&self) -> Result<Vec<CrossAttentionLayer>> {
        let mut layers = Vec::new();
        for (side, plans) in [("down", self.down_plans()?), ("up", self.up_plans()?)] {
            for (i, plan) in plans.iter().enumerate() {
                if plan.class.starts_with("CrossAttn") {
                    push_layers(&mut layers, &format!("{side}_blocks.{i}"), plan, &plan.transformer_layers);
                }
            }
        }
        if self.mid_block_type.as_deref() == Some("UNetMidBlock2DCrossAttn") {
            let plan = self.mid_plan()?;
            let depth = plan.transformer_layers.first().copied().unwrap_or(1);
            push_layers(&mut layers, "mid_block", &plan, &[depth]);
        }
        Ok(layers)
    }
}

/// The layers of a block whose transformers have these depths.
fn push_layers(layers: &mut Vec<CrossAttentionLayer>, block: &str, plan: &BlockPlan, depths: &[usize]) {
    for (transformer, &depth) in depths.iter().enumerate() {
        layers.extend((0..depth).map(|layer| CrossAttentionLayer {
            name: format!("{block}.attentions.{transformer}.transformer_blocks.{layer}.attn2"),
            block: block.to_owned(),
            transformer,
            channels: plan.channels,
            text_dim: plan.text_dim,
        }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_numbered_down_up_and_then_the_middle() {
        let config: UnetConfig = serde_json::from_str(
            r#"{"block_out_channels": [8, 16], "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
                "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "layers_per_block": 1,
                "transformer_layers_per_block": [1, 2], "cross_attention_dim": 24}"#,
        )
        .expect("a configuration");
        let layers = config.cross_attention_layers().expect("consistent");
        let names: Vec<&str> = layers.iter().map(|layer| layer.name.as_str()).collect();
        assert_eq!(
            names,
            [
                "down_blocks.1.attentions.0.transformer_blocks.0.attn2",
                "down_blocks.1.attentions.0.transformer_blocks.1.attn2",
                "up_blocks.0.attentions.0.transformer_blocks.0.attn2",
                "up_blocks.0.attentions.0.transformer_blocks.1.attn2",
                "up_blocks.0.attentions.1.transformer_blocks.0.attn2",
                "up_blocks.0.attentions.1.transformer_blocks.1.attn2",
                "mid_block.attentions.0.transformer_blocks.0.attn2",
                "mid_block.attentions.0.transformer_blocks.1.attn2",
            ]
        );
        assert!(layers.iter().all(|layer| (layer.channels, layer.text_dim) == (16, 24)));
        assert_eq!(layers[4].transformer, 1);
    }
}
