//! ControlNets in a call: which pictures steer it, how strongly and in which of its steps, and what that adds to the
//! UNet (Zhang, Rao and Agrawala 2023; diffusers `MultiControlNetModel`, `MultiControlNetUnionModel`).
//!
//! Several nets act one after the other and their additions are summed. Outside a net's window nothing is added.

use candle_core::Tensor;
use dw_core::arguments::Arguments;
use image::DynamicImage;
use schemars::JsonSchema;
use serde::Deserialize;

use super::{
    arguments::{Modes, Numbers, group},
    components::{ControlModel, Parts},
    fit::{Fit, own_size},
    image_to_image::{Pictures, pictures},
    prompt::repeat_rows,
    text_to_image::refuse,
    unet::side_multiple,
};
use crate::{
    Error, Result,
    models::{AddedConditions, ControlNetInput, ControlNetOutput, ControlNetUnionInput, UnetInput},
};

/// How ControlNets act.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(default)]
pub(crate) struct ControlArguments {
    /// How strongly the control picture acts; a list has one number for each ControlNet, or for each picture of a
    /// union ControlNet.
    pub(crate) controlnet_conditioning_scale: Numbers,
    /// The fraction of the steps after which control begins, 0 to 1; a list as for the scale.
    pub(crate) control_guidance_start: Numbers,
    /// The fraction of the steps after which control ends, 0 to 1; a list as for the scale.
    pub(crate) control_guidance_end: Numbers,
}

/// Whether the prompt is left aside.
#[derive(Clone, Copy, Debug, Default, Deserialize, JsonSchema)]
#[serde(default)]
pub(crate) struct GuessMode {
    /// Follows the control picture even where the prompt says nothing: only the prompted half of each step is
    /// steered, and coarse structure more than detail.
    pub(crate) guess_mode: bool,
}

impl Default for ControlArguments {
    fn default() -> Self {
        Self {
            controlnet_conditioning_scale: 1.0.into(),
            control_guidance_start: 0.0.into(),
            control_guidance_end: 1.0.into(),
        }
    }
}

/// The control picture of text to image, where there is no other picture.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(default)]
pub(crate) struct ControlAsImage {
    /// The control picture (edges, depth, a pose), resized to the size of the call; the call has its size when it
    /// names none. With several ControlNets a list, one for each; with one, a list has one for each prompt.
    pub(crate) image: Option<Pictures>,
}

/// The control picture beside other pictures.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(default)]
pub(crate) struct ControlPictures {
    /// The control picture (edges, depth, a pose), resized to the size of the call. With several ControlNets, or a
    /// union ControlNet, a list with one for each net or kind; with one ControlNet a list has one for each prompt.
    pub(crate) control_image: Option<Pictures>,
}

/// The kinds of pictures that a union ControlNet is given.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(default)]
pub(crate) struct ControlModes {
    /// What each control picture shows, as a number that the union ControlNet knows (its documentation lists them);
    /// one, or a list with one for each picture.
    pub(crate) control_mode: Option<Modes>,
}

/// How strongly and when a picture acts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Acting {
    scale: f64,
    start: f64,
    end: f64,
}

/// A ControlNet with its pictures, as a call gives them.
struct NetCall<'a> {
    model: ControlModel<'a>,
    /// For each kind of picture one picture, or one for each prompt.
    pictures: Vec<Vec<&'a DynamicImage>>,
    /// The kinds; for union ControlNets.
    kinds: Vec<usize>,
    acting: Vec<Acting>,
}

/// What a call says about its ControlNets, checked.
pub(crate) struct ControlCall<'a> {
    /// The argument that holds the pictures.
    name: &'static str,
    nets: Vec<NetCall<'a>>,
    is_guess: bool,
}

