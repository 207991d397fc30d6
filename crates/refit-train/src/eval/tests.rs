use super::*;
use burn::tensor::{Device, TensorData};

/// A bigram model: the hidden state of a position is its token, the head looks a row up.
struct Bigram {
    rows: Vec<Vec<f32>>,
}

impl Head for Bigram {
    fn vocab(&self) -> usize {
        self.rows[0].len()
    }

    fn with_logits(&self, hidden: &Tensor<3>, positions: Range<usize>, f: &mut dyn FnMut(&[f32])) {
        let tokens = ops::to_vec(hidden);
        let logits: Vec<f32> =
            tokens[positions].iter().flat_map(|&t| self.rows[t as usize].clone()).collect();
        f(&logits);
    }
}

impl CausalLm for Bigram {
    fn context(&self) -> usize {
        16
    }

    fn hidden(&self, ids: &[u32]) -> Result<Tensor<3>> {
        let values: Vec<f32> = ids.iter().map(|&id| id as f32).collect();
        Ok(Tensor::from_data(TensorData::new(values, [1, ids.len(), 1]), &Device::flex()))
    }

    fn head(&self) -> &dyn Head {
        self
    }
}

fn uniform(vocab: usize) -> Bigram {
    Bigram { rows: vec![vec![0.0; vocab]; vocab] }
}

/// Knows that token t is followed by t + 1.
fn successor(vocab: usize, confidence: f32) -> Bigram {
    let row =
        |t: usize| (0..vocab).map(move |j| if j == (t + 1) % vocab { confidence } else { 0.0 });
    Bigram { rows: (0..vocab).map(|t| row(t).collect()).collect() }
}

fn options(window: usize) -> Options {
    Options { window: Some(window), ..Options::default() }
}

fn quiet(_: u64, _: u64) {}

#[test]
fn a_uniform_model_has_the_perplexity_of_its_vocabulary() {
    let text = [Segment::new("all", (0..23).map(|i| i % 5).collect())];
    let result = perplexity(&uniform(5), &text, &options(10), Reference::None, &quiet).unwrap();
    assert!((result.perplexity - 5.0).abs() < 1e-6);
    // Windows of 10, 10 and 3: each scores all but its first token.
    assert_eq!(result.tokens, 9 + 9 + 2);
    assert_eq!(result.windows.iter().map(|w| w.tokens).collect::<Vec<_>>(), [9, 9, 2]);
    assert_eq!(result.kl_to_reference, None);
    assert!(result.domains.is_empty() && result.interval.is_some());
}

#[test]
fn a_last_window_of_one_token_is_left_out() {
    let text = [Segment::new("all", vec![0; 11])];
    let result = perplexity(&uniform(4), &text, &options(5), Reference::None, &quiet).unwrap();
    assert_eq!(result.tokens, 8);
    let limited = Options { max_tokens: Some(7), ..options(5) };
    assert_eq!(
        perplexity(&uniform(4), &text, &limited, Reference::None, &quiet).unwrap().tokens,
        5
    );
}

#[test]
fn divergence_to_a_reference_is_exact_and_domains_are_kept_apart() {
    let (model, reference) = (uniform(4), successor(4, 2.0));
    let text = [Segment::new("up", vec![0, 1, 2, 3, 0, 1]), Segment::new("flat", vec![2, 2, 2])];
    let result =
        perplexity(&model, &text, &options(16), Reference::Model(&reference), &quiet).unwrap();
    let z = 2f64.exp() + 3.0;
    let (top, rest) = (2f64.exp() / z, 1.0 / z);
    let expected = top * (top * 4.0).ln() + 3.0 * rest * (rest * 4.0).ln();
    assert!((result.kl_to_reference.unwrap() - expected).abs() < 1e-6);
    assert_eq!(result.domains.len(), 2);
    assert_eq!((result.domains[0].tokens, result.domains[1].tokens), (5, 2));

    let own =
        perplexity(&reference, &text, &options(16), Reference::Model(&reference), &quiet).unwrap();
    assert_eq!(own.kl_to_reference, Some(0.0));
    assert_eq!(own.top1_agreement, Some(1.0));
    assert!((own.top1_accuracy - 5.0 / 7.0).abs() < 1e-12);
    assert!((own.domains[0].nll + top.ln()).abs() < 1e-6);
}

#[test]
fn bad_input_is_an_error_that_says_where() {
    let text = [Segment::new("all", vec![0, 1, 2])];
    let run = |model: &Bigram, text: &[Segment], window, reference| {
        perplexity(model, text, &options(window), reference, &quiet).unwrap_err()
    };
    let model = uniform(4);
    for window in [0, 1, 17] {
        assert!(matches!(run(&model, &text, window, Reference::None), Error::Window { .. }));
    }
    let short = [Segment::new("all", vec![1])];
    assert!(matches!(run(&model, &short, 8, Reference::None), Error::EmptyText { .. }));
    let other = uniform(5);
    let found = run(&model, &text, 8, Reference::Model(&other));
    assert!(matches!(found, Error::Vocabulary { model: 4, reference: 5 }));

    let mut broken = uniform(4);
    broken.rows[1][3] = f32::NAN;
    let found = run(&broken, &text, 8, Reference::None);
    assert!(matches!(found, Error::Logits { who: "the model", window: 0, position: 1, token: 1 }));
    let found = run(&model, &text, 8, Reference::Model(&broken));
    assert!(matches!(found, Error::Logits { who: "the reference", position: 1, .. }));
}

#[test]
fn threads_do_not_change_a_bit() {
    let text = [Segment::new("all", (0..200).map(|i| (i * i) % 7).collect())];
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let model = successor(7, 1.3);
            perplexity(&model, &text, &options(16), Reference::None, &quiet).unwrap().nll
        })
    };
    assert_eq!(run(1).to_bits(), run(3).to_bits());
}

#[test]
fn results_travel_as_json() {
    let text = [Segment::new("all", vec![0, 1, 2, 3])];
    let result = perplexity(&uniform(4), &text, &options(4), Reference::None, &quiet).unwrap();
    let json = serde_json::to_value(&result).unwrap();
    for key in ["perplexity", "nll", "tokens", "kl_to_reference", "tokens_per_second"] {
        assert!(json.get(key).is_some(), "{key} is missing from {json}");
    }
}
