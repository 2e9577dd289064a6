//! Where lines come from: a person at a terminal, with editing, history and completion, or a script.

use std::{
    borrow::Cow,
    io::{self, BufRead, IsTerminal},
    path::PathBuf,
};

use console::style;
use rustyline::{
    Context, Editor, Helper,
    completion::{Completer, Pair},
    error::ReadlineError,
    highlight::Highlighter,
    hint::{Hint, Hinter},
    history::{DefaultHistory, SearchDirection},
    validate::Validator,
};

use super::{
    complete::{self, Known},
    history,
};

/// What came of waiting for a line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Input {
    /// A line, without its end.
    Line(String),
    /// Ctrl-C in place of a line.
    Interrupted,
    /// There are no more lines.
    End,
}

/// A place that lines come from.
pub(super) trait Lines {
    /// The next command.
    fn command(&mut self, prompt: &str, known: Known) -> io::Result<Input>;
    /// The next line, as an answer to a question; it is not kept.
    fn answer(&mut self, question: &str) -> io::Result<Input>;
    /// Whether a person types them.
    fn is_terminal(&self) -> bool;
}

/// The terminal, when there is a person at both ends of it; else standard input as a script.
pub(super) fn source() -> Result<(Box<dyn Lines>, Vec<String>), ReadlineError> {
    if io::stdin().is_terminal() && io::stdout().is_terminal() {
        let (terminal, warnings) = Terminal::new()?;
        Ok((Box::new(terminal), warnings))
    } else {
        Ok((Box::new(Script { input: io::stdin().lock(), number: 0 }), Vec::new()))
    }
}

/// Commands from a file or a pipe, one a line.
pub(super) struct Script<R> {
    /// Where they come from.
    pub(super) input: R,
    /// The number of the last line.
    pub(super) number: usize,
}

impl<R: BufRead> Lines for Script<R> {
    fn command(&mut self, _: &str, _: Known) -> io::Result<Input> {
        let mut bytes = Vec::new();
        self.number += 1;
        if self.input.read_until(b'\n', &mut bytes)? == 0 {
            return Ok(Input::End);
        }
        let line = String::from_utf8(bytes).map_err(|_| {
            io::Error::new(io::ErrorKind::InvalidData, format!("line {} is not UTF-8 text", self.number))
        })?;
        Ok(Input::Line(line.trim_end_matches(['\n', '\r']).to_owned()))
    }

    fn answer(&mut self, question: &str) -> io::Result<Input> {
        self.command(question, Known::default())
    }

    fn is_terminal(&self) -> bool {
        false
    }
}

/// A person.
struct Terminal {
    commands: Editor<Assistant, DefaultHistory>,
    /// Another editor, so that answers are neither kept nor completed.
    answers: Editor<(), DefaultHistory>,
    history_file: Option<PathBuf>,
}

impl Terminal {
    fn new() -> Result<(Self, Vec<String>), ReadlineError> {
        let config = rustyline::Config::builder()
            .max_history_size(history::MOST_LINES)?
            .history_ignore_dups(true)?
            .history_ignore_space(true)
            .completion_type(rustyline::CompletionType::List)
            .build();
        let mut commands = Editor::with_config(config)?;
        commands.set_helper(Some(Assistant::default()));
        let answers = Editor::new()?;
        let mut terminal = Self { commands, answers, history_file: history::file() };
        let warnings = terminal.load_history().err().map(|error| format!("the history is not kept: {error}"));
        if warnings.is_some() {
            terminal.history_file = None;
        }
        Ok((terminal, warnings.into_iter().collect()))
    }

    fn load_history(&mut self) -> Result<(), ReadlineError> {
        let Some(file) = &self.history_file else { return Ok(()) };
        if let Some(folder) = file.parent() {
            fs_err::create_dir_all(folder)?;
        }
        if file.exists() {
            return self.commands.load_history(file);
        }
        for line in history::lines_of_old(file) {
            self.commands.add_history_entry(line)?;
        }
        self.commands.save_history(file)
    }

