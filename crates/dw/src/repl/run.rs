//! `workflow run` and `workflow run ask`: a run with everything that is seen of it.

use std::{
    io::Write,
    path::{Path, PathBuf},
    sync::Arc,
};

use dw_core::{document::Document, event::EventSink};
use dw_engine::worker::{CancelSwitch, Job, Update, WorkerError};
use fs_err as fs;

use crate::{
    error::Exit,
    logging::level_name,
    render::{Reporter, findings, record::Record, summary, text},
};

use super::{
    Repl, arguments,
    lines::Input,
    parse::Word,
    picture::{self, Protocol},
    reply::{Failure, Reply},
    state::{Loaded, check, is_error},
    workflow,
};

/// The file in the output folder that holds the latest look at an unfinished picture.
const PREVIEW_FILE: &str = "preview.png";

/// Most log lines of a dead worker that are shown; the log file has all.
const MOST_LAST_WORDS: usize = 6;

/// Most pictures of a run that are shown.
const MOST_SHOWN: usize = 4;

/// `workflow run ask`.
pub(super) fn ask(repl: &mut Repl<'_>, words: &[Word]) -> Result<Reply, Failure> {
    let loaded = repl.state.loaded()?;
    let name = match words {
        [word] => word.text.clone(),
        _ => {
            return Err(Failure::usage("Error: Please specify an argument name\nUsage: workflow run ask <arg_name>"));
        }
    };
    if !loaded.variables().contains_key(&name) {
        return Err(arguments::undeclared(&name, loaded));
    }
    let cancelled = || Failure { notices: Vec::new(), message: "Cancelled".into(), exit: Exit::Cancelled };
    let input = repl.lines.answer(&format!("Enter value for '{name}': "));
    match input.map_err(|error| Failure::failed(format!("Error: {error}")))? {
        Input::Line(value) => arguments::store(repl, &name, value.trim())?,
        Input::Interrupted | Input::End => return Err(cancelled()),
    }
    run(repl, &[])
}

/// `workflow run`.
pub(super) fn run(repl: &mut Repl<'_>, _: &[Word]) -> Result<Reply, Failure> {
    repl.state.loaded()?;
    let reply = follow_file(repl, Reply::silent())?;
    let loaded = repl.state.loaded()?;
    let found = check(&loaded.path, &repl.state.arguments);
    if found.iter().any(is_error) {
        return Err(invalid(loaded, &found));
    }
    create_output_dir(&repl.config.output_dir)?;
    let job = job(repl)?;
    let id = loaded.id.clone();
    repl.talk(&format!("Running workflow: {}", text::printable(&id)));
    let reporter = Arc::new(Reporter::new(false, repl.session));
    let switch = CancelSwitch::default();
    repl.interrupts.run(&switch, &reporter);
    let mut watch = Watch::new(&reporter, repl, &job);
    let result = repl.worker.execute(&job, &mut |update| watch.take(update), &switch);
    repl.interrupts.work();
    let record = reporter.finish();
    remember(repl, &record);
    match result {
        Ok(finished) => {
            repl.state.runs += 1;
            show_pictures(repl, &record);
            repl.talk(&summary::finished(&finished.summary.workflow, finished.summary.seconds, &record, "seed"));
            Ok(reply)
        }
        Err(error) => Err(failure(repl, error, &record)),
    }
}

/// Takes over what was changed in the file since it was read.
fn follow_file(repl: &mut Repl<'_>, reply: Reply) -> Result<Reply, Failure> {
    let loaded = repl.state.loaded()?;
    // A file that cannot be read is told of by the check that follows.
    let changed = Document::load(&loaded.path).is_ok_and(|document| document.sha256 != loaded.sha256);
    if !changed {
        return Ok(reply);
    }
    let (new, warnings) = Loaded::read(&loaded.path).map_err(|found| invalid(loaded, &found))?;
    let changed = workflow::replace(repl, new, reply.findings(&warnings));
    for notice in &changed.notices {
        repl.talk(notice);
    }
    Ok(Reply { notices: Vec::new(), ..changed })
}

fn invalid(loaded: &Loaded, found: &[dw_core::finding::Finding]) -> Failure {
    let message = format!("Error validating workflow '{}': {}", loaded.path.display(), findings::tally(found));
    Failure::usage(message).findings(found)
}

fn create_output_dir(folder: &Path) -> Result<(), Failure> {
    if folder.exists() && !folder.is_dir() {
        let message = format!(
            "Error: Output path exists but is not a directory: {}; use: config set output_dir DIR",
            folder.display()
        );
        return Err(Failure::failed(message));
    }
    fs::create_dir_all(folder)
        .map_err(|error| Failure::failed(format!("Error: cannot create the output folder: {error}")))
}

