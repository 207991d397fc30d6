//! The loop.

mod ranks;
mod resume;

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::time::Instant;

use burn::module::ParamId;
use burn::tensor::{Gradients, Tensor};
use refit_nn::ops::sink::with_sink;
use refit_nn::{Parameter, Trainable};
use serde::{Deserialize, Serialize};

use super::checkpoint;
use super::error::{Result, TrainError};
use super::loss::Terms;
use super::metrics::Metrics;
use super::optimizer::{Optimizer, OptimizerConfig, State, Update};
use super::per_layer::{Low, Stream};
use super::ranks::{Ranks, Share};
use super::recipe::{PATIENCE, Recipe};
use super::scope::{self, Group};
use super::update;
use crate::{BoxError, heap};

/// Which micro-batch a loss is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct At {
    /// Update, counted from 0.
    pub step: u64,
    /// Micro-batch of the whole run, counted from 0: what [`Order::batch`](super::Order::batch) takes.
    pub batch: u64,
    /// The part of its rows that the loss is asked for: all of them, unless several ranks train.
    pub share: Share,
}

/// What is minimized. The loss must be a function of the model and `at` alone, or a resumed run will differ.
pub trait Objective<M> {
    /// The loss of one micro-batch, or of this rank's share of its rows.
    ///
    /// Where several ranks train, the loss of the micro-batch is the mean of the ranks' losses, weighted by their `items`: that
    /// is the loss of all rows together when every term is a mean over `items`. The ranks' terms must have the same names.
    ///
    /// # Errors
    /// Whatever the data or the model say.
    fn loss(&self, model: &M, at: At) -> Result<Terms, BoxError>;
}

impl<M, F: Fn(&M, At) -> Result<Terms, BoxError>> Objective<M> for F {
    fn loss(&self, model: &M, at: At) -> Result<Terms, BoxError> {
        self(model, at)
    }
}

/// Sees every update of every tensor: masks that must hold, gradients that are projected, statistics.
pub trait Hook {
    /// Before the optimizer runs; may change the gradient (it is clipped already).
    fn before(&mut self, _name: &str, _shape: &[usize], _value: &[f32], _grad: &mut [f32]) {}
    /// After the optimizer ran; may change the values.
    fn after(&mut self, _name: &str, _shape: &[usize], _value: &mut [f32]) {}
}

/// What one step did.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepReport {
    /// Update, counted from 0.
    pub step: u64,
    /// Weighted loss, mean over micro-batches.
    pub loss: f64,
    /// Its terms, unweighted.
    pub terms: BTreeMap<String, f64>,
    /// Norm of all gradients before clipping.
    pub grad_norm: f64,
    /// Learning rate.
    pub rate: f64,
    /// Tokens or examples.
    pub items: usize,
    /// Wall-clock seconds.
    pub seconds: f64,
}

/// Files and callbacks of a run.
#[derive(Default)]
pub struct RunOptions<'a> {
    /// Directory for checkpoints and `metrics.jsonl`; nothing is written without one.
    pub dir: Option<PathBuf>,
    /// Steps between checkpoints; 0: only at the end.
    pub every: u64,
    /// Checkpoints to keep (at least 1).
    pub keep: usize,
    /// Go on from the newest checkpoint in `dir`, if there is one.
    pub resume: bool,
    /// What the result depends on besides the recipe: hashes of base model and data. A resume must agree.
    pub identity: String,
    /// Called after every step.
    pub on_step: Option<&'a mut dyn FnMut(&StepReport)>,
    /// Called with the number of updates made when everything up to there lies on disk.
    pub on_checkpoint: Option<&'a mut dyn FnMut(u64)>,
}

/// A model in training.
pub struct Trainer<M> {
    model: Option<M>,
    recipe: Recipe,
    optimizer: Box<dyn Optimizer>,
    parameters: Vec<Parameter>,
    groups: HashMap<ParamId, (usize, Group)>,
    states: HashMap<ParamId, State>,
    averages: HashMap<ParamId, Vec<f32>>,
    hooks: Vec<Box<dyn Hook>>,
    ranks: Ranks,
    step: u64,
    guard: Guard,
    last_good: Option<PathBuf>,
    gradient_bytes: usize,
}

/// Watches for losses that run away.
#[derive(Debug, Clone, Copy)]
struct Guard {
    smooth: Option<f64>,
    best: f64,
    above: u64,
}

