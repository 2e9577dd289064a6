//! Commands that bring things into a workflow: pictures from files and URLs, and plain values.

use std::path::{Component, Path, PathBuf};

use dw_core::{
    arguments::ArtifactRef,
    artifact::Artifact,
    picture::{decode, load},
};
use glob::{MatchOptions, Pattern};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::{
    TaskError, TaskOutput,
    arguments::{Call, argument_error},
};

/// What the name of a picture file may end in.
const EXTENSIONS: [&str; 6] = ["jpg", "jpeg", "png", "gif", "bmp", "webp"];

/// Arguments of `gather_images`.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Images {
    /// A pattern of file names (`*`, `?`, `[ab]`, `**` for folders at any depth), relative to the
    /// workflow's folder (or, when nothing is there, to the current one) or absolute. Pictures come in
    /// the order of their paths.
    #[serde(default)]
    glob: Option<String>,
    /// Pictures on the web, taken after those of `glob`.
    #[serde(default)]
    urls: Vec<String>,
}

pub(crate) fn gather_images(arguments: Images, call: &Call) -> Result<TaskOutput, TaskError> {
    let mut pictures = Vec::new();
    for path in arguments.glob.map_or(Ok(Vec::new()), |pattern| matches(&pattern, call.context.base_dir))? {
        call.context.cancel.check()?;
        check_extension(&path)?;
        pictures.push(Artifact::image(load(&path).map_err(failed)?));
    }
    for url in arguments.urls {
        call.context.cancel.check()?;
        check_url(&url)?;
        let bytes = (call.context.fetch)(&url).map_err(TaskError::Failed)?;
        pictures.push(Artifact::image(decode(&bytes, &url).map_err(failed)?));
    }
    if pictures.is_empty() {
        let hint = "give a `glob` that matches files, or `urls`";
        return Err(TaskError::Failed(format!("No images found; {hint}")));
    }
    Ok(TaskOutput::Many(pictures))
}

fn failed(error: impl std::fmt::Display) -> TaskError {
    TaskError::Failed(error.to_string())
}

/// The files that `pattern` matches, in the order of their paths.
fn matches(pattern: &str, base_dir: &Path) -> Result<Vec<PathBuf>, TaskError> {
    check_pattern(pattern)?;
    let below_base = Path::new(&Pattern::escape(&base_dir.to_string_lossy())).join(pattern);
    let found = files(&below_base.to_string_lossy())?;
    if found.is_empty() { files(pattern) } else { Ok(found) }
}

/// `..` would let a workflow read outside the folders it names.
fn check_pattern(pattern: &str) -> Result<(), TaskError> {
    let parts = pattern.replace('\\', "/");
    if Path::new(&parts).components().any(|part| part == Component::ParentDir) || parts.contains("..") {
        let reason =
            format!("`{pattern}` contains `..`; write an absolute path, or move the pictures below the workflow");
        return Err(argument_error("glob", reason));
    }
    Ok(())
}

fn files(pattern: &str) -> Result<Vec<PathBuf>, TaskError> {
    let options =
        MatchOptions { case_sensitive: true, require_literal_separator: true, require_literal_leading_dot: true };
    let paths = glob::glob_with(pattern, options)
        .map_err(|error| argument_error("glob", format!("`{pattern}` is no pattern: {}", error.msg)))?;
    let mut found = paths.collect::<Result<Vec<_>, _>>().map_err(failed)?;
    found.retain(|path| !path.is_dir());
    found.sort();
    match found.iter().find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().contains(".."))) {
        Some(path) => Err(TaskError::Failed(format!("`{}` contains `..`; rename it", path.display()))),
        None => Ok(found),
    }
}

fn check_extension(path: &Path) -> Result<(), TaskError> {
    let extension = path.extension().map(|extension| extension.to_string_lossy().to_lowercase()).unwrap_or_default();
    if EXTENSIONS.contains(&extension.as_str()) {
        return Ok(());
    }
    let allowed = EXTENSIONS.map(|extension| format!(".{extension}")).join(", ");
    let shown = if extension.is_empty() { String::new() } else { format!(".{extension}") };
    Err(TaskError::Failed(format!(
        "Image file extension not allowed: `{shown}` of `{}`; pictures end in {allowed}",
        path.display()
    )))
}

fn check_url(url: &str) -> Result<(), TaskError> {
    let (scheme, rest) = url.split_once("://").unwrap_or_default();
    let host = rest.split(['/', '?', '#']).next().unwrap_or_default();
    if matches!(scheme.to_ascii_lowercase().as_str(), "http" | "https") && !host.is_empty() {
        return Ok(());
    }
    Err(argument_error("urls", format!("`{url}` is no `http://` or `https://` address; files on disk go into `glob`")))
}

