//! `refit embed MODEL --text FILE`: one vector per line.

use std::path::Path;

use refit_nn::{Model, Pooling};
use serde_json::{Value, json};

use crate::cli::App;
use crate::engine;
use crate::failure::{Failure, Result};
use crate::inputs::{self, Text};
use crate::output::Outcome;

/// Turn each line of a text into a vector
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The encoder
    model: String,
    /// Text files; one vector per line, in their order, also for lines that are empty
    #[arg(long, required = true, num_args = 1.., value_name = "FILE")]
    text: Vec<String>,
    /// Sequences per forward pass
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..))]
    batch: u16,
}

/// How sentences become vectors.
struct Recipe {
    pooling: Pooling,
    normalize: bool,
    max_tokens: Option<usize>,
}

/// Embeds every line.
pub fn run(app: &App, args: Args) -> Result<Outcome> {
    let model = inputs::open(app, &args.model)?;
    inputs::check_kind(&model.artifact, "embed")?;
    let texts = inputs::texts(&args.text)?;
    // Lines as they are: whoever counts them finds line i's vector at place i.
    let lines: Vec<&str> = texts.iter().flat_map(|t| t.text.lines()).collect();
    let tokenizer = engine::tokenizer(&model.artifact)?;
    let Model::Encoder(encoder) = engine::load(app, &model.artifact)? else {
        return Err(engine::wrong_kind(
            &model.artifact,
            "embed",
            "no text encoder",
            "refit inspect",
        ));
    };
    let recipe = recipe(&model.path)?;
    let longest = recipe.max_tokens.unwrap_or(usize::MAX).min(encoder.max_tokens());
    let mut sequences = tokenizer.encode_batch(&lines, true)?;
    if let Some(i) = sequences.iter().position(Vec::is_empty) {
        return Err(no_tokens(&texts, i));
    }
    let cut = sequences.iter().filter(|ids| ids.len() > longest).count();
    for ids in &mut sequences {
        if ids.len() > longest {
            // The closing special token stays.
            let last = ids.last().copied();
            ids.truncate(longest.saturating_sub(1));
            ids.extend(last);
        }
    }
    if cut > 0 {
        app.progress.note(&format!(
            "warning: {cut} of {} lines are longer than {longest} tokens and were cut",
            lines.len()
        ));
    }
    // Equal lengths share a batch, so that little is computed for padding.
    let mut order: Vec<usize> = (0..sequences.len()).collect();
    order.sort_by_key(|&i| sequences[i].len());
    let mut embeddings = vec![Vec::new(); sequences.len()];
    app.progress.begin("embedding", sequences.len() as u64, "lines");
    for chunk in order.chunks(usize::from(args.batch)) {
        let batch: Vec<Vec<u32>> = chunk.iter().map(|&i| sequences[i].clone()).collect();
        let vectors = encoder.sentence(&batch, recipe.pooling, recipe.normalize)?;
        for (&i, vector) in chunk.iter().zip(vectors) {
            if vector.iter().any(|value| !value.is_finite()) {
                let problem = format!("the vector of `{}` is not finite", lines[i]);
                return Err(inputs::blame_weights(&model.artifact, Failure::usage(problem)));
            }
            embeddings[i] = vector;
        }
        app.progress.advance(chunk.len() as u64);
    }
    app.progress.end();
    let width = embeddings.first().map_or(0, Vec::len);
    let mut text = String::new();
    for (line, vector) in lines.iter().zip(&embeddings) {
        let head: Vec<String> = vector.iter().take(6).map(|v| format!("{v:+.4}")).collect();
        let short: String = line.chars().take(40).collect();
        text.push_str(&format!("{short:40}  {} ...\n", head.join(" ")));
    }
    text.push_str(&format!("{} vectors of {width}; --json prints them whole", embeddings.len()));
    let json = json!({
        "embeddings": embeddings,
        "dimension": width,
        "pooling": format!("{:?}", recipe.pooling).to_lowercase(),
        "normalized": recipe.normalize,
        "truncated": cut,
    });
    Ok(Outcome::new(json, text))
}

/// The failure of a line of which the tokenizer makes nothing, not even a special token.
fn no_tokens(texts: &[Text], mut line: usize) -> Failure {
    for text in texts {
        let lines = text.text.lines().count();
        if line < lines {
            return Failure::usage(format!(
                "{}: line {}: no tokens; this model cannot embed an empty line, remove it",
                text.source,
                line + 1
            ));
        }
        line -= lines;
    }
    Failure::usage("a line has no tokens; remove it")
}

/// As the model's own sentence-transformers files say; mean pooling and unit length for a bare encoder.
fn recipe(path: &Path) -> Result<Recipe> {
    let dir = if path.is_dir() { path.to_owned() } else { super::parent(path) };
    let mut recipe = Recipe { pooling: Pooling::Mean, normalize: true, max_tokens: None };
    if let Some(config) = engine::side_json(&dir, "sentence_bert_config.json")? {
        recipe.max_tokens = config["max_seq_length"].as_u64().map(|n| n as usize);
    }
    let modules = engine::side_json(&dir, "modules.json")?;
    let modules: Vec<Value> = modules.and_then(|m| m.as_array().cloned()).unwrap_or_default();
    let is =
        |module: &Value, kind: &str| module["type"].as_str().is_some_and(|t| t.ends_with(kind));
    if !modules.is_empty() {
        recipe.normalize = modules.iter().any(|m| is(m, "Normalize"));
    }
    let pooling = modules.iter().find(|m| is(m, "Pooling")).and_then(|m| m["path"].as_str());
    // The path comes from a downloaded file: only a plain folder name is followed.
    let folder = pooling.filter(|p| !p.contains(['/', '\\']) && *p != "..").unwrap_or("1_Pooling");
    if let Some(config) = engine::side_json(&dir.join(folder), "config.json")? {
        let on = |key: &str| config[key].as_bool().unwrap_or(false);
        recipe.pooling = match () {
            () if on("pooling_mode_mean_tokens") => Pooling::Mean,
            () if on("pooling_mode_cls_token") => Pooling::Cls,
            () if on("pooling_mode_max_tokens") => Pooling::Max,
            () => {
                return Err(Failure::usage(format!(
                    "{}/{folder}/config.json: asks for a pooling that refit does not have (it has mean, cls and max)",
                    dir.display()
                )));
            }
        };
    }
    Ok(recipe)
}
