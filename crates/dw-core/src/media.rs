//! Media in arguments: which values are pictures or videos, and where those are.
//!
//! Nothing is loaded here. [`walk`] hands every media value to a callback, and the engine's callback loads it.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::{
    document::child_pointer,
    paths::{self, Existence, IMAGE_EXTENSIONS, InputError, VIDEO_EXTENSIONS},
    variables::{VARIABLE_PREFIX, holds_artifact},
};

/// What stands before the name of a library constant.
pub const CONSTANT_PREFIX: &str = "constant:";

/// Picture or video.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MediaKind {
    /// A picture.
    Image,
    /// A video.
    Video,
}

impl MediaKind {
    /// The word that `media_type` uses.
    pub fn name(self) -> &'static str {
        match self {
            Self::Image => "image",
            Self::Video => "video",
        }
    }

    fn title(self) -> &'static str {
        match self {
            Self::Image => "Image",
            Self::Video => "Video",
        }
    }
}

/// A picture or video that a workflow names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MediaSpec {
    /// Which of the two.
    pub kind: MediaKind,
    /// Path or URL, as written.
    pub location: String,
}

/// Where a medium is, its path checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Location {
    /// An existing file with an extension that is allowed.
    File(PathBuf),
    /// A well-formed `http` or `https` URL.
    Url(String),
}

/// Why a media value cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MediaError {
    /// An object without a location.
    #[error("{kind} dict must have 'location' key, got keys: [{keys}]")]
    NoLocation {
        /// `Image` or `Video`.
        kind: &'static str,
        /// The keys it has.
        keys: String,
    },
    /// A value that names nothing.
    #[error("{kind} specification must be a string, got {found}")]
    NotText {
        /// `Image` or `Video`.
        kind: &'static str,
        /// What it is.
        found: &'static str,
    },
    /// A `media_type` that is neither.
    #[error("Unknown media_type '{0}' - use 'image' or 'video'")]
    UnknownType(String),
    /// A path or URL that is refused.
    #[error(transparent)]
    Input(#[from] InputError),
    /// What the callback of a walk ran into.
    #[error("{0}")]
    Load(String),
}

impl MediaSpec {
    /// The explicit form, which is media under any key.
    pub fn to_value(&self) -> Value {
        json!({ "media_type": self.kind.name(), "location": self.location })
    }

    /// Checks the location; relative paths start from `base_dir`.
    pub fn locate(&self, base_dir: &Path) -> Result<Location, MediaError> {
        if self.location.contains("://") {
            paths::check_url(&self.location)?;
            return Ok(Location::Url(self.location.clone()));
        }
        let path = paths::resolve_path(&self.location, base_dir, Existence::Required)?;
        match self.kind {
            MediaKind::Image => paths::check_extension(&path, IMAGE_EXTENSIONS, "Image file")?,
            MediaKind::Video => paths::check_extension(&path, VIDEO_EXTENSIONS, "Video file")?,
        }
        Ok(Location::File(path))
    }
}

/// The kind of media that values under this key are: `image`, `*_image`, `video`, `*_video`.
pub fn kind_of_key(key: &str) -> Option<MediaKind> {
    if key == "image" || key.ends_with("_image") {
        Some(MediaKind::Image)
    } else if key == "video" || key.ends_with("_video") {
        Some(MediaKind::Video)
    } else {
        None
    }
}

/// Whether a text is filled in later: a result of a step, a variable, a constant.
pub fn is_reference(text: &str) -> bool {
    const PREFIXES: &[&str] = &["previous_result:", "previous_results:", VARIABLE_PREFIX, CONSTANT_PREFIX];
    PREFIXES.iter().any(|prefix| text.starts_with(prefix))
}

/// What a walk does with each medium; the second argument is its JSON pointer inside the walked value.
pub type Visit<'a> = &'a mut dyn FnMut(MediaSpec, &str) -> Result<Value, MediaError>;

