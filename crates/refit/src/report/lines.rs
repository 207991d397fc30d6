//! Line charts of what changes over a run: the measured values faint, their running mean strong, and both to be read where the
//! pointer is.

use std::fmt::Write;

use super::html::Esc;
use super::number::{plain, tick};
use super::scale::Scale;

/// Hover places of a chart; more would make the page heavy and no better to read.
const STOPS: usize = 40;
/// Points of a curve that are drawn: a chart has no more columns to show.
const DRAWN: usize = 240;

/// One curve.
#[derive(Clone, Debug)]
pub struct Series {
    /// What it is.
    pub label: String,
    /// Index into the page's palette.
    pub colour: usize,
    /// Drawn dashed: the palette begins again.
    pub dashed: bool,
    /// Update (counted from 1) and value, in order.
    pub points: Vec<(f64, f64)>,
}

/// How a chart is drawn.
#[derive(Clone, Copy, Debug)]
pub struct Style<'a> {
    /// What the values are.
    pub name: &'a str,
    /// Width and height in the page's units.
    pub size: (f64, f64),
    /// Draw the values faint and their running mean over them.
    pub smooth: bool,
    /// The axis begins at zero.
    pub from_zero: bool,
}

/// A curve with what is drawn of it.
struct Curve<'a> {
    series: &'a Series,
    points: Vec<(f64, f64)>,
    smooth: Vec<f64>,
}

/// Curves over the updates of a run. Empty without a finite point.
pub fn lines(series: &[Series], style: Style) -> String {
    let curves: Vec<Curve> = series
        .iter()
        .map(|series| {
            let points = thin(&series.points, DRAWN);
            let smooth = running_mean(&points);
            Curve { series, points, smooth }
        })
        .filter(|curve| !curve.points.is_empty())
        .collect();
    let Some((low, high)) = range(&curves, style) else { return String::new() };
    let (width, height) = style.size;
    let (left, right, top, bottom) = (52.0, width - 10.0, 26.0, height - 36.0);
    let log = !style.from_zero && low > 0.0 && high / low > 8.0;
    let y = match log {
        true => Scale::log(low, high, bottom, top),
        false => Scale::linear(low, high, bottom, top),
    };
    let ends = curves.iter().flat_map(|curve| curve.points.iter().map(|p| p.0));
    let (first, last) = ends.fold((f64::INFINITY, 1.0f64), |(a, b), v| (a.min(v), b.max(v)));
    let x = Scale::linear(first, last.max(first + 1.0), left, right);

    let mut out = String::new();
    let axis = if log { format!("{}, log scale", style.name) } else { style.name.to_owned() };
    let _ = write!(
        out,
        r#"<svg viewBox="0 0 {width} {height}" role="img" aria-label="{0} by update"><title>{0} by update</title><text class="soft" x="0" y="12">{0}</text>"#,
        Esc(axis)
    );
    for value in y.ticks(if height > 260.0 { 8 } else { 5 }) {
        let at = y.at(value);
        let _ = write!(
            out,
            r#"<line class="grid" x1="{left}" x2="{right}" y1="{at:.1}" y2="{at:.1}"/><text class="soft" x="{:.1}" y="{:.1}" text-anchor="end">{}</text>"#,
            left - 8.0,
            at + 4.5,
            small_tick(value)
        );
    }
    let counted = x.ticks(if width > 700.0 { 9 } else { 5 });
    for value in counted.into_iter().filter(|value| value.fract() == 0.0) {
        let at = x.at(value);
        let _ = write!(
            out,
            r#"<text class="soft" x="{at:.1}" y="{:.1}" text-anchor="middle">{}</text>"#,
            bottom + 18.0,
            tick(value)
        );
    }
    let _ = write!(
        out,
        r#"<text class="soft" x="{right}" y="{:.1}" text-anchor="end">update</text>"#,
        height - 2.0
    );
    for curve in curves.iter().filter(|_| style.smooth) {
        path(&mut out, curve.series, " raw", curve.points.iter().copied(), (&x, &y));
    }
    for curve in &curves {
        let updates = curve.points.iter().map(|p| p.0);
        let values: Vec<f64> = match style.smooth {
            true => curve.smooth.clone(),
            false => curve.points.iter().map(|p| p.1).collect(),
        };
        path(&mut out, curve.series, "", updates.zip(values), (&x, &y));
    }
    stops(&mut out, &curves, style, (&x, &y), (first, last), (top, bottom));
    out.push_str("</svg>");
    out
}

