//! The syntax of weighted prompts: `(word)`, `(word:1.3)`, `[word]`, escapes and `BREAK`.
//!
//! Owns the way from text to weighted pieces (the syntax of AUTOMATIC1111's `parse_prompt_attention`).
//! What the weights do to embeddings is left to the pipelines.

use std::fmt;

/// What `(…)` multiplies the weight of its contents with.
const STRONGER: f64 = 1.1;
/// What `[…]` multiplies the weight of its contents with.
const WEAKER: f64 = 1.0 / 1.1;
/// The word that ends a chunk.
const BREAK: &str = "BREAK";

/// A part of a prompt whose words all weigh the same.
#[derive(Clone, Debug, PartialEq)]
pub struct Piece {
    /// The text without the syntax; `BREAK` for a break.
    pub text: String,
    /// What its embeddings are multiplied with; for a break -1, multiplied as the text around it.
    pub weight: f64,
    /// Whether the text after it starts a new chunk.
    pub is_break: bool,
}

/// A number behind a colon that is none, such as `1.2.3`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MalformedWeight {
    /// What stands in the number's place.
    pub text: String,
    /// Where it starts, in characters, from 1.
    pub position: usize,
}

impl fmt::Display for MalformedWeight {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { text, position } = self;
        write!(
            formatter,
            "has the weight `{text}` at character {position}, which is no number; write it like `(word:1.3)`, or \
             `\\(` and `\\)` for brackets that belong to the text"
        )
    }
}

impl std::error::Error for MalformedWeight {}

/// The pieces of a prompt, in order; one empty piece for a prompt without text.
///
/// Neighbours of exactly equal weight are one piece, but a break never merges with anything.
pub fn parse(prompt: &str) -> Result<Vec<Piece>, MalformedWeight> {
    let mut parser = Parser { characters: prompt.chars().collect(), ..Parser::default() };
    while let Some(&character) = parser.characters.get(parser.at) {
        parser.step(character)?;
    }
    Ok(parser.finish())
}

/// A weight in front of a closing bracket.
struct Weight {
    value: Result<f64, MalformedWeight>,
    /// Where the text goes on.
    end: usize,
}

#[derive(Default)]
struct Parser {
    characters: Vec<char>,
    at: usize,
    pieces: Vec<Piece>,
    /// For each open bracket the number of pieces before it.
    round: Vec<usize>,
    square: Vec<usize>,
}

impl Parser {
    fn step(&mut self, character: char) -> Result<(), MalformedWeight> {
        match character {
            '\\' => self.escape(),
            '(' => self.open(true),
            '[' => self.open(false),
            ')' => self.close(true),
            ']' => self.close(false),
            ':' => return self.colon(),
            _ => self.run(),
        }
        Ok(())
    }

    /// A backslash makes the character of the syntax behind it ordinary, and disappears.
    fn escape(&mut self) {
        if let Some(&next) = self.characters.get(self.at + 1).filter(|next| "()[]\\".contains(**next)) {
            self.push(&next.to_string(), 1.0, false);
            self.at += 1;
        }
        self.at += 1;
    }

    fn open(&mut self, is_round: bool) {
        let brackets = if is_round { &mut self.round } else { &mut self.square };
        brackets.push(self.pieces.len());
        self.at += 1;
    }

    fn close(&mut self, is_round: bool) {
        let (brackets, factor, text) =
            if is_round { (&mut self.round, STRONGER, ")") } else { (&mut self.square, WEAKER, "]") };
        match brackets.pop() {
            Some(start) => self.multiply(start, factor),
            None => self.push(text, 1.0, false),
        }
        self.at += 1;
    }

    /// A colon is text unless a weight and a bracket follow that closes an open one.
    fn colon(&mut self) -> Result<(), MalformedWeight> {
        if let Some(weight) = self.weight().filter(|_| !self.round.is_empty()) {
            let factor = weight.value?;
            if let Some(start) = self.round.pop() {
                self.multiply(start, factor);
            }
            self.at = weight.end;
            return Ok(());
        }
        self.push(":", 1.0, false);
        self.at += 1;
        Ok(())
    }

