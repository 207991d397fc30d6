//! The King James Bible of Debian's `bible-kjv-text`.
//!
//! `bible.data` is a window-compressed file: a text header, then big-endian
//! words (window size at byte 84, number of windows, and one offset per window
//! plus the end), then one LZW stream per window. Only the first stream has the
//! three header bytes of `compress`, and the offsets already skip them. The text
//! holds one verse a line: `Ge1:1 In the beginning ...`.

use super::{Document, lzw};
use crate::{Error, Result, file};
use std::path::Path;

/// Where Debian puts the file.
pub const DEBIAN_PATH: &str = "/usr/lib/bible.data";

/// Reads the Bible, one [`Document`] per chapter (`kjv/Ge1`), in canonical order. A chapter's
/// text is its heading, an empty line, and one verse a line without its number.
pub fn open(path: &Path) -> Result<Vec<Document>> {
    let text = inflate(&file::read(path)?)
        .ok_or_else(|| Error::file(path, "not the bible.data of Debian's bible-kjv-text"))?;
    chapters(path, &file::utf8(path, text)?)
}

fn inflate(bytes: &[u8]) -> Option<Vec<u8>> {
    let word = |i: usize| {
        let at = 84 + 4 * i;
        Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?) as usize)
    };
    if !bytes.starts_with(b"EC02Compressed") {
        return None;
    }
    let (window, count) = (word(0)?, word(1)?);
    if window > 1 << 24 || count > bytes.len() / 4 {
        return None;
    }
    let mut text = Vec::with_capacity(bytes.len() * 3);
    for i in 0..count {
        text.extend(lzw::decode(bytes.get(word(2 + i)?..word(3 + i)?)?, window)?);
    }
    Some(text)
}

fn chapters(path: &Path, text: &str) -> Result<Vec<Document>> {
    let mut documents: Vec<Document> = Vec::new();
    for (row, line) in text.lines().enumerate().skip(1) {
        let bad = || Error::line(path, row + 1, "expected `Book1:1 verse`");
        let (reference, verse) = line.split_once(' ').ok_or_else(bad)?;
        let (chapter, _) = reference.split_once(':').ok_or_else(bad)?;
        let digits = chapter.trim_end_matches(|c: char| c.is_ascii_digit()).len();
        let (book, number) = chapter.split_at(digits);
        let book = book_name(book).ok_or_else(bad)?;
        let name = format!("kjv/{chapter}");
        match documents.last_mut() {
            Some(open) if open.name == name => {
                open.text.push('\n');
                open.text.push_str(verse);
            }
            _ => documents.push(Document { text: format!("{book} {number}\n\n{verse}"), name }),
        }
    }
    Ok(documents)
}

fn book_name(short: &str) -> Option<&'static str> {
    BOOKS.iter().find(|(key, _)| *key == short).map(|(_, name)| *name)
}

#[rustfmt::skip]
const BOOKS: [(&str, &str); 66] = [
    ("Ge", "Genesis"), ("Exo", "Exodus"), ("Lev", "Leviticus"), ("Num", "Numbers"),
    ("Deu", "Deuteronomy"), ("Josh", "Joshua"), ("Jdgs", "Judges"), ("Ruth", "Ruth"),
    ("1Sm", "1 Samuel"), ("2Sm", "2 Samuel"), ("1Ki", "1 Kings"), ("2Ki", "2 Kings"),
    ("1Chr", "1 Chronicles"), ("2Chr", "2 Chronicles"), ("Ezra", "Ezra"), ("Neh", "Nehemiah"),
    ("Est", "Esther"), ("Job", "Job"), ("Psa", "Psalm"), ("Prv", "Proverbs"),
    ("Eccl", "Ecclesiastes"), ("SSol", "Song of Solomon"), ("Isa", "Isaiah"), ("Jer", "Jeremiah"),
    ("Lam", "Lamentations"), ("Eze", "Ezekiel"), ("Dan", "Daniel"), ("Hos", "Hosea"),
    ("Joel", "Joel"), ("Amos", "Amos"), ("Obad", "Obadiah"), ("Jonah", "Jonah"),
    ("Mic", "Micah"), ("Nahum", "Nahum"), ("Hab", "Habakkuk"), ("Zep", "Zephaniah"),
    ("Hag", "Haggai"), ("Zec", "Zechariah"), ("Mal", "Malachi"), ("Mat", "Matthew"),
    ("Mark", "Mark"), ("Luke", "Luke"), ("John", "John"), ("Acts", "Acts"),
    ("Rom", "Romans"), ("1Cor", "1 Corinthians"), ("2Cor", "2 Corinthians"), ("Gal", "Galatians"),
    ("Eph", "Ephesians"), ("Phi", "Philippians"), ("Col", "Colossians"), ("1Th", "1 Thessalonians"),
    ("2Th", "2 Thessalonians"), ("1Tim", "1 Timothy"), ("2Tim", "2 Timothy"), ("Titus", "Titus"),
    ("Phmn", "Philemon"), ("Heb", "Hebrews"), ("Jas", "James"), ("1Pet", "1 Peter"),
    ("2Pet", "2 Peter"), ("1Jn", "1 John"), ("2Jn", "2 John"), ("3Jn", "3 John"),
    ("Jude", "Jude"), ("Rev", "Revelation"),
];

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn verses_gather_into_chapters() {
        let text = "Title line\nGe1:1 In the beginning\nGe1:2 And the earth\nGe2:1 Thus\n";
        let documents = chapters(Path::new("bible.data"), text).unwrap();
        assert_eq!(documents.len(), 2);
        assert_eq!(documents[0].text, "Genesis 1\n\nIn the beginning\nAnd the earth");
        let error = chapters(Path::new("bible.data"), "Title\nQqq1:1 text\n").unwrap_err();
        assert!(error.to_string().starts_with("bible.data:2:"), "{error}");
    }

    #[test]
    fn another_file_is_refused() {
        assert!(inflate(b"PK\x03\x04").is_none());
    }

    proptest! {
        #[test]
        fn never_panics(mut bytes in proptest::collection::vec(any::<u8>(), 84..600)) {
            bytes[..14].copy_from_slice(b"EC02Compressed");
            bytes[84..].chunks_mut(4).take(3).for_each(|word| word[0] = 0);
            let _ = inflate(&bytes);
            let _ = chapters(Path::new("x"), &String::from_utf8_lossy(&bytes));
        }
    }
}
