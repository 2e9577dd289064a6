//! The settings of the loop: one table of what can be set, the file that keeps them, and the commands
//! `config show`, `config set` and `config save`.
//!
//! The file is `repl.json` beside the settings file of the program. It holds only what differs from the
//! defaults, each value as it would be typed.

use std::{
    fmt::Write as _,
    io::Write,
    path::{Path, PathBuf},
};

use clap::ValueEnum;
use dw_core::{nearest::nearest, paths::check_string};
use etcetera::BaseStrategy;
use fs_err as fs;
use serde_json::{Map, Value};

use crate::{
    device::DeviceChoice,
    logging::{Level, level_name},
};

use super::{
    Repl,
    parse::Word,
    picture::Protocol,
    reply::{Failure, Reply},
};

/// Longest path that a setting may be.
const LONGEST_PATH: usize = 1000;

/// The settings in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Config {
    /// Where files go.
    pub(super) output_dir: PathBuf,
    /// Where workflows are looked for that are not found as typed.
    pub(super) workflow_dir: PathBuf,
    /// How much goes into the log.
    pub(super) log_level: Level,
    /// Whether pictures are shown in the terminal.
    pub(super) preview: PreviewChoice,
    /// After how many denoising steps a preview is made; 0 for never.
    pub(super) preview_every: usize,
    /// Whether PNG files say how they were made where the workflow does not say.
    pub(super) metadata: bool,
    /// Where to compute; none to let dw choose.
    pub(super) device: Option<DeviceChoice>,
    /// Bytes that loaded models may take; none for the worker's own measure.
    pub(super) cache_budget: Option<u64>,
}

/// Whether pictures are shown in the terminal, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PreviewChoice {
    /// In terminals that are known to show pictures, as they take them.
    Auto,
    /// In this way, whatever the terminal is.
    Always(Protocol),
    /// Never.
    Off,
}

impl PreviewChoice {
    /// All choices with their names.
    const ALL: [(&str, Self); 6] = [
        ("auto", Self::Auto),
        ("kitty", Self::Always(Protocol::Kitty)),
        ("iterm", Self::Always(Protocol::Iterm)),
        ("sixel", Self::Always(Protocol::Sixel)),
        ("blocks", Self::Always(Protocol::Blocks)),
        ("off", Self::Off),
    ];
}

impl Default for Config {
    fn default() -> Self {
        Self {
            output_dir: "outputs".into(),
            workflow_dir: "examples".into(),
            log_level: Level::Info,
            preview: PreviewChoice::Auto,
            preview_every: 0,
            metadata: true,
            device: None,
            cache_budget: None,
        }
    }
}

/// One thing that can be set.
pub(super) struct Setting {
    /// Its name.
    pub(super) name: &'static str,
    /// What it means, in a line.
    pub(super) summary: &'static str,
    /// The values it can have, where they can be listed.
    pub(super) values: &'static [&'static str],
    /// Whether it takes a new worker to take effect.
    pub(super) of_worker: bool,
    get: fn(&Config) -> String,
    set: fn(&mut Config, &str) -> Result<(), String>,
}

