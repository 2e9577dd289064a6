//! A run as lines of text, for logs and pipes: one line for what begins, and ten for a denoise loop.

use std::fmt::Write;

use dw_core::event::Event;

use super::{
    View, memory,
    record::Record,
    text::{self, bytes, duration, printable, rate},
};

/// Writes lines to standard error.
#[derive(Default)]
pub(super) struct PlainView {
    /// The component or file that the latest progress line was about.
    subject: Option<String>,
}

impl View for PlainView {
    fn show(&mut self, event: &Event, record: &Record) {
        if let Some(line) = self.line(event, record) {
            text::say(&line);
        }
    }

    fn say(&mut self, line: &str) {
        text::say(line);
    }

    fn clear(&mut self) {}
}

impl PlainView {
    fn line(&mut self, event: &Event, record: &Record) -> Option<String> {
        match event {
            Event::StepStarted { .. } => {
                record.current().map(|step| format!("{}{}", step.place, printable(&step.name)))
            }
            Event::IterationStarted { iteration, iterations, .. } if *iterations > 1 => {
                Some(format!("  iteration {} of {iterations}", iteration + 1))
            }
            Event::Download { file, total, .. } => {
                self.once(file).then(|| format!("  downloading {file} ({})", bytes(*total)))
            }
            Event::FitPlan { plan } => Some(format!("  {}", memory::line(plan))),
            Event::Loading { component, .. } => self.once(component).then(|| format!("  loading {component}")),
            Event::DenoiseStep { done, of } => tenth(*done, *of).then(|| denoise_line(*done, *of, record)),
            Event::Warning { message } => Some(text::warning(message)),
            Event::StepFinished { step, seconds, .. } => {
                self.subject = None;
                Some(format!("  {} done in {}", printable(step), duration(*seconds)))
            }
            Event::RunStarted { .. }
            | Event::IterationStarted { .. }
            | Event::Reused { .. }
            | Event::MemoryUsed { .. }
            | Event::StageFinished { .. }
            | Event::FileWritten { .. } => None,
        }
    }

    /// Whether this is the first event in a row about `subject`.
    fn once(&mut self, subject: &str) -> bool {
        let new = self.subject.as_deref() != Some(subject);
        if new {
            self.subject = Some(subject.to_owned());
        }
        new
    }
}

/// Whether step `done` is the first, the last, or the one that completes another tenth.
fn tenth(done: usize, of: usize) -> bool {
    done <= 1 || done >= of || done * 10 / of != (done - 1) * 10 / of
}

fn denoise_line(done: usize, of: usize, record: &Record) -> String {
    let mut line = format!("  denoise {done}/{of}");
    let pace = record.pace.filter(|_| done > 1 || of == 1);
    if let Some((per_second, left)) = pace.and_then(|pace| Some((pace.per_second()?, pace.seconds_left()?))) {
        let left = if done < of { format!(", {} left", duration(left)) } else { String::new() };
        let _ = write!(line, " ({}{left})", rate(per_second));
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(events: &[Event]) -> Vec<String> {
        let (mut view, mut record) = (PlainView::default(), Record::default());
        events
            .iter()
            .filter_map(|event| {
                record.add(event);
                view.line(event, &record)
            })
            .collect()
    }

    #[test]
    fn the_fit_plan_is_one_line_before_loading() {
        let plan = memory::tests::plan();
        let lines = lines(&[Event::FitPlan { plan }]);
        assert!(lines.len() == 1 && lines[0].starts_with("  memory: about 3.7 GB of 4.0 GB"), "{lines:?}");
    }

    #[test]
    fn loading_takes_one_line_for_each_component() {
        let loading = |component: &str, bytes| Event::Loading { component: component.into(), bytes, total: 9 };
        let events = [loading("unet", 1), loading("unet", 4), loading("vae", 6), loading("vae", 9)];
        assert_eq!(lines(&events), ["  loading unet", "  loading vae"]);
    }

    #[test]
    fn a_long_denoise_loop_takes_eleven_lines_and_a_short_one_a_line_for_each_step() {
        let steps = |of| (1..=of).map(|done| Event::DenoiseStep { done, of }).collect::<Vec<_>>();
        assert_eq!(lines(&steps(1000)).len(), 11);
        assert_eq!(lines(&steps(4)).len(), 4);
        assert!(lines(&steps(1000)).last().is_some_and(|line| line.starts_with("  denoise 1000/1000")));
    }

    #[test]
    fn a_step_is_announced_with_its_place() {
        let seed = dw_core::seed::Seed::One(1);
        let started = Event::RunStarted { workflow: "w".into(), steps: 2, seed, random_seed: false };
        let step = Event::StepStarted { step: "draw".into(), index: 1 };
        assert_eq!(lines(&[started, step]), ["[2/2] draw"]);
    }
}