    /// The weight behind the colon at this place: blanks, a sign, digits and points, blanks, `)`.
    fn weight(&self) -> Option<Weight> {
        let blanks = |at: usize| at + self.characters[at..].iter().take_while(|c| c.is_whitespace()).count();
        let start = blanks(self.at + 1);
        let signed = start + usize::from(matches!(self.characters.get(start), Some('+' | '-')));
        let is_digit = |c: &&char| c.is_ascii_digit() || **c == '.';
        let end = signed + self.characters[signed..].iter().take_while(is_digit).count();
        let close = blanks(end);
        if end == signed || self.characters.get(close) != Some(&')') {
            return None;
        }
        let text: String = self.characters[start..end].iter().collect();
        let number = text.parse().ok().filter(|number: &f64| (*number as f32).is_finite());
        let value = number.ok_or(MalformedWeight { text, position: start + 1 });
        Some(Weight { value, end: close + 1 })
    }

    /// Text up to the next character of the syntax, cut at each `BREAK`.
    fn run(&mut self) {
        let rest = &self.characters[self.at..];
        let length = rest.iter().position(|c| "\\()[]:".contains(*c)).unwrap_or(rest.len());
        let text: String = rest[..length].iter().collect();
        self.at += length;
        for (index, part) in split_at_breaks(&text).into_iter().enumerate() {
            if index > 0 {
                self.push(BREAK, -1.0, true);
            }
            self.push(part, 1.0, false);
        }
    }

    fn push(&mut self, text: &str, weight: f64, is_break: bool) {
        if !text.is_empty() {
            self.pieces.push(Piece { text: text.to_owned(), weight, is_break });
        }
    }

    fn multiply(&mut self, start: usize, factor: f64) {
        for piece in &mut self.pieces[start..] {
            piece.weight *= factor;
        }
    }

    /// Closes what is open and merges neighbours.
    fn finish(mut self) -> Vec<Piece> {
        for start in std::mem::take(&mut self.round) {
            self.multiply(start, STRONGER);
        }
        for start in std::mem::take(&mut self.square) {
            self.multiply(start, WEAKER);
        }
        let mut merged: Vec<Piece> = Vec::with_capacity(self.pieces.len());
        for piece in self.pieces {
            match merged.last_mut() {
                Some(last) if last.weight == piece.weight && !last.is_break && !piece.is_break => {
                    last.text.push_str(&piece.text);
                }
                _ => merged.push(piece),
            }
        }
        if merged.is_empty() {
            merged.push(Piece { text: String::new(), weight: 1.0, is_break: false });
        }
        merged
    }
}

