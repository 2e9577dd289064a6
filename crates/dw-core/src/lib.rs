//! The workflow language of dw: JSON documents with source positions, variables, references between
//! steps, plans, artifacts and the files they become.
//!
//! Knows no tensor, no network client, no process and no terminal: it turns bytes into a checked
//! [`plan`], and artifacts into files. Models live in `dw-pipelines`, tasks in `dw-tasks`, and
//! `dw-engine` puts the three together.

pub mod arguments;
pub mod artifact;
pub mod cancel;
pub mod catalog;
pub mod document;
pub mod event;
pub mod finding;
pub mod fit;
pub mod media;
pub mod metadata;
pub mod output;
pub mod paths;
pub mod picture;
pub mod plan;
pub mod references;
pub mod seed;
pub mod variables;
pub mod workflow;
