//! Variables: declared defaults, overrides and their types, and `variable:NAME` in a document.
//!
//! Works on JSON alone; where a finding belongs in a text is left to [`crate::plan`].

mod convert;

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value};

use crate::{
    arguments::HANDLE_KEY,
    document::child_pointer,
    media::{self, MediaKind},
    paths::{self, InputError},
    workflow::nearest,
};

pub use convert::convert;

/// What stands before the name of a variable in a text.
pub const VARIABLE_PREFIX: &str = "variable:";

/// What is wrong with a variable, an override or a reference to one.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum VariableError {
    /// An override for a variable that is not declared.
    #[error("Unknown variable '{name}'; declared variables: {}", .declared.join(", "))]
    Unknown {
        /// The name.
        name: String,
        /// Declared names, sorted.
        declared: Vec<String>,
    },
    /// An override for a workflow that declares no variables.
    #[error("Unknown variable '{0}'; the workflow declares no variables")]
    NoneDeclared(String),
    /// A name or a text that breaks a limit.
    #[error("{0}")]
    Input(#[from] InputError),
    /// Text that is neither true nor false.
    #[error("Cannot interpret '{value}' as true/false for variable '{name}'")]
    Boolean {
        /// The variable.
        name: String,
        /// The text.
        value: String,
    },
    /// A value that is not of the variable's type.
    #[error("variable `{name}` expects {expected}, found {found}")]
    Type {
        /// The variable.
        name: String,
        /// The type its default has, in words.
        expected: &'static str,
        /// The value, in words.
        found: String,
        /// What to do about it.
        remedy: Option<String>,
    },
    /// A reference to a variable that is not declared.
    #[error("Variable <{name}> not found")]
    NotFound {
        /// The name.
        name: String,
        /// Declared names, sorted.
        declared: Vec<String>,
    },
    /// Defaults that refer to each other in a circle.
    #[error("variable defaults refer to each other in a circle: {}", .0.join(" -> "))]
    Cycle(Vec<String>),
}

impl VariableError {
    /// A stable short name for findings.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Unknown { .. } | Self::NoneDeclared(_) => "unknown-variable",
            Self::Input(_) => "variable-value",
            Self::Boolean { .. } | Self::Type { .. } => "variable-type",
            Self::NotFound { .. } => "undefined-variable",
            Self::Cycle(_) => "variable-cycle",
        }
    }

    /// The next thing to try.
    pub fn remedy(&self) -> Option<String> {
        match self {
            Self::Unknown { name, declared } => {
                nearest(name, declared.iter().map(String::as_str)).map(|near| format!("did you mean `{near}`?"))
            }
            Self::NotFound { name, declared } => match nearest(name, declared.iter().map(String::as_str)) {
                Some(near) => Some(format!("did you mean `variable:{near}`?")),
                None => Some(format!("declare `{name}` under `variables`")),
            },
            Self::NoneDeclared(name) => Some(format!("declare `{name}` under `variables`, or leave the override out")),
            Self::Boolean { .. } => Some("write `true` or `false`".into()),
            Self::Type { remedy, .. } => remedy.clone(),
            Self::Cycle(_) => Some("give one of them a plain default".into()),
            Self::Input(_) => None,
        }
    }
}

/// Variables with the values they have in a run.
#[derive(Clone, Debug, Default)]
pub struct Bindings {
    values: Map<String, Value>,
}

/// A place where a variable stood in a document, and the variable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Substitution {
    /// JSON pointer of the place.
    pub pointer: String,
    /// The variable.
    pub name: String,
}

impl Bindings {
    /// Binds declared variables (none where a document has no `variables`). An override that is wrong
    /// leaves the default and is reported with its name; a default that is wrong leaves the text as it stands.
    pub fn new(
        declared: Option<&Map<String, Value>>,
        overrides: &Map<String, Value>,
    ) -> (Self, Vec<(String, VariableError)>) {
        let Some(declared) = declared else {
            let unknown = |name: &String| (name.clone(), VariableError::NoneDeclared(name.clone()));
            return (Self::default(), overrides.keys().map(unknown).collect());
        };
        let mut errors = Vec::new();
        let defaults = Defaults { declared, overridden: &Map::new() }.resolve_all(&mut errors);
        let mut overridden = Map::new();
        for (name, value) in overrides {
            let converted = check_override(name, value, &defaults).and_then(|()| convert(name, &defaults[name], value));
            match converted {
                Ok(value) => drop(overridden.insert(name.clone(), value)),
                Err(error) => errors.push((name.clone(), error)),
            }
        }
        // Defaults may refer to overridden variables, so they are resolved again around the overrides.
        let values = if overridden.is_empty() {
            defaults
        } else {
            Defaults { declared, overridden: &overridden }.resolve_all(&mut Vec::new())
        };
        (Self { values }, errors)
    }

