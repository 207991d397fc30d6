//! The inner loops: eight rows by a few tokens.

use super::{CHUNK, Factors, Offsets, PackedMatrix, ROWS, Rounded, TOKENS};
use crate::ops::simd::simd;

/// A way to multiply a tile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernel {
    /// Plain loops, for every processor.
    Portable,
    /// AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// As AVX2, with the dot products of AVX-512 VNNI.
    #[cfg(target_arch = "x86_64")]
    Vnni,
}

/// Every kernel that runs here, the fastest last.
pub fn kernels() -> Vec<Kernel> {
    let mut all = vec![Kernel::Portable];
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
    {
        all.push(Kernel::Avx2);
        if is_x86_feature_detected!("avx512vnni") && is_x86_feature_detected!("avx512vl") {
            all.push(Kernel::Vnni);
        }
    }
    all
}

/// The fastest kernel here.
pub(super) fn best() -> Kernel {
    static BEST: std::sync::OnceLock<Kernel> = std::sync::OnceLock::new();
    *BEST.get_or_init(|| *kernels().last().expect("invariant: the portable one is always there"))
}

simd! {
    /// Rounds up to 32 values to 8 bits; returns scale and sum of codes.
    pub(super) fn round_chunk(x: &[f32], codes: &mut [i8]) -> (f32, i32) {
        // 0 x is NaN exactly when x is not finite; a maximum would pass over NaN.
        if x.iter().map(|x| x * 0.0).sum::<f32>() != 0.0 {
            codes.fill(0);
            return (f32::NAN, 0);
        }
        let most = x.iter().fold(0f32, |most, x| most.max(x.abs()));
        let scale = most / 127.0;
        if !scale.is_normal() {
            codes.fill(0);
            return (0.0, 0);
        }
        let inverse = 127.0 / most;
        let mut sum = 0i32;
        for (code, x) in codes.iter_mut().zip(x) {
            let q = (x * inverse).round_ties_even().clamp(-127.0, 127.0) as i32;
            *code = q as i8;
            sum += q;
        }
        (scale, sum)
    }
}

