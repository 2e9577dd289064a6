//! References from a step to what earlier steps produced: their syntax, finding them in a template,
//! the named results they point to, and the expansion of a template into one set of arguments for
//! each combination of values.
//!
//! Whether a step of that name exists at all is checked by [`crate::plan`] before a run; running an
//! iteration, and loading the media a template names, is left to the engine. The items of a task's
//! `inputs` are taken as they are written, so the engine never passes them through here.

mod expand;
mod results;

use std::fmt;

use serde_json::{Map, Value};

use crate::{document::child_pointer, nearest::nearest};

pub use expand::{MAX_ITERATIONS, expand};
pub use results::Results;

/// Starts a reference that stands for one value in each iteration.
const EACH: &str = "previous_result:";
/// Starts a reference that stands for all values at once, as a list.
const ALL: &str = "previous_results:";
/// The key of an object whose value names a step without any prefix.
const FROM_PREVIOUS_RESULT: &str = "from_previous_result";

/// A string of a template that refers to an earlier step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reference<'a> {
    /// What follows the prefix: a step's name, or a step's name, a dot and a property.
    pub target: &'a str,
    /// All values as one list (`previous_results:`) rather than one value in each iteration.
    pub all: bool,
}

impl<'a> Reference<'a> {
    /// The reference that `text` is, if it is one. The prefix has to be at the very start.
    pub fn parse(text: &'a str) -> Option<Self> {
        let each = text.strip_prefix(EACH).map(|target| Self { target, all: false });
        each.or_else(|| text.strip_prefix(ALL).map(|target| Self { target, all: true }))
    }
}

impl fmt::Display for Reference<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", if self.all { ALL } else { EACH }, self.target)
    }
}

/// A reference and where it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found<'a> {
    /// JSON pointer from the searched value to the string.
    pub pointer: String,
    /// The object key the string stands under; none inside an array.
    pub key: Option<&'a str>,
    /// The reference.
    pub reference: Reference<'a>,
}

/// Every reference in `value`, depth first and in document order.
pub fn collect(value: &Value) -> Vec<Found<'_>> {
    let mut found = Vec::new();
    walk(value, String::new(), None, &mut found);
    found
}

/// Like [`collect`], for the members of an object.
pub fn collect_members(members: &Map<String, Value>) -> Vec<Found<'_>> {
    let mut found = Vec::new();
    walk_members(members, "", &mut found);
    found
}

fn walk<'a>(value: &'a Value, pointer: String, key: Option<&'a str>, found: &mut Vec<Found<'a>>) {
    match value {
        Value::String(text) => {
            found.extend(Reference::parse(text).map(|reference| Found { pointer, key, reference }));
        }
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                walk(item, format!("{pointer}/{index}"), None, found);
            }
        }
        Value::Object(members) => walk_members(members, &pointer, found),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

fn walk_members<'a>(members: &'a Map<String, Value>, pointer: &str, found: &mut Vec<Found<'a>>) {
    for (key, value) in members {
        let escaped = key.replace('~', "~0").replace('/', "~1");
        walk(value, format!("{pointer}/{escaped}"), Some(key), found);
    }
}

/// Splits the target of a reference into the step it names and the property of it that is asked for.
/// An exact name wins; otherwise the longest name followed by a dot does, and everything after that
/// dot is one property. None when no name fits.
pub fn split<'t, 'n>(target: &'t str, names: impl IntoIterator<Item = &'n str>) -> Option<(&'n str, Option<&'t str>)> {
    let candidates = names.into_iter().filter_map(|name| match target.strip_prefix(name)? {
        "" => Some((name, None)),
        rest => rest.strip_prefix('.').map(|property| (name, Some(property))),
    });
    candidates.max_by_key(|(name, _)| name.len())
}

/// Every target that `value` mentions, with either prefix or as `from_previous_result`, behind the JSON pointer from
/// `value` to the string.
pub fn mentions(value: &Value) -> Vec<(String, &str)> {
    let mut found = Vec::new();
    add_mentions(value, "", &mut found);
    found
}

