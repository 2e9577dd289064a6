//! The arguments of one call: plain JSON, with artifacts held beside it.
//!
//! Everything in the language works on JSON. A picture (or any artifact that is not JSON) travels
//! through it as a handle, the object `{"$artifact": 7}`, and the artifact itself is looked up in the
//! table that goes with the arguments. Typed argument structs hold an [`ArtifactRef`] in that place.

use std::{borrow::Cow, collections::BTreeMap};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};
use serde_json::{Map, Value, json};

use crate::artifact::Artifact;

/// The reserved key of a handle. A workflow document may not contain it.
pub const HANDLE_KEY: &str = "$artifact";

/// Arguments of one call of a pipeline or task, every reference already replaced.
#[derive(Clone, Debug, Default)]
pub struct Arguments {
    /// The named arguments.
    pub values: Map<String, Value>,
    /// The bare item (a string, a number) of a task's `inputs` list that this call is for, if it is one.
    pub input: Option<Value>,
    /// The artifacts that handles inside `values` stand for.
    pub artifacts: BTreeMap<u64, Artifact>,
}

impl Arguments {
    /// The artifact a handle stands for; none when the table does not hold it.
    pub fn get(&self, handle: ArtifactRef) -> Option<&Artifact> {
        self.artifacts.get(&handle.0)
    }
}

/// A place in typed arguments that holds an artifact: a picture, an array.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ArtifactRef(pub u64);

impl ArtifactRef {
    /// The handle as it stands in JSON.
    pub fn to_value(self) -> Value {
        json!({ HANDLE_KEY: self.0 })
    }

    /// The handle that `value` is, if it is one.
    pub fn from_value(value: &Value) -> Option<Self> {
        let object = value.as_object().filter(|object| object.len() == 1)?;
        object.get(HANDLE_KEY)?.as_u64().map(Self)
    }
}

impl<'de> Deserialize<'de> for ArtifactRef {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        Self::from_value(&value)
            .ok_or_else(|| D::Error::custom(format!("expected a picture or an earlier result, found {value}")))
    }
}

impl Serialize for ArtifactRef {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.to_value().serialize(serializer)
    }
}

impl JsonSchema for ArtifactRef {
    fn schema_name() -> Cow<'static, str> {
        "Media".into()
    }

    /// What a workflow writes in this place: a path or URL, an object with `location`, or a reference.
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "a path or URL, an object with `location`, or `previous_result:STEP`",
            "anyOf": [
                { "type": "string" },
                { "type": "object", "required": ["location"], "properties": { "location": { "type": "string" } } }
            ]
        })
    }
}
