//! A UNet with its conditioning: what both Stable Diffusion families do in each denoising step, and the
//! rest of a call around it.

use candle_core::{DType, Tensor};
use dw_core::arguments::Arguments;

use super::{
    arguments::{group, tensor},
    call::check_decoder,
    components::Parts,
    control::Control,
    denoise::initial_latents,
    guidance::{Guided, guidance_embedding},
    text_to_image::{Canvas, Generation, StartingNoise},
};
use crate::{
    Error, Result,
    models::{AddedConditions, ImagePrompts, Unet2DConditionModel, UnetConfig, UnetInput},
    rng::Generators,
};

/// SDXL's conditions besides the prompt, one row for each row of the UNet's batch.
pub(crate) struct Added {
    /// The pooled text, `(rows, features)`.
    pub(crate) text_embeds: Tensor,
    /// Sizes and crop, `(rows, 6)`.
    pub(crate) time_ids: Tensor,
}

/// A UNet and everything it is told in each step.
pub(crate) struct ConditionedUnet<'a> {
    pub(crate) unet: &'a Unet2DConditionModel,
    /// `(batch, tokens, features)`, or `(2 * batch, …)` with the negative half first.
    pub(crate) encoder_hidden_states: Tensor,
    pub(crate) added: Option<Added>,
    /// The guidance embedding of distilled models, `(batch, width)`.
    pub(crate) timestep_cond: Option<Tensor>,
    /// What attention sees of pictures, one row for each row of the text.
    pub(crate) image_prompts: Option<ImagePrompts>,
    /// How many predictions a step makes, and what becomes of them.
    pub(crate) guidance: Guided,
    /// What models for inpainting, editing and upscaling read after the latents in each step (mask and masked
    /// picture, or the picture alone): `(batch, channels, height / 8, width / 8)`, any number of channels.
    pub(crate) surrounding: Option<Tensor>,
    /// The class of every row, where the model has classes.
    pub(crate) class_labels: Option<Tensor>,
    /// The ControlNets that steer it.
    pub(crate) control: Option<Control<'a>>,
}

impl ConditionedUnet<'_> {
    /// The prediction for `latents`, `(batch, channels, height / 8, width / 8)`, of the same shape. `index` is the
    /// place of `timestep` in the schedule.
    pub(crate) fn predict(&self, latents: &Tensor, timestep: f64, index: usize) -> Result<Tensor> {
        let sample = self.guidance.rows(latents)?;
        let added = self.added.as_ref();
        let input = UnetInput {
            added: added.map(|added| AddedConditions { text_embeds: &added.text_embeds, time_ids: &added.time_ids }),
            timestep_cond: self.timestep_cond.as_ref(),
            image_prompts: self.image_prompts.as_ref(),
            class_labels: self.class_labels.as_ref(),
            ..UnetInput::new(&sample, timestep, &self.encoder_hidden_states)
        };
        // ControlNets know nothing of inpainting: they see the latents alone.
        let residuals = match &self.control {
            Some(control) => control.residuals(input, index, self.guidance.is_guided())?,
            None => None,
        };
        let sample = match &self.surrounding {
            Some(surrounding) => Tensor::cat(&[&sample, &self.guidance.picture_rows(surrounding)?], 1)?,
            None => sample.clone(),
        };
        let prediction = self.unet.forward(&UnetInput {
            sample: &sample,
            down_residuals: residuals.as_ref().map(|residuals| residuals.down.as_slice()),
            mid_residual: residuals.as_ref().map(|residuals| &residuals.mid),
            ..input
        })?;
        self.guidance.combine(prediction)
    }
}

/// Whether both halves are predicted: guidance is asked for and the UNet does not take it as an input.
pub(crate) fn is_guided(config: &UnetConfig, guidance_scale: f64) -> bool {
    guidance_scale > 1.0 && config.time_cond_proj_dim.is_none()
}

/// The guidance embedding for a UNet that takes one.
pub(crate) fn timestep_cond(parts: &Parts, guidance_scale: f64, batch: usize) -> Result<Option<Tensor>> {
    let unet = parts.unet()?;
    let embedding = unet
        .config()
        .time_cond_proj_dim
        .map(|width| guidance_embedding(guidance_scale, batch, width, unet.dtype(), &parts.device));
    embedding.transpose()
}

