//! What ends up in the output folder, file by file.

use std::sync::Arc;

use image::{ImageReader, Rgba, RgbaImage};
use serde_json::json;

use super::*;
use crate::artifact::Array;

const STEP: StepLabel = StepLabel { workflow_id: "wf", step_name: "gen", step_index: 2 };

fn folder() -> (tempfile::TempDir, Writer) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let writer = Writer::new(folder.path()).expect("it can be written to");
    (folder, writer)
}

fn picture() -> Artifact {
    Artifact::image(image::DynamicImage::new_rgb8(4, 2))
}

fn pictures(count: usize) -> Entry {
    Entry { artifacts: vec![picture(); count], properties: Vec::new() }
}

fn latents() -> Artifact {
    let data = (0..8).map(|value| value as f32 / 4.0).collect();
    Artifact::Array(Arc::new(Array { shape: vec![1, 2, 2, 2], data }))
}

fn save(writer: &Writer, content_type: &str, index: usize, entry: &Entry) -> Result<Saved, OutputError> {
    writer.save(&SaveSpec::new(content_type), STEP, index, entry, None)
}

fn names(saved: &Saved) -> Vec<String> {
    saved.files.iter().map(|path| path.file_name().expect("a name").to_string_lossy().into_owned()).collect()
}

fn listed(folder: &Path) -> usize {
    fs_err::read_dir(folder).expect("it can be listed").count()
}

#[test]
fn files_are_named_after_workflow_step_entry_and_artifact() {
    let pair = || {
        Artifact::Map(vec![
            ("bordered_image".into(), picture()),
            ("mask".into(), Artifact::Map(vec![("inner".into(), picture())])),
        ])
    };
    let cases: [(&str, usize, Entry, &[&str]); 12] = [
        ("image/jpeg", 1, pictures(3), &["wf-gen.2-1.0.jpg", "wf-gen.2-1.1.jpg", "wf-gen.2-1.2.jpg"]),
        ("image/png", 0, pictures(1), &["wf-gen.2-0.0.png"]),
        ("image/webp", 0, pictures(1), &["wf-gen.2-0.0.webp"]),
        ("image/bmp", 0, pictures(1), &["wf-gen.2-0.0.bmp"]),
        ("image/tiff", 0, pictures(1), &["wf-gen.2-0.0.tiff"]),
        ("image/gif", 0, pictures(1), &["wf-gen.2-0.0.gif"]),
        ("application/json", 3, pictures(2), &["wf-gen.2-3.json"]),
        ("text/plain", 0, Artifact::text("hello").into(), &["wf-gen.2-0.0.txt"]),
        ("image/jpeg", 0, pair().into(), &["wf-gen.2-0.0-bordered_image.jpg", "wf-gen.2-0.0-mask-inner.jpg"]),
        ("text/plain", 0, Artifact::Json(json!({"a": "x", "b": null})).into(), &["wf-gen.2-0.0-a.txt"]),
        ("application/x-safetensors", 0, latents().into(), &["wf-gen.2-0.0.safetensors"]),
        ("image/png", 0, pictures(0), &[]),
    ];
    for (content_type, index, entry, expected) in cases {
        let (folder, writer) = folder();
        let saved = save(&writer, content_type, index, &entry).expect("saved");
        assert_eq!(names(&saved), expected, "{content_type}");
        assert_eq!(listed(folder.path()), expected.len(), "nothing else is in the folder");
        assert!(saved.overwritten.is_empty());
    }
}

#[test]
fn the_base_name_goes_before_the_name() {
    let (_folder, writer) = folder();
    let spec = SaveSpec { file_base_name: Some("custom_".into()), ..SaveSpec::new("application/json") };
    let label = StepLabel { workflow_id: "wf", step_name: "s", step_index: 0 };
    let saved = writer.save(&spec, label, 0, &Artifact::text("x").into(), None).expect("saved");
    assert_eq!(names(&saved), ["custom_wf-s.0-0.json"]);
}

