//! Models in thin factors, and quantized ones with a product beside their codes, from the command line.

mod common;

use common::Place;
use refit_store::{Artifact, DType};

/// Perplexity on a little text; `more` are further flags.
fn perplexity(place: &Place, model: &str, more: &[&str]) -> f64 {
    let args = ["eval", model, "--text", "builtin:kjv", "--window", "64", "--max-tokens", "512"];
    let found = place.run(&[&args[..], more, &["--json"]].concat()).json();
    found["perplexity"].as_f64().unwrap()
}

fn near(a: f64, b: f64, tolerance: f64) {
    assert!((a / b - 1.0).abs() < tolerance, "{a} against {b}");
}

#[test]
fn pairs_are_smaller_and_run_as_their_product() {
    let place = Place::new();
    let said = place
        .run(&["apply", "svd", "builtin:tiny", "--ratio", "1.5", "-o", "pairs", "--json"])
        .json();
    let report = &said["report"];
    let (before, after) = (
        report["parameters_before"].as_f64().unwrap(),
        report["parameters_after"].as_f64().unwrap(),
    );
    assert!(after <= before / 1.5 && after > 0.6 * before, "{report}");
    let artifact = Artifact::open(place.path("pairs")).unwrap();
    let original = Artifact::open("../../assets/tiny").unwrap();
    artifact.check_fit().unwrap();
    for site in original.architecture().linears() {
        let (out, inputs) = site.out_in().unwrap();
        let factors = artifact.factors(&site.name).unwrap().expect("stored in factors");
        assert_eq!(factors.rank, out * inputs * 2 / (3 * (out + inputs)));
        assert_eq!(artifact.tensor(&site.name).unwrap().shape, [out, inputs]);
        // Both factors are as long as each other.
        let square = |v: &[f32]| v.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
        near(square(&factors.left), square(&factors.right), 2e-2);
    }
    // Multiplied out or as it is stored, and written out: one model.
    let dense = perplexity(&place, "pairs", &[]);
    near(perplexity(&place, "pairs", &["--weights", "packed"]), dense, 1e-4);
    place.run(&["export", "pairs", "--to", "safetensors", "-o", "dense"]).code(0);
    near(perplexity(&place, "dense", &[]), dense, 1e-4);
    let config = std::fs::read_to_string(place.path("dense/config.json")).unwrap();
    assert!(!config.contains("low_rank"), "{config}");
    assert!(std::fs::read_to_string(place.path("pairs/config.json")).unwrap().contains("low_rank"));
    place.run(&["apply", "svd", "pairs", "-o", "again"]).code(2).says(&["factors already"]);
}

#[test]
fn energy_bounds_what_each_matrix_loses() {
    let place = Place::new();
    let args = ["apply", "svd", "builtin:tiny", "--energy", "0.95", "-o", "most", "--json"];
    let report = place.run(&args).json()["report"].clone();
    let worst = report["worst_relative_error"].as_f64().unwrap();
    assert!(worst <= 0.05 + 1e-6, "{report}");
    // Matrices for which that saves nothing stay whole.
    let (most, mut pairs) = (Artifact::open(place.path("most")).unwrap(), 0);
    for site in most.architecture().linears() {
        let (out, inputs) = site.out_in().unwrap();
        if let Some(rank) = most.rank(&site.name) {
            assert!(rank * (out + inputs) < out * inputs, "{}", site.name);
            pairs += 1;
        }
    }
    assert_eq!(report["factorized_matrices"], pairs);
    assert!(0 < pairs && pairs < 35, "{pairs}");
    for (flags, word) in [
        (&["--energy", "1.5"][..], "share"),
        (&["--ratio", "0"], "ratio"),
        (&["--ratio", "1000"], "keeps no rank"),
        (&["--omit", "nothing_of_the_kind"], "--omit"),
    ] {
        let args = [&["apply", "svd", "builtin:tiny", "-o", "no"][..], flags].concat();
        place.run(&args).code(2).says(&[word]);
        assert!(!place.path("no").exists());
    }
    let omitted = ["apply", "svd", "builtin:tiny", "--omit", "mlp", "-o", "half"];
    place.run(&omitted).code(0);
    let half = Artifact::open(place.path("half")).unwrap();
    for site in half.architecture().linears() {
        assert_eq!(half.stored_in_factors(&site.name), !site.name.contains("mlp"), "{}", site.name);
    }
}

