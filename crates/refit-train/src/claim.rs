//! Claims: a method's central result as an experiment that anyone can rerun.
//!
//! A [`Claim`] is a question and a function. The function receives a [`ClaimContext`], runs its
//! *arms* (the method and its rivals) over *seeds*, records metrics, and states *checks*; the
//! harness times every trial, notes its peak memory, caches finished trials so that an interrupted
//! claim goes on where it stopped, and turns the checks into a verdict:
//!
//! ```
//! use refit_train::claim::{Claim, ClaimContext, RunOptions, Verdict};
//! use refit_train::BoxError;
//!
//! fn experiment(cx: &mut ClaimContext) -> Result<(), BoxError> {
//!     cx.param("tokens", 4096);
//!     for seed in cx.seeds().to_vec() {
//!         for (arm, perplexity) in [("magnitude", 30.0), ("magnitude + dsnot", 20.0)] {
//!             cx.arm(arm, seed, |trial| {
//!                 trial.record("perplexity", perplexity);
//!                 Ok(())
//!             })?;
//!         }
//!     }
//!     let ratio = cx.ratio("magnitude + dsnot", "magnitude", "perplexity");
//!     cx.check("at most 0.8 x magnitude in every seed", ratio.iter().all(|r| *r <= 0.8),
//!         format!("ratios {ratio:.2?}"));
//!     Ok(())
//! }
//! let claim = Claim { method: "dsnot", question: "Does swapping repair a mask?",
//!     paper: "arXiv:2310.08915", assets: &[], minutes: 1.0, seeds: &[0, 1, 2], run: experiment };
//! let report = claim.run(&RunOptions::default());
//! assert_eq!(report.verdict, Verdict::Reproduced);
//! ```

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::BoxError;
use crate::measure::{Cost, Machine, measure};
use crate::stats;

mod cache;
mod render;

use cache::Cache;

/// A central result of a paper, small enough to check in minutes.
#[derive(Debug, Clone, Copy)]
pub struct Claim {
    /// Name of the method, as people type it.
    pub method: &'static str,
    /// What is asked, in one sentence.
    pub question: &'static str,
    /// Where the claim was made.
    pub paper: &'static str,
    /// Source strings of what the experiment needs (`pypi:…`, `deb:…`, `builtin:…`).
    pub assets: &'static [&'static str],
    /// Minutes on two cores, roughly.
    pub minutes: f64,
    /// Seeds of a full run; a quick run takes the first.
    pub seeds: &'static [u64],
    /// The experiment.
    pub run: fn(&mut ClaimContext) -> Result<(), BoxError>,
}

/// Finds an asset by its source string.
pub type Resolve<'a> = &'a dyn Fn(&str) -> Result<PathBuf, BoxError>;

/// How a claim is run.
pub struct RunOptions<'a> {
    /// First seed only; experiments may also shrink their data.
    pub quick: bool,
    /// Replaces the claim's own seeds.
    pub seeds: Option<Vec<u64>>,
    /// Where finished trials are kept, and where experiments may write; `None` keeps nothing.
    pub work: Option<PathBuf>,
    /// Run everything again, whatever is cached.
    pub fresh: bool,
    /// The command line to print in the report.
    pub command: Option<String>,
    /// Fetches assets.
    pub resolve: Resolve<'a>,
    /// Receives one line per step.
    pub progress: &'a dyn Fn(&str),
}

impl Default for RunOptions<'_> {
    fn default() -> Self {
        Self {
            quick: false,
            seeds: None,
            work: None,
            fresh: false,
            command: None,
            resolve: &|source| Err(format!("no resolver was given for `{source}`").into()),
            progress: &|_| {},
        }
    }
}

/// What a claim comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Every check holds.
    Reproduced,
    /// The experiment ran, and at least one check does not hold.
    NotShown,
    /// The experiment did not run to its end.
    FailedToRun,
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Reproduced => "reproduced",
            Self::NotShown => "not shown",
            Self::FailedToRun => "failed to run",
        })
    }
}

