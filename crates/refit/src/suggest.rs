//! "Did you mean": names close to one that was mistyped.

/// Up to three known names close to `typed`, best first.
pub fn nearest<'a>(typed: &str, known: impl IntoIterator<Item = &'a str>) -> Vec<&'a str> {
    let typed = typed.to_lowercase();
    let mut close: Vec<(usize, &str)> = known
        .into_iter()
        .filter_map(|name| {
            let lower = name.to_lowercase();
            let distance = edits(&typed, &lower);
            let part = typed.len() >= 3 && (lower.contains(&typed) || typed.contains(&lower));
            (part || distance <= 1 + lower.len().max(typed.len()) / 4).then_some((distance, name))
        })
        .collect();
    close.sort();
    close.truncate(3);
    close.into_iter().map(|(_, name)| name).collect()
}

/// `; did you mean ...?`, or nothing when no name is close.
pub fn did_you_mean<'a>(typed: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    let names: Vec<String> = nearest(typed, known).iter().map(|n| format!("`{n}`")).collect();
    match names.is_empty() {
        true => String::new(),
        false => format!("; did you mean {}?", names.join(" or ")),
    }
}

/// Insertions, deletions and substitutions between two strings.
fn edits(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let substitute = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = substitute.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slips_are_found_and_strangers_are_not() {
        let known = ["wanda", "sparsegpt", "magnitude", "model-soups"];
        assert_eq!(nearest("wnada", known), ["wanda"]);
        assert_eq!(nearest("soups", known), ["model-soups"]);
        assert!(nearest("xyz", known).is_empty());
        assert_eq!(did_you_mean("wandaa", known), "; did you mean `wanda`?");
        assert_eq!(did_you_mean("xyz", known), "");
    }
}
