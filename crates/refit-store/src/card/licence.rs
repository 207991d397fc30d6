//! Licences of the parents, united.

use super::Fact;

/// Licence identifiers that the hub accepts in a card's head.
pub const HUB_LICENCES: &[&str] = &[
    "apache-2.0",
    "mit",
    "openrail",
    "bigscience-openrail-m",
    "creativeml-openrail-m",
    "bigscience-bloom-rail-1.0",
    "bigcode-openrail-m",
    "afl-3.0",
    "artistic-2.0",
    "bsl-1.0",
    "bsd",
    "bsd-2-clause",
    "bsd-3-clause",
    "bsd-3-clause-clear",
    "c-uda",
    "cc",
    "cc0-1.0",
    "cc-by-2.0",
    "cc-by-2.5",
    "cc-by-3.0",
    "cc-by-4.0",
    "cc-by-sa-3.0",
    "cc-by-sa-4.0",
    "cc-by-nc-2.0",
    "cc-by-nc-3.0",
    "cc-by-nc-4.0",
    "cc-by-nd-4.0",
    "cc-by-nc-nd-3.0",
    "cc-by-nc-nd-4.0",
    "cc-by-nc-sa-2.0",
    "cc-by-nc-sa-3.0",
    "cc-by-nc-sa-4.0",
    "cdla-sharing-1.0",
    "cdla-permissive-1.0",
    "cdla-permissive-2.0",
    "wtfpl",
    "ecl-2.0",
    "epl-1.0",
    "epl-2.0",
    "etalab-2.0",
    "eupl-1.1",
    "eupl-1.2",
    "agpl-3.0",
    "gfdl",
    "gpl",
    "gpl-2.0",
    "gpl-3.0",
    "lgpl",
    "lgpl-2.1",
    "lgpl-3.0",
    "isc",
    "intel-research",
    "lppl-1.3c",
    "ms-pl",
    "apple-ascl",
    "apple-amlr",
    "mpl-2.0",
    "odc-by",
    "odbl",
    "openmdw-1.0",
    "openrail++",
    "osl-3.0",
    "postgresql",
    "ofl-1.1",
    "ncsa",
    "unlicense",
    "zlib",
    "pddl",
    "lgpl-lr",
    "deepfloyd-if-license",
    "fair-noncommercial-research-license",
    "llama2",
    "llama3",
    "llama3.1",
    "llama3.2",
    "llama3.3",
    "llama4",
    "grok2-community",
    "gemma",
    "unknown",
    "other",
];

/// Licences that ask for a notice and no more, from the least to the most that they ask.
const PERMISSIVE: &[&str] = &[
    "cc0-1.0",
    "unlicense",
    "wtfpl",
    "pddl",
    "zlib",
    "mit",
    "isc",
    "postgresql",
    "ncsa",
    "bsl-1.0",
    "bsd",
    "bsd-2-clause",
    "bsd-3-clause",
    "cdla-permissive-1.0",
    "cdla-permissive-2.0",
    "odc-by",
    "cc-by-2.0",
    "cc-by-2.5",
    "cc-by-3.0",
    "cc-by-4.0",
    "afl-3.0",
    "ecl-2.0",
    "apache-2.0",
];

/// The licence of something made from parents `(name, licence)`, and the conflicts among them.
///
/// One restrictive licence beside permissive ones governs the whole. Two different restrictive ones conflict:
/// refit names them and claims nothing. It is a warning, not legal advice.
pub fn licence_union(parents: &[(String, Fact<String>)]) -> (Fact<String>, Vec<String>) {
    let unknown: Vec<_> = parents
        .iter()
        .filter(|(_, licence)| licence.known().is_none())
        .map(|(name, _)| name.as_str())
        .collect();
    let known: Vec<(&str, String)> = parents
        .iter()
        .filter_map(|(name, licence)| Some((name.as_str(), licence.known()?.to_lowercase())))
        .collect();
    let rank = |licence: &str| PERMISSIVE.iter().position(|permissive| *permissive == licence);
    let mut restrictive: Vec<_> =
        known.iter().filter(|(_, licence)| rank(licence).is_none()).collect();
    restrictive.sort_by(|a, b| a.1.cmp(&b.1));
    let conflicts: Vec<String> = restrictive
        .windows(2)
        .filter(|pair| pair[0].1 != pair[1].1)
        .map(|pair| {
            let [(a, x), (b, y)] = [pair[0], pair[1]];
            format!("{a} is under {x} and {b} under {y}; each has terms of its own, so check that both can be met")
        })
        .collect();
    let licence = if parents.is_empty() {
        Fact::Unknown("there is no parent to take a licence from".to_owned())
    } else if !unknown.is_empty() {
        Fact::Unknown(format!("no licence is stated by {}", unknown.join(", ")))
    } else if !conflicts.is_empty() {
        Fact::Unknown("the parents' licences differ in their restrictions".to_owned())
    } else if let Some((_, licence)) = restrictive.first() {
        Fact::Known(licence.clone())
    } else {
        let most = known.iter().max_by_key(|(_, licence)| rank(licence));
        Fact::or_unknown(most.map(|(_, licence)| licence.clone()), "no parent states a licence")
    };
    (licence, conflicts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn union(licences: &[&str]) -> (Fact<String>, usize) {
        let parents: Vec<_> = licences
            .iter()
            .enumerate()
            .map(|(i, l)| {
                (
                    format!("p{i}"),
                    Fact::or_unknown((!l.is_empty()).then(|| (*l).to_owned()), "none"),
                )
            })
            .collect();
        let (licence, conflicts) = licence_union(&parents);
        (licence, conflicts.len())
    }

    #[test]
    fn the_most_demanding_licence_wins() {
        assert_eq!(union(&["mit", "apache-2.0"]), (Fact::Known("apache-2.0".to_owned()), 0));
        assert_eq!(union(&["mit", "gpl-3.0"]), (Fact::Known("gpl-3.0".to_owned()), 0));
        assert_eq!(union(&["Llama3.2", "llama3.2"]), (Fact::Known("llama3.2".to_owned()), 0));
    }

    #[test]
    fn conflicts_and_gaps_are_not_hidden() {
        let (licence, conflicts) = union(&["cc-by-nc-4.0", "gpl-3.0", "mit"]);
        assert!(licence.known().is_none() && conflicts == 1);
        assert!(union(&["mit", ""]).0.known().is_none());
        assert!(union(&[]).0.known().is_none());
    }

    #[test]
    fn the_tables_agree() {
        assert!(PERMISSIVE.iter().all(|licence| HUB_LICENCES.contains(licence)));
    }
}
