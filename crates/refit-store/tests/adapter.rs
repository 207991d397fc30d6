//! Adapters that PEFT wrote: read, merged as PEFT merges them, written again, and every damage told by its name.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use refit_store::adapter::{
    self, AdapterConfig, Dialect, FILE_NAME, Factor, Form, Part, Prompt, Side, Values, WEIGHTS_NAME,
};
use refit_store::{Adapter, Artifact, Card, Error, Lineage, TensorFault};
use serde_json::{Value as Json, json};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/adapters").join(name)
}

fn expected(name: &str) -> Json {
    serde_json::from_slice(&fs::read(fixture(name).join("expected.json")).unwrap()).unwrap()
}

fn base_of(name: &str) -> Artifact {
    Artifact::open(root().join(expected(name)["base"].as_str().unwrap())).unwrap()
}

fn open(name: &str) -> Adapter {
    Adapter::open(&fixture(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// Names of all fixtures, so that a new one cannot be forgotten.
fn fixtures() -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(fixture(""))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert!(names.len() >= 17, "{names:?}");
    names
}

fn form<'a>(adapter: &'a Adapter, site: &str) -> &'a Form {
    let mut found = adapter.parts().iter().filter(|part| part.site == site).map(|part| &part.form);
    let form = found.next_back();
    form.unwrap_or_else(|| panic!("{site} is not among {:?}", sites(adapter)))
}

fn sites(adapter: &Adapter) -> Vec<&str> {
    adapter.parts().iter().map(|part| &*part.site).collect()
}

fn scale(form: &Form) -> f32 {
    match form {
        Form::Lora { scale, .. }
        | Form::EmbeddingLora { scale, .. }
        | Form::Loha { scale, .. }
        | Form::Lokr { scale, .. } => *scale,
        other => panic!("{} has no scale", other.name()),
    }
}

fn close(a: f32, b: f64) -> bool {
    (f64::from(a) - b).abs() <= 1e-6 * (1.0 + b.abs())
}

#[test]
fn every_fixture_opens_and_fits_its_base() {
    for name in fixtures() {
        assert!(Adapter::is_adapter(&fixture(&name)));
        let adapter = open(&name);
        assert_eq!(adapter.dialect(), Dialect::Peft, "{name}");
        assert!(adapter.parameters() > 0, "{name}");
        adapter.check_base(&base_of(&name)).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(adapter.parts().is_sorted_by_key(|part| part.site.clone()), "{name}");
        assert_eq!(adapter.parts().is_empty(), adapter.prompt().is_some(), "{name}");
        assert_eq!(adapter.config().base_model(), expected(&name)["base"].as_str());
    }
}

#[test]
fn forms_and_scales_are_those_of_the_configuration() {
    let lora = open("lora");
    assert_eq!(lora.parts().len(), 6);
    assert!(lora.parts().iter().all(|part| scale(&part.form) == 4.0));

    // r 2, alpha 6, rank-stabilized; `[qk]_proj` of layer 0 has rank 3, `up_proj` 1; `o_proj` alpha 3, `up_proj` of layer
    // 3 alpha 12.
    let patterns = open("rslora-patterns");
    for (site, rank, alpha) in [
        ("model.layers.0.self_attn.q_proj", 3.0, 6.0),
        ("model.layers.3.self_attn.q_proj", 2.0, 6.0),
        ("model.layers.0.self_attn.o_proj", 2.0, 3.0),
        ("model.layers.0.mlp.up_proj", 1.0, 6.0),
        ("model.layers.3.mlp.up_proj", 1.0, 12.0),
    ] {
        let form = form(&patterns, site);
        assert!(close(scale(form), alpha / f64::sqrt(rank)), "{site}: {}", scale(form));
        let Form::Lora { a, .. } = form else { panic!("{site}") };
        assert_eq!(a.rows() as f64, rank, "{site}");
    }

    let dora = open("dora");
    assert!(
        dora.parts().iter().all(
            |part| matches!(&part.form, Form::Lora { magnitude: Some(m), .. } if !m.is_empty())
        )
    );

    let saved = open("lora-saved-modules");
    let full =
        |part: &&Part| matches!(&part.form, Form::Full { tensor, .. } if tensor == ".weight");
    // `norm` also ends the names of both norms of each of the five layers.
    assert_eq!(saved.parts().iter().filter(full).count(), 11);
    assert_eq!(saved.parts().len(), 13);

    assert!(matches!(
        form(&open("lora-embedding"), "model.embed_tokens"),
        Form::EmbeddingLora { a, b, .. } if a.shape == [1, 3072] && b.shape == [192, 1]
    ));
    let ia3 = open("ia3");
    let side = |site: &str| match form(&ia3, site) {
        Form::Ia3 { factors, side } => (factors.len(), *side),
        other => panic!("{}", other.name()),
    };
    assert_eq!(side("model.layers.1.self_attn.k_proj"), (64, Side::Output));
    assert_eq!(side("model.layers.1.mlp.down_proj"), (512, Side::Input));
    let loha = open("loha");
    assert_eq!(scale(form(&loha, "model.layers.0.self_attn.q_proj")), 2.0);
    assert_eq!(scale(form(&loha, "model.layers.0.mlp.down_proj")), 3.0);
    assert!(matches!(
        form(&open("lokr"), "model.layers.0.self_attn.q_proj"),
        Form::Lokr { w1: Factor::Full(_), w2: Factor::LowRank(..), .. }
    ));
    assert!(matches!(
        form(&open("lokr-both"), "model.layers.0.self_attn.v_proj"),
        Form::Lokr { w1: Factor::LowRank(..), w2: Factor::LowRank(..), scale } if *scale == 1.5
    ));
    let prefix = open("prefix");
    let Some(prompt @ Prompt::Prefix { tokens: 4, layers: 5, table }) = prefix.prompt() else {
        panic!("{:?}", prefix.prompt())
    };
    assert_eq!((&*table.shape, prompt.width()), (&[4, 640][..], 64));
    let (keys, values) = prompt.layer(3).unwrap();
    let of_token = |token: usize, index: usize| &table.values[token * 640 + index * 64..][..64];
    assert_eq!(keys[..64], *of_token(0, 6));
    assert_eq!(keys[3 * 64..], *of_token(3, 6));
    assert_eq!(values[64..128], *of_token(1, 7));
    assert_eq!(prompt.layer(5), None);
    assert!(!prefix.mergeable());
    assert!(matches!(
        open("prompt").prompt(),
        Some(Prompt::Input { tokens: 5, table }) if table.shape == [5, 192]
    ));
    assert!(matches!(
        form(&open("gpt2-ln-tuning"), "transformer.h.1.ln_1"),
        Form::LayerNorm { weight, bias: Some(bias) } if weight.len() == 32 && bias.len() == 32
    ));
    assert!(matches!(
        form(&open("lora-bias"), "model.layers.1.mlp.down_proj"),
        Form::Lora { bias: Some(bias), .. } if bias.len() == 32
    ));
    let trained = open("gpt2-lora");
    let site = "transformer.h.0.mlp.c_fc";
    let at_site: Vec<_> = trained.parts().iter().filter(|part| part.site == site).collect();
    assert_eq!(at_site.len(), 2);
    assert_eq!(at_site[0].tensor(), format!("{site}.bias"));
    assert!(matches!(at_site[1].form, Form::Lora { .. }));
    let legacy = open("legacy-bin");
    assert_eq!(sites(&legacy), ["model.layers.1.self_attn.k_proj"]);
    // No `r` or `lora_alpha` of 8 is written there: alpha is PEFT's default.
    assert_eq!(scale(&legacy.parts()[0].form), 8.0);
}

