//! The advisor: every method is advised or excluded with a reason, more budget never takes advice away, and sizes are those of
//! the files.

mod support;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use refit_data::corpus;
use refit_methods::advise::{Advice, Budget, Keep, Needs, Question, advise};
use refit_methods::method::{Inputs, ModelInput, TextData, TrainingData};
use refit_methods::prune::mask::Pattern;
use refit_methods::quantize::export::Target;
use refit_methods::{Error, registry};
use refit_store::DType;
use serde_json::json;
use support::{apply, inputs, model};

fn tiny() -> ModelInput {
    open("tiny", &Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/tiny"))
}

fn open(name: &str, path: &Path) -> ModelInput {
    ModelInput::open(name, path).unwrap()
}

fn question(budget: Budget) -> Question {
    let text: Vec<TextData> = corpus::builtin()
        .iter()
        // Plans of trainings cut all of it into tokens.
        .map(|text| TextData {
            source: text.domain.into(),
            text: text.calib.chars().take(4000).collect(),
        })
        .collect();
    let data = text.iter().cloned().map(TrainingData::Text).collect();
    Question {
        budget,
        runtime: None,
        tokens: None,
        train_tokens: None,
        memory: None,
        keep: Keep::General,
        needs: Needs::Training,
        pattern: None,
        method: None,
        text: ("builtin:calibration".into(), text),
        data: ("builtin:calibration".into(), data),
    }
}

fn bytes(target: u64) -> Question {
    question(Budget::Bytes(target))
}

fn names(advice: &Advice) -> BTreeSet<&'static str> {
    advice.advised.iter().map(|advised| advised.method).collect()
}

/// Every method once, each with what it needs to be said of it.
#[track_caller]
fn complete(advice: &Advice) {
    let advised = advice.advised.iter().map(|advised| advised.method);
    let mut all: Vec<&str> =
        advised.chain(advice.excluded.iter().map(|excluded| excluded.method)).collect();
    all.sort_unstable();
    let mut known: Vec<&str> = registry::all().iter().map(|entry| entry.info.name).collect();
    known.sort_unstable();
    assert_eq!(all, known);
    for advised in &advice.advised {
        assert!(!advised.commands.is_empty() && !advised.reasons.is_empty(), "{advised:?}");
    }
    for excluded in &advice.excluded {
        assert!(!excluded.reason.trim().is_empty(), "{excluded:?}");
        if let Some(nearest) = excluded.alternative {
            assert!(names(advice).contains(nearest), "{excluded:?}");
        }
    }
    let needs: Vec<Needs> = advice.advised.iter().map(|advised| advised.needs).collect();
    assert!(needs.is_sorted(), "{needs:?}");
}

fn excluded<'a>(advice: &'a Advice, method: &str) -> &'a str {
    let found = advice.excluded.iter().find(|excluded| excluded.method == method);
    &found.unwrap_or_else(|| panic!("{method} is not excluded")).reason
}

#[test]
fn every_method_is_advised_or_has_a_reason_on_every_architecture() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../refit-nn/tests/fixtures/hf");
    let mut seen = 0;
    for family in ["llama", "gpt2", "gemma2", "qwen3", "opt", "bert", "mixtral", "vit"] {
        let model = open(family, &fixtures.join(family));
        // Large enough for anything to fit.
        for question in [bytes(u64::MAX), question(Budget::BitsPerWeight(40.0))] {
            for keep in [Keep::General, Keep::Task] {
                let pattern = Some(Pattern::Grouped { pruned: 2, of: 4 });
                let advice = advise(&model, &Question { keep, pattern, ..question.clone() });
                let advice = advice.unwrap_or_else(|error| panic!("{family}: {error}"));
                complete(&advice);
                seen += advice.advised.len();
            }
        }
    }
    assert!(seen > 50, "only {seen} pieces of advice");
}

