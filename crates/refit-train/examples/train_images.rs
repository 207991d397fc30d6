//! Images per second of full train steps of a small image classifier from scratch, with AdamW, in f32.
//!
//! ```text
//! RAYON_NUM_THREADS=2 cargo run --release -p refit-train --example train_images -- [MODEL] [STEPS] [BATCH]
//! ```
//! MODEL is `cnn` (3 x 3 convolutions of 32, 64 and 128 channels), `cnn2` (two of each), `separable` (depthwise and pointwise) or
//! `vit` (width 192, 6 blocks, 50 tokens). Synthetic images of the shape of Fashion-MNIST; the shapes are those of
//! `benches/peers/train_images_torch.py`. Prints one line of JSON.

use burn::tensor::{Tensor, TensorData};
use refit_nn::scratch::{CnnShape, VitShape};
use refit_nn::vision::Vision;
use refit_nn::{BurnDevice as Device, Run, ops};
use refit_train::BoxError;
use refit_train::train::loss::cross_entropy;
use refit_train::train::{At, Recipe, Terms, Trainer};

const SIZE: usize = 28;
const CLASSES: usize = 10;

fn main() -> Result<(), BoxError> {
    let mut args = std::env::args().skip(1);
    let model = args.next().unwrap_or_else(|| "cnn".into());
    let mut next = |default| args.next().map_or(Ok(default), |a| a.parse::<usize>());
    let (steps, batch) = (next(30)?, next(64)?);
    let device = Device::flex();
    let cnn = CnnShape { convs: 1, ..CnnShape::default() };
    let model = match model.as_str() {
        "cnn" => Vision::Cnn(cnn.init(0, &device)?),
        "cnn2" => Vision::Cnn(CnnShape { convs: 2, ..cnn }.init(0, &device)?),
        "separable" => Vision::Cnn(CnnShape { convs: 2, separable: true, ..cnn }.init(0, &device)?),
        "vit" => Vision::Vit(VitShape::default().init(0, &device)?),
        other => return Err(format!("unknown model `{other}`: cnn, cnn2, separable, vit").into()),
    };
    // Each class has a wave of its own, so that there is something to learn.
    let pixel = |i: usize| {
        let (image, at) = (i / (SIZE * SIZE), i % (SIZE * SIZE));
        let (class, noise) = (image % CLASSES, (i * 7919 % 1009) as f32 / 1009.0 - 0.5);
        ((class + 1) as f32 * 0.05 * (at / SIZE) as f32 + 0.3 * (at % SIZE) as f32).sin() + noise
    };
    let pixels: Vec<f32> = (0..batch * SIZE * SIZE).map(pixel).collect();
    let labels: Vec<Option<u32>> = (0..batch).map(|i| Some((i % CLASSES) as u32)).collect();
    let mut trainer = Trainer::new(model, Recipe::new(1000, 1e-3))?;
    let device = device.autodiff();
    let objective = |model: &Vision, _: At| -> Result<Terms, BoxError> {
        let data = TensorData::new(pixels.clone(), [batch, 1, SIZE, SIZE]);
        let logits = model.forward(Tensor::from_data(data, &device), &mut Run::plain())?;
        let loss = ops::logit_loss(logits, &cross_entropy(&labels, 0.0));
        Ok(Terms::one("ce", loss, batch))
    };
    let mut seconds = Vec::new();
    let mut loss = (0.0, 0.0);
    for i in 0..steps.max(4) {
        let report = trainer.step(&objective)?;
        if i == 0 {
            loss.0 = report.loss;
        }
        loss.1 = report.loss;
        seconds.push(report.seconds);
    }
    let mut timed = seconds.split_off(3);
    timed.sort_by(f64::total_cmp);
    let median = timed[timed.len() / 2];
    println!(
        "{}",
        serde_json::json!({
            "images_per_second": batch as f64 / median, "seconds": median, "fastest": timed[0],
            "first_loss": loss.0, "last_loss": loss.1,
        })
    );
    Ok(())
}
