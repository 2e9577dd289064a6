//! Stable Diffusion 1.x and 2.x text to image (diffusers `StableDiffusionPipeline`): one CLIP encoder, its
//! last state after the final norm.

use std::time::Instant;

use candle_core::Tensor;
use dw_core::{arguments::Arguments, artifact::Entry};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::Value;

use super::{
    arguments::{group, group_schema, merged_schema, number, refuse_unknown, tensor},
    call::{Denoising, Surroundings, set_timesteps, stage_finished},
    components::Parts,
    control::ControlCall,
    decode::Scaling,
    fit::Fit,
    guidance::Guidance,
    image_prompt::ImagePromptInputs,
    prompt::{TextEncoder, Truncations, hidden_state, repeat_rows, same_shape},
    text_to_image::{Canvas, Generation, StartingNoise, check_generators, one_for_each, refuse},
    unet::{ConditionedUnet, batch, check_parts, is_guided, picture_size, size_like, starting_noise, timestep_cond},
    weighting::Chunks,
};
use crate::{Result, models::ClipTextOutput, request::Context};

/// How strongly the prompt is followed.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(default)]
pub(crate) struct GuidanceArguments {
    /// How strongly the prompt is followed. Above 1 each step also predicts without the prompt and takes twice
    /// as long.
    #[serde(deserialize_with = "number")]
    pub(crate) guidance_scale: f64,
}

impl Default for GuidanceArguments {
    fn default() -> Self {
        Self { guidance_scale: 7.5 }
    }
}

/// The arguments of the class.
pub(crate) fn schema() -> Value {
    let groups = [
        group_schema::<Generation>(),
        group_schema::<GuidanceArguments>(),
        group_schema::<Canvas>(),
        group_schema::<StartingNoise>(),
    ];
    merged_schema("StableDiffusionPipeline", &groups)
}

/// One call.
pub(crate) fn run(parts: &Parts, arguments: &Arguments, surroundings: Surroundings<'_>) -> Result<Entry> {
    refuse_unknown(parts.class, arguments, &schema())?;
    generate(parts, arguments, None, surroundings)
}

/// One call of any text-to-image class of the family, with its defaults filled in.
pub(crate) fn generate(
    parts: &Parts,
    arguments: &Arguments,
    control: Option<ControlCall<'_>>,
    surroundings: Surroundings<'_>,
) -> Result<Entry> {
    let call: Generation = group(arguments)?;
    let canvas: Canvas = group(arguments)?;
    let GuidanceArguments { guidance_scale } = group(arguments)?;
    call.check(guidance_scale)?;
    check_parts(parts, &call)?;
    let size = match &control {
        Some(control) => size_like(parts, &canvas, control.picture_size(parts)?)?,
        None => picture_size(parts, &canvas, 64)?,
    };
    let prompts = Prompts::new(parts, &call, arguments)?;
    let pictures = prompts.count * call.num_images_per_prompt;
    check_generators(surroundings.generators, pictures)?;
    control.as_ref().map_or(Ok(()), |control| control.check_prompts(prompts.count))?;
    let mut scheduler = parts.scheduler.create()?;
    set_timesteps(&mut *scheduler, &call)?;

    let schedule = (0, scheduler.timesteps().len());
    let control = control.map(|control| control.prepare(parts, Fit::whole(size), prompts.counts(), schedule));
    let mut conditioned = condition(parts, &call, &prompts, guidance_scale, surroundings.context)?;
    conditioned.control = control.transpose()?;
    let sigma = scheduler.init_noise_sigma();
    let latents = starting_noise(parts, arguments, (pictures, size), surroundings.generators, sigma)?;
    let indices = schedule.0..schedule.1;
    Denoising { parts, call: &call, indices, scaling: Scaling::Factor, upcast: false, kept: None }.run(
        &mut |latents, timestep, index| conditioned.predict(latents, timestep, index),
        latents,
        &mut *scheduler,
        surroundings,
    )
}

/// The UNet with the encoded prompts.
pub(crate) fn condition<'a>(
    parts: &'a Parts,
    call: &Generation,
    prompts: &Prompts<'_>,
    guidance_scale: f64,
    context: Context<'_>,
) -> Result<ConditionedUnet<'a>> {
    let started = Instant::now();
    let unet = parts.unet()?;
    let guided = is_guided(unet.config(), guidance_scale);
    let (positive, negative) = prompts.encode(guided, context)?;
    let conditioned = ConditionedUnet {
        unet,
        encoder_hidden_states: batch(negative.as_ref(), &positive, unet.dtype())?,
        added: None,
        timestep_cond: timestep_cond(parts, guidance_scale, positive.dim(0)?)?,
        image_prompts: prompts.images.prompts(guided, positive.dim(0)?)?,
        guidance: guided.then_some(Guidance { scale: guidance_scale, rescale: call.guidance_rescale }).into(),
        surrounding: None,
        class_labels: None,
        control: None,
    };
    stage_finished(context, "encode prompt", started);
    Ok(conditioned)
}