#[test]
fn names_that_lead_out_of_the_folder_are_refused_and_nothing_is_written() {
    let (folder, writer) = folder();
    let outside = folder.path().join("inner");
    fs_err::create_dir(&outside).expect("created");
    let spec = |base: Option<&str>| SaveSpec { file_base_name: base.map(str::to_owned), ..SaveSpec::new("image/png") };
    let labels = [
        (StepLabel { workflow_id: "../wf", ..STEP }, None),
        (StepLabel { step_name: "inner/x", ..STEP }, None),
        (StepLabel { step_name: "a\\b", ..STEP }, None),
        (STEP, Some("../")),
        (STEP, Some("a\0b")),
        (StepLabel { workflow_id: &"x".repeat(150), step_name: &"y".repeat(150), step_index: 0 }, None),
    ];
    for (label, base) in labels {
        let refused = writer.save(&spec(base), label, 0, &pictures(1), None).expect_err("refused");
        assert!(matches!(refused, OutputError::BadName { .. }), "{refused}");
    }
    let key = Artifact::Map(vec![("../x".into(), picture())]);
    assert!(matches!(save(&writer, "image/png", 0, &key.into()), Err(OutputError::BadName { .. })));
    assert_eq!((listed(folder.path()), listed(&outside)), (1, 0));
}

#[test]
fn a_result_of_the_wrong_kind_is_an_error_that_names_both() {
    let frames = || Artifact::Frames(Arc::new(vec![image::DynamicImage::new_rgb8(2, 2)]));
    let cases = [
        ("image/png", Artifact::text("x"), "Content type image/png does not match result type text"),
        ("image/png", frames(), "Content type image/png does not match result type frames; use `image/gif`"),
        ("image/png", latents(), "Content type image/png does not match result type array; use `application/x-safe"),
        ("image/png", Artifact::Json(json!(4)), "Content type image/png does not match result type data"),
        ("text/plain", picture(), "Content type text/plain does not match result type image"),
        ("unknown/type", picture(), "Content type unknown/type does not match result type image"),
        ("application/x-safetensors", picture(), "Content type application/x-safetensors does not match"),
        ("image/gif", Artifact::Frames(Arc::default()), "does not match result type frames without any frame"),
        ("video/mp4", frames(), "this build cannot write `video/mp4`; save frames as `image/gif`"),
        ("audio/wav", latents(), "this build cannot write `audio/wav`"),
        ("image/avif", picture(), "this build cannot write `image/avif`; use `image/png`"),
    ];
    for (content_type, artifact, expected) in cases {
        let (folder, writer) = folder();
        let message = save(&writer, content_type, 0, &artifact.into()).expect_err(content_type).to_string();
        assert!(message.contains(expected), "{message}");
        assert_eq!(listed(folder.path()), 0);
    }
}

#[test]
fn json_is_the_whole_entry_indented_by_four_with_words_in_place_of_pictures() {
    let (_folder, writer) = folder();
    let entry = Entry {
        artifacts: vec![
            Artifact::Json(json!({"b": [1, 2.5], "a": null})),
            Artifact::Map(vec![("image".into(), picture()), ("text".into(), Artifact::text("é"))]),
            latents(),
        ],
        properties: vec![("prompt_embeds".into(), latents())],
    };
    let saved = save(&writer, "application/json", 0, &entry).expect("saved");
    let text = fs_err::read_to_string(&saved.files[0]).expect("readable");
    assert!(text.starts_with("[\n    {\n        \"b\": [\n"), "{text}");
    let value: Value = serde_json::from_str(&text).expect("valid JSON");
    let pair = json!({"image": "<image 4x2>", "text": "é"});
    assert_eq!(value, json!([{"b": [1, 2.5], "a": null}, pair, "<array 1x2x2x2>"]));
    let saved = save(&writer, "application/json", 1, &Artifact::Json(json!({"x": 1})).into()).expect("saved");
    assert_eq!(fs_err::read_to_string(&saved.files[0]).expect("readable"), "{\n    \"x\": 1\n}");
}

#[test]
fn text_files_hold_exactly_the_text() {
    let (_folder, writer) = folder();
    let saved = save(&writer, "text/plain", 0, &Artifact::Text("Grüße,\n\"you\"".into()).into()).expect("saved");
    assert_eq!(fs_err::read_to_string(&saved.files[0]).expect("readable"), "Grüße,\n\"you\"");
}

#[test]
fn null_artifacts_are_skipped_with_a_warning() {
    let (_folder, writer) = folder();
    let saved = save(&writer, "image/png", 0, &Artifact::Json(Value::Null).into()).expect("saved");
    assert!(saved.files.is_empty());
    assert_eq!(saved.warnings, ["`wf-gen.2-0.0` is null and was not saved"]);
}