/// All settings, in the order of `config show`.
pub(super) const SETTINGS: &[Setting] = &[
    Setting {
        name: "output_dir",
        summary: "folder for the files",
        values: &[],
        of_worker: false,
        get: |config| config.output_dir.display().to_string(),
        set: |config, text| {
            config.output_dir = folder(text).map_err(|reason| format!("Error: Invalid output directory: {reason}"))?;
            Ok(())
        },
    },
    Setting {
        name: "workflow_dir",
        summary: "folder in which workflows are found by name",
        values: &[],
        of_worker: false,
        get: |config| config.workflow_dir.display().to_string(),
        set: |config, text| {
            let invalid = |reason: String| format!("Error: Invalid workflow directory: {reason}");
            let path = folder(text).map_err(invalid)?;
            if !path.is_dir() {
                return Err(invalid(format!("`{}` is not a folder", path.display())));
            }
            config.workflow_dir = path;
            Ok(())
        },
    },
    Setting {
        name: "log_level",
        summary: "how much goes into the log",
        values: &["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"],
        of_worker: false,
        get: |config| level_name(config.log_level),
        set: |config, text| {
            config.log_level = Level::from_str(text, true)
                .map_err(|_| "Error: Log level must be one of: DEBUG, INFO, WARNING, ERROR, CRITICAL".to_owned())?;
            Ok(())
        },
    },
    Setting {
        name: "preview",
        summary: "how pictures are shown in the terminal; auto asks what it is, blocks works in all with colours",
        values: &["auto", "kitty", "iterm", "sixel", "blocks", "off"],
        of_worker: false,
        get: |config| {
            let name = PreviewChoice::ALL.iter().find(|(_, choice)| *choice == config.preview);
            name.map(|(name, _)| (*name).to_owned()).unwrap_or_default()
        },
        set: |config, text| {
            let text = if text == "on" { "auto" } else { text };
            let choice = PreviewChoice::ALL.iter().find(|(name, _)| *name == text).map(|(_, choice)| *choice);
            config.preview = choice.ok_or_else(|| one_of("preview", text, "auto, kitty, iterm, sixel, blocks, off"))?;
            Ok(())
        },
    },
    Setting {
        name: "preview_every",
        summary: "make a preview after every so many denoising steps; 0 for never",
        values: &[],
        of_worker: false,
        get: |config| config.preview_every.to_string(),
        set: |config, text| {
            config.preview_every =
                text.parse().map_err(|_| one_of("preview_every", text, "a whole number, 0 for never"))?;
            Ok(())
        },
    },
    Setting {
        name: "metadata",
        summary: "write into PNG files how they were made",
        values: &["true", "false"],
        of_worker: false,
        get: |config| config.metadata.to_string(),
        set: |config, text| {
            config.metadata = match text {
                "true" | "on" | "yes" => true,
                "false" | "off" | "no" => false,
                _ => return Err(one_of("metadata", text, "true, false")),
            };
            Ok(())
        },
    },
    Setting {
        name: "device",
        summary: "where to compute: cpu, cuda, cuda:N, metal; auto lets dw choose",
        values: &["auto", "cpu", "cuda", "metal"],
        of_worker: true,
        get: |config| config.device.as_ref().and_then(DeviceChoice::name).unwrap_or_else(|| "auto".into()),
        set: |config, text| {
            let choice: DeviceChoice = text.parse().map_err(|reason| format!("Error: {reason}"))?;
            config.device = Some(choice).filter(|choice| *choice != DeviceChoice::Auto);
            Ok(())
        },
    },
    Setting {
        name: "cache_budget",
        summary: "memory that loaded models may take, as 6GB or 800MB; auto is most of the device's",
        values: &["auto"],
        of_worker: true,
        get: |config| config.cache_budget.map_or_else(|| "auto".into(), size_text),
        set: |config, text| {
            config.cache_budget = size(text).ok_or_else(|| one_of("cache_budget", text, "a size as 6GB, or auto"))?;
            Ok(())
        },
    },
];

fn one_of(name: &str, value: &str, expected: &str) -> String {
    format!("Error: '{value}' is no value of {name}; it takes {expected}")
}

/// A folder as typed, made absolute, so that it stays the same wherever the program starts next time.
fn folder(text: &str) -> Result<PathBuf, String> {
    check_string(text, LONGEST_PATH).map_err(|error| error.to_string())?;
    std::path::absolute(text).map_err(|error| error.to_string())
}

/// Bytes of `6GB`, `1.5 GB`, `800MB`, `1000`; the inner none is `auto`.
#[expect(clippy::option_option, reason = "no size, and no sense, are two things")]
fn size(text: &str) -> Option<Option<u64>> {
    let text = text.trim().to_ascii_lowercase();
    if text == "auto" {
        return Some(None);
    }
    let digits = text.find(|letter: char| !letter.is_ascii_digit() && letter != '.').unwrap_or(text.len());
    let unit = match text[digits..].trim() {
        "" | "b" => 1.0,
        "kb" | "k" => 1e3,
        "mb" | "m" => 1e6,
        "gb" | "g" => 1e9,
        "gib" => 1024.0 * 1024.0 * 1024.0,
        "mib" => 1024.0 * 1024.0,
        _ => return None,
    };
    let bytes = text[..digits].parse::<f64>().ok()? * unit;
    (1.0..1e18).contains(&bytes).then_some(Some(bytes as u64))
}

