//! Ctrl-C while a command works. In a run the first stops it at the next denoising step, the second ends
//! the worker; the loop stays in both cases. At the prompt it is a key, not a signal, and not our business.

use std::{
    process,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use dw_engine::worker::CancelSwitch;

use crate::{
    error::{CliError, Exit},
    interrupt,
    render::Reporter,
};

/// What the handler finds when the signal comes. Clones share it.
#[derive(Clone, Default)]
pub(super) struct Interrupts(Arc<Mutex<Now>>);

/// What the program is doing.
#[derive(Default)]
enum Now {
    /// Waiting for a line. A signal here is none of the keyboard: somebody asks the program to end.
    #[default]
    Waiting,
    /// Something that is done soon. One signal is passed over, a second ends the program.
    Busy { signals: u32 },
    /// A run.
    Running { switch: CancelSwitch, reporter: Arc<Reporter> },
}

impl Interrupts {
    /// Starts listening. To be called once in the life of the program.
    pub(super) fn listen(&self) -> Result<(), CliError> {
        let interrupts = self.clone();
        interrupt::listen(move || interrupts.signal())
    }

    fn signal(&self) {
        match &mut *self.now() {
            Now::Waiting => process::exit(Exit::Cancelled as i32),
            Now::Busy { signals: 1.. } => process::exit(Exit::Cancelled as i32),
            Now::Busy { signals } => *signals += 1,
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
        *self.now() = Now::Waiting;
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
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn in_a_run_the_first_signal_cancels_and_elsewhere_one_is_passed_over() {
        let interrupts = Interrupts::default();
        interrupts.work();
        interrupts.signal();
        let (switch, reporter) = (CancelSwitch::default(), Arc::new(Reporter::silent()));
        interrupts.run(&switch, &reporter);
        assert!(!switch.is_cancelled());
        interrupts.signal();
        assert!(switch.is_cancelled());
    }
}
