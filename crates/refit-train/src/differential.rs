//! Differential testing: where do two models that should agree begin to differ?
//!
//! Both models run on the same probe inputs and their named activations are compared in running
//! order: e = ‖a − b‖_F / (‖b‖_F + 1e-12). The first activation with e above the tolerance *whose
//! input is still within it* is where the fault lies; everything behind it only inherits the error.
//! A reference may also be a [`Trace`] saved earlier, a golden trace.
//!
//! Source: the staged comparison that Jiang et al. (arXiv 2303.07476) found missing in practice.

use std::collections::HashMap;

use burn::tensor::Tensor;
use refit_nn::{Decoder, Encoder, Model, Run, Tap, ops};
use refit_store::DType;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::eval::{kl_divergence, log_sum_exp};

mod trace;

pub use trace::{Activation, Keep, Trace};

/// Name under which the model's output is compared: logits, or an encoder's hidden states.
pub const OUTPUT: &str = "output";

/// A model whose activations can be watched.
pub trait Traced {
    /// Runs `ids` as one sequence under `tap` and returns the output, `[1, seq, width]`.
    ///
    /// # Errors
    /// Ids outside the vocabulary, inputs longer than the context.
    fn trace(&self, ids: &[u32], tap: &mut dyn Tap) -> Result<Tensor<3>>;

    /// Whether the output is a row of logits per position.
    fn has_logits(&self) -> bool;
}

impl Traced for Decoder {
    fn trace(&self, ids: &[u32], tap: &mut dyn Tap) -> Result<Tensor<3>> {
        Ok(self.forward(ids, 1, &mut Run::tapped(tap))?)
    }

    fn has_logits(&self) -> bool {
        true
    }
}

impl Traced for Encoder {
    fn trace(&self, ids: &[u32], tap: &mut dyn Tap) -> Result<Tensor<3>> {
        Ok(self.forward(&[ids.to_vec()], &mut Run::tapped(tap))?)
    }

    fn has_logits(&self) -> bool {
        false
    }
}

impl Traced for Model {
    fn trace(&self, ids: &[u32], tap: &mut dyn Tap) -> Result<Tensor<3>> {
        match self {
            Model::Decoder(decoder) => decoder.trace(ids, tap),
            Model::Encoder(encoder) => encoder.trace(ids, tap),
            Model::Vision(_) => {
                let what = "a vision model takes images, not tokens; compare its outputs".into();
                Err(Error::NothingShared { what })
            }
        }
    }

    fn has_logits(&self) -> bool {
        matches!(self, Model::Decoder(_))
    }
}

/// How far two models may lie apart.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Tolerance {
    /// Bound on the relative error of every activation.
    Relative(f64),
    /// Bound on the mean KL divergence of the output, in nats: for formats that change every
    /// activation on purpose.
    Divergence(f64),
}

/// The tolerance that fits a model stored as `dtype`. The bounds for floats are the card's; those
/// for 8 bits and below are ours.
pub fn tolerance(dtype: DType) -> Tolerance {
    match dtype {
        DType::F64 | DType::F32 => Tolerance::Relative(1e-4),
        DType::F16 | DType::BF16 => Tolerance::Relative(2e-2),
        DType::Ggml(ggml) => {
            let bits = 8.0 * ggml.block_bytes() as f64 / ggml.block_len() as f64;
            Tolerance::Divergence(if bits > 8.0 { 0.02 } else { 0.5 })
        }
        _ => Tolerance::Divergence(0.02),
    }
}

/// One activation of both models.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Difference {
    /// Name of the activation.
    pub name: String,
    /// ‖a − b‖_F / (‖b‖_F + 1e-12) over all probes; infinite where a value is not finite.
    pub error: f64,
    /// Largest difference of any value.
    pub max_abs: f64,
}

/// A place where the models part.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Divergence {
    /// The activation that is wrong although its input is right.
    pub name: String,
    /// The activation before it, which is right.
    pub after: Option<String>,
    /// Its relative error.
    pub error: f64,
    /// What lies between the two, and so must differ.
    pub suspect: String,
}

/// How the outputs differ, over all positions of all probes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct OutputDifference {
    /// Largest difference of any value.
    pub max_abs: f64,
    /// Relative error in the Frobenius norm.
    pub error: f64,
    /// Mean KL(reference ‖ model) in nats, for logits.
    pub kl: Option<f64>,
    /// Share of positions where both put the same token first, for logits.
    pub top1_agreement: Option<f64>,
}

