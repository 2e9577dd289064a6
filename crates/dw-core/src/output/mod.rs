//! From artifacts to files in one folder: their names, their formats, and that each of them is either
//! whole or not there. Only this module writes results.
//!
//! What is in the metadata is decided in [`crate::metadata`]; when to save is the engine's business.

mod atomic;
mod encode;
mod naming;
mod spec;

use std::path::{Path, PathBuf};

use serde_json::Value;

use self::encode::{Encoded, Picture};
pub use self::{
    naming::{check_base_name, extension},
    spec::SaveSpec,
};
use crate::{
    artifact::{Artifact, Entry},
    metadata::Metadata,
};

/// Which step a file comes from; part of its name.
#[derive(Clone, Copy, Debug)]
pub struct StepLabel<'a> {
    /// The workflow's `id`.
    pub workflow_id: &'a str,
    /// The step's name.
    pub step_name: &'a str,
    /// The step's place in the workflow, from 0.
    pub step_index: usize,
}

/// What saving an entry did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Saved {
    /// Files written, in order.
    pub files: Vec<PathBuf>,
    /// Those of them that replaced a file which was there before.
    pub overwritten: Vec<PathBuf>,
    /// What the user should know: something that was not saved, and why.
    pub warnings: Vec<String>,
}

/// Why results could not be saved.
#[derive(Debug, thiserror::Error)]
pub enum OutputError {
    /// The output path is taken by something else.
    #[error("Output path exists but is not a directory: {}; choose another with `-o DIR`", .0.display())]
    NotADirectory(PathBuf),
    /// The output folder cannot be created or written to.
    #[error("cannot write to the output folder `{}`: {reason}; choose another with `-o DIR`", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// A file could not be written; nothing of it is left.
    #[error("cannot write `{}`: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said, and the remedy.
        reason: String,
    },
    /// An artifact could not be encoded.
    #[error("cannot encode `{}`: {reason}", path.display())]
    Encoding {
        /// The file it should have become.
        path: PathBuf,
        /// What the encoder said.
        reason: String,
    },
    /// A name from the workflow cannot be part of a file name.
    #[error("{what} `{name}` {reason}")]
    BadName {
        /// Which name.
        what: String,
        /// The name, made harmless for a terminal.
        name: String,
        /// What is wrong with it, and the remedy.
        reason: String,
    },
    /// A result of this kind cannot have that content type.
    #[error("Content type {content_type} does not match result type {kind}{remedy}")]
    Mismatch {
        /// The `content_type`.
        content_type: String,
        /// What the result is.
        kind: &'static str,
        /// `; ` and the next thing to try, or empty.
        remedy: &'static str,
    },
    /// This build has no writer for the content type.
    #[error("this build cannot write `{content_type}`; {remedy}")]
    NoWriter {
        /// The `content_type`.
        content_type: String,
        /// The next thing to try.
        remedy: &'static str,
    },
    /// The `result` object of a step is wrong.
    #[error("`result.{key}` is {found}; {expected}")]
    BadSpec {
        /// The key.
        key: &'static str,
        /// Its value.
        found: String,
        /// What it may be.
        expected: &'static str,
    },
}

/// Writes results into one folder.
#[derive(Clone, Debug)]
pub struct Writer {
    dir: PathBuf,
}

/// Removes what the process with this number had not finished writing to `folder` when it died; gives how many files
/// that were. To be called only when that process is gone.
pub fn remove_unfinished(folder: &Path, process_id: u32) -> std::io::Result<usize> {
    atomic::sweep(folder, process_id)
}

/// Everything that is the same for all files of one entry.
struct Job<'a> {
    writer: &'a Writer,
    spec: &'a SaveSpec,
    format: Format,
    metadata: Option<&'a Metadata>,
    saved: Saved,
}

