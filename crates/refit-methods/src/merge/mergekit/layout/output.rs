//! What goes along with the merged weights: configuration, tokenizer, chat template.

use refit_store::{Config as ModelConfig, DType, SideFile};
use serde_json::{Value, json};

use super::{Layout, layers};
use crate::error::{Error, Result};
use crate::inputs::Inputs;
use crate::merge::mergekit::chat;
use crate::merge::program::Program;

/// Configuration keys that count the layers.
const LAYER_KEYS: &[&str] = &["num_hidden_layers", "n_layer", "num_layers", "n_layers"];

/// Configuration keys that say something of every layer.
const PER_LAYER: &[&str] =
    &["layer_types", "no_rope_layers", "mlp_layer_types", "layers_block_type", "attention_layers"];

impl Layout<'_> {
    /// The program, with the files that differ from the first model's.
    pub(super) fn finish(mut self, inputs: &Inputs) -> Result<Program> {
        let config = self.config;
        let donor = &inputs.models[0];
        let mut set: Vec<(&str, Value)> = Vec::new();
        if !config.whole {
            self.count_layers(&mut set)?;
        }
        let mut program = std::mem::take(&mut self.program);
        if let Some(vocabulary) = self.vocabulary.take() {
            set.push(("vocab_size", json!(vocabulary.rows)));
            program.side_files.extend(vocabulary.files);
            program.dropped.extend(vocabulary.dropped);
            program.notes.extend(vocabulary.notes);
        }
        if let Some(wanted) = &config.chat_template
            && let Some(template) = chat::choose(wanted, &inputs.models)?
        {
            let find = |files: &[SideFile]| {
                files.iter().find(|file| file.name == "tokenizer_config.json").cloned()
            };
            let known = find(&program.side_files).or_else(|| find(donor.artifact.side_files()));
            let known = known.map(|file| file.read()).transpose()?;
            for file in chat::files(&template, known)? {
                program.side_files.retain(|other| other.name != file.name);
                program.side_files.push(file);
            }
        }
        let written = config.out_dtype.or(config.dtype);
        if written == Some(DType::F64) {
            let problem =
                "refit writes what it adds up in f64 as f32 at most; say out_dtype: float32";
            return Err(Error::recipe("dtype", problem));
        }
        program.set_config(donor, &set, written);
        program.warnings.extend(config.warnings.iter().cloned());
        if self.is_random() && !self.compat {
            program.notes.push(
                "what is kept of a change is divided by the probability of keeping it, as in the paper; mergekit restores the \
                 tensor's absolute sum instead (--mergekit-compat)"
                    .to_owned(),
            );
        }
        if self.compat {
            program.rounding = config.dtype;
        } else if matches!(config.dtype, Some(DType::F16 | DType::BF16)) {
            program.notes.push(
                "sums are f64 and rounded once; mergekit rounds every step to `dtype`".to_owned(),
            );
        }
        Ok(program)
    }

    /// The number of layers, and lists that say something of every layer, in the output's configuration.
    fn count_layers(&self, set: &mut Vec<(&'static str, Value)>) -> Result<()> {
        let donor = self.models[0].artifact.config();
        let before = layers(&self.models[0].artifact).values().copied().next().unwrap_or(0);
        let slices = &self.config.slices;
        let taken = slices.iter().filter_map(|slice| {
            let source = &slice.sources[0];
            Some((source.model.as_str(), source.range?))
        });
        let taken: Vec<(&str, (usize, usize))> = taken.collect();
        let count: usize = taken.iter().map(|(_, (from, to))| to - from).sum();
        if let Some(key) = LAYER_KEYS.iter().find(|key| donor.usize(key) == Some(before)) {
            set.push((key, json!(count)));
        }
        for key in PER_LAYER {
            let list = |config: &ModelConfig| config.get(key).and_then(Value::as_array).cloned();
            if list(donor).is_none_or(|list| list.len() != before) {
                continue;
            }
            let mut joined = Vec::new();
            for (model, (from, to)) in &taken {
                let theirs = list(self.artifact(model).config()).unwrap_or_default();
                let part = theirs.get(*from..*to).ok_or_else(|| {
                    let problem =
                        format!("`{key}` of its configuration does not have an entry per layer");
                    Error::recipe(*model, problem)
                })?;
                joined.extend(part.iter().cloned());
            }
            set.push((key, json!(joined)));
        }
        Ok(())
    }
}
