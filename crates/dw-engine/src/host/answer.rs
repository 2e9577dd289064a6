//! What a host program is told: progress, results, failures.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::request::RequestId;
use crate::{EngineError, Summary};

/// A stable name for a failure, for programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum FailureCode {
    /// The line is no JSON object, too long or not UTF-8.
    BadLine,
    /// The request says something it cannot say.
    BadRequest,
    /// No request of that name waits or runs.
    UnknownRequest,
    /// The workflow that the request stands for does not hold; nothing was loaded.
    InvalidWorkflow,
    /// A step failed.
    StepFailed,
    /// Something outside the steps failed: a folder, the device.
    SetupFailed,
    /// Somebody asked to stop.
    Cancelled,
    /// The worker ends, and the request was still waiting.
    ShuttingDown,
    /// A fault of dw itself; the worker ends.
    InternalFault,
}

/// Why a request has no result.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Failure {
    /// A stable name.
    pub code: FailureCode,
    /// What happened, values in backticks.
    pub message: String,
    /// The next thing to try, when there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
    /// The step or stage it happened in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step: Option<String>,
}

impl Failure {
    /// A failure of this code.
    pub fn new(code: FailureCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), remedy: None, step: None }
    }

    /// The request itself is wrong.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(FailureCode::BadRequest, message)
    }

    /// The same failure with the next thing to try.
    #[must_use]
    pub fn with_remedy(self, remedy: impl Into<String>) -> Self {
        Self { remedy: Some(remedy.into()), ..self }
    }
}

impl From<&EngineError> for Failure {
    fn from(error: &EngineError) -> Self {
        match error {
            EngineError::Invalid(findings) => {
                let errors = findings.iter().filter(|finding| finding.severity == dw_core::finding::Severity::Error);
                let messages: Vec<&str> = errors.clone().map(|finding| finding.message.as_str()).collect();
                Self {
                    remedy: errors.clone().find_map(|finding| finding.remedy.clone()),
                    ..Self::new(FailureCode::InvalidWorkflow, messages.join("; "))
                }
            }
            EngineError::Cancelled => Self::new(FailureCode::Cancelled, "cancelled"),
            EngineError::Step { step, iteration, message } => {
                Self { step: Some(step.clone()), ..Self::new(FailureCode::StepFailed, format!("{message}{iteration}")) }
            }
            EngineError::Setup(message) => Self::new(FailureCode::SetupFailed, message.clone()),
        }
    }
}

/// One finished picture, or another file that a workflow made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Picture {
    /// Where it was written, when it went to a file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// The file's bytes as base64, when it was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base64: Option<String>,
    /// `image/png`, `image/jpeg` or `image/webp`; `application/octet-stream` for what is no picture.
    pub content_type: String,
}

/// What came of a request.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct RequestResult {
    /// Finished pictures, in order.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub images: Vec<Picture>,
    /// The seed the noise started from; a list when each picture has its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<Value>,
    /// From start to end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
    /// What `status`, `load` and `unload` say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub report: Option<Value>,
}

impl RequestResult {
    /// The result of a finished run.
    pub(super) fn of(summary: &Summary, images: Vec<Picture>) -> Self {
        let seed = summary.seed.as_ref().and_then(|seed| serde_json::to_value(seed).ok());
        Self { images, seed, seconds: Some(summary.seconds), report: None }
    }

    /// A result that is a report.
    pub(super) fn report(report: Value) -> Self {
        Self { report: Some(report), ..Self::default() }
    }
}

/// One line to a host about one of its requests.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Answer {
    /// The request waits; so many are before it.
    RequestQueued {
        /// Which request.
        request_id: RequestId,
        /// How many requests come first.
        before: usize,
    },
    /// The request begins.
    RequestStarted {
        /// Which request.
        request_id: RequestId,
    },
    /// Weights are being read.
    RequestLoading {
        /// Which request.
        request_id: RequestId,
        /// The component (`unet`, `vae`, …).
        component: String,
        /// Bytes read so far.
        bytes: u64,
        /// Bytes in all.
        total: u64,
    },
    /// A denoising step is done.
    RequestProgress {
        /// Which request.
        request_id: RequestId,
        /// The stage of a batch, from 1.
        stage: usize,
        /// How many stages there are.
        stages: usize,
        /// Steps done.
        step: usize,
        /// Steps in all.
        of: usize,
        /// About how many seconds this stage still takes; none before two steps are done.
        seconds_left: Option<f64>,
        /// A small PNG picture as base64, when previews were asked for.
        #[serde(skip_serializing_if = "Option::is_none")]
        preview: Option<String>,
    },
    /// Something worth knowing that does not stop the request.
    RequestWarning {
        /// Which request.
        request_id: RequestId,
        /// What, and what to do about it.
        message: String,
    },
    /// The request is done.
    RequestResult {
        /// Which request.
        request_id: RequestId,
        /// Its `method`.
        method: String,
        /// What came of it.
        result: RequestResult,
    },
    /// The request, or the line, has no result.
    RequestError {
        /// Which request; none when the line does not say.
        request_id: Option<RequestId>,
        /// Why.
        error: Failure,
    },
}

/// JSON Schema of the lines a host receives about its requests.
pub fn schema() -> Value {
    let mut schema = schemars::schema_for!(Answer);
    schema.insert("title".into(), "Answers of `dw worker --stdio` to plain requests".into());
    schema.to_value()
}
