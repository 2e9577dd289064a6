//! Names of result files: what a workflow may put into them, and which extension a content type has.

use super::OutputError;
use crate::paths::{self, InputError};

/// The most bytes of a file name that common file systems take.
const MAX_FILE_NAME: usize = 255;

/// Extensions by content type, the same on every platform.
const EXTENSIONS: &[(&str, &str)] = &[
    ("image/png", ".png"),
    ("image/jpeg", ".jpg"),
    ("image/jpg", ".jpg"),
    ("image/webp", ".webp"),
    ("image/gif", ".gif"),
    ("image/bmp", ".bmp"),
    ("image/tiff", ".tiff"),
    ("text/plain", ".txt"),
    ("text/html", ".html"),
    ("text/markdown", ".md"),
    ("text/csv", ".csv"),
    ("application/json", ".json"),
    ("application/x-safetensors", ".safetensors"),
    ("audio/wav", ".wav"),
    ("audio/x-wav", ".wav"),
    ("audio/aiff", ".aiff"),
    ("audio/flac", ".flac"),
    ("audio/x-flac", ".flac"),
    ("audio/mpeg", ".mp3"),
    ("audio/mp3", ".mp3"),
    ("audio/ogg", ".ogg"),
    ("audio/vorbis", ".ogg"),
    ("audio/opus", ".ogg"),
    ("video/mp4", ".mp4"),
    ("video/webm", ".webm"),
    ("video/quicktime", ".mov"),
    ("video/x-msvideo", ".avi"),
];

/// A content type without its parameters, in lower case.
pub(super) fn essence(content_type: &str) -> String {
    content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase()
}

/// The file extension for a content type, with its dot; empty when the type is unknown.
pub fn extension(content_type: &str) -> &'static str {
    let essence = essence(content_type);
    EXTENSIONS.iter().find(|(known, _)| *known == essence).map_or("", |(_, extension)| extension)
}

/// Checks a name that becomes part of a file name: a workflow's `id`, a step's name, `file_base_name`,
/// the key of a group. `what` names it in the message.
pub fn check_base_name(what: &str, name: &str) -> Result<(), OutputError> {
    paths::check_base_name(name).map_err(|error| {
        let shown: String = name.chars().take(80).collect();
        let remedy = match error {
            InputError::StringTooLong { .. } => "shorten it",
            InputError::StringControl => "remove the control character",
            _ => "use letters, digits, `-` and `_`, so that files stay in the output folder itself",
        };
        let name = shown.escape_debug().to_string();
        OutputError::BadName { what: what.to_owned(), name, reason: format!("is refused ({error}); {remedy}") }
    })
}

/// Checks a whole file name put together from checked parts.
pub(super) fn check_file_name(name: &str) -> Result<(), OutputError> {
    if name.len() <= MAX_FILE_NAME {
        return Ok(());
    }
    Err(OutputError::BadName {
        what: "the file name".into(),
        name: name.chars().take(80).chain("…".chars()).collect(),
        reason: "is longer than 255 bytes; shorten the workflow's id, the step's name or `file_base_name`".into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extensions_do_not_depend_on_the_platform() {
        let cases = [
            ("image/png", ".png"),
            ("image/jpeg", ".jpg"),
            ("image/webp", ".webp"),
            ("image/gif", ".gif"),
            ("image/bmp", ".bmp"),
            ("image/tiff", ".tiff"),
            ("text/plain", ".txt"),
            ("text/plain; charset=utf-8", ".txt"),
            ("Text/HTML", ".html"),
            ("text/markdown", ".md"),
            ("text/csv", ".csv"),
            ("application/json", ".json"),
            ("audio/x-wav", ".wav"),
            ("audio/opus", ".ogg"),
            ("audio/mp3", ".mp3"),
            ("video/quicktime", ".mov"),
            ("unknown/type", ""),
            ("", ""),
        ];
        for (content_type, expected) in cases {
            assert_eq!(extension(content_type), expected, "{content_type}");
        }
    }

    #[test]
    fn names_cannot_lead_out_of_a_folder() {
        let long = "x".repeat(201);
        for name in ["../x", "a/b", "a\\b", "/etc/passwd", "..", ".", "a\0b", "a\nb", "\u{7f}", &long] {
            assert!(check_base_name("id", name).is_err(), "{name:?}");
        }
        let longest = "ä".repeat(200);
        for name in ["landscape", "v1.0..2", "two words", "", "日本", ".hidden", &longest] {
            assert!(check_base_name("id", name).is_ok(), "{name:?}");
        }
    }

    #[test]
    fn a_refused_name_is_shown_without_its_control_characters() {
        let message = check_base_name("step name", "a\x1b[2Jb").expect_err("refused").to_string();
        let expected =
            "step name `a\\u{1b}[2Jb` is refused (String contains invalid characters); remove the control character";
        assert_eq!(message, expected);
    }
}
