//! `dw pipelines`, `dw schedulers`, `dw tasks`: what this build can run, from the same schemas that
//! workflows are checked against.

use std::collections::BTreeSet;

use dw_core::{catalog::CatalogEntry, nearest::nearest};
use serde_json::Value;

use crate::{
    args::CatalogArgs,
    error::{CliError, Exit},
    render::{
        table::Table,
        text::{print, print_json},
    },
};

/// The words for one kind of thing.
pub(super) struct Kind {
    /// What one is called in a sentence.
    noun: &'static str,
    /// What its schema's properties are called, above their table.
    property: &'static str,
    /// The command that lists them.
    command: &'static str,
}

impl Kind {
    /// Pipeline classes.
    pub(super) const PIPELINES: Self = Self { noun: "pipeline class", property: "ARGUMENT", command: "dw pipelines" };
    /// Schedulers.
    pub(super) const SCHEDULERS: Self = Self { noun: "scheduler", property: "OPTION", command: "dw schedulers" };
    /// Task commands.
    pub(super) const TASKS: Self = Self { noun: "task command", property: "ARGUMENT", command: "dw tasks" };
}

/// Prints all entries, or the one that is asked for.
pub(super) fn show(args: &CatalogArgs, kind: &Kind, entries: &[CatalogEntry]) -> Result<Exit, CliError> {
    match &args.name {
        None if args.json => print_json(&entries)?,
        None => print(&list(entries))?,
        Some(name) => {
            let entry = find(name, kind, entries)?;
            if args.json { print_json(entry)? } else { print(&describe(entry, kind))? }
        }
    }
    Ok(Exit::Done)
}

fn list(entries: &[CatalogEntry]) -> String {
    let mut table = Table::new(["NAME", "WHAT IT DOES"]);
    for entry in entries {
        table.row([entry.name.clone(), entry.summary.clone()]);
    }
    table.render()
}

/// The entry of that name. Capitals do not matter to a person at a terminal.
fn find<'a>(name: &str, kind: &Kind, entries: &'a [CatalogEntry]) -> Result<&'a CatalogEntry, CliError> {
    let exact = entries.iter().find(|entry| entry.name == name);
    exact.or_else(|| entries.iter().find(|entry| entry.name.eq_ignore_ascii_case(name))).ok_or_else(|| {
        let near = nearest(name, entries.iter().map(|entry| entry.name.as_str()));
        let hint = near.map(|name| format!("did you mean `{name}`? ")).unwrap_or_default();
        CliError::Usage(format!("this build has no {} `{name}`; {hint}`{}` lists all", kind.noun, kind.command))
    })
}

fn describe(entry: &CatalogEntry, kind: &Kind) -> String {
    let arguments = arguments(&entry.schema);
    if arguments.is_empty() {
        return format!("{}\n{}\n\nIt takes none.\n", entry.name, entry.summary);
    }
    let mut table = Table::new([kind.property, "TYPE", "DEFAULT", "MEANING"]);
    for argument in arguments {
        table.row([argument.name, argument.kind, argument.default, argument.description]);
    }
    format!("{}\n{}\n\n{}", entry.name, entry.summary, table.render())
}

/// One property of a schema, in words.
#[derive(Debug, PartialEq, Eq)]
struct Argument {
    name: String,
    kind: String,
    default: String,
    description: String,
}

fn arguments(schema: &Value) -> Vec<Argument> {
    let required: Vec<_> = schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let properties = schema["properties"].as_object().into_iter().flatten();
    let argument = |(name, property): (&String, &Value)| Argument {
        name: name.clone(),
        kind: kind(property, schema, 0),
        default: default(property, required.contains(&name.as_str())),
        description: description(property, schema),
    };
    properties.map(argument).collect()
}

fn default(property: &Value, required: bool) -> String {
    match &property["default"] {
        Value::Null if required => "required".into(),
        Value::Null => "-".into(),
        value => value.to_string(),
    }
}

/// The property's own description, else that of the definition it refers to.
fn description(property: &Value, root: &Value) -> String {
    let own = property["description"].as_str();
    let referred = || referred(property, root).and_then(|definition| definition["description"].as_str());
    own.or_else(referred).unwrap_or_default().to_owned()
}

/// The definition that a schema refers to, directly or as one of `allOf`.
pub(crate) fn referred<'a>(schema: &Value, root: &'a Value) -> Option<&'a Value> {
    let reference = schema["$ref"].as_str().or_else(|| schema["allOf"][0]["$ref"].as_str())?;
    root.pointer(reference.strip_prefix('#')?)
}