/// Any arguments at all.
#[derive(Deserialize, JsonSchema)]
#[serde(transparent)]
pub(crate) struct Anything(Map<String, Value>);

pub(crate) fn gather_inputs(arguments: Anything, call: &Call) -> Result<TaskOutput, TaskError> {
    let given = call.raw.input.clone().unwrap_or(Value::Object(arguments.0));
    match &given {
        Value::Array(items) => {
            Ok(TaskOutput::Many(items.iter().map(|item| artifact_of(item, call)).collect::<Result<_, _>>()?))
        }
        value => Ok(TaskOutput::One(artifact_of(value, call)?)),
    }
}

/// A JSON value as an artifact: text, data, or, where it holds earlier results, a group of them.
pub(crate) fn artifact_of(value: &Value, call: &Call) -> Result<Artifact, TaskError> {
    if let Some(handle) = ArtifactRef::from_value(value) {
        return call.artifact("inputs", handle).cloned();
    }
    let group = |entries: &mut dyn Iterator<Item = (String, &Value)>| {
        entries.map(|(name, value)| Ok((name, artifact_of(value, call)?))).collect::<Result<_, TaskError>>()
    };
    match value {
        Value::String(text) => Ok(Artifact::text(text)),
        Value::Object(object) if holds_artifact(value) => {
            group(&mut object.iter().map(|(name, value)| (name.clone(), value))).map(Artifact::Map)
        }
        Value::Array(items) if holds_artifact(value) => {
            group(&mut items.iter().enumerate().map(|(index, value)| (index.to_string(), value))).map(Artifact::Map)
        }
        data => Ok(Artifact::Json(data.clone())),
    }
}

