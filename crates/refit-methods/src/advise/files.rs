//! Files that a quantized model could become: every grid that all matrices can share, in every format that holds it, with its
//! size to the byte and what rounding to it loses on a sample of the weights.

use refit_store::architecture::{Layout, Site};
use refit_store::lattice::Lattice;
use refit_store::{DType, GgmlType};
use serde_json::{Value, json};

use super::{Budget, Question};
use crate::error::Result;
use crate::inputs::ModelInput;
use crate::quantize::chain::Group;
use crate::quantize::export::{Activations, Export, ExportType, Forecast, Foreseen, Seen, Target};
use crate::quantize::fit::Fit;
use crate::quantize::fit::menu::{Menu, Uniform};
use crate::quantize::grid::ScaleRule;
use crate::quantize::options::mean_bits;
use crate::rewrite::{OutputType, read_matrix, shape_of};

/// Matrices and rows of each that are rounded on trial, spread over the model.
const SAMPLE: (usize, usize) = (8, 16);

/// Formats in the order in which equals are offered.
pub const TARGETS: [Target; 3] = [Target::CompressedTensors, Target::Gptq, Target::Gguf];

/// A file.
#[derive(Clone, Debug)]
pub struct File {
    /// The grid that all matrices share.
    pub uniform: Uniform,
    /// How it is written.
    pub export: Export,
    /// What it takes.
    pub size: Size,
    /// Squared error of rounding to nearest, relative to the squares of the sampled weights.
    pub error: f64,
    /// The type in which decoded weights must be written for their codes to be found again.
    pub dtype: OutputType,
}

/// What a file takes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Size {
    /// Bytes of the weight files.
    pub bytes: u64,
    /// Bits per weight of the matrices.
    pub bpw: f64,
}

impl Size {
    /// That of files in which the matrices, `weights` elements together, take what was foreseen.
    pub fn of(foreseen: Foreseen, weights: u64) -> Self {
        let bpw = 8.0 * foreseen.linears as f64 / weights.max(1) as f64;
        Self { bytes: foreseen.bytes, bpw }
    }

    /// The size with so many more bytes in files of their own.
    pub fn plus(self, bytes: u64, weights: u64) -> Self {
        let bpw = self.bpw + 8.0 * bytes as f64 / weights.max(1) as f64;
        Self { bytes: self.bytes + bytes, bpw }
    }
}

/// Every file of a model.
pub struct Files<'a> {
    /// The files.
    pub all: Vec<File>,
    /// Why a format holds none of them.
    pub refusals: Vec<String>,
    /// Weights of all matrices.
    pub weights: u64,
    /// The type in which methods write what they do not quantize.
    dtype: OutputType,
    /// Some matrices are stored with the 8 significant bits of bfloat16.
    coarse: bool,
    sites: Vec<&'a Site>,
}

impl<'a> Files<'a> {
    /// The files that the question allows.
    ///
    /// # Errors
    /// A model without matrices to quantize; files that cannot be read.
    pub fn of(model: &'a ModelInput, question: &Question, forecast: &Forecast) -> Result<Self> {
        let fit = Fit::default();
        let menu = Menu::of(&fit, model)?;
        // Decoded blocks would keep embeddings in 32 bits where 16 do.
        let dtype = if menu.others_are_wide() { OutputType::F16 } else { OutputType::Auto };
        let sample = Sample::of(model, &menu.sites)?;
        let mut files = Self {
            all: Vec::new(),
            refusals: Vec::new(),
            weights: menu.weights(),
            dtype,
            coarse: menu.sites.iter().any(|site| {
                let info = model.artifact.tensor(&site.name);
                info.is_ok_and(|info| info.dtype == DType::BF16)
            }),
            sites: menu.sites.clone(),
        };
        let targets =
            TARGETS.iter().filter(|target| question.runtime.is_none_or(|only| only == **target));
        let targets: Vec<Target> = targets.copied().collect();
        for uniform in menu.uniform() {
            let error = sample.error(uniform);
            let seen = files.seen(model, uniform);
            for export in targets.iter().flat_map(|target| exports(*target)) {
                if let Some(problem) = unsayable(&menu, &export, uniform) {
                    files.refuse(problem);
                    continue;
                }
                match forecast.foresee(&export, &seen) {
                    Ok(foreseen) if foreseen.keeps_grids => {
                        let size = Size::of(foreseen, files.weights);
                        let dtype = files.dtype_of(uniform.bits, uniform.symmetric);
                        files.all.push(File { uniform, export, size, error, dtype });
                    }
                    Ok(_) => {}
                    Err(error) => files.refuse(error.to_string()),
                }
            }
        }
        Ok(files)
    }

    fn refuse(&mut self, why: String) {
        if !why.is_empty() && !self.refusals.contains(&why) {
            self.refusals.push(why);
        }
    }

    /// The type in which decoded weights on a grid must be written. With zero points, codes of 8 bits reach 255, and half of the
    /// last of 8 significant bits is half a step there: bfloat16 cannot tell neighbours apart.
    pub fn dtype_of(&self, bits: u8, symmetric: bool) -> OutputType {
        match self.dtype {
            OutputType::Auto if self.coarse && bits == 8 && !symmetric => OutputType::F16,
            dtype => dtype,
        }
    }

