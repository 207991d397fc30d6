//! Hidden states on their way through a model, one block at a time.

use std::collections::{BTreeMap, VecDeque};

use burn::tensor::Tensor;
use refit_nn::block::{Block, Context};
use refit_nn::load::Loader;
use refit_nn::vision::VisionTransformer;
use refit_nn::{Encoder, Frame, Run, Tap, ops};
use refit_store::architecture::Kind;
use refit_store::artifact::Artifact;

use super::watch::{Watch, add_cosines};
use super::{BlockStats, Feed, Group, Options, Outcome, Visitor};
use crate::error::{Error, Result};
use crate::observe::{NonFinite, StatsRequest};

/// Where blocks come from.
enum Blocks<'a> {
    /// Read one at a time.
    Lazy(Box<Loader<'a>>),
    /// Encoders are small: loaded whole, given away one by one.
    Loaded(VecDeque<Block>),
}

/// Hidden states on their way through the model.
pub(super) struct Stream<'a> {
    source: Blocks<'a>,
    pub blocks: usize,
    /// `[batch, tokens, hidden]` per sequence.
    pub hidden: Vec<Tensor<3>>,
    /// What the blocks share, by sequence length.
    contexts: BTreeMap<usize, Context>,
    request: StatsRequest,
    keep: bool,
    pub warnings: Vec<String>,
}

impl<'a> Stream<'a> {
    pub fn open(artifact: &'a Artifact, feed: &Feed, options: &Options) -> Result<Self> {
        let sequences = match feed {
            Feed::Tokens(sequences) => *sequences,
            Feed::Images(batches) => return Self::open_images(artifact, batches, options),
        };
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
        Ok(Self::new(source, total, hidden, contexts, options))
    }

    fn open_images(artifact: &Artifact, batches: &[Tensor<4>], options: &Options) -> Result<Self> {
        if batches.is_empty() {
            return Err(Error::EmptyCalibration { what: "no images were given".into() });
        }
        let model_type = &artifact.architecture().model_type;
        if model_type != "vit" {
            let what = format!("`{model_type}` does not read images block by block; a ViT does");
            return Err(Error::NotCalibratable { what });
        }
        let model = VisionTransformer::load_trunk(artifact, &options.device)?;
        let embed = |images: &Tensor<4>| Ok(model.embed(images.clone())?);
        let hidden = batches.iter().map(embed).collect::<Result<Vec<_>>>()?;
        let contexts = hidden.iter().map(|x| (x.dims()[1], VisionTransformer::context())).collect();
        let total = model.blocks.len();
        Ok(Self::new(Blocks::Loaded(model.blocks.into()), total, hidden, contexts, options))
    }

    fn new(
        source: Blocks<'a>,
        total: usize,
        hidden: Vec<Tensor<3>>,
        contexts: BTreeMap<usize, Context>,
        options: &Options,
    ) -> Self {
        let blocks = options.max_blocks.map_or(total, |most| most.min(total));
        let (request, keep) = (options.request, options.keep_inputs);
        Self { source, blocks, hidden, contexts, request, keep, warnings: Vec::new() }
    }

    pub fn block(&mut self, index: usize) -> Result<Block> {
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
    pub fn forward(
        &mut self,
        index: usize,
        block: &Block,
        mut tap: Option<&mut dyn Tap>,
    ) -> Result<()> {
        for sequence in 0..self.hidden.len() {
            let mut run = match &mut tap {
                Some(tap) => Run::tapped(&mut **tap),
                None => Run::plain(),
            };
            let out = self.pass(index, block, sequence, &mut run);
            self.accept(index, sequence, out)?;
        }
        Ok(())
    }

    /// Replaces all hidden states by outputs that are there.
    pub fn advance(&mut self, index: usize, outputs: Vec<Tensor<3>>) -> Result<()> {
        outputs.into_iter().enumerate().try_for_each(|(at, out)| self.accept(index, at, out))
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

    /// Observes the inputs of `groups` and lets the visitor change the block. When it is seen whole, gives back its outputs
    /// as long as it did not change.
    pub fn visit<V: Visitor>(
        &mut self,
        index: usize,
        block: &mut Block,
        groups: &[Vec<String>],
        whole: bool,
        visitor: &mut V,
    ) -> Result<Option<Vec<Tensor<3>>>, V::Error> {
        let mut watch = Watch::new(block, groups, self.request, self.keep, visitor.tap());
        let mut outputs = Vec::with_capacity(self.hidden.len());
        let mut cosines = (0.0, 0usize);
        for sequence in 0..self.hidden.len() {
            let out = self.pass(index, block, sequence, &mut Run::tapped(&mut watch));
            watch.end_sequence(sequence)?;
            if whole {
                add_cosines(&self.hidden[sequence], &out, &mut cosines);
                outputs.push(out);
            }
        }
        let cosine = whole.then(|| cosines.0 / cosines.1.max(1) as f64);
        let contexts = if self.keep { self.contexts.clone() } else { BTreeMap::new() };
        let stats = BlockStats { groups: watch.groups, cosine, contexts };
        self.warn_about_rank(index, &stats);
        let outcome = visitor.visit(index, block, &stats)?;
        Ok((whole && outcome == Outcome::Unchanged).then_some(outputs))
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
