//! GaLore in the trainer: per-layer updates, bytes of gradients and state, resuming in the middle of a gap.

use refit_nn::adapt::{Compander, CompanderOptions};
use refit_nn::scratch::DecoderShape;
use refit_nn::{BurnDevice as Device, Decoder, Run, ops};
use refit_train::BoxError;
use refit_train::train::loss::next_token;
use refit_train::train::optimizer::{Refresh, Side};
use refit_train::train::*;

fn tiny() -> Decoder {
    let shape = DecoderShape {
        hidden: 32,
        intermediate: 48,
        layers: 3,
        heads: 2,
        kv_heads: 1,
        vocab: 32,
        context: 16,
        tied: false,
    };
    shape.init(5, &Device::flex()).expect("a valid shape")
}

fn row(example: usize) -> Vec<u32> {
    (0..12).map(|i| ((example * 5 + i * (1 + example % 3)) % 32) as u32).collect()
}

fn objective(model: &Decoder, at: At) -> Result<Terms, BoxError> {
    let ids: Vec<u32> = Order::new(1, 64).batch(at.batch, 4).into_iter().flat_map(row).collect();
    let (value, tokens) = next_token(model, &ids, 4, None, &mut Run::plain())?;
    Ok(Terms::one("ce", value, tokens))
}

fn recipe(steps: u64, change: impl FnOnce(&mut OptimizerConfig)) -> Recipe {
    let mut recipe = Recipe::new(steps, 2e-2);
    recipe.clip = None;
    recipe.optimizer = OptimizerConfig::galore(8);
    change(&mut recipe.optimizer);
    recipe
}

fn gap(updates: u64) -> impl FnOnce(&mut OptimizerConfig) {
    move |config| {
        if let OptimizerConfig::GaLore { gap, .. } = config {
            *gap = updates;
        }
    }
}

/// Every trained value, by name.
fn values(trainer: &Trainer<Decoder>) -> Vec<(String, Vec<u32>)> {
    let all = trainer.checkpoint("").parameters;
    all.into_iter().map(|(n, (_, v))| (n, v.into_iter().map(f32::to_bits).collect())).collect()
}

#[test]
fn per_layer_updates_are_ordinary_updates_to_the_bit_with_fewer_bytes() {
    for side in [Side::Std, Side::Full] {
        for (then, low_bit) in [(Refresh::Keep, false), (Refresh::Rotate, true)] {
            let run = |per_layer| {
                let recipe = Recipe {
                    per_layer,
                    ..recipe(8, |config| {
                        gap(3)(config);
                        if let OptimizerConfig::GaLore { side: s, on_refresh, eight_bit, .. } =
                            config
                        {
                            (*s, *on_refresh, *eight_bit) = (side, then, low_bit);
                        }
                    })
                };
                let mut trainer = Trainer::new(tiny(), recipe).unwrap();
                let report = trainer.run(&objective, RunOptions::default()).unwrap().unwrap();
                let state = trainer.checkpoint("").states;
                (values(&trainer), state, report.grad_norm, report.loss, trainer.gradient_bytes())
            };
            let (ordinary, streamed) = (run(false), run(true));
            assert_eq!(ordinary.0, streamed.0, "{side:?} {then:?}");
            assert_eq!(ordinary.1, streamed.1);
            assert_eq!((ordinary.2, ordinary.3), (streamed.2, streamed.3));
            let parameters: usize = ordinary.0.iter().map(|(_, v)| 4 * v.len()).sum();
            assert_eq!(ordinary.4, parameters);
            // Whole: embedding, head, seven norms, and one weight at a time; the rest in rank 8 with bases.
            assert!(streamed.4 < ordinary.4 * 2 / 3, "{} of {}", streamed.4, ordinary.4);
            assert!(streamed.4 >= 4 * (2 * 32 * 32 + 7 * 32), "{}", streamed.4);
        }
    }
}

