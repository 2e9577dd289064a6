//! The arguments that the pipelines of the Stable Diffusion families share, and the checks on them that
//! need no model.

use dw_core::arguments::ArtifactRef;
use schemars::JsonSchema;
use serde::Deserialize;

use super::{
    arguments::{Texts, number, optional_number, optional_numbers, optional_positive, optional_whole, positive},
    image_prompt::Handles,
};
use crate::{Error, Result, rng::Generators, schedulers::TimestepRequest};

/// What a call returns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, serde::Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OutputType {
    /// Pictures.
    #[default]
    #[serde(alias = "np", alias = "pt")]
    Pil,
    /// The latents as they leave the denoiser, with their batch axis.
    Latent,
}

/// Keyword arguments for the attention layers.
#[derive(Clone, Debug, Default, Deserialize, serde::Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AttentionKwargs {
    /// Multiplies the scale of every LoRA.
    pub scale: Option<f64>,
}

/// What the picture shows and how it is denoised.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Generation {
    /// What the picture should show. A list makes one picture (or more, see `num_images_per_prompt`) of each.
    pub prompt: Option<Texts>,
    /// What the picture should not show. Used when `guidance_scale` is above 1.
    pub negative_prompt: Option<Texts>,
    /// How many denoising steps; more take longer and follow the model more closely.
    #[serde(deserialize_with = "positive")]
    #[schemars(range(min = 1))]
    pub num_inference_steps: usize,
    /// The timesteps to visit, falling, instead of `num_inference_steps`.
    #[serde(deserialize_with = "optional_numbers")]
    pub timesteps: Option<Vec<f64>>,
    /// The noise levels to visit, falling, instead of `num_inference_steps`.
    #[serde(deserialize_with = "optional_numbers")]
    pub sigmas: Option<Vec<f64>>,
    /// Fresh noise in each step, 0 to 1, for schedulers that have it (DDIM).
    #[serde(deserialize_with = "number")]
    pub eta: f64,
    /// How many pictures of each prompt.
    #[serde(deserialize_with = "positive")]
    #[schemars(range(min = 1))]
    pub num_images_per_prompt: usize,
    /// Encoded prompts instead of `prompt`: an array `(prompts, tokens, features)`.
    pub prompt_embeds: Option<ArtifactRef>,
    /// Encoded negative prompts instead of `negative_prompt`, of the same shape.
    pub negative_prompt_embeds: Option<ArtifactRef>,
    /// `pil` for pictures, `latent` for the latents a later step goes on with.
    pub output_type: OutputType,
    /// How far the guided prediction is brought back to the contrast of the unguided one, 0 to 1
    /// (Lin et al. 2024, section 3.4).
    #[serde(deserialize_with = "number")]
    pub guidance_rescale: f64,
    /// How many of the text encoder's last layers are skipped.
    #[serde(deserialize_with = "optional_whole")]
    #[schemars(range(min = 0))]
    pub clip_skip: Option<usize>,
    /// Keyword arguments for the attention layers; `scale` multiplies the scale of every LoRA.
    pub cross_attention_kwargs: Option<AttentionKwargs>,
    /// The picture that the step's IP-Adapter is shown, or a list of pictures; with several adapters a list with
    /// one entry for each.
    pub ip_adapter_image: Option<Handles>,
    /// What the image encoder said about the pictures, instead of them: an array `(2, pictures, features)`, negative
    /// row first (only one row without guidance), or a list with one for each adapter.
    pub ip_adapter_image_embeds: Option<Handles>,
}

impl Default for Generation {
    fn default() -> Self {
        Self {
            prompt: None,
            negative_prompt: None,
            num_inference_steps: 50,
            timesteps: None,
            sigmas: None,
            eta: 0.0,
            num_images_per_prompt: 1,
            prompt_embeds: None,
            negative_prompt_embeds: None,
            output_type: OutputType::Pil,
            guidance_rescale: 0.0,
            clip_skip: None,
            cross_attention_kwargs: None,
            ip_adapter_image: None,
            ip_adapter_image_embeds: None,
        }
    }
}

/// How large the picture is.
#[derive(Clone, Copy, Debug, Default, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Canvas {
    /// Height in pixels, a multiple of 8, or of 16 with Stable Diffusion 3; when not given the start picture's or the control picture's where the class
    /// changes or follows one, else the model's own.
    #[serde(deserialize_with = "optional_positive")]
    #[schemars(range(min = 1))]
    pub height: Option<usize>,
    /// Width in pixels, a multiple as for `height`; when not given as for `height`.
    #[serde(deserialize_with = "optional_positive")]
    #[schemars(range(min = 1))]
    pub width: Option<usize>,
}