/// The text between the words `BREAK`, without the blanks around them.
fn split_at_breaks(text: &str) -> Vec<&str> {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let is_alone = |at: usize| {
        let (before, after) = (&text[..at], &text[at + BREAK.len()..]);
        !before.chars().next_back().is_some_and(is_word) && !after.chars().next().is_some_and(is_word)
    };
    let mut parts = Vec::new();
    let mut start = 0;
    for (at, _) in text.match_indices(BREAK).filter(|(at, _)| is_alone(*at)) {
        let part = &text[start..at];
        parts.push(if start == 0 { part.trim_end() } else { part.trim() });
        start = at + BREAK.len();
    }
    let part = &text[start..];
    parts.push(if start == 0 { part } else { part.trim_start() });
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pieces as text and weight; weights to six places.
    fn pieces(prompt: &str) -> Vec<(String, f64)> {
        let pieces = parse(prompt).expect("valid syntax");
        pieces.into_iter().map(|piece| (piece.text, (piece.weight * 1e6).round() / 1e6)).collect()
    }

    #[test]
    fn prompts_become_the_pieces_of_the_format() {
        let table: &[(&str, &[(&str, f64)])] = &[
            ("a cat", &[("a cat", 1.0)]),
            ("a (cat)", &[("a ", 1.0), ("cat", 1.1)]),
            ("a (cat:1.5)", &[("a ", 1.0), ("cat", 1.5)]),
            ("a ((cat))", &[("a ", 1.0), ("cat", 1.21)]),
            ("a [cat]", &[("a ", 1.0), ("cat", 0.909_091)]),
            ("a [[cat]]", &[("a ", 1.0), ("cat", 0.826_446)]),
            ("a \\(cat\\)", &[("a (cat)", 1.0)]),
            ("a (cat:-1.2)", &[("a ", 1.0), ("cat", -1.2)]),
            ("(a:+.5)", &[("a", 0.5)]),
            ("a [cat:1.5]", &[("a ", 1.0), ("cat:1.5", 0.909_091)]),
            ("a (cat:1.5) and (dog:0.5)", &[("a ", 1.0), ("cat", 1.5), (" and ", 1.0), ("dog", 0.5)]),
            ("", &[("", 1.0)]),
            ("()", &[("", 1.0)]),
            ("(:1.5)", &[("", 1.0)]),
            ("a (cat", &[("a ", 1.0), ("cat", 1.1)]),
            ("a [b", &[("a ", 1.0), ("b", 0.909_091)]),
            ("a cat)", &[("a cat)", 1.0)]),
            ("a ]b", &[("a ]b", 1.0)]),
            ("one BREAK two", &[("one", 1.0), ("BREAK", -1.0), ("two", 1.0)]),
            ("a BREAKFAST", &[("a BREAKFAST", 1.0)]),
            ("(((word:1.3)))", &[("word", 1.573)]),
            ("(a:1.2)(b:1.2)", &[("ab", 1.2)]),
            ("[a](b)", &[("a", 0.909_091), ("b", 1.1)]),
            ("(a:b)", &[("a:b", 1.1)]),
            ("(a: 1.5 )", &[("a", 1.5)]),
            ("(one BREAK two:1.5)", &[("one", 1.5), ("BREAK", -1.5), ("two", 1.5)]),
            ("((a) b:2)", &[("a", 2.2), (" b", 2.0)]),
            ("a (b [c] d:1.5)", &[("a ", 1.0), ("b ", 1.5), ("c", 1.363_636), (" d", 1.5)]),
            ("a\\b", &[("ab", 1.0)]),
            ("a:1.5)", &[("a:1.5)", 1.0)]),
            ("a:1.2.3)", &[("a:1.2.3)", 1.0)]),
            ("\\\\", &[("\\", 1.0)]),
            ("(a:1e5)", &[("a:1e5", 1.1)]),
            ("BREAK a", &[("BREAK", -1.0), ("a", 1.0)]),
            ("a BREAK BREAK b", &[("a", 1.0), ("BREAK", -1.0), ("BREAK", -1.0), ("b", 1.0)]),
            ("ünder (über:0.5)", &[("ünder ", 1.0), ("über", 0.5)]),
        ];
        for &(prompt, expected) in table {
            let expected: Vec<(String, f64)> = expected.iter().map(|&(text, weight)| (text.into(), weight)).collect();
            assert_eq!(pieces(prompt), expected, "{prompt}");
        }
    }

    #[test]
    fn a_malformed_weight_is_an_error_with_its_place() {
        for (prompt, text, position) in [("(a:1.2.3)", "1.2.3", 4), ("é (b: . )", ".", 7), ("(a:-..)", "-..", 4)] {
            let error = parse(prompt).expect_err("no number");
            assert_eq!(error, MalformedWeight { text: text.into(), position }, "{prompt}");
            assert!(error.to_string().contains(&format!("`{text}` at character {position}")), "{error}");
        }
        assert!(parse(&format!("(a:{})", "9".repeat(400))).is_err(), "infinite weights are refused");
    }
}
