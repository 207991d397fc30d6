//! Descriptions of model families against tensor lists as published checkpoints have them.

use proptest::prelude::*;
use refit_store::architecture::{
    Kind, Layout, MemoryOptions, Resolved, Role, document_key, known_model_types, memory_plan,
    resolve,
};
use serde_json::{Value, json};

type Tensors = Vec<(String, Vec<usize>)>;

fn fit(config: Value, tensors: &Tensors) -> Resolved {
    let config = config.as_object().cloned().unwrap_or_default();
    resolve(&config, tensors.iter().map(|(name, shape)| (name.as_str(), shape.as_slice())))
}

fn tensor(name: impl Into<String>, shape: &[usize]) -> (String, Vec<usize>) {
    (name.into(), shape.to_vec())
}

fn llama_config() -> Value {
    json!({"model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
           "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152,
           "max_position_embeddings": 8192, "tie_word_embeddings": true, "rope_theta": 100000.0})
}

/// SmolLM2-135M: a tied head is not stored.
fn llama_tensors(prefix: &str) -> Tensors {
    let mut tensors = vec![tensor(format!("{prefix}embed_tokens.weight"), &[49152, 576])];
    for layer in 0..30 {
        let at = format!("{prefix}layers.{layer}");
        for (name, shape) in [
            ("input_layernorm", &[576][..]),
            ("self_attn.q_proj", &[576, 576]),
            ("self_attn.k_proj", &[192, 576]),
            ("self_attn.v_proj", &[192, 576]),
            ("self_attn.o_proj", &[576, 576]),
            ("post_attention_layernorm", &[576]),
            ("mlp.gate_proj", &[1536, 576]),
            ("mlp.up_proj", &[1536, 576]),
            ("mlp.down_proj", &[576, 1536]),
        ] {
            tensors.push(tensor(format!("{at}.{name}.weight"), shape));
        }
    }
    tensors.push(tensor(format!("{prefix}norm.weight"), &[576]));
    tensors
}

#[test]
fn llama_with_a_tied_head() {
    let Resolved { architecture, report } = fit(llama_config(), &llama_tensors("model."));
    assert!(report.is_clean(), "{report}");
    assert!(!architecture.inferred);
    assert_eq!((architecture.kind, architecture.layers()), (Kind::Decoder, 30));
    assert_eq!(architecture.linears().count(), 30 * 7);
    let q = architecture.site("model.layers.4.self_attn.q_proj.weight").unwrap();
    assert_eq!((q.role, q.layer, q.out_in()), (Role::Q, Some(4), Some((576, 576))));
    assert_eq!(q.norm.as_deref(), Some("model.layers.4.input_layernorm.weight"));
    let up = architecture.site("model.layers.4.mlp.up_proj.weight").unwrap();
    assert_eq!(up.norm.as_deref(), Some("model.layers.4.post_attention_layernorm.weight"));
    let head = architecture.site("lm_head.weight").unwrap();
    assert_eq!((head.stored, head.tied_to.as_deref()), (false, Some("model.embed_tokens.weight")));
    assert_eq!(head.norm.as_deref(), Some("model.norm.weight"));
    // The published parameter count of SmolLM2-135M.
    let total: u64 = architecture.parameters_by_role().iter().map(|(.., n)| n).sum();
    assert_eq!(total, 134_515_008);
}

#[test]
fn prefixes_are_tolerated() {
    for prefix in ["", "model.", "language_model.model."] {
        let resolved = fit(llama_config(), &llama_tensors(prefix));
        assert!(resolved.report.is_clean(), "`{prefix}`: {}", resolved.report);
    }
}

#[test]
fn a_strict_load_names_what_does_not_fit() {
    let mut tensors = llama_tensors("model.");
    tensors.retain(|(name, _)| name != "model.layers.7.mlp.up_proj.weight");
    tensors.push(tensor("model.layers.7.mlp.upp_proj.weight", &[1536, 576]));
    for (name, shape) in &mut tensors {
        if name == "model.layers.3.self_attn.k_proj.weight" {
            *shape = vec![576, 576];
        }
    }
    let report = fit(llama_config(), &tensors).report;
    assert_eq!(report.missing.len(), 1);
    assert_eq!(report.missing[0].nearest.as_deref(), Some("model.layers.7.mlp.upp_proj.weight"));
    assert_eq!(report.unexpected[0].nearest.as_deref(), Some("model.layers.7.mlp.up_proj.weight"));
    assert_eq!(report.misshaped[0].name, "model.layers.3.self_attn.k_proj.weight");
    assert_eq!(report.misshaped[0].expected, [Some(192), Some(576)]);
    let text = report.to_string();
    assert!(text.contains("the config says [192, 576]") && text.contains("upp_proj"), "{text}");
}

