//! The EXIF block that carries metadata in JPEG and WebP: one `UserComment` field (EXIF 2.32,
//! section 4.6.5), whose first eight bytes name the encoding of the rest.

use std::io::Cursor;

use exif::{Field, In, Tag, Value, experimental::Writer};

const ASCII: &[u8; 8] = b"ASCII\0\0\0";
const UNICODE: &[u8; 8] = b"UNICODE\0";

/// A big-endian TIFF block whose user comment is `text`: as ASCII when it is, else as UTF-16.
pub(crate) fn block(text: &str) -> Result<Vec<u8>, exif::Error> {
    let comment = if text.is_ascii() {
        [ASCII, text.as_bytes()].concat()
    } else {
        let units = text.encode_utf16().flat_map(u16::to_be_bytes);
        UNICODE.iter().copied().chain(units).collect()
    };
    let field = Field { tag: Tag::UserComment, ifd_num: In::PRIMARY, value: Value::Undefined(comment, 0) };
    let mut writer = Writer::new();
    writer.push_field(&field);
    let mut block = Cursor::new(Vec::new());
    writer.write(&mut block, false)?;
    Ok(block.into_inner())
}

/// The user comment of an EXIF block as text; none when there is none or it is not readable text.
pub(crate) fn user_comment(exif: &exif::Exif) -> Option<String> {
    let field = exif.get_field(Tag::UserComment, In::PRIMARY)?;
    let (Value::Undefined(bytes, _) | Value::Byte(bytes)) = &field.value else { return None };
    let (encoding, text) = bytes.split_first_chunk::<8>()?;
    if encoding == UNICODE {
        return utf16(text, exif.little_endian());
    }
    // Programs put UTF-8 behind the ASCII and the undefined prefix alike.
    String::from_utf8(text.to_vec()).ok().map(|text| text.trim_end_matches('\0').to_owned())
}

/// UTF-16 in the byte order of the block, unless the text shows the other one: it starts with an
/// ASCII character, so its first zero byte tells. Writers do not agree on the order.
fn utf16(bytes: &[u8], little_endian: bool) -> Option<String> {
    let little_endian = match bytes {
        [0, second, ..] if *second != 0 => false,
        [first, 0, ..] if *first != 0 => true,
        _ => little_endian,
    };
    let (pairs, []) = bytes.as_chunks::<2>() else { return None };
    let unit = if little_endian { u16::from_le_bytes } else { u16::from_be_bytes };
    let units: Vec<u16> = pairs.iter().map(|pair| unit(*pair)).collect();
    String::from_utf16(&units).ok().map(|text| text.trim_end_matches('\0').to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn comment(block: Vec<u8>) -> Option<String> {
        user_comment(&exif::Reader::new().read_raw(block).expect("a valid block"))
    }

    #[test]
    fn comments_are_read_back_in_either_encoding() {
        for text in [r#"{"a": 1}"#, r#"{"prompt": "ein Bärchen 海 🌊"}"#, ""] {
            assert_eq!(comment(block(text).expect("it fits")).as_deref(), Some(text));
        }
    }

    #[test]
    fn utf16_is_understood_in_both_byte_orders() {
        let text = r#"{"é": 1}"#;
        let little: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
        let big: Vec<u8> = text.encode_utf16().flat_map(u16::to_be_bytes).collect();
        for order in [true, false] {
            assert_eq!(utf16(&little, order).as_deref(), Some(text));
            assert_eq!(utf16(&big, order).as_deref(), Some(text));
        }
        assert_eq!(utf16(&big[..3], false), None);
    }
}
