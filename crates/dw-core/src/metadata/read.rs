//! Reading metadata from a picture that anybody may have made: every size is limited, and a file that
//! lies about itself is an error, not a crash.

use std::{
    io::{self, BufRead, BufReader, Seek},
    path::{Path, PathBuf},
};

use super::{Metadata, PNG_KEYWORD, exif::user_comment};

/// The most bytes of a JPEG or WebP file that are searched: 256 MiB.
const MAX_SEARCHED: u64 = 256 << 20;
/// The most bytes that the chunks of a PNG file may occupy in memory: 64 MiB.
const MAX_CHUNKS: usize = 64 << 20;
/// Starts of picture files that cannot carry our metadata: GIF, BMP, TIFF.
const OTHER_PICTURES: [&[u8]; 4] = [b"GIF8", b"BM", b"II*\0", b"MM\0*"];

/// Why metadata cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum MetadataError {
    /// The file cannot be opened or read.
    #[error("cannot read the picture: {0}")]
    Io(#[from] io::Error),
    /// It is no picture that dw writes.
    #[error("`{}` is not a PNG, JPEG or WebP picture", .0.display())]
    NotAPicture(PathBuf),
    /// The file is truncated or lies about its contents.
    #[error("`{}` is damaged: {reason}; try a fresh copy of the file", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

/// Reads what a PNG, JPEG or WebP picture says about how it was made. None when it says nothing, or
/// nothing that follows our form; pictures of diffusers-workflow follow it.
pub fn read(path: &Path) -> Result<Option<Metadata>, MetadataError> {
    let mut file = BufReader::new(fs_err::File::open(path)?);
    let start = file.fill_buf()?;
    let text = if start.starts_with(b"\x89PNG\r\n\x1a\n") {
        png_text(file).map_err(|reason| damaged(path, reason))?
    } else if start.starts_with(b"\xff\xd8") || (start.starts_with(b"RIFF") && start.get(8..12) == Some(b"WEBP")) {
        exif_text(file).map_err(|reason| damaged(path, reason))?
    } else if OTHER_PICTURES.iter().any(|signature| start.starts_with(signature)) {
        None
    } else {
        return Err(MetadataError::NotAPicture(path.to_owned()));
    };
    Ok(text.and_then(|text| serde_json::from_str(&text).ok()).and_then(Metadata::from_value))
}

fn damaged(path: &Path, reason: String) -> MetadataError {
    MetadataError::Damaged { path: path.to_owned(), reason }
}

/// The text under our keyword, before or after the pixels, in any of the three kinds of text chunk.
fn png_text(file: impl BufRead + Seek) -> Result<Option<String>, String> {
    let decoder = png::Decoder::new_with_limits(file, png::Limits { bytes: MAX_CHUNKS });
    let mut reader = decoder.read_info().map_err(|error| error.to_string())?;
    if let Some(text) = keyword_text(reader.info()) {
        return Ok(Some(text));
    }
    reader.finish().map_err(|error| error.to_string())?;
    Ok(keyword_text(reader.info()))
}

fn keyword_text(info: &png::Info) -> Option<String> {
    let plain = info.uncompressed_latin1_text.iter().find(|chunk| chunk.keyword == PNG_KEYWORD);
    let international = || info.utf8_text.iter().find(|chunk| chunk.keyword == PNG_KEYWORD)?.get_text().ok();
    let compressed = || info.compressed_latin1_text.iter().find(|chunk| chunk.keyword == PNG_KEYWORD)?.get_text().ok();
    plain.map(|chunk| chunk.text.clone()).or_else(international).or_else(compressed)
}

fn exif_text(file: impl BufRead + Seek) -> Result<Option<String>, String> {
    match exif::Reader::new().read_from_container(&mut file.take(MAX_SEARCHED)) {
        Ok(exif) => Ok(user_comment(&exif)),
        Err(exif::Error::NotFound(_) | exif::Error::BlankValue(_)) => Ok(None),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use image::DynamicImage;
    use serde_json::json;

    use super::*;
    use crate::{
        artifact::Artifact,
        output::{SaveSpec, StepLabel, Writer},
        seed::Seed,
    };

    const STEP: StepLabel = StepLabel { workflow_id: "wf", step_name: "paint", step_index: 0 };

    fn metadata(prompt: &str) -> Metadata {
        Metadata {
            model_name: Some("builtin:landscapes".into()),
            arguments: Some(json!({ "prompt": prompt, "steps": 25 })),
            seed: Some(Seed::One(42)),
            workflow_document: Some(json!({"id": "wf", "steps": []})),
            ..Metadata::new("paint")
        }
    }

    fn saved(folder: &Path, content_type: &str, metadata: Option<&Metadata>) -> PathBuf {
        let writer = Writer::new(folder).expect("it can be written to");
        let entry = Artifact::image(DynamicImage::new_rgb8(16, 16)).into();
        let saved = writer.save(&SaveSpec::new(content_type), STEP, 0, &entry, metadata).expect("saved");
        saved.files[0].clone()
    }

    fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
        file.write_all(bytes).expect("written");
        file
    }

    #[test]
    fn what_is_written_is_read_back_in_every_format_and_script() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        for content_type in ["image/png", "image/jpeg", "image/webp"] {
            for prompt in ["a sea\n\"calm\"", "Café Größe", "山と海 🌊"] {
                let metadata = metadata(prompt);
                let path = saved(folder.path(), content_type, Some(&metadata));
                assert_eq!(read(&path).expect("readable"), Some(metadata), "{content_type} {prompt}");
                assert!(image::open(&path).is_ok(), "the picture is still a picture");
            }
            let path = saved(folder.path(), content_type, None);
            assert_eq!(read(&path).expect("readable"), None, "{content_type}");
        }
    }

    #[test]
    fn png_holds_latin_text_in_a_text_chunk_and_other_text_in_an_international_one() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        for (prompt, chunk) in
            [("Café", b"tEXtparameters\0{\"step_name\""), ("海", b"iTXtparameters\0\0\0\0\0{\"step_n")]
        {
            let bytes = fs_err::read(saved(folder.path(), "image/png", Some(&metadata(prompt)))).expect("readable");
            assert!(bytes.windows(chunk.len()).any(|window| window == chunk), "{prompt}");
        }
    }

    #[test]
    fn jpeg_leaves_out_the_workflow_and_then_everything_when_there_is_no_room() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let writer = Writer::new(folder.path()).expect("it can be written to");
        let entry = Artifact::image(DynamicImage::new_rgb8(16, 16)).into();
        let mut metadata = metadata("x");
        metadata.workflow_document = Some(json!("y".repeat(70_000)));
        let spec = SaveSpec::new("image/jpeg");
        let saved = writer.save(&spec, STEP, 0, &entry, Some(&metadata)).expect("saved");
        assert!(saved.warnings[0].contains("the workflow was left out"), "{:?}", saved.warnings);
        assert_eq!(read(&saved.files[0]).expect("readable"), Some(metadata.without_document()));
        metadata.arguments = Some(json!("z".repeat(70_000)));
        let saved = writer.save(&spec, STEP, 0, &entry, Some(&metadata)).expect("saved");
        assert!(saved.warnings[0].contains("it was left out"), "{:?}", saved.warnings);
        assert_eq!(read(&saved.files[0]).expect("readable"), None);
    }

    #[test]
    fn text_after_the_pixels_and_compressed_text_are_found() {
        let mut bytes = Vec::new();
        let mut writer = png::Encoder::new(&mut bytes, 1, 1).write_header().expect("a header");
        writer.write_image_data(&[0]).expect("a pixel");
        writer
            .write_text_chunk(&png::text_metadata::ZTXtChunk::new(PNG_KEYWORD, r#"{"step_name":"s"}"#))
            .expect("text");
        writer.finish().expect("finished");
        let found = read(file(&bytes).path()).expect("readable").expect("it is there");
        assert_eq!(found.step_name, "s");
    }

    #[test]
    fn foreign_text_under_our_keyword_is_not_ours() {
        for text in ["steps: 20, sampler: Euler", "[1, 2]", "{\"prompt\": \"x\"}", &"[".repeat(5_000)] {
            let mut bytes = Vec::new();
            let mut encoder = png::Encoder::new(&mut bytes, 1, 1);
            encoder.add_text_chunk(PNG_KEYWORD.into(), text.to_owned()).expect("text");
            let mut writer = encoder.write_header().expect("a header");
            writer.write_image_data(&[0]).expect("a pixel");
            writer.finish().expect("finished");
            assert_eq!(read(file(&bytes).path()).expect("readable"), None);
        }
    }

    #[test]
    fn files_that_are_no_pictures_and_pictures_without_room_are_told_apart() {
        for bytes in [&b""[..], b"{}", b"RIFF\x04\0\0\0WAVE", b"%PDF-1.7"] {
            let error = read(file(bytes).path()).expect_err("no picture");
            assert!(matches!(error, MetadataError::NotAPicture(_)), "{error}");
        }
        let folder = tempfile::tempdir().expect("a temporary folder");
        for content_type in ["image/gif", "image/bmp", "image/tiff"] {
            assert_eq!(read(&saved(folder.path(), content_type, None)).expect("readable"), None, "{content_type}");
        }
        let missing = read(&folder.path().join("missing.png")).expect_err("it is not there").to_string();
        assert!(missing.contains("missing.png"), "{missing}");
        assert!(read(folder.path()).is_err(), "a folder is no picture");
    }

    #[test]
    fn truncated_pictures_are_errors_or_have_no_metadata_and_never_panic() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        for content_type in ["image/png", "image/jpeg", "image/webp"] {
            let bytes = fs_err::read(saved(folder.path(), content_type, Some(&metadata("x")))).expect("readable");
            for length in 12..bytes.len() {
                match read(file(&bytes[..length]).path()) {
                    Ok(Some(found)) => assert_eq!(found, metadata("x")),
                    Ok(None) => panic!("{content_type} cut to {length} bytes hides that it is damaged"),
                    Err(error) => assert!(matches!(error, MetadataError::Damaged { .. }), "{error}"),
                }
            }
        }
    }

    #[test]
    fn flipped_bytes_never_panic() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        for content_type in ["image/png", "image/jpeg", "image/webp"] {
            let bytes = fs_err::read(saved(folder.path(), content_type, Some(&metadata("x")))).expect("readable");
            for index in 8..bytes.len() {
                let mut hostile = bytes.clone();
                hostile[index] ^= 0xff;
                let _ = read(file(&hostile).path());
            }
        }
    }

    #[test]
    fn chunks_that_claim_to_be_huge_are_refused_without_being_allocated() {
        let mut png = b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR\0\0\0\x01\0\0\0\x01\x08\0\0\0\0\x3a\x7e\x9b\x55".to_vec();
        png.extend(b"\x7f\xff\xff\xfftEXtparameters\0{}");
        let webp = b"RIFF\xff\xff\xff\xffWEBPEXIF\xf0\xff\xff\xffabc";
        let jpeg = b"\xff\xd8\xff\xe1\xff\xffExif\0\0MM\0*\xff\xff\xff\xff";
        for bytes in [&png[..], webp, jpeg] {
            let error = read(file(bytes).path()).expect_err("it lies");
            assert!(matches!(error, MetadataError::Damaged { .. }), "{error}");
        }
    }
}
