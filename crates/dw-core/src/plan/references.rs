//! Whether `previous_result:` names a step that ran before.

use serde_json::Value;

use super::{builder::Report, step::Context};
use crate::{
    document::child_pointer,
    references::{self, Reference},
    workflow::nearest,
};

/// Checks every reference inside the arguments of step `index`.
pub(super) fn check(report: &mut Report, context: &Context, index: usize, value: &Value, pointer: &str) {
    for (inside, target) in references::mentions(value) {
        check_name(report, context, index, target, &format!("{pointer}{inside}"));
    }
}

/// Says where a reference stands in a place that nothing fills in: anywhere but in the arguments of a step
/// and in the prompts of its chain. Items of a task's `inputs` are plain text by definition.
pub(super) fn check_places(report: &mut Report, step: &Value, pointer: &str) {
    for (action, value) in step.as_object().into_iter().flatten() {
        let pointer = child_pointer(pointer, action);
        let Some(object) = value.as_object() else { continue };
        for (key, value) in object.iter().filter(|(key, _)| !matches!(key.as_str(), "arguments" | "inputs")) {
            check_place(report, value, &child_pointer(&pointer, key));
        }
    }
}

fn check_place(report: &mut Report, value: &Value, pointer: &str) {
    match value {
        Value::String(text) if Reference::parse(text).is_some() => {
            let message = format!("`{text}` is not filled in here");
            report.error("reference-place", pointer, message).remedy =
                Some("results of steps can be used in the arguments of a step".into());
        }
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                check_place(report, item, &child_pointer(pointer, &index.to_string()));
            }
        }
        Value::Object(object) => {
            for (key, item) in object.iter().filter(|(key, _)| key.as_str() != "prompts") {
                check_place(report, item, &child_pointer(pointer, key));
            }
        }
        _ => {}
    }
}

fn check_name(report: &mut Report, context: &Context, index: usize, reference: &str, pointer: &str) {
    let earlier = &context.names[..index];
    if let Some(name) = resolve(reference, earlier) {
        if earlier.iter().filter(|earlier| *earlier == name).count() > 1 {
            let message = format!("several steps before this one are named `{name}`; the last of them counts");
            report.warning("ambiguous-step", pointer, message).remedy = Some("give each step its own name".into());
        }
        return;
    }
    if let Some(name) = resolve(reference, &context.names[index..]) {
        let message = if name == context.names[index] {
            format!("the step `{name}` refers to its own result")
        } else {
            format!("the step `{name}` runs after this one, so it has no result yet")
        };
        report.error("later-step", pointer, message).remedy = Some("refer to an earlier step, or reorder them".into());
        return;
    }
    let listed = earlier.join(", ");
    let message = format!("Previous result '{reference}' not found. Available results: [{listed}]");
    let wanted = reference.split('.').next().unwrap_or(reference);
    let names = || earlier.iter().map(String::as_str);
    let near = nearest(reference, names()).or_else(|| nearest(wanted, names()));
    report.error("unknown-step", pointer, message).remedy = near.map(|near| format!("did you mean `{near}`?"));
}

/// The step that a reference names.
fn resolve<'a>(reference: &str, names: &'a [String]) -> Option<&'a str> {
    let named = names.iter().map(String::as_str).filter(|name| !name.is_empty());
    let (name, property) = references::split(reference, named)?;
    (property != Some("")).then_some(name)
}
