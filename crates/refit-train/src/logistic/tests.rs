use super::*;

/// Clouds around one centre per class, with columns of very different scales and offsets.
fn clouds(n: usize, classes: usize, width: usize, spread: f64, seed: u64) -> (Vec<f32>, Vec<u32>) {
    let mut rng = SplitMix64::new(seed);
    let mut uniform = move || rng.below(1 << 20) as f64 / f64::from(1 << 19) - 1.0;
    let centres: Vec<f64> = (0..classes * width).map(|_| uniform()).collect();
    let labels: Vec<u32> = (0..n as u32).map(|i| i % classes as u32).collect();
    let features = labels
        .iter()
        .flat_map(|&label| {
            let centre = centres[label as usize * width..][..width].to_vec();
            let row: Vec<f32> = centre
                .into_iter()
                .enumerate()
                .map(|(j, c)| {
                    let scale = 10f64.powi(j as i32 % 5 - 2);
                    (scale * (c + spread * uniform() + 3.0)) as f32
                })
                .collect();
            row
        })
        .collect();
    (features, labels)
}

fn options() -> Options {
    Options { l2: None, dev_share: 0.2, seed: 3 }
}

#[test]
fn separable_clouds_are_separated_and_the_choice_is_reported() {
    let (features, labels) = clouds(300, 5, 12, 0.3, 1);
    for bias in [true, false] {
        let problem = Problem { features: &features, labels: &labels, classes: 5, width: 12, bias };
        let found = fit(&problem, &options()).unwrap();
        assert!(found.converged && found.accuracy > 0.98, "{bias}: {found:?}");
        assert_eq!((found.trials.len(), found.held_out), (GRID.len(), 60));
        let best = found.trials.iter().map(|t| t.cross_entropy).fold(f64::INFINITY, f64::min);
        let chosen = found.trials.iter().find(|t| t.l2 == found.l2).unwrap();
        assert_eq!(chosen.cross_entropy, best);
        assert_eq!(found.head.bias.is_some(), bias);
        // A weak penalty wins on clean data, and a head that is only penalized says nothing.
        assert!(found.l2 < 1.0 && found.trials[0].cross_entropy > best);
    }
}

#[test]
fn folding_back_the_scales_keeps_the_logits() {
    let (features, labels) = clouds(120, 4, 10, 0.8, 2);
    for bias in [true, false] {
        let problem = Problem { features: &features, labels: &labels, classes: 4, width: 10, bias };
        let all: Vec<usize> = (0..labels.len()).collect();
        let scale = Scale::of(&problem, &all);
        let inside = solve(&problem, &all, &scale, 1e-2, scale.start(&problem)).x;
        let logits = scale.fold(&problem, &inside).logits(&features, 10);
        let (weights, biases) = inside.split_at(40);
        for (row, logits) in features.chunks_exact(10).zip(logits.chunks_exact(4)) {
            let z: Vec<f64> =
                (0..10).map(|j| (f64::from(row[j]) - scale.mean[j]) / scale.deviation[j]).collect();
            for class in 0..4 {
                let w = &weights[class * 10..(class + 1) * 10];
                let wanted: f64 = w.iter().zip(&z).map(|(w, z)| w * z).sum();
                let wanted = wanted + biases.get(class).copied().unwrap_or(0.0);
                assert!((f64::from(logits[class]) - wanted).abs() < 1e-5, "{logits:?} {wanted}");
            }
        }
    }
}

#[test]
fn the_gradient_is_that_of_finite_differences() {
    let (features, labels) = clouds(40, 3, 6, 1.0, 4);
    let problem =
        Problem { features: &features, labels: &labels, classes: 3, width: 6, bias: true };
    let rows: Vec<usize> = (0..40).collect();
    let scale = Scale::of(&problem, &rows);
    let mut rng = SplitMix64::new(9);
    let x: Vec<f64> = (0..21).map(|_| rng.below(2000) as f64 / 1000.0 - 1.0).collect();
    let (_, gradient) = loss(&problem, &rows, &scale, &x);
    for i in 0..x.len() {
        let at = |by: f64| {
            let mut moved = x.clone();
            moved[i] += by;
            loss(&problem, &rows, &scale, &moved).0
        };
        let numeric = (at(1e-5) - at(-1e-5)) / 2e-5;
        assert!((numeric - gradient[i]).abs() < 1e-8, "{i}: {numeric} {}", gradient[i]);
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    let (features, labels) = clouds(1500, 3, 8, 1.5, 5);
    let problem =
        Problem { features: &features, labels: &labels, classes: 3, width: 8, bias: true };
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| fit(&problem, &options()).unwrap())
    };
    let (one, three) = (run(1), run(3));
    assert_eq!(one.head.weight, three.head.weight);
    assert_eq!(one.trials, three.trials);
}

#[test]
fn the_held_out_part_has_every_class_and_leaves_every_class() {
    let labels: Vec<u32> = [0; 20].into_iter().chain([1; 2]).chain([2; 9]).collect();
    let features = vec![0.0; labels.len()];
    let problem =
        Problem { features: &features, labels: &labels, classes: 3, width: 1, bias: true };
    for share in [0.01, 0.1, 0.99] {
        let (dev, train) = hold_out(&problem, share, 1);
        assert_eq!(dev.len() + train.len(), labels.len());
        for class in 0..3 {
            assert!(dev.iter().any(|&i| labels[i] == class), "{share}");
            assert!(train.iter().any(|&i| labels[i] == class), "{share}");
        }
    }
    assert_ne!(hold_out(&problem, 0.5, 1).0, hold_out(&problem, 0.5, 2).0);
}

#[test]
fn constant_and_duplicate_columns_do_no_harm() {
    let (mut features, labels) = clouds(60, 2, 4, 0.2, 6);
    for row in features.chunks_exact_mut(4) {
        row[1] = 1e6;
        row[3] = row[2];
    }
    let problem =
        Problem { features: &features, labels: &labels, classes: 2, width: 4, bias: true };
    let found = fit(&problem, &options()).unwrap();
    assert!(found.accuracy > 0.95 && found.head.weight.iter().all(|w| w.is_finite()), "{found:?}");
    assert_eq!((found.head.weight[1], found.head.weight[5]), (0.0, 0.0));
}

#[test]
fn bad_input_is_named() {
    let fail = |features: &[f32], labels: &[u32]| {
        let problem = Problem { features, labels, classes: 2, width: 2, bias: true };
        fit(&problem, &options()).unwrap_err()
    };
    assert!(matches!(fail(&[], &[]), Error::EmptyText { .. }));
    assert!(matches!(fail(&[0.0; 3], &[0, 1]), Error::Length { .. }));
    assert!(matches!(fail(&[0.0; 4], &[0, 2]), Error::Label { item: 1, label: 2, .. }));
    assert!(matches!(fail(&[0.0; 6], &[0, 0, 1]), Error::FewExamples { class: 1, examples: 1 }));
    let bad = [0.0, 0.0, 0.0, 0.0, f32::NAN, 0.0, 0.0, 0.0];
    assert!(matches!(fail(&bad, &[0, 1, 0, 1]), Error::Feature { item: 2, column: 0 }));
}
