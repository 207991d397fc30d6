//! Attention of one query, which decoding does for every token: reads keys and values once, at the speed of memory.

use super::simd::{fma, simd};

simd! {
    /// `out[j] = q · k_j` for keys that begin `stride` elements apart; `q [dim]`.
    pub(super) fn scores(q: &[f32], k: &[f32], stride: usize, out: &mut [f32]) {
        const LANES: usize = 8;
        const KEYS: usize = 4;
        let dim = q.len();
        let whole = dim / LANES * LANES;
        let one = |key: &[f32]| {
            let mut total = 0.0f32;
            for (q, k) in q.iter().zip(key) {
                total = fma::<FMA>(*q, *k, total);
            }
            total
        };
        let (fours, rest) = out.as_chunks_mut::<KEYS>();
        let done = KEYS * fours.len();
        for (block, out) in fours.iter_mut().enumerate() {
            let keys: [&[f32]; KEYS] =
                std::array::from_fn(|j| &k[(block * KEYS + j) * stride..][..dim]);
            let mut sums = [[0.0f32; LANES]; KEYS];
            for at in (0..whole).step_by(LANES) {
                let q: &[f32; LANES] = q[at..].first_chunk().expect("invariant: whole lanes");
                for j in 0..KEYS {
                    let key: &[f32; LANES] = keys[j][at..].first_chunk().expect("invariant: whole lanes");
                    for i in 0..LANES {
                        sums[j][i] = fma::<FMA>(q[i], key[i], sums[j][i]);
                    }
                }
            }
            for j in 0..KEYS {
                let s = &sums[j];
                let mut total = ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
                for i in whole..dim {
                    total = fma::<FMA>(q[i], keys[j][i], total);
                }
                out[j] = total;
            }
        }
        for (j, out) in rest.iter_mut().enumerate() {
            *out = one(&k[(done + j) * stride..][..dim]);
        }
    }
}

simd! {
    /// `out = sum_j p_j v_j` for values that begin `stride` elements apart; `out [dim]`.
    pub(super) fn weighted(p: &[f32], v: &[f32], stride: usize, out: &mut [f32]) {
        const LANES: usize = 32;
        let dim = out.len();
        let (blocks, _) = out.as_chunks_mut::<LANES>();
        let done = LANES * blocks.len();
        for (block, out) in blocks.iter_mut().enumerate() {
            let mut sums = [0.0f32; LANES];
            for (j, p) in p.iter().enumerate() {
                let v: &[f32; LANES] =
                    v[j * stride + block * LANES..].first_chunk().expect("invariant: whole lanes");
                for i in 0..LANES {
                    sums[i] = fma::<FMA>(*p, v[i], sums[i]);
                }
            }
            *out = sums;
        }
        for i in done..dim {
            let mut total = 0.0f32;
            for (j, p) in p.iter().enumerate() {
                total = fma::<FMA>(*p, v[j * stride + i], total);
            }
            out[i] = total;
        }
    }
}

#[cfg(test)]
mod tests {
    use refit_data::Rng;

    use super::*;

    #[test]
    fn equal_plain_loops_for_any_width_and_number_of_keys() {
        let mut rng = Rng::new(2);
        for dim in [1usize, 7, 8, 32, 40, 64, 80, 128] {
            for keys in [1usize, 3, 4, 9, 33] {
                let stride = dim + 5;
                let mut normals =
                    |n: usize| -> Vec<f32> { (0..n).map(|_| rng.normal() as f32).collect() };
                let (q, k, p) = (normals(dim), normals(keys * stride), normals(keys));
                let (mut found, mut sums) = (vec![0.0; keys], vec![0.0; dim]);
                scores(&q, &k, stride, &mut found);
                weighted(&p, &k, stride, &mut sums);
                for (j, found) in found.iter().enumerate() {
                    let wanted: f64 =
                        (0..dim).map(|i| f64::from(q[i]) * f64::from(k[j * stride + i])).sum();
                    assert!((f64::from(*found) - wanted).abs() < 1e-4, "{dim} {keys}");
                }
                for (i, found) in sums.iter().enumerate() {
                    let wanted: f64 =
                        (0..keys).map(|j| f64::from(p[j]) * f64::from(k[j * stride + i])).sum();
                    assert!((f64::from(*found) - wanted).abs() < 1e-4, "{dim} {keys}");
                }
            }
        }
    }
}
