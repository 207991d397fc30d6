//! GGUF's header: key-value metadata and the table of tensors. Everything is checked against the
//! bytes that are there before it is believed; nothing is allocated from a claimed length.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use serde_json::{Value as Json, json};

use super::GgmlType;
use crate::artifact::TensorInfo;
use crate::dtype::DType;
use crate::error::{Error, Result, TensorFault};

/// A metadata value.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Any unsigned integer.
    Unsigned(u64),
    /// Any signed integer.
    Signed(i64),
    /// `f32`, kept as such so that it prints with its own digits.
    F32(f32),
    /// `f64`.
    F64(f64),
    /// Boolean.
    Bool(bool),
    /// String (invalid UTF-8 replaced).
    String(String),
    /// Array of strings.
    Strings(Strings),
    /// Array of numbers or booleans.
    Numbers(Numbers),
}

/// An array of numbers or booleans, as stored.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Numbers {
    kind: u32,
    bytes: Vec<u8>,
}

impl Numbers {
    /// The elements.
    pub fn iter(&self) -> impl Iterator<Item = Value> {
        let size = scalar_size(self.kind).unwrap_or(1);
        self.bytes.chunks_exact(size).map(|bytes| decode_scalar(self.kind, bytes))
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.bytes.len() / scalar_size(self.kind).unwrap_or(1)
    }

    /// True if there is none.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }
}

/// Bytes of a fixed-size value type.
fn scalar_size(kind: u32) -> Option<usize> {
    Some(match kind {
        0 | 1 | 7 => 1,
        2 | 3 => 2,
        4..=6 => 4,
        10..=12 => 8,
        _ => return None,
    })
}

/// Decodes a fixed-size value; `bytes` has the type's size.
fn decode_scalar(kind: u32, bytes: &[u8]) -> Value {
    let mut word = [0; 8];
    word[..bytes.len()].copy_from_slice(bytes);
    let unsigned = u64::from_le_bytes(word);
    // Shifting up and back down again copies the sign bit.
    let spare = 64 - 8 * bytes.len() as u32;
    match kind {
        1 | 3 | 5 | 11 => Value::Signed((unsigned << spare) as i64 >> spare),
        6 => Value::F32(f32::from_bits(unsigned as u32)),
        7 => Value::Bool(unsigned != 0),
        12 => Value::F64(f64::from_bits(unsigned)),
        _ => Value::Unsigned(unsigned),
    }
}

/// An array of strings in one allocation: vocabularies hold a quarter of a million.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Strings {
    text: Vec<u8>,
    ends: Vec<usize>,
}

impl Strings {
    /// Number of strings.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// True if there is none.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// The bytes of string `index`.
    pub fn get(&self, index: usize) -> Option<&[u8]> {
        let end = *self.ends.get(index)?;
        let start = index.checked_sub(1).map_or(0, |before| self.ends[before]);
        Some(&self.text[start..end])
    }

    /// The strings, invalid UTF-8 replaced.
    pub fn iter(&self) -> impl Iterator<Item = std::borrow::Cow<'_, str>> {
        (0..self.len()).map(|index| {
            String::from_utf8_lossy(self.get(index).expect("invariant: index is in range"))
        })
    }

    fn push(&mut self, bytes: &[u8]) {
        self.text.extend_from_slice(bytes);
        self.ends.push(self.text.len());
    }
}

impl Value {
    /// As a non-negative integer.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Self::Unsigned(x) => Some(x),
            Self::Signed(x) => u64::try_from(x).ok(),
            _ => None,
        }
    }

    /// As a number.
    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            Self::Unsigned(x) => Some(x as f64),
            Self::Signed(x) => Some(x as f64),
            // Through the shortest decimal, so that 1e-5 stays 1e-5.
            Self::F32(x) => x.to_string().parse().ok(),
            Self::F64(x) => Some(x),
            _ => None,
        }
    }

    /// As a boolean.
    pub fn as_bool(&self) -> Option<bool> {
        if let Self::Bool(x) = *self { Some(x) } else { None }
    }

    /// As a string.
    pub fn as_str(&self) -> Option<&str> {
        if let Self::String(x) = self { Some(x) } else { None }
    }

    /// As an array of strings.
    pub fn as_strings(&self) -> Option<&Strings> {
        if let Self::Strings(x) = self { Some(x) } else { None }
    }

    /// As an array of numbers or booleans.
    pub fn as_numbers(&self) -> Option<&Numbers> {
        if let Self::Numbers(x) = self { Some(x) } else { None }
    }

    /// As JSON; an infinite or NaN number becomes `null`.
    pub fn to_json(&self) -> Json {
        match self {
            Self::Unsigned(x) => json!(x),
            Self::Signed(x) => json!(x),
            Self::F32(_) | Self::F64(_) => self.as_f64().map_or(Json::Null, |x| json!(x)),
            Self::Bool(x) => json!(x),
            Self::String(x) => json!(x),
            Self::Strings(x) => x.iter().map(|s| json!(s)).collect(),
            Self::Numbers(x) => x.iter().map(|x| x.to_json()).collect(),
        }
    }
}

