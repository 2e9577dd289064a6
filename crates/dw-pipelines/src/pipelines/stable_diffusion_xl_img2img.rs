//! Stable Diffusion XL image to image, the refiner included (diffusers `StableDiffusionXLImg2ImgPipeline`;
//! Podell et al. 2023, section 2.5).

use std::ops::Range;

use dw_core::{arguments::Arguments, artifact::Entry};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::Value;

use super::{
    arguments::{Pair, group, group_schema, merged_schema, number, optional_number, refuse_unknown},
    call::{Denoising, Surroundings, set_timesteps, steps},
    components::Parts,
    control::ControlCall,
    decode::Scaling,
    fit::Fit,
    image_to_image::{Encoding, StartPictures, clean_latents, first_index, noisy_latents},
    stable_diffusion_xl::{Prompts, SizeConditioning, XlPrompts, condition, cutoff, until},
    text_to_image::{DenoisingEnd, Generation, check_generators, refuse},
    unet::check_parts,
};
use crate::{Result, schedulers::Scheduler};

/// How far the result moves away from the picture, and the refiner's conditioning.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(default)]
pub(crate) struct Refinement {
    /// How far the result moves away from the picture, above 0 and at most 1: the fraction of the steps that is run.
    #[serde(deserialize_with = "number")]
    #[schemars(extend("exclusiveMinimum" = 0, "maximum" = 1))]
    pub(crate) strength: f64,
    /// Goes on with latents that a base model denoised up to this fraction of the noise schedule, between 0 and 1;
    /// no noise is added and `strength` does not count.
    #[serde(deserialize_with = "optional_number")]
    pub(crate) denoising_start: Option<f64>,
    /// How beautiful the result is said to be, for refiners (1 to 10).
    #[serde(deserialize_with = "number")]
    pub(crate) aesthetic_score: f64,
    /// The same for the negative half.
    #[serde(deserialize_with = "number")]
    pub(crate) negative_aesthetic_score: f64,
}

impl Default for Refinement {
    fn default() -> Self {
        Self { strength: 0.3, denoising_start: None, aesthetic_score: 6.0, negative_aesthetic_score: 2.5 }
    }
}

/// The arguments of the class.
pub(crate) fn schema() -> Value {
    let groups = [
        group_schema::<Generation>(),
        group_schema::<StartPictures>(),
        group_schema::<Refinement>(),
        group_schema::<XlPrompts>(),
        group_schema::<SizeConditioning>(),
        group_schema::<DenoisingEnd>(),
    ];
    merged_schema("StableDiffusionXLImg2ImgPipeline", &groups)
}

/// One call.
pub(crate) fn run(parts: &Parts, arguments: &Arguments, surroundings: Surroundings<'_>) -> Result<Entry> {
    refuse_unknown(parts.class, arguments, &schema())?;
    generate(parts, arguments, None, surroundings)
}

