//! JSON values as block-style YAML that every YAML 1.1 and 1.2 reader understands the same way, and back.

use std::fmt::Write;
use std::path::Path;

use serde_json::{Map, Value as Json};

use crate::error::{Error, Result};

/// Writes a map, two spaces per level.
pub(super) fn write(map: &Map<String, Json>) -> String {
    let mut out = String::new();
    entries(&mut out, map, 0);
    out
}

fn entries(out: &mut String, map: &Map<String, Json>, level: usize) {
    for (key, value) in map {
        out.extend(std::iter::repeat_n("  ", level));
        out.push_str(&self::key(key));
        out.push(':');
        nested(out, value, level);
    }
}

fn nested(out: &mut String, value: &Json, level: usize) {
    match value {
        Json::Object(map) if !map.is_empty() => {
            out.push('\n');
            entries(out, map, level + 1);
        }
        Json::Array(items) if !items.is_empty() => {
            out.push('\n');
            for item in items {
                out.extend(std::iter::repeat_n("  ", level + 1));
                out.push('-');
                match item {
                    Json::Object(map) if !map.is_empty() => {
                        let mut inner = String::new();
                        entries(&mut inner, map, level + 2);
                        out.push(' ');
                        out.push_str(inner.trim_start());
                    }
                    other => nested(out, other, level + 1),
                }
            }
        }
        scalar => {
            out.push(' ');
            out.push_str(&self::scalar(scalar));
            out.push('\n');
        }
    }
}

/// Keys and strings that no reader can take for something else stay bare; the rest is double-quoted as in JSON.
fn key(text: &str) -> String {
    let bare = text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-'))
        && !["true", "false", "null", "yes", "no", "on", "off", "y", "n"]
            .contains(&text.to_lowercase().as_str());
    if bare { text.to_owned() } else { quoted(text) }
}

fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            '\r' => out.push_str("\\r"),
            // Controls, and the line separators that YAML would fold.
            c if c.is_control() || matches!(c, '\u{2028}' | '\u{2029}' | '\u{feff}') => {
                write!(out, "\\u{:04x}", c as u32)
                    .expect("invariant: writing to a string succeeds");
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

fn scalar(value: &Json) -> String {
    match value {
        Json::String(text) => key(text),
        // Some readers take `1e-5` for a string: they want a point and a signed exponent.
        Json::Number(number) if number.is_f64() => {
            let text = number.to_string();
            match text.split_once(['e', 'E']) {
                Some((mantissa, exponent)) => {
                    let point = if mantissa.contains('.') { "" } else { ".0" };
                    let sign = if exponent.starts_with(['+', '-']) { "" } else { "+" };
                    format!("{mantissa}{point}e{sign}{exponent}")
                }
                None => text,
            }
        }
        other => other.to_string(),
    }
}

/// Parses a map. Anchors, aliases, tags with effects and duplicate keys are refused.
pub(super) fn parse(path: &Path, text: &str) -> Result<Map<String, Json>> {
    serde_saphyr::from_str_with_options(text, crate::yaml::strict_options())
        .map_err(|error| Error::malformed(path, "YAML head", error.to_string()))
}
