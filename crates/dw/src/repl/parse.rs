//! From a line to words, as a shell does it: white space separates, quotes hold together. The same
//! split serves the commands and the completion, which also wants to know where a word begins.
//!
//! One thing is milder than in a shell: a backslash protects white space, quotes and backslashes only
//! and is a plain character before anything else, so that Windows paths and `\(` in prompts stay.

/// A word of a line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Word {
    /// What it says, without its quotes.
    pub(super) text: String,
    /// Where it begins in the line, in bytes; at the quote, when it begins with one.
    pub(super) start: usize,
    /// Whether any part of it was quoted.
    pub(super) quoted: bool,
}

impl Word {
    /// Whether it is the question mark that asks for help.
    pub(super) fn asks(&self) -> bool {
        self.text == "?" && !self.quoted
    }
}

/// A line in words.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Split {
    /// The words, in order.
    pub(super) words: Vec<Word>,
    /// The quote that is open at the end of the line.
    pub(super) open: Option<char>,
    /// Whether the last word reaches the end of the line, so that more could be typed to it.
    pub(super) unfinished: bool,
}

/// Splits a line, whatever is wrong with it.
pub(super) fn split(line: &str) -> Split {
    let mut split = Split::default();
    let mut current: Option<Word> = None;
    let mut letters = line.char_indices().peekable();
    while let Some((at, letter)) = letters.next() {
        if split.open.is_none() && letter.is_whitespace() {
            split.words.extend(current.take());
            continue;
        }
        let word = current.get_or_insert(Word { text: String::new(), start: at, quoted: false });
        match (letter, split.open) {
            ('\'' | '"', None) => {
                split.open = Some(letter);
                word.quoted = true;
            }
            (_, Some(quote)) if letter == quote => split.open = None,
            ('\\', None | Some('"')) => {
                let protected = letters.next_if(|(_, next)| is_protected(*next, split.open));
                word.text.push(protected.map_or('\\', |(_, next)| next));
            }
            _ => word.text.push(letter),
        }
    }
    split.unfinished = current.is_some();
    split.words.extend(current);
    split
}

/// Whether a backslash before this character means the character itself.
fn is_protected(letter: char, quote: Option<char>) -> bool {
    match quote {
        Some(quote) => letter == quote || letter == '\\',
        None => letter.is_whitespace() || matches!(letter, '\'' | '"' | '\\'),
    }
}

/// A text as one word of a line; quoted only where it has to be.
pub(super) fn quote(text: &str) -> String {
    let special = |letter: char| letter.is_whitespace() || matches!(letter, '\'' | '"' | '\\');
    if !text.is_empty() && text != "?" && !text.starts_with('#') && !text.contains(special) {
        return text.to_owned();
    }
    format!("\"{}\"", escape(text))
}

/// A text as it stands between double quotes.
pub(super) fn escape(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(line: &str) -> Vec<String> {
        split(line).words.into_iter().map(|word| word.text).collect()
    }

    #[test]
    fn quotes_hold_a_word_together_and_are_not_part_of_it() {
        let cases: [(&str, &[&str]); 12] = [
            ("", &[]),
            ("   ", &[]),
            ("workflow  load\tx.json ", &["workflow", "load", "x.json"]),
            (r#"arg set prompt="a red boat" steps=4"#, &["arg", "set", "prompt=a red boat", "steps=4"]),
            ("prompt='it says \"hi\"'", &["prompt=it says \"hi\""]),
            (r#""a \"b\" \\ c""#, &[r#"a "b" \ c"#]),
            (r"a\ b", &["a b"]),
            (r"C:\pictures\new", &[r"C:\pictures\new"]),
            (r#""(sea:1.2) \(calm\)""#, &[r"(sea:1.2) \(calm\)"]),
            (r"'\'", &[r"\"]),
            (r#"empty="" ''"#, &["empty=", ""]),
            ("ünïcode='ß ö'", &["ünïcode=ß ö"]),
        ];
        for (line, words) in cases {
            assert_eq!(texts(line), words, "{line}");
            assert_eq!(split(line).open, None, "{line}");
        }
    }

    #[test]
    fn an_open_quote_is_noticed_and_the_rest_belongs_to_it() {
        let split = split("load \"my file");
        assert_eq!((split.open, split.unfinished), (Some('"'), true));
        let last = split.words.last().expect("a word");
        assert_eq!((last.text.as_str(), last.start, last.quoted), ("my file", 5, true));
    }

    #[test]
    fn a_line_that_ends_in_white_space_awaits_a_new_word() {
        assert!(!split("workflow ").unfinished);
        assert!(split("workflow").unfinished);
    }

    #[test]
    fn only_a_bare_question_mark_asks() {
        let asks = |line: &str| split(line).words.last().is_some_and(Word::asks);
        assert!(asks("arg ?"));
        assert!(!asks("arg '?'") && !asks("arg set a=?"));
    }

    #[test]
    fn what_is_quoted_comes_back_the_same() {
        for text in ["", "plain", "two words", "it's", "say \"hi\"", r"a\b", "?", "#1", " "] {
            assert_eq!(texts(&quote(text)), [text], "{}", quote(text));
        }
        assert_eq!(quote("plain.json"), "plain.json");
    }
}
