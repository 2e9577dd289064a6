//! A run on a terminal: one moving line that says what is going on, and a line that stays for each
//! finished step.

use std::time::Duration;

use console::style;
use dw_core::event::Event;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::{
    View, memory,
    record::Record,
    text::{self, count, duration, printable, rate},
};

/// A line without a known end.
const BUSY: &str = "{prefix:.bold} {spinner} {msg}";
/// A line for something that is read or fetched.
const BYTES: &str = "{prefix:.bold} {msg} [{bar:30.cyan/dim}] {decimal_bytes}/{decimal_total_bytes}";
/// A line for the denoise loop.
const DENOISE: &str = "{prefix:.bold} denoise [{bar:30.cyan/dim}] {pos}/{len} {msg}";

/// Draws on standard error.
pub(super) struct TerminalView {
    bar: ProgressBar,
    /// What the bar's style was made for.
    showing: Showing,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Showing {
    Busy,
    Bytes,
    Denoise,
}

impl TerminalView {
    pub(super) fn new() -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        bar.set_style(template(BUSY));
        bar.enable_steady_tick(Duration::from_millis(120));
        Self { bar, showing: Showing::Busy }
    }

    fn switch(&mut self, to: Showing) {
        if self.showing == to {
            return;
        }
        self.showing = to;
        self.bar.set_style(match to {
            Showing::Busy => template(BUSY),
            Showing::Bytes => template(BYTES),
            Showing::Denoise => template(DENOISE),
        });
    }

    fn busy(&mut self, what: &str) {
        self.switch(Showing::Busy);
        self.bar.set_message(printable(what).into_owned());
    }

    fn transfer(&mut self, what: &str, done: u64, total: u64) {
        self.switch(Showing::Bytes);
        self.bar.set_message(printable(what).into_owned());
        self.bar.set_length(total.max(done));
        self.bar.set_position(done);
    }

    fn denoise(&mut self, done: usize, of: usize, record: &Record) {
        self.switch(Showing::Denoise);
        self.bar.set_length(of as u64);
        self.bar.set_position(done as u64);
        let pace = record.pace.and_then(|pace| Some((pace.per_second()?, pace.seconds_left()?)));
        self.bar.set_message(match pace {
            Some((per_second, left)) => format!("{}, ETA {}", rate(per_second), duration(left)),
            None => String::new(),
        });
    }

    fn name_step(&self, record: &Record) {
        if let Some(step) = record.current() {
            let iteration = match step.iteration {
                (_, 0 | 1) => String::new(),
                (number, of) => format!(" ({number} of {of})"),
            };
            self.bar.set_prefix(format!("{}{}{iteration}", step.place, printable(&step.name)));
        }
    }

    fn step_done(&mut self, name: &str, seconds: f64, record: &Record) {
        let step = record.steps.iter().rev().find(|step| step.name == name);
        let (place, files) = step.map_or(("", 0), |step| (step.place.as_str(), step.files));
        let files = if files > 0 { format!(", {}", count(files, "file")) } else { String::new() };
        self.bar.println(format!(
            "{} {place}{} {}",
            style("✓").for_stderr().green(),
            style(printable(name)).for_stderr().bold(),
            style(format!("{}{files}", duration(seconds))).for_stderr().dim(),
        ));
    }
}

impl View for TerminalView {
    fn show(&mut self, event: &Event, record: &Record) {
        match event {
            Event::StepStarted { .. } | Event::IterationStarted { .. } => {
                self.name_step(record);
                self.busy("");
            }
            Event::Download { file, bytes: done, total } => {
                self.transfer(&format!("downloading {file}"), *done, *total);
            }
            Event::FitPlan { plan } => self.bar.println(format!("  {}", memory::line(plan))),
            Event::Loading { component, bytes: done, total } => {
                self.transfer(&format!("loading {component}"), *done, *total);
            }
            Event::DenoiseStep { done, of } => self.denoise(*done, *of, record),
            Event::StageFinished { stage, .. } => self.busy(after(stage)),
            Event::Warning { message } => self.bar.println(text::warning(message)),
            Event::StepFinished { step, seconds, .. } => self.step_done(step, *seconds, record),
            Event::RunStarted { .. } | Event::Reused { .. } | Event::MemoryUsed { .. } | Event::FileWritten { .. } => {}
        }
    }

    fn say(&mut self, line: &str) {
        self.bar.suspend(|| text::say(line));
    }

    fn clear(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// What usually comes after a stage, for the moments before the next event says so.
fn after(stage: &str) -> &'static str {
    match stage {
        "load" => "encode prompt",
        "encode prompt" => "denoise",
        "denoise" => "decode",
        "decode" | "task" => "save",
        _ => "",
    }
}

fn template(text: &str) -> ProgressStyle {
    ProgressStyle::with_template(text).expect("the templates of this file are well formed").progress_chars("━━╌")
}
