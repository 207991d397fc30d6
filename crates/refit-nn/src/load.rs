//! Bringing an artifact to life: whole models, or one block at a time.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use burn::module::Param;
use burn::tensor::{AllocationProperty, Bytes, DType, Device, Shape, Tensor, TensorData};
use rayon::prelude::*;
use refit_store::architecture::Layout;
use refit_store::artifact::Artifact;

use crate::block::{
    Attention, Block, Ffn, Fused, GateAndUp, GateUp, GatedMlp, Mlp, Projections, Separate,
};
use crate::config::TransformerConfig;
use crate::error::{Error, Result};
use crate::names::{Names, names};
use crate::operator::{Embedding, Linear, Norm, NormKind};
use crate::ops::AttentionSpec;
use crate::packed::{PackedMatrix, SharedMatrix};

/// How a family's files store the matrix of a linear: GPT-2 keeps its projections `[in, out]`. With [`stored`], the only place
/// that knows.
pub(crate) fn layout_of(model_type: &str, name: &str) -> Layout {
    match model_type == "gpt2" && name.contains(".c_") {
        true => Layout::InOut,
        false => Layout::OutIn,
    }
}

/// The values of a decoder's parameter `name`, held as `shape`, as its family's files store them: the way back from loading.
pub fn stored(config: &TransformerConfig, name: &str, shape: &[usize], values: &[f32]) -> Vec<f32> {
    match (layout_of(&config.model_type, name), shape) {
        (Layout::InOut, &[out, inputs]) => {
            (0..out * inputs).map(|i| values[i % out * inputs + i / out]).collect()
        }
        // Gemma's norms are stored less one.
        _ if config.norm_offset && name.ends_with("norm.weight") => {
            values.iter().map(|value| value - 1.0).collect()
        }
        _ => values.to_vec(),
    }
}

/// The gradient by a parameter, in the layout of the tensor `name` of shape `shape` in its family's files.
pub fn stored_gradient(
    config: &TransformerConfig,
    name: &str,
    shape: &[usize],
    gradient: Vec<f32>,
) -> Vec<f32> {
    match (layout_of(&config.model_type, name), shape) {
        (Layout::InOut, &[inputs, out]) => {
            (0..out * inputs).map(|i| gradient[i % out * inputs + i / out]).collect()
        }
        _ => gradient,
    }
}

/// Reads the parts of one transformer out of an artifact.
pub struct Loader<'a> {
    artifact: &'a Artifact,
    config: TransformerConfig,
    names: &'static Names,
    prefix: &'static str,
    device: Device,
    weights: Weights,
    /// Tensors decoded ahead of time by [`Self::decode_ahead`].
    decoded: Mutex<HashMap<String, Vec<f32>>>,
    /// Matrices packed ahead of time by [`Self::decode_ahead`].
    packed: Mutex<HashMap<String, SharedMatrix>>,
}

/// How quantized weights are held in memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Weights {
    /// Decoded to f32: exact, and the form that trains.
    #[default]
    Float,
    /// In codes, where they are stored so and kernels read them ([`crate::packed`]), and in factors where they are stored so;
    /// everything else as f32.
    Packed,
}

impl<'a> Loader<'a> {
    /// Reads the config and finds where the trunk lies. Reads no tensor.
    ///
    /// # Errors
    /// Unsupported model types and incomplete configs.
    pub fn new(artifact: &'a Artifact, device: &Device) -> Result<Self> {
        let config = TransformerConfig::read(artifact.config())?;
        let names = names(&config.model_type);
        let landmark = format!("{}{}.weight", names.block.replace("{}", "0"), names.o);
        let prefix = names
            .prefixes
            .iter()
            .copied()
            .find(|prefix| artifact.contains(&format!("{prefix}{landmark}")))
            .ok_or_else(|| Error::Missing { name: format!("{}{landmark}", names.prefixes[0]) })?;
        Ok(Self {
            artifact,
            config,
            names,
            prefix,
            device: device.clone(),
            weights: Weights::Float,
            decoded: Mutex::default(),
            packed: Mutex::default(),
        })
    }

    /// The same loader, with quantized weights held as `weights` says.
    #[must_use]
    pub fn holding(mut self, weights: Weights) -> Self {
        self.weights = weights;
        self
    }

    /// The config of the transformer.
    pub fn config(&self) -> &TransformerConfig {
        &self.config
    }

