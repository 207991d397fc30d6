//! The bench of claims about images: small convolutional networks on Fashion-MNIST.

use std::path::Path;

use burn::tensor::{Tensor, TensorData};
use refit_data::Rng;
use refit_data::images::idx;
use refit_nn::scratch::CnnShape;
use refit_nn::vision::Cnn;
use refit_nn::{BurnDevice, Run, ops};
use refit_train::BoxError;
use refit_train::claim::ClaimContext;
use refit_train::train::loss::cross_entropy;
use refit_train::train::{At, Objective, Order, Recipe, RunOptions, Terms, Trainer};

use super::find;

/// The asset.
pub const FASHION_MNIST: &str = "deb:dataset-fashion-mnist";
/// Height and width.
pub const SIZE: usize = 28;
const PIXELS: usize = SIZE * SIZE;
/// Classes.
pub const CLASSES: usize = 10;
/// Mean and deviation of the training pixels.
const NORM: (f32, f32) = (0.2860, 0.3530);

/// Images and their classes.
#[derive(Clone, Debug, Default)]
pub struct Images {
    /// `[n, 28 * 28]`, from 0 to 1.
    pub pixels: Vec<f32>,
    /// One class each.
    pub labels: Vec<u32>,
}

impl Images {
    /// Number of images.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Pixels of one image.
    pub fn image(&self, i: usize) -> &[f32] {
        &self.pixels[i * PIXELS..(i + 1) * PIXELS]
    }

    /// Those at `indices`.
    pub fn select(&self, indices: impl IntoIterator<Item = usize>) -> Self {
        let mut chosen = Self::default();
        for i in indices {
            chosen.pixels.extend_from_slice(self.image(i));
            chosen.labels.push(self.labels[i]);
        }
        chosen
    }

    /// Each image changed by `change`.
    pub fn map(&self, mut change: impl FnMut(usize, &mut [f32])) -> Self {
        let mut changed = self.clone();
        for (i, image) in changed.pixels.chunks_exact_mut(PIXELS).enumerate() {
            change(i, image);
        }
        changed
    }
}

/// Training part in an order that a seed decides, and the test part.
///
/// # Errors
/// An asset that cannot be fetched or read.
pub fn fashion_mnist(cx: &ClaimContext) -> Result<(Images, Images), BoxError> {
    let root = cx.asset(FASHION_MNIST)?;
    let named = |path: &Path| {
        path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("train-images-idx3"))
    };
    let found = find(&root, &named)?;
    let dir =
        found.first().and_then(|path| path.parent()).ok_or("the package holds no IDX files")?;
    let read = |part: &str| -> Result<Images, BoxError> {
        let read = idx::read_labelled(dir, part)?;
        Ok(Images {
            pixels: read.pixels.iter().map(|p| f32::from(*p) / 255.0).collect(),
            labels: read.labels.iter().map(|label| u32::from(*label)).collect(),
        })
    };
    let train = read("train")?;
    let mut order: Vec<usize> = (0..train.len()).collect();
    Rng::named(0, "fashion-mnist").shuffle(&mut order);
    Ok((train.select(order), read("t10k")?))
}

/// What is done to a training image, fixed by seed, epoch and index.
#[derive(Clone, Copy, Debug, Default)]
pub struct Augment {
    /// Largest shift in pixels.
    pub shift: usize,
    /// Mirror half of the images.
    pub flip: bool,
    /// Side of a square that is blanked; 0 for none.
    pub erase: usize,
}

impl Augment {
    fn apply(self, image: &[f32], out: &mut [f32], rng: &mut Rng) {
        let reach = 2 * self.shift + 1;
        let (dy, dx) = (rng.below(reach) as isize, rng.below(reach) as isize);
        let (dy, dx) = (dy - self.shift as isize, dx - self.shift as isize);
        let flip = self.flip && rng.below(2) == 1;
        for y in 0..SIZE {
            for x in 0..SIZE {
                let from_x = if flip { SIZE - 1 - x } else { x } as isize - dx;
                let from_y = y as isize - dy;
                let size = SIZE as isize;
                let inside = (0..size).contains(&from_x) && (0..size).contains(&from_y);
                out[y * SIZE + x] =
                    if inside { image[(from_y * size + from_x) as usize] } else { 0.0 };
            }
        }
        if self.erase > 0 {
            let (top, left) = (rng.below(SIZE - self.erase), rng.below(SIZE - self.erase));
            for row in out.chunks_exact_mut(SIZE).skip(top).take(self.erase) {
                row[left..left + self.erase].fill(0.0);
            }
        }
    }
}

