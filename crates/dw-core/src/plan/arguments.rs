//! Arguments of catalogued pipelines and tasks against the schema of their class or command.

use std::path::Path;

use serde_json::{Map, Value};

use super::{Purpose, builder::Report, late};
use crate::{
    catalog::CatalogEntry,
    document::{self, child_pointer},
    media::{self, MediaError},
    workflow::{Structure, nearest},
};

/// Checks pictures and videos in the arguments. Returns the pointers of those that are wrong.
pub(super) fn check_media(report: &mut Report, arguments: &Map<String, Value>, pointer: &str) -> Vec<String> {
    let base_dir = report.document.base_dir.clone();
    let mut copy = arguments.clone();
    let errors = media::walk(&mut copy, &mut |spec, _| {
        spec.locate(&base_dir)?;
        Ok(spec.to_value())
    });
    let mut wrong = Vec::new();
    for (inside, error) in errors {
        let here = format!("{pointer}{inside}");
        let empty = matches!(&error, MediaError::NoLocation { keys, .. } if keys.is_empty());
        if empty && report.purpose == Purpose::Validate {
            report.warning("media", &here, "a picture has to be given here before the workflow can run");
        } else {
            let remedy = match &error {
                MediaError::Input(error) => document::input_remedy(error),
                _ => None,
            };
            report.error("media", &here, error.to_string()).remedy = remedy.map(str::to_owned);
        }
        wrong.push(inside);
    }
    wrong
}

/// Arguments with the locations of their media made absolute, for a sub-workflow in another folder.
pub(super) fn with_absolute_media(arguments: &Map<String, Value>, base_dir: &Path) -> Map<String, Value> {
    let mut copy = arguments.clone();
    media::walk(&mut copy, &mut |mut spec, _| {
        if !spec.location.contains("://") {
            spec.location = base_dir.join(&spec.location).to_string_lossy().into_owned();
        }
        Ok(spec.to_value())
    });
    copy
}

/// Checks that the arguments of `owner` (``the task `canny` ``) exist, are complete and have the right types.
/// `always` are further arguments that every command takes.
pub(super) fn check(
    report: &mut Report,
    entry: &CatalogEntry,
    owner: &str,
    arguments: &Map<String, Value>,
    pointer: &str,
    always: &[&str],
) {
    let wrong_media = check_media(report, arguments, pointer);
    let known = properties(&entry.schema);
    if is_closed(&entry.schema) {
        check_unknown(report, &known, owner, arguments, pointer, always);
    }
    for name in required(&entry.schema) {
        if !arguments.contains_key(name) {
            let message = format!("{owner} needs the argument `{name}`");
            report.error("missing-argument", pointer, message).remedy = Some(format!("add `{name}`"));
        }
    }
    check_types(report, &entry.schema, arguments, pointer, &wrong_media);
}

fn check_unknown(
    report: &mut Report,
    known: &Map<String, Value>,
    owner: &str,
    arguments: &Map<String, Value>,
    pointer: &str,
    always: &[&str],
) {
    for name in arguments.keys().filter(|name| !known.contains_key(*name) && !always.contains(&name.as_str())) {
        let place = child_pointer(pointer, name);
        let remedy = match nearest(name, known.keys().map(String::as_str)) {
            Some(near) => format!("did you mean `{near}`?"),
            None => "remove it".to_owned(),
        };
        let finding = report.error("unknown-argument", &place, format!("{owner} has no argument `{name}`"));
        finding.remedy = Some(remedy);
        let place = report.document.key_place(&place);
        if let Some(finding) = report.findings.last_mut() {
            finding.place = place;
        }
    }
}

fn check_types(
    report: &mut Report,
    schema: &Value,
    arguments: &Map<String, Value>,
    pointer: &str,
    wrong_media: &[String],
) {
    // Presence has been checked with better words.
    let mut schema = schema.clone();
    if let Some(schema) = schema.as_object_mut() {
        for key in ["required", "additionalProperties", "unevaluatedProperties"] {
            schema.remove(key);
        }
    }
    let Some(structure) = Structure::new(&schema) else { return };
    let tolerate = |inside: &str, value: &Value| {
        late::is_late(value) || wrong_media.iter().any(|wrong| wrong.starts_with(inside) && !inside.is_empty())
    };
    for complaint in structure.complaints(&Value::Object(arguments.clone()), &tolerate) {
        let place = format!("{pointer}{}", complaint.pointer);
        let finding = report.error("argument-type", &place, complaint.message);
        finding.remedy = complaint.remedy;
    }
}

/// Whether a schema refuses keys that it does not name.
fn is_closed(schema: &Value) -> bool {
    ["additionalProperties", "unevaluatedProperties"].iter().any(|key| schema.get(*key) == Some(&Value::Bool(false)))
}

/// Properties of an object schema, including those of schemas it is put together from.
pub(super) fn properties(schema: &Value) -> Map<String, Value> {
    let mut found = Map::new();
    for part in parts(schema) {
        if let Some(Value::Object(properties)) = part.get("properties") {
            found.extend(properties.clone());
        }
    }
    found
}

fn required(schema: &Value) -> Vec<&str> {
    let lists = parts(schema).into_iter().filter_map(|part| part.get("required")?.as_array());
    lists.flatten().filter_map(Value::as_str).collect()
}

/// A schema and what it refers to by `$ref` and `allOf` at its top.
fn parts(schema: &Value) -> Vec<&Value> {
    let mut parts = vec![schema];
    let resolve = |part: &Value| {
        let reference = part.get("$ref")?.as_str()?.strip_prefix('#')?;
        schema.pointer(reference)
    };
    parts.extend(resolve(schema));
    for part in schema.get("allOf").and_then(Value::as_array).into_iter().flatten() {
        parts.push(resolve(part).unwrap_or(part));
    }
    parts
}
