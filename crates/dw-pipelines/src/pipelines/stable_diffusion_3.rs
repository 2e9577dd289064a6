//! Stable Diffusion 3 and 3.5 text to image (diffusers `StableDiffusion3Pipeline`; Esser et al. 2024): two CLIP
//! encoders and a T5 encoder, a transformer, skip-layer guidance.

use std::time::Instant;

use candle_core::Tensor;
use dw_core::{
    arguments::{Arguments, ArtifactRef},
    artifact::Entry,
    event::Event,
};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::Value;

use super::{
    arguments::{Texts, group, group_schema, merged_schema, number, optional_whole, refuse_unknown},
    call::{Denoising, Surroundings, check_decoder, stage_finished, steps},
    components::Parts,
    control::ControlArguments,
    decode::Scaling,
    flow::{FlowGeneration, ShiftArguments, check_flow, is_dynamic, set_timesteps, shift_for},
    guidance::Guidance,
    latent_control::{LatentControlCall, LatentControlMasks, LatentControlPictures, Rows},
    sd3_image_prompt::{ImagePromptInput, PicturePrompts},
    sd3_prompt::Prompts,
    sd3_transformer::{ConditionedTransformer, SkippedLayers},
    step_cache,
    t5_prompt::SequenceLength,
    text_to_image::{Canvas, Generation, StartingNoise, check_generators, refuse},
    unet::{batch, picture_size, scale_factor, starting_noise},
};
use crate::{
    Error, Result,
    models::Memory,
    request::Context,
    schedulers::{Scheduler, TimestepRequest},
};

/// The side of a picture in latents where the transformer's configuration names none.
const USUAL_SIDE: usize = 128;

/// What the reference takes for `max_shift` where a scheduler's configuration names none.
const MAX_SHIFT: f64 = 1.16;

/// Guidance, the prompts of each text encoder, pooled embeddings.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(default)]
pub(crate) struct Sd3Prompts {
    /// How strongly the prompt is followed. Above 1 each step also predicts without the prompt and takes twice
    /// as long.
    #[serde(deserialize_with = "number")]
    pub(crate) guidance_scale: f64,
    /// What the picture should not show. Used when `guidance_scale` is above 1.
    pub(crate) negative_prompt: Option<Texts>,
    /// The prompt for the second text encoder; `prompt` when not given.
    pub(crate) prompt_2: Option<Texts>,
    /// The prompt for the third text encoder (T5); `prompt` when not given.
    pub(crate) prompt_3: Option<Texts>,
    /// The negative prompt for the second text encoder; `negative_prompt` when not given.
    pub(crate) negative_prompt_2: Option<Texts>,
    /// The negative prompt for the third text encoder (T5); `negative_prompt` when not given.
    pub(crate) negative_prompt_3: Option<Texts>,
    /// Encoded negative prompts instead of `negative_prompt`, of the shape of `prompt_embeds`.
    pub(crate) negative_prompt_embeds: Option<ArtifactRef>,
    /// Pooled embeddings that go with `prompt_embeds`: an array `(prompts, features)`.
    pub(crate) pooled_prompt_embeds: Option<ArtifactRef>,
    /// Pooled embeddings that go with `negative_prompt_embeds`.
    pub(crate) negative_pooled_prompt_embeds: Option<ArtifactRef>,
    /// How many of the CLIP text encoders' last layers are skipped, beyond the last one, which always is.
    #[serde(deserialize_with = "optional_whole")]
    #[schemars(range(min = 0))]
    pub(crate) clip_skip: Option<usize>,
}

impl Default for Sd3Prompts {
    fn default() -> Self {
        Self {
            guidance_scale: 7.0,
            negative_prompt: None,
            prompt_2: None,
            prompt_3: None,
            negative_prompt_2: None,
            negative_prompt_3: None,
            negative_prompt_embeds: None,
            pooled_prompt_embeds: None,
            negative_pooled_prompt_embeds: None,
            clip_skip: None,
        }
    }
}

