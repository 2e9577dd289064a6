//! Plain requests of host programs: a method with parameters instead of a workflow, turned into one.
//!
//! Owns what a request may say ([`request`]), the workflow it stands for ([`document`]) and how its outcome is told
//! ([`answer`]); [`serve_lines`] reads them line by line, beside the commands of the worker's protocol. Leaves the running
//! to the engine.

mod answer;
mod document;
mod progress;
mod queue;
mod request;
mod session;

pub use answer::{Answer, Failure, FailureCode, Picture, RequestResult, schema as answer_schema};
pub use document::{OUTPUT_BASE64, Output, Prepared};
pub use request::{
    Batch, Call, Cancel, Generation, LoraAdapter, Loras, Model, Request, RequestId, Stage, StageMethod, Unload,
    WorkerType, schema as request_schema,
};
pub use session::{HostOptions, Say, serve_lines};

#[cfg(test)]
mod tests {
    use serde_json::Value;

    #[test]
    fn the_published_schemas_are_those_of_the_types() {
        for (name, schema) in [("host-request", super::request_schema()), ("host-answer", super::answer_schema())] {
            let path = format!("{}/../../schema/{name}.schema.json", env!("CARGO_MANIFEST_DIR"));
            let stored: Value =
                serde_json::from_str(&fs_err::read_to_string(path).expect("it is published")).expect("JSON");
            let remedy = "run `cargo run -p dw-engine --example write-schemas`";
            assert!(stored == schema, "schema/{name}.schema.json is out of date: {remedy}");
        }
    }
}
