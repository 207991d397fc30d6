//! Memory of training a decoder of SmolLM2-135M's shape from scratch, in f32.
//!
//! ```text
//! cargo run --release -p refit-train --example train_memory -- [adamw|galore|galore8] [per-layer] [checkpoint] [layers=30] [batch=4] [seq=256] [steps=3]
//! ```
//! Prints one line of JSON: bytes of parameters, of optimizer state and of gradients at their peak, the process's peak memory over
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
            "gradients": trainer.gradient_bytes(), "resident_before": before,
            "peak": peak_memory().filter(|_| reset), "first_seconds": first,
            "seconds": seconds[seconds.len() / 2], "loss": loss,
        })
    );
    Ok(())
}
