//! GGUF files: every count and length within the file, every tensor within the data, and the chat template.

use std::collections::HashSet;
use std::io::{BufReader, Read, Seek};
use std::path::Path;

use super::{Findings, Severity, template};

/// `(elements, bytes)` of one block, by GGML type id.
const BLOCKS: &[(u32, u64, u64)] = &[
    (0, 1, 4),
    (1, 1, 2),
    (2, 32, 18),
    (3, 32, 20),
    (6, 32, 22),
    (7, 32, 24),
    (8, 32, 34),
    (9, 32, 36),
    (10, 256, 84),
    (11, 256, 110),
    (12, 256, 144),
    (13, 256, 176),
    (14, 256, 210),
    (15, 256, 292),
    (16, 256, 66),
    (17, 256, 74),
    (18, 256, 98),
    (19, 256, 50),
    (20, 32, 18),
    (21, 256, 110),
    (22, 256, 82),
    (23, 256, 136),
    (24, 1, 1),
    (25, 1, 2),
    (26, 1, 4),
    (27, 1, 8),
    (28, 1, 8),
    (29, 256, 56),
    (30, 1, 2),
    (34, 256, 54),
    (35, 256, 66),
    (39, 32, 17),
];

const MAX_KEY: u64 = 1 << 16;
const MAX_TEMPLATE: u64 = 1 << 20;

pub(super) fn scan(path: &Path, findings: &mut Findings<'_>) {
    if let Err(reason) = check(path, findings) {
        findings.add(Severity::Danger, format!("malformed GGUF: {reason}"));
    }
}

struct Reader<R> {
    inner: R,
    offset: u64,
    length: u64,
}

impl<R: Read> Reader<R> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut bytes = [0; N];
        self.inner
            .read_exact(&mut bytes)
            .map_err(|_| format!("cut off at byte {}", self.offset))?;
        self.offset += N as u64;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32, String> {
        Ok(u32::from_le_bytes(self.take()?))
    }

    fn u64(&mut self) -> Result<u64, String> {
        Ok(u64::from_le_bytes(self.take()?))
    }

    /// Refuses a size that the rest of the file cannot hold.
    fn within(&self, bytes: u64, what: &str) -> Result<u64, String> {
        if bytes > self.length - self.offset.min(self.length) {
            return Err(format!("{what} of {bytes} bytes reaches beyond the file"));
        }
        Ok(bytes)
    }

    fn skip(&mut self, bytes: u64) -> Result<(), String> {
        let n = std::io::copy(&mut (&mut self.inner).take(bytes), &mut std::io::sink())
            .map_err(|e| e.to_string())?;
        self.offset += n;
        if n == bytes { Ok(()) } else { Err(format!("cut off at byte {}", self.offset)) }
    }

    fn text(&mut self, limit: u64) -> Result<String, String> {
        let len = self.u64()?;
        self.within(len, "a string")?;
        if len > limit {
            return Err(format!("a string of {len} bytes where {limit} are the most"));
        }
        let mut bytes = vec![0; len as usize];
        self.inner.read_exact(&mut bytes).map_err(|e| e.to_string())?;
        self.offset += len;
        String::from_utf8(bytes).map_err(|_| "a string is not UTF-8".to_owned())
    }

    /// Skips a value of a metadata type.
    fn value(&mut self, kind: u32, depth: usize) -> Result<(), String> {
        match kind {
            0 | 1 | 7 => self.skip(1),
            2 | 3 => self.skip(2),
            4..=6 => self.skip(4),
            10..=12 => self.skip(8),
            8 => {
                let len = self.u64()?;
                let len = self.within(len, "a string")?;
                self.skip(len)
            }
            9 if depth < 4 => {
                let (item, count) = (self.u32()?, self.u64()?);
                // The smallest item takes a byte, the smallest string its length.
                self.within(count, "an array")?;
                (0..count).try_for_each(|_| self.value(item, depth + 1))
            }
            9 => Err("arrays are nested too deeply".to_owned()),
            other => Err(format!("unknown metadata type {other}")),
        }
    }
}

