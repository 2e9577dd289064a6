//! What the loop asks of a worker: the supervisor of a process, or a stand-in that tests talk to.

use dw_engine::{
    MemoryReport,
    worker::{CancelSwitch, Finished, Job, Supervisor, Update, WorkerError},
};

/// Something that runs workflows and keeps their models.
pub(super) trait Worker {
    /// Whether it is there now. It is started when it is needed.
    fn is_running(&mut self) -> bool;
    /// Its process, while there is one.
    fn process_id(&self) -> Option<u32>;
    /// Runs a workflow, telling what happens, until it is done or the switch is turned.
    fn execute(
        &mut self,
        job: &Job,
        updates: &mut dyn FnMut(Update),
        cancel: &CancelSwitch,
    ) -> Result<Finished, WorkerError>;
    /// What is loaded, and the memory there is.
    fn memory(&mut self) -> Result<MemoryReport, WorkerError>;
    /// Unloads all models; answers with what is left.
    fn clear_memory(&mut self) -> Result<MemoryReport, WorkerError>;
    /// Ends it.
    fn shutdown(&mut self);
}

impl Worker for Supervisor {
    fn is_running(&mut self) -> bool {
        Self::is_running(self)
    }

    fn process_id(&self) -> Option<u32> {
        Self::process_id(self)
    }

    fn execute(
        &mut self,
        job: &Job,
        updates: &mut dyn FnMut(Update),
        cancel: &CancelSwitch,
    ) -> Result<Finished, WorkerError> {
        Self::execute(self, job, updates, cancel)
    }

    fn memory(&mut self) -> Result<MemoryReport, WorkerError> {
        Self::memory(self)
    }

    fn clear_memory(&mut self) -> Result<MemoryReport, WorkerError> {
        Self::clear_memory(self)
    }

    fn shutdown(&mut self) {
        Self::shutdown(self);
    }
}
