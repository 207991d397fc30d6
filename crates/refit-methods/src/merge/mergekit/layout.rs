//! From a recipe to tensors: which layers of which models become which tensor of the output, with which parameters.

use std::collections::{BTreeMap, BTreeSet};

use refit_store::Artifact;
use refit_store::architecture::Role;

use super::config::{Config, Slice, Source};
use super::setting::{Kind, Settings};
use super::vocabulary::Vocabulary;
use crate::error::{Error, Result};
use crate::inputs::{Inputs, ModelInput};
use crate::merge::fold::check_alike;
use crate::merge::group::Part;
use crate::merge::program::{Program, Stored, Work, is_buffer, is_vocabulary, names};
use crate::method::{Action, Need};

mod output;
mod parameters;

use parameters::kinds;

/// Lays a recipe out. `names` are the models' names in it, in the order of `inputs.models`.
pub struct Layout<'a> {
    config: &'a Config,
    models: &'a [ModelInput],
    names: &'a [String],
    compat: bool,
    vocabulary: Option<Vocabulary>,
    /// Per parameter: what it is, and whether every model has its own.
    kinds: BTreeMap<String, (Kind, bool)>,
    program: Program,
}

/// A tensor on its way to the output.
struct Place<'a> {
    out: String,
    slice: &'a Slice,
    sources: &'a [Source],
    /// The tensor's name in every source.
    tensors: Vec<String>,
    /// How far through the layers of the slice.
    t: f64,
}

/// Lays the whole recipe out.
///
/// # Errors
/// Everything that does not fit: models, layers, parameters, vocabularies.
pub fn program(
    config: &Config,
    inputs: &Inputs,
    names: &[String],
    compat: bool,
) -> Result<Program> {
    let models = &inputs.models;
    // Models that only lend tokens are not merged.
    let merged: BTreeSet<&String> = config
        .slices
        .iter()
        .flat_map(|slice| slice.sources.iter().map(|source| &source.model))
        .chain(&config.base)
        .collect();
    let aligned = config.tokenizer.is_some() || compat;
    for (model, name) in models.iter().zip(names).skip(1) {
        if merged.contains(name) {
            check_alike(&models[0], model, !aligned)?;
        }
    }
    let vocabulary = match &config.tokenizer {
        Some(wanted) => {
            let base = config.base.as_ref().and_then(|base| names.iter().position(|n| n == base));
            Some(Vocabulary::new(wanted, models, names, base)?)
        }
        None => None,
    };
    let mut layout = Layout {
        config,
        models,
        names,
        compat,
        vocabulary,
        kinds: kinds(config),
        program: Program::default(),
    };
    match config.whole {
        true => layout.whole_models()?,
        false => layout.stacked()?,
    }
    layout.finish(inputs)
}

impl<'a> Layout<'a> {
    fn place_of(&self, name: &str) -> usize {
        self.names.iter().position(|other| other == name).unwrap_or(0)
    }

