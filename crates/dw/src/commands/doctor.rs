//! `dw doctor`: what dw found on this machine, and what is in its way.

use std::{
    path::{Path, PathBuf},
    thread,
};

use dw_engine::{DeviceStatus, Engine, EngineConfig};
use fs_err as fs;
use serde::Serialize;

use crate::{
    args::{DoctorArgs, FEATURES},
    error::{CliError, Exit},
    render::{
        table::Table,
        text::{bytes, error, print, print_json, warn},
    },
    session::Session,
};

/// What was found. In JSON the keys are the fields.
#[derive(Debug, Serialize)]
struct Report {
    version: &'static str,
    features: &'static [&'static str],
    /// The device a run would use.
    device: Option<String>,
    devices: Vec<DeviceStatus>,
    memory: Option<Memory>,
    threads: usize,
    model_cache: Folder,
    hub_token: bool,
    offline: bool,
    settings: Option<PathBuf>,
    settings_found: bool,
    log_file: Option<PathBuf>,
    /// What does not work.
    problems: Vec<String>,
    /// What works otherwise than one may expect.
    warnings: Vec<String>,
}

/// Memory of the machine, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
struct Memory {
    total: u64,
    free: u64,
}

#[derive(Debug, Serialize)]
struct Folder {
    path: PathBuf,
    exists: bool,
    /// Bytes of the files inside, links not followed.
    bytes: u64,
    writable: bool,
}

/// Runs `dw doctor`.
pub(super) fn doctor(args: &DoctorArgs, session: &Session) -> Result<Exit, CliError> {
    let report = examine(session);
    if args.json {
        print_json(&report)?;
    } else {
        print(&describe(&report))?;
        report.warnings.iter().for_each(|warning| warn(warning));
        report.problems.iter().for_each(|problem| error(&format!("Error: {problem}")));
    }
    Ok(if report.problems.is_empty() { Exit::Done } else { Exit::Failed })
}

fn examine(session: &Session) -> Report {
    let (mut problems, mut warnings) = (Vec::new(), session.settings.warnings.clone());
    let device = match chosen_device(session) {
        Ok(device) => device,
        Err(reason) => {
            problems.push(reason);
            None
        }
    };
    let around = dw_engine::surroundings();
    let model_cache = folder(&around.model_cache);
    if !model_cache.writable {
        let path = model_cache.path.display();
        problems.push(format!("the model cache `{path}` cannot be written; set HF_HOME to a folder of yours"));
    }
    let log_file = session.log_file.clone().unwrap_or_else(|reason| {
        warnings.push(reason);
        None
    });
    Report {
        version: env!("CARGO_PKG_VERSION"),
        features: FEATURES,
        device,
        devices: around.devices,
        memory: memory(),
        threads: thread::available_parallelism().map_or(1, usize::from),
        model_cache,
        hub_token: around.has_token,
        offline: around.offline,
        settings: session.settings.path.clone(),
        settings_found: session.settings.found,
        log_file,
        problems,
        warnings,
    }
}

/// The device that a run without `--device` would use; an error when it cannot be used.
fn chosen_device(session: &Session) -> Result<Option<String>, String> {
    let choice = session.device(None).map_err(|error| error.to_string())?;
    let name = choice.and_then(|choice| choice.name());
    let config = EngineConfig { device: name.clone(), offline: true, ..EngineConfig::default() };
    Engine::new(config).map_err(|error| error.to_string())?;
    Ok(name)
}

/// Memory as Linux tells it; other systems have no such file.
fn memory() -> Option<Memory> {
    parse_meminfo(&fs::read_to_string("/proc/meminfo").ok()?)
}

fn parse_meminfo(text: &str) -> Option<Memory> {
    let kilobytes = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
    };
    Some(Memory { total: kilobytes("MemTotal")? * 1024, free: kilobytes("MemAvailable")? * 1024 })
}

fn folder(path: &Path) -> Folder {
    Folder { path: path.to_owned(), exists: path.is_dir(), bytes: size(path), writable: writable(path) }
}

/// Bytes of all files below a folder. Links are not followed: the cache's snapshots are links to its blobs.
fn size(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let sizes = entries.map(|entry| match entry.file_type() {
        Ok(kind) if kind.is_dir() => size(&entry.path()),
        Ok(kind) if kind.is_file() => entry.metadata().map_or(0, |metadata| metadata.len()),
        _ => 0,
    });
    sizes.sum()
}

/// Whether a file can be made in the folder, or in the one it would be made in.
fn writable(folder: &Path) -> bool {
    let existing = folder.ancestors().find(|folder| folder.is_dir());
    existing.is_some_and(|folder| tempfile::tempfile_in(folder).is_ok())
}

fn describe(report: &Report) -> String {
    let mut table = Table::plain(2);
    let mut row = |label: &str, value: String| table.row([label.into(), value]);
    row("dw", format!("{} (features: {})", report.version, report.features.join(", ")));
    for (index, device) in report.devices.iter().enumerate() {
        let memory = device.memory.map(|(free, total)| format!(", {} free of {}", bytes(free), bytes(total)));
        row(if index == 0 { "devices" } else { "" }, format!("{}{}", device.name, memory.unwrap_or_default()));
    }
    row("device", report.device.clone().unwrap_or_else(|| "the first of these".into()));
    if let Some(memory) = report.memory {
        row("memory", format!("{} free of {}", bytes(memory.free), bytes(memory.total)));
    }
    row("threads", report.threads.to_string());
    row("model cache", cache_words(&report.model_cache));
    let token = if report.hub_token { "present" } else { "none; gated models need HF_TOKEN" };
    row("hub token", token.into());
    let network = if report.offline { "off (HF_HUB_OFFLINE)" } else { "allowed" };
    row("network", network.into());
    let found = if report.settings_found { "" } else { " (not there; defaults hold)" };
    row("settings", path_words(report.settings.as_deref()) + found);
    row("log file", path_words(report.log_file.as_deref()));
    table.render()
}

fn cache_words(folder: &Folder) -> String {
    let state = if folder.exists { bytes(folder.bytes) } else { "not there yet".into() };
    let writable = if folder.writable { "" } else { ", not writable" };
    format!("{} ({state}{writable})", folder.path.display())
}

fn path_words(path: Option<&Path>) -> String {
    path.map_or_else(|| "none".into(), |path| path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_as_linux_writes_it() {
        let text = "MemTotal:       16000000 kB\nMemFree:          100000 kB\nMemAvailable:    8000000 kB\n";
        assert_eq!(parse_meminfo(text), Some(Memory { total: 16_384_000_000, free: 8_192_000_000 }));
        assert_eq!(parse_meminfo("MemTotal: lots"), None);
    }

    #[test]
    fn the_size_of_a_cache_counts_each_blob_once() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let blobs = folder.path().join("blobs");
        fs::create_dir(&blobs).expect("a folder");
        fs::write(blobs.join("a"), [0; 100]).expect("a file");
        #[cfg(unix)]
        std::os::unix::fs::symlink(blobs.join("a"), folder.path().join("link")).expect("a link");
        assert_eq!(size(folder.path()), 100);
        assert_eq!(size(&folder.path().join("missing")), 0);
    }

    #[test]
    fn a_folder_that_is_not_there_is_writable_when_it_can_be_made() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        assert!(writable(&folder.path().join("new/deep")));
    }
}
