//! Values of parameters in a mergekit recipe: plain, graded over the layers, or chosen by a part of the tensor's name.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::error::{Error, Result};

/// Parameters by name.
pub type Settings = BTreeMap<String, Setting>;

/// One parameter's value.
#[derive(Clone, Debug, PartialEq)]
pub enum Setting {
    /// The same everywhere.
    Plain(Scalar),
    /// Spread over the layers of a slice: numbers are interpolated, other values hold for a stretch.
    Gradient(Vec<Scalar>),
    /// The first whose filter is part of the tensor's name; `None` fits every name.
    Filtered(Vec<(Option<String>, Setting)>),
}

/// A value as YAML has it.
#[derive(Clone, Debug, PartialEq)]
pub enum Scalar {
    /// `true` or `false`.
    Bool(bool),
    /// A number.
    Number(f64),
    /// A word; numbers in quotes are numbers where one is asked for.
    Text(String),
}

/// What a parameter is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A number.
    Number,
    /// A whole number.
    Integer,
    /// On or off.
    Bool,
}

impl Setting {
    /// From a recipe; `at` says where, for errors.
    ///
    /// # Errors
    /// Lists of lists, and mappings that are no filter.
    pub fn parse(value: &Value, at: &str) -> Result<Self> {
        let wrong = || {
            Error::recipe(
                at,
                "expected a value, a list of values (spread over the layers), or a list of `{filter, value}`",
            )
        };
        match value {
            Value::Array(list) if list.iter().any(Value::is_object) => {
                let one = |item: &Value| Self::filtered(item, at).ok_or_else(wrong)?;
                Ok(Self::Filtered(list.iter().map(one).collect::<Result<_>>()?))
            }
            Value::Array(list) => {
                let all: Option<Vec<Scalar>> = list.iter().map(Scalar::of).collect();
                Ok(Self::Gradient(all.ok_or_else(wrong)?))
            }
            Value::Object(_) => {
                Ok(Self::Filtered(vec![Self::filtered(value, at).ok_or_else(wrong)??]))
            }
            other => Ok(Self::Plain(Scalar::of(other).ok_or_else(wrong)?)),
        }
    }

    fn filtered(item: &Value, at: &str) -> Option<Result<(Option<String>, Self)>> {
        let map = item.as_object()?;
        if map.keys().any(|key| key != "filter" && key != "value") {
            return None;
        }
        let filter = match map.get("filter") {
            None | Some(Value::Null) => None,
            Some(Value::String(any)) if any == "*" => None,
            Some(Value::String(part)) => Some(part.clone()),
            Some(_) => return None,
        };
        let value = Self::parse(map.get("value")?, at);
        Some(value.map(|value| (filter, value)))
    }

    /// The value for a tensor, `t` of the way through the layers; `None` where no filter fits.
    ///
    /// # Errors
    /// A value that is not of this kind.
    pub fn evaluate(&self, tensor: &str, t: f64, kind: Kind, at: &str) -> Result<Option<Value>> {
        let read = |scalar: &Scalar| scalar.as_kind(kind, at);
        match self {
            Self::Plain(scalar) => read(scalar).map(Some),
            Self::Gradient(list) if list.is_empty() => Ok(None),
            Self::Gradient(list) => {
                let scaled = t * (list.len() - 1) as f64;
                let low = (scaled as usize).min(list.len() - 1);
                if kind == Kind::Bool {
                    return read(&list[low]).map(Some);
                }
                let high = (low + 1).min(list.len() - 1);
                let (a, b) = (read(&list[low])?, read(&list[high])?);
                let share = scaled - low as f64;
                let number = |value: Value| value.as_f64().unwrap_or_default();
                let mixed = (1.0 - share) * number(a) + share * number(b);
                Scalar::Number(mixed).as_kind(kind, at).map(Some)
            }
            Self::Filtered(list) => {
                let fits = |filter: &Option<String>| {
                    filter.as_ref().is_none_or(|part| tensor.contains(part.as_str()))
                };
                match list.iter().find(|(filter, _)| fits(filter)) {
                    Some((_, setting)) => setting.evaluate(tensor, t, kind, at),
                    None => Ok(None),
                }
            }
        }
    }
}