impl<M: Trainable> Trainer<M> {
    /// Prepares `model` for training: scope resolved, frozen parameters without gradient.
    ///
    /// # Errors
    /// Settings that cannot work, patterns that match nothing (a scope's, or GaLore's targets), parameters that share a name.
    pub fn new(model: M, recipe: Recipe) -> Result<Self> {
        recipe.check()?;
        heap::keep();
        let optimizer = recipe.optimizer.build()?;
        let model = update::tracked(model);
        let parameters = model.parameters();
        let mut names = std::collections::HashSet::new();
        if let Some(twice) = parameters.iter().find(|p| !names.insert(p.name.as_str())) {
            return Err(TrainError::Duplicate { name: twice.name.clone() });
        }
        let resolved = recipe.scope.resolve(&parameters)?;
        let train = parameters.iter().zip(&resolved).map(|(p, g)| (p.id, g.train)).collect();
        let model = update::freeze(model, &train);
        let trained = parameters.iter().enumerate().zip(resolved).filter(|(_, g)| g.train);
        let groups: HashMap<_, _> = trained.map(|((i, p), g)| (p.id, (i, g))).collect();
        if let OptimizerConfig::GaLore { targets, .. } = &recipe.optimizer {
            let mut train = parameters.iter().filter(|p| groups.contains_key(&p.id));
            if !train.any(|p| optimizer.projects(&p.name, &p.shape)) {
                return Err(scope::nearest(&targets.join("` or `"), &parameters));
            }
        }
        Ok(Self {
            model: Some(model),
            recipe,
            optimizer,
            parameters,
            groups,
            states: HashMap::new(),
            averages: HashMap::new(),
            hooks: Vec::new(),
            ranks: Ranks::default(),
            step: 0,
            guard: Guard { smooth: None, best: f64::INFINITY, above: 0 },
            last_good: None,
            gradient_bytes: 0,
        })
    }

    /// Puts another optimizer (GaLore, ScaledAdam, ...) in place of the recipe's.
    pub fn with_optimizer(mut self, optimizer: Box<dyn Optimizer>) -> Self {
        self.optimizer = optimizer;
        self
    }

    /// Adds a hook on every update.
    pub fn with_hook(mut self, hook: Box<dyn Hook>) -> Self {
        self.hooks.push(hook);
        self
    }

    /// The model as it is now, on the autodiff device.
    pub fn model(&self) -> &M {
        self.model.as_ref().expect("invariant: only `apply` takes the model, and puts it back")
    }

    /// The model, off the autodiff device.
    pub fn into_model(self) -> M {
        self.model().valid()
    }

    /// The model with the moving averages in place of the trained values; the model itself when none are kept.
    pub fn averaged(&self) -> M {
        update::change(
            self.model().valid(),
            &mut |id, _, value| value.copy_from_slice(&self.averages[&id]),
            &|id| self.averages.contains_key(&id),
        )
    }

    /// Updates made so far.
    pub fn steps_done(&self) -> u64 {
        self.step
    }

    /// Bytes of optimizer state.
    pub fn state_bytes(&self) -> usize {
        self.states.values().map(State::bytes).sum()
    }

    /// Bytes of optimizer state of each parameter that has one.
    pub fn states(&self) -> impl Iterator<Item = (&str, usize)> {
        let bytes = |p: &Parameter| self.states.get(&p.id).map(State::bytes);
        self.parameters.iter().filter_map(move |p| Some((p.name.as_str(), bytes(p)?)))
    }

    /// The most bytes that gradients of parameters took at once in any step so far. What kernels hold inside is not counted.
    pub fn gradient_bytes(&self) -> usize {
        self.gradient_bytes
    }

    /// Names of the parameters that train.
    pub fn trained(&self) -> impl Iterator<Item = &str> {
        let parameters = self.parameters.iter().filter(|p| self.groups.contains_key(&p.id));
        parameters.map(|p| p.name.as_str())
    }

    /// Makes one update.
    ///
    /// # Errors
    /// What the objective says; losses and gradients that are not finite (nothing is then updated); divergence.
    pub fn step(&mut self, objective: &impl Objective<M>) -> Result<StepReport> {
        let start = Instant::now();
        let step = self.step;
        let micro = self.recipe.accumulate;
        if self.recipe.per_layer {
            self.check_per_layer()?;
        }
        let mut gradients = update::Host::new();
        let mut low = HashMap::new();
        let mut terms: BTreeMap<String, f64> = BTreeMap::new();
        let (mut loss, mut items) = (0.0, 0);
        for i in 0..micro {
            let batch = step * micro as u64 + i as u64;
            let found = self.forward(objective, At { step, batch, share: self.ranks.share() });
            let (found, weight, all) = self.weigh(found)?;
            for (name, value) in found.terms {
                *terms.entry(name.to_owned()).or_default() += value * weight / micro as f64;
            }
            loss += found.loss * weight / micro as f64;
            items += all;
            let mut total = found.total;
            if weight != 1.0 {
                total = total * weight;
            }
            if micro > 1 {
                total = total / micro as f64;
            }
            let (mut grads, peak);
            (grads, low, peak) = self.backward(total);
            let before =
                update::bytes(&gradients) + low.values().map(|(l, _)| l.bytes()).sum::<usize>();
            let new = update::collect(self.model(), &mut grads, &mut gradients);
            self.gradient_bytes = self.gradient_bytes.max(peak).max(before + new);
        }
        self.reduce(&mut loss, &mut terms, &mut gradients);
        let twice = self
            .parameters
            .iter()
            .find(|p| low.contains_key(&p.id) && gradients.contains_key(&p.id));
        if let Some(Parameter { name, .. }) = twice {
            return Err(TrainError::Parts { step, name: name.clone() });
        }
        let norm = self.norm(&gradients, &low)?;
        let clip = self.recipe.clip.map_or(1.0, |limit| (limit / norm).min(1.0)) as f32;
        let rate = self.recipe.rate * self.recipe.schedule.factor(step, self.recipe.steps);
        self.apply(gradients, low, clip, rate);
        self.average();
        self.step += 1;
        self.watch(loss)?;
        let seconds = start.elapsed().as_secs_f64();
        Ok(StepReport { step, loss, terms, grad_norm: norm, rate, items, seconds })
    }

