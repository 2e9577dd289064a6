//! `dw worker`: this program as the worker of another process, usually of itself.

use std::{
    io::{self, BufRead},
    time::Duration,
};

use dw_engine::worker::{self, WorkerOptions};

use crate::{
    args::WorkerArgs,
    error::{CliError, Exit},
    logging,
};

/// The longest line that a secret is read from.
const LONGEST_SECRET: u64 = 1024;

/// How long a run that does not stop may outlive the process that it was for.
const ORPHAN_LIMIT: Duration = Duration::from_secs(10);

/// Runs `dw worker`. The device and everything else comes over the connection.
pub(super) fn worker(args: &WorkerArgs) -> Result<Exit, CliError> {
    let secret = read_secret(io::stdin().lock())
        .map_err(|error| CliError::Failed(format!("cannot read the secret from standard input: {error}")))?;
    let options = WorkerOptions { set_log_level: &logging::set_level, exit_after: Some(ORPHAN_LIMIT) };
    worker::serve(&args.connect, secret, &options).map_err(|error| CliError::Failed(error.to_string()))?;
    Ok(Exit::Done)
}

/// The first line.
fn read_secret(input: impl BufRead) -> io::Result<String> {
    let mut line = String::new();
    input.take(LONGEST_SECRET).read_line(&mut line)?;
    Ok(line.trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_one_line_and_never_endless() {
        assert_eq!(read_secret("abc\r\ndef\n".as_bytes()).expect("text"), "abc");
        assert_eq!(read_secret("x".repeat(5000).as_bytes()).expect("text").len() as u64, LONGEST_SECRET);
    }
}
