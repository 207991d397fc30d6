//! A trainer's state to a checkpoint and back.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use burn::module::ParamId;
use refit_nn::Trainable;

use super::{Guard, Recipe, Trainer};
use crate::train::checkpoint::{self, Checkpoint, Position};
use crate::train::error::{Result, TrainError};
use crate::train::update;

impl<M: Trainable> Trainer<M> {
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
        self.adopt(Checkpoint::read(path)?, path, identity)
    }

    /// Goes on from the newest checkpoint in `dir`, if there is one. Rank 0 reads it and sends it to the others, which may not
    /// see that directory.
    pub(super) fn resume(&mut self, dir: &Path, identity: &str) -> Result<()> {
        let ranks = self.ranks.clone();
        if ranks.alone() {
            return match checkpoint::list(dir)?.pop() {
                Some(newest) => self.restore(&newest, identity),
                None => Ok(()),
            };
        }
        let read = || match checkpoint::list(dir)?.pop() {
            Some(path) => std::fs::read(&path)
                .map(|raw| (path.to_string_lossy().into_owned(), raw))
                .map_err(TrainError::io(path)),
            None => Ok(Default::default()),
        };
        let (path, raw) = ranks.lead(read)?.unwrap_or_default();
        let path = String::from_utf8_lossy(&ranks.broadcast(path.into_bytes())).into_owned();
        let raw = ranks.broadcast(raw);
        if path.is_empty() {
            return Ok(());
        }
        let path = Path::new(&path);
        self.adopt(Checkpoint::decode(path, &raw)?, path, identity)
    }

    fn adopt(&mut self, found: Checkpoint, path: &Path, identity: &str) -> Result<()> {
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

/// The recipe as far as it decides the result.
pub(super) fn recipe_json(recipe: &Recipe) -> serde_json::Value {
    let mut json = serde_json::to_value(recipe).expect("invariant: a recipe is plain data");
    // Both modes give the same bits: a run may go on in the other one, and older checkpoints do not know it.
    json.as_object_mut().expect("invariant: a struct is an object").remove("per_layer");
    json
}
