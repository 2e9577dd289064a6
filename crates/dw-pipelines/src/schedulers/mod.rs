//! Samplers: which noise levels a run visits and how one model output moves the latents to the next
//! level.
//!
//! Owns the [`Scheduler`] trait, the table of classes (named as the reference names them) and one file
//! per sampler. Leaves to the pipelines: the loop, guidance, and where noise comes from (a sampler asks
//! the closure it is given). Positions in a run are plain indices into [`Scheduler::timesteps`], so
//! timesteps that occur twice need no search; a run that starts in the middle (image to image) starts
//! with a larger index.

mod alphas;
mod betas;
mod brownian;
mod cogvideox_ddim;
mod config;
mod ddim;
mod ddpm;
mod deis_multistep;
mod dpm_solver;
mod dpmsolver_multistep;
mod dpmsolver_sde;
mod dpmsolver_singlestep;
mod edm;
mod edm_dpmsolver_multistep;
mod edm_euler;
mod euler_ancestral_discrete;
mod euler_discrete;
mod exponential;
mod flow;
mod flow_match_euler_discrete;
mod flow_match_heun_discrete;
mod flow_match_lcm;
mod heun_discrete;
mod k_dpm_2_ancestral_discrete;
mod k_dpm_2_discrete;
mod lcm;
mod levels;
mod lms_discrete;
mod numeric;
mod options;
mod pndm;
mod registry;
mod spacing;
mod tcd;
mod tensors;
mod unipc_multistep;

#[cfg(test)]
mod tests;

use candle_core::{DType, Tensor};
use serde_json::{Map, Value};

use crate::Result;
pub(crate) use registry::check_kinship;
pub use registry::{SchedulerClass, classes, create};

/// The schedule a run asks for. Exactly what it leaves empty follows from the scheduler's configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct TimestepRequest {
    /// How many denoising steps; not looked at when `timesteps` or `sigmas` are given.
    pub steps: usize,
    /// The timesteps to visit, falling.
    pub timesteps: Option<Vec<f64>>,
    /// The noise levels to visit, falling. Flow-matching samplers shift them and append the final zero;
    /// the others expect the final level as last entry.
    pub sigmas: Option<Vec<f64>>,
    /// The logarithm of the dynamic shift, for flow-matching samplers.
    pub mu: Option<f64>,
    /// Part of the schedule that is run, 0 to 1: only the consistency samplers (LCM, TCD) look at it.
    pub strength: f64,
    /// Length of the distillation schedule that consistency samplers pick their steps from.
    pub original_inference_steps: Option<usize>,
}

impl TimestepRequest {
    /// So many steps, everything else as the configuration says.
    pub fn steps(steps: usize) -> Self {
        Self { steps, timesteps: None, sigmas: None, mu: None, strength: 1.0, original_inference_steps: None }
    }
}

/// What a pipeline call may say about every step.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepOptions {
    /// How much fresh noise DDIM (0 to 1) and TCD (their gamma) add; the others do not look at it.
    /// `None` is the class's own default: 0 for DDIM, 0.3 for TCD.
    pub eta: Option<f64>,
    /// DDIM: derive the noise from the clipped sample instead of taking the model's.
    pub use_clipped_model_output: bool,
}

/// Gives standard normal noise of a shape and type, from the run's generators, on the run's device.
pub type NoiseSource<'a> = dyn FnMut(&[usize], DType) -> Result<Tensor> + 'a;

/// What one step gives.
#[derive(Clone, Debug)]
pub struct StepOutput {
    /// The latents at the next noise level, in the model output's type.
    pub prev_sample: Tensor,
    /// The sampler's guess of the clean latents, from samplers that make one.
    pub pred_original_sample: Option<Tensor>,
}

impl StepOutput {
    /// Converts f32 results to the type of the model output.
    fn new(prev_sample: &Tensor, pred_original_sample: Option<&Tensor>, model_output: &Tensor) -> Result<Self> {
        Ok(Self {
            prev_sample: tensors::like(prev_sample, model_output)?,
            pred_original_sample: pred_original_sample.map(|sample| tensors::like(sample, model_output)).transpose()?,
        })
    }
}

