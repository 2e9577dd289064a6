//! Flux inpainting and outpainting with a model made for it (diffusers `FluxFillPipeline`): the transformer reads the
//! masked picture and the mask beside the latents.

use dw_core::{arguments::Arguments, artifact::Entry};
use serde_json::Value;

use super::{check_inputs, class_schema, inpaint, with_class_defaults};
use crate::{
    Result,
    pipelines::{
        arguments::{Defaults, refuse_unknown},
        call::Surroundings,
        components::Parts,
    },
};

const DEFAULTS: Defaults = &[("guidance_scale", 30.0), ("num_inference_steps", 50.0), ("strength", 1.0)];

/// The arguments of the class.
pub(crate) fn schema() -> Value {
    class_schema("FluxFillPipeline", inpaint::groups(), &[DEFAULTS])
}

/// One call.
pub(crate) fn run(parts: &Parts, arguments: &Arguments, surroundings: Surroundings<'_>) -> Result<Entry> {
    refuse_unknown(parts.class, arguments, &schema())?;
    check_inputs(parts)?;
    inpaint::repainted(parts, &with_class_defaults(arguments, DEFAULTS), surroundings)
}
