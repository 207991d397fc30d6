//! Examples with the numbers of their classes: token ids of texts, or images.

use refit_data::Rng;
use refit_data::classes::{self, Classified, encode_within};
use refit_nn::classifier::head_form;
use refit_nn::config::TransformerConfig;
use refit_store::architecture::Kind;

use super::options::ProbeOptions;
use crate::error::{Error, Result};
use crate::inputs::{Inputs, Labelled, TrainingData};

/// Tokens of a text where nothing else is asked for.
const MAX_LENGTH: usize = 512;

/// What is classified.
pub(super) enum Content<'a> {
    /// Token ids with special tokens.
    Texts(Vec<Vec<u32>>),
    /// Images, and which of them.
    Images(&'a Labelled, Vec<usize>),
}

/// Examples to learn from.
pub(super) struct Examples<'a> {
    /// Texts or images.
    pub content: Content<'a>,
    /// The class of each.
    pub labels: Vec<u32>,
    /// Names of the classes.
    pub classes: Vec<String>,
    /// How messages call each.
    pub names: Vec<String>,
    /// Texts that were cut.
    pub cut: usize,
}

/// How long texts may be.
#[derive(Clone, Copy)]
pub(super) struct Limits {
    /// Most tokens; 512 or the model's context by default.
    pub max: Option<usize>,
    /// Cut what is longer instead of refusing it.
    pub truncate: bool,
}

/// Reads the examples that a head is fitted to.
///
/// # Errors
/// No examples, or of the wrong kind for the model; with file and line: what [`Classified::read`] refuses, a label outside
/// `labels`, a class with one example, a text that is too long.
pub(super) fn examples<'a>(
    method: &'static str,
    inputs: &'a Inputs,
    options: &ProbeOptions,
    limits: Limits,
) -> Result<Examples<'a>> {
    let model = &inputs.models[0];
    let conflict = |problem: String| Err(Error::Conflict { method, problem });
    let kind = model.artifact.architecture().kind;
    let family = model.artifact.config().model_type();
    let family = family.unwrap_or(&model.artifact.architecture().model_type);
    if head_form(family).is_none() {
        return conflict(format!(
            "{}: refit knows no classification head for models of type `{family}`",
            model.source
        ));
    }
    let vision = kind == Kind::Vision;
    match (&inputs.labelled, inputs.data.is_empty()) {
        (None, true) => {
            let how = if vision { "--labelled DIR" } else { "--data FILE" };
            return Err(Error::MissingData { method, what: "labelled examples".into(), how });
        }
        (Some(_), false) => return conflict("give --data or --labelled, not both".into()),
        (Some(Labelled::Table(_)), true) | (None, false) if vision => {
            return conflict(format!(
                "{} classifies images; give them with --labelled DIR",
                model.source
            ));
        }
        (Some(labelled), true) if vision => return images(method, labelled, options),
        (Some(Labelled::Images { .. } | Labelled::Idx { .. }), true) => {
            return conflict(format!(
                "{} reads texts; give a table with the columns `{}` and `{}`: --data FILE",
                model.source, options.text_column, options.label_column
            ));
        }
        _ => {}
    }
    let mut all = Classified::default();
    let read = |records: &refit_data::Records| {
        Classified::read(records, &options.text_column, &options.label_column)
    };
    if let Some(Labelled::Table(records)) = &inputs.labelled {
        all.extend(read(records)?);
    }
    for data in &inputs.data {
        match data {
            TrainingData::Records(records) => all.extend(read(records)?),
            TrainingData::Text(text) => {
                return conflict(format!(
                    "{} is plain text and has no labels; give a table (.jsonl, .csv, .parquet)",
                    text.source
                ));
            }
        }
    }
    texts(method, inputs, all, options, limits)
}

fn images<'a>(
    method: &'static str,
    labelled: &'a Labelled,
    options: &ProbeOptions,
) -> Result<Examples<'a>> {
    let written = labelled.image_labels();
    let classes = match options.labels.is_empty() {
        true => classes::classes(&written),
        false => options.labels.clone(),
    };
    let number = |(i, label): (usize, &String)| {
        let found = classes.iter().position(|class| class == label);
        found.map(|class| class as u32).ok_or_else(|| Error::BadData {
            source_name: labelled.name(i),
            problem: format!("the label `{label}` is none of the classes in labels"),
        })
    };
    let labels = written.iter().enumerate().map(number).collect::<Result<Vec<u32>>>()?;
    let examples = Examples {
        content: Content::Images(labelled, (0..labelled.len()).collect()),
        names: (0..labelled.len()).map(|i| labelled.name(i)).collect(),
        labels,
        classes,
        cut: 0,
    };
    examples.check(method, options, &labelled.source())?;
    Ok(examples)
}