/// The tensors that an adapter changes, merged.
fn merge(adapter: &Adapter, base: &Artifact) -> BTreeMap<String, Vec<f32>> {
    let mut merged: BTreeMap<String, Vec<f32>> = BTreeMap::new();
    for part in adapter.parts() {
        let bias = format!("{}.bias", part.site);
        if part.form.changes_bias() && base.contains(&bias) {
            let values =
                merged.entry(bias.clone()).or_insert_with(|| base.read_f32(&bias).unwrap());
            assert!(part.form.apply_bias(values).unwrap());
        }
        let name = part.tensor();
        if name == bias {
            continue;
        }
        let values = merged.entry(name.clone()).or_insert_with(|| base.read_f32(&name).unwrap());
        let layout = base.architecture().site(&name).unwrap().layout;
        part.form.apply_stored(values, &base.tensor(&name).unwrap().shape, layout).unwrap();
    }
    merged
}

#[test]
fn merging_gives_what_peft_merges() {
    let mut compared = 0;
    for name in fixtures() {
        let expected = expected(&name);
        let Some(theirs) = expected["merged"].as_object() else { continue };
        let (adapter, base) = (open(&name), base_of(&name));
        let ours = merge(&adapter, &base);
        // A tied head appears in PyTorch's state dictionary and not in the file.
        let stored: BTreeSet<&str> =
            theirs.keys().map(|key| &**key).filter(|key| base.contains(key)).collect();
        assert_eq!(ours.keys().map(|key| &**key).collect::<BTreeSet<_>>(), stored, "{name}");
        for tensor in stored {
            let (theirs, ours) = (&theirs[tensor], &ours[tensor]);
            let shape: Vec<usize> = serde_json::from_value(theirs["shape"].clone()).unwrap();
            let columns: usize = shape.iter().skip(1).product();
            let columns = if shape.len() > 1 { columns } else { shape[0] };
            for (row, values) in theirs["rows"].as_object().unwrap() {
                let row: usize = row.parse().unwrap();
                let ours = &ours[row * columns..(row + 1) * columns];
                for (column, (x, y)) in ours.iter().zip(values.as_array().unwrap()).enumerate() {
                    let y = y.as_f64().unwrap();
                    assert!(close(*x, y), "{name}: {tensor}[{row}, {column}]: {x} against {y}");
                    compared += 1;
                }
            }
            let sum: f64 = ours.iter().map(|&x| f64::from(x)).sum();
            let size: f64 = ours.iter().map(|&x| f64::from(x).abs()).sum();
            let total = theirs["sum_abs"].as_f64().unwrap();
            let bound = 1e-6 * (1.0 + total);
            assert!((sum - theirs["sum"].as_f64().unwrap()).abs() < bound, "{name}: {tensor}");
            assert!((size - total).abs() < bound, "{name}: {tensor}");
        }
    }
    assert!(compared > 4000, "{compared}");
}

#[test]
fn the_number_of_threads_does_not_matter() {
    for name in ["lora", "dora", "loha", "lokr", "ia3", "lora-embedding"] {
        let (adapter, base) = (open(name), base_of(name));
        let with = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| merge(&adapter, &base))
        };
        assert!(with(1) == with(3), "{name}");
    }
}