#[test]
fn a_run_resumed_in_the_middle_of_a_gap_ends_in_the_same_bits() {
    for (per_layer, low_bit) in [(false, true), (true, false)] {
        let dir = tempfile::tempdir().unwrap();
        let recipe = Recipe {
            per_layer,
            ..recipe(12, |config| {
                gap(5)(config);
                if let OptimizerConfig::GaLore { eight_bit, stagger, on_refresh, .. } = config {
                    (*eight_bit, *stagger, *on_refresh) = (low_bit, true, Refresh::Reset);
                }
            })
        };
        let mut whole = Trainer::new(tiny(), recipe.clone()).unwrap();
        whole.run(&objective, RunOptions::default()).unwrap();
        let mut part = Trainer::new(tiny(), recipe.clone()).unwrap();
        for _ in 0..7 {
            part.step(&objective).unwrap();
        }
        let saved = part.checkpoint("rows").write(dir.path(), 1).unwrap();
        // Into a model with other values: everything must come from the file. The mode may change, too.
        let other = Recipe { per_layer: !per_layer, ..recipe };
        let mut resumed = Trainer::new(tiny(), other).unwrap();
        resumed.step(&objective).unwrap();
        resumed.restore(&saved, "rows").unwrap();
        resumed.run(&objective, RunOptions::default()).unwrap();
        assert_eq!(values(&whole), values(&resumed));
        assert_eq!(whole.checkpoint("").states, resumed.checkpoint("").states);
    }
}

#[test]
fn state_is_a_fraction_of_adams_and_8_bits_train_alike() {
    let shape = DecoderShape {
        hidden: 128,
        intermediate: 640,
        layers: 1,
        heads: 2,
        kv_heads: 2,
        vocab: 32,
        context: 16,
        tied: true,
    };
    let run = |optimizer: OptimizerConfig, rate: f64| {
        let mut recipe = Recipe::new(60, rate);
        (recipe.clip, recipe.optimizer) = (None, optimizer);
        let model = shape.init(3, &Device::flex()).unwrap();
        let mut trainer = Trainer::new(model, recipe).unwrap();
        let mut last = Vec::new();
        for _ in 0..60 {
            last.push(trainer.step(&objective).unwrap().loss);
        }
        (last[50..].iter().sum::<f64>() / 10.0, last[0], trainer.checkpoint("").states)
    };
    let bytes = |states: &std::collections::BTreeMap<String, optimizer::State>| -> usize {
        let targets =
            states.iter().filter(|(name, _)| name.contains("attn") || name.contains("mlp"));
        targets.map(|(_, state)| state.bytes()).sum()
    };
    let galore = |low_bit| {
        let mut config = OptimizerConfig::galore(32);
        if let OptimizerConfig::GaLore { eight_bit, gap, .. } = &mut config {
            (*eight_bit, *gap) = (low_bit, 20);
        }
        config
    };
    let (adam, start, whole) = run(OptimizerConfig::adamw(), 3e-3);
    let (full, _, small) = run(galore(false), 1e-2);
    let (low, _, smaller) = run(galore(true), 1e-2);
    assert!(full < 0.7 * start, "GaLore does not learn: {full} from {start} (Adam: {adam})");
    assert!((low / full - 1.0).abs() < 0.02, "8 bits: {low}, 32 bits: {full}");
    // Adam 2 m n; GaLore m r + 2 n r.
    let (attention, mlp) = (4 * (128 * 32 + 2 * 128 * 32), 3 * (128 * 32 + 2 * 640 * 32));
    assert_eq!(bytes(&whole), 4 * 2 * (4 * 128 * 128 + 3 * 128 * 640));
    assert_eq!(bytes(&small), 4 * (attention + mlp));
    let moments = 2 * (4 * 128 * 32 + 3 * 640 * 32);
    assert_eq!(bytes(&smaller), 4 * (7 * 128 * 32) + moments + 4 * moments / 256);
}

