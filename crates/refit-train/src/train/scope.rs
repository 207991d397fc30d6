//! Which parameters train, and how: rules by pattern, the last match wins.

use refit_nn::Parameter;
use serde::{Deserialize, Serialize};

use super::error::{Result, TrainError};

/// One rule on all parameters that match a pattern.
///
/// Patterns are globs on names (`*` any run of characters, `?` one), or a kind: `@bias`, `@norm` (other vectors), `@matrix`
/// (rank 2 and up), `@all`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Rule {
    /// The pattern.
    pub pattern: String,
    /// Train or freeze; unset: as earlier rules say.
    #[serde(default)]
    pub train: Option<bool>,
    /// Factor on the learning rate.
    #[serde(default)]
    pub rate: Option<f64>,
    /// Weight decay in place of the optimizer's.
    #[serde(default)]
    pub decay: Option<f64>,
}

impl Rule {
    /// Trains what matches.
    pub fn train(pattern: impl Into<String>) -> Self {
        Self { pattern: pattern.into(), train: Some(true), rate: None, decay: None }
    }

    /// Freezes what matches.
    pub fn freeze(pattern: impl Into<String>) -> Self {
        Self { train: Some(false), ..Self::train(pattern) }
    }

    fn matches(&self, parameter: &Parameter) -> bool {
        let name = &parameter.name;
        match self.pattern.strip_prefix('@') {
            Some("all") => true,
            Some("bias") => name.ends_with(".bias") || name == "bias",
            Some("norm") => parameter.shape.len() == 1 && !name.ends_with("bias"),
            Some("matrix") => parameter.shape.len() > 1,
            _ => glob(&self.pattern, name),
        }
    }
}

/// Does `pattern` with `*` and `?` match the whole of `text`?
pub fn glob(pattern: &str, text: &str) -> bool {
    let (pattern, text) = (pattern.as_bytes(), text.as_bytes());
    let (mut p, mut t) = (0, 0);
    // Where the last `*` stood, and how much of the text it has swallowed.
    let mut star = None;
    while t < text.len() {
        if p < pattern.len() && pattern[p] == b'*' {
            star = Some((p, t));
            p += 1;
        } else if p < pattern.len() && (pattern[p] == b'?' || pattern[p] == text[t]) {
            p += 1;
            t += 1;
        } else if let Some((at, swallowed)) = star {
            star = Some((at, swallowed + 1));
            p = at + 1;
            t = swallowed + 1;
        } else {
            return false;
        }
    }
    pattern[p..].iter().all(|&c| c == b'*')
}

/// Rules in order. Without rules, parameters train as the model says (the base under an adapter stays frozen).
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Scope {
    /// The rules; later ones override earlier ones.
    pub rules: Vec<Rule>,
}

/// What the scope says about one parameter.
#[derive(Debug, Clone, PartialEq)]
pub struct Group {
    /// Whether it trains.
    pub train: bool,
    /// Factor on the learning rate.
    pub rate: f64,
    /// Weight decay, where it differs from the optimizer's.
    pub decay: Option<f64>,
}

impl Scope {
    /// Trains what matches `pattern` and freezes the rest.
    pub fn only(pattern: impl Into<String>) -> Self {
        Self { rules: vec![Rule::freeze("@all"), Rule::train(pattern)] }
    }