/// What the call starts from instead of drawn noise.
#[derive(Clone, Copy, Debug, Default, Deserialize, JsonSchema)]
#[serde(default)]
pub struct StartingNoise {
    /// Starting noise instead of drawn noise: an array `(pictures, channels, height / 8, width / 8)`.
    pub latents: Option<ArtifactRef>,
}

/// The part of a schedule that only refining pipelines and their bases use.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(default)]
pub struct DenoisingEnd {
    /// Stop after this fraction of the noise schedule, between 0 and 1, and hand the latents on
    /// (`output_type` `latent`).
    #[serde(deserialize_with = "optional_number")]
    pub denoising_end: Option<f64>,
}

/// Complains about `name`.
pub(crate) fn refuse(name: &str, reason: impl Into<String>) -> Error {
    Error::Argument { name: name.into(), reason: reason.into() }
}

impl Generation {
    /// The schedule this call asks for.
    pub(crate) fn timestep_request(&self) -> TimestepRequest {
        TimestepRequest {
            timesteps: self.timesteps.clone(),
            sigmas: self.sigmas.clone(),
            ..TimestepRequest::steps(self.num_inference_steps)
        }
    }

    /// Checks that need no model: prompt against embeddings, schedule, guidance rescale.
    pub(crate) fn check(&self, guidance_scale: f64) -> Result<()> {
        match (&self.prompt, self.prompt_embeds) {
            (None, None) => return Err(refuse("prompt", "is missing; say what the picture should show")),
            (Some(_), Some(_)) => {
                return Err(refuse("prompt", "cannot be combined with `prompt_embeds`; give one of them"));
            }
            _ => {}
        }
        if self.negative_prompt.is_some() && self.negative_prompt_embeds.is_some() {
            return Err(refuse(
                "negative_prompt",
                "cannot be combined with `negative_prompt_embeds`; give one of them",
            ));
        }
        if self.timesteps.is_some() && self.sigmas.is_some() {
            return Err(refuse("timesteps", "cannot be combined with `sigmas`; give one of them"));
        }
        for (name, value) in
            [("guidance_scale", guidance_scale), ("guidance_rescale", self.guidance_rescale), ("eta", self.eta)]
        {
            if !value.is_finite() {
                return Err(refuse(name, format!("must be a finite number, found `{value}`")));
            }
        }
        Ok(())
    }
}

impl Canvas {
    /// Height and width in pixels, checked to be multiples of `multiple`.
    pub(crate) fn size(&self, default: (usize, usize), multiple: usize) -> Result<(usize, usize)> {
        let (height, width) = (self.height.unwrap_or(default.0), self.width.unwrap_or(default.1));
        for (name, value) in [("height", height), ("width", width)] {
            if value % multiple != 0 {
                let (below, above) = (value / multiple * multiple, value.next_multiple_of(multiple));
                let try_instead = if below == 0 { format!("`{above}`") } else { format!("`{below}` or `{above}`") };
                return Err(refuse(
                    name,
                    format!("must be a multiple of {multiple}, found `{value}`; use {try_instead}"),
                ));
            }
        }
        Ok((height, width))
    }
}

/// `texts` as one for each of `prompts`; a single text serves all. None stays none.
pub(crate) fn one_for_each(name: &str, texts: Option<&Texts>, prompts: usize) -> Result<Option<Vec<String>>> {
    let Some(texts) = texts else { return Ok(None) };
    match texts.list() {
        [text] => Ok(Some(vec![text.clone(); prompts])),
        list if list.len() == prompts => Ok(Some(list.to_vec())),
        list => Err(refuse(
            name,
            format!("has {} texts for {prompts} prompt(s); give one text, or one for each prompt", list.len()),
        )),
    }
}

/// A list of seeds must have one for each picture.
pub(crate) fn check_generators(generators: &Generators, pictures: usize) -> Result<()> {
    match generators {
        Generators::Each(list) if list.len() != pictures => Err(refuse(
            "seed",
            format!("has {} values for {pictures} picture(s); give one seed, or one for each picture", list.len()),
        )),
        _ => Ok(()),
    }
}
