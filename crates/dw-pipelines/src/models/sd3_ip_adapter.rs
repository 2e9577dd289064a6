//! IP-Adapters of Stable Diffusion 3 (diffusers `IPAdapterTimeImageProjection` and
//! `SD3IPAdapterJointAttnProcessor2_0`; the file layout of `InstantX/SD3.5-Large-IP-Adapter`): what an image encoder says
//! about pictures to tokens, anew for each timestep, and those to what the blocks look at.
//!
//! Encoding pictures is the pipelines' part, and so is the scale.

use candle_core::{DType, Tensor};

use super::{
    mmdit::{BlockImages, ImageAttention, JointImages, Modulation, modulated},
    sd3::Sd3Config,
};
use crate::{
    Error, Result,
    nn::{Activation, AttentionOptions, LayerNorm, Linear, TimestepEmbedding, Timesteps, attention},
    weights::Weights,
};

/// The epsilon of the projection's norms, which no file names.
const EPS: f64 = 1e-5;
/// The size of a head of the projection, which no file names.
const HEAD_SIZE: usize = 64;

/// An adapter for one transformer.
pub struct Sd3IpAdapter {
    projection: TimeImageProjection,
    blocks: Vec<BlockAttentions>,
    width: usize,
    dtype: DType,
}

/// The attentions to pictures of one block.
struct BlockAttentions {
    joint: ImageAttention,
    alone: Option<ImageAttention>,
}

impl Sd3IpAdapter {
    /// Builds the adapter for a transformer, or says that it belongs to another model.
    pub fn new(config: &Sd3Config, weights: &Weights) -> Result<Self> {
        let shape_of = |name: &str| weights.shape_of(name).map(|shape| shape.dims().to_vec());
        let Shapes { width, times } = Shapes::check(config, weights.origin(), &shape_of)?;
        let sizes = config.sizes()?;
        // The reference numbers the attentions in the order of the blocks, those of picture tokens alone included.
        let mut numbers = 0..;
        let mut attention = || {
            let at = weights.pp("ip_adapter").pp(numbers.next().unwrap_or_default());
            ImageAttention::new(sizes, times, &at)
        };
        let mut blocks = Vec::with_capacity(config.num_layers);
        for block in 0..config.num_layers {
            let joint = attention()?;
            let alone = config.dual_attention_layers.contains(&block).then(&mut attention).transpose()?;
            blocks.push(BlockAttentions { joint, alone });
        }
        let projection = TimeImageProjection::new(&weights.pp("image_proj"))?;
        Ok(Self { projection, blocks, width, dtype: weights.dtype() })
    }

    /// How wide the states are that it takes of an image encoder.
    pub fn width(&self) -> usize {
        self.width
    }

    /// What is seen of pictures at a timestep: of their states before the image encoder's last layer, `(rows, pictures,
    /// patches, width)`. Each row sees all its pictures.
    pub fn prompt(&self, features: &Tensor, timestep: f64, scale: f64) -> Result<Sd3ImagePrompt<'_>> {
        let (rows, pictures, _, _) = features.dims4()?;
        let (tokens, time) = self.projection.forward(&features.flatten(0, 1)?.to_dtype(self.dtype)?, timestep)?;
        let (_, per_picture, inner) = tokens.dims3()?;
        Ok(Sd3ImagePrompt {
            adapter: self,
            tokens: tokens.reshape((rows, pictures * per_picture, inner))?,
            time,
            scale,
        })
    }
}

/// What a transformer sees of pictures at one timestep.
#[derive(Clone)]
pub struct Sd3ImagePrompt<'a> {
    adapter: &'a Sd3IpAdapter,
    /// `(batch, tokens, inner)`.
    tokens: Tensor,
    /// The vector of the timestep, `(1, features)`.
    time: Tensor,
    scale: f64,
}

impl std::fmt::Debug for Sd3ImagePrompt<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sd3ImagePrompt").field("tokens", &self.tokens.shape()).field("scale", &self.scale).finish()
    }
}

