//! Moving a scale per channel from the input of a group of linears into what produces it: the rewrite that AWQ, SmoothQuant and
//! RepQuant share. The function of the model stays what it was.
//!
//! ```text
//! norm:    y = x / rms(x) * gamma + beta      W y + b = (W diag(r)) ((y + t) / r) + (b - W t)
//!          gamma <- gamma / r,  beta <- (beta + t) / r,  W <- W diag(r),  b <- b - W_old t
//! linear:  y = V x + c, used channel by channel (values of attention, up times gate, up before a ReLU)
//!          V <- diag(1 / r) V,  c <- c / r,  W <- W diag(r)
//! ```
//!
//! Where norms stand *after* the residual sum, as in BERT, a norm's output also is the residual stream, and dividing it would
//! change the model: [`of_norms`] refuses such models. A value head that several query heads read has one scale for all of them.
//!
//! What is moved is what is stored: the producer is rounded to its stored type first, and the linears get the factor that this
//! leaves, so that a norm in bfloat16 costs nothing.

use std::collections::BTreeMap;

use refit_nn::block::{Block, Wiring};
use refit_nn::config::TransformerConfig;
use refit_nn::ops::{self, Activation};
use refit_store::architecture::{Role, Site};

use crate::blockwise::{Stored, vector};
use crate::error::{Error, Result};
use crate::inputs::ModelInput;
use crate::method::{Action, Plan};

/// What produces the input of some linears.
#[derive(Clone, Debug, PartialEq)]
pub enum Producer {
    /// A norm before them.
    Norm {
        /// Its module.
        site: String,
        /// Whether it and all consumers have biases, so that a shift can move, too.
        shifts: bool,
    },
    /// Rows of a linear.
    Rows {
        /// Its module.
        site: String,
        /// The row that produces each input channel.
        rows: Vec<usize>,
    },
}

/// Linears with one input, and what produces it.
#[derive(Clone, Debug, PartialEq)]
pub struct Fold {
    /// Modules of the linears.
    pub consumers: Vec<String>,
    /// What produces their input.
    pub producer: Producer,
}

/// Sites of one block by what they read: projections of attention, its output, first linears of the ffn, the last one.
#[derive(Default)]
struct Parts<'a> {
    read_first_norm: Vec<&'a Site>,
    o: Option<&'a Site>,
    read_second_norm: Vec<&'a Site>,
    down: Option<&'a Site>,
}

fn blocks(model: &ModelInput) -> BTreeMap<usize, Parts<'_>> {
    let mut blocks: BTreeMap<usize, Parts> = BTreeMap::new();
    for site in model.artifact.architecture().linears() {
        let Some(layer) = site.layer else { continue };
        let parts = blocks.entry(layer).or_default();
        match site.role {
            Role::Q | Role::K | Role::V | Role::Qkv => parts.read_first_norm.push(site),
            Role::O => parts.o = Some(site),
            Role::Gate | Role::Up | Role::GateUp => parts.read_second_norm.push(site),
            Role::Down => parts.down = Some(site),
            _ => {}
        }
    }
    blocks
}

fn refuse<T>(model: &ModelInput, site: &str, problem: impl Into<String>) -> Result<T> {
    Err(Error::CannotFold {
        model: model.source.clone(),
        site: site.to_owned(),
        problem: problem.into(),
    })
}

