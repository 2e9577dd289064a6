//! From one template with references to the arguments of every iteration.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::{
    ReferenceError, collect_members,
    results::{Results, Yield, member},
};
use crate::{
    arguments::{Arguments, ArtifactRef},
    artifact::Artifact,
};

/// The most iterations one step may have.
pub const MAX_ITERATIONS: u128 = 10_000;

/// One reference of a template and the values it takes.
struct Dimension<'a> {
    pointer: String,
    key: Option<&'a str>,
    values: Vec<Yield>,
}

/// The arguments of every iteration of `template`: all combinations of what its references stand
/// for, the last reference changing fastest. A template without references is one iteration; a
/// reference without values makes none.
///
/// Text and data are put in place as JSON. Pictures, arrays and frames become handles into
/// [`Arguments::artifacts`], numbered after those the template already holds, which keep their numbers.
pub fn expand(template: &Arguments, results: &Results) -> Result<Vec<Arguments>, ReferenceError> {
    let dimensions = dimensions(&template.values, results)?;
    let count = iterations(&dimensions)?;
    Ok((0..count).map(|index| iteration(template, &dimensions, index)).collect())
}

fn dimensions<'a>(values: &'a Map<String, Value>, results: &Results) -> Result<Vec<Dimension<'a>>, ReferenceError> {
    let found = collect_members(values).into_iter();
    found
        .map(|found| {
            let values = results.resolve(found.reference.target)?;
            let values = if found.reference.all { vec![Yield::List(flattened(values))] } else { values };
            Ok(Dimension { pointer: found.pointer, key: found.key, values })
        })
        .collect()
}

fn flattened(values: Vec<Yield>) -> Vec<Artifact> {
    let artifacts = values.into_iter().flat_map(|value| match value {
        Yield::One(artifact) => vec![artifact],
        Yield::List(artifacts) => artifacts,
    });
    artifacts.collect()
}

/// How many combinations there are, checked before any is made.
fn iterations(dimensions: &[Dimension]) -> Result<usize, ReferenceError> {
    if dimensions.iter().any(|dimension| dimension.values.is_empty()) {
        return Ok(0);
    }
    let count = dimensions.iter().fold(1u128, |count, dimension| count.saturating_mul(dimension.values.len() as u128));
    if count > MAX_ITERATIONS {
        return Err(ReferenceError::TooMany { count });
    }
    Ok(count as usize)
}

fn iteration(template: &Arguments, dimensions: &[Dimension], mut index: usize) -> Arguments {
    let mut values = Value::Object(template.values.clone());
    let mut artifacts = template.artifacts.clone();
    for dimension in dimensions.iter().rev() {
        let chosen = &dimension.values[index % dimension.values.len()];
        index /= dimension.values.len();
        if let Some(place) = values.pointer_mut(&dimension.pointer) {
            *place = put(chosen, dimension.key, &mut artifacts);
        }
    }
    let Value::Object(values) = values else {
        unreachable!("references are members, so the object itself is never replaced")
    };
    Arguments { values, input: template.input.clone(), artifacts }
}

/// The JSON for a value that stands under `key`. A dictionary with a member of that very name is
/// replaced by the member: `"mask": "previous_result:bordered"` takes the mask out of the pair.
fn put(value: &Yield, key: Option<&str>, artifacts: &mut BTreeMap<u64, Artifact>) -> Value {
    match value {
        Yield::One(artifact) => match key.and_then(|key| member(artifact, key)) {
            Some(member) => to_json(&member, artifacts),
            None => to_json(artifact, artifacts),
        },
        Yield::List(list) => list.iter().map(|artifact| to_json(artifact, artifacts)).collect(),
    }
}

fn to_json(artifact: &Artifact, artifacts: &mut BTreeMap<u64, Artifact>) -> Value {
    match artifact {
        Artifact::Text(text) => Value::String(text.clone()),
        Artifact::Json(value) => value.clone(),
        Artifact::Map(members) => {
            members.iter().map(|(name, member)| (name.clone(), to_json(member, artifacts))).collect()
        }
        Artifact::Image(_) | Artifact::Array(_) | Artifact::Frames(_) => {
            let handle = ArtifactRef(artifacts.last_key_value().map_or(0, |(last, _)| last + 1));
            artifacts.insert(handle.0, artifact.clone());
            handle.to_value()
        }
    }
}

#[cfg(test)]
mod tests {
    use image::DynamicImage;
    use serde_json::json;

    use super::*;
    use crate::artifact::Entry;

    fn template(value: Value) -> Arguments {
        match value {
            Value::Object(values) => Arguments { values, ..Arguments::default() },
            other => panic!("{other} is no object"),
        }
    }

    fn texts(prefix: &str, count: usize) -> Vec<Entry> {
        (0..count).map(|index| Artifact::text(&format!("{prefix}{index}")).into()).collect()
    }

    fn picture(width: u32) -> Artifact {
        Artifact::image(DynamicImage::new_rgb8(width, 1))
    }

