//! Methods that train, end to end on the small model that travels with refit: what they write, what they leave alone, how they
//! resume, and what they refuse.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use refit_data::Records;
use refit_methods::method::{AdapterInput, Context, Inputs, ModelInput, TextData, TrainingData};
use refit_methods::registry;
use refit_nn::{BurnDevice, Decoder, Run, adapter, ops};
use refit_store::Artifact;
use refit_store::adapter::Adapter;
use refit_train::train::TrainError;
use refit_train::train::ranks::threads;
use serde_json::{Value, json};

fn tiny() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../assets/tiny")
}

fn tuned(text: &str) -> Inputs {
    let text = TextData { source: "lesson".into(), text: text.repeat(40) };
    Inputs {
        models: vec![ModelInput::open("tiny", tiny()).unwrap()],
        data: vec![TrainingData::Text(text)],
        ..Inputs::default()
    }
}

const LESSON: &str =
    "And the keeper wrote down the height of the tide and the names of the ships. ";

fn small(more: Value) -> Value {
    let mut all = json!({"steps": 4, "batch": 2, "max_length": 32, "checkpoint_every": 1});
    for (key, value) in more.as_object().into_iter().flatten() {
        all[key] = value.clone();
    }
    all
}

fn apply(method: &str, parameters: Value, inputs: &Inputs, out: &Path) -> Result<Value, String> {
    apply_in(method, parameters, inputs, Context::new(out))
}

fn apply_in(
    method: &str,
    parameters: Value,
    inputs: &Inputs,
    mut cx: Context,
) -> Result<Value, String> {
    let configured =
        registry::get(method).unwrap().from_value(&parameters).map_err(|e| e.to_string())?;
    inputs.check(registry::get(method).unwrap().info).map_err(|e| e.to_string())?;
    let plan = configured.plan(inputs).map_err(|e| e.to_string())?;
    let output = configured.run(inputs, &plan, &mut cx).map_err(|e| e.to_string())?;
    Ok(output.report)
}

const IDS: [u32; 10] = [5, 9, 1, 30, 7, 7, 2, 48, 11, 3];

fn logits(decoder: &Decoder) -> Vec<f32> {
    ops::to_vec(&decoder.forward(&IDS, 1, &mut Run::plain()).unwrap())
}

fn load(path: &Path) -> Decoder {
    Decoder::load(&Artifact::open(path).unwrap(), &BurnDevice::flex()).unwrap()
}

fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn adapters_learn_attach_and_merge_to_the_same_model() {
    let dir = tempfile::tempdir().unwrap();
    let inputs = tuned(LESSON);
    let base = logits(&load(&tiny()));
    for (method, more, mergeable) in [
        ("lora", json!({"rank": 4, "learning_rate": 1e-2}), true),
        (
            "lora",
            json!({"rank": 4, "rslora": true, "target_modules": ["q_proj", "down_proj"], "learning_rate": 1e-2}),
            true,
        ),
        ("dora", json!({"rank": 4, "learning_rate": 1e-2}), true),
        ("ia3", json!({"learning_rate": 1e-1}), true),
        ("ln-tuning", json!({"learning_rate": 1e-2}), true),
        (
            "unified-peft",
            json!({"preset": "mam", "bottleneck": 8, "prefix_length": 4, "prefix_net": 16, "learning_rate": 1e-2}),
            false,
        ),
        ("unified-peft", json!({"preset": "houlsby", "bottleneck": 8}), false),
        (
            "unified-peft",
            json!({"preset": "pa-attn", "bottleneck": 8, "learnable_scale": true, "learning_rate": 1e-2}),
            false,
        ),
        ("unified-peft", json!({"preset": "mh-pa", "bottleneck": 4, "learning_rate": 1e-1}), false),
        ("unified-peft", json!({"preset": "prefix", "prefix_length": 4, "prefix_net": 0}), false),
        (
            "unified-peft",
            json!({"site": ["attention", "ffn"], "form": "parallel", "function": ["linear", "silu"], "composition": "scaled",
                   "bottleneck": 4, "learning_rate": 1e-2}),
            false,
        ),
        (
            "unified-peft",
            json!({"site": "heads", "form": "sequential", "function": "gelu", "scale": 2.0, "bottleneck": 4, "learning_rate": 1e-2}),
            false,
        ),
        (
            "unified-peft",
            json!({"site": ["per-head"], "function": ["softmax"], "composition": ["add"], "bottleneck": 4, "learning_rate": 1e-1}),
            false,
        ),
        (
            "unified-peft",
            json!({"site": ["per-head", "heads", "ffn"], "bottleneck": 4, "prefix_length": 3, "prefix_net": 0,
                   "learning_rate": 1e-2}),
            false,
        ),
        ("unified-peft", json!({"preset": "prompt", "prefix_length": 4}), false),
    ] {
        let name = format!("{method} {more}");
        let out = dir.path().join("adapter");
        let report =
            apply(method, small(more), &inputs, &out).unwrap_or_else(|e| panic!("{name}: {e}"));
        let (first, last) = (report["first_loss"].as_f64(), report["last_loss"].as_f64());
        assert!(first.is_some() && last.is_some(), "{name}");
        assert_eq!(report["updates"], 4, "{name}");
        let opened = Adapter::open(&out).unwrap_or_else(|e| panic!("{name}: {e}"));
        opened.check_base(&inputs.models[0].artifact).unwrap_or_else(|e| panic!("{name}: {e}"));
        let parts: usize = opened.parts().iter().map(|part| part.form.parameters()).sum();
        let prompt = opened.prompt().map_or(0, |prompt| prompt.table().values.len());
        if !name.contains("mam") && !name.contains("learnable") {
            // The net of a prefix and a learned factor train, but are folded away.
            assert_eq!(report["trained_parameters"], parts + prompt, "{name}");
        }
        let attached = logits(&adapter::attach(load(&tiny()), &opened).unwrap());
        assert!(distance(&base, &attached) > 1e-4, "{name} changes the model");
        assert!(refit_store::Lineage::verify(&out).unwrap().is_ok(), "{name}");
        let merged = dir.path().join("merged");
        let both = Inputs {
            models: inputs.models.clone(),
            adapters: vec![AdapterInput { source: "adapter".into(), adapter: Arc::new(opened) }],
            ..Inputs::default()
        };
        let merge = apply("merge-adapter", json!({"dtype": "f32"}), &both, &merged);
        if mergeable {
            merge.unwrap_or_else(|e| panic!("{name}: {e}"));
            let distance = distance(&attached, &logits(&load(&merged)));
            assert!(distance < 1e-4, "{name}: merged and attached differ by {distance}");
            std::fs::remove_dir_all(&merged).unwrap();
        } else {
            let error = merge.unwrap_err();
            assert!(
                error.contains("depends on the input") && error.contains("--adapter"),
                "{error}"
            );
        }
        std::fs::remove_dir_all(&out).unwrap();
    }
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().collect();
    assert!(left.is_empty(), "no checkpoints are left behind: {left:?}");
}

/// The card: l = 0 and r = 0 are the base model, exactly; and fresh adapters with `W_u = 0` are it to the bit.
#[test]
fn no_channels_and_no_tokens_are_the_base_model() {
    let dir = tempfile::tempdir().unwrap();
    let mut inputs = tuned(LESSON);
    inputs.text = vec![TextData { source: "held out".into(), text: LESSON.repeat(8) }];
    let base = logits(&load(&tiny()));
    let attached = |out: &Path| {
        let opened = Adapter::open_on(out, &inputs.models[0].artifact).unwrap();
        (logits(&adapter::attach(load(&tiny()), &opened).unwrap()), opened)
    };
    for (i, more) in [
        json!({"bottleneck": 0, "prefix_length": 0}),
        json!({"preset": "houlsby", "bottleneck": 0}),
        json!({"preset": "prefix", "prefix_length": 0}),
        json!({"preset": "prompt", "prefix_length": 0}),
        json!({"preset": "mh-pa", "bottleneck": 0}),
    ]
    .into_iter()
    .enumerate()
    {
        let out = dir.path().join(i.to_string());
        let report = apply("unified-peft", small(more.clone()), &inputs, &out).unwrap();
        assert_eq!((&report["updates"], &report["trained_parameters"]), (&json!(0), &json!(0)));
        assert_eq!(report["held_out_perplexity_before"], report["held_out_perplexity_after"]);
        let (logits, opened) = attached(&out);
        assert!(opened.parts().is_empty() && opened.prompt().is_none(), "{more}");
        assert!(logits == base, "{more} changes the model");
        assert!(refit_store::Lineage::verify(&out).unwrap().is_ok(), "{more}");
    }
    // One of the two at zero leaves the other one.
    let out = dir.path().join("half");
    apply("unified-peft", small(json!({"bottleneck": 4, "prefix_length": 0})), &inputs, &out)
        .unwrap();
    let (_, opened) = attached(&out);
    assert!(opened.prompt().is_none() && !opened.parts().is_empty());
    let configured = registry::get("unified-peft").unwrap();
    let zero = configured.from_value(&small(json!({"bottleneck": 0, "prefix_length": 0}))).unwrap();
    let plan = zero.plan(&inputs).unwrap();
    assert!(plan.tensors.is_empty() && plan.warnings[0].contains("nothing trains"), "{plan:?}");
}

