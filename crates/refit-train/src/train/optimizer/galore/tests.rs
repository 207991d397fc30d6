//! The invariants of GaLore on single tensors.

use super::linalg::eigen;
use super::*;
use crate::rng::SplitMix64;
use crate::train::optimizer::OptimizerConfig;

fn config(rank: usize, change: impl FnOnce(&mut OptimizerConfig)) -> Box<dyn Optimizer> {
    let mut config = OptimizerConfig::galore(rank);
    change(&mut config);
    config.build().expect("valid settings")
}

fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut rng = SplitMix64::new(seed);
    (0..n).map(|_| rng.normal() as f32).collect()
}

/// A gradient of rank `rank`.
fn thin(m: usize, n: usize, rank: usize, seed: u64) -> Vec<f32> {
    let (a, b) = (noise(m * rank, seed), noise(rank * n, seed + 1));
    let mut g = vec![0.0; m * n];
    product((m, rank, n), (&a, rank, 1), (&b, n, 1), &mut g, false, 1.0);
    g
}

fn update<'a>(value: &'a mut [f32], grad: &'a [f32], shape: &'a [usize]) -> Update<'a> {
    Update { name: "layers.0.mlp.up.weight", value, grad, shape, rate: 0.01, decay: 0.0 }
}

const SIDES: [Side; 5] = [Side::Std, Side::ReverseStd, Side::Left, Side::Right, Side::Full];

fn set_side(to: Side) -> impl FnOnce(&mut OptimizerConfig) {
    move |config| {
        if let OptimizerConfig::GaLore { side, .. } = config {
            *side = to;
        }
    }
}

#[test]
fn a_gradient_of_low_rank_survives_the_projection() {
    for side in SIDES {
        for (m, n) in [(20, 12), (12, 20), (300, 280)] {
            let optimizer = config(8, set_side(side));
            let g = thin(m, n, 5, 1);
            let state = State::default();
            let found = optimizer.project("x.mlp.w", &[m, n], &g, &state).expect("a target");
            let slot = |name: &str| found.basis.get(name).map(Vec::as_slice);
            for (rows, width) in [(slot(LEFT), m), (slot(RIGHT), n)] {
                let Some(rows) = rows else { continue };
                for i in 0..8 {
                    for j in 0..8 {
                        let pair = rows[i * width..(i + 1) * width].iter().zip(&rows[j * width..]);
                        let inner: f32 = pair.map(|(x, y)| x * y).sum();
                        assert!((inner - f32::from(u8::from(i == j))).abs() < 1e-5, "{side:?}");
                    }
                }
            }
            let (left, right) = side.of(m, n);
            assert_eq!((slot(LEFT).is_some(), slot(RIGHT).is_some()), (left, right));
            let mut back = vec![0.0; m * n];
            let basis = Basis { left: slot(LEFT), right: slot(RIGHT), rank: 8 };
            basis.up(&found.low, &mut back, m, n, 1.0);
            let size = g.iter().fold(0.0f32, |t, x| t.max(x.abs()));
            let worst = g.iter().zip(&back).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
            assert!(worst < 1e-4 * size, "{side:?} {m}x{n}: {worst} of {size}");
        }
    }
}

#[test]
fn at_full_rank_plain_descent_in_the_projection_is_plain_descent() {
    for (m, n) in [(10, 6), (6, 10)] {
        let (mut direct, rate) = (noise(m * n, 3), 0.1);
        let mut projected = direct.clone();
        for step in 0..5 {
            let g = noise(m * n, 10 + step);
            let optimizer = config(99, |_| {});
            let found = optimizer.project("mlp", &[m, n], &g, &State::default()).expect("a target");
            let slot = |name: &str| found.basis.get(name).map(Vec::as_slice);
            let basis = Basis { left: slot(LEFT), right: slot(RIGHT), rank: 6 };
            basis.up(&found.low, &mut projected, m, n, -rate);
            direct.iter_mut().zip(&g).for_each(|(w, g)| *w -= rate * g);
        }
        let worst = direct.iter().zip(&projected).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
        assert!(worst < 1e-5, "{worst}");
    }
}