fn put(out: &Path, config: &AdapterConfig, parts: &[Part], prompt: Option<&Prompt>) -> PathBuf {
    try_put(out, config, parts, prompt).unwrap_or_else(|error| panic!("{}: {error}", out.display()))
}

fn try_put(
    out: &Path,
    config: &AdapterConfig,
    parts: &[Part],
    prompt: Option<&Prompt>,
) -> Result<PathBuf, Error> {
    let lineage = Lineage::new("test", json!({ "rank": 2 }));
    adapter::write(out, config, parts, prompt, lineage, Card::new("test"), false, Vec::new())
}

#[test]
fn what_is_written_is_read_back_equal() {
    let dir = tempfile::tempdir().unwrap();
    for name in fixtures() {
        let adapter = open(&name);
        let config = adapter.config().clone().with("refit_note", json!({ "kept": [1, 2] }));
        let out = put(&dir.path().join(&name), &config, adapter.parts(), adapter.prompt());
        let again = Adapter::open(&out).unwrap();
        assert_eq!(again.parts(), adapter.parts(), "{name}");
        assert_eq!(again.prompt(), adapter.prompt(), "{name}");
        assert_eq!(again.config().raw()["refit_note"], json!({ "kept": [1, 2] }));
        let written = fs::read_to_string(out.join(FILE_NAME)).unwrap();
        let keys: Vec<_> = written.lines().filter(|line| line.starts_with("  \"")).collect();
        assert!(keys.is_sorted(), "{written}");
        // The same names and shapes as PEFT's own file.
        let tensors = |dir: &Path| {
            let mut found = Artifact::open(dir).unwrap().tensors().to_vec();
            found.iter_mut().for_each(|info| info.nbytes = 0);
            found
        };
        assert_eq!(tensors(&out), tensors(&fixture(&name)), "{name}");
        assert!(Lineage::verify(&out).unwrap().is_ok(), "{name}");
        let card = Card::read(&out).unwrap().unwrap();
        assert_eq!((&*card.library, card.relation.map(|r| r.hub())), ("peft", Some("adapter")));
        let bytes = fs::read(out.join(WEIGHTS_NAME)).unwrap();
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        assert_eq!(header.metadata().as_ref().unwrap()["format"], "pt");
    }
}

#[test]
fn a_described_configuration_gives_the_same_adapter() {
    // `scripts/interop_adapters.py` loads what is kept there.
    let kept = std::env::var_os("REFIT_ADAPTERS_OUT").map(PathBuf::from);
    let dir = tempfile::tempdir().unwrap();
    let dir = kept.as_deref().unwrap_or(dir.path());
    for name in fixtures() {
        let adapter = open(&name);
        if adapter.prompt().is_some() {
            continue;
        }
        let config = AdapterConfig::describe(adapter.parts(), None).unwrap();
        assert_eq!(config.peft_type(), adapter.config().peft_type(), "{name}");
        let again = Adapter::open(&put(&dir.join(&name), &config, adapter.parts(), None)).unwrap();
        assert_eq!(again.parts(), adapter.parts(), "{name}");
        again.check_base(&base_of(&name)).unwrap();
    }
}

#[test]
fn prompt_configurations_describe_their_tables() {
    let dir = tempfile::tempdir().unwrap();
    let (prefix, prompt) = (open("prefix"), open("prompt"));
    let made = AdapterConfig::prefix(4, 5, 2, 32);
    for key in ["token_dim", "num_attention_heads", "num_layers", "num_virtual_tokens"] {
        assert_eq!(made.get(key), prefix.config().get(key), "{key}");
    }
    for (config, adapter) in [(made, &prefix), (AdapterConfig::prompt(5, 192, 5, 6), &prompt)] {
        let out = dir.path().join(config.peft_type().unwrap());
        let again = Adapter::open(&put(&out, &config, &[], adapter.prompt())).unwrap();
        assert_eq!(again.prompt(), adapter.prompt());
    }
    let wrong = AdapterConfig::prefix(4, 5, 2, 16);
    let error = try_put(&dir.path().join("wrong"), &wrong, &[], prefix.prompt()).unwrap_err();
    assert!(matches!(error, Error::BadPlan { .. }), "{error}");
}

#[test]
fn a_configuration_that_contradicts_the_parts_is_not_written() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let adapter = open("lora");
    for (config, words) in [
        (adapter.config().clone().with("lora_alpha", 16), "scale"),
        (adapter.config().clone().with("r", 4), "rank"),
        (adapter.config().clone().with("use_dora", true), "lora_magnitude_vector"),
        (adapter.config().clone().with("peft_type", "IA3"), "no such tensor"),
        (AdapterConfig::default(), "peft_type"),
    ] {
        let error = try_put(&out, &config, adapter.parts(), None).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
        assert!(!out.exists());
    }
    put(&out, adapter.config(), adapter.parts(), None);
    let again = try_put(&out, adapter.config(), adapter.parts(), None);
    assert!(matches!(again, Err(Error::OutputExists { .. })));
}

