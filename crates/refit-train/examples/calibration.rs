//! What a calibrated pass costs on a real model: `calibration MODEL TEXT [SEQUENCES] [TOKENS]`.
//!
//! Streams the blocks of MODEL while collecting Wanda's statistics, prunes every linear to 60 % per
//! row the way Wanda does, then does the same with the f64 Gram matrices that SparseGPT and GPTQ
//! need (without changing weights), and last measures perplexity on TEXT. Prints seconds and peak
//! memory of each.

use burn::tensor::Device;
use refit_data::Tokenizer;
use refit_nn::block::Block;
use refit_nn::{Decoder, ops};
use refit_store::artifact::Artifact;
use refit_train::calibrate::{self, BlockStats, Options, Outcome};
use refit_train::eval::{self, Reference, Segment};
use refit_train::measure::{Cost, measure};
use refit_train::observe::StatsRequest;
use refit_train::{BoxError, Result};

fn main() -> Result<(), BoxError> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, text, rest @ ..] = &arguments[..] else {
        return Err("usage: calibration MODEL TEXT [SEQUENCES] [TOKENS]".into());
    };
    let number = |at: usize, default: usize| rest.get(at).map_or(Ok(default), |n| n.parse());
    let (count, length) = (number(0, 8)?, number(1, 256)?);
    let artifact = Artifact::open(model)?;
    let tokenizer = Tokenizer::from_artifact(&artifact)?;
    let ids = tokenizer.encode(&std::fs::read_to_string(text)?, false)?;
    let sequences: Vec<Vec<u32>> =
        ids.chunks_exact(length).take(count).map(<[u32]>::to_vec).collect();

    let (_, cost) = measure(|| pass(&artifact, &sequences, StatsRequest::SUM_SQUARES, true));
    print("Wanda pass", cost, sequences.len() * length);
    let (_, cost) = measure(|| pass(&artifact, &sequences, StatsRequest::GRAM, false));
    print("Gram pass", cost, sequences.len() * length);

    let device = Device::flex();
    let (decoder, cost) = measure(|| Decoder::load(&artifact, &device));
    print("load", cost, 0);
    let segments = [Segment::new("text", ids)];
    let options = eval::Options { window: Some(length), ..eval::Options::default() };
    let model = decoder?;
    let (found, cost) =
        measure(|| eval::perplexity(&model, &segments, &options, Reference::None, &|_, _| {}));
    let found = found?;
    print("perplexity", cost, found.tokens);
    println!("nll {:.6} perplexity {:.4} tokens {}", found.nll, found.perplexity, found.tokens);
    Ok(())
}

fn pass(
    artifact: &Artifact,
    sequences: &[Vec<u32>],
    request: StatsRequest,
    prune: bool,
) -> Result<()> {
    let visit = &mut |_: usize, block: &mut Block, stats: &BlockStats| -> Result<Outcome> {
        if !prune {
            return Ok(Outcome::Unchanged);
        }
        for (site, seen) in stats.sites() {
            let norms = seen.norms();
            let Some(linear) = block.linear_mut(site) else { continue };
            let mut weight = ops::to_vec(&linear.weight());
            for row in weight.chunks_exact_mut(norms.len()) {
                let score = |j: usize| f64::from(row[j].abs()) * norms[j];
                let mut order: Vec<usize> = (0..row.len()).collect();
                order.sort_by(|&a, &b| score(a).total_cmp(&score(b)));
                let pruned = row.len() * 6 / 10;
                order[..pruned].iter().for_each(|&j| row[j] = 0.0);
            }
            linear.set_weight(weight, &Device::flex());
        }
        Ok(Outcome::Changed)
    };
    let summary = calibrate::run(artifact, sequences, &Options::new(request), visit, &|_, _| {})?;
    summary.warnings.iter().for_each(|warning| println!("{warning}"));
    Ok(())
}

fn print(what: &str, cost: Cost, tokens: usize) {
    let peak = cost.peak_bytes.map_or("?".into(), |bytes| format!("{} MB", bytes / 1_000_000));
    let speed = cost.tokens_per_second(tokens as u64);
    println!("{what}: {:.2} s, peak {peak}, {speed:.0} tokens/s", cost.seconds);
}
