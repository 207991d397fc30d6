//! Evaluation, calibration and differential testing on tiny random models saved by transformers.

use std::path::PathBuf;

use burn::tensor::{Device, Tensor};
use refit_nn::block::Block;
use refit_nn::{Decoder, Encoder, Model, Run, ops};
use refit_store::artifact::Artifact;
use refit_train::calibrate::{self, BlockStats, Order, Outcome, Visitor};
use refit_train::differential::{self, Keep, Tolerance, Trace};
use refit_train::eval::{self, Reference, ReferenceCache, Segment};
use refit_train::observe::{ColumnStats, StatsRequest};
use refit_train::rng::SplitMix64;
use refit_train::{Error, Result};

const DECODERS: [&str; 5] = ["llama", "gpt2", "qwen3", "gemma2", "gpt-neox"];

fn fixture(name: &str) -> Artifact {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../refit-nn/tests/fixtures/hf");
    Artifact::open(root.join(name)).expect("the fixture opens")
}

fn decoder(name: &str) -> Decoder {
    Decoder::load(&fixture(name), &Device::flex()).expect("the fixture loads")
}

/// Ids that every fixture knows.
fn ids(n: usize, seed: u64) -> Vec<u32> {
    let mut rng = SplitMix64::new(seed);
    (0..n).map(|_| rng.below(64) as u32).collect()
}

fn quiet(_: u64, _: u64) {}

mod perplexity {
    use super::*;

    fn options(window: usize) -> eval::Options {
        eval::Options { window: Some(window), ..eval::Options::default() }
    }

    /// The definition, in f64, from whole logits.
    fn by_definition(model: &Decoder, ids: &[u32], window: usize) -> (f64, usize) {
        let (mut sum, mut count) = (0.0, 0);
        for window in ids.chunks(window).filter(|w| w.len() > 1) {
            let logits = model.forward(window, 1, &mut Run::plain()).unwrap();
            let vocab = logits.dims()[2];
            let logits = ops::to_vec(&logits);
            for (row, &target) in logits.chunks_exact(vocab).zip(&window[1..]) {
                let total: f64 = row.iter().map(|&z| f64::from(z).exp()).sum();
                sum += total.ln() - f64::from(row[target as usize]);
                count += 1;
            }
        }
        (sum / count as f64, count)
    }

    #[test]
    fn equals_its_definition() {
        for name in DECODERS {
            let model = decoder(name);
            let ids = ids(150, 1);
            let text = [Segment::new("all", ids.clone())];
            let found =
                eval::perplexity(&model, &text, &options(32), Reference::None, &quiet).unwrap();
            let (nll, tokens) = by_definition(&model, &ids, 32);
            assert_eq!(found.tokens, tokens);
            assert!((found.nll - nll).abs() < 1e-5, "{name}: {} for {nll}", found.nll);
            assert!(found.tokens_per_second > 0.0);
        }
    }

    #[test]
    fn a_cached_reference_gives_the_same_bits_as_a_live_one() {
        let (model, reference) = (decoder("llama"), decoder("llama-tied"));
        let text = [Segment::new("a", ids(70, 2)), Segment::new("b", ids(33, 3))];
        let options = options(24);
        let run = |reference: Reference| {
            eval::perplexity(&model, &text, &options, reference, &quiet).unwrap()
        };
        let live = run(Reference::Model(&reference));
        let cache = ReferenceCache::fill(&reference, &text, &options).unwrap();
        drop(reference);
        let cached = run(Reference::Cache(&cache));
        assert_eq!(live.kl_to_reference, cached.kl_to_reference);
        assert_eq!(live.domains, cached.domains);
        assert!(live.kl_to_reference.unwrap() > 0.0);
        let own = run(Reference::Model(&model));
        assert_eq!((own.kl_to_reference, own.top1_agreement), (Some(0.0), Some(1.0)));

        let other = [Segment::new("a", ids(70, 9)), Segment::new("b", ids(33, 3))];
        let stale = eval::perplexity(&model, &other, &options, Reference::Cache(&cache), &quiet);
        assert!(matches!(stale, Err(Error::StaleReference)));
    }

    #[test]
    fn tokens_outside_the_vocabulary_are_an_error() {
        let text = [Segment::new("all", vec![1, 2, 1_000_000])];
        let found =
            eval::perplexity(&decoder("llama"), &text, &options(8), Reference::None, &quiet);
        assert!(matches!(found, Err(Error::Model(refit_nn::Error::Token { id: 1_000_000, .. }))));
    }