/// Both norms of every block with the linears that read them, in running order.
///
/// # Errors
/// [`Error::CannotFold`] for models whose norms also feed something else; model types without a forward pass.
pub fn of_norms(model: &ModelInput) -> Result<Vec<Fold>> {
    let config = TransformerConfig::read(model.artifact.config())?;
    let architecture = model.artifact.architecture();
    let mut folds = Vec::new();
    for parts in blocks(model).into_values() {
        for sites in [parts.read_first_norm, parts.read_second_norm] {
            let Some(first) = sites.first() else { continue };
            if config.wiring == Wiring::PostNorm {
                return refuse(
                    model,
                    &first.name,
                    format!(
                        "in `{}` the norms stand after the residual sum, so what a norm gives out is also the residual \
                         stream; take a method that leaves norms alone: rtn, hqq, gptq",
                        config.model_type
                    ),
                );
            }
            let Some(norm) = first.norm.clone() else {
                return refuse(model, &first.name, "the architecture names no norm that feeds it");
            };
            if let Some(other) = sites.iter().find(|site| site.norm.as_ref() != Some(&norm)) {
                let problem = format!("it does not read `{norm}` as `{}` does", first.name);
                return refuse(model, &other.name, problem);
            }
            let stranger = architecture.sites.iter().find(|site| {
                site.norm.as_ref() == Some(&norm)
                    && site.role != Role::Bias
                    && !sites.iter().any(|own| own.name == site.name)
            });
            if let Some(stranger) = stranger {
                let problem = format!(
                    "its norm `{norm}` also feeds `{}`, which this method does not change",
                    stranger.name
                );
                return refuse(model, &first.name, problem);
            }
            let module = norm.trim_end_matches(".weight").to_owned();
            let has_bias = |module: &str| model.artifact.contains(&format!("{module}.bias"));
            let shifts = has_bias(&module) && sites.iter().all(|site| has_bias(site.module()));
            folds.push(Fold {
                consumers: sites.iter().map(|site| site.module().to_owned()).collect(),
                producer: Producer::Norm { site: module, shifts },
            });
        }
    }
    Ok(folds)
}

/// The output projection of attention and the last linear of the ffn of every block, with the linear before them or the reason
/// why nothing can move there.
///
/// # Errors
/// Model types without a forward pass.
pub fn of_linears(model: &ModelInput) -> Result<Vec<Result<Fold, String>>> {
    let config = TransformerConfig::read(model.artifact.config())?;
    let mut folds = Vec::new();
    for parts in blocks(model).into_values() {
        if let Some(o) = parts.o {
            let values =
                parts.read_first_norm.iter().find(|site| matches!(site.role, Role::V | Role::Qkv));
            folds.push(match values {
                Some(v) => Ok(Fold {
                    consumers: vec![o.module().to_owned()],
                    producer: Producer::Rows {
                        site: v.module().to_owned(),
                        rows: value_rows(&config, v),
                    },
                }),
                None => Err(format!("`{}`: no linear gives the values of its heads", o.name)),
            });
        }
        if let Some(down) = parts.down {
            let up = parts
                .read_second_norm
                .iter()
                .find(|site| matches!(site.role, Role::Up | Role::GateUp));
            let linear = config.gated || config.activation == Activation::Relu;
            folds.push(match up {
                Some(up) if linear => {
                    let first = if up.role == Role::GateUp { config.intermediate } else { 0 };
                    Ok(Fold {
                        consumers: vec![down.module().to_owned()],
                        producer: Producer::Rows {
                            site: up.module().to_owned(),
                            rows: (first..first + config.intermediate).collect(),
                        },
                    })
                }
                _ => Err(format!(
                    "`{}`: a nonlinearity other than ReLU stands between it and the linear before it",
                    down.name
                )),
            });
        }
    }
    Ok(folds)
}

/// The row of the values' matrix behind each input of the output projection.
fn value_rows(config: &TransformerConfig, site: &Site) -> Vec<usize> {
    let (heads, kv_heads, dim) = (config.heads, config.kv_heads, config.head_dim);
    (0..heads * dim)
        .map(|channel| {
            let (head, at) = (channel / dim / (heads / kv_heads), channel % dim);
            match site.role {
                Role::Qkv if site.interleaved => (3 * head + 2) * dim + at,
                Role::Qkv => (heads + kv_heads + head) * dim + at,
                _ => head * dim + at,
            }
        })
        .collect()
}

impl Fold {
    /// Means of a statistic over the channels that one row produces, repeated for each of them: what scales may depend on.
    pub fn tie(&self, values: &[f32]) -> Vec<f32> {
        let Producer::Rows { rows, .. } = &self.producer else { return values.to_vec() };
        let mut sums: BTreeMap<usize, (f64, usize)> = BTreeMap::new();
        for (&row, &value) in rows.iter().zip(values) {
            let entry = sums.entry(row).or_default();
            *entry = (entry.0 + f64::from(value), entry.1 + 1);
        }
        rows.iter().map(|row| (sums[row].0 / sums[row].1 as f64) as f32).collect()
    }