    /// The value of a variable.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.values.get(name)
    }

    /// Replaces every `variable:NAME` in `value`, which stands at `pointer` in its document. Returns where
    /// that happened, and reports names that are not declared with their pointers; those texts stay.
    pub fn substitute(
        &self,
        value: &mut Value,
        pointer: &str,
        errors: &mut Vec<(String, VariableError)>,
    ) -> Vec<Substitution> {
        let mut walk = Walk { bindings: self, errors, done: Vec::new() };
        let key = pointer.rsplit('/').next().unwrap_or_default().to_owned();
        walk.value(value, pointer, &key);
        walk.done
    }

    fn not_found(&self, name: &str) -> VariableError {
        VariableError::NotFound { name: name.to_owned(), declared: sorted_names(&self.values) }
    }
}

/// Names of variables that `value` refers to.
pub fn references(value: &Value) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    collect_references(value, &mut names);
    names
}

fn collect_references(value: &Value, names: &mut BTreeSet<String>) {
    match value {
        Value::String(text) => names.extend(text.strip_prefix(VARIABLE_PREFIX).map(str::to_owned)),
        Value::Array(items) => items.iter().for_each(|item| collect_references(item, names)),
        Value::Object(object) => object.values().for_each(|item| collect_references(item, names)),
        _ => {}
    }
}

/// Checks the name and the text of an override before anything is made of it.
fn check_override(name: &str, value: &Value, declared: &Map<String, Value>) -> Result<(), VariableError> {
    paths::check_variable_name(name)?;
    if !declared.contains_key(name) {
        return Err(VariableError::Unknown { name: name.to_owned(), declared: sorted_names(declared) });
    }
    match value {
        Value::String(text) => Ok(paths::check_variable_text(text)?),
        _ => Ok(()),
    }
}

fn sorted_names(variables: &Map<String, Value>) -> Vec<String> {
    let mut names: Vec<String> = variables.keys().cloned().collect();
    names.sort();
    names
}

/// Whether a value is, or holds, an artifact of the run it comes from.
pub(crate) fn holds_artifact(value: &Value) -> bool {
    match value {
        Value::Array(items) => items.iter().any(holds_artifact),
        Value::Object(object) => object.contains_key(HANDLE_KEY) || object.values().any(holds_artifact),
        _ => false,
    }
}

/// Declared defaults, of which some are overridden.
struct Defaults<'a> {
    declared: &'a Map<String, Value>,
    overridden: &'a Map<String, Value>,
}

impl Defaults<'_> {
    fn resolve_all(&self, errors: &mut Vec<(String, VariableError)>) -> Map<String, Value> {
        let mut resolved = BTreeMap::new();
        for name in self.declared.keys() {
            self.resolve(name, &mut Vec::new(), &mut resolved, errors);
        }
        // In the order of declaration, which is the order people see.
        self.declared.keys().filter_map(|name| Some((name.clone(), resolved.remove(name)?))).collect()
    }

    /// The value of `name`; `path` holds the variables whose defaults led here.
    fn resolve(
        &self,
        name: &str,
        path: &mut Vec<String>,
        resolved: &mut BTreeMap<String, Value>,
        errors: &mut Vec<(String, VariableError)>,
    ) -> Value {
        if let Some(value) = resolved.get(name).or_else(|| self.overridden.get(name)) {
            let value = value.clone();
            resolved.insert(name.to_owned(), value.clone());
            return value;
        }
        let mut value = self.declared[name].clone();
        path.push(name.to_owned());
        for reference in references(&value) {
            if let Some(start) = path.iter().position(|earlier| *earlier == reference) {
                let mut circle = path[start..].to_vec();
                circle.push(reference);
                errors.push((name.to_owned(), VariableError::Cycle(circle)));
            } else if self.declared.contains_key(&reference) {
                self.resolve(&reference, path, resolved, errors);
            }
        }
        path.pop();
        let known = Bindings { values: resolved.iter().map(|(name, value)| (name.clone(), value.clone())).collect() };
        let mut unknown = Vec::new();
        known.substitute(&mut value, name, &mut unknown);
        for (_, error) in unknown {
            match error {
                VariableError::NotFound { name: missing, .. } if !self.declared.contains_key(&missing) => {
                    let declared = sorted_names(self.declared);
                    errors.push((name.to_owned(), VariableError::NotFound { name: missing, declared }));
                }
                // Declared but not resolved: part of a circle, which has been reported.
                _ => {}
            }
        }
        resolved.insert(name.to_owned(), value.clone());
        value
    }
}

