//! How messages travel: four bytes of length (`u32`, little endian), then that many bytes of JSON in UTF-8.
//!
//! Whatever arrives is untrusted until it is decoded: a length beyond [`MAX_FRAME_BYTES`] is refused before
//! anything is allocated for it, and memory grows only with the bytes that really come.

use std::io::{self, Read, Write};

use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

/// The largest frame. The largest messages are previews and lists of findings, some hundred kilobytes.
pub const MAX_FRAME_BYTES: u32 = 16 * 1024 * 1024;

/// How a frame can be wrong. After one of these nothing on the connection can be trusted, so it ends.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The connection failed.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    /// The length is beyond the limit.
    #[error("a frame of {0} bytes was announced; at most {MAX_FRAME_BYTES} are allowed")]
    TooLong(u64),
    /// The connection ended inside a frame.
    #[error("the connection ended inside a frame, after {got} of {wanted} bytes")]
    Truncated {
        /// Bytes that came, the length's own included.
        got: u64,
        /// Bytes that should have come.
        wanted: u64,
    },
    /// The body is no JSON object with a `type`.
    #[error("a frame holds no message: {0}")]
    Malformed(String),
    /// The message is not one of this protocol.
    #[error("{0}")]
    Message(#[from] MessageError),
}

/// A JSON object that is no message of the protocol. The frame was whole, so the connection can go on.
#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    /// Nobody knows this `type`.
    #[error("Unknown command type: {0}")]
    UnknownType(String),
    /// The type is known and its members are wrong.
    #[error("message `{kind}` cannot be used: {reason}")]
    Members {
        /// The `type`.
        kind: String,
        /// What is wrong.
        reason: String,
    },
}

/// Sends one message.
///
/// # Errors
/// When the connection fails, or the message is larger than a frame may be.
pub fn write(writer: &mut (impl Write + ?Sized), message: &impl Serialize) -> Result<(), FrameError> {
    let body = serde_json::to_vec(message).map_err(|error| FrameError::Malformed(error.to_string()))?;
    let length = u32::try_from(body.len()).ok().filter(|length| *length <= MAX_FRAME_BYTES);
    let length = length.ok_or(FrameError::TooLong(body.len() as u64))?;
    // One call: two would be two packets, and the other side would wake up twice.
    let mut frame = Vec::with_capacity(body.len() + 4);
    frame.extend(length.to_le_bytes());
    frame.extend(body);
    writer.write_all(&frame)?;
    Ok(writer.flush()?)
}

/// The body of the next frame; none when the connection has ended between two frames.
///
/// # Errors
/// When the frame is not whole or too long.
pub fn read(reader: &mut impl Read) -> Result<Option<Vec<u8>>, FrameError> {
    let mut head = Vec::with_capacity(4);
    reader.by_ref().take(4).read_to_end(&mut head)?;
    let head: [u8; 4] = match head.as_slice().try_into() {
        Ok(head) => head,
        Err(_) if head.is_empty() => return Ok(None),
        Err(_) => return Err(FrameError::Truncated { got: head.len() as u64, wanted: 4 }),
    };
    let length = u32::from_le_bytes(head);
    if length > MAX_FRAME_BYTES {
        return Err(FrameError::TooLong(length.into()));
    }
    let mut body = Vec::new();
    reader.by_ref().take(length.into()).read_to_end(&mut body)?;
    if body.len() < length as usize {
        return Err(FrameError::Truncated { got: body.len() as u64 + 4, wanted: u64::from(length) + 4 });
    }
    Ok(Some(body))
}

/// The message in the body of a frame.
///
/// # Errors
/// [`FrameError::Malformed`] when it is no message of any protocol, [`FrameError::Message`] when it is none of
/// this one.
pub fn decode<M: DeserializeOwned + Named>(body: &[u8]) -> Result<M, FrameError> {
    let malformed = |error: &dyn std::fmt::Display| FrameError::Malformed(error.to_string());
    let text = str::from_utf8(body).map_err(|error| malformed(&error))?;
    let value: Value = serde_json::from_str(text).map_err(|error| malformed(&error))?;
    let Some(kind) = value.get("type").and_then(Value::as_str).map(str::to_owned) else {
        return Err(malformed(&"it is no JSON object with a text `type`"));
    };
    if !M::NAMES.contains(&kind.as_str()) {
        return Err(MessageError::UnknownType(kind).into());
    }
    serde_json::from_value(value).map_err(|error| MessageError::Members { kind, reason: error.to_string() }.into())
}

/// Messages with the names that one direction knows.
pub trait Named {
    /// The values of `type`.
    const NAMES: &'static [&'static str];
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::protocol::Command;

    fn frame(body: &[u8]) -> Vec<u8> {
        [&(body.len() as u32).to_le_bytes(), body].concat()
    }

    #[test]
    fn what_is_written_is_read_again_and_the_end_between_frames_is_no_error() {
        let mut bytes = Vec::new();
        write(&mut bytes, &Command::Ping).expect("written");
        write(&mut bytes, &Command::Cancel).expect("written");
        let mut reader = bytes.as_slice();
        let mut next = || read(&mut reader).expect("whole frames");
        assert_eq!(decode::<Command>(&next().expect("a frame")).expect("a command"), Command::Ping);
        assert_eq!(decode::<Command>(&next().expect("a frame")).expect("a command"), Command::Cancel);
        assert!(next().is_none());
    }

    #[test]
    fn a_frame_is_a_little_endian_length_and_json() {
        let mut bytes = Vec::new();
        write(&mut bytes, &Command::Ping).expect("written");
        assert_eq!(bytes, b"\x0f\0\0\0{\"type\":\"ping\"}");
    }

    #[test]
    fn a_length_beyond_the_limit_is_refused_before_anything_is_read() {
        let mut reader = [0xff_u8; 4].chain(io::repeat(0));
        assert!(matches!(read(&mut reader), Err(FrameError::TooLong(0xffff_ffff))));
    }

    #[test]
    fn a_connection_that_ends_inside_a_frame_says_how_far_it_came() {
        for (bytes, got, wanted) in [(&b"\x05\0"[..], 2, 4), (b"\x05\0\0\0ab", 6, 9)] {
            match read(&mut &*bytes) {
                Err(FrameError::Truncated { got: g, wanted: w }) => assert_eq!((g, w), (got, wanted)),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn bodies_that_are_no_message_are_malformed() {
        let deep = "[".repeat(100_000);
        for body in [&b""[..], b"\xff\xfe", b"[]", b"7", b"{}", b"{\"type\":3}", b"{\"type\":\"ping\"", deep.as_bytes()]
        {
            let body = read(&mut frame(body).as_slice()).expect("whole").expect("a frame");
            assert!(matches!(decode::<Command>(&body), Err(FrameError::Malformed(_))), "{body:?}");
        }
    }

    #[test]
    fn unknown_types_and_wrong_members_are_told_apart() {
        let error = |text: &str| decode::<Command>(text.as_bytes()).expect_err("no command").to_string();
        assert_eq!(error(r#"{"type":"x"}"#), "Unknown command type: x");
        let message = error(r#"{"type":"execute","workflow_path":1}"#);
        assert!(message.starts_with("message `execute` cannot be used: "), "{message}");
    }
}
