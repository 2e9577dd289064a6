//! Stable Diffusion's upscaler by two (diffusers `StableDiffusionLatentUpscalePipeline`; Karras et al. 2022,
//! arXiv:2206.00364, table 1): latents in, latents of twice the size out, both of the usual autoencoder.

use std::time::Instant;

use candle_core::Tensor;
use dw_core::{arguments::Arguments, artifact::Entry};
use serde_json::Value;

use super::{
    arguments::{Defaults, filled, group, group_schema, merged_schema, refuse_unknown, with_defaults},
    call::{Denoising, Surroundings, set_timesteps, stage_finished},
    components::Parts,
    decode::Scaling,
    guidance::{Guidance, Guided},
    image_to_image::{Encoding, Given, Start, StartPictures, clean_latents, latents},
    prompt::{TextEncoder, Truncations, hidden_state, repeat_rows},
    stable_diffusion::GuidanceArguments,
    stable_diffusion_upscale::pixels,
    text_to_image::{Generation, StartingNoise, check_generators, one_for_each, refuse},
    unet::{batch, check_extra_channels, scale_factor, starting_noise_of},
};
use crate::{
    Error, Result,
    models::{Unet2DConditionModel, UnetInput},
    nn::upsample_nearest_2x,
    request::Context,
};

const DEFAULTS: Defaults = &[("num_inference_steps", 75.0), ("guidance_scale", 9.0)];

/// Values of the embedding of the noise on the picture, of which there is none: half ones, half zeros.
const NOISE_LEVEL_WIDTH: usize = 128;

/// What the model predicts besides the latents and nobody looks at: one channel of a variance.
const VARIANCE_CHANNELS: usize = 1;

/// The arguments of the class.
pub(crate) fn schema() -> Value {
    let groups = [
        group_schema::<Generation>(),
        group_schema::<GuidanceArguments>(),
        group_schema::<StartPictures>(),
        group_schema::<StartingNoise>(),
    ];
    with_defaults(merged_schema("StableDiffusionLatentUpscalePipeline", &groups), DEFAULTS)
}

/// One call.
pub(crate) fn run(parts: &Parts, arguments: &Arguments, surroundings: Surroundings<'_>) -> Result<Entry> {
    refuse_unknown(parts.class, arguments, &schema())?;
    let arguments = &filled(arguments, DEFAULTS);
    let call: Generation = group(arguments)?;
    let GuidanceArguments { guidance_scale } = group(arguments)?;
    call.check(guidance_scale)?;
    check_call(parts, &call)?;
    let channels = parts.vae()?.config().latent_channels;
    check_extra_channels(parts, channels, "the picture")?;
    let start = start(parts, arguments)?;
    let texts = call.prompt.as_ref().map_or(&[][..], |prompt| prompt.list());
    let pictures = texts.len() * call.num_images_per_prompt;
    check_generators(surroundings.generators, pictures)?;
    let mut scheduler = parts.scheduler.create()?;
    set_timesteps(&mut *scheduler, &call)?;
    let Some(sigmas) = scheduler.sigmas().map(<[f32]>::to_vec) else {
        let class = scheduler.class();
        return Err(Error::Unsupported(format!(
            "`{class}` has no noise levels (sigmas), which `{}` needs; use `EulerDiscreteScheduler`",
            parts.class
        )));
    };

    let started = Instant::now();
    let rescale = call.guidance_rescale;
    let guidance = Guided::from((guidance_scale > 1.0).then_some(Guidance { scale: guidance_scale, rescale }));
    let text = Text::encode(parts, &call, (texts, guidance_scale), guidance, surroundings.context)?;
    stage_finished(surroundings.context, "encode prompt", started);
    let encoding = Encoding { scaling: Scaling::Factor, upcast: false, for_each_picture: false };
    let small = clean_latents(parts, &start, pictures, encoding, surroundings.generators)?;
    let upscaler = Upscaler { unet: parts.unet()?, text, picture: upsample_nearest_2x(&small)?, guidance, sigmas };
    let shape = upscaler.picture.dims().to_vec();
    let sigma = scheduler.init_noise_sigma();
    let latents = starting_noise_of(parts, arguments, &shape, surroundings.generators, sigma)?;
    let indices = 0..scheduler.timesteps().len();
    Denoising { parts, call: &call, indices, scaling: Scaling::Factor, upcast: false, kept: None }.run(
        &mut |latents, _, index| upscaler.predict(latents, index),
        latents,
        &mut *scheduler,
        surroundings,
    )
}

