//! Commands that take single pictures out of a video. A video is the frames of an earlier result, a
//! list of pictures, or an array of numbers from 0 to 1.

use dw_core::{
    arguments::ArtifactRef,
    artifact::{Array, Artifact},
    picture::from_unit_floats,
};
use image::DynamicImage;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, de::Error as _};
use serde_json::Value;

use crate::{
    TaskError, TaskOutput,
    arguments::{Call, argument_error},
    picture::one,
};

/// A place in arguments that holds a video: one earlier result, or a list of them.
pub(crate) struct VideoRef(Vec<ArtifactRef>);

impl<'de> Deserialize<'de> for VideoRef {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        let handles = match &value {
            Value::Array(items) => items.iter().map(ArtifactRef::from_value).collect(),
            single => ArtifactRef::from_value(single).map(|handle| vec![handle]),
        };
        handles
            .map(Self)
            .ok_or_else(|| D::Error::custom(format!("expected a video or a list of pictures, found {value}")))
    }
}

impl JsonSchema for VideoRef {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Video".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let media = generator.subschema_for::<ArtifactRef>();
        json_schema!({
            "description": "`previous_result:STEP`, or a list of pictures",
            "anyOf": [media, { "type": "array", "items": media }]
        })
    }
}

/// Arguments of `get_first_frame` and `get_last_frame`.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Edge {
    /// The video.
    video: VideoRef,
    /// Accepted and ignored: the command says which frame.
    #[serde(default, rename = "frame_index")]
    _frame_index: Option<i64>,
    /// Accepted and ignored: pictures are worked on by the CPU.
    #[serde(default, rename = "device")]
    _device: Option<String>,
}

/// Arguments of `get_frame`.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Place {
    /// The video.
    video: VideoRef,
    /// Which frame, from 0; -1 is the last.
    #[serde(default)]
    frame_index: i64,
    /// Accepted and ignored: pictures are worked on by the CPU.
    #[serde(default, rename = "device")]
    _device: Option<String>,
}

pub(crate) fn get_first_frame(arguments: Edge, call: &Call) -> Result<TaskOutput, TaskError> {
    frame(&arguments.video, 0, call)
}

pub(crate) fn get_last_frame(arguments: Edge, call: &Call) -> Result<TaskOutput, TaskError> {
    frame(&arguments.video, -1, call)
}

pub(crate) fn get_frame(arguments: Place, call: &Call) -> Result<TaskOutput, TaskError> {
    frame(&arguments.video, arguments.frame_index, call)
}

fn frame(video: &VideoRef, index: i64, call: &Call) -> Result<TaskOutput, TaskError> {
    let parts = video.0.iter().map(|&handle| Part::of(call.artifact("video", handle)?));
    let parts: Vec<Part> = parts.collect::<Result<_, TaskError>>()?;
    let count: usize = parts.iter().map(Part::len).sum();
    let place = if index < 0 { index + count as i64 } else { index };
    let mut place = usize::try_from(place).ok().filter(|place| *place < count).ok_or_else(|| {
        argument_error("frame_index", format!("frame {index} is out of range: the video has {count} frame(s)"))
    })?;
    for part in parts {
        if place < part.len() {
            return part.frame(place);
        }
        place -= part.len();
    }
    Err(argument_error("video", "it has no frames"))
}

