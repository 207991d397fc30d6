//! What to try for a model, a size and a machine, and what not to, each with its reason (the rules of arXiv:2402.09748 as far as
//! they were read or recalled; see [`crate::survey`]).
//!
//! Every registered method is either advised or excluded. Advised means that its dry run passes on this very model, with the
//! parameters and commands that are printed, within the budgets of size, memory, text and training. Methods that need nothing
//! come first, then those that look at text, then those that train ([`Effort`]). Nothing that is advised is lost when a budget
//! grows: parameters follow from the size alone, and of calibration text and batches as much is taken as the budgets pay.
//!
//! Sizes are those of the files that `refit export` writes: a method's own directory holds decoded weights and is no smaller.

use serde::Serialize;

use crate::error::{Error, Result};
use crate::inputs::{ModelInput, TextData, TrainingData};
use crate::method::{Effort, Info, Need};
use crate::prune::mask::Pattern;
use crate::quantize::export::Target;
use crate::quantize::fit::size::Size as Bytes;
use crate::registry;

mod facts;
mod files;
mod judge;
mod notes;
mod routes;
mod ways;

pub use facts::{Facts, SizeClass};
use files::Size;

/// What is asked.
#[derive(Clone, Debug)]
pub struct Question {
    /// What the result may take.
    pub budget: Budget,
    /// The only format that is of use.
    pub runtime: Option<Target>,
    /// Tokens of text there are to look at or to learn from; no limit when absent.
    pub tokens: Option<u64>,
    /// Tokens that training may pass over; no limit when absent.
    pub train_tokens: Option<u64>,
    /// Bytes of memory; no limit when absent.
    pub memory: Option<u64>,
    /// What the result must still be able to do.
    pub keep: Keep,
    /// The most that a method may need.
    pub needs: Needs,
    /// Zeros that the runtime makes use of: pruning is advised for them alone.
    pub pattern: Option<Pattern>,
    /// Judge this method only.
    pub method: Option<String>,
    /// Text that plans are made with, and how it is typed.
    pub text: (String, Vec<TextData>),
    /// Training data that plans are made with, and how they are typed.
    pub data: (String, Vec<TrainingData>),
}

/// What the result may take.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Budget {
    /// Bytes of weight files.
    Bytes(u64),
    /// Bits per weight of the matrices, scales and zero points included.
    BitsPerWeight(f64),
}

impl Budget {
    /// A size by this measure.
    fn of(self, size: Size) -> f64 {
        match self {
            Self::Bytes(_) => size.bytes as f64,
            Self::BitsPerWeight(_) => size.bpw,
        }
    }

    /// Whether a size is within it.
    fn pays(self, size: Size) -> bool {
        match self {
            Self::Bytes(target) => size.bytes <= target,
            // Bits per weight that were computed from whole bytes are those bytes again.
            Self::BitsPerWeight(bits) => size.bpw <= bits + 1e-9,
        }
    }

    fn in_words(self) -> String {
        match self {
            Self::Bytes(target) => Bytes(target).to_string(),
            Self::BitsPerWeight(bits) => format!("{bits} bits per weight"),
        }
    }

    /// A size by this measure, in words.
    fn words_of(self, size: Size) -> String {
        match self {
            Self::Bytes(_) => Bytes(size.bytes).to_string(),
            Self::BitsPerWeight(_) => format!("{:.4} bits per weight", size.bpw),
        }
    }
}

/// What the result must still be able to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Keep {
    /// Everything that the model can do.
    #[default]
    General,
    /// One task.
    Task,
}

/// The most that a method may need.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum, Serialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum Needs {
    /// Weights alone.
    None,
    /// Forward passes over text.
    Calibration,
    /// Training.
    #[default]
    Training,
}

impl Needs {
    /// What a method's cost class comes to.
    pub fn of(effort: Effort) -> Self {
        match effort {
            Effort::None => Self::None,
            Effort::Calibration | Effort::Evaluation => Self::Calibration,
            Effort::FineTuning | Effort::Retraining => Self::Training,
        }
    }

    /// As it is typed.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Calibration => "calibration",
            Self::Training => "training",
        }
    }

    fn what(self) -> &'static str {
        match self {
            Self::None => "nothing",
            Self::Calibration => "calibration text",
            Self::Training => "training data",
        }
    }
}

impl Question {
    /// Finds flags that contradict each other, and numbers that say nothing.
    ///
    /// # Errors
    /// [`Error::Conflict`] naming the need, [`Error::Range`], [`Error::UnknownMethod`].
    pub fn check(&self) -> Result<()> {
        if let Budget::BitsPerWeight(bits) = self.budget
            && !(bits > 0.0 && bits.is_finite())
        {
            return Err(Error::range(NAME, "bpw", bits, "a number of bits above 0"));
        }
        let conflict = |method, problem| Err(Error::Conflict { method, problem });
        if self.train_tokens.is_some_and(|tokens| tokens > 0) && self.needs < Needs::Training {
            let problem = format!(
                "--train-tokens is for training, and --needs {} allows none: leave one of them out",
                self.needs.as_str()
            );
            return conflict(NAME, problem);
        }
        let Some(name) = &self.method else { return Ok(()) };
        let info = registry::get(name)?.info;
        let (least, what) = (least(info), least(info).what());
        if least > self.needs {
            let problem =
                format!("it needs {what}, and --needs {} allows none", self.needs.as_str());
            return conflict(info.name, problem);
        }
        if least > Needs::None && self.tokens == Some(0) {
            let problem = format!("it needs {what}, and --tokens-available is 0");
            return conflict(info.name, problem);
        }
        if least == Needs::Training && self.train_tokens == Some(0) {
            let problem = "it needs training, and --train-tokens is 0".to_owned();
            return conflict(info.name, problem);
        }
        Ok(())
    }
}

