//! `refit classify MODEL IMAGE...`, `refit classify MODEL --text FILE`: the likeliest classes of images or texts; with
//! `--labelled`, how often they are right.

mod images;
mod texts;

use std::path::PathBuf;

use refit_methods::labelled::class_names;
use refit_store::Artifact;
use refit_store::architecture::Kind;
use refit_train::{eval, stats};
use serde_json::{Value, json};

use crate::cli::App;
use crate::failure::{Failure, Result};
use crate::inputs;
use crate::output::{self, Outcome, Table};
use crate::report::number;

/// Say what is in images or texts: class, label where the model has one, probability
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The model: an image classifier, or a text model with a classification head
    model: String,
    /// PNG, JPEG or BMP files
    #[arg(
        required_unless_present_any = ["labelled", "text"],
        conflicts_with_all = ["labelled", "text"],
        value_name = "IMAGE"
    )]
    images: Vec<PathBuf>,
    /// Classify each line of these texts
    #[arg(long, value_name = "FILE", num_args = 1.., conflicts_with = "labelled")]
    text: Vec<String>,
    /// How many classes to print
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    top: u16,
    /// Measure accuracy on labelled examples instead. Images: a folder with one folder per class, or with an IDX pair
    /// (`NAME-images-idx3-ubyte`, `NAME-labels-idx1-ubyte`, gzip or not), or the images' file of a pair. Texts: a table
    /// (.jsonl, .csv, .parquet)
    #[arg(long, value_name = "PATH", visible_alias = "data")]
    labelled: Option<String>,
    /// Column of the table that holds the texts
    #[arg(long, value_name = "COLUMN", default_value = "text")]
    text_column: String,
    /// Column of the table that holds the labels: names of classes, or their numbers
    #[arg(long, value_name = "COLUMN", default_value = "label")]
    label_column: String,
}

/// Examples per forward pass.
const BATCH: usize = 16;

/// Classifies everything that was given.
pub fn run(app: &App, args: Args) -> Result<Outcome> {
    let opened = inputs::open(app, &args.model)?;
    let artifact = &*opened.artifact;
    if refit_nn::classifier::text_classes(artifact).is_some() {
        if !args.images.is_empty() {
            let path = artifact.path().display();
            return Err(Failure::usage(format!(
                "{path}: this model reads texts; give one text a line: --text FILE"
            )));
        }
        return texts::run(app, artifact, &args);
    }
    if matches!(artifact.architecture().kind, Kind::Encoder | Kind::Decoder) {
        return Err(inputs::check_kind(artifact, "classify").err().map_or_else(
            || Failure::usage("the model has no classification head"),
            |failure| Failure {
                message: format!(
                    "{}, or put a classification head on it: `refit apply linear-probe`",
                    failure.message
                ),
                ..failure
            },
        ));
    }
    inputs::check_kind(artifact, "classify")?;
    if !args.text.is_empty() {
        let path = artifact.path().display();
        return Err(Failure::usage(format!("{path}: this is an image model; name image files")));
    }
    images::run(app, artifact, &args)
}

/// Scores of some examples.
struct Scored {
    /// `[examples, classes]`.
    logits: Vec<f32>,
    classes: usize,
}

impl Scored {
    /// Probabilities of one example.
    fn probabilities(&self, example: usize) -> Vec<f32> {
        let logits = &self.logits[example * self.classes..(example + 1) * self.classes];
        let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let powers: Vec<f64> = logits.iter().map(|l| f64::from(l - top).exp()).collect();
        let sum: f64 = powers.iter().sum();
        powers.into_iter().map(|power| (power / sum) as f32).collect()
    }
}

/// The likeliest classes of each example, as a table and as JSON; `kind` is what an example is.
fn listing(
    artifact: &Artifact,
    scored: &Scored,
    kind: &str,
    shown: &[String],
    top: u16,
) -> Outcome {
    let labels = class_names(artifact);
    let label = |class: usize| labels.get(class).and_then(Option::as_deref);
    let (mut text, mut results) = (String::new(), Vec::new());
    for (example, name) in shown.iter().enumerate() {
        let probabilities = scored.probabilities(example);
        let mut order: Vec<usize> = (0..probabilities.len()).collect();
        order.sort_by(|&a, &b| probabilities[b].total_cmp(&probabilities[a]).then(a.cmp(&b)));
        order.truncate(usize::from(top));
        let mut table = Table::new(2, &["class", "label", "probability"]);
        for &class in &order {
            table.row([
                class.to_string(),
                label(class).unwrap_or("–").to_owned(),
                format!("{:.2} %", probabilities[class] * 100.0),
            ]);
        }
        text.push_str(&format!("{name}\n{table}\n"));
        let logits = &scored.logits[example * scored.classes..(example + 1) * scored.classes];
        results.push(json!({
            kind: name,
            "classes": order.iter().map(|&class| json!({
                "class": class,
                "label": label(class),
                "probability": probabilities[class],
            })).collect::<Vec<_>>(),
            "logits": logits,
        }));
    }
    Outcome::new(json!({"results": results}), text)
}

/// The share of examples whose likeliest class is their own, with its 95 % Wilson interval; `score` gets ranges of examples.
fn accuracy(
    app: &App,
    kind: &'static str,
    classes: &[usize],
    name: &dyn Fn(usize) -> String,
    mut score: impl FnMut(std::ops::Range<usize>) -> Result<Scored>,
) -> Result<Outcome> {
    let count = classes.len();
    let mut right = 0;
    app.progress.begin("classifying", count as u64, kind);
    for from in (0..count).step_by(BATCH) {
        let items = from..count.min(from + BATCH);
        let Scored { logits, classes: known } = score(items.clone())?;
        let labels = &classes[items];
        if let Some(i) = labels.iter().position(|&label| label >= known) {
            return Err(Failure::usage(format!(
                "{}: its label is {}, but the model has {known} classes, numbered from 0",
                name(from + i),
                labels[i]
            )));
        }
        let found = eval::accuracy(&logits, known, labels)?;
        right += found.correct.iter().filter(|correct| **correct).count();
        app.progress.advance(labels.len() as u64);
    }
    app.progress.end();
    let interval = stats::wilson_interval(right as u64, count as u64, 0.95)
        .ok_or_else(|| Failure::usage(format!("there are no labelled {kind}")))?;
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
        (kind, number::count(count as u64)),
    ]);
    let json: Value = json!({
        "accuracy": interval.estimate,
        "interval": [interval.low, interval.high],
        "n": count,
    });
    Ok(Outcome::new(json, text))
}

/// Scores must be numbers; `name` says whose they are.
fn check_finite(
    artifact: &Artifact,
    scored: Scored,
    name: &dyn Fn(usize) -> String,
) -> Result<Scored> {
    match scored.logits.iter().position(|score| !score.is_finite()) {
        Some(at) => {
            let name = name(at / scored.classes.max(1));
            let problem = format!("the scores for {name} are not finite");
            Err(inputs::blame_weights(artifact, Failure::usage(problem)))
        }
        None => Ok(scored),
    }
}