/// The card's counts, as they are planned and as they are written.
#[test]
fn planned_tensors_are_those_that_are_written() {
    let dir = tempfile::tempdir().unwrap();
    let inputs = tuned(LESSON);
    let linears = inputs.models[0].artifact.architecture();
    let sides: usize = linears.linears().map(|site| site.shape.iter().sum::<usize>()).sum();
    for (i, (method, more, count)) in [
        // r (in + out) for each matrix.
        ("lora", json!({"rank": 4}), Some(4 * sides)),
        ("unified-peft", json!({"preset": "mh-pa", "bottleneck": 4}), None),
        (
            "unified-peft",
            json!({"preset": "mam", "bottleneck": 4, "prefix_length": 2, "prefix_net": 0}),
            None,
        ),
        ("unified-peft", json!({"site": ["attention", "ffn"], "bottleneck": 4}), None),
    ]
    .into_iter()
    .enumerate()
    {
        let out = dir.path().join(i.to_string());
        let configured = registry::get(method).unwrap().from_value(&small(more.clone())).unwrap();
        let plan = configured.plan(&inputs).unwrap();
        configured.run(&inputs, &plan, &mut Context::new(&out)).unwrap();
        let written = Artifact::open(out.join("adapter_model.safetensors")).unwrap();
        let bare = |name: &str| name.trim_start_matches("base_model.model.").to_owned();
        let mut found: Vec<(String, Vec<usize>)> =
            written.tensors().iter().map(|t| (bare(&t.name), t.shape.clone())).collect();
        let mut planned: Vec<(String, Vec<usize>)> =
            plan.tensors.iter().map(|t| (bare(&t.name), t.shape.clone())).collect();
        found.sort();
        planned.sort();
        assert_eq!(planned, found, "{method} {more}");
        let all: usize = found.iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
        assert!(count.is_none_or(|count| count == all), "{method}: {all}, not {count:?}");
    }
}

