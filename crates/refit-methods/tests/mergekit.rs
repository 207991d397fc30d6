//! Recipes of mergekit against mergekit's own output, tensor by tensor.
//!
//! `scripts/fixtures/mergekit.py` makes the models, the recipes and the outputs (mergekit 0.1.5).

mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use refit_methods::merge::mergekit::Recipe;
use refit_methods::method::{Context, Inputs, ModelInput, Output, Plan};
use refit_methods::registry::Configured;
use refit_store::{Artifact, DType};
use serde_json::{Value, json};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/mergekit")
}

fn open(recipe: &Recipe, models: &Path) -> Inputs {
    let open = |name: &String| ModelInput::open(name.clone(), models.join(name)).unwrap();
    Inputs {
        models: recipe.models().iter().map(open).collect(),
        base: recipe.has_base().then_some(0),
        ..Inputs::default()
    }
}

fn plan_of(text: &str, compat: bool) -> refit_methods::Result<Plan> {
    let recipe = Recipe::parse(Path::new("their.yaml"), text, compat)?;
    recipe.plan(&open(&recipe, &fixtures().join("models")))
}

fn merge(text: &str, compat: bool, out: &Path, cx: Context) -> refit_methods::Result<Output> {
    let recipe = Recipe::parse(Path::new("their.yaml"), text, compat)?;
    let inputs = open(&recipe, &fixtures().join("models"));
    let plan = recipe.plan(&inputs)?;
    recipe.run(&inputs, &plan, &mut Context { out: Some(out.to_owned()), ..cx })
}

