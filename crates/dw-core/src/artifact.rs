//! What a step produces: pictures, text, data, arrays. One enum, shared by tasks, pipelines and the
//! writers of [`crate::output`].

use std::sync::Arc;

use image::DynamicImage;
use serde_json::Value;

/// One thing that can be saved to a file or handed to a later step.
#[derive(Clone, Debug)]
pub enum Artifact {
    /// A decoded picture.
    Image(Arc<DynamicImage>),
    /// Text, already cleaned as the format asks (see [`Artifact::text`]).
    Text(String),
    /// Plain data: numbers, lists, objects without media inside.
    Json(Value),
    /// Named artifacts that belong together, in order (`bordered_image` and `mask`, say).
    Map(Vec<(String, Artifact)>),
    /// A numeric array on the host: latents, prompt embeddings.
    Array(Arc<Array>),
    /// Frames of one moving picture, in order.
    Frames(Arc<Vec<DynamicImage>>),
}

/// A dense row-major `f32` array on the host. It keeps its batch axis.
#[derive(Clone, Debug, PartialEq)]
pub struct Array {
    /// Extent of each axis, outermost first.
    pub shape: Vec<usize>,
    /// `shape.iter().product()` values, last axis fastest.
    pub data: Vec<f32>,
}

impl Artifact {
    /// Text cleaned as results are: outer white space, then outer `"` characters, then white space.
    pub fn text(raw: &str) -> Self {
        Self::Text(raw.trim().trim_matches('"').trim().to_owned())
    }

    /// A picture.
    pub fn image(picture: DynamicImage) -> Self {
        Self::Image(Arc::new(picture))
    }

    /// The word used for this kind of artifact in messages.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Image(_) => "image",
            Self::Text(_) => "text",
            Self::Json(_) => "data",
            Self::Map(_) => "group of artifacts",
            Self::Array(_) => "array",
            Self::Frames(_) => "frames",
        }
    }
}

/// What one iteration of a step returned: one line of its result. File names count entries and the
/// artifacts inside each (`name-<entry>.<artifact>`).
#[derive(Clone, Debug, Default)]
pub struct Entry {
    /// What `previous_result:step` yields and what is saved, in order.
    pub artifacts: Vec<Artifact>,
    /// What only `previous_result:step.<name>` yields (`prompt_embeds`, say).
    pub properties: Vec<(String, Artifact)>,
}

impl From<Artifact> for Entry {
    fn from(artifact: Artifact) -> Self {
        Self { artifacts: vec![artifact], properties: Vec::new() }
    }
}
