//! Classification heads on the tiny random models that transformers saved.

use std::path::PathBuf;

use burn::module::Module;
use refit_nn::classifier::{Dense, head_form};
use refit_nn::{BurnDevice, Run, TextClassifier, Trainable, named, ops};
use refit_store::artifact::Artifact;

const MODELS: [&str; 10] = [
    "bert",
    "roberta",
    "distilbert",
    "llama",
    "llama-tied",
    "gpt2",
    "gpt-neox",
    "opt",
    "qwen3",
    "gemma2",
];

fn fixture(name: &str) -> Artifact {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/hf");
    Artifact::open(root.join(name)).unwrap()
}

fn sequences() -> Vec<Vec<u32>> {
    vec![vec![2, 9, 33, 7, 5], vec![2, 40, 11], vec![2, 8, 61, 17, 22, 5, 3]]
}

fn classifier(name: &str) -> TextClassifier {
    let artifact = fixture(name);
    let device = BurnDevice::flex();
    let mut model = TextClassifier::load_trunk(&artifact, &device, Dense::Auto).unwrap();
    let form = head_form(artifact.config().model_type().unwrap()).unwrap();
    let width = model.config().hidden;
    let weight = (0..3 * width).map(|i| ((i * 37 % 19) as f32 - 9.0) / 20.0).collect();
    model.set_head(form.site, weight, form.bias.then(|| vec![0.1, -0.2, 0.0]), &device);
    model
}

#[test]
fn features_do_not_depend_on_what_they_are_computed_with() {
    for name in MODELS {
        let model = classifier(name);
        let features = |sequences: &[Vec<u32>]| {
            ops::to_vec(&model.features(sequences, &mut Run::plain()).unwrap())
        };
        let all = sequences();
        let together = features(&all);
        let alone: Vec<f32> = all.iter().flat_map(|s| features(std::slice::from_ref(s))).collect();
        let far = together.iter().zip(&alone).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(far < 1e-5, "{name}: padding changes features by {far}");
        // Nor do neighbours of the same length, but for the order of sums: products choose their tiles by the number of rows.
        let same: Vec<Vec<u32>> = (0..5).map(|i| vec![2, 9 + i, 33, 7, 5 + i, 41, 3]).collect();
        let together = features(&same);
        let alone: Vec<f32> = same.iter().flat_map(|s| features(std::slice::from_ref(s))).collect();
        let far = together.iter().zip(&alone).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(far < 1e-5, "{name}: neighbours change features by {far}");
    }
}

#[test]
fn gradients_are_those_of_finite_differences() {
    for name in MODELS {
        let model = classifier(name);
        let targets = [Some(0), Some(2), Some(1)];
        let loss = |model: &TextClassifier| {
            let logits = model.forward(&sequences(), &mut Run::plain()).unwrap();
            let logits = ops::to_vec(&logits);
            let rows = logits.chunks_exact(3).zip(targets);
            let one = |(row, target): (&[f32], Option<usize>)| {
                let sum: f64 = row.iter().map(|l| f64::from(*l).exp()).sum();
                sum.ln() - f64::from(row[target.unwrap_or(0)])
            };
            rows.map(one).sum::<f64>() / 3.0
        };
        let tracked = model.clone().train();
        let logits = tracked.forward(&sequences(), &mut Run::plain()).unwrap();
        let mean = |rows: std::ops::Range<usize>, logits: &mut [f32]| -> f64 {
            let mut total = 0.0;
            for (row, target) in logits.chunks_exact_mut(3).zip(&targets[rows]) {
                let sum: f64 = row.iter().map(|l| f64::from(*l).exp()).sum();
                let target = target.unwrap_or(0);
                total += (sum.ln() - f64::from(row[target])) / 3.0;
                row.iter_mut().for_each(|l| *l = (f64::from(*l).exp() / sum / 3.0) as f32);
                row[target] -= 1.0 / 3.0;
            }
            total
        };
        let mut found = ops::logit_loss(logits, &mean).backward();
        let mut gradients = std::collections::BTreeMap::new();
        named::gradients(&tracked, &mut found, |name, values| {
            gradients.insert(name.to_owned(), values);
        });
        let all = model.parameters();
        assert_eq!(gradients.len(), all.len(), "{name}: a parameter has no gradient");
        // Along each parameter's own gradient the loss moves as the gradient says.
        for parameter in all {
            let gradient = &gradients[&parameter.name];
            let square: f64 = gradient.iter().map(|g| f64::from(*g).powi(2)).sum();
            if square < 1e-10 {
                continue;
            }
            let step = 2e-3 / square.sqrt();
            let at = |by: f64| {
                let moved = named::edit(model.clone(), |name, _, values| {
                    (name == parameter.name).then(|| {
                        let pairs = values().into_iter().zip(gradient);
                        pairs.map(|(x, g)| x + (by * f64::from(*g)) as f32).collect()
                    })
                });
                loss(&moved)
            };
            let numeric = (at(step) - at(-step)) / (2.0 * step);
            let off = (numeric - square).abs() / square;
            assert!(off < 0.05, "{name} {}: {numeric} for {square}", parameter.name);
        }
    }
}

#[test]
fn a_layer_that_lets_pass_keeps_what_it_is_given() {
    for name in ["bert", "roberta", "distilbert"] {
        let artifact = fixture(name);
        let device = BurnDevice::flex();
        let load = |dense| TextClassifier::load_trunk(&artifact, &device, dense);
        let model = load(Dense::PassThrough).unwrap();
        let mut bare = model.clone();
        bare.dense = None;
        let features = |model: &TextClassifier| {
            ops::to_vec(&model.features(&sequences(), &mut Run::plain()).unwrap())
        };
        let (through, given) = (features(&model), features(&bare));
        let weight = ops::to_vec(&model.dense.as_ref().unwrap().weight());
        let bias = ops::to_vec(&model.dense.as_ref().unwrap().bias.as_ref().unwrap().val());
        for (i, (y, x)) in through.iter().zip(&given).enumerate() {
            let (w, b) = (weight[i % 32 * 33], bias[i % 32]);
            // The input can be read off the output again, since the layer's output is far from its ends.
            let back = if name == "distilbert" { (y - b) / w } else { (y.atanh() - b) / w };
            assert!((back - x).abs() < 1e-3 * (1.0 + x.abs()), "{name}: {back} for {x}");
        }
        // BERT's fixture has a pooler; the others have no layer of their own.
        assert_eq!(load(Dense::Own).is_ok(), name == "bert", "{name}");
    }
}

#[test]
fn padding_tokens_at_the_end_are_passed_over_as_transformers_does() {
    let model = classifier("llama");
    assert_eq!(model.pad, Some(0));
    let logits =
        |ids: &[u32]| ops::to_vec(&model.forward(&[ids.to_vec()], &mut Run::plain()).unwrap());
    assert_eq!(logits(&[1, 9, 33, 0, 0]), logits(&[1, 9, 33]));
    assert_ne!(logits(&[1, 9, 0, 33]), logits(&[1, 9]));
    assert_eq!(logits(&[0, 0]), logits(&[0]));
}
