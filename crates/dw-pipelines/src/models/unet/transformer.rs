//! The spatial transformer: pixels attend to each other and to the text (diffusers `Transformer2DModel` and
//! `BasicTransformerBlock`).

use candle_core::Tensor;

use super::{
    blocks::Conditioning,
    config::BlockPlan,
    image_prompt::{ImageBranch, ImagePrompts},
};
use crate::{
    Result,
    models::{
        blocks::{to_map, to_rows},
        config::unsupported,
    },
    nn::{AttentionOptions, Conv2d, Conv2dOptions, GroupNorm, LayerNorm, Linear, attention, feed_forward, geglu},
    weights::Weights,
};

/// The epsilon of the norm in front of a transformer, which no configuration names.
const GROUP_NORM_EPS: f64 = 1e-6;
/// The epsilon of the norms inside.
const LAYER_NORM_EPS: f64 = 1e-5;

/// A projection of the features of every pixel, in either of the two ways it is stored.
enum Projection {
    Linear(Linear),
    Conv(Conv2d),
}

/// A feature map through transformer layers, added to itself.
pub(crate) struct Transformer2d {
    norm: GroupNorm,
    proj_in: Projection,
    blocks: Vec<TransformerBlock>,
    proj_out: Projection,
}

impl Transformer2d {
    pub(crate) fn new(
        plan: &BlockPlan,
        layers: usize,
        groups: usize,
        is_linear: bool,
        weights: &Weights,
    ) -> Result<Self> {
        let channels = plan.channels;
        if plan.heads == 0 || !channels.is_multiple_of(plan.heads) {
            return Err(unsupported("attention_head_dim", plan.heads));
        }
        let projection = |name: &str| -> Result<Projection> {
            let weights = weights.pp(name);
            Ok(if is_linear {
                Projection::Linear(weights.linear(channels, channels, true)?)
            } else {
                Projection::Conv(weights.conv2d(channels, channels, Conv2dOptions::same(1))?)
            })
        };
        let blocks = weights.pp("transformer_blocks");
        Ok(Self {
            norm: weights.pp("norm").group_norm(groups, channels, GROUP_NORM_EPS)?,
            proj_in: projection("proj_in")?,
            blocks: (0..layers).map(|i| TransformerBlock::new(plan, &blocks.pp(i))).collect::<Result<_>>()?,
            proj_out: projection("proj_out")?,
        })
    }

    /// `x` is `(batch, channels, height, width)`.
    pub(crate) fn forward(&self, x: &Tensor, conditioning: Conditioning) -> Result<Tensor> {
        let (_, _, height, width) = x.dims4()?;
        let normed = self.norm.forward(x)?;
        let mut rows = match &self.proj_in {
            Projection::Linear(linear) => linear.forward(&to_rows(&normed)?)?,
            Projection::Conv(conv) => to_rows(&conv.forward(&normed)?)?,
        };
        for block in &self.blocks {
            rows = block.forward(&rows, conditioning.text, conditioning.image_prompts)?;
        }
        let map = match &self.proj_out {
            Projection::Linear(linear) => to_map(&linear.forward(&rows)?, height, width)?,
            Projection::Conv(conv) => conv.forward(&to_map(&rows, height, width)?)?,
        };
        Ok((map + x)?)
    }
}

/// Attention between pixels, attention to the text, and a gated feed-forward, each added to its input.
struct TransformerBlock {
    norm1: LayerNorm,
    attn1: Attention,
    norm2: LayerNorm,
    attn2: Attention,
    /// The path of `attn2`, under which image prompts know it.
    cross_name: String,
    norm3: LayerNorm,
    ff_in: Linear,
    ff_out: Linear,
    is_only_cross: bool,
}

impl TransformerBlock {
    fn new(plan: &BlockPlan, weights: &Weights) -> Result<Self> {
        let size = plan.channels;
        let norm = |name: &str| weights.pp(name).layer_norm(size, LAYER_NORM_EPS);
        let own = if plan.is_only_cross { plan.text_dim } else { size };
        Ok(Self {
            norm1: norm("norm1")?,
            attn1: Attention::new(size, own, plan.heads, &weights.pp("attn1"))?,
            norm2: norm("norm2")?,
            attn2: Attention::new(size, plan.text_dim, plan.heads, &weights.pp("attn2"))?,
            cross_name: weights.pp("attn2").path().to_owned(),
            norm3: norm("norm3")?,
            ff_in: weights.pp("ff.net.0.proj").linear(size, 8 * size, true)?,
            ff_out: weights.pp("ff.net.2").linear(4 * size, size, true)?,
            is_only_cross: plan.is_only_cross,
        })
    }

    /// `rows` is `(batch, pixels, channels)`.
    fn forward(&self, rows: &Tensor, text: &Tensor, prompts: Option<&ImagePrompts>) -> Result<Tensor> {
        let normed = self.norm1.forward(rows)?;
        let context = if self.is_only_cross { text } else { &normed };
        let rows = (rows + self.attn1.forward(&normed, context, &[])?)?;
        let branches = prompts.map_or(&[][..], |prompts| prompts.of(&self.cross_name));
        let rows = (&rows + self.attn2.forward(&self.norm2.forward(&rows)?, text, branches)?)?;
        let layer = |rows: &Tensor| self.ff_out.forward(&geglu(&self.ff_in.forward(rows)?)?);
        let inner = feed_forward(&self.norm3.forward(&rows)?, layer)?;
        Ok((rows + inner)?)
    }
}

/// Multi-head attention with its projections.
struct Attention {
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
    heads: usize,
}

impl Attention {
    fn new(size: usize, context: usize, heads: usize, weights: &Weights) -> Result<Self> {
        Ok(Self {
            to_q: weights.pp("to_q").linear(size, size, false)?,
            to_k: weights.pp("to_k").linear(context, size, false)?,
            to_v: weights.pp("to_v").linear(context, size, false)?,
            to_out: weights.pp("to_out.0").linear(size, size, true)?,
            heads,
        })
    }

    /// `branches` are looked at with the same queries, and what they give is added before the last projection.
    fn forward(&self, x: &Tensor, context: &Tensor, branches: &[ImageBranch]) -> Result<Tensor> {
        let query = self.to_q.forward(x)?;
        let options = AttentionOptions::heads(self.heads);
        let (key, value) = (self.to_k.forward(context)?, self.to_v.forward(context)?);
        let mut attended = attention(&query, &key, &value, options)?;
        for ImageBranch { key, value, scale } in branches {
            attended = (attended + (attention(&query, key, value, options)? * *scale)?)?;
        }
        self.to_out.forward(&attended)
    }
}
