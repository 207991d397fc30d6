//! The block types of GGML that refit reads.

use std::fmt;

macro_rules! ggml_types {
    ($($(#[$doc:meta])* $name:ident = $id:literal, $len:literal, $bytes:literal;)*) => {
        /// A block-quantized GGUF tensor type. Plain types (F32, F16, BF16, integers) are ordinary
        /// [`DType`](crate::dtype::DType)s.
        #[allow(non_camel_case_types)]
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum GgmlType { $($(#[$doc])* $name,)* }

        impl GgmlType {
            /// Every type that refit reads.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];

            /// The type of a GGUF tensor-type number.
            pub const fn from_id(id: u32) -> Option<Self> {
                match id { $($id => Some(Self::$name),)* _ => None }
            }

            /// GGUF's number of this type.
            pub const fn id(self) -> u32 {
                match self { $(Self::$name => $id),* }
            }

            /// Elements per block.
            pub const fn block_len(self) -> usize {
                match self { $(Self::$name => $len),* }
            }

            /// Bytes per block, scales included.
            pub const fn block_bytes(self) -> usize {
                match self { $(Self::$name => $bytes),* }
            }

            /// GGML's spelling.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => stringify!($name)),* }
            }
        }
    };
}

ggml_types! {
    /// 4 bits, symmetric: `(q - 8) d`.
    Q4_0 = 2, 32, 18;
    /// 4 bits, asymmetric: `q d + m`.
    Q4_1 = 3, 32, 20;
    /// 5 bits, symmetric: `(q - 16) d`.
    Q5_0 = 6, 32, 22;
    /// 5 bits, asymmetric: `q d + m`.
    Q5_1 = 7, 32, 24;
    /// 8 bits, symmetric: `q d`.
    Q8_0 = 8, 32, 34;
    /// 2 bits, 16 sub-blocks with 4-bit scale and minimum.
    Q2_K = 10, 256, 84;
    /// 3 bits, 16 sub-blocks with a 6-bit scale.
    Q3_K = 11, 256, 110;
    /// 4 bits, 8 sub-blocks with 6-bit scale and minimum.
    Q4_K = 12, 256, 144;
    /// 5 bits, 8 sub-blocks with 6-bit scale and minimum.
    Q5_K = 13, 256, 176;
    /// 6 bits, 16 sub-blocks with an 8-bit scale.
    Q6_K = 14, 256, 210;
    /// 8 bits with an f32 scale (an intermediate of GGML's kernels, rarely stored).
    Q8_K = 15, 256, 292;
    /// 4 bits on a non-linear grid.
    IQ4_NL = 20, 32, 18;
    /// 4 bits on a non-linear grid, 8 sub-blocks with a 6-bit scale.
    IQ4_XS = 23, 256, 136;
    /// Ternary, five digits to a byte.
    TQ1_0 = 34, 256, 54;
    /// Ternary, 2 bits each.
    TQ2_0 = 35, 256, 66;
    /// OCP microscaling: E2M1 elements, a power-of-two scale.
    MXFP4 = 39, 32, 17;
    /// E2M1 elements, an unsigned E4M3 scale for every 16 of them.
    NVFP4 = 40, 64, 36;
    /// One bit: `d` or `-d`.
    Q1_0 = 41, 128, 18;
    /// 2 bits: `(q - 1) d`.
    Q2_0 = 42, 64, 18;
}

impl fmt::Display for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}