    /// The model with all matrices on a grid.
    pub fn seen(&self, model: &ModelInput, uniform: Uniform) -> Seen {
        let lattice = |site: &&Site| {
            let choice = uniform.of(shape_of(site).1);
            let lattice =
                Lattice { bits: choice.bits, symmetric: choice.symmetric, group: choice.group };
            (site.name.clone(), lattice)
        };
        let dtype = self.dtype_of(uniform.bits, uniform.symmetric);
        Seen::after(model, dtype, self.sites.iter().map(lattice))
    }

    /// The file within a budget that loses least; of equals, the one that leaves embeddings alone, then the smallest.
    pub fn best(&self, budget: Budget, wanted: impl Fn(&File) -> bool) -> Option<&File> {
        let within = self.all.iter().filter(|file| budget.pays(file.size) && wanted(file));
        within.min_by(|a, b| {
            let rounds = |file: &File| file.export.embedding_type.0.is_some();
            let errors = a.error.total_cmp(&b.error);
            errors.then(rounds(a).cmp(&rounds(b))).then(a.size.bytes.cmp(&b.size.bytes))
        })
    }

    /// The smallest file by a budget's measure.
    pub fn smallest(&self, budget: Budget) -> Option<&File> {
        self.all.iter().min_by(|a, b| budget.of(a.size).total_cmp(&budget.of(b.size)))
    }

    /// Bits per weight of a grid, as methods count them before anything is packed.
    ///
    /// # Errors
    /// None: uniform grids divide every row.
    pub fn counted_bits(&self, uniform: Uniform) -> Result<f64> {
        let grid = uniform.of(1).grid(ScaleRule::Full);
        mean_bits(&self.sites, uniform.group, |group| grid.bits_per_weight(group))
    }
}

/// Why a grid is not offered in a format, although its plan might not say so; empty where it goes without saying.
fn unsayable(menu: &Menu, export: &Export, uniform: Uniform) -> Option<String> {
    if export.to == Target::Gguf {
        // Which type holds codes with zero points depends on the zero points.
        return (!uniform.symmetric).then(String::new);
    }
    let site = menu.transposed()?;
    Some(format!(
        "`{}` is stored transposed ({}), which packed formats have no word for",
        site.name,
        if site.layout == Layout::InOut { "[in, out]" } else { "no plain matrix" }
    ))
}

/// Ways of writing a format.
fn exports(to: Target) -> Vec<Export> {
    let plain = Export { to, ..Export::default() };
    let embedding = ExportType(Some(DType::Ggml(GgmlType::Q8_0)));
    match to {
        Target::Gguf => vec![plain.clone(), Export { embedding_type: embedding, ..plain }],
        _ => vec![plain],
    }
}

/// The export of weights in 8 bits whose readers round activations, too.
pub fn with_activations() -> Export {
    Export { to: Target::CompressedTensors, activations: Activations::Int8, ..Export::default() }
}

/// Parameters of an export that are not its defaults.
pub fn stated(export: &Export) -> Value {
    let (all, plain) = (json!(export), json!(Export::default()));
    let fields = all.as_object().into_iter().flatten();
    // The format is always said.
    let own = fields.filter(|(key, value)| *key == "to" || plain[key.as_str()] != **value);
    Value::Object(own.map(|(key, value)| (key.clone(), value.clone())).collect())
}

/// Rows of some matrices.
struct Sample {
    /// Length of a row, and rows.
    matrices: Vec<(usize, Vec<f32>)>,
    squares: f64,
}

impl Sample {
    fn of(model: &ModelInput, sites: &[&Site]) -> Result<Self> {
        let step = sites.len().div_ceil(SAMPLE.0).max(1);
        let matrices = sites
            .iter()
            .step_by(step)
            .map(|site| Ok((shape_of(site).1, rows(model, site)?)))
            .collect::<Result<Vec<_>>>()?;
        let square = |w: &f32| f64::from(*w) * f64::from(*w);
        let squares = matrices.iter().flat_map(|(_, rows)| rows).map(square).sum();
        Ok(Self { matrices, squares })
    }

    /// What rounding to nearest loses: its squared error, relative.
    fn error(&self, uniform: Uniform) -> f64 {
        let mut lost = 0.0;
        for (inputs, rows) in &self.matrices {
            let choice = uniform.of(*inputs);
            let grid = choice.grid(ScaleRule::Full);
            for row in rows.chunks(*inputs) {
                lost += grid.row_error(row, choice.group);
            }
        }
        if self.squares > 0.0 { lost / self.squares } else { 0.0 }
    }
}

/// Some rows `[rows, in]` of a matrix.
fn rows(model: &ModelInput, site: &Site) -> Result<Vec<f32>> {
    let (out, inputs) = shape_of(site);
    let count = out.min(SAMPLE.1);
    let starts = (0..count).map(|at| at * out / count * inputs);
    let mut rows = vec![0.0; count * inputs];
    if site.layout == Layout::OutIn {
        for (start, row) in starts.zip(rows.chunks_exact_mut(inputs)) {
            model.artifact.read_f32_into(&site.name, start, row)?;
        }
    } else {
        let whole = read_matrix(model, site)?;
        for (start, row) in starts.zip(rows.chunks_exact_mut(inputs)) {
            row.copy_from_slice(&whole[start..start + inputs]);
        }
    }
    Ok(rows)
}

/// A grid in words.
pub fn in_words(uniform: Uniform) -> String {
    let zero = if uniform.symmetric { "" } else { " with zero points" };
    match uniform.group {
        Group::Row => format!("{} bits, a scale for every row{zero}", uniform.bits),
        Group::Size(size) => format!("{} bits in groups of {size}{zero}", uniform.bits),
    }
}
