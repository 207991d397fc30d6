//! Scale reparameterization: one scale per channel while fitting, one for the whole tensor while running.
//!
//! ```text
//! s~ = mean_c s_c,   z~ = round(mean_c z_c),   r1_c = s_c / s~,   r2_c = z_c - z~
//! x'_c = x_c / r1_c + s~ r2_c
//! ```
//!
//! Rounding `x'` with `(s~, z~)` gives the codes that rounding `x` channel by channel would have given.

use super::range::{Range, grid_of};

/// Scales of channels far below the mean are raised to this share of it: what they would gain is nothing.
const LEAST: f64 = 1e-6;

/// What moves into the norm and the linears.
#[derive(Clone, Debug, PartialEq)]
pub struct Reparam {
    /// `s~`.
    pub scale: f32,
    /// `z~`, a whole number.
    pub zero: f32,
    /// `r1`.
    pub factors: Vec<f32>,
    /// `s r2`: what is added to the input before it is divided. Zeros where nothing may be added.
    pub shift: Vec<f32>,
}

/// Scales and zero points of channels from their ranges; 0 scale for a constant channel, whose zero point then is its value.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Channels {
    /// `s_c`.
    pub scales: Vec<f32>,
    /// `z_c`.
    pub zeros: Vec<f32>,
}

impl Channels {
    /// From ranges, with zero points that may be fractions: what learned bounds give.
    pub fn unrounded(ranges: &[Range], bits: u8, symmetric: bool) -> Self {
        let mut channels = Self::of(ranges, bits, symmetric);
        if !symmetric {
            for ((zero, scale), range) in
                channels.zeros.iter_mut().zip(&channels.scales).zip(ranges)
            {
                if *scale > 0.0 {
                    *zero = -range.low / scale;
                }
            }
        }
        channels
    }

    /// From ranges. `symmetric` grids share the zero point in the middle of the codes.
    pub fn of(ranges: &[Range], bits: u8, symmetric: bool) -> Self {
        let (scales, zeros) = ranges
            .iter()
            .map(|range| grid_of(*range, bits, symmetric).unwrap_or((0.0, range.low)))
            .unzip();
        Self { scales, zeros }
    }
}

/// The reparameterization of channels; `None` when every channel is constant, or the zero point does not fit its codes.
pub fn reparametrize(channels: &Channels, bits: u8, symmetric: bool) -> Option<Reparam> {
    let alive: Vec<usize> =
        (0..channels.scales.len()).filter(|&c| channels.scales[c] > 0.0).collect();
    if alive.is_empty() {
        return None;
    }
    let mean = |values: &[f32]| {
        alive.iter().map(|&c| f64::from(values[c])).sum::<f64>() / alive.len() as f64
    };
    let scale = mean(&channels.scales);
    let top = f64::from((1u16 << bits) - 1);
    let zero = match symmetric {
        true => f64::from(1u16 << (bits - 1)),
        false => mean(&channels.zeros).round_ties_even(),
    };
    if !scale.is_finite() || !zero.is_finite() || zero.abs() > f64::from(1 << 20) {
        return None;
    }
    let (mut factors, mut shift) = (Vec::new(), Vec::new());
    for (&s, &z) in channels.scales.iter().zip(&channels.zeros) {
        if s == 0.0 {
            // A constant: left where it is if a code reaches it, else moved onto the grid.
            let code = (f64::from(z) / scale).round_ties_even() + zero;
            let reached = symmetric || (0.0..=top).contains(&code);
            factors.push(1.0);
            shift.push(if reached { 0.0 } else { (scale * (code.clamp(0.0, top) - code)) as f32 });
            continue;
        }
        let s = f64::from(s).max(LEAST * scale);
        factors.push((s / scale) as f32);
        shift.push(if symmetric { 0.0 } else { (s * (f64::from(z) - zero)) as f32 });
    }
    Some(Reparam { scale: scale as f32, zero: zero as f32, factors, shift })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Stream;

    /// Channels with scales from 0.01 to 10 and whole zero points.
    fn channels(count: usize, bits: u8, seed: u64) -> Channels {
        let mut stream = Stream::new(seed);
        let top = f64::from((1u16 << bits) - 1);
        let scales = (0..count).map(|_| 10f64.powf(3.0 * stream.uniform() - 2.0) as f32).collect();
        let zeros = (0..count).map(|_| (stream.uniform() * top).round() as f32).collect();
        Channels { scales, zeros }
    }

    #[test]
    fn codes_of_the_tensor_are_codes_of_the_channels() {
        for bits in [3, 4, 8] {
            let channels = channels(40, bits, u64::from(bits));
            let re = reparametrize(&channels, bits, false).unwrap();
            let top = f32::from((1u16 << bits) - 1);
            assert_eq!(re.zero, re.zero.round());
            let mut stream = Stream::new(9);
            for c in 0..40 {
                let (s, z) = (channels.scales[c], channels.zeros[c]);
                for _ in 0..200 {
                    // Away from ties, where the last bit of a division decides.
                    let step = (stream.uniform() * f64::from(top + 6.0)) as f32;
                    let x = s * (step.floor() - z - 3.0 + 0.8 * (stream.uniform() as f32 - 0.5));
                    let own = ((x / s).round_ties_even() + z).clamp(0.0, top);
                    let moved = (x + re.shift[c]) / re.factors[c];
                    let shared = ((moved / re.scale).round_ties_even() + re.zero).clamp(0.0, top);
                    assert_eq!(own, shared, "{bits} bits, channel {c}: {x}");
                    // And back: the same value.
                    let back = (shared - re.zero) * re.scale * re.factors[c] - re.shift[c];
                    assert!((back - (own - z) * s).abs() <= 1e-4 * s * top, "{back}");
                }
            }
        }
    }

    #[test]
    fn equal_channels_change_nothing() {
        let channels = Channels { scales: vec![0.25; 6], zeros: vec![5.0; 6] };
        let re = reparametrize(&channels, 4, false).unwrap();
        assert_eq!((re.scale, re.zero), (0.25, 5.0));
        assert_eq!(re.factors, [1.0; 6]);
        assert_eq!(re.shift, [0.0; 6]);
        let re = reparametrize(&channels, 4, true).unwrap();
        assert_eq!((re.zero, re.shift), (8.0, vec![0.0; 6]));
    }

    #[test]
    fn constants_take_the_grid_of_the_others() {
        let channels =
            Channels { scales: vec![0.5, 0.0, 0.0, 0.5], zeros: vec![8.0, 1.0, 100.0, 8.0] };
        let re = reparametrize(&channels, 4, false).unwrap();
        assert_eq!((re.scale, re.factors[1], re.shift[1]), (0.5, 1.0, 0.0));
        // A constant of 100 lies beyond the codes and is moved onto the last one.
        let moved = 100.0 + re.shift[2];
        assert!((moved / re.scale + re.zero - 15.0).abs() < 1e-3, "{moved}");
        let dead = Channels { scales: vec![0.0; 2], zeros: vec![0.0; 2] };
        assert_eq!(reparametrize(&dead, 4, false), None);
    }

    #[test]
    fn ranges_on_one_side_of_zero_keep_their_zero_points() {
        let ranges = [Range { low: 4.0, high: 7.0 }, Range { low: -9.0, high: -6.0 }];
        let channels = Channels::of(&ranges, 4, false);
        assert!(channels.zeros[0] < 0.0 && channels.zeros[1] > 15.0, "{channels:?}");
        let re = reparametrize(&channels, 4, false).unwrap();
        assert!((0.0..=15.0).contains(&re.zero));
    }
}
