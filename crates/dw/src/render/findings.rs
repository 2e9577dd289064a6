//! Findings for people (with the line they are about), for programs (JSON) and for GitHub.

use std::fmt::Write;

use console::Style;
use dw_core::finding::{Finding, Place, Severity};

use super::text::{count, printable};

pub(crate) use super::excerpt::Sources;

/// Where text is going, which decides whether it is coloured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stream {
    /// Standard output.
    Out,
    /// Standard error.
    Err,
}

/// One finding as people read it, with a line break at its end.
pub(crate) fn human(finding: &Finding, sources: &mut Sources, stream: Stream) -> String {
    let styled = |style: Style| if stream == Stream::Err { style.for_stderr() } else { style.for_stdout() };
    let (word, colour) = match finding.severity {
        Severity::Error => ("error", styled(Style::new().red().bold())),
        Severity::Warning => ("warning", styled(Style::new().yellow().bold())),
    };
    let dim = styled(Style::new().blue());
    let label = colour.apply_to(format!("{word}[{}]", finding.code));
    let mut text = format!("{}: {label}: {}\n", finding.place, printable(&finding.message));
    let number = finding.place.line.to_string();
    let margin = " ".repeat(number.len());
    if let Some(excerpt) = sources.excerpt(&finding.place) {
        let bar = dim.apply_to("|");
        let _ = writeln!(text, " {margin} {bar}");
        let _ = writeln!(text, " {} {bar} {}", dim.apply_to(number), excerpt.line);
        let _ = writeln!(text, " {margin} {bar} {}", colour.apply_to(excerpt.mark));
    }
    if let Some(remedy) = &finding.remedy {
        let _ = writeln!(text, " {margin} {} {}", dim.apply_to("= help:"), printable(remedy));
    }
    text
}

/// One finding as a GitHub workflow command.
pub(crate) fn github(finding: &Finding) -> String {
    let command = match finding.severity {
        Severity::Error => "error",
        Severity::Warning => "warning",
    };
    let Place { file, line, column, .. } = &finding.place;
    let file = file.as_ref().map(|file| format!("file={},", property(&file.display().to_string()))).unwrap_or_default();
    let mut message = finding.message.clone();
    if let Some(remedy) = &finding.remedy {
        let _ = write!(message, "; {remedy}");
    }
    let title = property(&format!("dw {}", finding.code));
    format!("::{command} {file}line={line},col={column},title={title}::{}\n", data(&message))
}

/// `2 errors and 1 warning`; no mention of warnings where there are none.
pub(crate) fn tally(findings: &[Finding]) -> String {
    let errors = findings.iter().filter(|finding| finding.severity == Severity::Error).count();
    match findings.len() - errors {
        0 => count(errors, "error"),
        warnings => format!("{} and {}", count(errors, "error"), count(warnings, "warning")),
    }
}

/// Escapes as GitHub asks for the text of a command.
fn data(text: &str) -> String {
    text.replace('%', "%25").replace('\r', "%0D").replace('\n', "%0A")
}

/// Escapes as GitHub asks for a property of a command.
fn property(text: &str) -> String {
    data(text).replace(':', "%3A").replace(',', "%2C")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(file: &str) -> Finding {
        Finding {
            severity: Severity::Error,
            code: "unknown-variable",
            message: "variable `promt` is not declared".into(),
            remedy: Some("did you mean `prompt`?".into()),
            place: Place { file: Some(file.into()), line: 2, column: 3, pointer: "/a".into() },
        }
    }

    #[test]
    fn people_see_the_place_the_line_and_the_remedy() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let file = folder.path().join("w.json");
        fs_err::write(&file, "{\n  \"a\": \"variable:promt\"\n}").expect("a file");
        let file = file.to_str().expect("utf-8");
        let text = human(&finding(file), &mut Sources::default(), Stream::Out);
        assert_eq!(
            console::strip_ansi_codes(&text),
            format!(
                "{file}:2:3: error[unknown-variable]: variable `promt` is not declared\n   |\n \
                 2 |   \"a\": \"variable:promt\"\n   |   ^^^\n   = help: did you mean `prompt`?\n"
            )
        );
    }

    #[test]
    fn a_finding_without_a_readable_file_still_has_its_place() {
        let text = human(&finding("/no/such/file"), &mut Sources::default(), Stream::Out);
        assert!(text.starts_with("/no/such/file:2:3: "), "{text}");
    }

    #[test]
    fn github_gets_one_escaped_line() {
        let mut finding = finding("a,b.json");
        finding.message = "50%\nof it".into();
        assert_eq!(
            github(&finding),
            "::error file=a%2Cb.json,line=2,col=3,title=dw unknown-variable::50%25%0Aof it; did you mean `prompt`?\n"
        );
    }
}
