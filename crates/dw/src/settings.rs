//! The settings file: where it is, what it may say, and what holds when it says nothing.
//!
//! It is `dw/settings.json` in the platform's configuration folder; the file of diffusers-workflow
//! (`$DIFFUSERS_HELPER_ROOT/settings.json` or `~/.diffusers_helper/settings.json`) is read when there is none.

use std::path::{Path, PathBuf};

use clap::ValueEnum;
use etcetera::BaseStrategy;
use fs_err as fs;
use serde_json::{Map, Value};

use crate::{device::DeviceChoice, logging::Level};

/// What a settings file says. Keys that dw does not know are ignored.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Settings {
    /// `log_level`: how much goes into the log file.
    pub(crate) log_level: Option<Level>,
    /// `log_filename`: the log file, relative to the folder of the settings file.
    pub(crate) log_filename: Option<PathBuf>,
    /// `log_to_console`: whether log lines also go to standard error.
    pub(crate) log_to_console: bool,
    /// `device`: where to compute.
    pub(crate) device: Option<DeviceChoice>,
    /// `cuda_noise`: draw noise as torch's CUDA generator does, not as its CPU generator.
    pub(crate) cuda_noise: bool,
    /// `ignore_fit`: load models even when there does not seem to be enough memory.
    pub(crate) ignore_fit: bool,
}

/// The settings in force and where they came from.
#[derive(Clone, Debug, Default)]
pub(crate) struct SettingsFile {
    /// The file that was read, or the one that would be if it existed; none where no folder is known.
    pub(crate) path: Option<PathBuf>,
    /// Whether it exists.
    pub(crate) found: bool,
    /// What it says.
    pub(crate) settings: Settings,
    /// What is wrong with it, in words for the user.
    pub(crate) warnings: Vec<String>,
}

impl SettingsFile {
    /// Reads the settings of the user who runs dw.
    pub(crate) fn load() -> Self {
        let candidates = candidates();
        let found = candidates.iter().find(|path| path.exists());
        match found {
            Some(path) => Self::read(path),
            None => Self { path: candidates.into_iter().next(), ..Self::default() },
        }
    }

    fn read(path: &Path) -> Self {
        let (settings, warnings) = match fs::read_to_string(path) {
            Ok(text) => parse(&text),
            Err(error) => (Settings::default(), vec![error.to_string()]),
        };
        let warnings = warnings.iter().map(|reason| format!("settings file `{}`: {reason}", path.display())).collect();
        Self { path: Some(path.to_owned()), found: true, settings, warnings }
    }

    /// The log file: as the settings say, else in the platform's folder for such files.
    pub(crate) fn log_file(&self) -> Option<PathBuf> {
        let folder = self.path.as_deref().and_then(Path::parent);
        if let (Some(name), Some(folder)) = (&self.settings.log_filename, folder) {
            return Some(folder.join(name));
        }
        let folders = etcetera::choose_base_strategy().ok()?;
        Some(folders.state_dir().unwrap_or_else(|| folders.data_dir()).join("dw/dw.log"))
    }
}

/// Places of a settings file, best first.
fn candidates() -> Vec<PathBuf> {
    let own = etcetera::choose_base_strategy().ok().map(|folders| folders.config_dir().join("dw"));
    let old = match std::env::var_os("DIFFUSERS_HELPER_ROOT") {
        Some(root) if !root.is_empty() => Some(PathBuf::from(root)),
        _ => etcetera::home_dir().ok().map(|home| home.join(".diffusers_helper")),
    };
    [own, old].into_iter().flatten().map(|folder| folder.join("settings.json")).collect()
}

/// Reads what can be read; every key that cannot be is left at its default and named in a warning.
fn parse(text: &str) -> (Settings, Vec<String>) {
    let object: Map<String, Value> = match serde_json::from_str(text) {
        Ok(object) => object,
        Err(error) => {
            return (Settings::default(), vec![format!("invalid settings file, so defaults are used: {error}")]);
        }
    };
    let mut warnings = Vec::new();
    let mut keys = Keys { object: &object, warnings: &mut warnings };
    let settings = Settings {
        log_level: keys.read("log_level", "one of DEBUG, INFO, WARNING, ERROR, CRITICAL", |value| {
            Level::from_str(value.as_str()?, true).ok()
        }),
        log_filename: keys.read("log_filename", "a path", |value| value.as_str().map(PathBuf::from)),
        log_to_console: keys.read("log_to_console", "true or false", Value::as_bool).unwrap_or_default(),
        device: keys.read("device", "cpu, cuda, cuda:N, metal or auto", |value| value.as_str()?.parse().ok()),
        cuda_noise: keys.read("cuda_noise", "true or false", Value::as_bool).unwrap_or_default(),
        ignore_fit: keys.read("ignore_fit", "true or false", Value::as_bool).unwrap_or_default(),
    };
    (settings, warnings)
}

struct Keys<'a> {
    object: &'a Map<String, Value>,
    warnings: &'a mut Vec<String>,
}

impl Keys<'_> {
    /// The value of `key` if it is there, not null and `convert` can use it.
    fn read<T>(&mut self, key: &str, expected: &str, convert: impl Fn(&Value) -> Option<T>) -> Option<T> {
        let value = self.object.get(key).filter(|value| !value.is_null())?;
        let converted = convert(value);
        if converted.is_none() {
            self.warnings.push(format!("`{key}` is {value} and is ignored; it should be {expected}"));
        }
        converted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_keys_of_an_old_settings_file_are_read_and_unknown_ones_ignored() {
        let (settings, warnings) = parse(
            r#"{"log_level": "warning", "log_filename": "log/x.log", "log_to_console": true, "device": "cuda:1",
                "enable_tf32": true, "no_such_key": 1}"#,
        );
        assert_eq!(warnings, Vec::<String>::new());
        assert_eq!(
            settings,
            Settings {
                log_level: Some(Level::Warning),
                log_filename: Some("log/x.log".into()),
                log_to_console: true,
                device: Some(DeviceChoice::Named("cuda:1".into())),
                cuda_noise: false,
                ignore_fit: false,
            }
        );
    }

    #[test]
    fn a_value_that_makes_no_sense_is_named_and_the_rest_holds() {
        let (settings, warnings) =
            parse(r#"{"device": "gpu", "log_to_console": 1, "cuda_noise": true, "log_level": null}"#);
        assert_eq!(settings, Settings { cuda_noise: true, ..Settings::default() });
        assert_eq!(warnings.len(), 2, "{warnings:?}");
        assert!(warnings.iter().any(|warning| warning.contains("`device`")), "{warnings:?}");
    }

    #[test]
    fn text_that_is_not_json_means_defaults_and_a_warning() {
        for bad in ["{", "[]", ""] {
            let (settings, warnings) = parse(bad);
            assert_eq!(settings, Settings::default());
            assert!(warnings[0].contains("invalid settings file"), "{warnings:?}");
        }
    }
}
