//! Prefixes, prompts and bottlenecks on a small decoder: what they change, what they leave alone, and that caches see them.

use burn::module::Param;
use burn::tensor::{Device, Tensor, TensorData};
use refit_data::Rng;
use refit_nn::adapt::Lora;
use refit_nn::operator::Linear;
use refit_nn::ops::{self, AttentionSpec};
use refit_nn::scratch::DecoderShape;
use refit_nn::side::{Bottleneck, HeadAdapter, Init, Prefix};
use refit_nn::{Cache, Decoder, Run};

const LAYERS: usize = 2;
const HIDDEN: usize = 16;
const KV: usize = 8;

fn decoder() -> Decoder {
    let shape = DecoderShape {
        hidden: HIDDEN,
        intermediate: 24,
        layers: LAYERS,
        heads: 4,
        kv_heads: 2,
        vocab: 50,
        context: 64,
        tied: true,
    };
    let mut decoder = shape.init(3, &Device::flex()).unwrap();
    // Weights of 0.02 make logits that show nothing.
    for block in &mut decoder.blocks {
        for linear in block.linears_mut() {
            let values = ops::to_vec(&linear.weight()).iter().map(|w| w * 15.0).collect();
            linear.set_weight(values, &Device::flex());
        }
    }
    decoder
}

const IDS: [u32; 12] = [5, 9, 1, 30, 7, 7, 2, 48, 11, 3, 0, 21];

fn logits(decoder: &Decoder) -> Vec<f32> {
    ops::to_vec(&decoder.forward(&IDS, 2, &mut Run::plain()).unwrap())
}

fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn random(shape: [usize; 2], seed: u64) -> Tensor<2> {
    let mut rng = Rng::new(seed);
    let values: Vec<f32> = (0..shape[0] * shape[1]).map(|_| rng.normal() as f32).collect();
    Tensor::from_data(TensorData::new(values, shape), &Device::flex())
}

fn bottleneck(site: &str, outputs: usize, init: Init) -> Bottleneck {
    Bottleneck::new(site, [HIDDEN, 3, outputs], init, &mut Rng::new(8), &Device::flex())
}

fn prefix(tokens: usize) -> Prefix {
    Prefix::from_table(random([tokens, 2 * LAYERS * KV], 4))
}

#[test]
fn fresh_adapters_change_nothing_and_bert_s_init_does() {
    let base = logits(&decoder());
    for sequential in [false, true] {
        for place in 0..3 {
            for (init, changes) in [(Init::Lora, false), (Init::Bert, true)] {
                let mut model = decoder();
                for block in &mut model.blocks {
                    let side =
                        Bottleneck { sequential, scale: 4.0, ..bottleneck("x", HIDDEN, init) };
                    match place {
                        0 => block.mixer.side = Some(side),
                        1 => block.mixer_side = Some(side),
                        _ => block.ffn_side = Some(side),
                    }
                }
                assert_eq!(distance(&base, &logits(&model)) > 0.0, changes, "{place} {init:?}");
            }
        }
    }
    let mut model = decoder();
    for block in &mut model.blocks {
        let adapter = HeadAdapter::new([4, 3, 4], 2.0, &mut Rng::new(1), &Device::flex());
        block.mixer.head_adapter = Some(adapter);
    }
    assert_eq!(distance(&base, &logits(&model)), 0.0);
    model.frame.prefix = Some(prefix(3));
    assert!(distance(&base, &logits(&model)) > 1e-3, "a prefix changes the model from the start");
}

#[test]
fn a_parallel_adapter_without_nonlinearity_is_a_low_rank_update() {
    let side = Bottleneck { activation: None, scale: 0.5, ..bottleneck("x", 10, Init::Bert) };
    let x = random([6, HIDDEN], 2);
    let (a, b) = (side.down.weight(), side.up.weight());
    let wanted = x.clone().matmul(a.transpose()).matmul(b.transpose()) * 0.5;
    let got = side.forward(x.unsqueeze(), &mut Run::plain());
    assert!(distance(&ops::to_vec(&wanted), &ops::to_vec(&got)) < 1e-6);
}

/// The same factors beside a linear and as LoRA on it are the same map.
#[test]
fn a_linear_parallel_adapter_beside_a_linear_is_lora_on_it() {
    let mut plain = Linear::dense("x", random([10, HIDDEN], 5), None);
    let side = Bottleneck { activation: None, scale: 0.5, ..bottleneck("x", 10, Init::Bert) };
    let x = random([6, HIDDEN], 2).unsqueeze::<3>();
    let wanted =
        plain.forward(x.clone(), &mut Run::plain()) + side.forward(x.clone(), &mut Run::plain());
    let mut lora = Lora::init([10, HIDDEN], 3, 0.5, &mut Rng::new(1), &Device::flex());
    (lora.a, lora.b) =
        (Param::from_tensor(side.down.weight()), Param::from_tensor(side.up.weight()));
    assert!(plain.attach(lora, true));
    let got = plain.forward(x, &mut Run::plain());
    assert!(distance(&ops::to_vec(&wanted), &ops::to_vec(&got)) < 1e-5);
}

