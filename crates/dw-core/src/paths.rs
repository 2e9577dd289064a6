//! Limits of the format and the rules for paths, URLs, names and texts that come from outside.
//!
//! Checks only; reading files is left to [`crate::document`], the writers and the engine.

use std::path::{Path, PathBuf};

/// Longest path text, in characters.
pub const MAX_PATH_LENGTH: usize = 4096;
/// Longest file name, in characters.
pub const MAX_FILE_NAME_LENGTH: usize = 255;
/// Largest workflow file, in bytes.
pub const MAX_WORKFLOW_BYTES: u64 = 50 * 1024 * 1024;
/// Most steps of a workflow.
pub const MAX_STEPS: usize = 10_000;
/// Longest variable name, in characters.
pub const MAX_VARIABLE_NAME_LENGTH: usize = 100;
/// Longest text given to a variable, in characters.
pub const MAX_VARIABLE_VALUE_LENGTH: usize = 10_000;
/// Longest name after `constant:`, in characters.
pub const MAX_CONSTANT_NAME_LENGTH: usize = 200;
/// Longest text where no other limit applies, in characters.
pub const MAX_STRING_LENGTH: usize = 1000;
/// Longest id, step name or `file_base_name`, in characters.
pub const MAX_BASE_NAME_LENGTH: usize = 200;

/// Extensions of workflow files.
pub const WORKFLOW_EXTENSIONS: &[&str] = &[".json"];
/// Extensions of pictures.
pub const IMAGE_EXTENSIONS: &[&str] = &[".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp"];
/// Extensions of videos.
pub const VIDEO_EXTENSIONS: &[&str] = &[".mp4", ".avi", ".mkv", ".mov", ".webm"];

/// The family an [`InputError`] belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InputErrorKind {
    /// Not usable as what it is meant for.
    InvalidInput,
    /// Reaches for a place it must not reach.
    PathTraversal,
    /// Refused for another reason of safety.
    Refused,
}

/// Why a path, URL, name or text from outside is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InputError {
    /// An empty path.
    #[error("Path cannot be empty")]
    PathEmpty,
    /// A path longer than [`MAX_PATH_LENGTH`].
    #[error("Path too long: {0} > {MAX_PATH_LENGTH}")]
    PathTooLong(usize),
    /// A path with a NUL in it.
    #[error("Path contains null bytes")]
    PathNul,
    /// A path with `..`, `~/`, or below `/dev`, `/proc` or `/sys`.
    #[error("Path contains dangerous pattern matching `{0}`")]
    PathPattern(&'static str),
    /// A path outside the folder it has to stay in.
    #[error("Path outside allowed directory: {}", .0.display())]
    PathOutside(PathBuf),
    /// A file name longer than [`MAX_FILE_NAME_LENGTH`].
    #[error("Filename too long: {0} > {MAX_FILE_NAME_LENGTH}")]
    FileNameTooLong(usize),
    /// Nothing there.
    #[error("Path does not exist: {}", .0.display())]
    PathMissing(PathBuf),
    /// A path that cannot be made absolute.
    #[error("Path cannot be resolved: {}", .0.display())]
    PathUnresolved(PathBuf),
    /// An extension that is not among the allowed ones.
    #[error("{what} extension not allowed: {found}")]
    Extension {
        /// `File`, `Image file` or `Video file`.
        what: &'static str,
        /// The extension with its dot; empty when there is none.
        found: String,
    },
    /// A workflow larger than [`MAX_WORKFLOW_BYTES`].
    #[error("JSON file too large: {0} bytes > {MAX_WORKFLOW_BYTES} bytes")]
    TooLarge(u64),
    /// An empty URL.
    #[error("URL cannot be empty")]
    UrlEmpty,
    /// A URL that is neither `http` nor `https`.
    #[error("Invalid URL: URL scheme not allowed: {0}")]
    UrlScheme(String),
    /// A URL without a host.
    #[error("Invalid URL: URL must have a valid domain")]
    UrlHost,
    /// An empty variable name.
    #[error("Variable name cannot be empty")]
    VariableNameEmpty,
    /// A variable name with a character that names do not have.
    #[error("Invalid variable name: {0}")]
    VariableName(String),
    /// A variable name longer than [`MAX_VARIABLE_NAME_LENGTH`].
    #[error("Variable name too long: {0} > {MAX_VARIABLE_NAME_LENGTH}")]
    VariableNameTooLong(usize),
    /// An empty text where one is needed.
    #[error("String cannot be empty")]
    StringEmpty,
    /// A text over its limit.
    #[error("String too long: {length} > {limit}")]
    StringTooLong {
        /// Characters in the text.
        length: usize,
        /// Characters allowed.
        limit: usize,
    },
    /// A control character other than tab, line feed and carriage return.
    #[error("String contains invalid characters")]
    StringControl,
    /// A part of a file name that would leave its folder.
    #[error("Path component contains invalid characters: {0}")]
    Component(String),
    /// A built-in workflow whose name is no plain `NAME.json`.
    #[error("Invalid builtin workflow name: {0}")]
    BuiltinName(String),
    /// `constant:` with nothing behind it.
    #[error("Constant name cannot be empty")]
    ConstantEmpty,
    /// A constant that is no dotted name.
    #[error("Invalid constant name: {0}")]
    Constant(String),
    /// A constant name longer than [`MAX_CONSTANT_NAME_LENGTH`].
    #[error("Constant name too long: {0} > {MAX_CONSTANT_NAME_LENGTH}")]
    ConstantTooLong(usize),
}

