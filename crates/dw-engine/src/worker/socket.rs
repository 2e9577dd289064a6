//! The connection between a worker and its client: a local socket that exists only until the worker has
//! connected, so that nothing is left behind whoever dies.
//!
//! A name without a slash lives where the system forgets it by itself: the abstract namespace on Linux, named
//! pipes on Windows. A name with a slash is the path of a socket file, on the other Unix systems and for clients
//! that cannot do better; both sides remove it.

use std::{env, io, process, sync::Arc};

use interprocess::local_socket::{
    ConnectOptions, GenericFilePath, GenericNamespaced, Listener, ListenerNonblockingMode, ListenerOptions, Name,
    Stream, prelude::*,
};

use crate::fingerprint::hex;

/// One end of a connection. Both directions can be used at the same time, from different threads.
pub(super) type Connection = Arc<Stream>;

/// A socket under a name that nobody can guess, whose `accept` does not wait.
pub(super) fn listen() -> io::Result<(Listener, String)> {
    let name = format!("dw-{}-{}", process::id(), random_text()?);
    let has_namespace = cfg!(any(windows, target_os = "linux", target_os = "android"));
    let name = if has_namespace { name } else { env::temp_dir().join(name).to_string_lossy().into_owned() };
    let options = ListenerOptions::new().name(resolve(&name)?).nonblocking(ListenerNonblockingMode::Accept);
    Ok((options.create_sync()?, name))
}

/// Connects to whoever listens under `name`, and removes the name where that is a file.
pub(super) fn connect(name: &str) -> io::Result<Connection> {
    let stream = ConnectOptions::new().name(resolve(name)?).connect_sync()?;
    if cfg!(unix) && name.contains('/') {
        // The client may have removed it already.
        let _ = std::fs::remove_file(name);
    }
    Ok(Arc::new(stream))
}

fn resolve(name: &str) -> io::Result<Name<'_>> {
    if name.contains(['/', '\\']) {
        name.to_fs_name::<GenericFilePath>()
    } else {
        name.to_ns_name::<GenericNamespaced>()
    }
}

/// 128 random bits as hexadecimal text.
pub(super) fn random_text() -> io::Result<String> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|error| io::Error::other(error.to_string()))?;
    Ok(hex(&bytes))
}
