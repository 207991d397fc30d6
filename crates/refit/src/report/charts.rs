//! The charts of the report, drawn as SVG whose colours follow the page's theme.

use std::fmt::Write;

use super::html::Esc;
use super::number::{plain, tick};
use super::scale::Scale;

/// One bar.
#[derive(Clone, Debug)]
pub struct Bar {
    /// What it is.
    pub label: String,
    /// How long it is.
    pub value: f64,
    /// Lower and upper end of its interval.
    pub interval: Option<[f64; 2]>,
    /// Index into the page's palette.
    pub colour: usize,
    /// Drawn lighter: a baseline beside the method.
    pub pale: bool,
}

/// Bars that belong together.
#[derive(Clone, Debug)]
pub struct BarGroup {
    /// Heading; may be empty.
    pub title: String,
    /// Its bars.
    pub bars: Vec<Bar>,
}

/// Horizontal bars with a reference line. Values that span more than a factor of eight are drawn on
/// a logarithmic axis whose bars start at the reference, since such an axis has no zero.
pub fn bars(groups: &[BarGroup], reference: Option<(&str, f64)>, name: &str) -> String {
    const WIDTH: f64 = 980.0;
    const LABEL: f64 = 196.0;
    const ROW: f64 = 34.0;
    let values = || groups.iter().flat_map(|g| &g.bars).map(|b| b.value).filter(|v| v.is_finite());
    let top = values().chain(reference.map(|r| r.1)).fold(0.0, f64::max);
    let bottom = values().chain(reference.map(|r| r.1)).fold(f64::INFINITY, f64::min);
    if !bottom.is_finite() {
        return String::new();
    }
    let log = bottom > 0.0 && top / bottom > 8.0;
    let scale = if log {
        Scale::log(bottom, top, LABEL, WIDTH - 90.0)
    } else {
        Scale::linear(0.0, top, LABEL, WIDTH - 90.0)
    };
    let origin = if log { LABEL } else { scale.at(0.0) };

    let (mut body, mut y) = (String::new(), 34.0);
    let first_row = y;
    for group in groups {
        if !group.title.is_empty() {
            let _ = write!(
                body,
                r#"<text class="soft" x="0" y="{:.1}">{}</text>"#,
                y + 15.0,
                Esc(&group.title)
            );
            y += 24.0;
        }
        for bar in &group.bars {
            bar_row(&mut body, bar, &scale, (LABEL, origin, y));
            y += ROW;
        }
        y += 12.0;
    }
    let bottom_y = y - 8.0;

    let mut out = String::new();
    let height = bottom_y + 42.0;
    let _ = write!(
        out,
        r#"<svg viewBox="0 0 {WIDTH} {height:.0}" role="img" aria-label="{0}"><title>{0}</title>"#,
        Esc(name)
    );
    for value in scale.ticks(7) {
        let x = scale.at(value);
        let _ = write!(
            out,
            r#"<line class="grid" x1="{x:.1}" x2="{x:.1}" y1="{first_row}" y2="{bottom_y:.1}"/><text class="soft" x="{x:.1}" y="{:.1}" text-anchor="middle">{}</text>"#,
            bottom_y + 18.0,
            tick(value)
        );
    }
    let axis = if log { format!("{name}, log scale") } else { name.to_owned() };
    let _ = write!(
        out,
        r#"<text class="soft" x="{:.1}" y="{:.1}" text-anchor="end">{}, lower is better</text>"#,
        WIDTH,
        bottom_y + 38.0,
        Esc(axis)
    );
    out.push_str(&body);
    if let Some((label, value)) = reference {
        let x = scale.at(value);
        let anchor = if x > WIDTH - 220.0 { "end" } else { "start" };
        let _ = write!(
            out,
            r#"<line class="ref" x1="{x:.1}" x2="{x:.1}" y1="22" y2="{bottom_y:.1}"/><text x="{x:.1}" y="14" text-anchor="{anchor}">{} {}</text>"#,
            Esc(label),
            plain(value)
        );
    }
    out.push_str("</svg>");
    out
}

