//! What the options of scheduler configurations mean: one table for all classes, because an option means
//! the same wherever it occurs. The published schemas take their descriptions from here.

use schemars::JsonSchema;
use serde_json::Value;

/// Option and meaning.
static MEANINGS: &[(&str, &str)] = &[
    ("num_train_timesteps", "Length of the schedule the model was trained with."),
    ("beta_start", "First beta of the training schedule."),
    ("beta_end", "Last beta of the training schedule."),
    ("beta_schedule", "How the betas run from first to last."),
    ("trained_betas", "The betas themselves, one for each training timestep, instead of a computed schedule."),
    ("prediction_type", "What the model's output is an estimate of."),
    ("interpolation_type", "How noise levels between training timesteps are found."),
    ("use_karras_sigmas", "Put the noise levels on Karras et al.'s curve: small steps where little noise is left."),
    ("use_exponential_sigmas", "Space the logarithms of the noise levels evenly."),
    ("use_beta_sigmas", "Space the noise levels as quantiles of a beta distribution: small steps at both ends."),
    ("sigma_min", "Smallest noise level of the schedule; the model's own when none."),
    ("sigma_max", "Largest noise level of the schedule; the model's own when none."),
    ("timestep_spacing", "How the timesteps of a run lie in the training schedule."),
    ("timestep_type", "Whether the model is told timesteps or logarithms of noise levels."),
    ("steps_offset", "Added to the timesteps of `leading` spacing; 1 for Stable Diffusion."),
    (
        "rescale_betas_zero_snr",
        "Move the schedule so that its last timestep is pure noise; for models trained that way.",
    ),
    ("final_sigmas_type", "Whether the last step ends at no noise or at the smallest trained level."),
];

/// The schema of a configuration, with a description for each option.
pub(super) fn schema<C: JsonSchema>() -> Value {
    let mut schema = schemars::schema_for!(C).to_value();
    if let Some(properties) = schema.get_mut("properties").and_then(Value::as_object_mut) {
        for (name, property) in properties {
            if let (Some(meaning), Some(property)) = (meaning(name), property.as_object_mut()) {
                property.insert("description".into(), meaning.into());
            }
        }
    }
    schema
}

fn meaning(option: &str) -> Option<&'static str> {
    MEANINGS.iter().find(|(name, _)| *name == option).map(|(_, meaning)| *meaning)
}
