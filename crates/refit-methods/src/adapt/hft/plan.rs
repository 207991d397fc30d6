//! Which tensors one round leaves alone.

use std::collections::{BTreeMap, BTreeSet};

use clap::Args;
use refit_data::Rng;
use refit_store::architecture::{Architecture, Role, Site};
use refit_store::{DType, SideFile};
use refit_train::train::{Rule, Scope};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::inputs::ModelInput;

/// File beside the weights that says what was frozen.
pub const FREEZE_PLAN: &str = "freeze_plan.json";

/// What tensors compete for the frozen half.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// Tensors of one kind within a block.
    #[default]
    Category,
    /// Whole blocks.
    Layer,
    /// All matrices of the model.
    Model,
}

/// What half of the tensors means.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Balance {
    /// Half of their number, as in the paper.
    #[default]
    Count,
    /// Among choices of the paper's number, the one that keeps the frozen share of parameters nearest to the ratio.
    Params,
}

/// The plan of one round.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Freezing {
    /// Share of tensors that are frozen.
    #[arg(long, default_value_t = 0.5)]
    pub ratio: f64,
    /// What competes.
    #[arg(long, value_enum, default_value_t)]
    pub level: Level,
    /// What half means.
    #[arg(long, value_enum, default_value_t)]
    pub balance: Balance,
    /// Round of training, from 0; each draws another plan from the seed. By default one more than that of the model, when
    /// it was half fine-tuned already.
    #[arg(long, value_name = "N")]
    pub round: Option<u64>,
    /// Freeze embeddings and head as well.
    #[arg(long)]
    pub freeze_embeddings: bool,
}

crate::paper_defaults!(Freezing);

/// Which tensors one round leaves alone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FreezePlan {
    /// Round, from 0.
    pub round: u64,
    /// Seed that it was drawn from.
    pub seed: u64,
    /// Tensors of the model that are frozen.
    pub frozen: BTreeSet<String>,
}

/// Roles of matrices in blocks that are neither attention nor a gated ffn.
const OTHER: [Role; 4] = [Role::Qkv, Role::GateUp, Role::Conv, Role::Other];

/// A tensor of a model, as a plan sees it.
#[derive(Clone, Debug)]
pub struct Slot {
    /// Name of the tensor.
    pub name: String,
    /// Its role.
    pub role: Role,
    /// Its block.
    pub layer: Option<usize>,
    /// Elements.
    pub numel: usize,
}

/// The tensors of an artifact.
pub fn slots(architecture: &Architecture) -> Vec<Slot> {
    let slot = |site: &Site| Slot {
        name: site.name.clone(),
        role: site.role,
        layer: site.layer,
        numel: site.numel(),
    };
    architecture.sites.iter().filter(|site| site.stored).map(slot).collect()
}

/// A matrix or norm with the bias that follows it.
#[derive(Clone, Copy, Debug)]
struct Piece<'a> {
    name: &'a str,
    numel: usize,
}

impl Freezing {
    pub(super) fn check(&self, method: &'static str, model: &ModelInput) -> Result<()> {
        if !(0.0..=1.0).contains(&self.ratio) {
            return Err(Error::range(method, "ratio", self.ratio, "a share from 0 to 1"));
        }
        let packed = |info: &&refit_store::TensorInfo| matches!(info.dtype, DType::Ggml(_));
        if let Some(info) = model.artifact.tensors().iter().find(packed) {
            return Err(Error::Conflict {
                method,
                problem: format!(
                    "{}: `{}` is block-quantized ({}), and what is frozen must stay to the byte; write it in floats first: \
                     refit apply model-soups {0} -o FLOATS",
                    model.source, info.name, info.dtype
                ),
            });
        }
        let fused = |site: &&Site| matches!(site.role, Role::Qkv | Role::GateUp);
        if let Some(site) = model.artifact.architecture().sites.iter().find(fused)
            && self.level == Level::Category
        {
            return Err(Error::Conflict {
                method,
                problem: format!(
                    "{}: `{}` is several matrices in one tensor and cannot be half-frozen; take --level layer or model",
                    model.source, site.name
                ),
            });
        }
        Ok(())
    }

