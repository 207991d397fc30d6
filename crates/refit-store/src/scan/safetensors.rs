//! Headers of safetensors files: bounds, duplicates, holes and what does not belong into metadata.

use std::collections::HashSet;
use std::fmt;
use std::io::Read;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::Value as Json;

use super::{Findings, Severity, template};

/// The format's own limit.
const MAX_HEADER: u64 = 100_000_000;

/// Bytes of one element.
const DTYPES: &[(&str, u64)] = &[
    ("F64", 8),
    ("I64", 8),
    ("U64", 8),
    ("C64", 8),
    ("F32", 4),
    ("I32", 4),
    ("U32", 4),
    ("F16", 2),
    ("BF16", 2),
    ("I16", 2),
    ("U16", 2),
    ("F8_E4M3", 1),
    ("F8_E5M2", 1),
    ("F8_E8M0", 1),
    ("I8", 1),
    ("U8", 1),
    ("BOOL", 1),
];

/// A header with duplicate names kept.
struct Header(Vec<(String, Json)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Header(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

pub(super) fn scan(path: &Path, findings: &mut Findings<'_>) {
    if let Err(reason) = check(path, findings) {
        findings.add(Severity::Danger, reason);
    }
}

fn check(path: &Path, findings: &mut Findings<'_>) -> Result<(), String> {
    let mut file = std::fs::File::open(path).map_err(|e| e.to_string())?;
    let length = file.metadata().map_err(|e| e.to_string())?.len();
    let mut prefix = [0; 8];
    file.read_exact(&mut prefix).map_err(|_| "shorter than a safetensors header".to_owned())?;
    let header_len = u64::from_le_bytes(prefix);
    if header_len > MAX_HEADER || header_len > length.saturating_sub(8) {
        return Err(format!("header length {header_len} lies outside the file"));
    }
    let mut bytes = vec![0; header_len as usize];
    file.read_exact(&mut bytes).map_err(|e| e.to_string())?;
    if !bytes.starts_with(b"{") {
        return Err("the header does not begin with `{`".to_owned());
    }
    let header: Header =
        serde_json::from_slice(&bytes).map_err(|e| format!("malformed header: {e}"))?;
    let data_len = length - 8 - header_len;
    let mut names = HashSet::new();
    let mut ranges = Vec::new();
    for (name, entry) in &header.0 {
        if !names.insert(name) {
            return Err(format!("tensor `{name}` occurs twice"));
        }
        if name == "__metadata__" {
            metadata(entry, findings)?;
            continue;
        }
        ranges.push(tensor(name, entry, data_len)?);
    }
    ranges.sort_unstable();
    let mut end = 0;
    for (from, to) in ranges {
        if from != end {
            let what = if from < end { "overlap" } else { "leave a hole where something can hide" };
            return Err(format!("tensors {what} at byte {}", from.min(end)));
        }
        end = to;
    }
    if end != data_len {
        return Err(format!("{} bytes behind the last tensor belong to none", data_len - end));
    }
    Ok(())
}

fn tensor(name: &str, entry: &Json, data_len: u64) -> Result<(u64, u64), String> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Entry {
        dtype: String,
        shape: Vec<u64>,
        data_offsets: [u64; 2],
    }
    let entry = Entry::deserialize(entry).map_err(|e| format!("tensor `{name}`: {e}"))?;
    let [from, to] = entry.data_offsets;
    if from > to || to > data_len {
        return Err(format!(
            "tensor `{name}`: bytes {from}..{to} lie outside the {data_len} bytes of data"
        ));
    }
    let element = match DTYPES.iter().find(|(dtype, _)| *dtype == entry.dtype) {
        Some((_, bytes)) => *bytes,
        // Sub-byte and future types: the bounds above still hold.
        None if entry.dtype.starts_with('F') => return Ok((from, to)),
        None => return Err(format!("tensor `{name}`: unknown element type `{}`", entry.dtype)),
    };
    let bytes = entry.shape.iter().try_fold(element, |product, dim| product.checked_mul(*dim));
    if bytes != Some(to - from) {
        return Err(format!(
            "tensor `{name}`: shape {:?} does not fit its {} bytes",
            entry.shape,
            to - from
        ));
    }
    Ok((from, to))
}

fn metadata(metadata: &Json, findings: &mut Findings<'_>) -> Result<(), String> {
    let Json::Object(map) = metadata else { return Err("`__metadata__` is no object".to_owned()) };
    for (key, value) in map {
        let Json::String(text) = value else {
            return Err(format!("metadata `{key}` is no string"));
        };
        if let Some(why) = template::code_in(text) {
            findings.add(Severity::Danger, format!("metadata `{key}` {why}"));
        } else if text.len() > 1 << 20 {
            findings.add(Severity::Warning, format!("metadata `{key}` has {} bytes", text.len()));
        }
    }
    Ok(())
}
