//! Structure of a document against the schema, told in plain words.
//!
//! The raw document is checked against the strict schema, passing over `variable:` texts where they may
//! stand; that is the published schema with better messages. The plan checks again once they are bound.

use std::sync::LazyLock;

use jsonschema::{
    JsonType, ValidationError, Validator,
    error::{TypeKind, ValidationErrorKind as Kind},
};
use serde_json::Value;

use super::schema::strict_schema;
use crate::{
    document::{Document, child_pointer},
    finding::{Finding, Severity},
    nearest::nearest,
    paths::MAX_STEPS,
};

static STRICT: LazyLock<Structure<'static>> =
    LazyLock::new(|| Structure::new(strict_schema()).expect("a test compiles the schema that is generated here"));

/// Beyond this many complaints nobody reads on, and finding each one's place costs a walk over the text.
const MOST_COMPLAINTS: usize = 100;

/// Everything that is wrong with the structure of a document, in the order of its text.
pub fn check(document: &Document) -> Vec<Finding> {
    let steps = document.value.get("steps").and_then(Value::as_array).map_or(0, Vec::len);
    if steps > MAX_STEPS {
        return vec![document.error("too-large", "/steps", format!("too many steps: {steps} > {MAX_STEPS}"))];
    }
    let tolerate = |pointer: &str, value: &Value| is_variable(value) && !stands_for_structure(pointer);
    let complaints = Structure::strict().complaints(&document.value, &tolerate);
    let mut findings: Vec<Finding> = complaints.into_iter().map(|complaint| complaint.finding(document)).collect();
    crate::finding::settle(&mut findings);
    findings
}

fn is_variable(value: &Value) -> bool {
    value.as_str().is_some_and(|text| text.starts_with("variable:"))
}

/// Whether a pointer is a place that no variable can stand for.
fn stands_for_structure(pointer: &str) -> bool {
    let tokens: Vec<&str> = pointer.split('/').skip(1).collect();
    match tokens.as_slice() {
        [] | ["steps" | "variables"] | ["steps", _] => true,
        ["steps", _, key] => ACTIONS.contains(key),
        _ => false,
    }
}

const ACTIONS: &[&str] = &["task", "pipeline", "pipeline_reference", "workflow"];

/// One thing that is wrong with a value, before it has a place in a text.
#[derive(Clone, Debug)]
pub(crate) struct Complaint {
    /// JSON pointer of the value.
    pub(crate) pointer: String,
    /// Whether it is about the key rather than the value.
    pub(crate) at_key: bool,
    /// Stable short name.
    pub(crate) code: &'static str,
    /// What is wrong.
    pub(crate) message: String,
    /// The next thing to try.
    pub(crate) remedy: Option<String>,
}

impl Complaint {
    fn new(code: &'static str, pointer: &str, message: String) -> Self {
        Self { pointer: pointer.to_owned(), at_key: false, code, message, remedy: None }
    }

    fn remedy(self, remedy: Option<String>) -> Self {
        Self { remedy, ..self }
    }

    pub(crate) fn finding(self, document: &Document) -> Finding {
        let Self { pointer, at_key, code, message, remedy } = self;
        let place = if at_key { document.key_place(&pointer) } else { document.place(&pointer) };
        Finding { severity: Severity::Error, code, message, remedy, place }
    }
}

/// Decides which mismatches are passed over, by pointer and value.
pub(crate) type Tolerate<'a> = &'a dyn Fn(&str, &Value) -> bool;

/// A compiled schema that complains in plain words.
pub(crate) struct Structure<'a> {
    schema: &'a Value,
    validator: Validator,
}

impl<'a> Structure<'a> {
    /// Compiles a schema; none when it is not one.
    pub(crate) fn new(schema: &'a Value) -> Option<Self> {
        let validator = jsonschema::draft202012::options().build(schema).ok()?;
        Some(Self { schema, validator })
    }

