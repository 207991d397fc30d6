//! The loop.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::time::Instant;

use burn::module::ParamId;
use burn::tensor::Tensor;
use refit_nn::{Parameter, Trainable};
use serde::{Deserialize, Serialize};

use super::checkpoint::{self, Checkpoint, Position};
use super::error::{Result, TrainError};
use super::loss::Terms;
use super::metrics::Metrics;
use super::optimizer::{Optimizer, OptimizerConfig, State, Update};
use super::schedule::Schedule;
use super::scope::{Group, Scope};
use super::update;
use crate::BoxError;

/// Everything that decides a run's result besides model and data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Recipe {
    /// Updates to make.
    pub steps: u64,
    /// Micro-batches whose gradients are averaged into one update.
    pub accumulate: usize,
    /// Seed of everything random.
    pub seed: u64,
    /// Peak learning rate.
    pub rate: f64,
    /// Weight decay of matrices; vectors (norms, biases) are decayed only where the scope says so.
    pub decay: f64,
    /// The optimizer.
    pub optimizer: OptimizerConfig,
    /// Learning rate over the run.
    pub schedule: Schedule,
    /// Which parameters train.
    pub scope: Scope,
    /// Largest norm of all gradients together.
    pub clip: Option<f64>,
    /// Decay of the exponential moving average of the parameters, if one is kept.
    pub average: Option<f64>,
    /// A loss above `divergence` times the best smoothed loss for [`PATIENCE`] steps stops the run.
    pub divergence: f64,
}

/// Steps that a loss may stay above the limit of divergence.
pub const PATIENCE: u64 = 20;

impl Recipe {
    /// AdamW at `rate`, cosine schedule with 5 % warm-up, decay 0.01, clipping at 1.
    pub fn new(steps: u64, rate: f64) -> Self {
        Self {
            steps,
            accumulate: 1,
            seed: 0,
            rate,
            decay: 0.01,
            optimizer: OptimizerConfig::adamw(),
            schedule: Schedule::cosine(steps / 20, 0.0),
            scope: Scope::default(),
            clip: Some(1.0),
            average: None,
            divergence: 3.0,
        }
    }

    fn check(&self) -> Result<()> {
        let fail = |setting, found: String, expected| {
            Err(TrainError::Setting { setting, found, expected })
        };
        let positive = |x: f64| x > 0.0 && x.is_finite();
        if self.steps == 0 || self.accumulate == 0 {
            return fail("steps, accumulate", "0".into(), "at least 1");
        }
        if !(self.rate >= 0.0 && self.rate.is_finite()) {
            return fail("rate", self.rate.to_string(), "a learning rate of at least 0");
        }
        if !(self.decay >= 0.0 && self.decay.is_finite()) {
            return fail("decay", self.decay.to_string(), "a weight decay of at least 0");
        }
        if self.clip.is_some_and(|c| !positive(c)) {
            return fail("clip", format!("{:?}", self.clip), "a norm above 0, or none");
        }
        if self.average.is_some_and(|a| !(0.0..1.0).contains(&a)) {
            return fail("average", format!("{:?}", self.average), "at least 0 and below 1");
        }
        if self.divergence.is_nan() || self.divergence <= 1.0 {
            return fail("divergence", self.divergence.to_string(), "a factor above 1");
        }
        self.schedule.check(self.steps)
    }
}

/// Which micro-batch a loss is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct At {
    /// Update, counted from 0.
    pub step: u64,
    /// Micro-batch of the whole run, counted from 0: what [`Order::batch`](super::Order::batch) takes.
    pub batch: u64,
}

