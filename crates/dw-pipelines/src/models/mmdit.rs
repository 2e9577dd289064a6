//! The blocks of multimodal diffusion transformers, in which picture and text tokens attend to each other with weights
//! of their own (Esser et al. 2024, arXiv:2403.03206; diffusers `JointTransformerBlock`).
//!
//! Owns patches, positions, the embedding of time and pooled text, and the blocks. Leaves their order to the models.

use candle_core::{D, Device, Tensor};

mod image_attention;

use super::{config::unsupported, unet::ImageBranch};
use crate::{
    Error, Result,
    nn::{
        Activation, AttentionOptions, Conv2d, Conv2dOptions, LayerNorm, Linear, RmsNorm, Rotary, TimestepEmbedding,
        Timesteps, attention,
    },
    weights::Weights,
};

pub(super) use image_attention::{BlockImages, ImageAttention, JointImages};

/// The epsilon of all norms, which no configuration names.
pub(super) const EPS: f64 = 1e-6;

/// How many values the sinusoid of a timestep has, which no configuration names.
const TIME_VALUES: usize = 256;

/// What the blocks of one model have in common.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    /// Heads per attention.
    pub(super) heads: usize,
    /// Features per head.
    pub(super) head: usize,
    /// Whether queries and keys are normalised.
    pub(super) has_qk_norm: bool,
}

impl Sizes {
    /// Reads the configuration's keys of these names.
    pub(super) fn new(heads: usize, head: usize, qk_norm: Option<&str>) -> Result<Self> {
        match qk_norm {
            None | Some("rms_norm") => Ok(Self { heads, head, has_qk_norm: qk_norm.is_some() }),
            Some(other) => Err(unsupported("qk_norm", other)),
        }
    }

    /// Features per token.
    pub(super) fn inner(self) -> usize {
        self.heads * self.head
    }
}

/// The pieces a picture is cut into.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patches {
    /// Height and width of a patch in latents.
    pub(super) size: usize,
    /// Channels of the latents.
    pub(super) channels: usize,
    /// Patches per side of the table of positions.
    pub(super) max_size: usize,
}

/// Latents to tokens: a linear map of each patch, and its position (diffusers `PatchEmbed`).
pub(super) struct PatchEmbed {
    proj: Conv2d,
    /// `(max_size, max_size, inner)`; none where tokens have no position.
    positions: Option<Tensor>,
    patches: Patches,
}

impl PatchEmbed {
    /// Reads `proj` and, where the file has it, the table `pos_embed`. Without one tokens have positions all the same
    /// when `base` says how many patches per side the model was trained with.
    pub(super) fn new(patches: Patches, base: Option<usize>, inner: usize, weights: &Weights) -> Result<Self> {
        let Patches { size, channels, max_size } = patches;
        let options = Conv2dOptions { kernel: size, stride: size, padding: 0, bias: true };
        let positions = weights
            .contains("pos_embed")
            .then(|| {
                let table = weights.get((1, max_size * max_size, inner), "pos_embed")?;
                Ok::<_, Error>(table.reshape((max_size, max_size, inner))?)
            })
            .or_else(|| {
                base.map(|base| {
                    Ok::<_, Error>(waves(max_size, base, inner, weights.device())?.to_dtype(weights.dtype())?)
                })
            })
            .transpose()?;
        Ok(Self { proj: weights.pp("proj").conv2d(channels, inner, options)?, positions, patches })
    }

    /// `(batch, channels, height, width)` to `(batch, tokens, inner)`, row by row. Positions are the middle of the
    /// table.
    pub(super) fn forward(&self, latents: &Tensor) -> Result<Tensor> {
        let patches = self.proj.forward(latents)?;
        let (_, inner, rows, columns) = patches.dims4()?;
        let tokens = patches.flatten_from(2)?.transpose(1, 2)?;
        let Some(table) = &self.positions else { return Ok(tokens.contiguous()?) };
        let Patches { size, max_size, .. } = self.patches;
        if rows > max_size || columns > max_size {
            return Err(Error::Unsupported(format!(
                "the model has positions for {0} x {0} latents, but this picture needs {1} x {2}; make it smaller",
                max_size * size,
                columns * size,
                rows * size
            )));
        }
        let middle = table.narrow(0, (max_size - rows) / 2, rows)?.narrow(1, (max_size - columns) / 2, columns)?;
        Ok(tokens.broadcast_add(&middle.reshape((1, rows * columns, inner))?)?)
    }
}

