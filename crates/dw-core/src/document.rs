//! A workflow document: its text, the JSON it holds, and where each part of it stands.
//!
//! Owns reading, limits and syntax. What the JSON means is left to [`crate::workflow`] and [`crate::plan`].

mod scan;

pub(crate) use scan::child_pointer;

use std::{
    io::Read,
    path::{Path, PathBuf},
};

use serde_json::Value;
use sha2::{Digest, Sha256};

pub use scan::with_finite_numbers;

use crate::{
    arguments::HANDLE_KEY,
    finding::{Finding, Place, Severity},
    paths::{self, InputError, MAX_WORKFLOW_BYTES},
};

/// Beyond this many odd keys nobody reads on, and each one's position costs a walk over the text.
const MOST_KEY_FINDINGS: usize = 100;

/// A JSON document that parsed. Positions are found in the text when they are asked for.
#[derive(Clone, Debug)]
pub struct Document {
    /// The text, without a byte order mark.
    pub text: String,
    /// What the text says; of repeated keys the last one.
    pub value: Value,
    /// The file it came from, if it came from one.
    pub file: Option<PathBuf>,
    /// The folder that relative paths inside it start from, absolute.
    pub base_dir: PathBuf,
    /// SHA-256 of the bytes, in hexadecimal.
    pub sha256: String,
    /// What is odd about the text and does not stop a run.
    pub warnings: Vec<Finding>,
}

impl Document {
    /// Reads a workflow file. Its size is checked before it is read.
    pub fn load(path: &Path) -> Result<Self, Vec<Finding>> {
        let refuse = |error: &InputError| {
            let severity = Severity::Error;
            let remedy = input_remedy(error).map(str::to_owned);
            let place = start(Some(path.to_path_buf()));
            vec![Finding { severity, code: "unreadable", message: error.to_string(), remedy, place }]
        };
        let resolved = paths::workflow_path(&path.to_string_lossy()).map_err(|error| refuse(&error))?;
        let base_dir = resolved.parent().map_or_else(|| PathBuf::from("/"), Path::to_path_buf);
        let bytes = read_limited(&resolved).map_err(|message| {
            vec![Finding {
                severity: Severity::Error,
                code: "unreadable",
                message,
                remedy: None,
                place: start(Some(path.to_path_buf())),
            }]
        })?;
        Self::from_bytes(&bytes, Some(path.to_path_buf()), &base_dir)
    }

    /// A document from text that is in no file; relative paths inside it start from `base_dir`.
    pub fn from_text(text: &str, base_dir: &Path) -> Result<Self, Vec<Finding>> {
        Self::from_bytes(text.as_bytes(), None, base_dir)
    }

    /// A document from bytes; `file` is what findings name.
    pub fn from_bytes(bytes: &[u8], file: Option<PathBuf>, base_dir: &Path) -> Result<Self, Vec<Finding>> {
        let single = |finding: Finding| vec![finding];
        if bytes.len() as u64 > MAX_WORKFLOW_BYTES {
            let message = InputError::TooLarge(bytes.len() as u64).to_string();
            return Err(single(broken("too-large", message, None, start(file))));
        }
        let text = std::str::from_utf8(bytes).map_err(|error| {
            let (line, column) = scan::line_column_of_bytes(&bytes[..error.valid_up_to()]);
            let place = Place { file: file.clone(), line, column, pointer: String::new() };
            single(broken("encoding", "the text is not UTF-8".into(), Some("save the file as UTF-8"), place))
        })?;
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let value = serde_json::from_str(&with_finite_numbers(text))
            .map_err(|error| single(syntax_finding(text, &error, file.clone())))?;
        let base_dir = std::path::absolute(base_dir).unwrap_or_else(|_| base_dir.to_path_buf());
        let sha256 = Sha256::digest(bytes).iter().fold(String::new(), |hex, byte| hex + &format!("{byte:02x}"));
        let mut document = Self { text: text.to_owned(), value, file, base_dir, sha256, warnings: Vec::new() };
        let reserved = document.check_keys();
        if reserved.is_empty() { Ok(document) } else { Err(reserved) }
    }

    /// Where the value at a JSON pointer stands, or the nearest part around it that the text has.
    pub fn place(&self, pointer: &str) -> Place {
        self.place_of(pointer, false)
    }

    /// Where the key of the object member at a JSON pointer stands.
    pub fn key_place(&self, pointer: &str) -> Place {
        self.place_of(pointer, true)
    }

    /// An error about the value at a pointer.
    pub fn error(&self, code: &'static str, pointer: &str, message: impl Into<String>) -> Finding {
        broken(code, message.into(), None, self.place(pointer))
    }

    /// A warning about the value at a pointer.
    pub fn warning(&self, code: &'static str, pointer: &str, message: impl Into<String>) -> Finding {
        Finding { severity: Severity::Warning, ..self.error(code, pointer, message) }
    }

