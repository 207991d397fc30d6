//! `refit classify MODEL IMAGE...`: the likeliest classes of images.

use std::path::PathBuf;

use burn::tensor::{Tensor, TensorData, activation::softmax};
use refit_data::images::{Preprocess, decode_image};
use refit_nn::{Model, Run};
use serde_json::{Value, json};

use crate::cli::App;
use crate::engine;
use crate::failure::{Failure, Result};
use crate::inputs;
use crate::output::{Outcome, Table};

/// Say what is in images: class, label where the model has one, probability
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The image model
    model: String,
    /// PNG, JPEG or BMP files
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<PathBuf>,
    /// How many classes to print
    #[arg(long, default_value_t = 5)]
    top: usize,
}

/// Classifies every image.
pub fn run(app: &App, args: Args) -> Result<Outcome> {
    let opened = inputs::open(app, &args.model)?;
    inputs::check_kind(&opened.artifact, "classify")?;
    let preprocess = Preprocess::from_artifact(&opened.artifact)?;
    // Every image is decoded before the model is loaded: a wrong file is said at once.
    let pixels = args
        .images
        .iter()
        .map(|path| Ok(preprocess.apply(&decode_image(path)?)?))
        .collect::<Result<Vec<_>>>()?;
    let Model::Vision(model) = engine::load(app, &opened.artifact)? else {
        return Err(engine::wrong_kind(
            &opened.artifact,
            "classify",
            "no image model",
            "refit inspect",
        ));
    };
    let labels = opened.artifact.config().raw().get("id2label").and_then(Value::as_object).cloned();
    let label = |class: usize| {
        labels.as_ref().and_then(|all| all.get(&class.to_string())).and_then(Value::as_str)
    };
    let device = engine::device(app)?;
    let (mut text, mut results) = (String::new(), Vec::new());
    for (path, (values, height, width)) in args.images.iter().zip(pixels) {
        let channels = values.len() / (height * width).max(1);
        let data = TensorData::new(values, [1, channels, height, width]);
        let logits = model.forward(Tensor::<4>::from_data(data, &device), &mut Run::plain())?;
        let probabilities = softmax(logits, 1).into_data().convert::<f32>();
        let probabilities = probabilities.try_to_vec::<f32>().map_err(|e| {
            Failure::system(format!("{}: cannot read the scores: {e:?}", path.display()))
        })?;
        if probabilities.iter().any(|p| !p.is_finite()) {
            let problem = format!("the scores for {} are not finite", path.display());
            return Err(inputs::blame_weights(&opened.artifact, Failure::usage(problem)));
        }
        let mut order: Vec<usize> = (0..probabilities.len()).collect();
        order.sort_by(|&a, &b| probabilities[b].total_cmp(&probabilities[a]).then(a.cmp(&b)));
        order.truncate(args.top);
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
