//! Methods that train, and thin factors, which may.

use super::quantizing::Base;
use super::*;

/// Tokens that a recovery trains on, where there are as many.
const RECOVERY: u64 = 10_000;
/// Most tokens of an example, as trainings have it.
const EXAMPLE: u64 = 512;
/// Examples per update, largest first.
const BATCHES: [u64; 3] = [4, 2, 1];
/// By how much thin factors may shrink the matrices, the least first.
const RATIOS: [u64; 6] = [2, 3, 4, 6, 8, 12];
/// Quantizers that others build on, best first: the first that the budgets pay is taken.
const BASES: [&str; 2] = ["gptq", "rtn"];

impl<'a> Bench<'a> {
    /// Ways to train, the largest batch first, each with so many tokens as the budgets pay.
    pub(super) fn trainings(&self) -> Judged<Vec<(Map<String, Value>, u64)>> {
        let question = self.question;
        let limit = |tokens: Option<u64>| tokens.unwrap_or(u64::MAX);
        let tokens = limit(question.tokens).min(limit(question.train_tokens)).min(RECOVERY);
        let context =
            self.model.artifact.architecture().dims.context.map_or(u64::MAX, |n| n as u64);
        let length = EXAMPLE.min(context).max(1);
        let variants: Vec<_> = BATCHES
            .into_iter()
            .filter(|batch| batch * length <= tokens)
            .map(|batch| {
                let steps = tokens / (batch * length);
                let mut parameters = one("steps", steps);
                if batch != BATCHES[0] {
                    parameters.insert("batch".to_owned(), json!(batch));
                }
                (parameters, steps * batch * length)
            })
            .collect();
        if !variants.is_empty() {
            return Ok(variants);
        }
        let (flag, given) = match question.train_tokens {
            Some(given) if given < limit(question.tokens) => ("--train-tokens", given),
            _ => ("--tokens-available", question.tokens.unwrap_or(0)),
        };
        let flops = |tokens: u64| 6.0 * tokens as f64 * self.facts.parameters as f64;
        Err(too_dear(format!(
            "needs {length} tokens to learn from for a single update, {:.1e} FLOPs (6 per token and parameter), and {flag} {given} \
             pays {:.1e}",
            flops(length),
            flops(given)
        )))
    }

    pub(super) fn plan_training(&self, entry: &Entry, own: &Map<String, Value>) -> Judged<Planned> {
        let inputs = Inputs { data: self.question.data.1.clone(), ..self.inputs() };
        let mut variants = self.trainings()?;
        variants.iter_mut().for_each(|(parameters, _)| parameters.extend(own.clone()));
        self.plan_first(entry, &inputs, variants, " even with one example per update")
    }

