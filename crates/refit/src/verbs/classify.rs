//! `refit classify MODEL IMAGE...`: the likeliest classes of images; with `--labelled`, how often they are right.

use std::path::PathBuf;

use burn::tensor::{Tensor, TensorData, activation::softmax};
use refit_data::images::{Preprocess, decode_image};
use refit_nn::{BurnDevice, Model, Run, vision::Vision};
use refit_store::Artifact;
use refit_train::eval;
use refit_train::stats;
use serde_json::{Value, json};

use crate::cli::App;
use crate::engine;
use crate::failure::{Failure, Result};
use crate::inputs;
use crate::labelled::Labelled;
use crate::output::{self, Outcome, Table};
use crate::report::number;

/// Say what is in images: class, label where the model has one, probability
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The image model
    model: String,
    /// PNG, JPEG or BMP files
    #[arg(required_unless_present = "labelled", conflicts_with = "labelled", value_name = "IMAGE")]
    images: Vec<PathBuf>,
    /// How many classes to print
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    top: u16,
    /// Measure accuracy on labelled images instead: a folder with one folder per class, or with an IDX pair
    /// (`NAME-images-idx3-ubyte`, `NAME-labels-idx1-ubyte`, gzip or not), or the images' file of a pair
    #[arg(long, value_name = "DIR")]
    labelled: Option<String>,
}

/// Images per forward pass.
const BATCH: usize = 16;

/// Pixels as the model takes them: values, height, width.
type Pixels = (Vec<f32>, usize, usize);

/// An image model, ready.
struct Classifier<'a> {
    artifact: &'a Artifact,
    model: Vision,
    device: BurnDevice,
}

/// Classifies every image.
pub fn run(app: &App, args: Args) -> Result<Outcome> {
    let opened = inputs::open(app, &args.model)?;
    inputs::check_kind(&opened.artifact, "classify")?;
    let preprocess = Preprocess::from_artifact(&opened.artifact)?;
    let labels = labels(&opened.artifact);
    if let Some(source) = &args.labelled {
        let data = Labelled::open(app, source, &labels)?;
        let classifier = Classifier::load(app, &opened.artifact)?;
        return accuracy(app, &classifier, &preprocess, &data);
    }
    // Every image is decoded before the model is loaded: a wrong file is said at once.
    let pixels = args
        .images
        .iter()
        .map(|path| Ok(preprocess.apply(&decode_image(path)?)?))
        .collect::<Result<Vec<_>>>()?;
    let classifier = Classifier::load(app, &opened.artifact)?;
    let label = |class: usize| labels.get(class).and_then(Option::as_deref);
    let (mut text, mut results) = (String::new(), Vec::new());
    for (path, pixels) in args.images.iter().zip(pixels) {
        let (probabilities, _) =
            classifier.probabilities(vec![pixels], &|_| path.display().to_string())?;
        let mut order: Vec<usize> = (0..probabilities.len()).collect();
        order.sort_by(|&a, &b| probabilities[b].total_cmp(&probabilities[a]).then(a.cmp(&b)));
        order.truncate(usize::from(args.top));
        let mut table = Table::new(2, &["class", "label", "probability"]);
        for &class in &order {
            table.row([
                class.to_string(),
                label(class).unwrap_or("–").to_owned(),
                format!("{:.2} %", probabilities[class] * 100.0),
            ]);
        }
        text.push_str(&format!("{}\n{table}\n", path.display()));
        results.push(json!({
            "image": path,
            "classes": order.iter().map(|&class| json!({
                "class": class,
                "label": label(class),
                "probability": probabilities[class],
            })).collect::<Vec<_>>(),
        }));
    }
    Ok(Outcome::new(json!({"results": results}), text))
}

/// The share of images whose likeliest class is their own, with its 95 % Wilson interval.
fn accuracy(
    app: &App,
    classifier: &Classifier,
    preprocess: &Preprocess,
    data: &Labelled,
) -> Result<Outcome> {
    let count = data.len();
    let mut right = 0;
    app.progress.begin("classifying", count as u64, "images");
    for from in (0..count).step_by(BATCH) {
        let items = from..count.min(from + BATCH);
        let (mut batch, mut labels) = (Vec::new(), Vec::new());
        for i in items {
            let (image, label) = data.load(i)?;
            batch.push(preprocess.apply(&image)?);
            labels.push(label);
        }
        let (scores, classes) = classifier.probabilities(batch, &|i| data.name(from + i))?;
        if let Some(i) = labels.iter().position(|&label| label >= classes) {
            return Err(Failure::usage(format!(
                "{}: its label is {}, but the model has {classes} classes, numbered from 0",
                data.name(from + i),
                labels[i]
            )));
        }
        let found = eval::accuracy(&scores, classes, &labels)?;
        right += found.correct.iter().filter(|correct| **correct).count();
        app.progress.advance(labels.len() as u64);
    }
    app.progress.end();
    let interval = stats::wilson_interval(right as u64, count as u64, 0.95)
        .ok_or_else(|| Failure::usage("there are no labelled images"))?;
    let percent = |share: f64| format!("{:.2}", share * 100.0);
    let text = output::facts([
        (
            "accuracy",
            format!(
                "{} % (95 %: {} to {})",
                percent(interval.estimate),
                percent(interval.low),
                percent(interval.high)
            ),
        ),
        ("images", number::count(count as u64)),
    ]);
    let json = json!({
        "accuracy": interval.estimate,
        "interval": [interval.low, interval.high],
        "n": count,
    });
    Ok(Outcome::new(json, text))
}

/// Names of the classes by number, as far as the config has them.
fn labels(artifact: &Artifact) -> Vec<Option<String>> {
    let named = artifact.config().raw().get("id2label").and_then(Value::as_object);
    let named: Vec<(usize, String)> = named
        .into_iter()
        .flatten()
        .filter_map(|(class, label)| Some((class.parse().ok()?, label.as_str()?.to_owned())))
        .filter(|(class, _)| *class < 1 << 20)
        .collect();
    let count = named.iter().map(|(class, _)| class + 1).max().unwrap_or(0);
    let mut labels = vec![None; count];
    for (class, label) in named {
        labels[class] = Some(label);
    }
    labels
}

impl<'a> Classifier<'a> {
    fn load(app: &App, artifact: &'a Artifact) -> Result<Self> {
        match engine::load(app, artifact)? {
            Model::Vision(model) => Ok(Self { artifact, model, device: engine::device(app)? }),
            _ => Err(engine::wrong_kind(artifact, "classify", "no image model", "refit inspect")),
        }
    }

    /// Probabilities of the classes, `images × classes`, and the number of classes. Images of one batch have
    /// one size, since the same preprocessing made them.
    fn probabilities(
        &self,
        images: Vec<Pixels>,
        name: &dyn Fn(usize) -> String,
    ) -> Result<(Vec<f32>, usize)> {
        let (count, height, width) = match images.first() {
            Some((_, height, width)) => (images.len(), *height, *width),
            None => return Ok((Vec::new(), 0)),
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
        let logits = self.model.forward(image, &mut Run::plain())?;
        let classes = logits.dims()[1];
        let scores = softmax(logits, 1).into_data().convert::<f32>();
        let scores = scores
            .try_to_vec::<f32>()
            .map_err(|e| Failure::system(format!("{}: cannot read the scores: {e:?}", name(0))))?;
        if let Some(at) = scores.iter().position(|p| !p.is_finite()) {
            let problem = format!("the scores for {} are not finite", name(at / classes.max(1)));
            return Err(inputs::blame_weights(self.artifact, Failure::usage(problem)));
        }
        Ok((scores, classes))
    }
}
