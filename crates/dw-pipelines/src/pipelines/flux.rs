//! The Flux pipelines (Black Forest Labs 2024; diffusers `FluxPipeline` and its relatives): a CLIP and a T5 encoder, a
//! transformer over packed latents, guidance as an input of the model or by a second prediction.
//!
//! This file is text to image and what all classes of the family share. Latents go through the loop as every other
//! family's, `(pictures, channels, height / 8, width / 8)`, and are packed for the transformer only.

pub(crate) mod control;
pub(crate) mod controlnet;
pub(crate) mod fill;
mod image_prompt;
pub(crate) mod img2img;
pub(crate) mod inpaint;
pub(crate) mod ip_adapter;
pub(crate) mod kontext;
mod prompts;
pub(crate) mod redux;
mod transformer;

use std::{ops::Range, time::Instant};

use candle_core::Tensor;
use dw_core::{
    arguments::{Arguments, ArtifactRef},
    artifact::Entry,
    event::Event,
};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::Value;

use self::{
    image_prompt::{ImagePromptArguments, ImagePromptInputs},
    prompts::Prompts,
    transformer::{Conditioned, Guiding, Text, grid, unpacked},
};
use super::{
    arguments::{
        Defaults, Texts, filled, group, group_schema, merged_schema, number, optional_positive, refuse_unknown, tensor,
        with_defaults,
    },
    call::{Denoising, Surroundings, check_decoder, stage_finished, steps},
    components::Parts,
    decode::Scaling,
    denoise::{Kept, initial_latents},
    flow::{FlowGeneration, check_flow, even_sigmas, set_timesteps, shift_for},
    image_to_image::Encoding,
    step_cache,
    t5_prompt::SequenceLength,
    text_to_image::{Generation, check_generators, refuse},
    unet::scale_factor,
};
use crate::{
    Error, Result,
    request::Context,
    rng::Generators,
    schedulers::{Scheduler, TimestepRequest},
};

/// The side of a picture in latents when the call names none.
const USUAL_SIDE: usize = 128;

/// What the reference takes for `max_shift` where a scheduler's configuration names none.
const MAX_SHIFT: f64 = 1.15;

/// How pictures become latents.
const ENCODING: Encoding = Encoding { scaling: Scaling::Shifted, upcast: false, for_each_picture: false };

/// Defaults of the plain class; the others add their own.
const DEFAULTS: Defaults = &[("max_sequence_length", 512.0)];

/// Guidance, the prompt of the second encoder, pooled embeddings.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(default)]
pub(crate) struct FluxPrompts {
    /// How strongly the prompt is followed, as an input of the model. Models without this input (schnell) do not look at
    /// it.
    #[serde(deserialize_with = "number")]
    pub(crate) guidance_scale: f64,
    /// The prompt for the second text encoder (T5); `prompt` when not given.
    pub(crate) prompt_2: Option<Texts>,
    /// Pooled embeddings that go with `prompt_embeds`: an array `(prompts, features)`.
    pub(crate) pooled_prompt_embeds: Option<ArtifactRef>,
}

impl Default for FluxPrompts {
    fn default() -> Self {
        Self { guidance_scale: 3.5, prompt_2: None, pooled_prompt_embeds: None }
    }
}

/// What the picture should not show.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(default)]
pub(crate) struct NegativePrompts {
    /// What the picture should not show. Used when `true_cfg_scale` is above 1.
    pub(crate) negative_prompt: Option<Texts>,
    /// The negative prompt for the second text encoder (T5); `negative_prompt` when not given.
    pub(crate) negative_prompt_2: Option<Texts>,
    /// How far the result is moved away from what the negative prompt says. Above 1, and with a negative prompt, each
    /// step predicts twice and takes twice as long.
    #[serde(deserialize_with = "number")]
    pub(crate) true_cfg_scale: f64,
    /// Encoded negative prompts instead of `negative_prompt`, of the shape of `prompt_embeds`.
    pub(crate) negative_prompt_embeds: Option<ArtifactRef>,
    /// Pooled embeddings that go with `negative_prompt_embeds`.
    pub(crate) negative_pooled_prompt_embeds: Option<ArtifactRef>,
}

impl Default for NegativePrompts {
    fn default() -> Self {
        Self {
            negative_prompt: None,
            negative_prompt_2: None,
            true_cfg_scale: 1.0,
            negative_prompt_embeds: None,
            negative_pooled_prompt_embeds: None,
        }
    }
}

