//! Left-to-right language models: Llama, Mistral, Qwen 2 and 3, Gemma 2, Phi-3, GPT-2, GPT-NeoX, OPT.

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor, TensorData};
use refit_store::artifact::Artifact;

use crate::block::{Block, Context};
use crate::checkpoint;
use crate::config::TransformerConfig;
use crate::error::{Error, Result};
use crate::load::{Loader, Weights};
use crate::operator::{Embedding, Linear, Norm, Operator};
use crate::ops;
use crate::run::Run;
use crate::side::{self, Prefix};

/// Everything of a decoder but its blocks: what block-wise work keeps in memory.
#[derive(Module, Debug)]
pub struct Frame {
    /// Token embedding.
    pub embed: Embedding,
    /// Learned positions (GPT-2, OPT).
    pub positions: Option<Embedding>,
    /// Norm after the last block.
    pub norm: Norm,
    /// Output head; `None` when tied to the embedding.
    pub head: Option<Linear>,
    /// Keys and values of virtual tokens before the text (prefix tuning).
    pub prefix: Option<Prefix>,
    /// Embeddings `[tokens, hidden]` of virtual tokens before the text (prompt tuning).
    pub prompt: Option<Param<Tensor<2>>>,
    #[module(skip)]
    config: TransformerConfig,
}

/// A whole decoder.
#[derive(Module, Debug)]
pub struct Decoder {
    /// Embedding, final norm and head.
    pub frame: Frame,
    /// The blocks, in order.
    pub blocks: Vec<Block>,
}

impl Frame {
    /// A frame from its parts.
    pub(crate) fn new(
        embed: Embedding,
        norm: Norm,
        head: Option<Linear>,
        config: TransformerConfig,
    ) -> Self {
        Self { embed, positions: None, norm, head, prefix: None, prompt: None, config }
    }

    /// Loads the frame of a decoder.
    ///
    /// # Errors
    /// Missing or mis-shaped tensors.
    pub fn load(loader: &Loader) -> Result<Self> {
        Ok(Self { head: loader.head()?, ..Self::load_trunk(loader)? })
    }

    /// Loads the frame without its head; only what it embeds and norms means anything.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_trunk(loader: &Loader) -> Result<Self> {
        Ok(Self {
            embed: loader.embed()?,
            positions: loader.positions()?,
            norm: loader.outer_norm()?,
            head: None,
            prefix: None,
            prompt: None,
            config: loader.config().clone(),
        })
    }

    /// The config of the decoder.
    pub fn config(&self) -> &TransformerConfig {
        &self.config
    }

    /// Virtual tokens that stand before every text; they take positions.
    pub fn virtual_tokens(&self) -> usize {
        let prefix = self.prefix.as_ref().map_or(0, Prefix::tokens);
        prefix + self.prompt.as_ref().map_or(0, |prompt| prompt.val().dims()[0])
    }

    /// What the blocks of a pass over `seq` tokens from position `start` share.
    pub fn context(&self, start: usize, seq: usize) -> Context {
        let device = self.embed.weight.val().device();
        let rope = self.config.rope.as_ref().map(|rope| {
            let frequencies = rope.inverse_frequencies();
            let angles =
                || (start..start + seq).flat_map(|p| frequencies.iter().map(move |f| p as f64 * f));
            let table = |f: fn(f64) -> f64| {
                let values: Vec<f32> = angles().map(|a| f(a) as f32).collect();
                Tensor::from_data(TensorData::new(values, [seq, frequencies.len()]), &device)
            };
            (table(f64::cos), table(f64::sin))
        });
        Context { start, rope, causal: true, lengths: None, prefix: None }
    }

    /// Embeds `ids`, `batch` rows of `ids.len() / batch` tokens that start at position `start`: `[batch, seq, hidden]`.
    ///
    /// # Errors
    /// Ids outside the vocabulary, positions outside a learned position table, an empty input.
    pub fn embed(&self, ids: &[u32], batch: usize, start: usize) -> Result<Tensor<3>> {
        if batch == 0 || ids.is_empty() || !ids.len().is_multiple_of(batch) {
            let message =
                format!("{} tokens do not form {batch} rows of equal, positive length", ids.len());
            return Err(Error::Invalid(message));
        }
        let seq = ids.len() / batch;
        let vocab = self.embed.rows();
        if let Some(&id) = ids.iter().find(|&&id| id as usize >= vocab) {
            return Err(Error::Token { id, vocab });
        }
        self.place(self.embed.forward(ids, batch, seq), start)
    }

    /// Embeddings `[batch, seq, hidden]` with what depends on their place: the model's factor and learned positions from
    /// `start` on.
    fn place(&self, mut x: Tensor<3>, start: usize) -> Result<Tensor<3>> {
        let seq = x.dims()[1];
        if let Some(scale) = self.config.embed_scale {
            // Gemma rounds the factor to the weights' precision; in f32 that is the factor itself.
            x = x * scale;
        }
        if let (Some(table), Some(offset)) = (&self.positions, self.config.positions) {
            let rows = table.rows();
            if start + seq + offset > rows {
                return Err(Error::Context {
                    requested: start + seq,
                    context: rows - offset.min(rows),
                });
            }
            let positions: Vec<u32> = (0..seq).map(|i| (start + offset + i) as u32).collect();
            x = x + table.forward(&positions, 1, seq);
        }
        Ok(x)
    }

    /// Final norm and head: `[batch, seq, hidden]` to logits `[batch, seq, vocab]`.
    pub fn logits(&self, x: Tensor<3>, run: &mut Run) -> Tensor<3> {
        let x = run.tap(|| "final:in".into(), x);
        let x = self.norm.forward(x);
        let logits = match &self.head {
            Some(head) => head.forward(x, run),
            None => run.linear(x, self.embed.weight.val(), None),
        };
        match self.config.logit_softcap {
            Some(cap) => (logits / cap).tanh() * cap,
            None => logits,
        }
    }
}