#[test]
fn what_a_quantizer_lost_comes_back_in_part() {
    let place = Place::new();
    place.run(&["apply", "rtn", "builtin:tiny", "--bits", "3", "-o", "q"]).code(0);
    let (plain, whole) = (perplexity(&place, "q", &[]), perplexity(&place, "builtin:tiny", &[]));
    let text = ["--text", "builtin:calibration", "--samples", "8", "--sequence-length", "128"];
    for (name, flags) in [
        ("lorc", &[][..]),
        ("bytes", &["--factor-bits", "8"]),
        ("eora", &["--aware", "full"]),
        ("lqer", &["--aware", "diagonal"]),
    ] {
        let mut args = vec!["apply", "lorc", "q", "--base", "builtin:tiny", "-o", name];
        args.extend(flags);
        if flags.contains(&"--aware") {
            args.extend(text);
        }
        let report = place.run(&[&args[..], &["--json"]].concat()).json()["report"].clone();
        let [before, after] = ["mean_relative_error_before", "mean_relative_error"]
            .map(|key| report[key].as_f64().unwrap());
        assert!(after < before, "{name}: {report}");
        let found = perplexity(&place, name, &[]);
        assert!(whole < found && found < plain, "{name}: {whole} {found} {plain}");
        // Codes and factors as they are stored differ by the rounding of inputs only.
        near(perplexity(&place, name, &["--weights", "packed"]), found, 0.02);
        let said =
            place.run(&["generate", name, "--prompt", "In", "--max-new-tokens", "3", "--json"]);
        assert!(said.json()["packed_matrices"].as_u64().unwrap() >= 35);
        // The same product as an adapter beside the codes.
        let adapter = format!("{name}/lorc");
        near(perplexity(&place, "q", &["--adapter", &adapter]), found, 1e-4);
    }
    let bits = |model: &str| {
        let file = std::fs::read(place.path(model).join("refit.quantization.json")).unwrap();
        let read: serde_json::Value = serde_json::from_slice(&file).unwrap();
        read["summary"]["bits_per_weight"].as_f64().unwrap()
    };
    assert!(bits("q") < bits("bytes") && bits("bytes") < bits("lorc"));
    // Quantized on the way: the same as quantized before.
    place.run(&["apply", "lorc", "builtin:tiny", "--bits", "3", "-o", "direct"]).code(0);
    let files = ["direct", "lorc"]
        .map(|dir| std::fs::read(place.path(dir).join("model.safetensors")).unwrap());
    assert!(files[0] == files[1]);
}

