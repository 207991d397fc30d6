//! Bidirectional text encoders: BERT, RoBERTa, DistilBERT, and the sentence embedders built on them.

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use refit_store::artifact::Artifact;

use crate::block::{Block, Context};
use crate::checkpoint;
use crate::config::TransformerConfig;
use crate::error::{Error, Result};
use crate::load::Loader;
use crate::operator::{Embedding, Norm};
use crate::ops;
use crate::run::Run;

/// A BERT-like encoder.
#[derive(Module, Debug)]
pub struct Encoder {
    /// Token embedding.
    pub embed: Embedding,
    /// Learned positions.
    pub positions: Embedding,
    /// Segment embedding (BERT).
    pub segments: Option<Embedding>,
    /// Norm on the embeddings.
    pub norm: Norm,
    /// The blocks, in order.
    pub blocks: Vec<Block>,
    #[module(skip)]
    config: TransformerConfig,
}

/// How token vectors become one sentence vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    /// Mean over the real tokens.
    Mean,
    /// The first token.
    Cls,
    /// Elementwise maximum over the real tokens.
    Max,
}

impl Encoder {
    /// Loads an encoder to `device`.
    ///
    /// # Errors
    /// Unsupported model types, incomplete configs, missing or mis-shaped tensors.
    pub fn load(artifact: &Artifact, device: &Device) -> Result<Self> {
        let loader = Loader::new(artifact, device)?;
        loader.decode_ahead()?;
        Self::read(&loader)
    }

    pub(crate) fn read(loader: &Loader) -> Result<Self> {
        let hidden = loader.config().hidden;
        let segments = loader.trunk("embeddings.token_type_embeddings");
        let segments = loader
            .has(&format!("{segments}.weight"))
            .then(|| loader.table(segments, hidden))
            .transpose()?;
        let positions = loader
            .positions()?
            .ok_or_else(|| Error::Invalid("an encoder needs learned positions".into()))?;
        Ok(Self {
            embed: loader.embed()?,
            positions,
            segments,
            norm: loader.outer_norm()?,
            blocks: (0..loader.config().layers).map(|i| loader.block(i)).collect::<Result<_>>()?,
            config: loader.config().clone(),
        })
    }

    /// The config of the encoder.
    pub fn config(&self) -> &TransformerConfig {
        &self.config
    }

    /// Longest input in tokens.
    pub fn max_tokens(&self) -> usize {
        self.config.context.min(
            self.positions.rows() - self.config.positions.unwrap_or(0).min(self.positions.rows()),
        )
    }

    /// Embeds a padded batch of segment 0: the input of the first block.
    ///
    /// # Errors
    /// Ids outside the vocabulary and inputs longer than the context.
    pub fn embed(&self, ids: &[u32], batch: usize) -> Result<Tensor<3>> {
        self.embed_segments(ids, None, batch)
    }

    fn embed_segments(
        &self,
        ids: &[u32],
        types: Option<&[u32]>,
        batch: usize,
    ) -> Result<Tensor<3>> {
        let seq = ids.len() / batch.max(1);
        if seq > self.max_tokens() {
            return Err(Error::Context { requested: seq, context: self.max_tokens() });
        }
        let vocab = self.embed.rows();
        if let Some(&id) = ids.iter().find(|&&id| id as usize >= vocab) {
            return Err(Error::Token { id, vocab });
        }
        let offset = self.config.positions.unwrap_or(0) as u32;
        let positions: Vec<u32> = (0..seq as u32).map(|i| i + offset).collect();
        let mut x =
            self.embed.forward(ids, batch, seq) + self.positions.forward(&positions, 1, seq);
        x = match (&self.segments, types) {
            (Some(segments), Some(types)) => {
                let known = segments.rows();
                if let Some(&id) = types.iter().find(|&&id| id as usize >= known) {
                    let problem = format!("segment {id}, but the model knows {known} segments");
                    return Err(Error::Invalid(problem));
                }
                x + segments.forward(types, batch, seq)
            }
            (Some(segments), None) => x + segments.forward(&[0], 1, 1),
            (None, _) => x,
        };
        Ok(self.norm.forward(x))
    }