#[test]
fn a_head_that_is_not_tied_must_be_stored() {
    let mut config = llama_config();
    config["tie_word_embeddings"] = json!(false);
    let report = fit(config, &llama_tensors("model.")).report;
    assert_eq!(report.missing[0].name, "lm_head.weight");
}

#[test]
fn more_layers_in_the_file_than_in_the_config_are_unexpected() {
    let mut config = llama_config();
    config["num_hidden_layers"] = json!(29);
    let report = fit(config, &llama_tensors("model.")).report;
    assert_eq!(report.unexpected.len(), 9);
    assert!(report.unexpected.iter().all(|stray| stray.name.contains("layers.29.")));
}

fn bert_tensors(prefix: &str, layers: usize) -> Tensors {
    let (h, f) = (384, 1536);
    let mut tensors = vec![
        tensor(format!("{prefix}embeddings.word_embeddings.weight"), &[30522, h]),
        tensor(format!("{prefix}embeddings.position_embeddings.weight"), &[512, h]),
        tensor(format!("{prefix}embeddings.token_type_embeddings.weight"), &[2, h]),
        tensor(format!("{prefix}embeddings.position_ids"), &[1, 512]),
        tensor(format!("{prefix}pooler.dense.weight"), &[h, h]),
        tensor(format!("{prefix}pooler.dense.bias"), &[h]),
    ];
    let mut module = |name: String, shape: &[usize]| {
        tensors.push(tensor(format!("{prefix}{name}.weight"), shape));
        tensors.push(tensor(format!("{prefix}{name}.bias"), &shape[..1]));
    };
    module("embeddings.LayerNorm".into(), &[h]);
    for layer in 0..layers {
        let at = format!("encoder.layer.{layer}");
        for name in [
            "attention.self.query",
            "attention.self.key",
            "attention.self.value",
            "attention.output.dense",
        ] {
            module(format!("{at}.{name}"), &[h, h]);
        }
        module(format!("{at}.attention.output.LayerNorm"), &[h]);
        module(format!("{at}.intermediate.dense"), &[f, h]);
        module(format!("{at}.output.dense"), &[h, f]);
        module(format!("{at}.output.LayerNorm"), &[h]);
    }
    tensors
}

#[test]
fn bare_bert_as_in_minilm() {
    let config = json!({"model_type": "bert", "hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536,
                        "num_attention_heads": 12, "vocab_size": 30522, "max_position_embeddings": 512,
                        "type_vocab_size": 2});
    for prefix in ["", "bert."] {
        let Resolved { architecture, report } = fit(config.clone(), &bert_tensors(prefix, 6));
        assert!(report.is_clean(), "{report}");
        assert_eq!(architecture.linears().count(), 6 * 6);
        assert!(architecture.with_role(Role::Head).next().is_none(), "a bare encoder has no head");
        let norm = |name: &str| {
            architecture.site(&format!("{prefix}{name}")).unwrap().norm.clone().unwrap()
        };
        let first = norm("encoder.layer.0.attention.self.key.weight");
        assert_eq!(first, format!("{prefix}embeddings.LayerNorm.weight"));
        let third = norm("encoder.layer.2.attention.self.key.weight");
        assert_eq!(third, format!("{prefix}encoder.layer.1.output.LayerNorm.weight"));
    }
}

#[test]
fn a_family_is_recognised_without_a_config() {
    let Resolved { architecture, report } = fit(json!({}), &bert_tensors("", 3));
    assert!(report.is_clean(), "{report}");
    assert!(architecture.inferred);
    assert_eq!((architecture.model_type.as_str(), architecture.layers()), ("bert", 3));
    assert_eq!(architecture.dims.hidden, Some(384));
    assert!(report.absent_keys.iter().any(|key| key == "hidden_size"));
    // Sizes learned from the first tensors still bind the later ones.
    let mut tensors = bert_tensors("", 3);
    let query = tensors
        .iter_mut()
        .find(|(name, _)| name.contains("layer.1.attention.self.query.weight"))
        .unwrap();
    query.1 = vec![384, 383];
    assert_eq!(fit(json!({}), &tensors).report.misshaped.len(), 1);
}

