//! The commands of the loop as one table: what they are called, what they take, what they do and what
//! is said about them. Finding a command, help and completion all read it.

use super::{
    Repl, arguments, config, help, memory,
    parse::Word,
    reply::{Failure, Reply},
    results, run, workflow,
};

/// What does the work of a command.
pub(super) type Run = fn(&mut Repl<'_>, &[Word]) -> Result<Reply, Failure>;

/// One command.
pub(super) struct Command {
    /// The words that call it: `workflow load`.
    pub(super) name: &'static str,
    /// What follows the name, as help shows it.
    pub(super) usage: &'static str,
    /// What it does, in a line.
    pub(super) summary: &'static str,
    /// More about it; empty when there is nothing to add.
    pub(super) details: &'static str,
    /// What its arguments are, for completion and for `?`.
    pub(super) takes: Takes,
    /// What does it.
    pub(super) run: Run,
}

/// What the arguments of a command are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Takes {
    /// There are none.
    Nothing,
    /// A workflow file.
    Workflow,
    /// The name of a file to write.
    File,
    /// The name of a variable.
    Variable,
    /// `name=value` for variables.
    Assignments,
    /// A setting and its value.
    Setting,
    /// A seed.
    Seed,
    /// How many.
    Count,
    /// The name of a command.
    Topic,
}

/// Commands that share their first word.
pub(super) struct Group {
    /// That word.
    pub(super) name: &'static str,
    /// What they are about.
    pub(super) summary: &'static str,
}

/// A command of old and what it is called now.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Renamed {
    /// As it was.
    pub(super) old: &'static str,
    /// As it is.
    pub(super) new: &'static str,
}

/// All groups, in the order of help.
pub(super) const GROUPS: &[Group] = &[
    Group { name: "workflow", summary: "load, run and save workflows" },
    Group { name: "arg", summary: "values for the workflow's variables" },
    Group { name: "memory", summary: "what the worker has loaded" },
    Group { name: "config", summary: "settings of this program" },
];

/// All commands, in the order of help.
pub(super) const COMMANDS: &[Command] = &[
    Command {
        name: "workflow load",
        usage: "FILE",
        summary: "check a workflow and make it the current one",
        details: "FILE is a path, or a name in the folder `workflow_dir` of the settings; `.json` may be left out. \
                  Everything that is wrong with the workflow is shown. Values set with `arg set` are forgotten; \
                  what the worker has loaded stays.",
        takes: Takes::Workflow,
        run: workflow::load,
    },
    Command {
        name: "workflow reload",
        usage: "",
        summary: "read the current workflow again, keeping the values set",
        details: "A run reads the file by itself; this is for looking at what changed.",
        takes: Takes::Nothing,
        run: workflow::reload,
    },
    Command {
        name: "workflow run",
        usage: "",
        summary: "run the current workflow",
        details: "Ctrl-C stops after the current denoising step and keeps the models; pressed again it ends the \
                  worker. Models that are loaded already are used again.",
        takes: Takes::Nothing,
        run: run::run,
    },
    Command {
        name: "workflow run ask",
        usage: "NAME",
        summary: "ask for the value of a variable, then run",
        details: "",
        takes: Takes::Variable,
        run: run::ask,
    },
    Command {
        name: "workflow status",
        usage: "",
        summary: "show the current workflow and the worker",
        details: "",
        takes: Takes::Nothing,
        run: workflow::status,
    },
    Command {
        name: "workflow restart",
        usage: "",
        summary: "end the worker; the next run starts a fresh one",
        details: "",
        takes: Takes::Nothing,
        run: workflow::restart,
    },
    Command {
        name: "workflow save",
        usage: "[FILE]",
        summary: "write the workflow with the values set as its defaults",
        details: "Without FILE, over the file it was loaded from. Another file that exists is not overwritten.",
        takes: Takes::File,
        run: workflow::save,
    },
    Command {
        name: "arg show",
        usage: "",
        summary: "show the workflow's variables and the values set",
        details: "",
        takes: Takes::Nothing,
        run: arguments::show,
    },
    Command {
        name: "arg set",
        usage: "NAME=VALUE ...",
        summary: "set variables for the runs that follow",
        details: "Quotes hold a value together: arg set prompt=\"a boat, a moon\" steps=20. Words without `=` belong \
                  to the value before them.",
        takes: Takes::Assignments,
        run: arguments::set,
    },
    Command {
        name: "arg clear",
        usage: "[NAME ...]",
        summary: "forget the values set, or those of some variables",
        details: "",
        takes: Takes::Variable,
        run: arguments::clear,
    },
    Command {
        name: "memory show",
        usage: "",
        summary: "show the memory of the device and of the worker",
        details: "",
        takes: Takes::Nothing,
        run: memory::show,
    },
    Command {
        name: "memory clear",
        usage: "",
        summary: "unload all models and keep the worker",
        details: "",
        takes: Takes::Nothing,
        run: memory::clear,
    },
    Command {
        name: "config show",
        usage: "",
        summary: "show the settings",
        details: "",
        takes: Takes::Nothing,
        run: config::show,
    },
    Command {
        name: "config set",
        usage: "NAME VALUE",
        summary: "change a setting; NAME=VALUE works too",
        details: "It holds until the program ends; `config save` keeps it.",
        takes: Takes::Setting,
        run: config::set,
    },
    Command {
        name: "config save",
        usage: "",
        summary: "keep the settings for the next time",
        details: "",
        takes: Takes::Nothing,
        run: config::save,
    },
    Command {
        name: "models",
        usage: "",
        summary: "list the models that are loaded, and those on this machine",
        details: "",
        takes: Takes::Nothing,
        run: memory::models,
    },
    Command {
        name: "outputs",
        usage: "[COUNT]",
        summary: "list the files written last, ten if COUNT is not given",
        details: "",
        takes: Takes::Count,
        run: results::outputs,
    },
    Command {
        name: "seed",
        usage: "[N | N,N,... | keep | random]",
        summary: "show the seed, or set it for the runs that follow",
        details: "A number is used for every run; `keep` stays with that of the last run; `random` leaves it to the \
                  workflow again, which draws one when it names none.",
        takes: Takes::Seed,
        run: results::seed,
    },
    Command {
        name: "help",
        usage: "[COMMAND]",
        summary: "show all commands, or say more about one; `?` does the same at any place",
        details: "",
        takes: Takes::Topic,
        run: help::help,
    },
    Command {
        name: "exit",
        usage: "",
        summary: "end the worker and leave; so do `quit` and Ctrl-D",
        details: "",
        takes: Takes::Nothing,
        run: leave,
    },
];

