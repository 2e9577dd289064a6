//! What is known of a worker that died: how, its last words, and what to do about it.

use std::{fmt, process::ExitStatus};

/// A worker that died.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CrashReport {
    /// The signal that ended it, on Unix.
    pub signal: Option<i32>,
    /// Its exit code, when no signal ended it.
    pub exit_code: Option<i32>,
    /// What it said about its end itself.
    pub message: Option<String>,
    /// Its last log lines, oldest first.
    pub log_lines: Vec<String>,
    /// What to do.
    pub advice: String,
}

impl CrashReport {
    /// The report of a process that has ended.
    pub(super) fn new(status: Option<ExitStatus>, message: Option<String>, log_lines: Vec<String>) -> Self {
        let signal = status.and_then(signal);
        let exit_code = status.and_then(|status| status.code());
        let advice = advice(signal, message.as_deref(), &log_lines);
        Self { signal, exit_code, message, log_lines, advice: advice.to_owned() }
    }

    /// How it ended: `was killed by signal 9 (SIGKILL)`.
    pub fn cause(&self) -> String {
        match (self.signal, self.exit_code) {
            (Some(signal), _) => match signal_name(signal) {
                Some(name) => format!("was ended by signal {signal} ({name})"),
                None => format!("was ended by signal {signal}"),
            },
            (None, Some(code)) => format!("ended with exit code {code}"),
            (None, None) => "ended".to_owned(),
        }
    }
}

impl fmt::Display for CrashReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the worker {}", self.cause())?;
        if let Some(message) = &self.message {
            write!(f, ": {message}")?;
        }
        write!(f, "; {}", self.advice)
    }
}

#[cfg(unix)]
fn signal(status: ExitStatus) -> Option<i32> {
    std::os::unix::process::ExitStatusExt::signal(&status)
}

#[cfg(not(unix))]
fn signal(_: ExitStatus) -> Option<i32> {
    None
}

/// The numbers that Linux, macOS and the BSDs agree on.
fn signal_name(signal: i32) -> Option<&'static str> {
    Some(match signal {
        1 => "SIGHUP",
        2 => "SIGINT",
        3 => "SIGQUIT",
        4 => "SIGILL",
        6 => "SIGABRT",
        8 => "SIGFPE",
        9 => "SIGKILL",
        11 => "SIGSEGV",
        15 => "SIGTERM",
        _ => return None,
    })
}

fn advice(signal: Option<i32>, message: Option<&str>, log_lines: &[String]) -> &'static str {
    let said =
        |word: &str| message.into_iter().chain(log_lines.iter().map(String::as_str)).any(|line| line.contains(word));
    if said("out of memory") || said("OutOfMemory") || said("OUT_OF_MEMORY") || said("memory allocation of") {
        return "the memory did not suffice; make smaller or fewer pictures, or use a smaller model or type";
    }
    if said("CUDA_ERROR") || said("DriverError") {
        return "the GPU reported a fault; run again, and when that does not help, look at the driver or use the device \
                `cpu`";
    }
    match signal {
        Some(9) => {
            "somebody killed it, most often the system because memory ran out; make smaller or fewer pictures, or use a \
             smaller model or type"
        }
        Some(15 | 2 | 1 | 3) => "somebody asked it to end; run again",
        Some(4) => "the processor does not know an instruction; use a build of dw made for this machine",
        _ => "that is a fault of dw; run again, and report it with the lines of the log when it comes back",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(signal: Option<i32>, exit_code: Option<i32>, log: &str) -> CrashReport {
        let log_lines: Vec<String> = log.lines().map(str::to_owned).collect();
        let advice = advice(signal, None, &log_lines).to_owned();
        CrashReport { signal, exit_code, message: None, log_lines, advice }
    }

    #[test]
    fn a_kill_names_the_signal_and_thinks_of_memory() {
        let text = report(Some(9), None, "").to_string();
        assert!(text.starts_with("the worker was ended by signal 9 (SIGKILL); ") && text.contains("memory"), "{text}");
    }

    #[test]
    fn the_log_tells_what_an_abort_was_about() {
        let text = report(Some(6), None, "memory allocation of 1099511627776 bytes failed").to_string();
        assert!(text.contains("SIGABRT") && text.contains("smaller"), "{text}");
        let text = report(None, Some(101), "DriverError(CUDA_ERROR_ILLEGAL_ADDRESS)").to_string();
        assert!(text.contains("exit code 101") && text.contains("GPU"), "{text}");
    }

    #[test]
    fn a_segmentation_fault_is_a_fault_of_dw() {
        let text = report(Some(11), None, "").to_string();
        assert!(text.contains("SIGSEGV") && text.contains("report it"), "{text}");
    }
}