/// Bytes as [`size`] reads them back.
fn size_text(bytes: u64) -> String {
    match bytes {
        _ if bytes.is_multiple_of(1_000_000_000) => format!("{}GB", bytes / 1_000_000_000),
        _ if bytes.is_multiple_of(1_000_000) => format!("{}MB", bytes / 1_000_000),
        _ => bytes.to_string(),
    }
}

/// The setting of that name.
pub(super) fn setting(name: &str) -> Option<&'static Setting> {
    SETTINGS.iter().find(|setting| setting.name == name)
}

impl Setting {
    /// Its value as it would be typed.
    pub(super) fn value(&self, config: &Config) -> String {
        (self.get)(config)
    }
}

impl Config {
    /// The file that keeps the settings; none where no folder is known.
    pub(super) fn file() -> Option<PathBuf> {
        etcetera::choose_base_strategy().ok().map(|folders| folders.config_dir().join("dw/repl.json"))
    }

    /// These settings, changed by what a file says, and what is wrong with the file.
    pub(super) fn with_file(mut self, path: &Path) -> (Self, Vec<String>) {
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return (self, Vec::new()),
            Err(error) => return (self, vec![error.to_string()]),
        };
        let said: Map<String, Value> = match serde_json::from_str(&text) {
            Ok(said) => said,
            Err(error) => return (self, vec![format!("`{}` is ignored: {error}", path.display())]),
        };
        let mut warnings = Vec::new();
        for (name, value) in &said {
            let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            // A setting of a newer dw is no fault.
            if let Some(Err(reason)) = setting(name).map(|setting| (setting.set)(&mut self, &text)) {
                let reason = reason.trim_start_matches("Error: ");
                warnings.push(format!("`{}`: {reason}", path.display()));
            }
        }
        (self, warnings)
    }

    /// Writes what differs from the defaults, whole or not at all.
    fn write(&self, path: &Path) -> std::io::Result<()> {
        let defaults = Self::default();
        let differing = SETTINGS.iter().filter(|setting| setting.value(self) != setting.value(&defaults));
        let said: Map<String, Value> =
            differing.map(|setting| (setting.name.to_owned(), setting.value(self).into())).collect();
        let folder = path.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(folder)?;
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        writeln!(file, "{}", serde_json::to_string_pretty(&said)?)?;
        file.persist(path)?;
        Ok(())
    }
}

/// `config show`.
#[expect(clippy::unnecessary_wraps, reason = "all commands have this form")]
pub(super) fn show(repl: &mut Repl<'_>, _: &[Word]) -> Result<Reply, Failure> {
    let mut text = "Current configuration:\n".to_owned();
    for setting in SETTINGS {
        let _ = writeln!(text, "  {}={}", setting.name, setting.value(&repl.config));
    }
    Ok(Reply::answer(text))
}

/// `config set`.
pub(super) fn set(repl: &mut Repl<'_>, words: &[Word]) -> Result<Reply, Failure> {
    let (name, value) = match words {
        [] => return show(repl, words),
        [one] => match one.text.split_once('=') {
            Some((name, value)) => (name.trim(), value.trim().to_owned()),
            None => return Err(Failure::usage("Error: Invalid format. Use: config set name=value")),
        },
        [name, value @ ..] => match name.text.split_once('=') {
            // A value of several words that was not quoted.
            Some((name, first)) => (name, join(first, value)),
            None => (name.text.as_str(), join("", value)),
        },
    };
    let setting = setting(name).ok_or_else(|| unknown(name))?;
    (setting.set)(&mut repl.config, &value).map_err(Failure::usage)?;
    applied(repl, setting)
}

