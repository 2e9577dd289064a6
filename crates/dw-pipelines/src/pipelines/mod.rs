//! Pipelines: prompts in, pictures out. A [`Pipeline`] is a set of loaded components with the code that
//! runs them; one file for each family, the denoising loop written once.
//!
//! Knows no workflow and writes no file: arguments come as JSON with artifacts beside it, results go back
//! as artifacts.

mod adapt;
pub mod arguments;
mod cache;
mod call;
pub(crate) mod check;
mod clip_pixels;
pub mod components;
mod control;
mod decode;
mod denoise;
mod fit;
mod flow;
pub(crate) mod flux;
mod guidance;
mod image_prompt;
mod image_to_image;
mod inpaint;
mod ip_adapter;
mod latent_control;
mod learn;
pub(crate) mod loader;
pub mod memory;
mod prompt;
mod sd3_image_prompt;
mod sd3_prompt;
mod sd3_transformer;
pub(crate) mod stable_diffusion;
pub(crate) mod stable_diffusion_3;
pub(crate) mod stable_diffusion_3_img2img;
pub(crate) mod stable_diffusion_3_inpaint;
pub(crate) mod stable_diffusion_controlnet;
pub(crate) mod stable_diffusion_img2img;
pub(crate) mod stable_diffusion_inpaint;
pub(crate) mod stable_diffusion_instruct_pix2pix;
pub(crate) mod stable_diffusion_latent_upscale;
pub(crate) mod stable_diffusion_upscale;
pub(crate) mod stable_diffusion_xl;
pub(crate) mod stable_diffusion_xl_controlnet;
pub(crate) mod stable_diffusion_xl_img2img;
pub(crate) mod stable_diffusion_xl_inpaint;
pub(crate) mod stable_diffusion_xl_instruct_pix2pix;
mod step_cache;
mod t5_prompt;
pub mod text_to_image;
mod unet;
mod weighting;

use std::sync::Arc;

use candle_core::Device;
use dw_core::{arguments::Arguments, artifact::Entry, event::Event, fit::FitPlan};

pub use cache::{ComponentCache, Inventory, KeptComponent};
pub(crate) use call::Surroundings;
pub use components::SharedComponent;
pub use denoise::Observer;

use crate::{
    Error, Result,
    hub::{Hub, ModelFiles, Need},
    models::Reuse,
    registry::{self, Family, Implementation, Steering},
    request::{Context, PipelineRequest},
    rng::Generators,
};
use components::Parts;
use serde_json::Value;

/// A loaded pipeline. Dropping it frees what the cache does not keep.
pub struct Pipeline {
    implementation: &'static Implementation,
    parts: Parts,
    /// The parts with the scale of every LoRA multiplied, and by what: the last call asked for it.
    rescaled: Option<(f64, Parts)>,
}

/// One component of a pipeline, for reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ComponentSummary {
    /// Its name in the pipeline (`unet`).
    pub name: String,
    /// Its class (`UNet2DConditionModel`).
    pub class: String,
    /// Bytes of its weights in memory.
    pub bytes: u64,
    /// The key under which [`ComponentCache`] keeps it.
    pub key: String,
}

/// What kind of latents a pipeline works on: as good as the name of the autoencoder they belong to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LatentFormat {
    /// Channels.
    pub channels: usize,
    /// What latents are divided by before they are decoded.
    pub scaling_factor: f64,
}

impl Pipeline {
    /// Finds, reads and puts together what `request` asks for. Components that `cache` keeps are not read
    /// again.
    pub fn load(
        request: &PipelineRequest,
        hub: &Hub,
        cache: &mut ComponentCache,
        context: Context<'_>,
    ) -> Result<Self> {
        let (implementation, files, index) = Self::open(request, hub, context)?;
        let parts = loader::load(request, implementation, Arc::new(files), index, (hub, cache), context)?;
        Ok(Self { implementation, parts, rescaled: None })
    }

    /// What [`Self::load`] would say about memory. Fetches what the hub must give, and reads no weights.
    pub fn plan(request: &PipelineRequest, hub: &Hub, cache: &ComponentCache, context: Context<'_>) -> Result<FitPlan> {
        let (implementation, files, index) = Self::open(request, hub, context)?;
        loader::fit(request, implementation, Arc::new(files), &index, (hub, cache), context)
    }

    fn open(
        request: &PipelineRequest,
        hub: &Hub,
        context: Context<'_>,
    ) -> Result<(&'static Implementation, ModelFiles, Value)> {
        let class = registry::find(&request.class)?;
        let files = hub.open(&request.source, context)?;
        files.fetch("", Need::File("model_index.json"), context)?;
        let index = files.read_json("model_index.json")?.ok_or_else(|| Error::BadFile {
            path: files.place("model_index.json"),
            reason: "is missing, so this is no complete model in the diffusers layout; correct the path".into(),
        })?;
        let implementation = class.resolve(&index, Steering::of(request))?;
        Ok((implementation, files, index))
    }

