//! `dw`: runs declarative diffusion workflows from the command line.
//!
//! The only crate that prints. It turns words into requests to `dw-engine`, events into progress, and
//! errors into one message and an exit code; it knows no model and no tensor.

mod args;
mod commands;
mod device;
mod error;
mod interrupt;
mod logging;
mod render;
mod repl;
mod request;
mod session;
mod settings;

use std::process::ExitCode;

use clap::Parser;

use crate::{args::Cli, error::CliError, error::Exit, session::Session};

fn main() -> ExitCode {
    let cli = Cli::parse();
    if cli.command.computes() {
        // SAFETY: the process has one thread yet.
        #[allow(unsafe_code)]
        unsafe {
            dw_engine::start_threads()
        };
        dw_engine::keep_freed_memory();
    }
    match run(cli) {
        Ok(exit) => exit.into(),
        Err(error) => {
            if let Some(message) = error.message() {
                tracing::error!("{message}");
                render::text::error(&message);
            }
            error.exit().into()
        }
    }
}

fn run(cli: Cli) -> Result<Exit, CliError> {
    let session = Session::start(&cli.common)?;
    commands::dispatch(cli.command, &session)
}
