//! The decoder of Unix `compress` (`.Z`): LZW (Welch 1984) with codes that grow
//! from 9 to 16 bits.

const CLEAR: usize = 256;
const FIRST: usize = 257;
const MAX_BITS: u32 = 16;

/// Decodes a block-mode stream without its three header bytes. `None` when a
/// code is used before it is defined, or the output would exceed `limit` bytes.
pub(super) fn decode(stream: &[u8], limit: usize) -> Option<Vec<u8>> {
    // Entry `c` is the string of `prefix[c]` followed by the byte `last[c]`.
    let mut prefix: Vec<u16> = vec![0; FIRST];
    let mut last: Vec<u8> = (0..FIRST).map(|c| c as u8).collect();
    let (mut out, mut scratch) = (Vec::new(), Vec::new());
    let mut codes = Codes { stream, bit: 0, group_start: 0, bits: 9 };
    let mut previous: Option<(usize, u8)> = None;
    while let Some(code) = codes.next() {
        if code == CLEAR {
            prefix.truncate(FIRST);
            last.truncate(FIRST);
            codes.set_width(9);
            previous = None;
            continue;
        }
        // A code one past the table is the previous string plus its own first byte.
        let (mut walk, repeats) = match previous {
            _ if code < prefix.len() => (code, None),
            Some((old, first)) if code == prefix.len() => (old, Some(first)),
            _ => return None,
        };
        scratch.clear();
        scratch.extend(repeats);
        while walk >= FIRST {
            scratch.push(last[walk]);
            walk = usize::from(prefix[walk]);
        }
        let first = walk as u8;
        scratch.push(first);
        if out.len() + scratch.len() > limit {
            return None;
        }
        out.extend(scratch.iter().rev());
        if let Some((old, _)) = previous
            && prefix.len() < 1 << MAX_BITS
        {
            prefix.push(old as u16);
            last.push(first);
            if prefix.len() == 1 << codes.bits && codes.bits < MAX_BITS {
                codes.set_width(codes.bits + 1);
            }
        }
        previous = Some((code, first));
    }
    Some(out)
}

/// Little-endian codes, written by `compress` in groups of eight; a change of
/// width skips what is left of the group.
struct Codes<'a> {
    stream: &'a [u8],
    bit: usize,
    group_start: usize,
    bits: u32,
}

impl Codes<'_> {
    fn next(&mut self) -> Option<usize> {
        let byte = self.bit / 8;
        if self.bit + self.bits as usize > self.stream.len() * 8 {
            return None;
        }
        let word = (0..3).fold(0u32, |word, i| {
            word | u32::from(self.stream.get(byte + i).copied().unwrap_or(0)) << (8 * i)
        });
        self.bit += self.bits as usize;
        Some((word >> ((self.bit - self.bits as usize) % 8)) as usize & ((1 << self.bits) - 1))
    }

    fn set_width(&mut self, bits: u32) {
        let group = self.bits as usize * 8;
        self.bit = self.group_start + (self.bit - self.group_start).next_multiple_of(group);
        self.group_start = self.bit;
        self.bits = bits;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// 9-bit codes, little-endian.
    fn pack(codes: &[usize]) -> Vec<u8> {
        let mut out = vec![0u8; (codes.len() * 9).div_ceil(8)];
        for (i, code) in codes.iter().enumerate() {
            for b in 0..9 {
                out[(i * 9 + b) / 8] |= ((code >> b & 1) as u8) << ((i * 9 + b) % 8);
            }
        }
        out
    }

    #[test]
    fn a_code_may_name_the_entry_being_built() {
        // "a", then 257 = "aa" while 257 is still open, then "b".
        assert_eq!(decode(&pack(&[97, 257, 98]), 100).unwrap(), b"aaab");
    }

    #[test]
    fn undefined_codes_and_bombs_are_refused() {
        assert_eq!(decode(&pack(&[97, 400]), 100), None);
        assert_eq!(decode(&pack(&[300]), 100), None);
        assert_eq!(decode(&pack(&[97, 257, 258, 259]), 5), None);
    }

    proptest! {
        #[test]
        fn never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
            let _ = decode(&bytes, 1 << 16);
        }
    }
}