/// The least that a method can do with.
fn least(info: &Info) -> Needs {
    match (Needs::of(info.taxonomy.needs), info.inputs.text) {
        (Needs::Calibration, Need::Optional | Need::No) if info.inputs.labelled == Need::No => {
            Needs::None
        }
        (needs, _) => needs,
    }
}

/// Name in messages.
const NAME: &str = "advise";

/// The answer.
#[derive(Clone, Debug, Serialize)]
pub struct Advice {
    /// What was found out about the model.
    pub model: Facts,
    /// The smallest file that refit can write of it in the formats asked for, and how.
    pub smallest: Option<Smallest>,
    /// What to try, in this order.
    pub advised: Vec<Advised>,
    /// Everything else, and why.
    pub excluded: Vec<Excluded>,
    /// In which order methods are put together.
    pub order: &'static [&'static str],
    /// Commands that measure the first advised result.
    pub evaluate: Vec<String>,
    /// What else is worth knowing.
    pub notes: Vec<String>,
}

/// The smallest file.
#[derive(Clone, Debug, Serialize)]
pub struct Smallest {
    /// What it takes.
    pub bytes: u64,
    /// The same by matrices.
    pub bits_per_weight: f64,
    /// The method that gives it.
    pub method: &'static str,
    /// How.
    pub commands: Vec<String>,
}

/// A method to try.
#[derive(Clone, Debug, Serialize)]
pub struct Advised {
    /// Its name.
    pub method: &'static str,
    /// The most that any step needs.
    pub needs: Needs,
    /// The format of the result.
    pub runtime: Target,
    /// Bytes of the weight files (and of the adapter beside them, where there is one).
    pub bytes: u64,
    /// Bits per weight of the matrices, scales and zero points included.
    pub bits_per_weight: f64,
    /// Squared error of rounding a sample of the weights to nearest on the grid chosen, relative; `None` where no single grid is
    /// chosen.
    pub rounding_error: Option<f64>,
    /// What it costs.
    pub cost: Cost,
    /// Whether every value is kept.
    pub exact: bool,
    /// Why.
    pub reasons: Vec<String>,
    /// What to mind.
    pub warnings: Vec<String>,
    /// Commands, in order.
    pub commands: Vec<String>,
    /// What `refit eval` measures: a model that the commands write, and what is to be put on it.
    #[serde(skip)]
    pub result: Vec<String>,
}

/// What a method costs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Cost {
    /// Tokens of text that it looks at.
    pub calibration_tokens: u64,
    /// Tokens that it trains on.
    pub trained_tokens: u64,
    /// Floating-point operations on those tokens: 6 per trained token and parameter, 4 per token that is looked at (every block
    /// runs before it is changed and afterwards).
    pub flops: f64,
    /// Most memory of any step, in bytes.
    pub peak_memory: u64,
}

/// A method that is not advised.
#[derive(Clone, Debug, Serialize)]
pub struct Excluded {
    /// Its name.
    pub method: &'static str,
    /// Why.
    pub reason: String,
    /// Where a budget is too small for it: the advised method that comes nearest.
    pub alternative: Option<&'static str>,
}

/// Answers a question about a model.
///
/// # Errors
/// Contradictory questions, files that cannot be read, a budget below the smallest file that refit can write ([`Error::Range`],
/// naming that size and the method that gives it).
pub fn advise(model: &ModelInput, question: &Question) -> Result<Advice> {
    question.check()?;
    let facts = Facts::of(model)?;
    let bench = judge::Bench::new(model, question, &facts)?;
    let smallest = bench.smallest()?;
    if let Some((size, smallest)) = &smallest
        && !question.budget.pays(*size)
    {
        let (name, value) = match question.budget {
            Budget::Bytes(target) => ("target", Bytes(target).to_string()),
            Budget::BitsPerWeight(bits) => ("bpw", bits.to_string()),
        };
        let expected = format!(
            "the smallest that refit can write of {} takes {} bytes ({}), {:.4} bits per weight: {}",
            model.source,
            size.bytes,
            Bytes(size.bytes),
            // Rounded up, so that it can be asked for.
            (size.bpw * 1e4).ceil() / 1e4,
            smallest.commands.join(" && ")
        );
        return Err(Error::range(NAME, name, value, expected));
    }
    let (mut advised, mut refused) = (Vec::new(), Vec::new());
    for entry in registry::all() {
        if question.method.as_ref().is_some_and(|only| only != entry.info.name) {
            continue;
        }
        match bench.judge(entry) {
            Ok(found) => advised.push(found),
            Err(refusal) => refused.push((entry.info, refusal)),
        }
    }
    advised.sort_by_key(notes::rank);
    let nearest = |info: &Info| {
        let affordable = advised.iter().filter(|other| other.needs <= least(info));
        // The first of those that need most; ranks rise with needs.
        let most = affordable.clone().map(|other| other.needs).max()?;
        affordable.into_iter().find(|other| other.needs == most).map(|other| other.method)
    };
    let excluded = refused.into_iter().map(|(info, refusal)| Excluded {
        method: info.name,
        alternative: if refusal.over_budget { nearest(info) } else { None },
        reason: refusal.reason,
    });
    let excluded = excluded.collect();
    Ok(Advice {
        evaluate: notes::evaluate(model, question, &advised),
        notes: notes::notes(&facts, question, &advised),
        model: facts,
        smallest: smallest.map(|(_, smallest)| smallest),
        advised,
        excluded,
        order: notes::ORDER,
    })
}
