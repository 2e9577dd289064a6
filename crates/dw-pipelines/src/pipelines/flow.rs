//! What pipelines of rectified flows share: arguments, the shift of the schedule with the size of the picture, and where
//! in the schedule a call starts.

use dw_core::arguments::ArtifactRef;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::{
    arguments::{Texts, optional_number, optional_numbers, positive},
    call::refuse_unaccepted,
    text_to_image::{AttentionKwargs, Generation, OutputType, refuse},
};
use crate::{
    Result,
    schedulers::{Scheduler, TimestepRequest},
};

/// What the picture shows and how it is denoised.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(default)]
pub(crate) struct FlowGeneration {
    /// What the picture should show. A list makes one picture (or more, see `num_images_per_prompt`) of each.
    pub(crate) prompt: Option<Texts>,
    /// How many denoising steps; more take longer and follow the model more closely.
    #[serde(deserialize_with = "positive")]
    #[schemars(range(min = 1))]
    pub(crate) num_inference_steps: usize,
    /// The noise levels to visit, falling from 1, instead of `num_inference_steps`. The scheduler shifts them.
    #[serde(deserialize_with = "optional_numbers")]
    pub(crate) sigmas: Option<Vec<f64>>,
    /// How many pictures of each prompt.
    #[serde(deserialize_with = "positive")]
    #[schemars(range(min = 1))]
    pub(crate) num_images_per_prompt: usize,
    /// Encoded prompts instead of `prompt`: an array `(prompts, tokens, features)`.
    pub(crate) prompt_embeds: Option<ArtifactRef>,
    /// `pil` for pictures, `latent` for the latents a later step goes on with.
    pub(crate) output_type: OutputType,
    /// Keyword arguments for the attention layers; `scale` multiplies the scale of every LoRA.
    pub(crate) joint_attention_kwargs: Option<AttentionKwargs>,
}

impl Default for FlowGeneration {
    fn default() -> Self {
        Self {
            prompt: None,
            num_inference_steps: 28,
            sigmas: None,
            num_images_per_prompt: 1,
            prompt_embeds: None,
            output_type: OutputType::Pil,
            joint_attention_kwargs: None,
        }
    }
}

/// The shift of schedulers that take one for each call.
#[derive(Clone, Copy, Debug, Default, Deserialize, JsonSchema)]
#[serde(default)]
pub(crate) struct ShiftArguments {
    /// The logarithm of the shift towards noise, for schedulers with `use_dynamic_shifting`; follows from the size of
    /// the picture when not given.
    #[serde(deserialize_with = "optional_number")]
    pub(crate) mu: Option<f64>,
}

impl FlowGeneration {
    /// The call as the pieces that all families share read it.
    pub(crate) fn generation(&self) -> Generation {
        Generation {
            prompt: self.prompt.clone(),
            num_inference_steps: self.num_inference_steps,
            sigmas: self.sigmas.clone(),
            num_images_per_prompt: self.num_images_per_prompt,
            prompt_embeds: self.prompt_embeds,
            output_type: self.output_type,
            ..Generation::default()
        }
    }
}

/// Lays the schedule out, after checking that the scheduler can take custom noise levels.
pub(crate) fn set_timesteps(scheduler: &mut dyn Scheduler, request: &TimestepRequest) -> Result<()> {
    refuse_unaccepted(scheduler, request.timesteps.is_some(), request.sigmas.is_some())?;
    scheduler.set_timesteps(request)
}

/// Refuses schedulers whose noise levels mean something else than the times of a rectified flow.
pub(crate) fn check_flow(scheduler: &dyn Scheduler) -> Result<()> {
    let (class, config) = (scheduler.class(), scheduler.config_json());
    let uses_flow = config.get("use_flow_sigmas").and_then(Value::as_bool);
    if class.starts_with("FlowMatch") || uses_flow == Some(true) {
        return Ok(());
    }
    let remedy = match uses_flow {
        Some(_) => "give it `use_flow_sigmas` true and `prediction_type` `flow_prediction`",
        None => "use `FlowMatchEulerDiscreteScheduler`",
    };
    Err(refuse("scheduler", format!("`{class}` does not sample rectified flows, which this model is; {remedy}")))
}

/// The logarithm of the shift for a picture of `tokens` tokens: on the line through the points that the scheduler's
/// configuration names (diffusers `calculate_shift`). `max_shift` counts where it names none.
pub(crate) fn shift_for(config: &Map<String, Value>, tokens: usize, max_shift: f64) -> f64 {
    let number = |name: &str, usual: f64| config.get(name).and_then(Value::as_f64).unwrap_or(usual);
    let (few, many) = (number("base_image_seq_len", 256.0), number("max_image_seq_len", 4096.0));
    let (low, high) = (number("base_shift", 0.5), number("max_shift", max_shift));
    let slope = (high - low) / (many - few);
    tokens as f64 * slope + (low - slope * few)
}

