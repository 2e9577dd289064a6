//! What a picture says about how it was made: a JSON object inside the PNG, JPEG or WebP file, written
//! with the picture and read back by [`read`].
//!
//! What goes into the object is decided by the engine; where it stands in which format is decided
//! here. Encoding the pixels around it is left to [`crate::output`].

pub(crate) mod exif;
mod read;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde_json::{Map, Value, json};

pub use read::{MetadataError, read};

use crate::{
    arguments::{Arguments, ArtifactRef},
    artifact::Artifact,
    seed::Seed,
};

/// The keyword of the PNG text chunk that holds the object.
pub(crate) const PNG_KEYWORD: &str = "parameters";

/// How a picture was made. In JSON the keys stand in the order of the fields, absent ones left out.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metadata {
    /// The step's name.
    pub step_name: String,
    /// The model, for pipeline steps.
    pub model_name: Option<String>,
    /// The command, for task steps.
    pub task_command: Option<String>,
    /// The arguments of the iteration as [`shown`] renders them.
    pub arguments: Option<Value>,
    /// The seed in force for the step.
    pub seed: Option<Seed>,
    /// The workflow's `id`.
    pub workflow_id: Option<String>,
    /// The step's `scheduler`, when it names one.
    pub scheduler: Option<Value>,
    /// The step's `loras`, when it names any.
    pub loras: Option<Value>,
    /// The version of dw that made the picture.
    pub dw_version: Option<String>,
    /// The name of the workflow's file, without its folder.
    pub workflow: Option<String>,
    /// The folder that relative paths of the workflow start from, as seen from the picture's folder:
    /// a picture that is shared does not tell where its maker keeps files.
    pub base_dir: Option<String>,
    /// The whole workflow with every variable replaced, so that it can run again.
    pub workflow_document: Option<Value>,
    /// Keys that this version does not know, as they were read.
    pub other: Map<String, Value>,
}

impl Metadata {
    /// Metadata of a step, made by this version of dw.
    pub fn new(step_name: impl Into<String>) -> Self {
        Self { step_name: step_name.into(), dw_version: Some(env!("CARGO_PKG_VERSION").to_owned()), ..Self::default() }
    }

    /// The object as it stands in a file.
    pub fn to_value(&self) -> Value {
        let text = |value: &Option<String>| value.clone().map(Value::String);
        let members = [
            ("step_name", Some(Value::String(self.step_name.clone()))),
            ("model_name", text(&self.model_name)),
            ("task_command", text(&self.task_command)),
            ("arguments", self.arguments.clone()),
            ("seed", self.seed.as_ref().map(seed_to_value)),
            ("workflow_id", text(&self.workflow_id)),
            ("scheduler", self.scheduler.clone()),
            ("loras", self.loras.clone()),
            ("dw_version", text(&self.dw_version)),
            ("workflow", text(&self.workflow)),
            ("base_dir", text(&self.base_dir)),
            ("workflow_document", self.workflow_document.clone()),
        ];
        let known = members.into_iter().filter_map(|(key, value)| value.map(|value| (key.to_owned(), value)));
        Value::Object(known.chain(self.other.clone()).collect())
    }

    /// Reads the object. None when it is not one of ours: no object, or without `step_name`. A known
    /// key whose value has an unexpected type is kept among [`Metadata::other`].
    pub fn from_value(value: Value) -> Option<Self> {
        let Value::Object(mut members) = value else { return None };
        let step_name = take_text(&mut members, "step_name")?;
        Some(Self {
            step_name,
            model_name: take_text(&mut members, "model_name"),
            task_command: take_text(&mut members, "task_command"),
            arguments: members.shift_remove("arguments"),
            seed: take_seed(&mut members),
            workflow_id: take_text(&mut members, "workflow_id"),
            scheduler: members.shift_remove("scheduler"),
            loras: members.shift_remove("loras"),
            dw_version: take_text(&mut members, "dw_version"),
            workflow: take_text(&mut members, "workflow"),
            base_dir: take_text(&mut members, "base_dir"),
            workflow_document: members.shift_remove("workflow_document"),
            other: members,
        })
    }