    /// The plan for the tensors of a model.
    pub fn draw(&self, slots: &[Slot], round: u64, seed: u64) -> FreezePlan {
        let mut rng = Rng::named(seed, &format!("half fine-tuning, round {round}"));
        let mut frozen: BTreeSet<String> = match self.level {
            Level::Category => self.by_category(slots, &mut rng),
            Level::Layer => {
                let layers = layers(slots);
                let count = (self.ratio * layers as f64).floor() as usize;
                let chosen: BTreeSet<usize> = rng.sample(layers, count).into_iter().collect();
                let inside = |slot: &&Slot| slot.layer.is_some_and(|l| chosen.contains(&l));
                slots.iter().filter(inside).map(|slot| slot.name.clone()).collect()
            }
            Level::Model => {
                let inside =
                    |s: &&Slot| s.layer.is_some() && s.role.is_projection() && is_weight(&s.name);
                let all: Vec<&str> = slots.iter().filter(inside).map(|s| s.name.as_str()).collect();
                let count = (self.ratio * all.len() as f64).round() as usize;
                rng.sample(all.len(), count).into_iter().map(|i| all[i].to_owned()).collect()
            }
        };
        if self.freeze_embeddings {
            let outside = [Role::Embed, Role::Position, Role::TokenType, Role::Head];
            let chosen = slots.iter().filter(|slot| outside.contains(&slot.role));
            frozen.extend(chosen.map(|slot| slot.name.clone()));
        }
        // Biases follow their matrix or norm.
        let biases: Vec<String> = slots
            .iter()
            .filter(|slot| slot.name.ends_with(".bias"))
            .filter(|slot| frozen.contains(&format!("{}.weight", module(&slot.name))))
            .map(|slot| slot.name.clone())
            .collect();
        frozen.extend(biases);
        FreezePlan { round, seed, frozen }
    }

    fn by_category(&self, slots: &[Slot], rng: &mut Rng) -> BTreeSet<String> {
        let layers = layers(slots);
        let mut order: Vec<usize> = (0..layers).collect();
        rng.shuffle(&mut order);
        let heavy: BTreeSet<usize> = order.into_iter().take(layers / 2).collect();
        let mut frozen = BTreeSet::new();
        let mut share = Share::default();
        for layer in 0..layers {
            let of = |roles: &[Role]| -> Vec<Piece> {
                slots
                    .iter()
                    .filter(|s| s.layer == Some(layer) && roles.contains(&s.role))
                    .filter(|s| is_weight(&s.name))
                    .map(|s| Piece { name: &s.name, numel: s.numel })
                    .collect()
            };
            let attention = of(&[Role::Q, Role::K, Role::V, Role::O]);
            let ffn = of(&[Role::Gate, Role::Up, Role::Down]);
            let norms = of(&[Role::Norm]);
            let mut chosen = Vec::new();
            // At one half, an odd ffn alternates between the two nearest counts; elsewhere counts are rounded.
            let half = self.ratio == 0.5;
            let ffn_count = match (half, heavy.contains(&layer)) {
                (true, true) => ffn.len().div_ceil(2),
                (true, false) => ffn.len() / 2,
                _ => (self.ratio * ffn.len() as f64).round() as usize,
            };
            let count = |n: usize| (self.ratio * n as f64).round() as usize;
            // A block of another kind: half of its matrices, whatever they are.
            let known = !(attention.is_empty() && ffn.is_empty());
            let others = if known { Vec::new() } else { of(&OTHER) };
            let parts = [
                (&attention, count(attention.len())),
                (&ffn, ffn_count),
                (&others, count(others.len())),
            ];
            for (pieces, count) in parts {
                chosen.extend(self.choose(pieces, count, &mut share, rng));
            }
            if !half {
                self.adjust(&attention, &ffn, &mut chosen, rng);
            }
            frozen.extend(chosen.iter().map(|piece| piece.name.to_owned()));
            let count = (self.ratio * norms.len() as f64).round() as usize;
            let drawn = rng.sample(norms.len(), count);
            frozen.extend(drawn.into_iter().map(|i| norms[i].name.to_owned()));
        }
        frozen
    }