impl Sd3ImagePrompt<'_> {
    /// Each row as often as asked, one after the other.
    pub fn repeated(self, times: usize) -> Result<Self> {
        let (rows, tokens, inner) = self.tokens.dims3()?;
        let tokens = self.tokens.unsqueeze(1)?.repeat((1, times, 1, 1))?.reshape((rows * times, tokens, inner))?;
        Ok(Self { tokens, ..self })
    }

    /// What the reference shows one half of a guided batch that is evaluated alone: each row sees what it sees in both
    /// halves.
    pub fn of_one_half(&self) -> Result<Self> {
        let halves = self.tokens.chunk(2, 0)?;
        Ok(Self { tokens: Tensor::cat(&halves, 1)?, ..self.clone() })
    }

    /// What the attentions of a block see.
    pub(super) fn of_block(&self, block: usize) -> BlockImages<'_> {
        let BlockAttentions { joint, alone } = &self.adapter.blocks[block];
        let branch = |attention| JointImages { attention, tokens: &self.tokens, time: &self.time, scale: self.scale };
        BlockImages { joint: branch(joint), alone: alone.as_ref().map(branch) }
    }
}

/// What the shapes of a file's tensors tell.
pub(crate) struct Shapes {
    /// Features of the image encoder's states.
    pub(crate) width: usize,
    /// Features of the vector of the timestep.
    times: usize,
}

impl Shapes {
    /// Refuses files that hold no adapter for a transformer like this. `origin` is what errors call the file.
    pub(crate) fn check(
        config: &Sd3Config,
        origin: &str,
        shape_of: &dyn Fn(&str) -> Option<Vec<usize>>,
    ) -> Result<Self> {
        let refuse = |what: String| {
            Error::Unsupported(format!(
                "the IP-Adapter `{origin}` does not fit this model: {what}; use the adapter made for the model (3.5 large \
                 has one of its own; those of other families do not work)"
            ))
        };
        let dim = |name: &str, at: usize| {
            let found = shape_of(name).and_then(|shape| shape.get(at).copied());
            found.ok_or_else(|| {
                refuse(format!("it has no tensor `{name}`, so it is no IP-Adapter for Stable Diffusion 3"))
            })
        };
        let times = dim("ip_adapter.0.norm_ip.linear.weight", 1)?;
        let width = dim("image_proj.proj_in.weight", 1)?;
        dim("image_proj.time_embedding.linear_1.weight", 1)?;
        let wanted = config.num_attention_heads * config.attention_head_dim;
        for (name, at) in [("ip_adapter.0.to_k_ip.weight", 0), ("image_proj.proj_out.weight", 0)] {
            let inner = dim(name, at)?;
            if inner != wanted {
                return Err(refuse(format!("it was made for tokens of {inner} features, the model's have {wanted}")));
            }
        }
        let is_layer = |i: &usize| shape_of(&format!("ip_adapter.{i}.to_k_ip.weight")).is_some();
        let (layers, wanted) = ((0..usize::MAX).take_while(is_layer).count(), config.attentions());
        if layers != wanted {
            return Err(refuse(format!("it has {layers} attention layers, the model has {wanted}")));
        }
        Ok(Self { width, times })
    }
}

/// Learned queries that look at a picture's patches, told the timestep.
struct TimeImageProjection {
    time_proj: Timesteps,
    time_embedding: TimestepEmbedding,
    /// `(1, queries, hidden)`.
    latents: Tensor,
    proj_in: Linear,
    layers: Vec<ProjectionLayer>,
    proj_out: Linear,
    norm_out: LayerNorm,
}

impl TimeImageProjection {
    fn new(weights: &Weights) -> Result<Self> {
        let dims = |name: &str| weights.shape_of(name).map(|shape| shape.dims().to_vec()).unwrap_or_default();
        let size = |name: &str, at: usize| dims(name).get(at).copied().unwrap_or(0);
        let hidden = size("proj_in.weight", 0);
        let output = size("proj_out.weight", 0);
        let times = size("time_embedding.linear_1.weight", 1);
        let layers = weights.pp("layers");
        let is_layer = |i: &usize| ProjectionLayer::is_in(&layers.pp(i));
        let depth = (0..usize::MAX).take_while(is_layer).count();
        Ok(Self {
            time_proj: Timesteps::new(times, true, 0.0, weights.device())?,
            time_embedding: TimestepEmbedding::new(times, hidden, Activation::Silu, &weights.pp("time_embedding"))?,
            latents: weights.get((1, size("latents", 1), hidden), "latents")?,
            proj_in: weights.pp("proj_in").linear(size("proj_in.weight", 1), hidden, true)?,
            layers: (0..depth).map(|i| ProjectionLayer::new(hidden, &layers.pp(i))).collect::<Result<_>>()?,
            proj_out: weights.pp("proj_out").linear(hidden, output, true)?,
            norm_out: weights.pp("norm_out").layer_norm(output, EPS)?,
        })
    }

