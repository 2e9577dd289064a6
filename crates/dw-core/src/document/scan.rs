//! Finds places in JSON text that is known to parse: a walk that skips what it is not asked for.
//!
//! Nothing is indexed ahead, so a large document costs no memory for positions nobody asks about.

use std::{borrow::Cow, collections::HashSet};

/// A key met on the walk.
pub(super) struct Key<'a> {
    /// Byte offset of its opening quote.
    pub(super) offset: usize,
    /// JSON pointer of the member it names.
    pub(super) pointer: &'a str,
    /// The key itself, unescaped.
    pub(super) name: &'a str,
    /// Whether the same object had it before.
    pub(super) repeated: bool,
}

/// Byte offset of the value at `pointer` (or of its key), or of the nearest value around it.
pub(super) fn locate(text: &str, pointer: &str, key: bool) -> usize {
    let mut scanner = Scanner { text, at: 0 };
    scanner.space();
    let mut key_at = scanner.at;
    let mut value_at = scanner.at;
    for token in pointer.split('/').skip(1) {
        scanner.at = value_at;
        let Some(child) = scanner.child(&token.replace("~1", "/").replace("~0", "~")) else { return value_at };
        (key_at, value_at) = child;
    }
    if key { key_at } else { value_at }
}

/// Calls `visit` for every key of every object.
pub(super) fn visit_keys(text: &str, visit: &mut dyn FnMut(Key)) {
    let mut scanner = Scanner { text, at: 0 };
    scanner.space();
    scanner.keys(&mut String::new(), visit);
}

/// Line and column (in characters) of a byte offset, both from 1.
pub(super) fn line_column(text: &str, offset: usize) -> (usize, usize) {
    let mut offset = offset.min(text.len());
    while !text.is_char_boundary(offset) {
        offset -= 1;
    }
    let before = &text[..offset];
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
}

/// Line and column of the end of bytes that are the valid beginning of a text.
pub(super) fn line_column_of_bytes(valid: &[u8]) -> (usize, usize) {
    let text = String::from_utf8_lossy(valid);
    line_column(&text, text.len())
}

/// Byte offset of a line and a byte column, both from 1, as the parser reports them.
pub(super) fn offset_of(text: &str, line: usize, column: usize) -> usize {
    let line_start: usize = text.split_inclusive('\n').take(line.saturating_sub(1)).map(str::len).sum();
    let mut offset = (line_start + column.saturating_sub(1)).min(text.len());
    while !text.is_char_boundary(offset) {
        offset -= 1;
    }
    offset
}

/// The text with the `Infinity` and `-Infinity` that Python writes (scheduler configurations have them) as
/// numbers just below the largest, of the same length, so that places stay.
pub fn with_finite_numbers(text: &str) -> Cow<'_, str> {
    const INFINITY: &str = "Infinity";
    if !text.contains(INFINITY) {
        return Cow::Borrowed(text);
    }
    let mut scanner = Scanner { text, at: 0 };
    let mut finite = String::with_capacity(text.len());
    let mut copied = 0;
    while scanner.at < text.len() {
        if scanner.peek() == b'"' {
            scanner.string();
        } else if text.as_bytes()[scanner.at..].starts_with(INFINITY.as_bytes()) {
            finite.push_str(&text[copied..scanner.at]);
            finite.push_str("1.79e308");
            scanner.at += INFINITY.len();
            copied = scanner.at;
        } else {
            scanner.at += 1;
        }
    }
    finite.push_str(&text[copied..]);
    Cow::Owned(finite)
}

