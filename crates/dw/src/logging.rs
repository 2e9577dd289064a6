//! Where log lines go: a file that is rotated by size, and standard error with `-v`. What a person is
//! told about a run is not logging; that is [`crate::render`].

mod rolling_file;

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::{Mutex, OnceLock},
};

use clap::ValueEnum;
use tracing::{Event, Subscriber, level_filters::LevelFilter};
use tracing_subscriber::{
    Layer,
    filter::Targets,
    fmt::{
        FmtContext, FormatEvent, FormatFields,
        format::Writer,
        time::{FormatTime, SystemTime},
    },
    layer::SubscriberExt,
    registry::LookupSpan,
    reload,
    util::SubscriberInitExt,
};

use rolling_file::RollingFile;

/// Crates of dw, whose log lines follow the chosen level; everything else speaks from WARNING up.
const OWN_CRATES: [&str; 6] = ["dw", "dw_core", "dw_engine", "dw_kernels", "dw_pipelines", "dw_tasks"];

/// Importance of a log line, by the names that settings files use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Level {
    /// Details for finding faults.
    #[value(name = "DEBUG")]
    Debug,
    /// What dw does.
    #[value(name = "INFO")]
    Info,
    /// What somebody should look at.
    #[value(name = "WARNING", alias = "WARN")]
    Warning,
    /// What went wrong.
    #[value(name = "ERROR")]
    Error,
    /// As ERROR; kept because settings files may say it.
    #[value(name = "CRITICAL")]
    Critical,
}

impl Level {
    /// The same as the log library counts it.
    pub(crate) fn filter(self) -> LevelFilter {
        match self {
            Self::Debug => LevelFilter::DEBUG,
            Self::Info => LevelFilter::INFO,
            Self::Warning => LevelFilter::WARN,
            Self::Error | Self::Critical => LevelFilter::ERROR,
        }
    }
}

/// What to log, and where.
#[derive(Debug)]
pub(crate) struct LogConfig {
    /// The log file; none where no folder for it is known.
    pub(crate) file: Option<PathBuf>,
    /// How much goes into the file.
    pub(crate) level: Level,
    /// How much goes to standard error; none for nothing.
    pub(crate) console: Option<LevelFilter>,
}

/// Starts logging. An error says why the log file cannot be written; standard error is logged to all the same.
pub(crate) fn start(config: &LogConfig) -> Result<(), String> {
    let (file, trouble) = match config.file.as_deref().map(open) {
        None => (None, None),
        Some(Ok(file)) => (Some(file), None),
        Some(Err(reason)) => (None, Some(reason)),
    };
    let (filter, handle) = reload::Layer::new(own_crates_at(config.level.filter()));
    let file = file.map(|file| {
        tracing_subscriber::fmt::layer()
            .event_format(LogLine)
            .with_ansi(false)
            .with_writer(Mutex::new(file))
            .with_filter(filter)
    });
    let console = config.console.map(|level| {
        tracing_subscriber::fmt::layer()
            .event_format(LogLine)
            .with_ansi(false)
            .with_writer(std::io::stderr)
            .with_filter(own_crates_at(level))
    });
    // Fails only when logging has been started before, which is what we want then.
    if tracing_subscriber::registry().with(file).with(console).try_init().is_ok() {
        // Fails only when logging is over.
        let _ = CHANGE.set(Box::new(move |level| _ = handle.reload(own_crates_at(level))));
    }
    trouble.map_or(Ok(()), Err)
}

/// Changes how much goes into the log file.
static CHANGE: OnceLock<Box<dyn Fn(LevelFilter) + Send + Sync>> = OnceLock::new();

/// Changes how much goes into the log file from now on; an error lists the levels.
pub(crate) fn set_level(name: &str) -> Result<(), String> {
    let level = Level::from_str(name, true)
        .map_err(|_| "Log level must be one of: DEBUG, INFO, WARNING, ERROR, CRITICAL".to_owned())?;
    if let Some(change) = CHANGE.get() {
        change(level.filter());
    }
    Ok(())
}

fn open(path: &Path) -> Result<RollingFile, String> {
    RollingFile::open(path).map_err(|error| format!("cannot write the log file: {error}"))
}

fn own_crates_at(level: LevelFilter) -> Targets {
    let others = if level == LevelFilter::TRACE { level } else { level.min(LevelFilter::WARN) };
    Targets::new().with_default(others).with_targets(OWN_CRATES.map(|name| (name, level)))
}

/// One line: `2026-11-21T07:41:05.123456Z [INFO] (dw_engine) message`.
struct LogLine;

impl<S, N> FormatEvent<S, N> for LogLine
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut line: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let metadata = event.metadata();
        let level = match *metadata.level() {
            tracing::Level::WARN => "WARNING",
            other => other.as_str(),
        };
        SystemTime.format_time(&mut line)?;
        write!(line, " [{level}] ({}) ", metadata.target())?;
        context.format_fields(line.by_ref(), event)?;
        writeln!(line)
    }
}
