//! From the JSON arguments of a call to a command's argument struct, with messages for the person who
//! wrote the workflow, and from its handles to pictures. What each command takes is said in its file.

use std::sync::Arc;

use dw_core::{
    arguments::{Arguments, ArtifactRef},
    artifact::Artifact,
    nearest::nearest,
};
use image::DynamicImage;
use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::{TaskContext, TaskError};

/// One call of a command: what it was given, beside its typed arguments.
pub(crate) struct Call<'a> {
    pub(crate) raw: &'a Arguments,
    pub(crate) context: &'a TaskContext<'a>,
}

impl Call<'_> {
    /// The picture that the argument `name` stands for.
    pub(crate) fn picture(&self, name: &str, handle: ArtifactRef) -> Result<Arc<DynamicImage>, TaskError> {
        match self.artifact(name, handle)? {
            Artifact::Image(picture) => Ok(picture.clone()),
            other => Err(argument_error(name, format!("expected a picture, found {}", with_article(other.kind())))),
        }
    }

    /// The artifact that the argument `name` stands for.
    pub(crate) fn artifact(&self, name: &str, handle: ArtifactRef) -> Result<&Artifact, TaskError> {
        self.raw.get(handle).ok_or_else(|| argument_error(name, "the result it stands for is gone"))
    }
}

pub(crate) fn argument_error(name: &str, reason: impl Into<String>) -> TaskError {
    TaskError::Argument { name: name.to_owned(), reason: reason.into() }
}

fn with_article(kind: &str) -> String {
    match kind {
        "image" | "array" => format!("an {kind}"),
        "group of artifacts" => format!("a {kind}"),
        kind => kind.to_owned(),
    }
}

/// JSON Schema of an argument struct.
pub(crate) fn schema<T: JsonSchema>() -> Value {
    schemars::schema_for!(T).to_value()
}

/// The typed arguments of a call of `command`.
pub(crate) fn parse<T: DeserializeOwned + JsonSchema>(command: &str, raw: &Arguments) -> Result<T, TaskError> {
    let schema = schema::<T>();
    let open = schema["additionalProperties"] != Value::Bool(false);
    let mut values = raw.values.clone();
    if !open {
        if let Some(input) = &raw.input {
            let reason = format!("`{command}` takes an object of arguments for each item, found {input}");
            return Err(argument_error("inputs", reason));
        }
        check_names(command, &values, &schema)?;
    }
    make_integers(&mut values, &schema);
    serde_path_to_error::deserialize(Value::Object(values.clone())).map_err(|error| {
        let path = error.path().to_string();
        let expected = error.inner().to_string();
        argument_error(&path, mismatch(&expected, value_at(&values, error.path())))
    })
}

/// Complains about the first argument that the command does not take, or needs and was not given.
fn check_names(command: &str, values: &Map<String, Value>, schema: &Value) -> Result<(), TaskError> {
    let empty = Map::new();
    let properties = schema["properties"].as_object().unwrap_or(&empty);
    let known: Vec<&str> = properties.keys().map(String::as_str).collect();
    if let Some(name) = values.keys().find(|name| !known.contains(&name.as_str())) {
        let hint = match nearest(name, known.iter().copied()) {
            Some(near) => format!("did you mean `{near}`?"),
            None => format!("it takes {}", known.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")),
        };
        return Err(argument_error(name, format!("`{command}` has no such argument; {hint}")));
    }
    let required = schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str);
    match required.into_iter().find(|name| !values.contains_key(*name)) {
        None => Ok(()),
        Some(name) => {
            let what = properties[name]["description"].as_str().unwrap_or_default();
            Err(argument_error(name, format!("`{command}` needs it: {}", first_sentence(what))))
        }
    }
}

fn first_sentence(text: &str) -> String {
    let sentence = text.split_once(". ").map_or(text, |(first, _)| first);
    let mut sentence = sentence.trim_end_matches('.').to_owned();
    if let Some(first) = sentence.get_mut(..1) {
        first.make_ascii_lowercase();
    }
    sentence
}

/// Turns `768.0` into `768` where an integer is asked for: to JSON Schema they are the same.
fn make_integers(values: &mut Map<String, Value>, schema: &Value) {
    for (name, value) in values {
        let whole = value.as_f64().filter(|number| value.is_f64() && number.fract() == 0.0 && number.abs() < 9e15);
        if let Some(number) = whole
            && allows_integer(&schema["properties"][name.as_str()]["type"])
        {
            *value = Value::from(number as i64);
        }
    }
}

fn allows_integer(kind: &Value) -> bool {
    kind == "integer" || kind.as_array().is_some_and(|kinds| kinds.iter().any(|kind| kind == "integer"))
}

