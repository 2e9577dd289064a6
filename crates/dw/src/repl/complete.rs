//! What can be typed next: candidates for the tab key and hints behind the cursor, from the table of
//! commands and from what is known at the moment.

use std::{
    collections::BTreeSet,
    path::{MAIN_SEPARATOR, Path, PathBuf, is_separator},
};

use super::{
    commands::{self, COMMANDS, RENAMED, Takes},
    config::{SETTINGS, setting},
    parse::{Word, escape, quote, split},
};

/// What completion and help know about the moment.
#[derive(Clone, Debug, Default)]
pub(super) struct Known {
    /// The workflow's variables.
    pub(super) variables: Vec<Variable>,
    /// The values of the settings, in the order of their table.
    pub(super) settings: Vec<String>,
    /// The folder in which workflows are found by name.
    pub(super) workflow_dir: PathBuf,
    /// The seed of the last run.
    pub(super) last_seed: Option<String>,
}

/// A variable of the workflow.
#[derive(Clone, Debug, Default)]
pub(super) struct Variable {
    /// Its name.
    pub(super) name: String,
    /// Its value as it would be typed: the one set, else the default.
    pub(super) current: String,
    /// The values it can have, where they can be listed.
    pub(super) values: Vec<String>,
}

/// Something to put in place of the word at the cursor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Candidate {
    /// As it is listed.
    pub(super) display: String,
    /// As it is inserted.
    pub(super) replacement: String,
}

impl Candidate {
    /// A word that ends here.
    fn word(text: &str) -> Self {
        Self { display: text.to_owned(), replacement: format!("{} ", quote(text)) }
    }

    /// A word that goes on.
    fn open(text: &str) -> Self {
        Self { display: text.to_owned(), replacement: text.to_owned() }
    }
}

/// Where the word before the cursor begins, and what could stand there.
pub(super) fn candidates(line: &str, cursor: usize, known: &Known) -> (usize, Vec<Candidate>) {
    let typed = &line[..cursor];
    let split = split(typed);
    let (before, partial, start) = match split.words.split_last() {
        Some((last, before)) if split.unfinished => (before, last.text.as_str(), last.start),
        _ => (split.words.as_slice(), "", cursor),
    };
    let before = without_detours(before);
    let mut found = next_words(&before, partial);
    if let Some((command, arguments)) = commands::find(&before) {
        found.extend(values(command.takes, arguments, partial, known));
    }
    (start, found)
}

/// The words as the table knows them: without `help` in front, with new names for old.
fn without_detours(words: &[Word]) -> Vec<Word> {
    let words = match words {
        [first, rest @ ..] if first.text == "help" => rest,
        _ => words,
    };
    let renamed = words.first().and_then(|first| RENAMED.iter().find(|renamed| renamed.old == first.text));
    match renamed {
        Some(renamed) => split(renamed.new).words.into_iter().chain(words[1..].iter().cloned()).collect(),
        None => words.to_vec(),
    }
}

/// The next words of commands whose names begin with these words.
fn next_words(before: &[Word], partial: &str) -> Vec<Candidate> {
    let mut found = BTreeSet::new();
    for command in COMMANDS {
        let mut name = command.name.split(' ');
        let begins = before.iter().all(|word| name.next() == Some(word.text.as_str()));
        found.extend(name.next().filter(|next| begins && next.starts_with(partial)));
    }
    found.into_iter().map(Candidate::word).collect()
}

fn values(takes: Takes, arguments: &[Word], partial: &str, known: &Known) -> Vec<Candidate> {
    let matching = |texts: &mut dyn Iterator<Item = &str>| -> Vec<Candidate> {
        texts.filter(|text| text.starts_with(partial)).map(Candidate::word).collect()
    };
    match takes {
        Takes::Workflow if arguments.is_empty() => files(&known.workflows(partial)),
        Takes::File if arguments.is_empty() => files(&listing(Path::new(""), partial)),
        Takes::Variable => matching(&mut known.variables.iter().map(|variable| variable.name.as_str())),
        Takes::Assignments => assignments(partial, known),
        Takes::Setting => settings(arguments, partial),
        Takes::Seed if arguments.is_empty() => {
            matching(&mut ["keep", "random"].into_iter().chain(known.last_seed.as_deref()))
        }
        _ => Vec::new(),
    }
}