    /// The device that parts are loaded to.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Decodes all tensors that cannot be mapped as they are, on all threads, before the parts ask for them one by one.
    ///
    /// # Errors
    /// Unreadable tensors.
    pub fn decode_ahead(&self) -> Result<()> {
        if self.weights == Weights::Packed {
            let sites: Vec<&str> = self.packable().collect();
            let packed: Result<Vec<_>> = sites
                .par_iter()
                .with_max_len(1)
                .map(|name| Ok(self.pack(name)?.map(|matrix| ((*name).to_owned(), matrix))))
                .collect();
            *self.packed.lock().expect("invariant: no thread panics while holding it") =
                packed?.into_iter().flatten().collect();
        }
        let is_packed = |name: &str| {
            let held = || self.matrix(name).is_some() || self.held_in_factors(name);
            name != self.trunk(self.names.embed) + ".weight" && held()
        };
        let mut todo: Vec<_> = self
            .artifact
            .tensors()
            .iter()
            .filter(|t| self.mapped(&t.name).is_none() && !is_packed(&t.name))
            .collect();
        // Largest first, so that no thread is left alone with the embedding at the end.
        todo.sort_by_key(|t| std::cmp::Reverse(t.numel()));
        let decoded: Result<HashMap<_, _>> = todo
            .par_iter()
            .with_max_len(1)
            .map(|t| Ok((t.name.clone(), self.artifact.read_f32(&t.name)?)))
            .collect();
        *self.decoded.lock().expect("invariant: no thread panics while holding it") = decoded?;
        Ok(())
    }

    /// The matrices that may stay packed: linears of blocks, the head, and the embedding where it is the head.
    fn packable(&self) -> impl Iterator<Item = &str> {
        let head = format!("{}.weight", self.names.head);
        let embed = self.trunk(self.names.embed) + ".weight";
        let tied = self.config.tied;
        let linears = self.artifact.architecture().linears().map(|site| &*site.name);
        let outside = self.artifact.tensors().iter().map(|info| &*info.name);
        linears.chain(outside.filter(move |name| *name == head || (tied && *name == embed)))
    }

    /// The codes of a matrix that is stored `[out, in]`, in the order of the kernels.
    fn pack(&self, name: &str) -> Result<Option<SharedMatrix>> {
        if layout_of(&self.config.model_type, name) != Layout::OutIn {
            return Ok(None);
        }
        let coded = self.artifact.coded_beneath(name)?;
        Ok(coded.as_ref().and_then(PackedMatrix::new).map(Arc::new))
    }

    /// Whether a linear stays in the factors that it is stored in: those of a compensation stand beside codes.
    fn held_in_factors(&self, name: &str) -> bool {
        self.weights == Weights::Packed
            && self.artifact.stored_in_factors(name)
            && (!self.artifact.is_compensated(name) || self.matrix(name).is_some())
    }

    /// The factors of a linear, `down [rank, in]` and `up [out, rank]`.
    fn factors(&self, name: &str, outputs: usize, inputs: usize) -> Result<Option<[Tensor<2>; 2]>> {
        if !self.held_in_factors(name) {
            return Ok(None);
        }
        let Some(stored) = self.artifact.factors(name)? else { return Ok(None) };
        let matrix = |values: Vec<f32>, shape: [usize; 2]| {
            Tensor::<2>::from_data(TensorData::new(values, shape), &self.device)
        };
        let rank = stored.rank;
        Ok(Some(match layout_of(&self.config.model_type, name) {
            Layout::InOut => [
                matrix(stored.left, [inputs, rank]).transpose(),
                matrix(stored.right, [rank, outputs]).transpose(),
            ],
            _ => [matrix(stored.right, [rank, inputs]), matrix(stored.left, [outputs, rank])],
        }))
    }

    /// A matrix that was packed ahead.
    fn matrix(&self, name: &str) -> Option<SharedMatrix> {
        self.packed.lock().expect("invariant: no thread panics while holding it").get(name).cloned()
    }

