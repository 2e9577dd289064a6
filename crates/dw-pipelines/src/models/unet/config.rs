//! The `config.json` of a UNet, and what it says about each block.

use serde::Deserialize;

use crate::{
    Error, Result,
    models::{
        blocks::ResnetOptions,
        config::{OneOrMany, unsupported},
    },
    nn::Activation,
};

/// The `config.json` of a `UNet2DConditionModel`; what it leaves out has diffusers' defaults.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct UnetConfig {
    /// Height and width of the training latents.
    pub sample_size: Option<OneOrMany<usize>>,
    /// Channels of the input: latents, and for inpainting models mask and masked picture.
    pub in_channels: usize,
    /// Channels of the prediction.
    pub out_channels: usize,
    /// Whether the input is mapped from 0..1 to -1..1.
    pub center_input_sample: bool,
    /// Whether the cosines of the time come before the sines.
    pub flip_sin_to_cos: bool,
    /// What is taken off the divisor of the exponents of the time sinusoid.
    pub freq_shift: f64,
    /// One block class per level, from the full size downwards.
    pub down_block_types: Vec<String>,
    /// The block class in the middle; none for a model without middle.
    pub mid_block_type: Option<String>,
    /// One block class per level, from the smallest size upwards.
    pub up_block_types: Vec<String>,
    /// Whether the first attention of a block looks at the text, too.
    pub only_cross_attention: OneOrMany<bool>,
    /// The same for the middle; plays no part in the block classes supported here.
    pub mid_block_only_cross_attention: Option<bool>,
    /// Channels per level.
    pub block_out_channels: Vec<usize>,
    /// Residual blocks per level.
    pub layers_per_block: OneOrMany<usize>,
    /// Zeros around the input of a downsampling; 0 puts one right and below.
    pub downsample_padding: usize,
    /// What sums in the middle are divided by.
    pub mid_block_scale_factor: f64,
    /// The activation.
    pub act_fn: String,
    /// Groups of the norms; none where the norms are of another kind, and none before the last convolution.
    pub norm_num_groups: Option<usize>,
    /// The epsilon of the norms.
    pub norm_eps: f64,
    /// Features of the text.
    pub cross_attention_dim: OneOrMany<usize>,
    /// Transformer layers per level, or per residual block of a level.
    pub transformer_layers_per_block: OneOrMany<OneOrMany<usize>>,
    /// The same for the way up, where it is not the reverse.
    pub reverse_transformer_layers_per_block: Option<Vec<OneOrMany<usize>>>,
    /// Features of the text before a projection.
    pub encoder_hid_dim: Option<usize>,
    /// What projects the text.
    pub encoder_hid_dim_type: Option<String>,
    /// The number of heads, in spite of its name (the size of a head in `AttnDownBlock2D` and `AttnUpBlock2D`).
    pub attention_head_dim: OneOrMany<usize>,
    /// Refused by diffusers for UNets.
    pub num_attention_heads: Option<OneOrMany<usize>>,
    /// Whether attention looks at two texts.
    pub dual_cross_attention: bool,
    /// Whether a transformer's first and last layers are linear instead of 1x1 convolutions.
    pub use_linear_projection: bool,
    /// What the class embedding is made from.
    pub class_embed_type: Option<String>,
    /// What is added to the time embedding; `text_time` is SDXL's pooled text and sizes.
    pub addition_embed_type: Option<String>,
    /// Values per added number.
    pub addition_time_embed_dim: Option<usize>,
    /// How many classes there are.
    pub num_class_embeds: Option<usize>,
    /// No effect: attention scores are always taken in f32.
    pub upcast_attention: bool,
    /// How the time acts in a residual block: `default` or `scale_shift`.
    pub resnet_time_scale_shift: String,
    /// `positional`, or `fourier` for frequencies that lie in the weights.
    pub time_embedding_type: String,
    /// Values of the time embedding; four times the first channels when none.
    pub time_embedding_dim: Option<usize>,
    /// An activation after everything was added to the time embedding.
    pub time_embedding_act_fn: Option<String>,
    /// An activation after the time embedding's own layers.
    pub timestep_post_act: Option<String>,
    /// Values of the guidance embedding of distilled models.
    pub time_cond_proj_dim: Option<usize>,
    /// Kernel of the first convolution.
    pub conv_in_kernel: usize,
    /// Kernel of the last convolution.
    pub conv_out_kernel: usize,
    /// Inputs of the class or addition embedding.
    pub projection_class_embeddings_input_dim: Option<usize>,
    /// `default`, or a kind of GLIGEN, which is not supported.
    pub attention_type: String,
    /// Whether the class embedding is appended to the time embedding instead of added.
    pub class_embeddings_concat: bool,
    /// A norm of the text inside attention, which is not supported.
    pub cross_attention_norm: Option<String>,
}