    /// This rank's part of the loss of a micro-batch, checked.
    fn forward(&self, objective: &impl Objective<M>, at: At) -> Result<Found> {
        let step = at.step;
        let found = objective
            .loss(self.model(), at)
            .map_err(|source| TrainError::Objective { step, source })?;
        let total = found.total().ok_or(TrainError::NoTerms { step })?;
        let mut terms = Vec::with_capacity(found.terms.len());
        for term in &found.terms {
            let value = scalar(&term.value);
            self.finite(&format!("the loss term `{}`", term.name), value)?;
            terms.push((term.name, value));
        }
        Ok(Found { loss: scalar(&total), total, terms, items: found.items })
    }

    /// The backward pass of `loss`: what autodiff keeps, what was projected on the way, the most bytes of gradients at once
    /// (0 where nobody counted).
    fn backward(&self, loss: Tensor<1>) -> (Gradients, HashMap<ParamId, Low>, usize) {
        if !self.recipe.per_layer {
            return (loss.backward(), HashMap::new(), 0);
        }
        let trained = self.parameters.iter().filter(|p| self.groups.contains_key(&p.id));
        let mut stream = Stream::new(self.model(), trained, self.optimizer.as_ref(), &self.states);
        let grads = with_sink(&mut stream, || loss.backward());
        (grads, stream.found, stream.peak)
    }

    /// What `per_layer` cannot go with, beyond what the recipe alone shows.
    fn check_per_layer(&self) -> Result<()> {
        let fail = |expected| {
            Err(TrainError::Setting { setting: "per_layer", found: "true".into(), expected })
        };
        if !self.hooks.is_empty() {
            return fail("false with hooks, which see whole gradients");
        }
        let mut trained = self.parameters.iter().filter(|p| self.groups.contains_key(&p.id));
        if !trained.any(|p| self.optimizer.projects(&p.name, &p.shape)) {
            return fail("false unless the optimizer projects gradients, as galore does");
        }
        Ok(())
    }

    fn finite(&self, what: &str, value: f64) -> Result<()> {
        if value.is_finite() {
            return Ok(());
        }
        let last_good = self.last_good.clone();
        Err(TrainError::NonFinite { step: self.step, what: what.to_owned(), value, last_good })
    }

    /// Norm of all gradients, in the order of the parameters.
    fn norm(&self, gradients: &update::Host, low: &HashMap<ParamId, Low>) -> Result<f64> {
        let mut total = 0.0;
        for parameter in &self.parameters {
            let whole = gradients.get(&parameter.id).map(|grad| update::squares(grad));
            if let Some(part) =
                whole.or_else(|| low.get(&parameter.id).map(|(_, squares)| *squares))
            {
                self.finite(&format!("the gradient of `{}`", parameter.name), part.sqrt())?;
                total += part;
            }
        }
        Ok(total.sqrt())
    }

    fn apply(
        &mut self,
        mut gradients: update::Host,
        mut low: HashMap<ParamId, Low>,
        clip: f32,
        rate: f64,
    ) {
        let model = self.model.take().expect("invariant: the model is put back below");
        let (groups, parameters, states) = (&self.groups, &self.parameters, &mut self.states);
        let (optimizer, hooks, decay) = (&self.optimizer, &mut self.hooks, self.recipe.decay);
        // One tensor at a time: its gradient is freed before the next one is touched.
        let edit = &mut |id: ParamId, shape: &[usize], value: &mut Vec<f32>| {
            let (index, group) = &groups[&id];
            let name = &parameters[*index].name;
            if let Some((projected, _)) = low.remove(&id) {
                let update = turn(name, group, (rate, decay), shape, value, &[]);
                optimizer.update_projected(update, projected, states.entry(id).or_default());
            } else if let Some(mut grad) = gradients.remove(&id) {
                if clip < 1.0 {
                    grad.iter_mut().for_each(|g| *g *= clip);
                }
                hooks.iter_mut().for_each(|h| h.before(name, shape, value, &mut grad));
                let update = turn(name, group, (rate, decay), shape, value, &grad);
                optimizer.update(update, states.entry(id).or_default());
                hooks.iter_mut().for_each(|h| h.after(name, shape, value));
            }
        };
        self.model = Some(update::change(model, edit, &|id| groups.contains_key(&id)));
    }

