//! Memory of training a decoder of SmolLM2-135M's shape from scratch, in f32.
//!
//! ```text
//! cargo run --release -p refit-train --example train_memory -- [adamw|galore|galore8] [per-layer] [checkpoint] [layers=30] [batch=4] [seq=256] [steps=3]
//! ```
//! Prints one line of JSON: bytes of parameters, of optimizer state (as measured, and as the formulas below say) and of gradients at
//! their peak, the process's peak memory over
//! the steps, and the median time of a step.

use refit_nn::scratch::DecoderShape;
use refit_nn::{BurnDevice as Device, Decoder, Run, Trainable};
use refit_train::BoxError;
use refit_train::measure::{peak_memory, reset_peak_memory, resident_memory};
use refit_train::train::loss::next_token;
use refit_train::train::{At, OptimizerConfig, Recipe, Terms, Trainer};

fn main() -> Result<(), BoxError> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let has = |word: &str| words.iter().any(|w| w == word);
    let number = |key: &str, default: usize| -> Result<usize, BoxError> {
        let found = words.iter().find_map(|w| w.strip_prefix(key)?.strip_prefix('='));
        Ok(found.map_or(Ok(default), str::parse)?)
    };
    let (layers, batch, seq) = (number("layers", 30)?, number("batch", 4)?, number("seq", 256)?);
    let shape = DecoderShape {
        hidden: 576,
        intermediate: 1536,
        layers,
        heads: 9,
        kv_heads: 3,
        vocab: 49152,
        context: seq,
        tied: true,
    };
    let mut recipe = Recipe::new(1000, 1e-3);
    recipe.clip = None;
    recipe.per_layer = has("per-layer");
    if has("galore") || has("galore8") {
        recipe.optimizer = OptimizerConfig::galore(128);
        if let OptimizerConfig::GaLore { eight_bit, .. } = &mut recipe.optimizer {
            *eight_bit = has("galore8");
        }
    }
    let model = shape.init(0, &Device::flex())?;
    let parameters: usize =
        model.parameters().iter().map(|p| 4 * p.shape.iter().product::<usize>()).sum();
    let formula: usize = model
        .parameters()
        .iter()
        .map(|p| {
            let target = p.shape.len() == 2 && ["attn", "mlp"].iter().any(|t| p.name.contains(t));
            match has("galore") || has("galore8") {
                true if target => galore_bytes(p.shape[0], p.shape[1], 128, has("galore8")),
                _ => moment_bytes(p.shape.iter().product(), has("galore8")) * 2,
            }
        })
        .sum();
    let mut trainer = Trainer::new(model, recipe)?;
    let checkpoint = has("checkpoint");
    let ids: Vec<u32> = (0..batch * seq).map(|i| (i * 7919 % 49152) as u32).collect();
    let objective = |model: &Decoder, _: At| -> Result<Terms, BoxError> {
        let mut run = Run { checkpoint, ..Run::plain() };
        let (loss, tokens) = next_token(model, &ids, batch, None, &mut run)?;
        Ok(Terms::one("ce", loss, tokens))
    };
    let before = resident_memory();
    let reset = reset_peak_memory();
    let mut seconds = Vec::new();
    let mut loss = 0.0;
    for _ in 0..number("steps", 3)? {
        let report = trainer.step(&objective)?;
        seconds.push(report.seconds);
        loss = report.loss;
    }
    let first = seconds[0];
    seconds.sort_by(f64::total_cmp);
    println!(
        "{}",
        serde_json::json!({
            "setting": words, "parameters": parameters, "state": trainer.state_bytes(),
            "state_by_formula": formula,
            "gradients": trainer.gradient_bytes(), "resident_before": before,
            "peak": peak_memory().filter(|_| reset), "first_seconds": first,
            "seconds": seconds[seconds.len() / 2], "loss": loss,
        })
    );
    Ok(())
}

/// One moment of Adam: four bytes an element; one byte, and a scale for every 256, in 8 bits (from 4096 elements on).
fn moment_bytes(elements: usize, eight_bit: bool) -> usize {
    match eight_bit && elements >= 4096 {
        true => elements + 4 * elements.div_ceil(256),
        false => 4 * elements,
    }
}

/// GaLore on `[m, n]`: the basis of the smaller extent in f32, `r min(m, n)`, and two moments of `r max(m, n)`.
fn galore_bytes(m: usize, n: usize, rank: usize, eight_bit: bool) -> usize {
    let rank = rank.min(m.min(n));
    4 * rank * m.min(n) + 2 * moment_bytes(rank * m.max(n), eight_bit)
}
