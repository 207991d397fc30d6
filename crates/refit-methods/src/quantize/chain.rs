//! Which group sizes a row allows: a chain in which each size divides the next, so that every
//! group of a coarser choice is a union of groups of a finer one.

use std::fmt;
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{Error, Result};

/// How many consecutive inputs of an output row share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Group {
    /// The whole row (per-channel).
    Row,
    /// That many.
    Size(usize),
}

impl Group {
    /// The number, where it is not the whole row.
    pub fn size(self) -> Option<usize> {
        match self {
            Self::Row => None,
            Self::Size(size) => Some(size),
        }
    }

    /// The group size for rows of `inputs` weights of `tensor`.
    ///
    /// # Errors
    /// [`Error::Divisibility`] with the sizes that would do.
    pub fn resolve(self, tensor: &str, inputs: usize) -> Result<usize> {
        match self {
            Self::Row => Ok(inputs),
            Self::Size(group) if group > 0 && inputs.is_multiple_of(group) => Ok(group),
            Self::Size(group) => Err(Error::Divisibility {
                tensor: tensor.to_owned(),
                inputs,
                group,
                divisors: join(&useful_divisors(inputs)),
            }),
        }
    }
}

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Row => f.write_str("row"),
            Self::Size(size) => size.fmt(f),
        }
    }
}

impl FromStr for Group {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            // -1 is how GPTQ's configuration spells a whole row.
            "row" | "channel" | "-1" => Ok(Self::Row),
            number => match number.parse() {
                Ok(size) if size > 0 => Ok(Self::Size(size)),
                _ => Err(format!("`{text}` is neither `row` nor a positive whole number")),
            },
        }
    }
}

impl Serialize for Group {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Row => serializer.serialize_str("row"),
            Self::Size(size) => serializer.serialize_u64(*size as u64),
        }
    }
}

impl<'de> Deserialize<'de> for Group {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = serde_json::Value::deserialize(deserializer)?;
        let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl JsonSchema for Group {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Group".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "anyOf": [{ "const": "row" }, { "type": "integer", "minimum": 1 }] })
    }
}

/// The nested sizes from `smallest` to `inputs`, ascending: start at `smallest` and multiply by the
/// smallest prime factor of what is left. 576 from 32 gives 32, 64, 192, 576.
///
/// # Errors
/// [`Error::Divisibility`] when `smallest` does not divide `inputs`.
pub fn nested(tensor: &str, inputs: usize, smallest: usize) -> Result<Vec<usize>> {
    let mut size = Group::Size(smallest).resolve(tensor, inputs)?;
    let mut sizes = vec![size];
    while size < inputs {
        size *= smallest_prime_factor(inputs / size);
        sizes.push(size);
    }
    Ok(sizes)
}

fn smallest_prime_factor(n: usize) -> usize {
    (2..).take_while(|p| p * p <= n).find(|p| n.is_multiple_of(*p)).unwrap_or(n)
}

/// Divisors from 8 to `n`: group sizes that are worth naming in a message.
fn useful_divisors(n: usize) -> Vec<usize> {
    let all: Vec<usize> = (1..=n).filter(|d| n.is_multiple_of(*d)).collect();
    let useful: Vec<usize> = all.iter().copied().filter(|d| *d >= 8 && *d < n).collect();
    if useful.is_empty() { all } else { useful }
}

fn join(sizes: &[usize]) -> String {
    sizes.iter().map(usize::to_string).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_of_the_card() {
        assert_eq!(nested("w", 576, 32).unwrap(), [32, 64, 192, 576]);
        assert_eq!(nested("w", 1536, 32).unwrap(), [32, 64, 128, 256, 512, 1536]);
        assert_eq!(nested("w", 384, 32).unwrap(), [32, 64, 128, 384]);
        assert_eq!(nested("w", 32, 32).unwrap(), [32]);
    }

    #[test]
    fn sizes_that_do_not_divide_say_what_would() {
        let error = Group::Size(128).resolve("layers.0.q", 576).unwrap_err().to_string();
        for part in ["layers.0.q", "576", "128", "64", "192"] {
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn groups_are_spelt_as_people_do() {
        assert_eq!("row".parse(), Ok(Group::Row));
        assert_eq!("-1".parse(), Ok(Group::Row));
        assert_eq!("64".parse(), Ok(Group::Size(64)));
        assert!("0".parse::<Group>().is_err());
        for text in ["64", "\"row\"", "\"64\""] {
            let group: Group = serde_json::from_str(text).unwrap();
            let again: Group =
                serde_json::from_str(&serde_json::to_string(&group).unwrap()).unwrap();
            assert_eq!(group, again);
        }
    }
}