fn join(first: &str, rest: &[Word]) -> String {
    let words = std::iter::once(first).chain(rest.iter().map(|word| word.text.as_str()));
    words.filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
}

fn unknown(name: &str) -> Failure {
    let names: Vec<_> = SETTINGS.iter().map(|setting| setting.name).collect();
    let near = nearest(name, names.iter().copied()).map(|near| format!(" Did you mean '{near}'?"));
    Failure::usage(format!(
        "Error: Unknown setting '{name}'.{} Settings: {}",
        near.unwrap_or_default(),
        names.join(", ")
    ))
}

/// What a change entails, and the answer.
fn applied(repl: &mut Repl<'_>, setting: &Setting) -> Result<Reply, Failure> {
    let value = setting.value(&repl.config);
    let mut text = String::new();
    if setting.name == "log_level" {
        crate::logging::set_level(&value).map_err(Failure::usage)?;
        let _ = writeln!(text, "Log level set to {value}");
    }
    let _ = writeln!(text, "Set {}={value}", setting.name);
    if setting.of_worker {
        if repl.worker.is_running() {
            text += "The worker was ended, for the next run needs a fresh one\n";
        }
        repl.replace_worker();
    }
    let reply = Reply::answer(text);
    let missing = setting.name == "output_dir" && !repl.config.output_dir.is_dir();
    Ok(if missing {
        reply.warning(&format!("Directory '{value}' does not exist; the next run makes it"))
    } else {
        reply
    })
}

/// `config save`.
pub(super) fn save(repl: &mut Repl<'_>, _: &[Word]) -> Result<Reply, Failure> {
    let Some(path) = &repl.config_file else {
        return Err(Failure::failed("Error: no folder for settings is known on this system; set HOME"));
    };
    repl.config.write(path).map_err(|error| Failure::failed(format!("Error: cannot keep the settings: {error}")))?;
    Ok(Reply::answer(format!("Saved to {}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again_and_defaults_are_left_out() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let file = folder.path().join("new/repl.json");
        let config = Config {
            preview: PreviewChoice::Off,
            preview_every: 5,
            cache_budget: Some(2 << 30),
            device: Some(DeviceChoice::Named("cuda:1".into())),
            ..Config::default()
        };
        config.write(&file).expect("written");
        let text = fs::read_to_string(&file).expect("the file");
        assert!(!text.contains("output_dir") && text.contains("\"preview\": \"off\""), "{text}");
        assert_eq!(Config::default().with_file(&file), (config, Vec::new()));
    }

    #[test]
    fn a_file_with_nonsense_is_read_as_far_as_it_makes_sense() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let file = folder.path().join("repl.json");
        fs::write(&file, r#"{"preview_every": 3, "preview": "maybe", "of_the_future": 1}"#).expect("written");
        let (config, warnings) = Config::default().with_file(&file);
        assert_eq!(config.preview_every, 3);
        assert!(warnings.len() == 1 && warnings[0].contains("'maybe' is no value of preview"), "{warnings:?}");
        fs::write(&file, "[").expect("written");
        assert_eq!(Config::default().with_file(&file).1.len(), 1);
    }

    #[test]
    fn sizes_are_read_as_people_write_them() {
        let cases = [
            ("6GB", Some(Some(6_000_000_000))),
            ("1.5 gb", Some(Some(1_500_000_000))),
            ("800MB", Some(Some(800_000_000))),
            ("2GiB", Some(Some(2 << 30))),
            ("1000", Some(Some(1000))),
            ("auto", Some(None)),
            ("much", None),
            ("-1GB", None),
            ("0", None),
        ];
        for (text, expected) in cases {
            assert_eq!(size(text), expected, "{text}");
        }
    }

    #[test]
    fn every_value_that_is_listed_can_be_set_and_is_shown_as_set() {
        for setting in SETTINGS {
            for value in setting.values {
                let mut config = Config::default();
                assert_eq!((setting.set)(&mut config, value), Ok(()), "{}", setting.name);
                assert_eq!(setting.value(&config), *value, "{}", setting.name);
            }
        }
    }
}
