//! The weights of the tiny reference models, made from seeds so that none need storing.
//!
//! Every parameter is drawn from torch's CPU generator, seeded with the first four bytes (little endian) of
//! `sha256("TAG/NAME")`: weights from N(0, 1/fan_in), embeddings from N(0, 0.36), scales of norms from N(1, 0.0225), biases
//! from N(0, 0.01), other vectors from N(0, 0.09). Nothing is zero, so that a dropped term shows. The autoencoders are
//! then brought into the range that their configuration promises ([`Autoencoder`]).

use std::{
    collections::HashMap,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use candle_core::{DType, Device, Shape, Tensor};
use dw_pipelines::{
    Result,
    rng::{Generator, NoiseDialect},
    weights::Weights,
};
use sha2::{Digest, Sha256};

/// Tables that are looked things up in: everything else of two dimensions is multiplied with.
const TABLES: [&str; 4] =
    ["token_embedding.weight", "position_embedding.weight", "shared.weight", "relative_attention_bias.weight"];

/// The weights of the model called `tag` (`flux/dev`, `flux/t5`, `sd35/tr`, …), made as they are asked for.
pub(crate) fn weights(tag: &str) -> Weights {
    let tag = tag.to_owned();
    Weights::generated(move |name, shape| parameter(&tag, name, shape), DType::F32, &Device::Cpu)
}

/// How a tiny autoencoder differs from the plain recipe.
#[derive(Clone, Copy)]
pub(crate) struct Autoencoder {
    /// What the decoder's first convolution is multiplied with.
    pub(crate) decoder: f64,
    /// What the rows of the means in the encoder's last convolution are multiplied with.
    pub(crate) means: f64,
    /// What is added to the means.
    pub(crate) shift: f64,
}

impl Autoencoder {
    /// That of the tiny Flux models.
    pub(crate) const FLUX: Self = Self { decoder: 0.3611, means: 0.8 / 0.3611, shift: 0.1159 };
    /// That of the tiny Stable Diffusion 3.5 model.
    pub(crate) const SD35: Self = Self { decoder: 1.0, means: 1.0, shift: 0.0609 };

    /// The weights of the autoencoder called `tag`.
    pub(crate) fn weights(self, tag: &str) -> Weights {
        let tag = tag.to_owned();
        let make = move |name: &str, shape: &Shape| self.adjusted(name, parameter(&tag, name, shape)?);
        Weights::generated(make, DType::F32, &Device::Cpu)
    }

    fn adjusted(self, name: &str, tensor: Tensor) -> Result<Tensor> {
        let halves = |mean: &dyn Fn(Tensor) -> Result<Tensor>, variance: &dyn Fn(Tensor) -> Result<Tensor>| {
            let half = tensor.dim(0)? / 2;
            let (means, variances) = (tensor.narrow(0, 0, half)?, tensor.narrow(0, half, half)?);
            Ok(Tensor::cat(&[mean(means)?, variance(variances)?], 0)?)
        };
        match name {
            "decoder.conv_in.weight" => Ok((tensor * self.decoder)?),
            "decoder.conv_out.weight" => Ok((tensor * 0.35)?),
            "encoder.conv_out.weight" => halves(&|means| Ok((means * self.means)?), &|rest| Ok((rest * 0.3)?)),
            "encoder.conv_out.bias" => halves(&|means| Ok((means + self.shift)?), &|rest| Ok((rest - 1.5)?)),
            _ => Ok(tensor),
        }
    }
}

/// Standard normal numbers that belong to `name`.
pub(crate) fn drawn(name: &str, shape: impl Into<Shape>) -> Result<Tensor> {
    let digest = Sha256::digest(name);
    let seed = u32::from_le_bytes([digest[0], digest[1], digest[2], digest[3]]);
    Generator::new(seed.into(), NoiseDialect::Cpu).randn(shape, DType::F32, &Device::Cpu)
}

/// One parameter by the recipe.
pub(crate) fn parameter(tag: &str, name: &str, shape: &Shape) -> Result<Tensor> {
    let drawn = drawn(&format!("{tag}/{name}"), shape.clone())?;
    let is_table = TABLES.iter().any(|table| name.ends_with(table));
    Ok(match shape.dims() {
        _ if is_table => (drawn * 0.6)?,
        [_] if name.rsplit('.').next() == Some("bias") => (drawn * 0.1)?,
        [_] if name.contains("norm") => ((drawn * 0.15)? + 1.0)?,
        [_] => (drawn * 0.3)?,
        [_, inputs @ ..] => (drawn * (1.0 / (inputs.iter().product::<usize>() as f64).sqrt()))?,
        [] => drawn,
    })
}

/// Remembers the tensors that a model asks for, so that they can be written as its checkpoint.
#[derive(Clone, Default)]
pub(crate) struct Recorder(Arc<Mutex<HashMap<String, Tensor>>>);

impl Recorder {
    /// The same tensors as `weights` makes, each remembered when it is asked for.
    pub(crate) fn listening(&self, weights: Weights) -> Weights {
        let heard = self.0.clone();
        let make = move |name: &str, shape: &Shape| {
            let tensor = weights.get(shape.clone(), name)?;
            heard.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), tensor.clone());
            Ok(tensor)
        };
        Weights::generated(make, DType::F32, &Device::Cpu)
    }

    /// Writes what was asked for as a safetensors file.
    pub(crate) fn write(&self, file: &Path) {
        let heard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        candle_core::safetensors::save(&heard, file).expect("the folder is writable");
    }
}
