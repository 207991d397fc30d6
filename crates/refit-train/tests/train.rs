//! The trainer on tiny models: gradients against PyTorch, frozen parameters, forms on a weight, resuming.

use std::path::{Path, PathBuf};

use burn::module::{Module, Param};
use burn::tensor::{Tensor, TensorData};
use refit_nn::adapt::{Dora, Ia3, Lora, Side};
use refit_nn::scratch::DecoderShape;
use refit_nn::{BurnDevice as Device, Decoder, Run, Trainable, ops};
use refit_store::artifact::Artifact;
use refit_train::BoxError;
use refit_train::train::checkpoint;
use refit_train::train::loss::{self, next_token};
use refit_train::train::*;

fn shape() -> DecoderShape {
    DecoderShape {
        hidden: 16,
        intermediate: 24,
        layers: 2,
        heads: 2,
        kv_heads: 1,
        vocab: 32,
        context: 16,
        tied: false,
    }
}

fn tiny() -> Decoder {
    shape().init(7, &Device::flex()).expect("a valid shape")
}

/// Rows that count upwards by row-specific steps: easy to learn, not trivial.
fn row(example: usize) -> Vec<u32> {
    (0..12).map(|i| ((example * 5 + i * (1 + example % 3)) % 32) as u32).collect()
}

/// Next-token loss on batches of 4 of 64 such rows.
fn objective(seed: u64) -> impl Fn(&Decoder, At) -> Result<Terms, BoxError> {
    let order = Order::new(seed, 64);
    move |model, at| {
        let ids: Vec<u32> = order.batch(at.batch, 4).into_iter().flat_map(row).collect();
        let (value, tokens) = next_token(model, &ids, 4, None, &mut Run::plain())?;
        Ok(Terms::one("ce", value, tokens))
    }
}

fn weights(model: &Decoder) -> Vec<u8> {
    let logits = model.valid().forward(&row(3), 1, &mut Run::plain()).expect("runs");
    bytemuck::cast_slice(&ops::to_vec(&logits)).to_vec()
}

#[test]
fn gradients_are_those_of_pytorch() {
    let here = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    for name in ["llama-tied", "gemma2", "qwen3", "gpt-neox"] {
        let dir = here.join("../refit-nn/tests/fixtures/hf").join(name);
        let artifact = Artifact::open(&dir).expect("fixture");
        let expected = Artifact::open(dir.join("expected.safetensors")).expect("fixture");
        let gradients = here.join(format!("tests/fixtures/gradients/{name}.safetensors"));
        let wanted = Artifact::open(gradients).expect("fixture");
        let ids: Vec<u32> =
            expected.read_f32("input_ids").expect("fixture").iter().map(|&x| x as u32).collect();
        let model = Decoder::load(&artifact, &Device::flex().autodiff()).expect("loads");
        let (value, _) = next_token(&model, &ids, 1, None, &mut Run::plain()).expect("runs");
        let found = value.clone().into_scalar::<f32>();
        let want = wanted.read_f32("loss").expect("fixture")[0];
        assert!((found - want).abs() < 1e-4 * want, "{name}: loss {found} {want}");

        struct Check<'a>(
            &'a burn::tensor::Gradients,
            &'a Artifact,
            Vec<refit_nn::Parameter>,
            usize,
        );
        impl burn::module::ModuleVisitor for Check<'_> {
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
                let name = &self.2.iter().find(|p| p.id == param.id).expect("named").name;
                let want = self.1.read_f32(name).unwrap_or_else(|e| panic!("{name}: {e}"));
                let found = ops::to_vec(&param.val().grad(self.0).expect("a gradient"));
                let size = want.iter().fold(1e-3f32, |m, x| m.max(x.abs()));
                let worst = want.iter().zip(&found).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(worst < 2e-4 * size, "{name}: {worst} of {size}");
                self.3 += 1;
            }
        }
        let parameters = model.parameters();
        let count = parameters.len();
        let grads = value.backward();
        let mut check = Check(&grads, &wanted, parameters, 0);
        model.visit(&mut check);
        assert_eq!(check.3, count, "{name}: every parameter is compared once");
    }
}

