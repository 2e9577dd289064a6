//! Stable Diffusion XL text to image (diffusers `StableDiffusionXLPipeline`; Podell et al. 2023): two CLIP
//! encoders, pooled text, and the sizes a training picture had as conditioning.

use std::{ops::Range, time::Instant};

use candle_core::Tensor;
use dw_core::{
    arguments::{Arguments, ArtifactRef},
    artifact::Entry,
};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::Value;

use super::{
    arguments::{Pair, Texts, group, group_schema, merged_schema, number, refuse_unknown},
    call::{Denoising, Surroundings, set_timesteps, stage_finished},
    components::Parts,
    control::ControlCall,
    decode::Scaling,
    fit::Fit,
    guidance::Guidance,
    image_prompt::ImagePromptInputs,
    prompt::{Embeddings, TextEncoder, Truncations, given_embeddings, hidden_state, same_shape},
    text_to_image::{Canvas, DenoisingEnd, Generation, StartingNoise, check_generators, one_for_each, refuse},
    unet::{
        Added, ConditionedUnet, batch, check_parts, is_guided, picture_size, size_like, starting_noise, timestep_cond,
    },
    weighting::Chunks,
};
use crate::{Error, Result, models::ClipTextOutput, request::Context, schedulers::Scheduler};

/// Guidance, the second encoder's prompts, pooled embeddings.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(default)]
pub(crate) struct XlPrompts {
    /// How strongly the prompt is followed. Above 1 each step also predicts without the prompt and takes twice
    /// as long.
    #[serde(deserialize_with = "number")]
    pub(crate) guidance_scale: f64,
    /// The prompt for the second text encoder; `prompt` when not given.
    pub(crate) prompt_2: Option<Texts>,
    /// The negative prompt for the second text encoder; `negative_prompt` when not given.
    pub(crate) negative_prompt_2: Option<Texts>,
    /// Pooled embeddings that go with `prompt_embeds`: an array `(prompts, features)`.
    pub(crate) pooled_prompt_embeds: Option<ArtifactRef>,
    /// Pooled embeddings that go with `negative_prompt_embeds`.
    pub(crate) negative_pooled_prompt_embeds: Option<ArtifactRef>,
}

impl Default for XlPrompts {
    fn default() -> Self {
        Self {
            guidance_scale: 5.0,
            prompt_2: None,
            negative_prompt_2: None,
            pooled_prompt_embeds: None,
            negative_pooled_prompt_embeds: None,
        }
    }
}

/// What the model is told about size and crop of the picture (Podell et al. 2023, section 2.2).
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(default)]
pub(crate) struct SizeConditioning {
    /// `[height, width]` the picture is said to have had before training; the picture's own when not given. Smaller
    /// looks upscaled.
    pub(crate) original_size: Option<Pair>,
    /// `[top, left]` the picture is said to be cropped at; `[0, 0]` is well centred.
    pub(crate) crops_coords_top_left: Pair,
    /// `[height, width]` the picture is said to have now; the picture's own when not given.
    pub(crate) target_size: Option<Pair>,
    /// `original_size` for the negative half; counts only together with `negative_target_size`.
    pub(crate) negative_original_size: Option<Pair>,
    /// `crops_coords_top_left` for the negative half.
    pub(crate) negative_crops_coords_top_left: Pair,
    /// `target_size` for the negative half; counts only together with `negative_original_size`.
    pub(crate) negative_target_size: Option<Pair>,
}

impl Default for SizeConditioning {
    fn default() -> Self {
        Self {
            original_size: None,
            crops_coords_top_left: Pair(0, 0),
            target_size: None,
            negative_original_size: None,
            negative_crops_coords_top_left: Pair(0, 0),
            negative_target_size: None,
        }
    }
}