/// One artifact of a video: frames that follow each other.
enum Part<'a> {
    Picture(&'a Artifact),
    Frames(&'a [DynamicImage]),
    /// Frames as numbers, with their layout.
    Numbers(&'a Array, Layout),
}

impl<'a> Part<'a> {
    fn of(artifact: &'a Artifact) -> Result<Self, TaskError> {
        match artifact {
            Artifact::Image(_) => Ok(Self::Picture(artifact)),
            Artifact::Frames(frames) => Ok(Self::Frames(frames)),
            Artifact::Array(array) => {
                Layout::of(&array.shape).map(|layout| Self::Numbers(array, layout)).ok_or_else(|| {
                    let reason = format!(
                        "an array of shape {:?} is no video; expected (frames, height, width, channels)",
                        array.shape
                    );
                    argument_error("video", reason)
                })
            }
            other => Err(argument_error("video", format!("expected a video, found {}", other.kind()))),
        }
    }

    fn len(&self) -> usize {
        match self {
            Self::Picture(_) => 1,
            Self::Frames(frames) => frames.len(),
            Self::Numbers(_, layout) => layout.frames,
        }
    }

    fn frame(&self, index: usize) -> Result<TaskOutput, TaskError> {
        match self {
            Self::Picture(picture) => Ok(TaskOutput::One(Artifact::clone(picture))),
            Self::Frames(frames) => Ok(one(frames[index].clone())),
            Self::Numbers(array, layout) => Ok(one(layout.frame(&array.data, index)?)),
        }
    }
}

/// How the frames of one video lie in an array.
struct Layout {
    frames: usize,
    height: usize,
    width: usize,
    channels: usize,
    channels_last: bool,
}

impl Layout {
    /// The layout of (frames, height, width, channels) or (frames, channels, height, width), with or
    /// without a batch axis of one video before it.
    fn of(shape: &[usize]) -> Option<Self> {
        let colours = |channels| matches!(channels, 1 | 3 | 4);
        match *shape {
            [1, a, b, c, d] => Self::of(&[a, b, c, d]),
            [frames, height, width, channels] if colours(channels) => {
                Some(Self { frames, height, width, channels, channels_last: true })
            }
            [frames, channels, height, width] if colours(channels) => {
                Some(Self { frames, height, width, channels, channels_last: false })
            }
            _ => None,
        }
    }

    fn frame(&self, data: &[f32], index: usize) -> Result<DynamicImage, TaskError> {
        let pixels = self.height * self.width;
        let frame = &data[index * pixels * self.channels..][..pixels * self.channels];
        let interleaved: Vec<f32> = if self.channels_last {
            frame.to_vec()
        } else {
            (0..pixels).flat_map(|pixel| (0..self.channels).map(move |c| frame[c * pixels + pixel])).collect()
        };
        from_unit_floats(self.width as u32, self.height as u32, self.channels, &interleaved)
            .ok_or_else(|| argument_error("video", "its frames are no pictures"))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use dw_core::{
        arguments::{Arguments, ArtifactRef},
        artifact::{Array, Artifact},
    };
    use image::DynamicImage;
    use serde_json::{Value, json};

    use crate::{
        TaskError,
        testing::{and, call, picture},
    };

    fn grey(shade: u8) -> DynamicImage {
        image::GrayImage::from_pixel(2, 2, image::Luma([shade])).into()
    }

    fn shade_of(command: &str, video: Vec<Artifact>, more: Value) -> Result<u8, TaskError> {
        let handles: Vec<Value> = (0..video.len() as u64).map(|id| ArtifactRef(id).to_value()).collect();
        let video_argument = if let [single] = &handles[..] { single.clone() } else { Value::Array(handles) };
        let mut arguments = and(and(Arguments::default(), json!({ "video": video_argument })), more);
        arguments.artifacts = (0..).zip(video).collect();
        Ok(picture(call(command, &arguments)?).as_bytes()[0])
    }

    fn clip() -> Vec<Artifact> {
        vec![Artifact::Frames(Arc::new((0..4).map(grey).collect()))]
    }

    #[test]
    fn a_frame_is_counted_from_the_start_or_from_the_end() {
        for (index, shade) in [(2, 2), (-1, 3), (-4, 0)] {
            assert_eq!(shade_of("get_frame", clip(), json!({ "frame_index": index })).expect("a frame"), shade);
        }
        assert_eq!(shade_of("get_frame", clip(), json!({})).expect("a frame"), 0);
        assert_eq!(shade_of("get_first_frame", clip(), json!({"device": "cpu"})).expect("a frame"), 0);
        assert_eq!(shade_of("get_last_frame", clip(), json!({"frame_index": 0})).expect("a frame"), 3);
    }

    #[test]
    fn a_frame_that_is_not_there_is_an_error() {
        for index in [99, 4, -5] {
            let error = shade_of("get_frame", clip(), json!({ "frame_index": index })).expect_err("out of range");
            let message = format!("argument `frame_index`: frame {index} is out of range: the video has 4 frame(s)");
            assert_eq!(error.to_string(), message);
        }
        assert!(shade_of("get_last_frame", vec![Artifact::Frames(Arc::default())], json!({})).is_err());
    }

    #[test]
    fn a_list_of_pictures_and_a_single_picture_are_videos() {
        let list = vec![Artifact::image(grey(7)), Artifact::image(grey(8)), Artifact::image(grey(9))];
        assert_eq!(shade_of("get_frame", list.clone(), json!({"frame_index": 1})).expect("a frame"), 8);
        assert_eq!(shade_of("get_last_frame", list[..1].to_vec(), json!({})).expect("a frame"), 7);
    }

    #[test]
    fn an_array_is_a_video_with_channels_first_or_last_and_one_video_to_a_batch() {
        let values: Vec<f32> = (0..2 * 2 * 2 * 3).map(|index| if index < 12 { 0.0 } else { 0.5 }).collect();
        for shape in [vec![2, 2, 2, 3], vec![2, 3, 2, 2], vec![1, 2, 2, 2, 3]] {
            let video = vec![Artifact::Array(Arc::new(Array { shape: shape.clone(), data: values.clone() }))];
            assert_eq!(shade_of("get_last_frame", video.clone(), json!({})).expect("a frame"), 128, "{shape:?}");
            assert_eq!(shade_of("get_first_frame", video, json!({})).expect("a frame"), 0, "{shape:?}");
        }
        let flat = vec![Artifact::Array(Arc::new(Array { shape: vec![24], data: values }))];
        assert!(shade_of("get_frame", flat, json!({})).is_err());
    }

    #[test]
    fn text_is_no_video() {
        let error = shade_of("get_frame", vec![Artifact::text("hi")], json!({})).expect_err("text").to_string();
        assert_eq!(error, "argument `video`: expected a video, found text");
    }
}