impl<'a> ControlCall<'a> {
    /// Reads a call with one picture, or list of pictures, for each net. `name` is the argument that holds them.
    pub(crate) fn read(
        parts: &'a Parts,
        arguments: &'a Arguments,
        name: &'static str,
        given: Option<Pictures>,
    ) -> Result<Self> {
        let models = parts.controlnets()?;
        if models.iter().any(|model| matches!(model, ControlModel::Union(_))) {
            let reason = "is a union ControlNet; use `StableDiffusionXLControlNetUnionPipeline` for it";
            return Err(Error::Unsupported(format!("component `controlnet` {reason}")));
        }
        let pictures = all_pictures(arguments, name, given)?;
        let (count, is_single) = (models.len(), models.len() == 1);
        if !is_single && pictures.len() != count {
            let reason = format!("has {} picture(s) for {count} ControlNets; give one for each", pictures.len());
            return Err(refuse(name, reason));
        }
        let mut pictures: Vec<Vec<&DynamicImage>> =
            if is_single { vec![pictures] } else { pictures.into_iter().map(|picture| vec![picture]).collect() };
        let acting = acting(arguments, count, "ControlNet(s)")?;
        let GuessMode { guess_mode: is_guess } = group(arguments)?;
        let net = |((model, acting), pictures): ((ControlModel<'a>, Acting), Vec<&'a DynamicImage>)| NetCall {
            model,
            pictures: vec![pictures],
            kinds: Vec::new(),
            acting: vec![acting],
        };
        let nets = models.into_iter().zip(acting).zip(pictures.drain(..)).map(net).collect();
        Self { name, nets, is_guess }.checked()
    }

    /// Reads a call of union ControlNets: one net with a picture for each kind, or several with one picture each.
    pub(crate) fn read_union(parts: &'a Parts, arguments: &'a Arguments) -> Result<Self> {
        let name = "control_image";
        let models = parts.controlnets()?;
        if models.iter().any(|model| matches!(model, ControlModel::Plain(_))) {
            let reason = "is no union ControlNet; use `StableDiffusionXLControlNetPipeline` for it";
            return Err(Error::Unsupported(format!("component `controlnet` {reason}")));
        }
        let ControlPictures { control_image } = group(arguments)?;
        let pictures = all_pictures(arguments, name, control_image)?;
        let kinds = kinds(arguments, pictures.len())?;
        let acting = acting(arguments, pictures.len(), "control picture(s)")?;
        let GuessMode { guess_mode: is_guess } = group(arguments)?;
        let nets = if let [model] = models[..] {
            let pictures = pictures.into_iter().map(|picture| vec![picture]).collect();
            vec![NetCall { model, pictures, kinds, acting }]
        } else if models.len() == pictures.len() {
            let each = models.into_iter().zip(pictures).zip(kinds).zip(acting);
            each.map(|(((model, picture), kind), acting)| NetCall {
                model,
                pictures: vec![vec![picture]],
                kinds: vec![kind],
                acting: vec![acting],
            })
            .collect()
        } else {
            let (found, count) = (pictures.len(), models.len());
            return Err(refuse(name, format!("has {found} picture(s) for {count} ControlNets; give one for each")));
        };
        Self { name, nets, is_guess }.checked()
    }

    /// Checks the nets themselves.
    fn checked(mut self) -> Result<Self> {
        for net in &self.nets {
            let channels = net.model.condition().conditioning_channels;
            if channels != 3 {
                return Err(Error::Unsupported(format!(
                    "the ControlNet reads pictures of {channels} channels; use one that reads colour pictures"
                )));
            }
            let known = net.model.kinds();
            if let Some(kind) = net.kinds.iter().find(|kind| **kind >= known) {
                let reason = format!("has `{kind}`, but this ControlNet knows 0 to {}", known.saturating_sub(1));
                return Err(refuse("control_mode", reason));
            }
        }
        self.is_guess |= self.nets.first().is_some_and(|net| net.model.condition().global_pool_conditions);
        Ok(self)
    }

    /// Height and width that a call has when it names none: those of the first control picture.
    pub(crate) fn picture_size(&self, parts: &Parts) -> Result<(usize, usize)> {
        let first = self.nets.first().and_then(|net| net.pictures.first()?.first().copied());
        first.map_or_else(
            || Err(refuse(self.name, "is missing")),
            |first| own_size(self.name, first, side_multiple(parts)),
        )
    }

    /// Refuses lists of pictures that do not go with the prompts.
    pub(crate) fn check_prompts(&self, prompts: usize) -> Result<()> {
        let lists = || self.nets.iter().flat_map(|net| &net.pictures);
        match lists().find(|list| list.len() != 1 && list.len() != prompts) {
            None => Ok(()),
            Some(list) => Err(refuse(
                self.name,
                format!("has {} pictures for {prompts} prompt(s); give one, or one for each prompt", list.len()),
            )),
        }
    }

    /// The nets ready to act in a call that runs the schedule's steps from `first` up to `end`.
    pub(crate) fn prepare(
        self,
        parts: &Parts,
        fit: Fit,
        (prompts, for_each_prompt): (usize, usize),
        (first, end): (usize, usize),
    ) -> Result<Control<'a>> {
        let several = self.nets.len() > 1;
        let rows = |list: &Vec<&DynamicImage>| {
            let rows = list.iter().map(|picture| fit.unit(picture, &parts.device)).collect::<Result<Vec<_>>>()?;
            let times = if list.len() == 1 { prompts * for_each_prompt } else { for_each_prompt };
            repeat_rows(&Tensor::cat(&rows, 0)?, times)
        };
        let net = |net: NetCall<'a>| {
            let pictures = net.pictures.iter().map(rows).collect::<Result<Vec<_>>>()?;
            Ok(Net { model: net.model, pictures, kinds: net.kinds, acting: net.acting, is_one_of_many: several })
        };
        let nets = self.nets.into_iter().map(net).collect::<Result<Vec<_>>>()?;
        Ok(Control { nets, is_guess: self.is_guess, first, total: end - first })
    }
}

