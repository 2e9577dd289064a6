//! What happens during a run, as one enum. The progress bar, `--json` and the worker protocol are
//! renderings of it.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{fit::FitPlan, seed::Seed};

/// Something that happened. Serialised as `{"event": "denoise_step", …}`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A run begins.
    RunStarted {
        /// The workflow's `id`.
        workflow: String,
        /// How many steps it has.
        steps: usize,
        /// The seed in force for steps that name none.
        seed: Seed,
        /// Whether dw drew that seed itself, because nothing named one.
        random_seed: bool,
    },
    /// A step begins.
    StepStarted {
        /// The step's name.
        step: String,
        /// Its place, from 0.
        index: usize,
    },
    /// An iteration of a step begins.
    IterationStarted {
        /// The step's name.
        step: String,
        /// Which iteration, from 0.
        iteration: usize,
        /// How many there are.
        iterations: usize,
    },
    /// Part of a model file arrives from the hub.
    Download {
        /// The file's name.
        file: String,
        /// Bytes so far.
        bytes: u64,
        /// Bytes in all.
        total: u64,
    },
    /// What the pipeline of a step will need of the device's memory; comes before anything is read.
    FitPlan {
        /// The numbers.
        plan: FitPlan,
    },
    /// What the pipeline of a step needed.
    MemoryUsed {
        /// Where.
        device: String,
        /// Bytes in use at most while the step ran.
        peak: u64,
        /// Bytes that the plan said.
        planned: u64,
    },
    /// Weights are being read.
    Loading {
        /// The component (`unet`, `vae`, …).
        component: String,
        /// Bytes read so far, over all components of the pipeline.
        bytes: u64,
        /// Bytes in all.
        total: u64,
    },
    /// A component was found in the cache and not read again.
    Reused {
        /// The component.
        component: String,
    },
    /// A stage of a step (`load`, `encode prompt`, `denoise`, `decode`, `task`, `save`) has finished.
    StageFinished {
        /// The step's name.
        step: String,
        /// The stage.
        stage: String,
        /// How long it took, in seconds.
        seconds: f64,
    },
    /// One denoising step is done.
    DenoiseStep {
        /// How many are done, from 1.
        done: usize,
        /// How many there are.
        of: usize,
    },
    /// A file was written.
    FileWritten {
        /// Where.
        path: PathBuf,
    },
    /// Something the user should know that does not stop the run.
    Warning {
        /// What, and what to do about it.
        message: String,
    },
    /// A step is done.
    StepFinished {
        /// The step's name.
        step: String,
        /// How long it took, in seconds.
        seconds: f64,
        /// The seed its generator started from, for pipeline steps.
        seed: Option<Seed>,
    },
}

/// Where events go. Called from the thread that does the work, so it should be quick.
pub trait EventSink: Send + Sync {
    /// Takes one event.
    fn emit(&self, event: Event);
}

impl<F: Fn(Event) + Send + Sync> EventSink for F {
    fn emit(&self, event: Event) {
        self(event);
    }
}

/// A sink that drops everything.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl EventSink for Silent {
    fn emit(&self, _: Event) {}
}