    #[test]
    fn a_nan_weight_is_found_at_a_position() {
        let mut model = decoder("llama");
        let linear = model.blocks[1].linears_mut().pop().unwrap();
        let [out, inner] = linear.weight().dims();
        linear.set_weight(vec![f32::NAN; out * inner], &Device::flex());
        let text = [Segment::new("all", ids(20, 1))];
        let found = eval::perplexity(&model, &text, &options(8), Reference::None, &quiet);
        assert!(matches!(found, Err(Error::Logits { window: 0, position: 0, .. })));
    }
}

mod calibration {
    use super::*;

    fn options(request: StatsRequest) -> calibrate::Options {
        calibrate::Options::new(request)
    }

    /// Inputs of one site of a whole model, observed sequence by sequence.
    fn tapped(
        model: &Decoder,
        site: &str,
        sequences: &[Vec<u32>],
        request: StatsRequest,
    ) -> ColumnStats {
        let mut stats: Option<ColumnStats> = None;
        for ids in sequences {
            let mut tap = |name: &str, value: Tensor<3>| {
                if name.strip_suffix(":in") == Some(site) {
                    let width = value.dims()[2];
                    let stats = stats.get_or_insert_with(|| ColumnStats::new(width, request));
                    stats.observe(&ops::to_vec(&value)).unwrap();
                }
                value
            };
            model.forward(ids, 1, &mut Run::tapped(&mut tap)).unwrap();
            stats.as_mut().unwrap().end_sequence();
        }
        stats.unwrap()
    }

    fn halve(block: &mut Block) {
        for linear in block.linears_mut() {
            let halved = ops::to_vec(&linear.weight()).iter().map(|w| w * 0.5).collect();
            linear.set_weight(halved, &Device::flex());
        }
    }

    fn near(a: &[f64], b: &[f64]) {
        assert_eq!(a.len(), b.len());
        let scale = b.iter().fold(0.0f64, |m, x| m.max(x.abs()));
        for (x, y) in a.iter().zip(b) {
            assert!((x - y).abs() <= 1e-5 * scale, "{x} for {y}");
        }
    }

    #[test]
    fn sees_what_the_whole_changed_prefix_produces() {
        let request = StatsRequest::GRAM | StatsRequest::SUM | StatsRequest::VARIANCE;
        let sequences = vec![ids(20, 1), ids(13, 2), ids(20, 3)];
        for name in DECODERS {
            let artifact = fixture(name);
            let mut whole = decoder(name);
            let mut visits = 0;
            let summary = calibrate::run(
                &artifact,
                &sequences,
                &options(request),
                &mut |index: usize, block: &mut Block, stats: &BlockStats| -> Result<Outcome> {
                    visits += 1;
                    assert_eq!(stats.sites().count(), block.linears().len());
                    for (site, seen) in stats.sites() {
                        let expected = tapped(&whole, site, &sequences, request);
                        assert_eq!((seen.rows(), seen.sequences()), (53, 3));
                        near(&seen.gram().unwrap(), &expected.gram().unwrap());
                        near(&seen.sequence_mean_sum(), &expected.sequence_mean_sum());
                        near(&seen.within_variance(), &expected.within_variance());
                    }
                    assert!(stats.cosine.unwrap().abs() <= 1.0 + 1e-9);
                    halve(block);
                    halve(&mut whole.blocks[index]);
                    Ok(Outcome::Changed)
                },
                &quiet,
            )
            .unwrap();
            assert_eq!((visits, summary.blocks, summary.tokens), (2, 2, 53), "{name}");
            // 53 tokens cannot fill the Hessian of a wider site, and that must be said.
            let singular = |w: &String| w.contains("Hessian is singular");
            assert!(summary.warnings.iter().all(singular), "{:?}", summary.warnings);
        }
    }

    #[test]
    fn within_a_block_later_groups_see_earlier_changes() {
        let artifact = fixture("llama");
        let sequences = vec![ids(24, 4)];
        let mut whole = decoder("llama");
        let mut seen_sites = Vec::new();
        let options =
            calibrate::Options { order: Order::WithinBlock, ..options(StatsRequest::SUM_SQUARES) };
        calibrate::run(
            &artifact,
            &sequences,
            &options,
            &mut |_: usize, block: &mut Block, stats: &BlockStats| -> Result<Outcome> {
                assert_eq!((stats.groups().len(), stats.cosine), (1, None));
                for (site, seen) in stats.sites() {
                    let expected = tapped(&whole, site, &sequences, StatsRequest::SUM_SQUARES);
                    near(seen.sum_squares(), expected.sum_squares());
                }
                for (site, _) in stats.sites() {
                    for linear in [block.linear_mut(site).unwrap(), whole.linear_mut(site).unwrap()]
                    {
                        let halved =
                            ops::to_vec(&linear.weight()).iter().map(|w| w * 0.5).collect();
                        linear.set_weight(halved, &Device::flex());
                    }
                    seen_sites.push(site.to_string());
                }
                Ok(Outcome::Changed)
            },
            &quiet,
        )
        .unwrap();
        assert_eq!(seen_sites.len(), 14);
        assert!(seen_sites[0].ends_with("q_proj") && seen_sites[6].ends_with("down_proj"));
    }