impl Default for UnetConfig {
    fn default() -> Self {
        let strings = |names: [&str; 4]| names.map(String::from).to_vec();
        let cross_down = "CrossAttnDownBlock2D";
        let cross_up = "CrossAttnUpBlock2D";
        Self {
            sample_size: None,
            in_channels: 4,
            out_channels: 4,
            center_input_sample: false,
            flip_sin_to_cos: true,
            freq_shift: 0.0,
            down_block_types: strings([cross_down, cross_down, cross_down, "DownBlock2D"]),
            mid_block_type: Some(String::from("UNetMidBlock2DCrossAttn")),
            up_block_types: strings(["UpBlock2D", cross_up, cross_up, cross_up]),
            only_cross_attention: OneOrMany::One(false),
            mid_block_only_cross_attention: None,
            block_out_channels: vec![320, 640, 1280, 1280],
            layers_per_block: OneOrMany::One(2),
            downsample_padding: 1,
            mid_block_scale_factor: 1.0,
            act_fn: String::from("silu"),
            norm_num_groups: Some(32),
            norm_eps: 1e-5,
            cross_attention_dim: OneOrMany::One(1280),
            transformer_layers_per_block: OneOrMany::One(OneOrMany::One(1)),
            reverse_transformer_layers_per_block: None,
            encoder_hid_dim: None,
            encoder_hid_dim_type: None,
            attention_head_dim: OneOrMany::One(8),
            num_attention_heads: None,
            dual_cross_attention: false,
            use_linear_projection: false,
            class_embed_type: None,
            addition_embed_type: None,
            addition_time_embed_dim: None,
            num_class_embeds: None,
            upcast_attention: false,
            resnet_time_scale_shift: String::from("default"),
            time_embedding_type: String::from("positional"),
            time_embedding_dim: None,
            time_embedding_act_fn: None,
            timestep_post_act: None,
            time_cond_proj_dim: None,
            conv_in_kernel: 3,
            conv_out_kernel: 3,
            projection_class_embeddings_input_dim: None,
            attention_type: String::from("default"),
            class_embeddings_concat: false,
            cross_attention_norm: None,
        }
    }
}

/// What one block is made of, read off the configuration.
#[derive(Clone, Debug)]
pub(crate) struct BlockPlan {
    pub(crate) class: String,
    pub(crate) channels: usize,
    /// Residual blocks.
    pub(crate) layers: usize,
    /// Transformer layers after each residual block.
    pub(crate) transformer_layers: Vec<usize>,
    pub(crate) heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) text_dim: usize,
    pub(crate) is_only_cross: bool,
    pub(crate) is_last: bool,
}

impl UnetConfig {
    /// Refuses values that this version cannot run; the error names key and value.
    pub(crate) fn check(&self) -> Result<()> {
        let refuse = |is_refused: bool, key: &str, value: &dyn std::fmt::Display| {
            if is_refused { Err(unsupported(key, value)) } else { Ok(()) }
        };
        refuse(self.num_attention_heads.is_some(), "num_attention_heads", &"set")?;
        refuse(self.dual_cross_attention, "dual_cross_attention", &true)?;
        let is_known = ["positional", "fourier"].contains(&self.time_embedding_type.as_str());
        refuse(!is_known, "time_embedding_type", &self.time_embedding_type)?;
        refuse(self.attention_type != "default", "attention_type", &self.attention_type)?;
        if let Some(dim) = self.encoder_hid_dim {
            return Err(unsupported("encoder_hid_dim", dim));
        }
        for (key, value) in
            [("encoder_hid_dim_type", &self.encoder_hid_dim_type), ("cross_attention_norm", &self.cross_attention_norm)]
        {
            if let Some(value) = value {
                return Err(unsupported(key, value));
            }
        }
        if self.block_out_channels.is_empty() {
            return Err(Error::Unsupported(String::from("`block_out_channels` is empty; a model needs blocks")));
        }
        self.same_length("down_block_types", self.down_block_types.len())
    }

