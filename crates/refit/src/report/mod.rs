//! The HTML report of a run: one file, no external resources, light and dark, printable.

pub mod charts;
pub mod html;
pub mod interference;
mod lines;
pub mod number;
mod scale;
mod sections;
pub mod single;
mod training;

use std::fmt::Write;

use crate::recipe::record::{Evaluation, RunRecord};
use charts::{Bar, BarGroup, Point, Stack};
use html::Esc;

/// The page's look: colours, type, print rules.
const STYLE: &str = include_str!("style.css");

/// By which a report is known; the version follows.
const GENERATOR: &str = "<meta name=\"generator\" content=\"refit ";

/// Which look a report is fixed to; readers' own setting decides when none is given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Theme {
    /// Follow the reader's system.
    #[default]
    Auto,
    /// Always light.
    Light,
    /// Always dark.
    Dark,
}

/// Renders a run as a complete HTML document.
pub fn render(run: &RunRecord, theme: Theme) -> String {
    let mut page = String::with_capacity(64 << 10);
    let attribute = match theme {
        Theme::Auto => "",
        Theme::Light => r#" data-theme="light""#,
        Theme::Dark => r#" data-theme="dark""#,
    };
    let _ = write!(
        page,
        "<!doctype html>\n<html lang=\"en\"{attribute}>\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         {GENERATOR}{}\">\n<title>{}</title>\n<style>\n{STYLE}</style>\n\
         </head>\n<body>\n<main>\n",
        Esc(&run.refit),
        Esc(&run.title)
    );
    sections::header(&mut page, run);
    for evaluation in &run.evaluations {
        figures(&mut page, run, evaluation);
        sections::table(&mut page, run, evaluation);
    }
    training::section(&mut page, run);
    interference::section(&mut page, run);
    sections::lineage(&mut page, run);
    sections::reproduce(&mut page, run);
    sections::machine(&mut page, run);
    page.push_str("</main>\n</body>\n</html>\n");
    page
}

/// Whether a file that begins like this is a report that refit made.
pub fn is_report(head: &str) -> bool {
    head.starts_with("<!doctype html>") && head.contains(GENERATOR)
}

/// Groups in the order in which their first member appears, with the arms of each (indices into
/// `evaluation.arms`); models without a group come first.
fn groups<'a>(run: &'a RunRecord, evaluation: &Evaluation) -> Vec<(&'a str, Vec<usize>)> {
    let mut groups: Vec<(&str, Vec<usize>)> = Vec::new();
    for (i, arm) in evaluation.arms.iter().enumerate() {
        let group = run.artifact(&arm.artifact).map_or("", |a| a.group.as_str());
        match groups.iter_mut().find(|(name, _)| *name == group) {
            Some((_, members)) => members.push(i),
            None => groups.push((group, vec![i])),
        }
    }
    groups.sort_by_key(|(name, _)| !name.is_empty());
    groups
}

/// Palette index of a model: that of its curve where trainings are compared; else grey for those in no group, one colour per group.
fn palette(run: &RunRecord, evaluation: &Evaluation, artifact: &str) -> usize {
    if let Some(colour) = training::colour(run, artifact) {
        return colour;
    }
    let group = run.artifact(artifact).map_or("", |a| a.group.as_str());
    let named = groups(run, evaluation).into_iter().filter(|(name, _)| !name.is_empty());
    match named.map(|(name, _)| name).position(|name| name == group) {
        Some(i) if !group.is_empty() => charts::colour(i),
        _ => 0,
    }
}

/// True for the model that a contest measures the method against.
fn is_baseline(run: &RunRecord, artifact: &str) -> bool {
    run.contests.iter().any(|contest| contest.baseline == artifact)
}

