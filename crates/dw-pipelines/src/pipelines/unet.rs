//! A UNet with its conditioning: what both Stable Diffusion families do in each denoising step, and the
//! rest of a call around it.

use std::{ops::Range, time::Instant};

use candle_core::{DType, Tensor};
use dw_core::{
    arguments::Arguments,
    artifact::{Artifact, Entry},
    event::Event,
};

use super::{
    arguments::{group, tensor},
    components::Parts,
    control::Control,
    decode::{Scaling, decode, latent_artifact},
    denoise::{Kept, Loop, Observer, initial_latents},
    guidance::{Guidance, guidance_embedding},
    text_to_image::{Canvas, Generation, OutputType, StartingNoise, refuse},
};
use crate::{
    Error, Result,
    models::{AddedConditions, ImagePrompts, Unet2DConditionModel, UnetConfig, UnetInput, config::OneOrMany},
    request::Context,
    rng::Generators,
    schedulers::{Scheduler, StepOptions},
};

/// Where a call draws noise from and reports to.
pub(crate) struct Surroundings<'a> {
    pub(crate) generators: &'a mut Generators,
    pub(crate) context: Context<'a>,
    pub(crate) observer: Observer<'a>,
}

/// Says how long a stage took. The step's name is filled in by whoever runs steps.
pub(crate) fn stage_finished(context: Context<'_>, stage: &str, started: Instant) {
    let seconds = started.elapsed().as_secs_f64();
    context.events.emit(Event::StageFinished { step: String::new(), stage: stage.into(), seconds });
}

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
    /// None when one prediction is enough.
    pub(crate) guidance: Option<Guidance>,
    /// What inpainting models read after the latents in each step: mask and masked picture,
    /// `(batch, channels + 1, height / 8, width / 8)`.
    pub(crate) surrounding: Option<Tensor>,
    /// The ControlNets that steer it.
    pub(crate) control: Option<Control<'a>>,
}

impl ConditionedUnet<'_> {
    /// The prediction for `latents`, `(batch, channels, height / 8, width / 8)`, of the same shape. `index` is the
    /// place of `timestep` in the schedule.
    pub(crate) fn predict(&self, latents: &Tensor, timestep: f64, index: usize) -> Result<Tensor> {
        let sample = self.doubled(latents)?;
        let added = self.added.as_ref();
        let input = UnetInput {
            added: added.map(|added| AddedConditions { text_embeds: &added.text_embeds, time_ids: &added.time_ids }),
            timestep_cond: self.timestep_cond.as_ref(),
            image_prompts: self.image_prompts.as_ref(),
            ..UnetInput::new(&sample, timestep, &self.encoder_hidden_states)
        };
        // ControlNets know nothing of inpainting: they see the latents alone.
        let residuals = match &self.control {
            Some(control) => control.residuals(input, index, self.guidance.is_some())?,
            None => None,
        };
        let sample = match &self.surrounding {
            Some(surrounding) => Tensor::cat(&[&sample, &self.doubled(surrounding)?], 1)?,
            None => sample.clone(),
        };
        let prediction = self.unet.forward(&UnetInput {
            sample: &sample,
            down_residuals: residuals.as_ref().map(|residuals| residuals.down.as_slice()),
            mid_residual: residuals.as_ref().map(|residuals| &residuals.mid),
            ..input
        })?;
        match self.guidance {
            Some(guidance) => guidance.combine(&prediction),
            None => Ok(prediction),
        }
    }

    /// The same rows for both halves when both are predicted.
    fn doubled(&self, rows: &Tensor) -> Result<Tensor> {
        Ok(if self.guidance.is_some() { Tensor::cat(&[rows, rows], 0)? } else { rows.clone() })
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
    scale_factor(parts).max(8)
}

