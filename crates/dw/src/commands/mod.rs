//! One module for each command.

mod bench;
mod catalog;
mod completions;
mod doctor;
mod inspect;
mod quantize;
mod rerun;
mod run;
mod schema;
mod validate;

use dw_engine::Engine;

use crate::{
    args::Command,
    error::{CliError, Exit},
    session::Session,
};

/// Does what the command line asks for.
pub(crate) fn dispatch(command: Command, session: &Session) -> Result<Exit, CliError> {
    match command {
        Command::Run(args) => run::run(&args, session),
        Command::Validate(args) => validate::validate(&args),
        Command::Schema => schema::schema(),
        Command::Pipelines(args) => catalog::show(&args, &catalog::Kind::PIPELINES, &Engine::catalog().pipelines),
        Command::Schedulers(args) => catalog::show(&args, &catalog::Kind::SCHEDULERS, &Engine::catalog().schedulers),
        Command::Tasks(args) => catalog::show(&args, &catalog::Kind::TASKS, &Engine::catalog().tasks),
        Command::Doctor(args) => doctor::doctor(&args, session),
        Command::Quantize(args) => quantize::quantize(&args, session),
        Command::Inspect(args) => inspect::inspect(&args),
        Command::Rerun(args) => rerun::rerun(&args, session),
        Command::Bench(args) => bench::bench(&args, session),
        Command::Completions(args) => completions::completions(&args),
    }
}