/// One arm with one seed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Trial {
    /// Name of the arm.
    pub arm: String,
    /// Seed.
    pub seed: u64,
    /// Measured values by metric, in the order of recording; may be infinite.
    pub metrics: Vec<Metric>,
    /// Time and memory of this trial.
    pub cost: Cost,
}

/// A measured value.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Metric {
    /// Name, such as `perplexity`.
    pub name: String,
    /// Value. JSON has no infinities, so those travel as the strings `inf`, `-inf` and `nan`.
    #[serde(with = "cache::any_f64")]
    pub value: f64,
}

impl Trial {
    fn new(arm: &str, seed: u64) -> Self {
        Self { arm: arm.into(), seed, metrics: Vec::new(), cost: Cost::default() }
    }

    /// Records a metric, replacing an earlier value.
    pub fn record(&mut self, metric: &str, value: f64) {
        match self.metrics.iter_mut().find(|m| m.name == metric) {
            Some(known) => known.value = value,
            None => self.metrics.push(Metric { name: metric.into(), value }),
        }
    }

    /// The recorded value of `metric`.
    pub fn get(&self, metric: &str) -> Option<f64> {
        self.metrics.iter().find(|m| m.name == metric).map(|m| m.value)
    }
}

/// A statement that the experiment either shows or does not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// The statement, with its threshold.
    pub statement: String,
    /// Whether it holds.
    pub holds: bool,
    /// The numbers behind it.
    pub detail: String,
}

/// What an experiment is run with, and where it puts its results.
pub struct ClaimContext<'a> {
    seeds: Vec<u64>,
    options: &'a RunOptions<'a>,
    method: &'static str,
    parameters: BTreeMap<String, serde_json::Value>,
    trials: Vec<Trial>,
    checks: Vec<Check>,
    notes: Vec<String>,
    reason: Option<String>,
    cache: Cache,
}