#[test]
fn what_per_layer_cannot_do_is_refused_before_the_first_step() {
    let setting = |recipe: Recipe| Trainer::new(tiny(), recipe).err().map(|e| e.to_string());
    let good = Recipe { per_layer: true, ..recipe(3, |_| {}) };
    assert_eq!(setting(good.clone()), None);
    let text = setting(Recipe { accumulate: 2, ..good.clone() }).expect("refused");
    assert!(text.starts_with("accumulate = 2") && text.contains("per_layer"), "{text}");
    let text = setting(Recipe { clip: Some(1.0), ..good.clone() }).expect("refused");
    assert!(text.starts_with("clip") && text.contains("per_layer"), "{text}");
    let mut targets = good.clone();
    if let OptimizerConfig::GaLore { targets, .. } = &mut targets.optimizer {
        *targets = vec!["*attention*".into()];
    }
    let text = setting(targets).expect("refused");
    assert!(text.contains("`*attention*`") && text.contains("nearest"), "{text}");

    let never = |_: &Decoder, _: At| -> Result<Terms, BoxError> { panic!("no loss is asked for") };
    let adam = Recipe { optimizer: OptimizerConfig::adamw(), ..good.clone() };
    let text = Trainer::new(tiny(), adam).unwrap().step(&never).unwrap_err().to_string();
    assert!(text.contains("galore"), "{text}");
    struct Nothing;
    impl Hook for Nothing {}
    let mut hooked = Trainer::new(tiny(), good.clone()).unwrap().with_hook(Box::new(Nothing));
    assert!(hooked.step(&never).unwrap_err().to_string().contains("hooks"));

    // A model that runs twice in one loss: its gradients come in parts.
    let twice = |model: &Decoder, at: At| -> Result<Terms, BoxError> {
        let again = objective(model, At { batch: at.batch + 1, ..at })?;
        Ok(objective(model, at)?.with("again", 1.0, again.terms[0].value.clone()))
    };
    let mut trainer = Trainer::new(tiny(), good.clone()).unwrap();
    let before = values(&trainer);
    let text = trainer.step(&twice).unwrap_err().to_string();
    assert!(text.contains("more than once") && text.contains("per_layer"), "{text}");
    assert_eq!(values(&trainer), before, "nothing was updated");
    assert_eq!(trainer.state_bytes(), 0);
    Trainer::new(tiny(), Recipe { per_layer: false, ..good }).unwrap().step(&twice).unwrap();
}

#[test]
fn recipes_are_read_with_and_without_the_new_settings() {
    let recipe = Recipe { per_layer: true, ..recipe(3, |_| {}) };
    let mut json = serde_json::to_value(&recipe).unwrap();
    assert_eq!(json["optimizer"]["kind"], "galore");
    assert_eq!(serde_json::from_value::<Recipe>(json.clone()).unwrap(), recipe);
    json.as_object_mut().unwrap().remove("per_layer");
    assert!(!serde_json::from_value::<Recipe>(json).unwrap().per_layer);
}

#[test]
fn a_compander_trains_resumes_and_folds() {
    let model = || {
        let mut model = tiny();
        for linear in model.blocks.iter_mut().flat_map(|b| b.linears_mut()) {
            linear.compand(&CompanderOptions::default()).unwrap();
        }
        model
    };
    let logits =
        |model: &Decoder| ops::to_vec(&model.forward(&row(2), 1, &mut Run::plain()).expect("runs"));
    let near = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5);
    assert!(near(&logits(&model()), &logits(&tiny())), "the start is the given model");
    let mut recipe = Recipe::new(30, 1e-2);
    let shape = Rule { rate: Some(0.1), decay: Some(0.0), ..Rule::train("*.compander.*") };
    recipe.scope = Scope { rules: vec![shape] };
    let mut trainer = Trainer::new(model(), recipe.clone()).unwrap();
    let first = trainer.step(&objective).unwrap().loss;
    let dir = tempfile::tempdir().unwrap();
    (0..9).for_each(|_| drop(trainer.step(&objective).unwrap()));
    let saved = trainer.checkpoint("").write(dir.path(), 1).unwrap();
    let last = trainer.run(&objective, RunOptions::default()).unwrap().unwrap();
    assert!(last.loss < first - 0.2, "{} {first}", last.loss);
    let mut resumed = Trainer::new(model(), recipe).unwrap();
    resumed.restore(&saved, "").unwrap();
    resumed.run(&objective, RunOptions::default()).unwrap();
    assert_eq!(values(&trainer), values(&resumed));
    use burn::module::Module;
    let tuned = trainer.into_model();
    let linear = tuned.blocks[0].linears()[0];
    let form = linear.form::<Compander>().expect("still there");
    assert!((form.a() / form.b() - 1.1).abs() > 1e-6, "a and b are learned");
    let folded = tuned.clone().materialize();
    use refit_nn::Trainable;
    let names =
        |m: &Decoder| -> Vec<_> { m.parameters().into_iter().map(|p| (p.name, p.shape)).collect() };
    assert_eq!(names(&folded), names(&tiny()), "the names and shapes of the input");
    assert!(near(&logits(&folded), &logits(&tuned)));
}
