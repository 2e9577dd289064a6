//! Flux steered by ControlNets (diffusers `FluxControlNetPipeline`, `FluxMultiControlNetModel`): they read the latents of
//! control pictures, those of XLabs the pictures themselves, and what they say is added after the transformer's blocks.
//! A union net is told with a number what a picture shows.

use candle_core::Tensor;
use dw_core::{arguments::Arguments, artifact::Entry};
use image::DynamicImage;
use serde_json::Value;

use super::{
    Call, check_inputs, class_schema,
    control::{check_prompts, picture_latents, picture_pixels},
    guided_groups, size,
    transformer::{grid, packed},
    with_class_defaults,
};
use crate::{
    Error, Result,
    models::{FluxConfig, FluxControlNetInput, FluxControlNetModel, FluxInput, FluxResiduals},
    nn::Rotary,
    pipelines::{
        arguments::{Defaults, Modes, group, group_schema, refuse_unknown},
        call::Surroundings,
        components::Parts,
        control::{Acting, ControlArguments, ControlModes, ControlPictures, acting, all_pictures},
        text_to_image::refuse,
    },
    rng::Generators,
};

const DEFAULTS: Defaults = &[("guidance_scale", 7.0)];

/// The argument that holds the pictures.
const NAME: &str = "control_image";

/// The arguments of the class.
pub(crate) fn schema() -> Value {
    let more = [group_schema::<ControlPictures>(), group_schema::<ControlModes>(), group_schema::<ControlArguments>()];
    class_schema("FluxControlNetPipeline", guided_groups().into_iter().chain(more), &[DEFAULTS])
}

/// One call.
pub(crate) fn run(parts: &Parts, arguments: &Arguments, surroundings: Surroundings<'_>) -> Result<Entry> {
    refuse_unknown(parts.class, arguments, &schema())?;
    let arguments = &with_class_defaults(arguments, DEFAULTS);
    check_inputs(parts)?;
    let control = ControlCall::read(parts, arguments)?;
    let size = size(parts, arguments, surroundings.context)?;
    let call = Call::new(parts, arguments, size, surroundings.generators)?;
    for net in &control.nets {
        check_prompts(NAME, net.pictures.len(), call.prompts.count)?;
    }
    let mut scheduler = call.scheduler()?;

    let indices = 0..scheduler.timesteps().len();
    let mut conditioned = call.conditioned(surroundings.context)?;
    let words = conditioned.positive.embeddings.embeds.dim(1)?;
    conditioned.control = Some(control.prepare(&call, (words, indices.len()), surroundings.generators)?);
    let latents = call.noise(&*scheduler, surroundings.generators)?;
    call.denoised(conditioned, latents, &mut *scheduler, (indices, None), surroundings)
}

/// What a call says about its ControlNets, checked.
struct ControlCall<'a> {
    nets: Vec<NetCall<'a>>,
}

/// A net with one kind of picture. A union net that is given several is there several times.
struct NetCall<'a> {
    model: &'a FluxControlNetModel,
    /// One picture, or one for each prompt.
    pictures: Vec<&'a DynamicImage>,
    mode: Option<usize>,
    acting: Acting,
}

impl<'a> ControlCall<'a> {
    fn read(parts: &'a Parts, arguments: &'a Arguments) -> Result<Self> {
        let models = parts.flux_controlnets()?;
        let ControlPictures { control_image } = group(arguments)?;
        let pictures = all_pictures(arguments, NAME, control_image)?;
        let ControlModes { control_mode } = group(arguments)?;
        check_alike(&models)?;
        let is_given_several = control_mode.as_ref().is_some_and(|modes| modes.len() > 1);
        let shared = |models: &[&'a FluxControlNetModel]| match models {
            [model] if is_given_several => Some(*model),
            _ => None,
        };
        let (models, lists): (Vec<_>, Vec<Vec<_>>) = match (models.as_slice(), shared(&models)) {
            (_, Some(model)) => pictures.into_iter().map(|picture| (model, vec![picture])).unzip(),
            ([model], None) => (vec![*model], vec![pictures]),
            (several, None) if several.len() == pictures.len() => {
                (models, pictures.into_iter().map(|picture| vec![picture]).collect())
            }
            (several, None) => {
                let (found, count) = (pictures.len(), several.len());
                return Err(refuse(NAME, format!("has {found} picture(s) for {count} ControlNets; give one for each")));
            }
        };
        let modes = of_each(control_mode.as_ref(), &models)?;
        let acting = acting(arguments, models.len(), "control picture(s)")?;
        let each = models.into_iter().zip(lists).zip(modes).zip(acting);
        let net = |(((model, pictures), mode), acting)| NetCall { model, pictures, mode, acting };
        Ok(Self { nets: each.map(net).collect() })
    }

