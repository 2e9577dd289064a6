//! `dw repl`: the loop of commands, for people at a terminal and for scripts. A worker process owns the
//! device and keeps models loaded from run to run; what happens to it, the loop stays.
//!
//! [`commands`] is the table of what can be typed, [`lines`] where lines come from, [`state`] what is
//! remembered. How a run looks is [`crate::render`]'s business, what a worker is [`dw_engine::worker`]'s.

mod arguments;
mod commands;
mod complete;
mod config;
mod help;
mod history;
mod interrupts;
mod lines;
mod memory;
mod parse;
mod picture;
mod reply;
mod results;
mod run;
mod state;
mod values;
mod worker;
mod workflow;

#[cfg(test)]
mod tests;

use std::path::PathBuf;

use dw_core::nearest::nearest;
use dw_engine::worker::{Supervisor, WorkerLaunch};

use serde_json::Value;

use crate::{
    args::{ComputeArgs, ReplArgs},
    device::DeviceChoice,
    error::{CliError, Exit},
    render::text::{self, printable},
    session::Session,
};

use commands::{Command, Meaning, Takes};
use complete::{Known, Variable};
use config::{Config, SETTINGS};
use interrupts::Interrupts;
use lines::{Input, Lines};
use parse::Word;
use reply::{Failure, Reply};
use state::{Loaded, State};
use worker::Worker;

const PROMPT: &str = "dw> ";

/// Starts the worker that a configuration asks for, once it is needed.
type Hire<'a> = Box<dyn Fn(&Config) -> Box<dyn Worker> + 'a>;

/// The loop.
struct Repl<'a> {
    session: &'a Session,
    state: State,
    config: Config,
    /// Where settings are kept; none where no folder is known.
    config_file: Option<PathBuf>,
    worker: Box<dyn Worker>,
    hire: Hire<'a>,
    lines: Box<dyn Lines>,
    interrupts: Interrupts,
    /// Whether Ctrl-C stopped a run.
    cancelled: bool,
}

/// Runs `dw repl`.
pub(crate) fn repl(args: &ReplArgs, session: &Session) -> Result<Exit, CliError> {
    let (config, mut warnings) = configuration(args, session)?;
    let (lines, troubles) = lines::source().map_err(|error| CliError::Failed(format!("no terminal: {error}")))?;
    warnings.extend(troubles);
    for warning in warnings {
        session.warn(&warning);
    }
    let program = std::env::current_exe()
        .map_err(|error| CliError::Failed(format!("the program does not find itself: {error}")))?;
    let compute = args.compute.clone();
    let hire: Hire<'_> = Box::new(move |config| Box::new(Supervisor::new(launch(&program, &compute, config, session))));
    let interrupts = Interrupts::new(lines.is_terminal());
    interrupts.listen()?;
    let mut repl = Repl {
        session,
        state: State { seed: args.compute.seed.clone(), ..State::default() },
        worker: hire(&config),
        config,
        config_file: Config::file(),
        hire,
        lines,
        interrupts,
        cancelled: false,
    };
    repl.run(args.file.as_deref())
}

/// The settings in force: the command line, then what was kept, then the settings of the program.
fn configuration(args: &ReplArgs, session: &Session) -> Result<(Config, Vec<String>), CliError> {
    let device = session.device(None)?.filter(|choice| *choice != DeviceChoice::Auto);
    let config = Config {
        log_level: session.settings.settings.log_level.unwrap_or(crate::logging::Level::Info),
        device,
        ..Config::default()
    };
    let (mut config, warnings) = match Config::file() {
        Some(file) => config.with_file(&file),
        None => (config, Vec::new()),
    };
    if let Some(level) = session.log_level {
        config.log_level = level;
    }
    if let Some(folder) = &args.output_dir {
        config.output_dir.clone_from(folder);
    }
    if let Some(device) = &args.compute.device {
        config.device = Some(device.clone()).filter(|choice| *choice != DeviceChoice::Auto);
    }
    Ok((config, warnings))
}

fn launch(program: &std::path::Path, compute: &ComputeArgs, config: &Config, session: &Session) -> WorkerLaunch {
    WorkerLaunch {
        engine: session.engine_config(config.device.as_ref(), compute.offline, compute.ignore_fit),
        cache_budget: config.cache_budget,
        log_file: session.log_file.as_ref().ok().cloned().flatten(),
        ..WorkerLaunch::new(program)
    }
}

