//! `dw validate`: everything that is wrong with some workflows, found without running them.

use std::{
    collections::BTreeSet,
    fmt::Write,
    path::{Path, PathBuf},
};

use dw_core::finding::{Finding, Severity};
use dw_engine::{RunRequest, Source};
use serde_json::Map;

use crate::{
    args::{FindingFormat, ValidateArgs},
    error::{CliError, Exit},
    render::{
        findings::{self, Sources, Stream},
        text::{count, error, print, print_json},
    },
    request,
};

/// A workflow and what is wrong with it.
struct Checked {
    name: String,
    /// Its text, when it came from standard input.
    stdin: Option<String>,
    findings: Vec<Finding>,
}

impl Checked {
    fn errors(&self) -> usize {
        self.findings.iter().filter(|finding| finding.severity == Severity::Error).count()
    }
}

/// Runs `dw validate`. What cannot be read does not keep the rest from being checked.
pub(super) fn validate(args: &ValidateArgs) -> Result<Exit, CliError> {
    let (paths, mut troubles) = expand(&args.files);
    let mut checked = Vec::new();
    for path in &paths {
        match request::source(path) {
            Ok(source) => checked.push(check(path, source)),
            Err(trouble) => troubles.push(trouble.to_string()),
        }
    }
    report(&checked, args.format)?;
    for trouble in &troubles {
        error(&format!("Error: {trouble}"));
    }
    Ok(match (troubles.is_empty(), checked.iter().any(|file| file.errors() > 0)) {
        (false, _) => Exit::Usage,
        (true, true) => Exit::Failed,
        (true, false) => Exit::Done,
    })
}

fn check(path: &Path, source: Source) -> Checked {
    let stdin = match &source {
        Source::Text { text, .. } => Some(text.clone()),
        Source::File(_) => None,
    };
    let request =
        RunRequest { source, variables: Map::new(), seed: None, output_dir: PathBuf::from("outputs"), metadata: true };
    Checked { name: path.display().to_string(), stdin, findings: dw_engine::check(&request) }
}

/// The files that arguments name, each once, and what is wrong with the others.
fn expand(arguments: &[PathBuf]) -> (Vec<PathBuf>, Vec<String>) {
    let (mut paths, mut troubles, mut seen) = (Vec::new(), Vec::new(), BTreeSet::new());
    for argument in arguments {
        match matches(argument) {
            Ok(found) => paths.extend(found.into_iter().filter(|path| seen.insert(path.clone()))),
            Err(trouble) => troubles.push(trouble),
        }
    }
    (paths, troubles)
}

/// An argument is a pattern when it looks like one and no file has that very name.
fn matches(argument: &Path) -> Result<Vec<PathBuf>, String> {
    let pattern = argument.to_str().filter(|text| text.contains(['*', '?', '[']) && !argument.exists());
    let Some(pattern) = pattern else { return Ok(vec![argument.to_owned()]) };
    let found = glob::glob(pattern).map_err(|error| format!("`{pattern}` is not a valid pattern: {error}"))?;
    let files: Vec<_> = found.filter_map(Result::ok).filter(|path| !path.is_dir()).collect();
    if files.is_empty() { Err(format!("no file matches `{pattern}`")) } else { Ok(files) }
}

fn report(checked: &[Checked], format: FindingFormat) -> Result<(), CliError> {
    match format {
        FindingFormat::Human => print(&human(checked))?,
        FindingFormat::Json => print_json(&checked.iter().flat_map(|file| &file.findings).collect::<Vec<_>>())?,
        FindingFormat::Github => {
            let lines = checked.iter().flat_map(|file| &file.findings).map(findings::github);
            print(&lines.collect::<String>())?;
        }
    }
    Ok(())
}

fn human(checked: &[Checked]) -> String {
    let mut text = String::new();
    for file in checked {
        let mut sources = Sources::with_stdin(file.stdin.clone());
        for finding in &file.findings {
            text += &findings::human(finding, &mut sources, Stream::Out);
            text += "\n";
        }
        if checked.len() > 1 {
            let _ = writeln!(text, "{}: {}", file.name, verdict(file));
        }
    }
    text + &conclusion(checked)
}

/// The last line: whether the workflow, or all of them, can run.
fn conclusion(checked: &[Checked]) -> String {
    let bad = checked.iter().filter(|file| file.errors() > 0).count();
    match checked {
        [_] if bad == 0 => "Workflow validated successfully\n".into(),
        [file] => format!("Error validating workflow '{}': {}\n", file.name, findings::tally(&file.findings)),
        _ if bad == 0 => String::new(),
        _ => format!("{bad} of {} cannot run\n", count(checked.len(), "workflow")),
    }
}

fn verdict(file: &Checked) -> String {
    match (file.errors(), file.findings.len()) {
        (0, 0) => "valid".into(),
        (0, warnings) => format!("valid, {}", count(warnings, "warning")),
        _ => findings::tally(&file.findings),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder_with(names: &[&str]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().expect("a temporary folder");
        for name in names {
            fs_err::write(folder.path().join(name), "{}").expect("a file");
        }
        folder
    }

    #[test]
    fn a_pattern_becomes_its_files_in_order_and_each_file_comes_once() {
        let folder = folder_with(&["b.json", "a.json", "c.txt"]);
        let arguments = [folder.path().join("b.json"), folder.path().join("*.json")];
        let (paths, troubles) = expand(&arguments);
        let names: Vec<_> = paths.iter().filter_map(|path| path.file_name()?.to_str()).collect();
        assert_eq!(names, ["b.json", "a.json"]);
        assert_eq!(troubles, Vec::<String>::new());
    }

    #[test]
    fn a_file_whose_name_looks_like_a_pattern_is_that_file() {
        let folder = folder_with(&["x[1].json"]);
        let path = folder.path().join("x[1].json");
        assert_eq!(matches(&path), Ok(vec![path]));
    }

    #[test]
    fn a_pattern_without_files_is_said() {
        let folder = folder_with(&[]);
        let (paths, troubles) = expand(&[folder.path().join("*.json")]);
        assert!(paths.is_empty());
        assert!(troubles[0].starts_with("no file matches"), "{troubles:?}");
    }
}
