//! `refit explain MODEL`: plain words, derived from the files alone, each line with its source.

use std::path::Path;

use refit_store::architecture::{Kind, MemoryOptions, Role, document_key, memory_plan};
use refit_store::{Artifact, Lineage};
use serde_json::{Value, json};

use crate::cli::App;
use crate::engine;
use crate::failure::{Failure, Result};
use crate::inputs;
use crate::output::Outcome;
use crate::report::number;
use crate::suggest::did_you_mean;

/// Say in plain words what a model is, from its files alone
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The model
    model: String,
    /// Explain one key of its config instead
    #[arg(long, value_name = "KEY")]
    key: Option<String>,
}

/// One statement and where it comes from.
struct Line {
    says: String,
    source: String,
}

/// Explains the model or one key.
pub fn run(app: &App, args: Args) -> Result<Outcome> {
    let model = inputs::open(app, &args.model)?;
    match &args.key {
        Some(key) => explain_key(&model.artifact, key),
        None => {
            let lines = lines(&model.artifact)?;
            let text: String =
                lines.iter().map(|l| format!("{} [{}]\n", l.says, l.source)).collect();
            let list: Vec<Value> =
                lines.iter().map(|l| json!({"says": l.says, "source": l.source})).collect();
            Ok(Outcome::new(json!({"model": args.model, "lines": list}), text))
        }
    }
}

fn explain_key(artifact: &Artifact, key: &str) -> Result<Outcome> {
    let config = artifact.config().raw();
    let model_type = artifact.architecture().model_type.as_str();
    let doc = document_key(model_type, key);
    let value = config.get(key);
    if value.is_none() && !doc.used && doc.text.starts_with("Not documented") {
        let hint = did_you_mean(key, config.keys().map(String::as_str));
        return Err(Failure::usage(format!(
            "--key {key}: neither in this model's config nor known to refit{hint}"
        )));
    }
    let here = match value {
        Some(value) => format!("{key} = {value}"),
        None => format!("{key} is not set in this model's config"),
    };
    let used = if doc.used { "refit reads it" } else { "refit does not read it" };
    let text = format!("{here}\n{}\n({used})", doc.text.trim());
    let json = json!({"key": key, "value": value, "text": doc.text, "used": doc.used});
    Ok(Outcome::new(json, text))
}

