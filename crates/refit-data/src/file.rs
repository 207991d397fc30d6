//! Whole-file reading: plain or gzip, bytes or checked UTF-8.

use crate::{Error, Result};
use std::io::Read;
use std::path::Path;

/// Gzip output beyond this is taken for a decompression bomb.
const MAX_INFLATED: u64 = 4 << 30;

/// The bytes of `path`; gzip is recognised by its magic number, not by the name.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    if !bytes.starts_with(&[0x1f, 0x8b]) {
        return Ok(bytes);
    }
    let mut out = Vec::new();
    let mut limited = flate2::read::MultiGzDecoder::new(&bytes[..]).take(MAX_INFLATED + 1);
    limited.read_to_end(&mut out).map_err(|e| {
        Error::file(path, format!("damaged gzip stream ({e}); fetch the file again"))
    })?;
    if out.len() as u64 > MAX_INFLATED {
        return Err(Error::file(path, "expands beyond 4 GiB; unpack it and pass a part of it"));
    }
    Ok(out)
}

/// The text of `path` without a leading byte order mark.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    utf8(path, read(path)?)
}

/// Checks `bytes` as UTF-8 and drops a leading byte order mark.
pub(crate) fn utf8(path: &Path, bytes: Vec<u8>) -> Result<String> {
    if bytes.starts_with(&[0xff, 0xfe]) || bytes.starts_with(&[0xfe, 0xff]) {
        let message =
            "UTF-16 (byte order mark at byte 0); convert it with `iconv -f utf-16 -t utf-8`";
        return Err(Error::file(path, message));
    }
    let mut text = String::from_utf8(bytes).map_err(|e| Error::NotUtf8 {
        path: path.to_owned(),
        offset: e.utf8_error().valid_up_to(),
    })?;
    if text.starts_with('\u{feff}') {
        text.drain(..'\u{feff}'.len_utf8());
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_offset_of_the_first_bad_byte_is_named() {
        let error = utf8(Path::new("a.txt"), b"ok \xff".to_vec()).unwrap_err();
        assert!(error.to_string().starts_with("a.txt: not valid UTF-8 at byte 3"), "{error}");
        let error = utf8(Path::new("a.txt"), b"\xff\xfeh\0".to_vec()).unwrap_err();
        assert!(error.to_string().contains("UTF-16"), "{error}");
    }

    #[test]
    fn a_byte_order_mark_is_not_text() {
        assert_eq!(utf8(Path::new("a"), b"\xef\xbb\xbfhi".to_vec()).unwrap(), "hi");
    }
}