/// The header's metadata of a safetensors file.
fn metadata(path: &Path) -> BTreeMap<String, Value> {
    let bytes = std::fs::read(path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let entries = header["__metadata__"].as_object().unwrap();
    let parse = |text: &Value| serde_json::from_str(text.as_str().unwrap()).unwrap();
    entries.iter().map(|(key, text)| (key.clone(), parse(text))).collect()
}

/// Bits that sort as the values do, so that neighbours differ by one; in the units of `dtype`.
fn place(value: f32, dtype: DType) -> i64 {
    let bits = match dtype {
        DType::F32 => i64::from(value.to_bits() as i32),
        DType::F16 => i64::from(half::f16::from_f32(value).to_bits() as i16),
        DType::BF16 => i64::from(half::bf16::from_f32(value).to_bits() as i16),
        other => panic!("no fixture of type {other}"),
    };
    let low = match dtype {
        DType::F32 => i64::from(i32::MIN),
        _ => i64::from(i16::MIN),
    };
    if bits < 0 { low - bits } else { bits }
}

fn ids(dir: &Path) -> BTreeMap<String, usize> {
    let json: Value = serde_json::from_slice(&support::bytes(dir, "tokenizer.json")).unwrap();
    let number = |id: &Value| id.as_u64().unwrap() as usize;
    let vocab = json["model"]["vocab"].as_object().unwrap();
    let mut ids: BTreeMap<String, usize> =
        vocab.iter().map(|(token, id)| (token.clone(), number(id))).collect();
    for added in json["added_tokens"].as_array().unwrap() {
        ids.insert(added["content"].as_str().unwrap().to_owned(), number(&added["id"]));
    }
    ids
}

#[test]
fn every_recipe_gives_what_mergekit_gives() {
    let dir = tempfile::tempdir().unwrap();
    let mut cases: Vec<PathBuf> = std::fs::read_dir(fixtures().join("cases"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "yaml"))
        .collect();
    cases.sort();
    assert!(cases.len() >= 34, "only {} recipes", cases.len());
    let mut wrong = Vec::new();
    for recipe in cases {
        let name = recipe.file_stem().unwrap().to_str().unwrap().to_owned();
        let text = std::fs::read_to_string(&recipe).unwrap();
        let out = dir.path().join(&name);
        if let Err(error) = merge(&text, false, &out, Context::default()) {
            wrong.push(format!("{name}: {error}"));
            continue;
        }
        let theirs = Artifact::open(recipe.with_extension("safetensors")).unwrap();
        let ours = Artifact::open(&out).unwrap();
        let facts = metadata(&recipe.with_extension("safetensors"));
        for key in ["num_hidden_layers", "vocab_size"] {
            let (a, b) = (ours.config().get(key), &facts["config"][key]);
            if a != Some(b) {
                wrong.push(format!("{name}: {key} is {a:?} and mergekit's {b}"));
            }
        }
        let names = |artifact: &Artifact| -> Vec<String> {
            artifact.tensors().iter().map(|info| info.name.clone()).collect()
        };
        if names(&ours) != names(&theirs) {
            wrong.push(format!(
                "{name}: the tensors are {:?} and {:?}",
                names(&ours),
                names(&theirs)
            ));
            continue;
        }
        // Ids of added tokens follow the order of a hash table in mergekit: rows are compared token by token.
        let (mine, other) = (ids(&out), &facts["vocabulary"]);
        let tokens: Vec<(usize, usize)> = mine
            .iter()
            .map(|(token, id)| (*id, other[token].as_u64().unwrap_or(u64::MAX) as usize))
            .collect();
        if tokens.iter().any(|(_, theirs)| *theirs == usize::MAX)
            || tokens.len() != other.as_object().unwrap().len()
        {
            wrong.push(format!("{name}: the tokens are {mine:?} and {other}"));
            continue;
        }
        for info in theirs.tensors() {
            let found = ours.tensor(&info.name).unwrap();
            if found.dtype != info.dtype || found.shape != info.shape {
                wrong.push(format!("{name}: {found:?} and mergekit's {info:?}"));
                continue;
            }
            let (x, y) = (ours.read_f32(&info.name).unwrap(), theirs.read_f32(&info.name).unwrap());
            let columns = *info.shape.last().unwrap();
            let rows: Vec<(usize, usize)> =
                match info.name.contains("embed") || info.name.contains("lm_head") {
                    true => {
                        let padding = tokens.len()..info.shape[0];
                        tokens.iter().copied().chain(padding.map(|row| (row, row))).collect()
                    }
                    false => (0..x.len() / columns).map(|row| (row, row)).collect(),
                };
            let far = rows
                .iter()
                .flat_map(|(i, j)| (0..columns).map(move |c| (i * columns + c, j * columns + c)));
            let worst = far
                .map(|(i, j)| {
                    ((place(x[i], info.dtype) - place(y[j], info.dtype)).abs(), x[i], y[j])
                })
                .max_by_key(|(far, ..)| *far)
                .unwrap();
            if worst.0 > 1 {
                let (far, x, y) = worst;
                wrong.push(format!(
                    "{name}: {}: {x} and mergekit's {y}, {far} places apart",
                    info.name
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{} differences:\n{}", wrong.len(), wrong.join("\n"));
}

const TIES: &str = "merge_method: ties\nbase_model: base\nmodels:\n  - {model: a, parameters: {weight: 0.5, density: 0.4}}\n  - {model: b, parameters: {weight: 1, density: 0.6}}\n";

#[test]
fn a_recipe_is_kept_with_its_model_and_the_manifest_says_how_to_make_it_again() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let output = merge(TIES, false, &out, Context::default()).unwrap();
    assert_eq!(output.report["base"], json!("base"));
    assert_eq!(support::bytes(&out, "mergekit_config.yml"), TIES.as_bytes());
    let lineage = refit_store::Lineage::read(&out).unwrap().unwrap();
    assert_eq!(lineage.command.as_deref(), Some("refit run mergekit_config.yml -o OUT"));
    assert_eq!(lineage.parents.len(), 3);
    assert_eq!(lineage.parents[0].part.as_deref(), Some("base"));
    assert_eq!(lineage.parents[1].part.as_deref(), Some("ingredient"));
}

#[test]
fn bytes_do_not_depend_on_threads_and_random_merges_follow_their_seed() {
    let dir = tempfile::tempdir().unwrap();
    let dare = TIES.replace("merge_method: ties", "merge_method: dare_ties");
    let della = TIES.replace("merge_method: ties", "merge_method: della");
    for (name, text) in [("ties", TIES), ("dare", &dare), ("della", &della)] {
        let run = |threads, seed| {
            let out = dir.path().join(format!("{name}-{threads}-{seed}"));
            let cx = Context { threads, seed, force: true, ..Context::default() };
            merge(text, false, &out, cx).unwrap();
            support::bytes(&out, "model.safetensors")
        };
        assert_eq!(run(1, 3), run(3, 3), "{name}");
        assert_eq!(run(1, 3) == run(1, 4), name == "ties", "{name}");
    }
}

#[test]
fn dare_to_the_letter_restores_the_absolute_sum() {
    let dir = tempfile::tempdir().unwrap();
    let text = "merge_method: dare_linear\nbase_model: base\nmodels: [{model: a, parameters: {weight: 1, density: 0.3}}]\n";
    let (ours, letter) = (dir.path().join("ours"), dir.path().join("letter"));
    merge(text, false, &ours, Context::default()).unwrap();
    merge(text, true, &letter, Context::default()).unwrap();
    let (base, a) = (fixtures().join("models/base"), fixtures().join("models/a"));
    let name = "model.layers.2.mlp.gate_proj.weight";
    let change = |dir: &Path| -> Vec<f64> {
        let (x, b) = (support::tensor(dir, name), support::tensor(&base, name));
        x.iter().zip(b).map(|(x, b)| f64::from(*x) - f64::from(b)).collect()
    };
    let (full, ours, letter) = (change(&a), change(&ours), change(&letter));
    let kept: Vec<usize> = (0..full.len()).filter(|i| ours[*i] != 0.0).collect();
    assert!(kept.len() > full.len() / 5 && kept.len() < full.len() / 2);
    for i in &kept {
        assert!((ours[*i] - full[*i] / 0.3).abs() < 1e-5);
    }
    let sum = |x: &[f64]| x.iter().map(|x| x.abs()).sum::<f64>();
    assert!((sum(&letter) / sum(&full) - 1.0).abs() < 1e-5);
    // The same elements are kept either way.
    assert!((0..full.len()).all(|i| (letter[i] != 0.0) == (ours[i] != 0.0)));
}

#[test]
fn what_cannot_be_merged_is_said_before_the_work() {
    let says = |text: &str, parts: &[&str]| {
        let error = plan_of(text, false).unwrap_err().to_string();
        for part in parts {
            assert!(error.contains(part), "`{part}` is not in: {error}");
        }
    };
    let ties = |from: &str, to: &str| TIES.replace(from, to);
    says(&ties("base_model: base\n", ""), &["base_model", "fine-tuned from"]);
    says(&ties("density: 0.4", "density: 1.4"), &["density = 1.4", "from 0 to 1"]);
    says(&ties("weight: 0.5", "weight: .nan"), &["non-finite", "line 4"]);
    says(&ties("weight: 0.5, ", ""), &["ties needs `weight` for a"]);
    says(&ties("{model: b", "{model: a"), &["a is given twice"]);
    says(&ties("{model: b", "{model: wide"), &["vocab_size", "12", "11"]);
    let slices = |range: &str, more: &str| {
        format!(
            "merge_method: linear\nslices:\n  - sources:\n      - {{model: a, layer_range: [0, {range}]}}\n{more}parameters: {{weight: 1}}\n"
        )
    };
    says(&slices("9", ""), &["layer_range ends at 9", "4 layers"]);
    says(&slices("2", "      - {model: b, layer_range: [0, 3]}\n"), &["3 layers here and 2"]);
    let linear = |weights: [f64; 2]| {
        format!(
            "merge_method: linear\nmodels: [{{model: a, parameters: {{weight: {}}}}}, {{model: b, parameters: {{weight: {}}}}}]\n",
            weights[0], weights[1]
        )
    };
    says(&linear([1.0, -1.0]), &["sum is not zero"]);
    says(&format!("{}dtype: float64\n", linear([1.0, 1.0])), &["out_dtype: float32"]);
    says(&format!("{}chat_template: chatlm\n", linear([1.0, 1.0])), &["did you mean `chatml`"]);
    says(
        "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]\n",
        &["slerp needs `t`"],
    );
    says(
        "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}, {model: c}]\nparameters: {t: 0.5}\n",
        &["slerp takes exactly 1 models beside the base, and 2"],
    );
    says(
        "merge_method: ties\nbase_model: base\nslices:\n  - sources: [{model: a, layer_range: [0, 4], parameters: {weight: 1}}]\n",
        &["the base base is not among the sources"],
    );
}

#[test]
fn tokens_of_other_meaning_are_refused_and_to_the_letter_merged() {
    let dir = tempfile::tempdir().unwrap();
    let models = dir.path().join("models");
    std::fs::create_dir(&models).unwrap();
    for name in ["a", "b"] {
        let (from, to) = (fixtures().join("models").join(name), models.join(name));
        std::fs::create_dir(&to).unwrap();
        for file in ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"]
        {
            std::fs::copy(from.join(file), to.join(file)).unwrap();
        }
    }
    let path = models.join("b/tokenizer.json");
    let swapped = std::fs::read_to_string(&path).unwrap().replace("\"c\": 4", "\"q\": 4");
    std::fs::write(&path, swapped).unwrap();
    let text = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n";
    let plan = |compat| {
        let recipe = Recipe::parse(Path::new("x"), text, compat).unwrap();
        recipe.plan(&open(&recipe, &models))
    };
    let error = plan(false).unwrap_err().to_string();
    assert!(error.contains("tokenizers differ") && error.contains("tokenizer_source"), "{error}");
    assert!(plan(true).is_ok());
}

#[test]
fn layers_are_numbered_anew_and_lists_of_layers_follow() {
    let dir = tempfile::tempdir().unwrap();
    let models = dir.path().join("models");
    for name in ["a", "b"] {
        let (from, to) = (fixtures().join("models").join(name), models.join(name));
        std::fs::create_dir_all(&to).unwrap();
        std::fs::copy(from.join("model.safetensors"), to.join("model.safetensors")).unwrap();
        let text = std::fs::read_to_string(from.join("config.json")).unwrap();
        let mut config: Value = serde_json::from_str(&text).unwrap();
        config["layer_types"] = json!([0, 1, 2, 3].map(|i| format!("{name}{i}")));
        std::fs::write(to.join("config.json"), config.to_string()).unwrap();
    }
    let text = "merge_method: passthrough\nslices:\n  - sources: [{model: a, layer_range: [0, 3]}]\n  - sources: [{model: b, layer_range: [1, 4]}]\n";
    let recipe = Recipe::parse(Path::new("x"), text, false).unwrap();
    let inputs = open(&recipe, &models);
    let plan = recipe.plan(&inputs).unwrap();
    assert_eq!(plan.changed(), 0);
    let out = dir.path().join("out");
    recipe.run(&inputs, &plan, &mut Context::new(&out)).unwrap();
    let made = Artifact::open(&out).unwrap();
    assert_eq!(made.config().usize("num_hidden_layers"), Some(6));
    assert_eq!(
        made.config().get("layer_types"),
        Some(&json!(["a0", "a1", "a2", "b1", "b2", "b3"]))
    );
    made.check_fit().unwrap();
    let name = |layer: usize| format!("model.layers.{layer}.mlp.up_proj.weight");
    assert_eq!(support::tensor(&out, &name(3)), support::tensor(&models.join("b"), &name(1)));
    // Embeddings of the first slice, the final norm of the last.
    let same = |model: &str, name: &str| {
        support::tensor(&out, name) == support::tensor(&models.join(model), name)
    };
    assert!(same("a", "model.embed_tokens.weight") && same("b", "model.norm.weight"));
}

#[test]
fn a_head_that_only_some_tie_becomes_the_outputs_own() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let text =
        "merge_method: linear\nmodels: [{model: a}, {model: untied}]\nparameters: {weight: 1}\n";
    let plan = plan_of(text, false).unwrap();
    assert!(plan.warnings.iter().any(|w| w.contains("lm_head.weight")), "{:?}", plan.warnings);
    merge(text, false, &out, Context::default()).unwrap();
    let made = Artifact::open(&out).unwrap();
    assert!(made.contains("lm_head.weight"));
    assert_eq!(made.config().bool("tie_word_embeddings"), Some(false));
}

#[test]
fn chat_templates_are_named_chosen_and_written() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let text = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\nchat_template: chatml\ndtype: bfloat16\n";
    merge(text, false, &out, Context::default()).unwrap();
    let written = String::from_utf8(support::bytes(&out, "chat_template.jinja")).unwrap();
    assert!(written.contains("<|im_start|>"));
    let config: Value =
        serde_json::from_slice(&support::bytes(&out, "tokenizer_config.json")).unwrap();
    assert_eq!(config["chat_template"], json!(written));
    assert_eq!(config["bos_token"], json!("<s>"));
    let made = Artifact::open(&out).unwrap();
    assert_eq!(made.config().str("torch_dtype"), Some("bfloat16"));
    assert!(made.tensors().iter().all(|info| info.dtype == DType::BF16));
}

#[test]
fn the_last_slice_counts_its_own_models() {
    let dir = tempfile::tempdir().unwrap();
    let text = "merge_method: linear\nslices:\n  - sources: [{model: a, layer_range: [0, 2]}]\n  - sources: [{model: a, layer_range: [2, 4]}, {model: b, layer_range: [2, 4]}]\nparameters: {weight: 1}\n";
    let (ours, letter) = (dir.path().join("ours"), dir.path().join("letter"));
    merge(text, false, &ours, Context::default()).unwrap();
    merge(text, true, &letter, Context::default()).unwrap();
    let norm = "model.norm.weight";
    let of = |name: &str| support::tensor(&fixtures().join("models").join(name), norm);
    let mean: Vec<f32> = of("a").iter().zip(of("b")).map(|(a, b)| 0.5 * (a + b)).collect();
    assert_eq!(support::tensor(&ours, norm), mean);
    // mergekit takes as many models as the first slice has.
    assert_eq!(support::tensor(&letter, norm), of("a"));
}