impl ClaimContext<'_> {
    /// Seeds to run.
    pub fn seeds(&self) -> &[u64] {
        &self.seeds
    }

    /// Whether a short version was asked for.
    pub fn quick(&self) -> bool {
        self.options.quick
    }

    /// Path of an asset, fetched if need be.
    ///
    /// # Errors
    /// Sources that cannot be reached.
    pub fn asset(&self, source: &str) -> Result<PathBuf, BoxError> {
        (self.options.progress)(&format!("fetching {source}"));
        (self.options.resolve)(source)
    }

    /// A folder for intermediate files, which outlives the run so that it can be resumed.
    ///
    /// # Errors
    /// A folder that cannot be created.
    pub fn work_dir(&self) -> Result<PathBuf, BoxError> {
        let dir = match &self.options.work {
            Some(work) => work.join(self.method),
            None => std::env::temp_dir().join(format!("refit-claim-{}", std::process::id())),
        };
        std::fs::create_dir_all(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
        Ok(dir)
    }

    /// Declares a parameter of the experiment. Trials are cached under all parameters declared
    /// before them, so whatever changes a result belongs here: sizes, the model's hash, settings.
    pub fn param(&mut self, name: &str, value: impl Into<serde_json::Value>) {
        self.parameters.insert(name.into(), value.into());
    }

    /// Runs one trial, timed, unless it was finished by an earlier run with the same parameters.
    ///
    /// # Errors
    /// Whatever `work` returns, with arm and seed in front.
    pub fn arm(
        &mut self,
        arm: &str,
        seed: u64,
        work: impl FnOnce(&mut Trial) -> Result<(), BoxError>,
    ) -> Result<(), BoxError> {
        let key = cache::key(self.method, self.options.quick, &self.parameters, arm, seed);
        if let Some(trial) = self.cache.find(&key) {
            (self.options.progress)(&format!("{arm}, seed {seed}: kept from an earlier run"));
            self.keep(trial);
            return Ok(());
        }
        (self.options.progress)(&format!("{arm}, seed {seed}"));
        let mut trial = Trial::new(arm, seed);
        let (result, cost) = measure(|| work(&mut trial));
        result.map_err(|e| format!("{arm}, seed {seed}: {e}"))?;
        trial.cost = cost;
        self.cache.store(&key, &trial)?;
        self.keep(trial);
        Ok(())
    }

    fn keep(&mut self, trial: Trial) {
        self.trials.retain(|t| (&t.arm, t.seed) != (&trial.arm, trial.seed));
        self.trials.push(trial);
    }

    /// Records a metric outside a timed trial: a derived number, or one arm's share of common work.
    pub fn record(&mut self, arm: &str, seed: u64, metric: &str, value: f64) {
        let known = self.trials.iter().position(|t| t.arm == arm && t.seed == seed);
        let index = known.unwrap_or_else(|| {
            self.trials.push(Trial::new(arm, seed));
            self.trials.len() - 1
        });
        self.trials[index].record(metric, value);
    }

    /// A recorded value.
    pub fn value(&self, arm: &str, seed: u64, metric: &str) -> Option<f64> {
        self.trials.iter().find(|t| t.arm == arm && t.seed == seed)?.get(metric)
    }

    /// Values of `metric` in `arm`, in the order of seeds. Seeds without one are left out.
    pub fn values(&self, arm: &str, metric: &str) -> Vec<f64> {
        self.seeds.iter().filter_map(|&seed| self.value(arm, seed, metric)).collect()
    }

    /// Mean of `metric` over the seeds of `arm`; `NaN`, which satisfies no threshold, without any.
    pub fn mean(&self, arm: &str, metric: &str) -> f64 {
        stats::mean(&self.values(arm, metric)).unwrap_or(f64::NAN)
    }

    /// `metric` of `arm` divided by that of `rival`, for every seed that has both.
    pub fn ratio(&self, arm: &str, rival: &str, metric: &str) -> Vec<f64> {
        self.paired(arm, rival, metric).map(|(a, b)| a / b).collect()
    }

    /// `metric` of `arm` minus that of `rival`, for every seed that has both.
    pub fn difference(&self, arm: &str, rival: &str, metric: &str) -> Vec<f64> {
        self.paired(arm, rival, metric).map(|(a, b)| a - b).collect()
    }

    fn paired(&self, arm: &str, rival: &str, metric: &str) -> impl Iterator<Item = (f64, f64)> {
        let both =
            |&seed: &u64| Some((self.value(arm, seed, metric)?, self.value(rival, seed, metric)?));
        self.seeds.iter().filter_map(both)
    }

    /// States what the paper claims, with its threshold, and whether the numbers show it.
    pub fn check(&mut self, statement: &str, holds: bool, detail: impl Into<String>) {
        let detail = detail.into();
        self.checks.push(Check { statement: statement.into(), holds, detail });
    }

    /// Adds a remark to the report.
    pub fn note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }

    /// The likely reason to print should the claim not be shown.
    pub fn likely_reason(&mut self, reason: impl Into<String>) {
        self.reason = Some(reason.into());
    }

    /// Tells the user what is going on.
    pub fn progress(&self, line: &str) {
        (self.options.progress)(line);
    }
}

impl Claim {
    /// Runs the experiment. Failures are part of the report, never an error or a panic.
    pub fn run(&self, options: &RunOptions) -> Report {
        let seeds = match &options.seeds {
            Some(seeds) => seeds.clone(),
            None if options.quick => self.seeds.iter().copied().take(1).collect(),
            None => self.seeds.to_vec(),
        };
        let folder = options.work.as_ref().map(|work| work.join(self.method));
        let (cache, note) = Cache::open(folder.as_deref(), options.fresh);
        let mut cx = ClaimContext {
            seeds,
            options,
            method: self.method,
            parameters: BTreeMap::new(),
            trials: Vec::new(),
            checks: Vec::new(),
            notes: note.into_iter().collect(),
            reason: None,
            cache,
        };
        let ran = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| (self.run)(&mut cx)));
        let failure = match ran {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(panic) => Some(format!("the experiment panicked: {}", panic_text(&panic))),
        };
        self.report(cx, failure)
    }

    fn report(&self, cx: ClaimContext, failure: Option<String>) -> Report {
        let (verdict, reason) = match failure {
            Some(failure) => (Verdict::FailedToRun, Some(without_paths(&failure))),
            None if cx.checks.is_empty() => {
                (Verdict::NotShown, Some("the experiment made no check".into()))
            }
            None if cx.checks.iter().all(|check| check.holds) => (Verdict::Reproduced, None),
            None => (Verdict::NotShown, cx.reason),
        };
        let costs = cx.trials.iter().map(|trial| trial.cost);
        Report {
            method: self.method.into(),
            question: self.question.into(),
            paper: self.paper.into(),
            verdict,
            reason,
            quick: cx.options.quick,
            seeds: cx.seeds,
            checks: cx.checks,
            cost: costs.reduce(Cost::then).unwrap_or_default(),
            trials: cx.trials,
            parameters: cx.parameters,
            notes: cx.notes,
            assets: self.assets.iter().map(|asset| (*asset).to_string()).collect(),
            command: cx.options.command.clone().unwrap_or_else(|| {
                let quick = if cx.options.quick { " --quick" } else { "" };
                format!("refit claim {}{quick}", self.method)
            }),
            machine: Machine::here(),
            version: env!("CARGO_PKG_VERSION").into(),
        }
    }
}

