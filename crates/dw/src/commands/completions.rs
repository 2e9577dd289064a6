//! `dw completions`: a script that teaches a shell the commands and options.

use clap::CommandFactory;

use crate::{
    args::{Cli, CompletionsArgs},
    error::{CliError, Exit},
    render::text::print,
};

/// Prints the script.
pub(super) fn completions(args: &CompletionsArgs) -> Result<Exit, CliError> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "dw", &mut script);
    print(&String::from_utf8_lossy(&script))?;
    Ok(Exit::Done)
}
