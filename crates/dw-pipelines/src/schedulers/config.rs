//! Scheduler configurations: reading them from a model's or a workflow's JSON, and describing them.
//!
//! A configuration may come from another class (a model saved with one sampler, run with another): keys
//! the class does not know are passed over, as the reference does.

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};

use crate::{Error, Result};

/// Declares a configuration struct: fields, types and the class's defaults. What the fields mean stands
/// in [`super::options`].
macro_rules! config {
    ($(#[$meta:meta])* $name:ident { $($(#[$field_meta:meta])* $field:ident : $type:ty = $default:expr),+ $(,)? }) => {
        $(#[$meta])*
        #[derive(Clone, Debug, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
        #[serde(default)]
        pub(super) struct $name { $($(#[$field_meta])* pub(super) $field: $type),+ }

        impl Default for $name {
            fn default() -> Self {
                Self { $($field: $default),+ }
            }
        }
    };
}
pub(super) use config;

/// What the model's output is an estimate of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum PredictionType {
    /// The noise.
    Epsilon,
    /// The clean sample.
    #[serde(alias = "original_sample")]
    Sample,
    /// The velocity (Salimans and Ho 2022).
    VPrediction,
    /// The velocity of a rectified flow: noise minus clean sample.
    FlowPrediction,
}

impl PredictionType {
    /// Refuses prediction types a class has no formula for.
    pub(super) fn one_of(self, class: &'static str, allowed: &[Self]) -> Result<()> {
        if allowed.contains(&self) {
            return Ok(());
        }
        let names: Vec<String> = allowed.iter().map(|kind| format!("`{}`", kind.name())).collect();
        let reason = format!("`{}` is not possible here - choose {}", self.name(), names.join(", "));
        Err(option_error(class, "prediction_type", &reason))
    }

    fn name(self) -> &'static str {
        match self {
            Self::Epsilon => "epsilon",
            Self::Sample => "sample",
            Self::VPrediction => "v_prediction",
            Self::FlowPrediction => "flow_prediction",
        }
    }
}

/// How the timesteps of a run lie in the training schedule (Lin et al. 2024, table 2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum TimestepSpacing {
    /// Evenly, both ends included.
    Linspace,
    /// Multiples of a whole step from the start, plus `steps_offset`.
    Leading,
    /// Counted down from the end.
    Trailing,
}

/// Where a schedule of sigmas ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum FinalSigmas {
    /// At no noise.
    Zero,
    /// At the smallest noise level of the training schedule.
    SigmaMin,
}

/// A complaint about one option of a class.
pub(super) fn option_error(class: &str, key: &str, reason: &str) -> Error {
    Error::Argument { name: format!("scheduler.{key}"), reason: format!("{reason} (`{class}`)") }
}

/// A complaint about the schedule a run asks for.
pub(super) fn request_error(name: &str, reason: impl Into<String>) -> Error {
    Error::Argument { name: name.into(), reason: reason.into() }
}

/// Reads a class's configuration: its defaults, overridden by the keys of `given` that it knows. A null
/// stands for the default.
pub(super) fn read<C>(class: &str, given: &Map<String, Value>) -> Result<C>
where
    C: Default + Serialize + DeserializeOwned,
{
    let mut merged = plain_map(&C::default());
    for (key, value) in given {
        if let Some(slot) = merged.get_mut(key)
            && !value.is_null()
        {
            *slot = value.clone();
        }
    }
    serde_path_to_error::deserialize(Value::Object(merged)).map_err(|error| {
        let key = error.path().to_string();
        option_error(class, &key, &error.into_inner().to_string())
    })
}

/// A configuration as JSON, every key present, with `_class_name`.
pub(super) fn to_map(class: &str, config: &impl Serialize) -> Map<String, Value> {
    let mut map = Map::from_iter([("_class_name".to_owned(), Value::from(class))]);
    map.extend(plain_map(config));
    map
}

fn plain_map(config: &impl Serialize) -> Map<String, Value> {
    match serde_json::to_value(config) {
        Ok(Value::Object(map)) => map,
        _ => Map::new(),
    }
}

/// At most one of the sigma spacings may be chosen.
pub(super) fn at_most_one(class: &str, chosen: &[(&str, bool)]) -> Result<()> {
    let names: Vec<String> = chosen.iter().filter(|(_, on)| *on).map(|(name, _)| format!("`{name}`")).collect();
    match names.as_slice() {
        [] | [_] => Ok(()),
        [first, rest @ ..] => {
            let reason = format!("cannot be combined with {} - set all but one of them to false", rest.join(", "));
            Err(option_error(class, first.trim_matches('`'), &reason))
        }
    }
}

/// Minus infinity has no JSON number: written as `"-Infinity"`.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes fields by reference")]
pub(super) fn write_bound<S: serde::Serializer>(bound: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    if bound.is_finite() { serializer.serialize_f64(*bound) } else { serializer.serialize_str("-Infinity") }
}

/// Reads what [`write_bound`] writes, and the spellings other tools use.
pub(super) fn read_bound<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Bound {
        Number(f64),
        Text(String),
    }
    match Bound::deserialize(deserializer)? {
        Bound::Number(number) => Ok(number),
        Bound::Text(text) if ["-infinity", "-inf"].contains(&text.to_ascii_lowercase().as_str()) => {
            Ok(f64::NEG_INFINITY)
        }
        Bound::Text(text) => Err(serde::de::Error::custom(format!("`{text}` is neither a number nor `-Infinity`"))),
    }
}