fn check(path: &Path, findings: &mut Findings<'_>) -> Result<(), String> {
    let file = std::fs::File::open(path).map_err(|e| e.to_string())?;
    let length = file.metadata().map_err(|e| e.to_string())?.len();
    let mut reader = Reader { inner: BufReader::new(file), offset: 0, length };
    if &reader.take::<4>()? != b"GGUF" {
        return Err("it does not begin with GGUF".to_owned());
    }
    let version = reader.u32()?;
    if !(2..=3).contains(&version) {
        return Err(format!("version {version} is unknown"));
    }
    let (tensors, pairs) = (reader.u64()?, reader.u64()?);
    // A pair takes at least 13 bytes, a tensor at least 24.
    reader.within(
        pairs.saturating_mul(13).saturating_add(tensors.saturating_mul(24)),
        "the header",
    )?;
    let mut alignment = 32;
    let mut keys = HashSet::new();
    for _ in 0..pairs {
        let key = reader.text(MAX_KEY)?;
        let kind = reader.u32()?;
        if key.starts_with("tokenizer.chat_template") && kind == 8 {
            let text = reader.text(MAX_TEMPLATE)?;
            template::scan(&text, &key, findings);
        } else if key == "general.alignment" && kind == 4 {
            alignment = u64::from(reader.u32()?);
        } else {
            reader.value(kind, 0)?;
        }
        if !keys.insert(key.clone()) {
            return Err(format!("metadata `{key}` occurs twice"));
        }
    }
    if alignment == 0 || !alignment.is_multiple_of(8) || alignment > 1 << 20 {
        return Err(format!("alignment {alignment} is not a multiple of 8"));
    }
    let mut ranges = Vec::new();
    let mut names = HashSet::new();
    for _ in 0..tensors {
        let name = reader.text(MAX_KEY)?;
        let rank = reader.u32()?;
        if rank > 8 {
            return Err(format!("tensor `{name}` has {rank} dimensions"));
        }
        let mut elements = 1u64;
        for _ in 0..rank {
            elements = elements
                .checked_mul(reader.u64()?)
                .ok_or_else(|| format!("tensor `{name}` overflows"))?;
        }
        let (kind, offset) = (reader.u32()?, reader.u64()?);
        let Some((_, block, bytes)) = BLOCKS.iter().find(|(id, ..)| *id == kind) else {
            return Err(format!("tensor `{name}` has the unknown type {kind}"));
        };
        if !offset.is_multiple_of(alignment) {
            return Err(format!("tensor `{name}` is not aligned"));
        }
        let size = elements.div_ceil(*block).checked_mul(*bytes);
        let end = size.and_then(|size| offset.checked_add(size));
        ranges.push((
            offset,
            end.ok_or_else(|| format!("tensor `{name}` overflows"))?,
            name.clone(),
        ));
        if !names.insert(name.clone()) {
            return Err(format!("tensor `{name}` occurs twice"));
        }
    }
    let data =
        reader.inner.stream_position().map_err(|e| e.to_string())?.next_multiple_of(alignment);
    ranges.sort();
    if let Some(pair) = ranges.windows(2).find(|pair| pair[1].0 < pair[0].1) {
        return Err(format!("tensors `{}` and `{}` overlap", pair[0].2, pair[1].2));
    }
    let end = ranges.last().map_or(0, |last| last.1);
    let available = length.saturating_sub(data);
    if end > available {
        return Err(format!("tensors take {end} bytes, but {available} are there"));
    }
    let padded = end.next_multiple_of(alignment);
    if available > padded {
        findings.add(
            Severity::Warning,
            format!("{} bytes behind the last tensor belong to none", available - padded),
        );
    }
    Ok(())
}
