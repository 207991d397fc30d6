//! How models stood in each other's way before a merge: heat maps over layers and roles.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde_json::Value;

use super::charts::{self, Heat};
use super::html::Esc;
use super::{number, sections};
use crate::recipe::record::RunRecord;

/// Key of the measurements in a report.
pub const KEY: &str = "interference";

/// Roles in the order in which a pass meets them.
const ROLES: &[&str] = &[
    "embed", "norm", "q", "k", "v", "qkv", "o", "router", "gate", "up", "gateup", "down", "conv",
    "bias", "pooler", "head", "other",
];

pub(super) fn section(page: &mut String, run: &RunRecord) {
    for artifact in &run.artifacts {
        let found = &artifact.report[KEY];
        let Some(tensors) = found["tensors"].as_array().filter(|tensors| !tensors.is_empty())
        else {
            continue;
        };
        let overall = &found["overall"];
        let _ = write!(
            page,
            "<section>\n<h2>Interference: {}</h2>\n<p class=\"sub\">What {} models changed in their base, and whether it agrees. Over all \
             weights: {} of those that several models changed are pulled both ways, and {} of the changes cancel when they are added.</p>\n",
            Esc(run.label(&artifact.name)),
            found["models"].as_array().map_or(0, Vec::len),
            percent(&overall["sign_conflicts"]),
            percent(&overall["cancelled"]),
        );
        pairs(page, found);
        let cosine = heat(tensors, |tensor| {
            let all: Vec<f64> =
                tensor["cosines"].as_array()?.iter().filter_map(Value::as_f64).collect();
            (!all.is_empty()).then(|| all.iter().sum::<f64>() / all.len() as f64)
        });
        let conflicts = heat(tensors, |tensor| tensor["sign_conflicts"].as_f64());
        let svg = charts::heat(&cosine, (-1.0, 1.0), "mean cosine of the changes");
        let caption = "Mean over all pairs of models: 1 the same direction, 0 nothing in common, \u{2212}1 opposite.";
        sections::figure(page, "Cosine of changes", caption, &svg);
        let svg = charts::heat(&conflicts, (0.0, 0.5), "share of sign conflicts");
        let caption = "Share of the weights that at least two models changed, and not all in one direction; half is what chance gives two.";
        sections::figure(page, "Sign conflicts", caption, &svg);
        page.push_str("</section>\n");
    }
}

fn percent(share: &Value) -> String {
    format!("{:.1}\u{a0}%", share.as_f64().unwrap_or(0.0) * 100.0)
}

/// Every pair of models: cosine over all weights, and how far each went.
fn pairs(page: &mut String, found: &Value) {
    let models: Vec<&str> =
        found["models"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let overall = &found["overall"];
    page.push_str("<div class=\"scroll\"><table>\n<thead><tr><th scope=\"col\">model</th><th scope=\"col\">relative change</th>");
    for (k, _) in models.iter().enumerate() {
        let _ = write!(page, "<th scope=\"col\">cosine with {}</th>", k + 1);
    }
    page.push_str("</tr></thead>\n<tbody>\n");
    for (j, model) in models.iter().enumerate() {
        let change = overall["relative_change"][j].as_f64().map_or("–".to_owned(), number::plain);
        let _ = write!(page, "<tr><td>{} {}</td><td>{change}</td>", j + 1, Esc(model));
        for i in 0..models.len() {
            let (low, high) = (i.min(j), i.max(j));
            let at = high * high.saturating_sub(1) / 2 + low;
            let text = match i == j {
                true => "1".to_owned(),
                false => {
                    overall["cosines"][at].as_f64().map_or("–".to_owned(), |c| format!("{c:.3}"))
                }
            };
            let _ = write!(page, "<td>{text}</td>");
        }
        page.push_str("</tr>\n");
    }
    page.push_str("</tbody></table></div>\n");
}

/// Layers by roles, each the mean of its tensors.
fn heat(tensors: &[Value], of: impl Fn(&Value) -> Option<f64>) -> Heat {
    let mut cells: BTreeMap<(Option<u64>, usize), Vec<f64>> = BTreeMap::new();
    for tensor in tensors {
        let role = tensor["role"].as_str().unwrap_or("other");
        let column = ROLES.iter().position(|known| *known == role).unwrap_or(ROLES.len() - 1);
        if let Some(value) = of(tensor) {
            cells.entry((tensor["layer"].as_u64(), column)).or_default().push(value);
        }
    }
    let mut rows: Vec<Option<u64>> = cells.keys().map(|(layer, _)| *layer).collect();
    rows.dedup();
    let mut columns: Vec<usize> = cells.keys().map(|(_, column)| *column).collect();
    columns.sort_unstable();
    columns.dedup();
    let value = |row: &Option<u64>, column: &usize| {
        let all = cells.get(&(*row, *column))?;
        Some(all.iter().sum::<f64>() / all.len() as f64)
    };
    Heat {
        values: rows.iter().map(|row| columns.iter().map(|c| value(row, c)).collect()).collect(),
        rows: rows
            .iter()
            .map(|row| row.map_or("outside".to_owned(), |layer| layer.to_string()))
            .collect(),
        columns: columns.iter().map(|c| ROLES[*c].to_owned()).collect(),
    }
}
