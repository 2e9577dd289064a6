//! Turns the media specs of a step's arguments into handles on decoded pictures: files relative to the
//! workflow, URLs through [`crate::fetch`]. Each place is read once per run.

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
};

use dw_core::{
    arguments::ArtifactRef,
    artifact::Artifact,
    media::{self, Location, MediaError, MediaKind, MediaSpec},
    picture,
};
use image::DynamicImage;
use serde_json::{Map, Value};

use crate::fetch::fetch;

/// The artifacts that handles in templates stand for, and where they were loaded from.
#[derive(Clone, Default)]
pub(crate) struct Media {
    /// By handle number.
    pub(crate) artifacts: BTreeMap<u64, Artifact>,
    /// Where each came from, for metadata.
    pub(crate) sources: BTreeMap<u64, String>,
    known: HashMap<String, u64>,
}

impl Media {
    /// A table that begins with artifacts a parent workflow handed over.
    pub(crate) fn with(artifacts: BTreeMap<u64, Artifact>) -> Self {
        Self { artifacts, ..Self::default() }
    }

    /// Replaces every media spec in the arguments `values` by a handle.
    pub(crate) fn load(&mut self, values: &mut Map<String, Value>, base_dir: &Path, offline: bool) -> Result<(), String> {
        let errors = media::walk(values, &mut |spec, _| {
            self.handle(&spec, base_dir, offline).map(ArtifactRef::to_value).map_err(MediaError::Load)
        });
        match errors.into_iter().next() {
            Some((pointer, error)) => Err(format!("argument `{}`: {error}", pointer.trim_start_matches('/'))),
            None => Ok(()),
        }
    }

    fn handle(&mut self, spec: &MediaSpec, base_dir: &Path, offline: bool) -> Result<ArtifactRef, String> {
        if let Some(handle) = self.known.get(&spec.location) {
            return Ok(ArtifactRef(*handle));
        }
        let picture = picture_at(spec, base_dir, offline)?;
        let handle = self.artifacts.keys().next_back().map_or(0, |last| last + 1);
        self.artifacts.insert(handle, Artifact::image(picture));
        self.sources.insert(handle, spec.location.clone());
        self.known.insert(spec.location.clone(), handle);
        Ok(ArtifactRef(handle))
    }
}

fn picture_at(spec: &MediaSpec, base_dir: &Path, offline: bool) -> Result<DynamicImage, String> {
    if spec.kind == MediaKind::Video {
        return Err(format!("`{}` is a video, which this build cannot read; use a picture", spec.location));
    }
    let decoded = match spec.locate(base_dir).map_err(|error| error.to_string())? {
        Location::Url(url) => picture::decode(&fetch(&url, offline)?, &url),
        Location::File(path) => picture::load(&path),
    };
    decoded.map_err(|error| error.to_string())
}
