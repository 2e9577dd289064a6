//! What inpainting calls of the Stable Diffusion families share: picture and mask, their way into latents, the
//! noise a call begins with, and the painted part pasted back into the whole picture.
//!
//! UNets with 4 input channels have the kept part brought back after each step ([`Kept`]); those with 9 read mask and
//! masked picture beside the latents (Rombach et al. 2022, section 4.5).

use candle_core::{D, DType, Device, Tensor};
use dw_core::{
    arguments::{Arguments, ArtifactRef},
    artifact::{Artifact, Entry},
};
use image::DynamicImage;
use schemars::JsonSchema;
use serde::Deserialize;

use super::{
    arguments::{group, optional_whole, tensor},
    call::check_decoder,
    components::{Denoiser, Parts},
    denoise::{Kept, initial_latents},
    fit::{Fit, Region, overlay, own_size},
    image_to_image::{
        Encoding, Given, Pictures, Start, StartPictures, clean_latents, encoded, latents, pictures, tiled,
    },
    text_to_image::{Generation, OutputType, refuse},
    unet::{scale_factor, side_multiple},
};
use crate::{Error, Result, rng::Generators, schedulers::Scheduler};

/// Where the picture is painted.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(default)]
pub(crate) struct MaskArguments {
    /// White where the picture is painted anew, black where it is kept; greys count as the nearer of the two. Resized
    /// as the picture is. One mask, or one for each picture.
    pub(crate) mask_image: Option<Pictures>,
    /// The encoded picture without its painted part, instead of `image` under `mask_image`: an array
    /// `(pictures, channels, height / 8, width / 8)`.
    pub(crate) masked_image_latents: Option<ArtifactRef>,
    /// Paints only the part of the picture around the mask, enlarged to the size of the call, with so many pixels
    /// around the mask; the result is pasted back into the whole picture.
    #[serde(deserialize_with = "optional_whole")]
    #[schemars(range(min = 0))]
    pub(crate) padding_mask_crop: Option<usize>,
}

impl MaskArguments {
    /// The masks; none is an error.
    pub(crate) fn handles(&self) -> Result<&[ArtifactRef]> {
        match &self.mask_image {
            Some(masks) => Ok(masks.handles()),
            None => Err(refuse("mask_image", "is missing; give a picture that is white where `image` is painted anew")),
        }
    }
}

/// The pictures of an inpainting call, at its size.
pub(crate) struct Repaint<'a> {
    start: Start,
    /// 1 where it is painted, `(masks, 1, height, width)` in f32.
    mask: Tensor,
    masked: Masked,
    pub(crate) fit: Fit,
    /// The whole picture with its mask, when only a region of it is painted.
    whole: Option<(&'a DynamicImage, &'a DynamicImage)>,
}

/// The picture without its painted part.
enum Masked {
    /// In -1 to 1, grey where it is painted: `(pictures, 3, height, width)` in f32.
    Pixels(Tensor),
    /// Encoded.
    Latents(Tensor),
    /// Latents of an earlier step cannot be masked.
    Unknown,
}

/// The picture that is painted on, at the size of the call, which latents must have already.
pub(crate) fn start(parts: &Parts, arguments: &Arguments, images: &StartPictures, fit: Fit) -> Result<Start> {
    let handles = match images.given(arguments)? {
        Given::Pictures(pictures) => return Start::pixels(&pictures, fit, &parts.device),
        Given::Arrays(handles) => handles,
    };
    let start = latents(parts, arguments, &handles)?;
    let ((height, width), _) = start.size(parts)?;
    if (height, width) == (fit.height, fit.width) {
        return Ok(start);
    }
    Err(refuse(
        "image",
        format!("has latents for `{width} x {height}` pixels, but the call is for `{} x {}`", fit.width, fit.height),
    ))
}

