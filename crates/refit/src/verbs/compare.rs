//! `refit compare A B`: tensor by tensor, and in behaviour where both run.

use refit_store::Artifact;
use refit_train::differential::{self, Comparison};
use serde_json::{Value, json};

use crate::cli::App;
use crate::engine;
use crate::failure::Result;
use crate::inputs;
use crate::output::{Outcome, Table};
use crate::report::number;

/// Compare two models tensor by tensor, and by what they compute
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The model
    a: String,
    /// What it is compared with
    b: String,
    /// Compare weights alone
    #[arg(long)]
    weights_only: bool,
    /// Tokens per probe, of eight probes
    #[arg(long, default_value_t = 48)]
    probe_tokens: usize,
    /// Most tensors to list, the most different first
    #[arg(long, default_value_t = 20)]
    top: usize,
    /// Exit with code 1 when the models are not equal within the tolerance of their element type
    #[arg(long)]
    check: bool,
}

/// One tensor that both have.
struct Row {
    name: String,
    max_abs: f64,
    relative: f64,
    cosine: f64,
}

/// Compares weights, then behaviour.
pub fn run(app: &App, args: Args) -> Result<Outcome> {
    let (a, b) = (inputs::open(app, &args.a)?, inputs::open(app, &args.b)?);
    let (left, right) = (&*a.artifact, &*b.artifact);
    let names = |x: &Artifact, y: &Artifact| -> Vec<String> {
        x.tensors().iter().filter(|t| !y.contains(&t.name)).map(|t| t.name.clone()).collect()
    };
    let (only_a, only_b) = (names(left, right), names(right, left));
    let mut rows = Vec::new();
    let mut misshaped = Vec::new();
    let shared: Vec<_> = left.tensors().iter().filter(|t| right.contains(&t.name)).collect();
    app.progress.begin("comparing tensors", shared.len() as u64, "tensors");
    for tensor in shared {
        let other = right.tensor(&tensor.name)?;
        match tensor.shape == other.shape {
            true => rows.push(compare(left, right, &tensor.name)?),
            false => {
                misshaped.push((tensor.name.clone(), tensor.shape.clone(), other.shape.clone()))
            }
        }
        app.progress.advance(1);
    }
    app.progress.end();
    let equal = rows.iter().filter(|row| row.max_abs == 0.0).count();
    let total = rows.len();
    rows.sort_by(|x, y| y.relative.total_cmp(&x.relative).then_with(|| x.name.cmp(&y.name)));

    let behaviour = match args.weights_only {
        true => Err("not asked for".to_owned()),
        false => behaviour(app, left, right, args.probe_tokens).map_err(|failure| failure.message),
    };
    let same_weights =
        equal == total && only_a.is_empty() && only_b.is_empty() && misshaped.is_empty();
    // A config under which one of them does not load is a difference, even with the same weights.
    let same_fit = left.check_fit().is_ok() == right.check_fit().is_ok();
    let same = match &behaviour {
        Ok(found) => found.equal,
        Err(_) => same_weights && (args.weights_only || same_fit),
    };

    let mut text = format!("{total} tensors in both, {equal} equal bit by bit in value\n");
    let mut table = Table::new(1, &["tensor", "max abs", "relative", "cosine"]);
    for row in rows.iter().filter(|row| row.max_abs != 0.0).take(args.top) {
        table.row([
            row.name.clone(),
            number::plain(row.max_abs),
            format!("{:.3e}", row.relative),
            format!("{:.6}", row.cosine),
        ]);
    }
    if !table.is_empty() {
        text.push_str(&format!("\n{table}"));
        let left_out = (total - equal).saturating_sub(args.top);
        if left_out > 0 {
            text.push_str(&format!(
                "... and {left_out} that differ less (--top {})\n",
                total - equal
            ));
        }
    }
    for (which, list) in [(&args.a, &only_a), (&args.b, &only_b)] {
        if !list.is_empty() {
            text.push_str(&format!("\nonly in {which}: {}", head(list)));
        }
    }
    for (name, x, y) in &misshaped {
        text.push_str(&format!("\n{name}: {x:?} against {y:?}"));
    }
    text.push_str("\n\nbehaviour: ");
    text.push_str(&match &behaviour {
        Ok(found) => words(found),
        Err(why) => format!("not compared ({why})"),
    });

    let json = json!({
        "a": args.a,
        "b": args.b,
        "tensors": rows.iter().map(|row| json!({
            "name": row.name,
            "max_abs": row.max_abs,
            "relative_frobenius": row.relative,
            "cosine": row.cosine,
        })).collect::<Vec<_>>(),
        "equal_tensors": equal,
        "only_a": only_a,
        "only_b": only_b,
        "misshaped": misshaped.iter().map(|(name, x, y)| json!({"name": name, "a": x, "b": y})).collect::<Vec<_>>(),
        "behaviour": match &behaviour {
            Ok(found) => json!(found),
            Err(_) => Value::Null,
        },
        "behaviour_skipped": behaviour.as_ref().err(),
        "equal": same,
    });
    Ok(Outcome::new(json, text).holds(same || !args.check))
}