/// Commands that are called otherwise now and still work.
pub(super) const RENAMED: &[Renamed] = &[
    Renamed { old: "load", new: "workflow load" },
    Renamed { old: "reload", new: "workflow reload" },
    Renamed { old: "run", new: "workflow run" },
    Renamed { old: "restart", new: "workflow restart" },
    Renamed { old: "save", new: "workflow save" },
    Renamed { old: "args", new: "arg show" },
    Renamed { old: "set", new: "config set" },
    Renamed { old: "clear", new: "memory clear" },
];

/// `arg name=value`, which had no word of its own for setting.
const OLD_ASSIGNMENT: Renamed = Renamed { old: "arg NAME=VALUE", new: "arg set NAME=VALUE" };

/// What a line means.
pub(super) enum Meaning<'a> {
    /// A command and its arguments, called by its old name perhaps.
    Run { command: &'static Command, arguments: &'a [Word], renamed: Option<&'static Renamed> },
    /// Help about everything.
    Overview,
    /// Help about a group.
    AboutGroup(&'static Group),
    /// Help about a command, asked for behind these arguments.
    About { command: &'static Command, arguments: &'a [Word] },
    /// No such command.
    Unknown,
    /// No such command in a group.
    UnknownIn { group: &'static Group, word: &'a str },
}

/// Finds out what words mean; there is at least one.
pub(super) fn meaning(words: &[Word]) -> Meaning<'_> {
    let asks = words.last().is_some_and(Word::asks);
    let asked = if asks { &words[..words.len() - 1] } else { words };
    let Some(first) = asked.first() else { return Meaning::Overview };
    if let Some((command, arguments)) = find(asked) {
        let in_value = command.takes == Takes::Assignments && !arguments.is_empty();
        return if asks && !in_value {
            Meaning::About { command, arguments }
        } else {
            Meaning::Run {
                command,
                arguments: &words[words.len() - arguments.len() - usize::from(asks)..],
                renamed: None,
            }
        };
    }
    if let Some(group) = group(&first.text) {
        return match asked.get(1) {
            None if asks || group.name != "arg" => Meaning::AboutGroup(group),
            None => run("arg show", &words[1..], None),
            Some(word) if group.name == "arg" && word.text.contains('=') => {
                run("arg set", &words[1..], Some(&OLD_ASSIGNMENT))
            }
            Some(word) => Meaning::UnknownIn { group, word: &word.text },
        };
    }
    match RENAMED.iter().find(|renamed| renamed.old == first.text) {
        Some(renamed) => match command(renamed.new) {
            Some(command) if asks => Meaning::About { command, arguments: &asked[1..] },
            _ => run(renamed.new, &words[1..], Some(renamed)),
        },
        None => Meaning::Unknown,
    }
}

fn run<'a>(name: &str, arguments: &'a [Word], renamed: Option<&'static Renamed>) -> Meaning<'a> {
    let asks_for_value = name == "workflow run" && arguments.first().is_some_and(|word| word.text == "ask");
    let (name, arguments) = if asks_for_value { ("workflow run ask", &arguments[1..]) } else { (name, arguments) };
    match command(name) {
        Some(command) => Meaning::Run { command, arguments, renamed },
        None => Meaning::Unknown,
    }
}

/// The command with exactly this name.
pub(super) fn command(name: &str) -> Option<&'static Command> {
    COMMANDS.iter().find(|command| command.name == name)
}

/// The group with exactly this name.
pub(super) fn group(name: &str) -> Option<&'static Group> {
    GROUPS.iter().find(|group| group.name == name)
}