/// The comparison of a model with a reference.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// Whether the tolerance is kept.
    pub equal: bool,
    /// Where the models first part.
    pub first: Option<Divergence>,
    /// Every place that creates error by itself, `first` included.
    pub origins: Vec<Divergence>,
    /// All compared activations, in running order.
    pub activations: Vec<Difference>,
    /// The outputs.
    pub output: OutputDifference,
    /// Activations that the reference lacks, or has in another shape.
    pub only_model: Vec<String>,
    /// Activations that the model lacks, or has in another shape.
    pub only_reference: Vec<String>,
}

/// Compares `model` with `reference` on `probes`, one probe at a time: memory is that of the
/// reference's activations on one probe. With [`Tolerance::Divergence`] places are reported where
/// the relative error passes one half.
///
/// # Errors
/// No probes, no shared activation, and whatever running the models meets.
pub fn compare(
    model: &dyn Traced,
    reference: &dyn Traced,
    probes: &[Vec<u32>],
    tolerance: Tolerance,
) -> Result<Comparison> {
    let mut sums = Sums::default();
    for probe in probes {
        let expected = trace::capture(reference, probe, Keep::All)?;
        sums.add(model, probe, expected, reference.has_logits())?;
    }
    sums.finish(tolerance)
}

/// Compares `model` with a saved trace.
///
/// # Errors
/// As [`compare`].
pub fn compare_with_trace(
    model: &dyn Traced,
    trace: &Trace,
    tolerance: Tolerance,
) -> Result<Comparison> {
    let mut sums = Sums::default();
    for (probe, expected) in trace.probes.iter().zip(&trace.activations) {
        sums.add(model, probe, expected.clone(), trace.logits)?;
    }
    sums.finish(tolerance)
}

/// Running sums of one activation.
#[derive(Default)]
struct Sum {
    name: String,
    difference: f64,
    reference: f64,
    max_abs: f64,
}

#[derive(Default)]
struct Sums {
    probes: usize,
    /// In the model's running order.
    order: Vec<Sum>,
    index: HashMap<String, usize>,
    only_model: Vec<String>,
    only_reference: Vec<String>,
    kl: f64,
    agree: usize,
    positions: usize,
}

impl Sums {
    /// Runs `model` on one probe and compares what it does with `expected` on the fly.
    fn add(
        &mut self,
        model: &dyn Traced,
        probe: &[u32],
        expected: Vec<Activation>,
        logits: bool,
    ) -> Result<()> {
        self.probes += 1;
        let mut left: HashMap<String, Activation> =
            expected.into_iter().map(|a| (a.name.clone(), a)).collect();
        let mut tap = |name: &str, value: Tensor<3>| {
            let reference = left.remove(name);
            self.compare_one(name, &value, reference);
            value
        };
        let output = model.trace(probe, &mut tap)?;
        let reference = left.remove(OUTPUT);
        if let Some(reference) = &reference
            && logits
            && model.has_logits()
            && reference.shape == output.dims()
        {
            self.compare_logits(&output, &reference.values);
        }
        self.compare_one(OUTPUT, &output, reference);
        let mut rest: Vec<String> = left.into_keys().collect();
        rest.sort();
        rest.into_iter().for_each(|name| note(&mut self.only_reference, &name));
        Ok(())
    }

    fn compare_one(&mut self, name: &str, value: &Tensor<3>, reference: Option<Activation>) {
        let Some(reference) = reference else { return note(&mut self.only_model, name) };
        if reference.shape != value.dims() {
            let (ours, theirs) = (value.dims(), reference.shape);
            note(&mut self.only_model, &format!("{name} {ours:?}"));
            return note(&mut self.only_reference, &format!("{name} {theirs:?}"));
        }
        let at = *self.index.entry(name.to_string()).or_insert_with(|| {
            self.order.push(Sum { name: name.into(), ..Sum::default() });
            self.order.len() - 1
        });
        let sum = &mut self.order[at];
        ops::with_values(value, |values| {
            for (&a, &b) in values.iter().zip(&reference.values) {
                let gap = f64::from(a) - f64::from(b);
                // Equal infinities agree; any other value that is not finite does not.
                let gap = if a == b {
                    0.0
                } else if gap.is_finite() {
                    gap
                } else {
                    f64::INFINITY
                };
                sum.difference += gap * gap;
                sum.reference += f64::from(b) * f64::from(b);
                sum.max_abs = sum.max_abs.max(gap.abs());
            }
        });
    }