impl Kernel {
    /// Sums of tile `tile` for `count` tokens from `token` on.
    pub(super) fn tile(
        self,
        w: &PackedMatrix,
        tile: usize,
        x: &Rounded,
        token: usize,
        count: usize,
        out: &mut [[f32; ROWS]; TOKENS],
    ) {
        match self {
            Self::Portable => portable(w, tile, x, token, count, out),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `kernels` lists them only where the processor has what they need.
            Self::Avx2 => unsafe { x86::avx2(w, tile, x, token, count, out) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Self::Vnni => unsafe { x86::vnni(w, tile, x, token, count, out) },
        }
    }
}

impl Factors {
    fn eight(&self, at: usize) -> [f32; ROWS] {
        match self {
            Self::Half(values) => std::array::from_fn(|lane| values[at + lane].to_f32()),
            Self::Single(values) => std::array::from_fn(|lane| values[at + lane]),
        }
    }
}

fn portable(
    w: &PackedMatrix,
    tile: usize,
    x: &Rounded,
    token: usize,
    count: usize,
    out: &mut [[f32; ROWS]; TOKENS],
) {
    let bytes = CHUNK * usize::from(w.width);
    let (fields, mask) = (8 / usize::from(w.width), ((1u16 << w.width) - 1) as u8);
    let groups = w.groups();
    out[..count].iter_mut().for_each(|sums| sums.fill(0.0));
    for c in 0..w.chunks {
        let codes = &w.codes[(tile * w.chunks + c) * bytes..][..bytes];
        let at = (tile * groups + c / w.span) * ROWS;
        let scales = w.scales.eight(at);
        for (t, out) in out[..count].iter_mut().enumerate() {
            let row = token + t;
            let p = &x.codes[(row * x.chunks + c) * CHUNK..][..CHUNK];
            let (d, sum) = (x.scales[row * x.chunks + c], x.sums[row * x.chunks + c]);
            let mut dots = [0i32; ROWS];
            for (v, vector) in codes.chunks_exact(CHUNK).enumerate() {
                for field in 0..fields {
                    let p = &p[field * (CHUNK / fields) + 4 * v..][..4];
                    let shift = (field * usize::from(w.width)) as u32;
                    for (dot, four) in dots.iter_mut().zip(vector.chunks_exact(4)) {
                        for (code, p) in four.iter().zip(p) {
                            *dot += i32::from((code >> shift) & mask) * i32::from(*p);
                        }
                    }
                }
            }
            for lane in 0..ROWS {
                let (dot, least) = match &w.offsets {
                    Offsets::Constant(z) => (dots[lane] - z * sum, 0.0),
                    Offsets::Integer(zeros) => {
                        (dots[lane] - i32::from(zeros[at + lane]) * sum, 0.0)
                    }
                    Offsets::Float(least) => (dots[lane], least.eight(at)[lane]),
                };
                out[lane] += d * scales[lane] * dot as f32 + least * (d * sum as f32);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::*;

    /// Eight factors.
    #[inline(always)]
    unsafe fn eight(factors: &Factors, at: usize) -> __m256 {
        // SAFETY: `[tile, group, 8]` holds eight from `at` on, and the callers have AVX2 and F16C.
        unsafe {
            match factors {
                Factors::Half(values) => {
                    _mm256_cvtph_ps(_mm_loadu_si128(values.as_ptr().add(at).cast()))
                }
                Factors::Single(values) => _mm256_loadu_ps(values.as_ptr().add(at)),
            }
        }
    }

    /// Four inputs of a token in every lane.
    #[inline(always)]
    unsafe fn four(p: *const i8) -> __m256i {
        // SAFETY: the caller points into a chunk.
        unsafe { _mm256_set1_epi32(p.cast::<i32>().read_unaligned()) }
    }

    /// The codes of a chunk, 4 inputs of 8 rows to a vector, in the order of the inputs.
    #[inline(always)]
    unsafe fn unpack<const WIDTH: u8>(codes: *const u8) -> [__m256i; 8] {
        // SAFETY: a chunk has 32 * WIDTH bytes, and the callers have AVX2.
        unsafe {
            let load = |v: usize| _mm256_loadu_si256(codes.add(v * CHUNK).cast());
            match WIDTH {
                2 => {
                    let (mask, a, b) = (_mm256_set1_epi8(3), load(0), load(1));
                    let field = |x: __m256i, n: u8| {
                        let shifted = match n {
                            0 => x,
                            1 => _mm256_srli_epi16::<2>(x),
                            2 => _mm256_srli_epi16::<4>(x),
                            _ => _mm256_srli_epi16::<6>(x),
                        };
                        _mm256_and_si256(shifted, mask)
                    };
                    [
                        field(a, 0),
                        field(b, 0),
                        field(a, 1),
                        field(b, 1),
                        field(a, 2),
                        field(b, 2),
                        field(a, 3),
                        field(b, 3),
                    ]
                }
                4 => {
                    let mask = _mm256_set1_epi8(15);
                    let (a, b, c, d) = (load(0), load(1), load(2), load(3));
                    let low = |x| _mm256_and_si256(x, mask);
                    let high = |x| _mm256_and_si256(_mm256_srli_epi16::<4>(x), mask);
                    [low(a), low(b), low(c), low(d), high(a), high(b), high(c), high(d)]
                }
                _ => [load(0), load(1), load(2), load(3), load(4), load(5), load(6), load(7)],
            }
        }
    }

    /// Eight dot products of a chunk, `sum_i q_ri p_i`.
    #[inline(always)]
    unsafe fn dots<const WIDTH: u8, const VNNI: bool>(w: &[__m256i; 8], p: *const i8) -> __m256i {
        // SAFETY: `p` points to a chunk; the caller has what its kernel needs.
        unsafe {
            if VNNI {
                let mut sum = _mm256_setzero_si256();
                for (v, w) in w.iter().enumerate() {
                    sum = dpbusd(sum, *w, four(p.add(4 * v)));
                }
                return sum;
            }
            let ones = _mm256_set1_epi16(1);
            if WIDTH < 8 {
                // 8 x 2 x 15 x 127 = 30480: sums of a whole chunk fit in 16 bits.
                let mut sum = _mm256_maddubs_epi16(w[0], four(p));
                for (v, w) in w.iter().enumerate().skip(1) {
                    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(*w, four(p.add(4 * v))));
                }
                return _mm256_madd_epi16(sum, ones);
            }
            // Codes of 8 bits would saturate: the upper and the lower four go apart, 16 high + low.
            let mask = _mm256_set1_epi8(15);
            let (mut low, mut high) = (_mm256_setzero_si256(), _mm256_setzero_si256());
            for (v, w) in w.iter().enumerate() {
                let p = four(p.add(4 * v));
                let upper = _mm256_and_si256(_mm256_srli_epi16::<4>(*w), mask);
                low = _mm256_add_epi16(low, _mm256_maddubs_epi16(_mm256_and_si256(*w, mask), p));
                high = _mm256_add_epi16(high, _mm256_maddubs_epi16(upper, p));
            }
            let high = _mm256_slli_epi32::<4>(_mm256_madd_epi16(high, ones));
            _mm256_add_epi32(_mm256_madd_epi16(low, ones), high)
        }
    }

    /// `sum + four products`, unsigned by signed.
    #[inline]
    #[target_feature(enable = "avx512vnni,avx512vl")]
    unsafe fn dpbusd_vnni(sum: __m256i, w: __m256i, p: __m256i) -> __m256i {
        _mm256_dpbusd_epi32(sum, w, p)
    }

    #[inline(always)]
    unsafe fn dpbusd(sum: __m256i, w: __m256i, p: __m256i) -> __m256i {
        // SAFETY: only the kernel with these features asks for it.
        unsafe { dpbusd_vnni(sum, w, p) }
    }

    #[inline(always)]
    unsafe fn tile<const WIDTH: u8, const VNNI: bool, const COUNT: usize>(
        w: &PackedMatrix,
        tile: usize,
        x: &Rounded,
        token: usize,
        out: &mut [[f32; ROWS]; TOKENS],
    ) {
        let bytes = CHUNK * usize::from(WIDTH);
        let (chunks, groups) = (w.chunks, w.groups());
        // SAFETY: `PackedMatrix` and `Rounded` hold whole chunks of every tile and token, and whole eights of factors.
        unsafe {
            let codes = w.codes.as_ptr().add(tile * chunks * bytes);
            let mut sums = [_mm256_setzero_ps(); COUNT];
            let mut c = 0;
            for group in 0..groups {
                let at = (tile * groups + group) * ROWS;
                let scale = eight(&w.scales, at);
                let end = (c + w.span).min(chunks);
                while c < end {
                    let q = unpack::<WIDTH>(codes.add(c * bytes));
                    for (t, sum) in sums.iter_mut().enumerate() {
                        let place = (token + t) * chunks + c;
                        let dot = dots::<WIDTH, VNNI>(&q, x.codes.as_ptr().add(place * CHUNK));
                        let (d, total) =
                            (*x.scales.get_unchecked(place), *x.sums.get_unchecked(place));
                        let factor = _mm256_mul_ps(scale, _mm256_set1_ps(d));
                        let dot = match &w.offsets {
                            Offsets::Constant(z) => {
                                _mm256_sub_epi32(dot, _mm256_set1_epi32(z * total))
                            }
                            Offsets::Integer(zeros) => {
                                let zeros = _mm_loadl_epi64(zeros.as_ptr().add(at).cast());
                                let zeros = _mm256_cvtepu8_epi32(zeros);
                                let shift = _mm256_mullo_epi32(zeros, _mm256_set1_epi32(total));
                                _mm256_sub_epi32(dot, shift)
                            }
                            Offsets::Float(least) => {
                                let shift = _mm256_set1_ps(d * total as f32);
                                *sum = _mm256_fmadd_ps(eight(least, at), shift, *sum);
                                dot
                            }
                        };
                        *sum = _mm256_fmadd_ps(factor, _mm256_cvtepi32_ps(dot), *sum);
                    }
                    c += 1;
                }
            }
            for (sum, out) in sums.iter().zip(out) {
                _mm256_storeu_ps(out.as_mut_ptr(), *sum);
            }
        }
    }

    macro_rules! kernel {
        ($name:ident, $features:literal, $vnni:literal) => {
            #[target_feature(enable = $features)]
            pub(super) unsafe fn $name(
                w: &PackedMatrix,
                at: usize,
                x: &Rounded,
                token: usize,
                count: usize,
                out: &mut [[f32; ROWS]; TOKENS],
            ) {
                // SAFETY: the caller's; each count of tokens has its own loop.
                unsafe {
                    match (w.width, count) {
                        (2, 1) => tile::<2, $vnni, 1>(w, at, x, token, out),
                        (2, 4) => tile::<2, $vnni, 4>(w, at, x, token, out),
                        (4, 1) => tile::<4, $vnni, 1>(w, at, x, token, out),
                        (4, 4) => tile::<4, $vnni, 4>(w, at, x, token, out),
                        (8, 4) => tile::<8, $vnni, 4>(w, at, x, token, out),
                        (8, 1) => tile::<8, $vnni, 1>(w, at, x, token, out),
                        (_, count) => {
                            let mut one = [[0f32; ROWS]; TOKENS];
                            for t in 0..count {
                                match w.width {
                                    2 => tile::<2, $vnni, 1>(w, at, x, token + t, &mut one),
                                    4 => tile::<4, $vnni, 1>(w, at, x, token + t, &mut one),
                                    _ => tile::<8, $vnni, 1>(w, at, x, token + t, &mut one),
                                }
                                out[t] = one[0];
                            }
                        }
                    }
                }
            }
        };
    }
    kernel!(avx2, "avx2,fma,f16c", false);
    kernel!(vnni, "avx2,fma,f16c,avx512f,avx512vl,avx512vnni", true);
}
