//! Digests in hexadecimal: sha256 of files, as hubs and registries state it, and BLAKE3 of tensors, which costs a
//! tenth of the time: a merge has to digest all that it reads.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use sha2::{Digest, Sha256};

/// sha256 of bytes.
pub fn hex(bytes: &[u8]) -> String {
    format(&Sha256::digest(bytes))
}

/// BLAKE3 of bytes.
pub fn blake3_hex(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex().to_string()
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

/// BLAKE3 of the bytes that `read(at, buffer)` puts into the buffer, from 0 to `len`. The buffer fits into a core's
/// own cache, so that the bytes are digested where they were copied to.
pub fn blake3<E>(
    len: u64,
    mut read: impl FnMut(u64, &mut [u8]) -> Result<(), E>,
) -> Result<::blake3::Hash, E> {
    let mut digest = ::blake3::Hasher::new();
    let mut buffer = vec![0; len.min(1 << 18) as usize];
    let mut at = 0;
    while at < len {
        let part = &mut buffer[..(len - at).min(1 << 18) as usize];
        read(at, part)?;
        digest.update(part);
        at += part.len() as u64;
    }
    Ok(digest.finalize())
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
        let bytes: Vec<u8> = (0..600_000u32).map(|i| i as u8).collect();
        let read = |at: u64, part: &mut [u8]| -> Result<(), ()> {
            part.copy_from_slice(&bytes[at as usize..][..part.len()]);
            Ok(())
        };
        assert_eq!(super::blake3(bytes.len() as u64, read).unwrap(), ::blake3::hash(&bytes));
    }
}
