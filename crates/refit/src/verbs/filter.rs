//! `refit filter MODEL --data FILE... -o OUT`: keeps the records that a model finds least surprising (POINTS, Liu et al. 2024,
//! arXiv:2409.04828, section 3.2).
//!
//! A record's perplexity is `exp(-(1/N) sum log P(w_i | context, w_<i))` over the tokens that a model would learn from it: the
//! completion where there is a prompt, the assistant's turns of a chat, else the whole text. The records with the lowest are
//! kept, `floor(ratio n)` of them; equal ones in the order of the file. The paper keeps a fifth.

use std::path::PathBuf;

use refit_data::examples::{self, Length};
use refit_data::{Records, Tokenizer};
use refit_train::eval::{Scored, score_examples};
use serde_json::{Map, Value, json};

use super::{check_writable, parent, write_atomically};
use crate::cli::App;
use crate::engine;
use crate::failure::{Failure, Result};
use crate::inputs;
use crate::output::{self, Outcome};
use crate::report::number;

/// Keep the records of training data that a model finds least surprising
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The model that scores them
    model: String,
    /// Tables of records (.jsonl, .csv, .tsv, .parquet) with the columns that training takes
    #[arg(long, required = true, num_args = 1.., value_name = "FILE")]
    data: Vec<String>,
    /// Part of the records that is kept, those with the lowest perplexity first
    #[arg(long, default_value_t = 0.2, value_name = "RATIO")]
    keep: f64,
    /// Most tokens of a record that are scored; what is longer is cut
    #[arg(long, default_value_t = 512, value_name = "N")]
    max_length: usize,
    /// Where the kept records go, one JSON object a line, in their order, with their `perplexity`
    #[arg(short, long, value_name = "FILE")]
    out: PathBuf,
    /// Replace the file if it exists
    #[arg(long)]
    force: bool,
    /// Read the data and say what would be scored; write nothing
    #[arg(long)]
    dry_run: bool,
}

/// A record that can be scored.
struct Row<'a> {
    table: &'a Records,
    index: usize,
    example: examples::Example,
}

/// Scores, sorts, keeps.
pub fn run(app: &App, args: Args) -> Result<Outcome> {
    check(&args)?;
    let model = inputs::open(app, &args.model)?;
    inputs::check_kind(&model.artifact, "eval")?;
    let context = model.artifact.architecture().dims.context.unwrap_or(usize::MAX);
    let length = Length { max: args.max_length.min(context), truncate: true };
    let tokenizer = engine::tokenizer(&model.artifact)?;
    let tables = args.data.iter().map(table).collect::<Result<Vec<_>>>()?;
    let (rows, unscored) = rows(&tokenizer, &tables, length)?;
    let total = rows.len() + unscored;
    let keep = (args.keep * rows.len() as f64).floor() as usize;
    let out = args.out.display();
    let mut facts = vec![("records", number::count(total as u64))];
    if unscored > 0 {
        facts.push(("dropped, nothing to score", number::count(unscored as u64)));
    }
    if args.dry_run {
        let tokens: usize = rows.iter().map(|row| row.example.learned()).sum();
        facts.push(("tokens to score", number::count(tokens as u64)));
        facts.push(("would keep", format!("{} in {out}", number::count(keep as u64))));
        let json = json!({"dry_run": true, "records": total, "unscored": unscored, "tokens": tokens, "kept": keep, "out": args.out});
        return Ok(Outcome::new(json, output::facts(facts)));
    }
    if keep == 0 {
        return Err(Failure::usage(format!(
            "--keep {}: of {} records that would be none; give more records or a larger ratio",
            args.keep,
            rows.len()
        )));
    }
    let decoder = engine::load_decoder(app, &model.artifact, "eval")?;
    let scored: Vec<Scored> = rows
        .iter()
        .map(|row| Scored { ids: &row.example.ids, counts: &row.example.learned })
        .collect();
    let progress = |done: u64, total: u64| match done {
        0 => app.progress.begin("scoring", total, "records"),
        _ => app.progress.set(done, Some(total)),
    };
    let scores = score_examples(&decoder, &scored, &progress);
    app.progress.end();
    let scores = scores.map_err(|e| inputs::blame_weights(&model.artifact, e.into()))?;
    let perplexities: Vec<f64> =
        scores.iter().map(|score| score.perplexity().unwrap_or(f64::INFINITY)).collect();
    let mut order: Vec<usize> = (0..rows.len()).collect();
    order.sort_by(|&a, &b| perplexities[a].total_cmp(&perplexities[b]));
    let (kept, dropped) = order.split_at(keep);
    let limit = perplexities[kept[keep - 1]];
    let mut kept = kept.to_vec();
    kept.sort_unstable();
    let mut lines = String::new();
    for &i in &kept {
        lines.push_str(&record(&rows[i], perplexities[i]).to_string());
        lines.push('\n');
    }
    let folder = parent(&args.out);
    std::fs::create_dir_all(&folder).map_err(|source| Failure::io(&folder, "make", &source))?;
    write_atomically(&args.out, lines.as_bytes())?;
    let middle = |of: &[usize]| {
        let mut values: Vec<f64> = of.iter().map(|&i| perplexities[i]).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied()
    };
    let tokens: usize = scores.iter().map(|score| score.tokens).sum();
    facts.push(("scored", format!("{} tokens", number::count(tokens as u64))));
    facts.push(("kept", format!("{} in {out}", number::count(keep as u64))));
    facts.push(("highest perplexity kept", format!("{limit:.3}")));
    if let (Some(kept), Some(dropped)) = (middle(&kept), middle(dropped)) {
        facts.push(("median kept, dropped", format!("{kept:.3}, {dropped:.3}")));
    }
    let json = json!({
        "records": total,
        "unscored": unscored,
        "tokens": tokens,
        "kept": keep,
        "highest_perplexity_kept": limit,
        "median_perplexity_kept": middle(&kept),
        "median_perplexity_dropped": middle(dropped),
        "out": args.out,
    });
    Ok(Outcome::new(json, output::facts(facts)))
}