/// How many pixels a latent stands for, per side.
pub(crate) fn scale_factor(parts: &Parts) -> usize {
    parts.vae().map_or(8, |vae| vae.config().scale_factor())
}

/// What the sides of a call's pictures must be multiples of.
pub(crate) fn side_multiple(parts: &Parts) -> usize {
    let patch = parts.denoiser().map_or(1, |denoiser| denoiser.patch);
    (scale_factor(parts) * patch).max(8)
}

/// Height and width in pixels of a call; the denoiser's training size when the call names none, and `fallback`
/// latents when the denoiser names none either.
pub(crate) fn picture_size(parts: &Parts, canvas: &Canvas, fallback: usize) -> Result<(usize, usize)> {
    let scale = scale_factor(parts);
    let (height, width) = parts.denoiser()?.sample_size.unwrap_or((fallback, fallback));
    canvas.size((height * scale, width * scale), side_multiple(parts))
}

/// Height and width in pixels of a call whose pictures have a size of their own, by which it goes when it names none.
pub(crate) fn size_like(parts: &Parts, canvas: &Canvas, own: (usize, usize)) -> Result<(usize, usize)> {
    canvas.size(own, side_multiple(parts))
}

/// The noise a text-to-image call starts from, `(pictures, channels, height / 8, width / 8)`; `size` is
/// height and width in pixels, `sigma` the scheduler's first noise level.
pub(crate) fn starting_noise(
    parts: &Parts,
    arguments: &Arguments,
    (pictures, size): (usize, (usize, usize)),
    generators: &mut Generators,
    sigma: f64,
) -> Result<Tensor> {
    let scale = scale_factor(parts);
    let shape = [pictures, parts.denoiser()?.channels, size.0 / scale, size.1 / scale];
    starting_noise_of(parts, arguments, &shape, generators, sigma)
}

/// As [`starting_noise`], for latents of a given shape.
pub(crate) fn starting_noise_of(
    parts: &Parts,
    arguments: &Arguments,
    shape: &[usize],
    generators: &mut Generators,
    sigma: f64,
) -> Result<Tensor> {
    let (dtype, device) = (parts.denoiser()?.dtype, &parts.device);
    initial_latents(given_noise(parts, arguments)?, shape, (dtype, device), generators, sigma)
}

/// The noise that a call gives (`latents`), in the denoiser's type.
pub(crate) fn given_noise(parts: &Parts, arguments: &Arguments) -> Result<Option<Tensor>> {
    let StartingNoise { latents } = group(arguments)?;
    let dtype = parts.denoiser()?.dtype;
    latents.map(|handle| tensor(arguments, "latents", handle, dtype, &parts.device)).transpose()
}

/// Refuses what would otherwise only be found out after the prompts are encoded, and UNets that read more than the
/// latents.
pub(crate) fn check_parts(parts: &Parts, call: &Generation) -> Result<()> {
    check_decoder(parts, call)?;
    let config = parts.unet()?.config();
    if config.in_channels != config.out_channels {
        return Err(Error::Unsupported(format!(
            "this model's UNet reads {} channels and predicts {}: it is made for inpainting or editing; use the pipeline class it belongs to",
            config.in_channels, config.out_channels
        )));
    }
    Ok(())
}

/// Refuses UNets that do not read latents with `extra` more channels after them: `what` the call adds.
pub(crate) fn check_extra_channels(parts: &Parts, extra: usize, what: &str) -> Result<()> {
    let (reads, latents) = (parts.unet()?.config().in_channels, parts.vae()?.config().latent_channels);
    if reads == latents + extra {
        return Ok(());
    }
    Err(Error::Unsupported(format!(
        "this model's UNet reads {reads} channels, but `{}` gives it {latents} of latents and {extra} of {what}; use a \
         model made for this pipeline class, or the class that the model belongs to",
        parts.class
    )))
}

/// Converts embeddings to the denoiser's type, negative half first when there is one.
pub(crate) fn batch(negative: Option<&Tensor>, positive: &Tensor, dtype: DType) -> Result<Tensor> {
    let rows = match negative {
        Some(negative) => Tensor::cat(&[negative, positive], 0)?,
        None => positive.clone(),
    };
    Ok(rows.to_dtype(dtype)?)
}