/// How large the picture is.
#[derive(Clone, Copy, Debug, Default, Deserialize, JsonSchema)]
#[serde(default)]
pub(crate) struct Sides {
    /// Height in pixels, cut down to a multiple of 16; 1024 when not given.
    #[serde(deserialize_with = "optional_positive")]
    #[schemars(range(min = 1))]
    pub(crate) height: Option<usize>,
    /// Width in pixels, cut down to a multiple of 16; 1024 when not given.
    #[serde(deserialize_with = "optional_positive")]
    #[schemars(range(min = 1))]
    pub(crate) width: Option<usize>,
}

/// What the call starts from instead of drawn noise.
#[derive(Clone, Copy, Debug, Default, Deserialize, JsonSchema)]
#[serde(default)]
pub(crate) struct GivenNoise {
    /// Starting noise instead of drawn noise: an array `(pictures, channels, height / 8, width / 8)`, or packed as the
    /// transformer reads it, `(pictures, height * width / 256, 4 * channels)`.
    pub(crate) latents: Option<ArtifactRef>,
}

/// The arguments that all classes of the family take.
fn common_groups() -> Vec<Value> {
    vec![
        group_schema::<FlowGeneration>(),
        group_schema::<FluxPrompts>(),
        group_schema::<SequenceLength>(),
        group_schema::<Sides>(),
        group_schema::<GivenNoise>(),
    ]
}

/// The arguments that the classes with negative prompts take beside the common ones.
fn guided_groups() -> [Value; 2] {
    [group_schema::<NegativePrompts>(), group_schema::<ImagePromptArguments>()]
}

/// The arguments of a class with these groups beside the common ones, and these defaults.
fn class_schema(title: &str, more: impl IntoIterator<Item = Value>, defaults: &[Defaults]) -> Value {
    let groups: Vec<Value> = common_groups().into_iter().chain(more).collect();
    let schema = with_defaults(merged_schema(title, &groups), DEFAULTS);
    defaults.iter().fold(schema, |schema, defaults| with_defaults(schema, defaults))
}

/// The arguments with a class's defaults.
fn with_class_defaults(arguments: &Arguments, defaults: Defaults) -> Arguments {
    filled(&filled(arguments, defaults), DEFAULTS)
}

/// The arguments of the class.
pub(crate) fn schema() -> Value {
    class_schema("FluxPipeline", guided_groups(), &[])
}

/// One call.
pub(crate) fn run(parts: &Parts, arguments: &Arguments, surroundings: Surroundings<'_>) -> Result<Entry> {
    refuse_unknown(parts.class, arguments, &schema())?;
    let arguments = &with_class_defaults(arguments, &[]);
    check_inputs(parts)?;
    let size = size(parts, arguments, surroundings.context)?;
    let call = Call::new(parts, arguments, size, surroundings.generators)?;
    let mut scheduler = call.scheduler_with_own_flow(surroundings.context)?;
    let conditioned = call.conditioned(surroundings.context)?;
    let latents = call.noise(&*scheduler, surroundings.generators)?;
    let indices = 0..scheduler.timesteps().len();
    call.denoised(conditioned, latents, &mut *scheduler, (indices, None), surroundings)
}

/// What a transformer of the family reads for each token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Inputs {
    /// The latents.
    Latents,
    /// The latents and those of a control picture.
    Control,
    /// The latents, those of the masked picture, and the mask.
    Fill,
}

impl Inputs {
    /// What a class gives its transformer.
    fn of_class(class: &str) -> Self {
        match class {
            "FluxControlPipeline" => Self::Control,
            "FluxFillPipeline" => Self::Fill,
            _ => Self::Latents,
        }
    }

    /// What a transformer reads that takes `read` channels for `latents` of latents, each of which stands for
    /// `scale` x `scale` pixels; none when it is nothing known.
    fn of_channels((read, latents): (usize, usize), scale: usize) -> Option<Self> {
        match read {
            _ if read == latents => Some(Self::Latents),
            _ if read == 2 * latents => Some(Self::Control),
            _ if read == 2 * latents + scale * scale => Some(Self::Fill),
            _ => None,
        }
    }

    fn classes(self) -> &'static str {
        match self {
            Self::Latents => "`FluxPipeline`",
            Self::Control => "`FluxControlPipeline`",
            Self::Fill => "`FluxFillPipeline`",
        }
    }
}

/// Refuses a transformer that reads something else than the class gives it; the sizes are those of
/// [`Inputs::of_channels`].
pub(super) fn check_class(class: &str, (read, latents): (usize, usize), scale: usize) -> Result<()> {
    let found = Inputs::of_channels((read, latents), scale);
    if found == Some(Inputs::of_class(class)) {
        return Ok(());
    }
    let use_instead = found.map_or("another model", Inputs::classes);
    Err(Error::Unsupported(format!(
        "this model's transformer reads {read} channels for {latents} of latents, which is not what `{class}` gives it; \
         use {use_instead}"
    )))
}

