//! ControlNets of transformers in a call: they read the latents of control pictures, and what they say is added after
//! the transformer's blocks (diffusers `StableDiffusion3ControlNetPipeline`, `SD3MultiControlNetModel`).
//!
//! Several nets act together: their additions are summed. Outside a net's window nothing is added.

use candle_core::Tensor;
use dw_core::arguments::Arguments;
use image::DynamicImage;
use schemars::JsonSchema;
use serde::Deserialize;

use super::{
    arguments::group,
    components::Parts,
    control::{Acting, acting},
    decode::Scaling,
    fit::Fit,
    image_prompt::Handles,
    image_to_image::{Encoding, Pictures, encoded, pictures},
    inpaint::at_latents,
    prompt::repeat_rows,
    text_to_image::refuse,
    unet::scale_factor,
};
use crate::{
    Error, Result,
    models::{Sd3ControlNetInput, Sd3ControlNetModel, Sd3Input, Sd3Transformer2DModel},
    rng::Generators,
};

/// The argument that holds the pictures.
const NAME: &str = "control_image";

/// The argument that holds the masks.
const MASK: &str = "control_mask";

/// What ControlNets are shown.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(default)]
pub(crate) struct LatentControlPictures {
    /// The control picture (edges, depth, a pose), resized to the size of the call. With several ControlNets a list with
    /// one entry for each, which may be a list with one for each prompt; with one ControlNet a list has one for each
    /// prompt.
    pub(crate) control_image: Option<Handles>,
}

/// What ControlNets for inpainting are shown beside the picture.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(default)]
pub(crate) struct LatentControlMasks {
    /// White where `control_image` is painted anew, black where it is kept; greys count as the nearer of the two. Resized
    /// as the picture is. One mask, or one for each picture.
    pub(crate) control_mask: Option<Pictures>,
}

/// The prompts of a call, and how many pictures each becomes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rows {
    pub(crate) prompts: usize,
    pub(crate) for_each: usize,
}

/// What a call says about its ControlNets, checked.
pub(crate) struct LatentControlCall<'a> {
    nets: Vec<NetCall<'a>>,
    /// Where pictures are painted, for nets that are made for that: one mask, or one for each prompt.
    masks: Option<Vec<&'a DynamicImage>>,
}

struct NetCall<'a> {
    model: &'a Sd3ControlNetModel,
    /// One picture, or one for each prompt.
    pictures: Vec<&'a DynamicImage>,
    acting: Acting,
}

impl<'a> LatentControlCall<'a> {
    /// Reads a call with one picture, or list of pictures, for each net.
    pub(crate) fn read(parts: &'a Parts, arguments: &'a Arguments) -> Result<Self> {
        let models = parts.sd3_controlnets()?;
        let extra = models.iter().map(|model| model.config().extra_conditioning_channels).find(|&extra| extra > 0);
        if let Some(extra) = extra {
            return Err(Error::Unsupported(format!(
                "the ControlNet reads {extra} channel(s) beside the control picture: it is made for inpainting; use \
                 `StableDiffusion3ControlNetInpaintingPipeline`"
            )));
        }
        Self::of(models, arguments, None)
    }

    /// Reads a call with one picture, or list of pictures, for each net, and masks for all of them.
    pub(crate) fn read_inpainting(parts: &'a Parts, arguments: &'a Arguments) -> Result<Self> {
        let models = parts.sd3_controlnets()?;
        let extra = models.iter().map(|model| model.config().extra_conditioning_channels).find(|&extra| extra != 1);
        if let Some(extra) = extra {
            return Err(Error::Unsupported(format!(
                "the ControlNet reads {extra} channels beside the control picture, where one for inpainting reads 1; use a \
                 ControlNet made for inpainting, or `StableDiffusion3ControlNetPipeline`"
            )));
        }
        let LatentControlMasks { control_mask } = group(arguments)?;
        let handles = control_mask.as_ref().map_or(&[][..], Pictures::handles);
        if handles.is_empty() {
            return Err(refuse(
                MASK,
                format!("is missing; give a picture that is white where `{NAME}` is painted anew"),
            ));
        }
        let masks = pictures((MASK, "a picture"), arguments, handles)?;
        Self::of(models, arguments, Some(masks))
    }

    fn of(
        models: Vec<&'a Sd3ControlNetModel>,
        arguments: &'a Arguments,
        masks: Option<Vec<&'a DynamicImage>>,
    ) -> Result<Self> {
        let count = models.len();
        let LatentControlPictures { control_image } = group(arguments)?;
        let Some(given) = control_image else {
            return Err(refuse(NAME, "is missing; give the picture that steers the result"));
        };
        let lists = given.shared_out(NAME, (count, "ControlNets"))?;
        let acting = acting(arguments, count, "ControlNet(s)")?;
        let net = |((model, handles), acting): ((_, Vec<_>), _)| {
            Ok(NetCall { model, pictures: pictures((NAME, "a picture"), arguments, &handles)?, acting })
        };
        let nets = models.into_iter().zip(lists).zip(acting).map(net).collect::<Result<_>>()?;
        Ok(Self { nets, masks })
    }

    /// Refuses lists of pictures that do not go with the prompts.
    pub(crate) fn check_prompts(&self, prompts: usize) -> Result<()> {
        let lists = self.nets.iter().map(|net| (NAME, net.pictures.len()));
        let masks = self.masks.iter().map(|masks| (MASK, masks.len()));
        match lists.chain(masks).find(|&(_, count)| count != 1 && count != prompts) {
            None => Ok(()),
            Some((name, count)) => Err(refuse(
                name,
                format!("has {count} pictures for {prompts} prompt(s); give one, or one for each prompt"),
            )),
        }
    }