impl InputError {
    /// The family of this error.
    pub fn kind(&self) -> InputErrorKind {
        match self {
            Self::PathPattern(_) | Self::PathOutside(_) => InputErrorKind::PathTraversal,
            Self::Extension { .. } => InputErrorKind::Refused,
            _ => InputErrorKind::InvalidInput,
        }
    }
}

/// Whether a checked path has to be there already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existence {
    /// It must exist.
    Required,
    /// It may be created later.
    Optional,
}

/// Checks the text of a path, then returns it absolute with symbolic links resolved.
///
/// `base` is a folder the result must not leave. `..` is refused anywhere, as are `~/` and everything
/// below `/dev`, `/proc` and `/sys`, also when a symbolic link leads there.
pub fn validate_path(text: &str, base: Option<&Path>, existence: Existence) -> Result<PathBuf, InputError> {
    check_path_text(text)?;
    let path = std::path::absolute(text).map_err(|_| InputError::PathUnresolved(text.into()))?;
    check_absolute(&path, base, existence)
}

/// Checks a path written in a document: relative ones start from `base_dir`, absolute ones are allowed.
pub fn resolve_path(text: &str, base_dir: &Path, existence: Existence) -> Result<PathBuf, InputError> {
    check_path_text(text)?;
    let path = std::path::absolute(base_dir.join(text)).map_err(|_| InputError::PathUnresolved(text.into()))?;
    check_absolute(&path, None, existence)
}

/// Checks the path of a workflow file, which must exist and end in `.json`.
pub fn workflow_path(text: &str) -> Result<PathBuf, InputError> {
    let path = validate_path(text, None, Existence::Required)?;
    check_extension(&path, WORKFLOW_EXTENSIONS, "File")?;
    Ok(path)
}

fn check_path_text(text: &str) -> Result<(), InputError> {
    if text.is_empty() {
        return Err(InputError::PathEmpty);
    }
    let length = text.chars().count();
    if length > MAX_PATH_LENGTH {
        return Err(InputError::PathTooLong(length));
    }
    if text.contains('\0') {
        return Err(InputError::PathNul);
    }
    check_patterns(text)
}

