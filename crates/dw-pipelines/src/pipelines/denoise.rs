//! The denoising loop, written once for all pipelines: a model callback, a sampler, and between the steps
//! cancellation, progress and the check for broken numbers.

use std::ops::Range;

use candle_core::{DType, Device, Tensor};
use dw_core::event::Event;

use crate::{
    Error, Result,
    request::Context,
    rng::Generators,
    schedulers::{Scheduler, StepOptions},
};

/// Sees the latents `(batch, channels, height / 8, width / 8)` after each step, with the step's number
/// from 0: previews, comparisons.
pub type Observer<'a> = &'a mut dyn FnMut(usize, &Tensor) -> Result<()>;

/// The model in a step: latents as it wants them, the timestep and its place in the schedule, to the (guided)
/// prediction, of the latents' shape.
pub(crate) type Predict<'a> = &'a mut dyn FnMut(&Tensor, f64, usize) -> Result<Tensor>;

/// Everything the loop needs beside the model.
pub(crate) struct Loop<'a> {
    pub(crate) scheduler: &'a mut dyn Scheduler,
    /// Which of the scheduler's timesteps are run; image to image starts late, a refined base stops early.
    pub(crate) indices: Range<usize>,
    pub(crate) options: StepOptions,
    /// What is brought back after each step.
    pub(crate) kept: Option<Kept>,
    pub(crate) generators: &'a mut Generators,
    pub(crate) context: Context<'a>,
    pub(crate) observer: Observer<'a>,
}

impl Loop<'_> {
    /// Takes noisy latents to clean ones.
    pub(crate) fn run(self, latents: Tensor, predict: Predict<'_>) -> Result<Tensor> {
        let Self { scheduler, indices, options, kept, generators, context, observer } = self;
        let (start, end, total) = (indices.start, indices.end, indices.len());
        let device = latents.device().clone();
        let mut latents = latents;
        for index in indices {
            context.cancel.check()?;
            let timestep = scheduler.timesteps()[index];
            let input = scheduler.scale_model_input(&latents, index)?;
            let prediction = predict(&input, timestep, index)?;
            let mut noise = |shape: &[usize], dtype: DType| generators.randn(shape, dtype, &device);
            latents = scheduler.step(&prediction, index, &latents, &mut noise, &options)?.prev_sample;
            if let Some(kept) = &kept {
                latents = kept.restore(&latents, scheduler, Some(index + 1).filter(|&next| next < end))?;
            }
            let done = index - start + 1;
            // On the CPU the look is cheap; elsewhere it would make the host wait for the device.
            if device.is_cpu() || done == total {
                check_finite("latents", &latents, || format!(" after denoise step {done}"))?;
            }
            observer(done - 1, &latents)?;
            context.events.emit(Event::DenoiseStep { done, of: total });
        }
        context.cancel.check()?;
        Ok(latents)
    }
}

/// The part of a picture that inpainting does not touch (diffusers calls it `init_latents_proper`).
pub(crate) struct Kept {
    /// 1 where the picture is painted, 0 where it is kept: `(batch, 1, height / 8, width / 8)`.
    pub(crate) mask: Tensor,
    /// The picture's latents, `(batch, channels, height / 8, width / 8)`.
    pub(crate) clean: Tensor,
    /// The noise that the call began with; the same in every step.
    pub(crate) noise: Tensor,
}

impl Kept {
    /// `latents` with the kept part at the noise level of `next`, or clean after the last step.
    fn restore(&self, latents: &Tensor, scheduler: &dyn Scheduler, next: Option<usize>) -> Result<Tensor> {
        let kept = match next {
            Some(next) => scheduler.add_noise(&self.clean, &self.noise, next)?,
            None => self.clean.clone(),
        };
        let painted = latents.broadcast_mul(&self.mask)?;
        Ok((kept.broadcast_mul(&self.mask.affine(-1.0, 1.0)?)? + painted)?)
    }
}

/// Refuses NaN and infinity.
pub(crate) fn check_finite(what: &'static str, tensor: &Tensor, at: impl Fn() -> String) -> Result<()> {
    if is_finite(tensor)? {
        return Ok(());
    }
    let remedy = match tensor.dtype() {
        DType::F16 => "float16 is too narrow for this model; use `torch_dtype` bfloat16 or float32",
        _ => {
            "the weights or the scheduler's settings do not fit the model; try the model's own scheduler, or fetch \
              the weights again"
        }
    };
    Err(Error::NonFinite { what, at: at(), remedy: remedy.into() })
}

/// Whether there is neither NaN nor infinity.
pub(crate) fn is_finite(tensor: &Tensor) -> Result<bool> {
    // Any NaN or infinity makes the sum NaN or infinite.
    Ok(tensor.to_dtype(DType::F32)?.sum_all()?.to_scalar::<f32>()?.is_finite())
}

/// The first latents of a run from nothing: noise of the scheduler's magnitude, drawn or given.
pub(crate) fn initial_latents(
    given: Option<Tensor>,
    shape: &[usize],
    (dtype, device): (DType, &Device),
    generators: &mut Generators,
    init_noise_sigma: f64,
) -> Result<Tensor> {
    let noise = match given {
        Some(latents) if latents.dims() == shape => latents,
        Some(latents) => {
            return Err(Error::Argument {
                name: "latents".into(),
                reason: format!("has shape {:?}, but this call needs {shape:?}", latents.dims()),
            });
        }
        None => generators.randn(shape, dtype, device)?,
    };
    Ok((noise * init_noise_sigma)?)
}
