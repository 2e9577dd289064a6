//! What a pipeline will need of a device's memory, and what is there: plain numbers, as they are shown and sent.

use serde::{Deserialize, Serialize};

/// The memory that a pipeline will need, computed before anything is read.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct FitPlan {
    /// Where it will run.
    pub device: String,
    /// Its components, in the order of their names.
    pub components: Vec<ComponentFit>,
    /// How the components are kept: `none` (all on the device), `model`, `group`, `sequential`.
    pub offload: String,
    /// Whether that was chosen by this plan (`offload: auto`).
    pub is_chosen: bool,
    /// Whether the autoencoder works in tiles.
    pub tiles_vae: bool,
    /// Height and width in pixels that the plan assumes.
    pub size: [usize; 2],
    /// Bytes of the results of layers, in the stage that needs most in all.
    pub activations: u64,
    /// Bytes that are in use on the device before anything is loaded: by this program on a CPU, by all on a GPU.
    pub in_use: u64,
    /// Bytes that will be in use at most.
    pub peak: u64,
    /// The stage that needs them.
    pub peak_stage: String,
    /// Bytes that may be in use; none where the system does not say.
    pub limit: Option<u64>,
    /// What that comes to.
    pub verdict: Verdict,
    /// Other settings, and the bytes that would be in use at most with each of them.
    pub alternatives: Vec<Alternative>,
}

/// The memory of one component.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ComponentFit {
    /// Its name (`unet`).
    pub name: String,
    /// The type of its weights (`bf16`), or the format of most of them where they are quantized (`q4_k`).
    pub dtype: String,
    /// Bytes of all of them on the device.
    pub bytes: u64,
    /// Bytes of them that are on the device at a time.
    pub at_once: u64,
    /// When they are: `always`, `in its stage`, `in groups`, `layer by layer`.
    pub presence: String,
    /// Whether it is in memory already.
    pub is_loaded: bool,
}

/// Whether a plan can work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// There is enough memory.
    Fits,
    /// There may be enough.
    Tight,
    /// There is not.
    TooLarge,
    /// Nobody says how much there is.
    #[default]
    Unknown,
}

/// A setting that needs less memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Alternative {
    /// As it is written in a workflow's `configuration`.
    pub setting: String,
    /// Bytes that would be in use at most.
    pub peak: u64,
    /// Whether that is little enough.
    pub fits: bool,
}

impl FitPlan {
    /// The alternatives that fit, in words; none when none does.
    pub fn remedies(&self) -> Option<String> {
        let fitting: Vec<String> =
            self.alternatives.iter().filter(|other| other.fits).map(|other| format!("`{}`", other.setting)).collect();
        (!fitting.is_empty()).then(|| fitting.join(" or "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_settings_that_fit_are_remedies() {
        let other = |setting: &str, fits| Alternative { setting: setting.into(), peak: 1, fits };
        let plan = FitPlan { alternatives: vec![other("a", false), other("b", true)], ..FitPlan::default() };
        assert_eq!(plan.remedies().as_deref(), Some("`b`"));
        assert_eq!(FitPlan::default().remedies(), None);
    }
}
