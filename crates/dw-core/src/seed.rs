//! Seeds: one generator for a whole step, or one for each picture.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What a `seed` in a workflow says. Negative numbers count as their 64-bit two's complement.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Seed {
    /// One generator that all pictures of the step draw from.
    One(i128),
    /// One generator for each picture.
    Each(Vec<i128>),
}

impl Seed {
    /// A seed nobody chose: 32 random bits, so that it is easily typed again.
    pub fn random() -> Result<Self, getrandom::Error> {
        getrandom::u32().map(|bits| Self::One(i128::from(bits)))
    }
}
