//! Where weights come from: what a model name or a single file means, and whether local ones are there.

use std::path::{Path, PathBuf};

use super::builder::Report;
use crate::{
    catalog::Catalog,
    document::child_pointer,
    media, paths,
    workflow::{Dtype, FromPretrained, nearest},
};

/// What stands before the name of a built-in model or workflow.
pub(super) const BUILTIN_PREFIX: &str = "builtin:";

/// What a `model_name` means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelName {
    /// A model inside the program, by its name without `builtin:`.
    Builtin(String),
    /// A folder or file that exists.
    Local(PathBuf),
    /// A local path where nothing is.
    Missing(PathBuf),
    /// A repository on the hub: `owner/name`, or a single old-style name.
    Hub(String),
}

/// What a `from_single_file` means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SingleFile {
    /// A file that exists.
    Local(PathBuf),
    /// A local path where no file is.
    Missing(PathBuf),
    /// A URL.
    Url(String),
    /// A file of a repository on the hub.
    Hub {
        /// `owner/name`.
        repo: String,
        /// Path inside the repository.
        file: String,
    },
}

/// What a model name written in a workflow in `base_dir` means: a local path where one exists, else a hub name
/// if it has the form of one.
pub fn model_name(text: &str, base_dir: &Path) -> ModelName {
    if let Some(name) = text.strip_prefix(BUILTIN_PREFIX) {
        return ModelName::Builtin(name.to_owned());
    }
    let path = base_dir.join(text);
    if path.exists() && !text.is_empty() {
        ModelName::Local(path)
    } else if is_explicit_path(text) || !is_hub_name(text) {
        ModelName::Missing(path)
    } else {
        ModelName::Hub(text.to_owned())
    }
}

/// What a single file written in a workflow in `base_dir` means. Hub URLs (`…/blob/main/…`) count as hub files.
pub fn single_file(text: &str, base_dir: &Path) -> SingleFile {
    if paths::is_url(text) {
        let inside = ["https://huggingface.co/", "https://hf.co/", "http://huggingface.co/"]
            .iter()
            .find_map(|host| text.strip_prefix(host));
        let parts: Vec<&str> = inside.unwrap_or_default().splitn(5, '/').collect();
        return match parts.as_slice() {
            [owner, name, "blob" | "resolve", "main", file] => {
                SingleFile::Hub { repo: format!("{owner}/{name}"), file: (*file).to_owned() }
            }
            _ => SingleFile::Url(text.to_owned()),
        };
    }
    let path = base_dir.join(text);
    if path.is_file() {
        return SingleFile::Local(path);
    }
    let parts: Vec<&str> = text.splitn(3, '/').collect();
    match parts.as_slice() {
        [owner, name, file] if !is_explicit_path(text) && is_hub_name(&format!("{owner}/{name}")) => {
            SingleFile::Hub { repo: format!("{owner}/{name}"), file: (*file).to_owned() }
        }
        _ => SingleFile::Missing(path),
    }
}

fn is_explicit_path(text: &str) -> bool {
    Path::new(text).is_absolute() || text.starts_with('.') || text.starts_with('~') || text.contains('\\')
}

fn is_hub_name(text: &str) -> bool {
    let part = |part: &str| {
        !part.is_empty() && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
    };
    let parts: Vec<&str> = text.split('/').collect();
    parts.len() <= 2 && parts.into_iter().all(part)
}

/// Checks a `from_pretrained_arguments`.
pub(super) fn check(report: &mut Report, catalog: &Catalog, source: &FromPretrained, pointer: &str) {
    let subfolder = source.subfolder.as_deref();
    if let Some(name) = &source.model_name {
        check_model(report, catalog, name, subfolder, &child_pointer(pointer, "model_name"));
    }
    if let Some(file) = &source.from_single_file {
        check_file(report, file, &child_pointer(pointer, "from_single_file"));
    }
    if let Some(config) = &source.config {
        check_model(report, catalog, config, None, &child_pointer(pointer, "config"));
    }
    check_dtype(report, source.torch_dtype.as_deref(), &child_pointer(pointer, "torch_dtype"));
}