    fn place_of(&self, pointer: &str, key: bool) -> Place {
        let offset = scan::locate(&self.text, pointer, key);
        let (line, column) = scan::line_column(&self.text, offset);
        Place { file: self.file.clone(), line, column, pointer: pointer.to_owned() }
    }

    /// Notes repeated keys as warnings and returns the reserved keys as errors.
    fn check_keys(&mut self) -> Vec<Finding> {
        let mut reserved = Vec::new();
        let mut warnings = Vec::new();
        scan::visit_keys(&self.text, &mut |key| {
            if reserved.len() + warnings.len() >= MOST_KEY_FINDINGS {
                return;
            }
            let place = || {
                let (line, column) = scan::line_column(&self.text, key.offset);
                Place { file: self.file.clone(), line, column, pointer: key.pointer.to_owned() }
            };
            if key.name == HANDLE_KEY {
                let message = format!("`{HANDLE_KEY}` is a key that dw keeps for itself");
                reserved.push(broken("reserved-key", message, Some("rename the key"), place()));
            }
            if key.repeated {
                let message = format!("the key `{}` stands here more than once; the last one counts", key.name);
                let finding = broken("duplicate-key", message, Some("remove one of them"), place());
                warnings.push(Finding { severity: Severity::Warning, ..finding });
            }
        });
        self.warnings = warnings;
        reserved
    }
}

/// What to do about a path that was refused, when there is something to do.
pub(crate) fn input_remedy(error: &InputError) -> Option<&'static str> {
    match error {
        InputError::PathMissing(_) => Some("check the spelling and the folder it is relative to"),
        InputError::PathPattern(_) => Some("write the path without it, absolute if need be"),
        InputError::Extension { what: "File", .. } => Some("workflow files end in `.json`"),
        InputError::Extension { .. } => Some("convert the file to one of the formats dw reads"),
        InputError::Component(_) => Some("use a plain name without `/`, `\\` and `..`"),
        _ => None,
    }
}

fn read_limited(path: &Path) -> Result<Vec<u8>, String> {
    let file = fs_err::File::open(path).map_err(|error| error.to_string())?;
    let metadata = file.metadata().map_err(|error| error.to_string())?;
    if metadata.is_dir() {
        return Err(format!("`{}` is a folder, not a workflow file", path.display()));
    }
    if metadata.len() > MAX_WORKFLOW_BYTES {
        return Err(InputError::TooLarge(metadata.len()).to_string());
    }
    let mut bytes = Vec::new();
    file.take(MAX_WORKFLOW_BYTES + 1).read_to_end(&mut bytes).map_err(|error| error.to_string())?;
    Ok(bytes)
}

fn start(file: Option<PathBuf>) -> Place {
    Place { file, line: 1, column: 1, pointer: String::new() }
}

fn broken(code: &'static str, message: String, remedy: Option<&str>, place: Place) -> Finding {
    Finding { severity: Severity::Error, code, message, remedy: remedy.map(str::to_owned), place }
}

/// Turns the parser's complaint into a finding with a place in characters and a plain message.
fn syntax_finding(text: &str, error: &serde_json::Error, file: Option<PathBuf>) -> Finding {
    let offset = scan::offset_of(text, error.line(), error.column());
    let (line, column) = scan::line_column(text, offset);
    let place = Place { file, line, column, pointer: String::new() };
    let raw = error.to_string();
    let raw = raw.split(" at line ").next().unwrap_or_default();
    let (message, remedy) = if text.trim().is_empty() {
        ("the document is empty".to_owned(), None)
    } else if error.is_eof() {
        ("the JSON ends too early".to_owned(), Some("close what is still open, or get the whole file"))
    } else if raw.contains("recursion limit") {
        ("the JSON is nested too deeply (more than 127 levels)".to_owned(), None)
    } else {
        (format!("this is not JSON: {raw}"), syntax_remedy(text, offset))
    };
    broken("syntax", message, remedy, place)
}

