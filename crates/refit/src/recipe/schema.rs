//! The YAML of a recipe: what keys there are, and errors that name the line and the nearest key.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use refit_methods::method::Need;
use refit_methods::registry;
use serde::Deserialize;
use serde_json::Value;
use serde_saphyr::{Options, Spanned};

use crate::failure::{Failure, Result};
use crate::suggest::did_you_mean;

/// Recipes are read whole: a larger file is not a recipe.
pub const MAX_BYTES: u64 = 256 << 10;

/// A recipe, checked.
#[derive(Clone, Debug)]
pub struct Recipe {
    /// Also the name of its run directory.
    pub name: String,
    /// Heading of the report.
    pub title: String,
    /// What it does, in a sentence or two.
    pub summary: String,
    /// Seed of every random choice.
    pub seed: u64,
    /// Texts by name.
    pub data: BTreeMap<String, Vec<String>>,
    /// Steps in order.
    pub steps: Vec<Step>,
}

impl Recipe {
    /// Sources of the models that it pulls.
    pub fn sources(&self) -> impl Iterator<Item = &str> {
        self.steps.iter().filter_map(|step| match &step.work {
            Work::Pull { source, .. } => Some(source.as_str()),
            _ => None,
        })
    }
}

/// One step.
#[derive(Clone, Debug)]
pub struct Step {
    /// Name of its output.
    pub name: String,
    /// What it does.
    pub work: Work,
}

impl Step {
    /// What it does, in a line.
    pub fn headline(&self) -> String {
        match &self.work {
            Work::Pull { source, .. } => format!("pull {source}"),
            Work::Apply { method, to, .. } => {
                format!("apply {method} to {} -> {}", to.join(", "), self.name)
            }
            Work::Eval { models, .. } => format!("eval {}", models.join(", ")),
            Work::Report { .. } => "report".to_owned(),
        }
    }
}

/// What a step does.
#[derive(Clone, Debug)]
pub enum Work {
    /// Fetch a model.
    Pull {
        /// Its source.
        source: String,
        /// Taken where the source cannot be reached.
        fallback: Option<String>,
        /// How it is called in tables.
        label: String,
    },
    /// Apply a method.
    Apply {
        /// Its name.
        method: String,
        /// Names of the models it takes.
        to: Vec<String>,
        /// Name of their base, for methods that take one.
        base: Option<String>,
        /// Its parameters.
        with: Value,
        /// Name of an entry in `data`: calibration text, or what the model learns.
        data: Option<String>,
        /// Name of a text in `data` that a method which trains is measured on.
        held_out: Option<String>,
        /// Source of labelled examples that it learns from, or is scored by.
        labelled: Option<String>,
        /// Label in tables.
        label: String,
        /// Arms of one group are drawn together.
        group: String,
    },
    /// Measure models on a text.
    Eval {
        /// Names of the models.
        models: Vec<String>,
        /// Name of a text in `data`.
        on: String,
        /// KL is measured against this one.
        reference: Option<String>,
        /// Tokens per window.
        window: usize,
        /// Most tokens, spread evenly over the texts.
        max_tokens: Option<usize>,
    },
    /// Draw the report, with these pairs set side by side.
    Report {
        /// Title, baseline, candidate.
        contests: Vec<ContestSpec>,
    },
}

/// Two arms to set side by side.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ContestSpec {
    /// What is held equal.
    pub title: String,
    /// The rival.
    pub baseline: String,
    /// The method.
    pub candidate: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRecipe {
    name: Spanned<String>,
    #[serde(default)]
    title: Option<String>,
    #[serde(default)]
    summary: String,
    #[serde(default)]
    seed: u64,
    #[serde(default)]
    data: BTreeMap<String, OneOrMany>,
    steps: Vec<Spanned<RawStep>>,
}