#[test]
fn training_tells_what_happens_and_leaves_it_beside_the_weights() {
    use refit_methods::method::{Progress, TrainingEvent, Unit};
    #[derive(Default)]
    struct Log(std::sync::Mutex<Vec<TrainingEvent>>);
    impl Progress for Log {
        fn begin(&self, _: &str, _: u64, _: Unit) {}
        fn advance(&self, _: u64) {}
        fn end(&self) {}
        fn training(&self, event: &TrainingEvent) {
            self.0.lock().unwrap().push(event.clone());
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let mut inputs = tuned(LESSON);
    inputs.text = vec![TextData { source: "held out".into(), text: LESSON.repeat(8) }];
    let configured = registry::get("lora").unwrap();
    let parameters = small(json!({"rank": 2, "checkpoint_every": 3}));
    let configured = configured.from_value(&parameters).unwrap();
    let plan = configured.plan(&inputs).unwrap();
    let (out, log) = (dir.path().join("out"), Arc::new(Log::default()));
    let mut cx = Context { progress: log.clone(), ..Context::new(&out) };
    let report = configured.run(&inputs, &plan, &mut cx).unwrap().report;
    let events = log.0.lock().unwrap();
    let TrainingEvent::Begin { updates: 4, parameters, held_out: Some(before) } = events[0] else {
        panic!("{:?}", events[0]);
    };
    assert_eq!(report["trained_parameters"], parameters);
    assert_eq!(report["held_out_perplexity_before"], before);
    let updates: Vec<u64> = events
        .iter()
        .filter_map(|event| match event {
            TrainingEvent::Update { update, loss, rate, grad_norm, items, .. } => {
                assert!(loss.is_finite() && *rate > 0.0 && *grad_norm > 0.0 && *items > 0);
                Some(*update)
            }
            _ => None,
        })
        .collect();
    assert_eq!(updates, [1, 2, 3, 4]);
    let saved = |event: &&TrainingEvent| matches!(event, TrainingEvent::Checkpoint { .. });
    let saved: Vec<&TrainingEvent> = events.iter().filter(saved).collect();
    assert_eq!(
        saved,
        [&TrainingEvent::Checkpoint { update: 3 }, &TrainingEvent::Checkpoint { update: 4 }]
    );
    // The summary is the report without what differs from run to run.
    let file = std::fs::read(out.join("refit.training.json")).unwrap();
    let summary: Value = serde_json::from_slice(&file).unwrap();
    for key in ["loss", "learning_rate", "grad_norm"] {
        assert_eq!(summary[key].as_array().unwrap().len(), 4, "{key}");
    }
    assert!(summary.as_object().unwrap().iter().all(|(key, value)| report[key] == *value));
    assert!(summary.get("training_seconds").is_none() && report["training_seconds"].is_number());
    let lineage = refit_store::Lineage::read(&out).unwrap().unwrap();
    let measured = &lineage.measurements[0];
    assert_eq!((measured.metric.as_str(), measured.before.unwrap().value), ("perplexity", before));
    assert!(measured.n > 0 && measured.dataset == "held out");
}

#[test]
fn learning_lowers_the_loss_on_what_is_learned() {
    let dir = tempfile::tempdir().unwrap();
    let mut inputs = tuned(LESSON);
    inputs.text = vec![TextData { source: "held out".into(), text: LESSON.repeat(8) }];
    for (method, rate) in [("lora", 5e-3), ("fine-tune", 1e-3), ("hft", 1e-3)] {
        let out = dir.path().join(method);
        let more = json!({"steps": 20, "learning_rate": rate, "warmup": 0.0});
        let report = apply(method, small(more), &inputs, &out).unwrap();
        let value = |key: &str| report[key].as_f64().unwrap();
        assert!(value("last_loss") < 0.8 * value("first_loss"), "{method}: {report}");
        let (before, after) =
            (value("held_out_perplexity_before"), value("held_out_perplexity_after"));
        assert!(after < 0.8 * before, "{method}: {before} to {after}");
    }
}

#[test]
fn half_of_the_tensors_stay_to_the_byte() {
    let dir = tempfile::tempdir().unwrap();
    let inputs = tuned(LESSON);
    let out = dir.path().join("hft");
    let more = json!({"weight_decay": 0.1, "learning_rate": 1e-3, "dtype": "f32"});
    let report = apply("hft", small(more), &inputs, &out).unwrap();
    let plan: Value =
        serde_json::from_slice(&std::fs::read(out.join("freeze_plan.json")).unwrap()).unwrap();
    assert_eq!(plan["round"], 0);
    let (base, made) = (&inputs.models[0].artifact, Artifact::open(&out).unwrap());
    let mut frozen = 0;
    for info in made.tensors() {
        let (old, new) = (base.read_f32(&info.name).unwrap(), made.read_f32(&info.name).unwrap());
        let same = old.iter().zip(&new).all(|(a, b)| a.to_bits() == b.to_bits());
        assert_eq!(same, plan["tensors"][&info.name] == "frozen", "{}", info.name);
        frozen += usize::from(same);
    }
    assert!(frozen > 0 && frozen < made.tensors().len());
    // Two moments of four bytes for what trains, and nothing for what does not.
    let trained = report["trained_parameters"].as_u64().unwrap();
    assert_eq!(report["optimizer_state_bytes"], 8 * trained);
    assert!((0.3..0.7).contains(&report["frozen_share"].as_f64().unwrap()), "{report}");
    // The next round draws another plan.
    let next = Inputs { models: vec![ModelInput::open("hft", &out).unwrap()], ..tuned(LESSON) };
    let again = dir.path().join("again");
    let report = apply("hft", small(json!({})), &next, &again).unwrap();
    assert_eq!(report["round"], 1);
    // Half-Reset of a model to itself is that model; with ratio 0 it is the tuned one.
    for (ratio, models) in [(0.5, [&out, &out]), (0.0, [&again, &out])] {
        let inputs = Inputs {
            models: models.map(|m| ModelInput::open("m", m).unwrap()).to_vec(),
            ..Inputs::default()
        };
        let reset = dir.path().join("reset");
        apply("half-reset", json!({"ratio": ratio, "dtype": "f32"}), &inputs, &reset).unwrap();
        let (wanted, got) = (Artifact::open(models[0]).unwrap(), Artifact::open(&reset).unwrap());
        for info in wanted.tensors() {
            assert_eq!(wanted.read_f32(&info.name).unwrap(), got.read_f32(&info.name).unwrap());
        }
        std::fs::remove_dir_all(&reset).unwrap();
    }
}

#[test]
fn patterns_choose_what_trains() {
    let dir = tempfile::tempdir().unwrap();
    let inputs = tuned(LESSON);
    let out = dir.path().join("out");
    let more = json!({"train": ["*.mlp.*"], "freeze": ["*layers.0.*"], "learning_rate": 1e-3});
    apply("fine-tune", small(more), &inputs, &out).unwrap();
    let (base, made) = (&inputs.models[0].artifact, Artifact::open(&out).unwrap());
    for info in made.tensors() {
        let same = base.read_f32(&info.name).unwrap() == made.read_f32(&info.name).unwrap();
        let trains = info.name.contains(".mlp.") && !info.name.contains("layers.0.");
        assert_eq!(same, !trains, "{}", info.name);
    }
    let error =
        apply("fine-tune", small(json!({"train": ["*.mlpp.*"]})), &inputs, &dir.path().join("x"));
    let error = error.unwrap_err();
    assert!(error.contains("`*.mlpp.*`") && error.contains("mlp"), "{error}");
    let error = apply("bitfit", small(json!({})), &inputs, &dir.path().join("x")).unwrap_err();
    assert!(error.contains("biases") && error.contains("ln-tuning"), "{error}");
}

#[test]
fn an_interrupted_run_goes_on_to_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let inputs = tuned(LESSON);
    let parameters = small(json!({"steps": 6, "rank": 2, "learning_rate": 1e-2, "dropout": 0.1}));
    let whole = dir.path().join("whole");
    apply("lora", parameters.clone(), &inputs, &whole).unwrap();
    // A run that stops half-way: its progress panics in step 4.
    struct Stop(std::sync::atomic::AtomicU64);
    impl refit_methods::method::Progress for Stop {
        fn begin(&self, _: &str, _: u64, _: refit_methods::method::Unit) {}
        fn advance(&self, by: u64) {
            let before = self.0.fetch_add(by, std::sync::atomic::Ordering::SeqCst);
            assert!(before < 3, "interrupted here");
        }
        fn end(&self) {}
    }
    let out = dir.path().join("resumed");
    let configured = registry::get("lora").unwrap().from_value(&parameters).unwrap();
    let plan = configured.plan(&inputs).unwrap();
    let stopped = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let mut cx = Context::new(&out);
        cx.progress = Arc::new(Stop(Default::default()));
        configured.run(&inputs, &plan, &mut cx).map(drop)
    }));
    assert!(stopped.is_err() && !out.exists());
    // With other settings it is refused, and what is there stays.
    let other = registry::get("lora").unwrap();
    let other =
        other.from_value(&small(json!({"steps": 7, "rank": 2, "learning_rate": 1e-2}))).unwrap();
    let plan_of_other = other.plan(&inputs).unwrap();
    let error =
        other.run(&inputs, &plan_of_other, &mut Context::new(&out)).unwrap_err().to_string();
    assert!(error.contains("recipe changed") || error.contains("other data"), "{error}");
    configured.run(&inputs, &plan, &mut Context::new(&out)).unwrap();
    for file in ["adapter_model.safetensors", "adapter_config.json", "training.jsonl"] {
        let (a, b) =
            (std::fs::read(whole.join(file)).unwrap(), std::fs::read(out.join(file)).unwrap());
        assert!(a == b, "{file} differs");
    }
}

