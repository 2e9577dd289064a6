//! What happened in a run so far, gathered from its events: the summary, the benchmark and the
//! progress display read it.

use std::{path::PathBuf, time::Instant};

use dw_core::{event::Event, seed::Seed};

/// A run so far.
#[derive(Debug, Default)]
pub(crate) struct Record {
    /// How many steps the workflow has.
    pub(crate) steps_in_all: usize,
    /// The steps that began, in order; those of a sub-workflow follow the step that runs it.
    pub(crate) steps: Vec<StepRecord>,
    /// Places in `steps` of those that have not finished: a step, a step of its sub-workflow, and so on.
    running: Vec<usize>,
    /// Files written, in order.
    pub(crate) files: Vec<PathBuf>,
    /// The run's seed.
    pub(crate) seed: Option<Seed>,
    /// Whether dw drew it.
    pub(crate) random_seed: bool,
    /// The pace of the denoise loop that is running.
    pub(crate) pace: Option<Pace>,
}

/// One step.
#[derive(Debug, Default)]
pub(crate) struct StepRecord {
    /// Its name.
    pub(crate) name: String,
    /// `[2/3] `, its place among the steps of the main workflow; empty for a step of a sub-workflow.
    pub(crate) place: String,
    /// Which iteration runs, from 1, and how many there are.
    pub(crate) iteration: (usize, usize),
    /// Seconds of each stage over all iterations, in the order in which they first finished.
    pub(crate) stages: Vec<(String, f64)>,
    /// How many denoising steps were done.
    pub(crate) denoise_steps: usize,
    /// The seed its generator started from.
    pub(crate) seed: Option<Seed>,
    /// How many files it wrote.
    pub(crate) files: usize,
    /// What it needed of a device's memory, where that is known.
    pub(crate) memory: Option<MemoryRecord>,
}

/// The memory that a step needed.
#[derive(Clone, Debug)]
pub(crate) struct MemoryRecord {
    /// Where.
    pub(crate) device: String,
    /// Bytes in use at most.
    pub(crate) peak: u64,
    /// Bytes that were planned.
    pub(crate) planned: u64,
}

/// How fast a denoise loop goes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    started: Instant,
    latest: Instant,
    done: usize,
    of: usize,
}

impl Pace {
    /// Denoising steps per second; none before the clock has moved.
    pub(crate) fn per_second(self) -> Option<f64> {
        let seconds = self.latest.duration_since(self.started).as_secs_f64();
        (seconds > 0.0 && self.done > 0).then(|| self.done as f64 / seconds)
    }

    /// Seconds until the loop is through, at this pace.
    pub(crate) fn seconds_left(self) -> Option<f64> {
        self.per_second().map(|pace| (self.of - self.done.min(self.of)) as f64 / pace)
    }
}

impl Record {
    /// Takes in one event.
    pub(crate) fn add(&mut self, event: &Event) {
        self.keep_pace(event);
        match event {
            Event::RunStarted { steps, seed, random_seed, .. } => {
                self.steps_in_all = *steps;
                self.seed = Some(seed.clone());
                self.random_seed = *random_seed;
            }
            Event::StepStarted { step, index } => self.start_step(step, *index),
            Event::IterationStarted { iteration, iterations, .. } => {
                self.change(|step| step.iteration = (iteration + 1, *iterations));
            }
            Event::StageFinished { stage, seconds, .. } => {
                self.change(|step| add_to(&mut step.stages, stage, *seconds));
            }
            Event::DenoiseStep { .. } => self.change(|step| step.denoise_steps += 1),
            Event::FileWritten { path } => {
                self.files.push(path.clone());
                self.change(|step| step.files += 1);
            }
            Event::StepFinished { seed, .. } => {
                self.change(|step| step.seed.clone_from(seed));
                self.running.pop();
            }
            Event::MemoryUsed { device, peak, planned } => {
                let memory = MemoryRecord { device: device.clone(), peak: *peak, planned: *planned };
                self.change(|step| step.memory = Some(memory));
            }
            Event::Download { .. }
            | Event::FitPlan { .. }
            | Event::Loading { .. }
            | Event::Reused { .. }
            | Event::Warning { .. } => {}
        }
    }