fn holds_artifact(value: &Value) -> bool {
    match value {
        Value::Object(object) => ArtifactRef::from_value(value).is_some() || object.values().any(holds_artifact),
        Value::Array(items) => items.iter().any(holds_artifact),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use dw_core::{
        arguments::{Arguments, ArtifactRef},
        artifact::Artifact,
    };
    use image::DynamicImage;
    use serde_json::{Value, json};

    use crate::{
        TaskError, TaskOutput,
        testing::{and, call, call_in, png},
    };

    /// A folder `work[1]` with pictures 1, 2 and 3 pixels wide: b.png, a.PNG and deep/c.png.
    fn folder() -> (tempfile::TempDir, std::path::PathBuf) {
        let folder = tempfile::tempdir().expect("a folder can be made");
        let base = folder.path().join("work[1]");
        std::fs::create_dir_all(base.join("deep")).expect("a folder can be made");
        for (name, width) in [("b.png", 1), ("a.PNG", 2), ("deep/c.png", 3), (".hidden.png", 4)] {
            std::fs::write(base.join(name), png(&DynamicImage::new_rgb8(width, 1))).expect("a file can be written");
        }
        (folder, base)
    }

    fn gather(base: &Path, values: Value) -> Result<Vec<u32>, TaskError> {
        match call_in(base, "gather_images", &and(Arguments::default(), values))? {
            TaskOutput::Many(items) => Ok(items
                .iter()
                .map(|item| match item {
                    Artifact::Image(picture) => picture.width(),
                    other => panic!("expected a picture, found {other:?}"),
                })
                .collect()),
            TaskOutput::One(other) => panic!("expected several pictures, found {other:?}"),
        }
    }

    #[test]
    fn a_glob_starts_from_the_workflows_folder_and_is_sorted() {
        let (_guard, base) = folder();
        assert_eq!(gather(&base, json!({"glob": "*.[pP][nN][gG]"})).expect("two pictures"), [2, 1]);
        assert_eq!(gather(&base, json!({"glob": "**/*.png"})).expect("two pictures"), [1, 3]);
        assert_eq!(gather(&base, json!({"glob": "*"})).expect("folders are passed over"), [2, 1]);
    }

    #[test]
    fn a_glob_may_be_absolute_and_urls_come_after_it() {
        let (_guard, base) = folder();
        let pattern = glob::Pattern::escape(&base.display().to_string()) + "/b.*";
        let urls = json!(["https://example.com/red"]);
        assert_eq!(gather(Path::new("/"), json!({"glob": pattern, "urls": urls})).expect("pictures"), [1, 2]);
    }

    #[test]
    fn a_glob_that_matches_nothing_below_the_workflow_is_tried_from_the_current_folder() {
        let (_guard, base) = folder();
        let pattern = "../../tests/parity/imageops/photo*.png".replace("../", "");
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().expect("the repository");
        assert_eq!(gather(&root, json!({"glob": pattern})).expect("one picture"), [75]);
        assert_eq!(
            gather(&base, json!({"glob": "Cargo.toml"})).expect_err("no picture").to_string().get(..36),
            Some("Image file extension not allowed: `.")
        );
    }

    #[test]
    fn nothing_found_is_an_error() {
        let (_guard, base) = folder();
        for values in [json!({}), json!({"glob": "*.jpg"}), json!({"glob": null, "urls": []})] {
            let error = gather(&base, values).expect_err("nothing there").to_string();
            assert!(error.starts_with("No images found"), "{error}");
        }
    }

    #[test]
    fn files_that_are_not_named_as_pictures_are_refused() {
        let (_guard, base) = folder();
        for (name, pattern) in [("x.svg", "*.svg"), ("x.txt", "*.txt"), ("README", "READ*")] {
            std::fs::write(base.join(name), "text").expect("a file can be written");
            let error = gather(&base, json!({ "glob": pattern })).expect_err("no picture").to_string();
            assert!(error.starts_with("Image file extension not allowed: `"), "{error}");
        }
    }

    #[test]
    fn two_dots_in_a_pattern_or_a_name_are_refused() {
        let (_guard, base) = folder();
        std::fs::write(base.join("deep/x..y.png"), png(&DynamicImage::new_rgb8(1, 1))).expect("a file can be written");
        for pattern in ["../*.png", "deep/../*.png", "deep\\..\\*.png", "deep/*.png"] {
            let error = gather(&base, json!({ "glob": pattern })).expect_err("two dots").to_string();
            assert!(error.contains("contains `..`"), "{pattern}: {error}");
        }
    }

    #[test]
    fn a_file_that_only_claims_to_be_a_picture_is_named() {
        let (_guard, base) = folder();
        std::fs::write(base.join("z.jpg"), "text").expect("a file can be written");
        let error = gather(&base, json!({"glob": "z.jpg"})).expect_err("no picture").to_string();
        assert!(error.contains("z.jpg` cannot be decoded"), "{error}");
    }

    #[test]
    fn urls_are_checked_before_anything_is_fetched_and_failures_are_passed_on() {
        let (_guard, base) = folder();
        for url in ["", "ftp://example.com/a.png", "file:///etc/passwd", "not-a-url", "https://", "data:,x"] {
            let error = gather(&base, json!({ "urls": [url] })).expect_err("no address").to_string();
            assert!(error.starts_with("argument `urls`: "), "{url}: {error}");
        }
        let error = gather(&base, json!({"urls": ["https://example.com/missing"]})).expect_err("404").to_string();
        assert_eq!(error, "`https://example.com/missing` answered 404");
    }

    #[test]
    fn an_unclosed_bracket_is_no_pattern() {
        let (_guard, base) = folder();
        let error = gather(&base, json!({"glob": "a["})).expect_err("no pattern").to_string();
        assert!(error.starts_with("argument `glob`: "), "{error}");
    }

    #[test]
    fn gathering_stops_when_asked_to() {
        let (_guard, base) = folder();
        let cancel = dw_core::cancel::CancellationToken::default();
        cancel.cancel();
        let context = crate::TaskContext {
            base_dir: &base,
            events: &dw_core::event::Silent,
            cancel: &cancel,
            fetch: &|_| Ok(Vec::new()),
        };
        let arguments = and(Arguments::default(), json!({"glob": "*.png"}));
        let run = crate::registry::find("gather_images").expect("known").run;
        assert!(matches!(run(&arguments, &context), Err(TaskError::Cancelled(_))));
    }

    #[test]
    fn inputs_come_back_as_they_are() {
        let bare = |value: Value| {
            let arguments = Arguments { input: Some(value), ..Arguments::default() };
            call("gather_inputs", &arguments).expect("it is given back")
        };
        assert!(matches!(bare(json!(" a ")), TaskOutput::One(Artifact::Text(text)) if text == "a"));
        assert!(matches!(bare(json!(1.5)), TaskOutput::One(Artifact::Json(value)) if value == json!(1.5)));
        assert!(matches!(bare(json!(["a", 2])), TaskOutput::Many(items) if items.len() == 2));
        let object = and(Arguments::default(), json!({"any": 1, "thing": [true]}));
        let output = call("gather_inputs", &object).expect("it is given back");
        assert!(
            matches!(output, TaskOutput::One(Artifact::Json(value)) if value == json!({"any": 1, "thing": [true]}))
        );
    }

    #[test]
    fn earlier_results_inside_inputs_stay_what_they_are() {
        let mut arguments = and(Arguments::default(), json!({"picture": ArtifactRef(3).to_value(), "name": "x"}));
        arguments.artifacts.insert(3, Artifact::image(DynamicImage::new_rgb8(1, 1)));
        let output = call("gather_inputs", &arguments).expect("it is given back");
        let TaskOutput::One(Artifact::Map(group)) = output else { panic!("expected a group") };
        assert!(matches!(&group[..], [(_, Artifact::Image(_)), (_, Artifact::Text(_))]));
    }
}
