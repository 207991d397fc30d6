//! The model as it is, in other formats, and the smallest of all files.

use super::*;

impl<'a> Bench<'a> {
    /// The smallest file, and how it is made: rounding to nearest, or exporting to GGML's types.
    ///
    /// # Errors
    /// None in practice.
    pub fn smallest(&self) -> Result<Option<(Size, Smallest)>> {
        let budget = self.question.budget;
        let mut found: Option<(Size, Smallest)> = None;
        let mut offer = |size: Size, method: &'static str, commands: Vec<String>| {
            if found.as_ref().is_none_or(|(least, _)| budget.of(size) < budget.of(*least)) {
                let smallest =
                    Smallest { bytes: size.bytes, bits_per_weight: size.bpw, method, commands };
                found = Some((size, smallest));
            }
        };
        if let Ok(files) = &self.files
            && let Some(file) = files.smallest(budget)
            && let Some(way) = Way::of(registry::get("rtn")?)
        {
            let parameters = way.parameters(file, files)?;
            let (decoded, packed) = self.names("rtn", &file.export);
            let apply = routes::apply("rtn", &self.model.source, &parameters, &[], &decoded);
            let export = routes::export(&decoded, &file.export, &packed);
            offer(file.size, "rtn", vec![apply, export]);
        }
        for (export, size, _) in self.exports().0 {
            let out = routes::exported(&self.stem, &export);
            offer(size, "export", vec![routes::export(&self.model.source, &export, &out)]);
        }
        Ok(found)
    }

    /// Exports of the model as it is, with what they take and whether they keep every value; and what stands in the way of others.
    pub(super) fn exports(&self) -> (Vec<(Export, Size, bool)>, Vec<String>) {
        let asked = |to: Target| self.question.runtime.is_none_or(|only| only == to);
        let plain = |to: Target| Export { to, ..Export::default() };
        let typed =
            |to: Target, dtype: DType| Export { r#type: ExportType(Some(dtype)), ..plain(to) };
        let halves = [DType::BF16, DType::F16];
        let mut all = Vec::new();
        if asked(Target::Safetensors) {
            all.extend(halves.map(|dtype| typed(Target::Safetensors, dtype)));
        }
        if asked(Target::Gguf) {
            // Ternary types are for models that were trained to be.
            let ternary = |ggml: &GgmlType| matches!(ggml, GgmlType::TQ1_0 | GgmlType::TQ2_0);
            let blocks = WRITABLE.into_iter().filter(|ggml| !ternary(ggml)).map(DType::Ggml);
            all.extend(halves.into_iter().chain(blocks).map(|dtype| typed(Target::Gguf, dtype)));
        }
        // Codes that are there already.
        if !self.as_it_is.grids.is_empty() || self.model.artifact.tensors().iter().any(is_block) {
            all.extend(files::TARGETS.into_iter().filter(|to| asked(*to)).map(plain));
        }
        let weights = self.weights();
        let (mut found, mut refusals) = (Vec::new(), Vec::<String>::new());
        for export in all {
            match self.forecast.foresee(&export, &self.as_it_is) {
                Ok(foreseen) => {
                    let exact = export.r#type.0.is_none() && foreseen.keeps_grids;
                    found.push((export, Size::of(foreseen, weights), exact));
                }
                Err(error) => {
                    let why = error.to_string();
                    if !refusals.contains(&why) {
                        refusals.push(why);
                    }
                }
            }
        }
        (found, refusals)
    }

    /// The model as it is, in another format.
    pub(super) fn exporter(&self, entry: &'static Entry) -> Judged<Advised> {
        let (budget, (exports, refusals)) = (self.question.budget, self.exports());
        let within = exports.iter().filter(|(_, size, _)| budget.pays(*size));
        // Codes that are kept beat any rounding; of roundings, the one with most bits.
        let key = |(_, size, exact): &&(Export, Size, bool)| {
            let size = budget.of(*size);
            if *exact { (true, -size) } else { (false, size) }
        };
        let by_key = |a: &&(Export, Size, bool), b: &&(Export, Size, bool)| {
            let (a, b) = (key(a), key(b));
            a.0.cmp(&b.0).then(a.1.total_cmp(&b.1))
        };
        let Some((export, size, exact)) = within.max_by(by_key) else {
            let least = exports.iter().map(|(_, size, _)| *size);
            let least = least.min_by(|a, b| budget.of(*a).total_cmp(&budget.of(*b)));
            return Err(match least {
                Some(least) => refuse(format!(
                    "the smallest export of the model as it is takes {}, more than {}",
                    budget.words_of(least),
                    budget.in_words()
                )),
                None => refuse(refusals.join("; ")),
            });
        };
        let planned = {
            let stated = files::stated(export);
            let parameters = stated.as_object().cloned().unwrap_or_default();
            self.plan_first(entry, &self.inputs(), vec![(parameters, 0)], "")?
        };
        let out = routes::exported(&self.stem, export);
        let kind = match (exact, export.r#type.0) {
            (true, _) => {
                "keeps every value: the codes that are there are written as they are".to_owned()
            }
            (_, Some(dtype @ DType::Ggml(_))) => {
                format!("rounds the weights to {dtype} blocks, to nearest")
            }
            (_, Some(dtype)) => format!("rounds the weights to {dtype}"),
            _ => "writes what lies on no grid as it is".to_owned(),
        };
        Ok(Advised {
            method: entry.info.name,
            needs: Needs::None,
            runtime: export.to,
            bytes: size.bytes,
            bits_per_weight: size.bpw,
            rounding_error: None,
            cost: Cost { peak_memory: planned.plan.peak_memory, ..Cost::default() },
            exact: *exact,
            reasons: vec!["needs no data".into(), kind],
            warnings: planned.plan.warnings,
            commands: vec![routes::export(&self.model.source, export, &out)],
            result: vec![out],
        })
    }
}

fn is_block(info: &TensorInfo) -> bool {
    matches!(info.dtype, DType::Ggml(_))
}
