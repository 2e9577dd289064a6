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
    ("clip_sample", "Cut the guess of the clean sample at `clip_sample_range`; for models that make pixels."),
    ("clip_sample_range", "Where `clip_sample` cuts, on both sides of 0."),
    ("set_alpha_to_one", "Let the last step end at a clean sample instead of the first training timestep."),
    ("thresholding", "Keep the guess of the clean sample in range by a quantile; for models that make pixels."),
    ("dynamic_thresholding_ratio", "The quantile of `thresholding`."),
    ("sample_max_value", "The largest value that `thresholding` divides by."),
    ("variance_type", "Where the variance of the fresh noise comes from."),
    ("skip_prk_steps", "Start with multistep right away instead of Runge-Kutta steps."),
    ("original_inference_steps", "Length of the distillation schedule that steps are picked from."),
    ("timestep_scaling", "How sharply the model's guess takes over from the sample near timestep 0."),
    ("snr_shift_scale", "How far the signal-to-noise ratio is shifted down."),
    ("solver_order", "How many model outputs a step uses."),
    (
        "algorithm_type",
        "What is integrated: the clean sample (`++`) or the noise, with fresh noise (`sde-`) or without.",
    ),
    ("solver_type", "Which formula a step of higher order uses."),
    ("lower_order_final", "End with steps of lower order; steadier for runs of fewer than 15 steps."),
    ("euler_at_final", "Make the last step a first-order one; more detail, or artefacts."),
    ("use_lu_lambdas", "Space the logarithms of the noise levels evenly (Lu et al.)."),
    ("use_flow_sigmas", "Run on the noise levels of a rectified flow."),
    ("flow_shift", "How far the times of a rectified flow are moved towards noise."),
    ("lambda_min_clipped", "Cut noise levels with a smaller log signal-to-noise ratio; -5.1 for cosine schedules."),
    ("use_dynamic_shifting", "Take the shift from the size of the picture."),
    ("time_shift_type", "How the dynamic shift acts."),
    ("predict_x0", "Integrate the clean sample (else the noise)."),
    ("disable_corrector", "Steps whose correction is left out."),
    ("solver_p", "Another scheduler as predictor; not possible here."),
    ("shift_terminal", "Stretch the times so that the last one before the end has this value."),
    ("shift", "How far the times are moved towards noise when the shift is not dynamic; 3 for SD3."),
    ("base_shift", "The dynamic shift at `base_image_seq_len`."),
    ("max_shift", "The dynamic shift at `max_image_seq_len`."),
    ("base_image_seq_len", "Picture tokens at which the dynamic shift is `base_shift`."),
    ("max_image_seq_len", "Picture tokens at which the dynamic shift is `max_shift`."),
    ("invert_sigmas", "Run the flow the other way round, from 0 to 1."),
    ("stochastic_sampling", "Jump to a clean sample and back with fresh noise at each step."),
    ("noise_sampler_seed", "Seed of the Brownian path; from the run's generators when none."),
    ("sigma_data", "Standard deviation of the data the model was trained on."),
    ("sigma_schedule", "The curve of the noise levels."),
    ("rho", "Exponent of the `karras` curve."),
    ("scale_factors", "How large the latents are after each step; not possible here."),
    ("upscale_mode", "How latents grow with `scale_factors`."),
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
