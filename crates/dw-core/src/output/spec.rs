//! What a step's `result` object says about saving.

use serde_json::{Map, Value};

use super::OutputError;

/// Frames in a second of an animation when the workflow does not say.
const DEFAULT_FPS: u32 = 8;

/// How the results of a step are saved, with every variable replaced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SaveSpec {
    /// The MIME type of the files.
    pub content_type: String,
    /// Goes before the names of the files.
    pub file_base_name: Option<String>,
    /// Frames in a second of an animation.
    pub fps: u32,
    /// JPEG quality, 1 to 100; Pillow's 75 when none.
    pub quality: Option<u8>,
    /// Whether pictures carry metadata; the run's default for the type when none.
    pub embed_metadata: Option<bool>,
}

impl SaveSpec {
    /// Saving as `content_type`, everything else at its default.
    pub fn new(content_type: impl Into<String>) -> Self {
        Self {
            content_type: content_type.into(),
            file_base_name: None,
            fps: DEFAULT_FPS,
            quality: None,
            embed_metadata: None,
        }
    }

    /// Reads a step's `result`. None when nothing is to be saved: no `result`, no `content_type`, or
    /// `save` is false. Numbers may be text, as variables given on a command line are.
    pub fn from_result(result: Option<&Value>) -> Result<Option<Self>, OutputError> {
        let Some(result) = result.and_then(Value::as_object) else { return Ok(None) };
        let content_type = text(result, "content_type")?.unwrap_or_default();
        if content_type.trim().is_empty() || boolean(result, "save")? == Some(false) {
            return Ok(None);
        }
        let fps = integer(result, "fps", 1..=1000, "give a whole number from 1 to 1000")?;
        let quality = integer(result, "quality", 1..=100, "give a whole number from 1 to 100")?;
        Ok(Some(Self {
            file_base_name: text(result, "file_base_name")?,
            fps: fps.unwrap_or(DEFAULT_FPS),
            quality: quality.map(|quality| quality as u8),
            embed_metadata: boolean(result, "embed_metadata")?,
            ..Self::new(content_type)
        }))
    }

    /// Whether pictures saved this way carry metadata: as the workflow says, else PNG does when
    /// `by_default` is set, and nothing else does.
    pub fn embeds_metadata(&self, by_default: bool) -> bool {
        self.embed_metadata.unwrap_or(by_default && super::naming::essence(&self.content_type) == "image/png")
    }
}

fn bad(key: &'static str, found: &Value, expected: &'static str) -> OutputError {
    OutputError::BadSpec { key, found: found.to_string(), expected }
}

fn text(result: &Map<String, Value>, key: &'static str) -> Result<Option<String>, OutputError> {
    match result.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(other) => Err(bad(key, other, "give text")),
    }
}

fn boolean(result: &Map<String, Value>, key: &'static str) -> Result<Option<bool>, OutputError> {
    match result.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Bool(value)) => Ok(Some(*value)),
        Some(Value::String(text)) if text.eq_ignore_ascii_case("true") => Ok(Some(true)),
        Some(Value::String(text)) if text.eq_ignore_ascii_case("false") => Ok(Some(false)),
        Some(other) => Err(bad(key, other, "give true or false")),
    }
}

fn integer(
    result: &Map<String, Value>,
    key: &'static str,
    range: std::ops::RangeInclusive<u32>,
    expected: &'static str,
) -> Result<Option<u32>, OutputError> {
    let Some(value) = result.get(key).filter(|value| !value.is_null()) else { return Ok(None) };
    let number = match value {
        Value::Number(number) => number.as_f64().filter(|number| number.fract() == 0.0),
        Value::String(text) => text.trim().parse::<u32>().ok().map(f64::from),
        _ => None,
    };
    let number = number.filter(|number| (0.0..=f64::from(u32::MAX)).contains(number)).map(|number| number as u32);
    number.filter(|number| range.contains(number)).map(Some).ok_or_else(|| bad(key, value, expected))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn nothing_is_saved_without_a_content_type_or_when_save_is_false() {
        for result in [json!({}), json!({"save": true}), json!({"content_type": null}), json!({"content_type": ""})] {
            assert_eq!(SaveSpec::from_result(Some(&result)).expect("it is valid"), None, "{result}");
        }
        let off = json!({"content_type": "image/png", "save": false});
        assert_eq!(SaveSpec::from_result(Some(&off)).expect("it is valid"), None);
        assert_eq!(SaveSpec::from_result(None).expect("it is valid"), None);
    }

    #[test]
    fn every_key_is_read_and_numbers_may_be_text() {
        let result = json!({
            "content_type": "image/jpeg", "file_base_name": "a_", "fps": "12", "quality": 90.0,
            "embed_metadata": true, "unknown": [1]
        });
        let expected = SaveSpec {
            file_base_name: Some("a_".into()),
            fps: 12,
            quality: Some(90),
            embed_metadata: Some(true),
            ..SaveSpec::new("image/jpeg")
        };
        assert_eq!(SaveSpec::from_result(Some(&result)).expect("it is valid"), Some(expected));
    }

    #[test]
    fn values_that_make_no_sense_are_refused() {
        for (key, value) in [
            ("fps", json!(0)),
            ("fps", json!(-3)),
            ("fps", json!(1.5)),
            ("fps", json!("soon")),
            ("quality", json!(101)),
            ("save", json!(1)),
            ("file_base_name", json!(7)),
            ("content_type", json!(["image/png"])),
        ] {
            let mut result = json!({"content_type": "image/png"});
            result[key] = value;
            let message = SaveSpec::from_result(Some(&result)).expect_err("refused").to_string();
            assert!(message.starts_with(&format!("`result.{key}` is ")), "{message}");
        }
    }

    #[test]
    fn png_carries_metadata_unless_told_otherwise_and_other_types_only_when_told() {
        let spec = |content_type: &str, embed_metadata| SaveSpec { embed_metadata, ..SaveSpec::new(content_type) };
        assert!(spec("image/png", None).embeds_metadata(true));
        assert!(!spec("image/png", None).embeds_metadata(false));
        assert!(!spec("image/png", Some(false)).embeds_metadata(true));
        assert!(spec("image/jpeg", Some(true)).embeds_metadata(false));
        assert!(!spec("image/jpeg", None).embeds_metadata(true));
    }
}
