//! Curves out of noisy points: smoothing, and a plot in braille dots.

/// Dots of one braille cell: two columns of four.
const DOTS: [[u32; 4]; 2] = [[0x01, 0x02, 0x04, 0x40], [0x08, 0x10, 0x20, 0x80]];

/// An exponential moving average without the pull of its start: every mean is of what has been seen so far.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Smooth {
    sum: f64,
    weight: f64,
}

impl Smooth {
    /// How much of the past each new value leaves: about the last twenty values count.
    const KEEP: f64 = 0.9;

    /// Takes a value in; gives the mean.
    pub fn push(&mut self, value: f64) -> f64 {
        self.sum = Self::KEEP * self.sum + value;
        self.weight = Self::KEEP * self.weight + 1.0;
        self.sum / self.weight
    }
}

/// One cell of a plot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cell {
    /// A braille character, or a space.
    pub glyph: char,
    /// The smoothed curve passes through it.
    pub strong: bool,
}

/// A plot of `columns` x `rows` cells.
#[derive(Clone, Debug, PartialEq)]
pub struct Plot {
    /// Rows of cells, topmost first.
    pub cells: Vec<Vec<Cell>>,
    /// Value at the lower edge.
    pub low: f64,
    /// Value at the upper edge.
    pub high: f64,
}

/// Plots the points `(place, raw, smoothed)`, places from 0 (left) to 1 (right) and rising. The raw values are dots, the smoothed
/// ones a line. Few points far off the others do not decide the scale: they lie on its edge. `None` without a finite point.
pub fn plot(points: &[(f64, f64, f64)], columns: usize, rows: usize) -> Option<Plot> {
    let finite = |p: &&(f64, f64, f64)| p.1.is_finite() && p.2.is_finite();
    let points: Vec<(f64, f64, f64)> = points.iter().filter(finite).copied().collect();
    if points.is_empty() || columns == 0 || rows == 0 {
        return None;
    }
    let (low, high) = range(&points);
    let (width, height) = (2 * columns, 4 * rows);
    let across = |place: f64| (place.clamp(0.0, 1.0) * (width - 1) as f64).round() as usize;
    let down = |value: f64| {
        let share = ((high - value) / (high - low)).clamp(0.0, 1.0);
        (share * (height - 1) as f64).round() as usize
    };
    let mut dots = vec![vec![(false, false); width]; height];
    for (place, raw, _) in &points {
        dots[down(*raw)][across(*place)].0 = true;
    }
    // Of the points that share a column the last one counts; gaps between columns are bridged by a straight line.
    let mut last: Option<(usize, f64)> = None;
    for (place, _, smooth) in &points {
        let x = across(*place);
        let (from, start) = last.unwrap_or((x, *smooth));
        let mut above = down(start);
        for column in from..=x {
            let share = if x == from { 1.0 } else { (column - from) as f64 / (x - from) as f64 };
            let y = down(start + share * (smooth - start));
            dots[y.min(above)..=y.max(above)].iter_mut().for_each(|row| row[column].1 = true);
            above = y;
        }
        last = Some((x, *smooth));
    }
    let cell = |row: usize, column: usize| {
        let (mut bits, mut strong) = (0, false);
        for (dx, column_dots) in DOTS.iter().enumerate() {
            for (dy, bit) in column_dots.iter().enumerate() {
                let (raw, smooth) = dots[4 * row + dy][2 * column + dx];
                bits |= if raw || smooth { *bit } else { 0 };
                strong |= smooth;
            }
        }
        let glyph = if bits == 0 { ' ' } else { char::from_u32(0x2800 + bits).unwrap_or(' ') };
        Cell { glyph, strong }
    };
    let cells =
        (0..rows).map(|row| (0..columns).map(|column| cell(row, column)).collect()).collect();
    Some(Plot { cells, low, high })
}

/// The smoothed values, and all raw ones but the outermost fiftieths; never empty.
fn range(points: &[(f64, f64, f64)]) -> (f64, f64) {
    let mut raw: Vec<f64> = points.iter().map(|p| p.1).collect();
    raw.sort_unstable_by(f64::total_cmp);
    let cut = raw.len() / 50;
    let inner = &raw[cut..raw.len() - cut];
    let smooth = points.iter().map(|p| p.2);
    let ends = |(low, high): (f64, f64), v: f64| (low.min(v), high.max(v));
    let (low, high) = smooth
        .chain([inner[0], inner[inner.len() - 1]])
        .fold((f64::INFINITY, f64::NEG_INFINITY), ends);
    let margin = if high > low { 0.0 } else { (high.abs() * 0.05).max(1e-6) };
    (low - margin, high + margin)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(plot: &Plot) -> Vec<String> {
        plot.cells.iter().map(|row| row.iter().map(|cell| cell.glyph).collect()).collect()
    }

    #[test]
    fn the_first_mean_is_the_first_value_and_constants_stay() {
        let mut smooth = Smooth::default();
        assert_eq!(smooth.push(7.0), 7.0);
        assert!((smooth.push(1.0) - (0.9 * 7.0 + 1.0) / 1.9).abs() < 1e-12);
        let mut flat = Smooth::default();
        assert!((0..50).map(|_| flat.push(2.5)).all(|mean| (mean - 2.5).abs() < 1e-12));
    }

    #[test]
    fn a_falling_curve_runs_from_the_upper_left_to_the_lower_right() {
        let points: Vec<_> =
            (0..=20).map(|i| (i as f64 / 20.0, 20.0 - i as f64, 20.0 - i as f64)).collect();
        let plot = plot(&points, 10, 3).unwrap();
        let rows = text(&plot);
        assert_eq!((plot.low, plot.high), (0.0, 20.0));
        assert!(rows.iter().all(|row| row.chars().count() == 10), "{rows:?}");
        assert!(!rows[0].starts_with(' ') && rows[0].ends_with("   "), "{rows:?}");
        assert!(rows[2].starts_with("   ") && !rows[2].ends_with(' '), "{rows:?}");
        // The line has no gaps: every column of cells holds a part of it.
        for column in 0..10 {
            assert!(plot.cells.iter().any(|row| row[column].strong), "{rows:?}");
        }
    }

    #[test]
    fn two_points_far_apart_are_joined_and_one_is_a_dot() {
        let joined = plot(&[(0.0, 1.0, 1.0), (1.0, 0.0, 0.0)], 8, 2).unwrap();
        assert!((0..8).all(|c| joined.cells.iter().any(|row| row[c].strong)));
        let dot = plot(&[(0.5, 3.0, 3.0)], 9, 1).unwrap();
        assert_eq!(text(&dot)[0].trim().chars().count(), 1);
        assert!(dot.low < 3.0 && dot.high > 3.0);
    }

    #[test]
    fn outliers_do_not_flatten_the_rest_and_nothing_is_no_plot() {
        let mut points: Vec<_> =
            (0..100).map(|i| (i as f64 / 99.0, 2.0 + (i % 5) as f64, 3.0)).collect();
        points[50].1 = 1e9;
        assert!(plot(&points, 20, 4).unwrap().high <= 6.0);
        assert_eq!(plot(&[], 20, 4), None);
        assert_eq!(plot(&[(0.0, f64::NAN, 1.0)], 20, 4), None);
        assert_eq!(plot(&points, 0, 4), None);
    }
}
