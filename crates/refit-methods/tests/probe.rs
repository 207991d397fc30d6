//! Classification heads, from labelled examples to a model directory.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use refit_data::Records;
use refit_data::images::Preprocess;
use refit_methods::labelled::{Labelled, Part, class_names};
use refit_methods::method::{Context, Inputs, ModelInput, Progress, TrainingData, Unit};
use refit_methods::registry;
use refit_nn::vision::Vision;
use refit_nn::{BurnDevice, Run, TextClassifier, ops};
use refit_store::Artifact;
use serde_json::{Value, json};

const FIXTURES: &str = "../refit-nn/tests/fixtures/hf";

fn here(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// A place with a cache of its own.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A copy of a fixture; text models get a vocabulary of words `w5` to `w63`.
    fn model(&self, name: &str) -> ModelInput {
        let to = self.path(&format!("model-{name}"));
        if !to.exists() {
            std::fs::create_dir(&to).unwrap();
            for file in ["config.json", "model.safetensors"] {
                std::fs::copy(here(FIXTURES).join(name).join(file), to.join(file)).unwrap();
            }
            if name != "vit" {
                let special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"].map(str::to_owned);
                let words = special.into_iter().chain((5..64).map(|i| format!("w{i}")));
                let words: Vec<String> = words.collect();
                std::fs::write(to.join("vocab.txt"), words.join("\n")).unwrap();
            }
        }
        ModelInput::open(name, to).unwrap()
    }

    fn table(&self, name: &str, lines: &str) -> Arc<Records> {
        let path = self.path(name);
        std::fs::write(&path, lines).unwrap();
        Arc::new(Records::open(path).unwrap())
    }

    fn context(&self, out: &Path) -> Context {
        Context { cache: self.path("cache"), ..Context::new(out) }
    }

    fn apply(
        &self,
        method: &str,
        parameters: Value,
        inputs: &Inputs,
        out: &str,
    ) -> Result<Value, String> {
        let entry = registry::get(method).unwrap();
        let configured = entry.from_value(&parameters).map_err(|e| e.to_string())?;
        inputs.check(entry.info).map_err(|e| e.to_string())?;
        let plan = configured.plan(inputs).map_err(|e| e.to_string())?;
        let out = self.path(out);
        let output = configured.run(inputs, &plan, &mut self.context(&out));
        Ok(output.map_err(|e| e.to_string())?.report)
    }
}

/// Texts of three classes, each with words of its own among words of all.
fn lesson(n: usize) -> String {
    (0..n)
        .map(|i| {
            let (class, at) = (i % 3, i / 3);
            let own = 5 + 8 * class + at % 8;
            let name = ["sea", "land", "air"][class];
            format!(
                "{{\"text\": \"w{} w{own} w{} w{}\", \"label\": \"{name}\"}}\n",
                30 + at % 9,
                40 + (at * 7) % 20,
                5 + 8 * class + (at * 3) % 8
            )
        })
        .collect()
}

fn texts(place: &Place, model: &str, n: usize) -> Inputs {
    let records = place.table("lesson.jsonl", &lesson(n));
    Inputs {
        models: vec![place.model(model)],
        data: vec![TrainingData::Records(records)],
        ..Inputs::default()
    }
}

fn logits(dir: &Path, texts: &[&str]) -> Vec<f32> {
    let artifact = Artifact::open(dir).unwrap();
    artifact.check_fit().unwrap();
    let model = TextClassifier::load(&artifact, &BurnDevice::flex()).unwrap();
    let tokenizer = refit_data::Tokenizer::from_artifact(&artifact).unwrap();
    let ids: Vec<Vec<u32>> = texts.iter().map(|t| tokenizer.encode(t, true).unwrap()).collect();
    ops::to_vec(&model.forward(&ids, &mut Run::plain()).unwrap())
}