    /// The nets ready to act in a call of `steps` timesteps at `size`, in both halves when it is guided.
    ///
    /// The reference encodes the pictures with noise of torch's global generator, which nothing seeds; here it is at
    /// its start, as in a fresh process, and the call's own generators are left alone.
    pub(crate) fn prepare(
        self,
        parts: &Parts,
        size: (usize, usize),
        rows: Rows,
        (is_guided, steps): (bool, usize),
    ) -> Result<LatentControl<'a>> {
        let fit = Fit::whole(size);
        let of_first = self.nets.first().is_none_or(|net| net.model.config().force_zeros_for_pooled_projection);
        // The first net decides for all of them; where they are made for inpainting, none reads pooled text.
        let zeroes_pooled = of_first || self.masks.is_some();
        let scaling = if of_first && self.masks.is_none() { Scaling::Factor } else { Scaling::Shifted };
        let encoding = Encoding { scaling, upcast: false, for_each_picture: false };
        let doubled =
            |tensor: Tensor| -> Result<_> { Ok(if is_guided { Tensor::cat(&[&tensor, &tensor], 0)? } else { tensor }) };
        let mask = self.masks.map(|masks| rows.of(&masks, |mask| fit.mask(mask, &parts.device))).transpose()?;
        let mut generators = Generators::unseeded();
        let mut nets = Vec::with_capacity(self.nets.len());
        for net in self.nets {
            let pixels = rows.of(&net.pictures, |picture| fit.signed(picture, &parts.device))?;
            let condition = match &mask {
                None => {
                    let pixels = doubled(pixels)?;
                    encoded(parts, &pixels, pixels.dim(0)?, encoding, &mut generators)?
                }
                Some(mask) => {
                    let kept = mask.affine(-1.0, 1.0)?;
                    // Black where it is painted.
                    let masked = (pixels.broadcast_mul(&kept)?.broadcast_sub(mask))?;
                    let latents = encoded(parts, &masked, masked.dim(0)?, encoding, &mut generators)?;
                    let kept = at_latents(&kept, scale_factor(parts))?.to_dtype(latents.dtype())?;
                    doubled(Tensor::cat(&[&latents, &kept], 1)?)?
                }
            };
            nets.push(Net { model: net.model, condition, acting: net.acting });
        }
        Ok(LatentControl { nets, zeroes_pooled, steps })
    }
}

impl Rows {
    /// One tensor of each picture as often as it is drawn, `(rows, …)`.
    fn of(self, pictures: &[&DynamicImage], tensor: impl Fn(&DynamicImage) -> Result<Tensor>) -> Result<Tensor> {
        let tensors = pictures.iter().map(|picture| tensor(picture)).collect::<Result<Vec<_>>>()?;
        let times = if pictures.len() == 1 { self.prompts * self.for_each } else { self.for_each };
        repeat_rows(&Tensor::cat(&tensors, 0)?, times)
    }
}

/// The ControlNets of a call, with the latents of their pictures.
pub(crate) struct LatentControl<'a> {
    nets: Vec<Net<'a>>,
    /// Whether the nets are given zeros for the pooled text.
    zeroes_pooled: bool,
    /// How many timesteps are run.
    steps: usize,
}

struct Net<'a> {
    model: &'a Sd3ControlNetModel,
    /// A row for each row of the transformer's batch.
    condition: Tensor,
    acting: Acting,
}

impl LatentControl<'_> {
    /// What is added after the transformer's blocks at place `index` of the schedule; nothing when no net acts.
    pub(crate) fn residuals(
        &self,
        transformer: &Sd3Transformer2DModel,
        input: &Sd3Input<'_>,
        index: usize,
    ) -> Result<Vec<Tensor>> {
        let pooled =
            if self.zeroes_pooled { input.pooled_projections.zeros_like()? } else { input.pooled_projections.clone() };
        let input = Sd3Input { pooled_projections: &pooled, ..*input };
        let mut sum: Option<Vec<Tensor>> = None;
        for net in &self.nets {
            let scale = net.acting.at(index, self.steps);
            if scale == 0.0 {
                continue;
            }
            let residuals = net.residuals(transformer, &input, scale)?;
            sum = Some(match sum {
                None => residuals,
                Some(sum) => {
                    let pairs = sum.iter().zip(&residuals);
                    pairs.map(|(one, other)| one + other).collect::<candle_core::Result<_>>()?
                }
            });
        }
        let mut sum = sum.unwrap_or_default();
        sum.truncate(self.depth());
        Ok(sum)
    }

    /// How many blocks all nets have. The others' last ones say nothing, even where a net with fewer does not act.
    fn depth(&self) -> usize {
        self.nets.iter().map(|net| net.model.config().num_layers).min().unwrap_or(0)
    }
}

impl Net<'_> {
    fn residuals(&self, transformer: &Sd3Transformer2DModel, input: &Sd3Input<'_>, scale: f64) -> Result<Vec<Tensor>> {
        let tokens = (!self.model.config().use_pos_embed).then(|| transformer.embedded(input.sample)).transpose()?;
        self.model.forward(&Sd3ControlNetInput {
            sample: input.sample,
            tokens: tokens.as_ref(),
            condition: &self.condition,
            timestep: input.timestep,
            encoder_hidden_states: input.encoder_hidden_states,
            pooled_projections: input.pooled_projections,
            scale,
        })
    }
}
