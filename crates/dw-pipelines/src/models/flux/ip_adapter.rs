//! IP-Adapters of Flux (XLabs; diffusers `FluxIPAdapterAttnProcessor`): a picture's features to tokens, and those to keys
//! and values for each block in which picture and text have weights of their own.
//!
//! Takes what the image encoder says about pictures; encoding them is the pipelines' part, and so are the scales.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};

use super::FluxConfig;
use crate::{
    Error, Result,
    models::unet::ImageBranch,
    nn::{LayerNorm, Linear},
    weights::Weights,
};

/// The epsilon of the norm, which no configuration names.
const EPS: f64 = 1e-5;

/// XLabs' names of an adapter's parts, and those of diffusers.
const XLABS_PROJECTION: (&str, &str) = ("ip_adapter_proj_model.", "image_proj.");
const XLABS_BLOCKS: (&str, &str) = ("double_blocks.", "ip_adapter.");
const XLABS_LAYERS: [(&str, &str); 2] = [
    ("processor.ip_adapter_double_stream_k_proj", "to_k_ip"),
    ("processor.ip_adapter_double_stream_v_proj", "to_v_ip"),
];

/// What each block sees of the pictures that adapters were shown.
#[derive(Clone, Debug)]
pub struct FluxImagePrompts {
    blocks: Vec<Vec<ImageBranch>>,
}

impl FluxImagePrompts {
    /// Nothing to see for any block of the model.
    pub fn new(config: &FluxConfig) -> Self {
        Self { blocks: vec![Vec::new(); config.num_layers] }
    }

    /// What a block sees.
    pub(super) fn of(&self, block: usize) -> &[ImageBranch] {
        self.blocks.get(block).map_or(&[], Vec::as_slice)
    }
}

/// An adapter for one transformer.
pub struct FluxIpAdapter {
    proj: Linear,
    norm: LayerNorm,
    /// Tokens for each picture.
    tokens: usize,
    /// Features for each picture that it reads.
    width: usize,
    /// Keys and values for each block.
    blocks: Vec<[Linear; 2]>,
    dtype: DType,
}

impl FluxIpAdapter {
    /// Builds the adapter from weights under XLabs' names or those of diffusers, or says that it belongs to another model.
    pub fn new(config: &FluxConfig, weights: Weights) -> Result<Self> {
        let weights = weights.renamed(canonical);
        let shape = |name: &str| weights.shape_of(name).map(|shape| shape.dims().to_vec());
        let Shape { width, tokens } = Shape::of(config, weights.origin(), &shape)?;
        let (text, inner) = (config.joint_attention_dim, config.inner_dim());
        let projection = weights.pp("image_proj");
        let layers = weights.pp("ip_adapter");
        let block = |i: usize| {
            let at = layers.pp(i);
            Ok([at.pp("to_k_ip").linear(text, inner, true)?, at.pp("to_v_ip").linear(text, inner, true)?])
        };
        Ok(Self {
            proj: projection.pp("proj").linear(width, tokens * text, true)?,
            norm: projection.pp("norm").layer_norm(text, EPS)?,
            tokens,
            width,
            blocks: (0..config.num_layers).map(block).collect::<Result<_>>()?,
            dtype: weights.dtype(),
        })
    }

    /// Features for each picture that an adapter with tensors of these names and shapes reads, or why it does not fit the
    /// model. `origin` is what errors call it.
    pub fn check(config: &FluxConfig, origin: &str, tensors: &BTreeMap<String, Vec<usize>>) -> Result<usize> {
        let shape = |name: &str| {
            let named = |(other, _): &(&String, &Vec<usize>)| canonical(other).as_deref().unwrap_or(other) == name;
            tensors.iter().find(named).map(|(_, shape)| shape.clone())
        };
        Shape::of(config, origin, &shape).map(|shape| shape.width)
    }

    /// How wide the features it takes are.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Adds to `prompts` what each block sees of pictures' features, `(pictures, width)`: the same for each row of a batch
    /// of `rows`. `scales` has a number for each block; blocks with scale 0 see nothing.
    pub fn prompt(&self, features: &Tensor, scales: &[f64], rows: usize, prompts: &mut FluxImagePrompts) -> Result<()> {
        let projected = self.proj.forward(&features.to_dtype(self.dtype)?)?;
        let (pictures, all) = projected.dims2()?;
        let text = all / self.tokens;
        let tokens = self.norm.forward(&projected.reshape((pictures, self.tokens, text))?)?;
        let tokens = tokens.reshape((1, pictures * self.tokens, text))?;
        let for_each_row = |x: Tensor| Ok::<_, Error>(x.repeat((rows, 1, 1))?);
        for (([to_k, to_v], &scale), branches) in self.blocks.iter().zip(scales).zip(&mut prompts.blocks) {
            if scale != 0.0 {
                let (key, value) = (for_each_row(to_k.forward(&tokens)?)?, for_each_row(to_v.forward(&tokens)?)?);
                branches.push(ImageBranch { key, value, scale });
            }
        }
        Ok(())
    }
}

