//! Element types of artifacts, and the conversion of stored bytes to and from `f32`.

use std::fmt;

pub use crate::formats::gguf::GgmlType;

/// Element type of a stored tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DType {
    /// IEEE 754 binary64.
    F64,
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// bfloat16: the upper half of an f32.
    BF16,
    /// 8-bit float, 4 exponent bits, finite only (OCP `E4M3`, `float8_e4m3fn`): largest value 448.
    F8E4M3,
    /// 8-bit float, 5 exponent bits, with infinities (OCP `E5M2`): largest value 57344.
    F8E5M2,
    /// 8-bit power of two without a sign (OCP `E8M0`, the scale of microscaling formats): 2^(byte - 127), 255 is NaN.
    F8E8M0,
    /// Signed 64-bit integer.
    I64,
    /// Signed 32-bit integer.
    I32,
    /// Signed 16-bit integer.
    I16,
    /// Signed 8-bit integer.
    I8,
    /// Unsigned 64-bit integer.
    U64,
    /// Unsigned 32-bit integer.
    U32,
    /// Unsigned 16-bit integer.
    U16,
    /// Unsigned 8-bit integer.
    U8,
    /// One byte, 0 or 1.
    Bool,
    /// A block-quantized GGUF type: whole blocks along the last dimension.
    Ggml(GgmlType),
}

impl DType {
    /// Elements per block: 1, or the GGUF block length (32 or 256).
    pub const fn block_len(self) -> usize {
        match self {
            Self::Ggml(ggml) => ggml.block_len(),
            _ => 1,
        }
    }

    /// Bytes per block (per element where the block length is 1).
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::F64 | Self::I64 | Self::U64 => 8,
            Self::F32 | Self::I32 | Self::U32 => 4,
            Self::F16 | Self::BF16 | Self::I16 | Self::U16 => 2,
            Self::F8E4M3 | Self::F8E5M2 | Self::F8E8M0 | Self::I8 | Self::U8 | Self::Bool => 1,
            Self::Ggml(ggml) => ggml.block_bytes(),
        }
    }

    /// Alignment in bytes that a zero-copy view as this element type needs.
    pub const fn alignment(self) -> usize {
        match self {
            Self::Ggml(_) => 1,
            _ => self.block_bytes(),
        }
    }

    /// Stored bits per element, block scales included.
    pub fn bits(self) -> f64 {
        8.0 * self.block_bytes() as f64 / self.block_len() as f64
    }

    /// Bytes that a tensor of this shape takes; `None` if that overflows or a row is not whole blocks.
    pub fn bytes_of(self, shape: &[usize]) -> Option<u64> {
        let numel = shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d as u64))?;
        let block = self.block_len() as u64;
        let row = shape.last().copied().unwrap_or(1) as u64;
        if !row.is_multiple_of(block) {
            return None;
        }
        (numel / block).checked_mul(self.block_bytes() as u64)
    }

    /// True for the floating-point types (block-quantized ones included). `F8_E8M0` holds scales, not weights: it is
    /// kept as it is, like the integers.
    pub const fn is_float(self) -> bool {
        matches!(
            self,
            Self::F64
                | Self::F32
                | Self::F16
                | Self::BF16
                | Self::F8E4M3
                | Self::F8E5M2
                | Self::Ggml(_)
        )
    }

    /// The name that safetensors headers use; `None` for GGUF's block types.
    pub const fn safetensors_name(self) -> Option<&'static str> {
        Some(match self {
            Self::F64 => "F64",
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::F8E4M3 => "F8_E4M3",
            Self::F8E5M2 => "F8_E5M2",
            Self::F8E8M0 => "F8_E8M0",
            Self::I64 => "I64",
            Self::I32 => "I32",
            Self::I16 => "I16",
            Self::I8 => "I8",
            Self::U64 => "U64",
            Self::U32 => "U32",
            Self::U16 => "U16",
            Self::U8 => "U8",
            Self::Bool => "BOOL",
            Self::Ggml(_) => return None,
        })
    }

    /// The type of a safetensors header name.
    pub fn from_safetensors(name: &str) -> Option<Self> {
        Self::PLAIN.into_iter().find(|dtype| dtype.safetensors_name() == Some(name))
    }

    /// The type of a name as it is displayed: safetensors' or GGML's, in any case.
    pub fn parse(name: &str) -> Option<Self> {
        let plain = || Self::PLAIN.into_iter();
        let blocks = || GgmlType::ALL.iter().map(|&ggml| Self::Ggml(ggml));
        plain().chain(blocks()).find(|dtype| dtype.to_string().eq_ignore_ascii_case(name))
    }

    /// Every type that is not a GGUF block type.
    pub const PLAIN: [Self; 16] = [
        Self::F64,
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::F8E4M3,
        Self::F8E5M2,
        Self::F8E8M0,
        Self::I64,
        Self::I32,
        Self::I16,
        Self::I8,
        Self::U64,
        Self::U32,
        Self::U16,
        Self::U8,
        Self::Bool,
    ];
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ggml(ggml) => ggml.fmt(f),
            plain => f.pad(plain.safetensors_name().expect("invariant: plain types are named")),
        }
    }
}