#[test]
fn a_family_that_is_not_known_gets_what_looks_at_weights_alone() {
    let dir = tempfile::tempdir().unwrap();
    let toy = model(&dir.path().join("toy"), 1, DType::F32, |_, _| {});
    let config = toy.join("config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, text.replace("\"llama\"", "\"nobodys\"")).unwrap();
    let advice = advise(&open("toy", &toy), &bytes(u64::MAX)).unwrap();
    complete(&advice);
    assert!(!advice.model.known);
    assert!(names(&advice).contains("rtn"), "{:?}", names(&advice));
    assert!(advice.notes.iter().any(|note| note.contains("inferred")), "{:?}", advice.notes);
}

#[test]
fn more_memory_or_more_tokens_take_no_advice_away() {
    let dir = tempfile::tempdir().unwrap();
    let toy = open("toy", &model(&dir.path().join("toy"), 1, DType::F32, |_, _| {}));
    // The toy has no tokenizer, so that trainings are judged on the model that has one.
    for model in [toy, tiny()] {
        let wide = Question {
            keep: Keep::Task,
            pattern: Some(Pattern::Grouped { pruned: 2, of: 4 }),
            ..bytes(u64::MAX)
        };
        let unlimited = advise(&model, &wide).unwrap();
        let mut peaks: Vec<u64> =
            unlimited.advised.iter().map(|advised| advised.cost.peak_memory).collect();
        peaks.sort_unstable();
        peaks.dedup();
        let step = peaks.len().div_ceil(4).max(1);
        let mut memories = vec![Some(1 << 20)];
        memories.extend(peaks.iter().step_by(step).flat_map(|peak| [Some(peak - 1), Some(*peak)]));
        memories.push(None);
        let tokens = [Some(0), Some(100), Some(256), Some(3000), None];
        let amount = |limit: Option<u64>| limit.unwrap_or(u64::MAX);
        let mut found = Vec::new();
        for memory in memories {
            for tokens in tokens {
                let advice = advise(&model, &Question { memory, tokens, ..wide.clone() }).unwrap();
                complete(&advice);
                for advised in &advice.advised {
                    assert!(advised.cost.peak_memory <= amount(memory), "{advised:?}");
                    let read = advised.cost.calibration_tokens.max(advised.cost.trained_tokens);
                    assert!(read <= amount(tokens), "{advised:?}");
                }
                found.push((amount(memory), amount(tokens), names(&advice)));
            }
        }
        let mut grew = false;
        for (memory, tokens, less) in &found {
            for (_, _, more) in found.iter().filter(|(m, t, _)| m >= memory && t >= tokens) {
                assert!(
                    less.is_subset(more),
                    "{memory} bytes, {tokens} tokens: {less:?}, {more:?}"
                );
                grew |= less.len() < more.len();
            }
        }
        assert!(grew, "no budget made a difference");
    }
}

#[test]
fn more_training_takes_no_advice_away_and_too_little_names_what_comes_nearest() {
    let model = tiny();
    let mut last = BTreeSet::new();
    for train_tokens in [Some(0), Some(511), Some(512), Some(4096), None] {
        let advice = advise(&model, &Question { train_tokens, ..bytes(4_000_000) }).unwrap();
        complete(&advice);
        assert!(last.is_subset(&names(&advice)), "{train_tokens:?}");
        last = names(&advice);
        let lora = advice.excluded.iter().find(|excluded| excluded.method == "lora");
        match train_tokens {
            Some(..512) => {
                let lora = lora.unwrap();
                assert!(lora.reason.contains("FLOPs") && lora.reason.contains("--train-tokens"));
                assert_eq!(lora.alternative, Some("fit"));
            }
            _ => assert!(lora.is_none(), "{lora:?}"),
        }
    }
}

#[test]
fn needs_that_are_not_wanted_exclude_what_has_them() {
    let model = tiny();
    let only = |needs| advise(&model, &Question { needs, ..bytes(4_000_000) }).unwrap();
    let (none, some, all) = (only(Needs::None), only(Needs::Calibration), only(Needs::Training));
    for (advice, most) in
        [(&none, Needs::None), (&some, Needs::Calibration), (&all, Needs::Training)]
    {
        complete(advice);
        assert!(advice.advised.iter().all(|advised| advised.needs <= most));
    }
    assert!(names(&none).is_subset(&names(&some)) && names(&some).is_subset(&names(&all)));
    assert!(excluded(&none, "gptq").contains("calibration text"));
    assert!(names(&some).contains("gptq") && excluded(&some, "lora").contains("training"));
    // Without text, a size can still be hit.
    assert_eq!(none.advised[0].method, "fit");
}