/// Whether the scheduler shifts its schedule with the size of the picture.
pub(crate) fn is_dynamic(config: &Map<String, Value>) -> bool {
    config.get("use_dynamic_shifting").and_then(Value::as_bool).unwrap_or(false)
}

/// `steps` noise levels that fall evenly from 1 to `1 / steps`.
pub(crate) fn even_sigmas(steps: usize) -> Vec<f64> {
    let last = 1.0 / steps as f64;
    let step = (last - 1.0) / steps.saturating_sub(1).max(1) as f64;
    (0..steps).map(|i| if i > 0 && i + 1 == steps { last } else { 1.0 + i as f64 * step }).collect()
}

/// Refuses strengths that are no fraction.
pub(crate) fn check_strength(strength: f64) -> Result<()> {
    if (0.0..=1.0).contains(&strength) {
        return Ok(());
    }
    Err(refuse("strength", format!("must lie between 0 and 1, found `{strength}`")))
}

/// The first of the scheduler's timesteps that is run when a fraction `strength` of `steps` is. Unlike in the older
/// families a step that is begun counts.
pub(crate) fn first_index(scheduler: &dyn Scheduler, steps: usize, strength: f64) -> Result<usize> {
    check_strength(strength)?;
    let first = (steps as f64 - (steps as f64 * strength).min(steps as f64)) as usize * scheduler.order();
    if first < scheduler.timesteps().len() {
        return Ok(first);
    }
    Err(refuse("strength", format!("`{strength}` of {steps} steps leaves none; use a larger value or more steps")))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::schedulers;

    #[test]
    fn the_shift_lies_on_the_line_of_the_configuration() {
        let empty = Map::new();
        assert!((shift_for(&empty, 256, 1.15) - 0.5).abs() < 1e-12);
        assert!((shift_for(&empty, 4096, 1.15) - 1.15).abs() < 1e-12);
        assert!((shift_for(&empty, 4096, 1.16) - 1.16).abs() < 1e-12);
        let config = json!({ "base_image_seq_len": 0, "max_image_seq_len": 100, "base_shift": 1.0, "max_shift": 2.0 });
        assert!((shift_for(config.as_object().expect("an object"), 50, 9.0) - 1.5).abs() < 1e-12);
    }

    #[test]
    fn schedulers_of_other_models_are_refused_with_the_way_out() {
        let checked = |class: &str, config: Value| {
            let config = config.as_object().expect("an object").clone();
            check_flow(&*schedulers::create(class, &config).expect("a known class")).map_err(|error| error.to_string())
        };
        assert_eq!(checked("FlowMatchEulerDiscreteScheduler", json!({})), Ok(()));
        let flow = json!({ "use_flow_sigmas": true, "prediction_type": "flow_prediction" });
        assert_eq!(checked("UniPCMultistepScheduler", flow), Ok(()));
        let message = checked("UniPCMultistepScheduler", json!({})).expect_err("no flow");
        assert!(message.contains("`use_flow_sigmas`"), "{message}");
        let message = checked("EulerDiscreteScheduler", json!({})).expect_err("no flow");
        assert!(message.contains("`FlowMatchEulerDiscreteScheduler`"), "{message}");
    }

    #[test]
    fn even_sigmas_fall_from_one_to_the_share_of_a_step() {
        assert_eq!(even_sigmas(1), [1.0]);
        assert_eq!(even_sigmas(2), [1.0, 0.5]);
        assert_eq!(even_sigmas(4), [1.0, 0.75, 0.5, 0.25]);
    }

    #[test]
    fn a_step_that_is_begun_is_run() {
        let mut scheduler = schedulers::create("FlowMatchEulerDiscreteScheduler", &Map::new()).expect("a known class");
        scheduler.set_timesteps(&TimestepRequest::steps(5)).expect("5 steps");
        let first = |strength| first_index(&*scheduler, 5, strength);
        assert_eq!(first(0.5).ok(), Some(2));
        assert_eq!(first(1.0).ok(), Some(0));
        assert_eq!(first(0.01).ok(), Some(4));
        assert!(first(0.0).expect_err("none").to_string().contains("leaves none"));
        assert!(first(-0.1).expect_err("negative").to_string().contains("between 0 and 1"));
    }
}