impl Sd3Prompts {
    /// Refuses texts that nothing would read.
    fn check(&self, is_encoded: bool) -> Result<()> {
        let negative_encoded = self.negative_prompt_embeds.is_some();
        for (name, text, is_encoded, embeds) in [
            ("prompt_2", &self.prompt_2, is_encoded, "prompt_embeds"),
            ("prompt_3", &self.prompt_3, is_encoded, "prompt_embeds"),
            ("negative_prompt_2", &self.negative_prompt_2, negative_encoded, "negative_prompt_embeds"),
            ("negative_prompt_3", &self.negative_prompt_3, negative_encoded, "negative_prompt_embeds"),
        ] {
            if is_encoded && text.is_some() {
                return Err(refuse(name, format!("cannot be combined with `{embeds}`; give one of them")));
            }
        }
        Ok(())
    }
}

/// Skip-layer guidance: away from what the transformer predicts without some of its blocks.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(default)]
#[expect(clippy::struct_field_names, reason = "the fields are named as the arguments are")]
pub(crate) struct SkipLayerArguments {
    /// Blocks of the transformer, counted from 0, whose absence the result is guided away from; `[7, 8, 9]` for Stable
    /// Diffusion 3.5 medium. Needs `guidance_scale` above 1.
    pub(crate) skip_guidance_layers: Option<Vec<usize>>,
    /// How strongly.
    #[serde(deserialize_with = "number")]
    pub(crate) skip_layer_guidance_scale: f64,
    /// The fraction of the steps before which it ends.
    #[serde(deserialize_with = "number")]
    pub(crate) skip_layer_guidance_stop: f64,
    /// The fraction of the steps after which it begins.
    #[serde(deserialize_with = "number")]
    pub(crate) skip_layer_guidance_start: f64,
}

impl Default for SkipLayerArguments {
    fn default() -> Self {
        Self {
            skip_guidance_layers: None,
            skip_layer_guidance_scale: 2.8,
            skip_layer_guidance_stop: 0.2,
            skip_layer_guidance_start: 0.01,
        }
    }
}

/// The arguments that all classes of the family take.
pub(crate) fn groups() -> Vec<Value> {
    vec![
        group_schema::<FlowGeneration>(),
        group_schema::<Sd3Prompts>(),
        group_schema::<SequenceLength>(),
        group_schema::<Canvas>(),
        group_schema::<ShiftArguments>(),
        group_schema::<PicturePrompts>(),
    ]
}

/// The arguments of the class.
pub(crate) fn schema() -> Value {
    let mut groups = groups();
    groups.extend([group_schema::<StartingNoise>(), group_schema::<SkipLayerArguments>()]);
    merged_schema("StableDiffusion3Pipeline", &groups)
}

/// One call.
pub(crate) fn run(parts: &Parts, arguments: &Arguments, surroundings: Surroundings<'_>) -> Result<Entry> {
    refuse_unknown(parts.class, arguments, &schema())?;
    generate(parts, arguments, None, surroundings)
}

/// The arguments of `StableDiffusion3ControlNetPipeline`.
pub(crate) fn control_schema() -> Value {
    merged_schema("StableDiffusion3ControlNetPipeline", &control_groups())
}

fn control_groups() -> Vec<Value> {
    let mut groups = groups();
    groups.extend([
        group_schema::<StartingNoise>(),
        group_schema::<LatentControlPictures>(),
        group_schema::<ControlArguments>(),
    ]);
    groups
}

/// One call of `StableDiffusion3ControlNetPipeline`.
pub(crate) fn run_control(parts: &Parts, arguments: &Arguments, surroundings: Surroundings<'_>) -> Result<Entry> {
    refuse_unknown(parts.class, arguments, &control_schema())?;
    let control = LatentControlCall::read(parts, arguments)?;
    generate(parts, arguments, Some(control), surroundings)
}

/// The arguments of `StableDiffusion3ControlNetInpaintingPipeline`.
pub(crate) fn control_inpainting_schema() -> Value {
    let mut groups = control_groups();
    groups.push(group_schema::<LatentControlMasks>());
    merged_schema("StableDiffusion3ControlNetInpaintingPipeline", &groups)
}

