//! `refit inspect ARTIFACT`: the facts, from headers (and, asked, from the values).

use std::collections::BTreeMap;

use refit_store::architecture::{Kind, MemoryOptions, Role, memory_plan};
use refit_store::{Artifact, weight_grid};
use serde_json::{Value, json};

use crate::cli::App;
use crate::failure::Result;
use crate::inputs;
use crate::output::{self, Outcome, Table};
use crate::report::number;

/// Show a model's config, tensors, parameters by role, ties, grid, and the memory it needs
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The model
    model: String,
    /// List every tensor
    #[arg(long)]
    tensors: bool,
    /// Read all values: count NaN, infinities, zeros and rows of zeros
    #[arg(long)]
    values: bool,
    /// Exit with code 1 when a tensor is missing, unexpected, mis-shaped or not finite
    #[arg(long)]
    strict: bool,
    /// Tokens per sequence in the memory plan [default: 1024, or the model's context where that is
    /// shorter]
    #[arg(long, value_name = "N")]
    context: Option<usize>,
}

/// Opens the model and gathers the facts.
pub fn run(app: &App, args: Args) -> Result<Outcome> {
    let model = inputs::open(app, &args.model)?;
    let artifact = &*model.artifact;
    let architecture = artifact.architecture();
    let bytes_of = |t: &refit_store::TensorInfo| artifact.stored_bytes(&t.name).unwrap_or(t.nbytes);
    let stored: u64 = artifact.tensors().iter().map(bytes_of).sum();
    let default = MemoryOptions::default();
    let longest = architecture.dims.context.unwrap_or(usize::MAX);
    let context = args.context.unwrap_or_else(|| default.context.min(longest));
    let options = MemoryOptions { context, ..default };
    let memory = memory_plan(architecture, stored, &options);
    let parameters: u64 = artifact.tensors().iter().map(|t| t.numel() as u64).sum();
    let dtypes = dtypes(artifact);
    let ties: Vec<(&str, &str)> = architecture
        .sites
        .iter()
        .filter_map(|site| Some((site.name.as_str(), site.tied_to.as_deref()?)))
        .collect();
    let grid = weight_grid::detect(artifact)?;
    let report = artifact.load_report();
    let values = match args.values {
        true => Some(values(app, artifact)?),
        false => None,
    };
    let healthy = report.is_clean() && values.as_ref().is_none_or(|v| v.faulty.is_empty());

    let mut facts = vec![
        ("path", model.path.display().to_string()),
        (
            "format",
            match artifact.packed() {
                Some(packed) => format!("safetensors, weights packed as {packed}"),
                None => format!("{:?}", artifact.format()).to_lowercase(),
            },
        ),
        (
            "architecture",
            format!(
                "{}{}: {}",
                architecture.model_type,
                if architecture.inferred { " (inferred from names and shapes)" } else { "" },
                architecture.summary.trim()
            ),
        ),
        ("blocks", architecture.layers().to_string()),
        (
            "parameters",
            format!("{} ({})", number::parameters(parameters), number::count(parameters)),
        ),
        ("on disk", number::bytes(stored)),
        ("grid", grid.to_string()),
        ("strict load", report.to_string().replace('\n', "\n             ")),
    ];
    let labels = labels(artifact);
    facts.extend(labels.as_ref().map(|labels| ("labels", shown(labels))));
    let mut text = output::facts(facts);
    for (name, tied_to) in &ties {
        text.push_str(&format!("tied          {name} = {tied_to}\n"));
    }
    text.push('\n');
    let mut roles = Table::new(1, &["role", "tensors", "parameters", "share"]);
    for (role, tensors, elements) in architecture.parameters_by_role() {
        let share = 100.0 * elements as f64 / parameters.max(1) as f64;
        roles.row([
            role.to_string(),
            tensors.to_string(),
            number::count(elements),
            format!("{share:.1} %"),
        ]);
    }
    text.push_str(&format!("{roles}\n"));
    let mut kinds = Table::new(1, &["element type", "tensors", "parameters", "bytes"]);
    for (dtype, (tensors, elements, bytes)) in &dtypes {
        kinds.row([
            dtype.clone(),
            tensors.to_string(),
            number::count(*elements),
            number::bytes(*bytes),
        ]);
    }
    text.push_str(&format!("{kinds}\n"));
    let input = match architecture.kind {
        Kind::Vision => "an image".to_owned(),
        _ => format!("{context} tokens"),
    };
    text.push_str(&format!("memory, {input}, batch 1, f32 (estimates)\n"));
    text.push_str(&output::facts([
        ("  run", number::bytes(memory.run)),
        ("  tune all (AdamW)", number::bytes(memory.tune_adamw)),
        (
            "  tune LoRA rank 8",
            format!(
                "{} ({} parameters)",
                number::bytes(memory.tune_lora),
                number::count(memory.lora_parameters)
            ),
        ),
    ]));
    let warnings: Vec<String> = grid.warning().into_iter().collect();
    for warning in &warnings {
        text.push_str(&format!("\nwarning: {warning}\n"));
    }
    if let Some(values) = &values {
        text.push_str(&format!("\nvalues: {}\n", values.summary()));
    }
    if args.tensors {
        let mut list = Table::new(3, &["tensor", "role", "element type", "shape", "bytes"]);
        for tensor in artifact.tensors() {
            let role =
                architecture.site(&tensor.name).map_or_else(String::new, |s| s.role.to_string());
            list.row([
                tensor.name.clone(),
                role,
                tensor.dtype.to_string(),
                format!("{:?}", tensor.shape),
                number::count(tensor.nbytes),
            ]);
        }
        text.push_str(&format!("\n{list}"));
    }

    let json = json!({
        "path": model.path,
        "source": model.source,
        "format": artifact.format(),
        "config": artifact.config().raw(),
        "architecture": {
            "model_type": architecture.model_type,
            "kind": architecture.kind,
            "inferred": architecture.inferred,
            "summary": architecture.summary,
            "layers": architecture.layers(),
            "dims": architecture.dims,
        },
        "labels": labels,
        "parameters": parameters,
        "bytes": stored,
        "roles": architecture.parameters_by_role().iter().map(|(role, tensors, elements)| {
            json!({"role": role, "tensors": tensors, "parameters": elements})
        }).collect::<Vec<_>>(),
        "dtypes": dtypes.iter().map(|(dtype, (tensors, elements, bytes))| {
            json!({"dtype": dtype, "tensors": tensors, "parameters": elements, "bytes": bytes})
        }).collect::<Vec<_>>(),
        "ties": ties.iter().map(|(name, to)| json!({"tensor": name, "tied_to": to})).collect::<Vec<_>>(),
        "grid": grid,
        "packed": artifact.packed(),
        "warnings": warnings,
        "memory": memory,
        "strict_load": report,
        "values": values.as_ref().map(Values::json),
        "healthy": healthy,
        "tensors": artifact.tensors().iter().map(|tensor| json!({
            "name": tensor.name,
            "shape": tensor.shape,
            "dtype": tensor.dtype.to_string(),
            "bytes": tensor.nbytes,
            "role": architecture.site(&tensor.name).map(|site| site.role),
        })).collect::<Vec<_>>(),
    });
    Ok(Outcome::new(json, text).holds(healthy || !args.strict))
}