/// Height and width in pixels of a call; the UNet's training size when the call names none, and `fallback`
/// latents when the UNet names none either.
pub(crate) fn picture_size(parts: &Parts, canvas: &Canvas, fallback: usize) -> Result<(usize, usize)> {
    let scale = scale_factor(parts);
    let (height, width) = match &parts.unet()?.config().sample_size {
        Some(OneOrMany::One(side)) => (*side, *side),
        Some(OneOrMany::Many(sides)) if sides.len() == 2 => (sides[0], sides[1]),
        _ => (fallback, fallback),
    };
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
    let (unet, scale) = (parts.unet()?, scale_factor(parts));
    let shape = [pictures, unet.config().in_channels, size.0 / scale, size.1 / scale];
    let (dtype, device) = (unet.dtype(), &parts.device);
    initial_latents(given_noise(parts, arguments)?, &shape, (dtype, device), generators, sigma)
}

/// The noise that a call gives (`latents`), in the denoiser's type.
pub(crate) fn given_noise(parts: &Parts, arguments: &Arguments) -> Result<Option<Tensor>> {
    let StartingNoise { latents } = group(arguments)?;
    let dtype = parts.unet()?.dtype();
    latents.map(|handle| tensor(arguments, "latents", handle, dtype, &parts.device)).transpose()
}

/// The part of a call after prompts are encoded and the first latents are there.
pub(crate) struct Denoising<'a> {
    pub(crate) parts: &'a Parts,
    pub(crate) call: &'a Generation,
    /// Which of the scheduler's timesteps are run.
    pub(crate) indices: Range<usize>,
    pub(crate) scaling: Scaling,
    /// Whether an autoencoder in float16 is widened for decoding.
    pub(crate) upcast: bool,
    /// What inpainting brings back after each step.
    pub(crate) kept: Option<Kept>,
}

impl Denoising<'_> {
    /// Latents to pictures, or to clean latents when the call asks for them.
    pub(crate) fn run(
        self,
        unet: &ConditionedUnet<'_>,
        latents: Tensor,
        scheduler: &mut dyn Scheduler,
        surroundings: Surroundings<'_>,
    ) -> Result<Entry> {
        let Surroundings { generators, context, observer } = surroundings;
        let started = Instant::now();
        let options = StepOptions { eta: Some(self.call.eta), ..StepOptions::default() };
        let denoising =
            Loop { scheduler, indices: self.indices, options, kept: self.kept, generators, context, observer };
        let latents = denoising.run(latents, &mut |latents, timestep, index| unet.predict(latents, timestep, index))?;
        stage_finished(context, "denoise", started);
        if self.call.output_type == OutputType::Latent {
            return Ok(Entry::from(latent_artifact(&latents)?));
        }
        let started = Instant::now();
        let artifacts: Vec<Artifact> = decode(self.parts.vae()?, &latents, self.scaling, self.upcast, context)?;
        stage_finished(context, "decode", started);
        Ok(Entry { artifacts, properties: Vec::new() })
    }
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

/// Refuses a call for pictures when nothing can decode them.
pub(crate) fn check_decoder(parts: &Parts, call: &Generation) -> Result<()> {
    if call.output_type == OutputType::Pil {
        parts.vae()?;
    }
    Ok(())
}

/// Lays the schedule out, after checking that the scheduler can take a custom one.
pub(crate) fn set_timesteps(scheduler: &mut dyn Scheduler, call: &Generation) -> Result<()> {
    for (name, given, accepted) in [
        ("timesteps", call.timesteps.is_some(), scheduler.accepts_timesteps()),
        ("sigmas", call.sigmas.is_some(), scheduler.accepts_sigmas()),
    ] {
        if given && !accepted {
            let class = scheduler.class();
            return Err(refuse(
                name,
                format!("`{class}` does not take them; use `num_inference_steps`, or another scheduler"),
            ));
        }
    }
    scheduler.set_timesteps(&call.timestep_request())
}

/// How many denoising steps a call asks for, by number or by list.
pub(crate) fn steps(call: &Generation) -> usize {
    let list = call.timesteps.as_ref().or(call.sigmas.as_ref());
    list.map_or(call.num_inference_steps, Vec::len)
}

/// Converts embeddings to the denoiser's type, negative half first when there is one.
pub(crate) fn batch(negative: Option<&Tensor>, positive: &Tensor, dtype: DType) -> Result<Tensor> {
    let rows = match negative {
        Some(negative) => Tensor::cat(&[negative, positive], 0)?,
        None => positive.clone(),
    };
    Ok(rows.to_dtype(dtype)?)
}
