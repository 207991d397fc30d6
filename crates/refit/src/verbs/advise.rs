//! `refit advise MODEL --target SIZE`: what to try for this model, size and machine, and what not to, with reasons.

use refit_methods::advise::{self, Advice, Advised, Budget, Keep, Needs, Question};
use refit_methods::method::{ModelInput, TextData};
use refit_methods::prune::mask::Pattern;
use refit_methods::quantize::export::Target;
use refit_methods::quantize::fit::size::Size;
use refit_store::adapter::Adapter;
use serde_json::json;

use crate::cli::App;
use crate::failure::{Failure, Result};
use crate::output::{self, Outcome};
use crate::report::number;
use crate::{inputs, machine};

/// Say which methods fit a model, a size and a machine, in which order to try them, and why not the others
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The model
    model: String,
    /// Bytes that the weight files may take, such as 60MB or 1.5GiB
    #[arg(long, value_name = "SIZE", required_unless_present = "bpw", conflicts_with = "bpw")]
    target: Option<Size>,
    /// Bits per weight of the matrices instead, scales and zero points included
    #[arg(long, value_name = "BITS")]
    bpw: Option<f64>,
    /// The only format that is of use [default: any]
    #[arg(long, value_enum, value_name = "FORMAT")]
    runtime: Option<Target>,
    /// Tokens of text there are to look at or to learn from [default: as many as a method wants]
    #[arg(long, value_name = "N")]
    tokens_available: Option<u64>,
    /// Tokens that training may pass over, 6 floating-point operations per parameter each [default: as many as a method wants]
    #[arg(long, value_name = "N")]
    train_tokens: Option<u64>,
    /// Memory that a method may take [default: what this machine has available]
    #[arg(long, value_name = "SIZE")]
    ram: Option<Size>,
    /// What the result must still be able to do: everything, or one task
    #[arg(long, value_enum, default_value_t)]
    keep: Keep,
    /// The most that a method may need
    #[arg(long, value_enum, default_value_t)]
    needs: Needs,
    /// Zeros that the runtime makes use of, such as 2:4: advises pruning, too
    #[arg(long)]
    pattern: Option<Pattern>,
    /// Judge this method only
    #[arg(long, value_name = "NAME")]
    method: Option<String>,
    /// Calibration text that the commands name: a file, or builtin:NAME
    #[arg(long, value_name = "FILE", default_value = "builtin:calibration")]
    text: String,
    /// Training data that the commands name: a table of records, or text
    #[arg(long, value_name = "FILE", default_value = "builtin:calibration")]
    data: String,
}

/// Plans every method against the model and sorts what passes.
pub fn run(app: &App, args: Args) -> Result<Outcome> {
    let budget = match (args.target, args.bpw) {
        (Some(Size(bytes)), _) => Budget::Bytes(bytes),
        (None, Some(bits)) => Budget::BitsPerWeight(bits),
        (None, None) => return Err(Failure::usage("say what the result may take: --target SIZE")),
    };
    let memory = args.ram.map(|Size(bytes)| bytes).or_else(machine::available_memory);
    let mut question = Question {
        budget,
        runtime: args.runtime,
        tokens: args.tokens_available,
        train_tokens: args.train_tokens,
        memory,
        keep: args.keep,
        needs: args.needs,
        pattern: args.pattern,
        method: args.method,
        text: (args.text, Vec::new()),
        data: (args.data, Vec::new()),
    };
    // Before anything is fetched or read.
    question.check()?;
    let texts = inputs::texts(std::slice::from_ref(&question.text.0))?;
    question.text.1 =
        texts.into_iter().map(|t| TextData { source: t.source, text: t.text }).collect();
    question.data.1 = inputs::training(std::slice::from_ref(&question.data.0))?;
    let model = inputs::open(app, &args.model)?;
    if Adapter::is_adapter(&model.path) {
        return Err(Failure::usage(format!(
            "{}: this is an adapter and no model; `refit apply compeft` compresses it",
            args.model
        )));
    }
    model.artifact.check_fit()?;
    let model = ModelInput { source: args.model, artifact: model.artifact };
    app.progress.begin("looking at the weights", 0, "");
    let advice = advise::advise(&model, &question);
    app.progress.end();
    let advice = advice?;
    let text = in_words(&question, &advice);
    let mut json = json!(advice);
    json["question"] = json!({
        "target": args.target,
        "bpw": args.bpw,
        "runtime": question.runtime,
        "tokens_available": question.tokens,
        "train_tokens": question.train_tokens,
        "ram": question.memory,
        "keep": question.keep,
        "needs": question.needs,
        "pattern": question.pattern,
        "method": question.method,
    });
    Ok(Outcome::new(json, text).holds(!advice.advised.is_empty()))
}