#[test]
fn a_probe_leaves_the_trunk_to_the_byte_and_names_its_classes() {
    for (name, class, head, kept) in [
        ("bert", "BertForSequenceClassification", "classifier", "bert."),
        ("distilbert", "DistilBertForSequenceClassification", "classifier", "distilbert."),
        ("roberta", "RobertaForSequenceClassification", "classifier.out_proj", "roberta."),
        ("llama", "LlamaForSequenceClassification", "score", ""),
        ("gpt2", "GPT2ForSequenceClassification", "score", ""),
    ] {
        let place = Place::new();
        let inputs = texts(&place, name, 24);
        // Fewer rows than features: a light penalty lets the probe learn them all.
        let report = place.apply("linear-probe", json!({"l2": 1e-3}), &inputs, "out").unwrap();
        assert_eq!((&report["classes"], &report["converged"]), (&json!(3), &json!(true)), "{name}");
        assert_eq!(report["labels"], json!(["air", "land", "sea"]), "{name}");
        assert!(report["accuracy_on_examples"].as_f64().unwrap() > 0.9, "{name}: {report}");
        let (base, made) = (&inputs.models[0].artifact, Artifact::open(place.path("out")).unwrap());
        assert!(made.load_report().is_clean(), "{name}: {}", made.load_report());
        let config = made.config();
        assert_eq!(config.get("architectures").unwrap(), &json!([class]));
        assert_eq!(config.get("num_labels").unwrap(), &json!(3));
        assert_eq!(config.get("id2label").unwrap(), &json!({"0": "air", "1": "land", "2": "sea"}));
        assert_eq!(config.get("label2id").unwrap(), &json!({"air": 0, "land": 1, "sea": 2}));
        assert_eq!(config.get("problem_type").unwrap(), &json!("single_label_classification"));
        let width = made.architecture().dims.hidden.unwrap();
        assert_eq!(made.tensor(&format!("{head}.weight")).unwrap().shape, [3, width], "{name}");
        assert_eq!(made.contains(&format!("{head}.bias")), head != "score", "{name}");
        let mut same = 0;
        for info in made.tensors() {
            let old = match base.contains(&info.name) {
                true => info.name.clone(),
                false => info.name.strip_prefix(kept).unwrap_or_default().to_owned(),
            };
            if !base.contains(&old) || old.starts_with("classifier") {
                assert!(
                    info.name.contains("classifier") || info.name.contains("score"),
                    "{name}: {}",
                    info.name
                );
                continue;
            }
            let (a, b) = (base.tensor(&old).unwrap(), info);
            let read = |artifact: &Artifact, name: &str| {
                let mut bytes = vec![0; a.nbytes as usize];
                artifact.read_raw_into(name, 0, &mut bytes).unwrap();
                bytes
            };
            assert_eq!((&a.shape, a.dtype), (&b.shape, b.dtype), "{name}: {old}");
            assert!(read(base, &old) == read(&made, &info.name), "{name}: {old} changed");
            same += 1;
        }
        assert!(same + 3 >= base.tensors().len(), "{name}: {same} of {}", base.tensors().len());
        assert!(refit_store::Lineage::verify(&place.path("out")).unwrap().is_ok(), "{name}");
        // What was fitted is what runs: three of the lesson's own lines.
        let found =
            logits(&place.path("out"), &["w30 w5 w40 w5", "w31 w14 w47 w16", "w32 w23 w54 w27"]);
        let best: Vec<usize> = found
            .chunks_exact(3)
            .map(|row| (0..3).max_by(|a, b| row[*a].total_cmp(&row[*b])).unwrap())
            .collect();
        assert_eq!(best, [2, 1, 0], "{name}: {found:?}");
    }
}

#[test]
fn lp_ft_begins_where_the_probe_ended() {
    for name in ["bert", "distilbert", "llama"] {
        let place = Place::new();
        let inputs = texts(&place, name, 60);
        place.apply("linear-probe", json!({}), &inputs, "probe").unwrap();
        // A rate that is zero in f32: no value moves in any bit, not even a zero.
        let still = json!({"steps": 1, "learning_rate": 1e-60, "batch": 4});
        let report = place.apply("lp-ft", still, &inputs, "still").unwrap();
        let (probe, tuned) = (
            Artifact::open(place.path("probe")).unwrap(),
            Artifact::open(place.path("still")).unwrap(),
        );
        assert_eq!(probe.content_hash().unwrap(), tuned.content_hash().unwrap(), "{name}");
        assert_eq!(
            report["features"]["computed"], 0,
            "{name}: the probe's features are found again"
        );
        let lines = ["w30 w5 w40 w5", "w31 w14 w47 w16"];
        assert_eq!(logits(&place.path("probe"), &lines), logits(&place.path("still"), &lines));
        // Training lowers the loss from there, and a random head begins at ln 3.
        let train = |from: &str| json!({"from_head": from, "steps": 20, "learning_rate": 1e-3, "batch": 12, "warmup": 0.0});
        let value = |report: &Value, key: &str| report[key].as_f64().unwrap();
        let (mut lp, mut ft) = (train("probe"), train("random"));
        for more in [&mut lp, &mut ft] {
            more["l2"] = json!(0.1);
        }
        let lp = place.apply("lp-ft", lp, &inputs, "lp-ft").unwrap();
        let ft = place.apply("lp-ft", ft, &inputs, "ft").unwrap();
        assert!(value(&lp, "first_loss") < value(&ft, "first_loss"), "{name}: {lp} {ft}");
        for (report, out) in [(&lp, "lp-ft"), (&ft, "ft")] {
            assert!(
                value(report, "last_loss") < value(report, "first_loss"),
                "{name} {out}: {report}"
            );
            assert!(Artifact::open(place.path(out)).unwrap().load_report().is_clean());
        }
        assert!(ft.get("l2").is_none() && lp.get("l2").is_some());
        assert!(report["trained_parameters"].as_u64().unwrap() > 10_000);
    }
}