/// The arguments of the class.
pub(crate) fn schema() -> Value {
    let groups = [
        group_schema::<Generation>(),
        group_schema::<Canvas>(),
        group_schema::<StartingNoise>(),
        group_schema::<XlPrompts>(),
        group_schema::<SizeConditioning>(),
        group_schema::<DenoisingEnd>(),
    ];
    merged_schema("StableDiffusionXLPipeline", &groups)
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
    let xl: XlPrompts = group(arguments)?;
    let sizes: SizeConditioning = group(arguments)?;
    let DenoisingEnd { denoising_end } = group(arguments)?;
    call.check(xl.guidance_scale)?;
    check_parts(parts, &call)?;
    let size = match &control {
        Some(control) => size_like(parts, &canvas, control.picture_size(parts)?)?,
        None => picture_size(parts, &canvas, 128)?,
    };
    let prompts = Prompts::new(parts, &call, &xl, arguments)?;
    let pictures = prompts.count * call.num_images_per_prompt;
    check_generators(surroundings.generators, pictures)?;
    control.as_ref().map_or(Ok(()), |control| control.check_prompts(prompts.count))?;
    let mut scheduler = parts.scheduler.create()?;
    set_timesteps(&mut *scheduler, &call)?;
    let indices = until(&*scheduler, 0, denoising_end)?;

    let time_ids = |guided| sizes.time_ids(size, guided, pictures);
    let schedule = (indices.start, scheduler.timesteps().len());
    let control = control.map(|control| control.prepare(parts, Fit::whole(size), prompts.counts(), schedule));
    let mut conditioned = condition(parts, &call, prompts, (xl.guidance_scale, &time_ids), surroundings.context)?;
    conditioned.control = control.transpose()?;
    let sigma = scheduler.init_noise_sigma();
    let latents = starting_noise(parts, arguments, (pictures, size), surroundings.generators, sigma)?;
    Denoising { parts, call: &call, indices, scaling: Scaling::Statistics, upcast: true, kept: None }.run(
        &mut |latents, timestep, index| conditioned.predict(latents, timestep, index),
        latents,
        &mut *scheduler,
        surroundings,
    )
}

/// The UNet with the encoded prompts. `time_ids` gives the rows of numbers for a call with or without
/// guidance.
pub(crate) fn condition<'a>(
    parts: &'a Parts,
    call: &Generation,
    prompts: Prompts<'_>,
    (guidance_scale, time_ids): (f64, &dyn Fn(bool) -> Vec<Vec<f32>>),
    context: Context<'_>,
) -> Result<ConditionedUnet<'a>> {
    let started = Instant::now();
    let unet = parts.unet()?;
    let (dtype, device) = (unet.dtype(), &parts.device);
    let guided = is_guided(unet.config(), guidance_scale);
    let (positive, negative) = prompts.encode(guided, context)?;
    let conditioned = ConditionedUnet {
        unet,
        encoder_hidden_states: batch(negative.as_ref().map(|negative| &negative.embeds), &positive.embeds, dtype)?,
        added: Some(Added {
            text_embeds: batch(negative.as_ref().map(|negative| &negative.pooled), &positive.pooled, dtype)?,
            time_ids: Tensor::new(time_ids(guided), device)?.to_dtype(dtype)?,
        }),
        timestep_cond: timestep_cond(parts, guidance_scale, positive.embeds.dim(0)?)?,
        image_prompts: prompts.images.prompts(guided, positive.embeds.dim(0)?)?,
        guidance: guided.then_some(Guidance { scale: guidance_scale, rescale: call.guidance_rescale }).into(),
        surrounding: None,
        class_labels: None,
        control: None,
    };
    stage_finished(context, "encode prompt", started);
    Ok(conditioned)
}

/// The timesteps that are run from `start` on when denoising stops at a fraction of the training schedule;
/// all of them when no fraction is given, or 1.
pub(crate) fn until(scheduler: &dyn Scheduler, start: usize, denoising_end: Option<f64>) -> Result<Range<usize>> {
    let timesteps = scheduler.timesteps();
    let Some(end) = denoising_end.filter(|&end| end != 1.0) else { return Ok(start..timesteps.len()) };
    let cutoff = cutoff("denoising_end", end, scheduler)?;
    let steps = timesteps[start..].iter().filter(|&&timestep| timestep >= cutoff).count();
    if steps == 0 {
        let reason = format!("`{end}` leaves no denoising step; use a larger value or more steps");
        return Err(refuse("denoising_end", reason));
    }
    Ok(start..start + steps)
}

/// The timestep at which a fraction of the training schedule is denoised.
pub(crate) fn cutoff(name: &str, fraction: f64, scheduler: &dyn Scheduler) -> Result<f64> {
    if fraction > 0.0 && fraction < 1.0 {
        let length = scheduler.num_train_timesteps() as f64;
        return Ok((length - fraction * length).round_ties_even());
    }
    Err(refuse(name, format!("must lie between 0 and 1, found `{fraction}`; leave it out to denoise fully")))
}