#[test]
fn mistakes_are_found_before_training() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let lines = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        Inputs {
            data: vec![TrainingData::Records(Arc::new(Records::open(&path).unwrap()))],
            ..tuned(LESSON)
        }
    };
    let long = format!("{{\"text\": \"{}\"}}\n", "word ".repeat(300));
    for (method, parameters, inputs, wanted) in [
        ("lora", json!({"rank": 0}), tuned(LESSON), "at least 1"),
        ("lora", json!({"rank": 100_000}), tuned(LESSON), "rank is at most"),
        ("lora", json!({"target_modules": ["q_prj"]}), tuned(LESSON), "did you mean `q_proj`"),
        ("lora", json!({"learning_rate": -1.0}), tuned(LESSON), "above 0"),
        ("lora", json!({"dropout": 1.0}), tuned(LESSON), "dropout"),
        ("lora", json!({"max_length": 1_000_000}), tuned(LESSON), "context"),
        ("lora", json!({}), Inputs { data: vec![], ..tuned(LESSON) }, "--data FILE"),
        (
            "lora",
            json!({}),
            lines("empty.jsonl", "{\"text\": \"a b\"}\n{\"text\": \"\"}\n"),
            "empty.jsonl:2",
        ),
        ("lora", json!({"max_length": 64}), lines("long.jsonl", &long), "long.jsonl:1"),
        ("lora", json!({}), lines("other.jsonl", "{\"question\": \"a\"}\n"), "found question"),
        (
            "unified-peft",
            json!({"site": "ffn", "composition": "gated"}),
            tuned(LESSON),
            "add or scaled",
        ),
        (
            "unified-peft",
            json!({"site": "fnn"}),
            tuned(LESSON),
            "`per-head`, `heads`, `attention`, `ffn`",
        ),
        ("unified-peft", json!({"preset": "prefix", "scale": 2.0}), tuned(LESSON), "no factor"),
        ("unified-peft", json!({"composition": "add", "scale": 2.0}), tuned(LESSON), "--scale"),
        ("unified-peft", json!({"preset": "mh-pa", "learnable_scale": true}), tuned(LESSON), "ffn"),
        ("galore", json!({"target_modules": ["*.attn.*"]}), tuned(LESSON), "q_proj"),
        ("hft", json!({"ratio": 1.5}), tuned(LESSON), "from 0 to 1"),
        ("merge-adapter", json!({}), tuned(LESSON), "adapter beside the model"),
    ] {
        let error = apply(method, parameters, &inputs, &out).unwrap_err();
        assert!(error.contains(wanted), "{method}: {error}\nshould contain {wanted}");
        assert!(!out.exists());
    }
}