/// What is minimized. The loss must be a function of the model and `at` alone, or a resumed run will differ.
pub trait Objective<M> {
    /// The loss of one micro-batch.
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
    step: u64,
    guard: Guard,
    last_good: Option<PathBuf>,
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
    /// Settings that cannot work, patterns that match nothing, parameters that share a name.
    pub fn new(model: M, recipe: Recipe) -> Result<Self> {
        recipe.check()?;
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
        let groups = trained.map(|((i, p), g)| (p.id, (i, g))).collect();
        Ok(Self {
            model: Some(model),
            recipe,
            optimizer,
            parameters,
            groups,
            states: HashMap::new(),
            averages: HashMap::new(),
            hooks: Vec::new(),
            step: 0,
            guard: Guard { smooth: None, best: f64::INFINITY, above: 0 },
            last_good: None,
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
        let mut gradients = update::Host::new();
        let mut terms: BTreeMap<String, f64> = BTreeMap::new();
        let (mut loss, mut items) = (0.0, 0);
        for i in 0..micro {
            let at = At { step, batch: step * micro as u64 + i as u64 };
            let found = objective
                .loss(self.model(), at)
                .map_err(|source| TrainError::Objective { step, source })?;
            let total = found.total().ok_or(TrainError::NoTerms { step })?;
            for term in &found.terms {
                let value = scalar(&term.value);
                self.finite(&format!("the loss term `{}`", term.name), value)?;
                *terms.entry(term.name.to_owned()).or_default() += value / micro as f64;
            }
            loss += scalar(&total) / micro as f64;
            items += found.items;
            drop(found);
            let mut grads = if micro == 1 { total } else { total / micro as f64 }.backward();
            update::collect(self.model(), &mut grads, &mut gradients);
        }
        let norm = self.norm(&gradients)?;
        let clip = self.recipe.clip.map_or(1.0, |limit| (limit / norm).min(1.0)) as f32;
        let rate = self.recipe.rate * self.recipe.schedule.factor(step, self.recipe.steps);
        self.apply(gradients, clip, rate);
        self.average();
        self.step += 1;
        self.watch(loss)?;
        let seconds = start.elapsed().as_secs_f64();
        Ok(StepReport { step, loss, terms, grad_norm: norm, rate, items, seconds })
    }

    fn finite(&self, what: &str, value: f64) -> Result<()> {
        if value.is_finite() {
            return Ok(());
        }
        let last_good = self.last_good.clone();
        Err(TrainError::NonFinite { step: self.step, what: what.to_owned(), value, last_good })
    }

    /// Norm of all gradients, in the order of the parameters.
    fn norm(&self, gradients: &update::Host) -> Result<f64> {
        let mut total = 0.0;
        for parameter in &self.parameters {
            if let Some(grad) = gradients.get(&parameter.id) {
                let part = update::squares(grad);
                self.finite(&format!("the gradient of `{}`", parameter.name), part.sqrt())?;
                total += part;
            }
        }
        Ok(total.sqrt())
    }

    fn apply(&mut self, mut gradients: update::Host, clip: f32, rate: f64) {
        let model = self.model.take().expect("invariant: the model is put back below");
        let (groups, parameters, states) = (&self.groups, &self.parameters, &mut self.states);
        let (optimizer, hooks, decay) = (&self.optimizer, &mut self.hooks, self.recipe.decay);
        // One tensor at a time: its gradient is freed before the next one is touched.
        let mut run = |id: ParamId, shape: &[usize], value: &mut Vec<f32>, mut grad: Vec<f32>| {
            let (index, group) = &groups[&id];
            let name = &parameters[*index].name;
            if clip < 1.0 {
                grad.iter_mut().for_each(|g| *g *= clip);
            }
            hooks.iter_mut().for_each(|h| h.before(name, shape, value, &mut grad));
            let own = if shape.len() > 1 { decay } else { 0.0 };
            let update = Update {
                value,
                grad: &grad,
                shape,
                rate: (rate * group.rate) as f32,
                decay: group.decay.unwrap_or(own) as f32,
            };
            optimizer.update(update, states.entry(id).or_default());
            hooks.iter_mut().for_each(|h| h.after(name, shape, value));
        };
        self.model = Some(update::change(
            model,
            &mut |id, shape, value| {
                if let Some(grad) = gradients.remove(&id) {
                    run(id, shape, value, grad);
                }
            },
            &|id| groups.contains_key(&id),
        ));
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
    /// `None` when the run was complete already.
    ///
    /// # Errors
    /// As [`Self::step`]; files that cannot be written; a checkpoint of another recipe, data or model.
    pub fn run(
        &mut self,
        objective: &impl Objective<M>,
        mut options: RunOptions,
    ) -> Result<Option<StepReport>> {
        if let Some(dir) = options.dir.as_ref().filter(|_| options.resume)
            && let Some(newest) = checkpoint::list(dir)?.pop()
        {
            self.restore(&newest, &options.identity)?;
        }
        let metrics = options.dir.as_ref().map(|dir| Metrics::open(dir, self.step)).transpose()?;
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
                let saved = self.checkpoint(&options.identity).write(dir, options.keep)?;
                self.last_good = Some(saved);
            }
        }
        Ok(last)
    }

    /// Everything that is needed to go on from here.
    pub fn checkpoint(&self, identity: &str) -> Checkpoint {
        let name = |id: &ParamId| {
            self.groups.get(id).map(|(index, _)| self.parameters[*index].name.clone())
        };
        let mut parameters = BTreeMap::new();
        update::read(self.model(), |id, shape, values| {
            if let Some(name) = name(&id) {
                parameters.insert(name, (shape.to_vec(), values()));
            }
        });
        let named = |id: &ParamId| name(id).expect("invariant: only trained parameters have state");
        Checkpoint {
            position: Position {
                step: self.step,
                recipe: recipe_json(&self.recipe),
                identity: identity.to_owned(),
                updates: self.states.iter().map(|(id, s)| (named(id), s.step)).collect(),
                guard: (self.guard.smooth, self.guard.best, self.guard.above),
            },
            parameters,
            states: self.states.iter().map(|(id, s)| (named(id), s.clone())).collect(),
            averages: self.averages.iter().map(|(id, a)| (named(id), a.clone())).collect(),
        }
    }

    /// Goes on from the checkpoint in `path`.
    ///
    /// # Errors
    /// Files of another recipe (the settings that differ are named), other data, or another model.
    pub fn restore(&mut self, path: &Path, identity: &str) -> Result<()> {
        let found = Checkpoint::read(path)?;
        let bad = |problem: String| Err(TrainError::Checkpoint { path: path.into(), problem });
        let (theirs, ours) = (&found.position.recipe, recipe_json(&self.recipe));
        if let (Some(theirs), Some(ours)) = (theirs.as_object(), ours.as_object()) {
            let changed: Vec<String> = ours
                .iter()
                .filter(|(key, value)| theirs.get(*key) != Some(value))
                .map(|(key, v)| {
                    format!(
                        "`{key}` was {}, is {v}",
                        theirs.get(key).unwrap_or(&serde_json::Value::Null)
                    )
                })
                .collect();
            if !changed.is_empty() {
                return bad(format!(
                    "the recipe changed ({}); resume with the old settings or start in another directory",
                    changed.join("; ")
                ));
            }
        }
        if found.position.identity != identity {
            return bad(
                "the run had other data or another base model; start in another directory".into()
            );
        }
        let mut ids = HashMap::new();
        for (id, (index, _)) in &self.groups {
            let parameter = &self.parameters[*index];
            match found.parameters.get(&parameter.name) {
                Some((shape, _)) if *shape == parameter.shape => {
                    ids.insert(parameter.name.clone(), *id);
                }
                Some((shape, _)) => {
                    return bad(format!(
                        "`{}` has shape {shape:?}, the model {:?}",
                        parameter.name, parameter.shape
                    ));
                }
                None => return bad(format!("it lacks `{}`, which trains", parameter.name)),
            }
        }
        if let Some(extra) = found.parameters.keys().find(|name| !ids.contains_key(*name)) {
            return bad(format!("it holds `{extra}`, which does not train in this model"));
        }
        let Checkpoint { position, parameters, states, averages } = found;
        let by_id: HashMap<ParamId, Vec<f32>> =
            parameters.into_iter().map(|(name, (_, values))| (ids[&name], values)).collect();
        let model = self.model.take().expect("invariant: put back below");
        self.model = Some(update::change(
            model,
            &mut |id, _, value| value.copy_from_slice(&by_id[&id]),
            &|id| by_id.contains_key(&id),
        ));
        let keyed = |name: &String| ids.get(name).copied();
        self.states = states.into_iter().filter_map(|(n, s)| Some((keyed(&n)?, s))).collect();
        self.averages = averages.into_iter().filter_map(|(n, a)| Some((keyed(&n)?, a))).collect();
        let (smooth, best, above) = position.guard;
        self.guard = Guard { smooth, best, above };
        self.step = position.step;
        self.last_good = Some(path.to_owned());
        Ok(())
    }
}

fn recipe_json(recipe: &Recipe) -> serde_json::Value {
    serde_json::to_value(recipe).expect("invariant: a recipe is plain data")
}

fn scalar(x: &Tensor<1>) -> f64 {
    f64::from(x.clone().into_scalar::<f32>())
}
