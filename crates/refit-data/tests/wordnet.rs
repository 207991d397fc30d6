//! The real WordNet and Bible where they are installed.

use refit_data::corpus::{self, kjv};
use refit_data::wordnet::{CLASSES, DEBIAN_DIR, Glosses, Pos};
use std::path::Path;

#[test]
fn wordnet_opens_where_it_is_installed() {
    if !Path::new(DEBIAN_DIR).join("data.noun").is_file() {
        return;
    }
    let net = Glosses::open(DEBIAN_DIR).unwrap();
    assert_eq!(net.synsets().len(), 117_659);
    let mut counts = [0usize; 45];
    net.synsets().iter().for_each(|s| counts[usize::from(s.class)] += 1);
    assert!(counts.iter().all(|c| *c > 0), "{counts:?}");

    let dog = net.find("dog", Pos::Noun)[0];
    let cat = net.find("cat", Pos::Noun)[0];
    let synset = &net.synsets()[dog];
    assert_eq!(CLASSES[usize::from(synset.class)], "noun.animal");
    assert!(synset.definition().starts_with("a member of the genus Canis"));
    let (common, steps) = net.lowest_common_ancestor(dog, cat).unwrap();
    assert_eq!((net.synsets()[common].lemmas[0].as_str(), steps), ("carnivore", 4));
    let roots = net.synsets().iter().filter(|s| s.pos == Pos::Noun && s.hypernyms.is_empty());
    assert_eq!(roots.map(|s| &s.lemmas[0]).collect::<Vec<_>>(), ["entity"]);
}

#[test]
fn the_bible_opens_where_it_is_installed() {
    let path = Path::new(kjv::DEBIAN_PATH);
    if !path.is_file() {
        return;
    }
    let chapters = kjv::open(path).unwrap();
    assert_eq!(chapters.len(), 1189);
    assert!(chapters[0].text.starts_with("Genesis 1\n\nIn the beginning God created"));
    assert!(chapters[1188].text.ends_with("be with you all. Amen."));
    // What was held out is a part of it.
    let text = corpus::join(&chapters);
    let eval = corpus::builtin()[0].eval;
    assert!(eval.lines().all(|line| text.contains(line)));
}