/// The positions of `max_size` x `max_size` patches as sinusoids, `(max_size, max_size, inner)` in f32: those of the
/// column, then those of the row, each sines and then cosines (diffusers `get_2d_sincos_pos_embed`).
fn waves(max_size: usize, base: usize, inner: usize, device: &Device) -> Result<Tensor> {
    let quarter = inner / 4;
    let axis: Vec<Vec<f32>> = (0..max_size)
        .map(|at| {
            let position = f64::from(at as f32 / (max_size as f64 / base as f64) as f32);
            let phase = |k: usize| position / 10000f64.powf(k as f64 / quarter as f64);
            let sines = (0..quarter).map(|k| phase(k).sin() as f32);
            sines.chain((0..quarter).map(|k| phase(k).cos() as f32)).collect()
        })
        .collect();
    let mut values: Vec<f32> = Vec::with_capacity(max_size * max_size * inner);
    for row in &axis {
        for column in &axis {
            values.extend(column.iter().chain(row));
        }
    }
    Ok(Tensor::from_vec(values, (max_size, max_size, 4 * quarter), device)?)
}

/// Tokens back to latents: `(batch, rows * columns, size * size * channels)` to
/// `(batch, channels, rows * size, columns * size)`.
pub(super) fn unpatchified(tokens: &Tensor, (rows, columns): (usize, usize), size: usize) -> Result<Tensor> {
    let batch = tokens.dim(0)?;
    let channels = tokens.dim(2)? / (size * size);
    let pieces = tokens.reshape(&[batch, rows, columns, size, size, channels][..])?;
    let pieces = pieces.permute(vec![0, 5, 1, 3, 2, 4])?;
    Ok(pieces.reshape((batch, channels, rows * size, columns * size))?)
}

/// Timestep and pooled text as one vector (diffusers `CombinedTimestepTextProjEmbeddings`).
pub(super) struct TimeTextEmbed {
    time_proj: Timesteps,
    timestep_embedder: TimestepEmbedding,
    /// Of models whose guidance is an input.
    guidance_embedder: Option<TimestepEmbedding>,
    text_embedder: TimestepEmbedding,
}

impl TimeTextEmbed {
    pub(super) fn new(pooled: usize, inner: usize, weights: &Weights) -> Result<Self> {
        let embedder =
            |name: &str, inputs: usize| TimestepEmbedding::new(inputs, inner, Activation::Silu, &weights.pp(name));
        Ok(Self {
            time_proj: Timesteps::new(TIME_VALUES, true, 0.0, weights.device())?,
            timestep_embedder: embedder("timestep_embedder", TIME_VALUES)?,
            guidance_embedder: None,
            text_embedder: embedder("text_embedder", pooled)?,
        })
    }

    /// The same with an embedder of the guidance beside it (diffusers `CombinedTimestepGuidanceTextProjEmbeddings`).
    pub(super) fn with_guidance(pooled: usize, inner: usize, weights: &Weights) -> Result<Self> {
        let at = weights.pp("guidance_embedder");
        let guidance_embedder = Some(TimestepEmbedding::new(TIME_VALUES, inner, Activation::Silu, &at)?);
        Ok(Self { guidance_embedder, ..Self::new(pooled, inner, weights)? })
    }

    /// A timestep and `(batch, pooled)` to `(batch, inner)`.
    pub(super) fn forward(&self, timestep: f64, pooled: &Tensor) -> Result<Tensor> {
        self.guided(timestep, 0.0, pooled)
    }

    /// The same with a guidance, which only models that embed it look at.
    pub(super) fn guided(&self, timestep: f64, guidance: f64, pooled: &Tensor) -> Result<Tensor> {
        let embedded = |number: f64, embedder: &TimestepEmbedding| {
            embedder.forward(&self.time_proj.of(number)?.to_dtype(pooled.dtype())?, None)
        };
        let mut time = embedded(timestep, &self.timestep_embedder)?;
        if let Some(embedder) = &self.guidance_embedder {
            time = (time + embedded(guidance, embedder)?)?;
        }
        Ok(self.text_embedder.forward(pooled, None)?.broadcast_add(&time)?)
    }
}

/// `x (1 + scale) + shift` for each row of the batch.
pub(super) fn modulated(x: &Tensor, scale: &Tensor, shift: &Tensor) -> Result<Tensor> {
    Ok(x.broadcast_mul(&(scale + 1.0)?)?.broadcast_add(shift)?)
}

/// What a block makes of the vector of time and text: `N` vectors for each row, each `(batch, 1, inner)`.
pub(super) struct Modulation<const N: usize> {
    linear: Linear,
}