/// What is wrong whatever the data say.
fn check(args: &Args) -> Result {
    if !(args.keep > 0.0 && args.keep <= 1.0) {
        return Err(Failure::usage(format!(
            "--keep {}: a part of the records, above 0 and at most 1",
            args.keep
        )));
    }
    if args.max_length < 2 {
        return Err(Failure::usage(format!(
            "--max-length {}: at least 2 tokens are needed, since the first is not scored",
            args.max_length
        )));
    }
    if args.out.is_dir() || (args.out.exists() && !args.force) {
        return Err(Failure::usage(format!(
            "{} exists; name another file, or replace it with --force",
            args.out.display()
        )));
    }
    let same = |file: &String| matches!((args.out.canonicalize(), PathBuf::from(file).canonicalize()), (Ok(a), Ok(b)) if a == b);
    if let Some(file) = args.data.iter().find(|file| same(file)) {
        return Err(Failure::usage(format!(
            "{file} is read here, and its other records would be lost; name another file to write"
        )));
    }
    check_writable(&parent(&args.out))
}

fn table(file: &String) -> Result<Records> {
    if !inputs::is_table(file) {
        return Err(Failure::usage(format!(
            "{file}: records come as a table: .jsonl, .csv, .tsv or .parquet"
        )));
    }
    Ok(Records::open(file)?)
}

/// The records that have something to score, and how many have not.
fn rows<'a>(
    tokenizer: &Tokenizer,
    tables: &'a [Records],
    length: Length,
) -> Result<(Vec<Row<'a>>, usize)> {
    let (mut rows, mut unscored, mut last) = (Vec::new(), 0, None);
    for table in tables {
        for (index, example) in examples::each_record(tokenizer, table, length)?.enumerate() {
            match example {
                Ok(example) => rows.push(Row { table, index, example }),
                Err(error) => {
                    unscored += 1;
                    last = Some(error);
                }
            }
        }
    }
    match last {
        // Then it is not a record that is bad, but the whole table.
        Some(error) if rows.is_empty() => Err(error.into()),
        None if rows.is_empty() => Err(Failure::usage("the data have no rows")),
        _ => Ok((rows, unscored)),
    }
}

/// A record as it was, and its score.
fn record(row: &Row, perplexity: f64) -> Value {
    let values = &row.table.rows()[row.index].values;
    let mut object: Map<String, Value> = row
        .table
        .columns()
        .iter()
        .cloned()
        .zip(values.iter().cloned())
        .filter(|(_, value)| !value.is_null())
        .collect();
    object.insert("perplexity".to_owned(), json!(perplexity));
    Value::Object(object)
}