/// One checked entry of the tensor table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    /// GGUF name, shape (outermost dimension first), type, size.
    pub info: TensorInfo,
    /// First byte in the file.
    pub offset: u64,
}

/// A parsed header.
#[derive(Debug, Clone, Default)]
pub struct Header {
    /// Format version, 2 or 3.
    pub version: u32,
    /// Metadata.
    pub metadata: HashMap<String, Value>,
    /// Tensors in table order.
    pub tensors: Vec<Tensor>,
}

impl Header {
    /// A metadata value.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// `general.architecture`.
    pub fn architecture(&self) -> Option<&str> {
        self.get("general.architecture")?.as_str()
    }
}

struct Cursor<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, len: u64, what: &str) -> Result<&'a [u8]> {
        let rest = &self.bytes[self.at..];
        match usize::try_from(len).ok().and_then(|len| rest.get(..len)) {
            Some(taken) => {
                self.at += taken.len();
                Ok(taken)
            }
            None => Err(Error::Truncated {
                path: self.path.to_owned(),
                what: what.to_owned(),
                need: (self.at as u64).saturating_add(len),
                have: self.bytes.len() as u64,
            }),
        }
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        Ok(*self.take(N as u64, what)?.first_chunk().expect("invariant: N bytes were taken"))
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        self.array(what).map(u64::from_le_bytes)
    }

    fn string(&mut self, what: &str) -> Result<&'a [u8]> {
        let len = self.u64(what)?;
        self.take(len, what)
    }

    fn name(&mut self, what: &str) -> Result<String> {
        let bytes = self.string(what)?;
        String::from_utf8(bytes.to_vec())
            .map_err(|_| self.malformed(format!("{what} is not UTF-8")))
    }

    fn malformed(&self, reason: impl Into<String>) -> Error {
        Error::malformed(self.path, "GGUF", reason)
    }

    fn value(&mut self, key: &str) -> Result<Value> {
        match self.u32(key)? {
            8 => Ok(Value::String(String::from_utf8_lossy(self.string(key)?).into_owned())),
            9 => self.array_value(key),
            kind => {
                let size = self.size_of(kind, key)?;
                Ok(decode_scalar(kind, self.take(size, key)?))
            }
        }
    }

    fn array_value(&mut self, key: &str) -> Result<Value> {
        let (kind, count) = (self.u32(key)?, self.u64(key)?);
        if kind == 8 {
            let mut strings = Strings::default();
            // A false count runs into the end of the file: every string takes eight bytes.
            for _ in 0..count {
                strings.push(self.string(key)?);
            }
            return Ok(Value::Strings(strings));
        }
        let size = self.size_of(kind, key)?;
        let bytes = self.take(count.saturating_mul(size), key)?.to_vec();
        Ok(Value::Numbers(Numbers { kind, bytes }))
    }

    fn size_of(&self, kind: u32, key: &str) -> Result<u64> {
        scalar_size(kind).map(|size| size as u64).ok_or_else(|| {
            self.malformed(format!(
                "{key} has value type {kind}, but types 0 to 12 exist, and arrays do not nest; the \
                 header is damaged: download the file again"
            ))
        })
    }
}

/// Parses and checks a header. `bytes` is the file's beginning, at least to the end of the tensor table;
/// `file_len` bounds the tensors' data. `path` serves the error messages.
pub fn parse(path: &Path, bytes: &[u8], file_len: u64) -> Result<Header> {
    let mut cursor = Cursor { path, bytes, at: 0 };
    if cursor.take(4, "the magic")? != b"GGUF" {
        return Err(cursor.malformed("it does not begin with `GGUF`; is it another format?"));
    }
    let version = cursor.u32("the version")?;
    if version.swap_bytes() <= 3 && version != 0 {
        return Err(cursor.malformed("it is big-endian; convert it with gguf-convert-endian"));
    }
    if !(2..=3).contains(&version) {
        return Err(cursor.malformed(format!("version {version}; refit reads 2 and 3: convert it")));
    }
    let (tensor_count, key_count) = (cursor.u64("the tensor count")?, cursor.u64("the key count")?);
    let mut metadata = HashMap::new();
    for _ in 0..key_count {
        let key = cursor.name("a metadata key")?;
        let value = cursor.value(&format!("metadata `{key}`"))?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(cursor.malformed(format!(
                "key `{key}` occurs twice; the header is damaged: download the file again"
            )));
        }
    }
    let alignment = match metadata.get("general.alignment") {
        None => 32,
        Some(value) => {
            value.as_u64().filter(|x| x.is_power_of_two() && *x <= 1 << 20).ok_or_else(|| {
                cursor.malformed("`general.alignment` must be a power of two up to 2^20")
            })?
        }
    };
    let mut tensors = Vec::new();
    for _ in 0..tensor_count {
        tensors.push(tensor(&mut cursor)?);
    }
    let data_start = (cursor.at as u64).next_multiple_of(alignment);
    check_layout(path, &mut tensors, data_start, alignment, file_len)?;
    Ok(Header { version, metadata, tensors })
}