fn figures(page: &mut String, run: &RunRecord, evaluation: &Evaluation) {
    let reference = evaluation.reference.as_deref();
    let arm_of = |name: &str| evaluation.arms.iter().find(|arm| arm.artifact == name);
    let bars: Vec<BarGroup> = groups(run, evaluation)
        .into_iter()
        .map(|(title, members)| BarGroup {
            title: title.to_owned(),
            bars: members
                .into_iter()
                .map(|i| &evaluation.arms[i])
                .filter(|arm| Some(arm.artifact.as_str()) != reference)
                .map(|arm| Bar {
                    label: run.label(&arm.artifact).to_owned(),
                    value: arm.perplexity,
                    interval: arm.interval,
                    colour: palette(run, evaluation, &arm.artifact),
                    pale: is_baseline(run, &arm.artifact),
                })
                .collect(),
        })
        .filter(|group: &BarGroup| !group.bars.is_empty())
        .collect();
    let line = reference.and_then(arm_of).map(|arm| (run.label(&arm.artifact), arm.perplexity));
    let svg = charts::bars(&bars, line, "perplexity");
    if !svg.is_empty() {
        let whiskers = evaluation.arms.iter().any(|arm| arm.interval.is_some());
        sections::figure(
            page,
            "Perplexity on held-out text",
            &format!(
                "{}, windows of {} tokens.{}",
                evaluation.text,
                evaluation.window,
                if whiskers { " Whiskers: 95 % interval over windows." } else { "" }
            ),
            &svg,
        );
    }

    let points: Vec<Point> = evaluation
        .arms
        .iter()
        .filter(|arm| Some(arm.artifact.as_str()) != reference)
        .filter_map(|arm| {
            let artifact = run.artifact(&arm.artifact)?;
            Some(Point {
                label: run.label(&arm.artifact).to_owned(),
                x: artifact.packed_bytes.unwrap_or(artifact.bytes) as f64 / 1e6,
                y: arm.kl_to_reference?,
                colour: palette(run, evaluation, &arm.artifact),
                ring: is_baseline(run, &arm.artifact),
            })
        })
        .collect();
    let scatter = charts::scatter(&points, "packed size, MB", "KL to the original, nats per token");
    let chosen = group_sizes(run);
    let paired = !scatter.is_empty() && chosen.is_some();
    // Two half-wide plots share a row; one alone must not be blown up to the page's width.
    let row = if paired { "pair" } else { "alone" };
    let any = !scatter.is_empty() || chosen.is_some();
    if any {
        let _ = writeln!(page, "<div class=\"{row}\">");
    }
    if !scatter.is_empty() {
        sections::figure(
            page,
            "What the bytes cost",
            "How far each model's predictions moved, against the bytes it needs when packed.",
            &scatter,
        );
    }
    if let Some((label, rows, series)) = chosen {
        sections::figure(
            page,
            &format!("Group sizes that {label} chose"),
            "Share of matrices per role; smaller groups go where outliers are.",
            &charts::stacked(&rows, &series, "group sizes by role"),
        );
    }
    if any {
        page.push_str("</div>\n");
    }
}

/// The group sizes of the first method that chose different ones, by role of the matrix: `groups` in
/// the method's report, tensor by tensor.
fn group_sizes(run: &RunRecord) -> Option<(&str, Vec<Stack>, Vec<String>)> {
    run.artifacts.iter().find_map(|artifact| {
        let groups = artifact.report.get("groups")?.as_object()?;
        let chosen: Vec<(&str, u64)> =
            groups.iter().filter_map(|(name, size)| Some((role(name), size.as_u64()?))).collect();
        let mut sizes: Vec<u64> = chosen.iter().map(|(_, size)| *size).collect();
        sizes.sort_unstable();
        sizes.dedup();
        if sizes.len() < 2 {
            return None;
        }
        let mut rows: Vec<Stack> = Vec::new();
        for (role, size) in &chosen {
            let column = sizes.binary_search(size).ok()?;
            let row = match rows.iter().position(|row| row.label == *role) {
                Some(i) => &mut rows[i],
                None => {
                    rows.push(Stack { label: (*role).to_owned(), parts: vec![0.0; sizes.len()] });
                    rows.last_mut()?
                }
            };
            row.parts[column] += 1.0;
        }
        let order = ["q", "k", "v", "o", "gate", "up", "down"];
        rows.sort_by_key(|row| order.iter().position(|o| *o == row.label).unwrap_or(order.len()));
        rows.truncate(10);
        Some((run.label(&artifact.name), rows, sizes.iter().map(u64::to_string).collect()))
    })
}

/// `model.layers.3.self_attn.q_proj.weight` -> `q`.
fn role(name: &str) -> &str {
    let name = name.strip_suffix(".weight").unwrap_or(name);
    let last = name.rsplit('.').next().unwrap_or(name);
    last.strip_suffix("_proj").unwrap_or(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> RunRecord {
        serde_json::from_str(include_str!("../../tests/fixtures/run.json")).unwrap()
    }

    #[test]
    fn the_page_is_self_contained_and_balanced() {
        let page = render(&sample(), Theme::Auto);
        for outside in ["src=", "<script", "@import", "url(", "<link"] {
            assert!(!page.contains(outside), "{outside}");
        }
        for tag in ["svg", "g", "figure", "table", "section", "div", "li", "dl", "text", "title"] {
            let opened = page.matches(&format!("<{tag}>")).count()
                + page.matches(&format!("<{tag} ")).count();
            assert_eq!(opened, page.matches(&format!("</{tag}>")).count(), "{tag}");
        }
        for word in ["NaN", "inf<", "null"] {
            assert!(!page.contains(word), "{word}");
        }
        assert!(page.len() < 200_000);
        assert!(is_report(&page) && !is_report("<!doctype html>\n<p>mine</p>"));
    }

    #[test]
    fn names_from_recipes_are_escaped() {
        let mut run = sample();
        run.title = "<img onerror=x>".into();
        run.artifacts[1].label = "a\"b<c>".into();
        run.notes.push("<b>&".into());
        let page = render(&run, Theme::Dark);
        assert!(!page.contains("<img") && !page.contains("b<c>") && !page.contains("<b>&"));
        assert!(page.contains("data-theme=\"dark\""));
    }

    #[test]
    fn an_empty_run_still_renders() {
        let page = render(&RunRecord::default(), Theme::Light);
        assert!(page.ends_with("</html>\n"));
    }
}
