//! Why a command ended early, and the exit code that says so. Printed once, by `main`.

use std::{io, process::ExitCode};

use dw_core::finding::Finding;
use dw_engine::EngineError;

/// The exit codes of the program; a contract with scripts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// Everything asked for was done.
    Done = 0,
    /// The workflow failed, or a check found something wrong.
    Failed = 1,
    /// Wrong usage, or a workflow that cannot run.
    Usage = 2,
    /// Stopped by Ctrl-C, as shells count it (128 + SIGINT).
    Cancelled = 130,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// Why a command ended early.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CliError {
    /// The command line asks for something that makes no sense or does not exist.
    #[error("{0}")]
    Usage(String),
    /// The workflow cannot run; what is wrong has been printed already.
    #[error("Error validating workflow '{file}': {reason}")]
    Invalid {
        /// The file, as typed.
        file: String,
        /// How much is wrong.
        reason: String,
        /// What is wrong.
        findings: Vec<Finding>,
    },
    /// The workflow failed.
    #[error("Error running workflow '{file}'")]
    Run {
        /// The file, as typed.
        file: String,
        /// What happened.
        #[source]
        source: EngineError,
    },
    /// Somebody pressed Ctrl-C; that was said when it happened.
    #[error("cancelled")]
    Cancelled,
    /// Something else the command needs did not work.
    #[error("{0}")]
    Failed(String),
    /// Standard output could not be written.
    #[error("cannot write to standard output")]
    Output(#[from] io::Error),
}

impl CliError {
    /// The exit code that stands for it.
    pub(crate) fn exit(&self) -> Exit {
        match self {
            Self::Usage(_) | Self::Invalid { .. } => Exit::Usage,
            Self::Cancelled => Exit::Cancelled,
            // Whoever read our output has seen enough (`dw tasks | head`).
            Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe => Exit::Done,
            Self::Run { .. } | Self::Failed(_) | Self::Output(_) => Exit::Failed,
        }
    }

    /// What is wrong with the workflow, where that is the reason.
    pub(crate) fn findings(&self) -> &[Finding] {
        match self {
            Self::Invalid { findings, .. } => findings,
            _ => &[],
        }
    }

    /// The whole message, causes included; none where nothing is left to say.
    pub(crate) fn message(&self) -> Option<String> {
        match self {
            Self::Cancelled => None,
            Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe => None,
            Self::Invalid { .. } | Self::Run { .. } => Some(chain(self)),
            _ => Some(format!("Error: {}", chain(self))),
        }
    }
}

/// An error and its causes in one line; a cause that its parent already quotes is not said twice.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let reason = error.to_string();
        if !text.contains(&reason) {
            text = format!("{text}: {reason}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_run_names_the_file_and_the_cause_in_one_line() {
        let error = CliError::Run { file: "w.json".into(), source: EngineError::Setup("the disk is full".into()) };
        assert_eq!(error.message().as_deref(), Some("Error running workflow 'w.json': the disk is full"));
        assert_eq!(error.exit(), Exit::Failed);
    }

    #[test]
    fn a_reader_that_went_away_is_not_an_error() {
        let error = CliError::from(io::Error::from(io::ErrorKind::BrokenPipe));
        assert_eq!(error.message(), None);
        assert_eq!(error.exit(), Exit::Done);
    }
}