/// Height and width of the picture that is painted on, cut down to sides the model can take.
pub(crate) fn start_size(parts: &Parts, arguments: &Arguments) -> Result<(usize, usize)> {
    match group::<StartPictures>(arguments)?.given(arguments)? {
        Given::Arrays(handles) => Ok(latents(parts, arguments, &handles)?.size(parts)?.0),
        Given::Pictures(pictures) => own_size("image", pictures[0], side_multiple(parts)),
    }
}

/// How an inpainting call begins.
pub(crate) struct Beginning<'a> {
    pub(crate) scheduler: &'a dyn Scheduler,
    /// The first timestep that is run.
    pub(crate) index: usize,
    /// Whether nothing of the picture is left under the mask (`strength` 1).
    pub(crate) is_pure_noise: bool,
    /// Whether noise is added at all; not when another model has begun.
    pub(crate) adds_noise: bool,
    pub(crate) given_noise: Option<Tensor>,
    pub(crate) encoding: Encoding,
}

/// The first latents of an inpainting call, and what holds on to the kept part.
pub(crate) struct Opening {
    pub(crate) latents: Tensor,
    pub(crate) kept: Option<Kept>,
    /// See [`ConditionedUnet`](super::unet::ConditionedUnet).
    pub(crate) surrounding: Option<Tensor>,
}

impl<'a> Repaint<'a> {
    /// The pictures at height and width `size`; complaints about them come before anything is computed.
    pub(crate) fn read(
        parts: &Parts,
        call: &Generation,
        arguments: &'a Arguments,
        size: (usize, usize),
    ) -> Result<Self> {
        check_decoder(parts, call)?;
        let channels = UnetChannels::of(parts)?;
        let given: MaskArguments = group(arguments)?;
        let images: StartPictures = group(arguments)?;
        let masks = pictures(("mask_image", "a picture"), arguments, given.handles()?)?;
        let device = &parts.device;
        let mut fit = Fit::whole(size);
        let mut whole = None;
        if let Some(padding) = given.padding_mask_crop {
            let (picture, mask) = only_one(&images.given(arguments)?, &masks, call)?;
            let region = Region::around(mask, size, padding);
            fit.region =
                Some(region.ok_or_else(|| refuse("mask_image", "is black, so that there is nothing to paint"))?);
            whole = Some((picture, mask));
        }
        let start = start(parts, arguments, &images, fit)?;
        let masks = masks.iter().map(|mask| fit.mask(mask, device)).collect::<Result<Vec<_>>>()?;
        let mask = match masks.as_slice() {
            [] => return Err(refuse("mask_image", "is an empty list; give a mask")),
            masks => Tensor::cat(masks, 0)?,
        };
        let masked = Masked::of(parts, arguments, given.masked_image_latents, &start, &mask)?;
        if matches!((&masked, channels), (Masked::Unknown, UnetChannels::Surrounding | UnetChannels::Filled)) {
            return Err(refuse("masked_image_latents", "is missing; this model needs it where `image` is latents"));
        }
        Ok(Self { start, mask, masked, fit, whole })
    }