    fn average(&mut self) {
        let Some(decay) = self.recipe.average else { return };
        // The first steps would otherwise be dominated by the start.
        let decay = decay.min((1.0 + self.step as f64) / (10.0 + self.step as f64)) as f32;
        let (groups, averages) = (&self.groups, &mut self.averages);
        let model = self.model.as_ref().expect("invariant: put back by `apply`");
        update::read(model, |id, _, values| {
            if groups.contains_key(&id) {
                let values = values();
                match averages.get_mut(&id) {
                    Some(average) => average
                        .iter_mut()
                        .zip(&values)
                        .for_each(|(a, v)| *a = decay * *a + (1.0 - decay) * v),
                    None => {
                        averages.insert(id, values);
                    }
                }
            }
        });
    }

    fn watch(&mut self, loss: f64) -> Result<()> {
        let guard = &mut self.guard;
        let smooth = guard.smooth.map_or(loss, |s| 0.9 * s + 0.1 * loss);
        guard.smooth = Some(smooth);
        guard.best = guard.best.min(smooth);
        // Losses may be small or negative: the margin never shrinks below a tenth.
        let margin = (guard.best.abs() * (self.recipe.divergence - 1.0)).max(0.1);
        let limit = guard.best + margin;
        guard.above = if loss > limit { guard.above + 1 } else { 0 };
        if guard.above < PATIENCE {
            return Ok(());
        }
        Err(TrainError::Diverged {
            step: self.step - 1,
            loss,
            best: guard.best,
            limit,
            patience: PATIENCE,
            last_good: self.last_good.clone(),
        })
    }

    /// Runs to the end of the recipe, with checkpoints, metrics and resumption as `options` say. Returns the last report, or
    /// `None` when the run was complete already. Of several ranks, all must call it; rank 0 reads and writes the files.
    ///
    /// # Errors
    /// As [`Self::step`]; files that cannot be written; a checkpoint of another recipe, data or model.
    pub fn run(
        &mut self,
        objective: &impl Objective<M>,
        mut options: RunOptions,
    ) -> Result<Option<StepReport>> {
        let ranks = self.ranks.clone();
        self.agree(&mut options.identity)?;
        if let Some(dir) = options.dir.as_ref().filter(|_| options.resume) {
            self.resume(dir, &options.identity)?;
        }
        self.align()?;
        let step = self.step;
        let open = || options.dir.as_ref().map(|dir| Metrics::open(dir, step)).transpose();
        let metrics = ranks.lead(open)?.flatten();
        let mut last = None;
        while self.step < self.recipe.steps {
            let report = self.step(objective)?;
            if let Some(metrics) = &metrics {
                metrics.append(&report)?;
            }
            if let Some(on_step) = &mut options.on_step {
                on_step(&report);
            }
            last = Some(report);
            let due = options.every > 0 && self.step.is_multiple_of(options.every);
            if let Some(dir) =
                options.dir.as_ref().filter(|_| due || self.step == self.recipe.steps)
            {
                ranks.lead(|| self.checkpoint(&options.identity).write(dir, options.keep))?;
                self.last_good = Some(checkpoint::path(dir, self.step));
                if let Some(on_checkpoint) = &mut options.on_checkpoint {
                    on_checkpoint(self.step);
                }
            }
        }
        Ok(last)
    }
}

/// The loss of (a share of) a micro-batch.
struct Found {
    total: Tensor<1>,
    /// Its value.
    loss: f64,
    /// Values of its terms.
    terms: Vec<(&'static str, f64)>,
    items: usize,
}

/// One tensor's turn at the step's `(rate, decay)`.
fn turn<'a>(
    name: &'a str,
    group: &Group,
    (rate, decay): (f64, f64),
    shape: &'a [usize],
    value: &'a mut [f32],
    grad: &'a [f32],
) -> Update<'a> {
    let own = if shape.len() > 1 { decay } else { 0.0 };
    Update {
        name,
        value,
        grad,
        shape,
        rate: (rate * group.rate) as f32,
        decay: group.decay.unwrap_or(own) as f32,
    }
}

fn scalar(x: &Tensor<1>) -> f64 {
    f64::from(x.clone().into_scalar::<f32>())
}
