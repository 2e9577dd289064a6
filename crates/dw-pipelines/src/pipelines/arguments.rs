//! Reads the arguments of a pipeline call into typed structs, and describes them as a JSON Schema.
//!
//! A class's arguments are made of groups, each a struct with documentation and defaults. Owns the
//! value types that arguments share (texts, sizes, whole numbers) and the complaints about unknown and
//! mistyped arguments. Which groups a class has stands beside its pipeline.

use candle_core::{DType, Device, Tensor};
use dw_core::{
    arguments::{Arguments, ArtifactRef},
    artifact::{Array, Artifact},
    nearest::nearest,
};
use schemars::{JsonSchema, Schema, SchemaGenerator, generate::SchemaSettings, json_schema};
use serde::{Deserialize, Deserializer, Serialize, de::DeserializeOwned, de::Error as _};
use serde_json::{Map, Value};

use crate::{Error, Result};

/// The JSON Schema (an object) of one group of arguments.
pub(crate) fn group_schema<G: JsonSchema>() -> Value {
    let settings = SchemaSettings::draft2020_12().with(|settings| settings.inline_subschemas = true);
    settings.into_generator().into_root_schema_for::<G>().to_value()
}

/// The schema of a class whose arguments are these groups together. A name in two groups counts once, as
/// the first group has it.
pub(crate) fn merged_schema(title: &str, groups: &[Value]) -> Value {
    let mut properties = Map::new();
    for group in groups {
        for (name, property) in group.get("properties").and_then(Value::as_object).into_iter().flatten() {
            properties.entry(name.clone()).or_insert_with(|| property.clone());
        }
    }
    serde_json::json!({ "title": title, "type": "object", "properties": properties, "additionalProperties": false })
}

/// Defaults of a class that are not those of its groups.
pub(crate) type Defaults = &'static [(&'static str, f64)];

/// `schema` with a class's own defaults.
pub(crate) fn with_defaults(mut schema: Value, defaults: Defaults) -> Value {
    for (name, default) in defaults {
        if let Some(property) = schema.pointer_mut(&format!("/properties/{name}")) {
            property["default"] = (*default).into();
        }
    }
    schema
}

/// `arguments` with a class's own defaults where they say nothing.
pub(crate) fn filled(arguments: &Arguments, defaults: Defaults) -> Arguments {
    let mut arguments = arguments.clone();
    for (name, default) in defaults {
        let value = arguments.values.entry(*name).or_insert(Value::Null);
        if value.is_null() {
            *value = (*default).into();
        }
    }
    arguments
}

/// Complains about an argument that `schema` does not know.
pub(crate) fn refuse_unknown(class: &str, arguments: &Arguments, schema: &Value) -> Result<()> {
    let known: Vec<&str> = property_names(schema).collect();
    let Some(name) = arguments.values.keys().find(|name| !known.contains(&name.as_str())) else {
        return Ok(());
    };
    let hint = nearest(name, known.iter().copied()).map_or(String::new(), |close| format!("; did you mean `{close}`?"));
    let known = known.join("`, `");
    Err(Error::Argument { name: name.clone(), reason: format!("`{class}` does not take it{hint} It takes `{known}`") })
}

fn property_names(schema: &Value) -> impl Iterator<Item = &str> {
    schema.get("properties").and_then(Value::as_object).into_iter().flatten().map(|(name, _)| name.as_str())
}

/// Reads one group: the arguments it knows, null counting as not given.
pub(crate) fn group<G: DeserializeOwned + JsonSchema>(arguments: &Arguments) -> Result<G> {
    let schema = group_schema::<G>();
    let given: Map<String, Value> = property_names(&schema)
        .filter_map(|name| {
            Some((name.to_owned(), arguments.values.get(name).filter(|value| !value.is_null())?.clone()))
        })
        .collect();
    serde_path_to_error::deserialize(Value::Object(given)).map_err(|error| {
        let name = error.path().to_string();
        Error::Argument { name, reason: error.into_inner().to_string() }
    })
}

/// The host array behind a handle, as a tensor.
pub(crate) fn tensor(
    arguments: &Arguments,
    name: &str,
    handle: ArtifactRef,
    dtype: DType,
    device: &Device,
) -> Result<Tensor> {
    let reason = match arguments.get(handle) {
        Some(Artifact::Array(array)) => {
            let Array { shape, data } = &**array;
            return Ok(Tensor::from_slice(data, shape.as_slice(), device)?.to_dtype(dtype)?);
        }
        Some(other) => format!("must be an array (latents or embeddings of an earlier step), found {}", other.kind()),
        None => "refers to a result that is not there any more".into(),
    };
    Err(Error::Argument { name: name.into(), reason })
}

/// One text, or one for each picture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Texts {
    /// One text.
    One(String),
    /// A batch of texts.
    Many(Vec<String>),
}

impl Texts {
    /// The texts, one or more.
    pub fn list(&self) -> &[String] {
        match self {
            Self::One(text) => std::slice::from_ref(text),
            Self::Many(texts) => texts,
        }
    }

    /// Whether they stand for themselves where another argument could stand in: an empty text gives way, a list never
    /// does, empty texts or not (what Python takes for false).
    pub(crate) fn stands(&self) -> bool {
        !matches!(self, Self::One(text) if text.is_empty())
    }
}

impl<'de> Deserialize<'de> for Texts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        let wrong = || D::Error::custom(format!("must be text or a list of texts, found `{value}`"));
        match &value {
            Value::String(text) => Ok(Self::One(text.clone())),
            Value::Array(items) if !items.is_empty() => {
                let texts = items.iter().map(|item| item.as_str().map(str::to_owned).ok_or_else(wrong));
                texts.collect::<Result<_, _>>().map(Self::Many)
            }
            _ => Err(wrong()),
        }
    }
}

