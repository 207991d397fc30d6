//! What trainings did: loss, learning rate and gradient norm of every step that trains, and a table to compare them.

use std::fmt::Write;

use serde_json::Value;

use super::html::Esc;
use super::lines::{self, Series, Style};
use super::{charts, number, sections};
use crate::recipe::record::{ArtifactRecord, RunRecord};

/// The models and adapters of a run that were trained, in the order of their making.
pub(super) fn trained(run: &RunRecord) -> impl Iterator<Item = &ArtifactRecord> {
    run.artifacts.iter().filter(|artifact| !points(&artifact.report, "loss").is_empty())
}

/// Palette index of a trained artifact in a run that compares trainings; `None` elsewhere.
pub(super) fn colour(run: &RunRecord, artifact: &str) -> Option<usize> {
    let at = trained(run).position(|other| other.name == artifact)?;
    (trained(run).count() > 1).then(|| charts::colour(at))
}

/// A curve of a report: `[[update, value], ...]`.
fn points(report: &Value, key: &str) -> Vec<(f64, f64)> {
    let list = report[key].as_array().map(Vec::as_slice).unwrap_or_default();
    list.iter().filter_map(|pair| Some((pair[0].as_f64()?, pair[1].as_f64()?))).collect()
}

pub(super) fn section(page: &mut String, run: &RunRecord) {
    let trained: Vec<&ArtifactRecord> = trained(run).collect();
    if trained.is_empty() {
        return;
    }
    let several = trained.len() > 1;
    let name = |artifact: &ArtifactRecord| run.label(&artifact.name).to_owned();
    let curves = |key: &str| -> Vec<Series> {
        let series = trained.iter().enumerate().map(|(i, artifact)| Series {
            label: name(artifact),
            colour: charts::colour(i),
            dashed: i >= charts::COLOURS,
            points: points(&artifact.report, key),
        });
        series.collect()
    };
    let _ = writeln!(
        page,
        "<section id=\"training\">\n<h2>Training</h2>\n<p class=\"sub\">{} Held-out perplexity is measured before the first and after \
         the last update; optimizer state is what the optimizer remembers of each parameter.</p>",
        match several {
            true => "How the steps that learn went about it, on the same scale.",
            false => "How the step that learns went about it.",
        }
    );
    let legend = if several { legend(&curves("loss")) } else { String::new() };
    let style = Style {
        name: "loss, nats per token",
        size: (980.0, 320.0),
        smooth: true,
        from_zero: false,
    };
    let caption =
        "Faint: loss of each update, in long runs the mean of a few. Strong: running mean.";
    let svg = lines::lines(&curves("loss"), style);
    sections::figure(page, "Loss", caption, &format!("{legend}{svg}"));

    let small = |name| Style { name, size: (480.0, 210.0), smooth: false, from_zero: true };
    let rate = lines::lines(&curves("learning_rate"), small("learning rate"));
    let norm = Style { smooth: true, from_zero: false, ..small("norm of the gradient") };
    let norm = lines::lines(&curves("grad_norm"), norm);
    let multiples: Vec<(&str, &str, &String)> = [
        ("Learning rate", "As the schedule has it.", &rate),
        ("Gradient", "Norm of all gradients together, before clipping.", &norm),
    ]
    .into_iter()
    .filter(|(_, _, svg)| !svg.is_empty())
    .collect();
    if !multiples.is_empty() {
        page.push_str("<div class=\"pair\">\n");
        for (title, caption, svg) in multiples {
            sections::figure(page, title, caption, svg);
        }
        page.push_str("</div>\n");
    }
    table(page, run, &trained);
    page.push_str("</section>\n");
}

/// Which curve is which.
fn legend(series: &[Series]) -> String {
    let mut out = String::from("<ul class=\"legend\">");
    for one in series {
        let dash = if one.dashed { " dashed" } else { "" };
        let _ = write!(
            out,
            "<li><span class=\"key k{}{dash}\"></span>{}</li>",
            one.colour,
            Esc(&one.label)
        );
    }
    out.push_str("</ul>\n");
    out
}

/// From one value to another.
fn arrow((from, to): (f64, f64)) -> String {
    format!("{} → {}", number::plain(from), number::plain(to))
}

