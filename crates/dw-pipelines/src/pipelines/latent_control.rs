//! ControlNets of transformers in a call: they read the latents of control pictures, and what they say is added after
//! the transformer's blocks (diffusers `StableDiffusion3ControlNetPipeline`, `SD3MultiControlNetModel`).
//!
//! Several nets act together: their additions are summed. Outside a net's window nothing is added.

use candle_core::Tensor;
use dw_core::arguments::Arguments;
use image::DynamicImage;

use super::{
    arguments::group,
    components::Parts,
    control::{Acting, ControlPictures, acting, all_pictures},
    decode::Scaling,
    fit::Fit,
    image_to_image::{Encoding, encoded},
    prompt::repeat_rows,
    text_to_image::refuse,
};
use crate::{
    Error, Result,
    models::{Sd3ControlNetInput, Sd3ControlNetModel, Sd3Input, Sd3Transformer2DModel},
    rng::Generators,
};

/// The argument that holds the pictures.
const NAME: &str = "control_image";

/// The prompts of a call, and how many pictures each becomes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rows {
    pub(crate) prompts: usize,
    pub(crate) for_each: usize,
}

/// What a call says about its ControlNets, checked.
pub(crate) struct LatentControlCall<'a> {
    nets: Vec<NetCall<'a>>,
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
        let ControlPictures { control_image } = group(arguments)?;
        let pictures = all_pictures(arguments, NAME, control_image)?;
        let count = models.len();
        if count > 1 && pictures.len() != count {
            let reason = format!("has {} picture(s) for {count} ControlNets; give one for each", pictures.len());
            return Err(refuse(NAME, reason));
        }
        for model in &models {
            let extra = model.config().extra_conditioning_channels;
            if extra > 0 {
                return Err(Error::Unsupported(format!(
                    "the ControlNet reads {extra} channel(s) beside the control picture (it is made for inpainting); use \
                     one that reads pictures alone"
                )));
            }
        }
        let lists: Vec<Vec<&DynamicImage>> =
            if count == 1 { vec![pictures] } else { pictures.into_iter().map(|picture| vec![picture]).collect() };
        let acting = acting(arguments, count, "ControlNet(s)")?;
        let net = |((model, pictures), acting)| NetCall { model, pictures, acting };
        Ok(Self { nets: models.into_iter().zip(lists).zip(acting).map(net).collect() })
    }

    /// Refuses lists of pictures that do not go with the prompts.
    pub(crate) fn check_prompts(&self, prompts: usize) -> Result<()> {
        match self.nets.iter().map(|net| net.pictures.len()).find(|&count| count != 1 && count != prompts) {
            None => Ok(()),
            Some(count) => Err(refuse(
                NAME,
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
        let mut generators = Generators::unseeded();
        let mut nets = Vec::with_capacity(self.nets.len());
        for net in self.nets {
            let pixels = net.pictures.iter().map(|picture| Fit::whole(size).signed(picture, &parts.device));
            let times = if net.pictures.len() == 1 { rows.prompts * rows.for_each } else { rows.for_each };
            let pixels = repeat_rows(&Tensor::cat(&pixels.collect::<Result<Vec<_>>>()?, 0)?, times)?;
            let pixels = if is_guided { Tensor::cat(&[&pixels, &pixels], 0)? } else { pixels };
            let is_shifted = !net.model.config().force_zeros_for_pooled_projection;
            let scaling = if is_shifted { Scaling::Shifted } else { Scaling::Factor };
            let encoding = Encoding { scaling, upcast: false, for_each_picture: false };
            let condition = encoded(parts, &pixels, pixels.dim(0)?, encoding, &mut generators)?;
            nets.push(Net { model: net.model, condition, acting: net.acting });
        }
        Ok(LatentControl { nets, steps })
    }
}

/// The ControlNets of a call, with the latents of their pictures.
pub(crate) struct LatentControl<'a> {
    nets: Vec<Net<'a>>,
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
        let mut sum: Option<Vec<Tensor>> = None;
        for net in &self.nets {
            let scale = net.acting.at(index, self.steps);
            if scale == 0.0 {
                continue;
            }
            let residuals = net.residuals(transformer, input, scale)?;
            sum = Some(match sum {
                None => residuals,
                Some(sum) => {
                    let pairs = sum.iter().zip(&residuals);
                    pairs.map(|(one, other)| one + other).collect::<candle_core::Result<_>>()?
                }
            });
        }
        Ok(sum.unwrap_or_default())
    }
}

impl Net<'_> {
    fn residuals(&self, transformer: &Sd3Transformer2DModel, input: &Sd3Input<'_>, scale: f64) -> Result<Vec<Tensor>> {
        let config = self.model.config();
        let tokens = (!config.use_pos_embed).then(|| transformer.embedded(input.sample)).transpose()?;
        let pooled = if config.force_zeros_for_pooled_projection {
            input.pooled_projections.zeros_like()?
        } else {
            input.pooled_projections.clone()
        };
        self.model.forward(&Sd3ControlNetInput {
            sample: input.sample,
            tokens: tokens.as_ref(),
            condition: &self.condition,
            timestep: input.timestep,
            encoder_hidden_states: input.encoder_hidden_states,
            pooled_projections: &pooled,
            scale,
        })
    }
}