impl Serialize for Texts {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::One(text) => text.serialize(serializer),
            Self::Many(texts) => texts.serialize(serializer),
        }
    }
}

impl JsonSchema for Texts {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Texts".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "anyOf": [{ "type": "string" }, { "type": "array", "items": { "type": "string" }, "minItems": 1 }] })
    }
}

/// One number for all, or one for each.
#[derive(Clone, Debug, PartialEq)]
pub struct Numbers(Vec<f64>);

impl From<f64> for Numbers {
    fn from(number: f64) -> Self {
        Self(vec![number])
    }
}

impl Numbers {
    /// How many numbers there are.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// `count` numbers: the list, or the one number for each.
    pub(crate) fn for_each(&self, name: &str, count: usize, of: &str) -> Result<Vec<f64>> {
        match self.0.as_slice() {
            [number] => Ok(vec![*number; count]),
            list if list.len() == count => Ok(list.to_vec()),
            list => Err(Error::Argument {
                name: name.into(),
                reason: format!("has {} numbers for {count} {of}; give one number, or one for each", list.len()),
            }),
        }
    }

    /// `count` numbers, one of its own for each.
    pub(crate) fn exactly(&self, name: &str, count: usize, of: &str) -> Result<Vec<f64>> {
        if self.0.len() == count {
            return Ok(self.0.clone());
        }
        let found = self.0.len();
        let reason = format!("has {found} number(s) for {count} {of}; give one for each");
        Err(Error::Argument { name: name.into(), reason })
    }
}

impl<'de> Deserialize<'de> for Numbers {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        let items = value.as_array().map_or(std::slice::from_ref(&value), Vec::as_slice);
        let numbers = items.iter().map(Value::as_f64).collect::<Option<Vec<f64>>>();
        let numbers = numbers.filter(|numbers| !numbers.is_empty());
        numbers
            .map(Self)
            .ok_or_else(|| D::Error::custom(format!("must be a number or a list of numbers, found `{value}`")))
    }
}

impl Serialize for Numbers {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0.as_slice() {
            [number] => number.serialize(serializer),
            numbers => numbers.serialize(serializer),
        }
    }
}

impl JsonSchema for Numbers {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Numbers".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "anyOf": [{ "type": "number" }, { "type": "array", "items": { "type": "number" }, "minItems": 1 }] })
    }
}

/// A pair of pixel numbers, height or vertical first: `[h, w]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Pair(pub usize, pub usize);

impl Pair {
    /// The two numbers as conditioning takes them.
    pub(crate) fn values(self) -> [f32; 2] {
        [self.0 as f32, self.1 as f32]
    }
}

impl<'de> Deserialize<'de> for Pair {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        let items = value.get("$tuple").unwrap_or(&value).as_array();
        match items.map(Vec::as_slice) {
            Some([first, second]) => whole_number(first).zip(whole_number(second)).map(|(a, b)| Self(a, b)),
            _ => None,
        }
        .ok_or_else(|| D::Error::custom(format!("must be two whole numbers, `[height, width]`, found `{value}`")))
    }
}

impl JsonSchema for Pair {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Pair".into()
    }

    /// What a workflow writes; the form `{"$tuple": […]}` is read too but not advertised for writing.
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "anyOf": [
                { "type": "array", "items": { "type": "integer", "minimum": 0 }, "minItems": 2, "maxItems": 2 },
                { "type": "object", "required": ["$tuple"] }
            ]
        })
    }
}

/// A whole number that is not negative; `42.0` counts as 42.
fn whole_number(value: &Value) -> Option<usize> {
    let from_float = || value.as_f64().filter(|number| number.fract() == 0.0 && (0.0..9e15).contains(number));
    value.as_u64().or_else(|| from_float().map(|number| number as u64)).map(|number| number as usize)
}

/// Reads a whole number of at least 1.
pub(crate) fn positive<'de, D: Deserializer<'de>>(deserializer: D) -> Result<usize, D::Error> {
    let value = Value::deserialize(deserializer)?;
    whole_number(&value)
        .filter(|&number| number > 0)
        .ok_or_else(|| D::Error::custom(format!("must be a whole number of at least 1, found `{value}`")))
}

/// Reads a whole number of at least 1 that may be left out.
pub(crate) fn optional_positive<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<usize>, D::Error> {
    positive(deserializer).map(Some)
}

/// Reads a whole number that may be 0.
pub(crate) fn whole<'de, D: Deserializer<'de>>(deserializer: D) -> Result<usize, D::Error> {
    let value = Value::deserialize(deserializer)?;
    whole_number(&value)
        .ok_or_else(|| D::Error::custom(format!("must be a whole number of at least 0, found `{value}`")))
}

/// Reads a whole number that may be 0 or left out.
pub(crate) fn optional_whole<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<usize>, D::Error> {
    whole(deserializer).map(Some)
}

/// Reads a number.
pub(crate) fn number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    let value = Value::deserialize(deserializer)?;
    value.as_f64().ok_or_else(|| D::Error::custom(format!("must be a number, found `{value}`")))
}

/// Reads a number that may be left out.
pub(crate) fn optional_number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f64>, D::Error> {
    number(deserializer).map(Some)
}

/// Reads a list of numbers that may be left out.
pub(crate) fn optional_numbers<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<f64>>, D::Error> {
    let value = Value::deserialize(deserializer)?;
    let numbers = value.as_array().filter(|items| !items.is_empty());
    let numbers = numbers.and_then(|items| items.iter().map(Value::as_f64).collect::<Option<Vec<f64>>>());
    numbers.map(Some).ok_or_else(|| D::Error::custom(format!("must be a list of numbers, found `{value}`")))
}