    /// `count` of `pieces`; by parameters, the draw that keeps the running share nearest to the ratio.
    fn choose<'a>(
        &self,
        pieces: &[Piece<'a>],
        count: usize,
        share: &mut Share,
        rng: &mut Rng,
    ) -> Vec<Piece<'a>> {
        let total: usize = pieces.iter().map(|piece| piece.numel).sum();
        let drawn: Vec<Piece> = match self.balance {
            Balance::Count => {
                rng.sample(pieces.len(), count).into_iter().map(|i| pieces[i]).collect()
            }
            Balance::Params => {
                let mut sets = subsets(pieces.len(), count);
                rng.shuffle(&mut sets);
                let distance = |set: &Vec<usize>| {
                    let frozen: usize = set.iter().map(|&i| pieces[i].numel).sum();
                    let all = (share.total + total) as f64;
                    ((share.frozen + frozen) as f64 / all.max(1.0) - self.ratio).abs()
                };
                let best = sets.iter().min_by(|a, b| distance(a).total_cmp(&distance(b)));
                best.map(|set| set.iter().map(|&i| pieces[i]).collect()).unwrap_or_default()
            }
        };
        share.total += total;
        share.frozen += drawn.iter().map(|piece| piece.numel).sum::<usize>();
        drawn
    }

    /// Adds or drops single matrices while that brings the block's share of parameters nearer to the ratio.
    fn adjust<'a>(
        &self,
        attention: &[Piece<'a>],
        ffn: &[Piece<'a>],
        chosen: &mut Vec<Piece<'a>>,
        rng: &mut Rng,
    ) {
        let mut all: Vec<Piece> = attention.iter().chain(ffn).copied().collect();
        rng.shuffle(&mut all);
        let total: usize = all.iter().map(|piece| piece.numel).sum();
        let target = self.ratio * total as f64;
        loop {
            let now: usize = chosen.iter().map(|piece| piece.numel).sum();
            let distance = |sum: usize| (sum as f64 - target).abs();
            let is_in = |piece: &Piece| chosen.iter().any(|other| other.name == piece.name);
            let moved = |piece: &Piece| match is_in(piece) {
                true => now - piece.numel,
                false => now + piece.numel,
            };
            let best = all
                .iter()
                .min_by(|a, b| distance(moved(a)).total_cmp(&distance(moved(b))))
                .filter(|piece| distance(moved(piece)) < distance(now));
            let Some(best) = best.copied() else { break };
            match chosen.iter().position(|other| other.name == best.name) {
                Some(at) => drop(chosen.remove(at)),
                None => chosen.push(best),
            }
        }
    }

    /// The round that this run is.
    pub(super) fn round(&self, model: &ModelInput) -> u64 {
        self.round.unwrap_or_else(|| last_round(model).map_or(0, |round| round + 1))
    }
}

/// Parameters drawn so far.
#[derive(Default)]
struct Share {
    frozen: usize,
    total: usize,
}

/// All sets of `count` of `n` indices, in order.
fn subsets(n: usize, count: usize) -> Vec<Vec<usize>> {
    (0..1usize << n.min(16))
        .filter(|bits| bits.count_ones() as usize == count)
        .map(|bits| (0..n).filter(|i| bits >> i & 1 == 1).collect())
        .collect()
}

/// Number of blocks.
fn layers(slots: &[Slot]) -> usize {
    slots.iter().filter_map(|slot| slot.layer).max().map_or(0, |last| last + 1)
}

fn is_weight(name: &str) -> bool {
    name.ends_with(".weight")
}

/// A tensor's name without its last part.
fn module(name: &str) -> &str {
    name.rsplit_once('.').map_or(name, |(module, _)| module)
}

/// The round that a model was half fine-tuned in last.
fn last_round(model: &ModelInput) -> Option<u64> {
    let file = model.artifact.side_files().iter().find(|file| file.name == FREEZE_PLAN)?;
    let plan: Value = serde_json::from_slice(&file.read().ok()?).ok()?;
    plan["round"].as_u64()
}

impl FreezePlan {
    pub(super) fn scope(&self, model: &ModelInput) -> Scope {
        let tied = |name: &&String| {
            model.artifact.architecture().site(name).is_none_or(|site| site.tied_to.is_none())
        };
        let frozen = self.frozen.iter().filter(tied).filter(|name| model.artifact.contains(name));
        Scope {
            rules: std::iter::once(Rule::train("@all")).chain(frozen.map(Rule::freeze)).collect(),
        }
    }

    fn describe(&self, model: &ModelInput) -> Value {
        let mut by_name = BTreeMap::new();
        for info in model.artifact.tensors() {
            let state = if self.frozen.contains(&info.name) { "frozen" } else { "updated" };
            by_name.insert(info.name.as_str(), state);
        }
        json!({ "round": self.round, "seed": self.seed, "tensors": by_name })
    }

    pub(super) fn file(&self, model: &ModelInput) -> SideFile {
        let mut text = format!("{:#}", self.describe(model));
        text.push('\n');
        SideFile::from_bytes(FREEZE_PLAN, text.into_bytes())
    }