#[test]
fn replaced_files_are_reported() {
    let (_folder, writer) = folder();
    let first = save(&writer, "image/png", 0, &pictures(2)).expect("saved");
    assert!(first.overwritten.is_empty());
    let second = save(&writer, "image/png", 0, &pictures(1)).expect("saved");
    assert_eq!(second.overwritten, second.files);
}

#[test]
fn a_folder_in_the_place_of_a_file_is_an_error_and_earlier_files_stay() {
    let (folder, writer) = folder();
    fs_err::create_dir(folder.path().join("wf-gen.2-0.1.png")).expect("created");
    let message = save(&writer, "image/png", 0, &pictures(3)).expect_err("refused").to_string();
    assert!(message.contains("wf-gen.2-0.1.png") && message.contains("a folder of that name exists"), "{message}");
    assert_eq!(listed(folder.path()), 2);
    assert!(folder.path().join("wf-gen.2-0.0.png").is_file());
}

#[test]
fn missing_folders_are_created_and_files_in_their_place_are_refused() {
    let root = tempfile::tempdir().expect("a temporary folder");
    let deep = root.path().join("a/b/c");
    assert_eq!(Writer::new(&deep).expect("created").dir(), deep);
    assert!(deep.is_dir() && listed(&deep) == 0);
    let file = root.path().join("file");
    fs_err::write(&file, "x").expect("written");
    let message = Writer::new(&file).expect_err("refused").to_string();
    assert!(
        message.starts_with(&format!("Output path exists but is not a directory: {}", file.display())),
        "{message}"
    );
    let message = Writer::new(file.join("below")).expect_err("refused").to_string();
    assert!(message.starts_with("cannot write to the output folder"), "{message}");
}

#[cfg(target_os = "linux")]
#[test]
fn a_folder_that_takes_no_files_is_refused_before_any_work() {
    // Even an administrator cannot create files there.
    let message = Writer::new("/proc").expect_err("refused").to_string();
    assert!(message.starts_with("cannot write to the output folder `/proc`: "), "{message}");
    assert!(message.ends_with("choose another with `-o DIR`"), "{message}");
}

#[test]
fn a_folder_that_vanished_is_an_error_that_names_the_file() {
    let (folder, writer) = folder();
    folder.close().expect("removed");
    let message = save(&writer, "image/png", 0, &pictures(1)).expect_err("refused").to_string();
    assert!(message.starts_with("cannot write `") && message.contains("wf-gen.2-0.0.png"), "{message}");
}

#[test]
fn pictures_keep_their_pixels_and_depth_where_the_format_has_them() {
    let colors = RgbaImage::from_fn(8, 4, |x, y| Rgba([x as u8 * 30, y as u8 * 60, 7, 255 - x as u8]));
    let images = [
        image::DynamicImage::from(colors.clone()),
        image::DynamicImage::from(colors.clone()).to_rgb8().into(),
        image::DynamicImage::from(colors.clone()).to_luma8().into(),
        image::DynamicImage::from(colors.clone()).to_luma_alpha8().into(),
        image::DynamicImage::from(colors.clone()).to_rgb16().into(),
        image::DynamicImage::from(colors).to_luma16().into(),
    ];
    let (_folder, writer) = folder();
    for content_type in ["image/png", "image/webp", "image/bmp", "image/tiff"] {
        for image in &images {
            let saved = save(&writer, content_type, 0, &Artifact::image(image.clone()).into()).expect("saved");
            let read = ImageReader::open(&saved.files[0]).expect("there").decode().expect("valid");
            let sixteen = image.color().bytes_per_pixel() / image.color().channel_count() == 2;
            if sixteen && content_type == "image/png" {
                assert_eq!(&read, image);
            }
            assert_eq!(read.to_rgba8(), image.to_rgba8(), "{content_type} {:?}", image.color());
        }
    }
}

#[test]
fn floating_point_pictures_become_eight_bits() {
    let (_folder, writer) = folder();
    let image: image::DynamicImage = image::Rgb32FImage::from_pixel(2, 2, image::Rgb([0.0, 0.5, 1.0])).into();
    for content_type in ["image/png", "image/jpeg", "image/webp", "image/bmp", "image/gif"] {
        let saved = save(&writer, content_type, 0, &Artifact::image(image.clone()).into()).expect(content_type);
        let pixel = image::open(&saved.files[0]).expect("valid").to_rgb8().get_pixel(0, 0).0;
        let near = pixel.iter().zip([0, 128, 255]).all(|(got, wanted): (&u8, u8)| got.abs_diff(wanted) < 6);
        assert!(near, "{content_type}: {pixel:?}");
    }
}