#[test]
fn a_rate_that_diverges_stops_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let more =
        json!({"steps": 60, "learning_rate": 1e4, "warmup": 0.0, "clip": 0.0, "optimizer": "sgd"});
    let error = apply("fine-tune", small(more), &tuned(LESSON), &out).unwrap_err();
    assert!(error.contains("diverges") || error.contains("nothing was updated"), "{error}");
    assert!(!out.exists());
}

#[test]
fn a_merge_that_changes_nothing_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let inputs = tuned(LESSON);
    let out = dir.path().join("adapter");
    // Rate so small that B stays zero in every bit that counts.
    apply("lora", small(json!({"rank": 1, "learning_rate": 1e-30, "steps": 1})), &inputs, &out)
        .unwrap();
    let both = Inputs {
        models: inputs.models.clone(),
        adapters: vec![AdapterInput {
            source: "adapter".into(),
            adapter: Arc::new(Adapter::open(&out).unwrap()),
        }],
        ..Inputs::default()
    };
    let error = apply("merge-adapter", json!({}), &both, &dir.path().join("merged")).unwrap_err();
    assert!(error.contains("no change") || error.contains("survives"), "{error}");
}

/// The linears of a model as 4-bit codes in groups of 32, or the name of the first that is off the grid.
fn on_grid(dir: &Path) -> Result<Vec<refit_store::lattice::Codes>, String> {
    let artifact = Artifact::open(dir).unwrap();
    let lattice = refit_store::lattice::Lattice { bits: 4, symmetric: true, group: 32 };
    let find = |name: &str| {
        let values = artifact.read_f32(name).unwrap();
        lattice.find(&values, refit_store::DType::F32).map_err(|_| name.to_owned())
    };
    artifact.architecture().linears().map(|site| find(&site.name)).collect()
}