impl<const N: usize> Modulation<N> {
    pub(super) fn new(inner: usize, weights: &Weights) -> Result<Self> {
        Ok(Self::of(weights.pp("linear").linear(inner, N * inner, true)?))
    }

    /// That of a layer with `N` times as many outputs as the vectors have features.
    pub(super) fn of(linear: Linear) -> Self {
        Self { linear }
    }

    pub(super) fn forward(&self, embedding: &Tensor) -> Result<[Tensor; N]> {
        let all = self.linear.forward(&Activation::Silu.forward(embedding)?)?.unsqueeze(1)?;
        let inner = all.dim(D::Minus1)? / N;
        let parts = (0..N).map(|i| all.narrow(D::Minus1, i * inner, inner)).collect::<candle_core::Result<Vec<_>>>()?;
        Ok(parts.try_into().expect("as many parts as were cut"))
    }
}

/// A norm that is scaled and shifted by the vector of time and text (diffusers `AdaLayerNormContinuous`).
pub(super) struct AdaptiveNorm(Modulation<2>);

impl AdaptiveNorm {
    pub(super) fn new(inner: usize, weights: &Weights) -> Result<Self> {
        Modulation::new(inner, weights).map(Self)
    }

    /// `(batch, tokens, inner)` to the same.
    pub(super) fn forward(&self, x: &Tensor, embedding: &Tensor) -> Result<Tensor> {
        let [scale, shift] = self.0.forward(embedding)?;
        modulated(&LayerNorm::plain(x, EPS)?, &scale, &shift)
    }
}

/// Queries, keys and values of one kind of token.
pub(super) struct Projections {
    q: Linear,
    k: Linear,
    v: Linear,
    norms: Option<(RmsNorm, RmsNorm)>,
    sizes: Sizes,
}

impl Projections {
    /// `names` are those of the projections, then of the norms.
    fn new(sizes: Sizes, names: [&str; 5], weights: &Weights) -> Result<Self> {
        let inner = sizes.inner();
        let [q, k, v, norm_q, norm_k] = names.map(|name| weights.pp(name));
        let norm = |at: &Weights| at.rms_norm(sizes.head, EPS);
        let norms = if sizes.has_qk_norm { Some((norm(&norm_q)?, norm(&norm_k)?)) } else { None };
        let linear = |at: &Weights| at.linear(inner, inner, true);
        Ok(Self { q: linear(&q)?, k: linear(&k)?, v: linear(&v)?, norms, sizes })
    }

    /// Those of picture tokens.
    pub(super) fn of_picture(sizes: Sizes, weights: &Weights) -> Result<Self> {
        Self::new(sizes, ["to_q", "to_k", "to_v", "norm_q", "norm_k"], weights)
    }

    fn of_text(sizes: Sizes, weights: &Weights) -> Result<Self> {
        Self::new(sizes, ["add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k"], weights)
    }

    /// `(batch, tokens, inner)` each.
    pub(super) fn forward(&self, x: &Tensor) -> Result<[Tensor; 3]> {
        self.normed(self.raw(x)?)
    }

    /// The same before the norms.
    fn raw(&self, x: &Tensor) -> Result<[Tensor; 3]> {
        Ok([self.q.forward(x)?, self.k.forward(x)?, self.v.forward(x)?])
    }

    fn normed(&self, [q, k, v]: [Tensor; 3]) -> Result<[Tensor; 3]> {
        let Some((norm_q, norm_k)) = &self.norms else { return Ok([q, k, v]) };
        Ok([normed_heads(&q, norm_q, self.sizes)?, normed_heads(&k, norm_k, self.sizes)?, v])
    }
}

/// Queries or keys, `(batch, tokens, inner)`, with each head's features normalised.
fn normed_heads(x: &Tensor, norm: &RmsNorm, sizes: Sizes) -> Result<Tensor> {
    let (batch, tokens, inner) = x.dims3()?;
    let heads = x.reshape((batch, tokens, sizes.heads, sizes.head))?;
    Ok(norm.forward(&heads)?.reshape((batch, tokens, inner))?)
}

/// Attention of picture tokens among themselves.
struct SelfAttention {
    projections: Projections,
    to_out: Linear,
}

impl SelfAttention {
    fn new(sizes: Sizes, weights: &Weights) -> Result<Self> {
        let inner = sizes.inner();
        Ok(Self {
            projections: Projections::of_picture(sizes, weights)?,
            to_out: weights.pp("to_out.0").linear(inner, inner, true)?,
        })
    }