/// One call of `StableDiffusion3ControlNetInpaintingPipeline`.
pub(crate) fn run_control_inpainting(
    parts: &Parts,
    arguments: &Arguments,
    surroundings: Surroundings<'_>,
) -> Result<Entry> {
    refuse_unknown(parts.class, arguments, &control_inpainting_schema())?;
    let control = LatentControlCall::read_inpainting(parts, arguments)?;
    generate(parts, arguments, Some(control), surroundings)
}

/// One call of any text-to-image class of the family.
fn generate(
    parts: &Parts,
    arguments: &Arguments,
    control: Option<LatentControlCall<'_>>,
    surroundings: Surroundings<'_>,
) -> Result<Entry> {
    let Call { generation: call, prompts: given, size } = Call::read(parts, arguments)?;
    check_decoder(parts, &call)?;
    refuse_other_inputs(parts)?;
    let skipped = skipped_layers(parts, arguments, &call)?;
    let prompts = Prompts::new(parts, &call, &given, arguments)?;
    let pictures = prompts.count * call.num_images_per_prompt;
    check_generators(surroundings.generators, pictures)?;
    control.as_ref().map_or(Ok(()), |control| control.check_prompts(prompts.count))?;
    let mut scheduler = schedule(parts, arguments, &call, size, surroundings.context)?;

    let indices = 0..scheduler.timesteps().len();
    let mut conditioned = condition(parts, prompts, given.guidance_scale, arguments, surroundings.context)?;
    conditioned.skipped = skipped;
    let rows = Rows { prompts: pictures / call.num_images_per_prompt, for_each: call.num_images_per_prompt };
    let is_guided = conditioned.guidance.is_some();
    conditioned.control =
        control.map(|control| control.prepare(parts, size, rows, (is_guided, indices.len()))).transpose()?;
    let sigma = scheduler.init_noise_sigma();
    let latents = starting_noise(parts, arguments, (pictures, size), surroundings.generators, sigma)?;
    let denoising = Denoising { parts, call: &call, indices, scaling: Scaling::Shifted, upcast: false, kept: None };
    denoised(denoising, conditioned, latents, &mut *scheduler, surroundings)
}

/// Latents to pictures by this transformer; says what steps were skipped, where that is asked for.
pub(crate) fn denoised(
    denoising: Denoising<'_>,
    mut conditioned: ConditionedTransformer<'_>,
    latents: Tensor,
    scheduler: &mut dyn Scheduler,
    surroundings: Surroundings<'_>,
) -> Result<Entry> {
    let (steps, context) = (denoising.indices.clone(), surroundings.context);
    let entry = denoising.run(
        &mut |latents, timestep, index| conditioned.predict(latents, timestep, (index, &steps)),
        latents,
        scheduler,
        surroundings,
    )?;
    step_cache::report(&conditioned.memory.iter().collect::<Vec<_>>(), context);
    Ok(entry)
}

/// What every call of the family reads first.
pub(crate) struct Call {
    pub(crate) generation: Generation,
    pub(crate) prompts: Sd3Prompts,
    /// Height and width in pixels.
    pub(crate) size: (usize, usize),
}

impl Call {
    /// Reads the arguments and checks them as far as that goes without the prompts.
    pub(crate) fn read(parts: &Parts, arguments: &Arguments) -> Result<Self> {
        let prompts: Sd3Prompts = group(arguments)?;
        let generation = Generation {
            negative_prompt: prompts.negative_prompt.clone(),
            negative_prompt_embeds: prompts.negative_prompt_embeds,
            clip_skip: prompts.clip_skip,
            ..group::<FlowGeneration>(arguments)?.generation()
        };
        generation.check(prompts.guidance_scale)?;
        prompts.check(generation.prompt_embeds.is_some())?;
        let size = picture_size(parts, &group(arguments)?, USUAL_SIDE)?;
        Ok(Self { generation, prompts, size })
    }
}

