//! Axes: from a number to a place, with ticks where people expect them.

/// A linear or logarithmic axis.
#[derive(Clone, Debug)]
pub struct Scale {
    log: bool,
    domain: (f64, f64),
    range: (f64, f64),
}

impl Scale {
    /// An axis from `low` to `high` drawn from `from` to `to`.
    pub fn linear(low: f64, high: f64, from: f64, to: f64) -> Self {
        Self { log: false, domain: (low, high.max(low + f64::EPSILON)), range: (from, to) }
    }

    /// A logarithmic axis; both ends must be positive.
    pub fn log(low: f64, high: f64, from: f64, to: f64) -> Self {
        let low = low.max(f64::MIN_POSITIVE);
        Self { log: true, domain: (low, high.max(low * 1.0001)), range: (from, to) }
    }

    /// Where a value lies.
    pub fn at(&self, value: f64) -> f64 {
        let of = |v: f64| if self.log { v.max(f64::MIN_POSITIVE).ln() } else { v };
        let (low, high) = (of(self.domain.0), of(self.domain.1));
        let share = ((of(value) - low) / (high - low)).clamp(-0.05, 1.05);
        self.range.0 + share * (self.range.1 - self.range.0)
    }

    /// Round numbers inside the domain, about `wanted` of them.
    pub fn ticks(&self, wanted: usize) -> Vec<f64> {
        let (low, high) = self.domain;
        if !self.log {
            let step = round_step((high - low) / wanted.max(1) as f64);
            let first = (low / step).ceil() as i64;
            let last = (high / step + 1e-9).floor() as i64;
            return (first..=last).map(|i| i as f64 * step).collect();
        }
        let decades = (low.log10().floor() as i32)..=(high.log10().ceil() as i32);
        // The finest of these sets that does not crowd the axis.
        for set in [&[1.0, 1.5, 2.0, 3.0, 5.0, 7.0][..], &[1.0, 2.0, 5.0], &[1.0, 3.0], &[1.0]] {
            let ticks: Vec<f64> = decades
                .clone()
                .flat_map(|decade| set.iter().map(move |m| m * 10f64.powi(decade)))
                .filter(|tick| (low * 0.9999..=high * 1.0001).contains(tick))
                .collect();
            if ticks.len() <= wanted + 1 {
                return ticks;
            }
        }
        vec![low, high]
    }
}

/// The 1-2-5 number just above `raw`.
fn round_step(raw: f64) -> f64 {
    let power = 10f64.powf(raw.log10().floor());
    let lead = raw / power;
    power
        * if lead <= 1.0 {
            1.0
        } else if lead <= 2.0 {
            2.0
        } else if lead <= 5.0 {
            5.0
        } else {
            10.0
        }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linear_ticks_are_round() {
        let scale = Scale::linear(0.0, 47.0, 0.0, 470.0);
        assert_eq!(scale.ticks(5), vec![0.0, 10.0, 20.0, 30.0, 40.0]);
        assert!((scale.at(23.5) - 235.0).abs() < 1e-9);
    }

    #[test]
    fn log_ticks_do_not_crowd() {
        let scale = Scale::log(20.0, 3000.0, 0.0, 100.0);
        let ticks = scale.ticks(6);
        assert!(ticks.len() <= 7 && ticks.contains(&100.0) && ticks.contains(&1000.0), "{ticks:?}");
        assert!((scale.at(3000.0) - 100.0).abs() < 1e-9);
    }
}
