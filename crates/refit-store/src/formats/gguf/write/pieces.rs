//! `tokenizer.model` of SentencePiece: the pieces of its vocabulary, read from the protocol buffer.

/// One piece: its text, its score, and its kind as SentencePiece and GGUF number it.
#[derive(Debug, Clone, PartialEq)]
pub struct Piece {
    pub text: Vec<u8>,
    pub score: f32,
    pub kind: i32,
}

/// A reader of protocol buffer fields.
struct Wire<'a> {
    bytes: &'a [u8],
}

/// The value of a field that matters here.
enum Value<'a> {
    Number(u64),
    Fixed(u32),
    Bytes(&'a [u8]),
    Other,
}

impl<'a> Wire<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.bytes.split_at_checked(len)?;
        self.bytes = rest;
        Some(taken)
    }

    fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            value |= u64::from(byte & 127) << shift;
            if byte < 128 {
                return Some(value);
            }
        }
        None
    }

    /// The next field: its number and value; `None` where the bytes are damaged.
    fn field(&mut self) -> Option<(u64, Value<'a>)> {
        let tag = self.varint()?;
        let value = match tag & 7 {
            0 => Value::Number(self.varint()?),
            1 => self.take(8).map(|_| Value::Other)?,
            2 => {
                let len = usize::try_from(self.varint()?).ok()?;
                Value::Bytes(self.take(len)?)
            }
            5 => Value::Fixed(u32::from_le_bytes(*self.take(4)?.first_chunk()?)),
            _ => return None,
        };
        Some((tag >> 3, value))
    }
}

/// The pieces in the order of their ids; `None` where the file is no SentencePiece model.
pub fn pieces(bytes: &[u8]) -> Option<Vec<Piece>> {
    let mut model = Wire { bytes };
    let mut pieces = Vec::new();
    while !model.bytes.is_empty() {
        let (1, Value::Bytes(message)) = model.field()? else { continue };
        let mut wire = Wire { bytes: message };
        let mut piece = Piece { text: Vec::new(), score: 0.0, kind: 1 };
        while !wire.bytes.is_empty() {
            match wire.field()? {
                (1, Value::Bytes(text)) => piece.text = text.to_vec(),
                (2, Value::Fixed(bits)) => piece.score = f32::from_bits(bits),
                (3, Value::Number(kind)) => piece.kind = i32::try_from(kind).ok()?,
                _ => {}
            }
        }
        pieces.push(piece);
    }
    (!pieces.is_empty()).then_some(pieces)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_read_and_damage_is_not_believed() {
        // Two pieces ("ab", -1.5) and ("<s>", 0, control), then a trainer specification that is skipped.
        let mut bytes = vec![0x0a, 9, 0x0a, 2, b'a', b'b', 0x15];
        bytes.extend((-1.5f32).to_le_bytes());
        bytes.extend([0x0a, 7, 0x0a, 3, b'<', b's', b'>', 0x18, 3]);
        bytes.extend([0x12, 2, 0x08, 1]);
        let found = pieces(&bytes).unwrap();
        assert_eq!(found[0], Piece { text: b"ab".to_vec(), score: -1.5, kind: 1 });
        assert_eq!(found[1], Piece { text: b"<s>".to_vec(), score: 0.0, kind: 3 });
        for len in 1..bytes.len() {
            let _ = pieces(&bytes[..len]);
        }
        assert_eq!(pieces(&bytes[..5]), None);
        assert_eq!(pieces(b""), None);
    }
}