    fn forward(&self, x: &Tensor, image: Option<&JointImages<'_>>) -> Result<Tensor> {
        let raw = self.projections.raw(x)?;
        let [q, k, v] = self.projections.normed(raw.clone())?;
        let attended = attention(&q, &k, &v, AttentionOptions::heads(self.projections.sizes.heads))?;
        self.out(attended, &raw, image)
    }

    /// What picture tokens learn, from what they attended to and, before the norms, their queries, keys and values.
    fn out(&self, attended: Tensor, raw: &[Tensor; 3], image: Option<&JointImages<'_>>) -> Result<Tensor> {
        match image {
            Some(image) => self.to_out.forward(&(attended + image.learned(raw)?)?),
            None => self.to_out.forward(&attended),
        }
    }
}

/// Attention of picture and text tokens together (diffusers `JointAttnProcessor2_0`).
struct JointAttention {
    picture: SelfAttention,
    text: Projections,
    /// None in the last block, after which nothing reads the text.
    to_add_out: Option<Linear>,
}

impl JointAttention {
    fn new(sizes: Sizes, is_last: bool, weights: &Weights) -> Result<Self> {
        let inner = sizes.inner();
        Ok(Self {
            picture: SelfAttention::new(sizes, weights)?,
            text: Projections::of_text(sizes, weights)?,
            to_add_out: (!is_last).then(|| weights.pp("to_add_out").linear(inner, inner, true)).transpose()?,
        })
    }

    /// What picture and text tokens learn, each of the shape of its input, and what picture tokens see in `images`.
    fn forward(&self, picture: &Tensor, text: &Tensor, rotary: Option<&Rotary>, images: Images<'_>) -> Result<Learned> {
        let raw = self.picture.projections.raw(picture)?;
        let (of_picture, of_text) = (self.picture.projections.normed(raw.clone())?, self.text.forward(text)?);
        let mut joined = Vec::with_capacity(3);
        for (picture, text) in of_picture.iter().zip(&of_text) {
            joined.push(Tensor::cat(&[picture, text], 1)?);
        }
        if let Some(rotary) = rotary {
            for turned in &mut joined[..2] {
                *turned = rotary.forward(turned)?;
            }
        }
        let heads = self.text.sizes.heads;
        let from_images = seen(&of_picture[0], images.apart(), heads)?;
        let attended = attention(&joined[0], &joined[1], &joined[2], AttentionOptions::heads(heads))?;
        let (pixels, words) = (picture.dim(1)?, text.dim(1)?);
        let to_picture = self.picture.out(attended.narrow(1, 0, pixels)?.contiguous()?, &raw, images.joint())?;
        let to_text = match &self.to_add_out {
            Some(layer) => Some(layer.forward(&attended.narrow(1, pixels, words)?.contiguous()?)?),
            None => None,
        };
        Ok(Learned { picture: to_picture, text: to_text, images: from_images })
    }
}

/// What the picture's tokens of a block look at besides the block's own.
#[derive(Clone, Copy)]
pub(super) enum Images<'a> {
    /// Nothing.
    None,
    /// In each attention the picture's tokens and those of an image prompt together (Stable Diffusion 3).
    Joint(&'a BlockImages<'a>),
    /// Image prompts alone; what is seen is added at the end of the block (Flux).
    Apart(&'a [ImageBranch]),
}

impl<'a> Images<'a> {
    fn joint(self) -> Option<&'a JointImages<'a>> {
        if let Self::Joint(images) = self { Some(&images.joint) } else { None }
    }

    fn alone(self) -> Option<&'a JointImages<'a>> {
        if let Self::Joint(images) = self { images.alone.as_ref() } else { None }
    }

    fn apart(self) -> &'a [ImageBranch] {
        if let Self::Apart(images) = self { images } else { &[] }
    }
}

/// What tokens learn in one attention.
struct Learned {
    /// `(batch, pixels, inner)`.
    picture: Tensor,
    /// `(batch, words, inner)`; none in the last block.
    text: Option<Tensor>,
    /// What picture tokens see in image prompts, `(batch, pixels, inner)`; none where there are none.
    images: Option<Tensor>,
}

/// What queries `(batch, pixels, inner)`, which know no position, see in image prompts.
fn seen(query: &Tensor, images: &[ImageBranch], heads: usize) -> Result<Option<Tensor>> {
    let mut sum: Option<Tensor> = None;
    for image in images {
        let attended = attention(query, &image.key, &image.value, AttentionOptions::heads(heads))?;
        let attended = (attended * image.scale)?;
        sum = Some(match sum {
            Some(sum) => (sum + attended)?,
            None => attended,
        });
    }
    Ok(sum)
}

