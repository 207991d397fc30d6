//! Several ranks against one process with the same batches: the same losses, the same weights, and one error when one fails.
//!
//! The tolerance: sums of f32 gradients in another order. Weights of this model are up to 1 and move by a few hundredths.

use std::path::Path;

use burn::tensor::Tensor;
use refit_nn::scratch::DecoderShape;
use refit_nn::{BurnDevice as Device, Decoder, Run};
use refit_train::BoxError;
use refit_train::train::loss::next_token;
use refit_train::train::ranks::{Ranks, threads};
use refit_train::train::*;

/// Largest difference of a weight.
const CLOSE: f32 = 2e-6;

fn tiny(seed: u64) -> Decoder {
    let shape = DecoderShape {
        hidden: 16,
        intermediate: 24,
        layers: 2,
        heads: 2,
        kv_heads: 1,
        vocab: 32,
        context: 16,
        tied: false,
    };
    shape.init(seed, &Device::flex()).expect("a valid shape")
}

/// Rows of which very different numbers of tokens are learned: 1 to 11.
fn row(example: usize) -> (Vec<u32>, Vec<bool>) {
    let ids = (0..12).map(|i| ((example * 5 + i * (1 + example % 3)) % 32) as u32).collect();
    (ids, (0..12).map(|i| i > example * 7 % 11).collect())
}

/// This rank's rows of batches of `batch`; `items` says how many the loss counts as, given the learned tokens.
fn objective(
    batch: usize,
    items: fn(usize) -> usize,
) -> impl Fn(&Decoder, At) -> Result<Terms, BoxError> {
    let order = Order::new(1, 64);
    move |model, at| {
        let rows = &order.batch(at.batch, batch)[at.share.of(batch)];
        let (ids, learned): (Vec<_>, Vec<_>) = rows.iter().map(|&r| row(r)).unzip();
        let (ids, learned) = (ids.concat(), learned.concat());
        let run = &mut Run::plain();
        let (value, tokens) = next_token(model, &ids, rows.len(), Some(&learned), run)?;
        Ok(Terms::one("ce", value, items(tokens)))
    }
}

/// Weights by name.
type Weights = Vec<(String, Vec<f32>)>;

fn weights(trainer: &Trainer<Decoder>) -> Weights {
    let state = trainer.checkpoint("");
    state.parameters.into_iter().map(|(name, (_, values))| (name, values)).collect()
}

fn run(
    ranks: Ranks,
    recipe: &Recipe,
    objective: &impl Objective<Decoder>,
) -> (Weights, Vec<StepReport>) {
    let trainer = Trainer::new(tiny(7), recipe.clone()).unwrap();
    let mut trainer = trainer.with_ranks(ranks).unwrap();
    let mut reports = Vec::new();
    let mut keep = |report: &StepReport| reports.push(report.clone());
    let options = RunOptions { on_step: Some(&mut keep), ..RunOptions::default() };
    trainer.run(objective, options).unwrap();
    (weights(&trainer), reports)
}

fn distance(a: &Weights, b: &Weights) -> f32 {
    let each = a.iter().zip(b).map(|((name, a), (same, b))| {
        assert_eq!((name, a.len()), (same, b.len()));
        a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    });
    each.fold(0.0, f32::max)
}

fn recipe() -> Recipe {
    Recipe { accumulate: 2, clip: Some(0.5), decay: 0.1, ..Recipe::new(12, 3e-3) }
}

#[test]
fn several_ranks_do_what_one_process_does() {
    let tokens = objective(5, |tokens| tokens);
    let (alone, wanted) = run(Ranks::default(), &recipe(), &tokens);
    assert!(wanted.iter().all(|r| r.grad_norm > 0.5), "every step is clipped");
    for size in [2, 3] {
        let all = threads::run(size, |ranks| run(ranks, &recipe(), &objective(5, |tokens| tokens)));
        for (found, reports) in &all {
            assert_eq!(distance(found, &all[0].0), 0.0, "ranks hold the same bits");
            let apart = distance(found, &alone);
            assert!(apart < CLOSE, "{size} ranks: {apart}");
            for (a, b) in reports.iter().zip(&wanted) {
                assert_eq!((a.step, a.items), (b.step, b.items));
                assert!((a.loss - b.loss).abs() < 1e-5, "{a:?} {b:?}");
                assert!((a.terms["ce"] - b.terms["ce"]).abs() < 1e-5, "{a:?} {b:?}");
                assert!((a.grad_norm - b.grad_norm).abs() < 1e-5 * b.grad_norm, "{a:?} {b:?}");
            }
        }
    }
    // The measure can tell: a mean of the ranks' means is another loss.
    let unweighted =
        threads::run(2, |ranks| run(ranks, &recipe(), &objective(5, |_| 1)).0).remove(0);
    assert!(distance(&unweighted, &alone) > 100.0 * CLOSE);
}