#[test]
fn exports_carry_the_product_as_an_adapter() {
    let place = Place::new();
    let apply = ["apply", "lorc", "builtin:tiny", "--bits", "4", "--group", "32"];
    place.run(&[&apply[..], &["--dtype", "f32", "-o", "lorc"]].concat()).code(0);
    let found = perplexity(&place, "lorc", &[]);
    for to in ["compressed-tensors", "gptq"] {
        place.run(&["export", "lorc", "--to", to, "-o", to]).code(0);
        let adapter = format!("{to}/lorc");
        near(perplexity(&place, to, &["--adapter", &adapter]), found, 1e-4);
    }
    place.run(&["export", "lorc", "--to", "safetensors", "-o", "dense"]).code(0);
    near(perplexity(&place, "dense", &[]), found, 1e-4);

    // GGUF: codes in the model, factors under llama.cpp's names and in its order of rows.
    place.run(&["export", "lorc", "--to", "gguf", "-o", "gguf"]).code(0);
    let model = Artifact::open(place.path("gguf")).unwrap();
    let source = Artifact::open(place.path("lorc")).unwrap();
    let name = "model.layers.1.self_attn.q_proj.weight";
    assert_eq!(source.read_uncompensated(name).unwrap().unwrap(), model.read_f32(name).unwrap());
    let lora = std::fs::read(place.path("gguf/lorc/lora.gguf")).unwrap();
    let header =
        refit_store::formats::gguf::parse("lora.gguf".as_ref(), &lora, lora.len() as u64).unwrap();
    let text = |key: &str| header.get(key).and_then(|value| value.as_str()).map(str::to_owned);
    assert_eq!(text("general.type").as_deref(), Some("adapter"));
    assert_eq!(text("adapter.type").as_deref(), Some("lora"));
    assert_eq!(header.get("adapter.lora.alpha").unwrap().as_f64(), Some(8.0));
    assert_eq!(header.tensors.len(), 2 * 35);
    let values = |name: &str| {
        let tensor = header.tensors.iter().find(|tensor| tensor.info.name == name).unwrap();
        assert_eq!(tensor.info.dtype, DType::F16, "{name}");
        let bytes = &lora[tensor.offset as usize..][..tensor.info.nbytes as usize];
        let mut out = vec![0.0; tensor.info.numel()];
        refit_store::convert::decode(DType::F16, bytes, &mut out);
        (tensor.info.shape.clone(), out)
    };
    let factors = source.factors(name).unwrap().unwrap();
    let (shape, a) = values("blk.1.attn_q.weight.lora_a");
    assert_eq!((shape[0], &a), (8, &factors.right));
    let (shape, b) = values("blk.1.attn_q.weight.lora_b");
    let heads = source.config().usize("num_attention_heads").unwrap();
    let head = shape[0] / heads;
    for (row, stored) in b.chunks(8).enumerate() {
        // Row 2 j + p of a head is Hugging Face's row p d/2 + j.
        let (at, within) = (row / head * head, row % head);
        let theirs = at + within % 2 * (head / 2) + within / 2;
        assert_eq!(stored, &factors.left[8 * theirs..8 * theirs + 8], "row {row}");
    }
}

#[test]
fn compensations_that_make_no_sense_are_refused() {
    let place = Place::new();
    let cases: [(&[&str], &str); 6] = [
        (&["--rank", "0"], "rank"),
        (&["--rank", "100"], "--allow-large"),
        (&["--factor-bits", "4"], "8 or 16"),
        (&["--aware", "full"], "--text"),
        (&["--quantizer", "gptq"], "--text"),
        (&["--group", "7"], "divisible"),
    ];
    for (flags, word) in cases {
        let args = [&["apply", "lorc", "builtin:tiny", "-o", "no"][..], flags].concat();
        place.run(&args).code(2).says(&[word]);
        assert!(!place.path("no").exists());
    }
    // A model that lost nothing gets nothing, and says so.
    place.run(&["export", "builtin:tiny", "--to", "safetensors", "-o", "copy"]).code(0);
    let args = ["apply", "lorc", "copy", "--base", "builtin:tiny", "-o", "same", "--json"];
    let said = place.run(&args).json()["warnings"].to_string();
    assert!(said.contains("nothing to compensate"), "{said}");
    assert!(!Artifact::open(place.path("same")).unwrap().factored());
    assert!(!place.path("same/lorc").exists());
}

/// A directory's weight file.
fn weights(place: &Place, model: &str) -> Vec<u8> {
    std::fs::read(place.path(model).join("model.safetensors")).unwrap()
}

/// Names of the tensors in it, as they are stored.
fn names(place: &Place, model: &str) -> Vec<String> {
    let bytes = weights(place, model);
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let mut names: Vec<String> = header.as_object().unwrap().keys().cloned().collect();
    names.sort();
    names
}

const LESSON: [&str; 8] = [
    "--data",
    "builtin:kjv-calib",
    "--batch",
    "4",
    "--max-length",
    "64",
    "--learning-rate",
    "1e-3",
];