impl Frame {
    /// A loss on the logits of `x [batch, seq, hidden]` without ever holding all of them; see [`ops::head_loss`].
    pub fn head_loss(&self, x: Tensor<3>, loss: &ops::LogitLoss, run: &mut Run) -> Tensor<1> {
        let x = run.tap(|| "final:in".into(), x);
        let x = self.norm.forward(x);
        let weight = match &self.head {
            Some(head) => head.weight(),
            None => self.embed.weight.val(),
        };
        let bias = self.head.as_ref().and_then(|head| head.bias.as_ref()).map(|b| b.val());
        if let Some(bias) = bias {
            // One more input that is always 1 carries the bias.
            let [batch, seq, _] = x.dims();
            let ones = Tensor::ones([batch, seq, 1], &x.device());
            let x = Tensor::cat(vec![x, ones], 2);
            let weight = Tensor::cat(vec![weight, bias.unsqueeze_dim(1)], 1);
            return ops::head_loss(x, weight, loss, run.precision);
        }
        let Some(cap) = self.config.logit_softcap else {
            return ops::head_loss(x, weight, loss, run.precision);
        };
        let cap = cap as f32;
        let capped = |rows: std::ops::Range<usize>, logits: &mut [f32]| {
            logits.iter_mut().for_each(|l| *l = (*l / cap).tanh() * cap);
            let capped = logits.to_vec();
            let value = loss(rows, logits);
            logits.iter_mut().zip(capped).for_each(|(g, l)| *g *= 1.0 - (l / cap).powi(2));
            value
        };
        ops::head_loss(x, weight, &capped, run.precision)
    }
}

impl Decoder {
    /// Loads a decoder to `device`. f32 tensors stay mapped, everything else is decoded to f32.
    ///
    /// # Errors
    /// Unsupported model types, incomplete configs, missing or mis-shaped tensors.
    pub fn load(artifact: &Artifact, device: &Device) -> Result<Self> {
        Self::load_as(artifact, device, Weights::Float)
    }