#[test]
fn the_content_hash_follows_what_the_adapter_does() {
    let dir = tempfile::tempdir().unwrap();
    let adapter = open("lora");
    let hash = |name: &str, config: &AdapterConfig, parts: &[Part]| {
        let out = put(&dir.path().join(name), config, parts, None);
        Adapter::open(&out).unwrap().content_hash().unwrap()
    };
    let own = adapter.content_hash().unwrap();
    let moved = adapter.config().clone().with("peft_version", "0.1").with("revision", "main");
    assert_eq!(hash("moved", &moved, adapter.parts()), own);
    let mut parts = adapter.parts().to_vec();
    for part in &mut parts {
        let Form::Lora { scale, .. } = &mut part.form else { panic!() };
        *scale = 8.0;
    }
    assert_ne!(hash("alpha", &adapter.config().clone().with("lora_alpha", 16), &parts), own);
    let mut parts = adapter.parts().to_vec();
    let Form::Lora { a, .. } = &mut parts[0].form else { panic!() };
    a.values[0] += 1.0;
    assert_ne!(hash("factor", adapter.config(), &parts), own);
}

#[test]
fn refits_own_dialect_holds_bottlenecks_and_a_prefix() {
    let dir = tempfile::tempdir().unwrap();
    let table = |shape: [usize; 2], first: f32| {
        let count = shape[0] * shape[1];
        let values = (0..count).map(|i| first + (i as f32 * 0.37).sin()).collect();
        Values::new(shape, values).unwrap()
    };
    let part = |site: &str, sequential, position: &str| Part {
        site: site.to_owned(),
        form: Form::Bottleneck {
            down: table([3, 192], 0.1),
            down_bias: vec![0.5; 3],
            up: table([192, 3], 0.2),
            up_bias: vec![-0.25; 192],
            scale: 4.0,
            activation: "relu".to_owned(),
            sequential,
            position: position.to_owned(),
        },
    };
    let parts = [
        part("model.layers.0.mlp.down_proj", false, "ffn"),
        part("model.layers.1.self_attn.o_proj", true, "attention"),
    ];
    let prefix = Prompt::Prefix { tokens: 2, layers: 5, table: table([2, 640], 0.0) };
    let base = Artifact::open(root().join("assets/tiny")).unwrap();
    for prompt in [None, Some(&prefix)] {
        let config = AdapterConfig::describe(&parts, prompt).unwrap();
        assert_eq!(config.dialect(), Some(Dialect::Refit));
        assert_eq!(config.get("peft_type"), None);
        let out = dir.path().join(format!("prompt-{}", prompt.is_some()));
        let adapter = Adapter::open(&put(&out, &config, &parts, prompt)).unwrap();
        assert_eq!((adapter.parts(), adapter.prompt()), (&parts[..], prompt));
        assert!(!adapter.mergeable());
        adapter.check_base(&base).unwrap();
        assert_eq!(Card::read(&out).unwrap().unwrap().library, "transformers");
    }
    let error = parts[0].form.apply(&mut [0.0; 4], 2, 2).unwrap_err().to_string();
    assert!(error.contains("cannot become part of a weight"), "{error}");
    // An adapter that the configuration lists and the file lacks.
    let config = AdapterConfig::describe(&parts, None).unwrap();
    let error = try_put(&dir.path().join("less"), &config, &parts[..1], None).unwrap_err();
    assert!(error.to_string().contains("o_proj"), "{error}");
}

#[test]
fn adapters_of_other_models_are_refused_with_names_and_shapes() {
    let gpt2 = base_of("gpt2-lora");
    let llama = base_of("lora");
    let biased = base_of("lora-bias");
    let refusal = |name: &str, base: &Artifact| {
        let error = open(name).check_base(base).unwrap_err();
        assert!(matches!(error, Error::AdapterMisfit { .. }), "{error}");
        error.to_string()
    };
    let error = refusal("lora", &gpt2);
    assert!(error.contains("6 of 6") && error.contains("not in the model"), "{error}");
    assert_eq!(error.matches("is not in the model").count(), 5, "{error}");
    let error = refusal("lora-bias", &llama);
    assert!(error.contains("[192, 512]") && error.contains("[out 32, in 48]"), "{error}");
    let error = refusal("prefix", &biased);
    assert!(error.contains("number of layers is 5, the model's 2"), "{error}");
    let error = refusal("prompt", &biased);
    assert!(error.contains("width is 192, the model's 32"), "{error}");
    let error = refusal("lora-saved-modules", &gpt2);
    assert!(error.contains("gate_proj"), "{error}");
    // An adapter that meets nothing, though each of its tensors could be new.
    let dir = tempfile::tempdir().unwrap();
    let head = Part {
        site: "classifier".to_owned(),
        form: Form::Full {
            tensor: ".weight".into(),
            values: Values::new([1, 2], vec![1., 2.]).unwrap(),
        },
    };
    let config = open("lora").config().clone().with("modules_to_save", json!(["classifier"]));
    let out = put(&dir.path().join("head"), &config, &[head], None);
    let error = Adapter::open(&out).unwrap().check_base(&llama).unwrap_err().to_string();
    assert!(error.contains("changes no tensor"), "{error}");
}

