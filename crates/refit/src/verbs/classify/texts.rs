//! Texts: one a line, or a column of a table, read by a model with a classification head.

use refit_data::Tokenizer;
use refit_data::classes::{Classified, encode_within};
use refit_methods::labelled::{Labelled, Part, class_names, text_classes};
use refit_nn::{Run, TextClassifier, ops};
use refit_store::Artifact;

use super::{Args, BATCH, Scored, accuracy, check_finite, listing};
use crate::cli::App;
use crate::engine;
use crate::failure::{Failure, Result};
use crate::inputs;
use crate::labelled;
use crate::output::Outcome;

/// A text classifier, ready.
struct Classifier<'a> {
    artifact: &'a Artifact,
    model: TextClassifier,
    tokenizer: Tokenizer,
}

/// Classifies lines, or measures accuracy on labelled texts.
pub fn run(app: &App, artifact: &Artifact, args: &Args) -> Result<Outcome> {
    if let Some(source) = &args.labelled {
        let data = labelled::open(app, source, Part::HeldOut)?;
        let Labelled::Table(records) = &data else {
            return Err(Failure::usage(format!(
                "{source}: this model reads texts; give a table with the columns `{}` and `{}`",
                args.text_column, args.label_column
            )));
        };
        let texts = Classified::read(records, &args.text_column, &args.label_column)?;
        let classifier = Classifier::load(app, artifact)?;
        let classes = text_classes(&texts, &class_names(artifact), classifier.classes())?;
        let ids = classifier.encode(app, &texts.texts, &|i| texts.place(i))?;
        return accuracy(app, "texts", &classes, &|i| texts.place(i), |items| {
            let first = items.start;
            classifier.scores(&ids[items], &|i| texts.place(first + i))
        });
    }
    let mut lines = Vec::new();
    for text in inputs::texts(&args.text)? {
        for (i, line) in text.text.lines().enumerate() {
            let place = format!("{}: line {}", text.source, i + 1);
            if line.trim().is_empty() {
                return Err(Failure::usage(format!("{place}: it is empty; remove it")));
            }
            lines.push((place, line.to_owned()));
        }
    }
    let (places, shown): (Vec<String>, Vec<String>) = lines.into_iter().unzip();
    let classifier = Classifier::load(app, artifact)?;
    let ids = classifier.encode(app, &shown, &|i| places[i].clone())?;
    app.progress.begin("classifying", ids.len() as u64, "texts");
    // Equal lengths share a batch, so that little is computed for padding.
    let mut order: Vec<usize> = (0..ids.len()).collect();
    order.sort_by_key(|&i| ids[i].len());
    let classes = classifier.classes();
    let mut all = Scored { logits: vec![0.0; ids.len() * classes], classes };
    for batch in order.chunks(BATCH) {
        let sequences: Vec<Vec<u32>> = batch.iter().map(|&i| ids[i].clone()).collect();
        let found = classifier.scores(&sequences, &|i| places[batch[i]].clone())?;
        for (&i, row) in batch.iter().zip(found.logits.chunks_exact(classes)) {
            all.logits[i * classes..(i + 1) * classes].copy_from_slice(row);
        }
        app.progress.advance(batch.len() as u64);
    }
    app.progress.end();
    Ok(listing(artifact, &all, "text", &shown, args.top))
}

impl<'a> Classifier<'a> {
    fn load(app: &App, artifact: &'a Artifact) -> Result<Self> {
        artifact.check_fit()?;
        if let Some(warning) = inputs::strays(artifact) {
            app.progress.note(&format!("warning: {warning}"));
        }
        let tokenizer = engine::tokenizer(artifact)?;
        app.progress.begin("loading the model", 0, "");
        let model = TextClassifier::load(artifact, &engine::device(app)?);
        app.progress.end();
        let model = model.map_err(|error| Failure::from(error).about(artifact.path()))?;
        Ok(Self { artifact, model, tokenizer })
    }

    fn classes(&self) -> usize {
        self.model.classifier.as_ref().map_or(0, |head| head.weight().dims()[0])
    }

    /// Token ids of texts; what is longer than the model's context is cut, and said.
    fn encode(
        &self,
        app: &App,
        texts: &[String],
        place: &dyn Fn(usize) -> String,
    ) -> Result<Vec<Vec<u32>>> {
        let longest = self.model.max_tokens();
        let mut cut = 0;
        let mut all = Vec::with_capacity(texts.len());
        for (i, text) in texts.iter().enumerate() {
            let (ids, shorter) = encode_within(&self.tokenizer, text, longest)?;
            if ids.is_empty() {
                let place = place(i);
                return Err(Failure::usage(format!("{place}: the tokenizer makes no token of it")));
            }
            cut += usize::from(shorter);
            all.push(ids);
        }
        if cut > 0 {
            let count = texts.len();
            app.progress.note(&format!(
                "warning: {cut} of {count} texts are longer than {longest} tokens and were cut"
            ));
        }
        Ok(all)
    }

    fn scores(&self, ids: &[Vec<u32>], name: &dyn Fn(usize) -> String) -> Result<Scored> {
        let logits = self.model.forward(ids, &mut Run::plain())?;
        let classes = logits.dims()[1];
        check_finite(self.artifact, Scored { logits: ops::to_vec(&logits), classes }, name)
    }
}