/// The command with the longest name that the words begin with, and the words behind its name.
pub(super) fn find(words: &[Word]) -> Option<(&'static Command, &[Word])> {
    // `quit` is not in the table, so that help names one way to leave.
    if words.first().is_some_and(|word| word.text == "quit" && !word.quoted) {
        return command("exit").map(|command| (command, &words[1..]));
    }
    let names = COMMANDS.iter().filter_map(|command| {
        let count = command.name.split(' ').count();
        let same = command.name.split(' ').eq(words.iter().take(count).map(|word| word.text.as_str()));
        same.then_some((command, count))
    });
    names.max_by_key(|(_, count)| *count).map(|(command, count)| (command, &words[count..]))
}

/// The commands of a group, or those without one.
pub(super) fn members(group: Option<&Group>) -> impl Iterator<Item = &'static Command> {
    let name = group.map(|group| group.name);
    COMMANDS.iter().filter(move |command| match (name, command.name.split_once(' ')) {
        (Some(name), Some((first, _))) => first == name,
        (None, None) => true,
        _ => false,
    })
}

/// `exit`.
#[expect(clippy::unnecessary_wraps, reason = "all commands have this form")]
fn leave(_: &mut Repl<'_>, _: &[Word]) -> Result<Reply, Failure> {
    Ok(Reply::leave())
}

#[cfg(test)]
mod tests {
    use super::{super::parse::split, *};

    fn said(line: &str) -> String {
        let words = split(line).words;
        let texts = |words: &[Word]| words.iter().map(|word| format!(" <{}>", word.text)).collect::<String>();
        match meaning(&words) {
            Meaning::Run { command, arguments, renamed } => {
                let renamed = renamed.map(|renamed| format!(" (was {})", renamed.old)).unwrap_or_default();
                format!("{}{}{renamed}", command.name, texts(arguments))
            }
            Meaning::Overview => "help".into(),
            Meaning::AboutGroup(group) => format!("help on {}", group.name),
            Meaning::About { command, arguments } => format!("help on {}{}", command.name, texts(arguments)),
            Meaning::Unknown => "unknown".into(),
            Meaning::UnknownIn { group, word } => format!("unknown {word} in {}", group.name),
        }
    }

    #[test]
    fn lines_mean_commands_of_today_and_of_old() {
        let cases = [
            ("workflow load a.json", "workflow load <a.json>"),
            ("workflow run", "workflow run"),
            ("workflow run ask prompt", "workflow run ask <prompt>"),
            ("arg", "arg show"),
            ("arg set prompt=\"a b\"", "arg set <prompt=a b>"),
            ("arg set prompt=what is this ?", "arg set <prompt=what> <is> <this> <?>"),
            ("exit", "exit"),
            ("quit", "exit"),
            ("load a", "workflow load <a> (was load)"),
            ("run", "workflow run (was run)"),
            ("run ask prompt", "workflow run ask <prompt> (was run)"),
            ("arg a=1", "arg set <a=1> (was arg NAME=VALUE)"),
            ("arg a=b c", "arg set <a=b> <c> (was arg NAME=VALUE)"),
            ("clear", "memory clear (was clear)"),
            ("set preview off", "config set <preview> <off> (was set)"),
        ];
        for (line, expected) in cases {
            assert_eq!(said(line), expected, "{line}");
        }
    }

    #[test]
    fn a_question_mark_asks_at_every_level() {
        let cases = [
            ("?", "help"),
            ("workflow ?", "help on workflow"),
            ("workflow", "help on workflow"),
            ("memory", "help on memory"),
            ("config", "help on config"),
            ("arg ?", "help on arg"),
            ("workflow load ?", "help on workflow load"),
            ("workflow run ?", "help on workflow run"),
            ("workflow run ask ?", "help on workflow run ask"),
            ("arg set ?", "help on arg set"),
            ("config set preview ?", "help on config set <preview>"),
            ("load ?", "help on workflow load"),
            ("exit ?", "help on exit"),
        ];
        for (line, expected) in cases {
            assert_eq!(said(line), expected, "{line}");
        }
    }

    #[test]
    fn words_without_meaning_are_unknown() {
        let cases = [
            ("model ?", "unknown"),
            ("status", "unknown"),
            ("!ls", "unknown"),
            ("workflow lod x", "unknown lod in workflow"),
            ("memory x", "unknown x in memory"),
            ("arg x", "unknown x in arg"),
        ];
        for (line, expected) in cases {
            assert_eq!(said(line), expected, "{line}");
        }
    }

    #[test]
    fn every_command_can_be_found_by_its_name_and_stands_in_a_group_or_alone() {
        for command in COMMANDS {
            assert_eq!(said(command.name), command.name);
            let first = command.name.split(' ').next().expect("a word");
            assert_eq!(command.name.contains(' '), group(first).is_some(), "{}", command.name);
            assert!(!command.summary.ends_with('.') && !command.summary.is_empty(), "{}", command.name);
        }
        for renamed in RENAMED {
            assert!(command(renamed.new).is_some(), "{}", renamed.new);
            assert!(command(renamed.old).is_none() && group(renamed.old).is_none(), "{}", renamed.old);
        }
    }
}