struct Scanner<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Scanner<'a> {
    fn peek(&self) -> u8 {
        self.text.as_bytes().get(self.at).copied().unwrap_or(0)
    }

    fn space(&mut self) {
        while matches!(self.peek(), b' ' | b'\t' | b'\n' | b'\r') {
            self.at += 1;
        }
    }

    /// Past white space, then past `byte` if it is next.
    fn eat(&mut self, byte: u8) -> bool {
        self.space();
        let found = self.peek() == byte;
        self.at += usize::from(found);
        found
    }

    /// Past a string; the slice with its quotes.
    fn string(&mut self) -> &'a str {
        let start = self.at;
        self.at += 1;
        while !matches!(self.peek(), b'"' | 0) {
            self.at += if self.peek() == b'\\' { 2 } else { 1 };
        }
        self.at = (self.at + 1).min(self.text.len());
        &self.text[start..self.at]
    }

    /// Past any value.
    fn skip(&mut self) {
        let mut depth = 0usize;
        loop {
            self.space();
            match self.peek() {
                b'"' => {
                    self.string();
                }
                b'{' | b'[' => {
                    depth += 1;
                    self.at += 1;
                }
                b'}' | b']' => {
                    depth = depth.saturating_sub(1);
                    self.at += 1;
                }
                b',' | b':' => self.at += 1,
                0 => return,
                _ => self.scalar(),
            }
            if depth == 0 {
                return;
            }
        }
    }

    fn scalar(&mut self) {
        while !matches!(self.peek(), b',' | b'}' | b']' | b' ' | b'\t' | b'\n' | b'\r' | 0) {
            self.at += 1;
        }
    }

    /// Offsets of the key (for arrays: the value) and the value of the child called `token`.
    fn child(&mut self, token: &str) -> Option<(usize, usize)> {
        match self.peek() {
            b'{' => self.member(token),
            b'[' => self.element(token.parse().ok()?),
            _ => None,
        }
    }

    fn member(&mut self, token: &str) -> Option<(usize, usize)> {
        self.at += 1;
        let mut found = None;
        while !self.eat(b'}') && self.at < self.text.len() {
            let key_at = self.at;
            let key = unquote(self.string());
            self.eat(b':');
            self.space();
            if key == token {
                found = Some((key_at, self.at));
            }
            self.skip();
            self.eat(b',');
        }
        found
    }

    fn element(&mut self, index: usize) -> Option<(usize, usize)> {
        self.at += 1;
        let mut position = 0;
        while !self.eat(b']') && self.at < self.text.len() {
            if position == index {
                return Some((self.at, self.at));
            }
            self.skip();
            self.eat(b',');
            position += 1;
        }
        None
    }

    /// Walks a value, calling `visit` for its keys. The parser's depth limit bounds the recursion.
    fn keys(&mut self, pointer: &mut String, visit: &mut dyn FnMut(Key)) {
        let length = pointer.len();
        match self.peek() {
            b'{' => {
                self.at += 1;
                let mut seen = HashSet::new();
                while !self.eat(b'}') && self.at < self.text.len() {
                    let offset = self.at;
                    let name = unquote(self.string());
                    push_token(pointer, &name);
                    let repeated = !seen.insert(name.clone());
                    visit(Key { offset, pointer, name: &name, repeated });
                    self.eat(b':');
                    self.space();
                    self.keys(pointer, visit);
                    pointer.truncate(length);
                    self.eat(b',');
                }
            }
            b'[' => {
                self.at += 1;
                let mut index = 0usize;
                while !self.eat(b']') && self.at < self.text.len() {
                    push_token(pointer, &index.to_string());
                    self.keys(pointer, visit);
                    pointer.truncate(length);
                    self.eat(b',');
                    index += 1;
                }
            }
            _ => self.skip(),
        }
    }
}

/// Appends one reference token to a JSON pointer.
pub(crate) fn push_token(pointer: &mut String, token: &str) {
    pointer.push('/');
    if token.contains(['~', '/']) {
        pointer.push_str(&token.replace('~', "~0").replace('/', "~1"));
    } else {
        pointer.push_str(token);
    }
}

/// The pointer of the child called `token`.
pub(crate) fn child_pointer(pointer: &str, token: &str) -> String {
    let mut child = pointer.to_owned();
    push_token(&mut child, token);
    child
}

fn unquote(quoted: &str) -> String {
    serde_json::from_str(quoted).unwrap_or_default()
}
