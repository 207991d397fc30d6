//! Block-sequential calibration: the stream that Wanda, SparseGPT, GPTQ, DSnoT and their kin share.
//!
//! The hidden states of all calibration sequences stay in memory. For each block in order, the
//! block alone is loaded, run over all sequences while the inputs of its linears are observed,
//! handed to the method to be changed, run again to feed its successor, and dropped. Statistics of
//! block `b` thus come from the already changed blocks before it. Peak memory is one block, the
//! hidden states (`tokens × hidden × 4` bytes, twice) and the statistics.
//!
//! **Resuming.** A [`Visitor`] that has finished block `b` in an earlier run puts the finished
//! weights back in [`Visitor::restore`]; the stream then only runs the block forward, which costs
//! half of a visit and needs no stored activations. The same bytes come out as from an uninterrupted
//! run provided that [`Visitor::visit`] leaves the weights in the block *as they will be read back*,
//! that is rounded to the type they are stored in.

use std::collections::BTreeMap;

use burn::tensor::{Device, Tensor};
use refit_nn::Tap;
use refit_nn::block::{Block, Context, Ffn, GateUp, Projections};
use refit_store::artifact::Artifact;

use crate::error::Error;
use crate::observe::{ColumnStats, StatsRequest};

mod stream;
mod watch;

use stream::Stream;

/// What is run through the model.
#[derive(Debug, Clone)]
pub enum Feed<'a> {
    /// Token ids, sequence by sequence: decoders and text encoders.
    Tokens(&'a [Vec<u32>]),
    /// Batches of images `[batch, channels, height, width]` of one size, each batch a sequence: Vision Transformers.
    Images(&'a [Tensor<4>]),
}

impl Feed<'_> {
    fn len(&self) -> usize {
        match self {
            Self::Tokens(sequences) => sequences.len(),
            Self::Images(batches) => batches.len(),
        }
    }
}

/// When the statistics of a block's linears are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Order {
    /// All linears of a block are observed while the block is still as it was (Wanda, DSnoT).
    #[default]
    WholeBlock,
    /// Linears with a common input are visited group by group (q, k, v, then o, then gate and up,
    /// then down), each after the earlier groups of the block were changed (GPTQ's `true_sequential`).
    WithinBlock,
}

/// How a calibration runs.
#[derive(Debug, Clone)]
pub struct Options {
    /// What to collect at every linear.
    pub request: StatsRequest,
    /// When to collect it.
    pub order: Order,
    /// Where to compute.
    pub device: Device,
    /// Stop after this many blocks; later blocks are neither loaded nor visited.
    pub max_blocks: Option<usize>,
    /// Keep the inputs themselves beside their statistics: [`Group::inputs`].
    pub keep_inputs: bool,
    /// Within attention, too: groups `layers.N.attn.{q,k,v}` and then `layers.N.attn.probs` come between the projections and
    /// the output projection. They have no statistics; keep the inputs.
    pub attention: bool,
}

impl Options {
    /// Collect `request` at every linear on the CPU, whole blocks at a time.
    pub fn new(request: StatsRequest) -> Self {
        Self {
            request,
            order: Order::default(),
            device: Device::flex(),
            max_blocks: None,
            keep_inputs: false,
            attention: false,
        }
    }
}

/// Whether a visit changed the block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Weights changed: the block is run again to feed the next one.
    Changed,
    /// The block is as it was: the second run is saved.
    Unchanged,
}

/// What a method does with the stream. A closure
/// `FnMut(usize, &mut Block, &BlockStats) -> Result<Outcome, E>` is a visitor without `restore`.
pub trait Visitor {
    /// The method's error type.
    type Error: From<Error>;

    /// Puts finished weights of block `index` back from an earlier run; `false` when there are none.
    ///
    /// # Errors
    /// Whatever reading them back meets.
    fn restore(&mut self, _index: usize, _block: &mut Block) -> Result<bool, Self::Error> {
        Ok(false)
    }

    /// What activations go through on their way to a linear, in every pass: rounding of activations that are decided on.
    /// Statistics are of what comes before.
    fn tap(&mut self) -> Option<&mut dyn Tap> {
        None
    }

    /// Sees block `index` after its last visit, before it is run to feed the next one.
    ///
    /// # Errors
    /// Whatever the method meets.
    fn finished(&mut self, _index: usize, _block: &mut Block) -> Result<(), Self::Error> {
        Ok(())
    }

    /// Sees block `index` with the statistics of its linears' inputs and may change it. With
    /// [`Order::WithinBlock`] it is called once per group and `stats` holds that group alone.
    ///
    /// # Errors
    /// Whatever the method meets.
    fn visit(
        &mut self,
        index: usize,
        block: &mut Block,
        stats: &BlockStats,
    ) -> Result<Outcome, Self::Error>;
}

impl<F, E> Visitor for F
where
    F: FnMut(usize, &mut Block, &BlockStats) -> Result<Outcome, E>,
    E: From<Error>,
{
    type Error = E;

    fn visit(&mut self, index: usize, block: &mut Block, stats: &BlockStats) -> Result<Outcome, E> {
        self(index, block, stats)
    }
}

/// Statistics of the inputs of a block's linears. Linears with a common input share them.
#[derive(Debug, Clone)]
pub struct BlockStats {
    groups: Vec<Group>,
    /// Mean over tokens of the cosine between the block's input and output (before the change): one
    /// minus it is the block influence of ShortGPT. `None` for a part of a block.
    pub cosine: Option<f64>,
    contexts: BTreeMap<usize, Context>,
}