/// A merge into a quantized model stays quantized, says what that cost, and can be exported as its base was.
#[test]
fn a_merge_into_a_quantized_model_stays_on_its_grid() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let plain = Inputs { models: tuned(LESSON).models, ..Inputs::default() };
    let rtn = json!({"bits": 4, "group": 32, "dtype": "f32"});
    apply("rtn", rtn, &plain, &at("q")).unwrap();
    let quantized = |base: &str| Inputs {
        models: vec![ModelInput::open(base, at(base)).unwrap()],
        ..Inputs::default()
    };
    let mut learn = quantized("q");
    learn.data = tuned(LESSON).data;
    let targets = json!({"rank": 4, "learning_rate": 2e-2, "steps": 8,
                         "target_modules": ["q_proj", "down_proj"]});
    apply("lora", small(targets), &learn, &at("adapter")).unwrap();
    let with = |base: &str| Inputs {
        adapters: vec![AdapterInput {
            source: "adapter".into(),
            adapter: Arc::new(Adapter::open(&at("adapter")).unwrap()),
        }],
        ..quantized(base)
    };
    let report = apply("merge-adapter", json!({}), &with("q"), &at("merged")).unwrap();
    let layers = Artifact::open(at("q")).unwrap().architecture().layers();
    assert_eq!(report["requantized_tensors"], json!(2 * layers), "{report}");
    let lost = report["update_lost_to_rounding"].as_f64().unwrap();
    assert!((0.01..1.5).contains(&lost), "{lost}");
    assert_eq!(report["update_lost_by_tensor"].as_object().unwrap().len(), 2 * layers);
    on_grid(&at("merged")).unwrap();
    let record = |dir: &str| {
        let file = std::fs::read(at(dir).join("refit.quantization.json")).unwrap();
        let record: Value = serde_json::from_slice(&file).unwrap();
        record["tensors"].as_object().unwrap().clone()
    };
    assert_eq!(record("merged").len(), on_grid(&at("q")).unwrap().len());
    assert!(refit_store::Lineage::verify(&at("merged")).unwrap().is_ok());
    let moved = |out: &str| -> f32 { distance(&logits(&load(&at("q"))), &logits(&load(&at(out)))) };
    assert!(moved("merged") > 1e-3, "the update is there");

    // Floats on request: nothing is lost, and nothing is on a grid.
    let float = json!({"quantized": "float"});
    let report = apply("merge-adapter", float, &with("q"), &at("float")).unwrap();
    assert!(report.get("requantized_tensors").is_none(), "{report}");
    assert!(report["update_lost_to_rounding"].as_f64().unwrap() < 1e-6);
    assert!(on_grid(&at("float")).is_err());
    // Nor does its record say so of what changed.
    assert_eq!(record("float").len(), record("q").len() - 2 * layers);

    // A packed base gives the same weights, and what comes out can be packed again.
    for to in ["compressed-tensors", "gptq"] {
        let parameters = json!({"to": to, "checkpoint_format": "gptq_v2"});
        let parameters = if to == "gptq" { parameters } else { json!({ "to": to }) };
        apply("export", parameters.clone(), &quantized("q"), &at("packed")).unwrap();
        apply("merge-adapter", json!({"dtype": "f32"}), &with("packed"), &at("again")).unwrap();
        let names =
            ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"];
        for name in names {
            let read = |dir: &str| Artifact::open(at(dir)).unwrap().read_f32(name).unwrap();
            assert_eq!(read("merged"), read("again"), "{to} {name}");
        }
        let report = apply("export", parameters, &quantized("again"), &at("out")).unwrap();
        assert_eq!(report["tensors_rounded"], json!(0), "{to}");
        for made in ["packed", "again", "out"] {
            std::fs::remove_dir_all(at(made)).unwrap();
        }
    }

    // Changes below the steps of the grid leave nothing.
    let faint = json!({"weight": 1e-6});
    let error = apply("merge-adapter", faint, &with("q"), &at("faint")).unwrap_err();
    assert!(error.contains("--quantized float") && !at("faint").exists(), "{error}");
}

/// Values of all tensors of a safetensors file.
fn values(file: PathBuf) -> Vec<f32> {
    let opened = Artifact::open(file).unwrap();
    opened.tensors().iter().flat_map(|t| opened.read_f32(&t.name).unwrap()).collect()
}

#[test]
fn several_ranks_write_what_one_process_does_and_once() {
    let dir = tempfile::tempdir().unwrap();
    for (method, more, file) in [
        ("lora", json!({"rank": 4, "learning_rate": 1e-3}), "adapter_model.safetensors"),
        (
            "fine-tune",
            json!({"train": ["*.mlp.*"], "dtype": "f32", "learning_rate": 1e-3}),
            "model.safetensors",
        ),
        ("galore", json!({"rank": 16, "dtype": "f32", "learning_rate": 1e-3}), "model.safetensors"),
    ] {
        let parameters = || {
            let mut all = small(more.clone());
            all["batch"] = json!(3);
            all["accumulate"] = json!(2);
            all
        };
        let (one, two) = (format!("{method}-one"), format!("{method}-two"));
        let mut inputs = tuned(LESSON);
        inputs.text = vec![TextData { source: "held out".into(), text: LESSON.repeat(20) }];
        apply(method, parameters(), &inputs, &dir.path().join(&one)).unwrap();
        let reports = threads::run(2, |ranks| {
            let out = dir.path().join(if ranks.leads() { &two } else { "nowhere" });
            let cx = Context { ranks: ranks.clone(), ..Context::new(out) };
            ranks.settle(apply_in(method, parameters(), &inputs, cx).map_err(Said)).unwrap()
        });
        assert_eq!(reports[0]["processes"], 2, "{method}");
        assert!(reports[0]["held_out_perplexity_after"].is_f64(), "{method}");
        let found = values(dir.path().join(&two).join(file));
        let alone = values(dir.path().join(&one).join(file));
        // Adam makes steps of the same size of gradients that are nothing but rounding, so a few values may go their own way: at
        // most one in a thousand is further apart than a fiftieth of what one update moves a value.
        let rate = more["learning_rate"].as_f64().unwrap_or(1e-4) as f32;
        let apart = alone.iter().zip(&found).filter(|(a, b)| (*a - *b).abs() > 0.02 * rate);
        let apart = apart.count();
        assert!(1000 * apart <= alone.len(), "{method}: {apart} of {} values", alone.len());
        let start = values(tiny().join("model.safetensors"));
        assert!(found.len() != start.len() || distance(&found, &start) > 1e-5, "{method} learned");
    }
    let names: Vec<_> =
        std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names.len(), 6, "two outputs of each method and nothing else: {names:?}");
}