/// One curve as a path; a single point is a dot.
fn path(
    out: &mut String,
    series: &Series,
    kind: &str,
    points: impl Iterator<Item = (f64, f64)>,
    (x, y): (&Scale, &Scale),
) {
    let mut d = String::new();
    for (i, (update, value)) in points.enumerate() {
        let step = if i == 0 { 'M' } else { 'L' };
        let _ = write!(d, "{step}{:.1} {:.1}", x.at(update), y.at(value));
    }
    if !d.contains('L') {
        // A round cap makes a stroke of no length visible.
        d.push_str("h0");
    }
    let dashes = if series.dashed { r#" stroke-dasharray="7 5""# } else { "" };
    let _ = write!(out, r#"<path class="curve s{}{kind}"{dashes} d="{d}"/>"#, series.colour);
}

/// Places where the pointer finds the values of all curves.
fn stops(
    out: &mut String,
    curves: &[Curve],
    style: Style,
    (x, y): (&Scale, &Scale),
    (first, last): (f64, f64),
    (top, bottom): (f64, f64),
) {
    let longest = curves.iter().map(|curve| curve.points.len()).max().unwrap_or(0);
    let count = longest.min(STOPS);
    for i in 0..count {
        let share = if count > 1 { i as f64 / (count - 1) as f64 } else { 0.0 };
        let wanted = first + share * (last - first);
        let half = (x.at(last.max(first + 1.0)) - x.at(first)) / count.max(2) as f64 / 2.0;
        let (mut words, mut dots) = (String::new(), String::new());
        let mut at = wanted;
        for curve in curves {
            let Some(k) = nearest(&curve.points, wanted) else { continue };
            let (update, value) = curve.points[k];
            let shown = if style.smooth { curve.smooth[k] } else { value };
            if words.is_empty() {
                at = update;
                let _ = write!(words, "update {}", tick(update));
            }
            let _ = write!(words, "\n{}: {}", curve.series.label, measured(value));
            if style.smooth {
                let _ = write!(words, ", mean {}", measured(shown));
            }
            let _ = write!(
                dots,
                r#"<circle class="f{}" cx="{:.1}" cy="{:.1}" r="4"/>"#,
                curve.series.colour,
                x.at(update),
                y.at(shown)
            );
        }
        if words.is_empty() {
            continue;
        }
        let _ = write!(
            out,
            r#"<g class="stop"><title>{}</title><rect x="{:.1}" y="{top}" width="{:.1}" height="{:.1}"/><line class="ref" x1="{4:.1}" x2="{4:.1}" y1="{top}" y2="{bottom}"/>{dots}</g>"#,
            Esc(words),
            x.at(wanted) - half,
            2.0 * half,
            bottom - top,
            x.at(at),
        );
    }
}

/// The point nearest to an update; none where the curve is over.
fn nearest(points: &[(f64, f64)], wanted: f64) -> Option<usize> {
    let end = points.last()?.0;
    let stride = (end - points[0].0) / points.len().max(2) as f64;
    if wanted > end + stride {
        return None;
    }
    let at = points.partition_point(|p| p.0 < wanted);
    let closer = |i: usize, j: usize| {
        if (points[i].0 - wanted).abs() <= (points[j].0 - wanted).abs() { i } else { j }
    };
    Some(match at {
        0 => 0,
        at if at == points.len() => at - 1,
        at => closer(at - 1, at),
    })
}

/// Learning rates are small, and read best with an exponent.
fn measured(value: f64) -> String {
    if value != 0.0 && value.abs() < 0.01 { format!("{value:.2e}") } else { plain(value) }
}

/// An axis label: `0.0002` is `2e-4`.
fn small_tick(value: f64) -> String {
    if value == 0.0 || value.abs() >= 0.01 {
        return tick(value);
    }
    let text = format!("{value:.1e}");
    text.replace(".0e", "e")
}

/// At most `most` points, each the mean of a stretch of finite ones, at the last of its updates.
fn thin(points: &[(f64, f64)], most: usize) -> Vec<(f64, f64)> {
    let finite: Vec<(f64, f64)> =
        points.iter().copied().filter(|(u, v)| u.is_finite() && v.is_finite()).collect();
    let stretch = finite.len().div_ceil(most).max(1);
    let mean = |part: &[(f64, f64)]| {
        let sum: f64 = part.iter().map(|p| p.1).sum();
        (part[part.len() - 1].0, sum / part.len() as f64)
    };
    finite.chunks(stretch).map(mean).collect()
}

/// Points on either side that a running mean takes in.
fn reach(points: usize) -> usize {
    points / 16
}

/// Mean over the neighbours of each point, fewer towards the ends: it follows the curve and does not lag behind it.
pub fn running_mean(points: &[(f64, f64)]) -> Vec<f64> {
    let most = reach(points.len());
    (0..points.len())
        .map(|i| {
            let reach = most.min(i).min(points.len() - 1 - i);
            let part = &points[i - reach..=i + reach];
            part.iter().map(|p| p.1).sum::<f64>() / part.len() as f64
        })
        .collect()
}

/// The ends of the axis: all running means, and all values but the outermost fiftieths; those lie on the edge.
fn range(curves: &[Curve], style: Style) -> Option<(f64, f64)> {
    let mut values: Vec<f64> = curves.iter().flat_map(|c| c.points.iter().map(|p| p.1)).collect();
    values.sort_unstable_by(f64::total_cmp);
    let cut = values.len() / 50;
    let inner = values.get(cut..values.len() - cut).filter(|inner| !inner.is_empty())?;
    let smooth = curves.iter().flat_map(|c| c.smooth.iter().copied());
    let (low, high) = smooth
        .chain([inner[0], inner[inner.len() - 1]])
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), v| (a.min(v), b.max(v)));
    if style.from_zero {
        let top = if high > 0.0 { high * 1.06 } else { 1.0 };
        return Some((low.min(0.0), top));
    }
    let margin = ((high - low) * 0.06).max(high.abs() * 1e-3).max(1e-9);
    Some((if low > 0.0 { (low - margin).max(low / 2.0) } else { low - margin }, high + margin))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOSS: Style<'_> =
        Style { name: "loss", size: (980.0, 300.0), smooth: true, from_zero: false };

    fn series(label: &str, values: impl IntoIterator<Item = f64>) -> Series {
        let points = values.into_iter().enumerate().map(|(i, v)| (i as f64 + 1.0, v)).collect();
        Series { label: label.into(), colour: 1, dashed: false, points }
    }

    #[test]
    fn a_running_mean_keeps_lines_straight_and_ends_in_place() {
        let straight: Vec<(f64, f64)> =
            (0..97).map(|i| (i as f64, 5.0 - 0.03 * i as f64)).collect();
        let mean = running_mean(&straight);
        for (point, mean) in straight.iter().zip(&mean) {
            assert!((point.1 - mean).abs() < 1e-9);
        }
        let noise: Vec<(f64, f64)> =
            (0..100).map(|i| (i as f64, if i % 2 == 0 { 1.0 } else { 3.0 })).collect();
        assert!(running_mean(&noise)[40..60].iter().all(|m| (m - 2.0).abs() < 0.2));
    }

    #[test]
    fn every_curve_can_be_read_at_every_stop() {
        let both = [
            series("LoRA", (0..300).map(|i| 4.0 - 0.01 * i as f64)),
            series("<b>", (0..60).map(|_| 2.5)),
        ];
        let svg = lines(&both, LOSS);
        assert_eq!(svg.matches("<g class=\"stop\">").count(), STOPS);
        assert_eq!(svg.matches("class=\"curve").count(), 4, "values and means of two curves");
        assert!(svg.contains("update 1\nLoRA: 4.000") || svg.contains("update 2\nLoRA"), "{svg}");
        assert!(svg.contains("&lt;b&gt;: 2.500") && !svg.contains("<b>"));
        // The shorter curve is not carried on where it is over.
        assert!(svg.matches("&lt;b&gt;").count() < STOPS / 2);
        assert!(svg.len() < 60_000, "{}", svg.len());
    }

    #[test]
    fn hostile_numbers_are_left_out() {
        let odd = series("x", [f64::NAN, 3.0, f64::INFINITY, 2.0, -1.0, 0.0]);
        let svg = lines(&[odd], LOSS);
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        assert_eq!(lines(&[series("x", [f64::NAN])], LOSS), "");
        assert_eq!(lines(&[], LOSS), "");
        let one = lines(&[series("x", [3.0])], LOSS);
        assert!(one.contains("h0") && !one.contains("NaN"), "{one}");
        let constant = lines(&[series("x", [2.0; 9])], LOSS);
        assert!(!constant.contains("NaN"), "{constant}");
    }

    #[test]
    fn wide_ranges_are_logarithmic_and_small_numbers_short() {
        let wide = lines(&[series("x", [100.0, 10.0, 1.0])], LOSS);
        assert!(wide.contains("log scale"));
        let rates =
            Style { name: "learning rate", size: (480.0, 200.0), smooth: false, from_zero: true };
        let svg = lines(&[series("x", [0.0, 1e-4, 2e-4, 1e-4])], rates);
        assert!(svg.contains(">1e-4<") && !svg.contains("log scale"), "{svg}");
        assert_eq!([0.0002, 0.00025, 0.5].map(small_tick), ["2e-4", "2.5e-4", "0.5"]);
    }

    #[test]
    fn thinned_points_are_means_of_stretches() {
        let points: Vec<(f64, f64)> = (1..=500).map(|i| (i as f64, i as f64)).collect();
        let thinned = thin(&points, 240);
        assert!(thinned.len() <= 240);
        assert_eq!(thinned[0], (3.0, 2.0));
    }
}
