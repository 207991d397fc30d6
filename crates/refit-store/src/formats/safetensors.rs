//! safetensors: eight bytes of header length, a JSON header, then the tensors without holes.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};

use crate::artifact::TensorInfo;
use crate::dtype::DType;
use crate::error::{Error, Result, TensorFault};
use crate::storage::{Entry, Source, View};

/// Longest header that is read, as in the reference implementation.
const MAX_HEADER: u64 = 100_000_000;

/// A parsed header.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Header {
    /// The tensors in the order of their bytes.
    pub tensors: Vec<Tensor>,
    /// `__metadata__`.
    pub metadata: BTreeMap<String, String>,
    /// First byte of tensor data in the file.
    pub data_start: u64,
}

/// One checked header entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    /// Name, shape, type and size.
    pub info: TensorInfo,
    /// First byte, from the start of the data.
    pub begin: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTensor {
    dtype: String,
    shape: Vec<Whole>,
    data_offsets: (Whole, Whole),
}

/// A `u64` whose error says so in words: negative and fractional numbers are what damaged headers hold.
#[derive(Clone, Copy)]
struct Whole(u64);

impl<'de> Deserialize<'de> for Whole {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Number;
        impl Visitor<'_> for Number {
            type Value = Whole;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a whole number that is not negative")
            }

            fn visit_u64<E>(self, number: u64) -> Result<Whole, E> {
                Ok(Whole(number))
            }
        }
        deserializer.deserialize_u64(Number)
    }
}

