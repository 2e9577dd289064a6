//! Commands on text and data: chats, values out of objects, sections out of what a language model wrote.

use dw_core::{arguments::ArtifactRef, artifact::Artifact};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::{
    TaskError, TaskOutput,
    arguments::{Call, argument_error},
    gather::artifact_of,
};

/// Arguments of `format_chat_message`.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Chat {
    /// What the model is told to be and do.
    system_prompt: String,
    /// What it is asked.
    user_message: String,
}

#[expect(clippy::unnecessary_wraps, reason = "every command has this signature")]
pub(crate) fn format_chat_message(arguments: Chat, _: &Call) -> Result<TaskOutput, TaskError> {
    let Chat { system_prompt, user_message } = arguments;
    let messages = json!([
        { "role": "system", "content": system_prompt },
        { "role": "user", "content": user_message },
    ]);
    Ok(TaskOutput::One(Artifact::Json(json!({ "text_inputs": messages }))))
}

/// Arguments of `get_dict_value`.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Lookup {
    /// The object: written out, or an earlier result.
    dict: Value,
    /// The name of the value in it.
    key: String,
}

/// A list is several results, one for each item.
pub(crate) fn get_dict_value(arguments: Lookup, call: &Call) -> Result<TaskOutput, TaskError> {
    let Lookup { dict, key } = arguments;
    let no_object = |found: &str| argument_error("dict", format!("expected an object, found {found}"));
    if let Some(handle) = ArtifactRef::from_value(&dict) {
        return match call.artifact("dict", handle)? {
            Artifact::Json(Value::Object(object)) => value_of(object.get(&key), call),
            Artifact::Map(group) => {
                let found = group.iter().find(|(name, _)| *name == key).map(|(_, artifact)| artifact.clone());
                Ok(TaskOutput::One(found.unwrap_or(Artifact::Json(Value::Null))))
            }
            other => Err(no_object(other.kind())),
        };
    }
    match &dict {
        Value::Object(object) => value_of(object.get(&key), call),
        other => Err(no_object(&format!("`{other}`"))),
    }
}

fn value_of(value: Option<&Value>, call: &Call) -> Result<TaskOutput, TaskError> {
    match value {
        None => Ok(TaskOutput::One(Artifact::Json(Value::Null))),
        Some(Value::Array(items)) => {
            let artifacts = items.iter().map(|item| artifact_of(item, call));
            Ok(TaskOutput::Many(artifacts.collect::<Result<_, _>>()?))
        }
        Some(value) => Ok(TaskOutput::One(artifact_of(value, call)?)),
    }
}

/// Arguments of `extract_sections`.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Extraction {
    /// The text.
    text: String,
    /// Labels of the sections to keep, in the order they are to have. In the text each begins a line
    /// and ends with a colon; upper and lower case are the same.
    sections: Vec<String>,
    /// Keep the text before the first label.
    #[serde(default = "yes")]
    keep_preamble: bool,
}

fn yes() -> bool {
    true
}

#[expect(clippy::unnecessary_wraps, reason = "every command has this signature")]
pub(crate) fn extract_sections(arguments: Extraction, _: &Call) -> Result<TaskOutput, TaskError> {
    let Extraction { text, sections, keep_preamble } = arguments;
    Ok(TaskOutput::One(Artifact::text(&extract(&text, &sections, keep_preamble))))
}

/// A label found in the text: which one, and where it and its body start.
struct Found {
    label: usize,
    start: usize,
    body: usize,
}

fn extract(text: &str, labels: &[String], keep_preamble: bool) -> String {
    let found = find_labels(text, labels);
    let Some(first) = found.first() else { return text.trim().to_owned() };
    let preamble = keep_preamble.then(|| text[..first.start].trim()).filter(|preamble| !preamble.is_empty());
    let body_of = |place: usize| {
        let end = found.get(place + 1).map_or(text.len(), |next| next.start);
        first_paragraph(&text[found[place].body..end])
    };
    let section = |(label, name): (usize, &String)| {
        let place = found.iter().position(|found| found.label == label)?;
        Some(format!("{name}: {}", body_of(place)).trim_end().to_owned())
    };
    let sections = labels.iter().enumerate().filter_map(section);
    preamble.map(str::to_owned).into_iter().chain(sections).collect::<Vec<_>>().join("\n\n")
}

fn find_labels(text: &str, labels: &[String]) -> Vec<Found> {
    let mut start = 0;
    let mut found = Vec::new();
    for line in text.split_inclusive('\n') {
        let label = labels.iter().enumerate().find_map(|(label, name)| Some((label, after_label(line, name)?)));
        if let Some((label, length)) = label {
            found.push(Found { label, start, body: start + length });
        }
        start += line.len();
    }
    found
}

/// How many bytes `label:` takes at the start of `line`, whatever the case of its letters.
fn after_label(line: &str, label: &str) -> Option<usize> {
    let (start, _) = line.split_once(':')?;
    // A label may hold colons itself, so its own length in characters says where it ends.
    let end =
        line.char_indices().nth(label.chars().count()).map(|(index, _)| index).filter(|&end| end >= start.len())?;
    let same = line[..end].to_lowercase() == label.to_lowercase();
    (same && line[end..].starts_with(':')).then_some(end + 1)
}

/// The text up to the first blank line, trimmed.
fn first_paragraph(body: &str) -> &str {
    let body = body.trim_start();
    let mut end = 0;
    for line in body.split_inclusive('\n').take_while(|line| !line.trim().is_empty()) {
        end += line.len();
    }
    body[..end].trim_end()
}