/// Refuses what the class does not take.
fn check_call(parts: &Parts, call: &Generation) -> Result<()> {
    let embeds = [
        ("prompt_embeds", call.prompt_embeds.is_some()),
        ("negative_prompt_embeds", call.negative_prompt_embeds.is_some()),
    ];
    if let Some((name, _)) = embeds.iter().find(|(_, is_given)| *is_given) {
        return Err(refuse(name, "is not taken by this class, which needs more of the text than that; give `prompt`"));
    }
    if parts.ip_adapters.is_some() {
        return Err(Error::Unsupported(format!("`{}` takes no IP-Adapter; remove it from the step", parts.class)));
    }
    if parts.prompt_weighting {
        return Err(Error::Unsupported(format!(
            "`{}` reads no weighted prompts; remove `prompt_weighting` from the step",
            parts.class
        )));
    }
    let (predicts, latents) = (parts.unet()?.config().out_channels, parts.vae()?.config().latent_channels);
    if predicts != latents + VARIANCE_CHANNELS {
        return Err(Error::Unsupported(format!(
            "this model's UNet predicts {predicts} channels, but `{}` needs {}; use a model made for this class",
            parts.class,
            latents + VARIANCE_CHANNELS
        )));
    }
    Ok(())
}

/// The pictures in -1 to 1, their sides cut down to what the autoencoder takes, or latents as they are.
fn start(parts: &Parts, arguments: &Arguments) -> Result<Start> {
    match group::<StartPictures>(arguments)?.given(arguments)? {
        Given::Arrays(handles) => latents(parts, arguments, &handles),
        Given::Pictures(pictures) => pixels(parts, &pictures, scale_factor(parts)).map(Start::Pixels),
    }
}

/// What the model is told of the prompts, one row for each row of its batch.
struct Text {
    /// The last state before the final norm, `(rows, tokens, features)`.
    states: Tensor,
    /// The noise on the picture and the pooled state, `(rows, 128 + features)`.
    condition: Tensor,
}

impl Text {
    fn encode(
        parts: &Parts,
        call: &Generation,
        (prompts, guidance_scale): (&[String], f64),
        guidance: Guided,
        context: Context<'_>,
    ) -> Result<Self> {
        let Some(encoder) = parts.text_encoder("text_encoder", "tokenizer")?.map(TextEncoder::from) else {
            return Err(Error::Unsupported(format!("`{}` needs its text encoder; do not leave it out", parts.class)));
        };
        let mut truncations = Truncations::new(context);
        let mut encode = |texts: &[String], skip: usize| -> Result<(Tensor, Tensor)> {
            let output = encoder.encode(texts, &mut truncations)?;
            let times = call.num_images_per_prompt;
            Ok((repeat_rows(hidden_state(&output, skip)?, times)?, repeat_rows(&output.pooled, times)?))
        };
        let nothing = vec![String::new(); prompts.len()];
        let (states, pooled) =
            encode(if guidance_scale == 0.0 { &nothing } else { prompts }, call.clip_skip.unwrap_or(0))?;
        let negative = if guidance.is_guided() {
            let texts = one_for_each("negative_prompt", call.negative_prompt.as_ref(), prompts.len())?;
            Some(encode(&texts.unwrap_or(nothing), 0)?)
        } else {
            None
        };
        let dtype = parts.unet()?.dtype();
        let negative = negative.as_ref();
        let states = batch(negative.map(|(states, _)| states), &states, dtype)?;
        let pooled = batch(negative.map(|(_, pooled)| pooled), &pooled, dtype)?;
        let half = (pooled.dim(0)?, NOISE_LEVEL_WIDTH / 2);
        let ones = Tensor::ones(half, dtype, pooled.device())?;
        Ok(Self { states, condition: Tensor::cat(&[&ones, &ones.zeros_like()?, &pooled], 1)? })
    }
}

/// The model with everything it is told in each step.
struct Upscaler<'a> {
    unet: &'a Unet2DConditionModel,
    text: Text,
    /// The small picture's latents at twice their size, `(pictures, channels, height / 8, width / 8)`.
    picture: Tensor,
    guidance: Guided,
    /// The noise level of every step.
    sigmas: Vec<f32>,
}

impl Upscaler<'_> {
    /// The clean latents that the model makes out of `scaled`: latents that the sampler has divided by
    /// `sqrt(sigma² + 1)`.
    fn predict(&self, scaled: &Tensor, index: usize) -> Result<Tensor> {
        let sigma = self.sigmas[index];
        let scaled = self.guidance.rows(scaled)?;
        let sample = Tensor::cat(&[&scaled, &self.guidance.picture_rows(&self.picture)?], 1)?;
        let timestep = f64::from(sigma.ln() * 0.25);
        let input = UnetInput {
            timestep_cond: Some(&self.text.condition),
            ..UnetInput::new(&sample, timestep, &self.text.states)
        };
        let channels = self.picture.dim(1)?;
        let output = self.unet.forward(&input)?.narrow(1, 0, channels)?;
        // The skip and output scalings of the paper with a data deviation of 1.
        let deviation = f64::from(sigma * sigma + 1.0).sqrt();
        let prediction = ((scaled / deviation)? + (output * (f64::from(sigma) / deviation))?)?;
        self.guidance.combine(prediction)
    }
}