fn value_at(values: &Map<String, Value>, path: &serde_path_to_error::Path) -> Option<Value> {
    use serde_path_to_error::Segment;
    let mut value = &Value::Object(values.clone());
    for segment in path {
        value = match segment {
            Segment::Seq { index } => value.get(index)?,
            Segment::Map { key } => value.get(key)?,
            Segment::Enum { .. } | Segment::Unknown => return None,
        };
    }
    Some(value.clone())
}

/// Serde's `invalid type: string "x", expected u32` in plain words.
fn mismatch(message: &str, found: Option<Value>) -> String {
    let Some((_, expected)) = message.split_once(", expected ") else { return message.to_owned() };
    let expected = match expected {
        "u8" => "a whole number from 0 to 255",
        "u32" | "u64" | "usize" => "a whole number, 0 or more",
        "i32" | "i64" => "a whole number",
        "f32" | "f64" => "a number",
        "a boolean" => "`true` or `false`",
        "a string" => "text",
        "a sequence" => "a list",
        other => other,
    };
    match found {
        Some(found) => format!("expected {expected}, found `{}`", shorten(&found.to_string())),
        None => format!("expected {expected}"),
    }
}

fn shorten(text: &str) -> String {
    if text.chars().count() <= 80 { text.to_owned() } else { text.chars().take(80).chain(['…']).collect() }
}

#[cfg(test)]
mod tests {
    use dw_core::arguments::Arguments;
    use serde_json::{Value, json};

    use crate::testing::{call, picture_of};

    fn failure(command: &str, values: Value) -> String {
        let Value::Object(values) = values else { panic!("arguments are an object") };
        let arguments = Arguments { values, ..picture_of(8, 8) };
        call(command, &arguments).expect_err("wrong arguments").to_string()
    }

    #[test]
    fn a_mistyped_argument_names_the_one_that_was_meant() {
        let message = failure("resize_rescale", json!({"image": {"$artifact": 0}, "widht": 4}));
        assert_eq!(message, "argument `widht`: `resize_rescale` has no such argument; did you mean `width`?");
    }

    #[test]
    fn an_argument_unlike_any_other_lists_what_there_is() {
        let message = failure("crop_square", json!({"image": {"$artifact": 0}, "temperature": 1}));
        assert_eq!(message, "argument `temperature`: `crop_square` has no such argument; it takes `image`, `device`");
    }

    #[test]
    fn a_missing_argument_is_named_with_what_it_is_for() {
        assert_eq!(failure("crop_square", json!({})), "argument `image`: `crop_square` needs it: the picture");
    }

    #[test]
    fn a_wrong_type_names_the_argument_what_it_expects_and_what_it_found() {
        let image = json!({"$artifact": 0});
        let cases = [
            (
                json!({"image": image, "width": "wide"}),
                "argument `width`: expected a whole number, 0 or more, found `\"wide\"`",
            ),
            (json!({"image": image, "width": -3}), "argument `width`: expected a whole number, 0 or more, found `-3`"),
            (
                json!({"image": image, "width": 1.5}),
                "argument `width`: expected a whole number, 0 or more, found `1.5`",
            ),
            (
                json!({"image": image, "width": null}),
                "argument `width`: expected a whole number, 0 or more, found `null`",
            ),
        ];
        for (values, message) in cases {
            assert_eq!(failure("resize_rescale", values), message);
        }
        let colour = failure("add_watermark", json!({"image": image, "color": [1, 2, 300]}));
        assert_eq!(colour, "argument `color[2]`: expected a whole number from 0 to 255, found `300`");
        let text = failure("extract_sections", json!({"text": "a", "sections": "a"}));
        assert_eq!(text, "argument `sections`: expected a list, found `\"a\"`");
    }

    #[test]
    fn a_path_in_the_place_of_a_picture_is_refused() {
        let message = failure("crop_square", json!({"image": "a.png"}));
        assert_eq!(message, "argument `image`: expected a picture or an earlier result, found \"a.png\"");
    }

    #[test]
    fn an_artifact_of_another_kind_is_refused() {
        let mut arguments = picture_of(8, 8);
        arguments.artifacts.insert(0, dw_core::artifact::Artifact::text("hello"));
        let message = call("crop_square", &arguments).expect_err("text is no picture").to_string();
        assert_eq!(message, "argument `image`: expected a picture, found text");
    }

    #[test]
    fn a_whole_float_serves_as_an_integer() {
        let mut arguments = picture_of(8, 8);
        arguments.values.insert("width".into(), json!(32.0));
        assert!(call("resize_rescale", &arguments).is_ok());
    }

    #[test]
    fn a_bare_input_is_refused_by_commands_with_named_arguments() {
        let arguments = Arguments { input: Some(json!("text")), ..Arguments::default() };
        let message = call("qr_code", &arguments).expect_err("needs an object").to_string();
        assert_eq!(message, "argument `inputs`: `qr_code` takes an object of arguments for each item, found \"text\"");
    }
}
