//! Fetches pictures from the web: one GET with limits on time and size.

use std::{io::Read, time::Duration};

/// The largest picture file that is fetched, in bytes.
pub(crate) const MAX_DOWNLOAD_BYTES: u64 = 256 * 1024 * 1024;

/// How long a picture may take to arrive.
pub(crate) const DOWNLOAD_TIMEOUT: Duration = Duration::from_mins(2);

/// The body behind an `http(s)` URL.
///
/// # Errors
/// A sentence that names the URL when dw is offline, the server refuses, the body is larger than
/// [`MAX_DOWNLOAD_BYTES`], or it takes longer than [`DOWNLOAD_TIMEOUT`].
pub(crate) fn fetch(url: &str, offline: bool) -> Result<Vec<u8>, String> {
    if offline {
        return Err(format!("`{url}` was not fetched because dw is offline; save the picture and name its path"));
    }
    let agent: ureq::Agent = ureq::Agent::config_builder().timeout_global(Some(DOWNLOAD_TIMEOUT)).build().into();
    let mut response = agent.get(url).call().map_err(|error| format!("could not fetch `{url}`: {error}"))?;
    let mut body = Vec::new();
    response
        .body_mut()
        .as_reader()
        .take(MAX_DOWNLOAD_BYTES + 1)
        .read_to_end(&mut body)
        .map_err(|error| format!("could not fetch `{url}`: {error}"))?;
    if body.len() as u64 > MAX_DOWNLOAD_BYTES {
        return Err(format!("`{url}` is larger than {} MiB", MAX_DOWNLOAD_BYTES / (1024 * 1024)));
    }
    Ok(body)
}

#[cfg(test)]
mod tests {
    use std::{io::Write, net::TcpListener};

    use super::*;

    #[test]
    fn offline_fetches_nothing_and_says_what_to_do() {
        let message = fetch("http://localhost/a.png", true).expect_err("offline");
        assert!(message.contains("offline") && message.contains("http://localhost/a.png"), "{message}");
    }

    #[test]
    fn a_body_arrives_whole() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("an address");
        let server = std::thread::spawn(move || {
            let (mut socket, _) = listener.accept().expect("one client");
            let mut request = [0; 1024];
            let _ = std::io::Read::read(&mut socket, &mut request).expect("a request");
            socket.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc").expect("the answer");
        });
        assert_eq!(fetch(&format!("http://{address}/x.png"), false).expect("the body"), b"abc");
        server.join().expect("the server ends");
    }

    #[test]
    fn a_refused_connection_names_the_url() {
        let message = fetch("http://127.0.0.1:1/x.png", false).expect_err("nothing listens there");
        assert!(message.contains("http://127.0.0.1:1/x.png"), "{message}");
    }
}
