//! Editing pictures in words with FLUX.1 Kontext (diffusers `FluxKontextPipeline`): the tokens of the picture follow those
//! of the result.

use candle_core::Tensor;
use dw_core::{arguments::Arguments, artifact::Entry};
use image::DynamicImage;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::Value;

use super::{
    Call, ENCODING, Sides, USUAL_SIDE, check_inputs, class_schema, guided_groups, tell_change, token_side,
    transformer::{grid, packed},
    with_class_defaults,
};
use crate::{
    Result,
    pipelines::{
        arguments::{group, group_schema, positive, refuse_unknown},
        call::Surroundings,
        components::Parts,
        fit::{Fit, own_size},
        image_to_image::{Given, Pictures, Start, StartPictures, latents, most_likely, tiled},
        text_to_image::refuse,
        unet::scale_factor,
    },
    request::Context,
};

/// The sizes that the model was trained on, width and height in pixels, from the narrowest to the widest.
const TRAINED_SIZES: [(usize, usize); 17] = [
    (672, 1568),
    (688, 1504),
    (720, 1456),
    (752, 1392),
    (800, 1328),
    (832, 1248),
    (880, 1184),
    (944, 1104),
    (1024, 1024),
    (1104, 944),
    (1184, 880),
    (1248, 832),
    (1328, 800),
    (1392, 752),
    (1456, 720),
    (1504, 688),
    (1568, 672),
];

/// The picture and the sizes.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(default)]
pub(crate) struct KontextArguments {
    /// The picture that is edited, or a list with one for each picture of the result. Without one, the picture is made
    /// from the prompt alone. Latents of an earlier step are taken as they are.
    pub(crate) image: Option<Pictures>,
    /// How many pixels the result has: `height` and `width` only say its shape.
    #[serde(deserialize_with = "positive")]
    #[schemars(range(min = 1))]
    pub(crate) max_area: usize,
    /// Whether the picture is brought to the nearest of the sizes that the model was trained on.
    #[serde(rename = "_auto_resize")]
    pub(crate) auto_resize: bool,
}

impl Default for KontextArguments {
    fn default() -> Self {
        Self { image: None, max_area: 1024 * 1024, auto_resize: true }
    }
}

/// The arguments of the class.
pub(crate) fn schema() -> Value {
    let more = guided_groups().into_iter().chain([group_schema::<KontextArguments>()]);
    class_schema("FluxKontextPipeline", more, &[])
}

/// One call.
pub(crate) fn run(parts: &Parts, arguments: &Arguments, surroundings: Surroundings<'_>) -> Result<Entry> {
    refuse_unknown(parts.class, arguments, &schema())?;
    let arguments = &with_class_defaults(arguments, &[]);
    check_inputs(parts)?;
    let given: KontextArguments = group(arguments)?;
    let size = result_size(parts, arguments, given.max_area, surroundings.context)?;
    let start = given.start(parts, arguments)?;
    let call = Call::new(parts, arguments, size, surroundings.generators)?;
    let mut scheduler = call.scheduler()?;

    let (rows, columns) = call.tokens();
    let mut positions = grid(rows, columns, 0);
    let following = match &start {
        Some(start) => {
            let latents = picture_latents(parts, start, call.pictures())?;
            let (_, _, height, width) = latents.dims4()?;
            positions.extend(grid(height / 2, width / 2, 1));
            Some(packed(&latents)?)
        }
        None => None,
    };
    let mut conditioned = call.conditioned_at(&positions, surroundings.context)?;
    conditioned.following = following;
    let latents = call.noise(&*scheduler, surroundings.generators)?;
    let indices = 0..scheduler.timesteps().len();
    call.denoised(conditioned, latents, &mut *scheduler, (indices, None), surroundings)
}

/// Height and width in pixels of a result of about `max_area` pixels with the shape that the call names.
fn result_size(parts: &Parts, arguments: &Arguments, max_area: usize, context: Context<'_>) -> Result<(usize, usize)> {
    let Sides { height, width } = group(arguments)?;
    let (usual, multiple) = (USUAL_SIDE * scale_factor(parts), token_side(parts)?);
    let ratio = width.unwrap_or(usual) as f64 / height.unwrap_or(usual) as f64;
    let side = |square: f64| square.sqrt().round_ties_even() as usize / multiple * multiple;
    let size = (side(max_area as f64 / ratio), side(max_area as f64 * ratio));
    if size.0 == 0 || size.1 == 0 {
        return Err(refuse("max_area", format!("`{max_area}` is too small for this shape; use a larger number")));
    }
    tell_change((height, width), size, &format!("`max_area` is `{max_area}`"), context);
    Ok(size)
}

impl KontextArguments {
    /// The pictures that are edited, at a size the model can take.
    fn start(&self, parts: &Parts, arguments: &Arguments) -> Result<Option<Start>> {
        let Some(image) = &self.image else { return Ok(None) };
        let image = StartPictures { image: Some(image.clone()) };
        Ok(Some(match image.given(arguments)? {
            Given::Arrays(handles) => latents(parts, arguments, &handles)?,
            Given::Pictures(pictures) => {
                let fit = Fit::whole(self.picture_size(pictures[0], token_side(parts)?)?);
                Start::pixels(&pictures, fit, &parts.device)?
            }
        }))
    }

    /// Height and width that a picture is brought to.
    fn picture_size(&self, picture: &DynamicImage, multiple: usize) -> Result<(usize, usize)> {
        if !self.auto_resize {
            return own_size("image", picture, multiple);
        }
        let (width, height) = nearest_trained_size(picture.width(), picture.height());
        Ok((height / multiple * multiple, width / multiple * multiple))
    }
}

/// The width and height the model was trained on whose shape is nearest to that of a picture.
fn nearest_trained_size(width: u32, height: u32) -> (usize, usize) {
    let ratio = f64::from(width) / f64::from(height.max(1));
    let distance = |size: &(usize, usize)| (ratio - size.0 as f64 / size.1 as f64).abs();
    let nearer = |a: &&(usize, usize), b: &&(usize, usize)| distance(a).total_cmp(&distance(b));
    *TRAINED_SIZES.iter().min_by(nearer).expect("there are sizes")
}

/// The latents of the pictures that are edited, one row for each of `pictures` of the result; nothing is drawn for them.
fn picture_latents(parts: &Parts, start: &Start, pictures: usize) -> Result<Tensor> {
    let latents = match start {
        Start::Latents(latents) => latents.to_dtype(parts.denoiser()?.dtype)?,
        Start::Pixels(pixels) => most_likely(parts, pixels, ENCODING.scaling)?,
    };
    tiled(&latents, pictures)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_takes_the_trained_size_of_the_nearest_shape() {
        assert_eq!(nearest_trained_size(64, 64), (1024, 1024));
        assert_eq!(nearest_trained_size(1920, 1080), (1392, 752));
        assert_eq!(nearest_trained_size(100, 4000), (672, 1568));
        assert_eq!(nearest_trained_size(4000, 100), (1568, 672));
    }
}
