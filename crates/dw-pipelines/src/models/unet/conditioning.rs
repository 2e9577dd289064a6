//! The time embedding and everything that is added to it: guidance, class, and SDXL's pooled text and sizes.

use candle_core::{DType, Device, Tensor};

use super::{AddedConditions, UnetInput, config::UnetConfig};
use crate::{
    Error, Result,
    models::config::unsupported,
    nn::{Activation, Embedding, Linear, TimestepEmbedding, Timesteps},
    weights::Weights,
};

/// What makes the class embedding (`class_embed_type`).
enum ClassEmbedding {
    Table(Embedding),
    Timestep(TimestepEmbedding),
    Identity,
    Projection(TimestepEmbedding),
    SimpleProjection(Linear),
}

/// SDXL's micro-conditioning (`addition_embed_type` `text_time`; Podell et al. 2023, arXiv:2307.01952, 2.2).
struct TextTime {
    sinusoid: Timesteps,
    embedding: TimestepEmbedding,
}

/// The waves that stand for a time (`time_embedding_type`).
enum Waves {
    Positional(Timesteps),
    /// Frequencies of the weights, `(size / 2,)`, and whether the cosines come first.
    Fourier {
        frequencies: Tensor,
        is_cosine_first: bool,
    },
}

impl Waves {
    fn new(config: &UnetConfig, weights: &Weights) -> Result<Self> {
        if !config.is_fourier() {
            return sinusoid(config, config.block_out_channels[0], weights.device()).map(Self::Positional);
        }
        let frequencies = weights.pp("time_proj").get(config.time_embed_dim() / 2, "weight")?;
        Ok(Self::Fourier { frequencies: frequencies.to_dtype(DType::F32)?, is_cosine_first: config.flip_sin_to_cos })
    }

    /// `(1, size)` in f32.
    fn of(&self, time: f64) -> Result<Tensor> {
        match self {
            Self::Positional(sinusoid) => sinusoid.of(time),
            Self::Fourier { frequencies, is_cosine_first } => {
                let phases = frequencies.affine(time, 0.0)?.affine(2.0, 0.0)?.affine(std::f64::consts::PI, 0.0)?;
                let (sine, cosine) = (phases.sin()?, phases.cos()?);
                let pair = if *is_cosine_first { [cosine, sine] } else { [sine, cosine] };
                Ok(Tensor::cat(&pair, 0)?.unsqueeze(0)?)
            }
        }
    }

    /// Many times at once, `(n,)` to `(n, size)` in f32.
    fn forward(&self, times: &Tensor) -> Result<Tensor> {
        match self {
            Self::Positional(sinusoid) => sinusoid.forward(times),
            Self::Fourier { .. } => {
                let times = times.to_dtype(DType::F32)?.to_vec1::<f32>()?;
                let rows = times.into_iter().map(|time| self.of(f64::from(time))).collect::<Result<Vec<_>>>()?;
                Ok(Tensor::cat(&rows, 0)?)
            }
        }
    }
}

/// The embedding that goes into every residual block.
pub(crate) struct TimeConditioning {
    waves: Waves,
    embedding: TimestepEmbedding,
    class: Option<ClassEmbedding>,
    is_class_appended: bool,
    added: Option<TextTime>,
    act: Option<Activation>,
}

impl TimeConditioning {
    pub(crate) fn new(config: &UnetConfig, weights: &Weights) -> Result<Self> {
        let act = config.act()?;
        let size = config.time_embed_dim();
        let inputs = if config.is_fourier() { size } else { config.block_out_channels[0] };
        let optional_act =
            |key: &str, name: &Option<String>| name.as_deref().map(|name| Activation::parse(key, name)).transpose();
        let post_act = optional_act("timestep_post_act", &config.timestep_post_act)?;
        let cond_dim = config.time_cond_proj_dim;
        let path = weights.pp("time_embedding");
        Ok(Self {
            waves: Waves::new(config, weights)?,
            embedding: TimestepEmbedding::with_condition(inputs, size, act, cond_dim, post_act, &path)?,
            class: class_embedding(config, &weights.pp("class_embedding"))?,
            is_class_appended: config.class_embeddings_concat,
            added: text_time(config, weights)?,
            act: optional_act("time_embedding_act_fn", &config.time_embedding_act_fn)?,
        })
    }