/// Eigenvalues of `x xᵀ` above `1e-6` of the first.
fn rank_of(x: &[f32], m: usize, n: usize) -> usize {
    let (values, _) = eigen(linalg::gram(x, (m, n), true), m).expect("converges");
    values.iter().filter(|v| **v > 1e-6 * values[0]).count()
}

#[test]
fn one_update_has_low_rank_and_several_bases_reach_beyond_it() {
    let (m, n) = (16, 24);
    let optimizer = config(3, |config| {
        if let OptimizerConfig::GaLore { gap, .. } = config {
            *gap = 4;
        }
    });
    let (mut w, mut state) = (vec![0.0; m * n], State::default());
    for step in 0..12 {
        let before = w.clone();
        let g = noise(m * n, 50 + step);
        optimizer.update(update(&mut w, &g, &[m, n]), &mut state);
        let delta: Vec<f32> = w.iter().zip(&before).map(|(a, b)| a - b).collect();
        assert_eq!(rank_of(&delta, m, n), 3, "update {step}");
        if step == 3 {
            assert_eq!(rank_of(&w, m, n), 3, "one basis so far");
        }
    }
    assert_eq!(rank_of(&w, m, n), 9, "three bases of rank 3");
}

#[test]
fn the_step_is_the_reference_formula() {
    // A diagonal gradient with distinct entries: the singular vectors are axes, so the step can be written down.
    let (m, n) = (4, 3);
    let mut g = vec![0.0; m * n];
    (g[0], g[n + 1], g[2 * n + 2]) = (3.0, -2.0, 1.0);
    let optimizer = config(2, |_| {});
    let (mut w, mut state) = (vec![1.0; m * n], State::default());
    optimizer.update(Update { decay: 0.5, ..update(&mut w, &g, &[m, n]) }, &mut state);
    // Update 1: M = 0.1 R, V = 0.001 R², so N = 0.1 R / (√0.001 |R| + 1e-6) and η = 0.01 √0.001 / 0.1.
    for i in 0..m {
        for j in 0..n {
            let r = if i == j && i < 2 { g[i * n + j] } else { 0.0 };
            let eta = 0.01 * 0.001f64.sqrt() / 0.1;
            let normed = 0.1 * f64::from(r) / (0.001f64.sqrt() * f64::from(r).abs() + 1e-6);
            let want = (1.0 - eta * 0.25 * normed) * (1.0 - 0.01 * 0.5);
            let found = f64::from(w[i * n + j]);
            assert!((found - want).abs() < 1e-6, "{i} {j}: {found} {want}");
        }
    }
}

#[test]
fn bytes_of_state_are_those_of_the_formula() {
    let bytes = |m: usize, n: usize, side: Side, low_bit: bool| {
        let optimizer = config(8, |config| {
            set_side(side)(config);
            if let OptimizerConfig::GaLore { eight_bit, .. } = config {
                *eight_bit = low_bit;
            }
        });
        let (mut w, mut state) = (vec![0.0; m * n], State::default());
        optimizer.update(update(&mut w, &noise(m * n, 9), &[m, n]), &mut state);
        state.bytes()
    };
    // Basis m r, moments 2 n r for m <= n.
    assert_eq!(bytes(32, 48, Side::Std, false), 4 * (32 * 8 + 2 * 48 * 8));
    assert_eq!(bytes(48, 32, Side::Std, false), 4 * (32 * 8 + 2 * 48 * 8));
    assert_eq!(bytes(48, 32, Side::ReverseStd, false), 4 * (48 * 8 + 2 * 32 * 8));
    assert_eq!(bytes(48, 32, Side::Full, false), 4 * (48 * 8 + 32 * 8 + 2 * 64));
    // 8 bits from 4096 elements on, and one scale for 256 of them.
    assert_eq!(bytes(32, 512, Side::Std, true), 4 * 32 * 8 + 2 * (512 * 8 + 4 * 16));
    assert_eq!(bytes(32, 504, Side::Std, true), 4 * (32 * 8 + 2 * 504 * 8));
}