impl SizeConditioning {
    /// The six numbers for each row of the UNet's batch, height first.
    ///
    /// The reference repeats the pair (negative, positive) for each picture, so with differing negative sizes
    /// the rows of a batch alternate while the embeddings come in halves; that is kept.
    pub(crate) fn time_ids(&self, size: (usize, usize), guided: bool, pictures: usize) -> Vec<Vec<f32>> {
        let own = Pair(size.0, size.1);
        let row = |original: Pair, crop: Pair, target: Pair| [original, crop, target].map(Pair::values).concat();
        let positive =
            row(self.original_size.unwrap_or(own), self.crops_coords_top_left, self.target_size.unwrap_or(own));
        let negative = match (self.negative_original_size, self.negative_target_size) {
            (Some(original), Some(target)) => row(original, self.negative_crops_coords_top_left, target),
            _ => positive.clone(),
        };
        let pair = if guided { vec![negative, positive] } else { vec![positive] };
        std::iter::repeat_n(pair, pictures).flatten().collect()
    }
}

/// What is to be encoded, checked.
pub(crate) struct Prompts<'a> {
    parts: &'a Parts,
    call: &'a Generation,
    pub(crate) images: ImagePromptInputs<'a>,
    /// How many prompts there are.
    pub(crate) count: usize,
    /// For each encoder, in order.
    positive: Option<[Vec<String>; 2]>,
    negative: Option<[Vec<String>; 2]>,
    given: Option<Embeddings>,
    negative_given: Option<Embeddings>,
}

impl<'a> Prompts<'a> {
    pub(crate) fn new(parts: &'a Parts, call: &'a Generation, xl: &XlPrompts, arguments: &Arguments) -> Result<Self> {
        let given = |name: &str, embeds: Option<ArtifactRef>, pooled: Option<ArtifactRef>| {
            given_embeddings(parts, arguments, name, embeds, pooled)
        };
        let positive_given = given("prompt_embeds", call.prompt_embeds, xl.pooled_prompt_embeds)?;
        let negative_given =
            given("negative_prompt_embeds", call.negative_prompt_embeds, xl.negative_pooled_prompt_embeds)?;
        let count = match (&call.prompt, &positive_given) {
            (Some(prompt), _) => prompt.list().len(),
            (None, Some(given)) => given.embeds.dim(0)?,
            (None, None) => 0,
        };
        let both = |name: &str, first: Option<&Texts>, second: Option<&Texts>| {
            let Some(first) = one_for_each(name, first, count)? else { return Ok(None) };
            let second = second.filter(|texts| texts.stands());
            let second = one_for_each(&format!("{name}_2"), second, count)?.unwrap_or_else(|| first.clone());
            Ok::<_, Error>(Some([first, second]))
        };
        // Without a negative prompt the reference may use zeros, and then `negative_prompt_2` alone changes nothing.
        let zeros = call.negative_prompt.is_none() && parts.setting("force_zeros_for_empty_prompt", true);
        let nothing = Texts::One(String::new());
        let negative = if zeros { None } else { Some(call.negative_prompt.as_ref().unwrap_or(&nothing)) };
        Ok(Self {
            parts,
            call,
            images: ImagePromptInputs::read(
                parts,
                arguments,
                call.ip_adapter_image.as_ref(),
                call.ip_adapter_image_embeds.as_ref(),
            )?,
            count,
            positive: both("prompt", call.prompt.as_ref(), xl.prompt_2.as_ref())?,
            negative: both("negative_prompt", negative, xl.negative_prompt_2.as_ref())?,
            given: positive_given,
            negative_given,
        })
    }

    /// How many prompts there are, and how many pictures of each.
    pub(crate) fn counts(&self) -> (usize, usize) {
        (self.count, self.call.num_images_per_prompt)
    }

