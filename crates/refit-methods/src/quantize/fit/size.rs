//! Sizes as people write them: `60MB`, `1.5GiB`, `123456`.

use std::fmt;
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

/// Units and their bytes; the first of equal letters is the one that is printed.
const UNITS: [(&str, f64); 8] = [
    ("TB", 1e12),
    ("GB", 1e9),
    ("MB", 1e6),
    ("kB", 1e3),
    ("GiB", 1073741824.0),
    ("MiB", 1048576.0),
    ("KiB", 1024.0),
    ("B", 1.0),
];

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let unit = &text[digits.len()..];
        let factor = match unit {
            "" => Some(1.0),
            unit => UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit)).map(|(_, f)| *f),
        };
        let number: Option<f64> = digits.trim_end().parse().ok();
        match (number, factor) {
            (Some(number), Some(factor)) if number >= 0.0 && number * factor < 1e18 => {
                Ok(Self((number * factor) as u64))
            }
            _ => Err(format!(
                "`{text}` is no size; write bytes, or a number with kB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB (of 1024)"
            )),
        }
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.0 as f64;
        let (unit, factor) =
            UNITS[..4].iter().find(|(_, factor)| bytes >= *factor).unwrap_or(&UNITS[7]);
        match *unit {
            "B" => write!(f, "{} B", self.0),
            unit => write!(f, "{:.2} {unit}", bytes / factor),
        }
    }
}

impl Serialize for Size {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.0)
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = serde_json::Value::deserialize(deserializer)?;
        let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl JsonSchema for Size {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Size".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "anyOf": [{ "type": "string" }, { "type": "integer", "minimum": 0 }] })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_spelt_as_people_do() {
        for (text, bytes) in [
            ("60MB", 60_000_000),
            ("60 mb", 60_000_000),
            ("1.5GiB", 1_610_612_736),
            ("123456", 123_456),
            ("12kB", 12_000),
            ("7B", 7),
        ] {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
        for text in ["", "MB", "-3MB", "60XB", "1e300GB", "nanMB"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
        assert_eq!(Size(60_000_000).to_string(), "60.00 MB");
        assert_eq!(Size(999).to_string(), "999 B");
        let size: Size = serde_json::from_str("\"1MB\"").unwrap();
        assert_eq!(serde_json::to_string(&size).unwrap(), "1000000");
    }
}