/// Replaces references on the way through a value.
struct Walk<'a, 'b> {
    bindings: &'a Bindings,
    errors: &'b mut Vec<(String, VariableError)>,
    done: Vec<Substitution>,
}

impl Walk<'_, '_> {
    /// `key` is the nearest object key above the value: it decides whether a location stays text.
    fn value(&mut self, value: &mut Value, pointer: &str, key: &str) {
        match value {
            Value::String(text) => {
                let Some(name) = text.strip_prefix(VARIABLE_PREFIX).map(str::to_owned) else { return };
                match self.bindings.get(&name) {
                    Some(bound) => {
                        *value = placed(&name, bound, key);
                        self.done.push(Substitution { pointer: pointer.to_owned(), name });
                    }
                    None => self.errors.push((pointer.to_owned(), self.bindings.not_found(&name))),
                }
            }
            Value::Array(items) => {
                for (index, item) in items.iter_mut().enumerate() {
                    self.value(item, &child_pointer(pointer, &index.to_string()), key);
                }
            }
            Value::Object(object) => {
                for (key, item) in object.iter_mut() {
                    self.value(item, &child_pointer(pointer, key), key);
                }
            }
            _ => {}
        }
    }
}

/// Keys whose value is the text of a path or URL, never a picture.
const LOCATION_KEYS: &[&str] = &["location", "path", "url", "urls", "glob", "from_file"];

/// The form a variable's value takes under `key`. A variable named like a picture (`image`, `start_image`) holds
/// one, so its text becomes a picture under any key; only where a location is asked for it stays text.
fn placed(name: &str, bound: &Value, key: &str) -> Value {
    let Some(kind) = media::kind_of_key(name) else { return bound.clone() };
    if LOCATION_KEYS.contains(&key) {
        return match bound.get("location") {
            Some(location) if !holds_artifact(bound) => location.clone(),
            _ => bound.clone(),
        };
    }
    if media::kind_of_key(key).is_some() { bound.clone() } else { as_media(kind, bound) }
}