/// Stops a run at a stage, after so many of its steps.
struct Stop {
    stage: &'static str,
    after: u64,
    seen: std::sync::Mutex<Option<u64>>,
}

impl Progress for Stop {
    fn begin(&self, stage: &str, _: u64, _: Unit) {
        *self.seen.lock().unwrap() = (stage == self.stage).then_some(0);
    }

    fn advance(&self, by: u64) {
        let mut seen = self.seen.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(count) = seen.as_mut() {
            *count += by;
            assert!(*count <= self.after, "stopped in {}", self.stage);
        }
    }

    fn end(&self) {}
}

#[test]
fn a_killed_run_goes_on_to_the_same_bytes() {
    let parameters = json!({"steps": 6, "batch": 4, "learning_rate": 1e-3, "checkpoint_every": 1});
    for (method, parameters, stage, after) in [
        ("linear-probe", json!({}), "frozen features", 20),
        ("linear-probe", json!({}), "writing", 2),
        ("lp-ft", parameters.clone(), "frozen features", 20),
        ("lp-ft", parameters, "training", 3),
    ] {
        let place = Place::new();
        let inputs = texts(&place, "bert", 45);
        let configured = registry::get(method).unwrap().from_value(&parameters).unwrap();
        let plan = configured.plan(&inputs).unwrap();
        let whole = place.path("whole");
        let other = Context { cache: place.path("other"), ..Context::new(&whole) };
        configured.run(&inputs, &plan, &mut other.clone()).unwrap();
        let out = place.path("out");
        let stopped = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let mut cx = place.context(&out);
            cx.progress = Arc::new(Stop { stage, after, seen: Default::default() });
            configured.run(&inputs, &plan, &mut cx).map(drop)
        }));
        assert!(stopped.is_err() && !out.exists(), "{method} {stage}");
        let output = configured.run(&inputs, &plan, &mut place.context(&out)).unwrap();
        if stage == "frozen features" {
            let count = |key: &str| output.report["features"][key].as_u64().unwrap();
            assert!(count("found") >= 16 && count("computed") > 0, "{}", output.report["features"]);
        }
        for file in ["model.safetensors", "config.json"] {
            let (a, b) =
                (std::fs::read(whole.join(file)).unwrap(), std::fs::read(out.join(file)).unwrap());
            assert!(a == b, "{method} {stage}: {file} differs");
        }
        let left: Vec<_> = std::fs::read_dir(place.0.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.starts_with('.'))
            .collect();
        assert!(left.is_empty(), "{method} {stage}: {left:?}");
    }
}

/// An IDX pair of 32 x 32 images: class 0 is dark above, class 1 dark below, class 2 dark at the left.
fn idx(dir: &Path, n: usize) {
    std::fs::create_dir_all(dir).unwrap();
    let dark = |class: usize, y: usize, x: usize| match class {
        0 => y < 16,
        1 => y >= 16,
        _ => x < 16,
    };
    let mut pixels = Vec::new();
    for i in 0..n {
        for y in 0..32 {
            for x in 0..32 {
                let noise = ((i * 31 + y * 17 + x * 13) % 41) as u8;
                pixels.push(if dark(i % 3, y, x) { noise } else { 200 + noise });
            }
        }
    }
    let count = (n as u32).to_be_bytes();
    let images = [&[0, 0, 8, 3][..], &count, &[0, 0, 0, 32, 0, 0, 0, 32], &pixels].concat();
    let labels: Vec<u8> = (0..n).map(|i| (i % 3) as u8).collect();
    std::fs::write(dir.join("train-images-idx3-ubyte"), images).unwrap();
    std::fs::write(
        dir.join("train-labels-idx1-ubyte"),
        [&[0, 0, 8, 1][..], &count, &labels].concat(),
    )
    .unwrap();
}