#[test]
fn what_several_ranks_cannot_do_is_refused_before_the_work() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |method: &str, more: Value, lesson: fn(usize) -> &'static str| {
        threads::run(2, |ranks| {
            let inputs = tuned(lesson(ranks.rank()));
            let cx = Context { ranks: ranks.clone(), ..Context::new(dir.path().join("out")) };
            let ended = apply_in(method, small(more.clone()), &inputs, cx).map_err(Said);
            ranks.settle(ended).unwrap_err().0
        })
    };
    let same = |_| LESSON;
    let texts = refused("lora", json!({"batch": 1}), same);
    assert!(texts[0].contains("--batch 2 or more"), "{texts:?}");
    let texts = refused("galore", json!({"per_layer": true, "clip": 0.0}), same);
    assert!(texts[0].contains("--per-layer") && texts[1].contains("process 0"), "{texts:?}");
    let texts = refused("lora", json!({}), |rank| [LESSON, "Another lesson. "][rank]);
    assert!(texts[0].contains("training data"), "{texts:?}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

/// A message as an error of this test.
#[derive(Debug)]
struct Said(String);

impl From<TrainError> for Said {
    fn from(error: TrainError) -> Self {
        Self(error.to_string())
    }
}

#[test]
fn a_llama_gets_biases_to_train() {
    let dir = tempfile::tempdir().unwrap();
    let inputs = tuned(LESSON);
    let base = Artifact::open(tiny()).unwrap();
    // Before anything is learned the model says what it said.
    let still = json!({"add_biases": true, "learning_rate": 1e-30, "steps": 1, "dtype": "f32"});
    apply("bitfit", small(still), &inputs, &dir.path().join("still")).unwrap();
    assert_eq!(logits(&load(&dir.path().join("still"))), logits(&load(&tiny())));
    let out = dir.path().join("out");
    let more = json!({"add_biases": true, "learning_rate": 1e-2, "dtype": "f32"});
    let report = apply("bitfit", small(more), &inputs, &out).unwrap();
    let made = Artifact::open(&out).unwrap();
    assert!(made.load_report().is_clean(), "{}", made.load_report());
    let config = made.config();
    assert_eq!((config.bool("attention_bias"), config.bool("mlp_bias")), (Some(true), Some(true)));
    let mut trained = 0;
    for info in made.tensors() {
        let values = made.read_f32(&info.name).unwrap();
        match info.name.strip_suffix(".bias") {
            None => assert_eq!(values, base.read_f32(&info.name).unwrap(), "{}", info.name),
            Some(site) if site.ends_with("o_proj") || site.ends_with("down_proj") => {
                assert!(values.iter().any(|v| *v != 0.0), "{site} did not train");
                trained += values.len();
            }
            Some(site) => assert!(values.iter().all(|v| *v == 0.0), "{site} is not zero"),
        }
    }
    assert_eq!(report["trained_parameters"], trained);
    assert_eq!(made.tensors().len(), base.tensors().len() + 7 * made.architecture().layers());
    assert!(distance(&logits(&load(&out)), &logits(&load(&tiny()))) > 1e-4);
    // A model with biases trains those that it has.
    let again = Inputs { models: vec![ModelInput::open("out", &out).unwrap()], ..tuned(LESSON) };
    let refused = small(json!({"add_biases": true}));
    let error = apply("bitfit", refused, &again, &dir.path().join("x")).unwrap_err();
    assert!(error.contains("biases of its own"), "{error}");
    apply("bitfit", small(json!({"learning_rate": 1e-3})), &again, &dir.path().join("more"))
        .unwrap();
}
