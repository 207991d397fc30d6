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

use std::collections::{BTreeMap, VecDeque};

use burn::tensor::{Device, Tensor};
use refit_nn::block::{Block, Context, Ffn, GateUp, Projections};
use refit_nn::load::Loader;
use refit_nn::{Encoder, Frame, Run, ops};
use refit_store::architecture::Kind;
use refit_store::artifact::Artifact;

use crate::error::{Error, Result};
use crate::observe::{ColumnStats, NonFinite, StatsRequest};

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
}

impl Options {
    /// Collect `request` at every linear on the CPU, whole blocks at a time.
    pub fn new(request: StatsRequest) -> Self {
        Self { request, order: Order::default(), device: Device::flex(), max_blocks: None }
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
}

/// Linears with one common input.
#[derive(Debug, Clone)]
pub struct Group {
    /// Sites, in running order, without `.weight`.
    pub sites: Vec<String>,
    /// Statistics of their input.
    pub stats: ColumnStats,
}

impl BlockStats {
    /// Statistics of the input of `site` (with or without `.weight`).
    pub fn get(&self, site: &str) -> Option<&ColumnStats> {
        let site = site.strip_suffix(".weight").unwrap_or(site);
        self.groups.iter().find(|g| g.sites.iter().any(|s| s == site)).map(|g| &g.stats)
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
/// No sequences or an empty one, sequences longer than the context, ids outside the vocabulary,
/// activations that are not finite (with site, sequence, row and column), model types that have no
/// blocks, and whatever the visitor returns.
pub fn run<V: Visitor>(
    artifact: &Artifact,
    sequences: &[Vec<u32>],
    options: &Options,
    visitor: &mut V,
    progress: &dyn Fn(u64, u64),
) -> Result<Summary, V::Error> {
    let mut stream = Stream::open(artifact, sequences, options)?;
    let mut summary = Summary {
        blocks: stream.blocks,
        sequences: sequences.len(),
        tokens: sequences.iter().map(Vec::len).sum(),
        ..Summary::default()
    };
    progress(0, stream.blocks as u64);
    for index in 0..stream.blocks {
        let mut block = stream.block(index)?;
        if visitor.restore(index, &mut block)? {
            summary.restored += 1;
            stream.forward(index, &block)?;
        } else {
            let groups = groups(&block);
            match options.order {
                Order::WholeBlock => stream.visit(index, &mut block, &groups, true, visitor)?,
                Order::WithinBlock => {
                    for group in groups.chunks(1) {
                        stream.visit(index, &mut block, group, false, visitor)?;
                    }
                    stream.forward(index, &block)?;
                }
            }
        }
        progress(index as u64 + 1, stream.blocks as u64);
    }
    summary.warnings = stream.warnings;
    Ok(summary)
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

/// Where blocks come from.
enum Blocks<'a> {
    /// Read one at a time.
    Lazy(Box<Loader<'a>>),
    /// Encoders are small: loaded whole, given away one by one.
    Loaded(VecDeque<Block>),
}

/// Hidden states on their way through the model.
struct Stream<'a> {
    source: Blocks<'a>,
    blocks: usize,
    /// `[1, tokens, hidden]` per sequence.
    hidden: Vec<Tensor<3>>,
    /// What the blocks share, by sequence length.
    contexts: BTreeMap<usize, Context>,
    request: StatsRequest,
    warnings: Vec<String>,
}

impl<'a> Stream<'a> {
    fn open(artifact: &'a Artifact, sequences: &[Vec<u32>], options: &Options) -> Result<Self> {
        if sequences.is_empty() {
            let what = "no sequences were given (the text may be shorter than one sequence)";
            return Err(Error::EmptyCalibration { what: what.into() });
        }
        if let Some(index) = sequences.iter().position(Vec::is_empty) {
            return Err(Error::EmptyCalibration {
                what: format!("sequence {index} has no tokens"),
            });
        }
        let check = |context: usize| -> Result<()> {
            let long = sequences.iter().enumerate().find(|(_, ids)| ids.len() > context);
            long.map_or(Ok(()), |(sequence, ids)| {
                Err(Error::SequenceTooLong { sequence, tokens: ids.len(), context })
            })
        };
        let lengths = || sequences.iter().map(Vec::len);
        let (source, total, hidden, contexts);
        match artifact.architecture().kind {
            Kind::Decoder => {
                let loader = Loader::new(artifact, &options.device)?;
                check(loader.config().context)?;
                total = loader.config().layers;
                // The frame goes at the end of this arm: blocks need only what the contexts hold.
                let frame = Frame::load(&loader)?;
                hidden = sequences
                    .iter()
                    .map(|ids| Ok(frame.embed(ids, 1, 0)?))
                    .collect::<Result<Vec<_>>>()?;
                contexts = lengths().map(|n| (n, frame.context(0, n))).collect();
                source = Blocks::Lazy(Box::new(loader));
            }
            Kind::Encoder => {
                let encoder = Encoder::load(artifact, &options.device)?;
                check(encoder.max_tokens())?;
                total = encoder.blocks.len();
                hidden = sequences
                    .iter()
                    .map(|ids| Ok(encoder.embed(ids, 1)?))
                    .collect::<Result<Vec<_>>>()?;
                contexts = lengths().map(|n| (n, encoder.context(&[n]))).collect();
                source = Blocks::Loaded(encoder.blocks.into());
            }
            kind => {
                let model_type = &artifact.architecture().model_type;
                let what = format!("`{model_type}` is a model of kind {kind:?}");
                return Err(Error::NotCalibratable { what });
            }
        }
        let blocks = options.max_blocks.map_or(total, |most| most.min(total));
        let warnings = Vec::new();
        Ok(Self { source, blocks, hidden, contexts, request: options.request, warnings })
    }

    fn block(&mut self, index: usize) -> Result<Block> {
        match &mut self.source {
            Blocks::Lazy(loader) => Ok(loader.block(index)?),
            Blocks::Loaded(blocks) => Ok(blocks.pop_front().expect("invariant: one per index")),
        }
    }

    /// Runs one sequence through `block`.
    fn pass(&self, index: usize, block: &Block, sequence: usize, run: &mut Run) -> Tensor<3> {
        let x = self.hidden[sequence].clone();
        let context = &self.contexts[&x.dims()[1]];
        block.forward(x, context, index, run)
    }

    /// Replaces all hidden states by the block's outputs.
    fn forward(&mut self, index: usize, block: &Block) -> Result<()> {
        for sequence in 0..self.hidden.len() {
            let out = self.pass(index, block, sequence, &mut Run::plain());
            self.accept(index, sequence, out)?;
        }
        Ok(())
    }

    fn accept(&mut self, index: usize, sequence: usize, out: Tensor<3>) -> Result<()> {
        let width = out.dims()[2];
        ops::with_values(&out, |values| match values.iter().position(|x| !x.is_finite()) {
            None => Ok(()),
            Some(at) => Err(Error::Activation {
                site: format!("the block after block {index}"),
                sequence,
                found: NonFinite {
                    row: (at / width) as u64,
                    column: at % width,
                    value: values[at],
                },
            }),
        })?;
        self.hidden[sequence] = out;
        Ok(())
    }

    /// Observes the inputs of `groups`, lets the visitor change the block, and, when `advance`,
    /// moves the hidden states behind the block.
    fn visit<V: Visitor>(
        &mut self,
        index: usize,
        block: &mut Block,
        groups: &[Vec<String>],
        advance: bool,
        visitor: &mut V,
    ) -> Result<(), V::Error> {
        let mut watch = Watch::new(block, groups, self.request);
        let mut outputs = Vec::with_capacity(self.hidden.len());
        let mut cosines = (0.0, 0usize);
        for sequence in 0..self.hidden.len() {
            let out = self.pass(index, block, sequence, &mut Run::tapped(&mut watch));
            watch.end_sequence(sequence)?;
            if advance {
                add_cosines(&self.hidden[sequence], &out, &mut cosines);
                outputs.push(out);
            }
        }
        let cosine = advance.then(|| cosines.0 / cosines.1.max(1) as f64);
        let stats = BlockStats { groups: watch.groups, cosine };
        self.warn_about_rank(index, &stats);
        let outcome = visitor.visit(index, block, &stats)?;
        drop(stats);
        match (advance, outcome) {
            (false, _) => {}
            (true, Outcome::Changed) => {
                drop(outputs);
                self.forward(index, block)?;
            }
            (true, Outcome::Unchanged) => {
                for (sequence, out) in outputs.into_iter().enumerate() {
                    self.accept(index, sequence, out)?;
                }
            }
        }
        Ok(())
    }

    fn warn_about_rank(&mut self, index: usize, stats: &BlockStats) {
        let deficient =
            |g: &&Group| g.stats.request().contains(StatsRequest::GRAM) && g.stats.rank_deficient();
        let Some(group) = stats.groups.iter().filter(deficient).max_by_key(|g| g.stats.columns())
        else {
            return;
        };
        if index == 0 {
            self.warnings.push(format!(
                "{} calibration tokens cannot fill the {} columns of `{}`: its Hessian is singular \
                 and only damping keeps it invertible; give at least {} tokens",
                group.stats.rows(),
                group.stats.columns(),
                group.sites[0],
                group.stats.columns()
            ));
        }
    }
}

/// A tap that feeds the inputs of chosen linears to their statistics.
struct Watch {
    groups: Vec<Group>,
    failure: Option<(String, NonFinite)>,
}

impl Watch {
    fn new(block: &Block, groups: &[Vec<String>], request: StatsRequest) -> Self {
        let width = |site: &str| {
            let linear = block.linears().into_iter().find(|l| l.site == site);
            linear.map_or(0, |l| l.weight().dims()[1])
        };
        let groups = groups
            .iter()
            .map(|sites| Group {
                stats: ColumnStats::new(width(&sites[0]), request),
                sites: sites.clone(),
            })
            .collect();
        Self { groups, failure: None }
    }

    fn end_sequence(&mut self, sequence: usize) -> Result<()> {
        if let Some((site, found)) = self.failure.take() {
            return Err(Error::Activation { site, sequence, found });
        }
        self.groups.iter_mut().for_each(|group| group.stats.end_sequence());
        Ok(())
    }
}

impl refit_nn::Tap for Watch {
    fn visit(&mut self, name: &str, value: Tensor<3>) -> Tensor<3> {
        let Some(site) = name.strip_suffix(":in") else { return value };
        // One observation per group: its first site stands for all of them.
        if let Some(group) = self.groups.iter_mut().find(|g| g.sites[0] == site) {
            let seen = ops::with_values(&value, |rows| group.stats.observe(rows));
            if let (Err(mut found), None) = (seen, &self.failure) {
                // A pass is a sequence, so this makes the row a position in it.
                found.row -= group.stats.rows();
                self.failure = Some((site.to_string(), found));
            }
        }
        value
    }
}

/// Adds the cosines between the rows of `a` and `b` to a running sum and count.
fn add_cosines(a: &Tensor<3>, b: &Tensor<3>, total: &mut (f64, usize)) {
    let width = a.dims()[2];
    ops::with_values(a, |a| {
        ops::with_values(b, |b| {
            for (x, y) in a.chunks_exact(width).zip(b.chunks_exact(width)) {
                let dot = |p: &[f32], q: &[f32]| {
                    p.iter().zip(q).map(|(&p, &q)| f64::from(p) * f64::from(q)).sum::<f64>()
                };
                total.0 += dot(x, y) / (dot(x, x) * dot(y, y)).sqrt().max(1e-300);
                total.1 += 1;
            }
        });
    });
}
