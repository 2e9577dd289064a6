//! The JSON Schema (draft 2020-12) of a workflow, generated from the types beside it.
//!
//! Two forms: the *strict* one describes a workflow whose variables are bound; the published one also
//! lets `variable:NAME` stand wherever a value may.

use std::sync::LazyLock;

use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

use super::Workflow;

static STRICT: LazyLock<Value> = LazyLock::new(|| {
    let settings = SchemaSettings::draft2020_12().for_deserialize();
    let mut schema = Value::from(settings.into_generator().into_root_schema_for::<Workflow>());
    drop_optional_nulls(&mut schema);
    if let Some(root) = schema.as_object_mut() {
        let mut described = Map::new();
        described.insert("$schema".into(), root.remove("$schema").unwrap_or_default());
        described.insert("$id".into(), "workflow.schema.json".into());
        described.append(root);
        *root = described;
    }
    schema
});

static PUBLISHED: LazyLock<Value> = LazyLock::new(|| {
    let mut schema = STRICT.clone();
    allow_variables(&mut schema);
    schema
});

/// The published schema: `variable:NAME` may stand wherever a value may.
pub fn schema() -> &'static Value {
    &PUBLISHED
}

/// The schema of a workflow whose variables are bound.
pub fn strict_schema() -> &'static Value {
    &STRICT
}

/// An absent key and `null` are different things in the format, while derived schemas of `Option`
/// allow both; schemas that mean null say so with `oneOf`.
fn drop_optional_nulls(schema: &mut Value) {
    let Some(object) = schema.as_object_mut() else { return };
    if let Some(Value::Object(properties)) = object.get_mut("properties") {
        for property in properties.values_mut() {
            drop_null(property);
        }
    }
    for key in ["properties", "$defs"] {
        if let Some(Value::Object(children)) = object.get_mut(key) {
            children.values_mut().for_each(drop_optional_nulls);
        }
    }
}

fn drop_null(property: &mut Value) {
    let Some(object) = property.as_object_mut() else { return };
    object.remove("default");
    if let Some(Value::Array(types)) = object.get_mut("type") {
        types.retain(|name| name != "null");
        if let [single] = types.as_slice() {
            let single = single.clone();
            object.insert("type".into(), single);
        }
    }
    if let Some(Value::Array(options)) = object.get_mut("enum") {
        options.retain(|option| !option.is_null());
    }
    let Some(Value::Array(branches)) = object.get_mut("anyOf") else { return };
    branches.retain(|branch| branch != &json!({ "type": "null" }));
    if let [single] = branches.as_slice() {
        let single = single.as_object().cloned().unwrap_or_default();
        object.remove("anyOf");
        object.extend(single);
    }
}

/// Keys whose values no variable can stand for: the plan needs them to know what there is to bind.
const LITERAL_KEYS: &[(&str, &str)] = &[
    ("Workflow", "variables"),
    ("Workflow", "steps"),
    ("Step", "task"),
    ("Step", "pipeline"),
    ("Step", "pipeline_reference"),
    ("Step", "workflow"),
];

fn allow_variables(schema: &mut Value) {
    let Some(root) = schema.as_object_mut() else { return };
    let mut definitions = match root.remove("$defs") {
        Some(Value::Object(definitions)) => definitions,
        _ => Map::new(),
    };
    for (name, definition) in &mut definitions {
        allow_in_properties(name, definition);
        if let Some(Value::Array(branches)) = definition.get_mut("anyOf") {
            branches.iter_mut().for_each(allow_in_children);
        }
    }
    let reference = json!({
        "description": "the value of a declared variable",
        "type": "string",
        "pattern": "^variable:"
    });
    definitions.insert("VariableReference".into(), reference);
    root.insert("$defs".into(), Value::Object(definitions));
    allow_in_properties("Workflow", schema);
}

fn allow_in_properties(owner: &str, schema: &mut Value) {
    let Some(Value::Object(properties)) = schema.get_mut("properties") else { return };
    for (name, property) in properties.iter_mut() {
        if !LITERAL_KEYS.contains(&(owner, name.as_str())) {
            allow_in_value(property);
        }
    }
}

/// Lets a variable stand for a value, for its items, and for the values of its further keys.
fn allow_in_value(schema: &mut Value) {
    allow_in_properties("", schema);
    for key in ["items", "additionalProperties"] {
        if let Some(child) = schema.get_mut(key) {
            allow_in_value(child);
        }
    }
    for key in ["anyOf", "oneOf"] {
        if let Some(Value::Array(branches)) = schema.get_mut(key) {
            branches.iter_mut().for_each(allow_in_children);
        }
    }
    if !accepts_text(schema) {
        let Some(mut object) = schema.as_object().cloned() else { return };
        let description = object.remove("description");
        let mut wrapped = Map::new();
        if let Some(description) = description {
            wrapped.insert("description".into(), description);
        }
        wrapped.insert("anyOf".into(), json!([object, { "$ref": "#/$defs/VariableReference" }]));
        *schema = Value::Object(wrapped);
    }
}

/// The same for what is inside a branch, leaving the branch itself as it is.
fn allow_in_children(branch: &mut Value) {
    allow_in_properties("", branch);
    for key in ["items", "additionalProperties"] {
        if let Some(child) = branch.get_mut(key) {
            allow_in_value(child);
        }
    }
}

fn accepts_text(schema: &Value) -> bool {
    let Some(object) = schema.as_object() else { return true };
    if object.contains_key("enum") || object.contains_key("const") || object.contains_key("$ref") {
        return false;
    }
    for key in ["anyOf", "oneOf"] {
        if let Some(Value::Array(branches)) = object.get(key) {
            return branches.iter().any(accepts_text);
        }
    }
    match object.get("type") {
        Some(Value::String(name)) => name == "string",
        Some(Value::Array(names)) => names.iter().any(|name| name == "string"),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_schema_is_the_one_in_the_repository() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../schema/workflow.schema.json");
        let text = fs_err::read_to_string(path).expect("schema/workflow.schema.json");
        let stored: Value = serde_json::from_str(&text).expect("JSON");
        let remedy = "run `cargo run -p dw-core --example write-schema`";
        assert!(&stored == schema(), "schema/workflow.schema.json is out of date: {remedy}");
    }

    #[test]
    fn the_published_schema_is_a_schema() {
        assert!(jsonschema::meta::is_valid(schema()));
        assert_eq!(schema()["$id"], "workflow.schema.json");
        assert_eq!(schema()["$schema"], "https://json-schema.org/draft/2020-12/schema");
    }

    #[test]
    fn every_property_says_what_it_is() {
        fn walk(name: &str, schema: &Value, missing: &mut Vec<String>) {
            for (key, property) in schema.get("properties").and_then(Value::as_object).into_iter().flatten() {
                if property.get("description").is_none() {
                    missing.push(format!("{name}.{key}"));
                }
            }
        }
        let mut missing = Vec::new();
        walk("Workflow", schema(), &mut missing);
        for (name, definition) in schema()["$defs"].as_object().expect("definitions") {
            walk(name, definition, &mut missing);
        }
        assert_eq!(missing, Vec::<String>::new());
    }
}