#[test]
fn a_size_that_cannot_be_had_names_the_smallest_and_how() {
    let model = tiny();
    for runtime in [None, Some(Target::CompressedTensors), Some(Target::Gptq), Some(Target::Gguf)] {
        let ask = |budget| advise(&model, &Question { runtime, ..question(budget) });
        let error = ask(Budget::Bytes(1000)).unwrap_err();
        assert!(matches!(error, Error::Range { name: "target", .. }), "{error:?}");
        let said = error.to_string();
        assert!(said.contains("refit "), "{said}");
        let least = said.split(" takes ").nth(1).unwrap().split(' ').next().unwrap();
        let least: u64 = least.parse().unwrap_or_else(|_| panic!("{said}"));
        let advice = ask(Budget::Bytes(least)).unwrap();
        assert!(!advice.advised.is_empty(), "{runtime:?}");
        assert!(advice.advised.iter().all(|advised| advised.bytes <= least));
        assert!(ask(Budget::Bytes(least - 1)).is_err(), "{runtime:?}");
        let error = ask(Budget::BitsPerWeight(0.5)).unwrap_err();
        assert!(matches!(error, Error::Range { name: "bpw", .. }), "{error:?}");
    }
}

#[test]
fn contradictions_name_the_need() {
    let model = tiny();
    let base = bytes(4_000_000);
    let gptq = Question { method: Some("gptq".into()), ..base.clone() };
    let lora = Question { method: Some("lora".into()), ..base.clone() };
    for (question, parts) in [
        (Question { tokens: Some(0), ..gptq.clone() }, ["gptq", "calibration text"]),
        (Question { needs: Needs::None, ..gptq.clone() }, ["gptq", "--needs none"]),
        (Question { needs: Needs::Calibration, ..lora.clone() }, ["lora", "training data"]),
        (Question { train_tokens: Some(0), ..lora }, ["lora", "--train-tokens is 0"]),
        (
            Question { train_tokens: Some(9), needs: Needs::None, ..base.clone() },
            ["--train-tokens", "--needs none"],
        ),
        (Question { method: Some("gtpq".into()), ..base }, ["gtpq", "did you mean `gptq`"]),
        (question(Budget::BitsPerWeight(f64::NAN)), ["bpw", "above 0"]),
    ] {
        let error = advise(&model, &question).unwrap_err().to_string();
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    }
    let only = advise(&model, &gptq).unwrap();
    assert_eq!((only.advised.len(), only.excluded.len()), (1, 0));
}

#[test]
fn methods_that_would_change_nothing_are_told_on_a_model_that_lies_on_a_grid() {
    let dir = tempfile::tempdir().unwrap();
    let source = Inputs { models: vec![tiny()], ..Inputs::default() };
    let out = dir.path().join("four");
    let parameters = json!({"bits": 4, "group": 32, "asymmetric": true, "dtype": "f32"});
    apply("rtn", parameters, &source, &out, 0).unwrap();
    let ask = |bpw: f64| {
        let runtime = Some(Target::CompressedTensors);
        advise(&open("four", &out), &Question { runtime, ..question(Budget::BitsPerWeight(bpw)) })
            .unwrap()
    };
    let advice = ask(4.7);
    complete(&advice);
    for method in ["rtn", "gptq", "hqq", "finequant", "awq", "fit"] {
        let reason = excluded(&advice, method);
        assert!(reason.contains("at best change nothing") && reason.contains("4-bit"), "{reason}");
    }
    let first = &advice.advised[0];
    assert_eq!((first.method, first.exact), ("export", true));
    assert!(advice.notes.iter().any(|note| note.contains("quantized before")));
    // Below that grid they are of use again.
    let lower = ask(3.7);
    assert!(names(&lower).contains("rtn") && !lower.advised.iter().any(|advised| advised.exact));
}