    fn artifact(&self, name: &str) -> &'a Artifact {
        &self.models[self.place_of(name)].artifact
    }

    /// `models:`; the base takes part without being listed.
    fn whole_models(&mut self) -> Result<()> {
        let config = self.config;
        let slice = &config.slices[0];
        let mut sources = slice.sources.clone();
        if let Some(base) = &config.base
            && sources.iter().all(|source| source.model != *base)
        {
            sources.push(Source { model: base.clone(), range: None, parameters: Settings::new() });
        }
        let members: Vec<ModelInput> = sources
            .iter()
            .map(|source| self.models[self.place_of(&source.model)].clone())
            .collect();
        for source in &sources[1..] {
            let (a, b) =
                (layers(self.artifact(&sources[0].model)), layers(self.artifact(&source.model)));
            if a != b && !a.is_empty() && !b.is_empty() {
                let total = |layers: &BTreeMap<_, usize>| layers.values().sum::<usize>();
                return Err(Error::Mismatch {
                    first: sources[0].model.clone(),
                    second: source.model.clone(),
                    problem: format!(
                        "they have {} and {} layers; say with `slices` which layers go together",
                        total(&a),
                        total(&b)
                    ),
                });
            }
        }
        // The first model that goes along decides on names; the base is that, where there is one.
        let mut ordered = members.clone();
        let first =
            config.base.as_ref().and_then(|base| sources.iter().position(|s| s.model == *base));
        ordered.swap(0, first.unwrap_or(0));
        let architecture = ordered[0].artifact.architecture();
        let counts = layers(&ordered[0].artifact);
        let found = names(&ordered)?;
        let slice = Slice { sources: sources.clone(), ..slice.clone() };
        for name in found {
            let site = architecture.site(&name);
            let layer = site.and_then(|site| site.layer);
            let count = site.and_then(|site| counts.get(&site.stack)).copied().unwrap_or(0);
            let t = layer.map_or(0.0, |layer| way(layer, count));
            let tensors = vec![name.clone(); sources.len()];
            self.tensor(Place { out: name, slice: &slice, sources: &sources, tensors, t })?;
        }
        Ok(())
    }

    /// `slices:`; layers are numbered anew.
    fn stacked(&mut self) -> Result<()> {
        let config = self.config;
        for (i, slice) in config.slices.iter().enumerate() {
            self.check_slice(slice, &format!("slices[{i}]"))?;
        }
        let (Some(first), Some(last)) = (config.slices.first(), config.slices.last()) else {
            return Ok(());
        };
        let outside = self.outside(first, last)?;
        for (name, before) in outside {
            let slice = if before { first } else { last };
            let mut sources = &slice.sources[..];
            if !before && self.compat {
                // mergekit pairs the last slice's models with the first slice's number of them.
                sources = &sources[..sources.len().min(first.sources.len())];
            }
            let tensors = vec![name.clone(); sources.len()];
            self.tensor(Place { out: name, slice, sources, tensors, t: 0.0 })?;
        }
        let mut next = 0;
        for slice in &config.slices {
            let (from, to) = slice.sources[0].range.unwrap_or((0, 0));
            let template = self.artifact(&slice.sources[0].model);
            for offset in 0..to - from {
                self.check_layer(slice, offset)?;
                for name in layer_tensors(template, from + offset) {
                    let at = |layer: usize| renumber(&name, from + offset, layer);
                    let start = |source: &Source| source.range.map_or(0, |range| range.0);
                    let tensors = slice.sources.iter().map(|s| at(start(s) + offset)).collect();
                    let t = way(offset, to - from);
                    let sources = &slice.sources[..];
                    self.tensor(Place { out: at(next + offset), slice, sources, tensors, t })?;
                }
            }
            next += to - from;
        }
        Ok(())
    }

    /// Refuses tensors of a layer that the slice's first source does not have: they would be lost.
    fn check_layer(&self, slice: &Slice, offset: usize) -> Result<()> {
        let start = |source: &Source| source.range.map_or(0, |range| range.0) + offset;
        let first = &slice.sources[0];
        let template = layer_tensors(self.artifact(&first.model), start(first));
        for source in &slice.sources[1..] {
            for name in layer_tensors(self.artifact(&source.model), start(source)) {
                let there = renumber(&name, start(source), start(first));
                if !template.contains(&there) && !is_buffer(&name) {
                    let problem =
                        format!("{} has no such tensor in layer {}", first.model, start(first));
                    return Err(Error::tensor(&source.model, name, problem));
                }
            }
        }
        Ok(())
    }

    fn check_slice(&self, slice: &Slice, at: &str) -> Result<()> {
        let length = |source: &Source| source.range.map_or(0, |(from, to)| to - from);
        for (k, source) in slice.sources.iter().enumerate() {
            let at = format!("{at}.sources[{k}]");
            let counts = layers(self.artifact(&source.model));
            let [count] = counts.values().copied().collect::<Vec<_>>()[..] else {
                let problem = format!(
                    "{} has {} stacks of layers; slices need one",
                    source.model,
                    counts.len()
                );
                return Err(Error::recipe(at, problem));
            };
            if let Some((_, to)) = source.range.filter(|(_, to)| *to > count) {
                let problem =
                    format!("layer_range ends at {to}, and {} has {count} layers", source.model);
                return Err(Error::recipe(at, problem));
            }
            if length(source) != length(&slice.sources[0]) {
                let problem = format!(
                    "{} layers here and {} in the first source; the sources of a slice have equal lengths",
                    length(source),
                    length(&slice.sources[0])
                );
                return Err(Error::recipe(at, problem));
            }
        }
        Ok(())
    }

    /// Tensors outside the layers, and whether they come before them.
    fn outside(&self, first: &Slice, last: &Slice) -> Result<Vec<(String, bool)>> {
        let mut found = Vec::new();
        for (slice, before) in [(first, true), (last, false)] {
            let members: Vec<ModelInput> = slice
                .sources
                .iter()
                .map(|source| self.models[self.place_of(&source.model)].clone())
                .collect();
            // Tensors in layers may differ; the others must agree as in a merge of whole models.
            let artifact = &members[0].artifact;
            for info in artifact.tensors() {
                if layer_of(artifact, &info.name).is_none()
                    && comes_before(artifact, &info.name) == before
                {
                    found.push((info.name.clone(), before));
                }
            }
            for other in &members[1..] {
                for info in other.artifact.tensors() {
                    let name = &info.name;
                    let here = layer_of(&other.artifact, name).is_none()
                        && comes_before(&other.artifact, name) == before;
                    if !here || artifact.contains(name) || is_buffer(name) {
                        continue;
                    }
                    // A head that only some models tie; anything else would be lost.
                    let site = artifact.architecture().site(name);
                    if site.is_none_or(|site| site.tied_to.is_none()) {
                        let problem = format!("{} has no such tensor", members[0].source);
                        return Err(Error::tensor(&other.source, name, problem));
                    }
                    if found.iter().all(|(known, _)| known != name) {
                        found.push((name.clone(), before));
                    }
                }
            }
        }
        Ok(found)
    }

    /// Adds one output tensor.
    fn tensor(&mut self, place: Place) -> Result<()> {
        let about = self.config.method.about;
        let method = about.name.replace('-', "_");
        let at = |what: &str| if self.config.whole { "models".to_owned() } else { what.to_owned() };
        let models: Vec<&String> = place.sources.iter().map(|source| &source.model).collect();
        if let Some(twice) = models.iter().enumerate().find(|(i, m)| models[..*i].contains(m)) {
            let problem =
                format!("{} is given twice; models of a merge are different ones", twice.1);
            return Err(Error::recipe(at("slices"), problem));
        }
        let wanted = place.slice.base.as_ref().or(self.config.base.as_ref());
        let base = match (about.base, wanted) {
            (Need::No, _) => None,
            (Need::Required, None) => {
                let problem = format!(
                    "it is missing: {method} needs the model that the others were fine-tuned from"
                );
                return Err(Error::recipe("base_model", problem));
            }
            (Need::Optional, None) => None,
            (_, Some(name)) => match models.iter().position(|model| *model == name) {
                Some(base) => Some(base),
                None => {
                    let problem = format!(
                        "the base {name} is not among the sources; add it with its layer_range"
                    );
                    return Err(Error::recipe(at("slices"), problem));
                }
            },
        };
        let beside: Vec<usize> = (0..models.len()).filter(|k| Some(*k) != base).collect();
        let (least, most) = about.models;
        if beside.len() < least || most.is_some_and(|most| beside.len() > most) {
            let bound = match most {
                Some(most) if most == least => format!("exactly {least}"),
                Some(most) => format!("{least} to {most}"),
                None => format!("at least {least}"),
            };
            let than = if about.base == Need::No { "" } else { " beside the base" };
            let problem =
                format!("{method} takes {bound} models{than}, and {} are given", beside.len());
            return Err(Error::recipe(at("slices"), problem));
        }
        let parameters = self.parameters(&place, &beside)?;
        let kernel = self.config.method.kernel(&parameters, beside.len())?;
        let mut parts: Vec<Part> = (0..models.len())
            .map(|k| Part::plain(self.place_of(models[k]), place.tensors[k].clone()))
            .collect();
        self.align(&place, &mut parts)?;
        let (mut base_part, mut inputs) = (None, Vec::new());
        for (k, part) in parts.into_iter().enumerate() {
            match Some(k) == base {
                true => base_part = Some(part),
                false => inputs.push(part),
            }
        }
        let out = Stored::Promoted(self.config.out_dtype.or(self.config.dtype));
        let plain = about.name == "passthrough" && parameters.get("scale").is_none();
        self.program.add(self.models, &place.out, base_part, inputs, kernel, out)?;
        if let Some(job) = self.program.jobs.get_mut(&place.out)
            && plain
            && let Work::Merge { inputs, .. } = &job.work
            && inputs[0].rows.is_none()
        {
            job.work = Work::Copy(inputs[0].clone());
            job.tensor.action = Action::Copy;
        }
        Ok(())
    }

    /// Puts rows of vocabularies into the output's order.
    fn align(&self, place: &Place, parts: &mut [Part]) -> Result<()> {
        let Some(vocabulary) = &self.vocabulary else { return Ok(()) };
        let first = &self.models[parts[0].model].artifact;
        if !is_vocabulary(first, &place.tensors[0]) {
            return Ok(());
        }
        let mut named = Vec::new();
        for part in parts.iter() {
            let artifact = &self.models[part.model].artifact;
            match crate::merge::program::stored(artifact, &part.tensor) {
                Some(found) => named.push((part.model, found.to_owned())),
                // `Program::add` says what is missing.
                None => return Ok(()),
            }
        }
        let maps = vocabulary.maps(&named, self.models)?;
        parts.iter_mut().zip(maps).for_each(|(part, map)| part.rows = Some(map));
        Ok(())
    }
}

