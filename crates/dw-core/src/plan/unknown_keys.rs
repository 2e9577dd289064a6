//! Keys that nothing reads. The format allows further keys nearly everywhere, so they are no errors; but a key that is
//! misspelt would otherwise be passed over in silence.

use serde_json::{Map, Value};

use super::builder::Report;
use crate::{document::child_pointer, nearest::nearest, workflow::schema};

/// Notes the keys below `value` that the format does not name, where it names all keys that have a meaning: an object
/// that takes arguments of something else says so in the schema by `additionalProperties`.
pub(super) fn check(report: &mut Report, value: &Value) {
    walk(report, value, schema(), "");
}

fn walk(report: &mut Report, value: &Value, described: &Value, pointer: &str) {
    match value {
        Value::Object(members) => {
            if let Some(object) = only(described, "object") {
                walk_members(report, members, object, pointer);
            }
        }
        Value::Array(items) => {
            let Some(described) = only(described, "array").and_then(|array| array.get("items")) else { return };
            for (index, item) in items.iter().enumerate() {
                walk(report, item, described, &child_pointer(pointer, &index.to_string()));
            }
        }
        _ => {}
    }
}

fn walk_members(report: &mut Report, members: &Map<String, Value>, object: &Value, pointer: &str) {
    let nothing = Map::new();
    let known = object.get("properties").and_then(Value::as_object).unwrap_or(&nothing);
    let further = object.get("additionalProperties");
    for (key, value) in members {
        let place = child_pointer(pointer, key);
        if let Some(described) = known.get(key).or(further) {
            walk(report, value, described, &place);
        } else if !known.is_empty() && !is_remark(key) {
            let near = nearest(key, known.keys().map(String::as_str)).map(|near| format!("did you mean `{near}`?"));
            report
                .warning("unknown-key", &place, format!("`{key}` has no meaning here, and nothing reads it"))
                .remedy =
                Some(near.unwrap_or_else(|| "remove it, or begin its name with `_` to keep it as a remark".into()));
        }
    }
}

/// Keys by which people and editors leave word in a document.
fn is_remark(key: &str) -> bool {
    key.starts_with(['$', '_', '/']) || ["comment", "comments", "description", "note", "notes"].contains(&key)
}

/// The alternative of this JSON type, when there is exactly one.
fn only<'a>(described: &'a Value, json_type: &str) -> Option<&'a Value> {
    let mut found = Vec::new();
    alternatives(described, &mut found);
    found.retain(|schema| schema.get("type").and_then(Value::as_str) == Some(json_type));
    match found[..] {
        [one] => Some(one),
        _ => None,
    }
}

fn alternatives<'a>(described: &'a Value, found: &mut Vec<&'a Value>) {
    if let Some(name) = described.get("$ref").and_then(Value::as_str) {
        let target = schema().pointer(name.trim_start_matches('#'));
        if let Some(target) = target {
            alternatives(target, found);
        }
        return;
    }
    let several = ["anyOf", "oneOf"].iter().find_map(|key| described.get(*key)).and_then(Value::as_array);
    match several {
        // The type beside alternatives makes them conditions on one object.
        Some(several) if described.get("type").is_none() => {
            for alternative in several {
                alternatives(alternative, found);
            }
        }
        _ => found.push(described),
    }
}