fn bar_row(out: &mut String, bar: &Bar, scale: &Scale, (label_x, origin, y): (f64, f64, f64)) {
    let middle = y + 14.0;
    let end = if bar.value.is_finite() { scale.at(bar.value) } else { scale.at(f64::MAX) };
    let pale = if bar.pale { " pale" } else { "" };
    let value = if bar.value.is_finite() { plain(bar.value) } else { "not finite".to_owned() };
    let _ = write!(
        out,
        r#"<g><title>{0}: {value}</title><text x="{1:.1}" y="{2:.1}" text-anchor="end"{3}>{0}</text><rect class="f{4}{pale}" x="{origin:.1}" y="{5:.1}" width="{6:.1}" height="22" rx="3"/>"#,
        Esc(&bar.label),
        label_x - 12.0,
        middle + 4.5,
        if bar.pale { "" } else { r#" class="strong""# },
        bar.colour,
        middle - 11.0,
        (end - origin).max(2.0),
    );
    let mut value_x = end;
    if let Some([low, high]) = bar.interval.filter(|i| i.iter().all(|v| v.is_finite())) {
        let (a, b) = (scale.at(low), scale.at(high));
        let _ = write!(
            out,
            r#"<path class="whisker" fill="none" d="M{a:.1} {0:.1}v8m0 -4H{b:.1}m0 -4v8"/>"#,
            middle - 4.0
        );
        value_x = value_x.max(b);
    }
    let _ = write!(
        out,
        r#"<text class="halo strong" x="{:.1}" y="{:.1}">{value}</text></g>"#,
        value_x + 9.0,
        middle + 4.5
    );
}

/// One point of a scatter plot.
#[derive(Clone, Debug)]
pub struct Point {
    /// What it is.
    pub label: String,
    /// Place on the horizontal axis.
    pub x: f64,
    /// Place on the vertical axis.
    pub y: f64,
    /// Index into the page's palette.
    pub colour: usize,
    /// Drawn as a ring: a baseline beside the method.
    pub ring: bool,
}

/// Points with labels that avoid each other; the vertical axis is logarithmic where values span
/// more than a factor of eight.
pub fn scatter(points: &[Point], x_name: &str, y_name: &str) -> String {
    const WIDTH: f64 = 480.0;
    const HEIGHT: f64 = 340.0;
    let ok = |p: &&Point| p.x.is_finite() && p.y.is_finite() && p.y > 0.0;
    let points: Vec<&Point> = points.iter().filter(ok).collect();
    if points.is_empty() {
        return String::new();
    }
    let fold = |of: fn(&Point) -> f64| {
        points.iter().map(|p| of(p)).fold((f64::INFINITY, 0.0f64), |(a, b), v| (a.min(v), b.max(v)))
    };
    let ((x0, x1), (y0, y1)) = (fold(|p| p.x), fold(|p| p.y));
    let log = y1 / y0 > 8.0;
    // Sizes lie close together beside their distance from zero: the axis shows where they differ.
    let margin = ((x1 - x0) * 0.45).max(x1 * 0.08).max(1e-3);
    let x = Scale::linear((x0 - margin).max(0.0), x1 + margin, 46.0, WIDTH - 14.0);
    let y = if log {
        Scale::log(y0 / 1.6, y1 * 1.6, HEIGHT - 44.0, 24.0)
    } else {
        Scale::linear(0.0, y1 * 1.15, HEIGHT - 44.0, 24.0)
    };

    let mut out = String::new();
    let _ = write!(
        out,
        r#"<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{0} against {1}"><title>{0} against {1}</title>"#,
        Esc(y_name),
        Esc(x_name)
    );
    for value in y.ticks(6) {
        let at = y.at(value);
        let _ = write!(
            out,
            r#"<line class="grid" x1="46" x2="{:.1}" y1="{at:.1}" y2="{at:.1}"/><text class="soft" x="38" y="{:.1}" text-anchor="end">{}</text>"#,
            WIDTH - 14.0,
            at + 4.5,
            tick(value)
        );
    }
    for value in x.ticks(5) {
        let at = x.at(value);
        let _ = write!(
            out,
            r#"<text class="soft" x="{at:.1}" y="{:.1}" text-anchor="middle">{}</text>"#,
            HEIGHT - 24.0,
            tick(value)
        );
    }
    let scale_word = if log { ", log scale" } else { "" };
    let _ = write!(
        out,
        r#"<text class="soft" x="0" y="11">{}{scale_word}</text><text class="soft" x="{:.1}" y="{:.1}" text-anchor="end">{}</text>"#,
        Esc(y_name),
        WIDTH - 14.0,
        HEIGHT - 4.0,
        Esc(x_name)
    );
    let places: Vec<(f64, f64)> = points.iter().map(|p| (x.at(p.x), y.at(p.y))).collect();
    // Labels first: their halos must not eat into the points of others.
    for (point, label) in points.iter().zip(place_labels(&points, &places, WIDTH, HEIGHT - 44.0)) {
        let _ = write!(
            out,
            r#"<text class="halo" x="{:.1}" y="{:.1}" text-anchor="{}">{}</text>"#,
            label.x,
            label.y,
            label.anchor,
            Esc(&point.label)
        );
    }
    for (point, (px, py)) in points.iter().zip(&places) {
        let style = if point.ring {
            format!(r#"class="s{}" fill="var(--panel)" stroke-width="2.5""#, point.colour)
        } else {
            format!(r#"class="f{}""#, point.colour)
        };
        let _ = write!(
            out,
            r#"<circle {style} cx="{px:.1}" cy="{py:.1}" r="5.5"><title>{0}: {1} at {2}</title></circle>"#,
            Esc(&point.label),
            plain(point.y),
            plain(point.x),
        );
    }
    out.push_str("</svg>");
    out
}

/// Where a label goes.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Label {
    x: f64,
    y: f64,
    /// Which end of the text `x` is: anchored at the point's side, a label keeps its distance in any font.
    anchor: &'static str,
}

/// Picks for each point the first of eight places around it where its label hits no point, no other
/// label and no edge.
fn place_labels(points: &[&Point], at: &[(f64, f64)], width: f64, height: f64) -> Vec<Label> {
    type Box = (f64, f64, f64, f64);
    let hit = |a: &Box, b: &Box| a.0 < b.2 && b.0 < a.2 && a.1 < b.3 && b.1 < a.3;
    let mut taken: Vec<Box> =
        at.iter().map(|(x, y)| (x - 7.0, y - 7.0, x + 7.0, y + 7.0)).collect();
    let mut labels = Vec::with_capacity(points.len());
    for (point, &(x, y)) in points.iter().zip(at) {
        // 8.2 units per character is a safe width at this font size, in wide fonts too.
        let w = point.label.chars().count() as f64 * 8.2;
        let candidates = [
            (x + 11.0, y + 4.5, "start"),
            (x - 11.0, y + 4.5, "end"),
            (x, y - 12.0, "middle"),
            (x, y + 22.0, "middle"),
            (x + 9.0, y - 9.0, "start"),
            (x + 9.0, y + 18.0, "start"),
            (x - 9.0, y - 9.0, "end"),
            (x - 9.0, y + 18.0, "end"),
        ]
        .map(|(x, y, anchor)| Label { x, y, anchor });
        let area = |label: Label| {
            let left = match label.anchor {
                "start" => label.x,
                "end" => label.x - w,
                _ => label.x - w / 2.0,
            };
            (left, label.y - 12.0, left + w, label.y + 4.0)
        };
        let fits = |place: &Label| {
            let b = area(*place);
            b.0 >= 46.0
                && b.2 <= width
                && b.1 >= 14.0
                && b.3 <= height
                && !taken.iter().any(|t| hit(&b, t))
        };
        let place = candidates.iter().copied().find(fits).unwrap_or(candidates[0]);
        taken.push(area(place));
        labels.push(place);
    }
    labels
}

/// One row of a stacked chart: its label and the share of each series.
#[derive(Clone, Debug)]
pub struct Stack {
    /// What it is.
    pub label: String,
    /// A number per series; drawn as shares of their sum.
    pub parts: Vec<f64>,
}

/// Rows of shares, with a legend: which group sizes were chosen for which matrices.
pub fn stacked(rows: &[Stack], series: &[String], name: &str) -> String {
    const WIDTH: f64 = 480.0;
    const LABEL: f64 = 84.0;
    const ROW: f64 = 36.0;
    let height = 34.0 + ROW * rows.len() as f64 + 10.0;
    let mut out = String::new();
    let _ = write!(
        out,
        r#"<svg viewBox="0 0 {WIDTH} {height:.0}" role="img" aria-label="{0}"><title>{0}</title>"#,
        Esc(name)
    );
    let mut x = LABEL;
    for (i, label) in series.iter().enumerate() {
        let _ = write!(
            out,
            r#"<rect class="f1" opacity="{:.2}" x="{x:.1}" y="3" width="11" height="11" rx="2"/><text x="{:.1}" y="13">{}</text>"#,
            shade(i, series.len()),
            x + 16.0,
            Esc(label)
        );
        x += 34.0 + label.chars().count() as f64 * 7.5;
    }
    for (i, row) in rows.iter().enumerate() {
        let y = 34.0 + ROW * i as f64;
        let _ = write!(
            out,
            r#"<text x="{:.1}" y="{:.1}" text-anchor="end">{}</text>"#,
            LABEL - 12.0,
            y + 17.5,
            Esc(&row.label)
        );
        let total: f64 = row.parts.iter().sum();
        let mut x = LABEL;
        for (series_index, part) in row.parts.iter().enumerate().filter(|(_, p)| **p > 0.0) {
            let w = part / total * (WIDTH - LABEL);
            let _ = write!(
                out,
                r#"<rect class="f1" opacity="{:.2}" x="{x:.1}" y="{y:.1}" width="{:.1}" height="26" rx="2"><title>{}: {} of {}</title></rect>"#,
                shade(series_index, series.len()),
                (w - 1.5).max(0.5),
                Esc(&series[series_index]),
                tick(*part),
                tick(total)
            );
            x += w;
        }
    }
    out.push_str("</svg>");
    out
}

/// A table of values that is drawn in colours.
#[derive(Clone, Debug, Default)]
pub struct Heat {
    /// Labels of the rows.
    pub rows: Vec<String>,
    /// Labels of the columns.
    pub columns: Vec<String>,
    /// Row by row; `None` where there is nothing.
    pub values: Vec<Vec<Option<f64>>>,
}

/// Cells in two colours: the second for values below 0, both stronger the further from it; `(low, high)` are the ends of the scale.
pub fn heat(heat: &Heat, (low, high): (f64, f64), name: &str) -> String {
    const WIDTH: f64 = 980.0;
    const LABEL: f64 = 72.0;
    let columns = heat.columns.len().max(1) as f64;
    let row = if heat.rows.len() > 24 { 16.0 } else { 24.0 };
    let cell = ((WIDTH - LABEL) / columns).min(120.0);
    let top = 26.0;
    let height = top + row * heat.rows.len() as f64 + 34.0;
    let mut out = String::new();
    let _ = write!(
        out,
        r#"<svg viewBox="0 0 {WIDTH} {height:.0}" role="img" aria-label="{0}"><title>{0}</title>"#,
        Esc(name)
    );
    for (c, label) in heat.columns.iter().enumerate() {
        let x = LABEL + cell * (c as f64 + 0.5);
        let _ =
            write!(out, r#"<text x="{x:.1}" y="16" text-anchor="middle">{}</text>"#, Esc(label));
    }
    let strength = |value: f64| {
        let end = if value < 0.0 { low.abs() } else { high };
        (value.abs() / end.max(f64::MIN_POSITIVE)).clamp(0.0, 1.0)
    };
    let mut square = |x: f64, y: f64, (width, height): (f64, f64), value: f64, title: &str| {
        let colour = if value < 0.0 { 2 } else { 1 };
        let _ = write!(
            out,
            r#"<rect class="cell" x="{x:.1}" y="{y:.1}" width="{width:.1}" height="{height:.1}" rx="2"/><rect class="f{colour}" opacity="{:.2}" x="{x:.1}" y="{y:.1}" width="{width:.1}" height="{height:.1}" rx="2"><title>{}</title></rect>"#,
            0.04 + 0.96 * strength(value),
            Esc(title)
        );
    };
    for (r, values) in heat.values.iter().enumerate() {
        let y = top + row * r as f64;
        for (c, value) in values.iter().enumerate() {
            if let Some(value) = value {
                let title = format!("{} {}: {value:.3}", heat.rows[r], heat.columns[c]);
                let x = LABEL + cell * c as f64;
                square(x + 0.75, y + 0.75, (cell - 1.5, row - 1.5), *value, &title);
            }
        }
    }
    // The scale, in nine steps.
    let y = height - 16.0;
    let steps = 9;
    for step in 0..steps {
        let value = low + (high - low) * step as f64 / (steps - 1) as f64;
        square(LABEL + 22.0 * step as f64, y, (20.0, 12.0), value, &format!("{value:.2}"));
    }
    for (r, label) in heat.rows.iter().enumerate() {
        let y = top + row * (r as f64 + 0.5) + 4.5;
        let x = LABEL - 10.0;
        let _ =
            write!(out, r#"<text x="{x:.1}" y="{y:.1}" text-anchor="end">{}</text>"#, Esc(label));
    }
    let end = LABEL + 22.0 * steps as f64 + 6.0;
    let _ = write!(
        out,
        r#"<text x="{:.1}" y="{2:.1}" text-anchor="end">{3}</text><text x="{end:.1}" y="{1:.1}">{4}</text></svg>"#,
        LABEL - 10.0,
        y + 10.5,
        y + 10.5,
        tick(low),
        tick(high)
    );
    out
}

/// Opacity of the n-th of `count` ordered series: the first is the strongest.
fn shade(n: usize, count: usize) -> f64 {
    1.0 - 0.8 * n as f64 / count.max(1) as f64
}

/// Palette index of the n-th series; 0 is the neutral grey of originals.
pub fn colour(series: usize) -> usize {
    1 + series % COLOURS
}

/// Colours of the palette beside the neutral one.
pub const COLOURS: usize = 5;

#[cfg(test)]
mod tests {
    use super::*;

    fn point(label: &str, x: f64, y: f64) -> Point {
        Point { label: label.into(), x, y, colour: 1, ring: false }
    }

    #[test]
    fn labels_of_close_points_do_not_overlap() {
        let points = [point("FineQuant", 3.2, 1.0), point("RTN", 3.2, 1.01)];
        let refs: Vec<&Point> = points.iter().collect();
        let placed = place_labels(&refs, &[(300.0, 150.0), (300.0, 152.0)], 480.0, 300.0);
        assert_ne!(placed[0], placed[1]);
        assert!(
            (placed[0].x - placed[1].x).abs() > 20.0 || (placed[0].y - placed[1].y).abs() > 12.0
        );
    }

    #[test]
    fn a_chart_survives_infinite_values_and_hostile_labels() {
        let bar = |value| Bar {
            label: "<script>&".into(),
            value,
            interval: None,
            colour: 1,
            pale: false,
        };
        let group = BarGroup { title: String::new(), bars: vec![bar(f64::INFINITY), bar(3.0)] };
        let svg = bars(&[group], Some(("original", 2.0)), "perplexity");
        assert!(svg.contains("not finite") && !svg.contains("<script>") && !svg.contains("NaN"));
        assert_eq!(bars(&[], None, "perplexity"), "");
    }
}
