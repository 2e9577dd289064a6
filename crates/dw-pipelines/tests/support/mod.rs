//! What several test binaries share.

// Each of them uses a part of it.
#![allow(dead_code)]

pub(crate) mod sd3;
pub(crate) mod tiny;
