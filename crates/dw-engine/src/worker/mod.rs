//! The worker: a process of its own that owns the device and the loaded models, so that its death takes
//! nothing else with it.
//!
//! [`protocol`] is what is said, [`frame`] how it travels, [`serve`] the worker's side and [`Supervisor`]
//! the side of whoever started it. `docs/worker-protocol.md` describes all of it for other languages.

mod crash;
pub mod frame;
mod liveness;
mod process;
pub mod protocol;
mod server;
mod session;
mod socket;
mod supervisor;
mod switch;

pub use crash::CrashReport;
pub use server::{ServeError, WorkerOptions, serve};
pub use supervisor::{Finished, Job, Supervisor, Update, WorkerError, WorkerLaunch};
pub use switch::CancelSwitch;