    fn width(arguments: &Arguments, pointer: &str) -> u32 {
        let value = Value::Object(arguments.values.clone());
        let handle = value.pointer(pointer).and_then(ArtifactRef::from_value).expect("a handle stands there");
        match arguments.get(handle) {
            Some(Artifact::Image(image)) => image.width(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_last_reference_varies_fastest() {
        let mut results = Results::default();
        results.insert("i", texts("i", 2));
        results.insert("p", texts("p", 2));
        let template = template(json!({"image": "previous_result:i", "prompt": "previous_result:p", "steps": 4}));
        let iterations = expand(&template, &results).expect("it expands");
        let pairs: Vec<_> =
            iterations.iter().map(|a| (a.values["image"].clone(), a.values["prompt"].clone())).collect();
        let expected = [("i0", "p0"), ("i0", "p1"), ("i1", "p0"), ("i1", "p1")].map(|(i, p)| (json!(i), json!(p)));
        assert_eq!(pairs, expected);
        assert!(iterations.iter().all(|arguments| arguments.values["steps"] == 4));
    }

    #[test]
    fn the_number_of_iterations_is_the_product_of_what_each_reference_yields() {
        let mut results = Results::default();
        results.insert("two", texts("x", 2));
        results.insert("three", texts("x", 3));
        results.insert("hundred", texts("x", 100));
        results.insert("many", texts("x", 10_001));
        results.insert("none", vec![]);
        let cases = [
            (json!({}), Ok(1)),
            (json!({"a": 1, "b": [true, null]}), Ok(1)),
            (
                json!({"a": "previous_result:two", "b": ["previous_result:two"], "c": {"d": "previous_result:two"}}),
                Ok(8),
            ),
            (json!({"a": "previous_result:three", "b": "previous_result:three"}), Ok(9)),
            (json!({"a": "previous_result:hundred", "b": "previous_result:hundred"}), Ok(10_000)),
            (json!({"a": "previous_result:many"}), Err(10_001)),
            (json!({"a": "previous_result:many", "b": "previous_result:none"}), Ok(0)),
            (json!({"a": "previous_result:none"}), Ok(0)),
            (json!({"a": "previous_results:many"}), Ok(1)),
            (json!({"a": "previous_results:none"}), Ok(1)),
        ];
        for (value, expected) in cases {
            let count = expand(&template(value.clone()), &results).map(|iterations| iterations.len());
            assert_eq!(count, expected.map_err(|count| ReferenceError::TooMany { count }), "{value}");
        }
    }

    #[test]
    fn too_many_iterations_are_counted_without_being_made() {
        let mut results = Results::default();
        results.insert("many", texts("x", 5_000));
        let references: Map<_, _> = (0..40).map(|index| (format!("a{index}"), json!("previous_result:many"))).collect();
        let arguments = Arguments { values: references, ..Arguments::default() };
        let message = expand(&arguments, &results).expect_err("5000^40 is too many").to_string();
        assert!(message.starts_with("Too many iterations generated: "), "{message}");
        assert!(message.contains(" exceeds maximum of 10000."), "{message}");
    }

    #[test]
    fn nested_references_are_replaced_and_the_template_stays_as_it_was() {
        let mut results = Results::default();
        results.insert("gen", texts("x", 1));
        let original =
            template(json!({"list": [{"deep": "previous_result:gen"}, "keep"], "a/b~c": "previous_result:gen"}));
        let before = original.values.clone();
        let iterations = expand(&original, &results).expect("it expands");
        assert_eq!(
            Value::Object(iterations[0].values.clone()),
            json!({"list": [{"deep": "x0"}, "keep"], "a/b~c": "x0"})
        );
        assert_eq!(original.values, before);
    }

    #[test]
    fn a_dictionary_gives_way_to_its_member_of_the_same_name() {
        let mut results = Results::default();
        results.insert("msg", vec![Artifact::Json(json!({"text_inputs": [1, 2]})).into()]);
        results.insert("dict", vec![Artifact::Json(json!({"a": 1})).into()]);
        let pair = vec![("bordered_image".to_owned(), picture(7)), ("mask".to_owned(), picture(9))];
        results.insert("border", vec![Artifact::Map(pair).into()]);
        let template = template(json!({
            "text_inputs": "previous_result:msg",
            "dict": "previous_result:dict",
            "mask": "previous_result:border",
            "both": "previous_result:border",
            "list": ["previous_result:msg"]
        }));
        let iterations = expand(&template, &results).expect("it expands");
        let arguments = &iterations[0];
        assert_eq!(arguments.values["text_inputs"], json!([1, 2]));
        assert_eq!(arguments.values["dict"], json!({"a": 1}));
        assert_eq!(arguments.values["list"], json!([{"text_inputs": [1, 2]}]));
        assert_eq!(width(arguments, "/mask"), 9);
        assert_eq!((width(arguments, "/both/bordered_image"), width(arguments, "/both/mask")), (7, 9));
    }

    #[test]
    fn handles_of_the_template_are_kept_and_new_ones_do_not_collide() {
        let mut results = Results::default();
        results.insert("gen", vec![picture(10).into(), picture(11).into()]);
        let mut arguments = template(json!({
            "image": ArtifactRef(3).to_value(), "other": "previous_result:gen", "all": "previous_results:gen"
        }));
        arguments.artifacts.insert(3, picture(1));
        let iterations = expand(&arguments, &results).expect("it expands");
        assert_eq!(iterations.len(), 2);
        for (index, iteration) in iterations.iter().enumerate() {
            assert_eq!(width(iteration, "/image"), 1);
            assert_eq!(width(iteration, "/other"), 10 + index as u32);
            assert_eq!((width(iteration, "/all/0"), width(iteration, "/all/1")), (10, 11));
            assert_eq!(iteration.artifacts.len(), 4);
        }
    }

    #[test]
    fn replaced_text_is_not_read_as_a_reference_again() {
        let mut results = Results::default();
        results.insert("a", vec![Artifact::text("previous_result:b").into()]);
        let iterations = expand(&template(json!({"x": "previous_result:a"})), &results).expect("it expands");
        assert_eq!(iterations[0].values["x"], "previous_result:b");
    }

    #[test]
    fn the_item_of_an_inputs_list_is_kept_verbatim() {
        let arguments = Arguments { input: Some(json!("previous_result:x")), ..Arguments::default() };
        let iterations = expand(&arguments, &Results::default()).expect("it expands");
        assert_eq!(iterations[0].input, Some(json!("previous_result:x")));
    }
}