/// Replaces every media value inside the arguments `values` by what `visit` returns for it.
///
/// Errors come with the JSON pointer of the value they are about; values with errors stay, and so do
/// references and artifacts. `null` stands for no picture.
pub fn walk(values: &mut Map<String, Value>, visit: Visit) -> Vec<(String, MediaError)> {
    let mut errors = Vec::new();
    for (key, value) in values.iter_mut() {
        walk_entry(key, value, &child_pointer("", key), visit, &mut errors);
    }
    errors
}

fn walk_entry(key: &str, value: &mut Value, pointer: &str, visit: Visit, errors: &mut Vec<(String, MediaError)>) {
    let explicit = value.get("media_type").is_some() && value.get("location").is_some();
    match kind_of_key(key) {
        Some(kind) if !explicit => walk_media(kind, value, pointer, visit, errors),
        _ => walk_any(value, pointer, visit, errors),
    }
}

/// A value that is media by the key above it.
fn walk_media(kind: MediaKind, value: &mut Value, pointer: &str, visit: Visit, errors: &mut Vec<(String, MediaError)>) {
    let wrong = |found| MediaError::NotText { kind: kind.title(), found };
    if holds_artifact(value) && !value.is_array() {
        return;
    }
    let location = match &mut *value {
        Value::Null => return,
        Value::Array(items) => {
            for (index, item) in items.iter_mut().enumerate() {
                let pointer = child_pointer(pointer, &index.to_string());
                if item.get("media_type").is_some() {
                    walk_any(item, &pointer, visit, errors);
                } else {
                    walk_media(kind, item, &pointer, visit, errors);
                }
            }
            return;
        }
        Value::String(text) if is_reference(text) => return,
        Value::String(text) => Ok(text.clone()),
        Value::Object(object) => match object.get("location") {
            Some(Value::String(text)) if is_reference(text) => return,
            Some(Value::String(text)) => Ok(text.clone()),
            Some(other) => Err(wrong(type_name(other))),
            None => {
                let keys = object.keys().map(|key| format!("'{key}'")).collect::<Vec<_>>().join(", ");
                Err(MediaError::NoLocation { kind: kind.title(), keys })
            }
        },
        other => Err(wrong(type_name(other))),
    };
    replace(value, location.map(|location| MediaSpec { kind, location }), pointer, visit, errors);
}

/// A value that is media only if it says so itself.
fn walk_any(value: &mut Value, pointer: &str, visit: Visit, errors: &mut Vec<(String, MediaError)>) {
    match value {
        Value::Array(items) => {
            for (index, item) in items.iter_mut().enumerate() {
                walk_any(item, &child_pointer(pointer, &index.to_string()), visit, errors);
            }
        }
        Value::Object(object) => match (object.get("media_type"), object.get("location")) {
            (Some(_), Some(location)) if holds_artifact(location) => {
                // A sub-workflow was given the decoded picture where it writes the location.
                *value = location.clone();
            }
            (Some(_), Some(Value::String(text))) if is_reference(text) => {}
            (Some(media_type), Some(location)) => {
                let spec = explicit_spec(media_type, location);
                replace(value, spec, pointer, visit, errors);
            }
            _ => {
                for (key, item) in object.iter_mut() {
                    walk_entry(key, item, &child_pointer(pointer, key), visit, errors);
                }
            }
        },
        _ => {}
    }
}

fn explicit_spec(media_type: &Value, location: &Value) -> Result<MediaSpec, MediaError> {
    let kind = match media_type.as_str() {
        Some("image") => MediaKind::Image,
        Some("video") => MediaKind::Video,
        Some(other) => return Err(MediaError::UnknownType(other.to_owned())),
        None => return Err(MediaError::UnknownType(media_type.to_string())),
    };
    match location {
        Value::String(text) => Ok(MediaSpec { kind, location: text.clone() }),
        other => Err(MediaError::NotText { kind: kind.title(), found: type_name(other) }),
    }
}

fn replace(
    value: &mut Value,
    spec: Result<MediaSpec, MediaError>,
    pointer: &str,
    visit: Visit,
    errors: &mut Vec<(String, MediaError)>,
) {
    match spec.and_then(|spec| visit(spec, pointer)) {
        Ok(loaded) => *value = loaded,
        Err(error) => errors.push((pointer.to_owned(), error)),
    }
}

fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Locations found, and errors, in the order of the walk.
    fn walked(arguments: Value) -> (Value, Vec<String>) {
        let mut values = arguments.as_object().cloned().expect("an object");
        let errors = walk(&mut values, &mut |spec, _| Ok(json!(format!("<{} {}>", spec.kind.name(), spec.location))));
        (Value::Object(values), errors.into_iter().map(|(pointer, error)| format!("{pointer}: {error}")).collect())
    }

    #[test]
    fn media_are_found_by_key_and_by_media_type() {
        let explicit = json!({"media_type": "image", "location": "m.png"});
        let (found, errors) = walked(json!({
            "image": "a.png", "control_image": {"location": "b.png", "size": 1}, "start_video": "c.mp4",
            "mask": explicit, "masks": [explicit, [explicit]], "references": {"image": ["d.png", {"location": "e.png"}]},
            "config": {"location": "somewhere", "other": 1}, "prompt": "f.png", "images": "g.png"
        }));
        assert_eq!(errors, Vec::<String>::new());
        assert_eq!(found["image"], "<image a.png>");
        assert_eq!(found["control_image"], "<image b.png>");
        assert_eq!(found["start_video"], "<video c.mp4>");
        assert_eq!(found["mask"], "<image m.png>");
        assert_eq!(found["masks"], json!(["<image m.png>", ["<image m.png>"]]));
        assert_eq!(found["references"]["image"], json!(["<image d.png>", "<image e.png>"]));
        assert_eq!(found["config"], json!({"location": "somewhere", "other": 1}));
        assert_eq!((&found["prompt"], &found["images"]), (&json!("f.png"), &json!("g.png")));
    }

    #[test]
    fn references_artifacts_and_null_are_left_for_later() {
        let arguments = json!({"image": "previous_result:gen", "mask_image": null, "a_image": {"$artifact": 1},
                               "b_image": ["previous_results:gen"], "x": {"media_type": "image", "location": "variable:v"}});
        assert_eq!(walked(arguments.clone()), (arguments, Vec::new()));
        let decoded = json!({"x": {"media_type": "image", "location": {"$artifact": 1}}});
        assert_eq!(walked(decoded).0, json!({"x": {"$artifact": 1}}));
    }

    #[test]
    fn values_that_name_no_picture_are_errors_with_their_place() {
        let cases = [
            (json!({"image": 123}), "/image: Image specification must be a string, got a number"),
            (
                json!({"image": {"invalid": "key"}}),
                "/image: Image dict must have 'location' key, got keys: ['invalid']",
            ),
            (
                json!({"a": [{"media_type": "audio", "location": "x"}]}),
                "/a/0: Unknown media_type 'audio' - use 'image' or 'video'",
            ),
            (json!({"video": [true]}), "/video/0: Video specification must be a string, got true or false"),
        ];
        for (arguments, message) in cases {
            assert_eq!(walked(arguments).1, [message]);
        }
    }

    #[test]
    fn locations_are_files_beside_the_workflow_or_urls() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        fs_err::write(folder.path().join("a.PNG"), "").expect("a file");
        fs_err::write(folder.path().join("notes.txt"), "").expect("a file");
        let locate = |location: &str| {
            MediaSpec { kind: MediaKind::Image, location: location.into() }
                .locate(folder.path())
                .map_err(|e| e.to_string())
        };
        assert!(matches!(locate("a.PNG"), Ok(Location::File(_))));
        let absolute = folder.path().join("a.PNG").to_string_lossy().into_owned();
        assert!(matches!(locate(&absolute), Ok(Location::File(_))));
        assert!(matches!(locate("https://example.com/a"), Ok(Location::Url(_))));
        assert!(locate("ftp://example.com/a").expect_err("scheme").contains("not allowed: ftp"));
        assert_eq!(locate("notes.txt"), Err("Image file extension not allowed: .txt".into()));
        assert!(locate("gone.png").expect_err("missing").starts_with("Path does not exist"));
        assert!(locate("../../../etc/passwd").expect_err("traversal").contains("dangerous pattern"));
        assert!(locate("~/a.png").expect_err("home").contains("dangerous pattern"));
    }
}