fn accuracy(dir: &Path, labelled: &Labelled) -> f64 {
    let artifact = Artifact::open(dir).unwrap();
    artifact.check_fit().unwrap();
    let preprocess = Preprocess::from_artifact(&artifact).unwrap();
    let model = Vision::load(&artifact, &BurnDevice::flex()).unwrap();
    let classes = labelled.image_classes(&class_names(&artifact)).unwrap();
    let mut right = 0;
    for (i, class) in classes.iter().enumerate() {
        let (values, h, w) = preprocess.apply(&labelled.image(i).unwrap()).unwrap();
        let channels = values.len() / (h * w);
        let data = burn::tensor::TensorData::new(values, [1, channels, h, w]);
        let image = burn::tensor::Tensor::from_data(data, &BurnDevice::flex());
        let logits = ops::to_vec(&model.forward(image, &mut Run::plain()).unwrap());
        let best = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap();
        right += usize::from(best == *class);
    }
    right as f64 / classes.len() as f64
}

#[test]
fn images_get_heads_too() {
    let place = Place::new();
    idx(&place.path("idx"), 48);
    let labelled = Labelled::open(&place.path("idx"), Part::Train).unwrap();
    let inputs = Inputs {
        models: vec![place.model("vit")],
        labelled: Some(labelled.clone()),
        ..Inputs::default()
    };
    let report = place.apply("linear-probe", json!({}), &inputs, "probe").unwrap();
    assert_eq!(
        (&report["labels"], &report["features"]["computed"]),
        (&json!(["0", "1", "2"]), &json!(48))
    );
    let made = Artifact::open(place.path("probe")).unwrap();
    assert_eq!(made.config().get("architectures").unwrap(), &json!(["ViTForImageClassification"]));
    assert_eq!(made.tensor("classifier.weight").unwrap().shape, [3, 32]);
    assert!(accuracy(&place.path("probe"), &labelled) > 0.95);
    let more = json!({"steps": 4, "batch": 8, "learning_rate": 1e-4});
    let report = place.apply("lp-ft", more, &inputs, "tuned").unwrap();
    assert_eq!(report["features"]["found"], 48);
    assert!(accuracy(&place.path("tuned"), &labelled) > 0.95);
    // A trunk without any classifier.
    let bare = place.path("bare");
    let headless = place.model("vit");
    let keep: Vec<_> =
        headless.artifact.tensors().iter().filter(|t| !t.name.starts_with("classifier")).collect();
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for info in keep {
        let start = data.len();
        data.extend(
            headless.artifact.read_f32(&info.name).unwrap().iter().flat_map(|v| v.to_le_bytes()),
        );
        header.insert(
            info.name.clone(),
            json!({"dtype": "F32", "shape": info.shape, "data_offsets": [start, data.len()]}),
        );
    }
    let header = Value::Object(header).to_string();
    std::fs::create_dir(&bare).unwrap();
    let file = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat();
    std::fs::write(bare.join("model.safetensors"), file).unwrap();
    std::fs::copy(headless.artifact.path().join("config.json"), bare.join("config.json")).unwrap();
    let inputs = Inputs { models: vec![ModelInput::open("bare", &bare).unwrap()], ..inputs };
    place.apply("linear-probe", json!({}), &inputs, "from-bare").unwrap();
    let read = |name: &str| {
        Artifact::open(place.path(name)).unwrap().read_f32("classifier.weight").unwrap()
    };
    assert_eq!(read("probe"), read("from-bare"));
}