/// Optimizers whose steps jump (signs, codes, singular vectors) make more of the last bit; what must hold for all of them is
/// that no rank drifts from another.
#[test]
fn every_optimizer_keeps_the_ranks_together() {
    let kinds = [
        OptimizerConfig::Sgd { momentum: 0.9, nesterov: true },
        OptimizerConfig::AdamW { betas: (0.9, 0.99), eps: 1e-8, eight_bit: true },
        OptimizerConfig::Adafactor { exponent: 0.8, clip: 1.0, relative: false },
        OptimizerConfig::Lion { betas: (0.9, 0.99) },
        OptimizerConfig::galore(4),
    ];
    for optimizer in kinds {
        let recipe = Recipe { optimizer, average: Some(0.9), ..recipe() };
        let all = threads::run(2, |ranks| {
            let trainer = Trainer::new(tiny(7), recipe.clone()).unwrap();
            let mut trainer = trainer.with_ranks(ranks).unwrap();
            trainer.run(&objective(5, |tokens| tokens), RunOptions::default()).unwrap();
            trainer.checkpoint("")
        });
        assert!(all[0] == all[1], "{:?}", recipe.optimizer);
        assert!(!all[0].averages.is_empty());
    }
}

/// Rank 0 learns one tensor and rank 1 another: what either found reaches both.
#[test]
fn a_gradient_that_only_one_rank_has_counts() {
    let size = |model: &Decoder, i: usize| -> Tensor<1> {
        model.blocks[0].linears()[i].weight().powi_scalar(2).mean()
    };
    let recipe = Recipe { decay: 0.0, ..Recipe::new(3, 1e-2) };
    let whole = |model: &Decoder, _: At| -> Result<Terms, BoxError> {
        Ok(Terms::one("size", (size(model, 0) + size(model, 1)) * 0.5, 2))
    };
    let (alone, _) = run(Ranks::default(), &recipe, &whole);
    let all = threads::run(2, |ranks| {
        let own = ranks.rank();
        let part = |model: &Decoder, _: At| -> Result<Terms, BoxError> {
            Ok(Terms::one("size", size(model, own), 1))
        };
        run(ranks, &recipe, &part).0
    });
    let (start, _) = run(Ranks::default(), &Recipe { rate: 0.0, ..recipe.clone() }, &whole);
    let moved = start.iter().zip(&alone).filter(|(a, b)| a != b).count();
    assert_eq!(moved, 2, "two tensors train, and the others have no gradient anywhere");
    assert!(all.iter().all(|found| distance(found, &alone) < CLOSE));
}

/// What rank 1 does at step 2, and the message that one rank gives for it.
#[test]
fn a_rank_that_fails_ends_all_before_anything_is_updated() {
    type Break = fn(Terms) -> Result<Terms, BoxError>;
    let kinds: [(Break, &str); 2] = [
        (|_| Err("the row is damaged".into()), "step 2: the row is damaged"),
        (
            |mut terms| {
                terms.terms[0].value = terms.terms[0].value.clone() * f32::NAN;
                Ok(terms)
            },
            "`ce` is NaN; nothing was updated",
        ),
    ];
    for (damage, message) in kinds {
        let all = threads::run(3, |ranks| {
            let fine = objective(4, |tokens| tokens);
            let broken = |model: &Decoder, at: At| {
                let terms = fine(model, at)?;
                if (at.step, at.share.rank) == (2, 1) { damage(terms) } else { Ok(terms) }
            };
            let trainer = Trainer::new(tiny(7), Recipe::new(9, 1e-3)).unwrap();
            let mut trainer = trainer.with_ranks(ranks.clone()).unwrap();
            let error = trainer.run(&broken, RunOptions::default()).unwrap_err();
            let settled = ranks.settle(Err::<(), _>(error)).unwrap_err().to_string();
            (settled, ranks.speaks(), trainer.steps_done(), ranks.last(ranks.rank() as u8))
        });
        for (rank, (text, speaks, steps, code)) in all.iter().enumerate() {
            assert_eq!((*speaks, *steps, *code), (rank == 1, 2, 1), "{text}");
            assert!(text.contains(if rank == 1 { message } else { "process 1 failed" }), "{text}");
        }
    }
}

fn options(dir: &Path) -> RunOptions<'static> {
    RunOptions { dir: Some(dir.into()), every: 3, keep: 2, resume: true, ..RunOptions::default() }
}

