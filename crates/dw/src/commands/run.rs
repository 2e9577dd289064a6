//! `dw run`: a workflow from its file to its pictures.

use std::{fmt::Write, path::Path, sync::Arc};

use dw_core::{cancel::CancellationToken, finding::Finding};
use dw_engine::{Engine, EngineError, PlannedRun, Preview, RunRequest, Source};
use fs_err as fs;

use crate::{
    args::{OutputArgs, RunArgs},
    error::{CliError, Exit},
    interrupt,
    render::{
        Line, Reporter,
        findings::{self, Sources, Stream},
        memory, summary,
        table::Table,
        text::{bytes, count, print, say, seed},
    },
    request,
    session::Session,
};

/// Runs `dw run`.
pub(super) fn run(args: &RunArgs, session: &Session) -> Result<Exit, CliError> {
    reported(args.output.json, || {
        let request = RunRequest {
            variables: request::variables(&args.variables)?,
            source: request::source(&args.file)?,
            seed: args.compute.seed.clone(),
            output_dir: args.output.output_dir.clone(),
            metadata: !args.output.no_metadata,
        };
        let name = args.file.display().to_string();
        let mut engine = session.engine(&args.compute)?;
        let planned = plan(&engine, request, &name, args.output.json)?;
        if args.dry_run {
            return dry_run(&engine, &planned, args.output.json);
        }
        execute(&mut engine, &planned, &name, &args.output, session)
    })
}

/// Does something whose failure programs are told about as well, when they read standard output.
pub(super) fn reported(json: bool, work: impl FnOnce() -> Result<Exit, CliError>) -> Result<Exit, CliError> {
    let result = work();
    if let (Err(error), true) = (&result, json) {
        let message = error.message().unwrap_or_else(|| error.to_string());
        Line::RunFailed { message, exit_code: error.exit() as u8, findings: error.findings() }.print();
    }
    result
}

/// Checks a request before anything is loaded or written. `name` is the workflow as the user knows it.
pub(super) fn plan(engine: &Engine, request: RunRequest, name: &str, json: bool) -> Result<PlannedRun, CliError> {
    let source = request.source.clone();
    let planned = engine.plan(request).map_err(|found| invalid(name, found, &source, json))?;
    show(&planned.plan.warnings, &source);
    Ok(planned)
}

/// Runs a checked request, with everything that people and programs see of it.
pub(super) fn execute(
    engine: &mut Engine,
    planned: &PlannedRun,
    name: &str,
    output: &OutputArgs,
    session: &Session,
) -> Result<Exit, CliError> {
    create_output_dir(&planned.request.output_dir, session)?;
    let cancel = CancellationToken::default();
    let reporter = Arc::new(Reporter::new(output.json, session));
    interrupt::cancels(&cancel, &reporter)?;
    let result = engine.run(planned, &*reporter, &cancel);
    let record = reporter.finish();
    let talk = |text: String| {
        if !session.quiet && !output.json {
            say(&text);
        }
    };
    match result {
        Ok(done) => {
            talk(summary::finished(&done.workflow, done.seconds, &record, "--seed"));
            if output.json {
                Line::RunFinished(&done).print();
            }
            Ok(Exit::Done)
        }
        Err(EngineError::Cancelled) => {
            talk(summary::cancelled(&record));
            Err(CliError::Cancelled)
        }
        Err(EngineError::Invalid(found)) => Err(invalid(name, found, &planned.request.source, output.json)),
        Err(source) => Err(CliError::Run { file: name.into(), source }),
    }
}

/// Shows what is wrong (unless programs are to read it) and makes the error that ends the command.
pub(super) fn invalid(name: &str, found: Vec<Finding>, source: &Source, json: bool) -> CliError {
    if !json {
        show(&found, source);
    }
    CliError::Invalid { file: name.into(), reason: findings::tally(&found), findings: found }
}

fn show(found: &[Finding], source: &Source) {
    let stdin = match source {
        Source::Text { text, .. } => Some(text.clone()),
        Source::File(_) => None,
    };
    let mut sources = Sources::with_stdin(stdin);
    for finding in found {
        say(findings::human(finding, &mut sources, Stream::Err).trim_end());
    }
}

fn create_output_dir(folder: &Path, session: &Session) -> Result<(), CliError> {
    if folder.is_dir() {
        return Ok(());
    }
    if folder.exists() {
        let message =
            format!("Output path exists but is not a directory: {}; choose another with `-o DIR`", folder.display());
        return Err(CliError::Failed(message));
    }
    fs::create_dir_all(folder)
        .map_err(|error| CliError::Failed(format!("cannot create the output folder: {error}")))?;
    let shown = std::path::absolute(folder).unwrap_or_else(|_| folder.to_owned());
    if !session.quiet {
        say(&format!("Created output directory: {}", shown.display()));
    }
    Ok(())
}

/// Shows what a run would do.
fn dry_run(engine: &Engine, planned: &PlannedRun, json: bool) -> Result<Exit, CliError> {
    let preview = engine.preview(planned);
    if json {
        Line::Preview(&preview).print();
    } else {
        print(&describe(&preview, &planned.request.output_dir))?;
    }
    let problem = preview.steps.iter().find_map(|step| Some((&step.step, step.problem.as_ref()?)));
    match problem {
        None => Ok(Exit::Done),
        Some((step, problem)) => Err(CliError::Failed(format!("step `{step}` cannot run: {problem}"))),
    }
}

fn describe(preview: &Preview, output_dir: &Path) -> String {
    let seed = preview.seed.as_ref().map_or_else(|| "drawn at random".into(), seed);
    let mut text = format!("Workflow {}, {}, seed {seed}\n", preview.workflow, count(preview.steps.len(), "step"));
    for (index, step) in preview.steps.iter().enumerate() {
        let times = match step.iterations {
            Some(1) => String::new(),
            Some(number) => format!(", {number} times"),
            None => ", once for each earlier result".into(),
        };
        let _ = writeln!(text, "\n[{}/{}] {}: {}{times}", index + 1, preview.steps.len(), step.step, step.action);
        let mut table = Table::plain(2);
        for model in &step.models {
            let size = model.bytes.map_or_else(|| "size not known yet".into(), bytes);
            table.row(["  load".into(), format!("{} ({size})", model.name)]);
        }
        for file in &step.files {
            table.row(["  write".into(), output_dir.join(file).display().to_string()]);
        }
        text += &table.render();
        text += &step.fit.as_ref().map_or(String::new(), memory::table);
    }
    text += "\nNothing was loaded, run or written.\n";
    text
}
