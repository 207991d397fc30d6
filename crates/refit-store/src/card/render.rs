//! A card as text, and back.

use std::fmt::Write;
use std::path::Path;

use serde_json::{Map, Value as Json, json};

use super::{Card, Fact, HUB_LICENCES, yaml};
use crate::error::{Error, Result};
use crate::lineage::Estimate;

/// Machine sections in the order of rendering.
const SECTIONS: [&str; 7] = ["summary", "origin", "files", "data", "results", "use", "unknown"];

/// Keys of the head that a card writes itself.
const OWN_KEYS: [&str; 8] = [
    "license",
    "license_name",
    "base_model",
    "base_model_relation",
    "library_name",
    "tags",
    "metrics",
    "refit",
];

pub(super) fn render(card: &Card) -> String {
    let mut out = format!("---\n{}---\n", yaml::write(&head(card)));
    let human = |name: &str| card.human.get(name).map_or("", String::as_str);
    out.push_str(human(""));
    for name in SECTIONS {
        let body = section(card, name);
        write!(out, "<!-- refit:begin {name} -->\n{body}<!-- refit:end {name} -->\n")
            .expect("invariant: writing to a string succeeds");
        out.push_str(human(name));
    }
    out
}

fn head(card: &Card) -> Map<String, Json> {
    let mut head = Map::new();
    match card.license.known() {
        Some(licence) if HUB_LICENCES.contains(&licence.as_str()) => {
            head.insert("license".into(), json!(licence));
        }
        Some(licence) => {
            head.insert("license".into(), json!("other"));
            head.insert("license_name".into(), json!(licence));
        }
        None => {
            head.insert("license".into(), json!("unknown"));
        }
    }
    let on_hub: Vec<_> = card.base_models.iter().filter_map(|source| hub_id(source)).collect();
    if !on_hub.is_empty() {
        head.insert("base_model".into(), json!(on_hub));
        if let Some(relation) = card.relation {
            head.insert("base_model_relation".into(), json!(relation.hub()));
        }
    }
    head.insert("library_name".into(), json!(card.library));
    head.insert("tags".into(), json!(card.tags));
    if let Some(measurements) = card.measurements.known() {
        let mut metrics: Vec<_> = measurements.iter().map(|m| m.metric.as_str()).collect();
        metrics.sort_unstable();
        metrics.dedup();
        if !metrics.is_empty() {
            head.insert("metrics".into(), json!(metrics));
        }
    }
    for (key, value) in &card.extra {
        head.entry(key.clone()).or_insert_with(|| value.clone());
    }
    head.insert("refit".into(), serde_json::to_value(card).expect("invariant: a card serializes"));
    head
}

/// `owner/name` of a hub source; other sources mean nothing to the hub.
fn hub_id(source: &str) -> Option<&str> {
    let id = source.strip_prefix("hf:")?.split('@').next()?;
    let end = id.match_indices('/').nth(1).map_or(id.len(), |(end, _)| end);
    Some(&id[..end])
}

