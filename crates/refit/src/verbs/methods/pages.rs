//! One page of documentation per method, made from the registry alone, so that a page cannot say what
//! the method does not do. Prose that is not in the registry has no place here.

use clap::Arg;
use clap::builder::PossibleValue;
use refit_methods::method::{Effort, Family, Info, Need, OutputKind, Touches};
use refit_methods::registry::{self, Entry};
use serde_json::Value;

use super::needs;

/// The command that makes the pages, as they quote it.
const COMMAND: &str = "refit methods --markdown docs/src/methods";

/// File name and text of every page, the index first.
pub fn all() -> Vec<(String, String)> {
    let mut pages = vec![("README.md".to_owned(), index())];
    pages.extend(registry::all().iter().map(|e| (format!("{}.md", e.info.name), page(e))));
    pages
}

fn index() -> String {
    let mut text = head("Methods");
    text.push_str(
        "One page per method, made from the same structures that make the flags and the recipe fields.\n",
    );
    let mut family = "";
    for Entry { info, .. } in registry::all() {
        if info.family.as_str() != family {
            family = info.family.as_str();
            text.push_str(&format!(
                "\n## {family}\n\n| method | what you get | needs | paper |\n|---|---|---|---|\n"
            ));
        }
        text.push_str(&format!(
            "| [`{0}`]({0}.md) | {1} | {2} | {3} |\n",
            info.name,
            info.summary,
            needs(&info.inputs),
            reference(info)
        ));
    }
    text
}

fn page(entry: &Entry) -> String {
    let info = entry.info;
    let mut text = head(info.title);
    text.push_str(&format!("{}.\n\n| | |\n|---|---|\n", info.summary));
    for (name, value) in facts(info) {
        text.push_str(&format!("| {name} | {value} |\n"));
    }
    text.push_str(&parameters(entry));
    text.push_str(&command_line(info));
    text.push_str(&recipe(entry));
    text.push_str(&claim(entry));
    text
}

fn head(title: &str) -> String {
    format!("<!-- Made by `{COMMAND}`. Do not edit: change the method instead. -->\n# {title}\n\n")
}

/// The paper's identifier, as a link where it has an address.
fn reference(info: &Info) -> String {
    let reference = info.paper.reference;
    match info.paper.url() {
        Some(url) => format!("[{reference}]({url})"),
        None => reference.to_owned(),
    }
}

fn facts(info: &Info) -> Vec<(&'static str, String)> {
    let mut facts = vec![("name", format!("`{}`", info.name))];
    if !info.paper.title.is_empty() {
        let paper = info.paper;
        facts.push(("paper", format!("{} ({}, {})", paper.title, reference(info), paper.year)));
    }
    facts.push(("family", format!("{}: {}", info.family, info.taxonomy.path.join(" > "))));
    facts.push(("needs", needs(&info.inputs)));
    if !info.inputs.data_role.is_empty() {
        facts.push(("data", info.inputs.data_role.to_owned()));
    }
    let cost = match info.taxonomy.needs {
        Effort::None => "reading and writing the weights",
        Effort::Calibration => "forward passes over a little text",
        Effort::Evaluation => "evaluations on held-out data",
        Effort::FineTuning => "gradient steps on a pretrained model",
        Effort::Retraining => "training from the beginning",
    };
    facts.push(("costs", cost.to_owned()));
    let touches = info.taxonomy.touches.iter().map(|touched| match touched {
        Touches::Weights => "values of weights",
        Touches::Activations => "activations at run time",
        Touches::Cache => "the decoding cache",
        Touches::Architecture => "shapes or wiring",
    });
    facts.push(("changes", touches.collect::<Vec<_>>().join(", ")));
    let writes = match info.output {
        OutputKind::Model => "a model directory in Hugging Face layout, with lineage and card",
        OutputKind::Adapter => "an adapter directory in PEFT layout, with lineage and card",
        OutputKind::Report => "a report",
    };
    facts.push(("writes", writes.to_owned()));
    let then = info.taxonomy.composes_with;
    if !then.is_empty() {
        let links: Vec<String> = then.iter().map(|name| format!("[{name}]({name}.md)")).collect();
        facts.push(("composes with", format!("{}, applied afterwards", links.join(", "))));
    }
    facts
}

