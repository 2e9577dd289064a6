//! Whether a process that says nothing is busy or hung: it is hung when its heartbeat stops.
//!
//! Time comes in as an argument, and a look counts for little time however long ago the one before it was: when
//! the watcher itself was stopped (a suspended machine, Ctrl-Z), the other side is not to blame.

use std::time::{Duration, Instant};

/// How often a worker sends a heartbeat.
pub(super) const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(1);

/// How long a worker may send nothing at all.
pub(super) const SILENCE_LIMIT: Duration = Duration::from_secs(10);

/// The most that one look adds to the silence.
const LONGEST_LOOK: Duration = Duration::from_millis(500);

/// The silence of a process, from one look to the next.
#[derive(Debug)]
pub(super) struct Liveness {
    limit: Duration,
    looked: Instant,
    silence: Duration,
    signs: u64,
}

impl Liveness {
    /// Begins to watch. `signs` counts the signs of life so far.
    pub(super) fn new(limit: Duration, now: Instant, signs: u64) -> Self {
        Self { limit, looked: now, silence: Duration::ZERO, signs }
    }

    /// Takes a look: `signs` counts the signs of life so far. True when the silence has lasted too long.
    pub(super) fn is_hung(&mut self, now: Instant, signs: u64) -> bool {
        let since = now.saturating_duration_since(self.looked).min(LONGEST_LOOK);
        self.looked = now;
        if signs == self.signs {
            self.silence += since;
        } else {
            self.silence = Duration::ZERO;
            self.signs = signs;
        }
        self.silence > self.limit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Looks every `every`, on a clock of its own, at a worker that shows `signs(seconds)` signs of life. Gives the
    /// second in which it counts as hung.
    fn hung_at(every: Duration, until: Duration, signs: impl Fn(u64) -> u64) -> Option<u64> {
        let start = Instant::now();
        let mut liveness = Liveness::new(SILENCE_LIMIT, start, signs(0));
        let looks = (1..).map(|look| every * look).take_while(|after| *after <= until);
        looks
            .map(|after| (after, liveness.is_hung(start + after, signs(after.as_secs()))))
            .find_map(|(after, hung)| hung.then_some(after.as_secs()))
    }

    const LOOK: Duration = Duration::from_millis(50);
    const HOUR: Duration = Duration::from_hours(1);

    #[test]
    fn a_run_that_says_nothing_for_twenty_minutes_but_beats_is_not_hung() {
        assert_eq!(hung_at(LOOK, Duration::from_mins(20), |seconds| seconds), None);
    }

    #[test]
    fn a_heart_that_stops_is_noticed_within_seconds() {
        let limit = SILENCE_LIMIT.as_secs();
        assert_eq!(hung_at(LOOK, HOUR, |seconds| seconds.min(100)), Some(100 + limit));
    }

    #[test]
    fn a_late_heartbeat_starts_the_count_again() {
        assert_eq!(hung_at(LOOK, HOUR, |seconds| seconds / 9), None);
    }

    #[test]
    fn a_watcher_that_was_stopped_for_an_hour_does_not_blame_the_worker() {
        let start = Instant::now();
        let mut liveness = Liveness::new(SILENCE_LIMIT, start, 0);
        assert!(!liveness.is_hung(start + LOOK, 0));
        assert!(!liveness.is_hung(start + HOUR, 0));
        assert!(!liveness.is_hung(start + HOUR + LOOK, 1));
    }
}
