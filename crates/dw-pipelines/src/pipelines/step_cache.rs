//! Steps that reuse what earlier ones computed: which pipelines do so, and what is said about it.

use dw_core::event::Event;

use crate::{models::Memory, models::Reuse, request::Context};

/// How a call says what it skipped.
pub(crate) fn report(memories: &[&Memory], context: Context<'_>) {
    let Some(first) = memories.first() else { return };
    let (skipped, steps) =
        memories.iter().fold((0, 0), |(skipped, steps), memory| (skipped + memory.skipped, steps + memory.steps));
    let (name, threshold) = match first.rule() {
        Reuse::FirstBlock { threshold } => ("cache", threshold),
        Reuse::Tea { threshold, .. } => ("teacache", threshold),
    };
    let message = if skipped == 0 {
        format!(
            "`{name}` skipped none of {steps} transformer passes; raise its threshold (now {threshold}) to skip some"
        )
    } else {
        format!("`{name}` skipped {skipped} of {steps} transformer passes (threshold {threshold})")
    };
    context.events.emit(Event::Warning { message });
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use dw_core::cancel::CancellationToken;

    use super::*;

    #[test]
    fn the_passes_of_all_prompts_are_counted_together() {
        let told = Mutex::new(Vec::new());
        let events = |event: Event| told.lock().expect("one thread").push(event);
        let cancel = CancellationToken::default();
        let mut memory = Memory::new(Reuse::FirstBlock { threshold: 0.05 });
        (memory.skipped, memory.steps) = (3, 10);
        report(&[&memory, &memory], Context { events: &events, cancel: &cancel });
        report(&[], Context { events: &events, cancel: &cancel });
        let message = "`cache` skipped 6 of 20 transformer passes (threshold 0.05)".to_owned();
        assert_eq!(*told.lock().expect("one thread"), [Event::Warning { message }]);
    }
}
