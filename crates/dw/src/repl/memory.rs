//! `memory show`, `memory clear` and `models`: what is loaded, what it takes, and what there is to load.

use std::fmt::Write as _;

use std::path::Path;

use dw_engine::{Engine, MemoryReport, worker::WorkerError};

use crate::render::{
    table::Table,
    text::{bytes, count},
};

use super::{
    Repl,
    parse::Word,
    reply::{Failure, Reply},
};

const NO_WORKER: &str = "No worker process running";

/// `memory show`.
pub(super) fn show(repl: &mut Repl<'_>, _: &[Word]) -> Result<Reply, Failure> {
    if !repl.worker.is_running() {
        return Ok(Reply::answer(NO_WORKER));
    }
    let report = repl.worker.memory().map_err(|error| failure("getting memory status", &error))?;
    Ok(Reply::answer(described(&report)))
}

/// `memory clear`.
pub(super) fn clear(repl: &mut Repl<'_>, _: &[Word]) -> Result<Reply, Failure> {
    if !repl.worker.is_running() {
        return Ok(Reply::answer(NO_WORKER));
    }
    let report = repl.worker.clear_memory().map_err(|error| failure("clearing memory", &error))?;
    Ok(Reply::answer(format!("{}Memory cleared successfully\n", described(&report))))
}

fn failure(doing: &str, error: &WorkerError) -> Failure {
    Failure::failed(format!("Error {doing}: {error}"))
}

/// A report as people read it.
fn described(report: &MemoryReport) -> String {
    let mut table = Table::plain(2);
    let known = |size: Option<u64>| size.map_or_else(|| "not known".into(), bytes);
    for (name, value) in [
        ("Device", report.device_name.clone()),
        ("Allocated", bytes(report.allocated)),
        ("Reserved", known(report.reserved)),
        ("Free", known(report.free)),
        ("Total", known(report.total)),
        ("Budget", known(report.budget)),
        ("Process", known(report.host_rss)),
        ("Growth", growth(report.growth_since_last_run)),
    ] {
        table.row([format!("  {name}"), value]);
    }
    let mut text = format!("{}Runs in this session: {}\n", table.render(), report.run_count);
    text += &loaded(report);
    text
}

fn growth(growth: Option<i64>) -> String {
    match growth {
        None => "not known before the second run".into(),
        Some(growth) => {
            format!("{}{} in the last run", if growth < 0 { "-" } else { "+" }, bytes(growth.unsigned_abs()))
        }
    }
}

fn loaded(report: &MemoryReport) -> String {
    if report.components.is_empty() {
        return "Loaded: nothing\n".into();
    }
    let mut table = Table::plain(3);
    for component in &report.components {
        table.row([format!("  {}", component.name), bytes(component.bytes), component.class.clone()]);
    }
    format!("Loaded: {}\n{}", count(report.components.len(), "component"), table.render())
}

/// `models`.
pub(super) fn models(repl: &mut Repl<'_>, _: &[Word]) -> Result<Reply, Failure> {
    let mut text = if repl.worker.is_running() {
        loaded(&repl.worker.memory().map_err(|error| failure("getting memory status", &error))?)
    } else {
        format!("Loaded: nothing ({})\n", NO_WORKER.to_lowercase())
    };
    let built_in = Engine::catalog().models;
    text += "Built in:\n";
    text += &built_in.iter().map(|name| format!("  builtin:{name}\n")).collect::<String>();
    let cache = dw_engine::surroundings().model_cache;
    let downloaded = downloaded(&cache);
    if !downloaded.is_empty() {
        let mut table = Table::plain(2);
        for (name, size) in downloaded {
            table.row([format!("  {name}"), bytes(size)]);
        }
        let _ = write!(text, "Downloaded, in {}:\n{}", cache.display(), table.render());
    }
    Ok(Reply::answer(text))
}

/// Models in a cache of the hub, with the bytes they take there.
fn downloaded(cache: &Path) -> Vec<(String, u64)> {
    let entries = fs_err::read_dir(cache).into_iter().flatten().flatten();
    let mut found: Vec<(String, u64)> = entries
        .filter_map(|entry| {
            let folder = entry.file_name().into_string().ok()?;
            let name = folder.strip_prefix("models--")?.replace("--", "/");
            let blobs = fs_err::read_dir(entry.path().join("blobs")).into_iter().flatten().flatten();
            Some((name, blobs.filter_map(|blob| Some(blob.metadata().ok()?.len())).sum()))
        })
        .collect();
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cache_of_the_hub_is_read() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        for (name, text) in
            [("models--a--b--c/blobs/x", "12345"), ("models--a--b--c/blobs/y", "1"), ("datasets--d/blobs/z", "")]
        {
            let path = folder.path().join(name);
            fs_err::create_dir_all(path.parent().expect("a folder")).expect("the folder");
            fs_err::write(path, text).expect("the file");
        }
        assert_eq!(downloaded(folder.path()), [("a/b/c".to_owned(), 6)]);
        assert_eq!(downloaded(Path::new("/no/such/folder")), []);
    }

    #[test]
    fn growth_has_a_sign() {
        assert_eq!(growth(Some(-1_500_000)), "-1.5 MB in the last run");
        assert_eq!(growth(Some(0)), "+0 B in the last run");
    }
}
