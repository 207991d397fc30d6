//! How probable a language model finds single records: what perplexity filters sort by.

use refit_nn::{Decoder, Run};
use serde::Serialize;

use super::{CausalLm, score_row};
use crate::error::{Error, Result};

/// Most tokens, padding counted, of one forward pass.
const BATCH_TOKENS: usize = 1024;

/// Token ids of one record, and which of them count.
#[derive(Debug, Clone, Copy)]
pub struct Scored<'a> {
    /// Token ids.
    pub ids: &'a [u32],
    /// Which of them are scored given those before; as long as `ids`. The first never is.
    pub counts: &'a [bool],
}

/// What a model says about one record.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct ExampleScore {
    /// Negative log-likelihood of the tokens that count, summed, in nats.
    pub nll: f64,
    /// How many they are.
    pub tokens: usize,
}

impl ExampleScore {
    /// `exp(nll / tokens)`; `None` where no token counts.
    pub fn perplexity(&self) -> Option<f64> {
        (self.tokens > 0).then(|| (self.nll / self.tokens as f64).exp())
    }
}

/// Scores every record by itself. Records of like lengths run together; a score does not depend on which ones do, beyond the
/// rounding of sums. `progress` is told how many are done, and of how many.
///
/// # Errors
/// Ids outside the vocabulary, records longer than the context, logits that are not finite.
pub fn score_examples(
    model: &Decoder,
    examples: &[Scored],
    progress: &dyn Fn(u64, u64),
) -> Result<Vec<ExampleScore>> {
    let mut order: Vec<usize> = (0..examples.len()).collect();
    order.sort_by_key(|&i| examples[i].ids.len());
    let mut scores = vec![ExampleScore::default(); examples.len()];
    let (mut done, total) = (0, examples.len());
    progress(0, total as u64);
    while done < total {
        // The last of a batch is its longest.
        let fits = |many: &usize| examples[order[done + many - 1]].ids.len() * many <= BATCH_TOKENS;
        let many = (1..=total - done).take_while(fits).last().unwrap_or(1);
        let rows = &order[done..done + many];
        score_batch(model, examples, rows, &mut scores)?;
        done += many;
        progress(done as u64, total as u64);
    }
    Ok(scores)
}

fn score_batch(
    model: &Decoder,
    examples: &[Scored],
    rows: &[usize],
    scores: &mut [ExampleScore],
) -> Result<()> {
    let longest = rows.iter().map(|&i| examples[i].ids.len()).max().unwrap_or(0);
    if longest < 2 {
        return Ok(());
    }
    // Padding comes last: no token before it sees it.
    let padded: Vec<u32> = rows
        .iter()
        .flat_map(|&i| {
            let ids = examples[i].ids;
            ids.iter().copied().chain(std::iter::repeat_n(0, longest - ids.len()))
        })
        .collect();
    let hidden = Decoder::hidden(model, &padded, rows.len(), &mut Run::plain())?;
    let [batch, seq, width] = hidden.dims();
    let hidden = hidden.reshape([1, batch * seq, width]);
    let head = model.head();
    let vocab = head.vocab();
    let step = ((8 << 20) / vocab.max(1)).clamp(8, 512);
    for (row, &i) in rows.iter().enumerate() {
        let Scored { ids, counts } = examples[i];
        for from in (0..ids.len().saturating_sub(1)).step_by(step) {
            let to = (from + step).min(ids.len() - 1);
            let mut failed = None;
            head.with_logits(&hidden, row * seq + from..row * seq + to, &mut |logits| {
                for (at, logits) in (from..to).zip(logits.chunks_exact(vocab)) {
                    if !counts[at + 1] {
                        continue;
                    }
                    let score = score_row(logits, ids[at + 1] as usize);
                    if !score.nll.is_finite() {
                        failed = failed.or(Some(at));
                    }
                    scores[i].nll += score.nll;
                    scores[i].tokens += 1;
                }
            });
            if let Some(position) = failed {
                let (who, token) = ("the model", ids[position]);
                return Err(Error::Logits { who, window: i, position, token });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use refit_nn::BurnDevice;
    use refit_store::Artifact;

    use super::*;
    use crate::eval::{Options, Reference, Segment, perplexity};

    #[test]
    fn a_record_scores_the_same_alone_and_among_others() {
        let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/tiny");
        let model = Decoder::load(&Artifact::open(dir).unwrap(), &BurnDevice::flex()).unwrap();
        let rows: Vec<Vec<u32>> =
            (2..40).map(|n| (0..n).map(|i| (i * 37 + n * 11) % 500).collect()).collect();
        let marks: Vec<Vec<bool>> =
            rows.iter().map(|ids| (0..ids.len()).map(|i| i % 3 != 1 || i == 1).collect()).collect();
        let records: Vec<Scored> =
            rows.iter().zip(&marks).map(|(ids, counts)| Scored { ids, counts }).collect();
        let together = score_examples(&model, &records, &|_, _| {}).unwrap();
        for (record, among) in records.iter().zip(&together) {
            let alone = score_examples(&model, &[*record], &|_, _| {}).unwrap()[0];
            assert_eq!(alone.tokens, among.tokens);
            assert!((alone.nll - among.nll).abs() < 1e-4 * alone.nll, "{alone:?} {among:?}");
            // A record that counts whole is a window of text.
            let all = vec![true; record.ids.len()];
            let whole = Scored { ids: record.ids, counts: &all };
            let score = score_examples(&model, &[whole], &|_, _| {}).unwrap()[0];
            let text = [Segment::new("one", record.ids.to_vec())];
            let found = perplexity(&model, &text, &Options::default(), Reference::None, &|_, _| {})
                .unwrap();
            assert!((score.perplexity().unwrap() / found.perplexity - 1.0).abs() < 1e-5);
        }
        assert_eq!(ExampleScore::default().perplexity(), None);
        assert!(
            score_examples(&model, &[Scored { ids: &[9], counts: &[true] }], &|_, _| {}).unwrap()
                [0]
            .tokens
                == 0
        );
    }
}