/// Names of the classes of a classifier, numbered where the config does not name them; `None` for other models.
pub fn labels(artifact: &Artifact) -> Option<Vec<String>> {
    let classes = match artifact.architecture().kind {
        Kind::Vision => {
            let head = artifact.architecture().with_role(Role::Head).find(|site| site.stored)?;
            *head.shape.first()?
        }
        _ => refit_nn::classifier::text_classes(artifact)?,
    };
    let names = refit_methods::labelled::class_names(artifact);
    let name = |i: usize| names.get(i).cloned().flatten().unwrap_or_else(|| i.to_string());
    Some((0..classes).map(name).collect())
}

/// How many, and the first of them.
fn shown(labels: &[String]) -> String {
    let first: Vec<&str> = labels.iter().take(5).map(String::as_str).collect();
    let more = if labels.len() > first.len() { ", ..." } else { "" };
    format!("{}: {}{more}", number::count(labels.len() as u64), first.join(", "))
}

/// Element type -> (tensors, elements, bytes).
fn dtypes(artifact: &Artifact) -> BTreeMap<String, (usize, u64, u64)> {
    let mut census = BTreeMap::<String, (usize, u64, u64)>::new();
    for tensor in artifact.tensors() {
        let entry = census.entry(tensor.dtype.to_string()).or_default();
        entry.0 += 1;
        entry.1 += tensor.numel() as u64;
        entry.2 += artifact.stored_bytes(&tensor.name).unwrap_or(tensor.nbytes);
    }
    census
}

/// What reading every value showed.
struct Values {
    elements: u64,
    zeros: u64,
    /// Tensors with values that are not finite: name, NaN, infinities.
    faulty: Vec<(String, u64, u64)>,
    /// Matrices with rows of zeros: name, rows.
    empty_rows: Vec<(String, u64)>,
}

fn values(app: &App, artifact: &Artifact) -> Result<Values> {
    let mut found = Values { elements: 0, zeros: 0, faulty: Vec::new(), empty_rows: Vec::new() };
    app.progress.begin("reading values", artifact.tensors().len() as u64, "tensors");
    for tensor in artifact.tensors() {
        let data = artifact.read_f32(&tensor.name)?;
        found.elements += data.len() as u64;
        found.zeros += data.iter().filter(|v| **v == 0.0).count() as u64;
        let nan = data.iter().filter(|v| v.is_nan()).count() as u64;
        let infinite = data.iter().filter(|v| v.is_infinite()).count() as u64;
        if nan + infinite > 0 {
            found.faulty.push((tensor.name.clone(), nan, infinite));
        }
        if let [rows, columns] = tensor.shape[..]
            && rows > 0
            && columns > 0
        {
            let empty =
                data.chunks_exact(columns).filter(|row| row.iter().all(|v| *v == 0.0)).count();
            if empty > 0 {
                found.empty_rows.push((tensor.name.clone(), empty as u64));
            }
        }
        app.progress.advance(1);
    }
    app.progress.end();
    Ok(found)
}

impl Values {
    fn summary(&self) -> String {
        let share = 100.0 * self.zeros as f64 / self.elements.max(1) as f64;
        let mut text = format!("{} read, {share:.2} % zeros", number::count(self.elements));
        if self.faulty.is_empty() {
            text.push_str(", all finite");
        }
        for (name, nan, infinite) in &self.faulty {
            text.push_str(&format!("\n  `{name}`: {nan} NaN, {infinite} infinite"));
        }
        for (name, rows) in &self.empty_rows {
            text.push_str(&format!("\n  `{name}`: {rows} rows of zeros"));
        }
        text
    }

    fn json(&self) -> Value {
        let faulty = self
            .faulty
            .iter()
            .map(|(name, nan, infinite)| json!({"tensor": name, "nan": nan, "infinite": infinite}));
        let rows = self.empty_rows.iter().map(|(name, rows)| json!({"tensor": name, "rows": rows}));
        json!({
            "elements": self.elements,
            "zeros": self.zeros,
            "not_finite": faulty.collect::<Vec<_>>(),
            "rows_of_zeros": rows.collect::<Vec<_>>(),
        })
    }
}
