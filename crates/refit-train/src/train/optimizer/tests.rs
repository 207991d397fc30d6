//! Optimizers against hand-computed steps and on a quadratic.

use super::*;

fn run(config: &OptimizerConfig, steps: usize, rate: f32, shape: &[usize]) -> (Vec<f32>, State) {
    let optimizer = config.build().unwrap();
    let n: usize = shape.iter().product();
    let goal: Vec<f32> = (0..n).map(|i| (i as f32 * 0.37).sin()).collect();
    let (mut value, mut state) = (vec![0.5; n], State::default());
    for step in 0..steps {
        let grad: Vec<f32> = value.iter().zip(&goal).map(|(w, g)| w - g).collect();
        let rate = rate * (1.0 - step as f32 / steps as f32);
        let update = Update { name: "w", value: &mut value, grad: &grad, shape, rate, decay: 0.0 };
        optimizer.update(update, &mut state);
    }
    let error: f32 = value.iter().zip(&goal).map(|(w, g)| (w - g).powi(2)).sum::<f32>() / n as f32;
    assert!(error < 1e-3, "{config:?}: mean squared error {error}");
    (value, state)
}

fn adamw(eight_bit: bool) -> OptimizerConfig {
    OptimizerConfig::AdamW { betas: (0.9, 0.99), eps: 1e-8, eight_bit }
}

#[test]
fn all_of_them_find_the_minimum_of_a_quadratic() {
    run(&OptimizerConfig::Sgd { momentum: 0.9, nesterov: true }, 200, 0.1, &[8, 16]);
    run(&OptimizerConfig::Sgd { momentum: 0.0, nesterov: false }, 200, 0.2, &[128]);
    run(&adamw(false), 300, 0.05, &[8, 16]);
    run(&OptimizerConfig::Lion { betas: (0.9, 0.99) }, 300, 0.05, &[8, 16]);
    for (relative, shape) in [(false, &[8, 16][..]), (true, &[8, 16]), (false, &[128])] {
        let config = OptimizerConfig::Adafactor { exponent: 0.8, clip: 1.0, relative };
        run(&config, 400, 0.1, shape);
    }
}

#[test]
fn one_step_of_adamw_by_hand() {
    let optimizer = OptimizerConfig::adamw().build().unwrap();
    let (mut value, mut state) = ([1.0, -2.0], State::default());
    let update = Update {
        name: "w",
        value: &mut value,
        grad: &[0.5, -3.0],
        shape: &[2],
        rate: 0.1,
        decay: 0.01,
    };
    optimizer.update(update, &mut state);
    // After one step m̂ / √v̂ is the gradient's sign.
    assert!((value[0] - (1.0 - 0.1 * (1.0 + 0.01))).abs() < 1e-6, "{value:?}");
    assert!((value[1] - (-2.0 + 0.1 * (1.0 + 0.02))).abs() < 1e-6, "{value:?}");
}

#[test]
fn eight_bit_moments_are_small_and_close() {
    let shape = [64, 100];
    let (full, state) = run(&adamw(false), 300, 0.05, &shape);
    assert_eq!(state.bytes(), 8 * 6400);
    let (small, state) = run(&adamw(true), 300, 0.05, &shape);
    assert_eq!(state.bytes(), 2 * (6400 + 4 * 25));
    let worst = full.iter().zip(&small).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst < 0.05, "{worst}");
}

#[test]
fn adafactor_state_is_rows_plus_columns() {
    let config = OptimizerConfig::Adafactor { exponent: 0.8, clip: 1.0, relative: false };
    let (_, state) = run(&config, 400, 0.1, &[8, 16]);
    assert_eq!(state.bytes(), 4 * (8 + 16));
}

#[test]
fn nonsense_is_refused() {
    assert!(OptimizerConfig::Sgd { momentum: 1.0, nesterov: false }.build().is_err());
    assert!(OptimizerConfig::Lion { betas: (0.9, f32::NAN) }.build().is_err());
    let config = OptimizerConfig::AdamW { betas: (0.9, 0.99), eps: 0.0, eight_bit: false };
    assert!(config.build().is_err());
}
