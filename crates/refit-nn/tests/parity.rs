//! Every family of models against transformers: small random models with their outputs, written by `scripts/fixtures/tiny_models.py`.

use std::path::PathBuf;

use burn::tensor::{Tensor, TensorData};
use refit_nn::{BurnDevice as Device, Cache, Decoder, Encoder, Run, ops, vision::Vision};
use refit_store::artifact::Artifact;

fn fixture(name: &str) -> (Artifact, Artifact) {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/hf").join(name);
    let open =
        |path: PathBuf| Artifact::open(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    (open(dir.clone()), open(dir.join("expected.safetensors")))
}

fn ids(expected: &Artifact) -> Vec<u32> {
    expected.read_f32("input_ids").expect("fixture").iter().map(|&x| x as u32).collect()
}

fn worst(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Like [`worst`], relative to the largest value where that exceeds 1.
fn worst_relative(found: &[f32], expected: &[f32]) -> f32 {
    worst(found, expected) / expected.iter().fold(1.0, |largest: f32, x| largest.max(x.abs()))
}

/// Logits and residual stream after each block, all at once and token by token with a cache.
fn decoder(name: &str) {
    let (artifact, expected) = fixture(name);
    let device = Device::flex();
    let model = Decoder::load(&artifact, &device).unwrap_or_else(|e| panic!("{name}: {e}"));
    let ids = ids(&expected);
    let mut stream = Vec::new();
    let mut watch = |tap: &str, x: Tensor<3>| {
        if tap == "layers.1.resid.pre" {
            stream = ops::to_vec(&x);
        }
        x
    };
    let logits = ops::to_vec(&model.forward(&ids, 1, &mut Run::tapped(&mut watch)).expect("runs"));
    let want = expected.read_f32("logits").expect("fixture");
    let error = worst(&logits, &want);
    assert!(error < 2e-5, "{name}: logits differ by {error}");
    let error = worst_relative(&stream, &expected.read_f32("hidden_states.1").expect("fixture"));
    assert!(error < 2e-5, "{name}: the stream after block 0 differs by {error}");

    let mut cache = Cache::new();
    let vocab = model.config().vocab;
    for (i, chunk) in [&ids[..10], &ids[10..11], &ids[11..]].into_iter().enumerate() {
        let at = cache.len();
        let logits =
            ops::to_vec(&model.forward(chunk, 1, &mut Run::cached(&mut cache)).expect("runs"));
        let error = worst(&logits, &want[at * vocab..(at + chunk.len()) * vocab]);
        assert!(error < 2e-5, "{name}: cached logits of chunk {i} differ by {error}");
    }
    // Rolling back and going on again changes nothing.
    cache.truncate(12);
    let logits =
        ops::to_vec(&model.next(&ids[12..13], 1, &mut Run::cached(&mut cache)).expect("runs"));
    assert!(worst(&logits, &want[12 * vocab..13 * vocab]) < 2e-5, "{name}: after truncate");
}

macro_rules! decoders {
    ($($test:ident: $name:literal),* $(,)?) => { $(#[test] fn $test() { decoder($name); })* };
}

decoders! {
    llama: "llama", llama_tied: "llama-tied", llama_bias: "llama-bias", llama_rope_linear: "llama-rope-linear",
    llama_rope_llama3: "llama-rope-llama3", mistral: "mistral", qwen2: "qwen2", qwen3: "qwen3", gemma2: "gemma2",
    phi3: "phi3", gpt2: "gpt2", gpt_neox: "gpt-neox", opt: "opt",
}

/// Hidden states of two rows of different length.
fn encoder(name: &str) {
    let (artifact, expected) = fixture(name);
    let model = Encoder::load(&artifact, &Device::flex()).unwrap_or_else(|e| panic!("{name}: {e}"));
    let ids = ids(&expected);
    let mask = expected.read_f32("attention_mask").expect("fixture");
    let longest = ids.len() / 2;
    let rows = |ids: &[u32]| -> Vec<Vec<u32>> {
        let length = |row| mask[row * longest..(row + 1) * longest].iter().sum::<f32>() as usize;
        (0..2).map(|row| ids[row * longest..row * longest + length(row)].to_vec()).collect()
    };
    let sequences = rows(&ids);
    let types = expected.contains("token_type_ids").then(|| {
        let types = expected.read_f32("token_type_ids").expect("fixture");
        rows(&types.iter().map(|&t| t as u32).collect::<Vec<_>>())
    });
    let hidden =
        model.forward_segments(&sequences, types.as_deref(), &mut Run::plain()).expect("runs");
    let [_, seq, width] = hidden.dims();
    let found = ops::to_vec(&hidden);
    let want = expected.read_f32("last_hidden_state").expect("fixture");
    for (row, sequence) in sequences.iter().enumerate() {
        let n = sequence.len() * width;
        let error = worst(&found[row * seq * width..][..n], &want[row * longest * width..][..n]);
        assert!(error < 2e-5, "{name}: row {row} differs by {error}");
    }
}

#[test]
fn bert() {
    encoder("bert");
}

#[test]
fn roberta() {
    encoder("roberta");
}

#[test]
fn distilbert() {
    encoder("distilbert");
}

#[test]
fn vit() {
    let (artifact, expected) = fixture("vit");
    let device = Device::flex();
    let model = Vision::load(&artifact, &device).expect("loads");
    let pixels =
        TensorData::new(expected.read_f32("pixel_values").expect("fixture"), [1, 3, 32, 32]);
    let logits =
        model.forward(Tensor::from_data(pixels, &device), &mut Run::plain()).expect("runs");
    let error = worst(&ops::to_vec(&logits), &expected.read_f32("logits").expect("fixture"));
    assert!(error < 2e-5, "logits differ by {error}");
}

#[test]
fn a_model_without_a_forward_pass_is_refused_by_name() {
    let (artifact, _) = fixture("mixtral");
    let error = Decoder::load(&artifact, &Device::flex())
        .expect_err("mixtral has no forward pass")
        .to_string();
    assert!(error.contains("mixtral") && error.contains("llama"), "{error}");
}

#[test]
fn bad_inputs_are_errors() {
    let (artifact, _) = fixture("llama");
    let model = Decoder::load(&artifact, &Device::flex()).expect("loads");
    let context = model.config().context;
    let fails = |ids: &[u32], batch: usize| {
        model.forward(ids, batch, &mut Run::plain()).expect_err("bad input").to_string()
    };
    assert!(fails(&[1, 64], 1).contains("token id 64"));
    assert!(fails(&vec![1; context + 1], 1).contains("context"));
    assert!(fails(&[], 1).contains("tokens"));
    assert!(fails(&[1, 2, 3], 2).contains("rows"));
}