/// The type of a schema in words: `integer`, `string or list of string`, `"pil" or "latent"`.
fn kind(schema: &Value, root: &Value, depth: usize) -> String {
    // A schema may refer to itself.
    if depth > 4 {
        return "any".into();
    }
    if let Some(definition) = referred(schema, root) {
        // Pictures may be written in so many ways that the word says more.
        return if is_media(schema) { "media".into() } else { kind(definition, root, depth + 1) };
    }
    let inner = |schema: &Value| kind(schema, root, depth + 1);
    let mut words = if let Some(value) = schema.get("const") {
        vec![value.to_string()]
    } else if let Some(values) = schema["enum"].as_array() {
        values.iter().map(Value::to_string).collect()
    } else if let Some(choices) = ["anyOf", "oneOf"].iter().find_map(|key| schema[key].as_array()) {
        choices.iter().map(inner).collect()
    } else {
        type_names(schema).into_iter().map(|name| named(name, schema, inner)).collect()
    };
    let mut seen = BTreeSet::new();
    words.retain(|word| word != "null" && seen.insert(word.clone()));
    if words.is_empty() { "null".into() } else { words.join(" or ") }
}

/// The names in `type`; `any` where there are none.
fn type_names(schema: &Value) -> Vec<&str> {
    match &schema["type"] {
        Value::String(name) => vec![name],
        Value::Array(names) => names.iter().filter_map(Value::as_str).collect(),
        _ => vec!["any"],
    }
}

fn is_media(schema: &Value) -> bool {
    let reference = schema["$ref"].as_str().or_else(|| schema["allOf"][0]["$ref"].as_str());
    reference.is_some_and(|reference| reference.ends_with("/Media"))
}

fn named(name: &str, schema: &Value, kind: impl Fn(&Value) -> String) -> String {
    match (name, schema.get("items")) {
        ("array", Some(items)) => format!("list of {}", kind(items)),
        ("array", None) => "list".into(),
        _ => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn entry(name: &str) -> CatalogEntry {
        CatalogEntry { name: name.into(), summary: "Draws.".into(), schema: json!({}) }
    }

    #[test]
    fn types_are_said_in_words() {
        let root = json!({"$defs": {
            "Media": {"anyOf": [{"type": "string"}, {"type": "object"}]},
            "Output": {"type": "string", "enum": ["pil", "latent"]},
            "Loop": {"type": "array", "items": {"$ref": "#/$defs/Loop"}},
        }});
        let cases = [
            (json!({"type": "integer"}), "integer"),
            (json!({"type": ["number", "null"]}), "number"),
            (json!({"type": "array", "items": {"type": "string"}}), "list of string"),
            (
                json!({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]}),
                "string or list of string",
            ),
            (json!({"$ref": "#/$defs/Output"}), "\"pil\" or \"latent\""),
            (json!({"anyOf": [{"$ref": "#/$defs/Media"}, {"type": "null"}]}), "media"),
            (json!({"oneOf": [{"const": "a"}, {"const": "b"}]}), "\"a\" or \"b\""),
            (json!(true), "any"),
        ];
        for (schema, words) in cases {
            assert_eq!(kind(&schema, &root, 0), words, "{schema}");
        }
        assert!(kind(&json!({"$ref": "#/$defs/Loop"}), &root, 0).starts_with("list of list"));
    }

    #[test]
    fn an_argument_has_its_default_or_is_required() {
        let schema = json!({"type": "object", "required": ["prompt"], "properties": {
            "prompt": {"type": "string", "description": "What to draw"},
            "steps": {"type": "integer", "default": 30},
            "seed": {"type": "integer", "default": null},
        }});
        let rows: Vec<_> = arguments(&schema).into_iter().map(|row| (row.name, row.default)).collect();
        let expected = [("prompt", "required"), ("steps", "30"), ("seed", "-")];
        assert_eq!(rows, expected.map(|(name, default)| (name.to_owned(), default.to_owned())));
    }

    #[test]
    fn an_unknown_name_leads_to_a_known_one() {
        let entries = [entry("gather_images"), entry("qr_code")];
        assert!(find("QR_Code", &Kind::TASKS, &entries).is_ok());
        let error = find("gather_image", &Kind::TASKS, &entries).expect_err("unknown").to_string();
        assert_eq!(
            error,
            "this build has no task command `gather_image`; did you mean `gather_images`? `dw tasks` lists all"
        );
    }
}
