//! `arg show`, `set` and `clear`: values for the workflow's variables.

use std::fmt::Write;

use dw_core::{
    nearest::nearest,
    paths::{check_variable_name, check_variable_text},
    variables::Bindings,
};
use serde_json::{Map, Value};

use crate::render::text::printable;

use super::{
    Repl,
    parse::Word,
    reply::{Failure, Reply},
    state::Loaded,
};

/// `arg show`.
pub(super) fn show(repl: &mut Repl<'_>, _: &[Word]) -> Result<Reply, Failure> {
    let loaded = repl.state.loaded()?;
    let mut text = "Available variables in workflow and their default values:\n".to_owned();
    for (name, default) in loaded.variables() {
        let _ = writeln!(text, "  {}={}", printable(name), shown(default));
    }
    if loaded.variables().is_empty() {
        text += "  (none)\n";
    }
    text += "Current argument values:\n";
    for (name, value) in &repl.state.arguments {
        let _ = writeln!(text, "  {name}={}", shown(value));
    }
    if repl.state.arguments.is_empty() {
        text += "  No arguments set\n";
    }
    Ok(Reply::answer(text))
}

/// A value as it would be typed: text without quotes, everything else as JSON.
pub(super) fn shown(value: &Value) -> String {
    match value {
        Value::String(text) => printable(text).into_owned(),
        other => other.to_string(),
    }
}

/// `arg set`.
pub(super) fn set(repl: &mut Repl<'_>, words: &[Word]) -> Result<Reply, Failure> {
    let loaded = repl.state.loaded()?;
    if words.is_empty() {
        return Err(Failure::usage("Error: Please specify an argument\nUsage: arg set name=value"));
    }
    let assignments = assignments(words)?;
    // All or none: a mistake in the second must not leave the first.
    for (name, value) in &assignments {
        check(name, value, loaded)?;
    }
    let mut text = String::new();
    for (name, value) in assignments {
        let _ = writeln!(text, "Set argument {name}={}", printable(&value));
        repl.state.arguments.insert(name, value.into());
    }
    Ok(Reply::answer(text))
}

/// Names and values. A word that does not begin with a name and `=` belongs to the value before it, so a
/// prompt needs no quotes as long as its white space does not matter.
fn assignments(words: &[Word]) -> Result<Vec<(String, String)>, Failure> {
    let mut found: Vec<(String, String)> = Vec::new();
    for word in words {
        let parts = word.text.split_once('=').map(|(name, value)| (name.trim(), value));
        match (parts, found.last_mut()) {
            (Some((name, value)), None) => found.push((name.to_owned(), value.to_owned())),
            (Some((name, value)), Some(_)) if check_variable_name(name).is_ok() => {
                found.push((name.to_owned(), value.to_owned()));
            }
            (_, Some((_, value))) => {
                if !value.is_empty() {
                    value.push(' ');
                }
                value.push_str(&word.text);
            }
            (None, None) => return Err(Failure::usage("Error: Invalid format. Use: arg set name=value")),
        }
    }
    Ok(found.into_iter().map(|(name, value)| (name, value.trim().to_owned())).collect())
}

/// Stores a value for a variable, as typed.
pub(super) fn store(repl: &mut Repl<'_>, name: &str, value: &str) -> Result<(), Failure> {
    check(name, value, repl.state.loaded()?)?;
    repl.state.arguments.insert(name.to_owned(), value.into());
    Ok(())
}

fn check(name: &str, value: &str, loaded: &Loaded) -> Result<(), Failure> {
    check_variable_name(name)
        .and_then(|()| check_variable_text(value))
        .map_err(|error| Failure::usage(format!("Error: Invalid input: {error}")))?;
    if !loaded.variables().contains_key(name) {
        return Err(undeclared(name, loaded));
    }
    let overrides = Map::from_iter([(name.to_owned(), Value::from(value))]);
    let (_, errors) = Bindings::new(Some(loaded.variables()), &overrides);
    match errors.into_iter().find(|(at, _)| at == name) {
        None => Ok(()),
        Some((_, error)) => {
            let remedy = error.remedy().map(|remedy| format!("; {remedy}")).unwrap_or_default();
            Err(Failure::usage(format!("Error: Invalid input: {error}{remedy}")))
        }
    }
}

/// What is said about a variable that the workflow does not have.
pub(super) fn undeclared(name: &str, loaded: &Loaded) -> Failure {
    let names = || loaded.variables().keys().map(String::as_str);
    let near = nearest(name, names()).map(|near| format!("\nDid you mean '{near}'?")).unwrap_or_default();
    let list = names().collect::<Vec<_>>().join(", ");
    Failure::usage(format!("Error: '{name}' is not defined in workflow variables\nAvailable variables: {list}{near}"))
}

/// `arg clear`.
pub(super) fn clear(repl: &mut Repl<'_>, words: &[Word]) -> Result<Reply, Failure> {
    if words.is_empty() {
        repl.state.arguments.clear();
        return Ok(Reply::answer("All workflow arguments cleared"));
    }
    let mut text = String::new();
    for word in words {
        match repl.state.arguments.remove(&word.text) {
            Some(_) => text.push_str(&format!("Cleared argument {}\n", word.text)),
            None => return Err(Failure::usage(format!("Error: no value is set for '{}'", word.text))),
        }
    }
    Ok(Reply::answer(text))
}
