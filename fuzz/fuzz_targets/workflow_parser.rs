//! A workflow can come from anywhere; checking one may only give findings.

#![no_main]

use dw_engine::{RunRequest, Source};

libfuzzer_sys::fuzz_target!(|text: &str| {
    let source = Source::Text { text: text.to_owned(), base_dir: "/nonexistent".into() };
    let variables = serde_json::Map::new();
    let request = RunRequest { source, variables, seed: None, output_dir: "/nonexistent".into(), metadata: true };
    let _ = dw_engine::check(&request);
});
