//! `dw worker`: this program as the worker of another process: of itself over a socket, of a host program over
//! standard input and output.

use std::{
    io::{self, BufRead},
    sync::Arc,
    time::Duration,
};

use dw_engine::{
    Engine,
    host::{self, HostOptions, Say},
    worker::{self, WorkerOptions},
};

use crate::{
    args::WorkerArgs,
    error::{CliError, Exit},
    logging,
    render::text::print,
    session::Session,
};

/// The longest line that a secret is read from.
const LONGEST_SECRET: u64 = 1024;

/// How long a run that does not stop may outlive the process that it was for.
const ORPHAN_LIMIT: Duration = Duration::from_secs(10);

/// Runs `dw worker`.
pub(super) fn worker(args: &WorkerArgs, session: &Session) -> Result<Exit, CliError> {
    match &args.connect {
        Some(name) => connected(name),
        None => stdio(args, session),
    }
}

/// Works for a host program that writes to standard input and reads standard output.
fn stdio(args: &WorkerArgs, session: &Session) -> Result<Exit, CliError> {
    let device = session.device(args.device.as_ref())?;
    let config = session.engine_config(device.as_ref(), args.offline, args.ignore_fit);
    let budget = args.cache_budget.map(|megabytes| megabytes.saturating_mul(1_000_000));
    let engine = Engine::with_budget(config, budget).map_err(|error| CliError::Failed(error.to_string()))?;
    let options = HostOptions { output_dir: args.output_dir.clone(), set_log_level: logging::set_level };
    // A line is written whole or not at all, so that two threads do not mix theirs.
    let say: Say = Arc::new(|line: &str| print(&format!("{line}\n")).is_ok());
    host::serve_lines(io::BufReader::new(io::stdin()), say, engine, options).map_err(CliError::Failed)?;
    Ok(Exit::Done)
}

/// Works for a dw that listens on a local socket. The device and everything else comes over the connection.
fn connected(name: &str) -> Result<Exit, CliError> {
    let secret = read_secret(io::stdin().lock())
        .map_err(|error| CliError::Failed(format!("cannot read the secret from standard input: {error}")))?;
    let options = WorkerOptions { set_log_level: &logging::set_level, exit_after: Some(ORPHAN_LIMIT) };
    worker::serve(name, secret, &options).map_err(|error| CliError::Failed(error.to_string()))?;
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