/// Linears with one common input.
#[derive(Debug, Clone)]
pub struct Group {
    /// Sites, in running order, without `.weight`.
    pub sites: Vec<String>,
    /// Statistics of their input.
    pub stats: ColumnStats,
    /// Their input in every sequence, `[batch, seq, width]`, where [`Options::keep_inputs`] asked for it.
    pub inputs: Vec<Tensor<3>>,
}

impl BlockStats {
    /// Statistics of the input of `site` (with or without `.weight`).
    pub fn get(&self, site: &str) -> Option<&ColumnStats> {
        let site = site.strip_suffix(".weight").unwrap_or(site);
        self.groups.iter().find(|g| g.sites.iter().any(|s| s == site)).map(|g| &g.stats)
    }

    /// What a pass over `x` `[batch, seq, ...]` shares, for running parts of the block again.
    ///
    /// # Panics
    /// When no sequence has that length.
    pub fn context(&self, x: &Tensor<3>) -> &Context {
        &self.contexts[&x.dims()[1]]
    }

    /// All groups, in running order.
    pub fn groups(&self) -> &[Group] {
        &self.groups
    }

    /// Every site with the statistics of its input, in running order.
    pub fn sites(&self) -> impl Iterator<Item = (&str, &ColumnStats)> {
        self.groups.iter().flat_map(|g| g.sites.iter().map(move |s| (s.as_str(), &g.stats)))
    }
}

/// What a whole calibration saw.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Summary {
    /// Blocks of the model that were streamed.
    pub blocks: usize,
    /// Blocks that [`Visitor::restore`] had finished already.
    pub restored: usize,
    /// Calibration sequences.
    pub sequences: usize,
    /// Calibration tokens.
    pub tokens: usize,
    /// Things the user should know.
    pub warnings: Vec<String>,
}

/// Streams `sequences` of token ids through the blocks of `artifact`; `progress` is told how many
/// blocks are done, and of how many.
///
/// # Errors
/// As [`run_on`].
pub fn run<V: Visitor>(
    artifact: &Artifact,
    sequences: &[Vec<u32>],
    options: &Options,
    visitor: &mut V,
    progress: &dyn Fn(u64, u64),
) -> Result<Summary, V::Error> {
    run_on(artifact, &Feed::Tokens(sequences), options, visitor, progress)
}

/// Streams texts or images through the blocks of `artifact`; `progress` is told how many blocks are done, and of how many.
///
/// # Errors
/// No sequences or an empty one, sequences longer than the context, ids outside the vocabulary,
/// activations that are not finite (with site, sequence, row and column), model types that have no
/// blocks or do not read what is fed, and whatever the visitor returns.
pub fn run_on<V: Visitor>(
    artifact: &Artifact,
    feed: &Feed,
    options: &Options,
    visitor: &mut V,
    progress: &dyn Fn(u64, u64),
) -> Result<Summary, V::Error> {
    let mut stream = Stream::open(artifact, feed, options)?;
    let mut summary = Summary {
        blocks: stream.blocks,
        sequences: feed.len(),
        tokens: stream.hidden.iter().map(|x| x.dims()[0] * x.dims()[1]).sum(),
        ..Summary::default()
    };
    progress(0, stream.blocks as u64);
    for index in 0..stream.blocks {
        let mut block = stream.block(index)?;
        if visitor.restore(index, &mut block)? {
            summary.restored += 1;
            stream.forward(index, &block, visitor.tap())?;
        } else {
            let visits = visits(&block, index, options.attention);
            match options.order {
                Order::WholeBlock => {
                    let groups: Vec<_> = visits.into_iter().flatten().collect();
                    let outputs = stream.visit(index, &mut block, &groups, true, visitor)?;
                    visitor.finished(index, &mut block)?;
                    match outputs {
                        Some(outputs) => stream.advance(index, outputs)?,
                        None => stream.forward(index, &block, visitor.tap())?,
                    }
                }
                Order::WithinBlock => {
                    for groups in visits {
                        stream.visit(index, &mut block, &groups, false, visitor)?;
                    }
                    visitor.finished(index, &mut block)?;
                    stream.forward(index, &block, visitor.tap())?;
                }
            }
        }
        progress(index as u64 + 1, stream.blocks as u64);
    }
    summary.warnings = stream.warnings;
    Ok(summary)
}

/// What is observed together: sites of a block's linears, grouped by common input, in running order, and what lies within
/// attention where that is asked for.
fn visits(block: &Block, index: usize, attention: bool) -> Vec<Vec<Vec<String>>> {
    let mut visits: Vec<Vec<Vec<String>>> =
        groups(block).into_iter().map(|group| vec![group]).collect();
    if attention {
        let site = |part: &str| vec![format!("layers.{index}.attn.{part}")];
        visits.insert(1, vec![site("q"), site("k"), site("v")]);
        visits.insert(2, vec![site("probs")]);
    }
    visits
}

/// Sites of a block's linears, grouped by common input, in running order.
fn groups(block: &Block) -> Vec<Vec<String>> {
    let mut groups = vec![match &block.mixer.projections {
        Projections::Separate(p) => vec![&p.q, &p.k, &p.v],
        Projections::Fused(p) => vec![&p.qkv],
    }];
    groups.push(vec![&block.mixer.o]);
    match &block.ffn {
        Ffn::Gated(mlp) => {
            groups.push(match &mlp.gate_up {
                GateUp::Separate(p) => vec![&p.gate, &p.up],
                GateUp::Fused(both) => vec![both],
            });
            groups.push(vec![&mlp.down]);
        }
        Ffn::Plain(mlp) => groups.extend([vec![&mlp.up], vec![&mlp.down]]),
    }
    groups.iter().map(|group| group.iter().map(|linear| linear.site.clone()).collect()).collect()
}
