//! Ctrl-C: the first asks the run to stop at its next chance, the second ends the program.

use std::{process, sync::Arc};

use dw_core::cancel::CancellationToken;

use crate::{
    error::{CliError, Exit},
    render::Reporter,
};

/// Lets Ctrl-C (and a request to terminate) raise the token. To be called once in the life of the program.
pub(crate) fn cancels(token: &CancellationToken, reporter: &Arc<Reporter>) -> Result<(), CliError> {
    let (token, reporter) = (token.clone(), Arc::clone(reporter));
    listen(move || {
        if token.is_cancelled() {
            process::exit(Exit::Cancelled as i32);
        }
        token.cancel();
        reporter.say("Stopping after the current step; press Ctrl-C again to stop at once.");
    })
}

/// Calls something on Ctrl-C (and on a request to terminate). To be called once in the life of the program.
pub(crate) fn listen(act: impl FnMut() + Send + 'static) -> Result<(), CliError> {
    ctrlc::set_handler(act).map_err(|error| CliError::Failed(format!("cannot listen for Ctrl-C: {error}")))
}