/// One training run.
#[derive(Clone, Debug)]
pub struct Fit {
    /// Everything but the data.
    pub recipe: Recipe,
    /// Images per step.
    pub batch: usize,
    /// Share of the target that goes to all classes.
    pub smoothing: f32,
    /// Changes of the images.
    pub augment: Augment,
    /// Share of the last features that is dropped.
    pub dropout: f32,
}

impl Fit {
    fn objective<'a>(&self, images: &'a Images) -> impl Objective<Cnn> + use<'a> {
        let Self { batch, smoothing, augment, dropout, .. } = *self;
        let seed = self.recipe.seed;
        let order = Order::new(seed, images.len());
        let device = BurnDevice::flex().autodiff();
        move |model: &Cnn, at: At| -> Result<Terms, BoxError> {
            let mut rng = Rng::named(seed, &format!("augment {}", at.batch));
            let chosen = order.batch(at.batch, batch);
            let mut pixels = vec![0.0; batch * PIXELS];
            for (out, &i) in pixels.chunks_exact_mut(PIXELS).zip(&chosen) {
                augment.apply(images.image(i), out, &mut rng);
            }
            let labels: Vec<Option<u32>> = chosen.iter().map(|&i| Some(images.labels[i])).collect();
            let mut features = model.features(tensor(pixels, &device))?;
            if dropout > 0.0 {
                let keep = 1.0 / (1.0 - dropout);
                let mask: Vec<f32> = (0..features.shape().num_elements())
                    .map(|_| if (rng.uniform() as f32) < dropout { 0.0 } else { keep })
                    .collect();
                features = features.clone()
                    * Tensor::from_data(TensorData::new(mask, features.dims()), &device);
            }
            let [rows, width] = features.dims();
            let x = features.reshape([1, rows, width]);
            let logits = model.classifier.forward(x, &mut Run::plain()).reshape([rows, CLASSES]);
            let loss = ops::logit_loss(logits, &cross_entropy(&labels, smoothing));
            Ok(Terms::one("cross-entropy", loss, batch))
        }
    }

    /// Trains `model` on `images`.
    ///
    /// # Errors
    /// As [`Trainer::run`].
    pub fn run(&self, model: Cnn, images: &Images) -> Result<Cnn, BoxError> {
        let mut trainer = Trainer::new(model, self.recipe.clone())?;
        trainer.run(&self.objective(images), RunOptions::default())?;
        Ok(trainer.into_model())
    }
}

fn tensor(mut pixels: Vec<f32>, device: &BurnDevice) -> Tensor<4> {
    pixels.iter_mut().for_each(|p| *p = (*p - NORM.0) / NORM.1);
    let batch = pixels.len() / PIXELS;
    Tensor::from_data(TensorData::new(pixels, [batch, 1, SIZE, SIZE]), device)
}

/// Images as a network takes them.
pub fn input(images: &Images, device: &BurnDevice) -> Tensor<4> {
    tensor(images.pixels.clone(), device)
}

/// A fresh network.
///
/// # Errors
/// Shapes that cannot be.
pub fn cnn(channels: &[usize], seed: u64) -> Result<Cnn, BoxError> {
    let shape = CnnShape { channels: channels.to_vec(), convs: 1, ..CnnShape::default() };
    Ok(shape.init(seed, &BurnDevice::flex())?)
}

/// Logits of all images, `[n, classes]`.
///
/// # Errors
/// Images of another size.
pub fn logits(model: &Cnn, images: &Images) -> Result<Vec<f32>, BoxError> {
    let mut all = Vec::with_capacity(images.len() * CLASSES);
    for pixels in images.pixels.chunks(256 * PIXELS) {
        let x = tensor(pixels.to_vec(), &BurnDevice::flex());
        all.extend(ops::to_vec(&model.forward(x, &mut Run::plain())?));
    }
    Ok(all)
}

/// Which images the logits are right about.
pub fn correct(logits: &[f32], labels: &[u32]) -> Vec<bool> {
    let best = |row: &[f32]| {
        let top = row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
        top.map_or(0, |(class, _)| class as u32)
    };
    logits.chunks_exact(CLASSES).zip(labels).map(|(row, label)| best(row) == *label).collect()
}

/// Share of `images` that `model` names right, in percent.
///
/// # Errors
/// Images of another size.
pub fn accuracy(model: &Cnn, images: &Images) -> Result<f64, BoxError> {
    let right = correct(&logits(model, images)?, &images.labels);
    Ok(100.0 * right.iter().filter(|right| **right).count() as f64 / right.len().max(1) as f64)
}