/// Rank 1 sees no directory of rank 0's: it gets the checkpoint from it, and writes nothing.
#[test]
fn rank_0_alone_reads_and_writes_files() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = Recipe { average: Some(0.9), ..recipe() };
    let go = |ranks: Ranks, place: &str, stop: u64| {
        let own = dir.path().join(format!("{place}-{}", ranks.rank()));
        let trainer = Trainer::new(tiny(7), recipe.clone()).unwrap();
        let mut trainer = trainer.with_ranks(ranks.clone()).unwrap();
        let fine = objective(5, |tokens| tokens);
        let broken = |model: &Decoder, at: At| match at.step == stop && at.share.rank == 1 {
            true => Err("stopped".into()),
            false => fine(model, at),
        };
        let identity = format!("as rank {} sees it", ranks.rank());
        let ended = trainer.run(&broken, RunOptions { identity, ..options(&own) });
        assert_eq!(ended.is_err(), stop < recipe.steps);
        assert_eq!(own.exists(), ranks.leads());
        (weights(&trainer), trainer.steps_done())
    };
    let whole = threads::run(2, |ranks| go(ranks, "whole", u64::MAX));
    let stopped = threads::run(2, |ranks| go(ranks, "stopped", 8));
    assert!(stopped.iter().all(|(_, steps)| *steps == 8));
    let resumed = threads::run(2, |ranks| go(ranks, "stopped", u64::MAX));
    assert!(resumed == whole, "a resumed run ends with the same bits");
    let metrics = std::fs::read_to_string(dir.path().join("stopped-0/metrics.jsonl")).unwrap();
    assert_eq!(metrics.lines().count(), 12);
}

#[test]
fn a_checkpoint_that_cannot_be_written_ends_all() {
    let dir = tempfile::tempdir().unwrap();
    let texts = threads::run(2, |ranks| {
        let own = dir.path().join(format!("run-{}", ranks.rank()));
        let trainer = Trainer::new(tiny(7), recipe()).unwrap();
        let mut trainer = trainer.with_ranks(ranks.clone()).unwrap();
        let fine = objective(5, |tokens| tokens);
        // A directory where the temporary file of the first checkpoint would be.
        let blocked = |model: &Decoder, at: At| {
            if ranks.leads() {
                std::fs::create_dir_all(own.join(".step-000000003.partial"))?;
            }
            fine(model, at)
        };
        let error = trainer.run(&blocked, options(&own)).unwrap_err();
        ranks.settle(Err::<(), _>(error)).unwrap_err().to_string()
    });
    assert!(texts[0].contains("step-000000003"), "{texts:?}");
    assert!(texts[1].contains("process 0 failed"), "{texts:?}");
}

#[test]
fn ranks_that_hold_different_things_are_refused_or_made_the_same() {
    let frozen = |ranks: Ranks, seed: u64, recipe: Recipe| {
        let scope = Scope::only("*.mlp.down_proj.weight");
        let trainer = Trainer::new(tiny(seed), Recipe { scope, ..recipe }).unwrap();
        let mut trainer = trainer.with_ranks(ranks.clone()).unwrap();
        let ended = trainer.run(&objective(4, |tokens| tokens), RunOptions::default());
        ranks.settle(ended).err().map(|error| error.to_string())
    };
    let other = threads::run(2, |ranks| frozen(ranks.clone(), 7 + ranks.rank() as u64, recipe()));
    assert!(other[0].as_ref().is_some_and(|text| text.contains("weights")), "{other:?}");
    let slower = |rank: usize| Recipe { rate: 1e-3 / (1.0 + rank as f64), ..recipe() };
    let other = threads::run(2, |ranks| frozen(ranks.clone(), 7, slower(ranks.rank())));
    assert!(other[0].as_ref().is_some_and(|text| text.contains("recipe")), "{other:?}");
    // What trains is rank 0's, wherever the others began.
    let trained = threads::run(2, |ranks| {
        let trainer = Trainer::new(tiny(7 + ranks.rank() as u64), recipe()).unwrap();
        let mut trainer = trainer.with_ranks(ranks).unwrap();
        trainer.run(&objective(4, |tokens| tokens), RunOptions::default()).unwrap();
        weights(&trainer)
    });
    assert_eq!(distance(&trained[0], &trained[1]), 0.0);
}

#[test]
fn per_layer_updates_are_refused() {
    let optimizer = OptimizerConfig::galore(4);
    let recipe = Recipe { optimizer, per_layer: true, clip: None, ..Recipe::new(3, 1e-3) };
    let texts = threads::run(2, |ranks| {
        let trainer = Trainer::new(tiny(7), recipe.clone()).unwrap();
        trainer.with_ranks(ranks).err().map(|error| error.to_string())
    });
    assert!(texts.iter().flatten().all(|text| text.contains("per_layer")), "{texts:?}");
    assert_eq!(texts.iter().flatten().count(), 2);
}