fn as_media(kind: MediaKind, value: &Value) -> Value {
    match value {
        Value::String(text) if !text.is_empty() && !media::is_reference(text) => {
            media::MediaSpec { kind, location: text.clone() }.to_value()
        }
        Value::Object(object) if !object.contains_key("media_type") => match object.get("location") {
            Some(Value::String(location)) => media::MediaSpec { kind, location: location.clone() }.to_value(),
            _ => value.clone(),
        },
        Value::Array(items) => items.iter().map(|item| as_media(kind, item)).collect(),
        _ => value.clone(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn map(value: Value) -> Map<String, Value> {
        value.as_object().cloned().expect("an object")
    }

    fn bind(declared: Value, overrides: Value) -> (Bindings, Vec<(String, VariableError)>) {
        Bindings::new(Some(&map(declared)), &map(overrides))
    }

    fn substituted(declared: Value, mut value: Value) -> (Value, Vec<String>) {
        let (bindings, errors) = bind(declared, json!({}));
        assert_eq!(errors, []);
        let mut errors = Vec::new();
        bindings.substitute(&mut value, "", &mut errors);
        (value, errors.into_iter().map(|(pointer, error)| format!("{pointer}: {error}")).collect())
    }

    #[test]
    fn overrides_take_the_type_of_the_default() {
        let (bindings, errors) =
            bind(json!({"n": 1, "s": "test", "b": true}), json!({"n": "2", "s": "new_test", "b": "false"}));
        assert_eq!(errors, []);
        assert_eq!(Value::Object(bindings.values), json!({"n": 2, "s": "new_test", "b": false}));
    }

    #[test]
    fn an_unknown_override_lists_the_declared_names_sorted() {
        let (_, errors) = bind(json!({"steps": 1, "prompt": ""}), json!({"promt": "x"}));
        let message = errors[0].1.to_string();
        assert!(message.starts_with("Unknown variable 'promt'; declared variables: prompt, steps"), "{message}");
        assert_eq!(errors[0].1.remedy().as_deref(), Some("did you mean `prompt`?"));
    }

    #[test]
    fn names_and_texts_of_overrides_keep_their_limits() {
        let long = "a".repeat(10_001);
        for overrides in [json!({"invalid!name": 1}), json!({"p": long}), json!({"p": "\u{1}"})] {
            let (_, errors) = bind(json!({"p": ""}), overrides);
            assert!(matches!(errors[0].1, VariableError::Input(_)), "{errors:?}");
        }
        assert_eq!(bind(json!({"p": ""}), json!({"p": "line\n\ttab"})).1, []);
    }

    #[test]
    fn whole_texts_are_replaced_at_any_depth_and_nothing_else() {
        let variables = json!({"test": [1], "other": "variable text"});
        let value = json!({"a": "variable:test", "b": ["variable:other", {"c": {"d": "variable:test"}}],
                           "e": "prefix variable:test", "variable:test": 1});
        let (value, errors) = substituted(variables, value);
        assert_eq!(errors, Vec::<String>::new());
        let expected = json!({"a": [1], "b": ["variable text", {"c": {"d": [1]}}],
                              "e": "prefix variable:test", "variable:test": 1});
        assert_eq!(value, expected);
    }

    #[test]
    fn a_missing_variable_is_reported_with_its_place() {
        let (value, errors) = substituted(json!({}), json!({"a": ["variable:missing"]}));
        assert_eq!(errors, ["/a/0: Variable <missing> not found"]);
        assert_eq!(value, json!({"a": ["variable:missing"]}));
    }

    #[test]
    fn defaults_may_refer_to_other_variables_and_follow_their_overrides() {
        let declared = json!({"a": "variable:b", "b": 3, "c": {"x": ["variable:a"]}});
        let (bindings, errors) = bind(declared.clone(), json!({"b": "5"}));
        assert_eq!(errors, []);
        assert_eq!(Value::Object(bindings.values), json!({"a": 5, "b": 5, "c": {"x": [5]}}));
        assert!(matches!(bind(declared, json!({"a": "x"})).1[0].1, VariableError::Type { .. }));
    }

    #[test]
    fn circles_of_defaults_are_errors() {
        let (_, errors) = bind(json!({"a": "variable:b", "b": ["variable:a"], "c": "variable:c"}), json!({}));
        let messages: Vec<String> = errors.iter().map(|(name, error)| format!("{name}: {error}")).collect();
        assert_eq!(
            messages,
            [
                "b: variable defaults refer to each other in a circle: a -> b -> a",
                "c: variable defaults refer to each other in a circle: c -> c"
            ]
        );
    }

    #[test]
    fn a_default_that_refers_to_nothing_is_an_error() {
        let (_, errors) = bind(json!({"a": "variable:gone"}), json!({}));
        assert_eq!(errors[0].1.to_string(), "Variable <gone> not found");
    }

    #[test]
    fn texts_given_by_overrides_are_not_replaced_again() {
        let (bindings, _) = bind(json!({"a": "", "b": "x"}), json!({"a": "variable:b"}));
        assert_eq!(bindings.get("a"), Some(&json!("variable:b")));
    }

    #[test]
    fn a_variable_named_like_a_picture_is_one_under_any_key() {
        let variables = json!({"x_image": "a.png"});
        let value = json!({"control": "variable:x_image", "image": "variable:x_image",
                           "mask": {"media_type": "image", "location": "variable:x_image"},
                           "location": "variable:x_image", "urls": ["variable:x_image"]});
        let expected = json!({"control": {"media_type": "image", "location": "a.png"}, "image": "a.png",
                              "mask": {"media_type": "image", "location": "a.png"},
                              "location": "a.png", "urls": ["a.png"]});
        assert_eq!(substituted(variables, value.clone()).0, expected);
        let variables = json!({"x_image": {"location": "a.png", "size": 3}});
        let (value, _) = substituted(variables, value);
        assert_eq!(value["location"], "a.png");
        assert_eq!(value["control"], json!({"media_type": "image", "location": "a.png"}));
    }

    #[test]
    fn artifacts_from_a_parent_pass_unchanged() {
        let handle = json!({"$artifact": 7});
        let (bindings, errors) = bind(
            json!({"image": {}, "n": 3, "list": ["a"], "s": "x", "b": true}),
            json!({"image": handle, "n": handle, "list": [handle], "s": handle, "b": handle}),
        );
        assert_eq!(errors, []);
        assert_eq!(bindings.get("image"), Some(&handle));
        assert_eq!(bindings.get("list"), Some(&json!([handle])));
        let mut value = json!({"location": "variable:image", "other": "variable:image"});
        bindings.substitute(&mut value, "", &mut Vec::new());
        assert_eq!(value, json!({"location": handle, "other": handle}));
    }
}
