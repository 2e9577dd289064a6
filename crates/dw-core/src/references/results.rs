//! The named results of the steps that have run, and what a reference to one of them yields.

use serde_json::Value;

use super::{ReferenceError, mentions, split};
use crate::artifact::{Artifact, Entry};

/// What finished steps produced, by step name, in the order in which the names first appeared.
#[derive(Clone, Debug, Default)]
pub struct Results {
    steps: Vec<(String, Vec<Entry>)>,
}

/// One value of a reference.
#[derive(Clone, Debug)]
pub(super) enum Yield {
    One(Artifact),
    List(Vec<Artifact>),
}

impl Results {
    /// Stores the result of a step. A second step of the same name replaces the first.
    pub fn insert(&mut self, step: impl Into<String>, entries: Vec<Entry>) {
        let step = step.into();
        match self.steps.iter_mut().find(|(name, _)| *name == step) {
            Some((_, stored)) => *stored = entries,
            None => self.steps.push((step, entries)),
        }
    }

    /// The entries of a step's result; none when it has not run or was released.
    pub fn get(&self, step: &str) -> Option<&[Entry]> {
        self.steps.iter().find(|(name, _)| name == step).map(|(_, entries)| entries.as_slice())
    }

    /// The names that have results.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.steps.iter().map(|(name, _)| name.as_str())
    }

    /// Drops every result that none of the `remaining` steps refers to.
    pub fn release_except(&mut self, remaining: &[&Value]) {
        let targets: Vec<&str> = remaining.iter().flat_map(|step| mentions(step)).map(|(_, target)| target).collect();
        self.steps.retain(|(name, _)| targets.iter().any(|target| split(target, [name.as_str()]).is_some()));
    }

    /// The values that `target` (a step's name, or its name, a dot and a property) stands for: all
    /// artifacts of the step, or the property of each entry that has it.
    pub(super) fn resolve(&self, target: &str) -> Result<Vec<Yield>, ReferenceError> {
        let not_found = || ReferenceError::NotFound {
            target: target.to_owned(),
            available: self.names().map(str::to_owned).collect(),
        };
        let (step, property) = split(target, self.names()).ok_or_else(not_found)?;
        let entries = self.get(step).unwrap_or_default();
        let Some(property) = property else {
            return Ok(entries.iter().flat_map(|entry| &entry.artifacts).cloned().map(Yield::One).collect());
        };
        let mut values = Vec::new();
        for entry in entries {
            values.extend(property_of(entry, property).map_err(|kind| ReferenceError::NoProperty {
                target: target.to_owned(),
                property: property.to_owned(),
                kind,
                offered: entry.properties.iter().map(|(name, _)| name.clone()).collect(),
            })?);
        }
        Ok(values)
    }
}

/// The values of one property of an entry: a property the pipeline returned, the member of a
/// dictionary (nothing when it lacks the member), or the whole list of pictures or frames. The error
/// is what the entry is, in words, when it cannot have the property.
fn property_of(entry: &Entry, property: &str) -> Result<Vec<Yield>, &'static str> {
    if let Some((_, artifact)) = entry.properties.iter().find(|(name, _)| name == property) {
        return Ok(vec![Yield::One(artifact.clone())]);
    }
    let artifacts = &entry.artifacts;
    let is_dictionary = |artifact: &Artifact| matches!(artifact, Artifact::Map(_) | Artifact::Json(Value::Object(_)));
    if artifacts.iter().all(is_dictionary) {
        return Ok(artifacts.iter().filter_map(|artifact| member(artifact, property)).map(Yield::One).collect());
    }
    match (property, artifacts.as_slice()) {
        ("images", pictures) if pictures.iter().all(|picture| matches!(picture, Artifact::Image(_))) => {
            Ok(vec![Yield::List(pictures.to_vec())])
        }
        ("frames", [frames @ Artifact::Frames(_)]) => Ok(vec![Yield::One(frames.clone())]),
        (_, [artifact]) => Err(described(artifact)),
        _ => Err("a list"),
    }
}

/// The member of a dictionary artifact, if it is one and has it.
pub(super) fn member(artifact: &Artifact, key: &str) -> Option<Artifact> {
    match artifact {
        Artifact::Map(members) => members.iter().find(|(name, _)| name == key).map(|(_, value)| value.clone()),
        Artifact::Json(Value::Object(members)) => members.get(key).cloned().map(Artifact::Json),
        _ => None,
    }
}

/// What an artifact is, with the type names that users of the format know from error messages.
fn described(artifact: &Artifact) -> &'static str {
    match artifact {
        Artifact::Text(_) | Artifact::Json(Value::String(_)) => "a str",
        Artifact::Json(Value::Array(_)) => "a list",
        Artifact::Json(Value::Bool(_)) => "a bool",
        Artifact::Json(Value::Null) => "a NoneType",
        Artifact::Json(Value::Number(number)) if number.is_f64() => "a float",
        Artifact::Json(Value::Number(_)) => "an int",
        Artifact::Json(Value::Object(_)) | Artifact::Map(_) => "a dict",
        Artifact::Image(_) => "an image",
        Artifact::Array(_) => "an array",
        Artifact::Frames(_) => "a list of frames",
    }
}

#[cfg(test)]
mod tests {
    use image::DynamicImage;
    use serde_json::json;

    use super::*;
    use crate::artifact::Array;

    fn data(value: Value) -> Entry {
        Artifact::Json(value).into()
    }

    fn picture() -> Artifact {
        Artifact::image(DynamicImage::new_rgb8(2, 2))
    }

    fn results(steps: &[(&str, Vec<Entry>)]) -> Results {
        let mut results = Results::default();
        for (name, entries) in steps {
            results.insert(*name, entries.clone());
        }
        results
    }

