//! The table of sampler classes, and making one from its name and configuration.

use dw_core::nearest::nearest;
use schemars::JsonSchema;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};

use super::{
    Scheduler, cogvideox_ddim::CogVideoXDdim, config, ddim::Ddim, ddpm::Ddpm, deis_multistep::DeisMultistep,
    dpmsolver_multistep::DpmSolverMultistep, dpmsolver_sde::DpmSolverSde, dpmsolver_singlestep::DpmSolverSinglestep,
    edm_dpmsolver_multistep::EdmDpmSolverMultistep, edm_euler::EdmEuler,
    euler_ancestral_discrete::EulerAncestralDiscrete, euler_discrete::EulerDiscrete,
    flow_match_euler_discrete::FlowMatchEulerDiscrete, flow_match_heun_discrete::FlowMatchHeunDiscrete,
    flow_match_lcm::FlowMatchLcm, heun_discrete::HeunDiscrete, k_dpm_2_ancestral_discrete::KDpm2AncestralDiscrete,
    k_dpm_2_discrete::KDpm2Discrete, lcm::Lcm, lms_discrete::LmsDiscrete, options, pndm::Pndm, tcd::Tcd,
    unipc_multistep::UniPcMultistep,
};
use crate::{Error, Result};

/// A sampler that is made from a configuration.
pub(super) trait FromConfig: Scheduler + Sized + 'static {
    /// The class name.
    const CLASS: &'static str;
    /// The options of the class.
    type Config: Default + Serialize + DeserializeOwned + JsonSchema;

    /// Checks the options and computes the tables that do not depend on a run.
    fn from_config(config: Self::Config) -> Result<Self>;
}

type Create = fn(&Map<String, Value>) -> Result<Box<dyn Scheduler>>;

/// One row of the table.
#[derive(Clone, Copy)]
pub struct SchedulerClass {
    /// The class, as the reference names it.
    pub name: &'static str,
    /// One line on what it is good for.
    pub summary: &'static str,
    /// The JSON Schema of its configuration, with the class's defaults.
    pub schema: fn() -> Value,
    create: Create,
}

const fn row<S: FromConfig>(summary: &'static str) -> SchedulerClass {
    SchedulerClass {
        name: S::CLASS,
        summary,
        schema: options::schema::<S::Config>,
        create: |given| Ok(Box::new(S::from_config(config::read(S::CLASS, given)?)?)),
    }
}

static CLASSES: &[SchedulerClass] = &[
    row::<CogVideoXDdim>("DDIM with the schedule of CogVideoX"),
    row::<Ddim>("Deterministic by default, `eta` adds noise; takes 20 to 50 steps"),
    row::<Ddpm>("The original stochastic sampler; needs many steps"),
    row::<DeisMultistep>("Multistep exponential integrator; good from 10 steps"),
    row::<DpmSolverMultistep>(
        "DPM++ 2M and, with `algorithm_type` `sde-dpmsolver++`, DPM++ 2M SDE; good from 15 steps",
    ),
    row::<DpmSolverSde>("DPM++ SDE: noise from a Brownian path; two model calls for each step"),
    row::<DpmSolverSinglestep>("DPM++ 2S: like the multistep form, without memory across steps"),
    row::<EdmDpmSolverMultistep>("DPM++ 2M for models in the EDM formulation"),
    row::<EdmEuler>("Euler for models in the EDM formulation"),
    row::<EulerAncestralDiscrete>("Euler with fresh noise at each step; pictures keep changing with more steps"),
    row::<EulerDiscrete>("First-order Euler steps; plain, fast, the default of SDXL"),
    row::<FlowMatchEulerDiscrete>("Euler for rectified flows: SD3, Flux and their descendants"),
    row::<FlowMatchHeunDiscrete>("Heun for rectified flows; two model calls for each step"),
    row::<FlowMatchLcm>("For rectified flows distilled into latent consistency models; 2 to 8 steps"),
    row::<HeunDiscrete>("Second order; two model calls for each step"),
    row::<KDpm2AncestralDiscrete>("DPM2 with fresh noise at each step; two model calls for each step"),
    row::<KDpm2Discrete>("DPM2; two model calls for each step"),
    row::<Lcm>("For models distilled into latent consistency models; 2 to 8 steps"),
    row::<LmsDiscrete>("Linear multistep of order 4"),
    row::<Pndm>("Pseudo linear multistep; the default of Stable Diffusion 1"),
    row::<Tcd>("For models distilled with trajectory consistency; `eta` sets the noise"),
    row::<UniPcMultistep>("Predictor and corrector; good from 5 to 10 steps, the default of Wan"),
];

/// Every class this build has.
pub fn classes() -> &'static [SchedulerClass] {
    CLASSES
}

/// Makes a sampler of a class. Keys of `config` that the class does not know are passed over, so that one
/// class can be made from another's configuration.
pub fn create(class: &str, config: &Map<String, Value>) -> Result<Box<dyn Scheduler>> {
    match CLASSES.iter().find(|row| row.name == class) {
        Some(row) => (row.create)(config),
        None => Err(unknown(class)),
    }
}

/// Classes whose models are trained in a way of their own, by how their names begin, and what such a model predicts.
const KINDS: [(&str, &str); 2] = [("FlowMatch", "the velocity of a rectified flow"), ("EDM", "noise scaled as in EDM")];

/// Refuses a class that steps in another way than the model's own one predicts: flows and EDM are neither noise nor
/// the other. A class that is told to use flow sigmas serves flows; a shift by the picture's size is for flows alone.
pub(crate) fn check_kinship(class: &str, config: &Map<String, Value>, own: &str) -> Result<()> {
    let kind = |class: &str| KINDS.iter().find(|(beginning, _)| class.starts_with(beginning)).map(|(name, _)| *name);
    let uses_flow = config.get("use_flow_sigmas").and_then(Value::as_bool).unwrap_or(false);
    let (asked, of_model) = (kind(class).or(uses_flow.then_some("FlowMatch")), kind(own));
    let shifts = config.get("use_dynamic_shifting").and_then(Value::as_bool).unwrap_or(false);
    if class == UniPcMultistep::CLASS && shifts && of_model.is_none() {
        let reason = "needs a flow model, whose pipeline says how far to shift - set it to false";
        return Err(config::option_error(class, "use_dynamic_shifting", reason));
    }
    if asked == of_model || (uses_flow && of_model.is_none()) {
        return Ok(());
    }
    let predicts = |kind: Option<&str>| {
        let known = KINDS.iter().find(|(name, _)| Some(*name) == kind);
        known.map_or("noise or a velocity of diffusion", |(_, what)| *what)
    };
    Err(Error::Argument {
        name: "scheduler".into(),
        reason: format!(
            "`{class}` is for models that predict {}, but this model, made for `{own}`, predicts {} - use a class like \
             its own",
            predicts(asked),
            predicts(of_model)
        ),
    })
}

fn unknown(class: &str) -> Error {
    let names: Vec<&str> = CLASSES.iter().map(|row| row.name).collect();
    let near = nearest(class, names.iter().copied());
    let hint = near.map_or(String::new(), |name| format!(" - did you mean `{name}`?"));
    Error::Argument {
        name: "scheduler".into(),
        reason: format!("unknown class `{class}`{hint} Known: {}", names.join(", ")),
    }
}