fn section(card: &Card, name: &str) -> String {
    let mut out = String::new();
    let mut line = |text: String| {
        out.push_str(&text);
        out.push('\n');
    };
    match name {
        "summary" => {
            line(format!("# {}\n", inline(&card.name)));
            line(fact("Architecture", &card.architecture, |text| inline(text)));
            line(fact("Format", &card.format, |text| inline(text)));
            line(fact("Parameters", &card.parameters, |census| {
                let total: u64 = census.values().sum();
                let parts: Vec<_> =
                    census.iter().map(|(dtype, n)| format!("{n} {dtype}")).collect();
                format!("{total} ({})", parts.join(", "))
            }));
            line(fact("Licence", &card.license, |text| inline(text)));
            for conflict in &card.license_conflicts {
                line(format!("- **Licence conflict:** {}", inline(conflict)));
            }
        }
        "origin" => {
            line("## Origin\n".to_owned());
            let relation = card.relation.map_or_else(
                || "made from".to_owned(),
                |r| {
                    serde_json::to_value(r)
                        .ok()
                        .and_then(|v| v.as_str().map(str::to_owned))
                        .unwrap_or_default()
                        + " from"
                },
            );
            for parent in &card.base_models {
                line(format!("- {relation} `{}`", inline(parent)));
            }
            line(fact("Method", &card.method, |text| {
                format!("`{}`, refit {}", inline(text), card.refit_version)
            }));
            for (key, value) in &card.method_parameters {
                line(format!("  - `{}`: `{}`", inline(key), inline(&value.to_string())));
            }
            line(fact("To reproduce", &card.reproduce, |command| format!("`{}`", inline(command))));
            line(fact("Cost", &card.resources, |r| {
                let megabytes = r.peak_memory / 1_000_000;
                format!("{:.1} s, {megabytes} MB at most, on {}", r.seconds, inline(&r.machine))
            }));
        }
        "files" => {
            line("## Files\n\n| file | bytes | sha256 |\n|---|---|---|".to_owned());
            for file in &card.files {
                line(format!("| `{}` | {} | `{}` |", cell(&file.name), file.size, file.sha256));
            }
        }
        "data" => {
            line("## Data\n".to_owned());
            match &card.data {
                Fact::Unknown(reason) => line(format!("Unknown: {}.", inline(reason))),
                Fact::Known(data) if data.is_empty() => {
                    line("The method reads no data.".to_owned())
                }
                Fact::Known(data) => {
                    line(
                        "| data | purpose | size | licence | sha256 |\n|---|---|---|---|---|"
                            .to_owned(),
                    );
                    for d in data {
                        let or =
                            |value: &Option<String>| cell(value.as_deref().unwrap_or("unknown"));
                        line(format!(
                            "| {} | {} | {} | {} | `{}` |",
                            cell(&d.name),
                            cell(&d.purpose),
                            or(&d.size),
                            or(&d.license),
                            cell(&d.sha256)
                        ));
                    }
                }
            }
        }
        "results" => {
            line("## Results\n".to_owned());
            match &card.measurements {
                Fact::Unknown(reason) => line(format!("Unknown: {}.", inline(reason))),
                Fact::Known(measurements) => {
                    line(
                        "| metric | data | n | before | after |\n|---|---|---|---|---|".to_owned(),
                    );
                    for m in measurements {
                        line(format!(
                            "| {} | {} | {} | {} | {} |",
                            cell(&m.metric),
                            cell(&m.dataset),
                            m.n,
                            estimate(&m.before),
                            estimate(&m.after)
                        ));
                    }
                }
            }
            for check in &card.checks {
                line(format!("- {}", inline(check)));
            }
        }
        "use" => {
            line("## Use and limits\n".to_owned());
            line(fact("Intended use", &card.intended_use, |text| inline(text)));
            line(fact("Limits", &card.limits, |text| inline(text)));
        }
        _ => {
            let completeness = card.completeness();
            line(format!(
                "## What is not known\n\n{} of {} required fields are filled.\n",
                completeness.filled, completeness.required
            ));
            for (field, reason) in completeness.unknown {
                line(format!("- `{field}`: {}", inline(&reason)));
            }
        }
    }
    out
}

fn fact<T>(title: &str, fact: &Fact<T>, show: impl Fn(&T) -> String) -> String {
    match fact {
        Fact::Known(value) => format!("- **{title}:** {}", show(value)),
        Fact::Unknown(reason) => format!("- **{title}:** unknown ({})", inline(reason)),
    }
}

fn estimate(estimate: &Option<Estimate>) -> String {
    match estimate {
        None => "not measured".to_owned(),
        Some(Estimate { value, interval: None }) => format!("{value:.4}"),
        Some(Estimate { value, interval: Some([low, high]) }) => {
            format!("{value:.4} [{low:.4}, {high:.4}]")
        }
    }
}

/// Text on one line that cannot close a marker.
fn inline(text: &str) -> String {
    text.replace(['\n', '\r'], " ").replace("<!--", "&lt;!--")
}

fn cell(text: &str) -> String {
    inline(text).replace('|', "\\|")
}