#[cfg(test)]
mod tests {
    use dw_core::{
        arguments::{Arguments, ArtifactRef},
        artifact::Artifact,
    };
    use serde_json::{Value, json};

    use super::extract;
    use crate::{
        TaskOutput,
        testing::{and, call},
    };

    fn run(command: &str, values: Value) -> TaskOutput {
        call(command, &and(Arguments::default(), values)).expect("it works")
    }

    fn data(output: TaskOutput) -> Value {
        match output {
            TaskOutput::One(Artifact::Json(value)) => value,
            TaskOutput::One(Artifact::Text(text)) => Value::String(text),
            other => panic!("expected data, found {other:?}"),
        }
    }

    #[test]
    fn a_chat_is_a_system_and_a_user_message() {
        let chat = run("format_chat_message", json!({"system_prompt": "be brief", "user_message": "hello"}));
        let messages = json!([{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]);
        assert_eq!(data(chat), json!({ "text_inputs": messages }));
    }

    #[test]
    fn a_value_is_taken_out_and_a_missing_key_is_null() {
        let dict = json!({"generated_text": "  \"a cat\" ", "n": 3, "o": {"p": 1}});
        let value = |key: &str| data(run("get_dict_value", json!({"dict": dict, "key": key})));
        assert_eq!(value("generated_text"), json!("a cat"));
        assert_eq!(value("n"), json!(3));
        assert_eq!(value("o"), json!({"p": 1}));
        assert_eq!(value("absent"), Value::Null);
    }

    #[test]
    fn a_list_inside_an_object_is_several_results() {
        let output = run("get_dict_value", json!({"dict": {"words": ["a", "b"]}, "key": "words"}));
        let TaskOutput::Many(items) = output else { panic!("expected several") };
        assert!(matches!(&items[..], [Artifact::Text(a), Artifact::Text(b)] if a == "a" && b == "b"));
    }

    #[test]
    fn a_value_is_taken_out_of_an_earlier_result() {
        let mut arguments = and(Arguments::default(), json!({"dict": ArtifactRef(4).to_value(), "key": "mask"}));
        arguments.artifacts.insert(4, Artifact::Map(vec![("mask".into(), Artifact::text("white"))]));
        let output = call("get_dict_value", &arguments).expect("it is there");
        assert!(matches!(output, TaskOutput::One(Artifact::Text(text)) if text == "white"));
    }

    #[test]
    fn only_objects_have_values() {
        let error = call("get_dict_value", &and(Arguments::default(), json!({"dict": [1], "key": "a"})));
        let message = error.expect_err("a list").to_string();
        assert_eq!(message, "argument `dict`: expected an object, found `[1]`");
    }

    #[test]
    fn sections_are_kept_in_the_declared_order_each_with_its_first_paragraph() {
        let cases = [
            ("alpha: one\n\nbeta: two\n\ngamma: three", "alpha: one\n\nbeta: two\n\ngamma: three"),
            ("alpha: one\n\nbeta: two\n\ngamma: three\n\nAs you see, done.", "alpha: one\n\nbeta: two\n\ngamma: three"),
            ("alpha: one\n\nbeta: two\n\nbeta: again\n\ngamma: three", "alpha: one\n\nbeta: two\n\ngamma: three"),
            ("Here it is.\n\nalpha: one\n\nbeta: two", "Here it is.\n\nalpha: one\n\nbeta: two"),
            ("alpha: \nthe body\n\nbeta: two", "alpha: the body\n\nbeta: two"),
            ("gamma: three\n\nalpha: one", "alpha: one\n\ngamma: three"),
            ("alpha: one\nstill one\nand more\n\nbeta: two", "alpha: one\nstill one\nand more\n\nbeta: two"),
            ("  no labels: here\nat all \n", "no labels: here\nat all"),
            ("Alpha: one\n\nBETA: two", "alpha: one\n\nbeta: two"),
            ("alpha: one\n\nAlpha: again\n\nbeta: two", "alpha: one\n\nbeta: two"),
            ("alpha: one\nALPHA: again\nbeta: two", "alpha: one\n\nbeta: two"),
            ("alpha:\r\n\r\none\r\n\r\nnot this\r\nbeta: two", "alpha: one\n\nbeta: two"),
            ("alphabet: no\nalpha : no\n alpha: no\nbeta: yes", "alphabet: no\nalpha : no\n alpha: no\n\nbeta: yes"),
            ("alpha:\n\nbeta: two", "alpha:\n\nbeta: two"),
        ];
        let labels = ["alpha", "beta", "gamma"].map(str::to_owned);
        for (text, want) in cases {
            assert_eq!(extract(text, &labels, true), want, "{text:?}");
        }
    }

    #[test]
    fn a_label_may_hold_colons_and_letters_outside_ascii() {
        let labels = ["step: 1", "Übersicht"].map(str::to_owned);
        assert_eq!(extract("STEP: 1: go\n\nübersicht: da", &labels, true), "step: 1: go\n\nÜbersicht: da");
    }

    #[test]
    fn the_preamble_can_be_dropped_and_no_sections_mean_the_whole_text() {
        let drop = json!({"text": "Sure!\n\nalpha: one", "sections": ["alpha"], "keep_preamble": false});
        assert_eq!(data(run("extract_sections", drop)), json!("alpha: one"));
        let none = json!({"text": " alpha: one\n\nrest ", "sections": []});
        assert_eq!(data(run("extract_sections", none)), json!("alpha: one\n\nrest"));
    }
}
