//! CLIP token ids against transformers, for plain and awkward texts (`tests/parity/make.py` rebuilds the
//! fixtures).

use std::path::{Path, PathBuf};

use dw_pipelines::{hub::ModelFiles, text::ClipTokenizer};
use serde_json::Value;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity")
}

fn tokenizer(folder: &str) -> ClipTokenizer {
    let files = ModelFiles::Folder(fixtures()).tokenizer(folder).expect("readable files");
    ClipTokenizer::new(&files).expect("a valid tokenizer")
}

fn rows(name: &str) -> Vec<(String, Vec<u32>)> {
    let text = std::fs::read_to_string(fixtures().join("tokens.json")).expect("the fixture is there");
    let all: Value = serde_json::from_str(&text).expect("valid JSON");
    serde_json::from_value(all[name]["rows"].clone()).expect("texts with their ids")
}

fn assert_all(tokenizer: &ClipTokenizer, name: &str) {
    for (text, expected) in rows(name) {
        let tokens = tokenizer.encode(&text).expect("text can be tokenized");
        assert_eq!(tokens.ids, expected, "{text:?}");
    }
}

#[test]
fn token_ids_are_those_of_the_reference_when_padding_is_the_end_mark() {
    assert_all(&tokenizer("models/sdxl/tokenizer"), "clip_pad_eos");
}

#[test]
fn an_exclamation_mark_is_padding_when_the_tokenizer_pads_with_it() {
    assert_all(&tokenizer("models/sdxl/tokenizer_2"), "clip_pad_bang");
}

#[test]
fn a_vocabulary_with_merges_gives_the_same_ids_as_a_tokenizer_file() {
    let mut files = ModelFiles::Folder(fixtures()).tokenizer("models/sd15/tokenizer").expect("readable files");
    assert!(files.vocab.is_some() && files.merges.is_some());
    files.tokenizer = None;
    assert_all(&ClipTokenizer::new(&files).expect("vocabulary and merges are enough"), "clip_pad_eos");
}

#[test]
fn what_does_not_fit_is_cut_before_the_end_mark_and_reported() {
    let tokenizer = tokenizer("models/sdxl/tokenizer");
    let text = format!("{}The End of it", "a ".repeat(75));
    let tokens = tokenizer.encode(&text).expect("text can be tokenized");
    assert_eq!(tokens.ids.len(), 77);
    assert_eq!(tokens.ids[76], 999);
    assert_eq!(tokens.lost.as_deref(), Some("The End of it"));
    assert_eq!(tokenizer.encode("a cat").expect("short text").lost, None);
}

#[test]
fn a_folder_without_vocabulary_is_refused_by_name() {
    let files = ModelFiles::Folder(fixtures()).tokenizer("models/sdxl/vae").expect("nothing to read");
    let message = ClipTokenizer::new(&files).expect_err("no tokenizer").to_string();
    assert!(message.contains("vae") && message.contains("tokenizer.json"), "{message}");
}