/// Every key that some step has; which of them go together is checked afterwards, with better words
/// than a parser has.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawStep {
    pull: Option<String>,
    apply: Option<String>,
    eval: Option<OneOrMany>,
    report: Option<Vec<ContestSpec>>,
    #[serde(rename = "as")]
    name: Option<String>,
    label: Option<String>,
    group: Option<String>,
    fallback: Option<String>,
    to: Option<OneOrMany>,
    base: Option<String>,
    with: Option<Value>,
    data: Option<String>,
    held_out: Option<String>,
    labelled: Option<String>,
    on: Option<String>,
    reference: Option<String>,
    window: Option<usize>,
    max_tokens: Option<usize>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(
    untagged,
    expecting = "expected a name or a list of names (a name such as `n` or `off` needs quotes)"
)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl OneOrMany {
    fn list(self) -> Vec<String> {
        match self {
            Self::One(one) => vec![one],
            Self::Many(many) => many,
        }
    }
}

/// Reads a recipe's text, whoever wrote it.
pub fn load(path: &Path) -> Result<String> {
    let meta = std::fs::metadata(path).map_err(|source| match source.kind() {
        std::io::ErrorKind::NotFound => Failure::usage(format!(
            "{}: no such recipe; the ones that travel with refit lie in recipes/",
            path.display()
        )),
        _ => Failure::io(path, "read", &source),
    })?;
    if meta.len() > MAX_BYTES {
        return Err(Failure::usage(format!(
            "{}: {} bytes are too many for a recipe (at most {MAX_BYTES})",
            path.display(),
            meta.len()
        )));
    }
    crate::inputs::read_text(path)
}

/// Parses a recipe; messages begin with `line N:`.
pub fn parse(text: &str) -> Result<Recipe> {
    let raw: RawRecipe =
        serde_saphyr::from_str_with_options(text, options()).map_err(|e| yaml_failure(&e))?;
    check(raw)
}

/// YAML without its dangers: one document, no anchors, no aliases, no merge keys, bounded depth.
fn options() -> Options {
    serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_anchors: 0,
            max_aliases: 0,
            max_merge_keys: 0,
            max_documents: 1,
            max_depth: 16,
            max_nodes: 20_000,
        },
        with_snippet: false,
    }
}

fn yaml_failure(error: &serde_saphyr::Error) -> Failure {
    use serde_saphyr::Error as E;
    let line = error.location().map_or_else(String::new, |at| format!("line {}: ", at.line()));
    let reason = match error {
        E::SerdeUnknownField { field, expected, .. } => format!(
            "unknown key `{field}`{} (keys here: {})",
            did_you_mean(field, expected.iter().copied()),
            expected.join(", ")
        ),
        E::SerdeMissingField { field, .. } => format!("the key `{field}` is missing"),
        E::Budget { .. } => {
            "anchors, aliases (`&name`, `*name`, `<<`) and deep nesting are not allowed in recipes; write the values out".to_owned()
        }
        other => {
            // The library's message, on one line, without its own position.
            let text = other.to_string();
            let first = text.lines().next().unwrap_or_default();
            first.split(" at line ").next().unwrap_or(first).trim_start_matches("error: ").to_owned()
        }
    };
    Failure::usage(format!("{line}{reason}"))
}

fn check(raw: RawRecipe) -> Result<Recipe> {
    let name = raw.name.value;
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || name.starts_with('.') || !name.chars().all(plain) {
        return Err(Failure::usage(format!(
            "line {}: name `{name}`: use letters, digits, `-` and `_`: it names the run directory",
            raw.name.referenced.line()
        )));
    }
    let data: BTreeMap<String, Vec<String>> =
        raw.data.into_iter().map(|(name, sources)| (name, sources.list())).collect();
    let mut steps: Vec<Step> = Vec::new();
    let mut models = BTreeSet::new();
    let mut names = BTreeSet::new();
    for (index, step) in raw.steps.into_iter().enumerate() {
        let line = step.referenced.line();
        let step = check_step(step.value, &models, &data)
            .map_err(|failure| failure.within(format!("line {line}: step {}", index + 1)))?;
        if !names.insert(step.name.clone()) {
            return Err(Failure::usage(format!(
                "line {line}: step {}: the name `{}` is taken by an earlier step; choose another with `as:`",
                index + 1,
                step.name
            )));
        }
        if matches!(step.work, Work::Pull { .. } | Work::Apply { .. }) {
            models.insert(step.name.clone());
        }
        steps.push(step);
    }
    if steps.is_empty() {
        return Err(Failure::usage("`steps` is empty: a recipe has at least one step"));
    }
    let title = raw.title.unwrap_or_else(|| name.clone());
    Ok(Recipe { name, title, summary: raw.summary, seed: raw.seed, data, steps })
}