fn add_mentions<'a>(value: &'a Value, pointer: &str, found: &mut Vec<(String, &'a str)>) {
    match value {
        Value::String(text) => {
            found.extend(Reference::parse(text).map(|reference| (pointer.to_owned(), reference.target)));
        }
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                add_mentions(item, &child_pointer(pointer, &index.to_string()), found);
            }
        }
        Value::Object(members) => {
            for (key, member) in members {
                let pointer = child_pointer(pointer, key);
                match member {
                    Value::String(target) if key == FROM_PREVIOUS_RESULT => found.push((pointer, target)),
                    member => add_mentions(member, &pointer, found),
                }
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// Why a reference has no value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReferenceError {
    /// No step of that name has a result.
    #[error(
        "Previous result '{target}' not found. Available results: [{}]; name a step that ran before this one{}",
        quoted(.available), did_you_mean(.target, .available)
    )]
    NotFound {
        /// What follows the prefix.
        target: String,
        /// The names that have results, in the order of their steps.
        available: Vec<String>,
    },
    /// A property was asked of something that has none by that name.
    #[error(
        "`{target}`: result has no property '{property}' (it is {kind}, not a dict){}",
        alternatives(.offered)
    )]
    NoProperty {
        /// What follows the prefix.
        target: String,
        /// The property.
        property: String,
        /// What the result is instead, with its article.
        kind: &'static str,
        /// Properties the result does have.
        offered: Vec<String>,
    },
    /// The values combine to more iterations than a step may have.
    #[error(
        "Too many iterations generated: {count} exceeds maximum of {MAX_ITERATIONS}. \
         Refer to fewer results, or pass a whole result as one list with `previous_results:`"
    )]
    TooMany {
        /// How many there would be.
        count: u128,
    },
}

fn quoted(names: &[String]) -> String {
    names.iter().map(|name| format!("'{name}'")).collect::<Vec<_>>().join(", ")
}

fn alternatives(names: &[String]) -> String {
    if names.is_empty() { String::new() } else { format!("; it has {}", quoted(names)) }
}

fn did_you_mean(target: &str, available: &[String]) -> String {
    let near = nearest(target, available.iter().map(String::as_str));
    near.map_or_else(String::new, |name| format!(", `{name}` perhaps"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn references_are_found_depth_first_in_document_order_with_their_places() {
        let value = json!({
            "b": ["previous_result:one", {"deep/er": "previous_results:two.mask"}],
            "a": "previous_result:three",
            "text": "see previous_result:four"
        });
        let found = collect(&value);
        let places: Vec<_> = found.iter().map(|f| (f.pointer.as_str(), f.key, f.reference.to_string())).collect();
        let expected = [
            ("/b/0", None, "previous_result:one".to_owned()),
            ("/b/1/deep~1er", Some("deep/er"), "previous_results:two.mask".to_owned()),
            ("/a", Some("a"), "previous_result:three".to_owned()),
        ];
        assert_eq!(places, expected);
        assert!(found.iter().all(|f| value.pointer(&f.pointer).is_some()));
    }

    #[test]
    fn the_exact_name_wins_and_then_the_longest_prefix() {
        let names = ["step", "step.sub", "v1.0"];
        let cases = [
            ("step", Some(("step", None))),
            ("step.text", Some(("step", Some("text")))),
            ("step.a.b", Some(("step", Some("a.b")))),
            ("step.sub", Some(("step.sub", None))),
            ("step.sub.text", Some(("step.sub", Some("text")))),
            ("step.subtle", Some(("step", Some("subtle")))),
            ("v1.0", Some(("v1.0", None))),
            ("v1.0.mask", Some(("v1.0", Some("mask")))),
            ("steps", None),
            ("v1", None),
            ("", None),
        ];
        for (target, expected) in cases {
            assert_eq!(split(target, names), expected, "{target}");
        }
    }

    #[test]
    fn a_missing_result_is_named_beside_the_ones_there_are() {
        let available = vec!["draw".to_owned(), "upscale".to_owned()];
        let message = ReferenceError::NotFound { target: "drow".into(), available }.to_string();
        assert!(message.starts_with("Previous result 'drow' not found. Available results: ['draw', 'upscale']"));
        assert!(message.ends_with("`draw` perhaps"), "{message}");
    }
}