#[test]
fn gpt2_stores_inputs_first() {
    let mut tensors = vec![tensor("wte.weight", &[100, 12]), tensor("wpe.weight", &[16, 12])];
    for layer in 0..2 {
        for (name, shape) in [
            ("ln_1", &[12][..]),
            ("ln_2", &[12]),
            ("attn.c_attn", &[12, 36]),
            ("attn.c_proj", &[12, 12]),
            ("mlp.c_fc", &[12, 48]),
            ("mlp.c_proj", &[48, 12]),
        ] {
            tensors.push(tensor(format!("h.{layer}.{name}.weight"), shape));
            tensors.push(tensor(format!("h.{layer}.{name}.bias"), &shape[shape.len() - 1..]));
        }
        tensors.push(tensor(format!("h.{layer}.attn.bias"), &[1, 1, 16, 16]));
    }
    tensors.push(tensor("ln_f.weight", &[12]));
    tensors.push(tensor("ln_f.bias", &[12]));
    let config = json!({"model_type": "gpt2", "n_embd": 12, "n_layer": 2, "n_head": 3, "n_positions": 16,
                        "vocab_size": 100});
    let Resolved { architecture, report } = fit(config, &tensors);
    assert!(report.is_clean(), "{report}");
    let qkv = architecture.site("h.1.attn.c_attn.weight").unwrap();
    assert_eq!((qkv.layout, qkv.out_in()), (Layout::InOut, Some((36, 12))));
    assert_eq!(qkv.fused, [(Role::Q, 12), (Role::K, 12), (Role::V, 12)]);
    assert_eq!(architecture.site("h.0.attn.bias").unwrap().role, Role::Other);
    assert_eq!(architecture.site("lm_head.weight").unwrap().tied_to.as_deref(), Some("wte.weight"));
}

#[test]
fn unknown_families_are_inferred() {
    let mut tensors = vec![tensor("backbone.tok_embeddings.weight", &[100, 16])];
    for layer in [0, 1, 10] {
        for (name, shape) in [
            ("attention.wq", &[16, 16][..]),
            ("attention.wk", &[8, 16]),
            ("attention.wv", &[8, 16]),
            ("attention.wo", &[16, 16]),
            ("attention_norm", &[16]),
            ("ffn_norm", &[16]),
            ("mystery.widen", &[64, 16]),
            ("mystery.narrow", &[16, 64]),
        ] {
            tensors.push(tensor(format!("backbone.layers.{layer}.{name}.weight"), shape));
        }
    }
    let Resolved { architecture, report } = fit(json!({"model_type": "novel"}), &tensors);
    assert!(architecture.inferred && report.is_clean());
    assert_eq!(architecture.model_type, "novel");
    let role =
        |name: &str| architecture.site(&format!("backbone.layers.1.{name}.weight")).unwrap().role;
    assert_eq!(role("attention.wq"), Role::Q);
    assert_eq!(role("attention.wo"), Role::O);
    assert_eq!(role("mystery.widen"), Role::Up);
    assert_eq!(role("mystery.narrow"), Role::Down);
    let q = architecture.site("backbone.layers.10.attention.wq.weight").unwrap();
    assert_eq!(q.norm.as_deref(), Some("backbone.layers.10.attention_norm.weight"));
    let last = architecture.sites.iter().filter_map(|site| site.layer).next_back();
    assert_eq!(last, Some(10), "blocks are in numeric order");
}

#[test]
fn no_tensor_is_lost() {
    for tensors in [llama_tensors("model."), bert_tensors("", 6)] {
        for config in [
            json!({}),
            json!({"model_type": "llama"}),
            json!({"model_type": "bert"}),
            json!({"model_type": "x"}),
        ] {
            let architecture = fit(config, &tensors).architecture;
            assert_eq!(architecture.sites.iter().filter(|site| site.stored).count(), tensors.len());
        }
    }
}

