//! Flux steered by ControlNets (diffusers `FluxControlNetPipeline`, `FluxMultiControlNetModel`): they read the latents of
//! control pictures, and what they say is added after the transformer's blocks. A union net is told with a number what
//! a picture shows.

use candle_core::Tensor;
use dw_core::{arguments::Arguments, artifact::Entry};
use image::DynamicImage;
use serde_json::Value;

use super::{
    Call, Inputs, check_inputs, class_schema,
    control::{check_prompts, picture_latents},
    guided_groups, size,
    transformer::{grid, packed},
    with_class_defaults,
};
use crate::{
    Result,
    models::{FluxControlNetInput, FluxControlNetModel, FluxInput, FluxResiduals},
    nn::Rotary,
    pipelines::{
        arguments::{Defaults, Numbers, group, group_schema, refuse_unknown},
        call::Surroundings,
        components::Parts,
        control::{Acting, ControlArguments, ControlModes, ControlPictures, acting, all_pictures, kinds},
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
    check_inputs(parts, Inputs::Latents)?;
    let control = ControlCall::read(parts, arguments)?;
    let call = Call::new(parts, arguments, size(parts, arguments)?, surroundings.generators)?;
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
        let modes = control_mode.as_ref().map_or(0, Numbers::len);
        let shared = |models: &[&'a FluxControlNetModel]| match models {
            [model] if modes > 1 => Some(*model),
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
        let modes = of_each(arguments, &models, modes)?;
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
            let condition = packed(&picture_latents(call, &net.pictures, generators)?)?;
            let config = &net.model.config().transformer;
            let rotary = config.rotary(&positions, net.model.words(words), &call.parts.device)?;
            Ok(Net { model: net.model, condition, mode: net.mode, acting: net.acting, rotary })
        };
        Ok(Control { nets: self.nets.into_iter().map(net).collect::<Result<_>>()?, steps })
    }
}

/// The kind of picture that each net is given; none for nets that know one kind only.
fn of_each(arguments: &Arguments, models: &[&FluxControlNetModel], given: usize) -> Result<Vec<Option<usize>>> {
    let name = "control_mode";
    if given == 0 && models.iter().all(|model| model.config().num_mode.is_none()) {
        return Ok(vec![None; models.len()]);
    }
    let modes = kinds(arguments, models.len())?;
    let mode = |(model, mode): (&&FluxControlNetModel, usize)| match model.config().num_mode {
        Some(known) if mode < known => Ok(Some(mode)),
        Some(known) => {
            Err(refuse(name, format!("has `{mode}`, but this ControlNet knows 0 to {}", known.saturating_sub(1))))
        }
        None => Ok(None),
    };
    models.iter().zip(modes).map(mode).collect()
}

/// The ControlNets of a call, with the latents of their pictures.
pub(super) struct Control<'a> {
    nets: Vec<Net<'a>>,
    /// How many timesteps are run.
    steps: usize,
}

struct Net<'a> {
    model: &'a FluxControlNetModel,
    /// A row for each picture of the result, packed.
    condition: Tensor,
    mode: Option<usize>,
    acting: Acting,
    rotary: Rotary,
}

impl Control<'_> {
    /// What is added after the transformer's blocks at place `index` of the schedule, for each net that acts.
    pub(super) fn residuals(&self, input: &FluxInput<'_>, index: usize) -> Result<Vec<FluxResiduals>> {
        let mut residuals = Vec::with_capacity(self.nets.len());
        for net in &self.nets {
            let scale = net.acting.at(index, self.steps);
            if scale != 0.0 {
                let input = FluxInput { rotary: &net.rotary, ..*input };
                let condition = &net.condition;
                residuals.push(net.model.forward(&FluxControlNetInput { input, condition, mode: net.mode, scale })?);
            }
        }
        Ok(residuals)
    }
}
