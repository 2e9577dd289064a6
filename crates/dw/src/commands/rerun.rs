//! `dw rerun`: makes a picture again from the workflow inside it, with other arguments if asked.

use std::path::PathBuf;

use dw_core::{metadata::Metadata, seed::Seed};
use dw_engine::{RunRequest, Source};
use serde_json::{Map, Value};

use crate::{
    args::RerunArgs,
    error::{CliError, Exit},
    request,
    session::Session,
};

use super::{inspect, run};

/// Runs `dw rerun`.
pub(super) fn rerun(args: &RerunArgs, session: &Session) -> Result<Exit, CliError> {
    run::reported(args.output.json, || {
        let words = request::variables(&args.variables)?;
        let metadata = inspect::read(&args.image)?;
        let name = args.image.display().to_string();
        let (document, variables) = document(&metadata, words)
            .map_err(|reason| CliError::Usage(format!("cannot make `{name}` again: {reason}")))?;
        let request = RunRequest {
            source: Source::Text {
                text: format!("{document:#}"),
                base_dir: metadata.base_dir_of(&args.image).unwrap_or_else(|| PathBuf::from(".")),
            },
            variables,
            seed: args.compute.seed.clone(),
            output_dir: args.output.output_dir.clone(),
            metadata: !args.output.no_metadata,
        };
        let mut engine = session.engine(&args.compute)?;
        let planned = run::plan(&engine, request, &name, args.output.json)?;
        run::execute(&mut engine, &planned, &name, &args.output, session)
    })
}

/// The workflow that made the picture, with the seed that was drawn for it, and values for its variables.
/// Words that name no variable change arguments of the step that made the picture.
fn document(metadata: &Metadata, words: Map<String, Value>) -> Result<(Value, Map<String, Value>), String> {
    let mut document = metadata.workflow_document.clone().ok_or(
        "its metadata does not hold the workflow; only PNG files written by dw do, other formats have no room for it",
    )?;
    let declared = |name: &String| document["variables"].get(name).is_some();
    let (variables, changes): (Map<_, _>, Map<_, _>) = words.into_iter().partition(|(name, _)| declared(name));
    if !changes.is_empty() {
        change(step(&mut document, &metadata.step_name)?, &changes)?;
    }
    if document.get("seed").is_none_or(Value::is_null)
        && let Some(seed) = &metadata.seed
    {
        document["seed"] = seed_value(seed)?;
    }
    Ok((document, variables))
}

fn step<'a>(document: &'a mut Value, name: &str) -> Result<&'a mut Value, String> {
    let steps = document["steps"].as_array_mut().map(Vec::as_mut_slice).unwrap_or_default();
    let step = steps.iter_mut().find(|step| step["name"].as_str() == Some(name));
    step.ok_or_else(|| format!("the workflow inside it has no step `{name}`"))
}

fn seed_value(seed: &Seed) -> Result<Value, String> {
    serde_json::to_value(seed).map_err(|error| format!("its seed cannot be used: {error}"))
}

/// Puts new values among a step's arguments.
fn change(step: &mut Value, changes: &Map<String, Value>) -> Result<(), String> {
    let name = step["name"].as_str().unwrap_or_default().to_owned();
    let action = ["pipeline", "pipeline_reference", "task", "workflow"].into_iter().find(|key| step.get(key).is_some());
    let arguments = action
        .and_then(|action| step[action].get_mut("arguments"))
        .and_then(Value::as_object_mut)
        .ok_or_else(|| format!("step `{name}` has no arguments to change"))?;
    for (key, value) in changes {
        let text = value.as_str().unwrap_or_default();
        let value = converted(text, arguments.get(key)).map_err(|reason| format!("argument `{key}`: {reason}"))?;
        arguments.insert(key.clone(), value);
    }
    Ok(())
}

/// Text from the command line in the type of the value it replaces; numbers and words where there was none.
fn converted(text: &str, old: Option<&Value>) -> Result<Value, String> {
    let json = || serde_json::from_str::<Value>(text).ok();
    match old {
        Some(Value::String(old)) if !old.starts_with("variable:") => Ok(text.into()),
        // Its type is not known.
        None | Some(Value::Null | Value::String(_)) => {
            Ok(json().filter(|value| value.is_number() || value.is_boolean()).unwrap_or_else(|| text.into()))
        }
        Some(old) => json()
            .filter(|new| kind(new) == kind(old))
            .ok_or_else(|| format!("`{text}` does not fit; it was `{old}`, so write {}", kind(old))),
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "a JSON list",
        Value::Object(_) => "a JSON object",
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn metadata() -> Metadata {
        Metadata {
            seed: Some(Seed::One(7)),
            workflow_document: Some(json!({"id": "w", "variables": {"size": 128}, "steps": [
                {"name": "other", "task": {"command": "qr_code", "arguments": {}}},
                {"name": "draw", "pipeline": {"arguments": {"prompt": "a sea", "num_inference_steps": 20}}},
            ]})),
            ..Metadata::new("draw")
        }
    }

    fn changed(words: &[(&str, &str)]) -> Result<(Value, Map<String, Value>), String> {
        let words = words.iter().map(|(name, value)| ((*name).to_owned(), Value::from(*value))).collect();
        document(&metadata(), words)
    }

    #[test]
    fn the_drawn_seed_becomes_the_workflows_own() {
        let (document, _) = changed(&[]).expect("a document");
        assert_eq!(document["seed"], json!(7));
    }

    #[test]
    fn changed_arguments_keep_their_types() {
        let words = [("prompt", "12"), ("num_inference_steps", "30"), ("guidance_scale", "4.5"), ("style", "ink")];
        assert_eq!(
            changed(&words).expect("a document").0["steps"][1]["pipeline"]["arguments"],
            json!({"prompt": "12", "num_inference_steps": 30, "guidance_scale": 4.5, "style": "ink"})
        );
    }

    #[test]
    fn a_word_that_names_a_variable_goes_to_the_variable() {
        let (document, variables) = changed(&[("size", "64")]).expect("a document");
        assert_eq!(Value::Object(variables), json!({"size": "64"}));
        assert!(document["steps"][1]["pipeline"]["arguments"].get("size").is_none());
    }

    #[test]
    fn a_value_of_another_type_is_refused() {
        let error = changed(&[("num_inference_steps", "many")]).expect_err("not a number");
        assert_eq!(error, "argument `num_inference_steps`: `many` does not fit; it was `20`, so write a number");
    }

    #[test]
    fn a_picture_without_its_workflow_cannot_be_made_again() {
        let error = document(&Metadata::new("draw"), Map::new()).expect_err("no document");
        assert!(error.contains("does not hold the workflow"), "{error}");
    }
}
