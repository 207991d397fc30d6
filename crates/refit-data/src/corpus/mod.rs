//! Text corpora: from packages installed on this machine, and the small held-out
//! texts that travel inside refit.
//!
//! Corpora are lists of [`Document`]s and are split by document, never inside
//! one. [`hold_out`] also keeps any document that repeats another one's sentences
//! (parallel chapters, boilerplate) out of the held-out parts, so that a model
//! trained on the train part has not seen them.

pub mod kjv;
mod lzw;
pub mod roff;

use crate::rng::{Rng, hash};
use crate::wordnet::{Glosses, Pos, Synset};
use crate::{Error, Result, file};
use sha2::{Digest, Sha256};
use std::collections::{HashMap, HashSet};
use std::path::Path;

/// One unit of a corpus: a chapter, a manual page, a gloss, a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    /// What a person calls it: `kjv/Ge1`, `man/fopen.3.gz`, a path.
    pub name: String,
    /// Plain text.
    pub text: String,
}

/// A domain of the texts that travel with refit: enough to calibrate on and to
/// evaluate with when nothing can be fetched. The sources and their licences
/// stand in `assets/text/README.md`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Builtin {
    /// `kjv`, `man` or `wordnet`.
    pub domain: &'static str,
    /// For calibration.
    pub calib: &'static str,
    /// For evaluation; no document of it is in `calib`, or in the texts that the
    /// builtin tiny model was trained on.
    pub eval: &'static str,
}

/// The three domains: a Bible translation, manual pages, dictionary glosses.
pub fn builtin() -> [Builtin; 3] {
    macro_rules! domain {
        ($name:literal) => {
            Builtin {
                domain: $name,
                calib: include_str!(concat!("../../../../assets/text/", $name, ".calib.txt")),
                eval: include_str!(concat!("../../../../assets/text/", $name, ".eval.txt")),
            }
        };
    }
    [domain!("kjv"), domain!("man"), domain!("wordnet")]
}

/// Manual pages (`.gz` or plain) as plain text, in the order given; pages that
/// only point to another are left out.
///
/// # Errors
/// A page that cannot be read or is not UTF-8.
pub fn man_pages<P: AsRef<Path>>(paths: &[P]) -> Result<Vec<Document>> {
    let mut documents = Vec::new();
    for path in paths {
        let path = path.as_ref();
        let text = roff::to_text(&file::read_text(path)?);
        if !text.is_empty() {
            let file = path.file_name().unwrap_or_default().to_string_lossy();
            documents.push(Document { name: format!("man/{file}"), text });
        }
    }
    Ok(documents)
}

/// Dictionary lines, `dog, domestic dog: a member of the genus Canis ...`, fifty
/// neighbours (which are related: the files follow the lexicographers) to a
/// document, named `wordnet/noun50` after part of speech and first line.
pub fn glosses(net: &Glosses) -> Vec<Document> {
    let mut documents = Vec::new();
    for same_pos in net.synsets().chunk_by(|a, b| a.pos == b.pos) {
        let pos = match same_pos[0].pos {
            Pos::Noun => "noun",
            Pos::Verb => "verb",
            Pos::Adjective => "adj",
            Pos::Adverb => "adv",
        };
        for (block, synsets) in same_pos.chunks(50).enumerate() {
            let line = |s: &Synset| format!("{}: {}", s.lemmas.join(", "), s.gloss);
            let text = synsets.iter().map(line).collect::<Vec<_>>().join("\n");
            documents.push(Document { name: format!("wordnet/{pos}{}", block * 50), text });
        }
    }
    documents
}

/// One document per file, whatever is in it; every file must be UTF-8 text.
///
/// # Errors
/// A file that cannot be read or is not UTF-8 (with the byte offset).
pub fn files<P: AsRef<Path>>(paths: &[P]) -> Result<Vec<Document>> {
    let read = |path: &P| {
        let path = path.as_ref();
        Ok(Document { name: path.display().to_string(), text: file::read_text(path)? })
    };
    paths.iter().map(read).collect()
}

/// Which part of a corpus a document belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Part {
    Train,
    Calib,
    Eval,
}

/// The part that a document's name alone decides: SHA-256 of the name, as a
/// number, modulo 40; 0 and 1 evaluate, 2 calibrates, the rest trains. Adding
/// documents to a corpus never moves another one.
pub fn part_of(name: &str) -> Part {
    let digest = Sha256::digest(name.as_bytes());
    match digest.iter().fold(0, |rest, byte| (rest * 256 + u32::from(*byte)) % 40) {
        0 | 1 => Part::Eval,
        2 => Part::Calib,
        _ => Part::Train,
    }
}

/// The result of [`hold_out`], each part in corpus order.
#[derive(Debug, Clone)]
pub struct HeldOut {
    /// Every document whose name says so.
    pub train: Vec<Document>,
    /// At least the bytes asked for.
    pub calib: Vec<Document>,
    /// At least the bytes asked for.
    pub eval: Vec<Document>,
}

/// Words per shingle when documents are compared.
const SHINGLE: usize = 8;
/// A held-out document shares at most this part of its shingles with the rest.
const MAX_SHARED: f64 = 0.1;
/// Bytes of the longest document that is held out: no single one may dominate a part.
const MAX_DOCUMENT: usize = 15_000;

