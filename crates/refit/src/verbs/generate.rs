//! `refit generate MODEL --prompt TEXT`: continues a text.

use std::io::Write;

use refit_data::Message;
use refit_nn::generate::{self, Options};
use serde_json::json;

use crate::cli::App;
use crate::engine::{self, Held};
use crate::failure::{Failure, Result};
use crate::inputs;
use crate::output::Outcome;

/// Continue a prompt
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The language model
    model: String,
    /// Adapters to put on the model, in this order
    #[arg(long, value_name = "ADAPTER", num_args = 1..)]
    adapter: Vec<String>,
    /// What to continue
    #[arg(long, short)]
    prompt: String,
    /// Put the prompt into the model's chat template as a user's message
    #[arg(long)]
    chat: bool,
    /// System message, with --chat
    #[arg(long, requires = "chat")]
    system: Option<String>,
    /// Most tokens to generate
    #[arg(long, default_value_t = 128, value_name = "N")]
    max_new_tokens: usize,
    /// 0 always takes the likeliest token
    #[arg(long, default_value_t = 0.0, value_parser = not_negative)]
    temperature: f32,
    /// Sample among the K likeliest tokens; 0 means all
    #[arg(long, default_value_t = 0, value_name = "K")]
    top_k: usize,
    /// Sample among the likeliest tokens that together hold this probability
    #[arg(long, default_value_t = 1.0, value_parser = probability)]
    top_p: f32,
    /// Seed of the sampler
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Go on after an end-of-text token
    #[arg(long)]
    ignore_eos: bool,
    /// How quantized weights are held in memory [default: packed; f32 with adapters]
    #[arg(long, value_enum, value_name = "HOW")]
    weights: Option<Held>,
}

fn not_negative(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(value) if value >= 0.0 && value.is_finite() => Ok(value),
        _ => Err("expected a number that is 0 or more".to_owned()),
    }
}

fn probability(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(value) if value > 0.0 && value <= 1.0 => Ok(value),
        _ => Err("expected a number above 0 and at most 1".to_owned()),
    }
}

/// Generates; text streams to a reader of standard output as it comes.
pub fn run(app: &App, args: Args) -> Result<Outcome> {
    let model = inputs::open(app, &args.model)?;
    inputs::check_kind(&model.artifact, "generate")?;
    let adapters = engine::adapters(app, &args.adapter)?;
    let tokenizer = engine::tokenizer(&model.artifact)?;
    let ids = if args.chat {
        let mut messages = Vec::new();
        if let Some(system) = &args.system {
            messages.push(Message::new("system", system.as_str()));
        }
        messages.push(Message::new("user", args.prompt.as_str()));
        // The template writes special tokens itself.
        tokenizer.encode(&tokenizer.render_chat(&messages, true)?, false)?
    } else {
        tokenizer.encode(&args.prompt, true)?
    };
    if ids.is_empty() {
        return Err(Failure::usage("--prompt: the prompt has no tokens; give at least one word"));
    }
    let held = args.weights.unwrap_or(match adapters.is_empty() {
        true => Held::Packed,
        false => Held::F32,
    });
    let decoder = engine::load_held(app, &model.artifact, &adapters, held, "generate")?;
    let options = Options {
        max_new_tokens: args.max_new_tokens,
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        seed: args.seed,
        stop: if args.ignore_eos { Vec::new() } else { tokenizer.special().eos.clone() },
    };
    let stream_out = !app.global.json;
    let mut stream = tokenizer.stream(true);
    let mut text = String::new();
    let mut trouble = None;
    let show = |piece: &str, text: &mut String| {
        text.push_str(piece);
        if stream_out {
            let mut out = std::io::stdout().lock();
            // A closed pipe ends the stream, not the program.
            return out.write_all(piece.as_bytes()).and_then(|()| out.flush()).is_ok();
        }
        true
    };
    let done = generate::generate(&decoder, &ids, &options, |id| match stream.push(id) {
        Ok(piece) => show(&piece, &mut text),
        Err(error) => {
            trouble = Some(error);
            false
        }
    })
    .map_err(|error| inputs::blame_weights(&model.artifact, error.into()))?;
    if let Some(error) = trouble {
        return Err(error.into());
    }
    let open = show(&stream.finish()?, &mut text);
    if stream_out {
        if open {
            // As above: a reader that has seen enough is no error.
            let _ = writeln!(std::io::stdout());
        }
        app.progress.note(&format!(
            "{} tokens, {:.1} tokens/s, first after {:.2} s",
            done.tokens.len(),
            done.tokens_per_second,
            done.first_token_seconds
        ));
    }
    let json = json!({
        "text": text,
        "tokens": done.tokens,
        "tokens_per_second": done.tokens_per_second,
        "time_to_first_token": done.first_token_seconds,
        "prompt_tokens": ids.len(),
        "stopped": done.stopped,
        "packed_matrices": decoder.packed().0,
    });
    Ok(Outcome::new(json, ""))
}
