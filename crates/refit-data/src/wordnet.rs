//! WordNet (Fellbaum 1998): glosses, the 45 lexicographer classes, and the
//! hypernym tree of nouns and verbs, read from the `data.*` files that
//! `wndb(5WN)` describes.

use crate::{Error, Result, file};
use std::collections::{HashMap, VecDeque};
use std::path::Path;

/// Where Debian's `wordnet-base` puts the files.
pub const DEBIAN_DIR: &str = "/usr/share/wordnet";

/// The lexicographer files, in the order of their numbers (`lexnames(5WN)`): the
/// label set of gloss classification.
#[rustfmt::skip]
pub const CLASSES: [&str; 45] = [
    "adj.all", "adj.pert", "adv.all", "noun.Tops", "noun.act", "noun.animal", "noun.artifact",
    "noun.attribute", "noun.body", "noun.cognition", "noun.communication", "noun.event",
    "noun.feeling", "noun.food", "noun.group", "noun.location", "noun.motive", "noun.object",
    "noun.person", "noun.phenomenon", "noun.plant", "noun.possession", "noun.process",
    "noun.quantity", "noun.relation", "noun.shape", "noun.state", "noun.substance", "noun.time",
    "verb.body", "verb.change", "verb.cognition", "verb.communication", "verb.competition",
    "verb.consumption", "verb.contact", "verb.creation", "verb.emotion", "verb.motion",
    "verb.perception", "verb.possession", "verb.social", "verb.stative", "verb.weather", "adj.ppl",
];

/// Part of speech; adjective satellites count as adjectives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum Pos {
    Noun,
    Verb,
    Adjective,
    Adverb,
}

/// One set of synonyms.
#[derive(Debug, Clone)]
pub struct Synset {
    /// Part of speech.
    pub pos: Pos,
    /// Byte offset in the data file: with `pos`, WordNet's own key.
    pub offset: u32,
    /// Index into [`CLASSES`].
    pub class: u8,
    /// Words, most frequent first, spaces instead of underscores.
    pub lemmas: Vec<String>,
    /// Definition and examples as they stand in the file.
    pub gloss: String,
    /// Indices of the synsets one step up, instance hypernyms included.
    pub hypernyms: Vec<usize>,
}

impl Synset {
    /// The gloss without its quoted examples.
    pub fn definition(&self) -> &str {
        self.gloss.split("; \"").next().unwrap_or("").trim()
    }
}

/// All synsets: nouns, verbs, adjectives, adverbs, each in file order.
#[derive(Debug, Clone)]
pub struct Glosses {
    synsets: Vec<Synset>,
    by_key: HashMap<(Pos, u32), usize>,
}

impl Glosses {
    /// Reads `data.noun`, `data.verb`, `data.adj` and `data.adv` in `dir`.
    ///
    /// # Errors
    /// A missing file, a malformed line, or a hypernym that does not exist.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        if !dir.join("data.noun").is_file() {
            let message = "no data.noun here; install Debian's wordnet-base, or pass its directory";
            return Err(Error::file(dir, message));
        }
        let files = [
            ("data.noun", Pos::Noun),
            ("data.verb", Pos::Verb),
            ("data.adj", Pos::Adjective),
            ("data.adv", Pos::Adverb),
        ];
        let mut rows = Vec::new();
        for (name, pos) in files {
            let path = dir.join(name);
            parse(&path, pos, &file::read_text(&path)?, &mut rows)?;
        }
        Self::link(dir, rows)
    }

    fn link(dir: &Path, rows: Vec<(Synset, Vec<u32>)>) -> Result<Self> {
        let by_key: HashMap<_, _> =
            rows.iter().enumerate().map(|(i, (s, _))| ((s.pos, s.offset), i)).collect();
        let mut synsets = Vec::with_capacity(rows.len());
        for (mut synset, up) in rows {
            for offset in up {
                let index = by_key.get(&(synset.pos, offset)).ok_or_else(|| {
                    let from = synset.offset;
                    let message = format!("synset {from:08} has hypernym {offset:08}, which is not there; the files are of different versions or damaged");
                    Error::file(dir, message)
                })?;
                synset.hypernyms.push(*index);
            }
            synsets.push(synset);
        }
        Ok(Glosses { synsets, by_key })
    }

    /// Every synset; indices elsewhere in this API point into this slice.
    pub fn synsets(&self) -> &[Synset] {
        &self.synsets
    }

    /// The index of WordNet's own key.
    pub fn index(&self, pos: Pos, offset: u32) -> Option<usize> {
        self.by_key.get(&(pos, offset)).copied()
    }

    /// Indices of the synsets that hold `lemma`, in file order.
    pub fn find(&self, lemma: &str, pos: Pos) -> Vec<usize> {
        let holds = |s: &Synset| s.pos == pos && s.lemmas.iter().any(|l| l == lemma);
        (0..self.synsets.len()).filter(|i| holds(&self.synsets[*i])).collect()
    }

    /// Every ancestor with the least number of steps to it, `(a, 0)` first.
    pub fn ancestors(&self, a: usize) -> Vec<(usize, usize)> {
        let mut found = vec![(a, 0)];
        let mut seen = std::collections::HashSet::from([a]);
        let mut queue = VecDeque::from([(a, 0)]);
        while let Some((node, steps)) = queue.pop_front() {
            for &up in &self.synsets[node].hypernyms {
                if seen.insert(up) {
                    found.push((up, steps + 1));
                    queue.push_back((up, steps + 1));
                }
            }
        }
        found
    }

    /// The common ancestor that gives the shortest path between `a` and `b`, and
    /// the length of that path; the first in file order among equals. `None` for
    /// synsets of different trees (verbs have many roots; adjectives none).
    pub fn lowest_common_ancestor(&self, a: usize, b: usize) -> Option<(usize, usize)> {
        let up: HashMap<_, _> = self.ancestors(a).into_iter().collect();
        let common = self.ancestors(b).into_iter();
        common
            .filter_map(|(node, steps)| up.get(&node).map(|other| (node, steps + other)))
            .min_by_key(|&(node, length)| (length, node))
    }

    /// Steps from `a` to `b` along hypernym edges; `None` for different trees.
    pub fn distance(&self, a: usize, b: usize) -> Option<usize> {
        self.lowest_common_ancestor(a, b).map(|(_, length)| length)
    }

    /// Steps to the nearest root.
    pub fn depth(&self, a: usize) -> usize {
        let is_root = |&&(node, _): &&(usize, usize)| self.synsets[node].hypernyms.is_empty();
        self.ancestors(a).iter().find(is_root).map_or(0, |(_, steps)| *steps)
    }
}