#[test]
fn jpeg_lays_transparency_over_white_and_follows_the_quality() {
    let (_folder, writer) = folder();
    let clear: image::DynamicImage = RgbaImage::from_pixel(8, 8, Rgba([0, 0, 0, 0])).into();
    let saved = save(&writer, "image/jpeg", 0, &Artifact::image(clear).into()).expect("saved");
    let pixel = image::open(&saved.files[0]).expect("valid").to_rgb8().get_pixel(3, 3).0;
    assert!(pixel.iter().all(|channel| *channel > 250), "{pixel:?}");
    let noise = RgbaImage::from_fn(64, 64, |x, y| Rgba([(x * 97 + y * 57) as u8, (x * y) as u8, (x ^ y) as u8, 255]));
    let entry = Artifact::image(noise.into()).into();
    let size = |quality| {
        let spec = SaveSpec { quality, ..SaveSpec::new("image/jpeg") };
        let saved = writer.save(&spec, STEP, 1, &entry, None).expect("saved");
        fs_err::metadata(&saved.files[0]).expect("there").len()
    };
    assert!(size(Some(10)) < size(None) && size(None) < size(Some(95)));
    assert_eq!(size(None), size(Some(75)));
}

#[test]
fn animations_have_every_frame_at_the_speed_asked_for() {
    use image::AnimationDecoder;
    let (_folder, writer) = folder();
    let frames: Vec<_> =
        (0..3).map(|index| RgbaImage::from_pixel(4, 4, Rgba([index * 100, 0, 0, 255])).into()).collect();
    let spec = SaveSpec { fps: 20, ..SaveSpec::new("image/gif") };
    let saved = writer.save(&spec, STEP, 0, &Artifact::Frames(Arc::new(frames)).into(), None).expect("saved");
    let file = std::io::BufReader::new(fs_err::File::open(&saved.files[0]).expect("there"));
    let decoder = image::codecs::gif::GifDecoder::new(file).expect("valid");
    let frames = decoder.into_frames().collect_frames().expect("valid");
    assert_eq!(frames.len(), 3);
    assert!(frames.iter().all(|frame| frame.delay().numer_denom_ms() == (50, 1)));
}

#[test]
fn arrays_are_saved_as_one_tensor_called_latents() {
    let (_folder, writer) = folder();
    let saved = save(&writer, "application/x-safetensors", 0, &latents().into()).expect("saved");
    let bytes = fs_err::read(&saved.files[0]).expect("readable");
    let (length, rest) = bytes.split_first_chunk::<8>().expect("long enough");
    let length = u64::from_le_bytes(*length) as usize;
    assert_eq!(length % 8, 0);
    let header: Value = serde_json::from_slice(&rest[..length]).expect("valid JSON");
    assert_eq!(header["latents"], json!({"dtype": "F32", "shape": [1, 2, 2, 2], "data_offsets": [0, 32]}));
    let (values, rest) = rest[length..].as_chunks::<4>();
    assert_eq!(values.iter().map(|value| f32::from_le_bytes(*value)).collect::<Vec<_>>()[5], 1.25);
    assert_eq!((values.len(), rest.len()), (8, 0));
    let lying = Artifact::Array(Arc::new(Array { shape: vec![3], data: vec![0.0] }));
    assert!(matches!(save(&writer, "application/x-safetensors", 1, &lying.into()), Err(OutputError::Encoding { .. })));
}

#[test]
fn pictures_an_encoder_cannot_hold_are_errors_and_leave_nothing() {
    let (folder, writer) = folder();
    let wide = Artifact::image(image::DynamicImage::new_luma8(70_000, 1));
    for content_type in ["image/jpeg", "image/webp", "image/gif"] {
        let message = save(&writer, content_type, 0, &wide.clone().into()).expect_err(content_type).to_string();
        assert!(message.starts_with("cannot encode `"), "{message}");
    }
    assert_eq!(listed(folder.path()), 0);
}