/// The same with the components at hand; a control LoRA changes what the transformer reads.
fn check_inputs(parts: &Parts) -> Result<()> {
    let denoiser = parts.denoiser()?;
    check_class(parts.class, (denoiser.in_channels, denoiser.channels), scale_factor(parts))
}

/// Height and width of a token in pixels.
fn token_side(parts: &Parts) -> Result<usize> {
    Ok(scale_factor(parts) * parts.denoiser()?.patch)
}

/// Height and width in pixels that a call names, or the usual ones, cut down to whole tokens.
fn size(parts: &Parts, arguments: &Arguments, context: Context<'_>) -> Result<(usize, usize)> {
    let Sides { height, width } = group(arguments)?;
    let (usual, side) = (USUAL_SIDE * scale_factor(parts), token_side(parts)?);
    let whole = |name: &str, asked: Option<usize>| match asked.unwrap_or(usual) / side * side {
        0 => Err(refuse(name, format!("must be at least {side}, found `{}`", asked.unwrap_or(usual)))),
        whole => Ok(whole),
    };
    let size = (whole("height", height)?, whole("width", width)?);
    tell_change((height, width), size, &format!("sides of this model are multiples of {side}"), context);
    Ok(size)
}

/// Says that pictures do not get the height and width that were asked for, and `why`.
fn tell_change(asked: (Option<usize>, Option<usize>), size: (usize, usize), why: &str, context: Context<'_>) {
    let (height, width) = (asked.0.unwrap_or(size.0), asked.1.unwrap_or(size.1));
    if (height, width) != size {
        let (rows, columns) = size;
        let message = format!("pictures get `{columns} x {rows}` pixels instead of `{width} x {height}`: {why}");
        context.events.emit(Event::Warning { message });
    }
}

/// A call as every class of the family begins it.
struct Call<'a> {
    parts: &'a Parts,
    arguments: &'a Arguments,
    generation: Generation,
    guiding: Guiding,
    prompts: Prompts<'a>,
    /// None without IP-Adapters.
    images: Option<ImagePromptInputs<'a>>,
    /// Height and width in pixels.
    size: (usize, usize),
    /// Height and width of a token in pixels.
    token_side: usize,
}

impl<'a> Call<'a> {
    /// Reads what all classes take and checks it as far as that goes before anything is computed.
    fn new(parts: &'a Parts, arguments: &'a Arguments, size: (usize, usize), generators: &Generators) -> Result<Self> {
        let given: FluxPrompts = group(arguments)?;
        let negative: NegativePrompts = group(arguments)?;
        let generation = Generation {
            negative_prompt: negative.negative_prompt.clone(),
            negative_prompt_embeds: negative.negative_prompt_embeds,
            ..group::<FlowGeneration>(arguments)?.generation()
        };
        generation.check(given.guidance_scale)?;
        let guiding = Guiding { guidance: given.guidance_scale, true_cfg_scale: negative.true_cfg_scale };
        if !guiding.true_cfg_scale.is_finite() {
            return Err(refuse(
                "true_cfg_scale",
                format!("must be a finite number, found `{}`", guiding.true_cfg_scale),
            ));
        }
        check_decoder(parts, &generation)?;
        let prompts = Prompts::new(parts, &generation, (&given, &negative), arguments)?;
        let images = ImagePromptInputs::read(parts, arguments, &group(arguments)?)?;
        let token_side = token_side(parts)?;
        let call = Self { parts, arguments, generation, guiding, prompts, images, size, token_side };
        check_generators(generators, call.pictures())?;
        Ok(call)
    }

    /// How many pictures the call makes.
    fn pictures(&self) -> usize {
        self.prompts.count * self.generation.num_images_per_prompt
    }

    /// Rows and columns of tokens.
    fn tokens(&self) -> (usize, usize) {
        (self.size.0 / self.token_side, self.size.1 / self.token_side)
    }

    /// The scheduler with its schedule, shifted for the size of the picture: the noise levels that the call names, or
    /// even ones.
    fn scheduler(&self) -> Result<Box<dyn Scheduler>> {
        let scheduler = self.parts.scheduler.create()?;
        let mut request = self.generation.timestep_request();
        if request.sigmas.is_none() && scheduler.accepts_sigmas() {
            request.sigmas = Some(even_sigmas(request.steps));
        }
        self.scheduled(scheduler, request)
    }

    /// The same with the noise levels of a scheduler that lays out flows itself (`use_flow_sigmas`). In the reference
    /// text to image leaves them to it and no other class does.
    fn scheduler_with_own_flow(&self, context: Context<'_>) -> Result<Box<dyn Scheduler>> {
        let scheduler = self.parts.scheduler.create()?;
        if scheduler.config_json().get("use_flow_sigmas").and_then(Value::as_bool) != Some(true) {
            return self.scheduler();
        }
        let mut request = self.generation.timestep_request();
        if request.sigmas.take().is_some() {
            let message =
                "`sigmas` is not looked at, because the scheduler makes its own (`use_flow_sigmas`)".to_owned();
            context.events.emit(Event::Warning { message });
        }
        self.scheduled(scheduler, request)
    }

