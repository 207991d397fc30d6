//! Rates of the matrix products behind linears, in f32 and bfloat16.
//!
//! ```text
//! RAYON_NUM_THREADS=2 cargo run --release -p refit-nn --example products -- [ROWS] [INPUTS] [OUTPUTS]
//! ```
//! Prints one line of JSON: GFLOP/s of the forward product and of the products of the backward pass, the best of 20 each.

use std::time::Instant;

use refit_nn::ops::{Precision, back, bf16, cpu};

fn main() {
    let mut words = std::env::args().skip(1).map(|a| a.parse::<usize>().expect("a number"));
    let mut next = |default| words.next().unwrap_or(default);
    let (m, k, n) = (next(1024), next(576), next(1536));
    let values =
        |count: usize| (0..count).map(|i| (i * 7919 % 1009) as f32 / 1009.0 - 0.5).collect();
    let (x, w, g): (Vec<f32>, Vec<f32>, Vec<f32>) = (values(m * k), values(n * k), values(m * n));
    let mut out = vec![0.0; m * n];
    let mut rate = |f: &mut dyn FnMut(&mut [f32])| {
        let mut best = f64::INFINITY;
        for _ in 0..20 {
            let began = Instant::now();
            f(&mut out);
            best = best.min(began.elapsed().as_secs_f64());
        }
        (2.0 * (m * k * n) as f64 / best / 1e9).round()
    };
    let mut line =
        serde_json::json!({ "rows": m, "inputs": k, "outputs": n, "native": bf16::native() });
    for (name, precision) in [("f32", Precision::F32), ("bf16", Precision::Bf16)] {
        line[name] = serde_json::json!({
            "forward": rate(&mut |out| cpu::linear(&x, &w, None, out, k, n, precision)),
            "input": rate(&mut |_| drop(back::linear_x(&g, &w, k, n, precision))),
            "weight": rate(&mut |_| drop(back::linear_w(&g, &x, k, n, precision))),
        });
    }
    println!("{line}");
}
