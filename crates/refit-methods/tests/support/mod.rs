//! A tiny model on disk.

#![allow(dead_code, missing_docs)]

use std::path::{Path, PathBuf};

use refit_methods::method::{Context, Inputs, ModelInput, Output, Plan};
use refit_methods::registry;
use refit_store::writer::ArtifactWriter;
use refit_store::{Artifact, Card, DType, Lineage, SideFile, TensorSpec, WritePlan};
use serde_json::{Value, json};

pub const HIDDEN: usize = 96;
pub const FFN: usize = 192;
pub const LAYERS: usize = 2;

/// SplitMix64, summed to something bell-shaped.
pub struct Stream(u64);

impl Stream {
    pub fn new(seed: u64) -> Self {
        Self(seed ^ 0x5851_f42d_4c95_7f2d)
    }

    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn normal(&mut self) -> f32 {
        let sum: f64 = (0..6).map(|_| (self.bits() >> 11) as f64 / (1u64 << 53) as f64).sum();
        ((sum - 3.0) * 0.1) as f32
    }
}

pub fn shapes() -> Vec<(String, Vec<usize>)> {
    let mut all = vec![
        ("model.embed_tokens.weight".to_owned(), vec![40, HIDDEN]),
        ("model.norm.weight".to_owned(), vec![HIDDEN]),
    ];
    for layer in 0..LAYERS {
        let mut add = |name: &str, shape: &[usize]| {
            all.push((format!("model.layers.{layer}.{name}.weight"), shape.to_vec()));
        };
        add("self_attn.q_proj", &[HIDDEN, HIDDEN]);
        add("self_attn.k_proj", &[HIDDEN / 2, HIDDEN]);
        add("self_attn.v_proj", &[HIDDEN / 2, HIDDEN]);
        add("self_attn.o_proj", &[HIDDEN, HIDDEN]);
        add("mlp.gate_proj", &[FFN, HIDDEN]);
        add("mlp.up_proj", &[FFN, HIDDEN]);
        add("mlp.down_proj", &[HIDDEN, FFN]);
        add("input_layernorm", &[HIDDEN]);
        add("post_attention_layernorm", &[HIDDEN]);
    }
    all
}

pub fn config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": FFN, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 40, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true,
        "hidden_act": "silu",
    })
}

/// Writes a model with random weights, changed by `edit(name, values)`.
pub fn model(
    dir: &Path,
    seed: u64,
    dtype: DType,
    mut edit: impl FnMut(&str, &mut Vec<f32>),
) -> PathBuf {
    let specs: Vec<TensorSpec> =
        shapes().into_iter().map(|(name, shape)| TensorSpec { name, shape, dtype }).collect();
    let plan = WritePlan {
        tensors: specs.clone(),
        side_files: vec![SideFile::from_bytes("config.json", config().to_string().into_bytes())],
        identity: format!("fixture {seed}"),
        force: true,
        ..WritePlan::default()
    };
    let writer = ArtifactWriter::create(dir, plan).unwrap();
    for spec in specs {
        let mut stream = Stream::new(spec.name.len() as u64 * 31 + seed);
        let count = spec.shape.iter().product();
        let mut values: Vec<f32> = (0..count).map(|_| stream.normal()).collect();
        edit(&spec.name, &mut values);
        let bytes: Vec<u8> = match dtype {
            DType::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            DType::BF16 => {
                values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect()
            }
            other => panic!("no fixture of type {other}"),
        };
        writer.write_raw(&spec.name, 0, &bytes).unwrap();
        writer.done(&spec.name).unwrap();
    }
    writer.finish(Lineage::new("fixture", json!({})), Card::new("fixture")).unwrap()
}

pub fn inputs(paths: &[&Path]) -> Inputs {
    let models = paths.iter().map(|path| {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        ModelInput::open(name, path).unwrap()
    });
    Inputs { models: models.collect(), ..Inputs::default() }
}

pub fn plan(method: &str, parameters: Value, inputs: &Inputs) -> refit_methods::Result<Plan> {
    registry::get(method)?.from_value(&parameters)?.plan(inputs)
}

pub fn apply(
    method: &str,
    parameters: Value,
    inputs: &Inputs,
    out: &Path,
    threads: usize,
) -> refit_methods::Result<Output> {
    let configured = registry::get(method)?.from_value(&parameters)?;
    let plan = configured.plan(inputs)?;
    let mut cx = Context { threads, ..Context::new(out) };
    configured.run(inputs, &plan, &mut cx)
}

/// Bytes of a file of an output.
pub fn bytes(dir: &Path, name: &str) -> Vec<u8> {
    std::fs::read(dir.join(name)).unwrap()
}

/// Values of a tensor.
pub fn tensor(dir: &Path, name: &str) -> Vec<f32> {
    Artifact::open(dir).unwrap().read_f32(name).unwrap()
}