    /// What stands before the names of the trunk.
    pub fn prefix(&self) -> &'static str {
        self.prefix
    }

    /// Whether the tensor `name`, given without the trunk's prefix, belongs to the trunk and not to a head.
    pub fn in_trunk(&self, name: &str) -> bool {
        let n = self.names;
        let block = n.block.split("{}").next().unwrap_or(n.block);
        let module = |site: &str| !site.is_empty() && name.starts_with(&format!("{site}."));
        name.starts_with(block)
            || [n.embed, n.positions, n.final_norm, "embeddings"].into_iter().any(module)
    }

    /// Full name of `part` in the trunk.
    pub(crate) fn trunk(&self, part: &str) -> String {
        format!("{}{part}", self.prefix)
    }

    fn in_block(&self, index: usize, part: &str) -> String {
        format!("{}{}{part}", self.prefix, self.names.block.replace("{}", &index.to_string()))
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.artifact.contains(name)
    }

    /// A view of the file's own bytes, where they are f32 already.
    fn mapped(&self, name: &str) -> Option<Bytes> {
        // Asked first: the error of a missing tensor searches for similar names.
        let info = self.artifact.contains(name).then(|| self.artifact.tensor(name).ok())??;
        if info.dtype != refit_store::DType::F32 {
            return None;
        }
        Some(Bytes::from_shared(self.artifact.shared_bytes(name)?, AllocationProperty::Other))
    }

    /// Reads the tensor `name` and checks its shape.
    pub(crate) fn tensor<const D: usize>(
        &self,
        name: &str,
        expected: [usize; D],
    ) -> Result<Tensor<D>> {
        let info = self.artifact.tensor(name).map_err(|_| Error::Missing { name: name.into() })?;
        if info.shape != expected {
            return Err(Error::Shape {
                name: name.into(),
                found: info.shape.clone(),
                expected: expected.to_vec(),
            });
        }
        let shape = Shape::from(expected);
        let ahead =
            self.decoded.lock().expect("invariant: no thread panics while holding it").remove(name);
        let data = match (ahead, self.mapped(name)) {
            (Some(values), _) => TensorData::new(values, shape),
            (None, Some(bytes)) => TensorData::from_bytes(bytes, shape, DType::F32),
            (None, None) => TensorData::new(self.artifact.read_f32(name)?, shape),
        };
        Ok(Tensor::from_data(data, &self.device))
    }

    /// A linear `site` with `[outputs, inputs]`, and its bias where the artifact has one.
    pub(crate) fn linear(&self, site: String, outputs: usize, inputs: usize) -> Result<Linear> {
        let name = format!("{site}.weight");
        let matrix = self.matrix(&name);
        if let Some(matrix) = &matrix {
            let found = vec![matrix.rows(), matrix.inputs()];
            if found != [outputs, inputs] {
                return Err(Error::Shape { name, found, expected: vec![outputs, inputs] });
            }
        }
        if let Some([down, up]) = self.factors(&name, outputs, inputs)? {
            let bias = self.bias(&site, outputs)?;
            return Ok(Linear::factored(site, matrix, down, up, bias));
        }
        if let Some(matrix) = matrix {
            return Ok(Linear::packed(site.clone(), matrix, self.bias(&site, outputs)?));
        }
        let weight = if layout_of(&self.config.model_type, &site) == Layout::InOut {
            let values = crate::ops::to_vec(&self.tensor::<2>(&name, [inputs, outputs])?);
            let mut turned = vec![0.0; values.len()];
            for (i, row) in values.chunks_exact(outputs).enumerate() {
                for (j, value) in row.iter().enumerate() {
                    turned[j * inputs + i] = *value;
                }
            }
            Tensor::from_data(TensorData::new(turned, [outputs, inputs]), &self.device)
        } else {
            self.tensor(&name, [outputs, inputs])?
        };
        let bias = self.bias(&site, outputs)?;
        Ok(Linear::dense(site, weight, bias))
    }

    /// The bias of a linear, where the artifact has one.
    fn bias(&self, site: &str, outputs: usize) -> Result<Option<Tensor<1>>> {
        let bias = format!("{site}.bias");
        if self.has(&bias) { self.tensor(&bias, [outputs]).map(Some) } else { Ok(None) }
    }

    pub(crate) fn norm(&self, site: String, width: usize) -> Result<Norm> {
        let weight = self.tensor::<1>(&format!("{site}.weight"), [width])?;
        let weight = if self.config.norm_offset { weight + 1.0 } else { weight };
        let bias = format!("{site}.bias");
        let bias = match self.config.norm {
            NormKind::Layer if self.has(&bias) => {
                Some(Param::from_tensor(self.tensor(&bias, [width])?))
            }
            _ => None,
        };
        Ok(Norm {
            site,
            weight: Param::from_tensor(weight),
            bias,
            eps: self.config.eps,
            kind: self.config.norm,
        })
    }

    pub(crate) fn table(&self, site: String, width: usize) -> Result<Embedding> {
        let name = format!("{site}.weight");
        let info =
            self.artifact.tensor(&name).map_err(|_| Error::Missing { name: name.clone() })?;
        let rows = info.shape.first().copied().unwrap_or(0);
        Ok(Embedding { site, weight: Param::from_tensor(self.tensor(&name, [rows, width])?) })
    }

    /// The token embedding.
    ///
    /// # Errors
    /// Missing or mis-shaped tensors.
    pub fn embed(&self) -> Result<Embedding> {
        self.table(self.trunk(self.names.embed), self.config.hidden)
    }

    /// The learned position table, where the family has one.
    ///
    /// # Errors
    /// Missing or mis-shaped tensors.
    pub fn positions(&self) -> Result<Option<Embedding>> {
        match self.config.positions {
            Some(_) => Ok(Some(self.table(self.trunk(self.names.positions), self.config.hidden)?)),
            None => Ok(None),
        }
    }

    /// The norm after the last block (decoders, ViT) or after the embeddings (BERT).
    ///
    /// # Errors
    /// Missing or mis-shaped tensors.
    pub fn outer_norm(&self) -> Result<Norm> {
        self.norm(self.trunk(self.names.final_norm), self.config.hidden)
    }

    /// The head; `None` when it is tied to the embedding.
    ///
    /// # Errors
    /// Missing or mis-shaped tensors.
    pub fn head(&self) -> Result<Option<Linear>> {
        let site = self.names.head.to_owned();
        if self.config.tied || !self.has(&format!("{site}.weight")) {
            // The table that looks tokens up stays f32; as a head it is read whole for every token.
            if let Some(matrix) = self.matrix(&(self.trunk(self.names.embed) + ".weight")) {
                return Ok(Some(Linear::packed(site, matrix, None)));
            }
            return if self.config.tied || self.config.vocab == 0 {
                Ok(None)
            } else {
                Err(Error::Missing {
                    name: format!("{site}.weight (the config says that the head is not tied)"),
                })
            };
        }
        self.linear(site, self.config.vocab, self.config.hidden).map(Some)
    }

    /// Block `index`: all its tensors and nothing else.
    ///
    /// # Errors
    /// Missing or mis-shaped tensors.
    pub fn block(&self, index: usize) -> Result<Block> {
        let (c, n) = (&self.config, self.names);
        let at = |part: &str| self.in_block(index, part);
        let (q_width, kv_width) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let projections = if n.qkv.is_empty() {
            Projections::Separate(Separate {
                q: self.linear(at(n.q), q_width, c.hidden)?,
                k: self.linear(at(n.k), kv_width, c.hidden)?,
                v: self.linear(at(n.v), kv_width, c.hidden)?,
            })
        } else {
            let qkv = self.linear(at(n.qkv), q_width + 2 * kv_width, c.hidden)?;
            Projections::Fused(Fused { qkv, by_head: c.model_type == "gpt_neox" })
        };
        let head_norm = |part: &str| {
            if c.qk_norm { self.norm(at(part), c.head_dim).map(Some) } else { Ok(None) }
        };
        let mixer = Attention {
            projections,
            o: self.linear(at(n.o), c.hidden, q_width)?,
            q_norm: head_norm(n.q_norm)?,
            k_norm: head_norm(n.k_norm)?,
            side: None,
            head_adapter: None,
            spec: AttentionSpec {
                heads: c.heads,
                kv_heads: c.kv_heads,
                head_dim: c.head_dim,
                scale: c.attention_scale,
                causal: None,
                window: c.windows.get(index).copied().flatten(),
                softcap: c.attention_softcap,
                lengths: None,
            },
        };
        let down = self.linear(at(n.down), c.hidden, c.intermediate)?;
        let ffn = if c.gated {
            let gate_up = if n.gate_up.is_empty() {
                GateUp::Separate(GateAndUp {
                    gate: self.linear(at(n.gate), c.intermediate, c.hidden)?,
                    up: self.linear(at(n.up), c.intermediate, c.hidden)?,
                })
            } else {
                GateUp::Fused(self.linear(at(n.gate_up), 2 * c.intermediate, c.hidden)?)
            };
            Ffn::Gated(GatedMlp { gate_up, down, activation: c.activation })
        } else {
            let up = self.linear(at(n.up), c.intermediate, c.hidden)?;
            Ffn::Plain(Mlp { up, down, activation: c.activation })
        };
        let post = |part: &str| {
            if part.is_empty() { Ok(None) } else { self.norm(at(part), c.hidden).map(Some) }
        };
        Ok(Block {
            mixer_norm: self.norm(at(n.mixer_norm), c.hidden)?,
            mixer,
            ffn_norm: self.norm(at(n.ffn_norm), c.hidden)?,
            ffn,
            mixer_post_norm: post(n.mixer_post_norm)?,
            ffn_post_norm: post(n.ffn_post_norm)?,
            mixer_side: None,
            ffn_side: None,
            wiring: c.wiring,
        })
    }
}
