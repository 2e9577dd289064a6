//! Conversion of an override to the type that a variable's default has.

use serde_json::{Map, Number, Value};

use super::{VariableError, holds_artifact};
use crate::{media, seed::whole_number, workflow::describe};

/// The override `value` of the variable `name` as its default's type asks.
///
/// `null` clears any variable, artifacts of a parent pass as they are, and an open variable (default `null`)
/// takes anything. What cannot be converted without loss is an error.
pub fn convert(name: &str, default: &Value, value: &Value) -> Result<Value, VariableError> {
    if value.is_null() || holds_artifact(value) {
        return Ok(value.clone());
    }
    let converted = match default {
        Value::Null => Some(value.clone()),
        Value::Bool(_) => return boolean(name, value),
        // The value of a library constant is not known here, so neither is its type.
        Value::String(text) if text.starts_with(media::CONSTANT_PREFIX) => Some(value.clone()),
        Value::String(_) if media::kind_of_key(name).is_some() && !value.is_number() => Some(value.clone()),
        Value::String(_) => Some(text(value)),
        Value::Number(number) if number.is_f64() => float(value),
        Value::Number(_) => return integer(name, value),
        Value::Array(items) => return list(name, items, value),
        Value::Object(_) => object(name, default, value),
    };
    converted.ok_or_else(|| mismatch(name, default, value, None))
}

