//! What a command has to say: answers go to standard output, everything else to standard error.

use dw_core::finding::Finding;

use crate::{
    error::Exit,
    render::{
        findings::{self, Sources, Stream},
        text,
    },
};

/// A command that did what it should.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Reply {
    /// Lines for the person at the terminal.
    pub(super) notices: Vec<String>,
    /// What was asked for, with a line break at its end; empty for nothing.
    pub(super) answer: String,
    /// Whether this was the last command.
    pub(super) leave: bool,
}

impl Reply {
    /// An answer, a line or several.
    pub(super) fn answer(text: impl Into<String>) -> Self {
        let mut answer = text.into();
        if !answer.is_empty() && !answer.ends_with('\n') {
            answer.push('\n');
        }
        Self { answer, ..Self::default() }
    }

    /// Nothing to say.
    pub(super) fn silent() -> Self {
        Self::default()
    }

    /// The last command.
    pub(super) fn leave() -> Self {
        Self { answer: "Goodbye!\n".into(), leave: true, ..Self::default() }
    }

    /// With a warning before the answer.
    #[must_use]
    pub(super) fn warning(mut self, message: &str) -> Self {
        self.notices.push(text::warning(message));
        self
    }

    /// With what a check found.
    #[must_use]
    pub(super) fn findings(mut self, found: &[Finding]) -> Self {
        self.notices.extend(shown(found));
        self
    }

    /// Says it all.
    pub(super) fn say(&self) -> std::io::Result<()> {
        for notice in &self.notices {
            text::say(notice);
        }
        if self.answer.is_empty() { Ok(()) } else { text::print(&self.answer) }
    }
}

/// A command that did not do what it should.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Failure {
    /// Lines before the message: findings, what a process said last.
    pub(super) notices: Vec<String>,
    /// What happened and what to do.
    pub(super) message: String,
    /// The exit code of a script in which this is the first failure.
    pub(super) exit: Exit,
}

impl Failure {
    /// The command makes no sense.
    pub(super) fn usage(message: impl Into<String>) -> Self {
        Self { notices: Vec::new(), message: message.into(), exit: Exit::Usage }
    }

    /// Something did not work.
    pub(super) fn failed(message: impl Into<String>) -> Self {
        Self { notices: Vec::new(), message: message.into(), exit: Exit::Failed }
    }

    /// With what a check found before the message.
    #[must_use]
    pub(super) fn findings(mut self, found: &[Finding]) -> Self {
        self.notices.extend(shown(found));
        self
    }

    /// Says it.
    pub(super) fn say(&self) {
        tracing::error!("{}", self.message);
        for notice in &self.notices {
            text::say(notice);
        }
        if !self.message.is_empty() {
            text::error(&self.message);
        }
    }
}

fn shown(found: &[Finding]) -> Vec<String> {
    let mut sources = Sources::default();
    found.iter().map(|finding| findings::human(finding, &mut sources, Stream::Err).trim_end().to_owned()).collect()
}
