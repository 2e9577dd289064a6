//! `dw inspect`: what a picture says about how it was made.

use std::path::Path;

use dw_core::metadata::{self, Metadata};
use serde_json::Value;

use crate::{
    args::InspectArgs,
    error::{CliError, Exit},
    render::{
        table::Table,
        text::{print, print_json},
    },
    request,
};

/// Prints the metadata of a picture.
pub(super) fn inspect(args: &InspectArgs) -> Result<Exit, CliError> {
    let metadata = read(&args.image)?;
    if args.json {
        print_json(&metadata.to_value())?;
    } else {
        print(&describe(&metadata))?;
    }
    Ok(Exit::Done)
}

/// The metadata of a picture, or the error that says why there is none.
pub(super) fn read(image: &Path) -> Result<Metadata, CliError> {
    request::check_file(image).map_err(CliError::Usage)?;
    let found = metadata::read(image).map_err(|error| CliError::Failed(error.to_string()))?;
    found.ok_or_else(|| {
        CliError::Failed(format!(
            "`{}` does not say how it was made; dw writes that into PNG files unless `--no-metadata` or \
             `embed_metadata` say otherwise, and other programs often remove it",
            image.display()
        ))
    })
}

/// A line for each key, and for each argument; the workflow's text is left to `--json`.
fn describe(metadata: &Metadata) -> String {
    let mut table = Table::plain(2);
    let Value::Object(members) = metadata.to_value() else { return String::new() };
    for (key, value) in &members {
        match (key.as_str(), value) {
            ("workflow_document", _) => {
                table.row([key.clone(), "inside (print it with `--json`; `dw rerun` runs it)".into()]);
            }
            ("arguments", Value::Object(arguments)) => {
                table.row([key.clone(), String::new()]);
                for (name, value) in arguments {
                    table.row([format!("  {name}"), shown(value)]);
                }
            }
            _ => table.row([key.clone(), shown(value)]),
        }
    }
    table.render()
}

fn shown(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(items) => items.iter().map(shown).collect::<Vec<_>>().join(", "),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn arguments_stand_one_below_the_other_and_the_document_is_only_mentioned() {
        let metadata = Metadata {
            arguments: Some(json!({"prompt": "a sea", "sizes": [1, 2]})),
            workflow_document: Some(json!({"id": "w"})),
            dw_version: None,
            ..Metadata::new("draw")
        };
        assert_eq!(
            describe(&metadata),
            "step_name          draw\narguments\n  prompt           a sea\n  sizes            1, 2\n\
             workflow_document  inside (print it with `--json`; `dw rerun` runs it)\n"
        );
    }
}