    fn scheduled(&self, mut scheduler: Box<dyn Scheduler>, request: TimestepRequest) -> Result<Box<dyn Scheduler>> {
        check_flow(&*scheduler)?;
        let (rows, columns) = self.tokens();
        let mu = Some(shift_for(&scheduler.config_json(), rows * columns, MAX_SHIFT));
        set_timesteps(&mut *scheduler, &TimestepRequest { mu, ..request })?;
        Ok(scheduler)
    }

    /// How many steps were asked for, of which image to image runs a part.
    fn steps(&self) -> usize {
        steps(&self.generation)
    }

    /// The transformer with the encoded prompts, for a picture alone.
    fn conditioned(&self, context: Context<'_>) -> Result<Conditioned<'a>> {
        let (rows, columns) = self.tokens();
        self.conditioned_at(&grid(rows, columns, 0), context)
    }

    /// The same for tokens at `positions`: the picture's, and those that follow it.
    fn conditioned_at(&self, positions: &[[u32; 3]], context: Context<'_>) -> Result<Conditioned<'a>> {
        let started = Instant::now();
        let transformer = self.parts.flux()?;
        let is_guided = self.guiding.true_cfg_scale > 1.0 && self.prompts.has_negative();
        let (positive, negative) = self.prompts.encode(is_guided, context)?;
        let text = |embeddings| Text::new(transformer, embeddings, positions, self.parts.reuse);
        let (mut positive, mut negative) = (text(positive)?, negative.map(text).transpose()?);
        if let Some(images) = &self.images {
            let (config, rows) = (transformer.config(), self.pictures());
            positive.images = Some(images.positive(config, rows)?);
            if let Some(negative) = &mut negative {
                negative.images = Some(images.negative(config, rows)?);
            }
        }
        stage_finished(context, "encode prompt", started);
        Ok(Conditioned {
            transformer,
            positive,
            negative,
            guiding: self.guiding,
            surrounding: None,
            following: None,
            control: None,
        })
    }

    /// Channels, height and width of the latents, for as many pictures as the call makes.
    fn latent_shape(&self) -> Result<[usize; 4]> {
        let scale = scale_factor(self.parts);
        Ok([self.pictures(), self.parts.denoiser()?.channels, self.size.0 / scale, self.size.1 / scale])
    }

    /// The noise that the call gives, as latents; none when it is drawn.
    fn given_noise(&self) -> Result<Option<Tensor>> {
        let GivenNoise { latents } = group(self.arguments)?;
        let Some(handle) = latents else { return Ok(None) };
        let dtype = self.parts.denoiser()?.dtype;
        let noise = tensor(self.arguments, "latents", handle, dtype, &self.parts.device)?;
        if noise.rank() != 3 {
            return Ok(Some(noise));
        }
        let [pictures, channels, ..] = self.latent_shape()?;
        let (rows, columns) = self.tokens();
        let packed = [pictures, rows * columns, 4 * channels];
        if noise.dims() != packed {
            return Err(refuse("latents", format!("has shape {:?}, but this call needs {packed:?}", noise.dims())));
        }
        unpacked(&noise, rows).map(Some)
    }

    /// The noise the call starts from, given or drawn.
    fn noise(&self, scheduler: &dyn Scheduler, generators: &mut Generators) -> Result<Tensor> {
        let kind = (self.parts.denoiser()?.dtype, &self.parts.device);
        let sigma = scheduler.init_noise_sigma();
        initial_latents(self.given_noise()?, &self.latent_shape()?, kind, generators, sigma)
    }

    /// Latents to pictures: the steps at `indices`, with what is `kept` brought back after each.
    fn denoised(
        &self,
        mut conditioned: Conditioned<'_>,
        latents: Tensor,
        scheduler: &mut dyn Scheduler,
        (indices, kept): (Range<usize>, Option<Kept>),
        surroundings: Surroundings<'_>,
    ) -> Result<Entry> {
        let (parts, call, context) = (self.parts, &self.generation, surroundings.context);
        let steps = indices.clone();
        let entry = Denoising { parts, call, indices, scaling: Scaling::Shifted, upcast: false, kept }.run(
            &mut |latents, timestep, index| conditioned.predict(latents, timestep, (index, &steps)),
            latents,
            scheduler,
            surroundings,
        )?;
        step_cache::report(&conditioned.memories(), context);
        Ok(entry)
    }
}