    /// Tensors that change with the producer, beside the consumers' matrices.
    pub fn tensors(&self, model: &ModelInput) -> Vec<String> {
        let (site, shifts) = match &self.producer {
            Producer::Norm { site, shifts } => (site, *shifts),
            Producer::Rows { site, .. } => (site, false),
        };
        let mut names = vec![format!("{site}.weight"), format!("{site}.bias")];
        if shifts {
            names.extend(self.consumers.iter().map(|consumer| format!("{consumer}.bias")));
        }
        names.retain(|name| model.artifact.contains(name));
        names
    }

    /// Divides the input of the consumers by `scales` and, where the producer allows it, adds `shift` before. Returns the
    /// scales as they were moved: those that the producer's stored type leaves.
    ///
    /// # Errors
    /// A block that does not hold the sites.
    ///
    /// # Panics
    /// When scales of channels that one row produces differ, or a shift is asked of a producer that takes none: mistakes of
    /// the caller.
    pub fn apply(
        &self,
        block: &mut Block,
        scales: &[f32],
        shift: Option<&[f32]>,
        stored: &Stored,
    ) -> Result<Vec<f32>> {
        let source = &stored.model.source;
        let missing = |site: &str| Error::tensor(source, site, "the block does not hold it");
        let mut moved_shift = None;
        let moved = match &self.producer {
            Producer::Norm { site, shifts } => {
                assert!(shift.is_none() || *shifts, "invariant: shifts need biases");
                let norm = block.norm_mut(site).ok_or_else(|| missing(site))?;
                let device = norm.weight.val().device();
                let old = ops::to_vec(&norm.weight.val());
                let mut new: Vec<f32> = old.iter().zip(scales).map(|(w, r)| w / r).collect();
                stored.round_norm(&format!("{site}.weight"), &mut new);
                let mut moved = Vec::with_capacity(old.len());
                for (new, old) in new.iter_mut().zip(&old) {
                    let factor = old / *new;
                    if factor.is_finite() && factor > 0.0 {
                        moved.push(factor);
                    } else {
                        // A gain of 0, or one that its type cannot hold divided: left alone.
                        *new = *old;
                        moved.push(1.0);
                    }
                }
                norm.weight = vector(new, &device);
                if let Some(bias) = &mut norm.bias {
                    let old = ops::to_vec(&bias.val());
                    let zero = vec![0.0; old.len()];
                    let shift = shift.unwrap_or(&zero);
                    let mut new: Vec<f32> =
                        old.iter().zip(shift).zip(&moved).map(|((b, t), r)| (b + t) / r).collect();
                    stored.round(&format!("{site}.bias"), &mut new);
                    if *shifts {
                        moved_shift = Some(
                            new.iter().zip(&moved).zip(&old).map(|((n, r), b)| n * r - b).collect(),
                        );
                    }
                    *bias = vector(new, &device);
                }
                moved
            }
            Producer::Rows { site, rows } => {
                assert!(shift.is_none(), "invariant: only norms take shifts");
                let linear = block.linear_mut(site).ok_or_else(|| missing(site))?;
                let [out, inputs] = linear.weight().dims();
                let mut factors = vec![1f32; out];
                for (&row, &scale) in rows.iter().zip(scales) {
                    assert!(
                        factors[row] == 1.0 || factors[row] == scale,
                        "invariant: one scale for the channels of a row"
                    );
                    factors[row] = scale;
                }
                let device = linear.weight().device();
                let mut weights = ops::to_vec(&linear.weight());
                for (row, factor) in weights.chunks_mut(inputs).zip(&factors) {
                    row.iter_mut().for_each(|w| *w /= factor);
                }
                linear.set_weight(weights, &device);
                if let Some(bias) = &mut linear.bias {
                    let values = ops::to_vec(&bias.val());
                    let new = values.iter().zip(&factors).map(|(b, r)| b / r).collect();
                    *bias = vector(new, &device);
                }
                scales.to_vec()
            }
        };
        for consumer in &self.consumers {
            let linear = block.linear_mut(consumer).ok_or_else(|| missing(consumer))?;
            let device = linear.weight().device();
            let mut weights = ops::to_vec(&linear.weight());
            if let (Some(shift), Some(bias)) = (&moved_shift, &mut linear.bias) {
                let values = ops::to_vec(&bias.val());
                let new = values
                    .iter()
                    .zip(weights.chunks(moved.len()))
                    .map(|(b, row)| {
                        let sum: f64 = row
                            .iter()
                            .zip(shift as &Vec<f32>)
                            .map(|(w, t)| f64::from(*w) * f64::from(*t))
                            .sum();
                        (f64::from(*b) - sum) as f32
                    })
                    .collect();
                *bias = vector(new, &device);
            }
            for row in weights.chunks_mut(moved.len()) {
                row.iter_mut().zip(&moved).for_each(|(w, r)| *w *= r);
            }
            linear.set_weight(weights, &device);
        }
        Ok(moved)
    }
}