    /// The blocks on the way down.
    pub(crate) fn down_plans(&self) -> Result<Vec<BlockPlan>> {
        self.plans(&self.down_block_types, &self.transformer_layers(self.block_out_channels.len())?, 0)
    }

    /// The blocks on the way up: the way down in reverse, each with one residual block more.
    pub(crate) fn up_plans(&self) -> Result<Vec<BlockPlan>> {
        let blocks = self.block_out_channels.len();
        self.same_length("up_block_types", self.up_block_types.len())?;
        let per_level = match &self.reverse_transformer_layers_per_block {
            Some(layers) => {
                let reversed =
                    OneOrMany::Many(layers.clone()).per_block("reverse_transformer_layers_per_block", blocks)?;
                reversed.into_iter().rev().collect()
            }
            None => self.transformer_layers(blocks)?,
        };
        let types: Vec<String> = self.up_block_types.iter().rev().cloned().collect();
        let mut plans = self.plans(&types, &per_level, 1)?;
        plans.reverse();
        let head_dims = self.attention_head_dim.per_block("attention_head_dim", blocks)?;
        for (i, plan) in plans.iter_mut().enumerate() {
            plan.is_last = i + 1 == blocks;
            // The reference does not reverse the sizes of heads.
            plan.head_dim = head_dims[i];
        }
        Ok(plans)
    }

    /// The middle has the sizes of the last level.
    pub(crate) fn mid_plan(&self) -> Result<BlockPlan> {
        let mut plans = self.down_plans()?;
        plans.pop().ok_or_else(|| Error::Unsupported(String::from("`block_out_channels` is empty")))
    }

    /// One plan per level, from the full size downwards, with `extra` residual blocks each.
    fn plans(&self, types: &[String], transformers: &[OneOrMany<usize>], extra: usize) -> Result<Vec<BlockPlan>> {
        let blocks = self.block_out_channels.len();
        let layers = self.layers_per_block.per_block("layers_per_block", blocks)?;
        let heads = self.attention_head_dim.per_block("attention_head_dim", blocks)?;
        let text_dims = self.cross_attention_dim.per_block("cross_attention_dim", blocks)?;
        let only_cross = self.only_cross_attention.per_block("only_cross_attention", blocks)?;
        (0..blocks)
            .map(|i| {
                let layers = layers[i] + extra;
                Ok(BlockPlan {
                    class: types[i].strip_prefix("UNetRes").unwrap_or(&types[i]).to_owned(),
                    channels: self.block_out_channels[i],
                    layers,
                    transformer_layers: transformers[i].per_block("transformer_layers_per_block", layers)?,
                    heads: heads[i],
                    head_dim: heads[i],
                    text_dim: text_dims[i],
                    is_only_cross: only_cross[i],
                    is_last: i + 1 == blocks,
                })
            })
            .collect()
    }

    /// Channels of every skip connection, from the full size downwards: the first feature map, then what each level
    /// makes.
    pub(crate) fn skip_channels(&self) -> Result<Vec<usize>> {
        let mut channels = vec![self.block_out_channels[0]];
        for plan in self.down_plans()? {
            channels.extend(vec![plan.channels; plan.layers + usize::from(!plan.is_last)]);
        }
        Ok(channels)
    }

    fn transformer_layers(&self, blocks: usize) -> Result<Vec<OneOrMany<usize>>> {
        self.transformer_layers_per_block.per_block("transformer_layers_per_block", blocks)
    }

