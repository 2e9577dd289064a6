//! `dw schema`: the JSON Schema of a workflow.

use crate::{
    error::{CliError, Exit},
    render::text::print_json,
};

/// Prints the schema.
pub(super) fn schema() -> Result<Exit, CliError> {
    print_json(&dw_core::workflow::schema())?;
    Ok(Exit::Done)
}