    /// The strict schema of workflows.
    pub(crate) fn strict() -> &'static Structure<'static> {
        &STRICT
    }

    /// What is wrong with `value`, less what `tolerate` passes over, up to [`MOST_COMPLAINTS`].
    pub(crate) fn complaints(&self, value: &Value, tolerate: Tolerate) -> Vec<Complaint> {
        self.validator
            .iter_errors(value)
            .flat_map(|error| self.explain(&error, tolerate))
            .take(MOST_COMPLAINTS)
            .collect()
    }

    fn explain(&self, error: &ValidationError, tolerate: Tolerate) -> Vec<Complaint> {
        let pointer = error.instance_path().as_str();
        let value = error.instance();
        if tolerate(pointer, value) {
            return Vec::new();
        }
        let name = name_of(pointer);
        let wrong = |code, message| vec![Complaint::new(code, pointer, message)];
        match error.kind() {
            Kind::AnyOf { context } | Kind::OneOfNotValid { context } => self.explain_choice(error, context, tolerate),
            Kind::OneOfMultipleValid { .. } if !value.is_object() => Vec::new(),
            Kind::OneOfMultipleValid { .. } => vec![explain_presence(pointer, value)],
            Kind::AdditionalProperties { unexpected } | Kind::UnevaluatedProperties { unexpected } => {
                unexpected.iter().map(|key| self.unknown_key(error, pointer, key)).collect()
            }
            Kind::Required { property } => {
                let property = property.as_str().unwrap_or_default();
                wrong("missing-key", format!("`{property}` is a required property of {}", owner_of(pointer)))
            }
            Kind::Enum { options } => {
                let options: Vec<&str> = options.as_array().into_iter().flatten().filter_map(Value::as_str).collect();
                vec![wrong_word(pointer, value, &options)]
            }
            Kind::Type { kind } => vec![wrong_type(pointer, value, &types_of(kind))],
            Kind::MinItems { limit } => wrong("wrong-value", format!("{name} must have at least {limit} item(s)")),
            Kind::MaxItems { limit } => wrong("wrong-value", format!("{name} must have at most {limit} item(s)")),
            Kind::Minimum { limit } => wrong("wrong-value", bound(&name, "at least", limit, value)),
            Kind::Maximum { limit } => wrong("wrong-value", bound(&name, "at most", limit, value)),
            Kind::ExclusiveMinimum { limit } => wrong("wrong-value", bound(&name, "above", limit, value)),
            Kind::ExclusiveMaximum { limit } => wrong("wrong-value", bound(&name, "below", limit, value)),
            _ => wrong("wrong-value", format!("{name}: {error}")),
        }
    }

    /// A choice between alternatives failed: say which alternatives there are, or follow the one that was meant.
    fn explain_choice(
        &self,
        error: &ValidationError,
        context: &[Vec<ValidationError<'static>>],
        tolerate: Tolerate,
    ) -> Vec<Complaint> {
        let pointer = error.instance_path().as_str();
        let mismatch = |error: &ValidationError| error.instance_path().as_str() == pointer;
        let presence = |branch: &Vec<ValidationError<'static>>| {
            branch
                .iter()
                .all(|error| mismatch(error) && matches!(error.kind(), Kind::Required { .. } | Kind::Not { .. }))
        };
        if context.iter().all(presence) {
            return vec![explain_presence(pointer, error.instance())];
        }
        let options: Option<Vec<&str>> = context.iter().map(|branch| constant_of(branch, pointer)).collect();
        if let Some(options) = options {
            return vec![wrong_word(pointer, error.instance(), &options)];
        }
        let branches: Vec<Vec<Complaint>> = context
            .iter()
            .map(|branch| branch.iter().flat_map(|error| self.explain(error, tolerate)).collect())
            .collect();
        if branches.iter().any(Vec::is_empty) {
            return Vec::new();
        }
        let type_of_branch = |branch: &Vec<ValidationError<'static>>| {
            branch.iter().filter(|error| mismatch(error)).find_map(|error| match error.kind() {
                Kind::Type { kind } => Some(types_of(kind)),
                _ => None,
            })
        };
        if let Some(meant) = context.iter().position(|branch| type_of_branch(branch).is_none()) {
            return branches.into_iter().nth(meant).unwrap_or_default();
        }
        let types: Vec<JsonType> = context.iter().filter_map(type_of_branch).flatten().collect();
        vec![wrong_type(pointer, error.instance(), &types)]
    }

    fn unknown_key(&self, error: &ValidationError, pointer: &str, key: &str) -> Complaint {
        let owner = error.schema_path().as_str().rsplit_once('/').map_or("", |(owner, _)| owner);
        let known = self.schema.pointer(&format!("{owner}/properties")).and_then(Value::as_object);
        let near = known.and_then(|known| nearest(key, known.keys().map(String::as_str)));
        let message = format!("{} has no key `{key}`", owner_of(pointer));
        Complaint { at_key: true, ..Complaint::new("unknown-key", &child_pointer(pointer, key), message) }
            .remedy(near.map(|near| format!("did you mean `{near}`?")))
    }
}

