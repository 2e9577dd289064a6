//! Seeds: one generator for a whole step, or one for each picture.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, de::Error as _};
use serde_json::Value;

/// What a `seed` in a workflow says. Negative numbers count as their 64-bit two's complement.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
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

/// The whole number a JSON value is: `42`, `42.0`, `-1`; not `42.5`, and not text.
pub(crate) fn whole_number(value: &Value) -> Option<i128> {
    let number = value.as_number()?;
    if let Some(integer) = number.as_i128() {
        return Some(integer);
    }
    // Beyond 2^63 a float no longer says which integer was meant, and the format's seeds are 64 bits.
    number.as_f64().filter(|float| float.fract() == 0.0 && float.abs() < 9.3e18).map(|float| float as i128)
}

impl<'de> Deserialize<'de> for Seed {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        let seed = match &value {
            Value::Array(items) if !items.is_empty() => {
                items.iter().map(whole_number).collect::<Option<Vec<_>>>().map(Self::Each)
            }
            single => whole_number(single).map(Self::One),
        };
        seed.ok_or_else(|| {
            D::Error::custom(format!("expected a whole number or a list of them as seed, found `{value}`"))
        })
    }
}

impl JsonSchema for Seed {
    fn schema_name() -> Cow<'static, str> {
        "Seed".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "a whole number (one generator for all pictures), or a list of them (one generator for each picture)",
            "anyOf": [
                { "type": "integer", "format": "int64" },
                { "type": "array", "minItems": 1, "items": { "type": "integer", "format": "int64" } }
            ]
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_seed_is_a_whole_number_or_a_list_of_them() {
        let read = |value: Value| serde_json::from_value::<Seed>(value).ok();
        assert_eq!(read(json!(42)), Some(Seed::One(42)));
        assert_eq!(read(json!(42.0)), Some(Seed::One(42)));
        assert_eq!(read(json!(-1)), Some(Seed::One(-1)));
        assert_eq!(read(json!(u64::MAX)), Some(Seed::One(i128::from(u64::MAX))));
        assert_eq!(read(json!([1, 2.0])), Some(Seed::Each(vec![1, 2])));
        for wrong in [json!(42.5), json!("42"), json!(null), json!([]), json!([1, "2"]), json!(true), json!(1e300)] {
            assert_eq!(read(wrong.clone()), None, "{wrong}");
        }
    }
}