/// Refuses positions outside the run; before `set_timesteps` every position is.
fn check_index(index: usize, timesteps: &[f64]) -> Result<()> {
    if index < timesteps.len() {
        return Ok(());
    }
    let reason =
        format!("position {index} of a run with {} timesteps - call `set_timesteps` for a longer run", timesteps.len());
    Err(crate::Error::Argument { name: "index".into(), reason })
}

/// The methods that are the same for every sampler with fields `config`, `timesteps` and, for the second
/// form, `sigmas`.
macro_rules! basics {
    () => {
        fn class(&self) -> &'static str {
            <Self as $crate::schedulers::registry::FromConfig>::CLASS
        }

        fn config_json(&self) -> serde_json::Map<String, serde_json::Value> {
            $crate::schedulers::config::to_map(self.class(), &self.config)
        }

        fn timesteps(&self) -> &[f64] {
            &self.timesteps
        }

        fn num_train_timesteps(&self) -> usize {
            self.config.num_train_timesteps
        }
    };
    (sigmas) => {
        $crate::schedulers::basics!();

        fn sigmas(&self) -> Option<&[f32]> {
            Some(&self.sigmas)
        }
    };
}
use basics;

/// A sampler: a noise schedule and the update from one of its levels to the next.
///
/// Call order: [`set_timesteps`](Self::set_timesteps), then for each position of
/// [`timesteps`](Self::timesteps), rising by one, [`scale_model_input`](Self::scale_model_input), the
/// model, [`step`](Self::step). Multistep samplers keep earlier model outputs; `set_timesteps` forgets
/// them.
pub trait Scheduler: Send {
    /// The class name (`EulerDiscreteScheduler`).
    fn class(&self) -> &'static str;

    /// The whole configuration with `_class_name`, every key present, as the reference saves it.
    fn config_json(&self) -> Map<String, Value>;

    /// Lays out the noise levels of a run and forgets the one before.
    fn set_timesteps(&mut self, request: &TimestepRequest) -> Result<()>;

    /// What the model is told at each call, in order. Second-order samplers list a timestep for each
    /// model call, so this can be longer than the steps asked for.
    fn timesteps(&self) -> &[f64];

    /// The noise levels with the final one appended; none for samplers that work on alphas alone.
    fn sigmas(&self) -> Option<&[f32]> {
        None
    }

    /// The factor that turns unit noise into the first latents.
    fn init_noise_sigma(&self) -> f64 {
        1.0
    }

    /// Brings latents to the magnitude the model was trained on. Keeps shape and type.
    fn scale_model_input(&mut self, sample: &Tensor, index: usize) -> Result<Tensor> {
        let _ = index;
        Ok(sample.clone())
    }

    /// Moves `sample` from the noise level at `index` to the next one, given the (guided) model output
    /// there. Both tensors have the same shape; the result has the model output's type.
    fn step(
        &mut self,
        model_output: &Tensor,
        index: usize,
        sample: &Tensor,
        noise: &mut NoiseSource<'_>,
        options: &StepOptions,
    ) -> Result<StepOutput>;

    /// Brings clean latents to the noise level at `index` (`index` may be the number of timesteps only
    /// for samplers that list sigmas). Keeps shape and type of `original`.
    fn add_noise(&self, original: &Tensor, noise: &Tensor, index: usize) -> Result<Tensor>;

    /// Model calls for each step: 2 for Heun and the KDPM2 samplers.
    fn order(&self) -> usize {
        1
    }

    /// Length of the training schedule; timesteps lie below it.
    fn num_train_timesteps(&self) -> usize;

    /// Sets the sigma shift of a flow-matching sampler, for the next `set_timesteps`.
    fn set_shift(&mut self, shift: f64) -> Result<()> {
        let _ = shift;
        Err(crate::Error::Argument {
            name: "shift".into(),
            reason: format!(
                "`{}` does not take a sigma shift - remove `shift` or use a flow-matching scheduler",
                self.class()
            ),
        })
    }

    /// Whether `set_timesteps` takes timesteps.
    fn accepts_timesteps(&self) -> bool {
        false
    }

    /// Whether `set_timesteps` takes sigmas.
    fn accepts_sigmas(&self) -> bool {
        false
    }

    /// Whether `eta` changes anything.
    fn uses_eta(&self) -> bool {
        false
    }
}