    fn same_length(&self, key: &str, length: usize) -> Result<()> {
        let blocks = self.block_out_channels.len();
        if length == blocks {
            return Ok(());
        }
        Err(Error::Unsupported(format!(
            "`{key}` names {length} blocks, but `block_out_channels` has {blocks} values; they must agree"
        )))
    }

    /// Values of the time embedding.
    pub(crate) fn time_embed_dim(&self) -> usize {
        let times = if self.is_fourier() { 2 } else { 4 };
        self.time_embedding_dim.unwrap_or(times * self.block_out_channels[0])
    }

    /// Whether the frequencies of the time embedding lie in the weights.
    pub(crate) fn is_fourier(&self) -> bool {
        self.time_embedding_type == "fourier"
    }

    /// What the residual blocks have in common; those in the middle divide their sums by `output_scale`.
    pub(crate) fn resnet_options(&self, output_scale: f64) -> Result<ResnetOptions> {
        let is_scale_shift = match self.resnet_time_scale_shift.as_str() {
            "default" => false,
            "scale_shift" => true,
            other => return Err(unsupported("resnet_time_scale_shift", other)),
        };
        let time = self.time_embed_dim();
        Ok(ResnetOptions {
            groups: self.groups()?,
            eps: self.norm_eps,
            act: self.act()?,
            time_channels: Some(if self.class_embeddings_concat { 2 * time } else { time }),
            is_scale_shift,
            output_scale,
        })
    }

    /// Groups of the norms.
    pub(crate) fn groups(&self) -> Result<usize> {
        self.norm_num_groups.ok_or_else(|| unsupported("norm_num_groups", "null"))
    }

    /// The activation.
    pub(crate) fn act(&self) -> Result<Activation> {
        Activation::parse("act_fn", &self.act_fn)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(json: &str) -> UnetConfig {
        serde_json::from_str(json).expect("a configuration of known keys")
    }

    #[test]
    fn levels_on_the_way_up_mirror_those_on_the_way_down_with_one_layer_more() {
        let config = config(
            r#"{"block_out_channels": [8, 16], "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
                "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "attention_head_dim": [2, 4],
                "transformer_layers_per_block": [1, 3]}"#,
        );
        let up = config.up_plans().expect("the lists agree");
        assert_eq!((up[0].class.as_str(), up[0].channels, up[0].heads), ("CrossAttnUpBlock2D", 16, 4));
        assert_eq!(up[0].transformer_layers, [3, 3, 3]);
        assert!(!up[0].is_last && up[1].is_last);
        assert_eq!(config.mid_plan().expect("the lists agree").transformer_layers[0], 3);
    }

    #[test]
    fn transformer_layers_may_differ_within_a_level_when_the_way_up_is_given() {
        let config = config(
            r#"{"block_out_channels": [8, 16], "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
                "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
                "transformer_layers_per_block": [[0, 2], 4], "reverse_transformer_layers_per_block": [4, [3, 2, 1]]}"#,
        );
        assert_eq!(config.down_plans().expect("the lists agree")[0].transformer_layers, [0, 2]);
        let up = config.up_plans().expect("the lists agree");
        assert_eq!((&up[0].transformer_layers[..], &up[1].transformer_layers[..]), (&[4, 4, 4][..], &[3, 2, 1][..]));
    }

    #[test]
    fn a_list_of_the_wrong_length_is_named() {
        let message = config(r#"{"attention_head_dim": [8, 8]}"#).down_plans().expect_err("two of four").to_string();
        assert!(message.contains("`attention_head_dim` has 2 values for 4 blocks"), "{message}");
    }

    #[test]
    fn values_that_cannot_run_are_named_with_their_key() {
        for (json, key) in [
            (r#"{"dual_cross_attention": true}"#, "`dual_cross_attention`: `true`"),
            (r#"{"encoder_hid_dim": 768}"#, "`encoder_hid_dim`: `768`"),
            (r#"{"time_embedding_type": "learned"}"#, "`time_embedding_type`: `learned`"),
            (r#"{"attention_type": "gated"}"#, "`attention_type`: `gated`"),
        ] {
            let message = config(json).check().expect_err("unsupported").to_string();
            assert!(message.contains(key), "{message}");
        }
    }
}