    /// Loads a decoder whose quantized weights are held as `weights` says.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_as(artifact: &Artifact, device: &Device, weights: Weights) -> Result<Self> {
        let loader = Loader::new(artifact, device)?.holding(weights);
        loader.decode_ahead()?;
        let blocks = (0..loader.config().layers).map(|i| loader.block(i)).collect::<Result<_>>()?;
        Ok(Self { frame: Frame::load(&loader)?, blocks })
    }

    /// Loads a decoder without the head that predicts tokens: what stands under a head of another kind.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_trunk(loader: &Loader) -> Result<Self> {
        let blocks = (0..loader.config().layers).map(|i| loader.block(i)).collect::<Result<_>>()?;
        Ok(Self { frame: Frame::load_trunk(loader)?, blocks })
    }

    /// The config.
    pub fn config(&self) -> &TransformerConfig {
        self.frame.config()
    }

    /// Runs the blocks: `ids` (`batch` rows) to the residual stream after the last block, `[batch, seq, hidden]`.
    ///
    /// With a cache, the tokens continue it.
    ///
    /// # Errors
    /// Ids outside the vocabulary and inputs longer than the context.
    pub fn hidden(&self, ids: &[u32], batch: usize, run: &mut Run) -> Result<Tensor<3>> {
        let seq = ids.len() / batch.max(1);
        let fresh = run.cache.as_ref().is_none_or(|cache| cache.is_empty());
        let virtual_tokens = self.frame.virtual_tokens();
        let seen = match &run.cache {
            Some(cache) if !fresh => cache.len(),
            _ => virtual_tokens,
        };
        let context = self.config().context;
        if seen + seq > context {
            return Err(Error::Context { requested: seen + seq, context });
        }
        let prefix = match &self.frame.prefix {
            Some(prefix) if fresh => Some(prefix.keys_and_values()),
            _ => None,
        };
        let x = self.frame.embed(ids, batch, seen)?;
        let prompt = self.frame.prompt.as_ref().filter(|_| fresh);
        let (start, mut x) = match prompt {
            Some(prompt) => {
                let [tokens, width] = prompt.val().dims();
                let prompt = self.frame.place(prompt.val().unsqueeze(), 0)?;
                (0, Tensor::cat(vec![prompt.expand([batch, tokens, width]), x], 1))
            }
            None => (seen, x),
        };
        let mut context = self.frame.context(start, x.dims()[1]);
        match (&mut run.cache, prefix) {
            (Some(cache), Some(prefix)) => {
                let width = self.config().kv_heads * self.config().head_dim;
                for layer in 0..self.blocks.len() {
                    let [keys, values] = side::layer_of(&prefix, layer, width, batch);
                    cache.append(layer, keys, values);
                }
            }
            (None, prefix) => context.prefix = prefix,
            (Some(_), None) => {}
        }
        for (index, block) in self.blocks.iter().enumerate() {
            // A prefix trains through the context, which a checkpointed block takes as given.
            x = match run.checkpoints() && context.prefix.is_none() {
                true => checkpoint::block(block, x, &context, index, run.precision),
                false => block.forward(x, &context, index, run),
            };
        }
        if prompt.is_some() {
            // Virtual tokens have no logits: the caller gets one row per id that it gave.
            let [batch, rows, width] = x.dims();
            x = x.slice([0..batch, rows - seq..rows, 0..width]);
        }
        Ok(x)
    }

    /// Logits `[batch, seq, vocab]` of every position.
    ///
    /// # Errors
    /// As [`Self::hidden`].
    pub fn forward(&self, ids: &[u32], batch: usize, run: &mut Run) -> Result<Tensor<3>> {
        let x = self.hidden(ids, batch, run)?;
        Ok(self.frame.logits(x, run))
    }

    /// Logits `[batch, 1, vocab]` of the last position alone: what generation needs.
    ///
    /// # Errors
    /// As [`Self::hidden`].
    pub fn next(&self, ids: &[u32], batch: usize, run: &mut Run) -> Result<Tensor<3>> {
        let x = self.hidden(ids, batch, run)?;
        let [batch, seq, width] = x.dims();
        Ok(self.frame.logits(x.slice([0..batch, seq - 1..seq, 0..width]), run))
    }

    /// Matrices that stay packed, and bytes that they take; see [`crate::packed`].
    pub fn packed(&self) -> (usize, usize) {
        let linears = self.blocks.iter().flat_map(Block::linears).chain(&self.frame.head);
        let packed = linears.filter_map(|linear| match &linear.op {
            Operator::Packed(packed) => Some(packed.matrix.bytes()),
            Operator::Compensated(both) => Some(both.base.matrix.bytes()),
            _ => None,
        });
        packed.fold((0, 0), |(count, bytes), more| (count + 1, bytes + more))
    }

    /// The linear at `site` (tensor name with or without `.weight`), to be changed.
    pub fn linear_mut(&mut self, site: &str) -> Option<&mut Linear> {
        self.blocks.iter_mut().find_map(|block| block.linear_mut(site))
    }
}
