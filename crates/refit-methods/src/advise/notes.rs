//! What goes with the advice: ranks, the order of composition, how to measure, and what studies have found.
//!
//! The findings are those of ZeroQuant-V2 (arXiv:2303.08302) and of the survey as they are recalled; none was measured here, and
//! each says so.

use refit_store::architecture::Kind;

use super::facts::{Facts, SizeClass};
use super::routes;
use super::{Advised, Keep, Needs, Question};
use crate::inputs::ModelInput;
use crate::quantize::export::Target;

/// In which order methods are put together.
pub const ORDER: &[&str] = &["prune or factorize", "recover", "quantize", "compensate", "export"];

/// Methods in the order in which equals are offered: what hits the size, then what studies found best, then the baselines.
const PREFERENCE: &[&str] = &[
    "fit",
    "gptq",
    "awq",
    "hqq",
    "finequant",
    "rtn",
    "lorc",
    "export",
    "smoothquant",
    "repquant",
    "lora",
    "dora",
];

/// Texts of three unrelated kinds that travel with refit.
const DOMAINS: [&str; 3] = ["builtin:kjv", "builtin:man", "builtin:wordnet"];

/// The order of the advice: cheapest needs first; among those, what keeps every value.
pub fn rank(advised: &Advised) -> (Needs, bool, usize, &'static str) {
    let at = PREFERENCE.iter().position(|name| *name == advised.method);
    (advised.needs, !advised.exact, at.unwrap_or(PREFERENCE.len()), advised.method)
}

/// Commands that measure the first result.
pub fn evaluate(model: &ModelInput, question: &Question, advised: &[Advised]) -> Vec<String> {
    let Some(first) = advised.first() else { return Vec::new() };
    if model.artifact.architecture().kind != Kind::Decoder {
        return Vec::new();
    }
    let texts = match question.keep {
        Keep::General => DOMAINS.to_vec(),
        Keep::Task => vec!["TASK.txt"],
    };
    texts.into_iter().map(|text| routes::eval(&first.result, &model.source, text)).collect()
}

/// What else is worth knowing.
pub fn notes(facts: &Facts, question: &Question, advised: &[Advised]) -> Vec<String> {
    let mut notes = Vec::new();
    if !facts.known {
        notes.push(format!(
            "the architecture is not known and was inferred from names and shapes ({}): methods that look at weights alone \
             apply, those that run the model do not",
            facts.model_type
        ));
    }
    notes.extend(facts.grid.warning());
    if let super::Budget::Bytes(target) = question.budget
        && facts.bytes <= target
    {
        notes.push(format!(
            "the model takes {} bytes as it is, which is within the size",
            facts.bytes
        ));
    }
    notes.push(match facts.size_class {
        SizeClass::Medium => format!(
            "a medium model ({} parameters; the threshold of a billion is recalled): training all weights is an option",
            facts.parameters
        ),
        SizeClass::RealLarge => format!(
            "a real large model ({} parameters; the threshold of a billion is recalled): no training, or adapters",
            facts.parameters
        ),
    });
    notes.push(
        "sizes are those of exported files: a method's own directory holds decoded weights and is no smaller".into(),
    );
    let any = |wanted: &dyn Fn(&Advised) -> bool| advised.iter().any(wanted);
    let bits =
        |advised: &Advised, range: std::ops::Range<f64>| range.contains(&advised.bits_per_weight);
    if any(&|a| bits(a, 8.0..9.5)) {
        notes.push("recalled: weights of 8 bits are nearly lossless".into());
    }
    if any(&|a| matches!(a.method, "smoothquant" | "repquant")) {
        notes.push("recalled: activations of 8 bits hurt more than weights of 8 bits".into());
    }
    if any(&|a| bits(a, 3.9..5.5)) {
        notes.push(
            "recalled: at 4 bits zero points help, and small groups mend most of what is lost; for large models GPTQ is the best \
             of the plain methods"
                .into(),
        );
    }
    if any(&|a| a.rounding_error.is_some()) {
        notes.push("recalled: low-rank compensation (lorc) adds to any quantizer".into());
    }
    if question.keep == Keep::General {
        notes.push(
            "compression can cost abilities that a single text does not show: measure at least three unrelated domains, and \
             distrust a result whose worst domain loses more than twice the mean"
                .into(),
        );
    }
    if any(&|a| a.runtime == Target::Gguf) && question.runtime.is_none() {
        notes.push("--runtime asks for one format only".into());
    }
    notes
}