fn lines(artifact: &Artifact) -> Result<Vec<Line>> {
    let architecture = artifact.architecture();
    let dims = &architecture.dims;
    let config = artifact.config();
    let config_file = match (artifact.gguf(), config.raw().is_empty()) {
        (Some(_), _) => "GGUF metadata",
        (None, true) => "tensor names and shapes",
        (None, false) => "config.json",
    };
    let mut lines = Vec::new();
    let mut say = |says: String, source: &str| lines.push(Line { says, source: source.to_owned() });

    let kind = match architecture.kind {
        Kind::Decoder => "a language model that writes text from left to right",
        Kind::Encoder => "an encoder that turns text into vectors; it does not write text",
        Kind::EncoderDecoder => "a model that reads one sequence and writes another",
        Kind::Vision => "an image model",
        Kind::VisionLanguage => "a model of images and text",
        Kind::Audio => "a model of sound",
        _ => "a model",
    };
    let family = match architecture.inferred {
        true => "tensor names and shapes; no config names a family that refit describes",
        false => config_file,
    };
    say(format!("This is {kind}, of the {} family.", architecture.model_type), family);
    say(architecture.summary.trim().to_owned(), family);
    if let Some(label) = output_meaning(artifact) {
        say(label, config_file);
    }
    let vision = architecture.kind == Kind::Vision;
    match (dims.layers, dims.hidden) {
        // A convolutional network has no stream of one width.
        (Some(layers), _) if vision && dims.heads.is_none() => {
            say(format!("It has {layers} blocks."), config_file);
        }
        (Some(layers), Some(hidden)) => {
            let token = if vision { "patch" } else { "token" };
            say(
                format!("It has {layers} blocks around a stream of {hidden} numbers per {token}."),
                config_file,
            );
        }
        _ => {}
    }
    if let (Some(heads), Some(kv)) = (dims.heads, dims.kv_heads) {
        let shared = match heads / kv.max(1) {
            0 | 1 => "each with its own keys and values".to_owned(),
            n => format!(
                "{n} of them share one of {kv} key/value heads, so its cache is {n} times smaller"
            ),
        };
        let width = dims.head_dim.map_or_else(String::new, |d| format!(" of {d} numbers"));
        say(format!("Attention has {heads} heads{width}; {shared}."), config_file);
    }
    if let Some(context) = dims.context.filter(|_| !vision) {
        let window =
            dims.window.map_or_else(String::new, |w| format!(", and each token sees the last {w}"));
        say(format!("Its longest input is {context} tokens{window}."), config_file);
    }
    // transformers 5 keeps it in a table.
    let table = config.raw().get("rope_parameters").and_then(|t| t.get("rope_theta"));
    if let Some(theta) = config.f64("rope_theta").or_else(|| table.and_then(Value::as_f64)) {
        say(
            format!("Positions are rotations (RoPE) with base {}.", number::tick(theta)),
            config_file,
        );
    }
    if let Some(vocab) = dims.vocab {
        let says = match engine::tokenizer(artifact) {
            Ok(tokenizer) if tokenizer.vocab_size() == vocab => {
                format!(
                    "Its vocabulary has {} tokens, and the tokenizer agrees.",
                    number::count(vocab as u64)
                )
            }
            Ok(tokenizer) => format!(
                "Its embedding has {} rows for {} tokens of the tokenizer; the rest is padding.",
                number::count(vocab as u64),
                number::count(tokenizer.vocab_size() as u64)
            ),
            Err(_) => format!(
                "Its vocabulary has {} tokens, but no usable tokenizer lies beside it.",
                number::count(vocab as u64)
            ),
        };
        say(says, &format!("{config_file}, tokenizer"));
    }

    let stored: u64 = artifact.tensors().iter().map(|t| t.nbytes).sum();
    let parameters: u64 = artifact.tensors().iter().map(|t| t.numel() as u64).sum();
    say(
        format!(
            "It has {} parameters in {} tensors, {} on disk: {:.2} bits per parameter.",
            number::parameters(parameters),
            artifact.tensors().len(),
            number::bytes(stored),
            stored as f64 * 8.0 / parameters.max(1) as f64
        ),
        "tensor headers",
    );
    let share = |roles: &[Role]| {
        let of = architecture.parameters_by_role();
        let sum: u64 = of.iter().filter(|(role, ..)| roles.contains(role)).map(|(.., n)| n).sum();
        100.0 * sum as f64 / parameters.max(1) as f64
    };
    let attention = share(&[Role::Q, Role::K, Role::V, Role::Qkv, Role::O]);
    let mlp = share(&[Role::Gate, Role::Up, Role::GateUp, Role::Down]);
    let embed = share(&[Role::Embed]);
    if attention + mlp > 0.0 {
        say(
            format!(
                "Of these {attention:.0} % are attention, {mlp:.0} % MLP and {embed:.0} % the embedding."
            ),
            "tensor headers",
        );
    }
    for site in architecture.sites.iter().filter(|site| site.tied_to.is_some()) {
        let to = site.tied_to.as_deref().unwrap_or_default();
        say(
            format!(
                "`{}` is tied to `{to}`: one set of values, used twice. A method that changes one changes both.",
                site.name
            ),
            &format!("{config_file}, tensor headers"),
        );
    }
    let report = artifact.load_report();
    let fits = match report.is_clean() {
        true => "Every tensor that the config promises is there, with the right shape.".to_owned(),
        false => format!(
            "Not everything fits: {} tensors missing, {} unexpected, {} of another shape (refit inspect lists them).",
            report.missing.len(),
            report.unexpected.len(),
            report.misshaped.len()
        ),
    };
    say(fits, &format!("{config_file}, tensor headers"));
    let grid = refit_store::weight_grid::detect(artifact)?;
    if let Some(bits) = grid.bits {
        say(
            format!(
                "Its weights lie on {bits}-bit grids of {}: it was quantized before. Compare methods at fewer bits.",
                grid.span()
            ),
            &format!("values of {} matrices", grid.matrices),
        );
    }
    let default = MemoryOptions::default();
    let context = dims.context.map_or(default.context, |longest| longest.min(default.context));
    let options = MemoryOptions { context, ..default };
    let memory = memory_plan(architecture, stored, &options);
    say(
        format!(
            "To run it on {} takes about {}, to tune it all {}, to tune LoRA factors of rank {} {} (f32).",
            if vision { "an image".to_owned() } else { format!("{} tokens", options.context) },
            number::bytes(memory.run),
            number::bytes(memory.tune_adamw),
            options.lora_rank,
            number::bytes(memory.tune_lora)
        ),
        "computed from the sizes above",
    );
    match Lineage::read(artifact.path())? {
        Some(lineage) => {
            let parents: Vec<&str> = lineage.parents.iter().map(|p| p.name.as_str()).collect();
            say(
                format!("refit made it with {} from {}.", lineage.method, parents.join(", ")),
                "refit.lineage.json",
            );
        }
        None => say("Nothing beside it says how it was made.".to_owned(), "no refit.lineage.json"),
    }
    if let Some(says) = licence(artifact.path()) {
        say(says, "README.md");
    }
    Ok(lines)
}

/// What the numbers that come out mean.
fn output_meaning(artifact: &Artifact) -> Option<String> {
    let dims = &artifact.architecture().dims;
    if refit_nn::classifier::text_classes(artifact).is_some() {
        let labels = super::inspect::labels(artifact)?;
        let some: Vec<&str> = labels.iter().take(3).map(String::as_str).collect();
        let more = if labels.len() > some.len() { ", ..." } else { "" };
        return Some(format!(
            "What comes out: for each text {} scores, one per class ({}{more}).",
            labels.len(),
            some.join(", ")
        ));
    }
    match artifact.architecture().kind {
        Kind::Decoder => Some(format!(
            "What comes out: for each position {} scores, one per token that could come next.",
            number::count(dims.vocab? as u64)
        )),
        Kind::Encoder => Some(format!(
            "What comes out: for each token {} numbers; a pooling makes one vector of them.",
            dims.hidden?
        )),
        Kind::Vision => {
            let labels = artifact.config().raw().get("id2label").and_then(Value::as_object);
            let Some(labels) = labels else {
                let head = artifact.architecture().with_role(Role::Head).next()?;
                let classes = head.shape.first()?;
                return Some(format!(
                    "What comes out: {} scores, one per class; nothing here names the classes.",
                    number::count(*classes as u64)
                ));
            };
            let some: Vec<&str> = labels.values().take(3).filter_map(Value::as_str).collect();
            Some(format!(
                "What comes out: {} scores, one per class ({}, ...).",
                labels.len(),
                some.join(", ")
            ))
        }
        _ => None,
    }
}

fn licence(path: &Path) -> Option<String> {
    let dir = if path.is_dir() { path.to_owned() } else { super::parent(path) };
    let card = refit_store::Card::read(&dir).ok()??;
    card.license.known().map(|licence| format!("Its card says the licence is {licence}."))
}
