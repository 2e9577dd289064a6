//! What the system's allocator does with memory that was freed: the next operation gets it, and the system does when the
//! work is done.
//!
//! glibc hands large blocks back at once and gets them anew, page by page and zeroed, for the next operation: a quarter of
//! the time of a Stable Diffusion step on a CPU (docs/benchmarks.md). Other systems' allocators are left as they are.

/// Blocks up to this many bytes are kept when they are freed: feature maps, but not the largest of weights and pictures.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const KEPT_BLOCK: i32 = 512 << 20;

/// Keeps freed memory for later operations, from now on.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: sets two numbers of the allocator, under its own lock.
    #[allow(unsafe_code)]
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, KEPT_BLOCK);
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
    }
}

/// Gives the system all memory that is free by now.
pub fn release_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: touches only what is free, under the allocator's own lock.
    #[allow(unsafe_code)]
    unsafe {
        libc::malloc_trim(0);
    }
}
