//! Methods that quantize, and what builds on them.

use super::*;

/// Bits per weight from which a size may be hit with codes of 8 bits.
const MANY_BITS: f64 = 5.0;
/// Bytes of an adapter that is exported beside codes: PEFT's holds 32 bits a value, llama.cpp's as many as the values need.
#[derive(Clone, Copy, Default)]
pub(super) struct Beside {
    packed: u64,
    gguf: u64,
}

impl Beside {
    fn of(self, to: Target) -> u64 {
        if to == Target::Gguf { self.gguf } else { self.packed }
    }
}

/// Matrices that were quantized and exported.
pub(super) struct Base<'b> {
    pub(super) file: &'b File,
    pub(super) commands: Vec<String>,
    /// The directory of decoded weights, and that of the export.
    pub(super) decoded: String,
    pub(super) packed: String,
    pub(super) cost: Cost,
    pub(super) warnings: Vec<String>,
}

impl<'a> Bench<'a> {
    /// Quantizes `input` on the grid of a file and exports it.
    pub(super) fn base<'b>(
        &self,
        entry: &Entry,
        way: Way,
        file: &'b File,
        files: &Files,
        input: (&str, &str),
    ) -> Judged<Base<'b>> {
        let name = entry.info.name;
        let planned = self.plan_method(entry, &way.parameters(file, files)?)?;
        let export = file.export.plan_seen(self.model, &files.seen(self.model, file.uniform))?;
        if !self.holds(export.peak_memory) {
            return Err(self.out_of_memory(" while it is exported", export.peak_memory));
        }
        let mut cost = self.cost_of(entry, &planned);
        cost.peak_memory = cost.peak_memory.max(export.peak_memory);
        let (source, stem) = input;
        let decoded = format!("{stem}-{name}");
        let packed = routes::exported(&decoded, &file.export);
        let text = [("text", &*self.question.text.0)];
        let data = if planned.tokens > 0 { &text[..] } else { &[] };
        Ok(Base {
            file,
            commands: vec![
                routes::apply(name, source, &planned.parameters, data, &decoded),
                routes::export(&decoded, &file.export, &packed),
            ],
            decoded,
            packed,
            cost,
            warnings: planned.plan.warnings,
        })
    }

    pub(super) fn quantizer(&self, entry: &'static Entry) -> Judged<Advised> {
        let unknown = "its parameters do not say a grid, so its size cannot be foreseen";
        let way = Way::of(entry).ok_or_else(|| refuse(unknown))?;
        if self.keeps_codes && !matches!(way, Way::Activations { .. }) {
            return Err(refuse(format!(
                "could at best change nothing: the weights lie on a grid already ({}), and refit export keeps every code within \
                 the size",
                self.facts.grid.span_in_words()
            )));
        }
        match way {
            Way::Nowhere(why) => Err(refuse(why)),
            Way::Sized => self.sized(entry),
            Way::Activations { weights, activations, symmetric } => {
                self.with_activations(entry, [weights, activations], symmetric)
            }
            Way::Uniform(_) | Way::Mean(_) | Way::Compensated(_) => {
                let (files, budget) = (self.files()?, self.question.budget);
                let beside = match way {
                    Way::Compensated(_) => self.beside(entry)?,
                    _ => Beside::default(),
                };
                let whole = |file: &File| file.size.plus(beside.of(file.export.to), files.weights);
                let fits = |file: &File| way.makes(file) && budget.pays(whole(file));
                let file = files
                    .best(budget, fits)
                    .ok_or_else(|| self.too_large(files, |file| way.makes(file), &whole))?;
                let mut base = self.base(entry, way, file, files, self.here())?;
                let mut reasons = Vec::new();
                if let Way::Compensated(_) = way {
                    let adapter = Bytes(beside.of(file.export.to));
                    reasons.push(format!("a product of low rank beside every matrix, exported as an adapter of {adapter}"));
                    base.warnings
                        .push("engines add it while they run (--lora of llama.cpp, PEFT)".into());
                }
                // Files for other tools hold the codes alone: refit measures codes and product together.
                let together = matches!(way, Way::Compensated(_)).then(|| base.decoded.clone());
                let mut advised = self.advised(entry, base, whole(file), reasons);
                advised.result = together.map_or(advised.result, |model| vec![model]);
                Ok(advised)
            }
        }
    }

    /// What a method writes beside the matrices that it quantizes.
    pub(super) fn beside(&self, entry: &Entry) -> Judged<Beside> {
        let plan = entry.default().plan(&self.inputs())?;
        let own = plan.tensors.iter().filter(|t| !self.model.artifact.contains(&t.name));
        let part = |dtype: DType| {
            let parts = own.clone().map(|t| (t.name.clone(), t.shape.clone(), dtype));
            file_bytes(parts.collect(), None)
        };
        Ok(Beside { packed: part(DType::F32)?, gguf: part(DType::F16)? })
    }

    /// Advice to quantize and export, with what goes before or beside it already among its commands.
    pub(super) fn advised(
        &self,
        entry: &Entry,
        base: Base,
        size: Size,
        mut reasons: Vec<String>,
    ) -> Advised {
        let cost = base.cost;
        if cost.calibration_tokens + cost.trained_tokens == 0 {
            reasons.insert(0, "needs no data".into());
        }
        if cost.calibration_tokens > 0 {
            let tokens = cost.calibration_tokens;
            reasons.push(format!("looks at {tokens} tokens of text and trains nothing"));
        }
        let grid = files::in_words(base.file.uniform);
        reasons.push(format!(
            "{grid}: within the size, the grid that loses least on a sample of the weights"
        ));
        Advised {
            method: entry.info.name,
            needs: Needs::of(entry.info.taxonomy.needs),
            runtime: base.file.export.to,
            bytes: size.bytes,
            bits_per_weight: size.bpw,
            rounding_error: Some(base.file.error),
            cost,
            exact: false,
            reasons,
            warnings: base.warnings,
            commands: base.commands,
            result: vec![base.packed],
        }
    }

    /// The method that finds its grids for a size.
    pub(super) fn sized(&self, entry: &'static Entry) -> Judged<Advised> {
        let (files, budget) = (self.files()?, self.question.budget);
        let packed = |file: &&File| file.export.to == Target::CompressedTensors;
        let own: Vec<Size> = files.all.iter().filter(packed).map(|file| file.size).collect();
        let by_size = |a: &&Size, b: &&Size| budget.of(**a).total_cmp(&budget.of(**b));
        let (Some(least), Some(most)) = (own.iter().min_by(by_size), own.iter().max_by(by_size))
        else {
            return Err(match self.question.runtime {
                Some(Target::CompressedTensors) | None => {
                    self.too_large(files, |_| false, &|file| file.size)
                }
                Some(_) => {
                    refuse("it counts the bytes of compressed-tensors, which was not asked for")
                }
            });
        };
        let weights = files.weights as f64;
        let (mut parameters, size) = match budget {
            Budget::Bytes(target) => {
                let bytes = target.min(most.bytes);
                let more = bytes as f64 - least.bytes as f64;
                (one("target", target), Size { bytes, bpw: least.bpw + 8.0 * more / weights })
            }
            Budget::BitsPerWeight(bits) => {
                let bpw = bits.min(most.bpw);
                let more = (bpw - least.bpw) * weights / 8.0;
                let bytes = (least.bytes as f64 + more) as u64;
                (one("bpw", bits), Size { bytes, bpw })
            }
        };
        let dtype = files.dtype_of(if size.bpw > MANY_BITS { 8 } else { 4 }, false);
        if dtype != OutputType::Auto {
            parameters.insert("dtype".to_owned(), json!(dtype));
        }
        let with_text = match self.question.needs {
            Needs::None => Err(refuse("")),
            _ => self.plan_method(entry, &parameters),
        };
        // Without text, weights alone decide.
        let alone = || self.plan_first(entry, &self.inputs(), vec![(parameters.clone(), 0)], "");
        let planned = with_text.or_else(|_| alone())?;
        let export = Export { to: Target::CompressedTensors, ..Export::default() };
        let (decoded, out) = self.names(entry.info.name, &export);
        let text = [("text", &*self.question.text.0)];
        let looks = planned.tokens > 0;
        let data = if looks { &text[..] } else { &[] };
        let source = &self.model.source;
        let mut reasons = vec![
            "hits any size: bits, groups and zero points for every matrix, where they are worth most"
                .to_owned(),
        ];
        reasons.push(match looks {
            true => format!("looks at {} tokens of text and trains nothing", planned.tokens),
            false => {
                "needs no data; with text it weighs matrices by what they do to predictions".into()
            }
        });
        Ok(Advised {
            method: entry.info.name,
            needs: if looks { Needs::Calibration } else { Needs::None },
            runtime: Target::CompressedTensors,
            bytes: size.bytes,
            bits_per_weight: size.bpw,
            rounding_error: None,
            cost: self.cost_of(entry, &planned),
            exact: false,
            reasons,
            warnings: planned.plan.warnings,
            commands: vec![
                routes::apply(entry.info.name, source, &planned.parameters, data, &decoded),
                routes::export(&decoded, &export, &out),
            ],
            result: vec![out],
        })
    }

    /// Methods that round activations, too: at 8 bits, where a format has words for it.
    pub(super) fn with_activations(
        &self,
        entry: &'static Entry,
        bits: [&str; 2],
        symmetric: bool,
    ) -> Judged<Advised> {
        let (files, budget) = (self.files()?, self.question.budget);
        let rows = |file: &&File| {
            let uniform = file.uniform;
            (uniform.bits, uniform.symmetric, uniform.group.size()) == (8, symmetric, None)
                && file.export.to == Target::CompressedTensors
        };
        let Some(file) = files.all.iter().find(rows) else {
            return Err(match self.question.runtime {
                Some(Target::CompressedTensors) | None => {
                    self.too_large(files, |_| false, &|file| file.size)
                }
                Some(_) => refuse(
                    "only compressed-tensors has words for rounded activations, and it was not asked for",
                ),
            });
        };
        let seen = files.seen(self.model, file.uniform);
        let size =
            Size::of(self.forecast.foresee(&files::with_activations(), &seen)?, files.weights);
        if !budget.pays(size) {
            return Err(refuse(format!(
                "rounds activations to 8 bits, and weights of 8 bits take {}, more than {}; at fewer bits no format has words \
                 for its activations",
                budget.words_of(size),
                budget.in_words()
            )));
        }
        let mut parameters = Map::new();
        for key in bits {
            if entry.default().parameters()[key] != 8 {
                parameters.insert(key.to_owned(), json!(8));
            }
        }
        if file.dtype != OutputType::Auto {
            parameters.insert("dtype".to_owned(), json!(file.dtype));
        }
        let planned = self.plan_method(entry, &parameters)?;
        let (decoded, packed) = self.names(entry.info.name, &file.export);
        let text = [("text", &*self.question.text.0)];
        let base = Base {
            file,
            commands: vec![
                routes::apply(
                    entry.info.name,
                    &self.model.source,
                    &planned.parameters,
                    &text,
                    &decoded,
                ),
                routes::export(&decoded, &file.export, &packed),
            ],
            decoded,
            packed,
            cost: self.cost_of(entry, &planned),
            warnings: planned.plan.warnings,
        };
        let reason = "products in integers: activations are rounded to 8 bits, too".to_owned();
        Ok(self.advised(entry, base, size, vec![reason]))
    }

    /// Pruning, and then quantizing what is left.
    pub(super) fn pruner(&self, entry: &'static Entry) -> Judged<Advised> {
        let Some(pattern) = self.question.pattern else {
            return Err(refuse(
                "zeros take as many bytes as other values in every format that refit writes; --pattern 2:4 advises it for \
                 runtimes that skip them",
            ));
        };
        let files = self.files()?;
        let then = entry.info.taxonomy.composes_with.iter().find_map(|name| {
            let next = registry::get(name).ok()?;
            let way = Way::of(next)?;
            matches!(way, Way::Uniform(_)).then_some((next, way))
        });
        let none = "it composes with no quantizer that keeps its zeros";
        let (next, way) = then.ok_or_else(|| refuse(none))?;
        let file = files
            .best(self.question.budget, |file| way.makes(file))
            .ok_or_else(|| self.too_large(files, |file| way.makes(file), &|file| file.size))?;
        let planned = self.plan_method(entry, &one("pattern", pattern))?;
        let pruned = format!("{}-{}", self.stem, entry.info.name);
        let mut base = self.base(next, way, file, files, (&pruned, &pruned))?;
        let text = [("text", &*self.question.text.0)];
        let data = if planned.tokens > 0 { &text[..] } else { &[] };
        let source = &self.model.source;
        let first = routes::apply(entry.info.name, source, &planned.parameters, data, &pruned);
        base.commands.insert(0, first);
        let own = self.cost_of(entry, &planned);
        base.cost = Cost { peak_memory: own.peak_memory.max(base.cost.peak_memory), ..own };
        base.warnings.extend(planned.plan.warnings);
        let reason = format!(
            "{pattern} zeros for runtimes that skip them, kept by {}; the file is no smaller for it",
            next.info.name
        );
        Ok(self.advised(entry, base, file.size, vec![reason]))
    }
}