/// Too few or too many of keys that exclude each other.
fn explain_presence(pointer: &str, value: &Value) -> Complaint {
    let has = |keys: &[&'static str]| keys.iter().copied().filter(|key| value.get(*key).is_some()).collect::<Vec<_>>();
    let complain =
        |code, message: String, remedy: &str| Complaint::new(code, pointer, message).remedy(Some(remedy.to_owned()));
    let exactly_one = |keys: &[&'static str], owner: &str, remedy: &str| match has(keys).as_slice() {
        [] => complain("missing-key", format!("{owner} has neither {}", join_words(keys, "nor")), remedy),
        found => complain("conflicting-keys", format!("{owner} has {}", join_words(found, "and")), remedy),
    };
    let tokens: Vec<&str> = pointer.split('/').skip(1).collect();
    match tokens.as_slice() {
        ["steps", index] => explain_actions(pointer, index, value, &has(ACTIONS)),
        ["steps", _, "task"] => {
            exactly_one(&["arguments", "inputs"], "the task", "give it either `arguments` or `inputs`")
        }
        [.., "from_pretrained_arguments"] => {
            let keys = &["model_name", "from_single_file", "task"];
            exactly_one(keys, "`from_pretrained_arguments`", "keep one of them")
        }
        [.., "chain"] => exactly_one(&["segments", "match_audio"], "the chain", "give it exactly one of them"),
        [.., "scheduler" | "audio_scheduler"] => {
            exactly_one(&["configuration", "shift"], "the scheduler", "give it at least one of them")
        }
        _ => Complaint::new("wrong-value", pointer, format!("{} has the wrong keys", owner_of(pointer))),
    }
}

fn explain_actions(pointer: &str, index: &str, value: &Value, found: &[&str]) -> Complaint {
    let name = value.get("name").and_then(Value::as_str);
    let step = name.map_or_else(|| format!("step {index} (counted from 0)"), |name| format!("step `{name}`"));
    if found.is_empty() {
        let mut keys = value.as_object().into_iter().flat_map(|object| object.keys());
        let near = keys.find_map(|key| nearest(key, ACTIONS.iter().copied()).map(|near| (key, near)));
        let remedy = match near {
            Some((key, near)) => format!("did you mean `{near}` where it says `{key}`?"),
            None => format!("give it one of {}", join_words(ACTIONS, "or")),
        };
        Complaint::new("step-action", pointer, format!("{step} has no action")).remedy(Some(remedy))
    } else {
        let message = format!("{step} has {} actions: {}", found.len(), join_words(found, "and"));
        let remedy = "a step has exactly one action; make a step of each".to_owned();
        Complaint::new("step-action", pointer, message).remedy(Some(remedy))
    }
}

/// The one text that a failed alternative would have allowed, if it is of that kind.
fn constant_of<'a>(branch: &'a [ValidationError<'static>], pointer: &str) -> Option<&'a str> {
    branch.iter().find_map(|error| match error.kind() {
        Kind::Constant { expected_value } if error.instance_path().as_str() == pointer => expected_value.as_str(),
        _ => None,
    })
}

fn wrong_word(pointer: &str, value: &Value, options: &[&str]) -> Complaint {
    let message = format!("{} must be {}, found {}", name_of(pointer), join_words(options, "or"), describe(value));
    let near = value.as_str().and_then(|text| nearest(text, options.iter().copied()));
    Complaint::new("wrong-value", pointer, message).remedy(near.map(|near| format!("did you mean `{near}`?")))
}

fn wrong_type(pointer: &str, value: &Value, types: &[JsonType]) -> Complaint {
    let mut words: Vec<&str> = types.iter().map(|kind| type_words(*kind)).collect();
    if words.contains(&"a number") {
        words.retain(|word| *word != "a whole number");
    }
    words.dedup();
    let expected = words.join(" or ");
    let numeric = value.as_str().is_some_and(|text| text.trim().parse::<f64>().is_ok());
    let wants_number = expected.contains("number");
    let remedy = (numeric && wants_number).then(|| "remove the quotes".to_owned());
    let message = format!("{} must be {expected}, found {}", name_of(pointer), describe(value));
    Complaint::new("wrong-type", pointer, message).remedy(remedy)
}

fn types_of(kind: &TypeKind) -> Vec<JsonType> {
    match kind {
        TypeKind::Single(single) => vec![*single],
        TypeKind::Multiple(set) => set.iter().collect(),
    }
}

fn type_words(kind: JsonType) -> &'static str {
    match kind {
        JsonType::Array => "a list",
        JsonType::Boolean => "`true` or `false`",
        JsonType::Integer => "a whole number",
        JsonType::Null => "`null`",
        JsonType::Number => "a number",
        JsonType::Object => "an object",
        JsonType::String => "text",
    }
}

fn bound(name: &str, relation: &str, limit: &Value, value: &Value) -> String {
    format!("{name} must be {relation} {limit}, found {}", describe(value))
}

/// How a message calls the value at a pointer.
fn name_of(pointer: &str) -> String {
    match pointer.rsplit_once('/') {
        None => "the document".to_owned(),
        Some((parent, last)) if last.parse::<usize>().is_ok() => {
            let list = parent.rsplit('/').next().unwrap_or_default();
            format!("item {last} of `{list}`")
        }
        Some((_, last)) => format!("`{}`", last.replace("~1", "/").replace("~0", "~")),
    }
}

/// How a message calls the object at a pointer.
fn owner_of(pointer: &str) -> String {
    let tokens: Vec<&str> = pointer.split('/').skip(1).collect();
    match tokens.as_slice() {
        [] => "the workflow".to_owned(),
        ["steps", index] => format!("step {index} (counted from 0)"),
        _ => name_of(pointer),
    }
}

/// A value as messages show it: short, and with its kind where that matters.
pub(crate) fn describe(value: &Value) -> String {
    const LONGEST: usize = 60;
    match value {
        Value::Object(_) => "an object".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        Value::String(text) if text.chars().count() > LONGEST => {
            let start: String = text.chars().take(LONGEST).collect();
            format!("the text `{start}…`")
        }
        Value::String(text) => format!("the text `{text}`"),
        other => format!("`{other}`"),
    }
}

/// Words in backticks, the last one joined by `or`, `and` or `nor`.
pub(crate) fn join_words(words: &[&str], last: &str) -> String {
    let quoted: Vec<String> = words.iter().map(|word| format!("`{word}`")).collect();
    match quoted.as_slice() {
        [] => String::new(),
        [one] => one.clone(),
        [first @ .., end] => format!("{} {last} {end}", first.join(", ")),
    }
}