impl Writer {
    /// A writer into `dir`, which is created when missing. Fails at once when files cannot be created
    /// there, before any work is done whose result could not be kept.
    pub fn new(dir: impl Into<PathBuf>) -> Result<Self, OutputError> {
        let dir = dir.into();
        if dir.exists() && !dir.is_dir() {
            return Err(OutputError::NotADirectory(dir));
        }
        let created = std::fs::create_dir_all(&dir).and_then(|()| atomic::probe(&dir));
        created.map_err(|error| OutputError::Folder { path: dir.clone(), reason: error.to_string() })?;
        Ok(Self { dir })
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Saves one entry of a step's result. `entry_index` counts the entries of the step over all of its
    /// iterations. Files already written stay when a later one of the same entry fails.
    pub fn save(
        &self,
        spec: &SaveSpec,
        step: StepLabel,
        entry_index: usize,
        entry: &Entry,
        metadata: Option<&Metadata>,
    ) -> Result<Saved, OutputError> {
        let base = format!("{}-{entry_index}", base_name(spec, step)?);
        let format = Format::of(&spec.content_type)?;
        let mut job = Job { writer: self, spec, format, metadata, saved: Saved::default() };
        if format == Format::Json {
            if !entry.artifacts.is_empty() {
                job.put(&base, Encoded::from(encode::json(entry)))?;
            }
            return Ok(job.saved);
        }
        for (index, artifact) in entry.artifacts.iter().enumerate() {
            job.artifact(&format!("{base}.{index}"), artifact)?;
        }
        Ok(job.saved)
    }
}

/// `<file_base_name><workflow id>-<step name>.<step index>`, every part of it checked.
fn base_name(spec: &SaveSpec, step: StepLabel) -> Result<String, OutputError> {
    check_base_name("the workflow's id", step.workflow_id)?;
    check_base_name("the step's name", step.step_name)?;
    let prefix = spec.file_base_name.as_deref().unwrap_or_default();
    check_base_name("`file_base_name`", prefix)?;
    Ok(format!("{prefix}{}-{}.{}", step.workflow_id, step.step_name, step.step_index))
}

/// The name of the file that artifact `artifact` of entry `entry` becomes. Data (JSON) is one file for
/// each entry, so `artifact` does not count there.
pub fn file_name(spec: &SaveSpec, step: StepLabel, entry: usize, artifact: usize) -> Result<String, OutputError> {
    let base = format!("{}-{entry}", base_name(spec, step)?);
    Ok(match Format::of(&spec.content_type)? {
        Format::Json => format!("{base}.json"),
        _ => format!("{base}.{artifact}{}", extension(&spec.content_type)),
    })
}

/// Checks that this build can write a content type, whatever the result is.
pub fn check_content_type(content_type: &str) -> Result<(), OutputError> {
    Format::of(content_type).map(|_| ())
}

/// What a content type is written as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Json,
    Text,
    Gif,
    Safetensors,
    Picture(Picture),
    /// No known type: nothing matches it.
    Unknown,
}

impl Format {
    fn of(content_type: &str) -> Result<Self, OutputError> {
        let essence = naming::essence(content_type);
        let missing = |remedy| Err(OutputError::NoWriter { content_type: content_type.to_owned(), remedy });
        match essence.as_str() {
            json if json.ends_with("json") => Ok(Self::Json),
            text if text.starts_with("text") => Ok(Self::Text),
            "image/gif" => Ok(Self::Gif),
            "application/x-safetensors" => Ok(Self::Safetensors),
            "image/png" => Ok(Self::Picture(Picture::Png)),
            "image/jpeg" | "image/jpg" => Ok(Self::Picture(Picture::Jpeg { quality: encode::DEFAULT_JPEG_QUALITY })),
            "image/webp" => Ok(Self::Picture(Picture::WebP)),
            "image/bmp" => Ok(Self::Picture(Picture::Bmp)),
            "image/tiff" => Ok(Self::Picture(Picture::Tiff)),
            image if image.starts_with("image/") => {
                missing("use `image/png`, `image/jpeg`, `image/webp`, `image/gif`, `image/bmp` or `image/tiff`")
            }
            video if video.starts_with("video") => missing("save frames as `image/gif`"),
            audio if audio.starts_with("audio") => missing("set `save` to false to run the step without its files"),
            _ => Ok(Self::Unknown),
        }
    }
}

