//! Finds the one safetensors file of an adapter: a file, a folder, or a repository of the hub.
//!
//! What is in the file is read by the modules for each kind of adapter.

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
};

use candle_core::Tensor;

use super::first_names;
use crate::{
    Error, Result,
    hub::{Hub, ModelFiles, Need, WeightFiles, sub},
    request::{Context, ModelSource},
    weights,
};

/// The name diffusers saves LoRA files under, preferred where several files lie together.
const USUAL_NAME: &str = "pytorch_lora_weights.safetensors";

/// Parts of the names of files that training leaves beside its result.
const BYPRODUCTS: [&str; 3] = ["scheduler", "optimizer", "checkpoint"];

/// Endings of formats that are refused: pickles, which can run code when they are read.
const PICKLES: [&str; 4] = [".bin", ".ckpt", ".pt", ".pth"];

/// Where an adapter is to be found.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// A file, a folder or a repository.
    pub source: &'a ModelSource,
    /// A folder inside the source.
    pub subfolder: Option<&'a str>,
    /// The file inside it; when none, the only `.safetensors` there.
    pub weight_name: Option<&'a str>,
}

/// One adapter file on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdapterFile {
    path: PathBuf,
    fingerprint: String,
}

impl AdapterFile {
    /// Finds the file, and downloads it when it is on the hub.
    pub fn find(place: Place<'_>, hub: &Hub, context: Context<'_>) -> Result<Self> {
        let path = match place.source {
            ModelSource::SingleFile { path, .. } => path.clone(),
            ModelSource::Folder(path) if path.is_file() => path.clone(),
            source => inside(&hub.open(source, context)?, place, context)?,
        };
        if is_pickle(&path.to_string_lossy()) {
            return Err(pickle(&path));
        }
        let fingerprint = WeightFiles::Disk(vec![path.clone()]).fingerprint()?;
        Ok(Self { path, fingerprint })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Text that changes when the file does: path, size and modification time.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// The names of its tensors, from the header alone.
    pub fn names(&self) -> Result<Vec<String>> {
        weights::read_names(&self.path)
    }

    /// The sizes of its tensors by name, from the header alone.
    pub(super) fn shapes(&self) -> Result<BTreeMap<String, Vec<usize>>> {
        let listed = weights::list_files(std::slice::from_ref(&self.path), None)?;
        Ok(listed.into_iter().map(|tensor| (tensor.name.clone(), tensor.dims().to_vec())).collect())
    }

    /// Its tensors by name, as they are stored, on the host.
    pub(super) fn read(&self) -> Result<BTreeMap<String, Tensor>> {
        weights::read_stored(&self.path)
    }

    /// The text beside its tensors, by key.
    pub(super) fn metadata(&self) -> Result<HashMap<String, String>> {
        weights::read_metadata(&self.path)
    }

    /// Complains about the file.
    pub(super) fn bad(&self, reason: impl Into<String>) -> Error {
        Error::BadFile { path: self.path.clone(), reason: reason.into() }
    }
}

/// The path of the file inside an opened model.
fn inside(files: &ModelFiles, place: Place<'_>, context: Context<'_>) -> Result<PathBuf> {
    let folder = place.subfolder.unwrap_or_default().trim_matches('/');
    let name = match place.weight_name {
        Some(name) => name.trim_start_matches("./").to_owned(),
        None => only_file(&files.names(folder, context)?, &files.place(folder))?,
    };
    if sub(folder, &name).split('/').any(|part| part.is_empty() || part == "..") {
        let reason = format!("`{name}` does not lie inside the folder; correct `weight_name`");
        return Err(Error::BadFile { path: files.place(folder), reason });
    }
    if is_pickle(&name) {
        return Err(pickle(&files.place(&sub(folder, &name))));
    }
    files.fetch(folder, Need::File(&name), context)?;
    let path = files.place(&sub(folder, &name));
    if path.is_file() {
        return Ok(path);
    }
    let there = files.names(folder, context).unwrap_or_default();
    let there = if there.is_empty() { "nothing is there".into() } else { format!("there are {}", first_names(&there)) };
    Err(Error::BadFile { path, reason: format!("does not exist, {there}; correct `weight_name` or `model_name`") })
}

/// The safetensors file among `names`, if it is clear which one is meant.
fn only_file(names: &[String], folder: &Path) -> Result<String> {
    let bad = |reason: String| Err(Error::BadFile { path: folder.to_owned(), reason });
    let is_result =
        |name: &&String| name.ends_with(".safetensors") && !BYPRODUCTS.iter().any(|byproduct| name.contains(byproduct));
    let found: Vec<&String> = names.iter().filter(is_result).collect();
    match found.as_slice() {
        [name] => Ok((*name).clone()),
        [] => match names.iter().find(|name| is_pickle(name)) {
            Some(name) => Err(pickle(&folder.join(name))),
            None => bad("holds no `.safetensors` file; correct `model_name`, `subfolder` or `weight_name`".into()),
        },
        found if found.iter().any(|name| *name == USUAL_NAME) => Ok(USUAL_NAME.into()),
        found => {
            bad(format!("holds {} safetensors files ({}); name one as `weight_name`", found.len(), first_names(found)))
        }
    }
}

fn is_pickle(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    PICKLES.iter().any(|ending| name.ends_with(ending))
}

fn pickle(path: &Path) -> Error {
    Error::Unsupported(format!(
        "`{}` is a pickle, which can run code when it is read, and is refused; convert it to safetensors",
        path.display()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn only(names: &[&str]) -> Result<String, String> {
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        only_file(&names, Path::new("loras")).map_err(|error| error.to_string())
    }

    #[test]
    fn without_a_name_the_only_safetensors_file_is_meant() {
        assert_eq!(only(&["README.md", "style.safetensors"]), Ok("style.safetensors".into()));
        assert_eq!(only(&["optimizer.safetensors", "style.safetensors"]), Ok("style.safetensors".into()));
        assert_eq!(only(&["a.safetensors", USUAL_NAME]), Ok(USUAL_NAME.into()));
    }

    #[test]
    fn several_files_or_none_are_an_error_that_says_what_is_there() {
        let several = only(&["a.safetensors", "b.safetensors"]).expect_err("nobody can know which");
        assert!(several.contains("`a.safetensors`, `b.safetensors`") && several.contains("weight_name"), "{several}");
        assert!(only(&["README.md"]).expect_err("nothing there").contains("no `.safetensors`"));
        assert!(only(&["style.pt"]).expect_err("a pickle").contains("pickle"));
    }
}