fn syntax_remedy(text: &str, offset: usize) -> Option<&'static str> {
    let rest = &text[offset..];
    let before = text[..offset].trim_end();
    match rest.chars().next()? {
        '/' | '#' => Some("JSON has no comments"),
        '\'' => Some("JSON texts stand in double quotes"),
        'N' if rest.starts_with("NaN") => Some("JSON has no NaN"),
        'T' | 'F' | 'N' => Some("JSON writes `true`, `false` and `null` in lower case"),
        '}' | ']' if before.ends_with(',') => Some("remove the comma before it"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(text: &str) -> Result<Document, Vec<Finding>> {
        Document::from_text(text, Path::new("/tmp"))
    }

    fn finding(text: &str) -> Finding {
        let mut findings = parse(text).expect_err(text);
        assert_eq!(findings.len(), 1, "{text}");
        findings.remove(0)
    }

    #[test]
    fn places_are_lines_and_columns_of_values_and_keys() {
        let document = parse("{\n  \"ä\": {\"a/b\": [1,\n   \"x\"]},\n \"k\":true}").expect("valid");
        let spot = |place: Place| (place.line, place.column);
        assert_eq!(spot(document.place("")), (1, 1));
        assert_eq!(spot(document.place("/ä")), (2, 8));
        assert_eq!(spot(document.key_place("/ä/a~1b")), (2, 9));
        assert_eq!(spot(document.place("/ä/a~1b/1")), (3, 4));
        assert_eq!(spot(document.place("/k")), (4, 6));
        assert_eq!(spot(document.place("/ä/a~1b/7/none")), (2, 16), "falls back to what is there");
        assert_eq!(document.place("/k/none").pointer, "/k/none");
    }

    #[test]
    fn broken_json_is_one_finding_with_its_place() {
        let cases = [
            ("", 1, 1, "empty"),
            ("{\"id\": \"w\", \"steps\": [{\"name\"", 1, 29, "ends too early"),
            ("{\n \"a\": 1,\n}", 3, 1, "trailing comma"),
            ("{\"é\": 'x'}", 1, 7, "expected value"),
            ("{} {}", 1, 4, "trailing characters"),
            ("[1, NaN]", 1, 5, "not JSON"),
        ];
        for (text, line, column, part) in cases {
            let found = finding(text);
            assert_eq!((found.place.line, found.place.column), (line, column), "{text}: {found}");
            assert!(found.message.contains(part), "{found}");
            assert_eq!(found.code, "syntax");
        }
    }

    #[test]
    fn infinities_of_python_are_read_as_the_largest_numbers_without_moving_places() {
        let document =
            parse("{\"low\": -Infinity, \"high\":Infinity, \"text\": \"a Infinity \\\" -Infinity\", \"é\": 1}");
        let document = document.expect("valid");
        assert_eq!(document.value["low"], json!(-1.79e308));
        assert_eq!(document.value["high"], json!(1.79e308));
        assert_eq!(document.value["text"], "a Infinity \" -Infinity");
        assert_eq!((document.place("/é").column, document.text.contains("-Infinity")), (77, true));
    }

    #[test]
    fn deep_nesting_is_refused() {
        let found = finding(&"[".repeat(100_000));
        assert!(found.message.contains("nested too deeply"), "{found}");
    }

    #[test]
    fn bytes_that_are_not_utf8_are_located() {
        let found = Document::from_bytes(b"{\"a\":\n \"\xff\"}", None, Path::new("/tmp")).expect_err("not UTF-8");
        assert_eq!((found[0].code, found[0].place.line, found[0].place.column), ("encoding", 2, 3));
    }

    #[test]
    fn repeated_keys_are_warnings_and_the_last_counts() {
        let document = parse("{\"a\": 1, \"b\": {\"a\": 2}, \"a\": 3}").expect("valid");
        assert_eq!(document.value, json!({"a": 3, "b": {"a": 2}}));
        assert_eq!(document.warnings.len(), 1);
        assert_eq!((document.warnings[0].place.column, document.warnings[0].severity), (25, Severity::Warning));
        assert_eq!(document.place("/a").column, 30);
    }

    #[test]
    fn the_reserved_key_is_an_error_even_when_escaped() {
        assert_eq!(finding("{\"x\": [{\"$artifact\": 1}]}").code, "reserved-key");
        assert_eq!(finding("{\"x\": [{\"\\u0024artifact\": 1}]}").place.pointer, "/x/0/$artifact");
    }

    #[test]
    fn the_hash_is_over_the_bytes_and_a_byte_order_mark_is_skipped() {
        let document = parse("\u{feff}{}").expect("valid");
        assert_eq!(document.value, json!({}));
        assert_eq!(
            parse("{}").expect("valid").sha256,
            "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
        );
        assert_ne!(document.sha256, parse("{}").expect("valid").sha256);
    }

    #[test]
    fn a_file_over_the_limit_is_refused_before_it_is_read() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("big.json");
        fs_err::File::create(&path).expect("a file").set_len(MAX_WORKFLOW_BYTES + 1).expect("sparse");
        let found = Document::load(&path).expect_err("too large");
        assert!(found[0].message.starts_with("JSON file too large"), "{}", found[0]);
    }

    #[test]
    fn loading_checks_the_path() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        fs_err::write(folder.path().join("wf.yaml"), "{}").expect("a file");
        fs_err::create_dir(folder.path().join("dir.json")).expect("a folder");
        fs_err::write(folder.path().join("wf.json"), "{\"id\": 1}").expect("a file");
        let message = |name: &str| Document::load(&folder.path().join(name)).expect_err(name)[0].message.clone();
        assert!(message("absent.json").starts_with("Path does not exist"));
        assert!(message("wf.yaml").starts_with("File extension not allowed: .yaml"));
        assert!(message("dir.json").contains("is a folder"));
        let document = Document::load(&folder.path().join("wf.json")).expect("a document");
        assert!(document.base_dir.is_absolute() && document.file.is_some());
    }
}