#[test]
fn training_learns_and_terms_add_up() {
    let mut recipe = Recipe::new(60, 1e-2);
    recipe.average = Some(0.9);
    let mut trainer = Trainer::new(tiny(), recipe).unwrap();
    let order = Order::new(1, 64);
    let start = tiny();
    let objective = move |model: &Decoder, at: At| -> Result<Terms, BoxError> {
        let ids: Vec<u32> = order.batch(at.batch, 4).into_iter().flat_map(row).collect();
        let targets = loss::next_targets(&ids, 4, None);
        let hidden = model.hidden(&ids, 4, &mut Run::plain())?;
        let ce = loss::cross_entropy(&targets, 0.0);
        let value = model.frame.head_loss(hidden.clone(), &ce, &mut Run::plain());
        let anchor = start.hidden(&ids, 4, &mut Run::plain())?;
        let stay = loss::mse(hidden, Tensor::from_inner(anchor));
        Ok(Terms::one("ce", value, 44).with("stay", 0.01, stay))
    };
    let first = trainer.step(&objective).unwrap();
    assert!((first.loss - (first.terms["ce"] + 0.01 * first.terms["stay"])).abs() < 1e-5);
    let last = trainer.run(&objective, RunOptions::default()).unwrap().unwrap();
    assert!(first.terms["ce"] > 3.3 && last.terms["ce"] < 2.0, "{first:?} {last:?}");
    assert!(trainer.state_bytes() > 0);
    assert_ne!(weights(&trainer.averaged()), weights(trainer.model()));
}

#[test]
fn frozen_parameters_do_not_move_and_have_no_state() {
    let mut recipe = Recipe::new(5, 1e-2);
    recipe.decay = 0.5;
    recipe.scope =
        Scope { rules: vec![Rule::freeze("@all"), Rule::train("*.mlp.down_proj.weight")] };
    let before = tiny();
    let mut trainer = Trainer::new(before.clone(), recipe).unwrap();
    assert_eq!(trainer.trained().count(), 2);
    trainer.run(&objective(1), RunOptions::default()).unwrap();
    assert_eq!(trainer.state_bytes(), 2 * 2 * 4 * 16 * 24);
    let after = trainer.into_model();
    for (a, b) in before.blocks.iter().zip(&after.blocks) {
        for (a, b) in a.linears().into_iter().zip(b.linears()) {
            let same = ops::to_vec(&a.weight()) == ops::to_vec(&b.weight());
            assert_eq!(same, !a.site.ends_with("down_proj"), "{}", a.site);
        }
    }
}

#[test]
fn accumulation_equals_one_big_batch() {
    let run = |accumulate: usize| {
        let mut recipe = Recipe::new(3, 1e-2);
        recipe.accumulate = accumulate;
        recipe.optimizer = OptimizerConfig::Sgd { momentum: 0.9, nesterov: false };
        let mut trainer = Trainer::new(tiny(), recipe).unwrap();
        let objective = move |model: &Decoder, at: At| -> Result<Terms, BoxError> {
            let size = 4 / accumulate;
            let first = at.batch as usize * size;
            let ids: Vec<u32> = (first..first + size).flat_map(row).collect();
            let (value, tokens) = next_token(model, &ids, size, None, &mut Run::plain())?;
            Ok(Terms::one("ce", value, tokens))
        };
        trainer.run(&objective, RunOptions::default()).unwrap();
        ops::to_vec(&trainer.into_model().blocks[0].linears()[0].weight())
    };
    let (one, four) = (run(1), run(4));
    let worst = one.iter().zip(&four).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst < 1e-6, "{worst}");
}

fn uniform(rows: usize, columns: usize) -> Tensor<2> {
    let values: Vec<f32> =
        (0..rows * columns).map(|i| ((i * 37 % 19) as f32 - 9.0) / 60.0).collect();
    Tensor::from_data(TensorData::new(values, [rows, columns]), &Device::flex())
}

fn adapted(attach: impl Fn(&mut refit_nn::operator::Linear, usize, usize)) -> Decoder {
    let mut model = tiny();
    for block in &mut model.blocks {
        for linear in block.linears_mut() {
            let [out, inputs] = linear.weight().dims();
            attach(linear, out, inputs);
        }
    }
    model
}

fn lora(rank: usize) -> Decoder {
    adapted(|linear, out, inputs| {
        let form = Lora {
            a: Param::from_tensor(uniform(rank, inputs)),
            b: Param::from_tensor(Tensor::zeros([out, rank], &Device::flex())),
            scale: 2.0,
        };
        assert!(linear.attach(form, true));
    })
}

