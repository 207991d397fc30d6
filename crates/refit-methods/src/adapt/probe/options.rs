//! What the heads of this folder have in common: where the labels stand, and how the head is fitted.

use clap::Args;
use refit_nn::classifier::Dense;
use refit_train::logistic;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Labels, head and penalty.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct ProbeOptions {
    /// Column of the table that holds the texts.
    #[arg(long, value_name = "COLUMN", default_value = "text")]
    pub text_column: String,
    /// Column of the table that holds the labels.
    #[arg(long, value_name = "COLUMN", default_value = "label")]
    pub label_column: String,
    /// Names of the classes in the order of their numbers. By default those that occur: by size where all are whole numbers,
    /// else by name.
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub labels: Vec<String>,
    /// Use at most this many examples, drawn by the seed; every class keeps two at least.
    #[arg(long, value_name = "N")]
    pub max_examples: Option<usize>,
    /// Strength of the L2 penalty on the head, on standardized features. By default chosen among 1, 0.1, ... 1e-6 by
    /// cross-entropy on held-out examples.
    #[arg(long, value_name = "STRENGTH")]
    pub l2: Option<f64>,
    /// Share of each class that is held out to choose it; the head is then fitted to all examples.
    #[arg(long, value_name = "SHARE", default_value_t = 0.1)]
    pub dev_share: f64,
    /// The layer that BERT, RoBERTa and DistilBERT have between the first token and the head.
    #[arg(long, value_enum, default_value_t)]
    pub pooler: Pooler,
}

crate::paper_defaults!(ProbeOptions);

/// The layer between an encoder and its head.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Pooler {
    /// The model's own where it has one, else `pass-through`.
    #[default]
    Auto,
    /// The model's own; an error where it has none.
    Own,
    /// A diagonal layer that lets the first token's vector pass nearly unbent.
    PassThrough,
}

impl From<Pooler> for Dense {
    fn from(pooler: Pooler) -> Self {
        match pooler {
            Pooler::Auto => Self::Auto,
            Pooler::Own => Self::Own,
            Pooler::PassThrough => Self::PassThrough,
        }
    }
}

impl ProbeOptions {
    /// Checks the numbers that no data are needed for.
    ///
    /// # Errors
    /// [`Error::Range`] and [`Error::Conflict`].
    pub fn check(&self, method: &'static str) -> Result<()> {
        if let Some(l2) = self.l2.filter(|l2| !(*l2 >= 0.0 && l2.is_finite())) {
            return Err(Error::range(method, "l2", l2, "0 or more"));
        }
        if !(self.dev_share > 0.0 && self.dev_share < 1.0) {
            let expected = "a share between 0 and 1";
            return Err(Error::range(method, "dev_share", self.dev_share, expected));
        }
        let mut names: Vec<&String> = self.labels.iter().collect();
        names.sort();
        if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            let problem = format!("the class `{}` is named twice in labels", pair[0]);
            return Err(Error::Conflict { method, problem });
        }
        Ok(())
    }

    /// What the solver takes.
    pub fn logistic(&self, seed: u64) -> logistic::Options {
        logistic::Options { l2: self.l2, dev_share: self.dev_share, seed }
    }
}
