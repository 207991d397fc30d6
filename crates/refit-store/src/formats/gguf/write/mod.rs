//! GGUF version 3: metadata, tensor table and layout of a file that will be written.

mod metadata;
mod pieces;
mod tokenizer;

use std::collections::HashMap;

pub use metadata::{MODEL_TYPES, Naming, metadata, naming, rope_factors};
pub use tokenizer::tokenizer_fields;

use crate::dtype::DType;

/// Bytes to which the data and every tensor in it are aligned.
pub const ALIGNMENT: u64 = 32;

/// A metadata value with the width that llama.cpp expects of it.
#[derive(Debug, Clone, PartialEq)]
pub enum Field {
    /// 32-bit unsigned: counts, sizes and ids.
    U32(u32),
    /// Single precision.
    F32(f32),
    /// Boolean.
    Bool(bool),
    /// UTF-8 text.
    Text(String),
    /// Texts that may hold any bytes (tokens).
    Texts(Vec<Vec<u8>>),
    /// 32-bit integers.
    I32s(Vec<i32>),
    /// Single-precision numbers.
    F32s(Vec<f32>),
}

/// Metadata in the order in which it is written.
pub type Fields = Vec<(String, Field)>;

impl From<&str> for Field {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

fn put_text(out: &mut Vec<u8>, text: &[u8]) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text);
}

fn put_field(out: &mut Vec<u8>, field: &Field) {
    let kind = |out: &mut Vec<u8>, kind: u32| out.extend(kind.to_le_bytes());
    let array = |out: &mut Vec<u8>, of: u32, len: usize| {
        kind(out, 9);
        kind(out, of);
        out.extend((len as u64).to_le_bytes());
    };
    match field {
        Field::U32(x) => {
            kind(out, 4);
            out.extend(x.to_le_bytes());
        }
        Field::F32(x) => {
            kind(out, 6);
            out.extend(x.to_le_bytes());
        }
        Field::Bool(x) => {
            kind(out, 7);
            out.push(u8::from(*x));
        }
        Field::Text(text) => {
            kind(out, 8);
            put_text(out, text.as_bytes());
        }
        Field::Texts(texts) => {
            array(out, 8, texts.len());
            texts.iter().for_each(|text| put_text(out, text));
        }
        Field::I32s(list) => {
            array(out, 5, list.len());
            list.iter().for_each(|x| out.extend(x.to_le_bytes()));
        }
        Field::F32s(list) => {
            array(out, 6, list.len());
            list.iter().for_each(|x| out.extend(x.to_le_bytes()));
        }
    }
}

/// GGUF's number of an element type; `None` for types that it does not have. Blocks that are copied may be of any type
/// that is read.
pub fn type_id(dtype: DType) -> Option<u32> {
    Some(match dtype {
        DType::F32 => 0,
        DType::F16 => 1,
        DType::I8 => 24,
        DType::I16 => 25,
        DType::I32 => 26,
        DType::I64 => 27,
        DType::F64 => 28,
        DType::BF16 => 30,
        DType::Ggml(ggml) => ggml.id(),
        _ => return None,
    })
}