fn in_words(question: &Question, advice: &Advice) -> String {
    let model = &advice.model;
    let asked = match question.budget {
        Budget::Bytes(bytes) => format!("at most {}", number::bytes(bytes)),
        Budget::BitsPerWeight(bits) => format!("at most {bits} bits per weight"),
    };
    let mut facts = vec![
        (
            "model",
            format!(
                "{}: {}, {} parameters, {}",
                model.source,
                model.model_type,
                number::parameters(model.parameters),
                number::bytes(model.bytes)
            ),
        ),
        ("size", asked),
    ];
    if let Some(memory) = question.memory {
        facts.push(("memory", number::bytes(memory)));
    }
    if let Some(smallest) = &advice.smallest {
        facts.push((
            "smallest",
            format!(
                "{} ({:.3} bits per weight), by {}",
                number::bytes(smallest.bytes),
                smallest.bits_per_weight,
                smallest.method
            ),
        ));
    }
    let mut text = output::facts(facts);
    text.push_str("\nTRY, IN THIS ORDER\n");
    if advice.advised.is_empty() {
        text.push_str("nothing: see below\n");
    }
    for (at, advised) in advice.advised.iter().enumerate() {
        text.push_str(&entry(at + 1, advised));
    }
    text.push_str("\nNOT ADVISED\n");
    let beside = |reason: &str| reason.starts_with("beside the point");
    for excluded in advice.excluded.iter().filter(|excluded| !beside(&excluded.reason)) {
        let nearest = excluded.alternative.map(|name| format!("; nearest: {name}"));
        let nearest = nearest.unwrap_or_default();
        text.push_str(&format!("{}: {}{nearest}\n", excluded.method, excluded.reason));
    }
    let others = advice.excluded.iter().filter(|excluded| beside(&excluded.reason));
    let others: Vec<&str> = others.map(|excluded| excluded.method).collect();
    if !others.is_empty() {
        text.push_str(&format!("beside the point (--json says why): {}\n", others.join(", ")));
    }
    if !advice.evaluate.is_empty() {
        text.push_str(&format!("\nTHEN MEASURE\n  {}\n", advice.evaluate.join("\n  ")));
    }
    text.push_str(&format!("\norder of composition: {}\n", advice.order.join(", then ")));
    for note in &advice.notes {
        text.push_str(&format!("note: {note}\n"));
    }
    text
}

fn entry(at: usize, advised: &Advised) -> String {
    let mut text = format!(
        "{at}. {}: {} as {}, {:.3} bits per weight, {} of memory\n",
        advised.method,
        number::bytes(advised.bytes),
        serde_json::to_value(advised.runtime)
            .ok()
            .and_then(|v| v.as_str().map(str::to_owned))
            .unwrap_or_default(),
        advised.bits_per_weight,
        number::bytes(advised.cost.peak_memory)
    );
    for reason in &advised.reasons {
        text.push_str(&format!("   {reason}\n"));
    }
    for warning in &advised.warnings {
        text.push_str(&format!("   warning: {warning}\n"));
    }
    for command in &advised.commands {
        text.push_str(&format!("     {command}\n"));
    }
    text
}
