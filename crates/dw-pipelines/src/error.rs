//! The one error type of this crate.

use std::path::PathBuf;

use dw_core::cancel::Cancelled;

/// What can go wrong while models are found, read and run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The caller asked to stop.
    #[error(transparent)]
    Cancelled(#[from] Cancelled),
    /// A tensor operation failed: shapes, types, the device.
    #[error("tensor operation failed: {0}")]
    Tensor(#[from] candle_core::Error),
    /// A file could not be read. The message of `fs_err` carries the path.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// A file is not what it should be.
    #[error("`{}`: {reason}", path.display())]
    BadFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and the remedy.
        reason: String,
    },
    /// An argument of a pipeline call cannot be used.
    #[error("argument `{name}`: {reason}")]
    Argument {
        /// The argument.
        name: String,
        /// What is wrong with it, and the remedy.
        reason: String,
    },
    /// The request asks for something this build or this model does not have.
    #[error("{0}")]
    Unsupported(String),
    /// A latent or picture holds NaN or infinity.
    #[error("NaN or infinity in the {what}{at}: {remedy}")]
    NonFinite {
        /// What (`latents`, `image`).
        what: &'static str,
        /// Where, with a leading blank (` after denoise step 3`), or empty.
        at: String,
        /// What to try.
        remedy: String,
    },
    /// The model source could not be found or fetched.
    #[error("{0}")]
    Source(String),
}

/// Results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;