    /// Keeps a line at once, so that nothing is lost however the program ends.
    fn keep(&mut self, line: &str) {
        let kept = self.commands.add_history_entry(line).and_then(|new| match &self.history_file {
            Some(file) if new => self.commands.append_history(file),
            _ => Ok(()),
        });
        if let Err(error) = kept {
            tracing::warn!("the history is not kept: {error}");
        }
    }
}

impl Lines for Terminal {
    fn command(&mut self, prompt: &str, known: Known) -> io::Result<Input> {
        if let Some(assistant) = self.commands.helper_mut() {
            assistant.known = known;
        }
        let input = input(self.commands.readline(prompt))?;
        if let Input::Line(line) = &input
            && !line.trim().is_empty()
        {
            self.keep(line);
        }
        Ok(input)
    }

    fn answer(&mut self, question: &str) -> io::Result<Input> {
        input(self.answers.readline(question))
    }

    fn is_terminal(&self) -> bool {
        true
    }
}

fn input(read: rustyline::Result<String>) -> io::Result<Input> {
    match read {
        Ok(line) => Ok(Input::Line(line)),
        Err(ReadlineError::Interrupted) => Ok(Input::Interrupted),
        Err(ReadlineError::Eof) => Ok(Input::End),
        Err(ReadlineError::Io(error)) => Err(error),
        Err(error) => Err(io::Error::other(error)),
    }
}

/// What helps while a command is typed.
#[derive(Default)]
struct Assistant {
    known: Known,
}

/// Grey text behind the cursor.
struct Suggestion {
    text: String,
    /// Whether the right arrow takes it over.
    usable: bool,
}

impl Hint for Suggestion {
    fn display(&self) -> &str {
        &self.text
    }

    fn completion(&self) -> Option<&str> {
        self.usable.then_some(self.text.as_str())
    }
}

impl Completer for Assistant {
    type Candidate = Pair;

    fn complete(&self, line: &str, pos: usize, _: &Context<'_>) -> rustyline::Result<(usize, Vec<Pair>)> {
        let (start, found) = complete::candidates(line, pos, &self.known);
        let pair = |found: complete::Candidate| Pair { display: found.display, replacement: found.replacement };
        Ok((start, found.into_iter().map(pair).collect()))
    }
}

impl Hinter for Assistant {
    type Hint = Suggestion;

    /// The latest line that began like this, else what the command takes.
    fn hint(&self, line: &str, pos: usize, context: &Context<'_>) -> Option<Suggestion> {
        if line.trim().is_empty() || pos < line.len() {
            return None;
        }
        let latest =
            context.history().len().checked_sub(1).and_then(|latest| {
                context.history().starts_with(line, latest, SearchDirection::Reverse).ok().flatten()
            });
        match latest.and_then(|found| Some(found.entry.get(pos..)?.to_owned())) {
            Some(rest) if !rest.is_empty() => Some(Suggestion { text: rest, usable: true }),
            _ => complete::usage_hint(line).map(|usage| Suggestion { text: usage.to_owned(), usable: false }),
        }
    }
}

impl Highlighter for Assistant {
    fn highlight_hint<'h>(&self, hint: &'h str) -> Cow<'h, str> {
        Cow::Owned(style(hint).dim().to_string())
    }

    fn highlight_prompt<'b, 's: 'b, 'p: 'b>(&'s self, prompt: &'p str, _: bool) -> Cow<'b, str> {
        Cow::Owned(style(prompt).bold().to_string())
    }
}

impl Validator for Assistant {}

impl Helper for Assistant {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_script_ends_with_its_last_line_and_knows_the_number_of_a_bad_one() {
        let mut script = Script { input: &b"help\r\n\nexit"[..], number: 0 };
        let mut next = || script.command("dw> ", Known::default()).expect("readable");
        assert_eq!(next(), Input::Line("help".into()));
        assert_eq!(next(), Input::Line(String::new()));
        assert_eq!(next(), Input::Line("exit".into()));
        assert_eq!((next(), next()), (Input::End, Input::End));
        let mut script = Script { input: &b"help\n\xff\n"[..], number: 0 };
        assert!(script.command("", Known::default()).is_ok());
        let error = script.command("", Known::default()).expect_err("not text").to_string();
        assert_eq!(error, "line 2 is not UTF-8 text");
    }
}