#[test]
fn sites_take_the_names_of_the_base() {
    let dir = tempfile::tempdir().unwrap();
    let bert = Artifact::open(root().join("crates/refit-nn/tests/fixtures/hf/bert")).unwrap();
    let lora = |site: &str| Part {
        site: site.to_owned(),
        form: Form::Lora {
            a: Values::new([1, 32], vec![0.5; 32]).unwrap(),
            b: Values::new([32, 1], vec![0.25; 32]).unwrap(),
            scale: 1.0,
            magnitude: None,
            bias: None,
        },
    };
    let classifier = Part {
        site: "classifier".to_owned(),
        form: Form::Full {
            tensor: ".bias".into(),
            values: Values::new([2], vec![1., 2.]).unwrap(),
        },
    };
    let parts = [lora("bert.encoder.layer.0.attention.self.query"), classifier];
    let config = AdapterConfig::describe(&parts, None).unwrap();
    let out = put(&dir.path().join("longer"), &config, &parts, None);
    assert!(Adapter::open(&out).unwrap().check_base(&bert).is_err());
    let adapter = Adapter::open_on(&out, &bert).unwrap();
    assert_eq!(sites(&adapter), ["classifier", "encoder.layer.0.attention.self.query"]);

    let gpt2 = base_of("gpt2-lora");
    let shorter = Part { site: "h.1.attn.c_proj".to_owned(), ..lora("") };
    let config = AdapterConfig::describe(std::slice::from_ref(&shorter), None).unwrap();
    let out = put(&dir.path().join("shorter"), &config, &[shorter], None);
    let adapter = Adapter::open_on(&out, &gpt2).unwrap();
    assert_eq!(sites(&adapter), ["transformer.h.1.attn.c_proj"]);
}

/// A copy of a fixture with other tensors or another configuration.
struct Altered {
    _dir: tempfile::TempDir,
    path: PathBuf,
}

type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

impl Altered {
    fn of(name: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("adapter");
        fs::create_dir(&path).unwrap();
        for file in [FILE_NAME, WEIGHTS_NAME] {
            fs::copy(fixture(name).join(file), path.join(file)).unwrap();
        }
        Self { _dir: dir, path }
    }

    fn tensors(self, edit: impl FnOnce(&mut Tensors)) -> Self {
        let artifact = Artifact::open(&self.path).unwrap();
        let mut tensors: Tensors = artifact
            .tensors()
            .iter()
            .map(|i| (i.name.clone(), (i.shape.clone(), artifact.read_f32(&i.name).unwrap())))
            .collect();
        edit(&mut tensors);
        save(&self.path.join(WEIGHTS_NAME), &tensors);
        self
    }

    fn config(self, key: &str, value: Json) -> Self {
        let path = self.path.join(FILE_NAME);
        let config = AdapterConfig::parse(&path, &fs::read(&path).unwrap()).unwrap();
        fs::write(&path, config.with(key, value).to_json()).unwrap();
        self
    }

    fn file(self, name: &str, bytes: &[u8]) -> Self {
        fs::write(self.path.join(name), bytes).unwrap();
        self
    }

    fn error(&self) -> Error {
        Adapter::open(&self.path).expect_err("the adapter is broken")
    }
}

fn save(path: &Path, tensors: &Tensors) {
    let bytes: Vec<(&String, Vec<u8>)> = tensors
        .iter()
        .map(|(name, (_, values))| (name, values.iter().flat_map(|x| x.to_le_bytes()).collect()))
        .collect();
    let views = bytes.iter().map(|(name, bytes)| {
        let shape = tensors[*name].0.clone();
        (name, safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape, bytes).unwrap())
    });
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

const DOWN: &str = "base_model.model.model.layers.0.mlp.down_proj";

#[test]
fn broken_tensors_are_named() {
    type Case = (&'static str, Box<dyn FnOnce(&mut Tensors)>, [&'static str; 2]);
    let down_a = format!("{DOWN}.lora_A.weight");
    let renamed = |from: &'static str, to: &'static str| -> Box<dyn FnOnce(&mut Tensors)> {
        Box::new(move |t| {
            let values = t.remove(&format!("{DOWN}{from}")).unwrap();
            t.insert(format!("{DOWN}{to}"), values);
        })
    };
    let a = down_a.clone();
    let b = down_a.clone();
    let c = down_a.clone();
    let cases: Vec<Case> = vec![
        (
            "lora",
            Box::new(move |t| drop(t.remove(&a))),
            ["lora_B.weight", "lora_A.weight` is missing"],
        ),
        (
            "lora",
            Box::new(|t| drop(t.remove(&format!("{DOWN}.lora_B.weight")))),
            ["lora_A.weight", "lora_B.weight` is missing"],
        ),
        (
            "dora",
            Box::new(|t| {
                drop(t.remove(
                    "base_model.model.model.layers.0.self_attn.k_proj.lora_magnitude_vector",
                ))
            }),
            ["lora_B.weight", "lora_magnitude_vector` is missing"],
        ),
        (
            "lora",
            Box::new(move |t| t.get_mut(&b).unwrap().1[7] = f32::NAN),
            ["lora_A.weight", "element 7 is NaN"],
        ),
        (
            "lora",
            Box::new(move |t| t.get_mut(&c).unwrap().0 = vec![4, 256]),
            ["lora_A.weight", "[4, 256], expected 2 rows, the rank"],
        ),
        ("lora", renamed(".lora_A.weight", ".lora_C.weight"), ["lora_C.weight", "no such tensor"]),
        ("lora", renamed(".lora_A.weight", ".lora_A.bias"), ["lora_A.bias", "no such tensor"]),
        (
            "lora",
            Box::new(|t| {
                let values = t[&format!("{DOWN}.lora_A.weight")].clone();
                t.insert(format!("{DOWN}.lora_A.default.weight"), values);
            }),
            ["lora_A", "keep one of them"],
        ),
        (
            "lora",
            Box::new(|t| {
                drop(t.insert(format!("{DOWN}.lora_A.weight"), (vec![0, 512], Vec::new())))
            }),
            ["lora_A.weight", "it is empty"],
        ),
        (
            "ia3",
            Box::new(|t| t.get_mut(&format!("{DOWN}.ia3_l")).unwrap().0 = vec![512, 1]),
            ["ia3_l", "[1, in]"],
        ),
        (
            "loha",
            Box::new(|t| drop(t.remove(&format!("{DOWN}.hada_w2_a")))),
            ["down_proj", "hada_w2_a` is missing"],
        ),
        (
            "lokr",
            Box::new(|t| drop(t.remove("base_model.model.model.layers.0.mlp.up_proj.lokr_w2_b"))),
            ["lokr_w2_a", "lokr_w2_b` is missing"],
        ),
        (
            "lokr",
            Box::new(|t| {
                t.insert(
                    "base_model.model.model.layers.0.mlp.up_proj.lokr_t2".into(),
                    (vec![1], vec![1.]),
                );
            }),
            ["lokr_t2", "Tucker"],
        ),
        (
            "prefix",
            Box::new(|t| t.get_mut("prompt_embeddings").unwrap().0 = vec![2, 1280]),
            ["prompt_embeddings", "4 rows"],
        ),
        ("prefix", Box::new(|t| t.clear()), ["adapter_model.safetensors", "holds no tensor"]),
    ];
    for (name, edit, words) in cases {
        let error = Altered::of(name).tensors(edit).error().to_string();
        for word in words.iter().chain(&["adapter_model.safetensors"]) {
            assert!(error.contains(word), "{name}: `{word}` is not in: {error}");
        }
    }
}