    /// Halves every block; knows the blocks that an earlier run finished.
    struct Halver {
        finished: usize,
        norms: Vec<Vec<f64>>,
    }

    impl Visitor for Halver {
        type Error = Error;

        fn restore(&mut self, index: usize, block: &mut Block) -> Result<bool> {
            if index < self.finished {
                halve(block);
            }
            Ok(index < self.finished)
        }

        fn visit(&mut self, _: usize, block: &mut Block, stats: &BlockStats) -> Result<Outcome> {
            self.norms.extend(stats.groups().iter().map(|g| g.stats.norms()));
            halve(block);
            Ok(Outcome::Changed)
        }
    }

    #[test]
    fn a_resumed_run_sees_the_same_bits() {
        let artifact = fixture("llama");
        let sequences = vec![ids(20, 1), ids(20, 2)];
        let run = |finished| {
            let mut halver = Halver { finished, norms: Vec::new() };
            let options = options(StatsRequest::SUM_SQUARES);
            let summary =
                calibrate::run(&artifact, &sequences, &options, &mut halver, &quiet).unwrap();
            assert_eq!(summary.restored, finished);
            halver.norms
        };
        let (all, rest) = (run(0), run(1));
        assert_eq!(all[4..], rest[..]);
    }

    #[test]
    fn an_unchanged_block_costs_no_second_run_and_changes_nothing() {
        let artifact = fixture("llama");
        let sequences = vec![ids(20, 1)];
        let run = |outcome| {
            let mut norms = Vec::new();
            let options = options(StatsRequest::SUM_SQUARES);
            calibrate::run(
                &artifact,
                &sequences,
                &options,
                &mut |_: usize, _: &mut Block, stats: &BlockStats| -> Result<Outcome> {
                    norms.extend(stats.groups().iter().map(|g| g.stats.norms()));
                    Ok(outcome)
                },
                &quiet,
            )
            .unwrap();
            norms
        };
        assert_eq!(run(Outcome::Unchanged), run(Outcome::Changed));
    }

    #[test]
    fn encoders_are_streamed_too() {
        for name in ["bert", "roberta", "distilbert"] {
            let artifact = fixture(name);
            let encoder = Encoder::load(&artifact, &Device::flex()).unwrap();
            let sequences = vec![ids(12, 1), ids(7, 2)];
            let mut widths = Vec::new();
            calibrate::run(
                &artifact,
                &sequences,
                &options(StatsRequest::SUM_SQUARES),
                &mut |_: usize, _: &mut Block, stats: &BlockStats| -> Result<Outcome> {
                    for (site, seen) in stats.sites() {
                        let mut expected = ColumnStats::new(seen.columns(), seen.request());
                        for ids in &sequences {
                            let mut tap = |name: &str, value: Tensor<3>| {
                                if name.strip_suffix(":in") == Some(site) {
                                    expected.observe(&ops::to_vec(&value)).unwrap();
                                }
                                value
                            };
                            let ids = std::slice::from_ref(ids);
                            encoder.forward(ids, &mut Run::tapped(&mut tap)).unwrap();
                        }
                        near(seen.sum_squares(), expected.sum_squares());
                        widths.push(seen.columns());
                    }
                    Ok(Outcome::Unchanged)
                },
                &quiet,
            )
            .unwrap();
            assert_eq!(widths.len(), 12, "{name}");
        }
    }

    fn failure(sequences: &[Vec<u32>], spoil: bool) -> Error {
        let artifact = fixture("llama");
        calibrate::run(
            &artifact,
            sequences,
            &options(StatsRequest::SUM),
            &mut |_: usize, block: &mut Block, _: &BlockStats| -> Result<Outcome> {
                if spoil {
                    let linear = block.linears_mut().pop().unwrap();
                    let [out, inner] = linear.weight().dims();
                    linear.set_weight(vec![f32::INFINITY; out * inner], &Device::flex());
                }
                Ok(Outcome::Changed)
            },
            &quiet,
        )
        .unwrap_err()
    }

