//! The last lines of a run: what was written, the seed and how to use it again, and where the time went.

use std::path::Path;

use console::style;

use super::{
    record::Record,
    text::{bytes, count, duration, printable, seed},
};

/// A finished run in a few lines. `repeat` is what to write before a seed to use it again.
pub(crate) fn finished(workflow: &str, seconds: f64, record: &Record, repeat: &str) -> String {
    let mut lines =
        format!("{} {} in {}", style("Finished").for_stderr().green().bold(), printable(workflow), duration(seconds));
    lines += &files(record);
    lines += &seeds(record, repeat);
    lines += &stages(record);
    lines += &memory(record);
    lines
}

/// A run that was stopped: what is left of it.
pub(crate) fn cancelled(record: &Record) -> String {
    let kept = match record.files.len() {
        0 => "no file was finished".into(),
        number => format!("{} finished before that and kept", count(number, "file")),
    };
    format!("{}: {kept}{}", style("Cancelled").for_stderr().yellow().bold(), files(record))
}

fn files(record: &Record) -> String {
    let label = ["wrote", ""].into_iter().chain(std::iter::repeat(""));
    record.files.iter().zip(label).map(|(path, label)| line(label, &path_text(path))).collect()
}

fn path_text(path: &Path) -> String {
    printable(&path.display().to_string()).into_owned()
}

/// The run's seed, and those of steps that had another one.
fn seeds(record: &Record, repeat: &str) -> String {
    let run_seed = record.seed.as_ref().filter(|seed| record.steps.iter().any(|step| step.seed.as_ref() == Some(seed)));
    let of_run = run_seed.map(|run_seed| {
        let number = seed(run_seed);
        let hint = format!(" (drawn at random; repeat with `{repeat} {number}`)");
        line("seed", &if record.random_seed { number + &hint } else { number })
    });
    let of_steps = record.steps.iter().filter(|step| step.seed != record.seed).filter_map(|step| {
        let number = seed(step.seed.as_ref()?);
        Some(line("seed", &format!("{number} (step {})", printable(&step.name))))
    });
    of_run.into_iter().chain(of_steps).collect()
}

/// Seconds per stage, a line for each step; a workflow of one step needs no names.
fn stages(record: &Record) -> String {
    let timed = record.steps.iter().filter(|step| !step.stages.is_empty());
    let lines = timed.map(|step| {
        let times = step.stages.iter().map(|(stage, seconds)| format!("{stage} {}", duration(*seconds)));
        let times = times.collect::<Vec<_>>().join(" · ");
        let name = if record.steps.len() > 1 { format!("{}: ", printable(&step.name)) } else { String::new() };
        line("time", &format!("{name}{times}"))
    });
    lines.collect()
}

/// The memory that each step needed, beside what was planned.
fn memory(record: &Record) -> String {
    let lines = record.steps.iter().filter_map(|step| {
        let memory = step.memory.as_ref()?;
        let name = if record.steps.len() > 1 { format!("{}: ", printable(&step.name)) } else { String::new() };
        let (peak, planned) = (bytes(memory.peak), bytes(memory.planned));
        Some(line("peak", &format!("{name}{peak} of memory on {}, {planned} planned", memory.device)))
    });
    lines.collect()
}

fn line(label: &str, value: &str) -> String {
    format!("\n  {} {value}", style(format!("{label:<5}")).for_stderr().dim())
}

#[cfg(test)]
mod tests {
    use dw_core::{event::Event, seed::Seed};

    use super::*;

    fn record(random_seed: bool, step_seed: Option<i128>) -> Record {
        let mut record = Record::default();
        for event in [
            Event::RunStarted { workflow: "w".into(), steps: 1, seed: Seed::One(7), random_seed },
            Event::StepStarted { step: "draw".into(), index: 0 },
            Event::StageFinished { step: "draw".into(), stage: "load".into(), seconds: 0.5 },
            Event::FileWritten { path: "outputs/w.png".into() },
            Event::StepFinished { step: "draw".into(), seconds: 1.0, seed: step_seed.map(Seed::One) },
        ] {
            record.add(&event);
        }
        record
    }

    fn plain(text: &str) -> String {
        console::strip_ansi_codes(text).into_owned()
    }

    #[test]
    fn the_summary_names_files_seed_and_seconds() {
        assert_eq!(
            plain(&finished("w", 1.5, &record(false, Some(7)), "--seed")),
            "Finished w in 1.50 s\n  wrote outputs/w.png\n  seed  7\n  time  load 0.50 s"
        );
    }

    #[test]
    fn the_memory_that_was_needed_stands_beside_what_was_planned() {
        let mut record = record(false, None);
        record.add(&Event::StepStarted { step: "more".into(), index: 0 });
        record.add(&Event::MemoryUsed { device: "cpu".into(), peak: 3_100_000_000, planned: 3_000_000_000 });
        let text = plain(&finished("w", 1.0, &record, "--seed"));
        assert!(text.contains("peak  more: 3.1 GB of memory on cpu, 3.0 GB planned"), "{text}");
    }

    #[test]
    fn a_random_seed_comes_with_the_option_that_repeats_it() {
        assert!(
            plain(&finished("w", 1.0, &record(true, Some(7)), "--seed"))
                .contains("drawn at random; repeat with `--seed 7`")
        );
    }

    #[test]
    fn a_step_with_a_seed_of_its_own_is_named_and_a_run_without_generators_has_no_seed() {
        assert!(plain(&finished("w", 1.0, &record(true, Some(8)), "--seed")).contains("seed  8 (step draw)"));
        assert!(!plain(&finished("w", 1.0, &record(true, None), "--seed")).contains("seed"));
    }

    #[test]
    fn a_cancelled_run_says_what_it_kept() {
        assert_eq!(
            plain(&cancelled(&record(false, None))),
            "Cancelled: 1 file finished before that and kept\n  wrote outputs/w.png"
        );
    }
}
