//! Plain requests of host programs: a method with parameters instead of a workflow, turned into one.
//!
//! Owns what a request may say ([`request`]), the workflow it stands for ([`document`]) and how its outcome is told
//! ([`answer`]). Leaves the running to the engine and the lines to the worker.

mod answer;
mod document;
mod request;

pub use answer::{Answer, Failure, FailureCode, Picture, RequestResult, schema as answer_schema};
pub use document::{OUTPUT_BASE64, Output, Prepared};
pub use request::{
    Batch, Call, Cancel, Generation, LoraAdapter, Loras, Model, Request, RequestId, Stage, StageMethod, Unload,
    WorkerType, schema as request_schema,
};