impl Job<'_> {
    fn artifact(&mut self, name: &str, artifact: &Artifact) -> Result<(), OutputError> {
        match artifact {
            Artifact::Json(Value::Null) => {
                self.saved.warnings.push(format!("`{name}` is null and was not saved"));
                Ok(())
            }
            Artifact::Map(members) => members.iter().try_for_each(|(key, member)| self.member(name, key, member)),
            Artifact::Json(Value::Object(members)) => {
                members.iter().try_for_each(|(key, value)| self.member(name, key, &from_json(value)))
            }
            other => {
                let encoded = self.encode(name, other)?;
                self.put(name, encoded)
            }
        }
    }

    fn member(&mut self, name: &str, key: &str, member: &Artifact) -> Result<(), OutputError> {
        check_base_name("the key", key)?;
        self.artifact(&format!("{name}-{key}"), member)
    }

    fn encode(&self, name: &str, artifact: &Artifact) -> Result<Encoded, OutputError> {
        let encoded = match (self.format, artifact) {
            (Format::Text, Artifact::Text(text)) => Ok(Encoded::from(text.clone().into_bytes())),
            (Format::Text, Artifact::Json(Value::String(text))) => Ok(Encoded::from(text.clone().into_bytes())),
            (Format::Gif, Artifact::Image(image)) => {
                encode::gif(&[image.as_ref().clone()], self.spec.fps).map(Into::into)
            }
            (Format::Gif, Artifact::Frames(frames)) if !frames.is_empty() => {
                encode::gif(frames, self.spec.fps).map(Into::into)
            }
            (Format::Safetensors, Artifact::Array(array)) => encode::safetensors(array).map(Into::into),
            (Format::Picture(picture), Artifact::Image(image)) => {
                encode::picture(image, self.with_quality(picture), self.metadata)
            }
            (_, other) => return Err(self.mismatch(other)),
        };
        encoded.map_err(|reason| OutputError::Encoding { path: self.path(name), reason })
    }

    fn with_quality(&self, picture: Picture) -> Picture {
        match picture {
            Picture::Jpeg { quality } => Picture::Jpeg { quality: self.spec.quality.unwrap_or(quality) },
            other => other,
        }
    }

    fn mismatch(&self, artifact: &Artifact) -> OutputError {
        let remedy = match artifact {
            Artifact::Image(_) => "; use `image/png` for pictures",
            Artifact::Frames(frames) if frames.is_empty() => " without any frame",
            Artifact::Frames(_) => "; use `image/gif` for frames",
            Artifact::Array(_) => "; use `application/x-safetensors` for arrays",
            Artifact::Text(_) => "; use `text/plain` for text",
            Artifact::Json(_) | Artifact::Map(_) => "; use `application/json` for data",
        };
        OutputError::Mismatch { content_type: self.spec.content_type.clone(), kind: artifact.kind(), remedy }
    }

    fn path(&self, name: &str) -> PathBuf {
        let extension = if self.format == Format::Json { ".json" } else { extension(&self.spec.content_type) };
        self.writer.dir.join(format!("{name}{extension}"))
    }

    fn put(&mut self, name: &str, encoded: Encoded) -> Result<(), OutputError> {
        let path = self.path(name);
        naming::check_file_name(&path.file_name().unwrap_or_default().to_string_lossy())?;
        let existed = path.symlink_metadata().is_ok();
        atomic::write(&path, |file| file.write_all(&encoded.bytes)).map_err(|error| file_error(&path, &error))?;
        self.saved.warnings.extend(encoded.warning.map(|warning| format!("`{}`: {warning}", path.display())));
        if existed {
            self.saved.overwritten.push(path.clone());
        }
        self.saved.files.push(path);
        Ok(())
    }
}

fn from_json(value: &Value) -> Artifact {
    match value {
        Value::String(text) => Artifact::Text(text.clone()),
        other => Artifact::Json(other.clone()),
    }
}

fn file_error(path: &Path, error: &std::io::Error) -> OutputError {
    use std::io::ErrorKind;
    let remedy = match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => "free some space, or choose another folder with `-o DIR`",
        ErrorKind::IsADirectory => "remove it, or choose another folder with `-o DIR`",
        _ => "look at the folder's permissions, or choose another with `-o DIR`",
    };
    OutputError::File { path: path.to_owned(), reason: format!("{error}; {remedy}") }
}

#[cfg(test)]
mod tests;