#[test]
fn nonsense_configs_do_not_panic() {
    for (key, value) in [
        ("num_hidden_layers", json!(1e18)),
        ("num_attention_heads", json!(0)),
        ("hidden_size", json!("wide")),
        ("num_key_value_heads", json!([1, 2])),
        ("vocab_size", json!(-4)),
        ("head_dim", json!(1.5)),
    ] {
        let mut config = llama_config();
        config[key] = value;
        let resolved = fit(config, &llama_tensors("model."));
        memory_plan(&resolved.architecture, 1, &MemoryOptions::default());
    }
}

#[test]
fn every_config_key_has_an_answer() {
    let config = llama_config();
    for key in config.as_object().unwrap().keys() {
        assert!(document_key("llama", key).used, "{key}");
    }
    let unused = document_key("llama", "transformers_version");
    assert!(!unused.used && !unused.text.contains("Not documented"));
    assert!(document_key("llama", "made_up").text.contains("Not documented"));
    assert!(document_key("gpt2", "n_inner").used);
}

#[test]
fn every_description_stands() {
    for model_type in known_model_types() {
        // Resolving nothing exercises the whole file: it parses, its parents exist, its expressions are sound.
        let resolved = fit(json!({ "model_type": model_type }), &Tensors::new());
        assert!(!resolved.architecture.inferred, "{model_type}");
        assert!(!resolved.architecture.summary.is_empty(), "{model_type} has no summary");
        assert!(!resolved.report.missing.is_empty(), "{model_type} expects no tensor");
    }
}

#[test]
fn memory_of_smollm2() {
    let architecture = fit(llama_config(), &llama_tensors("model.")).architecture;
    let options = MemoryOptions { context: 1024, batch: 1, element_bytes: 4, lora_rank: 8 };
    let plan = memory_plan(&architecture, 269_060_552, &options);
    assert_eq!(plan.parameters, 134_515_008);
    assert_eq!(plan.weights, 538_060_032);
    assert_eq!(plan.cache, Some(2 * 30 * 3 * 64 * 1024 * 4));
    // r (in + out) over q, k, v, o, gate, up, down of every block.
    let per_block = 8 * (2 * 1152 + 2 * 768 + 3 * 2112);
    assert_eq!(plan.lora_parameters, 30 * per_block);
    assert!(plan.run < plan.tune_lora && plan.tune_lora < plan.tune_adamw);
    // Measured as peak resident memory of `refit eval` with windows of so many tokens (no cache), and of
    // `refit generate` after a prompt of 1900: within a quarter.
    let near = |context: usize, cached: bool, measured: f64| {
        let plan = memory_plan(&architecture, 96_576_768, &MemoryOptions { context, ..options });
        let run = plan.run - if cached { 0 } else { plan.cache.unwrap() };
        assert!((run as f64 / measured - 1.0).abs() < 0.25, "{context}: {run} for {measured}");
    };
    near(16, false, 604e6);
    near(256, false, 641e6);
    near(1024, false, 647e6);
    near(2048, false, 660e6);
    near(1900, true, 751e6);
}

#[test]
fn memory_plans_of_absurd_sizes_do_not_overflow() {
    let mut architecture = fit(llama_config(), &llama_tensors("model.")).architecture;
    let vast = Some(usize::MAX);
    architecture.dims = refit_store::architecture::Dims {
        hidden: vast,
        layers: vast,
        heads: vast,
        kv_heads: vast,
        head_dim: vast,
        ffn: vast,
        vocab: vast,
        ..architecture.dims
    };
    let options = MemoryOptions {
        context: usize::MAX,
        batch: usize::MAX,
        element_bytes: 8,
        lora_rank: usize::MAX,
    };
    assert_eq!(memory_plan(&architecture, u64::MAX, &options).run, u64::MAX);
}