    /// What all blocks share when row `i` holds `lengths[i]` real tokens.
    pub fn context(&self, lengths: &[usize]) -> Context {
        Context {
            start: 0,
            rope: None,
            causal: false,
            lengths: Some(lengths.to_vec()),
            prefix: None,
        }
    }

    /// `sequences` of token ids (with special tokens) to `[batch, longest, hidden]`; rows past a sequence's length are padding.
    ///
    /// # Errors
    /// Empty sequences, ids outside the vocabulary, inputs longer than the context.
    pub fn forward(&self, sequences: &[Vec<u32>], run: &mut Run) -> Result<Tensor<3>> {
        self.forward_segments(sequences, None, run)
    }

    /// As [`Self::forward`] with the segment of every token (HF: `token_type_ids`), which tells the two texts of a pair
    /// apart; a model without segment embedding ignores it.
    ///
    /// # Errors
    /// As [`Self::forward`], and segments that the model does not know or that do not fit the sequences.
    pub fn forward_segments(
        &self,
        sequences: &[Vec<u32>],
        types: Option<&[Vec<u32>]>,
        run: &mut Run,
    ) -> Result<Tensor<3>> {
        let lengths: Vec<usize> = sequences.iter().map(Vec::len).collect();
        let longest = lengths.iter().copied().max().unwrap_or(0);
        if lengths.is_empty() || lengths.contains(&0) {
            return Err(Error::Invalid(
                "an encoder needs at least one token in every sequence".into(),
            ));
        }
        if types.is_some_and(|t| !t.iter().map(Vec::len).eq(lengths.iter().copied())) {
            return Err(Error::Invalid("one segment is needed for every token".into()));
        }
        let pad = |rows: &[Vec<u32>]| {
            let mut padded = vec![0; rows.len() * longest];
            for (to, from) in padded.chunks_exact_mut(longest).zip(rows) {
                to[..from.len()].copy_from_slice(from);
            }
            padded
        };
        let (ids, types) = (pad(sequences), types.map(pad));
        let mut x = self.embed_segments(&ids, types.as_deref(), sequences.len())?;
        let context = self.context(&lengths);
        for (index, block) in self.blocks.iter().enumerate() {
            x = match run.checkpoints() {
                true => checkpoint::block(block, x, &context, index, run.precision),
                false => block.forward(x, &context, index, run),
            };
        }
        Ok(x)
    }

    /// One vector per sequence, pooled and, if `normalize`, scaled to length 1.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn sentence(
        &self,
        sequences: &[Vec<u32>],
        pooling: Pooling,
        normalize: bool,
    ) -> Result<Vec<Vec<f32>>> {
        let hidden = self.forward(sequences, &mut Run::plain())?;
        let [_, longest, width] = hidden.dims();
        Ok(ops::with_values(&hidden, |values| {
            let rows = values.chunks_exact(longest * width).zip(sequences);
            rows.map(|(row, ids)| pool(&row[..ids.len() * width], width, pooling, normalize))
                .collect()
        }))
    }
}

fn pool(tokens: &[f32], width: usize, pooling: Pooling, normalize: bool) -> Vec<f32> {
    let count = tokens.len() / width;
    let mut out = match pooling {
        Pooling::Cls => tokens[..width].to_vec(),
        Pooling::Mean => (0..width)
            .map(|j| (0..count).map(|i| tokens[i * width + j]).sum::<f32>() / count as f32)
            .collect(),
        Pooling::Max => (0..width)
            .map(|j| (0..count).map(|i| tokens[i * width + j]).fold(f32::NEG_INFINITY, f32::max))
            .collect(),
    };
    if normalize {
        let length = out.iter().map(|x| x * x).sum::<f32>().sqrt().max(1e-12);
        out.iter_mut().for_each(|x| *x /= length);
    }
    out
}