#[test]
fn broken_configurations_are_named() {
    for (name, key, value, words) in [
        ("lora", "r", json!(0), "whole number from 1"),
        ("lora", "r", json!("two"), "whole number from 1"),
        ("lora", "lora_alpha", json!([8]), "expected a number"),
        ("lora", "use_dora", json!(1), "expected true or false"),
        ("lora", "rank_pattern", json!({ "(?<q": 3 }), "not a pattern"),
        ("lora", "rank_pattern", json!({ "down_proj": 1.5 }), "rank 1.5"),
        ("lora", "alpha_pattern", json!({ "down_proj": "x" }), "expected a number"),
        ("lora-saved-modules", "modules_to_save", json!({}), "list of names"),
        ("dora", "use_dora", json!(false), "set it to true"),
        ("lora", "init_lora_weights", json!("pissa_niter_16"), "path_initial_model"),
        ("lora", "layer_replication", json!([[0, 2]]), "layers that the base model does not have"),
        ("lora", "alora_invocation_tokens", json!([5]), "activated LoRA"),
        ("prefix", "num_layers", json!(null), "number of layers"),
        ("prefix", "num_layers", json!(7), "7 layers"),
        ("prefix", "token_dim", json!(32), "token_dim"),
        ("prompt", "num_virtual_tokens", json!(6), "6 rows"),
    ] {
        let error = Altered::of(name).config(key, value.clone()).error().to_string();
        assert!(error.contains(words), "{key} = {value}: {error}");
    }
    // Keys that only matter to training are no error.
    let trained = Altered::of("lora").config("init_lora_weights", json!("eva"));
    Adapter::open(&trained.path).unwrap();

    for kind in ["ADALORA", "OFT", "BOFT", "VERA", "lora"] {
        let error = Altered::of("lora").config("peft_type", json!(kind)).error();
        assert!(matches!(&error, Error::UnsupportedAdapter { kind: found, .. } if found == kind));
        let error = error.to_string();
        assert!(error.contains(FILE_NAME) && error.contains("LORA, IA3, LOHA"), "{error}");
    }
    let error = Altered::of("lora").config("peft_type", json!(null)).error();
    assert!(matches!(error, Error::AdapterConfig { ref key, .. } if key == "peft_type"), "{error}");
}

#[test]
fn broken_files_are_named() {
    let error = Altered::of("lora").file(FILE_NAME, b"").error();
    assert!(matches!(error, Error::Json { line: 1, .. }), "{error}");
    let error = Altered::of("lora").file(FILE_NAME, b"{\n  \"r\": \n}").error();
    assert!(matches!(error, Error::Json { line: 3, .. }), "{error}");
    let error = Altered::of("lora").file(FILE_NAME, b"[]").error();
    assert!(error.to_string().contains("JSON object"), "{error}");
    let error = Altered::of("lora").file(WEIGHTS_NAME, b"").error();
    assert!(matches!(error, Error::Truncated { .. }), "{error}");
    let error = Altered::of("lora").file(WEIGHTS_NAME, b"not a model at all").error().to_string();
    assert!(error.contains(WEIGHTS_NAME), "{error}");
    let copy = Altered::of("lora");
    fs::remove_file(copy.path.join(WEIGHTS_NAME)).unwrap();
    let error = copy.error().to_string();
    assert!(error.contains("adapter_model.bin"), "{error}");
    fs::remove_file(copy.path.join(FILE_NAME)).unwrap();
    assert!(!Adapter::is_adapter(&copy.path));
    assert!(copy.error().to_string().contains(FILE_NAME));
    assert!(matches!(Adapter::open(Path::new("/nowhere/at/all")), Err(Error::Io { .. })));
}

#[test]
fn an_adapter_with_a_name_lies_one_folder_down() {
    let dir = tempfile::tempdir().unwrap();
    let lora = open("lora");
    put(&dir.path().join("poems"), lora.config(), lora.parts(), None);
    assert!(!Adapter::is_adapter(dir.path()));
    let adapter = Adapter::open(dir.path()).unwrap();
    assert_eq!(adapter.parts(), lora.parts());
    assert_eq!(adapter.path(), dir.path().join("poems"));
    put(&dir.path().join("letters"), lora.config(), lora.parts(), None);
    let error = Adapter::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("letters, poems"), "{error}");
}