    /// The first base that the budgets pay, with so many bytes left for what stands beside it.
    pub(super) fn any_base<'b>(
        &self,
        files: &'b Files<'a>,
        beside: u64,
        input: (&str, &str),
    ) -> Judged<(Base<'b>, &'static str)> {
        let mut last = refuse("no quantizer to build on");
        for name in BASES {
            let entry = registry::get(name)?;
            if least(entry.info) > self.question.needs {
                continue;
            }
            let Some(way) = Way::of(entry) else { continue };
            let budget = self.question.budget;
            let fits =
                |file: &File| way.makes(file) && budget.pays(file.size.plus(beside, files.weights));
            let found = match files.best(budget, fits) {
                Some(file) => self.base(entry, way, file, files, input),
                None => Err(refuse(format!(
                    "its adapter takes {}, which leaves no room for the model in {}",
                    Bytes(beside),
                    budget.in_words()
                ))),
            };
            match found {
                Ok(base) => return Ok((base, entry.info.name)),
                Err(refusal) => last = refusal,
            }
        }
        Err(last)
    }

    /// An adapter that recovers what quantization lost, beside the quantized model.
    pub(super) fn recovery(&self, entry: &'static Entry) -> Judged<Advised> {
        if self.keeps_codes {
            return Err(refuse(
                "recovers what quantizing loses, and refit export keeps every code within the size",
            ));
        }
        let files = self.files()?;
        let planned = self.plan_training(entry, &Map::new())?;
        let adapter = bytes_of(&planned.plan)?;
        let (mut base, name) = self.any_base(files, adapter, self.here())?;
        let out = format!("{}-{}", base.decoded, entry.info.name);
        let data = [("data", &*self.question.data.0)];
        let step = routes::apply(entry.info.name, &base.decoded, &planned.parameters, &data, &out);
        base.commands.push(step);
        let size = base.file.size.plus(adapter, files.weights);
        base.cost = together(base.cost, self.cost_of(entry, &planned));
        base.warnings.extend(planned.plan.warnings.clone());
        if self.question.keep == Keep::General {
            base.warnings.push(
                "what is learned from text of one kind costs the others: give it text of several, and measure all of them".into(),
            );
        }
        let reasons = vec![format!(
            "trains an adapter of {} on {} tokens, beside the model that {name} quantized (refit eval {} --adapter {out})",
            Bytes(adapter),
            planned.tokens,
            base.packed
        )];
        let result = vec![base.packed.clone(), "--adapter".to_owned(), out];
        Ok(Advised { result, ..self.advised(entry, base, size, reasons) })
    }

    /// Thin factors in place of matrices, as many weights as the size pays for.
    pub(super) fn thinner(&self, entry: &'static Entry) -> Judged<Advised> {
        let (question, source) = (self.question, &self.model.source);
        if question.runtime.is_some_and(|only| only != Target::Safetensors) {
            return Err(refuse(
                "only refit reads thin factors (safetensors); --runtime asks for another format",
            ));
        }
        if self.keeps_codes {
            return Err(refuse(
                "the size pays for the codes that the model has, and factors of them are no codes",
            ));
        }
        let trains = Needs::of(entry.info.taxonomy.needs) == Needs::Training;
        let mut smallest = None;
        for ratio in RATIOS {
            let own = one("ratio", ratio);
            let planned = match trains {
                true => self.plan_training(entry, &own)?,
                false => self.plan_method(entry, &own)?,
            };
            let linears = |t: &&PlannedTensor| {
                let site = self.model.artifact.architecture().site(&t.name);
                site.is_none_or(|site| {
                    self.model.artifact.architecture().linears().any(|l| l.name == site.name)
                })
            };
            let tensors = &planned.plan.tensors;
            let size = Size {
                bytes: bytes_of(&planned.plan)?,
                bpw: 8.0 * tensors.iter().filter(linears).map(|t| t.bytes).sum::<u64>() as f64
                    / self.weights().max(1) as f64,
            };
            smallest = Some(size);
            if !question.budget.pays(size) {
                continue;
            }
            let out = format!("{}-{}", self.stem, entry.info.name);
            let data = [("data", &*question.data.0)];
            let data = if trains { &data[..] } else { &[] };
            let command = routes::apply(entry.info.name, source, &planned.parameters, data, &out);
            let mut reasons = vec![format!(
                "pairs of thin matrices with 1/{ratio} of the weights, which refit runs as they are"
            )];
            reasons.push(match trains {
                true => format!("trains them on {} tokens towards the original", planned.tokens),
                false => "needs no data".to_owned(),
            });
            let warning = "weights of language models are close to full rank: expect to train afterwards, or quantize instead";
            return Ok(Advised {
                method: entry.info.name,
                needs: Needs::of(entry.info.taxonomy.needs),
                runtime: Target::Safetensors,
                bytes: size.bytes,
                bits_per_weight: size.bpw,
                rounding_error: None,
                cost: self.cost_of(entry, &planned),
                exact: false,
                reasons,
                warnings: [vec![warning.to_owned()], planned.plan.warnings].concat(),
                commands: vec![command],
                result: vec![out],
            });
        }
        Err(match smallest {
            Some(least) => refuse(format!(
                "with 1/{} of the weights it takes {}, more than {}",
                RATIOS[RATIOS.len() - 1],
                question.budget.words_of(least),
                question.budget.in_words()
            )),
            None => refuse("it says no size"),
        })
    }

    /// Training that changes the weights themselves, before they are quantized.
    pub(super) fn specialist(&self, entry: &'static Entry) -> Judged<Advised> {
        if self.question.keep == Keep::General {
            return Err(refuse(
                "trains the weights themselves on one text, which costs the model's other abilities (the survey's second thesis, \
                 recalled); --keep task asks for that",
            ));
        }
        if self.facts.size_class == SizeClass::RealLarge {
            return Err(refuse(format!(
                "trains the weights themselves, and at {} parameters and more (a recalled threshold) methods without training, or \
                 adapters, are the default",
                crate::advise::facts::REAL_LARGE
            )));
        }
        let files = self.files()?;
        let planned = self.plan_training(entry, &Map::new())?;
        let trained = format!("{}-{}", self.stem, entry.info.name);
        let (mut base, name) = self.any_base(files, 0, (&trained, &trained))?;
        let data = [("data", &*self.question.data.0)];
        let source = &self.model.source;
        let first = routes::apply(entry.info.name, source, &planned.parameters, &data, &trained);
        base.commands.insert(0, first);
        base.cost = together(base.cost, self.cost_of(entry, &planned));
        base.warnings.extend(planned.plan.warnings.clone());
        let size = base.file.size;
        let reason = format!(
            "trains the model on {} tokens of the task before {name} quantizes it",
            planned.tokens
        );
        Ok(self.advised(entry, base, size, vec![reason]))
    }
}

/// What two steps cost.
fn together(a: Cost, b: Cost) -> Cost {
    Cost {
        calibration_tokens: a.calibration_tokens + b.calibration_tokens,
        trained_tokens: a.trained_tokens + b.trained_tokens,
        flops: a.flops + b.flops,
        peak_memory: a.peak_memory.max(b.peak_memory),
    }
}