    /// Draws what the call begins with: for the picture, the noise and the masked picture, in this order.
    pub(crate) fn open(
        &self,
        parts: &Parts,
        pictures: usize,
        beginning: Beginning<'_>,
        generators: &mut Generators,
    ) -> Result<Opening> {
        let Beginning { scheduler, index, is_pure_noise, adds_noise, given_noise, encoding } = beginning;
        let denoiser = parts.denoiser()?;
        let channels = UnetChannels::of(parts)?;
        let is_blended = matches!(channels, UnetChannels::Latents);
        let needs_clean = is_blended || !adds_noise || (given_noise.is_none() && !is_pure_noise);
        let clean =
            if needs_clean { Some(clean_latents(parts, &self.start, pictures, encoding, generators)?) } else { None };
        let scale = scale_factor(parts);
        let shape = [pictures, denoiser.channels, self.fit.height / scale, self.fit.width / scale];
        let is_given = given_noise.is_some() && adds_noise;
        let given_noise = given_noise.filter(|_| adds_noise);
        let noise = initial_latents(given_noise, &shape, (denoiser.dtype, &parts.device), generators, 1.0)?;
        let latents = match &clean {
            Some(clean) if !adds_noise => clean.clone(),
            Some(clean) if !is_given && !is_pure_noise => scheduler.add_noise(clean, &noise, index)?,
            _ => (&noise * scheduler.init_noise_sigma())?,
        };
        let mask = match channels {
            UnetChannels::Filled => pixels_of_latents(&self.mask, scale)?,
            UnetChannels::Latents | UnetChannels::Surrounding => at_latents(&self.mask, scale)?,
        };
        let mask = tiled(&mask.to_dtype(denoiser.dtype)?, pictures)?;
        if let (UnetChannels::Latents, Some(clean)) = (channels, clean) {
            // The reference encodes the masked picture here, too, and draws for it.
            self.masked.draw(parts, scale, encoding, generators)?;
            return Ok(Opening { latents, kept: Some(Kept { mask, clean, noise }), surrounding: None });
        }
        let masked = self.masked.encoded(parts, pictures, encoding, generators)?;
        let surrounding = match channels {
            UnetChannels::Filled => Tensor::cat(&[masked, mask], 1)?,
            UnetChannels::Latents | UnetChannels::Surrounding => Tensor::cat(&[mask, masked], 1)?,
        };
        Ok(Opening { latents, kept: None, surrounding: Some(surrounding) })
    }

    /// The pictures of a result inside the whole picture, when only a region was painted.
    pub(crate) fn paste_back(&self, mut entry: Entry) -> Entry {
        let (Some((picture, mask)), Some(region)) = (self.whole, self.fit.region) else { return entry };
        for artifact in &mut entry.artifacts {
            if let Artifact::Image(painted) = artifact {
                *artifact = Artifact::image(overlay(painted, picture, mask, region));
            }
        }
        entry
    }
}

/// What a UNet reads.
#[derive(Clone, Copy, Debug)]
enum UnetChannels {
    /// Latents.
    Latents,
    /// Latents, mask and masked latents.
    Surrounding,
    /// Latents, masked latents, and the mask with all the pixels of a latent as channels (Flux Fill).
    Filled,
}

impl UnetChannels {
    fn of(parts: &Parts) -> Result<Self> {
        let Denoiser { in_channels: read, channels: predicted, .. } = parts.denoiser()?;
        if read == predicted {
            Ok(Self::Latents)
        } else if read == 2 * predicted + 1 {
            Ok(Self::Surrounding)
        } else if read == 2 * predicted + scale_factor(parts).pow(2) {
            Ok(Self::Filled)
        } else {
            Err(Error::Unsupported(format!(
                "this model's denoiser reads {read} channels; inpainting needs one that reads {predicted}, or {} with mask \
                 and masked picture; use a model made for inpainting or a plain one",
                2 * predicted + 1
            )))
        }
    }
}

impl Masked {
    fn of(
        parts: &Parts,
        arguments: &Arguments,
        given: Option<ArtifactRef>,
        start: &Start,
        mask: &Tensor,
    ) -> Result<Self> {
        if let Some(handle) = given {
            let name = "masked_image_latents";
            let masked = tensor(arguments, name, handle, parts.denoiser()?.dtype, &parts.device)?;
            let scale = scale_factor(parts);
            let wanted = [parts.denoiser()?.channels, mask.dim(2)? / scale, mask.dim(3)? / scale];
            return match masked.dims() {
                [_, rest @ ..] if *rest == wanted => Ok(Self::Latents(masked)),
                dims => Err(refuse(
                    name,
                    format!(
                        "has shape {dims:?}, but this call needs [pictures, {}, {}, {}]",
                        wanted[0], wanted[1], wanted[2]
                    ),
                )),
            };
        }
        let Start::Pixels(pixels) = start else { return Ok(Self::Unknown) };
        let (pictures, masks) = (pixels.dim(0)?, mask.dim(0)?);
        if pictures != masks && pictures != 1 && masks != 1 {
            let reason = format!("has {masks} masks for {pictures} pictures; give one, or one for each");
            return Err(refuse("mask_image", reason));
        }
        Ok(Self::Pixels(pixels.broadcast_mul(&mask.affine(-1.0, 1.0)?)?))
    }

