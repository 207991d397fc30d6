//! YAML from strangers: no anchors, no aliases, bounded depth and size.

use std::path::Path;

use serde::de::DeserializeOwned;

use crate::error::{Error, Result};

/// Parses YAML into `T`. Anchors and aliases are refused (an alias bomb expands a few lines to gigabytes), and
/// so are duplicate keys; messages carry the line.
pub fn parse<T: DeserializeOwned>(path: &Path, text: &str) -> Result<T> {
    serde_saphyr::from_str_with_options(text, strict_options())
        .map_err(|error| Error::malformed(path, "YAML", error.to_string()))
}

pub(crate) fn strict_options() -> serde_saphyr::Options {
    serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_anchors: 0,
            max_aliases: 0,
            max_depth: 64,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::Value;

    fn parse_text(text: &str) -> Result<Value> {
        parse(Path::new("recipe.yaml"), text)
    }

    #[test]
    fn plain_yaml_is_read() {
        let value = parse_text("a: 1\nb: [x, 2.5, true]\nc: {d: null}\n").unwrap();
        assert_eq!(value, serde_json::json!({"a": 1, "b": ["x", 2.5, true], "c": {"d": null}}));
    }

    #[test]
    fn alias_bombs_and_their_relatives_are_refused() {
        let bomb = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n";
        let deep = "[".repeat(5_000);
        for text in [bomb, "a: &x 1\nb: 2\n", "a: 1\na: 2\n", &deep, "a: [1\n", "a: b: c\n"] {
            let error = parse_text(text).unwrap_err().to_string();
            assert!(error.starts_with("recipe.yaml: malformed YAML"), "{error}");
        }
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            "[ -~]{0,12}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 24, 4, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                proptest::collection::btree_map("[a-z]{1,6}", inner, 0..4)
                    .prop_map(|map| map.into_iter().collect()),
            ]
        })
    }

    proptest! {
        #![proptest_config(crate::testing::cases(256))]

        /// JSON is YAML.
        #[test]
        fn json_reads_as_itself(value in any_json()) {
            for text in [value.to_string(), serde_json::to_string_pretty(&value).unwrap()] {
                prop_assert_eq!(parse_text(&text).unwrap(), value.clone(), "{}", text);
            }
        }

        #[test]
        fn any_text_is_a_value_or_an_error(
            text in "(a|b|1|-|- |: |\\?|\\[|\\]|\\{|\\}|,|&x|\\*x|!!int|\\||>|'|\"|#|%|\n|\n  |\t|é|\u{0}){0,40}",
        ) {
            let _ = parse_text(&text);
        }

        #[test]
        fn a_changed_recipe_is_a_value_or_an_error(at in any::<prop::sample::Index>(), with in "[&*!|>%@`\\[{:\"'\n -]{0,3}") {
            let recipe = "seed: 7\nsteps:\n  - method: rtn\n    bits: 3\n    group: [64, 32]\n    note: |\n      two\n      lines\n";
            let mut text = recipe.to_owned();
            let at = at.index(text.len());
            text.replace_range(at..at + 1, &with);
            let _ = parse_text(&text);
        }
    }
}