/// Files end a word; folders go on, inside the quotes they may need.
fn files(paths: &[String]) -> Vec<Candidate> {
    let candidate = |path: &String| {
        if !path.ends_with(is_separator) {
            Candidate::word(path)
        } else if quote(path) == *path {
            Candidate::open(path)
        } else {
            Candidate { display: path.clone(), replacement: format!("\"{}", escape(path)) }
        }
    };
    paths.iter().map(candidate).collect()
}

fn assignments(partial: &str, known: &Known) -> Vec<Candidate> {
    let Some((name, value)) = partial.split_once('=') else {
        let names = known.variables.iter().filter(|variable| variable.name.starts_with(partial));
        return names.map(|variable| Candidate::open(&format!("{}=", variable.name))).collect();
    };
    let Some(variable) = known.variables.iter().find(|variable| variable.name == name) else { return Vec::new() };
    let current = Some(&variable.current).filter(|current| !variable.values.contains(current));
    let choices = current.into_iter().chain(&variable.values).filter(|choice| choice.starts_with(value));
    choices.map(|choice| assigned(name, choice)).collect()
}

fn assigned(name: &str, value: &str) -> Candidate {
    Candidate { display: value.to_owned(), replacement: format!("{name}={} ", quote(value)) }
}

/// `name value`, or `name=value`.
fn settings(arguments: &[Word], partial: &str) -> Vec<Candidate> {
    let choices = |name: &str| setting(name).map(|setting| setting.values).unwrap_or_default().iter();
    match (arguments, partial.split_once('=')) {
        ([], None) => {
            let names = SETTINGS.iter().map(|setting| setting.name).filter(|name| name.starts_with(partial));
            names.map(Candidate::word).collect()
        }
        ([], Some((name, value))) => {
            choices(name).filter(|choice| choice.starts_with(value)).map(|choice| assigned(name, choice)).collect()
        }
        ([name], None) => choices(&name.text)
            .filter(|choice| choice.starts_with(partial))
            .map(|choice| Candidate::word(choice))
            .collect(),
        _ => Vec::new(),
    }
}

impl Known {
    /// Workflow files and folders whose path begins like this: those found as typed, then those in the
    /// folder of workflows.
    pub(super) fn workflows(&self, partial: &str) -> Vec<String> {
        let is_workflow = |path: &String| {
            path.ends_with(is_separator) || Path::new(path).extension().is_some_and(|ending| ending == "json")
        };
        let mut found: Vec<String> = Vec::new();
        for root in [Path::new(""), &self.workflow_dir] {
            for path in listing(root, partial).into_iter().filter(is_workflow) {
                if !found.contains(&path) {
                    found.push(path);
                }
            }
        }
        found
    }
}

/// Paths below a folder that begin like this, folders with a separator at their end.
fn listing(root: &Path, partial: &str) -> Vec<String> {
    let at = partial.rfind(is_separator).map_or(0, |at| at + 1);
    let (folder, name) = partial.split_at(at);
    let place = match root.join(folder) {
        place if place.as_os_str().is_empty() => PathBuf::from("."),
        place => place,
    };
    let Ok(entries) = fs_err::read_dir(place) else { return Vec::new() };
    let mut found: Vec<String> = entries
        .flatten()
        .filter_map(|entry| {
            let own = entry.file_name().into_string().ok()?;
            let hidden = own.starts_with('.') && !name.starts_with('.');
            let end = if entry.path().is_dir() { String::from(MAIN_SEPARATOR) } else { String::new() };
            (own.starts_with(name) && !hidden).then(|| format!("{folder}{own}{end}"))
        })
        .collect();
    found.sort();
    found
}