    /// Positive and (when guided) negative embeddings.
    pub(crate) fn encode(&self, guided: bool, context: Context<'_>) -> Result<(Embeddings, Option<Embeddings>)> {
        let mut truncations = Truncations::new(context);
        let skip = self.call.clip_skip.unwrap_or(0);
        let chunks = self.chunks(guided)?;
        let positive = match (&self.given, &self.positive) {
            (Some(given), _) => given.clone(),
            (None, Some(texts)) => embed(self.parts, texts, skip, (chunks, &mut truncations))?,
            (None, None) => return Err(refuse("prompt", "is missing")),
        };
        let negative = match (&self.negative_given, &self.negative) {
            _ if !guided => None,
            (Some(given), _) => Some(given.clone()),
            // The reference leaves the negative prompt's layer alone.
            (None, Some(texts)) => Some(embed(self.parts, texts, 0, (chunks, &mut truncations))?),
            (None, None) => {
                Some(Embeddings { embeds: positive.embeds.zeros_like()?, pooled: positive.pooled.zeros_like()? })
            }
        };
        if let Some(negative) = &negative {
            same_shape("negative_prompt_embeds", &positive.embeds, &negative.embeds)?;
            same_shape("negative_pooled_prompt_embeds", &positive.pooled, &negative.pooled)?;
        }
        let times = self.call.num_images_per_prompt;
        Ok((positive.repeated(times)?, negative.map(|negative| negative.repeated(times)).transpose()?))
    }

    /// How many chunks each prompt is encoded in, by both encoders, when prompts are weighted.
    fn chunks(&self, guided: bool) -> Result<Option<Chunks>> {
        if !self.parts.prompt_weighting {
            return Ok(None);
        }
        let positive = self.positive.as_ref().filter(|_| self.given.is_none());
        let negative = self.negative.as_ref().filter(|_| guided && self.negative_given.is_none());
        let mut chunks = Chunks::default();
        for (name, texts) in [("prompt", positive), ("negative_prompt", negative)] {
            let Some(texts) = texts else { continue };
            for (texts, encoder) in texts.iter().zip(encoders(self.parts)?) {
                chunks.make_room(name, texts, encoder.tokenizer)?;
            }
        }
        Ok(Some(chunks))
    }
}

/// The text encoders that are there, in order. The first of them gets the first prompt: a refiner, which has
/// the second one only, does not look at `prompt_2`.
fn encoders(parts: &Parts) -> Result<Vec<TextEncoder<'_>>> {
    let mut encoders = Vec::new();
    for (encoder, tokenizer) in [("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")] {
        encoders.extend(parts.text_encoder(encoder, tokenizer)?.map(TextEncoder::from));
    }
    Ok(encoders)
}

/// Both encoders' states side by side, and the pooled state of the encoder that projects one. `skip` more
/// layers than the usual one are left out.
fn embed(
    parts: &Parts,
    texts: &[Vec<String>; 2],
    skip: usize,
    (chunks, truncations): (Option<Chunks>, &mut Truncations<'_>),
) -> Result<Embeddings> {
    let mut states = Vec::new();
    let mut pooled = None;
    let state = |output: &ClipTextOutput| Ok(hidden_state(output, skip + 1)?.to_dtype(parts.dtype)?);
    for (texts, encoder) in texts.iter().zip(encoders(parts)?) {
        if let Some(chunks) = chunks {
            let encoded = encoder.encode_weighted(texts, chunks, &state)?;
            states.push(encoded.states);
            pooled = pooled.or(encoded.pooled);
        } else {
            let output = encoder.encode(texts, truncations)?;
            states.push(state(&output)?);
            pooled = pooled.or(output.text_embeds);
        }
    }
    let Some(pooled) = pooled else {
        return Err(refuse(
            "pooled_prompt_embeds",
            "is needed, with `prompt_embeds`, because the text encoder with a projection (`text_encoder_2`) is left out",
        ));
    };
    Ok(Embeddings { embeds: Tensor::cat(&states, 2)?, pooled: pooled.to_dtype(parts.dtype)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_alternates_negative_and_positive_sizes_as_the_reference_does() {
        let sizes = SizeConditioning {
            original_size: Some(Pair(128, 96)),
            negative_original_size: Some(Pair(32, 16)),
            negative_target_size: Some(Pair(64, 48)),
            ..SizeConditioning::default()
        };
        let rows = sizes.time_ids((64, 48), true, 2);
        let (negative, positive) = ([32.0, 16.0, 0.0, 0.0, 64.0, 48.0], [128.0, 96.0, 0.0, 0.0, 64.0, 48.0]);
        assert_eq!(rows, [negative, positive, negative, positive]);
    }
}