    /// `(batch, time_channels)` in `dtype`.
    pub(crate) fn forward(&self, input: &UnetInput, dtype: DType) -> Result<Tensor> {
        let batch = input.sample.dim(0)?;
        let waves = self.waves.of(input.timestep)?.to_dtype(dtype)?;
        let waves = waves.broadcast_as((batch, waves.dim(1)?))?.contiguous()?;
        let mut time = self.embedding.forward(&waves, input.timestep_cond)?;
        if let Some(class) = self.class_embedding(input.class_labels, dtype)? {
            time = if self.is_class_appended { Tensor::cat(&[&time, &class], 1)? } else { time.broadcast_add(&class)? };
        }
        if let Some(text_time) = &self.added {
            let added = input.added.ok_or_else(|| missing("added", "text_embeds and time_ids"))?;
            time = time.broadcast_add(&text_time.forward(&added, dtype)?)?;
        }
        match self.act {
            Some(act) => act.forward(&time),
            None => Ok(time),
        }
    }

    fn class_embedding(&self, labels: Option<&Tensor>, dtype: DType) -> Result<Option<Tensor>> {
        let Some(class) = &self.class else { return Ok(None) };
        let labels = labels.ok_or_else(|| missing("class_labels", "a class per picture"))?;
        let embedding = match class {
            ClassEmbedding::Table(table) => table.forward(&labels.to_dtype(DType::U32)?)?,
            ClassEmbedding::Timestep(embedding) => {
                embedding.forward(&self.waves.forward(labels)?.to_dtype(dtype)?, None)?
            }
            ClassEmbedding::Identity => labels.to_dtype(dtype)?,
            ClassEmbedding::Projection(embedding) => embedding.forward(&labels.to_dtype(dtype)?, None)?,
            ClassEmbedding::SimpleProjection(linear) => linear.forward(&labels.to_dtype(dtype)?)?,
        };
        Ok(Some(embedding))
    }
}

impl TextTime {
    fn forward(&self, added: &AddedConditions, dtype: DType) -> Result<Tensor> {
        let batch = added.text_embeds.dim(0)?;
        let sizes = self.sinusoid.forward(&added.time_ids.flatten_all()?)?.reshape((batch, ()))?;
        let text = added.text_embeds.to_dtype(DType::F32)?;
        let both = Tensor::cat(&[&text, &sizes], 1)?.to_dtype(dtype)?;
        self.embedding.forward(&both, None)
    }
}

fn sinusoid(config: &UnetConfig, size: usize, device: &Device) -> Result<Timesteps> {
    Timesteps::new(size, config.flip_sin_to_cos, config.freq_shift, device)
}

fn class_embedding(config: &UnetConfig, weights: &Weights) -> Result<Option<ClassEmbedding>> {
    let size = config.time_embed_dim();
    let inputs = || {
        config
            .projection_class_embeddings_input_dim
            .ok_or_else(|| unsupported("projection_class_embeddings_input_dim", "null"))
    };
    Ok(match (config.class_embed_type.as_deref(), config.num_class_embeds) {
        (None, None) => None,
        (None, Some(count)) => Some(ClassEmbedding::Table(weights.embedding(count, size)?)),
        (Some("timestep"), _) => {
            let inputs = config.block_out_channels[0];
            Some(ClassEmbedding::Timestep(TimestepEmbedding::new(inputs, size, config.act()?, weights)?))
        }
        (Some("identity"), _) => Some(ClassEmbedding::Identity),
        (Some("projection"), _) => {
            let embedding = TimestepEmbedding::new(inputs()?, size, Activation::Silu, weights)?;
            Some(ClassEmbedding::Projection(embedding))
        }
        (Some("simple_projection"), _) => {
            Some(ClassEmbedding::SimpleProjection(weights.linear(inputs()?, size, true)?))
        }
        (Some(other), _) => return Err(unsupported("class_embed_type", other)),
    })
}

fn text_time(config: &UnetConfig, weights: &Weights) -> Result<Option<TextTime>> {
    let needed = |key: &str, value: Option<usize>| value.ok_or_else(|| unsupported(key, "null"));
    match config.addition_embed_type.as_deref() {
        None => Ok(None),
        Some("text_time") => {
            let per_number = needed("addition_time_embed_dim", config.addition_time_embed_dim)?;
            let key = "projection_class_embeddings_input_dim";
            let inputs = needed(key, config.projection_class_embeddings_input_dim)?;
            let path = weights.pp("add_embedding");
            Ok(Some(TextTime {
                sinusoid: sinusoid(config, per_number, weights.device())?,
                embedding: TimestepEmbedding::new(inputs, config.time_embed_dim(), Activation::Silu, &path)?,
            }))
        }
        Some(other) => Err(unsupported("addition_embed_type", other)),
    }
}

fn missing(name: &str, what: &str) -> Error {
    Error::Argument { name: name.to_owned(), reason: format!("this model needs it ({what}), but it was not given") }
}
