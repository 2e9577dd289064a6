//! `help` and `?`: the overview, a group, a command, and what a command's arguments can be.

use std::fmt::Write as _;

use crate::render::table::Table;

use super::{
    Repl,
    commands::{self, COMMANDS, Command, GROUPS, Group, Meaning, Takes, members},
    complete::Known,
    config::{SETTINGS, setting},
    parse::Word,
    reply::{Failure, Reply},
};

const EXAMPLES: &str = "\
Examples:
  workflow load examples/landscape.json
  arg set prompt=\"a sunset over the sea\" steps=20
  workflow run
  seed keep
  config set preview off
";

/// How many values a list in help shows.
const MOST_VALUES: usize = 40;

/// `help`.
pub(super) fn help(repl: &mut Repl<'_>, words: &[Word]) -> Result<Reply, Failure> {
    if words.is_empty() {
        return Ok(Reply::answer(overview()));
    }
    match commands::meaning(words) {
        Meaning::Overview => Ok(Reply::answer(overview())),
        Meaning::AboutGroup(group) => Ok(Reply::answer(about_group(group))),
        // `help arg`: bare `arg` is a command, but its name is a group's.
        Meaning::Run { command, .. } if words.len() == 1 && command.name != words[0].text => {
            let group = commands::group(&words[0].text);
            Ok(Reply::answer(group.map_or_else(|| about(command, &[], &repl.known()), about_group)))
        }
        Meaning::Run { command, arguments, .. } | Meaning::About { command, arguments } => {
            Ok(Reply::answer(about(command, arguments, &repl.known())))
        }
        Meaning::Unknown | Meaning::UnknownIn { .. } => {
            let topic: Vec<_> = words.iter().map(|word| word.text.as_str()).collect();
            Err(Failure::usage(format!("No help for '{}'\nType 'help' or '?' for a list of commands", topic.join(" "))))
        }
    }
}

/// All commands.
pub(super) fn overview() -> String {
    let mut text = "Commands (`?` behind any of them says more, Tab completes)\n".to_owned();
    for group in GROUPS {
        let _ = write!(text, "\n{}: {}\n", group.name, group.summary);
        text += &table(members(Some(group)));
    }
    text += "\nalso:\n";
    text += &table(members(None));
    text += "\n";
    text + EXAMPLES
}

fn table(commands: impl Iterator<Item = &'static Command>) -> String {
    let mut table = Table::plain(2);
    for command in commands {
        table.row([format!("  {}", call(command)), command.summary.to_owned()]);
    }
    table.render()
}

/// A command as it is typed.
fn call(command: &Command) -> String {
    format!("{} {}", command.name, command.usage).trim_end().to_owned()
}

/// One group.
pub(super) fn about_group(group: &'static Group) -> String {
    format!("{}: {}\n{}", group.name, group.summary, table(members(Some(group))))
}

/// One command, and what its next argument can be.
pub(super) fn about(command: &Command, arguments: &[Word], known: &Known) -> String {
    let mut text = format!("{}\n  {}\n", call(command), sentence(command.summary));
    if !command.details.is_empty() {
        let _ = writeln!(text, "  {}", command.details);
    }
    text + &values(command.takes, arguments, known)
}

fn sentence(summary: &str) -> String {
    let mut letters = summary.chars();
    let first = letters.next().map(|letter| letter.to_uppercase().collect::<String>()).unwrap_or_default();
    format!("{first}{}.", letters.as_str())
}

/// What can be written behind these arguments.
fn values(takes: Takes, arguments: &[Word], known: &Known) -> String {
    match takes {
        Takes::Setting => settings(arguments, known),
        Takes::Variable | Takes::Assignments if known.variables.is_empty() => {
            "\nThe variables are those of the workflow; none is loaded.\n".into()
        }
        Takes::Variable | Takes::Assignments => {
            let mut table = Table::plain(3);
            for variable in &known.variables {
                let values = variable.values.iter().take(MOST_VALUES).cloned().collect::<Vec<_>>().join(", ");
                table.row([format!("  {}", variable.name), variable.current.clone(), values]);
            }
            format!("\nVariables:\n{}", table.render())
        }
        Takes::Workflow => listed("Workflows", &known.workflows("")),
        Takes::Topic => listed("Commands", &COMMANDS.iter().map(|command| command.name.to_owned()).collect::<Vec<_>>()),
        Takes::Nothing | Takes::File | Takes::Seed | Takes::Count => String::new(),
    }
}

fn settings(arguments: &[Word], known: &Known) -> String {
    let name = arguments.first().map(|word| word.text.split('=').next().unwrap_or_default());
    if let Some(setting) = name.and_then(setting) {
        let values =
            if setting.values.is_empty() { String::new() } else { format!(" ({})", setting.values.join(", ")) };
        return format!("\n{}: {}{values}\n", setting.name, setting.summary);
    }
    let mut table = Table::plain(3);
    for (setting, value) in SETTINGS.iter().zip(&known.settings) {
        table.row([format!("  {}", setting.name), value.clone(), setting.summary.to_owned()]);
    }
    format!("\nSettings:\n{}", table.render())
}

fn listed(title: &str, items: &[String]) -> String {
    if items.is_empty() {
        return String::new();
    }
    let more = items.len().saturating_sub(MOST_VALUES);
    let more = if more > 0 { format!("  ... and {more} more\n") } else { String::new() };
    let lines: String = items.iter().take(MOST_VALUES).map(|item| format!("  {item}\n")).collect();
    format!("\n{title}:\n{lines}{more}")
}