/// Two linear layers with an approximate gelu between them.
struct FeedForward {
    proj: Linear,
    out: Linear,
}

impl FeedForward {
    fn new(inner: usize, weights: &Weights) -> Result<Self> {
        Ok(Self {
            proj: weights.pp("net.0.proj").linear(inner, 4 * inner, true)?,
            out: weights.pp("net.2").linear(4 * inner, inner, true)?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.out.forward(&Activation::GeluTanh.forward(&self.proj.forward(x)?)?)
    }
}

/// How a block's feed-forward layers act on its tokens.
struct FeedForwardModulation<'a> {
    shift: &'a Tensor,
    scale: &'a Tensor,
    gate: &'a Tensor,
}

impl FeedForward {
    /// `x` with what the layers add to it.
    fn added(&self, x: &Tensor, modulation: &FeedForwardModulation<'_>) -> Result<Tensor> {
        let input = modulated(&LayerNorm::plain(x, EPS)?, modulation.scale, modulation.shift)?;
        Ok((x + self.forward(&input)?.broadcast_mul(modulation.gate)?)?)
    }
}

/// How the norm before attention in a block is modulated.
enum PictureNorm {
    /// For one attention.
    Single(Modulation<6>),
    /// For two, the second among picture tokens alone (Stable Diffusion 3.5 medium).
    Dual(Modulation<9>, Box<SelfAttention>),
}

/// The text's side of a block.
enum TextSide {
    /// The text goes on to the next block.
    Whole { norm1: Modulation<6>, ff: FeedForward },
    /// The last block reads the text only.
    ReadOnly(AdaptiveNorm),
}

/// A block of picture and text tokens.
pub(super) struct JointBlock {
    norm1: PictureNorm,
    attn: JointAttention,
    ff: FeedForward,
    text: TextSide,
}

/// What sets one block apart from the others.
#[derive(Clone, Copy, Debug)]
pub(super) struct BlockForm {
    /// Whether the text ends here.
    pub(super) is_last: bool,
    /// Whether picture tokens attend among themselves, too.
    pub(super) is_dual: bool,
}

impl JointBlock {
    pub(super) fn new(sizes: Sizes, form: BlockForm, weights: &Weights) -> Result<Self> {
        let inner = sizes.inner();
        let (norm1, norm1_context) = (weights.pp("norm1"), weights.pp("norm1_context"));
        let text = if form.is_last {
            TextSide::ReadOnly(AdaptiveNorm::new(inner, &norm1_context)?)
        } else {
            let ff = FeedForward::new(inner, &weights.pp("ff_context"))?;
            TextSide::Whole { norm1: Modulation::new(inner, &norm1_context)?, ff }
        };
        Ok(Self {
            norm1: if form.is_dual {
                let second = SelfAttention::new(sizes, &weights.pp("attn2"))?;
                PictureNorm::Dual(Modulation::new(inner, &norm1)?, Box::new(second))
            } else {
                PictureNorm::Single(Modulation::new(inner, &norm1)?)
            },
            attn: JointAttention::new(sizes, form.is_last, &weights.pp("attn"))?,
            ff: FeedForward::new(inner, &weights.pp("ff"))?,
            text,
        })
    }

    /// What the block's attention reads of the picture's tokens.
    pub(super) fn modulated_picture(&self, picture: &Tensor, embedding: &Tensor) -> Result<Tensor> {
        let [shift, scale] = match &self.norm1 {
            PictureNorm::Single(modulation) => {
                let [shift, scale, ..] = modulation.forward(embedding)?;
                [shift, scale]
            }
            PictureNorm::Dual(modulation, _) => {
                let [shift, scale, ..] = modulation.forward(embedding)?;
                [shift, scale]
            }
        };
        modulated(&LayerNorm::plain(picture, EPS)?, &scale, &shift)
    }

    /// Picture and text tokens, `(batch, tokens, inner)` each, to the same; the text as it came where it ends. `rotary`
    /// turns queries and keys, the picture's tokens first.
    pub(super) fn forward(
        &self,
        picture: &Tensor,
        text: &Tensor,
        embedding: &Tensor,
        rotary: Option<&Rotary>,
    ) -> Result<(Tensor, Tensor)> {
        self.forward_seeing(picture, text, embedding, rotary, Images::None)
    }

