//! `refit interference MODEL MODEL... --base BASE`: what models changed in their base, and whether it agrees.

use std::path::PathBuf;

use refit_methods::inputs::{Inputs, ModelInput};
use refit_methods::merge::interference::{self, Interference, Overlap};
use serde_json::json;

use super::apply::Bars;
use super::{check_writable, parent, write_atomically};
use crate::cli::App;
use crate::failure::{Failure, Result};
use crate::inputs;
use crate::output::{Outcome, Table};
use crate::recipe::record::{ArtifactRecord, RunRecord, SCHEMA};
use crate::report::{self, Theme};

/// Measure how far fine-tuned models stand in each other's way, before they are merged
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The models, two or more
    #[arg(required = true, num_args = 2.., value_name = "MODEL")]
    models: Vec<String>,
    /// The model that they were fine-tuned from
    #[arg(long, value_name = "MODEL")]
    base: String,
    /// Write a page with heat maps
    #[arg(long, value_name = "FILE.html")]
    html: Option<PathBuf>,
    /// Replace the page if it exists
    #[arg(long)]
    force: bool,
    /// Most tensors to list, those with the most sign conflicts first
    #[arg(long, default_value_t = 12)]
    top: usize,
}

/// Measures opened models.
pub fn of(app: &App, inputs: &Inputs) -> Result<Interference> {
    let found = interference::measure(inputs, &Bars(app.progress.clone()));
    app.progress.end();
    Ok(found?)
}

/// Measures, prints, and draws where it is asked to.
pub fn run(app: &App, args: Args) -> Result<Outcome> {
    if let Some(page) = &args.html {
        if page.exists() && !args.force {
            let problem = format!("{}: it exists already; --force replaces it", page.display());
            return Err(Failure::usage(problem));
        }
        check_writable(&parent(page))?;
    }
    let open = |source: &String| -> Result<ModelInput> {
        let artifact = inputs::open(app, source)?.artifact;
        Ok(ModelInput { source: source.clone(), artifact })
    };
    let sources = std::iter::once(&args.base).chain(&args.models);
    let models = sources.map(open).collect::<Result<Vec<_>>>()?;
    let found = of(app, &Inputs { models, base: Some(0), ..Inputs::default() })?;
    let mut text = String::new();
    let mut overview = Table::new(1, &["model", "relative change", "cosine with the others"]);
    for (k, model) in found.models.iter().enumerate() {
        let cosines: Vec<String> = (0..found.models.len())
            .filter(|other| *other != k)
            .map(|other| spell(cosine(&found.overall, k, other)))
            .collect();
        let change = format!("{:.5}", found.overall.relative_change[k]);
        overview.row([model.clone(), change, cosines.join("  ")]);
    }
    text.push_str(&overview.to_string());
    text.push_str(&format!(
        "\n{:.1} % of the weights that several models changed are pulled both ways; {:.1} % of the changes cancel in their sum\n\n",
        100.0 * found.overall.sign_conflicts,
        100.0 * found.overall.cancelled
    ));
    let mut worst: Vec<_> = found.tensors.iter().collect();
    worst.sort_by(|a, b| b.overlap.sign_conflicts.total_cmp(&a.overlap.sign_conflicts));
    let mut table = Table::new(1, &["tensor", "sign conflicts", "cancelled", "mean cosine"]);
    for tensor in worst.into_iter().take(args.top) {
        table.row([
            tensor.name.clone(),
            format!("{:.1} %", 100.0 * tensor.overlap.sign_conflicts),
            format!("{:.1} %", 100.0 * tensor.overlap.cancelled),
            spell(tensor.overlap.mean_cosine()),
        ]);
    }
    text.push_str(&table.to_string());
    if let Some(path) = &args.html {
        let page = report::render(&record(app, &found), Theme::Auto);
        write_atomically(path, page.as_bytes())?;
        text.push_str(&format!("\npage  {}\n", path.display()));
    }
    let mut value = json!(found);
    value["html"] = json!(args.html);
    Ok(Outcome::new(value, text))
}

fn spell(cosine: Option<f64>) -> String {
    cosine.map_or("–".to_owned(), |cosine| format!("{cosine:.3}"))
}

fn cosine(overall: &Overlap, a: usize, b: usize) -> Option<f64> {
    let (low, high) = (a.min(b), a.max(b));
    overall.cosines[high * (high - 1) / 2 + low]
}

/// A run of one measurement, for the page.
fn record(app: &App, found: &Interference) -> RunRecord {
    let name = "interference".to_owned();
    RunRecord {
        schema: SCHEMA,
        refit: env!("CARGO_PKG_VERSION").to_owned(),
        name: name.clone(),
        title: format!("{} models on one base", found.models.len()),
        summary: format!("{}, fine-tuned from {}.", found.models.join(", "), found.base),
        machine: crate::machine::describe(app.global.device.as_str()),
        artifacts: vec![ArtifactRecord {
            label: "before a merge".to_owned(),
            method: Some("interference".to_owned()),
            name,
            report: json!({ report::interference::KEY: found }),
            ..ArtifactRecord::default()
        }],
        ..RunRecord::default()
    }
}
