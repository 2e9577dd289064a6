//! InstructPix2Pix with Stable Diffusion XL, CosXL Edit among its models (diffusers
//! `StableDiffusionXLInstructPix2PixPipeline`; Brooks, Holynski and Efros 2023).

use std::time::Instant;

use candle_core::Tensor;
use dw_core::{arguments::Arguments, artifact::Entry};
use serde_json::Value;

use super::{
    arguments::{Defaults, filled, group, group_schema, merged_schema, refuse_unknown, with_defaults},
    call::{Denoising, Surroundings, set_timesteps, stage_finished},
    components::Parts,
    decode::Scaling,
    image_to_image::StartPictures,
    stable_diffusion_instruct_pix2pix::{ImageGuidance, edit_rows, picture_latents},
    stable_diffusion_xl::{Prompts, SizeConditioning, XlPrompts, until},
    text_to_image::{Canvas, DenoisingEnd, Generation, StartingNoise, check_generators, refuse},
    unet::{Added, ConditionedUnet, check_extra_channels, picture_size, starting_noise_of},
};
use crate::Result;

const DEFAULTS: Defaults = &[("num_inference_steps", 100.0)];

/// The arguments of the class.
pub(crate) fn schema() -> Value {
    let groups = [
        group_schema::<Generation>(),
        group_schema::<ImageGuidance>(),
        group_schema::<StartPictures>(),
        group_schema::<Canvas>(),
        group_schema::<StartingNoise>(),
        group_schema::<XlPrompts>(),
        group_schema::<SizeConditioning>(),
        group_schema::<DenoisingEnd>(),
    ];
    with_defaults(merged_schema("StableDiffusionXLInstructPix2PixPipeline", &groups), DEFAULTS)
}

/// One call.
pub(crate) fn run(parts: &Parts, arguments: &Arguments, surroundings: Surroundings<'_>) -> Result<Entry> {
    refuse_unknown(parts.class, arguments, &schema())?;
    let arguments = &filled(arguments, DEFAULTS);
    let call: Generation = group(arguments)?;
    let xl: XlPrompts = group(arguments)?;
    let sizes: SizeConditioning = group(arguments)?;
    let start: StartPictures = group(arguments)?;
    let DenoisingEnd { denoising_end } = group(arguments)?;
    call.check(xl.guidance_scale)?;
    let guidance = group::<ImageGuidance>(arguments)?.with(&call, xl.guidance_scale)?;
    check_extra_channels(parts, parts.vae()?.config().latent_channels, "the picture")?;
    let size = picture_size(parts, &group(arguments)?, 128)?;
    let start = start.read(parts, arguments, &Canvas { height: Some(size.0), width: Some(size.1) })?;
    if start.size(parts)?.0 != size {
        let ((height, width), _) = start.size(parts)?;
        let reason = format!("are latents of {width} x {height} pixels; give `width` and `height` as they are");
        return Err(refuse("image", reason));
    }
    let prompts = Prompts::new(parts, &call, &xl, arguments)?;
    let pictures = prompts.count * call.num_images_per_prompt;
    check_generators(surroundings.generators, pictures)?;
    let mut scheduler = parts.scheduler.create()?;
    set_timesteps(&mut *scheduler, &call)?;
    let indices = until(&*scheduler, 0, denoising_end)?;

    let started = Instant::now();
    let unet = parts.unet()?;
    let (positive, negative) = prompts.encode(guidance.is_guided(), surroundings.context)?;
    let mut surrounding = picture_latents(parts, &start, pictures, true)?;
    if parts.setting("is_cosxl_edit", false) {
        surrounding = (surrounding * parts.vae()?.config().scaling_factor)?;
    }
    let latents_shape = surrounding.dims().to_vec();
    let negative = negative.as_ref();
    let conditioned = ConditionedUnet {
        unet,
        encoder_hidden_states: edit_rows(&positive.embeds, negative.map(|negative| &negative.embeds))?
            .to_dtype(unet.dtype())?,
        added: Some(Added {
            text_embeds: edit_rows(&positive.pooled, negative.map(|negative| &negative.pooled))?
                .to_dtype(unet.dtype())?,
            time_ids: Tensor::new(time_ids(&sizes, size, guidance.is_guided(), pictures), &parts.device)?
                .to_dtype(unet.dtype())?,
        }),
        timestep_cond: None,
        image_prompts: prompts.images.edit_prompts(guidance.is_guided(), pictures)?,
        guidance,
        surrounding: Some(surrounding),
        class_labels: None,
        control: None,
    };
    stage_finished(surroundings.context, "encode prompt", started);
    let sigma = scheduler.init_noise_sigma();
    let latents = starting_noise_of(parts, arguments, &latents_shape, surroundings.generators, sigma)?;
    Denoising { parts, call: &call, indices, scaling: Scaling::Statistics, upcast: true, kept: None }.run(
        &mut |latents, timestep, index| conditioned.predict(latents, timestep, index),
        latents,
        &mut *scheduler,
        surroundings,
    )
}

/// The six numbers for each row of the batch: positive for the first prediction, negative for the two others.
fn time_ids(sizes: &SizeConditioning, size: (usize, usize), guided: bool, pictures: usize) -> Vec<Vec<f32>> {
    let mut pair = sizes.time_ids(size, guided, 1).into_iter().rev();
    let positive = pair.next().into_iter().flat_map(|row| std::iter::repeat_n(row, pictures));
    let negative = pair.next().into_iter().flat_map(|row| std::iter::repeat_n(row, 2 * pictures));
    positive.chain(negative).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_third_of_a_guided_batch_has_the_positive_sizes() {
        let sizes: SizeConditioning = serde_json::from_value(serde_json::json!({
            "original_size": [128, 96], "negative_original_size": [32, 16], "negative_target_size": [64, 48]
        }))
        .expect("sizes");
        let rows = time_ids(&sizes, (64, 48), true, 2);
        let heights: Vec<f32> = rows.iter().map(|row| row[0]).collect();
        assert_eq!(heights, [128.0, 128.0, 32.0, 32.0, 32.0, 32.0]);
        assert_eq!(time_ids(&sizes, (64, 48), false, 2).len(), 2);
    }
}