fn check_patterns(text: &str) -> Result<(), InputError> {
    let text = text.replace('\\', "/").to_ascii_lowercase();
    if text.contains("..") {
        return Err(InputError::PathPattern(".."));
    }
    if text.contains("~/") {
        return Err(InputError::PathPattern("~/"));
    }
    match ["/dev/", "/proc/", "/sys/"].iter().find(|root| text.starts_with(**root)) {
        Some(root) => Err(InputError::PathPattern(root)),
        None => Ok(()),
    }
}

fn check_absolute(path: &Path, base: Option<&Path>, existence: Existence) -> Result<PathBuf, InputError> {
    let resolved = resolve_links(path);
    check_patterns(&resolved.to_string_lossy())?;
    if let Some(base) = base {
        let base = std::path::absolute(base).map_err(|_| InputError::PathUnresolved(base.into()))?;
        if !resolved.starts_with(resolve_links(&base)) {
            return Err(InputError::PathOutside(resolved));
        }
    }
    let length = resolved.file_name().map_or(0, |name| name.to_string_lossy().chars().count());
    if length > MAX_FILE_NAME_LENGTH {
        return Err(InputError::FileNameTooLong(length));
    }
    if existence == Existence::Required && !resolved.exists() {
        return Err(InputError::PathMissing(resolved));
    }
    Ok(resolved)
}

/// The path with the links of its longest existing part resolved.
fn resolve_links(path: &Path) -> PathBuf {
    if let Ok(resolved) = fs_err::canonicalize(path) {
        return resolved;
    }
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) => resolve_links(parent).join(name),
        _ => path.to_path_buf(),
    }
}

/// Checks the last extension of a path, whatever its case. `what` opens the message (`Image file`).
pub fn check_extension(path: &Path, allowed: &[&str], what: &'static str) -> Result<(), InputError> {
    let found = path.extension().map_or(String::new(), |extension| format!(".{}", extension.to_string_lossy()));
    let found = found.to_lowercase();
    if allowed.contains(&found.as_str()) { Ok(()) } else { Err(InputError::Extension { what, found }) }
}

/// Whether a text is meant as a URL that can be fetched.
pub fn is_url(text: &str) -> bool {
    let text = text.to_ascii_lowercase();
    text.starts_with("http://") || text.starts_with("https://")
}

/// Checks the form of a URL: `http` or `https`, and a host.
pub fn check_url(text: &str) -> Result<(), InputError> {
    if text.is_empty() {
        return Err(InputError::UrlEmpty);
    }
    let (scheme, rest) = text.split_once(':').unwrap_or(("", text));
    if !["http", "https"].contains(&scheme.to_ascii_lowercase().as_str()) {
        return Err(InputError::UrlScheme(scheme.to_owned()));
    }
    let authority = rest.strip_prefix("//").unwrap_or("").split(['/', '?', '#']).next().unwrap_or("");
    let host = authority.rsplit('@').next().unwrap_or("");
    if host.is_empty() || host.starts_with(':') || host.chars().any(|c| c.is_whitespace() || c.is_control()) {
        return Err(InputError::UrlHost);
    }
    Ok(())
}

/// Checks the name of a variable that an override names.
pub fn check_variable_name(name: &str) -> Result<(), InputError> {
    let length = name.chars().count();
    if name.is_empty() {
        return Err(InputError::VariableNameEmpty);
    }
    if length > MAX_VARIABLE_NAME_LENGTH {
        return Err(InputError::VariableNameTooLong(length));
    }
    let first = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
    if first && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-') {
        Ok(())
    } else {
        Err(InputError::VariableName(name.to_owned()))
    }
}

/// Checks a text that an override gives to a variable; it may be empty.
pub fn check_variable_text(text: &str) -> Result<(), InputError> {
    if text.is_empty() { Ok(()) } else { check_string(text, MAX_VARIABLE_VALUE_LENGTH) }
}