impl Scalar {
    fn of(value: &Value) -> Option<Self> {
        match value {
            Value::Bool(set) => Some(Self::Bool(*set)),
            Value::Number(number) => number.as_f64().map(Self::Number),
            Value::String(text) => Some(Self::Text(text.clone())),
            _ => None,
        }
    }

    fn as_kind(&self, kind: Kind, at: &str) -> Result<Value> {
        let number = || match self {
            Self::Bool(set) => Some(f64::from(u8::from(*set))),
            Self::Number(number) => Some(*number),
            Self::Text(text) => text.trim().parse().ok(),
        };
        let switch = || match self {
            Self::Bool(set) => Some(*set),
            Self::Number(number) if *number == 0.0 || *number == 1.0 => Some(*number == 1.0),
            Self::Number(_) => None,
            Self::Text(text) => match text.to_lowercase().as_str() {
                "true" | "yes" | "on" | "1" => Some(true),
                "false" | "no" | "off" | "0" => Some(false),
                _ => None,
            },
        };
        let (found, expected) = match kind {
            Kind::Number => (number().filter(|n| n.is_finite()).map(|n| json!(n)), "a number"),
            Kind::Integer => {
                let whole = number().filter(|n| n.fract() == 0.0 && (0.0..1e15).contains(n));
                (whole.map(|n| json!(n as u64)), "a whole number")
            }
            Kind::Bool => (switch().map(|set| json!(set)), "true or false"),
        };
        found.ok_or_else(|| {
            let shown = match self {
                Self::Bool(set) => set.to_string(),
                Self::Number(number) => number.to_string(),
                Self::Text(text) => format!("`{text}`"),
            };
            Error::recipe(at, format!("{shown} is not {expected}"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(value: Value, tensor: &str, t: f64) -> Option<f64> {
        let setting = Setting::parse(&value, "t").unwrap();
        setting.evaluate(tensor, t, Kind::Number, "t").unwrap().map(|v| v.as_f64().unwrap())
    }

    #[test]
    fn gradients_are_piecewise_linear() {
        let list = json!([0, 0.5, 0.3]);
        for (t, expected) in [(0.0, 0.0), (0.25, 0.25), (0.5, 0.5), (0.75, 0.4), (1.0, 0.3)] {
            assert!((number(list.clone(), "", t).unwrap() - expected).abs() < 1e-12, "{t}");
        }
        assert_eq!(number(json!([0.7]), "", 0.4), Some(0.7));
        assert_eq!(number(json!([]), "", 0.4), None);
        let setting = Setting::parse(&json!([true, false]), "").unwrap();
        let at = |t| setting.evaluate("", t, Kind::Bool, "").unwrap().unwrap();
        assert_eq!([at(0.0), at(0.99), at(1.0)], [json!(true), json!(true), json!(false)]);
    }

    #[test]
    fn the_first_filter_that_fits_counts() {
        let list = json!([
            {"filter": "self_attn", "value": [0, 1]}, {"filter": "mlp", "value": 0.5}, {"value": "1e-2"},
        ]);
        assert_eq!(number(list.clone(), "layers.3.self_attn.q_proj.weight", 0.25), Some(0.25));
        assert_eq!(number(list.clone(), "layers.3.mlp.up_proj.weight", 0.25), Some(0.5));
        assert_eq!(number(list, "model.norm.weight", 0.25), Some(0.01));
        assert_eq!(number(json!({"filter": "mlp", "value": 2}), "model.norm.weight", 0.0), None);
        assert_eq!(number(json!({"filter": "*", "value": 2}), "model.norm.weight", 0.0), Some(2.0));
    }

    #[test]
    fn what_is_no_value_is_an_error() {
        for value in
            [json!([[1]]), json!({"filtr": "x", "value": 1}), json!([{"filter": "x"}]), json!(null)]
        {
            let error = Setting::parse(&value, "density of a").unwrap_err().to_string();
            assert!(error.contains("density of a"), "{error}");
        }
        let word = Setting::parse(&json!("lots"), "t").unwrap();
        assert!(
            word.evaluate("", 0.0, Kind::Number, "t").unwrap_err().to_string().contains("`lots`")
        );
        let half = Setting::parse(&json!(0.5), "max_iter").unwrap();
        assert!(half.evaluate("", 0.0, Kind::Integer, "max_iter").is_err());
    }
}
