//! IP-Adapters: a picture's features to tokens, and those to keys and values for a UNet's attention (Ye et al.
//! 2023, arXiv:2308.06721; the file layout of `h94/IP-Adapter`).
//!
//! Takes what the image encoder says about pictures; encoding them is the pipelines' part, and so is the scale.

use candle_core::{DType, Tensor};

use super::unet::{CrossAttentionLayer, ImageBranch, ImagePrompts, UnetConfig};
use crate::{
    Error, Result,
    nn::{Activation, AttentionOptions, LayerNorm, Linear, attention},
    weights::Weights,
};

/// The epsilon of all norms.
const EPS: f64 = 1e-5;
/// The size of a head of the resampler.
const HEAD_SIZE: usize = 64;

/// Which of the image encoder's states an adapter looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageFeatures {
    /// The pooled and projected state, `(pictures, features)`.
    Pooled,
    /// The state before the last layer, `(pictures, patches, features)`.
    Penultimate,
}

/// A picture's features to tokens of the text's width.
enum Projection {
    Plain { proj: Linear, norm: LayerNorm, tokens: usize },
    Full { first: Linear, second: Linear, norm: LayerNorm },
    Resampler(Resampler),
}

/// The keys and values of one attention layer.
struct KeyValue {
    name: String,
    to_k: Linear,
    to_v: Linear,
}

/// An adapter for one UNet.
pub struct IpAdapter {
    projection: Projection,
    width: usize,
    layers: Vec<KeyValue>,
    dtype: DType,
}

impl IpAdapter {
    /// Builds the adapter for a UNet, or says that it belongs to another family of models.
    pub fn new(unet: &UnetConfig, weights: &Weights) -> Result<Self> {
        let layers = unet.cross_attention_layers()?;
        check_family(&layers, weights)?;
        let text_dim = layers.first().map_or(0, |layer| layer.text_dim);
        let (projection, width) = projection(text_dim, &weights.pp("image_proj"))?;
        let key_value = |(i, layer): (usize, &CrossAttentionLayer)| {
            let weights = weights.pp("ip_adapter").pp(2 * i + 1);
            Ok(KeyValue {
                name: layer.name.clone(),
                to_k: weights.pp("to_k_ip").linear(layer.text_dim, layer.channels, false)?,
                to_v: weights.pp("to_v_ip").linear(layer.text_dim, layer.channels, false)?,
            })
        };
        let layers = layers.iter().enumerate().map(key_value).collect::<Result<_>>()?;
        Ok(Self { projection, width, layers, dtype: weights.dtype() })
    }

    /// Which state of the image encoder it looks at.
    pub fn features(&self) -> ImageFeatures {
        if let Projection::Plain { .. } = self.projection { ImageFeatures::Pooled } else { ImageFeatures::Penultimate }
    }

    /// How wide the features it takes are.
    pub fn width(&self) -> usize {
        self.width
    }

    /// The tokens of pictures' features, `(pictures, width)` or `(pictures, patches, width)`: `(pictures, tokens,
    /// text_dim)`.
    pub fn tokens(&self, features: &Tensor) -> Result<Tensor> {
        let features = features.to_dtype(self.dtype)?;
        match &self.projection {
            Projection::Plain { proj, norm, tokens } => {
                let rows = proj.forward(&features)?;
                let (pictures, all) = rows.dims2()?;
                norm.forward(&rows.reshape((pictures, *tokens, all / tokens))?)
            }
            Projection::Full { first, second, norm } => {
                norm.forward(&second.forward(&Activation::Gelu.forward(&first.forward(&features)?)?)?)
            }
            Projection::Resampler(resampler) => resampler.forward(&features),
        }
    }

    /// Adds to `prompts` what each layer sees of `tokens`, `(batch, tokens, text_dim)`. `scale` is asked for each
    /// layer by name; layers with scale 0 see nothing.
    pub fn prompt(&self, tokens: &Tensor, scale: &dyn Fn(&str) -> f64, prompts: &mut ImagePrompts) -> Result<()> {
        for layer in &self.layers {
            let scale = scale(&layer.name);
            if scale != 0.0 {
                let (key, value) = (layer.to_k.forward(tokens)?, layer.to_v.forward(tokens)?);
                prompts.push(&layer.name, ImageBranch { key, value, scale });
            }
        }
        Ok(())
    }
}

/// Refuses adapters whose layers are not the UNet's.
fn check_family(layers: &[CrossAttentionLayer], weights: &Weights) -> Result<()> {
    let name = |i: usize| format!("ip_adapter.{}.to_k_ip.weight", 2 * i + 1);
    let refuse = |what: String| {
        Err(Error::Unsupported(format!(
            "the IP-Adapter `{}` does not fit this model: {what}; use the adapter made for the model's family (SD 1.5 \
             and SDXL have their own)",
            weights.origin()
        )))
    };
    if !weights.contains(&name(0)) {
        return refuse(format!("it has no tensor `{}`, so it is no IP-Adapter for a UNet", name(0)));
    }
    for (i, layer) in layers.iter().enumerate() {
        let expected = [layer.channels, layer.text_dim];
        match weights.shape_of(&name(i)) {
            Some(shape) if shape.dims() == expected => {}
            Some(shape) => {
                return refuse(format!("`{}` has shape {:?}, the model needs {expected:?}", name(i), shape.dims()));
            }
            None => return refuse(format!("it lacks `{}`; the model has {} such layers", name(i), layers.len())),
        }
    }
    if weights.contains(&name(layers.len())) {
        return refuse(format!("it has more layers than the model's {}", layers.len()));
    }
    Ok(())
}

