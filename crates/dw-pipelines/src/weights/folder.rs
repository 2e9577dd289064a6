//! Finds the weight files of one component in its folder: one safetensors file or the shards that an
//! index names, in the spelling of diffusers or transformers, with or without a variant; else one GGUF file.
//!
//! Knows file names only; [`super::Weights`] reads the files.

use std::{collections::BTreeSet, path::Path, path::PathBuf};

use serde::Deserialize;

use crate::{Error, Result};

/// The names a component's weights have: diffusers' models, transformers' models.
const STEMS: [&str; 2] = ["diffusion_pytorch_model", "model"];

/// Endings of formats that are refused: pickles, which can run code when they are read.
const PICKLES: [&str; 4] = ["bin", "ckpt", "pt", "pth"];

/// The index of a sharded checkpoint: which file holds which tensor.
#[derive(Deserialize)]
struct ShardIndex {
    weight_map: std::collections::BTreeMap<String, String>,
}

/// Which of a folder's files hold the weights.
pub(crate) enum Choice {
    /// One safetensors or GGUF file.
    Single(String),
    /// The index of several.
    Index(String),
}

/// The weights of `variant` among the names of a folder's files.
pub(crate) fn choose(names: &BTreeSet<String>, variant: Option<&str>) -> Option<Choice> {
    let first = |candidates: Vec<String>| candidates.into_iter().find(|name| names.contains(name));
    let safetensors = STEMS.iter().find_map(|stem| {
        let single = first(single_names(stem, variant)).map(Choice::Single);
        single.or_else(|| first(index_names(stem, variant)).map(Choice::Index))
    });
    let gguf = || first(STEMS.iter().map(|stem| format!("{stem}.gguf")).collect()).map(Choice::Single);
    safetensors.or_else(gguf)
}

/// The weight files of the component in `dir`, in reading order. With a `variant` (`fp16`), the files must
/// carry it; without one, they must not.
pub fn weight_files(dir: &Path, variant: Option<&str>) -> Result<Vec<PathBuf>> {
    let names = file_names(dir)?;
    match choose(&names, variant) {
        Some(Choice::Single(name)) => Ok(vec![dir.join(name)]),
        Some(Choice::Index(name)) => shards(dir, &name),
        None => Err(nothing_found(dir, variant, &names)),
    }
}

fn file_names(dir: &Path) -> Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    for entry in fs_err::read_dir(dir)? {
        names.insert(entry?.file_name().to_string_lossy().into_owned());
    }
    Ok(names)
}

fn single_names(stem: &str, variant: Option<&str>) -> Vec<String> {
    match variant {
        Some(variant) => vec![format!("{stem}.{variant}.safetensors")],
        None => vec![format!("{stem}.safetensors")],
    }
}

/// diffusers puts the variant before `index`, older releases after it.
fn index_names(stem: &str, variant: Option<&str>) -> Vec<String> {
    match variant {
        Some(variant) => vec![
            format!("{stem}.safetensors.index.{variant}.json"),
            format!("{stem}.{variant}.safetensors.index.json"),
            format!("{stem}.safetensors.{variant}.index.json"),
        ],
        None => vec![format!("{stem}.safetensors.index.json")],
    }
}

fn shards(dir: &Path, index: &str) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for name in shard_names(dir, index)? {
        let file = dir.join(&name);
        if !file.is_file() {
            return Err(Error::BadFile {
                path: dir.join(index),
                reason: format!("the shard `{name}` is not there; fetch the model again"),
            });
        }
        files.push(file);
    }
    Ok(files)
}

/// The files that the index `index` in `dir` names, whether they are there or not.
pub(crate) fn shard_names(dir: &Path, index: &str) -> Result<BTreeSet<String>> {
    let path = dir.join(index);
    let bad = |reason: String| Error::BadFile { path: path.clone(), reason };
    let text = fs_err::read_to_string(&path)?;
    let index: ShardIndex = serde_json::from_str(&text)
        .map_err(|error| bad(format!("not an index of sharded weights ({error}); fetch the model again")))?;
    let names: BTreeSet<String> = index.weight_map.into_values().collect();
    if names.is_empty() {
        return Err(bad(String::from("the index names no file; fetch the model again")));
    }
    for name in &names {
        // A shard lies beside its index; a path that leads elsewhere is not followed.
        let is_plain = Path::new(name).file_name().is_some_and(|file| file == name.as_str());
        if !is_plain || !name.ends_with(".safetensors") {
            return Err(bad(format!("`{name}` is not the name of a safetensors file beside the index")));
        }
    }
    Ok(names)
}