    /// Resolves the rules against the parameters of a model, in their order.
    ///
    /// # Errors
    /// Patterns that match nothing (with the nearest names), negative rates, a scope that freezes everything.
    pub fn resolve(&self, parameters: &[Parameter]) -> Result<Vec<Group>> {
        let mut groups: Vec<Group> = parameters
            .iter()
            .map(|p| Group { train: p.trainable, rate: 1.0, decay: None })
            .collect();
        for rule in &self.rules {
            for (setting, value) in [("rate", rule.rate), ("decay", rule.decay)] {
                if let Some(value) = value.filter(|v| !v.is_finite() || *v < 0.0) {
                    return Err(TrainError::Setting {
                        setting,
                        found: value.to_string(),
                        expected: "a number of at least 0",
                    });
                }
            }
            let mut matched = false;
            for (group, _) in groups.iter_mut().zip(parameters).filter(|(_, p)| rule.matches(p)) {
                matched = true;
                group.train = rule.train.unwrap_or(group.train);
                group.rate = rule.rate.unwrap_or(group.rate);
                group.decay = rule.decay.or(group.decay);
            }
            if !matched && rule.pattern != "@bias" {
                return Err(nearest(&rule.pattern, parameters));
            }
        }
        if !groups.iter().any(|g| g.train) {
            return Err(TrainError::NothingTrains { parameters: parameters.len() });
        }
        Ok(groups)
    }
}

pub(super) fn nearest(pattern: &str, parameters: &[Parameter]) -> TrainError {
    let bare = pattern.replace(['*', '?'], "");
    let mut scored: Vec<(f64, &str)> = parameters
        .iter()
        .map(|p| {
            // The best fit of the pattern to any tail of the name: patterns rarely spell the prefix.
            let tails = p.name.match_indices('.').map(|(i, _)| &p.name[i + 1..]);
            let score = std::iter::once(p.name.as_str())
                .chain(tails)
                .map(|tail| strsim::normalized_levenshtein(&bare, tail))
                .fold(0.0, f64::max);
            (score, p.name.as_str())
        })
        .collect();
    scored.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(b.1)));
    let nearest = scored.iter().take(3).map(|(_, name)| format!("`{name}`")).collect();
    TrainError::Pattern { pattern: pattern.to_owned(), nearest }
}

#[cfg(test)]
mod tests {
    use burn::module::ParamId;

    use super::*;

    fn parameters() -> Vec<Parameter> {
        [("layers.0.q.weight", 2), ("layers.0.q.bias", 1), ("layers.1.norm.weight", 1)]
            .map(|(name, rank)| Parameter {
                id: ParamId::new(),
                name: name.into(),
                shape: vec![4; rank],
                trainable: true,
            })
            .to_vec()
    }

    #[test]
    fn globs_match_whole_names() {
        for (pattern, text, fits) in [
            ("*", "", true),
            ("a*c", "abbc", true),
            ("a*c", "abbcd", false),
            ("*.q.*", "layers.0.q.weight", true),
            ("layers.?.q.weight", "layers.0.q.weight", true),
            ("layers.?.q.weight", "layers.10.q.weight", false),
            ("q", "layers.0.q", false),
            ("*a*b*", "xxaxxbxx", true),
        ] {
            assert_eq!(glob(pattern, text), fits, "{pattern} {text}");
        }
    }

    #[test]
    fn later_rules_override_and_groups_keep_their_numbers() {
        let scope = Scope {
            rules: vec![
                Rule::freeze("@all"),
                Rule { rate: Some(0.1), decay: Some(0.0), ..Rule::train("*.q.*") },
                Rule::freeze("@bias"),
            ],
        };
        let groups = scope.resolve(&parameters()).unwrap();
        assert_eq!(groups.iter().map(|g| g.train).collect::<Vec<_>>(), [true, false, false]);
        assert_eq!((groups[0].rate, groups[0].decay), (0.1, Some(0.0)));
    }

    #[test]
    fn mistakes_are_named() {
        let error = Scope::only("*q_proj.weight").resolve(&parameters()).unwrap_err().to_string();
        assert!(
            error.contains("`*q_proj.weight`") && error.contains("`layers.0.q.weight`"),
            "{error}"
        );
        let all = Scope { rules: vec![Rule::freeze("@all")] };
        assert!(matches!(all.resolve(&parameters()), Err(TrainError::NothingTrains { .. })));
        let bad = Scope { rules: vec![Rule { rate: Some(-1.0), ..Rule::train("@all") }] };
        assert!(matches!(bad.resolve(&parameters()), Err(TrainError::Setting { .. })));
    }
}
