//! Turns the media specs of a step's arguments into handles on decoded pictures: files relative to the
//! workflow, URLs through [`crate::fetch`]. Each place is read once per run.

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
};

use dw_core::{
    arguments::ArtifactRef,
    artifact::Artifact,
    media::{self, MediaSpec},
    picture,
};
use serde_json::Value;

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

    /// Replaces every media spec in `value` by a handle.
    pub(crate) fn load(&mut self, value: &mut Value, base_dir: &Path, offline: bool) -> Result<(), String> {
        media::walk(value, &mut |spec: MediaSpec| self.handle(&spec, base_dir, offline).map(ArtifactRef::to_value))
    }

    fn handle(&mut self, spec: &MediaSpec, base_dir: &Path, offline: bool) -> Result<ArtifactRef, String> {
        if let Some(handle) = self.known.get(&spec.location) {
            return Ok(ArtifactRef(*handle));
        }
        let picture = if spec.is_url() {
            let bytes = fetch(&spec.location, offline)?;
            picture::decode(&bytes, &spec.location).map_err(|error| error.to_string())?
        } else {
            picture::load(&base_dir.join(&spec.location)).map_err(|error| error.to_string())?
        };
        let handle = self.artifacts.keys().next_back().map_or(0, |last| last + 1);
        self.artifacts.insert(handle, Artifact::image(picture));
        self.sources.insert(handle, spec.location.clone());
        self.known.insert(spec.location.clone(), handle);
        Ok(ArtifactRef(handle))
    }
}