/// Every parameter with its flag, its key in a recipe, its default and what it means.
fn parameters(entry: &Entry) -> String {
    let mut text = String::from(
        "\n## Parameters\n\n| flag | in a recipe | default | meaning |\n|---|---|---|---|\n",
    );
    let command = entry.command();
    let defaults = entry.default().parameters();
    for arg in command.get_arguments() {
        let (Some(long), key) = (arg.get_long(), arg.get_id().as_str()) else { continue };
        let default = match &defaults[key] {
            Value::Null => "–".to_owned(),
            Value::Array(list) if list.is_empty() => "–".to_owned(),
            Value::Array(list) => {
                let words: Vec<&str> = list.iter().filter_map(Value::as_str).collect();
                format!("`{}`", words.join(","))
            }
            Value::String(text) => format!("`{text}`"),
            other => format!("`{other}`"),
        };
        text.push_str(&format!("| `--{long}` | `{key}` | {default} | {} |\n", meaning(arg)));
    }
    text
}

fn meaning(arg: &Arg) -> String {
    let help = arg.get_long_help().or_else(|| arg.get_help()).map(ToString::to_string);
    let mut words = one_line(&help.unwrap_or_default());
    if !words.is_empty() && !words.ends_with('.') {
        words.push('.');
    }
    // A switch has the possible values `true` and `false`, which say nothing.
    let values: Vec<PossibleValue> = match arg.get_action().takes_values() {
        true => arg.get_possible_values(),
        false => Vec::new(),
    };
    // Neither has one that takes one of the two.
    let switch = values.iter().map(PossibleValue::get_name).eq(["true", "false"]);
    for value in values.iter().filter(|value| !value.is_hide_set() && !switch) {
        let help = value.get_help().map(|help| one_line(&help.to_string())).unwrap_or_default();
        words.push_str(&format!("<br>`{}`: {}", value.get_name(), help.trim_end_matches('.')));
    }
    words
}

/// Fit for a cell of a table.
fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "\\|")
}

/// The language of a block of examples: those that the small model cannot run are not run by the book's test.
fn fence(info: &Info, language: &'static str) -> &'static str {
    match info.name {
        // The small model has no biases.
        "bitfit" => "text",
        // They want text, a size or something compressed, or its width is no multiple of their groups.
        "awq" | "smoothquant" | "repquant" | "fit" | "decompress" => "text",
        // Labelled examples do not travel with refit.
        _ if classifies(info) => "text",
        _ => language,
    }
}

fn command_line(info: &Info) -> String {
    let mut text = format!("\n## On the command line\n\n```{}\n", fence(info, "sh"));
    let name = info.name;
    let models = match companion(info) {
        Some(Companion::Model) => {
            text.push_str("refit apply rtn builtin:tiny --bits 4 -o four-bits\n");
            "builtin:tiny four-bits".to_owned()
        }
        Some(Companion::Base(relatives)) => {
            for (bits, name) in RELATIVES.iter().take(relatives) {
                text.push_str(&format!("refit apply rtn builtin:tiny --bits {bits} -o {name}\n"));
            }
            format!("{} --base builtin:tiny", names(relatives).join(" "))
        }
        Some(Companion::Adapter) => {
            text.push_str(
                "refit apply lora builtin:tiny --data builtin:kjv-calib --steps 4 -o adapter\n",
            );
            "builtin:tiny adapter".to_owned()
        }
        None => "builtin:tiny".to_owned(),
    };
    let data = match (info.inputs.text, info.inputs.data) {
        (Need::Required, _) => " --text builtin:calibration",
        (_, Need::Required) => " --data builtin:kjv-calib --steps 4",
        (_, Need::Optional) => " --data lesson.jsonl",
        (Need::Optional, _)
            if info.inputs.labelled == Need::Optional && info.family == Family::Quantize =>
        {
            " --text FILE"
        }
        _ if info.name == "fit" => " --bpw 3.1",
        _ => "",
    };
    let small = small(info.name).map(|(flag, value)| format!(" --{flag} {value}"));
    let command =
        format!("refit apply {name} {models}{data}{} -o {name}-out", small.unwrap_or_default());
    text.push_str(&format!("{command} --dry-run\n{command}\n```\n\n"));
    text.push_str(
        "`builtin:tiny` is the small model that travels with refit; put your own directory, file or \
         [source](../guide/sources.md) there.\n",
    );
    if classifies(info) {
        text.push_str("`lesson.jsonl` is a table of yours with the columns `text` and `label`.\n");
    }
    text
}

/// Whether it learns from labelled examples.
fn classifies(info: &Info) -> bool {
    info.inputs.data == Need::Optional
}

/// What the small model needs instead of a default that was made for large ones.
fn small(method: &str) -> Option<(&'static str, &'static str)> {
    match method {
        "unified-peft" => Some(("bottleneck", "16")),
        _ => None,
    }
}

/// A whole recipe that runs, with every parameter at its default.
fn recipe(entry: &Entry) -> String {
    let info = entry.info;
    let name = info.name;
    let calibrated = info.inputs.text == Need::Required;
    let trained = info.inputs.data == Need::Required;
    let mut text =
        format!("\n## In a recipe\n\n```{}\nname: try-{name}\ndata:\n", fence(info, "yaml"));
    match classifies(info) {
        true => text.push_str("  examples: lesson.jsonl\n"),
        false => text.push_str("  held-out: builtin:held-out\n"),
    }
    if calibrated {
        text.push_str("  calibration: builtin:calibration\n");
    }
    let companion = companion(info);
    if trained || matches!(companion, Some(Companion::Adapter)) {
        text.push_str("  examples: builtin:kjv-calib\n");
    }
    text.push_str("steps:\n  - pull: builtin:tiny\n    as: original\n");
    let to = match companion {
        Some(Companion::Model) => {
            text.push_str("  - apply: rtn\n    as: four-bits\n    to: original\n");
            "[original, four-bits]".to_owned()
        }
        Some(Companion::Base(relatives)) => {
            for (bits, name) in RELATIVES.iter().take(relatives) {
                text.push_str(&format!(
                    "  - apply: rtn\n    as: {name}\n    to: original\n    with: {{bits: {bits}}}\n"
                ));
            }
            format!("[{}]\n    base: original", names(relatives).join(", "))
        }
        Some(Companion::Adapter) => {
            text.push_str(
                "  - apply: lora\n    as: adapter\n    to: original\n    data: examples\n    with: {steps: 4}\n",
            );
            "[original, adapter]".to_owned()
        }
        None => "original".to_owned(),
    };
    text.push_str(&format!("  - apply: {name}\n    to: {to}\n"));
    if calibrated {
        text.push_str("    data: calibration\n");
    }
    if trained || classifies(info) {
        text.push_str("    data: examples\n");
    }
    let mut defaults = entry.default().parameters();
    if trained {
        defaults["steps"] = 4.into();
    }
    if let Some((key, value)) = small(name)
        && let Ok(number) = value.parse::<u64>()
    {
        defaults[key] = number.into();
    }
    let empty = |value: &Value| value.is_null() || value.as_array().is_some_and(Vec::is_empty);
    let set = defaults.as_object().into_iter().flatten().filter(|(_, value)| !empty(value));
    for (i, (key, value)) in set.enumerate() {
        text.push_str(if i == 0 { "    with:\n" } else { "" });
        match value {
            Value::String(word) => text.push_str(&format!("      {key}: {word}\n")),
            other => text.push_str(&format!("      {key}: {other}\n")),
        }
    }
    if classifies(info) {
        text.push_str("```\n");
        return text;
    }
    text.push_str(&format!(
        "  - eval: [original, {name}]\n    on: held-out\n    reference: original\n    window: 256\n    \
         max_tokens: 2048\n```\n"
    ));
    text
}

/// Models that were made from the small one, to be merged.
const RELATIVES: &[(u32, &str)] = &[(4, "four-bits"), (3, "three-bits")];

fn names(relatives: usize) -> Vec<&'static str> {
    RELATIVES.iter().take(relatives).map(|(_, name)| *name).collect()
}

