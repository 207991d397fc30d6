//! What the head sees of every example, from the store of frozen forward passes.

use std::cell::Cell;

use burn::tensor::{Tensor, TensorData};
use refit_data::images::Preprocess;
use refit_nn::classifier::Dense;
use refit_nn::vision::Vision;
use refit_nn::{BurnDevice, Run, TextClassifier, ops};
use refit_store::architecture::Kind;
use refit_train::features::{FeatureStore, Key, Limits, key};
use serde_json::{Value, json};

use super::data::{Content, Examples};
use crate::error::{Error, Result};
use crate::inputs::{Labelled, ModelInput};
use crate::method::{Context, Unit};

/// Examples per forward pass.
const BATCH: usize = 16;
/// Raised when forward passes give other numbers than before.
const VERSION: &str = "1";

/// What stands under a head.
#[allow(clippy::large_enum_variant)] // one per run: the weights dwarf it
pub(super) enum Trunk {
    /// Of texts.
    Text(TextClassifier),
    /// Of images, with their preprocessing.
    Image(Vision, Preprocess),
}

impl Trunk {
    /// Loads the trunk of a model.
    ///
    /// # Errors
    /// Model types without a forward pass, missing tensors.
    pub fn load(model: &ModelInput, dense: Dense) -> Result<Self> {
        let device = BurnDevice::flex();
        let artifact = &model.artifact;
        Ok(match artifact.architecture().kind {
            Kind::Vision => {
                let vision = Vision::load_trunk(artifact, &device)?;
                Self::Image(vision, Preprocess::from_artifact(artifact)?)
            }
            _ => Self::Text(TextClassifier::load_trunk(artifact, &device, dense)?),
        })
    }

    /// Columns of the features.
    pub fn width(&self) -> usize {
        match self {
            Self::Text(model) => model.config().hidden,
            Self::Image(model, _) => model.classifier().weight().dims()[1],
        }
    }

    /// Features of some examples, row after row.
    fn compute(&self, examples: &Examples, batch: &[usize]) -> Result<Vec<f32>> {
        let run = &mut Run::plain();
        let features = match (self, &examples.content) {
            (Self::Text(model), Content::Texts(ids)) => {
                let sequences: Vec<Vec<u32>> = batch.iter().map(|&i| ids[i].clone()).collect();
                model.features(&sequences, run)?
            }
            (Self::Image(model, preprocess), Content::Images(labelled, which)) => {
                let chosen: Vec<usize> = batch.iter().map(|&i| which[i]).collect();
                let images = images(labelled, &chosen, preprocess, &BurnDevice::flex())?;
                model.features(images, run)?
            }
            _ => unreachable!(
                "invariant: examples are of the model's kind, as `data::examples` saw to"
            ),
        };
        let values = ops::to_vec(&features);
        let width = self.width();
        match values.iter().position(|x| !x.is_finite()) {
            Some(at) => Err(Error::BadData {
                source_name: examples.names[batch[at / width]].clone(),
                problem:
                    "the model's output for it is not finite: its weights or an operation overflow"
                        .into(),
            }),
            None => Ok(values),
        }
    }
}

/// Images as a model takes them, `[images, channels, height, width]`.
///
/// # Errors
/// Files that cannot be decoded, images that preprocessing leaves at different sizes.
pub(crate) fn images(
    labelled: &Labelled,
    which: &[usize],
    preprocess: &Preprocess,
    device: &BurnDevice,
) -> Result<Tensor<4>> {
    let (mut all, mut size) = (Vec::new(), None);
    for &i in which {
        let (values, height, width) = preprocess.apply(&labelled.image(i)?)?;
        let first = *size.get_or_insert((height, width));
        if first != (height, width) {
            return Err(Error::BadData {
                source_name: labelled.name(i),
                problem: format!(
                    "after preprocessing it is {height} x {width} pixels, others are {} x {}; the model's \
                     preprocessor_config.json should crop to one size",
                    first.0, first.1
                ),
            });
        }
        all.extend(values);
    }
    let (height, width) = size.unwrap_or((1, 1));
    let channels = all.len() / (which.len() * height * width).max(1);
    let data = TensorData::new(all, [which.len(), channels, height, width]);
    Ok(Tensor::from_data(data, device))
}

/// Features of all examples, `[examples, width]`, and what the store did.
///
/// # Errors
/// Whatever reading and running the examples meets; features that were computed before are kept.
pub(super) fn features(
    trunk: &Trunk,
    model: &ModelInput,
    dense: Dense,
    examples: &Examples,
    cx: &Context,
) -> Result<(Vec<f32>, Value)> {
    let count = examples.len();
    cx.progress.begin("looking up features", count as u64, Unit::Steps);
    let found = prepare(trunk, model, dense, examples, cx);
    cx.progress.end();
    let (mut store, keys) = found?;
    let batches = batches(examples);
    let last = Cell::new(0);
    let progress = |done: u64, _: u64| cx.progress.advance(done - last.replace(done));
    cx.progress.begin("frozen features", count as u64, Unit::Steps);
    let mut compute = |batch: &[usize]| trunk.compute(examples, batch);
    let rows = store.rows(&keys, &batches, &mut compute, &progress);
    cx.progress.end();
    let rows = rows?;
    if let Some(why) = store.unkept.take() {
        cx.progress.note(&format!("warning: features are not kept for the next run: {why}"));
    }
    let report =
        json!({ "found": store.found, "computed": store.computed, "width": trunk.width() });
    Ok((rows, report))
}

/// Opens the model's set and names every example.
fn prepare(
    trunk: &Trunk,
    model: &ModelInput,
    dense: Dense,
    examples: &Examples,
    cx: &Context,
) -> Result<(FeatureStore, Vec<Key>)> {
    let artifact = &model.artifact;
    let config = serde_json::to_string(artifact.config().raw())
        .map_err(|source| Error::Parameters { method: "features", source })?;
    let reading = match trunk {
        Trunk::Text(_) => format!("{dense:?}"),
        Trunk::Image(_, preprocess) => format!("{preprocess:?}"),
    };
    let content = artifact.content_hash()?;
    let source: [&str; 6] = [
        VERSION,
        env!("CARGO_PKG_VERSION"),
        &artifact.architecture().model_type,
        &config,
        &content,
        &reading,
    ];
    let root = cx.cache.join("features");
    let store = FeatureStore::open(&root, &source, trunk.width(), Limits::default())?;
    let keys = match &examples.content {
        Content::Texts(all) => all
            .iter()
            .map(|ids| {
                cx.progress.advance(1);
                key(&[b"ids", bytemuck::cast_slice::<u32, u8>(ids)])
            })
            .collect(),
        Content::Images(labelled, which) => which
            .iter()
            .map(|&i| {
                cx.progress.advance(1);
                labelled.image_key(i)
            })
            .collect::<Result<_>>()?,
    };
    Ok((store, keys))
}

/// Which examples run together: texts of one length, so that nothing is computed for padding; images in their order.
fn batches(examples: &Examples) -> Vec<Vec<usize>> {
    match &examples.content {
        Content::Images(..) => {
            let all: Vec<usize> = (0..examples.len()).collect();
            all.chunks(BATCH).map(<[usize]>::to_vec).collect()
        }
        Content::Texts(ids) => {
            let mut order: Vec<usize> = (0..ids.len()).collect();
            order.sort_by_key(|&i| (ids[i].len(), i));
            let same = order.chunk_by(|a, b| ids[*a].len() == ids[*b].len());
            same.flat_map(|run| run.chunks(BATCH)).map(<[usize]>::to_vec).collect()
        }
    }
}
