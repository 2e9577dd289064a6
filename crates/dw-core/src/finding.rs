//! What is wrong with a document, said so that a person can mend it.

use std::{
    collections::BTreeSet,
    fmt,
    path::PathBuf,
    sync::{LazyLock, Mutex, PoisonError},
};

use serde::{Deserialize, Deserializer, Serialize};

/// Whether a finding stops a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The workflow cannot run.
    Error,
    /// It may run; somebody should look.
    Warning,
}

/// A place in a document.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Place {
    /// The file, when the document came from one.
    pub file: Option<PathBuf>,
    /// Line, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
    /// JSON pointer (RFC 6901), empty for the whole document.
    pub pointer: String,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.file {
            Some(file) => write!(f, "{}:{}:{}", file.display(), self.line, self.column),
            None => write!(f, "<stdin>:{}:{}", self.line, self.column),
        }
    }
}

/// One thing that is wrong, where, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Whether it stops a run.
    pub severity: Severity,
    /// A stable short name, for scripts (`unknown-variable`).
    pub code: &'static str,
    /// What is wrong, values in backticks.
    pub message: String,
    /// The next thing to try, when there is one.
    pub remedy: Option<String>,
    /// Where.
    #[serde(flatten)]
    pub place: Place,
}

impl Finding {
    /// The same finding with the next thing to try.
    #[must_use]
    pub fn with_remedy(self, remedy: impl Into<String>) -> Self {
        Self { remedy: Some(remedy.into()), ..self }
    }
}

impl<'de> Deserialize<'de> for Finding {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Received {
            severity: Severity,
            code: String,
            message: String,
            remedy: Option<String>,
            #[serde(flatten)]
            place: Place,
        }
        let Received { severity, code, message, remedy, place } = Received::deserialize(deserializer)?;
        Ok(Self { severity, code: known_code(code), message, remedy, place })
    }
}

/// The code as a text that lives as long as the program; there are a few dozen of them, each kept once.
fn known_code(code: String) -> &'static str {
    static KNOWN: LazyLock<Mutex<BTreeSet<&'static str>>> = LazyLock::new(Mutex::default);
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(code) = known.get(code.as_str()) {
        return code;
    }
    let code: &'static str = Box::leak(code.into_boxed_str());
    known.insert(code);
    code
}

/// Sorts findings by file and position and removes repetitions.
pub(crate) fn settle(findings: &mut Vec<Finding>) {
    let spot = |finding: &Finding| (finding.place.file.clone(), finding.place.line, finding.place.column);
    findings.sort_by_key(spot);
    let mut kept: Vec<Finding> = Vec::new();
    for finding in findings.drain(..) {
        if !kept.contains(&finding) {
            kept.push(finding);
        }
    }
    *findings = kept;
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let severity = match self.severity {
            Severity::Error => "error",
            Severity::Warning => "warning",
        };
        write!(f, "{}: {severity}[{}]: {}", self.place, self.code, self.message)?;
        if let Some(remedy) = &self.remedy {
            write!(f, "; {remedy}")?;
        }
        Ok(())
    }
}