/// Checks a text: not empty, at most `limit` characters, no control characters but tab and line ends.
pub fn check_string(text: &str, limit: usize) -> Result<(), InputError> {
    if text.is_empty() {
        return Err(InputError::StringEmpty);
    }
    let length = text.chars().count();
    if length > limit {
        return Err(InputError::StringTooLong { length, limit });
    }
    if text.chars().any(|c| c < ' ' && !matches!(c, '\t' | '\n' | '\r')) {
        return Err(InputError::StringControl);
    }
    Ok(())
}

/// Checks a part of output file names: a workflow id, a step name, a `file_base_name`.
///
/// It may be empty. It has no separators, no `..` and no control characters, so that a file named
/// with it stays in the output folder.
pub fn check_base_name(text: &str) -> Result<(), InputError> {
    let length = text.chars().count();
    if length > MAX_BASE_NAME_LENGTH {
        return Err(InputError::StringTooLong { length, limit: MAX_BASE_NAME_LENGTH });
    }
    if text.chars().any(char::is_control) {
        return Err(InputError::StringControl);
    }
    if text.contains(['/', '\\']) || text == "." || text == ".." {
        return Err(InputError::Component(text.to_owned()));
    }
    Ok(())
}

/// Checks what follows `builtin:` in the path of a sub-workflow.
pub fn check_builtin_workflow_name(name: &str) -> Result<(), InputError> {
    let plain = Path::new(name).extension().is_some_and(|extension| extension == "json");
    if plain && !name.contains(['/', '\\']) { Ok(()) } else { Err(InputError::BuiltinName(name.to_owned())) }
}

