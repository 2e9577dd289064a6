//! The events of a run as lines for a host: which stage, how far, how long still.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use dw_core::{
    cancel::CancellationToken,
    event::{Event, EventSink},
};

use super::{answer::Answer, request::RequestId, session::Outbox};
use crate::LatentPreview;

/// Loading is told in so many parts of the whole.
const LOADING_PARTS: u64 = 20;

/// Tells a host about one request.
pub(super) struct Progress<'a> {
    pub(super) id: &'a RequestId,
    outbox: &'a Outbox,
    /// Stops the request when nobody reads its answers any more.
    token: &'a CancellationToken,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    stage: usize,
    stages: usize,
    /// When the stage's first denoising step was done.
    first_step: Option<Instant>,
    loaded: u64,
    preview: Option<(usize, String)>,
}

impl<'a> Progress<'a> {
    /// For a request of so many stages; none to count the steps of the workflow.
    pub(super) fn new(
        id: &'a RequestId,
        (outbox, token): (&'a Outbox, &'a CancellationToken),
        stages: Option<usize>,
    ) -> Self {
        let state = State { stages: stages.unwrap_or_default(), ..State::default() };
        Self { id, outbox, token, state: Mutex::new(state) }
    }

    /// Keeps a preview for the progress line of its step.
    pub(super) fn preview(&self, preview: &LatentPreview) {
        self.state().preview = Some((preview.step, STANDARD.encode(&preview.png)));
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl EventSink for Progress<'_> {
    fn emit(&self, event: Event) {
        let answer = self.state().line(self.id, event, Instant::now());
        if let Some(answer) = answer {
            self.outbox.say(&answer);
            if self.outbox.is_gone() {
                self.token.cancel();
            }
        }
    }
}

impl State {
    fn line(&mut self, id: &RequestId, event: Event, now: Instant) -> Option<Answer> {
        let request_id = id.clone();
        match event {
            Event::RunStarted { steps, .. } if self.stages == 0 => {
                self.stages = steps;
                None
            }
            Event::StepStarted { step, index } => {
                // Steps that only resize belong to the stage after them.
                let of_request = step.strip_prefix("stage").and_then(|number| number.parse().ok());
                self.stage = of_request.unwrap_or(index + 1).min(self.stages.max(1));
                self.first_step = None;
                self.loaded = 0;
                None
            }
            Event::Loading { component, bytes, total } => {
                let part = (bytes * LOADING_PARTS).checked_div(total).unwrap_or(LOADING_PARTS);
                if part == self.loaded {
                    return None;
                }
                self.loaded = part;
                Some(Answer::RequestLoading { request_id, component, bytes, total })
            }
            Event::DenoiseStep { done, of } => {
                let since = self.first_step.get_or_insert(now);
                let seconds = now.duration_since(*since).as_secs_f64();
                let seconds_left = (done > 1).then(|| seconds / (done - 1) as f64 * (of - done.min(of)) as f64);
                let preview = self.preview.take().filter(|(step, _)| *step == done).map(|(_, png)| png);
                let (stage, stages) = (self.stage.max(1), self.stages.max(1));
                Some(Answer::RequestProgress { request_id, stage, stages, step: done, of, seconds_left, preview })
            }
            Event::Warning { message } => Some(Answer::RequestWarning { request_id, message }),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_time_left_is_that_of_the_steps_so_far() {
        let (mut state, id, start) = (State { stages: 2, ..State::default() }, RequestId::Number(1), Instant::now());
        let mut left = Vec::new();
        state.line(&id, Event::StepStarted { step: "stage2".into(), index: 2 }, start);
        for done in 1..=3 {
            let now = start + Duration::from_secs(10 * done as u64);
            let line = state.line(&id, Event::DenoiseStep { done, of: 5 }, now);
            let Some(Answer::RequestProgress { stage: 2, stages: 2, seconds_left, .. }) = line else {
                panic!("{line:?}")
            };
            left.push(seconds_left);
        }
        assert_eq!(left, [None, Some(30.0), Some(20.0)]);
    }

    #[test]
    fn loading_is_told_in_a_few_parts_however_many_tensors_there_are() {
        let (mut state, id) = (State::default(), RequestId::Number(1));
        let load = |bytes| Event::Loading { component: "unet".into(), bytes, total: 1000 };
        let lines = (1..=1000).filter(|bytes| state.line(&id, load(*bytes), Instant::now()).is_some()).count();
        assert_eq!(lines, 20);
    }

    #[test]
    fn a_preview_goes_with_the_progress_of_its_own_step() {
        let (mut state, id) = (State::default(), RequestId::Number(1));
        state.preview = Some((2, "png".into()));
        let mut shown = |done| match state.line(&id, Event::DenoiseStep { done, of: 3 }, Instant::now()) {
            Some(Answer::RequestProgress { preview, .. }) => preview,
            other => panic!("{other:?}"),
        };
        assert_eq!(shown(2).as_deref(), Some("png"));
        assert_eq!(shown(3), None);
    }
}