    /// `(pictures, patches, width)` to `(pictures, queries, output)`, and the vector of the timestep, `(1, hidden)`.
    fn forward(&self, features: &Tensor, timestep: f64) -> Result<(Tensor, Tensor)> {
        let time = self.time_embedding.forward(&self.time_proj.of(timestep)?.to_dtype(features.dtype())?, None)?;
        let patches = self.proj_in.forward(features)?.broadcast_add(&time.unsqueeze(1)?)?;
        let mut latents = self.latents.repeat((features.dim(0)?, 1, 1))?;
        for layer in &self.layers {
            latents = layer.forward(&patches, &latents, &time)?;
        }
        Ok((self.norm_out.forward(&self.proj_out.forward(&latents)?)?, time))
    }
}

/// Attention of the queries to patches and queries, and a feed-forward, both modulated by the timestep.
struct ProjectionLayer {
    norm_patches: LayerNorm,
    norm_latents: LayerNorm,
    to_q: Linear,
    /// Keys, then values.
    to_kv: Linear,
    to_out: Linear,
    heads: usize,
    modulation: Modulation<4>,
    ff_norm: LayerNorm,
    ff_in: Linear,
    ff_out: Linear,
}

impl ProjectionLayer {
    /// The names of the queries' layer: as published, and as diffusers has it.
    const QUERIES: [&str; 2] = ["0.to_q", "attn.to_q"];

    fn is_in(weights: &Weights) -> bool {
        Self::QUERIES.iter().any(|name| weights.contains(&format!("{name}.weight")))
    }

    fn new(hidden: usize, weights: &Weights) -> Result<Self> {
        let at = |[published, plain]: [&str; 2]| {
            let published = weights.pp(published);
            if published.contains("weight") { published } else { weights.pp(plain) }
        };
        let rows = |weights: &Weights| {
            weights.shape_of("weight").and_then(|shape| shape.dims().first().copied()).unwrap_or(hidden)
        };
        let (to_q, ff_in) = (at(Self::QUERIES), at(["1.1", "ff.net.0.proj"]));
        let (features, wide) = (rows(&to_q), rows(&ff_in));
        Ok(Self {
            norm_patches: at(["0.norm1", "ln0"]).layer_norm(hidden, EPS)?,
            norm_latents: at(["0.norm2", "ln1"]).layer_norm(hidden, EPS)?,
            to_q: to_q.linear(hidden, features, false)?,
            to_kv: at(["0.to_kv", "attn.to_kv"]).linear(hidden, 2 * features, false)?,
            to_out: at(["0.to_out", "attn.to_out.0"]).linear(features, hidden, false)?,
            heads: (features / HEAD_SIZE).max(1),
            modulation: Modulation::of(at(["2.1", "adaln_proj"]).linear(hidden, 4 * hidden, true)?),
            ff_norm: at(["1.0", "adaln_norm"]).layer_norm(hidden, EPS)?,
            ff_in: ff_in.linear(hidden, wide, false)?,
            ff_out: at(["1.3", "ff.net.2"]).linear(wide, hidden, false)?,
        })
    }

    /// `patches` is `(pictures, patches, hidden)`, `latents` and the result are `(pictures, queries, hidden)`.
    fn forward(&self, patches: &Tensor, latents: &Tensor, time: &Tensor) -> Result<Tensor> {
        let [shift, scale, ff_shift, ff_scale] = self.modulation.forward(time)?;
        let normed = modulated(&self.norm_latents.forward(latents)?, &scale, &shift)?;
        let context = Tensor::cat(&[&self.norm_patches.forward(patches)?, &normed], 1)?;
        let both = self.to_kv.forward(&context)?.chunk(2, 2)?;
        let (key, value) = (both[0].contiguous()?, both[1].contiguous()?);
        let attended = attention(&self.to_q.forward(&normed)?, &key, &value, AttentionOptions::heads(self.heads))?;
        let latents = (latents + self.to_out.forward(&attended)?)?;
        let input = modulated(&self.ff_norm.forward(&latents)?, &ff_scale, &ff_shift)?;
        let inner = Activation::Gelu.forward(&self.ff_in.forward(&input)?)?;
        Ok((&latents + self.ff_out.forward(&inner)?)?)
    }
}
