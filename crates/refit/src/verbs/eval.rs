//! `refit eval MODEL --text FILE...`: perplexity on text, and KL to a reference.

use refit_methods::quantize::activations;
use refit_nn::rounding::{Rounder, Rounding};
use refit_store::Artifact;
use refit_train::eval::{self, CausalLm, Options, Perplexity, Reference, Rounded, Segment};
use serde_json::json;

use crate::cli::App;
use crate::engine::{self, Held};
use crate::failure::{Failure, Result};
use crate::inputs::{self, Text};
use crate::output::{self, Outcome};
use crate::report::number;

/// Measure perplexity on text, and how far the predictions moved from a reference
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The model
    model: String,
    /// Text files, put together in this order, or builtin:held-out, builtin:kjv, builtin:man, builtin:wordnet
    #[arg(long, required = true, num_args = 1.., value_name = "FILE")]
    text: Vec<String>,
    /// Adapters to put on the model, in this order
    #[arg(long, value_name = "ADAPTER", num_args = 1..)]
    adapter: Vec<String>,
    /// Tokens per window; windows do not overlap and all but the first token of each are scored
    /// [default: 1024, or the model's context where that is shorter]
    #[arg(long, value_name = "N")]
    window: Option<usize>,
    /// Read at most this many tokens
    #[arg(long, value_name = "N")]
    max_tokens: Option<usize>,
    /// Measure the KL divergence from this model's predictions
    #[arg(long, value_name = "MODEL")]
    reference: Option<String>,
    /// Round activations while the model runs: `stated` as the model says in its configuration or its record of
    /// quantization, `none` not at all, `int2` to `int8` the inputs of all linears, token by token
    #[arg(long, value_name = "HOW", default_value = "stated")]
    activations: Activations,
    /// How quantized weights are held in memory
    #[arg(long, value_enum, value_name = "HOW", default_value = "f32")]
    weights: Held,
}

/// What `--activations` asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Activations {
    Stated,
    None,
    Token(u8),
}

impl std::str::FromStr for Activations {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.strip_prefix("int").and_then(|bits| bits.parse().ok())) {
            ("stated", _) => Ok(Self::Stated),
            ("none", _) => Ok(Self::None),
            (_, Some(bits @ 2..=8)) => Ok(Self::Token(bits)),
            _ => Err("expected stated, none, or int2 to int8".into()),
        }
    }
}

impl Activations {
    fn rounder(self, artifact: &Artifact) -> Result<Rounder> {
        match self {
            Self::Stated => Ok(activations::stated(artifact)?),
            Self::None => Ok(Rounder::default()),
            Self::Token(bits) => Ok(activations::per_token(artifact, bits)),
        }
    }
}

/// Bits and kind of what is rounded, in words.
pub fn describe(rounder: &Rounder) -> String {
    let mut kinds: Vec<String> = rounder
        .roundings
        .values()
        .map(|rounding| {
            let kind = match rounding {
                Rounding::Token { .. } => "per token",
                Rounding::Tensor { .. } => "fixed per tensor",
                Rounding::Channel { .. } | Rounding::ChannelDynamic { .. } => "per channel",
                Rounding::Log2 { .. } | Rounding::LogSqrt2 { .. } => "in powers",
            };
            format!("{} bits {kind}", rounding.bits())
        })
        .collect();
    kinds.sort();
    kinds.dedup();
    format!("{} rounded ({})", rounder.roundings.len(), kinds.join(", "))
}

/// Tokens per window where nothing else is asked for.
const WINDOW: usize = 1024;