/// Keys in file order, duplicates kept (a JSON map would silently drop them).
struct RawHeader {
    tensors: Vec<(String, RawTensor)>,
    metadata: Option<BTreeMap<String, String>>,
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object of tensors")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<RawHeader, M::Error> {
                let (mut tensors, mut metadata) = (Vec::new(), None);
                while let Some(name) = map.next_key::<String>()? {
                    if name != "__metadata__" {
                        let tensor = map.next_value().map_err(|error| {
                            M::Error::custom(format!("tensor `{name}`: {error}"))
                        })?;
                        tensors.push((name, tensor));
                    } else if metadata.replace(map.next_value()?).is_some() {
                        return Err(M::Error::custom("`__metadata__` occurs twice"));
                    }
                }
                Ok(RawHeader { tensors, metadata })
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

/// Length of the JSON header, from the first eight bytes, checked against the file's length.
fn header_len(path: &Path, first: [u8; 8], file_len: u64) -> Result<u64> {
    let len = u64::from_le_bytes(first);
    if len > MAX_HEADER {
        let reason = format!(
            "the header claims {len} bytes, more than the {MAX_HEADER} that are allowed; is this a \
             safetensors file?"
        );
        return Err(Error::malformed(path, "safetensors", reason));
    }
    if len + 8 > file_len {
        let path = path.to_owned();
        return Err(Error::Truncated {
            path,
            what: "the header".into(),
            need: len + 8,
            have: file_len,
        });
    }
    Ok(len)
}

/// Parses and checks the header of a file of `file_len` bytes whose first bytes are `bytes` (at least
/// the whole header). `path` serves the error messages.
pub fn parse(path: &Path, bytes: &[u8], file_len: u64) -> Result<Header> {
    let Some(first) = bytes.first_chunk::<8>() else {
        let (path, what) = (path.to_owned(), "the header length".to_owned());
        return Err(Error::Truncated { path, what, need: 8, have: bytes.len() as u64 });
    };
    let len = header_len(path, *first, file_len.min(bytes.len() as u64))?;
    let data_start = 8 + len;
    let raw: RawHeader =
        serde_json::from_slice(&bytes[8..data_start as usize]).map_err(|error| {
            let reason =
                format!("the header: {error}; the file is damaged: download or save it again");
            Error::malformed(path, "safetensors", reason)
        })?;
    let available = file_len - data_start;
    let mut tensors = Vec::with_capacity(raw.tensors.len());
    for (name, raw) in raw.tensors {
        tensors.push(
            check(name.clone(), raw, available)
                .map_err(|reason| Error::tensor(path, name, reason))?,
        );
    }
    check_layout(path, &mut tensors, available)?;
    Ok(Header { tensors, metadata: raw.metadata.unwrap_or_default(), data_start })
}

fn check(name: String, raw: RawTensor, available: u64) -> Result<Tensor, TensorFault> {
    let Some(dtype) = DType::from_safetensors(&raw.dtype) else {
        return Err(TensorFault::UnknownDType { dtype: raw.dtype });
    };
    let overflow = || TensorFault::Overflow { shape: raw.shape.iter().map(|dim| dim.0).collect() };
    let shape: Vec<usize> = raw
        .shape
        .iter()
        .map(|dim| usize::try_from(dim.0).ok())
        .collect::<Option<_>>()
        .ok_or_else(overflow)?;
    let expected = dtype.bytes_of(&shape).ok_or_else(overflow)?;
    let (Whole(start), Whole(end)) = raw.data_offsets;
    if end < start {
        return Err(TensorFault::Backwards { start, end });
    }
    if end > available {
        return Err(TensorFault::OutOfBounds { start, end, available });
    }
    if end - start != expected {
        let (dtype, found) = (dtype.to_string(), end - start);
        return Err(TensorFault::SizeMismatch { shape, dtype, expected, found });
    }
    Ok(Tensor { info: TensorInfo { name, shape, dtype, nbytes: expected }, begin: start })
}

/// Sorts by position; names must be unique, and every byte of data must belong to exactly one tensor.
fn check_layout(path: &Path, tensors: &mut [Tensor], available: u64) -> Result<()> {
    let mut names: Vec<&str> = tensors.iter().map(|tensor| &*tensor.info.name).collect();
    names.sort_unstable();
    if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(Error::tensor(path, pair[0], TensorFault::Duplicate { other: None }));
    }
    tensors.sort_by_key(|t| (t.begin, t.info.nbytes));
    let mut at = 0;
    let mut previous = "";
    for tensor in tensors.iter() {
        let fault = match tensor.begin {
            begin if begin < at => TensorFault::Overlaps { other: previous.to_owned() },
            begin if begin > at => TensorFault::Hole { bytes: begin - at },
            _ => {
                at = tensor.begin + tensor.info.nbytes;
                previous = &tensor.info.name;
                continue;
            }
        };
        return Err(Error::tensor(path, &tensor.info.name, fault));
    }
    if at != available {
        let reason = format!(
            "{} bytes after the last tensor belong to none; download or save the file again",
            available - at
        );
        return Err(Error::malformed(path, "safetensors", reason));
    }
    Ok(())
}