/// The control pictures behind the argument `name`; none is an error.
pub(crate) fn all_pictures<'a>(
    arguments: &'a Arguments,
    name: &str,
    given: Option<Pictures>,
) -> Result<Vec<&'a DynamicImage>> {
    match given {
        Some(given) if !given.handles().is_empty() => pictures((name, "a picture"), arguments, given.handles()),
        _ => Err(refuse(name, "is missing; give the picture that steers the result")),
    }
}

/// Scale and window of each of `count` things (`of` says what they are).
pub(crate) fn acting(arguments: &Arguments, count: usize, of: &str) -> Result<Vec<Acting>> {
    let given: ControlArguments = group(arguments)?;
    let (start_name, end_name) = ("control_guidance_start", "control_guidance_end");
    let scales = given.controlnet_conditioning_scale.for_each("controlnet_conditioning_scale", count, of)?;
    let starts = given.control_guidance_start.for_each(start_name, count, of)?;
    let ends = given.control_guidance_end.for_each(end_name, count, of)?;
    let each = scales.into_iter().zip(starts).zip(ends);
    let acting = each.map(|((scale, start), end)| {
        for (name, value) in [(start_name, start), (end_name, end)] {
            if !(0.0..=1.0).contains(&value) {
                return Err(refuse(name, format!("must lie between 0 and 1, found `{value}`")));
            }
        }
        if start >= end {
            let reason = format!("must be smaller than `{end_name}`, found `{start}` and `{end}`");
            return Err(refuse(start_name, reason));
        }
        Ok(Acting { scale, start, end })
    });
    acting.collect()
}

/// The kind of each of `count` pictures.
pub(crate) fn kinds(arguments: &Arguments, count: usize) -> Result<Vec<usize>> {
    let name = "control_mode";
    let ControlModes { control_mode } = group(arguments)?;
    let Some(modes) = control_mode else {
        return Err(refuse(name, "is missing; say with a number what each control picture shows"));
    };
    let modes = modes.exactly(name, count, "control picture(s)")?;
    let known = |mode: Option<usize>| mode.ok_or_else(|| refuse(name, "has a `null`; each picture needs a number"));
    modes.into_iter().map(known).collect()
}

/// The ControlNets of a call, with their pictures at its size.
pub(crate) struct Control<'a> {
    nets: Vec<Net<'a>>,
    is_guess: bool,
    /// The first timestep that is run, and how many there are from it on.
    first: usize,
    total: usize,
}

struct Net<'a> {
    model: ControlModel<'a>,
    /// For each kind, a row for each picture of the result: `(pictures, 3, height, width)` in 0 to 1.
    pictures: Vec<Tensor>,
    kinds: Vec<usize>,
    acting: Vec<Acting>,
    is_one_of_many: bool,
}