#[test]
fn what_is_no_target_gets_plain_adam() {
    let plain = OptimizerConfig::AdamW { betas: (0.9, 0.999), eps: 1e-6, eight_bit: false };
    let (galore, adam) = (config(2, |_| {}), plain.build().expect("valid"));
    for (name, shape) in [
        ("layers.0.mlp.up.bias", vec![40]),
        ("embed.weight", vec![5, 8]),
        ("mlp.conv", vec![2, 4, 5]),
    ] {
        assert!(!galore.projects(name, &shape));
        let (mut a, mut b) = (noise(40, 1), noise(40, 1));
        let (mut state_a, mut state_b) = (State::default(), State::default());
        for step in 0..4 {
            let g = noise(40, 20 + step);
            galore.update(Update { name, decay: 0.1, ..update(&mut a, &g, &shape) }, &mut state_a);
            adam.update(Update { name, decay: 0.1, ..update(&mut b, &g, &shape) }, &mut state_b);
        }
        assert_eq!((a, state_a), (b, state_b), "{name}");
    }
}

fn every(count: u64, then: Refresh, low_bit: bool) -> impl FnOnce(&mut OptimizerConfig) {
    move |config| {
        if let OptimizerConfig::GaLore { gap, on_refresh, eight_bit, .. } = config {
            (*gap, *on_refresh, *eight_bit) = (count, then, low_bit);
        }
    }
}

#[test]
fn a_gradient_without_directions_keeps_the_basis() {
    let optimizer = config(2, every(2, Refresh::Keep, false));
    let (m, n) = (6, 5);
    let (mut w, mut state) = (vec![0.0; m * n], State::default());
    // No basis yet: the first axes.
    optimizer.update(update(&mut w, &[0.0; 30], &[m, n]), &mut state);
    assert_eq!(state.slots[RIGHT], Slot::F32(axes(2, n)));
    assert!(w.iter().all(|w| *w == 0.0));
    optimizer.update(update(&mut w, &noise(30, 4), &[m, n]), &mut state);
    assert_eq!(state.slots[RIGHT], Slot::F32(axes(2, n)), "not due at update 1");
    optimizer.update(update(&mut w, &noise(30, 5), &[m, n]), &mut state);
    let second = state.slots[RIGHT].clone();
    assert_ne!(second, Slot::F32(axes(2, n)), "due at update 2");
    optimizer.update(update(&mut w, &noise(30, 6), &[m, n]), &mut state);
    optimizer.update(update(&mut w, &[0.0; 30], &[m, n]), &mut state);
    assert_eq!(state.slots[RIGHT], second, "due at update 4, but the gradient is zero");
}

#[test]
fn moments_are_kept_reset_or_rotated() {
    let (m, n, rank) = (16, 600, 8); // moments of 4800 elements: 8 bits apply
    for low_bit in [false, true] {
        for then in [Refresh::Keep, Refresh::Reset, Refresh::Rotate] {
            let optimizer = config(rank, every(3, then, low_bit));
            let (mut w, mut state) = (vec![0.0; m * n], State::default());
            for step in 0..3 {
                let g = thin(m, n, 4, 70 + step);
                optimizer.update(update(&mut w, &g, &[m, n]), &mut state);
            }
            let adam =
                AdamW { betas: (0.9, 0.999), eps: 1e-6, eight_bit: low_bit, early_eps: true };
            let (before, _) = adam.moments(rank * n, &state).expect("three updates were made");
            let lift = |state: &State, low: &[f32]| {
                let mut full = vec![0.0; m * n];
                let left = floats(state, LEFT, rank * m);
                Basis { left, right: None, rank }.up(low, &mut full, m, n, 1.0);
                full
            };
            let was = lift(&state, &before);
            // The same gradient as at the last update, tripled: its directions are those of the old basis's newest part.
            let g: Vec<f32> = thin(m, n, 4, 70).iter().map(|x| 3.0 * x).collect();
            let found = optimizer.project("mlp", &[m, n], &g, &state).expect("a target");
            assert!(found.basis.contains_key(LEFT), "due");
            let low = found.low.clone();
            optimizer.update_projected(update(&mut w, &[], &[m, n]), found, &mut state);
            let (after, _) = adam.moments(rank * n, &state).expect("four updates were made");
            let size = before.iter().fold(0.0f32, |t, x| t.max(x.abs()));
            let tolerance = if low_bit { 0.06 * size } else { 1e-4 * size };
            // Take the newest gradient's part out again: what is left is what became of the old moment.
            let left: Vec<f32> = after.iter().zip(&low).map(|(m, r)| (m - 0.1 * r) / 0.9).collect();
            match then {
                Refresh::Keep => near(&left, &before, tolerance),
                Refresh::Reset => near(&left, &vec![0.0; left.len()], tolerance),
                Refresh::Rotate => {
                    // Lifted to the full space, the moment is its old self inside the new subspace.
                    let basis = floats(&state, LEFT, rank * m);
                    let inside = Basis { left: basis, right: None, rank }.down(&was, m, n);
                    near(&left, &inside, tolerance);
                }
            }
            assert_eq!(state.slots.contains_key(AGE), then == Refresh::Reset);
        }
    }
}