/// Opens one file: reads its header, maps nothing.
pub(crate) fn open(path: &Path) -> Result<(Vec<Entry>, BTreeMap<String, String>)> {
    let source = Source::open(path)?;
    let first = source.read_vec(0, 8, "the header length")?;
    let first = *first.first_chunk().expect("invariant: eight bytes were read");
    let len = header_len(path, first, source.len)?;
    let header = parse(path, &source.read_vec(0, 8 + len, "the header")?, source.len)?;
    let start = header.data_start;
    let entry = |tensor: Tensor| Entry {
        info: tensor.info,
        source: source.clone(),
        offset: start + tensor.begin,
        view: View::Plain,
    };
    Ok((header.tensors.into_iter().map(entry).collect(), header.metadata))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn file(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + data, 7);
        bytes
    }

    fn parsed(header: &str, data: usize) -> Result<Header> {
        let bytes = file(header, data);
        parse(Path::new("m.safetensors"), &bytes, bytes.len() as u64)
    }

    fn fault(header: &str, data: usize) -> TensorFault {
        match parsed(header, data) {
            Err(Error::BadTensor { reason, .. }) => reason,
            other => panic!("expected a tensor fault, got {other:?}"),
        }
    }

    const TWO: &str = r#"{"__metadata__":{"format":"pt"},
        "b":{"dtype":"F32","shape":[2,2],"data_offsets":[4,20]},
        "a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}"#;

    #[test]
    fn a_valid_header_is_read_in_byte_order() {
        let header = parsed(TWO, 20).unwrap();
        let names: Vec<_> = header.tensors.iter().map(|t| &*t.info.name).collect();
        assert_eq!(names, ["a", "b"]);
        assert_eq!(header.metadata["format"], "pt");
        assert_eq!(header.tensors[1].info.nbytes, 16);
    }

    #[test]
    fn every_broken_rule_has_its_error() {
        let one = |entry: &str| format!(r#"{{"x":{entry}}}"#);
        let entry = |dtype: &str, shape: &str, offsets: &str| {
            one(&format!(r#"{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}"#))
        };
        assert!(matches!(
            fault(&entry("F32", "[2]", "[0,16]"), 8),
            TensorFault::OutOfBounds { .. }
        ));
        assert!(matches!(fault(&entry("F32", "[2]", "[8,0]"), 8), TensorFault::Backwards { .. }));
        assert!(matches!(
            fault(&entry("F32", "[3]", "[0,8]"), 8),
            TensorFault::SizeMismatch { .. }
        ));
        assert!(matches!(fault(&entry("F32", "[2]", "[4,12]"), 12), TensorFault::Hole { .. }));
        assert!(matches!(fault(&entry("Q9", "[2]", "[0,8]"), 8), TensorFault::UnknownDType { .. }));
        let huge = "[4294967296,4294967296,4294967296]";
        assert!(matches!(fault(&entry("F32", huge, "[0,8]"), 8), TensorFault::Overflow { .. }));
        let overlap = r#"{"x":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},
                          "y":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}"#;
        assert!(matches!(fault(overlap, 6), TensorFault::Overlaps { .. }));
        let twice = r#"{"x":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},
                        "x":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}}"#;
        assert!(matches!(fault(twice, 4), TensorFault::Duplicate { .. }));
        for bad in [
            entry("F32", "[2]", "[-1,8]"),
            entry("F32", "[-2]", "[0,8]"),
            "[]".to_owned(),
            "{".to_owned(),
        ] {
            assert!(matches!(parsed(&bad, 8), Err(Error::Malformed { .. })), "{bad}");
        }
        let ok = entry("U8", "[2]", "[0,2]");
        assert!(matches!(parsed(&ok, 9), Err(Error::Malformed { .. })), "trailing bytes");
        let error = parsed(&entry("F32", "[2]", "[0,16]"), 8).unwrap_err().to_string();
        assert!(error.contains("m.safetensors") && error.contains("`x`"), "{error}");
    }

    #[test]
    fn header_lengths_beyond_the_file_are_refused() {
        let mut bytes = file(TWO, 20);
        bytes[..8].copy_from_slice(&4000u64.to_le_bytes());
        let len = bytes.len() as u64;
        let path = Path::new("m");
        assert!(matches!(parse(path, &bytes, len), Err(Error::Truncated { .. })));
        bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(matches!(parse(path, &bytes, len), Err(Error::Malformed { .. })));
        assert!(matches!(parse(path, &bytes[..5], 5), Err(Error::Truncated { .. })));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse(Path::new("m"), &bytes, bytes.len() as u64);
        }

        #[test]
        fn mutated_headers_never_panic(edits in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
            let mut bytes = file(TWO, 20);
            for (at, value) in edits {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            if let Ok(header) = parse(Path::new("m"), &bytes, bytes.len() as u64) {
                let total: u64 = header.tensors.iter().map(|t| t.info.nbytes).sum();
                prop_assert_eq!(total + header.data_start, bytes.len() as u64);
            }
        }
    }
}