    /// Frozen share of the parameters inside blocks.
    pub fn frozen_share(&self, slots: &[Slot]) -> f64 {
        let (mut frozen, mut all) = (0usize, 0usize);
        for slot in slots.iter().filter(|slot| slot.layer.is_some()) {
            all += slot.numel;
            frozen += if self.frozen.contains(&slot.name) { slot.numel } else { 0 };
        }
        frozen as f64 / all.max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A Llama-like model with grouped keys and values.
    fn llama(layers: usize) -> Vec<Slot> {
        let mut slots = Vec::new();
        let mut push = |name: String, role, layer, numel| {
            slots.push(Slot { name: format!("{name}.weight"), role, layer, numel });
        };
        push("embed".into(), Role::Embed, None, 1000);
        for layer in 0..layers {
            for (name, role, numel) in [
                ("q", Role::Q, 36),
                ("k", Role::K, 12),
                ("v", Role::V, 12),
                ("o", Role::O, 36),
                ("gate", Role::Gate, 96),
                ("up", Role::Up, 96),
                ("down", Role::Down, 96),
                ("norm1", Role::Norm, 6),
                ("norm2", Role::Norm, 6),
            ] {
                push(format!("{layer}.{name}"), role, Some(layer), numel);
            }
        }
        push("norm".into(), Role::Norm, None, 6);
        slots
    }

    fn freezing() -> Freezing {
        Freezing::default()
    }

    fn frozen_of(plan: &FreezePlan, layer: usize, names: &[&str]) -> usize {
        let has = |name: &&&str| plan.frozen.contains(&format!("{layer}.{name}.weight"));
        names.iter().filter(has).count()
    }

    #[test]
    fn categories_are_halved_in_every_block() {
        for layers in [1, 2, 5, 6] {
            let plan = freezing().draw(&llama(layers), 0, 3);
            let mut heavy = 0;
            for layer in 0..layers {
                assert_eq!(frozen_of(&plan, layer, &["q", "k", "v", "o"]), 2);
                assert_eq!(frozen_of(&plan, layer, &["norm1", "norm2"]), 1);
                match frozen_of(&plan, layer, &["gate", "up", "down"]) {
                    2 => heavy += 1,
                    count => assert_eq!(count, 1),
                }
            }
            assert_eq!(heavy, layers / 2);
            assert!(!plan.frozen.contains("embed.weight") && !plan.frozen.contains("norm.weight"));
        }
    }

    #[test]
    fn plans_follow_from_seed_and_round() {
        let slots = llama(6);
        assert_eq!(freezing().draw(&slots, 0, 1), freezing().draw(&slots, 0, 1));
        assert_ne!(freezing().draw(&slots, 0, 1).frozen, freezing().draw(&slots, 0, 2).frozen);
        assert_ne!(freezing().draw(&slots, 0, 1).frozen, freezing().draw(&slots, 1, 1).frozen);
    }

    #[test]
    fn balance_by_parameters_comes_near_to_the_ratio() {
        let slots = llama(30);
        for seed in 0..5 {
            let balanced = Freezing { balance: Balance::Params, ..freezing() };
            let share = balanced.draw(&slots, 0, seed).frozen_share(&slots);
            assert!((share - 0.5).abs() < 0.05, "{share}");
        }
    }

    #[test]
    fn ends_of_the_ratio_freeze_nothing_or_every_block() {
        let slots = llama(4);
        let none = Freezing { ratio: 0.0, ..freezing() }.draw(&slots, 0, 0);
        assert!(none.frozen.is_empty());
        let all = Freezing { ratio: 1.0, ..freezing() }.draw(&slots, 0, 0);
        assert_eq!(all.frozen_share(&slots), 1.0);
        let quarter = Freezing { ratio: 0.25, ..freezing() }.draw(&slots, 0, 0);
        let share = quarter.frozen_share(&slots);
        assert!((0.15..0.35).contains(&share), "{share}");
    }

    #[test]
    fn other_levels_take_blocks_or_matrices() {
        let slots = llama(6);
        let layer = Freezing { level: Level::Layer, ..freezing() }.draw(&slots, 0, 0);
        assert_eq!(layer.frozen.len(), 3 * 9);
        let model = Freezing { level: Level::Model, ..freezing() }.draw(&slots, 0, 0);
        assert_eq!(model.frozen.len(), 6 * 7 / 2);
        assert!(model.frozen.iter().all(|name| !name.contains("norm")));
    }

    #[test]
    fn a_block_of_another_kind_loses_half_of_its_matrices() {
        let slot = |i: usize| Slot {
            name: format!("0.mixer.{i}.weight"),
            role: Role::Other,
            layer: Some(0),
            numel: 10,
        };
        let slots: Vec<Slot> = (0..6).map(slot).collect();
        assert_eq!(freezing().draw(&slots, 0, 0).frozen.len(), 3);
    }

    #[test]
    fn biases_follow_their_matrix() {
        let mut slots = llama(2);
        slots.push(Slot { name: "0.q.bias".into(), role: Role::Bias, layer: Some(0), numel: 6 });
        let plan = freezing().draw(&slots, 0, 4);
        assert_eq!(plan.frozen.contains("0.q.bias"), plan.frozen.contains("0.q.weight"));
    }
}