    fn shown(values: &[Yield]) -> Vec<Value> {
        let show = |artifact: &Artifact| match artifact {
            Artifact::Json(value) => value.clone(),
            Artifact::Text(text) => json!(text),
            other => json!(format!("<{}>", other.kind())),
        };
        values
            .iter()
            .map(|value| match value {
                Yield::One(artifact) => show(artifact),
                Yield::List(artifacts) => artifacts.iter().map(show).collect(),
            })
            .collect()
    }

    #[test]
    fn references_yield_what_the_format_says() {
        let entry = |artifacts: Vec<Artifact>| Entry { artifacts, properties: Vec::new() };
        let results = results(&[
            ("step1", ["item1", "item2", "item3"].map(|item| Artifact::text(item).into()).to_vec()),
            ("rows", vec![data(json!({"text": "first", "value": 1})), data(json!({"text": "second", "value": null}))]),
            ("mixed", vec![data(json!({"p1": 1})), data(json!({"p2": 2}))]),
            ("v1.0", vec![data(json!({"mask": "m"}))]),
            ("step", vec![data(json!({"a": {"b": "nested"}})), data(json!({"a.b": "literal"}))]),
            ("step.sub", vec![data(json!({"text": "from step.sub"}))]),
            ("empty", vec![]),
            (
                "pair",
                vec![Artifact::Map(vec![("bordered_image".into(), picture()), ("mask".into(), picture())]).into()],
            ),
            ("batch", vec![entry(vec![picture(), picture()])]),
            ("film", vec![Artifact::Frames(vec![DynamicImage::new_rgb8(1, 1)].into()).into()]),
        ]);
        let cases = [
            ("step1", json!(["item1", "item2", "item3"])),
            ("rows.text", json!(["first", "second"])),
            ("rows.value", json!([1, null])),
            ("mixed.p1", json!([1])),
            ("mixed.p3", json!([])),
            ("v1.0", json!([{"mask": "m"}])),
            ("v1.0.mask", json!(["m"])),
            ("step.a.b", json!(["literal"])),
            ("step.sub.text", json!(["from step.sub"])),
            ("empty", json!([])),
            ("empty.text", json!([])),
            ("pair.mask", json!(["<image>"])),
            ("batch", json!(["<image>", "<image>"])),
            ("batch.images", json!([["<image>", "<image>"]])),
            ("film.frames", json!(["<frames>"])),
        ];
        for (target, expected) in cases {
            let values = results.resolve(target).unwrap_or_else(|error| panic!("{target}: {error}"));
            assert_eq!(Value::Array(shown(&values)), expected, "{target}");
        }
    }

    #[test]
    fn properties_of_things_without_properties_are_refused() {
        let results = results(&[
            ("text", vec![Artifact::text("words").into()]),
            ("list", vec![data(json!([1, 2]))]),
            ("number", vec![data(json!(1)), data(json!({"x": 1}))]),
            ("images", vec![Entry { artifacts: vec![picture(), picture()], properties: Vec::new() }]),
        ]);
        let cases = [
            ("text.text", "result has no property 'text' (it is a str, not a dict)"),
            ("list.index", "result has no property 'index' (it is a list, not a dict)"),
            ("number.x", "result has no property 'x' (it is an int, not a dict)"),
            ("images.mask", "result has no property 'mask' (it is a list, not a dict)"),
        ];
        for (target, expected) in cases {
            let error = results.resolve(target).expect_err(target).to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn named_properties_of_an_entry_are_yielded_and_offered_when_another_is_asked_for() {
        let embeds = Artifact::Array(Array { shape: vec![1, 2], data: vec![0.5, 1.0] }.into());
        let entry = Entry { artifacts: vec![picture()], properties: vec![("prompt_embeds".into(), embeds)] };
        let results = results(&[("prior", vec![entry])]);
        let values = results.resolve("prior.prompt_embeds").expect("the property exists");
        assert!(matches!(&values[..], [Yield::One(Artifact::Array(array))] if array.shape == [1, 2]));
        let error = results.resolve("prior.pooled").expect_err("no such property").to_string();
        assert!(error.ends_with("it has 'prompt_embeds'"), "{error}");
    }

    #[test]
    fn missing_results_are_errors_with_and_without_a_property() {
        let results = results(&[("one", vec![]), ("two", vec![])]);
        for target in ["three", "three.mask", "on", ""] {
            let error = results.resolve(target).expect_err(target).to_string();
            assert!(error.contains(&format!("'{target}'")), "{error}");
            assert!(error.contains("Available results: ['one', 'two']"), "{error}");
        }
    }

    #[test]
    fn a_second_result_of_the_same_name_replaces_the_first() {
        let results = results(&[("a", vec![data(json!(1))]), ("b", vec![]), ("a", vec![data(json!(2))])]);
        assert_eq!(results.names().collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(shown(&results.resolve("a").expect("a is there")), [json!(2)]);
    }

    #[test]
    fn only_results_that_remaining_steps_mention_are_kept() {
        let all = ["segment", "segment.mask", "old", "list", "subject", "sub"].map(|name| (name, vec![]));
        let cases = [
            (json!({"mask": "previous_result:segment.mask"}), vec!["segment", "segment.mask"]),
            (json!([{"deep": ["previous_results:list.images"]}]), vec!["list"]),
            (json!({"ref": {"from_previous_result": "subject.frames", "x_type": "T"}}), vec!["subject"]),
            (json!({"from_previous_result": "subject"}), vec!["subject"]),
            (json!({"prompt": "old subject", "other": "segment"}), vec![]),
        ];
        for (step, kept) in cases {
            let mut results = results(&all);
            results.release_except(&[&json!({}), &step]);
            assert_eq!(results.names().collect::<Vec<_>>(), kept, "{step}");
        }
    }
}
