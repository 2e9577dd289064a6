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
    /// Whether log lines go to standard error, where they would break a progress bar.
    pub(crate) logs_to_console: bool,
}

impl Session {
    /// Reads `.env` and the settings, sets colours and starts the log. To be called before any thread starts.
    pub(crate) fn start(common: &Common) -> Result<Self, CliError> {
        let mut warnings = Vec::from_iter(load_env_file());
        set_colors(common.color);
        let settings = SettingsFile::load();
        warnings.extend(settings.warnings.iter().cloned());
        let console = console_level(common, &settings);
        let log_file = start_log(common, &settings, console)?;
        let session = Self { settings, log_file, quiet: common.quiet, logs_to_console: console.is_some() };
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
            offline: compute.offline,
            cuda_noise: self.settings.settings.cuda_noise,
            ignore_fit: compute.ignore_fit || self.settings.settings.ignore_fit,
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

fn log_level(common: &Common, settings: &SettingsFile) -> Level {
    common.log_level.or(settings.settings.log_level).unwrap_or(Level::Info)
}

/// How much of the log goes to standard error, by `-v` or the settings.
fn console_level(common: &Common, settings: &SettingsFile) -> Option<LevelFilter> {
    match common.verbose {
        0 if settings.settings.log_to_console && !common.quiet => Some(log_level(common, settings).filter()),
        0 => None,
        1 => Some(LevelFilter::INFO),
        2 => Some(LevelFilter::DEBUG),
        _ => Some(LevelFilter::TRACE),
    }
}

/// Starts the log. A file that was asked for must be writable; the usual one need not be.
fn start_log(
    common: &Common,
    settings: &SettingsFile,
    console: Option<LevelFilter>,
) -> Result<Result<Option<PathBuf>, String>, CliError> {
    let file = common.log_file.clone().or_else(|| settings.log_file());
    let config = LogConfig { file: file.clone(), level: log_level(common, settings), console };
    match logging::start(&config) {
        Err(reason) if common.log_file.is_some() => Err(CliError::Usage(reason)),
        started => Ok(started.map(|()| file)),
    }
}