/// Checks what follows `constant:`.
pub fn check_constant_name(name: &str) -> Result<(), InputError> {
    let length = name.chars().count();
    if name.is_empty() {
        return Err(InputError::ConstantEmpty);
    }
    if length > MAX_CONSTANT_NAME_LENGTH {
        return Err(InputError::ConstantTooLong(length));
    }
    let identifier = |part: &str| {
        part.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
    };
    if name.split('.').all(identifier) { Ok(()) } else { Err(InputError::Constant(name.to_owned())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind<T: std::fmt::Debug>(result: Result<T, InputError>) -> Option<InputErrorKind> {
        result.err().map(|error| error.kind())
    }

    #[test]
    fn unusable_paths_are_invalid_input() {
        let long_name = "a".repeat(256);
        for text in ["", "a\0b", &"a/".repeat(2049), &long_name] {
            assert_eq!(
                kind(validate_path(text, None, Existence::Optional)),
                Some(InputErrorKind::InvalidInput),
                "{:?}",
                &text[..text.len().min(20)]
            );
        }
    }

    #[test]
    fn paths_that_reach_elsewhere_are_traversal() {
        let texts = [
            "../../../etc/passwd",
            "/tmp/sub/../ok.json",
            "..\\..\\windows",
            "a..b.json",
            "/dev/random",
            "/proc/self/environ",
            "/sys/kernel/debug",
            "/PROC/self/environ",
            "~/secrets",
        ];
        for text in texts {
            let found = kind(validate_path(text, None, Existence::Optional));
            assert_eq!(found, Some(InputErrorKind::PathTraversal), "{text}");
        }
    }

    #[test]
    fn a_base_folder_is_not_left() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let base = folder.path().join("base");
        let evil = folder.path().join("base-evil");
        fs_err::create_dir_all(&base).expect("base");
        fs_err::create_dir_all(&evil).expect("sibling");
        let check = |path: &Path| validate_path(&path.to_string_lossy(), Some(&base), Existence::Optional);
        assert_eq!(kind(check(Path::new("/etc/passwd"))), Some(InputErrorKind::PathTraversal));
        assert_eq!(kind(check(&evil.join("f.json"))), Some(InputErrorKind::PathTraversal));
        assert!(check(&base).is_ok());
        assert!(check(&base.join("new/file.json")).is_ok());
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_link_into_proc_is_traversal() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let link = folder.path().join("link.json");
        std::os::unix::fs::symlink("/proc/self/environ", &link).expect("a link");
        let found = kind(validate_path(&link.to_string_lossy(), None, Existence::Required));
        assert_eq!(found, Some(InputErrorKind::PathTraversal));
    }

    #[test]
    fn a_missing_path_is_refused_only_when_it_must_exist() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let text = folder.path().join("absent.json").to_string_lossy().into_owned();
        let error = validate_path(&text, None, Existence::Required).expect_err("missing");
        assert!(error.to_string().starts_with("Path does not exist: /"), "{error}");
        assert!(validate_path(&text, None, Existence::Optional).is_ok());
    }

    #[test]
    fn only_the_last_extension_counts() {
        let ok = |path: &str, allowed| check_extension(Path::new(path), allowed, "File").is_ok();
        assert!(ok("photo.PNG", &[".png"]));
        assert!(!ok("payload.exe", &[".png"]));
        assert!(!ok("README", &[".png"]));
        assert!(!ok("workflow.json.sh", WORKFLOW_EXTENSIONS));
        let error = check_extension(Path::new("a.yaml"), WORKFLOW_EXTENSIONS, "File").expect_err("not a workflow");
        assert_eq!(error.to_string(), "File extension not allowed: .yaml");
    }

    #[test]
    fn urls_need_http_and_a_host() {
        for url in ["https://example.com/a.jpg", "http://localhost:8080/api"] {
            assert_eq!(check_url(url), Ok(()), "{url}");
        }
        for url in
            ["", "ftp://h/a", "file:///a", "javascript:alert(1)", "data:,x", "not-a-url", "https://", "http://:80/"]
        {
            assert_eq!(kind(check_url(url)), Some(InputErrorKind::InvalidInput), "{url}");
        }
    }

    #[test]
    fn variable_names_are_identifiers_with_hyphens() {
        for name in ["prompt", "num_images_per_prompt", "_private", "my-variable"] {
            assert_eq!(check_variable_name(name), Ok(()), "{name}");
        }
        let long = "a".repeat(101);
        for name in ["123invalid", "invalid-name!", "my.var", "var name", "$var", "", &long] {
            assert!(check_variable_name(name).is_err(), "{name}");
        }
    }

    #[test]
    fn texts_have_a_length_and_no_control_characters() {
        let long = "a".repeat(1001);
        for text in [&long, "a\0", "\u{1}", ""] {
            assert!(check_string(text, MAX_STRING_LENGTH).is_err());
        }
        assert_eq!(check_string("tab\tand\nline", MAX_STRING_LENGTH), Ok(()));
        assert_eq!(check_variable_text(""), Ok(()));
        assert!(check_variable_text(&"a".repeat(10_001)).is_err());
    }

    #[test]
    fn base_names_cannot_leave_the_output_folder() {
        for name in ["wf", "v1.0", "a..b", ""] {
            assert_eq!(check_base_name(name), Ok(()), "{name}");
        }
        let long = "a".repeat(201);
        for name in ["../x", "a/b", "a\\b", "..", "a\nb", &long] {
            assert!(check_base_name(name).is_err(), "{name}");
        }
    }

    #[test]
    fn builtin_names_and_constants_are_plain_names() {
        assert_eq!(check_builtin_workflow_name("test.json"), Ok(()));
        for name in ["../x.json", "x.txt", "a/b.json", ".json"] {
            assert!(check_builtin_workflow_name(name).is_err(), "{name}");
        }
        assert_eq!(check_constant_name("diffusers.pipelines.ltx2.utils.VALUES"), Ok(()));
        assert_eq!(check_constant_name("").map_err(|e| e.to_string()), Err("Constant name cannot be empty".into()));
        for name in ["../../etc/passwd", "__import__('os')", "os.system()", "a..b"] {
            assert!(check_constant_name(name).expect_err(name).to_string().starts_with("Invalid constant name"));
        }
        assert!(check_constant_name(&"a".repeat(201)).expect_err("too long").to_string().contains("too long"));
    }
}