/// Everything before the data, padded to [`ALIGNMENT`]. Tensors are given as name, shape (outermost dimension first),
/// type and offset from the start of the data, in the order of the table.
///
/// # Panics
/// If a type is none of GGUF's ([`type_id`]).
pub fn header<'a>(
    fields: &[(String, Field)],
    tensors: impl ExactSizeIterator<Item = (&'a str, &'a [usize], DType, u64)>,
) -> Vec<u8> {
    let mut out = b"GGUF".to_vec();
    out.extend(3u32.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((fields.len() as u64).to_le_bytes());
    for (key, field) in fields {
        put_text(&mut out, key.as_bytes());
        put_field(&mut out, field);
    }
    for (name, shape, dtype, offset) in tensors {
        put_text(&mut out, name.as_bytes());
        out.extend((shape.len() as u32).to_le_bytes());
        // The fastest dimension first.
        shape.iter().rev().for_each(|&dim| out.extend((dim as u64).to_le_bytes()));
        out.extend(type_id(dtype).expect("invariant: the plan was checked").to_le_bytes());
        out.extend(offset.to_le_bytes());
    }
    out.resize(out.len().next_multiple_of(ALIGNMENT as usize), 0);
    out
}

/// `general.file_type`, llama.cpp's number of a mix: that of the type that most weights have.
pub fn file_type(weights: impl Iterator<Item = (DType, u64)>) -> u32 {
    use crate::dtype::GgmlType as G;
    let mut counts = HashMap::<DType, u64>::new();
    for (dtype, numel) in weights {
        *counts.entry(dtype).or_default() += numel;
    }
    let most =
        counts.into_iter().max_by_key(|&(dtype, count)| (count, dtype)).map(|(dtype, _)| dtype);
    match most {
        Some(DType::F16) => 1,
        Some(DType::BF16) => 32,
        Some(DType::Ggml(ggml)) => match ggml {
            G::Q4_0 => 2,
            G::Q4_1 => 3,
            G::Q8_0 => 7,
            G::Q5_0 => 8,
            G::Q5_1 => 9,
            G::Q2_K => 10,
            G::Q3_K => 11,
            G::Q4_K => 14,
            G::Q5_K => 16,
            G::Q6_K => 18,
            G::IQ4_NL => 25,
            G::IQ4_XS => 30,
            G::TQ1_0 => 36,
            G::TQ2_0 => 37,
            // "Guessed": none of llama.cpp's mixes.
            _ => 1024,
        },
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::formats::gguf::{GgmlType, parse};

    #[test]
    fn a_header_is_read_back() {
        let fields = vec![
            ("general.architecture".to_owned(), Field::from("llama")),
            ("llama.block_count".to_owned(), Field::U32(3)),
            ("llama.rope.freq_base".to_owned(), Field::F32(1e4)),
            ("tokenizer.ggml.add_bos_token".to_owned(), Field::Bool(true)),
            ("tokenizer.ggml.tokens".to_owned(), Field::Texts(vec![b"a".to_vec(), vec![]])),
            ("tokenizer.ggml.token_type".to_owned(), Field::I32s(vec![1, -3])),
            ("tokenizer.ggml.scores".to_owned(), Field::F32s(vec![0.5, -1.0])),
        ];
        let tensors = [
            ("a", &[2usize, 64][..], DType::Ggml(GgmlType::Q4_0), 0),
            ("b", &[5][..], DType::F32, 96),
        ];
        let mut bytes = header(&fields, tensors.into_iter());
        assert_eq!(bytes.len() % 32, 0);
        let start = bytes.len() as u64;
        bytes.resize(bytes.len() + 96 + 20, 0);
        let read = parse(Path::new("x.gguf"), &bytes, bytes.len() as u64).unwrap();
        assert_eq!((read.version, read.metadata.len(), read.tensors.len()), (3, 7, 2));
        assert_eq!(read.get("llama.block_count").unwrap().as_u64(), Some(3));
        assert_eq!(read.get("llama.rope.freq_base").unwrap().as_f64(), Some(1e4));
        assert_eq!(read.get("tokenizer.ggml.add_bos_token").unwrap().as_bool(), Some(true));
        assert_eq!(read.get("tokenizer.ggml.tokens").unwrap().as_strings().unwrap().len(), 2);
        let kinds = read.get("tokenizer.ggml.token_type").unwrap().to_json();
        assert_eq!(kinds, serde_json::json!([1, -3]));
        assert_eq!(read.tensors[1].offset, start + 96);
        assert_eq!(read.tensors[0].info.shape, [2, 64]);
    }

    #[test]
    fn the_most_frequent_type_names_the_file() {
        let q8 = DType::Ggml(GgmlType::Q8_0);
        assert_eq!(file_type([(q8, 10), (DType::F32, 3)].into_iter()), 7);
        assert_eq!(file_type([(q8, 10), (DType::F16, 11)].into_iter()), 1);
        assert_eq!(file_type(std::iter::empty()), 0);
    }
}