impl Repl<'_> {
    /// Reads and does commands until there are no more.
    fn run(&mut self, file: Option<&std::path::Path>) -> Result<Exit, CliError> {
        let person = self.lines.is_terminal();
        if person && !self.session.quiet {
            text::print("Welcome to dw. Type help or ? to list commands, Ctrl-D to leave.\n\n")?;
        }
        let mut outcome = Exit::Done;
        if let Some(file) = file {
            let word = Word { text: file.to_string_lossy().into_owned(), start: 0, quoted: true };
            let loaded = workflow::load(self, &[word]);
            outcome = Self::settle(loaded, outcome)?.0;
        }
        loop {
            self.interrupts.wait();
            let known = if person { self.known() } else { Known::default() };
            let input = self.lines.command(PROMPT, known);
            self.interrupts.work();
            let line = match input.map_err(|error| CliError::Failed(format!("cannot read commands: {error}")))? {
                Input::Line(line) => line,
                Input::Interrupted => {
                    text::say("Ctrl-D or `exit` leaves");
                    continue;
                }
                Input::End => {
                    if person {
                        text::print("\nGoodbye!\n")?;
                    }
                    break;
                }
            };
            let result = self.execute(&line);
            let (new, leave) = Self::settle(result, outcome)?;
            outcome = new;
            // Whoever stops a run of a script means the script.
            if leave || (self.cancelled && !person) {
                break;
            }
            self.cancelled = false;
        }
        self.worker.shutdown();
        Ok(if person { Exit::Done } else { outcome })
    }

    /// Says what came of a command. Returns the exit code so far and whether it was the last command.
    fn settle(result: Result<Reply, Failure>, outcome: Exit) -> Result<(Exit, bool), CliError> {
        match result {
            Ok(reply) => {
                reply.say()?;
                Ok((outcome, reply.leave))
            }
            Err(failure) => {
                failure.say();
                Ok((if outcome == Exit::Done { failure.exit } else { outcome }, false))
            }
        }
    }

    /// Does what a line says.
    fn execute(&mut self, line: &str) -> Result<Reply, Failure> {
        let line = line.trim();
        // `?workflow` is `help workflow`.
        let line = match line.strip_prefix('?') {
            Some(topic) if !topic.trim().is_empty() => format!("help {topic}"),
            _ => line.to_owned(),
        };
        let split = parse::split(&line);
        if line.starts_with('#') || split.words.is_empty() {
            return Ok(Reply::silent());
        }
        if let Some(quote) = split.open {
            return Err(Failure::usage(format!(
                "Error: the quote {quote} is not closed; a {quote} inside a value has to stand in quotes of the other kind"
            )));
        }
        match commands::meaning(&split.words) {
            Meaning::Run { command, arguments, renamed } => {
                if let Some(renamed) = renamed {
                    self.talk(&format!("'{}' is now '{}'", renamed.old, renamed.new));
                }
                self.call(command, arguments)
            }
            Meaning::Overview => Ok(Reply::answer(help::overview())),
            Meaning::AboutGroup(group) => Ok(Reply::answer(help::about_group(group))),
            Meaning::About { command, arguments } => Ok(Reply::answer(help::about(command, arguments, &self.known()))),
            Meaning::Unknown => Err(unknown(&line, &split.words)),
            Meaning::UnknownIn { group, word } => Err(unknown_in(group, word)),
        }
    }

    fn call(&mut self, command: &Command, arguments: &[Word]) -> Result<Reply, Failure> {
        if command.takes == Takes::Nothing
            && let Some(word) = arguments.first()
        {
            let message =
                format!("Error: '{}' takes no arguments, but there is '{}'", command.name, printable(&word.text));
            return Err(Failure::usage(message));
        }
        (command.run)(self, arguments)
    }

    /// Says a line to the person at the terminal.
    fn talk(&self, line: &str) {
        if !self.session.quiet {
            text::say(line);
        }
    }

    /// Ends the worker; the next one is as the settings now say.
    fn replace_worker(&mut self) {
        self.worker.shutdown();
        self.worker = (self.hire)(&self.config);
    }

    /// What completion and help may offer now.
    fn known(&self) -> Known {
        Known {
            variables: self.state.workflow.as_ref().map(|loaded| self.variables(loaded)).unwrap_or_default(),
            settings: SETTINGS.iter().map(|setting| setting.value(&self.config)).collect(),
            workflow_dir: self.config.workflow_dir.clone(),
            last_seed: self.state.last_seed.as_ref().map(text::seed),
        }
    }

    fn variables(&self, loaded: &Loaded) -> Vec<Variable> {
        let variable = |(name, default): (&String, &Value)| Variable {
            name: name.clone(),
            current: arguments::shown(self.state.arguments.get(name).unwrap_or(default)),
            values: loaded.choices.get(name).cloned().unwrap_or_default(),
        };
        loaded.variables().iter().map(variable).collect()
    }
}

fn unknown(line: &str, words: &[Word]) -> Failure {
    let first = words.first().map(|word| word.text.as_str()).unwrap_or_default();
    let names = commands::GROUPS.iter().map(|group| group.name);
    let near = nearest(first, names.chain(commands::members(None).map(|command| command.name)));
    let near = near.map(|near| format!("Did you mean '{near}'? ")).unwrap_or_default();
    Failure::usage(format!("Unknown command: {}\n{near}Type 'help' or '?' for a list of commands", printable(line)))
}

fn unknown_in(group: &'static commands::Group, word: &str) -> Failure {
    let names = commands::members(Some(group)).filter_map(|command| command.name.split(' ').nth(1));
    let near = nearest(word, names).map(|near| format!("Did you mean '{} {near}'? ", group.name)).unwrap_or_default();
    Failure::usage(format!(
        "Unknown {} subcommand: {}\n{near}Use '{} ?' for help",
        group.name,
        printable(word),
        group.name
    ))
}