/// One call of any image-to-image class of the family, with its defaults filled in.
pub(crate) fn generate(
    parts: &Parts,
    arguments: &Arguments,
    control: Option<ControlCall<'_>>,
    surroundings: Surroundings<'_>,
) -> Result<Entry> {
    let call: Generation = group(arguments)?;
    let xl: XlPrompts = group(arguments)?;
    let sizes: SizeConditioning = group(arguments)?;
    let refinement: Refinement = group(arguments)?;
    let DenoisingEnd { denoising_end } = group(arguments)?;
    let start: StartPictures = group(arguments)?;
    call.check(xl.guidance_scale)?;
    check_parts(parts, &call)?;
    let start = start.read(parts, arguments, &group(arguments)?)?;
    let prompts = Prompts::new(parts, &call, &xl, arguments)?;
    let pictures = prompts.count * call.num_images_per_prompt;
    check_generators(surroundings.generators, pictures)?;
    control.as_ref().map_or(Ok(()), |control| control.check_prompts(prompts.count))?;
    let mut scheduler = parts.scheduler.create()?;
    set_timesteps(&mut *scheduler, &call)?;
    let indices = refinement.indices(&*scheduler, steps(&call), denoising_end)?;

    let schedule = (indices.start, scheduler.timesteps().len());
    let (size, _) = start.size(parts)?;
    let wants_score = parts.setting("requires_aesthetics_score", false);
    let time_ids = |guided| refinement.time_ids(&sizes, (size, wants_score), guided, pictures);
    let control = control.map(|control| control.prepare(parts, Fit::whole(size), prompts.counts(), schedule));
    let mut conditioned = condition(parts, &call, prompts, (xl.guidance_scale, &time_ids), surroundings.context)?;
    conditioned.control = control.transpose()?;
    let encoding = Encoding { scaling: Scaling::Statistics, upcast: true, for_each_picture: true };
    let mut latents = clean_latents(parts, &start, pictures, encoding, surroundings.generators)?;
    if refinement.denoising_start.is_none() {
        latents = noisy_latents(&latents, &*scheduler, indices.start, surroundings.generators)?;
    }
    Denoising { parts, call: &call, indices, scaling: Scaling::Statistics, upcast: true, kept: None }.run(
        &mut |latents, timestep, index| conditioned.predict(latents, timestep, index),
        latents,
        &mut *scheduler,
        surroundings,
    )
}

impl Refinement {
    /// Which timesteps are run.
    pub(crate) fn indices(
        self,
        scheduler: &dyn Scheduler,
        steps: usize,
        denoising_end: Option<f64>,
    ) -> Result<Range<usize>> {
        let Some(start) = self.denoising_start else {
            return until(scheduler, first_index(scheduler, steps, self.strength)?, denoising_end);
        };
        if denoising_end.is_some_and(|end| start >= end) {
            return Err(refuse("denoising_start", "must be smaller than `denoising_end`"));
        }
        let cutoff = cutoff("denoising_start", start, scheduler)?;
        let timesteps = scheduler.timesteps();
        let mut run = timesteps.iter().filter(|&&timestep| timestep < cutoff).count();
        if run == 0 {
            let reason = format!("`{start}` leaves no denoising step; use a smaller value or more steps");
            return Err(refuse("denoising_start", reason));
        }
        // A second-order sampler must not start in the middle of a step.
        if scheduler.order() == 2 && run.is_multiple_of(2) {
            run = (run + 1).min(timesteps.len());
        }
        until(scheduler, timesteps.len() - run, denoising_end)
    }

    /// The numbers for each row of the UNet's batch: sizes as in text to image, the score in the target size's
    /// place for refiners. Unlike there, the negative half comes whole.
    pub(crate) fn time_ids(
        self,
        sizes: &SizeConditioning,
        (size, wants_score): ((usize, usize), bool),
        guided: bool,
        pictures: usize,
    ) -> Vec<Vec<f32>> {
        let own = Pair(size.0, size.1);
        let (original, target) = (sizes.original_size.unwrap_or(own), sizes.target_size.unwrap_or(own));
        let negative_original = sizes.negative_original_size.unwrap_or(original);
        let negative_target = sizes.negative_target_size.unwrap_or(target);
        let crop = sizes.crops_coords_top_left;
        let row = |pairs: &[Pair], score: Option<f64>| {
            let values = pairs.iter().flat_map(|pair| pair.values());
            values.chain(score.map(|score| score as f32)).collect::<Vec<f32>>()
        };
        let (positive, negative) = if wants_score {
            let negative_crop = sizes.negative_crops_coords_top_left;
            let positive = row(&[original, crop], Some(self.aesthetic_score));
            (positive, row(&[negative_original, negative_crop], Some(self.negative_aesthetic_score)))
        } else {
            // The reference gives both halves the positive crop here.
            (row(&[original, crop, target], None), row(&[negative_original, crop, negative_target], None))
        };
        let negatives = std::iter::repeat_n(negative, if guided { pictures } else { 0 });
        negatives.chain(std::iter::repeat_n(positive, pictures)).collect()
    }
}