fn panic_text(panic: &Box<dyn std::any::Any + Send>) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message").to_string()
}

/// Reports are published, so absolute folders are cut down to the name of what they lead to.
fn without_paths(text: &str) -> String {
    let short = |word: &str| {
        let inner = word.trim_matches(|c: char| "`'\":,;()".contains(c));
        match Path::new(inner).file_name().and_then(|name| name.to_str()) {
            Some(name) if inner.starts_with('/') => word.replace(inner, name),
            _ => word.to_string(),
        }
    };
    text.split(' ').map(short).collect::<Vec<_>>().join(" ")
}

/// The outcome of a claim: what `refit claim` prints and `docs/claims/` keeps.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Name of the method.
    pub method: String,
    /// What was asked.
    pub question: String,
    /// Where the claim was made.
    pub paper: String,
    /// What it came to.
    pub verdict: Verdict,
    /// Why not, when it was not reproduced.
    pub reason: Option<String>,
    /// Whether this was the short version.
    pub quick: bool,
    /// Seeds that were run.
    pub seeds: Vec<u64>,
    /// Statements, with the numbers behind them.
    pub checks: Vec<Check>,
    /// All trials.
    pub trials: Vec<Trial>,
    /// Time of all trials together, and the highest peak memory of any.
    pub cost: Cost,
    /// Parameters of the experiment.
    pub parameters: BTreeMap<String, serde_json::Value>,
    /// Remarks.
    pub notes: Vec<String>,
    /// What the experiment was run on.
    pub assets: Vec<String>,
    /// How to run it again.
    pub command: String,
    /// Where it was run.
    pub machine: Machine,
    /// Version of refit.
    pub version: String,
}

impl Report {
    /// Writes `METHOD.md` and `METHOD.json` into `dir` and returns their paths.
    ///
    /// # Errors
    /// A folder or file that cannot be written.
    pub fn write(&self, dir: &Path) -> crate::Result<[PathBuf; 2]> {
        std::fs::create_dir_all(dir).map_err(crate::Error::io(dir))?;
        let paths = ["md", "json"].map(|kind| dir.join(format!("{}.{kind}", self.method)));
        for (path, text) in paths.iter().zip([self.to_markdown(), self.to_json()]) {
            std::fs::write(path, text).map_err(crate::Error::io(path))?;
        }
        Ok(paths)
    }

    /// The report as indented JSON with a final line break.
    pub fn to_json(&self) -> String {
        let json = serde_json::to_string_pretty(self);
        json.expect("invariant: a report is plain data") + "\n"
    }

    /// Reads what [`Self::to_json`] wrote.
    ///
    /// # Errors
    /// A file that is missing or is no report.
    pub fn read(path: &Path) -> crate::Result<Self> {
        let text = std::fs::read_to_string(path).map_err(crate::Error::io(path))?;
        serde_json::from_str(&text).map_err(|e| crate::Error::Malformed {
            path: path.into(),
            problem: format!("not a claim report ({e}); run the claim again to rewrite it"),
        })
    }
}

#[cfg(test)]
mod tests;