#[test]
fn raw_state_dictionaries_are_understood() {
    // Keys with the adapter's name and PEFT's wrappers inside, as `torch.save(model.state_dict())` gives them.
    let copy = Altered::of("lora-saved-modules").tensors(|tensors| {
        let renamed = tensors.iter().map(|(name, values)| {
            let name = name.replace(".lora_A.", ".lora_A.default.");
            let name = name.replace(".lora_B.", ".lora_B.default.");
            let name = name.replace("norm.weight", "norm.modules_to_save.default.weight");
            (name, values.clone())
        });
        let mut all: Tensors = renamed.collect();
        let old = "base_model.model.model.norm.original_module.weight".to_owned();
        all.insert(old, (vec![192], vec![1.0; 192]));
        *tensors = all;
    });
    assert_eq!(Adapter::open(&copy.path).unwrap().parts(), open("lora-saved-modules").parts());
}

/// A directory as AdapterHub's `save_adapter` writes it.
fn hub(config: Json, model_type: &str, version: &str, tensors: &[(&str, [usize; 2])]) -> Altered {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_owned();
    let whole = json!({
        "config": config, "hidden_size": 32, "model_class": "X", "model_name": "some/model",
        "model_type": model_type, "name": "poem", "version": version,
    });
    fs::write(path.join(FILE_NAME), serde_json::to_vec(&whole).unwrap()).unwrap();
    let tensors: Tensors = tensors
        .iter()
        .map(|(name, [rows, columns])| {
            let shape = if *columns == 0 { vec![*rows] } else { vec![*rows, *columns] };
            let count: usize = shape.iter().product();
            ((*name).to_owned(), (shape, (0..count).map(|i| (i as f32).cos()).collect()))
        })
        .collect();
    save(&path.join("adapter.safetensors"), &tensors);
    Altered { _dir: dir, path }
}

#[test]
fn adapterhubs_lora_is_read_with_the_scale_that_it_was_trained_with() {
    let config = json!({ "architecture": "lora", "r": 4, "alpha": 16, "composition_mode": "add" });
    let query = "bert.encoder.layer.1.attention.self.query.loras.poem";
    let (a, b) = (format!("{query}.lora_A"), format!("{query}.lora_B"));
    let tensors = [(&*a, [4, 32]), (&*b, [32, 4])];
    let bert = Artifact::open(root().join("crates/refit-nn/tests/fixtures/hf/bert")).unwrap();
    for (version, expected) in
        [("adapters.1.0.1", 1.0), ("adapters.1.1.0", 4.0), ("adapters.1.10.2", 4.0)]
    {
        let copy = hub(config.clone(), "bert", version, &tensors);
        let adapter = Adapter::open_on(&copy.path, &bert).unwrap();
        assert_eq!(adapter.dialect(), Dialect::AdapterHub);
        assert_eq!(sites(&adapter), ["encoder.layer.1.attention.self.query"]);
        assert_eq!(scale(&adapter.parts()[0].form), expected, "{version}");
        // It can go on as PEFT's.
        let described = AdapterConfig::describe(adapter.parts(), None).unwrap();
        let out = put(&copy.path.join("peft"), &described, adapter.parts(), None);
        assert_eq!(Adapter::open(&out).unwrap().parts(), adapter.parts());
        let own = try_put(&copy.path.join("own"), adapter.config(), adapter.parts(), None);
        assert!(own.unwrap_err().to_string().contains("describe"));
    }
    let error = hub(config.clone(), "bert", "adapters.1.2.0", &tensors[..1]).error();
    assert!(
        matches!(&error, Error::BadTensor { reason: TensorFault::Half { missing }, .. } if *missing == b),
        "{error}"
    );
    let scaled =
        json!({ "architecture": "lora", "r": 4, "alpha": 16, "composition_mode": "scale" });
    let error = hub(scaled, "bert", "adapters.1.2.0", &tensors).error().to_string();
    assert!(error.contains("AdapterHub that holds LoRA") && error.contains("scale"), "{error}");
}