fn check_step(
    raw: RawStep,
    models: &BTreeSet<String>,
    data: &BTreeMap<String, Vec<String>>,
) -> Result<Step> {
    let verbs = [
        ("pull", raw.pull.is_some()),
        ("apply", raw.apply.is_some()),
        ("eval", raw.eval.is_some()),
        ("report", raw.report.is_some()),
    ];
    let given: Vec<&str> = verbs.iter().filter(|(_, set)| *set).map(|(verb, _)| *verb).collect();
    let &[verb] = &given[..] else {
        return Err(Failure::usage(match given.is_empty() {
            true => "what should it do? Give one of `pull`, `apply`, `eval`, `report`".to_owned(),
            false => format!("it has `{}`; a step does one thing", given.join("` and `")),
        }));
    };
    let keys: &[(&str, bool, &[&str])] = &[
        ("label", raw.label.is_some(), &["pull", "apply"]),
        ("group", raw.group.is_some(), &["apply"]),
        ("fallback", raw.fallback.is_some(), &["pull"]),
        ("to", raw.to.is_some(), &["apply"]),
        ("base", raw.base.is_some(), &["apply"]),
        ("with", raw.with.is_some(), &["apply"]),
        ("data", raw.data.is_some(), &["apply"]),
        ("held_out", raw.held_out.is_some(), &["apply"]),
        ("labelled", raw.labelled.is_some(), &["apply"]),
        ("on", raw.on.is_some(), &["eval"]),
        ("reference", raw.reference.is_some(), &["eval"]),
        ("window", raw.window.is_some(), &["eval"]),
        ("max_tokens", raw.max_tokens.is_some(), &["eval"]),
    ];
    if let Some((key, _, owners)) = keys.iter().find(|(_, set, o)| *set && !o.contains(&verb)) {
        return Err(Failure::usage(format!(
            "`{key}` belongs to `{}`, not to `{verb}`",
            owners.join("` or `")
        )));
    }
    let known_model = |name: &String| match models.contains(name) {
        true => Ok(()),
        false => Err(Failure::usage(format!(
            "no earlier step is named `{name}`{}",
            did_you_mean(name, models.iter().map(String::as_str))
        ))),
    };
    let known_data = |name: &String| match data.contains_key(name) {
        true => Ok(()),
        false => Err(Failure::usage(format!(
            "`data` has no text named `{name}`{}",
            did_you_mean(name, data.keys().map(String::as_str))
        ))),
    };
    let (default_name, work) = if let Some(source) = raw.pull {
        let label = raw.label.unwrap_or_else(|| "original".to_owned());
        ("original".to_owned(), Work::Pull { source, fallback: raw.fallback, label })
    } else if let Some(method) = raw.apply {
        let entry = registry::get(&method)?;
        let to = raw.to.map(OneOrMany::list).unwrap_or_default();
        if to.is_empty() {
            return Err(Failure::usage(
                "`to` is missing: name the model, or models, that it is applied to",
            ));
        }
        to.iter().chain(&raw.base).try_for_each(known_model)?;
        raw.data.iter().chain(&raw.held_out).try_for_each(known_data)?;
        if raw.labelled.is_some() && entry.info.inputs.labelled == Need::No {
            return Err(Failure::usage(format!("`labelled`: {method} takes no labelled examples")));
        }
        let with = raw.with.unwrap_or(Value::Null);
        // Wrong parameters are found before anything is run.
        entry.from_value(&with)?;
        let label = raw.label.unwrap_or_else(|| entry.info.title.to_owned());
        let group = raw.group.unwrap_or_default();
        let (data, held_out, labelled, base) = (raw.data, raw.held_out, raw.labelled, raw.base);
        let work = Work::Apply {
            method: method.clone(),
            to,
            base,
            with,
            data,
            held_out,
            labelled,
            label,
            group,
        };
        (method, work)
    } else if let Some(list) = raw.eval {
        let list = list.list();
        list.iter().chain(&raw.reference).try_for_each(known_model)?;
        let on = raw.on.ok_or_else(|| Failure::usage("`on` is missing: name a text of `data`"))?;
        known_data(&on)?;
        let window = raw.window.unwrap_or(512);
        let work = Work::Eval {
            models: list,
            on,
            reference: raw.reference,
            window,
            max_tokens: raw.max_tokens,
        };
        ("scores".to_owned(), work)
    } else {
        let contests = raw.report.unwrap_or_default();
        contests.iter().flat_map(|c| [&c.baseline, &c.candidate]).try_for_each(known_model)?;
        ("report".to_owned(), Work::Report { contests })
    };
    let name = raw.name.unwrap_or(default_name);
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || name.starts_with('.') || !name.chars().all(plain) {
        return Err(Failure::usage(format!(
            "`as: {name}`: use letters, digits, `-` and `_`: it names a directory"
        )));
    }
    Ok(Step { name, work })
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "
name: small
data:
  held-out: builtin:held-out
steps:
  - pull: builtin:tiny
    as: original
  - apply: rtn
    to: original
    with: {bits: 3}
  - eval: [original, rtn]
    on: held-out
    reference: original
";

    fn failure(text: &str) -> String {
        parse(text).unwrap_err().message
    }

    #[test]
    fn a_good_recipe_parses() {
        let recipe = parse(GOOD).unwrap();
        assert_eq!(recipe.steps.len(), 3);
        assert_eq!(recipe.steps[1].name, "rtn");
    }

    #[test]
    fn unknown_keys_name_the_line_and_the_nearest_key() {
        let message = failure(&GOOD.replace("    reference:", "    refrence:"));
        assert!(message.contains("line 13") && message.contains("`reference`"), "{message}");
        let message = failure(&GOOD.replace("{bits: 3}", "{bit: 3}"));
        assert!(message.contains("line 8") && message.contains("`bits`"), "{message}");
    }

    #[test]
    fn unknown_names_are_found_before_anything_runs() {
        let message = failure(&GOOD.replace("to: original", "to: orignal"));
        assert!(message.contains("`original`"), "{message}");
        let message = failure(&GOOD.replace("apply: rtn", "apply: rnt"));
        assert!(message.contains("rtn"), "{message}");
        let message = failure(&GOOD.replace("on: held-out", "on: heldout"));
        assert!(message.contains("`held-out`"), "{message}");
    }

    #[test]
    fn keys_of_other_steps_are_refused() {
        let message = failure(&GOOD.replace("    as: original", "    window: 3"));
        assert!(message.contains("`window` belongs to `eval`"), "{message}");
        let message = failure(&GOOD.replace("    as: original", "    apply: rtn"));
        assert!(message.contains("one thing"), "{message}");
    }

    #[test]
    fn alias_bombs_are_refused() {
        let bomb = "
name: bomb
data:
  a: &a [x, x, x, x, x, x, x, x, x]
  b: *a
steps: []
";
        let message = failure(bomb);
        assert!(message.contains("aliases"), "{message}");
    }

    #[test]
    fn names_that_leave_the_run_directory_are_refused() {
        for name in ["../x", "a/b", ".hidden", "''"] {
            let message = failure(&GOOD.replace("name: small", &format!("name: {name}")));
            assert!(message.contains("names the run directory"), "{message}");
        }
        let message = failure(&GOOD.replace("as: original", "as: ../up"));
        assert!(message.contains("names a directory"), "{message}");
    }
}