    #[test]
    fn bad_input_is_named() {
        assert!(matches!(failure(&[], false), Error::EmptyCalibration { .. }));
        assert!(matches!(failure(&[vec![1], vec![]], false), Error::EmptyCalibration { .. }));
        let long = failure(&[ids(5, 1), ids(65, 1)], false);
        assert!(matches!(long, Error::SequenceTooLong { sequence: 1, tokens: 65, context: 64 }));
        let broken = failure(&[ids(5, 1)], true);
        assert!(
            matches!(&broken, Error::Activation { site, .. } if site.contains("block 0")),
            "{broken}"
        );
        let vision = calibrate::run(
            &fixture("vit"),
            &[ids(5, 1)],
            &options(StatsRequest::SUM),
            &mut |_: usize, _: &mut Block, _: &BlockStats| -> Result<Outcome> {
                Ok(Outcome::Unchanged)
            },
            &quiet,
        );
        assert!(matches!(vision, Err(Error::NotCalibratable { .. })));
    }

    #[test]
    fn too_few_tokens_for_a_hessian_are_a_warning() {
        let summary = calibrate::run(
            &fixture("llama"),
            &[ids(5, 1)],
            &options(StatsRequest::GRAM),
            &mut |_: usize, _: &mut Block, _: &BlockStats| -> Result<Outcome> {
                Ok(Outcome::Unchanged)
            },
            &quiet,
        )
        .unwrap();
        assert_eq!(summary.warnings.len(), 1);
        assert!(summary.warnings[0].contains("singular"), "{:?}", summary.warnings);
    }
}

mod differences {
    use super::*;

    const TOLERANCE: Tolerance = Tolerance::Relative(1e-4);

    fn probes() -> Vec<Vec<u32>> {
        vec![ids(16, 1), ids(9, 2)]
    }

    #[test]
    fn every_model_equals_itself() {
        let device = Device::flex();
        for name in DECODERS.into_iter().chain(["bert", "roberta", "distilbert"]) {
            let load = || Model::load(&fixture(name), &device).unwrap();
            let found = differential::compare(&load(), &load(), &probes(), TOLERANCE).unwrap();
            assert!(found.equal && found.origins.is_empty(), "{name}");
            assert!(found.only_model.is_empty() && found.only_reference.is_empty());
            assert!(found.activations.len() > 20, "{name}");
        }
    }

    #[test]
    fn a_changed_weight_is_reported_at_its_site_and_nowhere_else() {
        for name in DECODERS {
            let reference = decoder(name);
            let count = reference.blocks[1].linears().len();
            for at in 0..count {
                let mut model = decoder(name);
                let linear = model.blocks[1].linears_mut().swap_remove(at);
                let site = linear.site.clone();
                let inner = linear.weight().dims()[1];
                let mut values = ops::to_vec(&linear.weight());
                values[..inner].iter_mut().for_each(|w| *w = 1.0 - *w);
                linear.set_weight(values, &Device::flex());
                let found =
                    differential::compare(&model, &reference, &probes(), TOLERANCE).unwrap();
                let first = found.first.expect("the fault shows");
                assert_eq!(first.name, format!("{site}:out"), "{name}");
                assert_eq!(found.origins.len(), 1, "{name}: {:?}", found.origins);
            }
        }
    }

    #[test]
    fn faults_of_the_code_are_told_apart() {
        let reference = decoder("llama");
        let check = |model: Decoder, name: &str, word: &str| {
            let found = differential::compare(&model, &reference, &probes(), TOLERANCE).unwrap();
            let first = found.first.expect("the fault shows");
            assert!(first.name.contains(name), "{first:?}");
            assert!(first.suspect.contains(word), "{first:?}");
        };
        let mut model = decoder("llama");
        model.blocks[0].mixer_norm.eps = 0.5;
        check(model, "layers.0.self_attn.q_proj:in", "norm");
        let mut model = decoder("llama");
        model.blocks[1].mixer.spec.scale *= 3.0;
        check(model, "layers.1.self_attn.o_proj:in", "attention");
        let mut model = decoder("llama");
        model.frame.norm.eps = 0.5;
        check(model, "lm_head:in", "final norm");
    }

    #[test]
    fn a_golden_trace_serves_as_reference() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("golden.safetensors");
        let model = decoder("gpt2");
        Trace::record(&model, &probes(), Keep::Residual).unwrap().save(&path).unwrap();
        let trace = Trace::load(&path).unwrap();
        assert!(differential::compare_with_trace(&model, &trace, TOLERANCE).unwrap().equal);
        let mut broken = decoder("gpt2");
        broken.blocks[1].ffn_norm.eps = 0.5;
        let found = differential::compare_with_trace(&broken, &trace, TOLERANCE).unwrap();
        assert_eq!(found.first.unwrap().name, "layers.1.resid.post");
    }
}