fn texts<'a>(
    method: &'static str,
    inputs: &Inputs,
    all: Classified,
    options: &ProbeOptions,
    limits: Limits,
) -> Result<Examples<'a>> {
    let model = &inputs.models[0];
    let context = TransformerConfig::read(model.artifact.config())?.context;
    let most = limits.max.unwrap_or(MAX_LENGTH.min(context));
    if most > context || most < 2 {
        let expected = format!("2 tokens to the model's context of {context}");
        return Err(Error::range(method, "max_length", most, expected));
    }
    let classes = match options.labels.is_empty() {
        true => classes::classes(&all.labels),
        false => options.labels.clone(),
    };
    let labels = all.numbers(&classes, false)?.into_iter().map(|class| class as u32).collect();
    let tokenizer = model.tokenizer()?;
    let (mut ids, mut cut) = (Vec::with_capacity(all.len()), 0);
    for (i, text) in all.texts.iter().enumerate() {
        let bad = |problem: String| Error::BadData { source_name: all.place(i), problem };
        let (found, longer) = encode_within(&tokenizer, text, most)?;
        if longer && !limits.truncate {
            return Err(bad(format!(
                "the text has more than {most} tokens; raise --max-length, shorten it, or cut it with --truncate"
            )));
        }
        if found.is_empty() {
            return Err(bad("the tokenizer makes no token of this text".into()));
        }
        cut += usize::from(longer);
        ids.push(found);
    }
    let names = (0..all.len()).map(|i| all.place(i)).collect();
    let examples = Examples { content: Content::Texts(ids), labels, classes, names, cut };
    let source = all.places.first().map_or_else(String::new, |(p, _)| p.display().to_string());
    examples.check(method, options, &source)?;
    Ok(examples)
}

impl Examples<'_> {
    /// The number of examples.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Two classes at least, and two examples of each.
    fn check(&self, method: &'static str, options: &ProbeOptions, source: &str) -> Result<()> {
        let classes = self.classes.len();
        let bad =
            |source_name: String, problem: String| Err(Error::BadData { source_name, problem });
        if classes < 2 {
            let problem = format!("all examples are of one class (`{}`)", self.classes.join(""));
            return bad(source.to_owned(), problem);
        }
        for (class, name) in self.classes.iter().enumerate() {
            let mut of = (0..self.len()).filter(|i| self.labels[*i] as usize == class);
            match (of.next(), of.next()) {
                (None, _) => {
                    let problem =
                        format!("no example of the class `{name}`; leave it out of labels");
                    return bad(source.to_owned(), problem);
                }
                (Some(only), None) => {
                    let problem = format!(
                        "this is the only example of the class `{name}`; a head needs at least two of every class"
                    );
                    return bad(self.names[only].clone(), problem);
                }
                _ => {}
            }
        }
        if let Some(few) = options.max_examples.filter(|most| *most < 2 * classes) {
            let expected = format!("at least two for each of {classes} classes");
            return Err(Error::range(method, "max_examples", few, expected));
        }
        Ok(())
    }

    /// At most `most` of them, drawn by a seed, in their order; two of every class stay.
    pub fn sample(self, most: Option<usize>, seed: u64) -> Self {
        let count = most.unwrap_or(usize::MAX).min(self.len());
        if count == self.len() {
            return self;
        }
        let mut order: Vec<usize> = (0..self.len()).collect();
        Rng::named(seed, "examples").shuffle(&mut order);
        let mut seen = vec![0; self.classes.len()];
        let (first, rest): (Vec<usize>, Vec<usize>) = order.into_iter().partition(|&i| {
            let seen = &mut seen[self.labels[i] as usize];
            *seen += 1;
            *seen <= 2
        });
        let mut chosen: Vec<usize> = first.into_iter().chain(rest).take(count).collect();
        chosen.sort_unstable();
        let content = match self.content {
            Content::Texts(mut ids) => {
                Content::Texts(chosen.iter().map(|&i| std::mem::take(&mut ids[i])).collect())
            }
            Content::Images(labelled, which) => {
                Content::Images(labelled, chosen.iter().map(|&i| which[i]).collect())
            }
        };
        Self {
            content,
            labels: chosen.iter().map(|&i| self.labels[i]).collect(),
            names: chosen.iter().map(|&i| self.names[i].clone()).collect(),
            classes: self.classes,
            cut: self.cut,
        }
    }
}
