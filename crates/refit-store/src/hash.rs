//! sha256 of bytes, readers and files, in hexadecimal.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use sha2::{Digest, Sha256};

/// sha256 of bytes.
pub fn hex(bytes: &[u8]) -> String {
    format(&Sha256::digest(bytes))
}

/// sha256 of all that a reader gives.
pub fn reader(mut reader: impl Read) -> io::Result<String> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 18];
    loop {
        match reader.read(&mut buffer)? {
            0 => return Ok(format(&hasher.finalize())),
            n => hasher.update(&buffer[..n]),
        }
    }
}

/// sha256 of a file.
pub fn file(path: &Path) -> io::Result<String> {
    reader(File::open(path)?)
}

/// Hexadecimal digits of a digest.
pub(crate) fn format(digest: &[u8]) -> String {
    use std::fmt::Write;
    digest.iter().fold(String::with_capacity(2 * digest.len()), |mut text, byte| {
        write!(text, "{byte:02x}").expect("invariant: writing to a string succeeds");
        text
    })
}

#[cfg(test)]
mod tests {
    #[test]
    fn known_digest() {
        let empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(super::hex(b""), empty);
        assert_eq!(super::reader(&b""[..]).unwrap(), empty);
    }
}