    /// What was said about its memory before it was read.
    pub fn fit(&self) -> &FitPlan {
        &self.parts.fit
    }

    /// The class that runs, after `DiffusionPipeline` and its like are resolved.
    pub fn class(&self) -> &'static str {
        self.implementation.class
    }

    /// What it consists of.
    pub fn components(&self) -> Vec<ComponentSummary> {
        let summary = |(name, component): (&String, &SharedComponent)| ComponentSummary {
            name: name.clone(),
            class: component.class.clone(),
            bytes: component.bytes,
            key: component.key.clone(),
        };
        self.parts.components.iter().map(summary).collect()
    }

    /// How its latents become numbers of the decoder, when it has one.
    pub fn latent_format(&self) -> Option<LatentFormat> {
        let vae = self.parts.vae().ok()?.config();
        Some(LatentFormat { channels: vae.latent_channels, scaling_factor: vae.scaling_factor })
    }

    /// Where it runs.
    pub fn device(&self) -> &Device {
        &self.parts.device
    }

    /// The sampler's class.
    pub fn scheduler_class(&self) -> &str {
        &self.parts.scheduler.class
    }

    /// A component by name, to share it with a later pipeline (see [`ComponentCache::share`]).
    pub fn component(&self, name: &str) -> Option<SharedComponent> {
        self.parts.components.get(name).cloned()
    }

    /// From now on skips most of the transformer in steps in which it would say little new. False when the pipeline
    /// has no transformer that can.
    pub fn reuse_steps(&mut self, rule: Option<Reuse>) -> bool {
        let can = match self.implementation.family {
            Family::Flux => self.parts.flux().is_ok(),
            Family::StableDiffusion3 => true,
            _ => false,
        };
        if can || rule.is_none() {
            self.parts.reuse = rule;
            self.rescaled = None;
        }
        can
    }

    /// Threshold and polynomial of [`Reuse::Tea`] for this pipeline's transformer where a step names none.
    pub fn tea_defaults(&self) -> (f64, [f64; 5]) {
        match self.implementation.family {
            Family::Flux => (0.6, Reuse::FLUX),
            _ => (0.15, Reuse::UNFITTED),
        }
    }

    /// One call: the arguments of the class, noise from `generators`, pictures (or latents) as artifacts.
    pub fn run(&mut self, arguments: &Arguments, generators: &mut Generators, context: Context<'_>) -> Result<Entry> {
        self.run_observed(arguments, generators, context, &mut |_, _| Ok(()))
    }

    /// As [`Self::run`], with a look at the latents after each denoising step.
    pub fn run_observed(
        &mut self,
        arguments: &Arguments,
        generators: &mut Generators,
        context: Context<'_>,
        observer: Observer<'_>,
    ) -> Result<Entry> {
        context.cancel.check()?;
        self.rescale(lora_factor(arguments), context)?;
        let parts = self.rescaled.as_ref().map_or(&self.parts, |(_, parts)| parts);
        let run = || (self.implementation.run)(parts, arguments, Surroundings { generators, context, observer });
        let result = parts.memory.limits.during(run);
        parts.memory.occupancy.leave();
        parts.memory.take_notes().into_iter().for_each(|message| context.events.emit(Event::Warning { message }));
        result
    }

    /// Makes sure that [`Self::rescaled`] holds what a call with this factor runs with.
    fn rescale(&mut self, factor: f64, context: Context<'_>) -> Result<()> {
        if factor == 1.0 || !self.parts.adapters.has_loras() {
            self.rescaled = None;
            return Ok(());
        }
        if self.rescaled.as_ref().is_none_or(|(of, _)| *of != factor) {
            self.rescaled = None;
            let mut parts = self.parts.clone();
            // Kept by this pipeline alone: such a factor belongs to a call.
            let mut cache = ComponentCache::new(None);
            parts.adapters.put_on_scaled(&mut parts.components, factor, &mut cache, context)?;
            self.rescaled = Some((factor, parts));
        }
        Ok(())
    }
}

/// What a call multiplies the scale of every LoRA by: `cross_attention_kwargs.scale`, or as transformers call it
/// `joint_attention_kwargs.scale`.
fn lora_factor(arguments: &Arguments) -> f64 {
    let kwargs = ["cross_attention_kwargs", "joint_attention_kwargs"];
    let scale = kwargs.iter().find_map(|name| arguments.values.get(*name)?.get("scale"));
    scale.and_then(Value::as_f64).unwrap_or(1.0)
}