/// Refuses transformers that read more than the latents: they are made for inpainting.
pub(crate) fn refuse_other_inputs(parts: &Parts) -> Result<()> {
    let denoiser = parts.denoiser()?;
    if denoiser.in_channels == denoiser.channels {
        return Ok(());
    }
    Err(Error::Unsupported(format!(
        "this model's transformer reads {} channels and predicts {}: it is made for inpainting; use \
         `StableDiffusion3InpaintPipeline`",
        denoiser.in_channels, denoiser.channels
    )))
}

/// The layers that a call skips for guidance, checked; none where nothing is guided.
fn skipped_layers(parts: &Parts, arguments: &Arguments, call: &Generation) -> Result<Option<SkippedLayers>> {
    let given: SkipLayerArguments = group(arguments)?;
    let Some(layers) = given.skip_guidance_layers else { return Ok(None) };
    let blocks = parts.sd3_transformer()?.config().num_layers;
    if let Some(layer) = layers.iter().find(|layer| **layer >= blocks) {
        let reason = format!("has `{layer}`, but the transformer has the blocks 0 to {}", blocks.saturating_sub(1));
        return Err(refuse("skip_guidance_layers", reason));
    }
    let steps = steps(call) as f64;
    Ok(Some(SkippedLayers {
        layers,
        scale: given.skip_layer_guidance_scale,
        after: steps * given.skip_layer_guidance_start,
        before: steps * given.skip_layer_guidance_stop,
    }))
}

/// The scheduler with its schedule for a picture of `size`.
pub(crate) fn schedule(
    parts: &Parts,
    arguments: &Arguments,
    call: &Generation,
    size: (usize, usize),
    context: Context<'_>,
) -> Result<Box<dyn Scheduler>> {
    let ShiftArguments { mu } = group(arguments)?;
    let mut scheduler = parts.scheduler.create()?;
    check_flow(&*scheduler)?;
    let config = scheduler.config_json();
    if mu.is_some() && !is_dynamic(&config) {
        let message = format!(
            "`mu` has no effect: `{}` shifts its schedule alike for all sizes; set `use_dynamic_shifting` in \
             `scheduler.from_config_args`, or leave `mu` out",
            scheduler.class()
        );
        context.events.emit(Event::Warning { message });
    }
    let pixels = scale_factor(parts) * parts.denoiser()?.patch;
    let tokens = (size.0 / pixels) * (size.1 / pixels);
    let mu = mu.or_else(|| is_dynamic(&config).then(|| shift_for(&config, tokens, MAX_SHIFT)));
    set_timesteps(&mut *scheduler, &TimestepRequest { mu, ..call.timestep_request() })?;
    Ok(scheduler)
}

/// The transformer with the encoded prompts and pictures.
pub(crate) fn condition<'a>(
    parts: &'a Parts,
    prompts: Prompts<'_>,
    guidance_scale: f64,
    arguments: &Arguments,
    context: Context<'_>,
) -> Result<ConditionedTransformer<'a>> {
    let started = Instant::now();
    let transformer = parts.sd3_transformer()?;
    let is_guided = guidance_scale > 1.0;
    let image = ImagePromptInput::read(parts, arguments, is_guided)?;
    let (positive, negative) = prompts.encode(is_guided, context)?;
    let rows = |pick: fn(&super::prompt::Embeddings) -> &Tensor| {
        batch(negative.as_ref().map(pick), pick(&positive), transformer.dtype())
    };
    let conditioned = ConditionedTransformer {
        transformer,
        encoder_hidden_states: rows(|embeddings| &embeddings.embeds)?,
        pooled_projections: rows(|embeddings| &embeddings.pooled)?,
        guidance: is_guided.then_some(Guidance { scale: guidance_scale, rescale: 0.0 }),
        skipped: None,
        surrounding: None,
        control: None,
        image: image.map(|image| image.encode(positive.embeds.dim(0)?)).transpose()?.flatten(),
        memory: parts.reuse.map(Memory::new),
    };
    stage_finished(context, "encode prompt", started);
    Ok(conditioned)
}