/// The name in diffusers of a tensor that XLabs calls `name`; none for all others.
fn canonical(name: &str) -> Option<String> {
    for (xlabs, own) in [XLABS_PROJECTION, XLABS_BLOCKS] {
        if let Some(rest) = name.strip_prefix(xlabs) {
            let rest = XLABS_LAYERS.iter().fold(rest.to_owned(), |rest, (xlabs, own)| rest.replace(xlabs, own));
            return Some(format!("{own}{rest}"));
        }
    }
    None
}

/// The sizes of an adapter that no configuration names.
struct Shape {
    /// Features for each picture that it reads.
    width: usize,
    /// Tokens that it makes of them.
    tokens: usize,
}

impl Shape {
    /// Reads the sizes off an adapter's tensors, whose shapes `shape` knows by their names in diffusers, or says why it
    /// belongs to another model.
    fn of(config: &FluxConfig, origin: &str, shape: &dyn Fn(&str) -> Option<Vec<usize>>) -> Result<Self> {
        let refuse = |what: String| {
            Error::Unsupported(format!(
                "the IP-Adapter `{origin}` does not fit this model: {what}; use one made for FLUX.1, in XLabs' layout \
                 (XLabs-AI/flux-ip-adapter)"
            ))
        };
        let (text, inner) = (config.joint_attention_dim, config.inner_dim());
        let key = |block: usize| format!("ip_adapter.{block}.to_k_ip.weight");
        if shape(&key(0)).is_none() {
            return Err(refuse(format!("it has no tensor `{}`, so it is no IP-Adapter for Flux", key(0))));
        }
        for block in 0..config.num_layers {
            match shape(&key(block)) {
                Some(found) if found == [inner, text] => {}
                Some(found) => {
                    let reason = format!("`{}` has shape {found:?}, the model needs [{inner}, {text}]", key(block));
                    return Err(refuse(reason));
                }
                None => {
                    let reason = format!("it lacks `{}`; the model has {} such blocks", key(block), config.num_layers);
                    return Err(refuse(reason));
                }
            }
        }
        if shape(&key(config.num_layers)).is_some() {
            return Err(refuse(format!("it has more blocks than the model's {}", config.num_layers)));
        }
        let name = "image_proj.proj.weight";
        match shape(name).as_deref() {
            Some(&[all, width]) if all > 0 && all % text == 0 => Ok(Self { width, tokens: all / text }),
            Some(found) => {
                Err(refuse(format!("`{name}` has shape {found:?}, which makes no tokens of {text} features")))
            }
            None => Err(refuse(format!("it has no tensor `{name}`, so its image projection is of another kind"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> FluxConfig {
        FluxConfig {
            num_layers: 2,
            num_attention_heads: 2,
            attention_head_dim: 4,
            joint_attention_dim: 6,
            ..FluxConfig::default()
        }
    }

    fn named(names: &[(&str, &[usize])]) -> BTreeMap<String, Vec<usize>> {
        names.iter().map(|(name, shape)| ((*name).to_owned(), shape.to_vec())).collect()
    }

    #[test]
    fn xlabs_names_become_those_of_diffusers() {
        let name = "double_blocks.7.processor.ip_adapter_double_stream_v_proj.bias";
        assert_eq!(canonical(name).as_deref(), Some("ip_adapter.7.to_v_ip.bias"));
        assert_eq!(canonical("ip_adapter_proj_model.norm.weight").as_deref(), Some("image_proj.norm.weight"));
        assert_eq!(canonical("ip_adapter.0.to_k_ip.weight"), None);
    }

    #[test]
    fn an_adapter_for_another_model_is_told_by_its_tensors() {
        let check = |tensors: &[(&str, &[usize])]| {
            FluxIpAdapter::check(&config(), "x.safetensors", &named(tensors)).map_err(|error| error.to_string())
        };
        let keys = |i: usize| if i == 0 { "ip_adapter.0.to_k_ip.weight" } else { "ip_adapter.1.to_k_ip.weight" };
        let proj = "image_proj.proj.weight";
        assert_eq!(check(&[(keys(0), &[8, 6]), (keys(1), &[8, 6]), (proj, &[24, 5])]), Ok(5));
        let xlabs = "double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight";
        assert_eq!(
            check(&[(xlabs, &[8, 6]), (keys(1), &[8, 6]), ("ip_adapter_proj_model.proj.weight", &[6, 3])]),
            Ok(3)
        );
        let third: (&str, &[usize]) = ("ip_adapter.2.to_k_ip.weight", &[8, 6]);
        for (tensors, expected) in [
            (&[(keys(1), [8, 6].as_slice())][..], "no IP-Adapter for Flux"),
            (&[(keys(0), &[8, 7])], "has shape [8, 7], the model needs [8, 6]"),
            (&[(keys(0), &[8, 6])], "lacks `ip_adapter.1.to_k_ip.weight`; the model has 2"),
            (&[(keys(0), &[8, 6]), (keys(1), &[8, 6]), third], "more blocks than the model's 2"),
            (&[(keys(0), &[8, 6]), (keys(1), &[8, 6]), (proj, &[25, 5])], "no tokens of 6 features"),
            (&[(keys(0), &[8, 6]), (keys(1), &[8, 6])], "image projection is of another kind"),
        ] {
            let said = check(tensors).expect_err("another model's");
            assert!(said.contains(expected) && said.contains("x.safetensors"), "{said}");
        }
    }
}