/// The projection that the tensors are, and the width of the features it takes.
fn projection(text_dim: usize, weights: &Weights) -> Result<(Projection, usize)> {
    let size = |name: &str, dim: usize| weights.shape_of(name).and_then(|shape| shape.dims().get(dim).copied());
    if let (Some(width), Some(all)) = (size("proj.weight", 1), size("proj.weight", 0)) {
        let tokens = all / text_dim.max(1);
        let proj = weights.pp("proj").linear(width, tokens * text_dim, true)?;
        return Ok((Projection::Plain { proj, norm: weights.pp("norm").layer_norm(text_dim, EPS)?, tokens }, width));
    }
    let is_face_projection = weights.contains("proj.0.weight") && weights.contains("norm.weight");
    if is_face_projection || weights.contains("perceiver_resampler.proj_in.weight") {
        return Err(Error::Unsupported(format!(
            "`{}` is a FaceID adapter, which reads faces instead of pictures; use a plain, plus or full IP-Adapter",
            weights.origin()
        )));
    }
    if let Some(width) = size("proj.0.weight", 1) {
        let first = weights.pp("proj.0").linear(width, width, true)?;
        let second = weights.pp("proj.2").linear(width, text_dim, true)?;
        return Ok((Projection::Full { first, second, norm: weights.pp("proj.3").layer_norm(text_dim, EPS)? }, width));
    }
    if let Some(width) = size("proj_in.weight", 1) {
        return Ok((Projection::Resampler(Resampler::new(width, text_dim, weights)?), width));
    }
    Err(Error::Unsupported(format!(
        "`{}` has no image projection of a known kind; use a plain, plus or full IP-Adapter",
        weights.origin()
    )))
}

/// Learned queries that look at a picture's patches (the perceiver resampler of plus adapters).
struct Resampler {
    /// `(1, tokens, inner)`.
    latents: Tensor,
    proj_in: Linear,
    layers: Vec<ResamplerLayer>,
    proj_out: Linear,
    norm_out: LayerNorm,
}

impl Resampler {
    fn new(width: usize, text_dim: usize, weights: &Weights) -> Result<Self> {
        let shape = weights.shape_of("latents").map(|shape| shape.dims().to_vec()).unwrap_or_default();
        let inner = shape.last().copied().unwrap_or(0);
        let is_layer = |i: &usize| weights.contains(&format!("layers.{i}.0.norm1.weight"));
        let depth = (0..usize::MAX).take_while(is_layer).count();
        let layers = weights.pp("layers");
        Ok(Self {
            latents: weights.get(shape, "latents")?,
            proj_in: weights.pp("proj_in").linear(width, inner, true)?,
            layers: (0..depth).map(|i| ResamplerLayer::new(inner, &layers.pp(i))).collect::<Result<_>>()?,
            proj_out: weights.pp("proj_out").linear(inner, text_dim, true)?,
            norm_out: weights.pp("norm_out").layer_norm(text_dim, EPS)?,
        })
    }

    fn forward(&self, features: &Tensor) -> Result<Tensor> {
        let patches = self.proj_in.forward(features)?;
        let mut latents = self.latents.repeat((features.dim(0)?, 1, 1))?;
        for layer in &self.layers {
            latents = layer.forward(&patches, &latents)?;
        }
        self.norm_out.forward(&self.proj_out.forward(&latents)?)
    }
}

/// Attention of the queries to patches and queries, and a feed-forward, each added to its input.
struct ResamplerLayer {
    norm_patches: LayerNorm,
    norm_latents: LayerNorm,
    to_q: Linear,
    /// Keys, then values.
    to_kv: Linear,
    to_out: Linear,
    heads: usize,
    ff_norm: LayerNorm,
    ff_in: Linear,
    ff_out: Linear,
}

impl ResamplerLayer {
    fn new(inner: usize, weights: &Weights) -> Result<Self> {
        let (attention, feed_forward) = (weights.pp(0), weights.pp(1));
        let dims =
            |weights: &Weights, name: &str| weights.shape_of(name).and_then(|shape| shape.dims().first().copied());
        let features = dims(&attention, "to_q.weight").unwrap_or(inner);
        let wide = dims(&feed_forward, "1.weight").unwrap_or(4 * inner);
        Ok(Self {
            norm_patches: attention.pp("norm1").layer_norm(inner, EPS)?,
            norm_latents: attention.pp("norm2").layer_norm(inner, EPS)?,
            to_q: attention.pp("to_q").linear(inner, features, false)?,
            to_kv: attention.pp("to_kv").linear(inner, 2 * features, false)?,
            to_out: attention.pp("to_out").linear(features, inner, false)?,
            heads: (features / HEAD_SIZE).max(1),
            ff_norm: feed_forward.pp(0).layer_norm(inner, EPS)?,
            ff_in: feed_forward.pp(1).linear(inner, wide, false)?,
            ff_out: feed_forward.pp(3).linear(wide, inner, false)?,
        })
    }

    /// `patches` is `(pictures, patches, inner)`, `latents` and the result are `(pictures, tokens, inner)`.
    fn forward(&self, patches: &Tensor, latents: &Tensor) -> Result<Tensor> {
        let normed = self.norm_latents.forward(latents)?;
        let context = Tensor::cat(&[&self.norm_patches.forward(patches)?, &normed], 1)?;
        let both = self.to_kv.forward(&context)?.chunk(2, 2)?;
        let (key, value) = (both[0].contiguous()?, both[1].contiguous()?);
        let attended = attention(&self.to_q.forward(&normed)?, &key, &value, AttentionOptions::heads(self.heads))?;
        let latents = (latents + self.to_out.forward(&attended)?)?;
        let inner = Activation::Gelu.forward(&self.ff_in.forward(&self.ff_norm.forward(&latents)?)?)?;
        Ok((&latents + self.ff_out.forward(&inner)?)?)
    }
}