#[test]
fn mistakes_are_found_before_any_work() {
    let place = Place::new();
    let table = |name: &str, lines: &str| Inputs {
        models: vec![place.model("bert")],
        data: vec![TrainingData::Records(place.table(name, lines))],
        ..Inputs::default()
    };
    let row =
        |text: &str, label: &str| format!("{{\"text\": \"{text}\", \"label\": \"{label}\"}}\n");
    let two = row("w5", "a") + &row("w6", "a") + &row("w7", "b") + &row("w8", "b");
    idx(&place.path("idx"), 6);
    let images = Some(Labelled::open(&place.path("idx"), Part::Train).unwrap());
    let good = || table("good.jsonl", &two);
    for (parameters, inputs, wanted) in [
        (
            json!({}),
            table("one.jsonl", &(two.clone() + &row("w9", "c"))),
            "one.jsonl:5: this is the only example",
        ),
        (json!({}), table("same.jsonl", &(row("w5", "a") + &row("w6", "a"))), "of one class"),
        (
            json!({}),
            table("empty.jsonl", &(two.clone() + &row("  ", "a"))),
            "empty.jsonl:5: `text` is empty",
        ),
        (json!({"labels": ["a", "x"]}), good(), "good.jsonl:3: the label `b` is no class"),
        (json!({"labels": ["a", "b", "c"]}), good(), "no example of the class `c`"),
        (json!({"labels": ["a", "a"]}), good(), "named twice"),
        (json!({"label_column": "kind"}), good(), "no column `kind`"),
        (
            json!({"max_length": 4}),
            table("long.jsonl", &(two.clone() + &row("w5 w6 w7 w8", "a"))),
            "long.jsonl:5: the text has more than 4 tokens",
        ),
        (json!({"max_length": 1000}), good(), "context of 64"),
        (json!({"max_examples": 3}), good(), "at least two for each of 2 classes"),
        (json!({"l2": -1.0}), good(), "0 or more"),
        (json!({"dev_share": 1.0}), good(), "between 0 and 1"),
        (json!({}), Inputs { data: vec![], ..good() }, "--data FILE"),
        (json!({}), Inputs { labelled: images.clone(), ..good() }, "not both"),
        (json!({}), Inputs { data: vec![], labelled: images.clone(), ..good() }, "reads texts"),
        (json!({}), Inputs { models: vec![place.model("vit")], ..good() }, "classifies images"),
        (
            json!({"pooler": "own"}),
            Inputs { models: vec![place.model("distilbert")], ..good() },
            "pass-through",
        ),
    ] {
        for method in ["linear-probe", "lp-ft"] {
            if method == "lp-ft" && parameters.get("dtype").is_some() {
                continue;
            }
            let error = place.apply(method, parameters.clone(), &inputs, "out").unwrap_err();
            assert!(error.contains(wanted), "{method}: {error}\nshould contain {wanted}");
            assert!(!place.path("out").exists());
        }
    }
    assert!(!place.path("cache").exists(), "nothing was computed");
    // A table may be given as labelled examples, and long texts may be cut.
    let labelled = Some(Labelled::Table(
        place.table("long.jsonl", &format!("{two}{}", row("w5 w6 w7 w8", "a"))),
    ));
    let inputs = Inputs { data: vec![], labelled, ..good() };
    let parameters = json!({"max_length": 4, "truncate": true, "max_examples": 4, "dtype": "bf16"});
    let report = place.apply("linear-probe", parameters, &inputs, "out").unwrap();
    assert_eq!(report["examples"], 4);
    let made = Artifact::open(place.path("out")).unwrap();
    assert!(made.tensors().iter().all(|info| info.dtype == refit_store::DType::BF16));
}

/// Three classifiers on one trunk: a probe, and two that were tuned from it.
fn ingredients(place: &Place, inputs: &Inputs) -> Vec<ModelInput> {
    place.apply("linear-probe", json!({"l2": 0.1}), inputs, "a").unwrap();
    for (out, rate) in [("b", 1e-3), ("c", 3e-3)] {
        let more = json!({"l2": 0.1, "steps": 6, "batch": 8, "learning_rate": rate});
        place.apply("lp-ft", more, inputs, out).unwrap();
    }
    let open = |name: &str| ModelInput::open(name, place.path(name)).unwrap();
    ["a", "b", "c"].map(open).to_vec()
}