/// Checks the name of a model, LoRA, IP-Adapter or learned word.
pub(super) fn check_model(report: &mut Report, catalog: &Catalog, name: &str, subfolder: Option<&str>, pointer: &str) {
    if media::is_reference(name) {
        return;
    }
    match model_name(name, &report.document.base_dir) {
        ModelName::Builtin(name) if !catalog.models.contains(&name) => {
            let known: Vec<&str> = catalog.models.iter().map(String::as_str).collect();
            let remedy = match (nearest(&name, known.iter().copied()), known.is_empty()) {
                (Some(near), _) => format!("did you mean `builtin:{near}`?"),
                (None, false) => format!("built-in models: {}", known.join(", ")),
                (None, true) => "name a folder or a repository on the hub".to_owned(),
            };
            report.error("unknown-model", pointer, format!("there is no built-in model `{name}`")).remedy =
                Some(remedy);
        }
        ModelName::Missing(path) => missing(report, pointer, &path),
        ModelName::Local(path) => {
            if let Some(subfolder) = subfolder.filter(|subfolder| path.is_dir() && !path.join(subfolder).is_dir()) {
                missing(report, pointer, &path.join(subfolder));
            }
        }
        ModelName::Builtin(_) | ModelName::Hub(_) => {}
    }
}

/// Checks the model name of an adapter and the file inside it.
pub(super) fn check_adapter(
    report: &mut Report,
    catalog: &Catalog,
    name: &str,
    weight_name: Option<&str>,
    subfolder: Option<&str>,
    pointer: &str,
) {
    let name_pointer = child_pointer(pointer, "model_name");
    if let (ModelName::Missing(_), SingleFile::Hub { .. } | SingleFile::Url(_)) =
        (model_name(name, &report.document.base_dir), single_file(name, &report.document.base_dir))
    {
        return;
    }
    check_model(report, catalog, name, subfolder, &name_pointer);
    let (ModelName::Local(path), Some(weight_name)) = (model_name(name, &report.document.base_dir), weight_name) else {
        return;
    };
    let file = path.join(subfolder.unwrap_or_default()).join(weight_name);
    if path.is_dir() && !file.exists() && !media::is_reference(weight_name) {
        missing(report, &child_pointer(pointer, "weight_name"), &file);
    }
}

fn check_file(report: &mut Report, file: &str, pointer: &str) {
    if media::is_reference(file) {
        return;
    }
    match single_file(file, &report.document.base_dir) {
        SingleFile::Missing(path) => missing(report, pointer, &path),
        SingleFile::Url(url) => {
            if let Err(error) = paths::check_url(&url) {
                report.refused("url", pointer, &error);
            }
        }
        SingleFile::Local(_) | SingleFile::Hub { .. } => {}
    }
}

fn missing(report: &mut Report, pointer: &str, path: &Path) {
    report.error("missing-file", pointer, format!("nothing is at `{}`", path.display())).remedy =
        Some("check the path; relative ones start from the workflow's folder".into());
}

/// Checks the name of a number type.
pub(super) fn check_dtype(report: &mut Report, dtype: Option<&str>, pointer: &str) {
    let Some(dtype) = dtype.filter(|dtype| !media::is_reference(dtype)) else { return };
    if Dtype::parse(dtype).is_none() {
        let remedy = format!("write {}", Dtype::NAMES);
        report.error("unknown-dtype", pointer, format!("unknown number type `{dtype}`")).remedy = Some(remedy);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_name_is_local_where_something_is_and_else_a_hub_name() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        fs_err::create_dir_all(folder.path().join("owner/name")).expect("a folder");
        let read = |text: &str| model_name(text, folder.path());
        assert_eq!(read("builtin:landscapes"), ModelName::Builtin("landscapes".into()));
        assert!(matches!(read("owner/name"), ModelName::Local(_)));
        assert_eq!(read("owner/other"), ModelName::Hub("owner/other".into()));
        assert_eq!(read("gpt2"), ModelName::Hub("gpt2".into()));
        for missing in ["./models/x", "/nowhere/at/all", "a/b/c", "../x", "with space/x", ""] {
            assert!(matches!(read(missing), ModelName::Missing(_)), "{missing}");
        }
    }

    #[test]
    fn a_single_file_is_local_or_on_the_hub_or_a_url() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        fs_err::write(folder.path().join("m.safetensors"), "").expect("a file");
        let read = |text: &str| single_file(text, folder.path());
        assert!(matches!(read("m.safetensors"), SingleFile::Local(_)));
        let hub = SingleFile::Hub { repo: "o/n".into(), file: "d/f.gguf".into() };
        assert_eq!(read("o/n/d/f.gguf"), hub);
        assert_eq!(read("https://huggingface.co/o/n/blob/main/d/f.gguf"), hub);
        assert!(matches!(read("https://example.com/f.gguf"), SingleFile::Url(_)));
        assert!(matches!(read("./gone.safetensors"), SingleFile::Missing(_)));
        assert!(matches!(read("gone.safetensors"), SingleFile::Missing(_)));
    }
}
