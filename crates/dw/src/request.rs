//! From words to a request: which workflow, which variables.

use std::{
    ffi::OsString,
    io::{self, Read},
    path::{Path, PathBuf},
};

use dw_core::paths::{check_variable_name, check_variable_text};
use dw_engine::Source;
use serde_json::{Map, Value};

use crate::error::CliError;

/// Bytes of standard input that are read: one more than a workflow may have, so that the excess is noticed.
const STDIN_LIMIT: u64 = 50 * 1024 * 1024 + 1;

/// Whether a path stands for standard input.
pub(crate) fn is_stdin(path: &Path) -> bool {
    path.as_os_str() == "-"
}

/// The workflow that an argument names: a file, or `-`.
pub(crate) fn source(path: &Path) -> Result<Source, CliError> {
    if is_stdin(path) {
        return Ok(Source::Text { text: read_stdin()?, base_dir: PathBuf::from(".") });
    }
    check_file(path).map_err(CliError::Usage)?;
    Ok(Source::File(path.to_owned()))
}

/// Says what is wrong with a path that should be a file.
pub(crate) fn check_file(path: &Path) -> Result<(), String> {
    let shown = || std::path::absolute(path).unwrap_or_else(|_| path.to_owned()).display().to_string();
    match fs_err::metadata(path) {
        Ok(metadata) if metadata.is_dir() => Err(format!("`{}` is a folder; name a file in it", path.display())),
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(format!("Path does not exist: {}", shown())),
        Err(error) => Err(error.to_string()),
    }
}

fn read_stdin() -> Result<String, CliError> {
    let mut bytes = Vec::new();
    let read = io::stdin().lock().take(STDIN_LIMIT).read_to_end(&mut bytes);
    read.map_err(|error| CliError::Usage(format!("cannot read standard input: {error}")))?;
    String::from_utf8(bytes).map_err(|_| CliError::Usage("standard input is not UTF-8 text".into()))
}

/// Reads `name=value` words. The last one wins where a name comes twice.
pub(crate) fn variables(words: &[OsString]) -> Result<Map<String, Value>, CliError> {
    words.iter().map(variable).collect()
}

fn variable(word: &OsString) -> Result<(String, Value), CliError> {
    let lossy = word.to_string_lossy();
    let text = word.to_str().ok_or_else(|| CliError::Usage(format!("Variable '{lossy}' is not UTF-8 text")))?;
    let (name, value) = text
        .split_once('=')
        .ok_or_else(|| CliError::Usage(format!("Variable '{text}' is not in name=value format")))?;
    let (name, value) = (name.trim(), value.trim());
    let checked = check_variable_name(name).and_then(|()| check_variable_text(value));
    checked.map_err(|reason| CliError::Usage(format!("Invalid variable input: {reason}")))?;
    Ok((name.to_owned(), value.into()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(words: &[&str]) -> Result<Map<String, Value>, String> {
        variables(&words.iter().map(OsString::from).collect::<Vec<_>>()).map_err(|error| error.to_string())
    }

    #[test]
    fn a_variable_is_split_at_its_first_equals_sign_and_trimmed() {
        let read = read(&["p=a=b", " name = two words ", "empty=", "twice=1", "twice=2"]);
        assert_eq!(read.map(Value::Object), Ok(json!({"p": "a=b", "name": "two words", "empty": "", "twice": "2"})));
    }

    #[test]
    fn words_that_are_no_variables_are_refused_with_the_reason() {
        assert_eq!(read(&["prompt"]), Err("Variable 'prompt' is not in name=value format".into()));
        assert_eq!(read(&["bad;name=1"]), Err("Invalid variable input: Invalid variable name: bad;name".into()));
        assert_eq!(read(&["=1"]), Err("Invalid variable input: Variable name cannot be empty".into()));
    }
}