/// What is to be encoded, checked.
pub(crate) struct Prompts<'a> {
    call: &'a Generation,
    is_weighted: bool,
    pub(crate) images: ImagePromptInputs<'a>,
    encoder: Option<TextEncoder<'a>>,
    /// How many prompts there are.
    pub(crate) count: usize,
    negative: Option<Vec<String>>,
    prompt_embeds: Option<Tensor>,
    negative_prompt_embeds: Option<Tensor>,
}

impl<'a> Prompts<'a> {
    pub(crate) fn new(parts: &'a Parts, call: &'a Generation, arguments: &Arguments) -> Result<Self> {
        let given = |name: &str, handle| tensor(arguments, name, handle, parts.dtype, &parts.device);
        let prompt_embeds = call.prompt_embeds.map(|handle| given("prompt_embeds", handle)).transpose()?;
        let count = match (&call.prompt, &prompt_embeds) {
            (Some(prompt), _) => prompt.list().len(),
            (None, Some(embeds)) => embeds.dim(0)?,
            (None, None) => 0,
        };
        let negative_prompt_embeds =
            call.negative_prompt_embeds.map(|handle| given("negative_prompt_embeds", handle)).transpose()?;
        if let (Some(embeds), Some(negative)) = (&prompt_embeds, &negative_prompt_embeds) {
            same_shape("negative_prompt_embeds", embeds, negative)?;
        }
        Ok(Self {
            call,
            is_weighted: parts.prompt_weighting,
            images: ImagePromptInputs::read(
                parts,
                arguments,
                call.ip_adapter_image.as_ref(),
                call.ip_adapter_image_embeds.as_ref(),
            )?,
            encoder: parts.text_encoder("text_encoder", "tokenizer")?.map(TextEncoder::from),
            count,
            negative: one_for_each("negative_prompt", call.negative_prompt.as_ref(), count)?,
            prompt_embeds,
            negative_prompt_embeds,
        })
    }

    /// How many prompts there are, and how many pictures of each.
    pub(crate) fn counts(&self) -> (usize, usize) {
        (self.count, self.call.num_images_per_prompt)
    }

    /// Positive and (when guided) negative embeddings, `(pictures, tokens, features)`.
    pub(crate) fn encode(&self, guided: bool, context: Context<'_>) -> Result<(Tensor, Option<Tensor>)> {
        let mut truncations = Truncations::new(context);
        let negative_texts = match (&self.negative_prompt_embeds, guided) {
            (None, true) => Some(self.negative.clone().unwrap_or_else(|| vec![String::new(); self.count])),
            _ => None,
        };
        let chunks = self.chunks(negative_texts.as_deref())?;
        let positive = match (&self.prompt_embeds, &self.call.prompt) {
            (None, Some(prompt)) => {
                self.embed("prompt_embeds", prompt.list(), self.call.clip_skip, (chunks, &mut truncations))?
            }
            (embeds, _) => embeds.clone().ok_or_else(|| refuse("prompt", "is missing"))?,
        };
        let negative = match negative_texts {
            _ if !guided => None,
            // The reference leaves the negative prompt's layer alone.
            Some(texts) => Some(self.embed("negative_prompt_embeds", &texts, None, (chunks, &mut truncations))?),
            None => self.negative_prompt_embeds.clone(),
        };
        if let Some(negative) = &negative {
            same_shape("negative_prompt_embeds", &positive, negative)?;
        }
        let times = self.call.num_images_per_prompt;
        let negative = negative.map(|rows| repeat_rows(&rows, times)).transpose()?;
        Ok((repeat_rows(&positive, times)?, negative))
    }

    /// How many chunks each prompt is encoded in when prompts are weighted.
    fn chunks(&self, negative: Option<&[String]>) -> Result<Option<Chunks>> {
        let Some(encoder) = self.encoder.filter(|_| self.is_weighted) else { return Ok(None) };
        let mut chunks = Chunks::default();
        if let (None, Some(prompt)) = (&self.prompt_embeds, &self.call.prompt) {
            chunks.make_room("prompt", prompt.list(), encoder.tokenizer)?;
        }
        chunks.make_room("negative_prompt", negative.unwrap_or_default(), encoder.tokenizer)?;
        Ok(Some(chunks))
    }

    fn embed(
        &self,
        instead: &str,
        texts: &[String],
        clip_skip: Option<usize>,
        (chunks, truncations): (Option<Chunks>, &mut Truncations<'_>),
    ) -> Result<Tensor> {
        let Some(encoder) = self.encoder else {
            return Err(refuse(instead, "is needed, because the text encoder is left out"));
        };
        let state = |output: &ClipTextOutput| match clip_skip {
            None => Ok(output.last_hidden_state.clone()),
            Some(skip) => encoder.model.final_layer_norm(hidden_state(output, skip)?),
        };
        match chunks {
            Some(chunks) => Ok(encoder.encode_weighted(texts, chunks, &state)?.states),
            None => state(&encoder.encode(texts, truncations)?),
        }
    }
}