/// Measures one model.
pub fn run(app: &App, args: Args) -> Result<Outcome> {
    if let Some(few @ 0..2) = args.max_tokens {
        return Err(Failure::usage(format!(
            "--max-tokens {few}: at least 2 tokens are needed, since a window's first token is not scored"
        )));
    }
    let model = inputs::open(app, &args.model)?;
    inputs::check_kind(&model.artifact, "eval")?;
    let context = model.artifact.architecture().dims.context;
    let window = args.window.unwrap_or_else(|| WINDOW.min(context.unwrap_or(WINDOW)));
    let texts = inputs::texts(&args.text)?;
    let adapters = engine::adapters(app, &args.adapter)?;
    let tokenizer = engine::tokenizer(&model.artifact)?;
    let ids = engine::encode(&tokenizer, &texts)?;
    check_window(&texts, ids.len(), window, context)?;
    let options =
        Options { window: Some(window), max_tokens: args.max_tokens, ..Options::default() };
    let reference = match &args.reference {
        Some(source) => {
            let other = inputs::open(app, source)?;
            engine::tokenizer(&other.artifact)?.check_same(&tokenizer)?;
            Some(engine::load_decoder(app, &other.artifact, "eval")?)
        }
        None => None,
    };
    let rounder = args.activations.rounder(&model.artifact)?;
    let decoder = engine::load_held(app, &model.artifact, &adapters, args.weights, "eval")?;
    let rounded = Rounded { model: &decoder, rounder: &rounder };
    let runs: &dyn CausalLm = if rounder.is_empty() { &decoder } else { &rounded };
    let reference = reference.as_ref().map_or(Reference::None, |other| Reference::Model(other));
    let found = measure(app, runs, ids, &options, reference, &args.model)
        .map_err(|failure| inputs::blame_weights(&model.artifact, failure))?;
    let mut facts = vec![
        ("perplexity", with_interval(&found)),
        ("nll", format!("{:.5} nats per token", found.nll)),
        ("tokens", number::count(found.tokens as u64)),
    ];
    if let Some(kl) = found.kl_to_reference {
        facts.push(("KL to reference", format!("{kl:.5} nats per token")));
    }
    if let Some(share) = found.top1_agreement {
        facts.push(("same top token", format!("{:.2} %", share * 100.0)));
    }
    if !rounder.is_empty() {
        facts.push(("activations", describe(&rounder)));
    }
    facts.push(("speed", format!("{:.0} tokens/s", found.tokens_per_second)));
    let json = json!({
        "perplexity": found.perplexity,
        "nll": found.nll,
        "tokens": found.tokens,
        "kl_to_reference": found.kl_to_reference,
        "tokens_per_second": found.tokens_per_second,
        "top1_agreement": found.top1_agreement,
        "top1_accuracy": found.top1_accuracy,
        "interval": found.interval.map(|i| [i.low, i.high]),
        "window": window,
        "activations": if rounder.is_empty() { None } else { Some(describe(&rounder)) },
        "text": texts.iter().map(|t| json!({"source": t.source, "sha256": t.sha256()})).collect::<Vec<_>>(),
    });
    Ok(Outcome::new(json, output::facts(facts)))
}

/// Says early, and with the numbers, what the evaluator would refuse.
pub fn check_window(
    texts: &[Text],
    tokens: usize,
    window: usize,
    context: Option<usize>,
) -> Result {
    if window < 2 {
        return Err(Failure::usage(format!(
            "--window {window}: at least 2 tokens are needed, since a window's first token is not scored"
        )));
    }
    if let Some(context) = context.filter(|context| window > *context) {
        return Err(Failure::usage(format!(
            "--window {window}: larger than the model's context of {context} tokens; use --window {context} or less"
        )));
    }
    if tokens < 2 {
        let names: Vec<&str> = texts.iter().map(|text| text.source.as_str()).collect();
        return Err(Failure::usage(format!(
            "{}: {tokens} tokens of text are too few to score; give a longer text",
            names.join(", ")
        )));
    }
    Ok(())
}

/// Scores `ids` with progress.
pub fn measure(
    app: &App,
    model: &dyn CausalLm,
    ids: Vec<u32>,
    options: &Options,
    reference: Reference,
    name: &str,
) -> Result<Perplexity> {
    let text = [Segment::new("text", ids)];
    let progress = |done: u64, total: u64| match done {
        0 => app.progress.begin(&format!("eval {name}"), total, "windows"),
        _ => app.progress.set(done, Some(total)),
    };
    let found = eval::perplexity(model, &text, options, reference, &progress);
    app.progress.end();
    Ok(found?)
}

fn with_interval(found: &Perplexity) -> String {
    let value = format!("{:.4}", found.perplexity);
    match found.interval {
        Some(i) => format!("{value} (95 %: {:.3} to {:.3})", i.low, i.high),
        None => value,
    }
}
