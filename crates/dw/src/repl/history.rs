//! Where the lines that were typed are kept, and how those of diffusers-workflow come along.

use std::path::{Path, PathBuf};

use etcetera::BaseStrategy;
use fs_err as fs;

/// Most lines that are kept.
pub(super) const MOST_LINES: usize = 5000;

/// The file that keeps the lines; none where no folder for it is known.
pub(super) fn file() -> Option<PathBuf> {
    etcetera::choose_base_strategy().ok().map(|folders| folders.data_dir().join("dw/history"))
}

/// Lines typed in diffusers-workflow, when this program has no history of its own yet.
pub(super) fn lines_of_old(own: &Path) -> Vec<String> {
    let Ok(home) = etcetera::home_dir() else { return Vec::new() };
    if own.exists() {
        return Vec::new();
    }
    fs::read(home.join(".dw_history")).map(|bytes| imported(&String::from_utf8_lossy(&bytes))).unwrap_or_default()
}

/// The lines of a history of readline, or of libedit, which macOS has in its place.
fn imported(text: &str) -> Vec<String> {
    let mut lines = text.lines().map(str::trim_end).filter(|line| !line.is_empty()).peekable();
    let edited = lines.next_if_eq(&"_HiStOrY_V2_").is_some();
    lines.map(|line| if edited { without_octals(line) } else { line.to_owned() }).collect()
}

/// Text in which libedit wrote white space and backslashes as `\040`.
fn without_octals(line: &str) -> String {
    let mut parts = line.split('\\');
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let code = part.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok()).filter(u8::is_ascii);
        if let Some(code) = code {
            text.push(char::from(code));
            text.push_str(&part[3..]);
        } else {
            text.push('\\');
            text.push_str(part);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_of_old_histories_are_read() {
        assert_eq!(imported("workflow load x\n\narg set prompt=a b\n"), ["workflow load x", "arg set prompt=a b"]);
        let edited = "_HiStOrY_V2_\nworkflow\\040load\\040x\na\\134b \\q ü\\040\n";
        assert_eq!(imported(edited), ["workflow load x", "a\\b \\q ü "]);
    }
}
