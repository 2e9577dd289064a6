//! The switch by which another thread stops a run.

use std::sync::{
    Arc,
    atomic::{AtomicU8, Ordering},
};

/// Stops a run of [`super::Supervisor::execute`] from another thread, a Ctrl-C handler for example. Clones
/// share the switch.
#[derive(Clone, Debug, Default)]
pub struct CancelSwitch(Arc<AtomicU8>);

/// How far a switch has been turned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Wish {
    GoOn = 0,
    Cancel = 1,
    Kill = 2,
}

impl CancelSwitch {
    /// Asks the run to stop at the next denoising step; models stay loaded.
    pub fn cancel(&self) {
        self.0.fetch_max(Wish::Cancel as u8, Ordering::SeqCst);
    }

    /// Kills the worker; the next run starts a fresh one.
    pub fn kill(&self) {
        self.0.fetch_max(Wish::Kill as u8, Ordering::SeqCst);
    }

    /// What Ctrl-C does: the first press cancels, the second kills.
    pub fn press(&self) {
        let _ = self.0.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |wish| Some((wish + 1).min(Wish::Kill as u8)));
    }

    /// Whether the run was asked to stop, either way.
    pub fn is_cancelled(&self) -> bool {
        self.wish() > Wish::GoOn
    }

    /// Turns the switch back, for the next run.
    pub fn reset(&self) {
        self.0.store(Wish::GoOn as u8, Ordering::SeqCst);
    }

    pub(super) fn wish(&self) -> Wish {
        match self.0.load(Ordering::SeqCst) {
            0 => Wish::GoOn,
            1 => Wish::Cancel,
            _ => Wish::Kill,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_press_cancels_and_the_second_kills() {
        let switch = CancelSwitch::default();
        let handler = switch.clone();
        assert!(!switch.is_cancelled());
        handler.press();
        assert_eq!(switch.wish(), Wish::Cancel);
        handler.press();
        handler.press();
        assert_eq!(switch.wish(), Wish::Kill);
        switch.reset();
        assert_eq!(switch.wish(), Wish::GoOn);
    }

    #[test]
    fn cancelling_does_not_take_a_kill_back() {
        let switch = CancelSwitch::default();
        switch.kill();
        switch.cancel();
        assert_eq!(switch.wish(), Wish::Kill);
    }
}
