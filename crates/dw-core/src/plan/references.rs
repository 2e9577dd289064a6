//! Whether `previous_result:` names a step that ran before.

use serde_json::Value;

use super::{builder::Report, step::Context};
use crate::{document::child_pointer, workflow::nearest};

/// Checks every reference inside the arguments of step `index`.
pub(super) fn check(report: &mut Report, context: &Context, index: usize, value: &Value, pointer: &str) {
    match value {
        Value::String(text) => check_text(report, context, index, text, pointer),
        Value::Array(items) => {
            for (position, item) in items.iter().enumerate() {
                check(report, context, index, item, &child_pointer(pointer, &position.to_string()));
            }
        }
        Value::Object(object) => {
            for (key, item) in object {
                let pointer = child_pointer(pointer, key);
                match item {
                    Value::String(name) if key == "from_previous_result" => {
                        check_name(report, context, index, name, &pointer);
                    }
                    _ => check(report, context, index, item, &pointer),
                }
            }
        }
        _ => {}
    }
}

fn check_text(report: &mut Report, context: &Context, index: usize, text: &str, pointer: &str) {
    let reference = text.strip_prefix("previous_result:").or_else(|| text.strip_prefix("previous_results:"));
    if let Some(reference) = reference {
        check_name(report, context, index, reference, pointer);
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
        let message = if name == &context.names[index] {
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

/// The step that a reference names: exactly, or as its longest beginning before a dot.
fn resolve<'a>(reference: &str, names: &'a [String]) -> Option<&'a String> {
    let begins = |name: &&String| {
        let property = reference.strip_prefix(name.as_str()).and_then(|rest| rest.strip_prefix('.'));
        property.is_some_and(|property| !property.is_empty())
    };
    names
        .iter()
        .find(|name| *name == reference)
        .or_else(|| names.iter().filter(|name| !name.is_empty()).filter(begins).max_by_key(|name| name.len()))
}