/// Small models of each family as transformers itself saves them: config and tensors fit without a remainder.
#[test]
fn what_transformers_saves_fits() {
    let fixture: Value = serde_json::from_str(include_str!("fixtures/transformers.json")).unwrap();
    let mut seen = std::collections::BTreeSet::new();
    let mut faults = Vec::new();
    for (name, model) in fixture["models"].as_object().unwrap() {
        let shape = |dims: &Value| {
            dims.as_array().unwrap().iter().map(|d| d.as_u64().unwrap() as usize).collect()
        };
        let tensors: Tensors = model["tensors"]
            .as_object()
            .unwrap()
            .iter()
            .map(|(n, dims)| (n.clone(), shape(dims)))
            .collect();
        let Resolved { architecture, report } = fit(model["config"].clone(), &tensors);
        seen.insert(architecture.model_type.clone());
        if !report.is_clean() || !report.absent_keys.is_empty() {
            faults.push(format!("{name}: {report}; absent keys {:?}", report.absent_keys));
        }
        if architecture.linears().next().is_none() || architecture.dims.layers.is_none() {
            faults.push(format!("{name}: no linears or layers"));
        }
        // Every linear of a block that reads a norm names one that is stored.
        for site in &architecture.sites {
            if site.norm.as_ref().is_some_and(|norm| architecture.site(norm).is_none()) {
                faults.push(format!("{name}: {} is fed by an unknown norm", site.name));
            }
        }
        for key in model["config"].as_object().unwrap().keys() {
            if document_key(&architecture.model_type, key).text.contains("Not documented") {
                faults.push(format!("{name}: config key `{key}` has no entry"));
            }
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    assert!(seen.len() >= 20, "{seen:?}");
}

/// The width and the repeats of each stage of EfficientNet-Lite, from the coefficients of its authors: channels are
/// rounded to a multiple of eight and lose at most a tenth; the first and the last stage keep their depth.
fn lite_blocks(width: f64, depth: f64) -> Vec<(usize, usize, usize)> {
    let stages =
        [(1, 3, 16), (2, 3, 24), (2, 5, 40), (3, 3, 80), (3, 5, 112), (4, 5, 192), (1, 3, 320)];
    let round = |channels: usize| {
        let scaled = channels as f64 * width;
        let rounded = ((scaled + 4.0) as usize / 8 * 8).max(8);
        if (rounded as f64) < 0.9 * scaled { rounded + 8 } else { rounded }
    };
    let mut blocks = Vec::new();
    let mut input = 32;
    for (stage, (repeats, kernel, output)) in stages.into_iter().enumerate() {
        let repeats = match stage {
            0 | 6 => repeats,
            _ => (repeats as f64 * depth).ceil() as usize,
        };
        for _ in 0..repeats {
            blocks.push((input, round(output), kernel));
            input = round(output);
        }
    }
    blocks
}

/// The checkpoints that users of `lukemelas/EfficientNet-PyTorch` and its ports train, without a config.
#[test]
fn efficientnet_lites_are_recognised_by_their_names_and_shapes() {
    // Parameters as timm counts those of `tf_efficientnet_lite0` to `4`.
    for (version, width, depth, parameters) in [
        (0, 1.0, 1.0, 4_652_008),
        (1, 1.0, 1.1, 5_416_680),
        (2, 1.1, 1.2, 6_092_072),
        (3, 1.2, 1.4, 8_197_096),
        (4, 1.4, 1.8, 13_006_568),
    ] {
        let blocks = lite_blocks(width, depth);
        let last = blocks.last().unwrap().1;
        let mut tensors = vec![
            tensor("_conv_stem.weight", &[32, 3, 3, 3]),
            tensor("_conv_head.weight", &[1280, last, 1, 1]),
            tensor("_fc.weight", &[1000, 1280]),
            tensor("_fc.bias", &[1000]),
        ];
        let mut norm = vec![("_bn0".to_owned(), 32), ("_bn1".to_owned(), 1280)];
        for (i, &(input, output, kernel)) in blocks.iter().enumerate() {
            let inner = if i == 0 { input } else { 6 * input };
            let at = format!("_blocks.{i}");
            if i > 0 {
                tensors.push(tensor(format!("{at}._expand_conv.weight"), &[inner, input, 1, 1]));
                norm.push((format!("{at}._bn0"), inner));
            }
            let depthwise = format!("{at}._depthwise_conv.weight");
            tensors.push(tensor(depthwise, &[inner, 1, kernel, kernel]));
            tensors.push(tensor(format!("{at}._project_conv.weight"), &[output, inner, 1, 1]));
            norm.extend([(format!("{at}._bn1"), inner), (format!("{at}._bn2"), output)]);
        }
        for (name, channels) in norm {
            for part in ["weight", "bias", "running_mean", "running_var"] {
                tensors.push(tensor(format!("{name}.{part}"), &[channels]));
            }
            tensors.push(tensor(format!("{name}.num_batches_tracked"), &[]));
        }
        let name = format!("efficientnet-lite{version}");
        for config in [json!({}), json!({ "model_type": name })] {
            let Resolved { architecture, report } = fit(config, &tensors);
            assert!(report.is_clean(), "{name}: {report}");
            assert_eq!((&architecture.model_type, architecture.kind), (&name, Kind::Vision));
            assert_eq!(architecture.layers(), blocks.len());
            // Elements of weights and biases.
            let trained: u64 = architecture
                .parameters_by_role()
                .iter()
                .filter(|(role, ..)| *role != Role::Stat)
                .map(|(.., elements)| elements)
                .sum();
            assert_eq!(trained, parameters, "{name}");
        }
    }
}

/// The fixture's models: config and tensors of each.
fn published() -> &'static [(Value, Tensors)] {
    static MODELS: std::sync::LazyLock<Vec<(Value, Tensors)>> = std::sync::LazyLock::new(|| {
        let fixture: Value =
            serde_json::from_str(include_str!("fixtures/transformers.json")).unwrap();
        let models = fixture["models"].as_object().unwrap().values();
        models
            .map(|model| {
                let tensors = model["tensors"].as_object().unwrap().iter();
                let shape = |dims: &Value| serde_json::from_value(dims.clone()).unwrap();
                let tensors = tensors.map(|(name, dims)| (name.clone(), shape(dims))).collect();
                (model["config"].clone(), tensors)
            })
            .collect()
    });
    &MODELS
}

fn any_value() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        (0u64..70).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        Just(json!(u64::MAX)),
        Just(json!(-1)),
        "[a-z]{0,6}".prop_map(Value::from),
        proptest::collection::vec(0u64..70, 0..4).prop_map(Value::from),
        Just(json!({"rope_type": 1, "x": {}})),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Whatever a config says, every stored tensor gets one site and the plans of memory stand.
    #[test]
    fn any_config_leaves_every_tensor_its_site(
        which in any::<prop::sample::Index>(),
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any_value()), 1..5),
    ) {
        let (config, tensors) = &published()[which.index(published().len())];
        let mut config = config.clone();
        let object = config.as_object_mut().unwrap();
        for (at, value) in changes {
            let key = object.keys().nth(at.index(object.len())).unwrap().clone();
            object.insert(key, value);
        }
        let Resolved { architecture, report } = fit(config, tensors);
        let mut stored: Vec<&str> =
            architecture.sites.iter().filter(|site| site.stored).map(|site| &*site.name).collect();
        stored.sort_unstable();
        let mut names: Vec<&str> = tensors.iter().map(|(name, _)| &**name).collect();
        names.sort_unstable();
        prop_assert_eq!(stored, names);
        prop_assert_eq!(report.misfit().is_none(), report.missing.is_empty() && report.misshaped.is_empty());
        let _ = (report.to_string(), report.strays());
        memory_plan(&architecture, 1 << 20, &MemoryOptions::default());
    }

    /// A tensor that is gone, renamed or reshaped is noticed under its name, or the family can do without it.
    #[test]
    fn a_changed_tensor_is_noticed(which in any::<prop::sample::Index>(), at in any::<prop::sample::Index>(), how in 0usize..3) {
        let (config, tensors) = &published()[which.index(published().len())];
        let mut tensors = tensors.clone();
        let at = at.index(tensors.len());
        let name = tensors[at].0.clone();
        match how {
            0 => drop(tensors.remove(at)),
            1 => tensors[at].0.push('x'),
            _ => tensors[at].1.push(3),
        }
        let report = fit(config.clone(), &tensors).report;
        let noticed = match how {
            // Without its own head a model is taken for another member of the family, which lacks another one.
            0 => !report.missing.is_empty(),
            1 => report.unexpected.iter().any(|stray| stray.name == format!("{name}x")),
            _ => report.misshaped.iter().any(|found| found.name == name),
        };
        prop_assert!(noticed || how == 0 && report.is_clean() || how == 2 && name.ends_with("position_ids"), "{name}: {report}");
    }
}
