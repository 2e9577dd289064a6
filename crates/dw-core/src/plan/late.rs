//! Values whose meaning is settled late: escapes, references, constants and objects to construct.

use serde_json::{Map, Value};

use super::builder::Report;
use crate::{
    arguments::{ArtifactRef, HANDLE_KEY},
    document::child_pointer,
    media::{self, CONSTANT_PREFIX},
    paths,
};

/// Removes the braces of `{x}` under keys that would otherwise name a type.
pub(super) fn unescape(value: &mut Value) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(unescape),
        Value::Object(object) => {
            for (key, item) in object.iter_mut() {
                match item {
                    Value::String(text) if names_type(key) && text.starts_with('{') && text.ends_with('}') => {
                        *text = text.trim_matches(['{', '}']).to_owned();
                    }
                    _ => unescape(item),
                }
            }
        }
        _ => {}
    }
}

/// Whether a text under this key names a type: `*_type`, `*_dtype`, `dtype`.
fn names_type(key: &str) -> bool {
    key.ends_with("_type") || key.ends_with("_dtype") || key == "dtype"
}

/// The number of the artifact that stands for values a sub-workflow will be given later.
const OPAQUE: u64 = u64::MAX;

/// A value as far as it is known now: what is settled late becomes an artifact that nobody looks at.
pub(super) fn opaque(value: &Value) -> Value {
    match value {
        Value::Array(items) => items.iter().map(opaque).collect(),
        Value::Object(object) if object.contains_key(HANDLE_KEY) => value.clone(),
        _ if is_late(value) => ArtifactRef(OPAQUE).to_value(),
        _ => value.clone(),
    }
}

/// Whether a value holds something that a sub-workflow will be given later.
pub(super) fn holds_opaque(value: &Value) -> bool {
    match value {
        Value::Array(items) => items.iter().any(holds_opaque),
        Value::Object(object) => {
            ArtifactRef::from_value(value) == Some(ArtifactRef(OPAQUE)) || object.values().any(holds_opaque)
        }
        _ => false,
    }
}

/// Whether a value is not known before the run: it is, or holds, a reference, an artifact, a constant or an
/// object to construct.
pub(super) fn is_late(value: &Value) -> bool {
    match value {
        Value::String(text) => media::is_reference(text),
        Value::Array(items) => items.iter().any(is_late),
        Value::Object(object) => {
            object.contains_key(HANDLE_KEY) || construction(object).is_some() || object.values().any(is_late)
        }
        _ => false,
    }
}

const FORMS: &[&str] = &["from_file", "from_previous_result", "from_arguments"];

/// The form by which an object describes another to construct, if it does.
fn construction(object: &Map<String, Value>) -> Option<&'static str> {
    let form = *FORMS.iter().find(|form| object.contains_key(**form))?;
    // A `from_file` object without a type is plain data.
    (form != "from_file" || !type_keys(object).is_empty()).then_some(form)
}

fn type_keys(object: &Map<String, Value>) -> Vec<&str> {
    let named = |key: &&String| key.ends_with("_type") && !matches!(key.as_str(), "content_type" | "offload_type");
    object.keys().filter(named).map(String::as_str).collect()
}

/// Checks constants and objects to construct inside `value`, neither of which exist without Python.
pub(super) fn check(report: &mut Report, value: &Value, pointer: &str) {
    match value {
        Value::String(text) => {
            if let Some(name) = text.strip_prefix(CONSTANT_PREFIX) {
                check_constant(report, name.trim(), pointer);
            }
        }
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                check(report, item, &child_pointer(pointer, &index.to_string()));
            }
        }
        Value::Object(object) => match construction(object) {
            Some(form) => check_construction(report, object, form, pointer),
            None => {
                for (key, item) in object {
                    check(report, item, &child_pointer(pointer, key));
                }
            }
        },
        _ => {}
    }
}

fn check_constant(report: &mut Report, name: &str, pointer: &str) {
    if let Err(error) = paths::check_constant_name(name) {
        report.refused("constant", pointer, &error);
        return;
    }
    let message = format!("the constant `{name}` is defined by a Python library, which dw does not have");
    report.unsupported("needs-python", pointer, message).remedy = Some("write its value instead".into());
}

fn check_construction(report: &mut Report, object: &Map<String, Value>, form: &'static str, pointer: &str) {
    let types = type_keys(object);
    let source = &object[form];
    let text = source.as_str().unwrap_or_default();
    let broken = if types.len() != 1 {
        Some(format!("an object with `{form}` needs exactly one '_type' key, found {}", types.len()))
    } else if form == "from_arguments" && !source.is_object() {
        Some("`from_arguments` must be an object".to_owned())
    } else if form == "from_arguments" && object.len() > 2 {
        let sibling = object.keys().find(|key| *key != form && *key != types[0]).map_or("", String::as_str);
        Some(format!("`{sibling}` stands beside `from_arguments`; move it inside"))
    } else if form == "from_file" && (!source.is_string() || media::is_reference(text)) {
        Some("`from_file` must be a path or URL".to_owned())
    } else if form == "from_previous_result" && !source.is_string() {
        Some("`from_previous_result` must name a step".to_owned())
    } else {
        None
    };
    if let Some(message) = broken {
        report.error("construction", pointer, message);
        return;
    }
    let class = object[types[0]].as_str().unwrap_or("?");
    let message = format!("`{form}` constructs a `{class}`, a Python class that dw does not have");
    report.unsupported("needs-python", pointer, message);
}
