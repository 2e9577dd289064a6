//! What every pipeline does around its model: lays the schedule out, runs the loop, hands latents or pictures on.

use std::{ops::Range, time::Instant};

use candle_core::Tensor;
use dw_core::{
    artifact::{Artifact, Entry},
    event::Event,
};

use super::{
    components::Parts,
    decode::{Scaling, decode, latent_artifact},
    denoise::{Kept, Loop, Observer, Predict},
    text_to_image::{Generation, OutputType, refuse},
};
use crate::{
    Result,
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
        predict: Predict<'_>,
        latents: Tensor,
        scheduler: &mut dyn Scheduler,
        surroundings: Surroundings<'_>,
    ) -> Result<Entry> {
        let Surroundings { generators, context, observer } = surroundings;
        // Prompts and start pictures are encoded: whoever came for that goes.
        self.parts.memory.occupancy.leave();
        let started = Instant::now();
        let options = StepOptions { eta: Some(self.call.eta), ..StepOptions::default() };
        let denoising =
            Loop { scheduler, indices: self.indices, options, kept: self.kept, generators, context, observer };
        let latents = denoising.run(latents, predict)?;
        self.parts.memory.occupancy.leave();
        stage_finished(context, "denoise", started);
        if self.call.output_type == OutputType::Latent {
            return Ok(Entry::from(latent_artifact(&latents)?));
        }
        let started = Instant::now();
        let artifacts: Vec<Artifact> = decode(self.parts, &latents, self.scaling, self.upcast, context)?;
        stage_finished(context, "decode", started);
        Ok(Entry { artifacts, properties: Vec::new() })
    }
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
    refuse_unaccepted(scheduler, call.timesteps.is_some(), call.sigmas.is_some())?;
    scheduler.set_timesteps(&call.timestep_request())
}

/// Refuses timesteps or noise levels, where they are given, for a scheduler that does not take them.
pub(crate) fn refuse_unaccepted(scheduler: &dyn Scheduler, timesteps: bool, sigmas: bool) -> Result<()> {
    for (name, given, accepted) in
        [("timesteps", timesteps, scheduler.accepts_timesteps()), ("sigmas", sigmas, scheduler.accepts_sigmas())]
    {
        if given && !accepted {
            let class = scheduler.class();
            return Err(refuse(
                name,
                format!("`{class}` does not take them; use `num_inference_steps`, or another scheduler"),
            ));
        }
    }
    Ok(())
}

/// How many denoising steps a call asks for, by number or by list.
pub(crate) fn steps(call: &Generation) -> usize {
    let list = call.timesteps.as_ref().or(call.sigmas.as_ref());
    list.map_or(call.num_inference_steps, Vec::len)
}
