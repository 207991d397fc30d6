//! Codes in 32-bit words.

/// Whole codes that a word holds.
pub(super) fn per_word(bits: u8) -> usize {
    32 / usize::from(bits)
}

/// Words that a stream of codes takes.
pub fn words_of(codes: usize, bits: u8) -> usize {
    (codes * usize::from(bits)).div_ceil(32)
}

/// Code `i` of a row of words (little endian), a whole number of codes to a word.
pub(super) fn word_code(words: &[u8], i: usize, bits: u8) -> u32 {
    let per = per_word(bits);
    let word = &words[i / per * 4..];
    let word = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
    word >> (i % per * usize::from(bits)) & ((1 << bits) - 1)
}

/// Packs codes as one stream of bits, the lowest first, into words; the last one is filled up with zeros.
pub fn pack_stream(codes: impl Iterator<Item = u32>, bits: u8) -> Vec<u32> {
    let (mut words, mut buffer, mut filled) = (Vec::new(), 0u64, 0u32);
    for code in codes {
        buffer |= u64::from(code) << filled;
        filled += u32::from(bits);
        if filled >= 32 {
            words.push(buffer as u32);
            buffer >>= 32;
            filled -= 32;
        }
    }
    if filled > 0 {
        words.push(buffer as u32);
    }
    words
}

/// Code `i` of column `column` of a matrix of words `[words, columns]` (little endian) whose columns are streams of bits.
pub fn code_at(words: &[u8], i: usize, bits: u8, columns: usize, column: usize) -> u32 {
    let first = i * usize::from(bits);
    let (word, shift) = (first / 32, first % 32);
    let at = |word: usize| {
        let from = (word * columns + column) * 4;
        let bytes = &words[from..from + 4];
        u64::from(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    };
    let mut value = at(word);
    if shift + usize::from(bits) > 32 {
        value |= at(word + 1) << 32;
    }
    (value >> shift) as u32 & ((1 << bits) - 1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn codes_come_back(bits in 2u8..=8, seed in any::<u64>(), count in 1usize..90) {
            let code = |i: usize| (seed.rotate_left(i as u32 * 7) as u32) & ((1 << bits) - 1);
            // Whole codes to a word, as older files have them.
            let words: Vec<u8> = (0..count)
                .collect::<Vec<_>>()
                .chunks(per_word(bits))
                .flat_map(|chunk| {
                    let place = |k: usize| code(chunk[k]) << (k * usize::from(bits));
                    (0..chunk.len()).fold(0u32, |word, k| word | place(k)).to_le_bytes()
                })
                .collect();
            for i in 0..count {
                prop_assert_eq!(word_code(&words, i, bits), code(i));
            }
            // A stream whose last word is not full, and three columns side by side.
            let stream = pack_stream((0..count).map(code), bits);
            prop_assert_eq!(stream.len(), words_of(count, bits));
            let columns: Vec<Vec<u32>> =
                (0..3).map(|c| pack_stream((0..count).map(|i| code(i + c)), bits)).collect();
            let bytes: Vec<u8> = (0..columns[0].len())
                .flat_map(|w| columns.iter().flat_map(move |column| column[w].to_le_bytes()))
                .collect();
            for c in 0..3 {
                for i in 0..count {
                    prop_assert_eq!(code_at(&bytes, i, bits, 3, c), code(i + c));
                }
            }
        }
    }

    #[test]
    fn three_bits_lie_as_in_gptq() {
        // 32 values in three words: the low two bits of value 10 end the first, its third bit begins the second; the low
        // bit of value 21 ends the second.
        let mut codes = [0u32; 32];
        (codes[10], codes[21]) = (0b101, 0b111);
        let words = pack_stream(codes.into_iter(), 3);
        assert_eq!(words, [0b01 << 30, 1 | 1 << 31, 0b11]);
    }
}