/// What a method takes beside one model.
#[derive(Clone, Copy)]
enum Companion {
    Model,
    /// The model as the base of so many relatives.
    Base(usize),
    Adapter,
}

fn companion(info: &Info) -> Option<Companion> {
    match (info.inputs.adapters, several(info)) {
        (Need::Required, _) => Some(Companion::Adapter),
        _ if info.inputs.base == Need::Required => {
            Some(Companion::Base(if several(info) { RELATIVES.len() } else { 1 }))
        }
        (_, true) => Some(Companion::Model),
        _ => None,
    }
}

fn several(info: &Info) -> bool {
    info.inputs.max_models.is_none_or(|most| most > 1)
}

fn claim(entry: &Entry) -> String {
    let Some(claim) = entry.claim() else {
        return "\n## Claim\n\nNo experiment of its own. [How claims work](../guide/claims.md).\n"
            .to_owned();
    };
    let assets: Vec<String> = claim.assets.iter().map(|asset| format!("`{asset}`")).collect();
    let seeds: Vec<String> = claim.seeds.iter().map(u64::to_string).collect();
    format!(
        "\n## Claim\n\n{question}\n\n| | |\n|---|---|\n| claimed in | {paper} |\n| needs | {assets} |\n| seeds | {seeds} |\n\
         | takes | about {minutes} minutes on 2 cores |\n\n```sh\nrefit claim {name} --dry-run\nrefit claim {name}\n```\n\n\
         The results that were committed lie in `docs/claims/`. [How claims work](../guide/claims.md).\n",
        question = claim.question,
        paper = claim.paper,
        assets = assets.join(", "),
        seeds = seeds.join(", "),
        minutes = claim.minutes,
        name = entry.info.name,
    )
}