/// Splits by document with [`part_of`], then keeps of the held-out parts about
/// `bytes` each, in the order of the documents' content hashes: those for which
/// `eligible` holds, at most 15 kB long, with at most a tenth of
/// their eight-word sequences in any other document. What is left of the held-out
/// parts is dropped.
///
/// # Errors
/// Fewer qualifying bytes than asked for.
pub fn hold_out(
    documents: Vec<Document>,
    bytes: usize,
    eligible: impl Fn(&Document) -> bool,
) -> Result<HeldOut> {
    let shared = shared_shingles(&documents);
    let choose = |part: Part| {
        let mut order: Vec<(u64, usize)> = documents
            .iter()
            .enumerate()
            .filter(|(_, d)| {
                part_of(&d.name) == part && d.text.len() <= MAX_DOCUMENT && eligible(d)
            })
            .filter(|(i, _)| shared[*i] <= MAX_SHARED)
            .map(|(i, d)| (hash(0, d.text.as_bytes()), i))
            .collect();
        order.sort_unstable();
        let (mut chosen, mut size) = (HashSet::new(), 0);
        for (_, i) in order {
            if size >= bytes {
                break;
            }
            size += documents[i].text.len();
            chosen.insert(i);
        }
        if size < bytes {
            let message = format!(
                "only {size} of {bytes} bytes qualify for the {part:?} part; hold out fewer bytes or add documents"
            );
            return Err(Error::Invalid(message));
        }
        Ok(chosen)
    };
    let (calib, eval) = (choose(Part::Calib)?, choose(Part::Eval)?);
    let mut parts = HeldOut { train: vec![], calib: vec![], eval: vec![] };
    for (i, document) in documents.into_iter().enumerate() {
        match part_of(&document.name) {
            Part::Train => parts.train.push(document),
            Part::Calib if calib.contains(&i) => parts.calib.push(document),
            Part::Eval if eval.contains(&i) => parts.eval.push(document),
            _ => {}
        }
    }
    Ok(parts)
}

/// For each document, the part of its word sequences that occur in another.
fn shared_shingles(documents: &[Document]) -> Vec<f64> {
    let shingles = |text: &str| -> HashSet<u64> {
        let words: Vec<u64> = text
            .split(|c: char| !c.is_alphanumeric())
            .filter(|w| !w.is_empty())
            .map(|w| fold(0, w.to_lowercase().bytes().map(u64::from)))
            .collect();
        let width = SHINGLE.min(words.len()).max(1);
        words.windows(width).map(|w| fold(1, w.iter().copied())).collect()
    };
    let all: Vec<HashSet<u64>> = documents.iter().map(|d| shingles(&d.text)).collect();
    let mut holders: HashMap<u64, u32> = HashMap::new();
    all.iter().flatten().for_each(|s| *holders.entry(*s).or_default() += 1);
    let part = |own: &HashSet<u64>| {
        let shared = own.iter().filter(|s| holders[s] > 1).count();
        shared as f64 / own.len().max(1) as f64
    };
    all.iter().map(part).collect()
}

/// A 64-bit hash of a sequence: each item is mixed into the state by one
/// SplitMix64 step.
fn fold(seed: u64, items: impl Iterator<Item = u64>) -> u64 {
    items.fold(seed, |state, item| Rng::new(state ^ item.rotate_left(17)).next_u64())
}

/// Documents with an empty line between them.
pub fn join(documents: &[Document]) -> String {
    let mut text = String::new();
    for document in documents {
        text.push_str(document.text.trim_end());
        text.push_str("\n\n");
    }
    text.truncate(text.trim_end().len());
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(name: &str, text: String) -> Document {
        Document { name: name.into(), text }
    }

    fn corpus() -> Vec<Document> {
        let mut rng = Rng::new(9);
        let mut words = |n: usize| {
            (0..n).map(|_| format!("w{}", rng.below(5000))).collect::<Vec<_>>().join(" ")
        };
        (0..400).map(|i| document(&format!("d{i}"), words(40))).collect()
    }

    #[test]
    fn names_decide_and_never_change() {
        // Python: int(sha256(name).hexdigest(), 16) % 40
        assert_eq!(part_of("kjv/Ge1"), Part::Train);
        assert_eq!(part_of("kjv/Ge22"), Part::Eval);
        assert_eq!(part_of("kjv/Ge38"), Part::Calib);
        let parts = hold_out(corpus(), 1000, |_| true).unwrap();
        assert!(parts.train.iter().all(|d| part_of(&d.name) == Part::Train));
        assert!(parts.eval.iter().all(|d| part_of(&d.name) == Part::Eval));
        assert!(parts.calib.iter().all(|d| part_of(&d.name) == Part::Calib));
        assert!(join(&parts.eval).len() >= 1000 && join(&parts.calib).len() >= 1000);
        assert_eq!(hold_out(corpus(), 1000, |_| true).unwrap().eval, parts.eval);
    }

    #[test]
    fn repeated_and_ineligible_documents_are_not_held_out() {
        let first = hold_out(corpus(), 1000, |_| true).unwrap().eval.remove(0);
        let mut documents = corpus();
        documents.push(document("twin", first.text.to_uppercase()));
        let parts = hold_out(documents, 1000, |_| true).unwrap();
        assert!(parts.eval.iter().all(|d| d.name != first.name));
        let parts = hold_out(corpus(), 1000, |d| d.name != first.name).unwrap();
        assert!(parts.eval.iter().all(|d| d.name != first.name));
        let error = hold_out(corpus(), 100_000, |_| true).unwrap_err();
        assert!(error.to_string().contains("bytes qualify"), "{error}");
    }

    #[test]
    fn the_builtin_texts_are_held_out_from_each_other() {
        for text in builtin() {
            assert!(text.eval.len() >= 25_000 && text.calib.len() >= 25_000, "{}", text.domain);
            let calib: HashSet<&str> = text.calib.lines().filter(|l| l.len() > 80).collect();
            let repeated = text.eval.lines().filter(|l| calib.contains(l)).count();
            assert_eq!(repeated, 0, "{}", text.domain);
        }
    }
}