    /// The folder that relative paths of the workflow start from, for a picture that lies at `picture`;
    /// absolute, without `..`, when it exists.
    pub fn base_dir_of(&self, picture: &Path) -> Option<PathBuf> {
        let folder = picture.parent().unwrap_or(Path::new("")).join(self.base_dir.as_ref()?);
        Some(fs_err::canonicalize(&folder).unwrap_or(folder))
    }

    /// The JSON text as it is embedded, on one line.
    pub(crate) fn to_text(&self) -> String {
        self.to_value().to_string()
    }

    /// The same without what only `dw rerun` needs, for formats that cannot hold it all.
    pub(crate) fn without_document(&self) -> Self {
        Self { workflow_document: None, base_dir: None, ..self.clone() }
    }
}

fn take_text(members: &mut Map<String, Value>, key: &str) -> Option<String> {
    let text = members.get(key)?.as_str()?.to_owned();
    members.shift_remove(key);
    Some(text)
}

fn take_seed(members: &mut Map<String, Value>) -> Option<Seed> {
    let integer = |value: &Value| value.as_i64().map(i128::from).or_else(|| value.as_u64().map(i128::from));
    let seed = match members.get("seed")? {
        Value::Array(items) => Seed::Each(items.iter().map(integer).collect::<Option<_>>()?),
        value => Seed::One(integer(value)?),
    };
    members.shift_remove("seed");
    Some(seed)
}

/// A seed in JSON; a number too large for JSON libraries to keep exactly becomes text.
fn seed_to_value(seed: &Seed) -> Value {
    let integer = |number: &i128| match (i64::try_from(*number), u64::try_from(*number)) {
        (Ok(signed), _) => json!(signed),
        (_, Ok(unsigned)) => json!(unsigned),
        _ => json!(number.to_string()),
    };
    match seed {
        Seed::One(number) => integer(number),
        Seed::Each(numbers) => numbers.iter().map(integer).collect(),
    }
}

/// The arguments of a call as they are shown to people: handles become the path they were loaded from
/// (`sources`, by handle number) or, for results of other steps, a short description.
pub fn shown(arguments: &Arguments, sources: &BTreeMap<u64, String>) -> Value {
    match &arguments.input {
        Some(input) if arguments.values.is_empty() => shown_value(input, arguments, sources),
        _ => shown_members(&arguments.values, arguments, sources),
    }
}

fn shown_members(members: &Map<String, Value>, arguments: &Arguments, sources: &BTreeMap<u64, String>) -> Value {
    members.iter().map(|(key, value)| (key.clone(), shown_value(value, arguments, sources))).collect()
}

fn shown_value(value: &Value, arguments: &Arguments, sources: &BTreeMap<u64, String>) -> Value {
    if let Some(handle) = ArtifactRef::from_value(value) {
        let description = || arguments.get(handle).map_or_else(|| "<artifact>".to_owned(), placeholder);
        return Value::String(sources.get(&handle.0).cloned().unwrap_or_else(description));
    }
    match value {
        Value::Array(items) => items.iter().map(|item| shown_value(item, arguments, sources)).collect(),
        Value::Object(members) => shown_members(members, arguments, sources),
        other => other.clone(),
    }
}

/// A short description that stands for an artifact where only text can: `<image 128x128>`.
pub(crate) fn placeholder(artifact: &Artifact) -> String {
    match artifact {
        Artifact::Image(image) => format!("<image {}x{}>", image.width(), image.height()),
        Artifact::Frames(frames) => format!("<{} frames>", frames.len()),
        Artifact::Array(array) => {
            let extents: Vec<_> = array.shape.iter().map(ToString::to_string).collect();
            format!("<array {}>", extents.join("x"))
        }
        other => format!("<{}>", other.kind()),
    }
}

/// The path from `picture_dir` to `base_dir`, with `/` between its parts. None when either cannot be
/// found or they share no root.
pub fn relative_base_dir(picture_dir: &Path, base_dir: &Path) -> Option<String> {
    let from = fs_err::canonicalize(picture_dir).ok()?;
    let to = fs_err::canonicalize(base_dir).ok()?;
    let shared = from.components().zip(to.components()).take_while(|(a, b)| a == b).count();
    if shared == 0 {
        return None;
    }
    let up = from.components().skip(shared).map(|_| "..".to_owned());
    let down = to.components().skip(shared).map(|part| part.as_os_str().to_string_lossy().into_owned());
    let parts: Vec<_> = up.chain(down).collect();
    Some(if parts.is_empty() { ".".to_owned() } else { parts.join("/") })
}

