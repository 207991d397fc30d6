//! Images: decoded, preprocessed as the model expects, classified.

use burn::tensor::{Tensor, TensorData};
use refit_data::images::{Preprocess, decode_image};
use refit_methods::labelled::{Labelled, Part, class_names};
use refit_methods::quantize::activations;
use refit_nn::rounding::Rounder;
use refit_nn::vision::Vision;
use refit_nn::{BurnDevice, Model, Run, ops};
use refit_store::Artifact;

use super::{Args, BATCH, Scored, accuracy, check_finite, listing};
use crate::cli::App;
use crate::engine;
use crate::failure::{Failure, Result};
use crate::labelled;
use crate::output::Outcome;

/// Pixels as the model takes them: values, height, width.
type Pixels = (Vec<f32>, usize, usize);

/// An image model, ready.
struct Classifier<'a> {
    artifact: &'a Artifact,
    model: Vision,
    /// Activations are rounded as the model says.
    rounder: Rounder,
    device: BurnDevice,
}

/// Classifies images, or measures accuracy on labelled ones.
pub fn run(app: &App, artifact: &Artifact, args: &Args) -> Result<Outcome> {
    let preprocess = Preprocess::from_artifact(artifact)?;
    if let Some(source) = &args.labelled {
        let data = labelled::open(app, source, Part::HeldOut)?;
        if let Labelled::Table(records) = &data {
            let path = records.path().display();
            return Err(Failure::usage(format!(
                "{path}: a table holds texts, and this model classifies images; give a folder per class, or an IDX pair"
            )));
        }
        let classes = data.image_classes(&class_names(artifact))?;
        let classifier = Classifier::load(app, artifact)?;
        return accuracy(app, "images", &classes, &|i| data.name(i), |items| {
            let first = items.start;
            let images = items.map(|i| Ok(preprocess.apply(&data.image(i)?)?));
            classifier.scores(images.collect::<Result<_>>()?, &|i| data.name(first + i))
        });
    }
    // Every image is decoded before the model is loaded: a wrong file is said at once.
    let pixels = args.images.iter().map(|path| Ok(preprocess.apply(&decode_image(path)?)?));
    let pixels = pixels.collect::<Result<Vec<Pixels>>>()?;
    let classifier = Classifier::load(app, artifact)?;
    let shown: Vec<String> = args.images.iter().map(|path| path.display().to_string()).collect();
    let mut all = Scored { logits: Vec::new(), classes: 0 };
    for (batch, names) in pixels.chunks(BATCH).zip(shown.chunks(BATCH)) {
        // Images of their own sizes go one by one where the model takes them.
        let sizes: Vec<(usize, usize)> = batch.iter().map(|(_, h, w)| (*h, *w)).collect();
        let step = if sizes.iter().all(|size| *size == sizes[0]) { batch.len() } else { 1 };
        for (batch, names) in batch.chunks(step).zip(names.chunks(step)) {
            let found = classifier.scores(batch.to_vec(), &|i| names[i].clone())?;
            all.logits.extend(found.logits);
            all.classes = found.classes;
        }
    }
    Ok(listing(artifact, &all, "image", &shown, args.top))
}

impl<'a> Classifier<'a> {
    fn load(app: &App, artifact: &'a Artifact) -> Result<Self> {
        match engine::load(app, artifact)? {
            Model::Vision(model) => {
                let rounder = activations::stated(artifact)?;
                if !rounder.is_empty() {
                    let what = crate::verbs::eval::describe(&rounder);
                    app.progress.note(&format!("activations: {what}, as the model states"));
                }
                Ok(Self { artifact, model, rounder, device: engine::device(app)? })
            }
            _ => Err(engine::wrong_kind(artifact, "classify", "no image model", "refit inspect")),
        }
    }

    /// Logits of the classes. Images of one batch have one size, since the same preprocessing made them.
    fn scores(&self, images: Vec<Pixels>, name: &dyn Fn(usize) -> String) -> Result<Scored> {
        let (count, height, width) = match images.first() {
            Some((_, height, width)) => (images.len(), *height, *width),
            None => return Ok(Scored { logits: Vec::new(), classes: 0 }),
        };
        if let Some(i) = images.iter().position(|(_, h, w)| (*h, *w) != (height, width)) {
            return Err(Failure::usage(format!(
                "{}: after preprocessing it is {} x {} pixels, others are {height} x {width}; the model's \
                 preprocessor_config.json should crop to one size",
                name(i),
                images[i].1,
                images[i].2
            )));
        }
        let values: Vec<f32> = images.into_iter().flat_map(|(values, ..)| values).collect();
        let channels = values.len() / (count * height * width).max(1);
        let data = TensorData::new(values, [count, channels, height, width]);
        let image = Tensor::<4>::from_data(data, &self.device);
        let mut tap = &self.rounder;
        let mut run = match self.rounder.is_empty() {
            true => Run::plain(),
            false => Run::tapped(&mut tap),
        };
        let logits = self.model.forward(image, &mut run)?;
        let classes = logits.dims()[1];
        check_finite(self.artifact, Scored { logits: ops::to_vec(&logits), classes }, name)
    }
}