fn table(page: &mut String, run: &RunRecord, trained: &[&ArtifactRecord]) {
    let has = |key: &str| trained.iter().any(|artifact| !artifact.report[key].is_null());
    let (held_out, timed) = (has("held_out_perplexity_after"), has("learned_tokens_per_second"));
    let mut heads = vec!["step", "updates", "parameters", "optimizer state"];
    if timed {
        heads.extend(["tokens/s", "time"]);
    }
    heads.push("loss, first to last");
    if held_out {
        heads.push("perplexity, before to after");
    }
    page.push_str("<div class=\"scroll spaced\"><table>\n<thead><tr>");
    for head in heads {
        let _ = write!(page, "<th scope=\"col\">{head}</th>");
    }
    page.push_str("</tr></thead>\n<tbody>\n");
    let number = |artifact: &ArtifactRecord, key: &str| artifact.report[key].as_f64();
    let after = |artifact: &ArtifactRecord| number(artifact, "held_out_perplexity_after");
    let best = trained.iter().filter_map(|artifact| after(artifact)).fold(f64::INFINITY, f64::min);
    for (i, artifact) in trained.iter().enumerate() {
        let _ = write!(
            page,
            "<tr><td><span class=\"dot b{}\"></span>{}</td>",
            charts::colour(i),
            Esc(run.label(&artifact.name))
        );
        let mut cell = |text: Option<String>, best: bool| {
            let class = if best { " class=\"best\"" } else { "" };
            let _ = write!(page, "<td{class}>{}</td>", text.unwrap_or_else(|| "–".to_owned()));
        };
        let count = |key: &str| artifact.report[key].as_u64();
        cell(count("updates").map(number::count), false);
        cell(count("trained_parameters").map(number::count), false);
        cell(count("optimizer_state_bytes").map(number::bytes), false);
        if timed {
            let speed = number(artifact, "learned_tokens_per_second");
            cell(speed.map(|speed| number::count(speed.round() as u64)), false);
            cell(number(artifact, "training_seconds").map(number::seconds), false);
        }
        let ends = number(artifact, "first_loss").zip(number(artifact, "last_loss"));
        cell(ends.map(arrow), false);
        if held_out {
            let after = after(artifact);
            let ends = number(artifact, "held_out_perplexity_before").zip(after);
            cell(ends.map(arrow), trained.len() > 1 && after == Some(best));
        }
        page.push_str("</tr>\n");
    }
    page.push_str("</tbody>\n</table></div>\n");
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::report::{Theme, render};

    fn artifact(name: &str, label: &str, slope: f64) -> ArtifactRecord {
        let curve = |of: &dyn Fn(f64) -> f64| -> Value {
            (1..=50).map(|i| json!([i, of(i as f64)])).collect()
        };
        ArtifactRecord {
            name: name.into(),
            label: label.into(),
            method: Some("lora".into()),
            report: json!({
                "updates": 50, "trained_parameters": 12_345, "optimizer_state_bytes": 98_760,
                "first_loss": 4.0, "last_loss": 4.0 - 50.0 * slope,
                "loss": curve(&|i| 4.0 - slope * i),
                "learning_rate": curve(&|i| 1e-4 * (50.0 - i)),
                "grad_norm": curve(&|i| 1.0 / i),
                "held_out_perplexity_before": 30.5, "held_out_perplexity_after": 30.0 - 100.0 * slope,
                "learned_tokens_per_second": 1234.5, "training_seconds": 7.25,
            }),
            ..ArtifactRecord::default()
        }
    }

    fn run(artifacts: Vec<ArtifactRecord>) -> RunRecord {
        RunRecord { name: "adapt".into(), title: "Adapt".into(), artifacts, ..RunRecord::default() }
    }

    #[test]
    fn several_trainings_share_a_chart_with_a_legend() {
        let run = run(vec![artifact("a", "LoRA", 0.02), artifact("b", "Do<RA", 0.03)]);
        let page = render(&run, Theme::Auto);
        assert_eq!(page.matches("<ul class=\"legend\">").count(), 1);
        assert!(page.contains("Do&lt;RA") && !page.contains("Do<RA"));
        for part in
            ["12,345", "98.8 kB", "1,235", "4.000 → 3.000", "30.50", "28.00", "Learning rate"]
        {
            assert!(page.contains(part), "{part} is missing");
        }
        assert!(
            page.contains("<td class=\"best\">30.50 → 27.00</td>"),
            "the lowest perplexity is marked"
        );
        assert_eq!((colour(&run, "a"), colour(&run, "b")), (Some(1), Some(2)));
        assert!(!page.contains("NaN"));
    }

    #[test]
    fn one_training_needs_no_legend_and_old_records_no_rates() {
        let mut only = artifact("a", "LoRA", 0.02);
        for key in ["learning_rate", "grad_norm", "learned_tokens_per_second"] {
            only.report.as_object_mut().unwrap().remove(key);
        }
        let run = run(vec![only]);
        let page = render(&run, Theme::Dark);
        assert!(page.contains("<h2>Training</h2>") && !page.contains("<ul class=\"legend\">"));
        assert!(!page.contains("tokens/s") && !page.contains("Learning rate"));
        assert!(!page.contains("class=\"best\""), "there is nothing to be better than");
        assert_eq!(colour(&run, "a"), None);
    }

    #[test]
    fn a_sixth_curve_is_dashed() {
        let run = run((0..6).map(|i| artifact(&i.to_string(), "", 0.01)).collect());
        let page = render(&run, Theme::Light);
        assert!(page.contains("key k1 dashed") && page.contains("stroke-dasharray"));
    }

    #[test]
    fn runs_without_training_have_no_such_section() {
        let plain = ArtifactRecord { method: Some("rtn".into()), ..ArtifactRecord::default() };
        assert!(!render(&run(vec![plain]), Theme::Auto).contains("<h2>Training</h2>"));
    }
}