    /// The same, looking at `images` besides.
    pub(super) fn forward_seeing(
        &self,
        picture: &Tensor,
        text: &Tensor,
        embedding: &Tensor,
        rotary: Option<&Rotary>,
        images: Images<'_>,
    ) -> Result<(Tensor, Tensor)> {
        let normed = LayerNorm::plain(picture, EPS)?;
        let (first, second) = match &self.norm1 {
            PictureNorm::Single(modulation) => (modulation.forward(embedding)?, None),
            PictureNorm::Dual(modulation, attention) => {
                let [a, b, c, d, e, f, shift, scale, gate] = modulation.forward(embedding)?;
                ([a, b, c, d, e, f], Some((attention, modulated(&normed, &scale, &shift)?, gate)))
            }
        };
        let [shift, scale, gate, ff_shift, ff_scale, ff_gate] = first;
        let reading = match &self.text {
            TextSide::Whole { norm1, ff } => Reading::whole(text, norm1.forward(embedding)?, ff)?,
            TextSide::ReadOnly(norm) => Reading { normed: norm.forward(text, embedding)?, rest: None },
        };
        let input = modulated(&normed, &scale, &shift)?;
        let learned = self.attn.forward(&input, &reading.normed, rotary, images)?;
        let mut picture = (picture + learned.picture.broadcast_mul(&gate)?)?;
        if let Some((attention, input, gate)) = second {
            let alone = images.alone();
            picture = (picture + attention.forward(&input, alone)?.broadcast_mul(&gate)?)?;
        }
        let modulation = FeedForwardModulation { shift: &ff_shift, scale: &ff_scale, gate: &ff_gate };
        let mut picture = self.ff.added(&picture, &modulation)?;
        if let Some(images) = learned.images {
            picture = (picture + images)?;
        }
        Ok((picture, reading.finish(text, learned.text)?))
    }
}

/// The text's side of one pass through a block.
struct Reading<'a> {
    /// What attention reads.
    normed: Tensor,
    /// How the text goes on, unless it ends: gate, then the feed-forward layers with their modulation.
    rest: Option<(Tensor, &'a FeedForward, [Tensor; 3])>,
}

impl<'a> Reading<'a> {
    fn whole(text: &Tensor, modulation: [Tensor; 6], ff: &'a FeedForward) -> Result<Self> {
        let [shift, scale, gate, ff_shift, ff_scale, ff_gate] = modulation;
        let normed = modulated(&LayerNorm::plain(text, EPS)?, &scale, &shift)?;
        Ok(Self { normed, rest: Some((gate, ff, [ff_shift, ff_scale, ff_gate])) })
    }

    fn finish(self, text: &Tensor, learned: Option<Tensor>) -> Result<Tensor> {
        let (Some((gate, ff, [shift, scale, ff_gate])), Some(learned)) = (self.rest, learned) else {
            return Ok(text.clone());
        };
        let text = (text + learned.broadcast_mul(&gate)?)?;
        ff.added(&text, &FeedForwardModulation { shift: &shift, scale: &scale, gate: &ff_gate })
    }
}

/// A block of picture tokens alone (diffusers `SD3SingleTransformerBlock`).
pub(super) struct PictureBlock {
    norm1: Modulation<6>,
    attn: SelfAttention,
    ff: FeedForward,
}

impl PictureBlock {
    pub(super) fn new(sizes: Sizes, weights: &Weights) -> Result<Self> {
        // The reference gives these blocks no norms of queries and keys, whatever the configuration says.
        let sizes = Sizes { has_qk_norm: false, ..sizes };
        let inner = sizes.inner();
        Ok(Self {
            norm1: Modulation::new(inner, &weights.pp("norm1"))?,
            attn: SelfAttention::new(sizes, &weights.pp("attn"))?,
            ff: FeedForward::new(inner, &weights.pp("ff"))?,
        })
    }

    /// `(batch, tokens, inner)` to the same.
    pub(super) fn forward(&self, x: &Tensor, embedding: &Tensor) -> Result<Tensor> {
        let [shift, scale, gate, ff_shift, ff_scale, ff_gate] = self.norm1.forward(embedding)?;
        let input = modulated(&LayerNorm::plain(x, EPS)?, &scale, &shift)?;
        let x = (x + self.attn.forward(&input, None)?.broadcast_mul(&gate)?)?;
        self.ff.added(&x, &FeedForwardModulation { shift: &ff_shift, scale: &ff_scale, gate: &ff_gate })
    }
}
