//! Words on the terminal: the two streams, and how numbers are written for people.

use std::{
    borrow::Cow,
    fmt::Write as _,
    io::{self, Write as _},
};

use console::style;
use dw_core::seed::Seed;

/// Writes the product of a command to standard output.
pub(crate) fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// Writes a value to standard output as JSON.
pub(crate) fn print_json(value: &impl serde::Serialize) -> io::Result<()> {
    print(&format!("{}\n", serde_json::to_string_pretty(value)?))
}

/// A line for the person at the terminal. When nobody can read standard error any more, nobody is told.
pub(crate) fn say(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// A warning, on standard error.
pub(crate) fn warn(message: &str) {
    say(&warning(message));
}

/// How a warning looks.
pub(crate) fn warning(message: &str) -> String {
    format!("{} {}", style("Warning:").for_stderr().yellow().bold(), printable(message))
}

/// An error, on standard error. The word before the first colon is the one that stands out.
pub(crate) fn error(message: &str) {
    let message = printable(message);
    match message.strip_prefix("Error") {
        Some(rest) => say(&format!("{}{rest}", style("Error").for_stderr().red().bold())),
        None => say(&message),
    }
}

/// The text with control characters written out, so that a hostile file cannot steer the terminal.
pub(crate) fn printable(text: &str) -> Cow<'_, str> {
    let harmless = |c: char| !c.is_control() || c == '\n' || c == '\t';
    if text.chars().all(harmless) {
        return Cow::Borrowed(text);
    }
    let mut clean = String::with_capacity(text.len());
    for c in text.chars() {
        if harmless(c) {
            clean.push(c);
        } else {
            let _ = write!(clean, "{}", c.escape_unicode());
        }
    }
    Cow::Owned(clean)
}

/// `0.42 s`, `12.3 s`, `3 min 12 s`.
pub(crate) fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 9.995 => format!("{s:.2} s"),
        s if s < 59.95 => format!("{s:.1} s"),
        s => {
            let whole = s.round() as u64;
            match whole / 3600 {
                0 => format!("{} min {} s", whole / 60, whole % 60),
                hours => format!("{hours} h {} min", whole % 3600 / 60),
            }
        }
    }
}

/// `512 B`, `12.3 MB`: decimal units, as file managers and network speeds have them.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 4] = ["kB", "MB", "GB", "TB"];
    if count < 1000 {
        return format!("{count} B");
    }
    let mut value = count as f64 / 1000.0;
    let mut unit = 0;
    while value >= 999.95 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// `3.1 it/s`, and `2.5 s/it` for the slow.
pub(crate) fn rate(per_second: f64) -> String {
    if per_second >= 1.0 { format!("{per_second:.1} it/s") } else { format!("{:.1} s/it", 1.0 / per_second.max(1e-9)) }
}

/// A seed as `--seed` takes it.
pub(crate) fn seed(seed: &Seed) -> String {
    match seed {
        Seed::One(number) => number.to_string(),
        Seed::Each(numbers) => numbers.iter().map(ToString::to_string).collect::<Vec<_>>().join(","),
    }
}

/// `1 error`, `2 errors`.
pub(crate) fn count(number: usize, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_keep_three_figures() {
        let cases =
            [(0.0, "0.00 s"), (0.417, "0.42 s"), (9.999, "10.0 s"), (59.96, "1 min 0 s"), (192.4, "3 min 12 s")];
        for (seconds, text) in cases {
            assert_eq!(duration(seconds), text);
        }
        assert_eq!(duration(3725.0), "1 h 2 min");
    }

    #[test]
    fn bytes_are_written_in_decimal_units() {
        for (count, text) in
            [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_960, "1.0 MB"), (12_345_678, "12.3 MB")]
        {
            assert_eq!(bytes(count), text);
        }
    }

    #[test]
    fn escape_sequences_are_written_out() {
        assert_eq!(printable("a\u{1b}[2Jb\tc\nd"), "a\\u{1b}[2Jb\tc\nd");
        assert!(matches!(printable("plain ü"), Cow::Borrowed(_)));
    }

    #[test]
    fn slow_rates_are_turned_over() {
        assert_eq!(rate(3.06), "3.1 it/s");
        assert_eq!(rate(0.4), "2.5 s/it");
    }
}
