//! The threads that compute on a CPU: how many, and that the calling one is among them.

use std::{env, thread};

/// The environment variable that rayon and candle read.
const COUNT: &str = "RAYON_NUM_THREADS";

/// Makes the calling thread one of those that compute on a CPU, of which there are as many as the machine has cores, or as
/// `RAYON_NUM_THREADS` says. Returns how many. To be called once, before anything computes; a later call
/// changes nothing.
///
/// Without it everything works, slower: operations of a few microseconds wait for another thread to wake up for them, and
/// candle counts the machine's cores, by reading a file, for every matrix product.
///
/// A machine with one core keeps a thread of its own for kernels: work that other threads hand over must not
/// wait for a caller who may be waiting for them.
///
/// # Safety
///
/// Sets an environment variable, so no other thread may exist that reads or writes the environment meanwhile: call it at the
/// start of `main`.
#[allow(unsafe_code)]
pub unsafe fn start_threads() -> usize {
    let available = thread::available_parallelism().map_or(1, usize::from);
    let count = match env::var_os(COUNT) {
        Some(_) => candle_core::utils::get_num_threads(),
        None => candle_core::utils::get_num_threads().min(available),
    };
    // SAFETY: the caller promises that nobody else looks at the environment.
    unsafe { env::set_var(COUNT, count.to_string()) };
    // An error says that the threads exist already.
    let threads = rayon::ThreadPoolBuilder::new().num_threads(count);
    let _ = if count > 1 { threads.use_current_thread() } else { threads }.build_global();
    count
}
