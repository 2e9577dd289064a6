//! Value types that several parts of a workflow share, and schemas that cannot be derived.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, de::Error as _};
use serde_json::Value;

use crate::seed::whole_number;

/// A whole number; `42.0` is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Integer(pub i64);

impl<'de> Deserialize<'de> for Integer {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        let number = whole_number(&value).and_then(|number| i64::try_from(number).ok());
        number.map(Self).ok_or_else(|| D::Error::custom(format!("expected a whole number, found `{value}`")))
    }
}

impl JsonSchema for Integer {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Integer".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "integer" })
    }
}

/// A number, or text that holds one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
#[schemars(inline)]
pub enum NumberOrText {
    /// A number.
    Number(f64),
    /// Text that holds a number.
    Text(String),
}

impl NumberOrText {
    /// The number; none when the text holds something else, or a number that is not finite.
    pub fn number(&self) -> Option<f64> {
        match self {
            Self::Number(number) => Some(*number),
            Self::Text(text) => text.trim().parse().ok().filter(|number: &f64| number.is_finite()),
        }
    }
}

/// One, or a list of them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
#[schemars(inline)]
pub enum OneOrMany<T> {
    /// One.
    One(T),
    /// A list.
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    /// All of them.
    pub fn into_vec(self) -> Vec<T> {
        match self {
            Self::One(one) => vec![one],
            Self::Many(many) => many,
        }
    }
}

/// A number type of weights or activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// 64-bit float.
    F64,
    /// 32-bit float.
    F32,
    /// 16-bit float of IEEE 754.
    F16,
    /// 16-bit float with the exponent range of 32-bit ones.
    Bf16,
    /// 8-bit float, 4 exponent bits.
    F8E4M3,
    /// 8-bit float, 5 exponent bits.
    F8E5M2,
    /// 8-bit integer.
    I8,
    /// 8-bit unsigned integer.
    U8,
    /// Whatever the files hold.
    Auto,
}

impl Dtype {
    /// Names that are understood, for messages.
    pub const NAMES: &'static str = "`torch.float32`, `torch.float16`, `torch.bfloat16`";

    /// The type that a text names: `torch.float16`, or `float16`, or `{auto}`.
    pub fn parse(text: &str) -> Option<Self> {
        let name = text.trim_matches(['{', '}']);
        Some(match name.strip_prefix("torch.").unwrap_or(name) {
            "float64" | "double" => Self::F64,
            "float32" | "float" => Self::F32,
            "float16" | "half" => Self::F16,
            "bfloat16" => Self::Bf16,
            "float8_e4m3fn" => Self::F8E4M3,
            "float8_e5m2" => Self::F8E5M2,
            "int8" => Self::I8,
            "uint8" => Self::U8,
            "auto" => Self::Auto,
            _ => return None,
        })
    }
}

/// Items of a task's `inputs`: anything but null and lists.
pub(super) fn inputs_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "items": { "type": ["string", "integer", "number", "object", "boolean"] }
    })
}

/// A text, or null where null says "without".
pub(super) fn text_or_null_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "oneOf": [{ "type": "string" }, { "type": "null" }] })
}

/// Values of modular block configs: anything but objects.
pub(super) fn block_configs_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "object",
        "additionalProperties": { "type": ["string", "integer", "number", "boolean", "array", "null"] }
    })
}

/// Layer counts by dotted path.
pub(super) fn layer_counts_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "object", "additionalProperties": { "type": "integer", "minimum": 1 } })
}

/// A number above zero, or text.
pub(super) fn positive_or_text_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "anyOf": [{ "type": "number", "exclusiveMinimum": 0 }, { "type": "string" }] })
}

/// A number from zero up, or text.
pub(super) fn from_zero_or_text_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "anyOf": [{ "type": "number", "minimum": 0 }, { "type": "string" }] })
}

/// A whole number from one up, or text.
pub(super) fn count_or_text_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "anyOf": [{ "type": "integer", "minimum": 1 }, { "type": "string" }] })
}

/// A whole number from zero up, or text.
pub(super) fn count_from_zero_or_text_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "anyOf": [{ "type": "integer", "minimum": 0 }, { "type": "string" }] })
}

/// What sets the strength of an IP-Adapter: a number, a list, or a map of blocks.
pub(super) fn adapter_scale_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "anyOf": [{ "type": "number" }, { "type": "array" }, { "type": "object" }] })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dtypes_are_read_with_and_without_prefix_and_braces() {
        assert_eq!(Dtype::parse("torch.bfloat16"), Some(Dtype::Bf16));
        assert_eq!(Dtype::parse("float16"), Some(Dtype::F16));
        assert_eq!(Dtype::parse("{auto}"), Some(Dtype::Auto));
        assert_eq!(Dtype::parse("torch.flaot16"), None);
    }

    #[test]
    fn text_counts_as_the_number_it_holds() {
        assert_eq!(NumberOrText::Text(" 6.0 ".into()).number(), Some(6.0));
        assert_eq!(NumberOrText::Text("strong".into()).number(), None);
        assert_eq!(NumberOrText::Text("nan".into()).number(), None);
    }
}