/// The error for a folder without weights of `variant`, with what is there instead.
pub(crate) fn nothing_found(dir: &Path, variant: Option<&str>, names: &BTreeSet<String>) -> Error {
    let reason = if let Some(other) = other_variants(variant, names) {
        other
    } else if let Some(pickle) = names.iter().find(|name| is_pickle(name)) {
        format!(
            "only pickled weights are here (`{pickle}`), and reading a pickle can run code that is hidden in it; \
             convert the model to safetensors"
        )
    } else {
        String::from("no `diffusion_pytorch_model.safetensors` or `model.safetensors` is here; fetch the model again")
    };
    Error::BadFile { path: dir.to_owned(), reason }
}

/// What to say when weights are here, but not of the variant that was asked for.
fn other_variants(variant: Option<&str>, names: &BTreeSet<String>) -> Option<String> {
    let is_weights = |name: &&String| {
        let is_known = STEMS.iter().any(|stem| name.strip_prefix(stem).is_some_and(|rest| rest.starts_with('.')));
        is_known && name.contains(".safetensors")
    };
    let found: Vec<String> = names.iter().filter(is_weights).map(|name| format!("`{name}`")).collect();
    if found.is_empty() {
        return None;
    }
    let found = found.join(", ");
    Some(match variant {
        Some(variant) => {
            format!("no weights of variant `{variant}` are here, but {found}; leave `variant` out or correct it")
        }
        None => format!("no weights without a variant are here, but {found}; name the `variant`"),
    })
}

fn is_pickle(name: &str) -> bool {
    Path::new(name).extension().is_some_and(|extension| PICKLES.iter().any(|pickle| extension == *pickle))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Folder(PathBuf);

    impl Folder {
        fn with(test: &str, files: &[(&str, &str)]) -> Self {
            let dir = std::env::temp_dir().join(format!("dw-weight-files-{test}-{}", std::process::id()));
            fs_err::create_dir_all(&dir).expect("the temporary folder is writable");
            for (name, text) in files {
                fs_err::write(dir.join(name), text).expect("the temporary folder is writable");
            }
            Self(dir)
        }

        fn find(&self, variant: Option<&str>) -> Result<Vec<String>, String> {
            let files = weight_files(&self.0, variant).map_err(|error| error.to_string())?;
            let name = |file: &PathBuf| file.file_name().expect("files have names").to_string_lossy().into_owned();
            Ok(files.iter().map(name).collect())
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs_err::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_variant_is_taken_only_when_it_is_asked_for() {
        let folder =
            Folder::with("variant", &[("model.safetensors", ""), ("model.fp16.safetensors", ""), ("config.json", "")]);
        assert_eq!(folder.find(None), Ok(vec!["model.safetensors".to_owned()]));
        assert_eq!(folder.find(Some("fp16")), Ok(vec!["model.fp16.safetensors".to_owned()]));
        let message = folder.find(Some("bf16")).expect_err("there is no bf16 variant");
        assert!(message.contains("`bf16`") && message.contains("`model.fp16.safetensors`"), "{message}");
    }

    #[test]
    fn the_shards_of_an_index_are_found_in_order_in_every_variant_spelling() {
        let index = r#"{"weight_map": {"b": "m-00002-of-00002.safetensors", "a": "m-00001-of-00002.safetensors"}}"#;
        let shards = ["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"];
        let expected = Ok(shards.map(String::from).to_vec());
        for (at, (name, variant)) in [
            ("diffusion_pytorch_model.safetensors.index.json", None),
            ("diffusion_pytorch_model.safetensors.index.fp16.json", Some("fp16")),
            ("diffusion_pytorch_model.fp16.safetensors.index.json", Some("fp16")),
        ]
        .into_iter()
        .enumerate()
        {
            let folder = Folder::with(&format!("shards{at}"), &[(name, index), (shards[0], ""), (shards[1], "")]);
            assert_eq!(folder.find(variant), expected, "{name}");
        }
    }

    #[test]
    fn an_index_that_leads_out_of_the_folder_is_refused() {
        let index = r#"{"weight_map": {"a": "../elsewhere.safetensors"}}"#;
        let folder = Folder::with("escape", &[("model.safetensors.index.json", index)]);
        let message = folder.find(None).expect_err("the shard is elsewhere");
        assert!(message.contains("../elsewhere.safetensors"), "{message}");
    }

    #[test]
    fn a_missing_shard_is_named() {
        let index = r#"{"weight_map": {"a": "m-00001-of-00001.safetensors"}}"#;
        let folder = Folder::with("missing", &[("model.safetensors.index.json", index)]);
        let message = folder.find(None).expect_err("the shard is missing");
        assert!(message.contains("m-00001-of-00001.safetensors"), "{message}");
    }

    #[test]
    fn pickled_weights_are_refused_with_the_way_out() {
        let folder = Folder::with("pickle", &[("pytorch_model.bin", ""), ("config.json", "")]);
        let message = folder.find(None).expect_err("pickles are refused");
        assert!(message.contains("pytorch_model.bin") && message.contains("convert"), "{message}");
    }
}
