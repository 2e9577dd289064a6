//! Shapes that values of a `config.json` take in more than one model.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{Error, Result};

/// A value for all blocks, or one per block.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(untagged)]
pub enum OneOrMany<T> {
    /// One per block, in the order of the blocks. Comes first so that a list is read as this where a value may itself
    /// be a list.
    Many(Vec<T>),
    /// The same for all.
    One(T),
}

impl<T: Clone> OneOrMany<T> {
    /// One value per block; `key` is what an error calls the setting.
    pub fn per_block(&self, key: &str, blocks: usize) -> Result<Vec<T>> {
        match self {
            Self::One(value) => Ok(vec![value.clone(); blocks]),
            Self::Many(values) if values.len() == blocks => Ok(values.clone()),
            Self::Many(values) => Err(Error::Unsupported(format!(
                "`{key}` has {} values for {blocks} blocks; it takes one value, or one per block",
                values.len()
            ))),
        }
    }
}

/// Settings that are not null by default, and whose null says that the model does without.
const NULL_SAYS_NONE: [&str; 3] = ["joint_attention_dim", "mid_block_type", "norm_num_groups"];

/// A configuration's nulls mean "not set", as everywhere in the reference but for the settings that say "none".
pub(crate) fn without_nulls(config: Value) -> Value {
    let is_set = |name: &str, value: &Value| !value.is_null() || NULL_SAYS_NONE.contains(&name);
    match config {
        Value::Object(map) => Value::Object(map.into_iter().filter(|(name, value)| is_set(name, value)).collect()),
        other => other,
    }
}

/// The error for a setting with a value that this version cannot run.
pub(crate) fn unsupported(key: &str, value: impl std::fmt::Display) -> Error {
    Error::Unsupported(format!("the model's configuration has `{key}`: `{value}`, which this version does not support"))
}
