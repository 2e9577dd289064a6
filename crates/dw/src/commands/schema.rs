//! `dw schema`: the JSON Schemas that dw publishes.

use dw_engine::host;

use crate::{
    args::{SchemaArgs, SchemaChoice},
    error::{CliError, Exit},
    render::text::print_json,
};

/// Prints a schema.
pub(super) fn schema(args: &SchemaArgs) -> Result<Exit, CliError> {
    match args.of {
        SchemaChoice::Workflow => print_json(&dw_core::workflow::schema())?,
        SchemaChoice::HostRequest => print_json(&host::request_schema())?,
        SchemaChoice::HostAnswer => print_json(&host::answer_schema())?,
    }
    Ok(Exit::Done)
}