    /// A denoise loop is timed from the event before its first step.
    fn keep_pace(&mut self, event: &Event) {
        let now = Instant::now();
        let started = self.pace.map_or(now, |pace| if pace.done > 0 { pace.started } else { pace.latest });
        self.pace = Some(match event {
            Event::DenoiseStep { done: 1, of } => {
                let started = self.pace.map_or(now, |pace| pace.latest);
                Pace { started, latest: now, done: 1, of: *of }
            }
            Event::DenoiseStep { done, of } => Pace { started, latest: now, done: *done, of: *of },
            _ => Pace { started: now, latest: now, done: 0, of: 0 },
        });
    }

    fn start_step(&mut self, name: &str, index: usize) {
        let nested = !self.running.is_empty();
        let place = if nested { String::new() } else { format!("[{}/{}] ", index + 1, self.steps_in_all) };
        self.running.push(self.steps.len());
        self.steps.push(StepRecord { name: name.to_owned(), place, iteration: (1, 1), ..StepRecord::default() });
    }

    fn change(&mut self, change: impl FnOnce(&mut StepRecord)) {
        if let Some(index) = self.running.last() {
            change(&mut self.steps[*index]);
        }
    }

    /// The step that runs now, the innermost one.
    pub(crate) fn current(&self) -> Option<&StepRecord> {
        self.running.last().map(|index| &self.steps[*index])
    }

    /// Seconds of each stage over all steps, in the order in which they first finished.
    pub(crate) fn stages(&self) -> Vec<(String, f64)> {
        let mut sums = Vec::new();
        for (stage, seconds) in self.steps.iter().flat_map(|step| &step.stages) {
            add_to(&mut sums, stage, *seconds);
        }
        sums
    }
}

fn add_to(sums: &mut Vec<(String, f64)>, stage: &str, seconds: f64) {
    match sums.iter_mut().find(|(name, _)| name == stage) {
        Some((_, sum)) => *sum += seconds,
        None => sums.push((stage.to_owned(), seconds)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stage(stage: &str, seconds: f64) -> Event {
        Event::StageFinished { step: "a".into(), stage: stage.into(), seconds }
    }

    #[test]
    fn stages_of_all_iterations_and_steps_add_up_in_order() {
        let mut record = Record::default();
        for name in ["a", "b"] {
            record.add(&Event::StepStarted { step: name.into(), index: 0 });
            for event in [stage("load", 1.0), stage("denoise", 2.0), stage("denoise", 3.0), finished(name)] {
                record.add(&event);
            }
        }
        assert_eq!(record.steps[1].stages, [("load".to_owned(), 1.0), ("denoise".to_owned(), 5.0)]);
        assert_eq!(record.stages(), [("load".to_owned(), 2.0), ("denoise".to_owned(), 10.0)]);
    }

    fn finished(step: &str) -> Event {
        Event::StepFinished { step: step.into(), seconds: 1.0, seed: None }
    }

    #[test]
    fn a_step_of_a_sub_workflow_is_recorded_apart_from_the_step_that_runs_it() {
        let mut record = Record { steps_in_all: 1, ..Record::default() };
        record.add(&Event::StepStarted { step: "outer".into(), index: 0 });
        record.add(&Event::StepStarted { step: "outer/inner".into(), index: 3 });
        record.add(&stage("task", 1.0));
        record.add(&finished("outer/inner"));
        record.add(&stage("save", 2.0));
        let steps: Vec<_> = record.steps.iter().map(|step| (step.place.as_str(), step.stages[0].0.as_str())).collect();
        assert_eq!(steps, [("[1/1] ", "save"), ("", "task")]);
        assert_eq!(record.current().map(|step| step.name.as_str()), Some("outer"));
    }

    #[test]
    fn files_count_for_the_step_that_wrote_them() {
        let mut record = Record::default();
        record.add(&Event::StepStarted { step: "a".into(), index: 0 });
        record.add(&Event::FileWritten { path: "x.png".into() });
        assert_eq!((record.files.len(), record.steps[0].files), (1, 1));
    }

    #[test]
    fn a_finished_loop_has_no_seconds_left() {
        let mut record = Record::default();
        for done in 1..=4 {
            record.add(&Event::DenoiseStep { done, of: 4 });
        }
        let pace = record.pace.expect("a pace");
        assert!(pace.seconds_left().is_none_or(|left| left == 0.0));
        assert_eq!((pace.done, pace.of), (4, 4));
    }
}
