//! Why a run did not finish.

use dw_core::finding::Finding;

/// Why a run did not finish.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The document or its arguments are wrong; nothing was loaded.
    #[error("{}", problems(.0))]
    Invalid(Vec<Finding>),
    /// Somebody asked to stop; finished files stay.
    #[error("cancelled")]
    Cancelled,
    /// A step failed.
    #[error("step `{step}`{iteration}: {message}")]
    Step {
        /// The step's name.
        step: String,
        /// ` (iteration 3 of 8)`, or empty when there is one.
        iteration: String,
        /// What happened and what to do.
        message: String,
    },
    /// Something outside the steps failed: the output folder, the device.
    #[error("{0}")]
    Setup(String),
}

fn problems(findings: &[Finding]) -> String {
    match findings {
        [one] => one.to_string(),
        many => format!("the workflow has {} problems", many.len()),
    }
}
