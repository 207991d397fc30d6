//! Time of one train step of a decoder from scratch, with AdamW.
//!
//! ```text
//! RAYON_NUM_THREADS=2 cargo run --release -p refit-train --example train_step -- [STEPS] [BATCH] [SEQ] [f32|bf16]
//! ```
//! The shape is that of `benches/peers/train_torch.py`: 6 blocks, width 256, MLP 768, vocabulary 4096. Prints one line of JSON.

use refit_nn::ops::Precision;
use refit_nn::scratch::DecoderShape;
use refit_nn::{BurnDevice as Device, Decoder, Run};
use refit_train::BoxError;
use refit_train::train::loss::next_token;
use refit_train::train::{At, Recipe, Terms, Trainer};

fn main() -> Result<(), BoxError> {
    let mut words: Vec<String> = std::env::args().skip(1).collect();
    let precision = match words.last().map(String::as_str) {
        Some("bf16") => Precision::Bf16,
        _ => Precision::F32,
    };
    words.retain(|word| word != "bf16" && word != "f32");
    let mut numbers = words.iter().map(|a| a.parse::<usize>());
    let mut next = |default| numbers.next().unwrap_or(Ok(default));
    let (steps, batch, seq) = (next(15)?, next(8)?, next(128)?);
    let shape = DecoderShape {
        hidden: 256,
        intermediate: 768,
        layers: 6,
        heads: 8,
        kv_heads: 8,
        vocab: 4096,
        context: seq,
        tied: false,
    };
    let mut trainer = Trainer::new(shape.init(0, &Device::flex())?, Recipe::new(1000, 1e-3))?;
    let ids: Vec<u32> = (0..batch * seq).map(|i| (i * 7919 % 4096) as u32).collect();
    let objective = |model: &Decoder, _: At| -> Result<Terms, BoxError> {
        let mut run = Run { precision, ..Run::plain() };
        let (loss, tokens) = next_token(model, &ids, batch, None, &mut run)?;
        Ok(Terms::one("ce", loss, tokens))
    };
    let mut seconds = Vec::new();
    let mut loss = (0.0, 0.0);
    for i in 0..steps.max(3) {
        let report = trainer.step(&objective)?;
        if i == 0 {
            loss.0 = report.loss;
        }
        loss.1 = report.loss;
        seconds.push(report.seconds);
    }
    let mut timed = seconds.split_off(2);
    timed.sort_by(f64::total_cmp);
    let median = timed[timed.len() / 2];
    println!(
        "{}",
        serde_json::json!({
            "seconds": median, "fastest": timed[0], "tokens_per_second": (batch * seq) as f64 / median,
            "first_loss": loss.0, "last_loss": loss.1,
        })
    );
    Ok(())
}
