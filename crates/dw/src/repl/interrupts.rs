//! Ctrl-C while a command works. In a run the first stops it at the next denoising step, the second ends
//! the worker; the loop stays in both cases. At the prompt it is a key, not a signal, and not our business.
//! A script ends with the first Ctrl-C: at once, or when the run has stopped.

use std::{
    process,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use dw_engine::worker::CancelSwitch;

use crate::{
    error::{CliError, Exit},
    interrupt,
    render::Reporter,
};

/// How long after the prompt a signal may still be that of a Ctrl-C before it, pressed once too often.
const LATE: Duration = Duration::from_millis(500);

/// What the handler finds when the signal comes. Clones share it.
#[derive(Clone)]
pub(super) struct Interrupts {
    now: Arc<Mutex<Now>>,
    /// Whether a person types the commands.
    person: bool,
}

/// What the program is doing.
enum Now {
    /// Waiting for a line. A signal here is none of the keyboard: somebody asks the program to end.
    Waiting { since: Instant },
    /// Something that is done soon. One signal is passed over, a second ends the program.
    Busy { signals: u32 },
    /// A run.
    Running { switch: CancelSwitch, reporter: Arc<Reporter> },
}

impl Interrupts {
    /// For a loop that a person types into, or for a script.
    pub(super) fn new(person: bool) -> Self {
        Self { now: Arc::new(Mutex::new(Now::Busy { signals: 0 })), person }
    }

    /// Starts listening. To be called once in the life of the program.
    pub(super) fn listen(&self) -> Result<(), CliError> {
        let interrupts = self.clone();
        interrupt::listen(move || interrupts.signal())
    }

    fn signal(&self) {
        match &mut *self.now() {
            Now::Waiting { since } if self.person && since.elapsed() < LATE => {}
            Now::Busy { signals: signals @ 0 } if self.person => *signals += 1,
            Now::Waiting { .. } | Now::Busy { .. } => process::exit(Exit::Cancelled as i32),
            Now::Running { switch, reporter } if switch.is_cancelled() => {
                switch.kill();
                reporter.say("Ending the worker; the next run starts a fresh one.");
            }
            Now::Running { switch, reporter } => {
                switch.cancel();
                reporter.say("Stopping after the current step; press Ctrl-C again to end the worker.");
            }
        }
    }

    /// A line is being waited for.
    pub(super) fn wait(&self) {
        *self.now() = Now::Waiting { since: Instant::now() };
    }

    /// A command works.
    pub(super) fn work(&self) {
        *self.now() = Now::Busy { signals: 0 };
    }

    /// A run begins.
    pub(super) fn run(&self, switch: &CancelSwitch, reporter: &Arc<Reporter>) {
        *self.now() = Now::Running { switch: switch.clone(), reporter: Arc::clone(reporter) };
    }

    /// Whatever a panic left is as good as before.
    fn now(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn in_a_run_the_first_signal_cancels_and_around_it_one_is_passed_over() {
        let interrupts = Interrupts::new(true);
        interrupts.work();
        interrupts.signal();
        interrupts.wait();
        interrupts.signal();
        let (switch, reporter) = (CancelSwitch::default(), Arc::new(Reporter::silent()));
        interrupts.run(&switch, &reporter);
        assert!(!switch.is_cancelled());
        interrupts.signal();
        assert!(switch.is_cancelled());
    }
}