#[test]
fn soups_are_scored_by_accuracy_on_labelled_examples() {
    for name in ["bert", "gpt2"] {
        let place = Place::new();
        let models = ingredients(&place, &texts(&place, name, 60));
        let labelled = Some(Labelled::Table(place.table("held.jsonl", &lesson(30))));
        let inputs = Inputs { models, labelled, ..Inputs::default() };
        let report =
            place.apply("model-soups", json!({"mode": "greedy"}), &inputs, "greedy").unwrap();
        assert_eq!(report["score"], "accuracy on labelled held-out examples", "{name}");
        let score = report["recipe"]["score"].as_f64().unwrap();
        for step in report["recipe"]["steps"].as_array().unwrap() {
            let alone = step["alone"].as_f64().unwrap();
            assert!((30.0 * alone - (30.0 * alone).round()).abs() < 1e-9, "a share of 30: {alone}");
            assert!(score >= alone, "{name}: {report}");
        }
        for mode in ["learned", "learned-by-tensor"] {
            let more = json!({"mode": mode, "steps": 4, "learning_rate": 0.3});
            let report = place.apply("model-soups", more, &inputs, mode).unwrap();
            let losses: Vec<f64> = serde_json::from_value(report["losses"].clone()).unwrap();
            assert_eq!(losses.len(), 5, "{name} {mode}");
            assert!(losses[4] < losses[0], "{name} {mode}: {losses:?}");
            let made = Artifact::open(place.path(mode)).unwrap();
            made.check_fit().unwrap();
            if mode == "learned-by-tensor" {
                let by_tensor = report["coefficients_by_tensor"].as_object().unwrap();
                assert_eq!(by_tensor.len(), made.tensors().len(), "{name}");
                let mut apart = 0;
                for (tensor, weights) in by_tensor {
                    let weights: Vec<f64> = serde_json::from_value(weights.clone()).unwrap();
                    assert!((weights.iter().sum::<f64>() - 1.0).abs() < 1e-6, "{tensor}");
                    apart += usize::from((weights[0] - 1.0 / 3.0).abs() > 1e-3);
                }
                assert!(
                    apart > by_tensor.len() / 2,
                    "{name}: {apart} of {} moved",
                    by_tensor.len()
                );
            }
        }
        let unfit = Inputs { text: vec![], labelled: None, ..inputs.clone() };
        let error = place.apply("model-soups", json!({"mode": "greedy"}), &unfit, "x").unwrap_err();
        assert!(error.contains("--labelled PATH"), "{error}");
        let wrong = Some(Labelled::Table(
            place.table("wrong.jsonl", "{\"text\": \"w5\", \"label\": \"fire\"}\n"),
        ));
        let unfit = Inputs { labelled: wrong, ..inputs };
        let error = place.apply("model-soups", json!({"mode": "greedy"}), &unfit, "x").unwrap_err();
        assert!(error.contains("wrong.jsonl:1") && error.contains("`fire`"), "{error}");
    }
}

#[test]
fn weights_by_tensor_follow_the_exact_gradient() {
    // Images, and text under a language model: a first step moves the loss as the gradient promises.
    let place = Place::new();
    idx(&place.path("idx"), 24);
    let labelled = Labelled::open(&place.path("idx"), Part::Train).unwrap();
    let images = Inputs {
        models: vec![place.model("vit")],
        labelled: Some(labelled.clone()),
        ..Inputs::default()
    };
    let models = ingredients(&place, &images);
    let of_images = Inputs { models, ..images };
    let text = refit_methods::method::TextData {
        source: "held out".into(),
        text: "And the keeper wrote down the height of the tide. ".repeat(12),
    };
    let tiny = here("../../assets/tiny");
    let more =
        json!({"steps": 3, "batch": 2, "max_length": 32, "learning_rate": 2e-3, "dtype": "f32"});
    let learn = Inputs {
        models: vec![ModelInput::open("tiny", &tiny).unwrap()],
        data: vec![TrainingData::Text(text.clone())],
        ..Inputs::default()
    };
    place.apply("fine-tune", more, &learn, "tuned").unwrap();
    let base = json!({"dtype": "f32"});
    place.apply("model-soups", base, &Inputs { data: vec![], ..learn }, "base").unwrap();
    let open = |name: &str| ModelInput::open(name, place.path(name)).unwrap();
    let of_text =
        Inputs { models: vec![open("base"), open("tuned")], text: vec![text], ..Inputs::default() };
    for (what, inputs) in [("images", of_images), ("text", of_text)] {
        let run = |steps: usize| {
            let more = json!({"mode": "learned-by-tensor", "steps": steps, "learning_rate": 0.1});
            let report =
                place.apply("model-soups", more, &inputs, &format!("{what}-{steps}")).unwrap();
            serde_json::from_value::<Vec<f64>>(report["losses"].clone()).unwrap()
        };
        let (none, some) = (run(0), run(3));
        // Without steps it is the uniform soup, scored forward; with steps its loss comes from the backward pass.
        assert!((none[0] - some[0]).abs() < 1e-4 * (1.0 + none[0]), "{what}: {none:?} {some:?}");
        assert!(some[3] < some[0], "{what}: {some:?}");
    }
}