/// How far layer `at` of `count` is: from 0 to 1, and 1 for an only layer.
fn way(at: usize, count: usize) -> f64 {
    if count > 1 { at as f64 / (count - 1) as f64 } else { 1.0 }
}

/// Layers by stack.
fn layers(artifact: &Artifact) -> BTreeMap<Option<String>, usize> {
    let mut counts = BTreeMap::new();
    for site in &artifact.architecture().sites {
        if let Some(layer) = site.layer {
            let count: &mut usize = counts.entry(site.stack.clone()).or_default();
            *count = (*count).max(layer + 1);
        }
    }
    counts
}

fn layer_of(artifact: &Artifact, tensor: &str) -> Option<usize> {
    artifact.architecture().site(tensor).and_then(|site| site.layer)
}

fn layer_tensors(artifact: &Artifact, layer: usize) -> Vec<String> {
    let names = artifact.tensors().iter().map(|info| &info.name);
    names.filter(|name| layer_of(artifact, name) == Some(layer)).cloned().collect()
}

/// Whether a tensor outside the layers belongs to the embeddings rather than to what follows the last layer.
fn comes_before(artifact: &Artifact, tensor: &str) -> bool {
    let role = artifact.architecture().site(tensor).map(|site| site.role);
    match role {
        Some(Role::Embed | Role::Position | Role::TokenType) => true,
        Some(Role::Head | Role::Pooler) => false,
        _ => tensor.contains("embed"),
    }
}

/// The name of a tensor in another layer: its first part that is the layer's number is replaced.
fn renumber(tensor: &str, from: usize, to: usize) -> String {
    let old = from.to_string();
    let mut done = false;
    let part = |part: &str| match part == old && !done {
        true => {
            done = true;
            to.to_string()
        }
        false => part.to_owned(),
    };
    tensor.split('.').map(part).collect::<Vec<_>>().join(".")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_layers_number_changes() {
        assert_eq!(
            renumber("model.layers.3.mlp.experts.3.w1.weight", 3, 11),
            "model.layers.11.mlp.experts.3.w1.weight"
        );
        assert_eq!(renumber("h.13.attn.weight", 13, 2), "h.2.attn.weight");
        assert_eq!([way(0, 5), way(2, 5), way(4, 5), way(0, 1)], [0.0, 0.5, 1.0, 1.0]);
    }
}