/// Says in a plan that producers change with what they feed.
pub fn mark(plan: &mut Plan, model: &ModelInput, folds: &[Fold]) {
    let changed: std::collections::HashSet<String> =
        folds.iter().flat_map(|fold| fold.tensors(model)).collect();
    for tensor in &mut plan.tensors {
        if changed.contains(&tensor.name) {
            tensor.action = Action::Transform;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use burn::tensor::{Tensor, TensorData};
    use refit_nn::load::Loader;
    use refit_nn::vision::VisionTransformer;
    use refit_nn::{BurnDevice, Frame, Run};
    use refit_store::architecture::Kind;

    use super::*;
    use crate::rewrite::{OutputType, declare};
    use crate::testing::Stream;

    fn fixture(name: &str) -> ModelInput {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../refit-nn/tests/fixtures/hf");
        ModelInput::open(name, root.join(name)).unwrap()
    }

    /// First and last block, and what a pass over five tokens shares.
    fn blocks_of(model: &ModelInput) -> (Vec<(usize, Block)>, refit_nn::block::Context) {
        let device = BurnDevice::flex();
        if model.artifact.architecture().kind == Kind::Vision {
            let vit = VisionTransformer::load_trunk(&model.artifact, &device).unwrap();
            return (vit.blocks.into_iter().enumerate().collect(), VisionTransformer::context());
        }
        let loader = Loader::new(&model.artifact, &device).unwrap();
        let context = Frame::load_trunk(&loader).unwrap().context(0, 5);
        let blocks = (0..loader.config().layers).map(|i| (i, loader.block(i).unwrap()));
        (blocks.collect(), context)
    }

    /// Scales from 0.01 to 10.
    fn scales(stream: &mut Stream, count: usize) -> Vec<f32> {
        (0..count).map(|_| 10f64.powf(3.0 * stream.uniform() - 2.0) as f32).collect()
    }

    #[test]
    fn no_fold_changes_what_a_block_computes() {
        for name in [
            "llama",
            "llama-bias",
            "mistral",
            "qwen2",
            "qwen3",
            "gemma2",
            "phi3",
            "gpt2",
            "gpt-neox",
            "opt",
            "vit",
        ] {
            let model = fixture(name);
            let plan = declare(Plan::default(), &model, &[], OutputType::F32);
            let stored = Stored::new(&model, &plan).unwrap();
            let mut folds = of_norms(&model).unwrap();
            assert!(!folds.is_empty(), "{name}");
            let from_norms = folds.len();
            folds.extend(of_linears(&model).unwrap().into_iter().flatten());
            assert!(folds.len() > from_norms, "{name}: values always feed the output projection");
            let (blocks, context) = blocks_of(&model);
            let hidden = stored.config.hidden;
            let mut stream = Stream::new(7);
            for (index, block) in blocks {
                let x = TensorData::new(stream.normals(5 * hidden), [1, 5, hidden]);
                let x = Tensor::<3>::from_data(x, &BurnDevice::flex());
                let before =
                    ops::to_vec(&block.forward(x.clone(), &context, index, &mut Run::plain()));
                let mut changed = block.clone();
                let mut count = 0;
                for fold in &folds {
                    let held = block.linears().iter().any(|l| l.site == fold.consumers[0]);
                    if !held {
                        continue;
                    }
                    let inputs = block
                        .linears()
                        .into_iter()
                        .find(|l| l.site == fold.consumers[0])
                        .map_or(0, |l| l.weight().dims()[1]);
                    let factors = fold.tie(&scales(&mut stream, inputs));
                    let shifts = matches!(fold.producer, Producer::Norm { shifts: true, .. });
                    let shift = stream.normals(inputs);
                    let shift = shifts.then_some(shift.as_slice());
                    fold.apply(&mut changed, &factors, shift, &stored).unwrap();
                    count += 1;
                }
                assert!(count >= 3, "{name}: {count} folds in a block");
                let after = ops::to_vec(&changed.forward(x, &context, index, &mut Run::plain()));
                let size = before.iter().fold(1f32, |most, x| most.max(x.abs()));
                for (a, b) in before.iter().zip(&after) {
                    assert!((a - b).abs() <= 1e-4 * size, "{name}, block {index}: {a} became {b}");
                }
            }
        }
    }

    #[test]
    fn norms_after_the_residual_sum_are_refused() {
        for name in ["bert", "roberta", "distilbert"] {
            let error = of_norms(&fixture(name)).unwrap_err();
            assert!(matches!(error, Error::CannotFold { .. }), "{error}");
            let text = error.to_string();
            assert!(text.contains("residual") && text.contains("gptq"), "{text}");
        }
        // A router reads the norm in front of the experts; the family has no forward pass either.
        assert!(of_norms(&fixture("mixtral")).is_err());
    }

    #[test]
    fn shifts_need_biases_on_both_sides() {
        let shifts = |name: &str| -> Vec<bool> {
            let folds = of_norms(&fixture(name)).unwrap();
            let of = |fold: Fold| matches!(fold.producer, Producer::Norm { shifts: true, .. });
            folds.into_iter().map(of).collect()
        };
        assert!(shifts("llama-bias").iter().all(|shifts| !shifts));
        assert!(shifts("gpt2").iter().all(|shifts| *shifts));
        assert!(shifts("vit").iter().all(|shifts| *shifts));
    }

    #[test]
    fn query_heads_share_the_scale_of_their_value_head() {
        let model = fixture("llama");
        let config = TransformerConfig::read(model.artifact.config()).unwrap();
        let fold = of_linears(&model).unwrap().swap_remove(0).unwrap();
        let Producer::Rows { rows, .. } = &fold.producer else { panic!("{fold:?}") };
        let group = config.heads / config.kv_heads;
        assert!(group > 1, "the fixture groups its queries");
        let values: Vec<f32> = (0..rows.len()).map(|i| i as f32).collect();
        let tied = fold.tie(&values);
        let dim = config.head_dim;
        for channel in 0..dim {
            let mean: f32 =
                (0..group).map(|head| values[head * dim + channel]).sum::<f32>() / group as f32;
            for head in 0..group {
                assert!((tied[head * dim + channel] - mean).abs() < 1e-4);
            }
        }
    }

    #[test]
    fn a_norm_in_few_bits_moves_what_it_can_say() {
        let model = fixture("llama");
        let plan = declare(Plan::default(), &model, &[], OutputType::Bf16);
        let stored = Stored::new(&model, &plan).unwrap();
        let fold = of_norms(&model).unwrap().swap_remove(0);
        let (mut blocks, _) = blocks_of(&model);
        let block = &mut blocks[0].1;
        let old = ops::to_vec(&block.mixer_norm.weight.val());
        let wanted = scales(&mut Stream::new(3), old.len());
        let moved = fold.apply(block, &wanted, None, &stored).unwrap();
        let new = ops::to_vec(&block.mixer_norm.weight.val());
        for ((old, new), (moved, wanted)) in old.iter().zip(&new).zip(moved.iter().zip(&wanted)) {
            assert_eq!(half::bf16::from_f32(*new).to_f32(), *new);
            assert!((new * moved - old).abs() <= 1e-6 * old.abs(), "{new} {moved} {old}");
            assert!((moved / wanted - 1.0).abs() < 0.01);
        }
    }
}
