//! The requests that wait and the one that runs: filled by the thread that reads, emptied by the one that works.

use std::{
    collections::VecDeque,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
};

use dw_core::cancel::CancellationToken;

use super::request::{Request, RequestId};
use crate::worker::protocol::Execute;

/// What is to be done.
pub(super) enum Work {
    /// A workflow.
    Workflow(Execute),
    /// A plain request.
    Request(Request),
    /// Give up loaded models.
    Clear,
}

/// Work with its name and the token that stops it.
pub(super) struct Job {
    pub(super) id: RequestId,
    pub(super) work: Work,
    pub(super) token: CancellationToken,
}

/// What became of an attempt to stop a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stopped {
    /// It runs, and stops at its next chance.
    Running,
    /// It waited, and is gone.
    Waiting,
    /// There is none of that name.
    Unknown,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Job>,
    running: Option<(RequestId, CancellationToken)>,
    /// Nothing more will come.
    closed: bool,
}

/// The queue.
#[derive(Default)]
pub(super) struct Queue {
    state: Mutex<State>,
    changed: Condvar,
}

impl Queue {
    /// Adds a job; how many come before it.
    pub(super) fn push(&self, job: Job) -> usize {
        let mut state = self.state();
        let before = state.waiting.len() + usize::from(state.running.is_some());
        state.waiting.push_back(job);
        self.changed.notify_all();
        before
    }

    /// The next job, which counts as running now; none when there will be no more.
    pub(super) fn next(&self) -> Option<Job> {
        let mut state = self.state();
        loop {
            if let Some(job) = state.waiting.pop_front() {
                state.running = Some((job.id.clone(), job.token.clone()));
                return Some(job);
            }
            if state.closed {
                return None;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The running job has ended.
    pub(super) fn done(&self) {
        self.state().running = None;
    }

    /// Stops a request, or the running one when none is named.
    pub(super) fn stop(&self, id: Option<&RequestId>) -> Stopped {
        let mut state = self.state();
        let is_meant = |other: &RequestId| id.is_none_or(|id| id == other);
        if let Some((running, token)) = &state.running
            && is_meant(running)
        {
            token.cancel();
            return Stopped::Running;
        }
        let before = state.waiting.len();
        if id.is_some() {
            state.waiting.retain(|job| !is_meant(&job.id));
        }
        if state.waiting.len() < before { Stopped::Waiting } else { Stopped::Unknown }
    }

    /// Takes no more jobs. With `drop_all` the running one is stopped and the waiting ones are handed back.
    pub(super) fn close(&self, drop_all: bool) -> Vec<RequestId> {
        let mut state = self.state();
        state.closed = true;
        let mut dropped = Vec::new();
        if drop_all {
            dropped = state.waiting.drain(..).map(|job| job.id).collect();
            if let Some((_, token)) = &state.running {
                token.cancel();
            }
        }
        self.changed.notify_all();
        dropped
    }

    /// Whether a request of this name waits or runs.
    pub(super) fn has(&self, id: &RequestId) -> bool {
        let (running, waiting) = self.ids();
        running.as_ref() == Some(id) || waiting.contains(id)
    }

    /// The request that runs and those that wait.
    pub(super) fn ids(&self) -> (Option<RequestId>, Vec<RequestId>) {
        let state = self.state();
        let running = state.running.as_ref().map(|(id, _)| id.clone());
        (running, state.waiting.iter().map(|job| job.id.clone()).collect())
    }

    /// Every change is a single step, so a panic elsewhere has broken nothing.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(id: i64) -> Job {
        Job { id: RequestId::Number(id), work: Work::Clear, token: CancellationToken::default() }
    }

    #[test]
    fn jobs_come_in_order_and_waiting_ones_can_be_taken_out() {
        let queue = Queue::default();
        assert_eq!([1, 2, 3].map(|id| queue.push(job(id))), [0, 1, 2]);
        assert_eq!(queue.stop(Some(&RequestId::Number(2))), Stopped::Waiting);
        assert_eq!(queue.stop(Some(&RequestId::Number(2))), Stopped::Unknown);
        assert_eq!(queue.next().map(|job| job.id), Some(RequestId::Number(1)));
        assert!(queue.has(&RequestId::Number(1)) && !queue.has(&RequestId::Number(2)));
        queue.done();
        assert!(queue.close(false).is_empty());
        assert_eq!(queue.next().map(|job| job.id), Some(RequestId::Number(3)));
        queue.done();
        assert!(queue.next().is_none());
    }

    #[test]
    fn the_running_job_is_stopped_by_its_token() {
        let queue = Queue::default();
        queue.push(job(1));
        assert_eq!(queue.stop(None), Stopped::Unknown, "nothing runs yet");
        let running = queue.next().expect("a job");
        queue.push(job(2));
        assert_eq!(queue.stop(None), Stopped::Running);
        assert!(running.token.is_cancelled());
        assert_eq!(queue.close(true), [RequestId::Number(2)]);
    }
}