#[test]
fn forms_start_as_the_base_train_alone_and_merge() {
    let dora = adapted(|linear, out, inputs| {
        let norms = linear.weight().powi_scalar(2).sum_dim(1).sqrt().reshape([out]);
        let form = Dora {
            a: Param::from_tensor(uniform(4, inputs)),
            b: Param::from_tensor(Tensor::zeros([out, 4], &Device::flex())),
            magnitude: Param::from_tensor(norms),
            scale: 1.0,
        };
        assert!(linear.attach(form, true));
    });
    let ia3 = adapted(|linear, out, inputs| {
        let side = if linear.site.contains("mlp") { Side::Input } else { Side::Output };
        let width = if side == Side::Input { inputs } else { out };
        let factors = Param::from_tensor(Tensor::ones([width], &Device::flex()));
        assert!(linear.attach(Ia3 { factors, side }, true));
    });
    let logits =
        |model: &Decoder| ops::to_vec(&model.forward(&row(3), 1, &mut Run::plain()).expect("runs"));
    let close = |a: &[f32], b: &[f32], what: &str| {
        let worst = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 2e-5, "{what}: {worst}");
    };
    let base = logits(&tiny());
    for (form, model) in [("lora", lora(4)), ("dora", dora), ("ia3", ia3)] {
        close(&base, &logits(&model), form);
        let mut recipe = Recipe::new(40, 3e-2);
        recipe.scope = Scope::only(format!("*.{form}.*"));
        let mut trainer = Trainer::new(model.clone(), recipe).unwrap();
        assert!(trainer.trained().all(|name| name.contains(form)));
        // One batch again and again: (IA)³ alone cannot do much to a random model, but it must go down.
        let same = |model: &Decoder, at: At| objective(2)(model, At { batch: 0, ..at });
        let first = trainer.step(&same).unwrap();
        let last = trainer.run(&same, RunOptions::default()).unwrap().unwrap();
        assert!(last.loss < first.loss - 0.01, "{form}: {} {}", first.loss, last.loss);
        let tuned = trainer.into_model();
        let (with, merged) = (logits(&tuned), tuned.clone().materialize());
        close(&with, &logits(&merged), "merged");
        assert!(merged.parameters().iter().all(|p| !p.name.contains(form)));
        let moved = with.iter().zip(&base).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(moved > 1e-3, "{form} changed nothing: {moved}");
        // Without a scope the frozen base stays frozen: the form alone trains.
        let again = Trainer::new(model, Recipe::new(1, 1e-3)).unwrap();
        let trained: Vec<_> =
            again.trained().filter(|n| n.contains("layers") && n.contains("proj")).collect();
        assert!(trained.iter().all(|n| n.contains(form)), "{trained:?}");
    }
}

#[test]
fn lora_by_its_factors_is_lora_by_its_weight() {
    let model = lora(3);
    let linear = model.blocks[0].linears()[0];
    let mut moved = linear.clone();
    let form = Lora {
        a: Param::from_tensor(uniform(3, 16)),
        b: Param::from_tensor(uniform(16, 3)),
        scale: 0.5,
    };
    assert!(moved.attach(form, true), "replaces the form that is there");
    let x = uniform(5, 16).reshape([1, 5, 16]);
    let fast = moved.forward(x.clone(), &mut Run::plain());
    let whole = ops::linear(x, moved.weight(), None);
    let worst = (fast - whole).abs().max().into_scalar::<f32>();
    assert!(worst < 1e-6, "{worst}");
    assert!(linear.form::<Lora>().is_some() && linear.form::<Dora>().is_none());
}

#[test]
fn a_loss_that_is_not_a_number_stops_before_the_update() {
    let mut trainer = Trainer::new(tiny(), Recipe::new(10, 1e-2)).unwrap();
    trainer.step(&objective(1)).unwrap();
    let before = weights(trainer.model());
    let broken = |model: &Decoder, at: At| -> Result<Terms, BoxError> {
        let mut terms = objective(1)(model, at)?;
        terms.terms[0].value = terms.terms[0].value.clone() * f32::NAN;
        Ok(terms)
    };
    let error = trainer.step(&broken).unwrap_err();
    assert!(error.to_string().contains("`ce` is NaN; nothing was updated"), "{error}");
    assert_eq!(before, weights(trainer.model()));
    assert_eq!(trainer.steps_done(), 1);
}

#[test]
fn a_run_that_diverges_says_so_and_keeps_its_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let mut recipe = Recipe::new(400, 3.0);
    recipe.schedule = Schedule::Constant { warmup: 0 };
    recipe.optimizer = OptimizerConfig::Lion { betas: (0.9, 0.99) };
    recipe.divergence = 1.5;
    let mut trainer = Trainer::new(tiny(), recipe).unwrap();
    let options =
        RunOptions { dir: Some(dir.path().into()), every: 1, keep: 2, ..RunOptions::default() };
    let error = trainer.run(&objective(1), options).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("lower the learning rate") || text.contains("nothing was updated"),
        "{text}"
    );
    assert!(text.contains("last good state"), "{text}");
    assert_eq!(checkpoint::list(dir.path()).unwrap().len(), 2);
}