fn job(repl: &Repl<'_>) -> Result<Job, Failure> {
    let absolute = |path: &Path| {
        std::path::absolute(path).map_err(|error| Failure::failed(format!("Error: {}: {error}", path.display())))
    };
    Ok(Job {
        workflow: absolute(&repl.state.loaded()?.path)?,
        variables: repl.state.arguments.clone(),
        seed: repl.state.seed.clone(),
        output_dir: absolute(&repl.config.output_dir)?,
        metadata: repl.config.metadata,
        preview_every: Some(repl.config.preview_every).filter(|every| *every > 0),
        log_level: level_name(repl.config.log_level),
    })
}

/// Notes what a run left, however it ended.
fn remember(repl: &mut Repl<'_>, record: &Record) {
    repl.state.outputs.extend(record.files.iter().cloned());
    if record.seed.is_some() {
        repl.state.last_seed.clone_from(&record.seed);
    }
}

fn show_pictures(repl: &Repl<'_>, record: &Record) {
    if let Some(protocol) = picture::protocol(repl.config.preview) {
        record.files.iter().take(MOST_SHOWN).for_each(|path| picture::show_file(protocol, path));
    }
}

/// What is said about a run that ended early.
fn failure(repl: &mut Repl<'_>, error: WorkerError, record: &Record) -> Failure {
    match error {
        WorkerError::Cancelled | WorkerError::Killed => {
            repl.cancelled = true;
            repl.talk(&summary::cancelled(record));
            let message = if error == WorkerError::Cancelled { String::new() } else { error.to_string() };
            Failure { notices: Vec::new(), message, exit: Exit::Cancelled }
        }
        WorkerError::Invalid { findings, .. } => match repl.state.loaded() {
            Ok(loaded) => invalid(loaded, &findings),
            Err(failure) => failure,
        },
        WorkerError::Crashed(report) => {
            let message = format!("Error: {report}\nThe next run starts a fresh worker.");
            Failure { notices: last_words(&report.log_lines), message, exit: Exit::Failed }
        }
        WorkerError::Hung { ref log_lines, .. } => {
            Failure { notices: last_words(log_lines), ..Failure::failed(format!("Error: {error}")) }
        }
        error => Failure::failed(format!("Error: {error}")),
    }
}

fn last_words(log_lines: &[String]) -> Vec<String> {
    let log_lines = &log_lines[log_lines.len().saturating_sub(MOST_LAST_WORDS)..];
    let title = (!log_lines.is_empty()).then(|| "The last lines of the worker:".to_owned());
    title.into_iter().chain(log_lines.iter().map(|line| format!("  {}", text::printable(line)))).collect()
}

/// Shows a run as it happens.
struct Watch<'a> {
    reporter: &'a Reporter,
    quiet: bool,
    /// How previews are shown in the terminal.
    protocol: Option<Protocol>,
    scripted: bool,
    preview_file: PathBuf,
    /// Whether somebody was told where previews are.
    told: bool,
}

impl<'a> Watch<'a> {
    fn new(reporter: &'a Reporter, repl: &Repl<'_>, job: &Job) -> Self {
        Self {
            reporter,
            quiet: repl.session.quiet,
            protocol: picture::protocol(repl.config.preview),
            scripted: !repl.lines.is_terminal(),
            preview_file: job.output_dir.join(PREVIEW_FILE),
            told: false,
        }
    }

    fn take(&mut self, update: Update) {
        match update {
            Update::Event(event) => self.reporter.emit(event),
            // That was said before the worker was started.
            Update::Output(line) if line.starts_with("Executing workflow: ") => {}
            Update::Output(line) => self.say(&text::printable(&line)),
            Update::WorkflowLoaded { name } => {
                tracing::info!("the worker has read {name}");
            }
            Update::Warning(message) => self.say(&text::warning(&message)),
            Update::Preview(preview) => self.preview(preview.step, preview.of, &preview.png),
            Update::Memory(report) => tracing::debug!(?report, "memory"),
        }
    }

    fn say(&self, line: &str) {
        if !self.quiet {
            self.reporter.say(line);
        }
    }

    /// Shows a look at the unfinished picture, and keeps it in a file for other programs to show.
    fn preview(&mut self, step: usize, of: usize, png: &[u8]) {
        if let Err(error) = keep(&self.preview_file, png) {
            self.say(&text::warning(&format!("the preview cannot be written: {error}")));
        }
        if let Some(protocol) = self.protocol {
            self.reporter.aside(&mut || picture::show_preview(protocol, png));
        } else if self.scripted {
            self.say(&format!("  preview after {step}/{of}: {}", self.preview_file.display()));
        } else if !self.told {
            self.told = true;
            self.say(&format!("Previews: {}", self.preview_file.display()));
        }
    }
}

/// Writes a file, whole or not at all, so that a viewer never sees half a picture.
fn keep(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = tempfile::NamedTempFile::new_in(path.parent().unwrap_or(Path::new(".")))?;
    file.write_all(bytes)?;
    file.persist(path)?;
    Ok(())
}