pub(super) fn parse(path: &Path, text: &str) -> Result<Card> {
    let (head, body) = split_head(path, text)?;
    let mut card = match head.get("refit") {
        Some(machine) => serde_json::from_value(machine.clone()).map_err(|error| {
            Error::malformed(
                path,
                "YAML head",
                format!("`refit:` is not a card: {error}; remove it to start anew"),
            )
        })?,
        None => foreign(path, &head),
    };
    card.extra = head.into_iter().filter(|(key, _)| !OWN_KEYS.contains(&key.as_str())).collect();
    let mut follows = String::new();
    let mut rest = body;
    loop {
        let next = SECTIONS
            .iter()
            .filter_map(|name| Some((rest.find(&format!("<!-- refit:begin {name} -->"))?, *name)))
            .min();
        let (human, name) = match next {
            Some((at, name)) => (&rest[..at], Some(name)),
            None => (rest, None),
        };
        if !human.is_empty() {
            card.human.entry(follows.clone()).or_default().push_str(human);
        }
        let Some(name) = name else { return Ok(card) };
        let end = format!("<!-- refit:end {name} -->");
        let Some(at) = rest.find(&end) else {
            return Err(Error::malformed(
                path,
                "model card",
                format!(
                    "`{end}` is missing; put it back or remove the section with its begin marker"
                ),
            ));
        };
        rest = rest[at + end.len()..].strip_prefix('\n').unwrap_or(&rest[at + end.len()..]);
        name.clone_into(&mut follows);
    }
}

fn split_head<'t>(path: &Path, text: &'t str) -> Result<(Map<String, Json>, &'t str)> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let Some(inner) = text.strip_prefix("---\n").or_else(|| text.strip_prefix("---\r\n")) else {
        return Ok((Map::new(), text));
    };
    let mut offset = 0;
    for line in inner.split_inclusive('\n') {
        if line.trim_end() == "---" {
            let (head, body) = (&inner[..offset], &inner[offset + line.len()..]);
            let head = if head.trim().is_empty() { Map::new() } else { yaml::parse(path, head)? };
            return Ok((head, body));
        }
        offset += line.len();
    }
    Err(Error::malformed(path, "model card", "the YAML head is not closed by a line `---`"))
}

/// What the hub's keys say in a card that refit did not write.
fn foreign(path: &Path, head: &Map<String, Json>) -> Card {
    let dir =
        path.parent().and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned());
    let mut card =
        Card::new(dir.filter(|name| !name.is_empty()).unwrap_or_else(|| "model".to_owned()));
    let text = |key: &str| head.get(key).and_then(Json::as_str).map(str::to_owned);
    let stated = match text("license").as_deref() {
        Some("other") => text("license_name").or_else(|| Some("other".to_owned())),
        Some("unknown") => None,
        _ => text("license"),
    };
    card.license = Fact::or_unknown(stated, "the card states no licence");
    let list = |key: &str| match head.get(key) {
        Some(Json::String(one)) => vec![one.clone()],
        Some(Json::Array(many)) => {
            many.iter().filter_map(|v| v.as_str().map(str::to_owned)).collect()
        }
        _ => Vec::new(),
    };
    card.base_models = list("base_model").into_iter().map(|id| format!("hf:{id}")).collect();
    if head.contains_key("tags") {
        card.tags = list("tags");
    }
    if let Some(library) = text("library_name") {
        card.library = library;
    }
    card
}

/// Checks a head against the hub's rules, as far as that is possible without it: one sentence per fault.
pub(crate) fn hub_faults(head: &Map<String, Json>) -> Vec<String> {
    let mut faults = Vec::new();
    match head.get("license").map(Json::as_str) {
        Some(Some(licence)) if HUB_LICENCES.contains(&licence) => {}
        Some(_) => faults.push("`license` is not one of the hub's identifiers".to_owned()),
        None => faults.push("`license` is missing".to_owned()),
    }
    if head.get("license") == Some(&json!("other")) && !head.contains_key("license_name") {
        faults.push("`license: other` needs `license_name`".to_owned());
    }
    if let Some(relation) = head.get("base_model_relation") {
        let known = ["adapter", "merge", "quantized", "finetune"].map(|word| json!(word));
        if !known.contains(relation) {
            faults.push(
                "`base_model_relation` must be adapter, merge, quantized or finetune".to_owned(),
            );
        }
    }
    for key in ["tags", "metrics", "datasets"] {
        let strings =
            |v: &Json| v.as_array().is_some_and(|items| items.iter().all(Json::is_string));
        if head.get(key).is_some_and(|value| !strings(value)) {
            faults.push(format!("`{key}` must be a list of strings"));
        }
    }
    if head.get("library_name").is_some_and(|value| !value.is_string()) {
        faults.push("`library_name` must be a string".to_owned());
    }
    faults
}

impl Card {
    /// Faults of this card's head by the hub's rules, checked without the network.
    pub fn hub_faults(&self) -> Vec<String> {
        hub_faults(&head(self))
    }
}