    /// The nets ready to act in a call with prompts of `words` tokens and `steps` timesteps.
    fn prepare(
        self,
        call: &Call<'_>,
        (words, steps): (usize, usize),
        generators: &mut Generators,
    ) -> Result<Control<'a>> {
        let (rows, columns) = call.tokens();
        let positions = grid(rows, columns, 0);
        let net = |net: NetCall<'a>| {
            let condition = if net.model.reads_pixels() {
                picture_pixels(call, &net.pictures)?
            } else {
                packed(&picture_latents(call, &net.pictures, generators)?)?
            };
            let config = &net.model.config().transformer;
            let rotary = config.rotary(&positions, net.model.words(words), &call.parts.device)?;
            Ok(Net { model: net.model, condition, mode: net.mode, acting: net.acting, rotary })
        };
        let each = |count: fn(&FluxConfig) -> usize| {
            let counts: Vec<usize> = self.nets.iter().map(|net| count(&net.model.config().transformer)).collect();
            shared_count(&counts)
        };
        let (blocks, single_blocks) = (each(|config| config.num_layers), each(|config| config.num_single_layers));
        let nets = self.nets.into_iter().map(net).collect::<Result<_>>()?;
        Ok(Control { nets, steps, blocks, single_blocks })
    }
}

/// Refuses nets that read pictures beside ones that read latents.
fn check_alike(models: &[&FluxControlNetModel]) -> Result<()> {
    if models.windows(2).all(|pair| pair[0].reads_pixels() == pair[1].reads_pixels()) {
        return Ok(());
    }
    Err(Error::Unsupported(
        "ControlNets that read pixels (those of XLabs) and ones that read latents cannot act together; use nets of one \
         kind"
            .into(),
    ))
}

/// The kind of picture that each net is given; none for nets that know one kind only.
fn of_each(given: Option<&Modes>, models: &[&FluxControlNetModel]) -> Result<Vec<Option<usize>>> {
    let name = "control_mode";
    let modes = match given {
        Some(modes) => modes.for_each(name, models.len(), "control picture(s)")?,
        None => vec![None; models.len()],
    };
    let mode = |(model, mode): (&&FluxControlNetModel, Option<usize>)| match (model.config().num_mode, mode) {
        (None, _) => Ok(None),
        (Some(known), Some(mode)) if mode < known => Ok(Some(mode)),
        (Some(known), Some(mode)) => {
            Err(refuse(name, format!("has `{mode}`, but this ControlNet knows 0 to {}", known.saturating_sub(1))))
        }
        (Some(_), None) => {
            Err(refuse(name, "is missing; say with a number what each union ControlNet's picture shows"))
        }
    };
    models.iter().zip(modes).map(mode).collect()
}

/// After how many blocks something is added where the nets have something for `counts` of them: those that all know
/// which know any. Where the first net has nothing, the reference leaves out what the others have.
fn shared_count(counts: &[usize]) -> usize {
    match counts.first() {
        None | Some(0) => 0,
        Some(_) => counts.iter().copied().filter(|&count| count > 0).min().unwrap_or(0),
    }
}

/// The ControlNets of a call, with the latents of their pictures.
pub(super) struct Control<'a> {
    nets: Vec<Net<'a>>,
    /// How many timesteps are run.
    steps: usize,
    /// How many of each net's additions count, for either kind of the transformer's blocks.
    blocks: usize,
    single_blocks: usize,
}

struct Net<'a> {
    model: &'a FluxControlNetModel,
    /// A row for each picture of the result: packed latents, or pixels for a net that reads them.
    condition: Tensor,
    mode: Option<usize>,
    acting: Acting,
    rotary: Rotary,
}

impl Control<'_> {
    /// What is added after the transformer's blocks at place `index` of the schedule; none where no net acts.
    pub(super) fn residuals(&self, input: &FluxInput<'_>, index: usize) -> Result<Option<FluxResiduals>> {
        let mut sum: Option<FluxResiduals> = None;
        for net in &self.nets {
            let scale = net.acting.at(index, self.steps);
            if scale != 0.0 {
                let input = FluxInput { rotary: &net.rotary, ..*input };
                let condition = &net.condition;
                let call = FluxControlNetInput { input, condition, mode: net.mode, scale };
                let mut residuals = net.model.forward(&call)?;
                residuals.blocks.truncate(self.blocks);
                residuals.single_blocks.truncate(self.single_blocks);
                sum = Some(match sum {
                    Some(sum) => sum.add(&residuals)?,
                    None => residuals,
                });
            }
        }
        Ok(sum)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nets_of_several_depths_add_as_much_as_the_shallowest_has() {
        assert_eq!(shared_count(&[5, 2, 4]), 2);
        assert_eq!(shared_count(&[5, 0, 4]), 4);
        assert_eq!(shared_count(&[0, 3]), 0);
        assert_eq!(shared_count(&[]), 0);
    }
}