/// Reads one row of the table; its offset still counts from the start of the data.
fn tensor(cursor: &mut Cursor<'_>) -> Result<Tensor> {
    let name = cursor.name("a tensor's name")?;
    let what = format!("the entry of tensor `{name}`");
    let rank = cursor.u32(&what)?;
    if rank > 4 {
        let reason = TensorFault::Other(format!(
            "{rank} dimensions, but GGUF allows 4; the header is damaged: download the file again"
        ));
        return Err(Error::tensor(cursor.path, name, reason));
    }
    let mut dims = Vec::new();
    for _ in 0..rank {
        dims.push(cursor.u64(&what)?);
    }
    // GGUF lists the fastest dimension first.
    dims.reverse();
    let (id, offset) = (cursor.u32(&what)?, cursor.u64(&what)?);
    let checked = || {
        let Some(dtype) = dtype_of(id) else {
            return Err(TensorFault::UnknownDType { dtype: unread(id) });
        };
        let overflow = || TensorFault::Overflow { shape: dims.clone() };
        let shape: Vec<usize> = dims
            .iter()
            .map(|&dim| usize::try_from(dim).ok())
            .collect::<Option<_>>()
            .ok_or_else(overflow)?;
        let columns = shape.last().copied().unwrap_or(1);
        if !columns.is_multiple_of(dtype.block_len()) {
            let (block, dtype) = (dtype.block_len(), dtype.to_string());
            return Err(TensorFault::BlockMismatch { columns, dtype, block });
        }
        let nbytes = dtype.bytes_of(&shape).ok_or_else(overflow)?;
        Ok(Tensor { info: TensorInfo { name: name.clone(), shape, dtype, nbytes }, offset })
    };
    checked().map_err(|reason| Error::tensor(cursor.path, &name, reason))
}

fn check_layout(
    path: &Path,
    tensors: &mut [Tensor],
    data_start: u64,
    alignment: u64,
    file_len: u64,
) -> Result<()> {
    let available = file_len.saturating_sub(data_start);
    let mut seen = HashSet::new();
    for tensor in tensors.iter_mut() {
        let info = &tensor.info;
        let fault = |reason| Err(Error::tensor(path, &info.name, reason));
        if !seen.insert(info.name.clone()) {
            return fault(TensorFault::Duplicate { other: None });
        }
        let start = tensor.offset;
        let end = start.saturating_add(info.nbytes);
        if end > available {
            return fault(TensorFault::OutOfBounds { start, end, available });
        }
        if !start.is_multiple_of(alignment) {
            let reason = format!(
                "offset {start} is not a multiple of the alignment {alignment}; the header is damaged: \
                 download the file again"
            );
            return fault(TensorFault::Other(reason));
        }
        tensor.offset += data_start;
    }
    let mut order: Vec<&Tensor> = tensors.iter().filter(|t| t.info.nbytes > 0).collect();
    order.sort_by_key(|tensor| tensor.offset);
    for pair in order.windows(2) {
        if pair[0].offset + pair[0].info.nbytes > pair[1].offset {
            let other = pair[0].info.name.clone();
            return Err(Error::tensor(path, &pair[1].info.name, TensorFault::Overlaps { other }));
        }
    }
    Ok(())
}

/// The name of a type that refit does not read, as far as it has one.
fn unread(id: u32) -> String {
    let name = match id {
        9 => "Q8_1",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        21 => "IQ3_S",
        22 => "IQ2_S",
        29 => "IQ1_M",
        4 | 5 | 31..=33 | 36..=38 => {
            return format!("number {id} of GGML, which GGML has removed,");
        }
        _ => return format!("number {id} of GGML"),
    };
    format!("{name} (number {id} of GGML)")
}

fn dtype_of(id: u32) -> Option<DType> {
    Some(match id {
        0 => DType::F32,
        1 => DType::F16,
        24 => DType::I8,
        25 => DType::I16,
        26 => DType::I32,
        27 => DType::I64,
        28 => DType::F64,
        30 => DType::BF16,
        block => DType::Ggml(GgmlType::from_id(block)?),
    })
}