    fn encoded(
        &self,
        parts: &Parts,
        pictures: usize,
        encoding: Encoding,
        generators: &mut Generators,
    ) -> Result<Tensor> {
        match self {
            Self::Pixels(pixels) => tiled(&encoded(parts, pixels, pictures, encoding, generators)?, pictures),
            Self::Latents(latents) => tiled(latents, pictures),
            Self::Unknown => Err(refuse("masked_image_latents", "is missing")),
        }
    }

    /// Draws what encoding would, and forgets it.
    fn draw(&self, parts: &Parts, scale: usize, encoding: Encoding, generators: &mut Generators) -> Result<()> {
        let Self::Pixels(pixels) = self else { return Ok(()) };
        let (rows, _, height, width) = pixels.dims4()?;
        let shape = [rows, parts.denoiser()?.channels, height / scale, width / scale];
        let vae = parts.vae()?;
        if !vae.is_sampled() {
            return Ok(());
        }
        let dtype = if encoding.upcast && vae.config().force_upcast { DType::F32 } else { vae.dtype() };
        generators.randn_first(&shape, dtype, &Device::Cpu)?;
        Ok(())
    }
}

/// The nearest value for each latent: `(n, 1, height, width)` to `(n, 1, height / scale, width / scale)`.
pub(crate) fn at_latents(mask: &Tensor, scale: usize) -> Result<Tensor> {
    let (rows, _, height, width) = mask.dims4()?;
    let blocks = mask.reshape((rows, height / scale, scale, width / scale, scale))?;
    Ok(blocks.narrow(2, 0, 1)?.narrow(D::Minus1, 0, 1)?.reshape((rows, 1, height / scale, width / scale))?)
}

/// All the values for each latent: `(n, 1, height, width)` to `(n, scale * scale, height / scale, width / scale)`.
fn pixels_of_latents(mask: &Tensor, scale: usize) -> Result<Tensor> {
    let (rows, _, height, width) = mask.dims4()?;
    let (down, across) = (height / scale, width / scale);
    let blocks = mask.reshape((rows, down, scale, across, scale))?.permute((0, 2, 4, 1, 3))?;
    Ok(blocks.reshape((rows, scale * scale, down, across))?)
}

/// The picture and the mask of a call that paints a region; there can only be one of each, of one size.
fn only_one<'a>(
    given: &Given<'a>,
    masks: &[&'a DynamicImage],
    call: &Generation,
) -> Result<(&'a DynamicImage, &'a DynamicImage)> {
    let name = "padding_mask_crop";
    if call.output_type != OutputType::Pil {
        return Err(refuse(name, "gives pictures only; leave `output_type` out"));
    }
    match (given, masks) {
        (Given::Pictures(pictures), [mask]) if pictures.len() == 1 => {
            let picture = pictures[0];
            if (picture.width(), picture.height()) == (mask.width(), mask.height()) {
                return Ok((picture, mask));
            }
            let (of_mask, of_picture) = ((mask.width(), mask.height()), (picture.width(), picture.height()));
            Err(refuse(
                "mask_image",
                format!(
                    "is `{} x {}` pixels, but `image` is `{} x {}`; with `padding_mask_crop` they must be of one size",
                    of_mask.0, of_mask.1, of_picture.0, of_picture.1
                ),
            ))
        }
        _ => Err(refuse(name, "works on one picture with one mask; give one of each")),
    }
}