fn head(list: &[String]) -> String {
    match list.len() {
        0..=6 => list.join(", "),
        n => format!("{} and {} more", list[..6].join(", "), n - 6),
    }
}

/// Differences of one tensor, computed in f64.
fn compare(left: &Artifact, right: &Artifact, name: &str) -> Result<Row> {
    let (a, b) = (left.read_f32(name)?, right.read_f32(name)?);
    let (mut max_abs, mut difference, mut aa, mut bb, mut ab) = (0.0f64, 0.0, 0.0, 0.0, 0.0);
    for (x, y) in a.iter().zip(&b) {
        let (x, y) = (f64::from(*x), f64::from(*y));
        // `max` would drop a NaN, and a NaN is the greatest difference there is.
        let d = (x - y).abs();
        max_abs = if d.is_nan() || d > max_abs { d } else { max_abs };
        difference += d * d;
        aa += x * x;
        bb += y * y;
        ab += x * y;
    }
    let cosine = if aa > 0.0 && bb > 0.0 {
        ab / (aa.sqrt() * bb.sqrt())
    } else {
        f64::from(u8::from(aa == bb))
    };
    let relative = if difference == 0.0 { 0.0 } else { difference.sqrt() / (bb.sqrt() + 1e-12) };
    Ok(Row { name: name.to_owned(), max_abs, relative, cosine })
}

/// Runs both on the same probes and finds the first place where they part.
fn behaviour(app: &App, left: &Artifact, right: &Artifact, tokens: usize) -> Result<Comparison> {
    let probes = probes(left, tokens)?;
    let (a, b) = (engine::load(app, left)?, engine::load(app, right)?);
    let dtype = left.tensors().iter().max_by_key(|t| t.nbytes).map(|t| t.dtype);
    let other = right.tensors().iter().max_by_key(|t| t.nbytes).map(|t| t.dtype);
    // The looser of both element types decides.
    let tolerance = [dtype, other]
        .into_iter()
        .flatten()
        .min_by(|x, y| x.bits().total_cmp(&y.bits()))
        .map_or(differential::Tolerance::Relative(1e-4), differential::tolerance);
    app.progress.begin("comparing behaviour", 0, "");
    let found = differential::compare(&a, &b, &probes, tolerance);
    app.progress.end();
    Ok(found?)
}

/// Eight probes of text; of spread-out ids where there is no tokenizer.
fn probes(artifact: &Artifact, tokens: usize) -> Result<Vec<Vec<u32>>> {
    const PROBES: usize = 8;
    let dims = &artifact.architecture().dims;
    let tokens = tokens.clamp(1, dims.context.unwrap_or(usize::MAX));
    if let Ok(tokenizer) = engine::tokenizer(artifact) {
        let texts = inputs::texts(&["builtin:held-out".to_owned()])?;
        let mut probes = Vec::new();
        for text in &texts {
            // The beginning of each text is enough for its share of the probes.
            let start: String = text.text.chars().take(tokens * PROBES * 8).collect();
            let ids = tokenizer.encode(&start, false)?;
            probes.extend(
                ids.chunks_exact(tokens).take(PROBES.div_ceil(texts.len())).map(<[u32]>::to_vec),
            );
        }
        probes.truncate(PROBES);
        if !probes.is_empty() {
            return Ok(probes);
        }
    }
    let vocab = dims.vocab.unwrap_or(2).max(2) as u32;
    let id = |i: usize| ((i as u64 * 2_654_435_761) % u64::from(vocab)) as u32;
    Ok((0..PROBES).map(|p| (0..tokens).map(|t| id(p * tokens + t + 1)).collect()).collect())
}

fn words(found: &Comparison) -> String {
    let mut text =
        String::from(if found.equal { "equal within the tolerance" } else { "DIFFERENT" });
    text.push_str(&format!(
        "\n  output     max abs {}, relative {:.3e}",
        number::plain(found.output.max_abs),
        found.output.error
    ));
    if let Some(kl) = found.output.kl {
        text.push_str(&format!(", KL {}", number::plain(kl)));
    }
    if let Some(share) = found.output.top1_agreement {
        text.push_str(&format!(", same top token {:.1} %", share * 100.0));
    }
    if let Some(first) = &found.first {
        text.push_str(&format!("\n  first      {} (relative {:.3e})", first.name, first.error));
        if let Some(after) = &first.after {
            text.push_str(&format!(", after {after}"));
        }
        text.push_str(&format!("\n  suspect    {}", first.suspect));
    }
    text
}