#[test]
fn a_short_training_towards_the_teacher_repairs_the_pairs() {
    let place = Place::new();
    place.run(&["apply", "svd", "builtin:tiny", "--ratio", "2", "-o", "svd"]).code(0);
    let before = perplexity(&place, "svd", &[]);
    let apply = ["apply", "pela", "builtin:tiny", "--steps", "30", "--text", "builtin:kjv"];
    let made = place.run(&[&apply[..], &LESSON, &["-o", "pela", "--json"]].concat()).json();
    let report = &made["report"];
    let [teacher, untrained, after] = ["before", "untrained", "after"]
        .map(|when| report[format!("held_out_perplexity_{when}")].as_f64().unwrap());
    assert!(teacher < after && after < 0.5 * untrained, "{report}");
    assert!(perplexity(&place, "pela", &[]) < 0.5 * before);
    // The same pairs as the decomposition's, with other values.
    assert_eq!(names(&place, "svd"), names(&place, "pela"));
    assert!(names(&place, "pela").contains(&"model.layers.0.mlp.up_proj.0.weight".to_owned()));
    near(
        perplexity(&place, "pela", &["--weights", "packed"]),
        perplexity(&place, "pela", &[]),
        1e-4,
    );
    // And the teacher is what it was: it is read, not trained.
    let again = [&apply[..], &LESSON, &["-o", "again", "--json"]].concat();
    assert_eq!(
        &place.run(&again).json()["report"]["held_out_perplexity_before"],
        &report["held_out_perplexity_before"]
    );
    assert!(
        weights(&place, "again") == weights(&place, "pela"),
        "the same seed gives the same bytes"
    );

    // Tuned afterwards, pairs stay pairs; methods that pick single matrices refuse them.
    let tune = ["apply", "fine-tune", "pela", "--steps", "3", "-o", "tuned"];
    place.run(&[&tune[..], &LESSON].concat()).code(0);
    assert_eq!(names(&place, "tuned"), names(&place, "pela"));
    assert!(weights(&place, "tuned") != weights(&place, "pela"));
    let tuned = Artifact::open(place.path("tuned")).unwrap();
    assert_eq!(tuned.rank("model.layers.0.mlp.up_proj.weight"), Some(69));
    tuned.check_fit().unwrap();
    let half = ["apply", "hft", "pela", "--steps", "1", "-o", "no"];
    place
        .run(&[&half[..], &LESSON].concat())
        .code(2)
        .says(&["factors already", "--to safetensors"]);
}

#[test]
fn what_does_not_train_is_kept_to_the_byte() {
    let place = Place::new();
    place.run(&["apply", "svd", "builtin:tiny", "--dtype", "f32", "-o", "svd"]).code(0);
    let tune =
        ["apply", "fine-tune", "svd", "--train", "*layernorm*", "--steps", "2", "-o", "tuned"];
    place.run(&[&tune[..], &LESSON].concat()).code(0);
    let [before, after] = ["svd", "tuned"].map(|model| Artifact::open(place.path(model)).unwrap());
    for site in before.architecture().linears() {
        let [old, new] = [&before, &after].map(|model| model.factors(&site.name).unwrap().unwrap());
        assert!(old == new, "{}", site.name);
    }
    let norm = "model.layers.0.input_layernorm.weight";
    assert_ne!(before.read_f32(norm).unwrap(), after.read_f32(norm).unwrap());
}

#[test]
fn losses_that_are_all_off_are_refused() {
    let place = Place::new();
    let apply = ["apply", "pela", "builtin:tiny", "-o", "no"];
    let off = ["--task", "0", "--distill", "0", "--perturbation", "0"];
    place.run(&[&apply[..], &LESSON, &off].concat()).code(2).says(&["nothing to learn"]);
    let negative = ["--epsilon=-1"];
    place.run(&[&apply[..], &LESSON, &negative].concat()).code(2).says(&["epsilon"]);
    assert!(!place.path("no").exists());
}

#[test]
fn every_term_of_the_loss_is_told_apart() {
    let place = Place::new();
    let apply = ["apply", "pela", "builtin:tiny", "--steps", "2", "--ratio", "1.5"];
    let first = |out: &str, flags: &[&str]| {
        let args = [&apply[..], &LESSON, flags, &["-o", out, "--json"]].concat();
        place.run(&args).json()["report"]["first_loss"].as_f64().unwrap()
    };
    let task = first("task", &["--distill", "0", "--perturbation", "0"]);
    let features = first("features", &["--perturbation", "0"]);
    let held = first("held", &["--distill", "0"]);
    let logits = first("logits", &["--distill", "0", "--perturbation", "0", "--logits", "1"]);
    let all = first("all", &["--logits", "1"]);
    assert!(features > task && held > task && logits > task, "{task} {features} {held} {logits}");
    near(all - task, (features - task) + (held - task) + (logits - task), 1e-3);
}