/// What could follow, shown behind the cursor: the arguments of a command that has none yet.
pub(super) fn usage_hint(line: &str) -> Option<&'static str> {
    let split = split(line);
    let (command, arguments) = commands::find(&split.words)?;
    let fits = arguments.is_empty() && !split.unfinished && !command.usage.is_empty();
    fits.then_some(command.usage)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(folder: &Path) -> Known {
        let variable = |name: &str, current: &str, values: &[&str]| Variable {
            name: name.into(),
            current: current.into(),
            values: values.iter().map(|value| (*value).to_owned()).collect(),
        };
        Known {
            variables: vec![
                variable("prompt", "a red boat", &[]),
                variable("sampler", "", &["EulerDiscreteScheduler", "DDIMScheduler"]),
                variable("steps", "25", &[]),
            ],
            settings: Vec::new(),
            workflow_dir: folder.to_owned(),
            last_seed: Some("77".into()),
        }
    }

    /// What the tab key makes of a line with the cursor at its end: the line with each candidate in place.
    fn completed(line: &str, known: &Known) -> Vec<String> {
        let (start, found) = candidates(line, line.len(), known);
        found.into_iter().map(|candidate| format!("{}{}", &line[..start], candidate.replacement)).collect()
    }

    #[test]
    fn commands_variables_settings_and_their_values_are_completed() {
        let nowhere = tempfile::tempdir().expect("a temporary folder");
        let known = known(nowhere.path());
        let cases: [(&str, &[&str]); 21] = [
            ("wor", &["workflow "]),
            ("workflow re", &["workflow reload ", "workflow restart "]),
            ("workflow run ", &["workflow run ask "]),
            ("workflow run ask pr", &["workflow run ask prompt "]),
            ("run ask st", &["run ask steps "]),
            ("help wor", &["help workflow "]),
            ("help workflow l", &["help workflow load "]),
            ("arg set ", &["arg set prompt=", "arg set sampler=", "arg set steps="]),
            ("arg set s", &["arg set sampler=", "arg set steps="]),
            ("arg set prompt=", &["arg set prompt=\"a red boat\" "]),
            ("arg set prompt=\"a r", &["arg set prompt=\"a red boat\" "]),
            ("arg set steps=3 sampler=E", &["arg set steps=3 sampler=EulerDiscreteScheduler "]),
            ("arg clear pr", &["arg clear prompt "]),
            ("config set prev", &["config set preview ", "config set preview_every "]),
            ("config set preview o", &["config set preview off "]),
            ("config set preview=a", &["config set preview=auto "]),
            ("config set device c", &["config set device cpu ", "config set device cuda "]),
            ("seed ", &["seed keep ", "seed random ", "seed 77 "]),
            ("seed k", &["seed keep "]),
            ("arg set nope=", &[]),
            ("workflow status x", &[]),
        ];
        for (line, expected) in cases {
            assert_eq!(completed(line, &known), expected, "{line}");
        }
        assert_eq!(completed("", &known).len(), commands::GROUPS.len() + commands::members(None).count());
    }

    #[test]
    fn workflow_files_are_completed_by_path_and_by_name() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        for name in ["flux/dev.json", "flux/notes.txt", "my flux/a b.json", "land.json", ".hidden.json"] {
            let path = folder.path().join(name);
            fs_err::create_dir_all(path.parent().expect("a folder")).expect("the folder");
            fs_err::write(path, "{}").expect("the file");
        }
        let known = known(folder.path());
        let root = folder.path().to_str().expect("UTF-8");
        assert_eq!(completed("workflow load lan", &known), ["workflow load land.json "]);
        assert_eq!(completed("load flu", &known), [format!("load flux{MAIN_SEPARATOR}")]);
        assert_eq!(completed("workflow load flux/", &known), ["workflow load flux/dev.json "]);
        assert_eq!(completed("workflow load my", &known), [format!("workflow load \"my flux{MAIN_SEPARATOR}")]);
        assert_eq!(completed("workflow load \"my flux/", &known), ["workflow load \"my flux/a b.json\" "]);
        let whole = format!("workflow load {root}/la");
        assert_eq!(completed(&whole, &known), [format!("workflow load {root}/land.json ")]);
    }

    #[test]
    fn the_cursor_may_stand_inside_the_line() {
        let (start, found) = candidates("wor run", 3, &Known::default());
        assert_eq!((start, found.len()), (0, 1));
    }

    #[test]
    fn a_hint_shows_what_a_command_takes() {
        assert_eq!(usage_hint("workflow load "), Some("FILE"));
        assert_eq!(usage_hint("arg set "), Some("NAME=VALUE ..."));
        assert_eq!(usage_hint("workflow load"), None);
        assert_eq!(usage_hint("workflow load x"), None);
        assert_eq!(usage_hint("workflow run "), None);
    }
}