#[test]
fn adapterhubs_bottlenecks_are_read_where_they_have_a_place() {
    let names = |module: &str| {
        ["adapter_down.0.weight", "adapter_down.0.bias", "adapter_up.weight", "adapter_up.bias"]
            .map(|end| format!("{module}.adapters.poem.{end}"))
    };
    let shapes = [[2, 32], [2, 0], [32, 2], [32, 0]];
    let read = |model_type: &str, module: &str, changes: Json| {
        let mut config = json!({
            "mh_adapter": true, "output_adapter": true, "reduction_factor": 16, "non_linearity": "swish",
            "original_ln_before": false, "original_ln_after": true, "ln_before": false, "ln_after": false,
            "is_parallel": false, "scaling": 1.0, "use_gating": false, "inv_adapter": null, "phm_layer": false,
            "residual_before_ln": true, "adapter_residual_before_ln": false,
        });
        changes.as_object().unwrap().iter().for_each(|(k, v)| config[k] = v.clone());
        let names = names(module);
        let tensors: Vec<_> = names.iter().map(|name| &**name).zip(shapes).collect();
        let copy = hub(config, model_type, "adapters.1.0.0", &tensors);
        Adapter::open(&copy.path)
    };
    let cases = [
        (
            "bert",
            "bert.encoder.layer.0.output",
            json!({}),
            "bert.encoder.layer.0.output.dense",
            "ffn",
        ),
        (
            "bert",
            "bert.encoder.layer.0.attention.output",
            json!({ "is_parallel": true, "original_ln_before": true, "scaling": 4.0 }),
            "bert.encoder.layer.0.attention.output.dense",
            "attention",
        ),
        (
            "llama",
            "model.layers.3.output_adapters",
            json!({}),
            "model.layers.3.mlp.down_proj",
            "ffn",
        ),
        (
            "llama",
            "model.layers.3.attention_adapters",
            json!({}),
            "model.layers.3.self_attn.o_proj",
            "attention",
        ),
    ];
    for (model_type, module, changes, site, place) in cases {
        let parallel = changes["is_parallel"] == json!(true);
        let adapter = read(model_type, module, changes).unwrap();
        assert_eq!(sites(&adapter), [site]);
        let Form::Bottleneck { down, up, scale, activation, sequential, position, .. } =
            &adapter.parts()[0].form
        else {
            panic!("{site}")
        };
        assert_eq!((&*down.shape, &*up.shape), (&[2, 32][..], &[32, 2][..]));
        assert_eq!((&**activation, &**position), ("silu", place));
        assert_eq!((*scale, *sequential), (if parallel { 4.0 } else { 1.0 }, !parallel));
    }
    for (model_type, module, changes, words) in [
        ("bert", "bert.encoder.layer.0.output", json!({ "original_ln_before": true }), "seq_bn"),
        ("bert", "bert.encoder.layer.0.output", json!({ "use_gating": true }), "use_gating"),
        (
            "bert",
            "bert.encoder.layer.0.output",
            json!({ "original_ln_after": false }),
            "residual sum",
        ),
        ("bert", "bert.encoder.layer.0.output", json!({ "scaling": "learned" }), "learned"),
        ("bert", "bert.encoder.layer.0.output", json!({ "non_linearity": "odd" }), "`odd`"),
        ("bert", "bert.encoder.layer.0", json!({}), "does not know which module"),
        (
            "llama",
            "model.layers.0.output_adapters",
            json!({ "is_parallel": true }),
            "before the norm",
        ),
        ("whisper", "model.layers.0.output_adapters", json!({}), "`whisper`"),
        ("bert", "x", json!({ "architecture": "union" }), "`union`"),
    ] {
        let error = read(model_type, module, changes).unwrap_err();
        assert!(matches!(error, Error::ForeignAdapter { .. }), "{error}");
        let error = error.to_string();
        assert!(error.contains("bottleneck") && error.contains(words), "{error}");
    }
}

#[test]
fn kernels_are_merged_flattened() {
    // out 2, in 3, 1 x 2 kernel, rank 1: W + s B A over the flattened kernel.
    let a: Vec<f32> = (0..6).map(|i| i as f32).collect();
    let form = Form::Lora {
        a: Values::new([1, 3, 1, 2], a.clone()).unwrap(),
        b: Values::new([2, 1, 1, 1], vec![1.0, -2.0]).unwrap(),
        scale: 0.5,
        magnitude: None,
        bias: None,
    };
    let mut weight = vec![1.0; 12];
    form.apply_stored(&mut weight, &[2, 3, 1, 2], refit_store::architecture::Layout::Conv).unwrap();
    let expected: Vec<f32> =
        a.iter().map(|x| 1.0 + 0.5 * x).chain(a.iter().map(|x| 1.0 - x)).collect();
    assert_eq!(weight, expected);
    let error = form.apply(&mut weight, 3, 4).unwrap_err().to_string();
    assert!(error.contains("[2, 6], not [3, 4]"), "{error}");
    assert!(form.apply(&mut weight, 2, 5).is_err());
    assert!(Values::new([2, 3], vec![0.0; 5]).is_err());
}

/// Small multiplicative generator: the same damage on every run.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % n
    }
}

#[test]
fn damage_never_panics() {
    let mut random = Random(17);
    for name in ["dora", "lokr", "prefix", "gpt2-lora", "ia3"] {
        let base = base_of(name);
        for file in [FILE_NAME, WEIGHTS_NAME] {
            let whole = fs::read(fixture(name).join(file)).unwrap();
            let copy = Altered::of(name);
            let header = whole.len().min(2500);
            for round in 0..150 {
                let mut bytes = whole.clone();
                if round % 3 == 0 {
                    bytes.truncate(random.below(if round % 2 == 0 { header } else { whole.len() }));
                } else {
                    for _ in 0..=random.below(3) {
                        let at = random.below(header);
                        bytes[at] ^= 1 << random.below(8);
                    }
                }
                fs::write(copy.path.join(file), &bytes).unwrap();
                if let Ok(mut adapter) = Adapter::open(&copy.path) {
                    adapter.align(&base);
                    if adapter.check_base(&base).is_ok() && adapter.mergeable() {
                        for part in adapter.parts() {
                            let Ok(info) = base.tensor(&part.tensor()) else { continue };
                            let mut weight = vec![0.5; info.numel()];
                            let layout = base.architecture().site(&info.name).map(|s| s.layout);
                            let _ = part.form.apply_stored(
                                &mut weight,
                                &info.shape,
                                layout.unwrap_or_default(),
                            );
                        }
                    }
                }
            }
        }
    }
}