#[cfg(test)]
mod tests {
    use image::DynamicImage;

    use super::*;

    fn full() -> Metadata {
        Metadata {
            model_name: Some("builtin:landscapes".into()),
            arguments: Some(json!({"prompt": "a sea"})),
            seed: Some(Seed::Each(vec![-1, i128::from(u64::MAX)])),
            workflow_id: Some("landscape".into()),
            scheduler: Some(json!({"shift": 3})),
            loras: Some(json!([])),
            workflow: Some("landscape.json".into()),
            base_dir: Some("../examples".into()),
            workflow_document: Some(json!({"id": "landscape"})),
            other: Map::from_iter([("later".to_owned(), json!(1))]),
            ..Metadata::new("paint")
        }
    }

    #[test]
    fn the_object_is_read_back_as_it_was_written() {
        assert_eq!(Metadata::from_value(full().to_value()), Some(full()));
        let plain = Metadata::new("s");
        assert_eq!(Metadata::from_value(plain.to_value()), Some(plain));
    }

    #[test]
    fn keys_keep_their_order_and_absent_ones_are_left_out() {
        let value = full().to_value();
        let keys: Vec<_> = value.as_object().expect("an object").keys().map(String::as_str).collect();
        let expected = [
            "step_name",
            "model_name",
            "arguments",
            "seed",
            "workflow_id",
            "scheduler",
            "loras",
            "dw_version",
            "workflow",
            "base_dir",
            "workflow_document",
            "later",
        ];
        assert_eq!(keys, expected);
    }

    #[test]
    fn foreign_objects_are_not_ours_and_odd_values_do_not_hide_the_rest() {
        for value in [json!(null), json!([]), json!("x"), json!({}), json!({"step_name": 4})] {
            assert_eq!(Metadata::from_value(value.clone()), None, "{value}");
        }
        let odd = json!({"step_name": "s", "seed": "lots", "model_name": 3});
        let read = Metadata::from_value(odd).expect("it has a step name");
        assert_eq!((read.seed, read.model_name), (None, None));
        assert_eq!(Value::Object(read.other), json!({"seed": "lots", "model_name": 3}));
    }

    #[test]
    fn handles_are_shown_as_paths_or_descriptions() {
        let mut arguments = Arguments::default();
        arguments.values.insert("image".into(), ArtifactRef(0).to_value());
        arguments.values.insert("list".into(), json!([{"mask": ArtifactRef(1).to_value()}, 3]));
        arguments.artifacts.insert(0, Artifact::image(DynamicImage::new_rgb8(4, 2)));
        arguments.artifacts.insert(1, Artifact::image(DynamicImage::new_rgb8(8, 6)));
        let sources = BTreeMap::from([(0, "photos/sea.png".to_owned())]);
        let expected = json!({"image": "photos/sea.png", "list": [{"mask": "<image 8x6>"}, 3]});
        assert_eq!(shown(&arguments, &sources), expected);
    }

    #[test]
    fn the_base_folder_is_found_from_the_pictures_folder() {
        let root = tempfile::tempdir().expect("a temporary folder");
        let (out, base) = (root.path().join("out/today"), root.path().join("examples"));
        fs_err::create_dir_all(&out).expect("created");
        fs_err::create_dir_all(&base).expect("created");
        assert_eq!(relative_base_dir(&out, &base).as_deref(), Some("../../examples"));
        assert_eq!(relative_base_dir(&base, &base).as_deref(), Some("."));
        assert_eq!(relative_base_dir(&out, &root.path().join("missing")), None);
        let metadata = Metadata { base_dir: Some("../../examples".into()), ..Metadata::new("s") };
        let found = metadata.base_dir_of(&out.join("a.png")).expect("it is named");
        assert_eq!(found, base.canonicalize().expect("it exists"));
    }
}
