//! What holds for the whole program, whatever the command: environment file, settings, colours, log,
//! and the device that all of these and the command line lead to.

use std::{
    env, io,
    path::{Path, PathBuf},
};

use dw_engine::{Engine, EngineConfig};
use tracing::level_filters::LevelFilter;

use crate::{
    args::{ColorChoice, Common, ComputeArgs},
    device::DeviceChoice,
    error::CliError,
    logging::{self, Level, LogConfig},
    render::text::warn,
    settings::SettingsFile,
};

/// The circumstances of this call of the program.
#[derive(Debug)]
pub(crate) struct Session {
    /// The settings in force.
    pub(crate) settings: SettingsFile,
    /// The log file, where one could be opened.
    pub(crate) log_file: Result<Option<PathBuf>, String>,
    /// Whether only errors are to be said.
    pub(crate) quiet: bool,
}

impl Session {
    /// Reads `.env` and the settings, sets colours and starts the log. To be called before any thread starts.
    pub(crate) fn start(common: &Common) -> Result<Self, CliError> {
        let mut warnings = Vec::from_iter(load_env_file());
        set_colors(common.color);
        let settings = SettingsFile::load();
        warnings.extend(settings.warnings.iter().cloned());
        let log_file = start_log(common, &settings)?;
        let session = Self { settings, log_file, quiet: common.quiet };
        for warning in warnings {
            session.warn(&warning);
        }
        Ok(session)
    }

    /// Tells the user something that does not stop the command.
    pub(crate) fn warn(&self, message: &str) {
        tracing::warn!("{message}");
        if !self.quiet {
            warn(message);
        }
    }

    /// An engine as the command line, the environment and the settings want it.
    pub(crate) fn engine(&self, compute: &ComputeArgs) -> Result<Engine, CliError> {
        let device = self.device(compute.device.as_ref())?;
        let config = EngineConfig {
            device: device.and_then(|choice| choice.name()),
            offline: compute.offline || offline_by_environment(),
            cuda_noise: self.settings.settings.cuda_noise,
        };
        tracing::info!(?config, "starting the engine");
        Engine::new(config).map_err(|error| CliError::Failed(error.to_string()))
    }

    /// The device asked for: by the command line, else `DW_DEVICE`, else the settings.
    pub(crate) fn device(&self, asked: Option<&DeviceChoice>) -> Result<Option<DeviceChoice>, CliError> {
        if let Some(choice) = asked {
            return Ok(Some(choice.clone()));
        }
        match env::var("DW_DEVICE") {
            Ok(name) if !name.trim().is_empty() => name
                .parse()
                .map(Some)
                .map_err(|reason| CliError::Usage(format!("environment variable DW_DEVICE: {reason}"))),
            _ => Ok(self.settings.settings.device.clone()),
        }
    }
}

/// Whether the environment forbids the network, by the variable that HuggingFace's own tools read.
pub(crate) fn offline_by_environment() -> bool {
    env::var("HF_HUB_OFFLINE")
        .is_ok_and(|value| matches!(value.to_ascii_lowercase().as_str(), "1" | "true" | "yes" | "on"))
}

/// Takes variables from `.env` in the current folder; those that are set already stay as they are.
fn load_env_file() -> Option<String> {
    let path = Path::new(".env");
    match dotenvy::from_path(path) {
        Ok(()) => None,
        Err(dotenvy::Error::Io(error)) if error.kind() == io::ErrorKind::NotFound => None,
        // The parser's message quotes the line, which may hold a secret.
        Err(dotenvy::Error::LineParse(..)) => {
            Some("`.env` has a line that is not NAME=VALUE; it and the lines after it are ignored".into())
        }
        Err(error) => Some(format!("cannot read `.env`: {error}")),
    }
}

fn set_colors(choice: ColorChoice) {
    let (out, err) = match choice {
        ColorChoice::Always => (true, true),
        ColorChoice::Never => (false, false),
        ColorChoice::Auto => {
            let wanted = env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
            (wanted && console::colors_enabled(), wanted && console::colors_enabled_stderr())
        }
    };
    console::set_colors_enabled(out);
    console::set_colors_enabled_stderr(err);
}

/// Starts the log. A file that was asked for must be writable; the usual one need not be.
fn start_log(common: &Common, settings: &SettingsFile) -> Result<Result<Option<PathBuf>, String>, CliError> {
    let level = common.log_level.or(settings.settings.log_level).unwrap_or(Level::Info);
    let console = match common.verbose {
        0 if settings.settings.log_to_console && !common.quiet => Some(level.filter()),
        0 => None,
        1 => Some(LevelFilter::INFO),
        2 => Some(LevelFilter::DEBUG),
        _ => Some(LevelFilter::TRACE),
    };
    let file = common.log_file.clone().or_else(|| settings.log_file());
    match logging::start(&LogConfig { file: file.clone(), level, console }) {
        Err(reason) if common.log_file.is_some() => Err(CliError::Usage(reason)),
        started => Ok(started.map(|()| file)),
    }
}