    fn compare_logits(&mut self, output: &Tensor<3>, reference: &[f32]) {
        let vocab = output.dims()[2];
        ops::with_values(output, |values| {
            for (a, b) in values.chunks_exact(vocab).zip(reference.chunks_exact(vocab)) {
                let kl = kl_divergence(b, log_sum_exp(b), a, log_sum_exp(a));
                self.kl += if kl.is_nan() { f64::INFINITY } else { kl };
                self.agree += usize::from(top(a) == top(b));
                self.positions += 1;
            }
        });
    }

    fn finish(self, tolerance: Tolerance) -> Result<Comparison> {
        if self.probes == 0 {
            return Err(Error::NothingShared { what: "no probe inputs were given".into() });
        }
        let activations: Vec<Difference> = self.order.iter().map(Sum::difference).collect();
        let output = activations.iter().find(|d| d.name == OUTPUT).ok_or_else(|| {
            Error::NothingShared { what: "the outputs of the two models differ in shape".into() }
        })?;
        let per = |sum: f64| (self.positions > 0).then(|| sum / self.positions as f64);
        let output = OutputDifference {
            max_abs: output.max_abs,
            error: output.error,
            kl: per(self.kl),
            top1_agreement: per(self.agree as f64),
        };
        let bound = match tolerance {
            Tolerance::Relative(bound) => bound,
            Tolerance::Divergence(_) => 0.5,
        };
        let origins = origins(&activations, bound);
        let equal = match tolerance {
            Tolerance::Relative(bound) => activations.iter().all(|d| d.error <= bound),
            Tolerance::Divergence(most) => match output.kl {
                Some(kl) => kl <= most,
                None => output.error <= bound,
            },
        };
        Ok(Comparison {
            equal,
            first: origins.first().cloned(),
            origins,
            activations,
            output,
            only_model: self.only_model,
            only_reference: self.only_reference,
        })
    }
}

impl Sum {
    fn difference(&self) -> Difference {
        let error = self.difference.sqrt() / (self.reference.sqrt() + 1e-12);
        let error = if error.is_nan() { f64::INFINITY } else { error };
        Difference { name: self.name.clone(), error, max_abs: self.max_abs }
    }
}

fn note(list: &mut Vec<String>, name: &str) {
    if !list.iter().any(|known| known == name) {
        list.push(name.into());
    }
}

fn top(row: &[f32]) -> usize {
    (0..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best })
}

/// Activations that are wrong while their input is right. `SITE:out` is fed by `SITE:in`; anything
/// else is fed by what came before, so it counts only while all of that is right.
fn origins(activations: &[Difference], bound: f64) -> Vec<Divergence> {
    let errors: HashMap<&str, f64> =
        activations.iter().map(|d| (d.name.as_str(), d.error)).collect();
    let mut found = Vec::new();
    let mut clean = true;
    let mut middle = false;
    for (at, difference) in activations.iter().enumerate() {
        let name = difference.name.as_str();
        if name.ends_with("resid.pre") {
            middle = false;
        }
        let wrong = difference.error > bound;
        let input = name.strip_suffix(":out").map(|site| format!("{site}:in"));
        let fed_well = match input.as_deref().and_then(|input| errors.get(input)) {
            Some(error) => *error <= bound,
            None => clean,
        };
        if wrong && fed_well {
            let before = activations[..at].last().map(|d| d.name.clone());
            found.push(Divergence {
                name: name.into(),
                error: difference.error,
                suspect: suspect(name, before.as_deref(), middle),
                after: input.or(before),
            });
        }
        clean &= !wrong;
        middle |= name.ends_with("resid.mid");
    }
    found
}

/// What lies between two neighbouring activations.
fn suspect(name: &str, before: Option<&str>, behind_mixer: bool) -> String {
    let fed_by_norm = before.is_some_and(|before| before.contains(".resid."));
    if let Some(site) = name.strip_suffix(":out") {
        format!("the weight, bias or operator of `{site}`")
    } else if name == "lm_head:in" {
        "the final norm".into()
    } else if name == OUTPUT {
        "the final norm or the head".into()
    } else if before.is_none() {
        "the embeddings (token, position or segment) or their norm".into()
    } else if name.ends_with(":in") && fed_by_norm {
        format!("the norm in front of `{}`", name.trim_end_matches(":in"))
    } else if name.ends_with(":in") && behind_mixer {
        "the activation function or the gating of the ffn".into()
    } else if name.ends_with(":in") {
        "the attention itself: rotary positions, mask, scale, head count or head order".into()
    } else {
        "the residual wiring or a norm on the branch's output".into()
    }
}

#[cfg(test)]
mod tests;