fn long_recipe() -> Recipe {
    let mut recipe = Recipe::new(40, 1e-2);
    recipe.average = Some(0.95);
    recipe.accumulate = 2;
    recipe.optimizer = OptimizerConfig::AdamW { betas: (0.9, 0.99), eps: 1e-8, eight_bit: true };
    recipe
}

fn options<'a>(dir: &Path) -> RunOptions<'a> {
    RunOptions {
        dir: Some(dir.into()),
        every: 5,
        keep: 3,
        resume: true,
        identity: "rows".into(),
        on_step: None,
        on_checkpoint: None,
    }
}

#[test]
fn a_changed_recipe_or_other_data_is_not_resumed() {
    let dir = tempfile::tempdir().unwrap();
    let mut short = long_recipe();
    short.steps = 5;
    short.schedule = Schedule::cosine(1, 0.0);
    let mut trainer = Trainer::new(tiny(), short.clone()).unwrap();
    trainer.run(&objective(1), options(dir.path())).unwrap();
    let resume = |recipe: Recipe, identity: &str| {
        let mut trainer = Trainer::new(tiny(), recipe).unwrap();
        let options = RunOptions { identity: identity.into(), ..options(dir.path()) };
        trainer.run(&objective(1), options).map(|report| report.is_none())
    };
    assert!(resume(short.clone(), "rows").unwrap(), "a complete run has nothing to do");
    let text = resume(Recipe { rate: 0.5, ..short.clone() }, "rows").unwrap_err().to_string();
    assert!(text.contains("`rate` was 0.01, is 0.5"), "{text}");
    let text = resume(short, "other rows").unwrap_err().to_string();
    assert!(text.contains("other data"), "{text}");
}

const CHILD: &str = "REFIT_TEST_TRAIN_DIR";

/// The body of the child process of the next test: trains slowly until it is killed.
#[test]
fn child_of_the_kill_test() {
    let Ok(dir) = std::env::var(CHILD) else { return };
    let mut trainer = Trainer::new(tiny(), long_recipe()).unwrap();
    let mut pause = |_: &StepReport| std::thread::sleep(std::time::Duration::from_millis(40));
    let options = RunOptions { on_step: Some(&mut pause), ..options(Path::new(&dir)) };
    trainer.run(&objective(1), options).unwrap();
}

#[test]
fn a_killed_run_resumes_to_the_same_bytes() {
    let (whole, killed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut trainer = Trainer::new(tiny(), long_recipe()).unwrap();
    trainer.run(&objective(1), options(whole.path())).unwrap();

    let mut child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_of_the_kill_test"])
        .env(CHILD, killed.path())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let patience = std::time::Instant::now();
    while checkpoint::list(killed.path()).unwrap().len() < 2 {
        assert!(patience.elapsed().as_secs() < 120, "the child writes no checkpoints");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    child.kill().unwrap(); // SIGKILL
    child.wait().unwrap();
    let reached = checkpoint::list(killed.path()).unwrap();
    assert!(!reached.contains(&checkpoint::path(killed.path(), 40)), "killed before the end");

    let mut resumed = Trainer::new(tiny(), long_recipe()).unwrap();
    resumed.run(&objective(1), options(killed.path())).unwrap();
    assert_eq!(weights(trainer.model()), weights(resumed.model()));
    let bytes = |dir: &Path| std::fs::read(checkpoint::path(dir, 40)).unwrap();
    assert_eq!(bytes(whole.path()), bytes(killed.path()));
    let steps = |dir: &Path| -> Vec<u64> {
        let text = std::fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
        text.lines().map(|l| serde_json::from_str::<StepReport>(l).unwrap().step).collect()
    };
    assert_eq!(steps(killed.path()), (0..40).collect::<Vec<_>>());
}

#[test]
fn hooks_see_every_update() {
    struct Mask;
    impl Hook for Mask {
        fn after(&mut self, name: &str, _: &[usize], value: &mut [f32]) {
            if name.ends_with("up_proj.weight") {
                value.iter_mut().step_by(2).for_each(|v| *v = 0.0);
            }
        }
    }
    let mut trainer = Trainer::new(tiny(), Recipe::new(2, 1e-2)).unwrap().with_hook(Box::new(Mask));
    trainer.run(&objective(1), RunOptions::default()).unwrap();
    let model = trainer.into_model();
    for linear in model.blocks.iter().flat_map(|b| b.linears()) {
        let holds = ops::to_vec(&linear.weight()).iter().step_by(2).all(|v| *v == 0.0);
        assert_eq!(holds, linear.site.ends_with("up_proj"), "{}", linear.site);
    }
}
