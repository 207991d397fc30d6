//! A small pre-norm ViT on Fashion-MNIST, trained from scratch and kept as an artifact, for claims about methods that read one.

use std::path::{Path, PathBuf};

use refit_data::Rng;
use refit_nn::rounding::Rounder;
use refit_nn::scratch::VitShape;
use refit_nn::vision::Vision;
use refit_nn::{BurnDevice, Run, Trainable, ops};
use refit_store::writer::ArtifactWriter;
use refit_store::{Artifact, Card, DType, Lineage, SideFile, TensorSpec, WritePlan};
use refit_train::BoxError;
use refit_train::train::loss::cross_entropy;
use refit_train::train::{At, Order, Recipe, RunOptions, Terms, Trainer};
use serde_json::json;

use super::images::{CLASSES, Images, correct, input};

/// Images per step.
const BATCH: usize = 128;
/// Peak learning rate of AdamW.
const RATE: f64 = 1e-3;

/// 16 patches of 7 x 7 pixels, 4 blocks of width 64.
pub fn shape() -> VitShape {
    VitShape { patch: 7, hidden: 64, intermediate: 256, layers: 4, heads: 4, ..VitShape::default() }
}

/// Trains one.
///
/// # Errors
/// As [`Trainer::run`].
pub fn train(images: &Images, steps: u64, seed: u64) -> Result<Vision, BoxError> {
    let model = Vision::Vit(shape().init(seed, &BurnDevice::flex())?);
    let mut trainer = Trainer::new(model, Recipe { seed, ..Recipe::new(steps, RATE) })?;
    let order = Order::new(seed, images.len());
    let device = BurnDevice::flex().autodiff();
    let objective = |model: &Vision, at: At| -> Result<Terms, BoxError> {
        let batch = images.select(order.batch(at.batch, BATCH));
        let labels: Vec<Option<u32>> = batch.labels.iter().copied().map(Some).collect();
        let logits = model.forward(input(&batch, &device), &mut Run::plain())?;
        let loss = ops::logit_loss(logits, &cross_entropy(&labels, 0.0));
        Ok(Terms::one("cross-entropy", loss, BATCH))
    };
    trainer.run(&objective, RunOptions::default())?;
    Ok(trainer.into_model())
}

/// Writes a ViT as transformers would, with the preprocessing of Fashion-MNIST.
///
/// # Errors
/// Whatever the disk refuses.
pub fn save(model: &Vision, out: &Path) -> Result<PathBuf, BoxError> {
    let specs = model.parameters().into_iter().map(|parameter| TensorSpec {
        name: parameter.name,
        shape: parameter.shape,
        dtype: DType::F32,
    });
    let preprocessing = json!({
        "do_resize": false, "do_rescale": true, "rescale_factor": 1.0 / 255.0, "do_normalize": true,
        "image_mean": [0.2860], "image_std": [0.3530],
    });
    let plan = WritePlan {
        tensors: specs.collect(),
        side_files: vec![
            SideFile::from_bytes("config.json", shape().to_config_json().to_string().into_bytes()),
            SideFile::from_bytes(
                "preprocessor_config.json",
                preprocessing.to_string().into_bytes(),
            ),
        ],
        identity: "a ViT trained from scratch".into(),
        force: true,
        ..WritePlan::default()
    };
    let writer = ArtifactWriter::create(out, plan)?;
    let mut written = Ok(());
    let _ = refit_nn::named::edit(model.clone(), |name, _, read| {
        if written.is_ok() {
            written = writer.write_f32(name, 0, &read()).and_then(|()| writer.done(name));
        }
        None
    });
    written?;
    Ok(writer.finish(Lineage::new("train", json!({})), Card::new("vit"))?)
}

/// Scales the channels of every norm in front of linears by lognormal factors, and the linears' columns by their inverse: the
/// same function, with the spread of channels that large models have.
pub fn spread(model: &Vision, deviation: f64, seed: u64) -> Vision {
    let mut rng = Rng::named(seed, "spread");
    let mut model = model.clone();
    let Vision::Vit(vit) = &mut model else { return model };
    for block in &mut vit.blocks {
        let mut factors = || -> Vec<f32> {
            (0..shape().hidden).map(|_| (deviation * rng.normal()).exp() as f32).collect()
        };
        let (mixer, ffn) = (factors(), factors());
        for (norm, factors) in [(&mut block.mixer_norm, &mixer), (&mut block.ffn_norm, &ffn)] {
            let device = norm.weight.val().device();
            let scale = |values: Vec<f32>| -> Vec<f32> {
                values.iter().zip(factors).map(|(value, factor)| value * factor).collect()
            };
            let weight = scale(ops::to_vec(&norm.weight.val()));
            norm.weight = crate::blockwise::vector(weight, &device);
            if let Some(bias) = &mut norm.bias {
                let values = scale(ops::to_vec(&bias.val()));
                *bias = crate::blockwise::vector(values, &device);
            }
        }
        for linear in block.linears_mut() {
            let site = linear.site.as_str();
            let factors = match site {
                _ if site.contains("attention.attention") => &mixer,
                _ if site.ends_with("intermediate.dense") => &ffn,
                _ => continue,
            };
            let device = linear.weight().device();
            let mut weights = ops::to_vec(&linear.weight());
            for row in weights.chunks_mut(factors.len()) {
                row.iter_mut().zip(factors).for_each(|(w, factor)| *w /= factor);
            }
            linear.set_weight(weights, &device);
        }
    }
    model
}

/// Share of `images` that a saved ViT names right, in percent, with activations rounded.
///
/// # Errors
/// A model that cannot be opened.
pub fn accuracy(path: &Path, rounder: &Rounder, images: &Images) -> Result<f64, BoxError> {
    accuracy_of(&Vision::load(&Artifact::open(path)?, &BurnDevice::flex())?, rounder, images)
}

/// [`accuracy`] of a model in memory.
///
/// # Errors
/// Images of another size.
pub fn accuracy_of(model: &Vision, rounder: &Rounder, images: &Images) -> Result<f64, BoxError> {
    let device = BurnDevice::flex();
    let mut logits = Vec::with_capacity(images.len() * CLASSES);
    for from in (0..images.len()).step_by(BATCH) {
        let batch = images.select(from..(from + BATCH).min(images.len()));
        let mut tap = rounder;
        logits.extend(ops::to_vec(
            &model.forward(input(&batch, &device), &mut Run::tapped(&mut tap))?,
        ));
    }
    let right = correct(&logits, &images.labels);
    Ok(100.0 * right.iter().filter(|right| **right).count() as f64 / right.len().max(1) as f64)
}
