//! Which values the variables of a workflow can have, where that can be listed: found by looking where in
//! the workflow a variable is used, and what the build's schemas say about that place.

use std::collections::BTreeMap;

use dw_core::{catalog::Catalog, variables::VARIABLE_PREFIX};
use serde_json::Value;

use crate::commands::catalog::referred;

/// Number formats, as workflows name them.
const NUMBER_FORMATS: [&str; 3] = ["torch.float32", "torch.float16", "torch.bfloat16"];

/// Schemas refer to each other; deeper than this they say nothing about a choice.
const DEEPEST: usize = 6;

/// The values of each variable that has a choice, by its name.
pub(super) fn choices(document: &Value, catalog: &Catalog) -> BTreeMap<String, Vec<String>> {
    let mut found = BTreeMap::new();
    for (name, default) in document["variables"].as_object().into_iter().flatten() {
        if default.is_boolean() {
            found.insert(name.clone(), vec!["true".into(), "false".into()]);
        }
    }
    for step in document["steps"].as_array().into_iter().flatten() {
        let entry = match (&step["pipeline"]["configuration"]["component_type"], &step["task"]["command"]) {
            (Value::String(class), _) => catalog.pipeline(class),
            (_, Value::String(command)) => catalog.task(command),
            _ => None,
        };
        let schema = entry.map(|entry| &entry.schema);
        for arguments in [&step["pipeline"]["arguments"], &step["task"]["arguments"]] {
            for (key, value) in arguments.as_object().into_iter().flatten() {
                let property = schema.map(|schema| (&schema["properties"][key], schema));
                let values = || property.map(|(property, root)| listed(property, root, 0)).unwrap_or_default();
                add(&mut found, value, values);
            }
        }
        walk(step, catalog, &mut found);
    }
    found
}

/// Looks for keys that take the name of a class, at any depth.
fn walk(value: &Value, catalog: &Catalog, found: &mut BTreeMap<String, Vec<String>>) {
    let names = |entries: &[dw_core::catalog::CatalogEntry]| entries.iter().map(|entry| entry.name.clone()).collect();
    match value {
        Value::Object(object) => {
            for (key, value) in object {
                match key.as_str() {
                    "scheduler_type" => add(found, value, || names(&catalog.schedulers)),
                    "component_type" => add(found, value, || names(&catalog.pipelines)),
                    "torch_dtype" => add(found, value, || NUMBER_FORMATS.map(str::to_owned).to_vec()),
                    _ => walk(value, catalog, found),
                }
            }
        }
        Value::Array(items) => items.iter().for_each(|item| walk(item, catalog, found)),
        _ => {}
    }
}

/// Notes the values for the variable that stands there.
fn add(found: &mut BTreeMap<String, Vec<String>>, value: &Value, values: impl FnOnce() -> Vec<String>) {
    let Some(name) = value.as_str().and_then(|text| text.strip_prefix(VARIABLE_PREFIX)) else { return };
    let values = values();
    if !values.is_empty() {
        found.insert(name.to_owned(), values);
    }
}

/// The texts that a schema allows, when it allows only certain ones.
fn listed(schema: &Value, root: &Value, depth: usize) -> Vec<String> {
    if depth > DEEPEST {
        return Vec::new();
    }
    if let Some(definition) = referred(schema, root) {
        return listed(definition, root, depth + 1);
    }
    if let Some(value) = schema["const"].as_str() {
        return vec![value.to_owned()];
    }
    if let Some(values) = schema["enum"].as_array() {
        return values.iter().filter_map(Value::as_str).map(str::to_owned).collect();
    }
    let alternatives = ["anyOf", "oneOf"].into_iter().filter_map(|key| schema[key].as_array()).flatten();
    alternatives.flat_map(|schema| listed(schema, root, depth + 1)).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_variable_has_the_values_of_the_place_where_it_is_used() {
        let document = json!({
            "variables": {"sampler": "DDIMScheduler", "output": "pil", "fast": true, "prompt": "a boat"},
            "steps": [{"name": "paint", "pipeline": {
                "configuration": {"component_type": "StableDiffusionXLPipeline"},
                "scheduler": {"configuration": {"scheduler_type": "variable:sampler"}},
                "arguments": {"prompt": "variable:prompt", "output_type": "variable:output"},
            }}],
        });
        let catalog = dw_engine::Engine::catalog();
        let found = choices(&document, &catalog);
        assert!(found["sampler"].contains(&"EulerDiscreteScheduler".to_owned()));
        assert!(found["output"].contains(&"latent".to_owned()), "{found:?}");
        assert_eq!(found["fast"], ["true", "false"]);
        assert_eq!(found.get("prompt"), None);
    }
}