/// Both halves of a UNet's batch, as a ControlNet is given them.
struct Rows<'a> {
    input: UnetInput<'a>,
    is_doubled: bool,
    is_guess: bool,
}

impl Control<'_> {
    /// What is added to the UNet at the timestep at `index` of the schedule, for an `input` of both halves when
    /// `is_guided`. None when no net acts.
    pub(crate) fn residuals(
        &self,
        input: UnetInput<'_>,
        index: usize,
        is_guided: bool,
    ) -> Result<Option<ControlNetOutput>> {
        let position = index.saturating_sub(self.first);
        if !(self.is_guess && is_guided) {
            return self.sum(&Rows { input, is_doubled: is_guided, is_guess: self.is_guess }, position);
        }
        // The unprompted half is left alone.
        let second = |rows: &Tensor| -> Result<Tensor> {
            let half = rows.dim(0)? / 2;
            Ok(rows.narrow(0, half, half)?)
        };
        let (sample, text) = (second(input.sample)?, second(input.encoder_hidden_states)?);
        let added = input.added.map(|added| Ok::<_, Error>((second(added.text_embeds)?, second(added.time_ids)?)));
        let added = added.transpose()?;
        let input = UnetInput {
            added: added.as_ref().map(|(text_embeds, time_ids)| AddedConditions { text_embeds, time_ids }),
            ..UnetInput::new(&sample, input.timestep, &text)
        };
        let Some(sum) = self.sum(&Rows { input, is_doubled: false, is_guess: true }, position)? else {
            return Ok(None);
        };
        let padded = |rows: &Tensor| Tensor::cat(&[&rows.zeros_like()?, rows], 0);
        let down = sum.down.iter().map(padded).collect::<candle_core::Result<Vec<_>>>()?;
        Ok(Some(ControlNetOutput { down, mid: padded(&sum.mid)? }))
    }

    fn sum(&self, rows: &Rows<'_>, position: usize) -> Result<Option<ControlNetOutput>> {
        let mut sum: Option<ControlNetOutput> = None;
        for net in &self.nets {
            let scales: Vec<f64> = net.acting.iter().map(|acting| acting.at(position, self.total)).collect();
            // A union ControlNet with several pictures adds something of its own even when none of them acts.
            if scales.len() == 1 && scales[0] == 0.0 {
                continue;
            }
            let output = net.residuals(rows, &scales)?;
            sum = Some(match sum {
                Some(sum) => sum.add(&output)?,
                None => output,
            });
        }
        Ok(sum)
    }
}

impl Acting {
    /// The scale in step `position` of `total`: 0 unless the whole step lies in the window.
    pub(crate) fn at(self, position: usize, total: usize) -> f64 {
        let fraction = |position: usize| position as f64 / total as f64;
        let is_outside = fraction(position) < self.start || fraction(position + 1) > self.end;
        if is_outside { 0.0 } else { self.scale }
    }
}

impl Net<'_> {
    fn residuals(&self, rows: &Rows<'_>, scales: &[f64]) -> Result<ControlNetOutput> {
        let row = |picture: &Tensor| -> Result<Tensor> {
            Ok(if rows.is_doubled { Tensor::cat(&[picture, picture], 0)? } else { picture.clone() })
        };
        let conditions = self.pictures.iter().map(row).collect::<Result<Vec<_>>>()?;
        // The guidance embedding of distilled UNets is none of a ControlNet's inputs.
        let unet = UnetInput { timestep_cond: None, ..rows.input };
        match self.model {
            ControlModel::Plain(model) => model.forward(&ControlNetInput {
                unet,
                condition: &conditions[0],
                scale: scales[0],
                is_guess: rows.is_guess,
            }),
            ControlModel::Union(model) => model.forward(&ControlNetUnionInput {
                unet,
                conditions: &conditions,
                control_types: &self.kinds,
                scales,
                is_guess: rows.is_guess,
                is_one_of_many: self.is_one_of_many,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_net_acts_in_the_steps_that_lie_wholly_in_its_window() {
        let acting = Acting { scale: 0.7, start: 0.25, end: 0.8 };
        let scales: Vec<f64> = (0..4).map(|position| acting.at(position, 4)).collect();
        assert_eq!(scales, [0.0, 0.7, 0.7, 0.0]);
    }
}