fn near(a: &[f32], b: &[f32], tolerance: f32) {
    let worst = a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
    assert!(worst <= tolerance, "{worst} > {tolerance}");
}

#[test]
fn a_quadratic_is_minimized_with_32_and_with_8_bits() {
    let (m, n) = (40, 600);
    let goal = thin(m, n, 6, 1);
    let loss = |w: &[f32]| {
        let squares = w.iter().zip(&goal).map(|(w, g)| f64::from(w - g).powi(2));
        squares.sum::<f64>() / (m * n) as f64
    };
    let run = |low_bit: bool, then: Refresh| {
        let optimizer = config(8, every(25, then, low_bit));
        let (mut w, mut state) = (vec![0.0; m * n], State::default());
        for step in 0..250 {
            let grad: Vec<f32> = w.iter().zip(&goal).map(|(w, g)| w - g).collect();
            let rate = 0.6 * (1.0 - step as f32 / 250.0);
            optimizer.update(Update { rate, ..update(&mut w, &grad, &[m, n]) }, &mut state);
        }
        loss(&w)
    };
    let start = loss(&vec![0.0; m * n]);
    for then in [Refresh::Keep, Refresh::Reset, Refresh::Rotate] {
        let (full, small) = (run(false, then), run(true, then));
        assert!(full < 0.02 * start, "{then:?}: {full} of {start}");
        // Coarse moments leave a higher floor in the last, small steps; the descent is the same.
        assert!((small - full).abs() < 0.05 * start, "{then:?}: {small} {full} of {start}");
    }
}

#[test]
fn staggered_layers_change_their_basis_at_different_updates() {
    let optimizer = config(2, |config| {
        if let OptimizerConfig::GaLore { gap, stagger, .. } = config {
            (*gap, *stagger) = (10, true);
        }
    });
    let mut changed = [0usize; 10];
    for layer in 0..5 {
        let name = format!("model.layers.{layer}.mlp.up.weight");
        let (mut w, mut state) = (vec![0.0; 30], State::default());
        for step in 0..20 {
            let g = noise(30, 90 + step as u64);
            let found = optimizer.project(&name, &[6, 5], &g, &state).expect("a target");
            if step >= 10 && !found.basis.is_empty() {
                changed[step - 10] += 1;
            }
            let turn = Update { name: &name, ..update(&mut w, &g, &[6, 5]) };
            optimizer.update_projected(turn, found, &mut state);
        }
    }
    assert_eq!(changed.iter().sum::<usize>(), 5, "each layer once in a gap: {changed:?}");
    assert!(changed.iter().all(|c| *c <= 1), "{changed:?}");
}

#[test]
fn nonsense_is_refused() {
    let mut bad = OptimizerConfig::galore(0);
    assert!(bad.build().unwrap_err().to_string().contains("rank = 0"));
    bad = OptimizerConfig::galore(4);
    every(0, Refresh::Keep, false)(&mut bad);
    assert!(bad.build().unwrap_err().to_string().contains("gap = 0"));
    bad = OptimizerConfig::galore(4);
    if let OptimizerConfig::GaLore { targets, .. } = &mut bad {
        targets.clear();
    }
    assert!(bad.build().is_err());
}