/// The identity of the card: attention over `[P; K]` is `(1 - λ) Attn(K) + λ softmax(q P_kᵀ) P_v`.
#[test]
fn a_prefix_is_a_gated_sum_of_two_attentions() {
    let (heads, dim, seq, tokens) = (2, 4, 5, 3);
    let width = heads * dim;
    let [q, k, v] = [1, 2, 3].map(|seed| random([seq, width], seed).unsqueeze::<3>());
    let [pk, pv] = [4, 5].map(|seed| random([tokens, width], seed).unsqueeze::<3>());
    for causal in [None, Some(0)] {
        let spec = AttentionSpec {
            heads,
            kv_heads: heads,
            head_dim: dim,
            scale: 0.5,
            causal,
            window: None,
            softcap: None,
            lengths: None,
        };
        let own = ops::attention(q.clone(), k.clone(), v.clone(), &spec);
        let free = AttentionSpec { causal: None, ..spec.clone() };
        let term = ops::attention(q.clone(), pk.clone(), pv.clone(), &free);
        let both = AttentionSpec { causal: causal.map(|at| at + tokens), ..spec };
        let joined = ops::attention(
            q.clone(),
            Tensor::cat(vec![pk.clone(), k.clone()], 1),
            Tensor::cat(vec![pv.clone(), v.clone()], 1),
            &both,
        );
        let (q, k, pk) = (ops::to_vec(&q), ops::to_vec(&k), ops::to_vec(&pk));
        let (own, term, joined) = (ops::to_vec(&own), ops::to_vec(&term), ops::to_vec(&joined));
        for head in 0..heads {
            for row in 0..seq {
                let at = |x: &[f32], i: usize| x[i * width + head * dim..][..dim].to_vec();
                let query = at(&q, row);
                let scores = |keys: &[f32], n: usize| -> Vec<f64> {
                    let dot = |key: Vec<f32>| {
                        query
                            .iter()
                            .zip(key)
                            .map(|(a, b)| f64::from(*a) * f64::from(b))
                            .sum::<f64>()
                    };
                    (0..n).map(|i| 0.5 * dot(at(keys, i))).collect()
                };
                let visible = causal.map_or(seq, |_| row + 1);
                let (ours, theirs) = (scores(&k, visible), scores(&pk, tokens));
                // One shared maximum, as log-sum-exp has it.
                let top = ours.iter().chain(&theirs).copied().fold(f64::NEG_INFINITY, f64::max);
                let mass = |s: &[f64]| s.iter().map(|s| (s - top).exp()).sum::<f64>();
                let lambda = mass(&theirs) / (mass(&ours) + mass(&theirs));
                for i in 0..dim {
                    let j = row * width + head * dim + i;
                    let gated = (1.0 - lambda) * f64::from(own[j]) + lambda * f64::from(term[j]);
                    assert!((gated - f64::from(joined[j])).abs() < 1e-5, "{causal:?} {j}");
                }
            }
        }
    }
}

#[test]
fn a_head_adapter_with_softmax_is_the_ungated_prefix_term() {
    let (heads, dim, rank) = (4, 4, 3);
    let mut adapter = HeadAdapter::new([heads, rank, dim], 1.0, &mut Rng::new(1), &Device::flex());
    adapter.values = Param::from_tensor(random([heads * rank, dim], 9).reshape([heads, rank, dim]));
    adapter.softmax = true;
    let q = random([5, heads * dim], 2).unsqueeze::<3>();
    let per_token = |x: &Param<Tensor<3>>| x.val().swap_dims(0, 1).reshape([1, rank, heads * dim]);
    let spec = AttentionSpec {
        heads,
        kv_heads: heads,
        head_dim: dim,
        scale: 0.5,
        causal: None,
        window: None,
        softcap: None,
        lengths: None,
    };
    let (keys, values) = (per_token(&adapter.keys), per_token(&adapter.values));
    let wanted = ops::attention(q.clone(), keys, values, &spec);
    let got = adapter.forward(q, 0.5);
    assert!(distance(&ops::to_vec(&wanted), &ops::to_vec(&got)) < 1e-5);
}

#[test]
fn folding_a_prefix_keeps_its_logits() {
    let mut model = decoder();
    let net = Prefix::new(3, LAYERS, KV, [HIDDEN, 20], &mut Rng::new(6), &Device::flex());
    model.frame.prefix = Some(net.clone());
    let trained = logits(&model);
    model.frame.prefix = Some(net.fold());
    assert!(net.net.is_some() && model.frame.prefix.as_ref().is_some_and(|p| p.net.is_none()));
    assert!(distance(&trained, &logits(&model)) < 1e-6);
}

#[test]
fn virtual_tokens_reach_the_cache() {
    let with_prefix = {
        let mut model = decoder();
        model.frame.prefix = Some(prefix(3));
        model
    };
    let with_prompt = {
        let mut model = decoder();
        model.frame.prompt = Some(Param::from_tensor(random([4, HIDDEN], 7)));
        model
    };
    for model in [with_prefix, with_prompt] {
        let whole = ops::to_vec(&model.forward(&IDS, 1, &mut Run::plain()).unwrap());
        assert_eq!(whole.len(), IDS.len() * 50, "one row of logits per id");
        let mut cache = Cache::new();
        let mut stepwise = Vec::new();
        for piece in [&IDS[..5], &IDS[5..6], &IDS[6..]] {
            let part = model.forward(piece, 1, &mut Run::cached(&mut cache)).unwrap();
            stepwise.extend(ops::to_vec(&part));
        }
        assert_eq!(cache.len(), IDS.len() + model.frame.virtual_tokens());
        assert!(distance(&whole, &stepwise) < 1e-4);
        let long: Vec<u32> = vec![1; 64];
        let error = model.forward(&long, 1, &mut Run::plain()).unwrap_err().to_string();
        assert!(error.contains("64"), "virtual tokens take positions: {error}");
    }
}