/// Appends the synsets of one data file, each with its hypernyms' offsets.
fn parse(path: &Path, pos: Pos, text: &str, rows: &mut Vec<(Synset, Vec<u32>)>) -> Result<()> {
    for (number, line) in text.lines().enumerate() {
        // The licence stands at the top, each line indented by two spaces.
        if line.starts_with("  ") || line.is_empty() {
            continue;
        }
        let row = parse_line(pos, line).ok_or_else(|| {
            Error::line(
                path,
                number + 1,
                "not a WordNet synset (`offset class type count word ... | gloss`)",
            )
        })?;
        rows.push(row);
    }
    Ok(())
}

fn parse_line(pos: Pos, line: &str) -> Option<(Synset, Vec<u32>)> {
    let (head, gloss) = line.split_once(" | ")?;
    let mut fields = head.split(' ');
    let offset = fields.next()?.parse().ok()?;
    let class: u8 = fields.next()?.parse().ok()?;
    if usize::from(class) >= CLASSES.len() {
        return None;
    }
    let _synset_type = fields.next()?;
    let words = usize::from_str_radix(fields.next()?, 16).ok()?;
    let mut lemmas = Vec::new();
    for _ in 0..words {
        let word = fields.next()?;
        let _lex_id = fields.next()?;
        // Adjectives may carry a syntactic marker: (p), (a) or (ip).
        let word = if pos == Pos::Adjective { word.split('(').next()? } else { word };
        lemmas.push(word.replace('_', " "));
    }
    let pointers: usize = fields.next()?.parse().ok()?;
    let mut up = Vec::new();
    for _ in 0..pointers {
        let symbol = fields.next()?;
        let target = fields.next()?.parse().ok()?;
        let (_pos, _source_and_target) = (fields.next()?, fields.next()?);
        if symbol == "@" || symbol == "@i" {
            up.push(target);
        }
    }
    let gloss = gloss.trim().to_owned();
    Some((Synset { pos, offset, class, lemmas, gloss, hypernyms: Vec::new() }, up))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NOUNS: &str = "  1 licence\n\
        00000001 03 n 01 entity 0 000 | that which exists\n\
        00000002 05 n 02 animal 0 living_beast 0 001 @ 00000001 n 0000 | a living thing; \"an animal ran\"\n\
        00000003 05 n 01 dog 0 001 @ 00000002 n 0000 | it barks\n\
        00000004 05 n 01 cat 0 001 @ 00000002 n 0000 | it purrs\n\
        00000005 05 n 01 Rex 0 001 @i 00000003 n 0000 | a certain dog\n\
        00000006 06 n 01 loner 0 000 | no parent\n";

    fn tiny() -> Glosses {
        let mut rows = Vec::new();
        parse(Path::new("data.noun"), Pos::Noun, NOUNS, &mut rows).unwrap();
        Glosses::link(Path::new("."), rows).unwrap()
    }

    #[test]
    fn the_tree_answers() {
        let net = tiny();
        assert_eq!(net.synsets()[1].lemmas, ["animal", "living beast"]);
        assert_eq!(net.synsets()[1].definition(), "a living thing");
        let (dog, cat, rex) = (2, 3, 4);
        assert_eq!(net.find("dog", Pos::Noun), [dog]);
        assert_eq!(net.lowest_common_ancestor(rex, cat), Some((1, 3)));
        assert_eq!(net.distance(dog, rex), Some(1));
        assert_eq!(net.distance(dog, dog), Some(0));
        assert_eq!(net.distance(dog, 5), None);
        assert_eq!((net.depth(rex), net.depth(0)), (3, 0));
    }

    #[test]
    fn errors_name_file_and_line() {
        let error = parse(Path::new("data.noun"), Pos::Noun, "1 99 n 01 x 0 000 | y", &mut vec![]);
        assert!(error.unwrap_err().to_string().starts_with("data.noun:1:"));
        let mut rows = Vec::new();
        parse(Path::new("d"), Pos::Noun, "1 05 n 01 x 0 001 @ 7 n 0000 | y", &mut rows).unwrap();
        assert!(Glosses::link(Path::new("d"), rows).unwrap_err().to_string().contains("00000007"));
    }

    proptest! {
        #[test]
        fn never_panics(text in "([0-9a-f@|() _\n]{0,60}){0,8}") {
            let mut rows = Vec::new();
            if parse(Path::new("x"), Pos::Adjective, &text, &mut rows).is_ok() {
                let _ = Glosses::link(Path::new("x"), rows);
            }
        }
    }
}