fn mismatch(name: &str, default: &Value, value: &Value, remedy: Option<String>) -> VariableError {
    let expected = match default {
        Value::Null => "anything",
        Value::Bool(_) => "true or false",
        Value::Number(number) if number.is_f64() => "a number",
        Value::Number(_) => "a whole number",
        Value::String(_) => "text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    };
    VariableError::Type { name: name.to_owned(), expected, found: describe(value), remedy }
}

fn boolean(name: &str, value: &Value) -> Result<Value, VariableError> {
    let truth = match value {
        Value::String(text) => match text.to_lowercase().as_str() {
            "true" | "1" | "yes" | "on" => true,
            "false" | "0" | "no" | "off" => false,
            _ => return Err(VariableError::Boolean { name: name.to_owned(), value: text.clone() }),
        },
        Value::Bool(truth) => *truth,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::Array(items) => !items.is_empty(),
        Value::Object(object) => !object.is_empty(),
        Value::Null => false,
    };
    Ok(Value::Bool(truth))
}

fn integer(name: &str, value: &Value) -> Result<Value, VariableError> {
    let number = match value {
        Value::String(text) => plain_digits(text).and_then(|text| text.parse::<i128>().ok()),
        Value::Bool(truth) => Some(i128::from(*truth)),
        other => whole_number(other),
    };
    let number = number.and_then(|number| {
        i64::try_from(number).map(Number::from).or_else(|_| u64::try_from(number).map(Number::from)).ok()
    });
    number.map(Value::Number).ok_or_else(|| {
        let fraction = float(value).is_some();
        let remedy = if fraction {
            format!("write its default with a fraction (`4.0` instead of `4`) if `{name}` may have one")
        } else {
            "write it in digits".to_owned()
        };
        mismatch(name, &Value::from(0), value, Some(remedy))
    })
}

/// Digits without white space around them and without the `_` that may stand between them.
fn plain_digits(text: &str) -> Option<String> {
    let text = text.trim();
    let odd = text.starts_with('_') || text.ends_with('_') || text.contains("__");
    (!odd).then(|| text.replace('_', ""))
}

fn float(value: &Value) -> Option<Value> {
    let number = match value {
        Value::String(text) => plain_digits(text)?.parse().ok()?,
        Value::Number(number) => number.as_f64()?,
        Value::Bool(truth) => f64::from(*truth),
        _ => return None,
    };
    Number::from_f64(number).map(Value::Number)
}

fn text(value: &Value) -> Value {
    match value {
        Value::String(_) => value.clone(),
        other => Value::String(other.to_string()),
    }
}

fn object(name: &str, default: &Value, value: &Value) -> Option<Value> {
    match value {
        Value::Object(_) => Some(value.clone()),
        Value::Array(_) if media::kind_of_key(name).is_some() => Some(value.clone()),
        Value::String(text) if text.is_empty() => Some(Value::Object(Map::new())),
        // `image=./x.png` instead of a default `{"location": …}`.
        Value::String(_) if default.get("location").is_some() || media::kind_of_key(name).is_some() => {
            Some(value.clone())
        }
        Value::String(text) => serde_json::from_str(text).ok().filter(Value::is_object),
        _ => None,
    }
}

fn list(name: &str, default: &[Value], value: &Value) -> Result<Value, VariableError> {
    let items = match value {
        Value::Array(items) => items.clone(),
        Value::String(text) => split(text),
        _ => return Err(mismatch(name, &Value::Array(Vec::new()), value, None)),
    };
    match item_type(default) {
        Some(item) => items.iter().map(|value| convert(name, item, value)).collect(),
        None => Ok(Value::Array(items)),
    }
}

/// Items between commas, or those of a JSON list written as text (for items with commas in them).
fn split(text: &str) -> Vec<Value> {
    if text.trim_start().starts_with('[')
        && let Ok(Value::Array(items)) = serde_json::from_str(text)
    {
        return items;
    }
    text.split(',').map(|item| Value::from(item.trim())).collect()
}

/// An item that stands for the type of all items; none when they differ or there are none.
fn item_type(items: &[Value]) -> Option<&Value> {
    let kind = |value: &Value| match value {
        Value::Number(number) => {
            if number.is_f64() {
                4
            } else {
                3
            }
        }
        Value::Bool(_) => 1,
        Value::String(_) => 2,
        _ => 0,
    };
    let all_numbers = items.iter().all(Value::is_number);
    let first = items.iter().find(|item| kind(item) == 4).filter(|_| all_numbers).or(items.first())?;
    (kind(first) != 0 && (all_numbers || items.iter().all(|item| kind(item) == kind(first)))).then_some(first)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn values_are_converted_as_the_table_says() {
        let cases = [
            (json!(null), json!({"a": 1}), json!({"a": 1})),
            (json!(null), json!("x"), json!("x")),
            (json!(0), json!("42"), json!(42)),
            (json!(0), json!(" 42 "), json!(42)),
            (json!(0), json!("-1"), json!(-1)),
            (json!(0), json!("1_000"), json!(1000)),
            (json!(0), json!(3.0), json!(3)),
            (json!(0), json!("18446744073709551615"), json!(u64::MAX)),
            (json!(0.0), json!("2.25"), json!(2.25)),
            (json!(0.0), json!("1e-3"), json!(0.001)),
            (json!(0.0), json!("2"), json!(2.0)),
            (json!(3.5), json!("4"), json!(4.0)),
            (json!(3.5), json!(4), json!(4.0)),
            (json!("s"), json!(5), json!("5")),
            (json!("s"), json!(null), json!(null)),
            (json!("s"), json!(["a"]), json!("[\"a\"]")),
            (json!(["x"]), json!("a,b"), json!(["a", "b"])),
            (json!(["x"]), json!("a, b"), json!(["a", "b"])),
            (json!([]), json!("single"), json!(["single"])),
            (json!([]), json!(""), json!([""])),
            (json!([1]), json!("3, 4"), json!([3, 4])),
            (json!([1, 2.5]), json!("0.9, 2"), json!([0.9, 2.0])),
            (json!([true]), json!("yes,no"), json!([true, false])),
            (json!([1, "a"]), json!("3,b"), json!(["3", "b"])),
            (json!([]), json!("[\"a, b\", 2]"), json!(["a, b", 2])),
            (json!({"location": "u"}), json!("./x.png"), json!("./x.png")),
            (json!({"a": 1}), json!(""), json!({})),
            (json!({"a": 1}), json!("{\"b\": 2}"), json!({"b": 2})),
            (json!(true), json!(0), json!(false)),
            (json!("constant:a.B"), json!([1]), json!([1])),
        ];
        for (default, value, expected) in cases {
            assert_eq!(convert("v", &default, &value), Ok(expected), "{default} <- {value}");
        }
    }

    #[test]
    fn booleans_are_read_from_their_usual_words() {
        for text in ["true", "1", "yes", "on", "TRUE", "Yes", "ON"] {
            assert_eq!(convert("v", &json!(false), &json!(text)), Ok(json!(true)), "{text}");
        }
        for text in ["false", "0", "no", "off", "No", "OFF"] {
            assert_eq!(convert("v", &json!(true), &json!(text)), Ok(json!(false)), "{text}");
        }
        let error = convert("upscale", &json!(true), &json!("maybe")).expect_err("not a boolean");
        assert_eq!(error.to_string(), "Cannot interpret 'maybe' as true/false for variable 'upscale'");
    }

    #[test]
    fn what_cannot_be_converted_is_an_error_that_names_it() {
        let cases = [
            (json!(4), json!("3.5"), "variable `v` expects a whole number, found the text `3.5`", "4.0"),
            (json!(4), json!("4.0"), "variable `v` expects a whole number", "fraction"),
            (json!(4), json!("abc"), "variable `v` expects a whole number, found the text `abc`", "digits"),
            (json!(4), json!(3.7), "variable `v` expects a whole number, found `3.7`", "fraction"),
            (json!(4), json!("_1"), "variable `v` expects a whole number", ""),
            (json!(4.0), json!("abc"), "variable `v` expects a number, found the text `abc`", ""),
            (json!(4.0), json!("nan"), "variable `v` expects a number", ""),
            (json!([1]), json!("1,x"), "variable `v` expects a whole number", ""),
            (json!([1]), json!({"a": 1}), "variable `v` expects a list, found an object", ""),
            (json!({"a": 1}), json!("text"), "variable `v` expects an object, found the text `text`", ""),
        ];
        for (default, value, message, remedy) in cases {
            let error = convert("v", &default, &value).expect_err(message);
            assert!(error.to_string().starts_with(message), "{error}");
            assert!(error.remedy().unwrap_or_default().contains(remedy), "{error:?}");
        }
    }

    #[test]
    fn a_picture_variable_takes_paths_objects_and_lists() {
        for value in [json!("a.png"), json!({"location": "a.png"}), json!(["a.png", "b.png"])] {
            for default in [json!({}), json!("default.png"), json!(null)] {
                assert_eq!(convert("start_image", &default, &value), Ok(value.clone()));
            }
        }
    }
}
