//! The line of a document that a finding points at, with a mark below the place.

use std::{collections::HashMap, path::PathBuf};

use console::measure_text_width;
use dw_core::finding::Place;
use fs_err as fs;

/// Characters of a line that are shown; documents may be one line of megabytes.
const WINDOW: usize = 100;
/// Characters shown before the place when the line is longer than the window.
const LEAD: usize = 40;

/// The texts of documents, read when first asked for.
#[derive(Default)]
pub(crate) struct Sources {
    texts: HashMap<Option<PathBuf>, Option<String>>,
}

/// A line and the mark below it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Excerpt {
    /// The line, or the part of it around the place, without control characters.
    pub(super) line: String,
    /// Blanks and `^` that stand below the place.
    pub(super) mark: String,
}

impl Sources {
    /// Sources that know the text of standard input.
    pub(crate) fn with_stdin(text: Option<String>) -> Self {
        Self { texts: HashMap::from([(None, text)]) }
    }

    /// The line at a place; none where the text cannot be had.
    pub(super) fn excerpt(&mut self, place: &Place) -> Option<Excerpt> {
        let text = self
            .texts
            .entry(place.file.clone())
            .or_insert_with(|| fs::read_to_string(place.file.as_ref()?).ok())
            .as_deref()?;
        let line = text.lines().nth(place.line.checked_sub(1)?)?;
        (!line.trim().is_empty()).then(|| excerpt(line, place.column.saturating_sub(1)))
    }
}

/// Cuts the window around `column` (in characters, from 0) out of a line.
fn excerpt(line: &str, column: usize) -> Excerpt {
    let length = token_length(line.chars().skip(column));
    let short = line.chars().nth(WINDOW).is_none();
    let start = if short { 0 } else { column.saturating_sub(LEAD) };
    let shown: String = line.chars().skip(start).take(WINDOW).map(visible).collect();
    let (before, after) = (start > 0, line.chars().nth(start + WINDOW).is_some());
    let lead: String = shown.chars().take(column - start.min(column)).collect();
    let token: String = shown.chars().skip(column - start.min(column)).take(length).collect();
    let dots = |there| if there { "…" } else { "" };
    let blanks = measure_text_width(&lead) + usize::from(before);
    Excerpt {
        line: format!("{}{shown}{}", dots(before), dots(after)),
        mark: format!("{}{}", " ".repeat(blanks), "^".repeat(measure_text_width(&token).max(1))),
    }
}

/// A character that takes the place of one on the terminal: tabs become blanks, other control characters a sign.
fn visible(c: char) -> char {
    match c {
        '\t' => ' ',
        c if c.is_control() => '\u{fffd}',
        c => c,
    }
}

/// Characters of the JSON string, number or word that begins here; 1 for a bracket and anything else.
fn token_length(mut rest: impl Iterator<Item = char>) -> usize {
    match rest.next() {
        Some('"') => {
            let mut escaped = false;
            let inside = rest.take_while(|c| {
                let inside = escaped || *c != '"';
                escaped = *c == '\\' && !escaped;
                inside
            });
            inside.count() + 2
        }
        Some(c) if word(c) => 1 + rest.take_while(|c| word(*c)).count(),
        _ => 1,
    }
}

fn word(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '-' | '+' | '.')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn marked(line: &str, column: usize) -> (String, String) {
        let excerpt = excerpt(line, column);
        (excerpt.line, excerpt.mark)
    }

    #[test]
    fn the_whole_token_is_marked() {
        assert_eq!(marked(r#"{"a": "x\"y", "b": 12}"#, 6).1, "      ^^^^^^");
        assert_eq!(marked(r#"{"a": -1.5e3}"#, 6).1, "      ^^^^^^");
        assert_eq!(marked("  {", 2).1, "  ^");
    }

    #[test]
    fn wide_characters_and_tabs_keep_the_mark_in_place() {
        assert_eq!(marked("\t\"猫\": 1", 6), (" \"猫\": 1".into(), "       ^".into()));
    }

    #[test]
    fn of_a_huge_line_only_the_neighbourhood_is_shown() {
        let line = format!("[{}12{}]", "0,".repeat(5000), ",0".repeat(5000));
        let (shown, mark) = marked(&line, 10_001);
        assert_eq!(shown.chars().count(), WINDOW + 2);
        let place = mark.chars().take_while(|c| *c == ' ').count();
        assert_eq!(shown.chars().skip(place).take(2).collect::<String>(), "12");
        assert_eq!(mark.trim(), "^^");
    }

    #[test]
    fn a_column_past_the_end_is_marked_after_the_line() {
        assert_eq!(marked("{", 5), ("{".into(), " ^".into()));
    }

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        assert_eq!(marked("\"\u{1b}[2J\"", 0).0, "\"\u{fffd}[2J\"");
    }
}
