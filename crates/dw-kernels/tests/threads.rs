//! The thread that starts the threads computes with them. A file of its own, for it is about the whole process.

use std::env;

#[test]
#[allow(unsafe_code)]
fn the_caller_computes_too_and_candle_need_not_count() {
    // SAFETY: the only test of this process, and nothing else reads the environment meanwhile.
    unsafe { env::set_var("RAYON_NUM_THREADS", "3") };
    // SAFETY: as above.
    assert_eq!(unsafe { dw_kernels::start_threads() }, 3);
    assert_eq!(rayon::current_num_threads(), 3);
    assert_eq!(rayon::current_thread_index(), Some(0), "the calling thread is one of them");
    assert_eq!(candle_core::utils::get_num_threads(), 3);
    // SAFETY: as above.
    assert_eq!(unsafe { dw_kernels::start_threads() }, 3, "a second call changes nothing");
}