#[test]
fn a_large_model_is_not_trained_whole_and_zeros_are_advised_where_they_are_asked_for() {
    let model = tiny();
    let general = advise(&model, &bytes(4_000_000)).unwrap();
    assert!(excluded(&general, "fine-tune").contains("--keep task"));
    assert!(excluded(&general, "wanda").contains("--pattern"));
    let task = advise(&model, &Question { keep: Keep::Task, ..bytes(4_000_000) }).unwrap();
    let tuned = task.advised.iter().find(|advised| advised.method == "fine-tune").unwrap();
    assert!(tuned.commands[0].starts_with("refit apply fine-tune tiny "), "{tuned:?}");
    let pattern = Some(Pattern::Grouped { pruned: 2, of: 4 });
    let pruned = advise(&model, &Question { pattern, ..bytes(4_000_000) }).unwrap();
    let wanda = pruned.advised.iter().find(|advised| advised.method == "wanda").unwrap();
    assert!(wanda.commands[0].contains("--pattern 2:4"), "{wanda:?}");
    assert!(wanda.commands[1].starts_with("refit apply rtn tiny-wanda "), "{wanda:?}");
}

/// Bytes of the weight file in a directory, and of the adapter that goes with it.
fn weights(dir: &Path) -> u64 {
    let names =
        ["model.safetensors", "model.gguf", "lorc/adapter_model.safetensors", "lorc/lora.gguf"];
    let files: Vec<PathBuf> = names.map(|name| dir.join(name)).into();
    let there: Vec<&PathBuf> = files.iter().filter(|path| path.exists()).collect();
    assert!(!there.is_empty(), "{}", dir.display());
    there.iter().map(|path| std::fs::metadata(path).unwrap().len()).sum()
}

#[test]
fn sizes_are_those_of_the_files() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny();
    let source = Inputs { models: vec![model.clone()], ..Inputs::default() };
    for runtime in [Target::CompressedTensors, Target::Gptq, Target::Gguf] {
        for target in [2_000_000, 2_600_000, 3_600_000] {
            let question = Question {
                runtime: Some(runtime),
                needs: Needs::None,
                pattern: Some(Pattern::Grouped { pruned: 2, of: 4 }),
                ..bytes(target)
            };
            let Ok(advice) = advise(&model, &question) else { continue };
            for method in ["rtn", "export", "magnitude", "lorc", "svd"] {
                let Some(advised) = advice.advised.iter().find(|a| a.method == method) else {
                    continue;
                };
                let last = advised.commands.len() - 1;
                let mut from = source.clone();
                for (at, command) in advised.commands.iter().enumerate() {
                    let (name, parameters) = parsed(command);
                    let out = dir.path().join(format!("{method}-{at}"));
                    let _ = std::fs::remove_dir_all(&out);
                    apply(&name, parameters, &from, &out, 0).unwrap();
                    if at == last {
                        let real = weights(&out) as f64;
                        let off = (advised.bytes as f64 / real - 1.0).abs();
                        assert!(
                            off < 0.02,
                            "{command}: {} foreseen, {real} written",
                            advised.bytes
                        );
                        assert!(real <= target as f64 * 1.001, "{command}: {real}");
                    }
                    from = inputs(&[&out]);
                }
            }
        }
    }
}

/// A command as a method and its parameters.
fn parsed(command: &str) -> (String, serde_json::Value) {
    let words: Vec<&str> = command.split(' ').collect();
    let (name, rest) = match words[1] {
        "export" => ("export", &words[3..]),
        _ => (words[2], &words[4..]),
    };
    let mut parameters = serde_json::Map::new();
    let mut at = 0;
    while at < rest.len() {
        let key = rest[at].trim_start_matches("--").replace('-', "_");
        let value = rest.get(at + 1).filter(|word| !word.starts_with('-'));
        at += if value.is_some() { 2 } else { 1 };
        if key == "_o" {
            continue;
        }
        let value = value.map_or(json!(true), |word| {
            word.parse::<u64>().map_or_else(|_| json!(word), |number| json!(number))
        });
        parameters.insert(key, value);
    }
    (name.to_owned(), serde_json::Value::Object(parameters))
}
